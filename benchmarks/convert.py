"""Time and memory of a conversion, against a plain copy of the same files on the same disk.

    python benchmarks/convert.py --folder DISK [--size full20b] [--rounds 5] [--dense bf16]

Writes a random checkpoint (see make_checkpoint.py) into DISK, unless it is there, and then copies
and converts it in turn, each time from a cold page cache. Both end when the bytes are durable
(fsync). Processor time is given too, because other work on the machine stretches the rest. Peak
memory is that of a process which does nothing else, less that of an empty interpreter. Verification
is timed apart. Needs three times the checkpoint's size; everything but the checkpoint is removed.
The targets: <= 0.25 GiB, and <= 2 x the copy. The last line is JSON.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from mlx_gptoss.machine import read_machine

TARGET_GIB = 0.25
TARGET_RATIO = 2.0
MEASURE = """
import os, resource, sys, time

def peak():
    if os.path.exists("/proc/self/status"):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def cpu():
    return sum(os.times()[:2])
"""
EMPTY = MEASURE + "print(peak())"
COPY = (
    MEASURE
    + """
import shutil
from pathlib import Path
source, target = map(Path, sys.argv[1:3])
begin, used = time.perf_counter(), cpu()
target.mkdir()
for path in sorted(source.iterdir()):
    shutil.copyfile(path, target / path.name)
    with (target / path.name).open("rb") as file:
        os.fsync(file.fileno())
print([time.perf_counter() - begin, cpu() - used])
"""
)
CONVERT = (
    MEASURE
    + """
from mlx_gptoss.convert import convert_checkpoint
marks = {}

def progress(phase, done, total):
    marks.setdefault(phase, cpu())

report = convert_checkpoint(sys.argv[1], sys.argv[2], dense=sys.argv[3], progress=progress)
used = marks["verifying"] - marks["converting"]
print([report.convert_s, used, report.verify_s, peak(), report.weight_bytes])
"""
)


def python(code: str, *arguments: str | Path) -> str:
    """The output of a program in a new interpreter."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def forget_cached(folder: Path) -> None:
    """Take a folder's files out of the page cache, where the system offers it."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(program: str, source: Path, target: Path, *more: str) -> list[float]:
    """What a program prints of itself, started with the source out of the page cache."""
    forget_cached(source)
    result = json.loads(python(program, source, target, *more))
    shutil.rmtree(target)
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    ordered = sorted(values)
    middle = statistics.median(ordered)
    return {"median": round(middle, 3), "min": round(ordered[0], 3), "max": round(ordered[-1], 3)}


def make_source(folder: Path, size: str) -> Path:
    """The checkpoint to convert, made by another process so that this one stays small."""
    source = folder / f"convert-{size}"
    if not source.exists():
        script = Path(__file__).with_name("make_checkpoint.py")
        subprocess.run([sys.executable, script, source, "--size", size], check=True)
    return source


def commit() -> str:
    """The version of the code under test."""
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    return subprocess.run(command, cwd=here, stdout=subprocess.PIPE, text=True).stdout.strip()


def measure(source: Path, folder: Path, dense: str, rounds: int) -> dict[str, object]:
    """Copy and convert in turn, so that a change of the disk's speed meets both."""
    interpreter = int(python(EMPTY))
    copies, conversions = [], []
    for n in range(rounds):
        copies.append(run(COPY, source, folder / "convert-copy"))
        conversions.append(run(CONVERT, source, folder / "convert-result", dense))
        print(
            f"{n + 1}: copy {copies[-1][0]:.1f} s, convert {conversions[-1][0]:.1f} s, "
            f"verify {conversions[-1][2]:.1f} s",
            flush=True,
        )
    copy_s, copy_cpu_s = zip(*copies, strict=True)
    convert_s, cpu_s, verify_s, peaks, weight_bytes = zip(*conversions, strict=True)
    ratios = [ours / plain for ours, plain in zip(convert_s, copy_s, strict=True)]
    return {
        "dense": dense,
        "weight_bytes": weight_bytes[0],
        "copy_s": spread(copy_s),
        "copy_cpu_s": spread(copy_cpu_s),
        "convert_s": spread(convert_s),
        "convert_cpu_s": spread(cpu_s),
        "convert_over_copy": spread(ratios),
        "verify_s": spread(verify_s),
        "peak_gib_above_interpreter": spread([(p - interpreter) / 2**30 for p in peaks]),
        "interpreter_gib": round(interpreter / 2**30, 4),
    }


def main() -> None:
    """Parse the arguments, measure, and print the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=["mini", "full20b", "finetune"], default="full20b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense", choices=["bf16", "q8", "q4"], nargs="+", default=["bf16"])
    arguments = parser.parse_args()
    source = make_source(arguments.folder, arguments.size)
    rows = [measure(source, arguments.folder, d, arguments.rounds) for d in arguments.dense]
    record = {
        "benchmark": "convert",
        "date": date.today().isoformat(),
        "commit": commit(),
        "size": arguments.size,
        "rounds": arguments.rounds,
        "machine": platform.platform(),
        "processor": read_machine().cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "targets": {"convert_over_copy": TARGET_RATIO, "peak_gib_above_interpreter": TARGET_GIB},
        "rows": rows,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
