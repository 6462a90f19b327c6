"""Source lines of a library's machine addresses, read from its DWARF 4 line table.

Only what clang writes with `-gline-tables-only -gdwarf-4` in a 64-bit little-endian ELF file. No
tool is asked: binutils and LLVM's symbolizer may be missing where the compiler comes in a wheel.
Source: DWARF Debugging Information Format, version 4, section 6.2.
"""

import bisect
import struct
from pathlib import Path


class LineTable:
    """Maps offsets in a shared library to (file, line)."""

    def __init__(self, library: Path) -> None:
        """Read the line table; a library without one maps nothing."""
        rows: list[tuple[int, str, int]] = []
        section = _section(library.read_bytes(), ".debug_line")
        at = 0
        while at + 4 <= len(section):
            (length,) = struct.unpack_from("<I", section, at)
            rows += _Program(section[at + 4 : at + 4 + length]).rows()
            at += 4 + length
        rows.sort(key=lambda row: row[0])
        self._addresses = [row[0] for row in rows]
        self._rows = rows

    def __call__(self, offset: int) -> tuple[str, int]:
        """Return the file and line of the instruction at or before an offset, or ("?", 0)."""
        at = bisect.bisect_right(self._addresses, offset) - 1
        return self._rows[at][1:] if at >= 0 else ("?", 0)


def _section(elf: bytes, name: str) -> bytes:
    """The contents of an ELF section, empty if there is none."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return b""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, offset + i * size) for i in range(count)]
    strings = headers[names][4]
    for header in headers:
        start = strings + header[0]
        if elf[start : elf.index(b"\0", start)] == name.encode():
            return elf[header[4] : header[4] + header[5]]
    return b""


class _Program:
    """One line number program: a state machine whose opcodes append rows."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        version, header_length = struct.unpack("<HI", self.take(6))
        if version != 4:
            raise ValueError(f"DWARF line table of version {version}, expected 4")
        self.start = self.at + header_length
        self.minimum_length, _, _ = self.take(3)
        (self.line_base,) = struct.unpack("<b", self.take(1))
        self.line_range, self.opcode_base = self.take(2)
        self.argument_counts = self.take(self.opcode_base - 1)
        while self.string():  # directories: names of files are enough here
            pass
        self.files = ["?"]
        while name := self.string():
            self.files.append(name)
            for _ in range(3):  # directory, time, size
                self.unsigned()

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def string(self) -> str:
        end = self.data.index(b"\0", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def signed(self) -> int:
        start = self.at
        value = self.unsigned()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) else value

    def _add(self, found: list[tuple[int, str, int]], address: int, file: int, line: int) -> None:
        if line:  # code of no line in particular continues the line before it
            found.append((address, self.files[file], line))

    def rows(self) -> list[tuple[int, str, int]]:
        """Run the program; the end of a sequence is a row of line 0, which maps to nothing."""
        self.at, found = self.start, []
        address, file, line = 0, 1, 1
        while self.at < len(self.data):
            opcode = self.take(1)[0]
            if opcode >= self.opcode_base:
                step = opcode - self.opcode_base
                address += step // self.line_range * self.minimum_length
                line += self.line_base + step % self.line_range
                self._add(found, address, file, line)
            elif opcode == 0:
                length = self.unsigned()
                body = self.take(length)
                if body[0] == 1:  # end of sequence
                    found.append((address, "?", 0))
                    address, file, line = 0, 1, 1
                elif body[0] == 2:
                    address = int.from_bytes(body[1:], "little")
            elif opcode == 1:
                self._add(found, address, file, line)
            elif opcode == 2:
                address += self.unsigned() * self.minimum_length
            elif opcode == 3:
                line += self.signed()
            elif opcode == 4:
                file = self.unsigned()
            elif opcode == 8:
                address += (255 - self.opcode_base) // self.line_range * self.minimum_length
            elif opcode == 9:
                address += int.from_bytes(self.take(2), "little")
            else:
                for _ in range(self.argument_counts[opcode - 1]):
                    self.unsigned()
        return found
