"""A screen for tests of windows: an X server without a monitor, whose pixels can be read.

Xvfb writes its picture into a file, an X window dump, so that no client is needed to see it.
"""

import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from types import TracebackType

import pytest

SIZE = "640x480"  # of the screen: the chat window fills it


class Screen:
    """An X server of its own; use it in a `with` block.

    Args:
        folder: For its picture.

    Attributes:
        display: For DISPLAY, as in ":7".
    """

    def __init__(self, folder: Path):
        self._picture = folder / "Xvfb_screen0"
        read, write = os.pipe()
        options = ["-screen", "0", f"{SIZE}x24", "-fbdir", str(folder), "-nolisten", "tcp"]
        self._server = subprocess.Popen(
            ["Xvfb", *options, "-displayfd", str(write)],
            pass_fds=[write],
            stderr=subprocess.DEVNULL,
        )
        os.close(write)
        with os.fdopen(read) as answer:  # ends if the server does
            self.display = f":{answer.readline().strip()}"

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.terminate()
        self._server.wait(10)

    def rows(self) -> list[bytes]:
        """The screen's rows of red, green, blue bytes, from the top."""
        dump = self._picture.read_bytes()
        fields = struct.unpack(">25I", dump[:100])
        header_bytes, width, height = fields[0], fields[4], fields[5]
        row_bytes, colors = fields[12], fields[19]
        assert (fields[1], fields[11]) == (7, 32), "an X window dump, 32 bits a pixel"
        start = header_bytes + 12 * colors
        rows = []
        for at in range(start, start + height * row_bytes, row_bytes):
            pixels = dump[at : at + 4 * width]  # blue, green, red, nothing
            row = bytearray(3 * width)
            row[0::3], row[1::3], row[2::3] = pixels[2::4], pixels[1::4], pixels[0::4]
            rows.append(bytes(row))
        return rows


def screen_or_skip(folder: Path) -> Screen:
    """A screen, where windows can be shown on one."""
    pytest.importorskip("tkinter", reason="this Python has no Tk")
    if not shutil.which("Xvfb"):
        pytest.skip("Xvfb is not installed: no screen to show windows on")
    return Screen(folder)


def png(rows: list[bytes]) -> bytes:
    """Rows of red, green, blue bytes as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">2I5B", len(rows[0]) // 3, len(rows), 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + row for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines, 9))
        + chunk(b"IEND", b"")
    )
