"""`python -m mlx_gptoss.metal.emulator`: run a kernel of a .metal file and print its report."""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from mlx_gptoss.errors import EmulatorError
from mlx_gptoss.metal.emulator import ptx
from mlx_gptoss.metal.emulator.buffer import ITEM_SIZES, Buffer
from mlx_gptoss.metal.emulator.build import Mode
from mlx_gptoss.metal.emulator.launch import Kernel, KernelFault, Order
from mlx_gptoss.metal.emulator.report import ALLOWABLE, Report
from mlx_gptoss.metal.emulator.source import read_metal
from mlx_gptoss.metal.emulator.strict import check_strict

EPILOG = """
Buffers are named as the kernel's parameters, which also give their dtypes:
  x[5,1000]     random values; if it is not const, an output that the kernel must write
  y[5]=0        filled with a value; a shape counts elements, so float4* v of 5 is v[5,4]
  n=1000        a single value
  w=@w.npy      the contents of a file (bfloat16 as uint16; any bytes for a struct)

Example:
  python -m mlx_gptoss.metal.emulator row_sum.metal 'row_sum<float>' 'x[5,1000]' 'y[5]' n=1000 \\
      --grid 640 --threadgroup 128
"""


def _size(text: str) -> tuple[int, int, int]:
    numbers = [int(n) for n in text.split(",")]
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not X, X,Y or X,Y,Z")
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


def _constant(text: str) -> tuple[str, bool | int | float]:
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, float(value) if "." in value else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE") from None


def _threadgroup_bytes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)=([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not INDEX=BYTES")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_gptoss.metal.emulator",
        description="Compile a Metal kernel for the CPU and run it with every check on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.metal", help="Metal source; local includes are followed")
    add("kernel", metavar="KERNEL", help="function, instance such as 'f<float>', or host name")
    add("buffers", nargs="*", metavar="BUFFER", help="what to bind, see below")
    add("--grid", type=_size, default=(1, 1, 1), help="threads of the grid, X[,Y[,Z]] (default 1)")
    add("--threadgroup", type=_size, default=(1, 1, 1), help="threads of a threadgroup (default 1)")
    add("--threadgroups", type=int, metavar="N", help="run only N threadgroups, evenly spread")
    add("--order", choices=["forward", "reverse", "both"], default="both", help="(default both)")
    add(
        "--mode",
        choices=[m.value for m in Mode],
        default="instrumented",
        help="(default %(default)s)",
    )
    add("--constant", type=_constant, action="append", default=[], metavar="NAME=VALUE",
        help="a function constant")  # fmt: skip
    add("--threadgroup-bytes", type=_threadgroup_bytes, action="append", default=[],
        metavar="INDEX=BYTES", help="size of a [[threadgroup(INDEX)]] argument")  # fmt: skip
    add("--include", type=Path, action="append", default=[], metavar="DIR", help="of #include")
    add(
        "--allow",
        choices=sorted(ALLOWABLE),
        action="append",
        default=[],
        help="a check that does not count",
    )
    add("--strict", action="store_true", help="check address spaces first")
    add("--ptx", action="store_true", help="print registers and instructions of NVIDIA's back end")
    add("--json", action="store_true", help="print the reports as JSON, one a line")
    return parser


def _buffer(kernel: Kernel, text: str) -> tuple[str, Buffer]:
    match = re.fullmatch(r"(\w+)(?:\[([\d,]+)\])?(?:=(.+))?", text)
    if match is None or (match[2] is None and match[3] is None):
        raise EmulatorError(f"buffer {text!r}: expected name[shape], name=value or name=@file.npy")
    name, shape_text, value = match.groups()
    types = kernel.types
    if name not in types:
        raise EmulatorError(f"buffer {text!r}: the kernel has {', '.join(types) or 'none'}")
    dtype = types[name].dtype.decode()
    if value and value.startswith("@"):
        return name, _from_file(Path(value[1:]), dtype)
    if dtype not in ITEM_SIZES:
        raise EmulatorError(f"buffer {name!r} is a struct: bind a file, {name}=@file.npy")
    shape = tuple(int(n) for n in shape_text.split(",")) if shape_text else ()
    if value is not None:
        return name, _typed(np.full(shape, float(value)), dtype)
    if not types[name].read_only:
        return name, Buffer.empty(shape, dtype)
    rng = np.random.default_rng(0)
    normal = dtype in ("float32", "float16", "bfloat16")
    values = rng.standard_normal(shape) if normal else rng.integers(0, 100, shape)
    return name, _typed(values, dtype)


def _typed(values: np.ndarray, dtype: str) -> Buffer:
    if dtype != "bfloat16":
        return Buffer.of(values.astype(dtype))
    bits = values.astype(np.float32).view(np.uint32)
    return Buffer.of((bits >> 16).astype(np.uint16), dtype="bfloat16")


def _from_file(path: Path, dtype: str) -> Buffer:
    try:
        array = np.load(path)
    except (OSError, ValueError) as error:
        raise EmulatorError(f"{path}: not a .npy file: {error}") from error
    raw = dtype == "" or (dtype == "bfloat16" and array.dtype == np.uint16)
    return Buffer.of(array, dtype=dtype if raw else None)


def _run(kernel: Kernel, options: argparse.Namespace) -> list[Report]:
    orders: list[Order] = ["forward", "reverse"] if options.order == "both" else [options.order]
    reports = []
    for order in orders:
        buffers = dict(_buffer(kernel, text) for text in options.buffers)
        try:
            report = kernel(
                buffers,
                grid=options.grid,
                threadgroup=options.threadgroup,
                order=order,
                threadgroups=options.threadgroups,
                threadgroup_bytes=dict(options.threadgroup_bytes),
                allow=options.allow,
            )
        except KernelFault as fault:
            report = fault.report
        reports.append(report)
    return reports


def _print(report: Report, *, table: bool) -> None:
    done = f"{report.threadgroups_run} of {report.threadgroups_total} threadgroups"
    print(f"{report.kernel}, {report.order} order: {done}, {report.seconds:.3f} s on this CPU")
    print(f"threadgroup memory {report.threadgroup_bytes} bytes")
    for finding in report.findings:
        print(f"FAULT {finding}")
    if not table or not report.lines:
        return
    print(report.table())
    for name, t in report.buffer_traffic.items():
        if t.instructions:
            print(
                f"{name}: {t.bytes_requested} bytes requested, {t.instruction_sectors} sectors and "
                f"{t.lines128} lines touched, {t.distinct_sectors} distinct sectors per threadgroup"
            )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 0 if the kernel is clean, 1 if not."""
    options = _parser().parse_args(arguments)
    try:
        source = read_metal(options.file, roots=options.include)
        constants = dict(options.constant)
        if options.strict:
            check_strict(source, options.kernel)
        if options.ptx:
            made = ptx.build(source, options.kernel, constants=constants)
            registers = "unknown (no ptxas)" if made.registers is None else made.registers
            print(f"PTX: registers {registers}, stack {made.stack_bytes} bytes")
            print("  ".join(f"{op} {n}" for op, n in made.instructions.most_common(12)))
        kernel = Kernel(source, options.kernel, mode=Mode(options.mode), constants=constants)
        reports = _run(kernel, options)
    except (EmulatorError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for number, report in enumerate(reports):
        if options.json:
            print(report.to_json())
        else:
            _print(report, table=number == 0)
    return int(any(r.findings for r in reports))


if __name__ == "__main__":
    sys.exit(main())
