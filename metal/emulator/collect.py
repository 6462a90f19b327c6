"""Turns what the runtime recorded into a report: addresses become source lines."""

import functools
from collections.abc import Callable
from pathlib import Path

from mlx_gptoss.metal.emulator import runtime
from mlx_gptoss.metal.emulator.dwarf import LineTable
from mlx_gptoss.metal.emulator.report import CHECKS, Counts, Finding, Report, Traffic

Place = Callable[[int], tuple[str, int]]
_line_table = functools.lru_cache(maxsize=64)(LineTable)


def _file_name(path: bytes | None) -> str:
    return Path(path.decode()).name if path else "?"


def collect(
    report: Report,
    result: runtime.ResultRecord,
    buffers: list[runtime.BufferRecord],
    *,
    library: Path,
    allowed: int,
) -> None:
    """Fill a report.

    Args:
        report: Of this launch, still empty.
        result: What the runtime returned; valid until the next launch.
        buffers: The bound buffers, in the runtime's order.
        library: Of the kernel, for its line table.
        allowed: Bit set of checks that do not count.
    """
    lines = _line_table(library)

    def place(pc: int) -> tuple[str, int]:
        # a return address: the call lies before it
        file, line = lines(pc - 1 - result.image_base) if pc else ("?", 0)
        return Path(file).name, line

    report.threadgroups_run = result.threadgroups_run
    report.threadgroup_bytes = result.threadgroup_bytes
    _collect_findings(report, result, buffers, place)
    if report.mode == "instrumented":
        _collect_counts(report, result, buffers, place)
        complete = report.threadgroups_run == report.threadgroups_total
        if complete and not result.stopped and not allowed >> CHECKS.index("unwritten-output") & 1:
            _find_unwritten(report, buffers)


def _collect_findings(
    report: Report,
    result: runtime.ResultRecord,
    buffers: list[runtime.BufferRecord],
    place: Place,
) -> None:
    for record in result.findings[: result.finding_count]:
        site = record.site
        file, line = (_file_name(site.file), site.line) if site.line else place(record.pc)
        buffer = buffers[record.buffer].name.decode() if record.buffer >= 0 else None
        text = record.text.decode(errors="replace")
        check = CHECKS[record.check]
        report.findings.append(
            Finding(check, report.kernel, file, line, buffer, text, record.occurrences)
        )


def _collect_counts(
    report: Report,
    result: runtime.ResultRecord,
    buffers: list[runtime.BufferRecord],
    place: Place,
) -> None:
    traffic = {b.name.decode(): [0, 0, 0, b.distinct_load_sectors, 0, 0] for b in buffers}
    for a in result.accesses[: result.access_count]:
        counts = report.lines[place(a.pc)]
        if a.buffer < 0:
            kind = "threadgroup_load" if a.kind == runtime.LOAD else "threadgroup_store"
            counts.bank_conflicts += a.conflicts
            increments = {f"{kind}s": a.instructions, f"{kind}_bytes": a.bytes}
        elif a.kind == runtime.LOAD:
            row = traffic[buffers[a.buffer].name.decode()]
            for i, n in (
                (0, a.bytes),
                (1, a.sectors),
                (2, a.lines),
                (4, a.instructions),
                (5, a.lanes),
            ):
                row[i] += n
            increments = {"loads": a.instructions, "load_lanes": a.lanes, "load_bytes": a.bytes,
                          "load_sectors": a.sectors, "load_lines128": a.lines}  # fmt: skip
        else:
            increments = {"stores": a.instructions, "store_bytes": a.bytes,
                          "store_sectors": a.sectors, "store_lines128": a.lines}  # fmt: skip
        for name, value in increments.items():
            setattr(counts, name, getattr(counts, name) + value)
    sync_fields = (
        "simd_operations",
        "matrix_operations",
        "threadgroup_barriers",
        "simdgroup_barriers",
    )
    for s in result.syncs[: result.sync_count]:
        counts: Counts = report.lines[_file_name(s.site.file), s.site.line]
        name = sync_fields[s.kind]
        setattr(counts, name, getattr(counts, name) + s.count)
    report.buffer_traffic = {name: Traffic(*row) for name, row in traffic.items()}


def _find_unwritten(report: Report, buffers: list[runtime.BufferRecord]) -> None:
    for b in buffers:
        name = b.name.decode()
        if not b.flags & runtime.WRITABLE:
            continue
        report.stored_bytes[name] = b.bytes_written
        if not b.flags & runtime.INITIALISED and b.bytes_written < b.size:
            text = (
                f"{b.size - b.bytes_written} of {b.size} bytes of '{name}' are never written, the "
                f"first is byte {b.first_unwritten}"
            )
            finding = Finding("unwritten-output", report.kernel, "?", 0, name, text)
            report.findings.append(finding)
