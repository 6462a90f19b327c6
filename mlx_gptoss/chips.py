"""Apple's chips as data: memory sizes, bandwidth, GPU cores, and the GPU's default memory limit.

Used where no Mac can be asked: to plan for a machine one does not have, and to state how much of a
chip's bandwidth a measurement reaches. On a Mac, Metal's own answers win over this table.

Sources: memory sizes, core counts and bandwidth are those of Apple's technical specifications
(support.apple.com/docs, one page a machine; apple.com/newsroom for M5, M5 Pro and M5 Max). A chip
that Apple sells with two bandwidths has two rows, told apart by GPU cores.
"""

from dataclasses import dataclass

from mlx_gptoss.errors import MachineError

GIB = 2**30
TERA_PER_CORE = (0.331, 0.358, 0.41, 0.46, 0.46)  # of M1 to M5: 128 x 2 x the GPU's clock
TERA_OF_M3_ULTRA = 0.354
MATRIX_UNITS_OVER_ALU = 4


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip: `memory_gib` are the sizes it is sold with, `bandwidth` is in 10^9 bytes/s."""

    name: str
    gpu_cores: tuple[int, ...]
    memory_gib: tuple[int, ...]
    bandwidth_gb_per_s: float

    @property
    def generation(self) -> int:
        """1 for M1 and its larger siblings, and so on; M5's GPU is the first with matrix units."""
        return int(self.name[1])

    @property
    def has_matrix_units(self) -> bool:
        """Whether the GPU multiplies matrices in units made for it."""
        return self.generation >= 5

    @property
    def alu_flop_per_s(self) -> float:
        """Peak of the GPU's ordinary arithmetic, to a tenth: float32 and float16 alike."""
        each = TERA_PER_CORE[self.generation - 1] if self.name != "M3 Ultra" else TERA_OF_M3_ULTRA
        return max(self.gpu_cores) * each * 1e12

    @property
    def flop_per_s(self) -> float:
        """Peak of matrix products; where there are matrix units, a projection."""
        return self.alu_flop_per_s * (MATRIX_UNITS_OVER_ALU if self.has_matrix_units else 1)


def _chip(name: str, cores: str, memory: str, bandwidth: float) -> Chip:
    return Chip(
        name=name,
        gpu_cores=tuple(map(int, cores.split())),
        memory_gib=tuple(map(int, memory.split())),
        bandwidth_gb_per_s=bandwidth,
    )


CHIPS = (
    _chip("M1", "7 8", "8 16", 68.25),
    _chip("M1 Pro", "14 16", "16 32", 200),
    _chip("M1 Max", "24 32", "32 64", 400),
    _chip("M1 Ultra", "48 64", "64 128", 800),
    _chip("M2", "8 10", "8 16 24", 100),
    _chip("M2 Pro", "16 19", "16 32", 200),
    _chip("M2 Max", "30 38", "32 64 96", 400),
    _chip("M2 Ultra", "60 76", "64 128 192", 800),
    _chip("M3", "8 10", "8 16 24", 100),
    _chip("M3 Pro", "14 18", "18 36", 150),
    _chip("M3 Max", "30", "36 96", 300),
    _chip("M3 Max", "40", "48 64 128", 400),
    _chip("M3 Ultra", "60 80", "96 256 512", 819),
    _chip("M4", "8 10", "16 24 32", 120),
    _chip("M4 Pro", "16 20", "24 48 64", 273),
    _chip("M4 Max", "32", "36", 410),
    _chip("M4 Max", "40", "48 64 128", 546),
    _chip("M5", "8 10", "16 24 32", 153),
    _chip("M5 Pro", "16 20", "24 48 64", 307),
    _chip("M5 Max", "32", "36", 460),
    _chip("M5 Max", "40", "48 64 128", 614),
)


def find_chip(name: str, *, gpu_cores: int | None = None, memory_bytes: int | None = None) -> Chip:
    """The row of a chip, as macOS or a person spells it ("Apple M3 Max", "m3 max").

    Args:
        name: with or without "Apple", in any case.
        gpu_cores: tells apart the rows of a chip that has two; ignored where it has one.
        memory_bytes: the same, where the cores are not known.

    Returns:
        The row; of several that remain possible, the one with most bandwidth.

    Raises:
        MachineError: the table has no such chip.
    """
    plain = " ".join(name.lower().replace("apple", "").split())
    rows = [chip for chip in CHIPS if chip.name.lower() == plain]
    if not rows:
        known = ", ".join(dict.fromkeys(chip.name for chip in CHIPS))
        raise MachineError(f"chip: expected one of {known}; got {name!r}")
    if gpu_cores is not None:
        rows = [chip for chip in rows if gpu_cores in chip.gpu_cores] or rows
    if memory_bytes is not None:
        rows = [chip for chip in rows if memory_bytes // GIB in chip.memory_gib] or rows
    return max(rows, key=lambda chip: chip.bandwidth_gb_per_s)


def default_working_set_bytes(memory_bytes: int) -> int:
    """What Metal lets the GPU use by default, at least: its `recommendedMaxWorkingSetSize`.

    Two thirds of the memory up to 36 GiB, three quarters above: the values in public logs of
    macOS 13 to 15 (16 GiB: 10922 MiB, 64 GiB: 49152 MiB). Logs of macOS 26 show more (16 GiB:
    12124 MiB, 128 GiB: 107.5 GiB), so a plan by this rule is on the safe side.
    """
    if memory_bytes <= 36 * GIB:
        return memory_bytes * 2 // 3
    return memory_bytes * 3 // 4
