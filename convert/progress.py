"""How far a conversion is: bytes, rate and time left, told to whoever asked for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

INTERVAL_S = 0.1

Step = Literal["convert", "verify"]


@dataclass(frozen=True)
class Progress:
    """A step and where it stands; `seconds_left` is None until a rate is known."""

    step: Step
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    seconds_left: float | None


class Meter:
    """Counts bytes of one step and reports at most ten times a second, and at its end."""

    def __init__(
        self,
        step: Step,
        total_bytes: int,
        *,
        resumed_bytes: int,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self._step: Step = step
        self._total, self.resumed_bytes, self._done = total_bytes, resumed_bytes, resumed_bytes
        self.seconds = 0.0
        self._report = report
        self._began = self._told = time.monotonic()

    def stop(self) -> None:
        """Note how long the step took, in `seconds`."""
        self.seconds = time.monotonic() - self._began

    def add(self, nbytes: int) -> None:
        """Count bytes; resumed ones are done but do not count for the rate."""
        self._done += nbytes
        if self._report is None:
            return
        now = time.monotonic()
        if now - self._told < INTERVAL_S and self._done < self._total:
            return
        self._told = now
        rate = (self._done - self.resumed_bytes) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else None
        self._report(Progress(self._step, self._done, self._total, rate, left))
