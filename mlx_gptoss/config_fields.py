"""Taking fields out of a parsed JSON object strictly: each checked, and none overlooked."""

import sys
from collections.abc import Mapping
from typing import Any

from mlx_gptoss.errors import ConfigError


class Fields:
    """Takes fields out of a parsed JSON object, checking each, and knows what is left over."""

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = ""):
        self.raw, self.where, self.prefix = raw, where, prefix
        self.taken: set[str] = set()

    def error(self, name: str, problem: str) -> ConfigError:
        """The error to raise about a field."""
        return ConfigError(f"{self.where}: {self.prefix}{name}: {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null; it counts as known from now on."""
        self.taken.add(name)
        return self.raw.get(name) is not None

    def value(self, *names: str) -> Any:
        """The value under any of these spellings; none, or two that differ, is an error."""
        found = [name for name in names if self.has(name)]
        if not found:
            raise self.error(names[0], "missing; the computation depends on it")
        for other in found[1:]:
            if self.raw[other] != self.raw[found[0]]:
                raise self.error(
                    found[0], f"is {self.raw[found[0]]}, but {other} is {self.raw[other]}"
                )
        return self.raw[found[0]]

    def integer(self, *names: str, most: int = 2**31 - 1) -> int:
        """A whole number above 0; MLX counts in 32 bits."""
        value = self.value(*names)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(names[0], f"expected a whole number above 0, got {value!r}")
        if value > most:
            raise self.error(names[0], f"expected at most {most}, got {value}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A finite number above 0; the default where there is one and the field is missing."""
        if default is not None and not self.has(name):
            return default
        value = self.value(name)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 < value <= sys.float_info.max:
            raise self.error(name, f"expected a finite number above 0, got {value!r}")
        return float(value)

    def constant(self, name: str, expected: Any, *, required: bool = False) -> None:
        """A field with one value that this package computes with."""
        if (required or self.has(name)) and self.value(name) != expected:
            raise self.error(
                name, f"expected {expected!r}, got {self.raw[name]!r}; this is not a gpt-oss model"
            )

    def refuse_unknown(self, harmless: frozenset[str]) -> None:
        """Raise about the first field that was neither taken nor is harmless."""
        for name in sorted(set(self.raw) - self.taken - harmless):
            raise self.error(
                name, "unknown field; it may change the computation, so it is not ignored"
            )
