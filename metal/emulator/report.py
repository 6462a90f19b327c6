"""What a launch found and counted."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields

CHECKS = (  # the order of `Check` in runtime/launch.h, then those made in Python
    "out-of-bounds",
    "array-index",
    "read-only",
    "uninitialised-read",
    "threadgroup-race",
    "device-race",
    "lock-step",
    "divergent-barrier",
    "divergent-simd",
    "threadgroup-memory",
    "misaligned",
    "division-by-zero",
    "invalid-access",
    "unwritten-output",
    "too-many-threads",
)

# After these a kernel can go on; the others end it, so that nobody can allow them.
ALLOWABLE = frozenset(
    {
        "uninitialised-read",
        "threadgroup-race",
        "device-race",
        "lock-step",
        "divergent-barrier",
        "divergent-simd",
        "unwritten-output",
    }
)


@dataclass(frozen=True)
class Finding:
    """One fault of a kernel.

    Attributes:
        check: Which check found it, one of `CHECKS`.
        kernel: Name of the kernel.
        file: Source file, "?" if the place is unknown.
        line: Source line, 0 if unknown.
        buffer: Name of the device buffer concerned, or None.
        text: What happened: buffer, offset, thread.
        occurrences: How often at this place.
    """

    check: str
    kernel: str
    file: str
    line: int
    buffer: str | None
    text: str
    occurrences: int = 1

    def __str__(self) -> str:
        """One line: place, check, what happened."""
        place = f"{self.file}:{self.line}: " if self.line else ""
        again = f" ({self.occurrences} times)" if self.occurrences > 1 else ""
        return f"{place}{self.check} in kernel '{self.kernel}': {self.text}{again}"


@dataclass
class Counts:
    """Counters of one source line, or of a whole launch.

    An instruction is what the lanes of one simdgroup execute together; device loads and stores are
    counted per instruction: how many bytes its lanes asked for, how many 32-byte sectors and
    128-byte lines they touch. Loads from the constant address space count as device loads.
    """

    loads: int = 0
    load_lanes: int = 0
    load_bytes: int = 0
    load_sectors: int = 0
    load_lines128: int = 0
    stores: int = 0
    store_bytes: int = 0
    store_sectors: int = 0
    store_lines128: int = 0
    threadgroup_loads: int = 0
    threadgroup_load_bytes: int = 0
    threadgroup_stores: int = 0
    threadgroup_store_bytes: int = 0
    bank_conflicts: int = 0
    simd_operations: int = 0
    matrix_operations: int = 0
    simdgroup_barriers: int = 0
    threadgroup_barriers: int = 0

    def add(self, other: "Counts") -> None:
        """Add another's counters to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(frozen=True)
class Traffic:
    """Loads from one buffer, or from all.

    Attributes:
        bytes_requested: Sum over lanes and instructions.
        instruction_sectors: 32-byte sectors touched, summed over instructions.
        lines128: 128-byte lines touched, summed over instructions.
        distinct_sectors: Distinct sectors per threadgroup, summed over threadgroups: what must come
            from memory if each threadgroup has a perfect cache of its own.
        instructions: Load instructions executed by simdgroups.
        lanes: Lanes that took part in them.
    """

    bytes_requested: int
    instruction_sectors: int
    lines128: int
    distinct_sectors: int
    instructions: int
    lanes: int


@dataclass
class Report:
    """The outcome of one launch.

    Attributes:
        kernel: Name of the kernel.
        mode: "instrumented" or "plain".
        order: "forward" or "reverse".
        grid: Threads of the grid.
        threadgroup: Threads of a threadgroup.
        threadgroups_run: Threadgroups executed.
        threadgroups_total: Threadgroups of the grid; more than were run if sampled.
        threadgroup_bytes: Largest threadgroup memory in use.
        seconds: Wall time of the run, without compilation. Not a time of any GPU.
        findings: Faults, empty if clean.
        lines: Counters by (file, line).
        buffer_traffic: Loads by buffer name.
        stored_bytes: Bytes written at least once, by name of the writable buffers.
    """

    kernel: str
    mode: str
    order: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    threadgroups_total: int
    threadgroups_run: int = 0
    threadgroup_bytes: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    lines: dict[tuple[str, int], Counts] = field(default_factory=lambda: defaultdict(Counts))
    buffer_traffic: dict[str, Traffic] = field(default_factory=dict)
    stored_bytes: dict[str, int] = field(default_factory=dict)

    def totals(self) -> Counts:
        """The counters of the whole launch."""
        total = Counts()
        for counts in self.lines.values():
            total.add(counts)
        return total

    def traffic(self, buffer: str | None = None) -> Traffic:
        """Loads from one buffer, or from all of them.

        Raises:
            ValueError: The kernel has no buffer of that name.
        """
        if buffer is None:
            rows = [asdict(t) for t in self.buffer_traffic.values()]
            return Traffic(**{f.name: sum(r[f.name] for r in rows) for f in fields(Traffic)})
        if buffer not in self.buffer_traffic:
            raise ValueError(f"no buffer {buffer!r}; there are {', '.join(self.buffer_traffic)}")
        return self.buffer_traffic[buffer]

    def table(self) -> str:
        """The counters by source line as text."""
        heads = "loads bytes sectors lines128 stores bytes sectors tg_load tg_store conflicts simd "
        heads += "mma barriers"
        columns = ["source line", *heads.split()]
        rows = [columns]
        for (file, line), c in [*sorted(self.lines.items()), (("total", 0), self.totals())]:
            counts = (
                c.loads, c.load_bytes, c.load_sectors, c.load_lines128, c.stores, c.store_bytes,
                c.store_sectors, c.threadgroup_load_bytes, c.threadgroup_store_bytes,
                c.bank_conflicts, c.simd_operations, c.matrix_operations,
                c.threadgroup_barriers + c.simdgroup_barriers,
            )  # fmt: skip
            rows.append([f"{file}:{line}" if line else file, *map(str, counts)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        places = [row[0].ljust(widths[0]) for row in rows]
        counted = [[v.rjust(w) for v, w in zip(r[1:], widths[1:], strict=True)] for r in rows]
        return "\n".join(
            "  ".join(r) for r in ([p, *c] for p, c in zip(places, counted, strict=True))
        )

    def to_json(self) -> str:
        """The whole report as JSON; lines become a list of objects with `file` and `line`."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record["findings"] = [asdict(f) for f in self.findings]
        record["buffer_traffic"] = {n: asdict(t) for n, t in self.buffer_traffic.items()}
        record["lines"] = [
            {"file": file, "line": line, **asdict(c)}
            for (file, line), c in sorted(self.lines.items())
        ]
        record["totals"] = asdict(self.totals())
        return json.dumps(record)
