"""Whether a GGUF file's header is whole, before llama.cpp reads it: on some damaged ones it ends
the process.

Format: docs/gguf.md in ggml's repository.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path

from fastft.errors import FastFTError

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value
STRING, ARRAY = 8, 9
MOST_TENSORS, MOST_KEYS, DEEPEST = 1_000_000, 100_000, 4


def check_header(path: Path) -> None:
    """Raise FastFTError unless everything that the file's header names lies inside the file."""
    if not path.is_file():
        raise FastFTError(f"{path} is not a file; a GGUF file is expected.")
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise FastFTError(
                f"{path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _Header(data).check()
            except (struct.error, ValueError) as error:
                raise FastFTError(
                    f"{path} is damaged or cut off: {error}. Export or download it again."
                ) from error


class _Header:
    """A cursor over the file; raises ValueError or struct.error where something cannot be."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def check(self) -> None:
        """Walk through all keys and tensors."""
        version = self.number("<I")
        if version not in {2, 3}:
            raise ValueError(f"its version is {version}, not 2 or 3")
        tensors, keys = self.number("<Q"), self.number("<Q")
        if not 0 < keys <= MOST_KEYS or tensors > MOST_TENSORS:
            raise ValueError(f"it claims {tensors:,} tensors and {keys:,} keys")
        alignment = 32
        for _ in range(keys):
            name, kind = self.text(), self.number("<I")
            if name == b"general.alignment" and kind == 4:
                alignment = self.number("<I")
            else:
                self.value(kind)
        if alignment <= 0 or alignment % 8:
            raise ValueError(f"its alignment is {alignment}")
        found = [self.tensor() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        for name, offset, size in found:
            if start + offset + size > len(self.data):
                shown = name.decode("utf-8", "replace")[:80]
                raise ValueError(f"the data of {shown} is not within the file bounds")

    def number(self, form: str) -> int:
        """Read one number."""
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return int(value)

    def skip(self, size: int) -> None:
        """Step over `size` bytes, which must be there."""
        if self.at + size > len(self.data):
            raise ValueError(f"at byte {self.at:,} it promises {size:,} bytes, more than follow")
        self.at += size

    def text(self) -> bytes:
        """Read a text with its length in front."""
        size, start = self.number("<Q"), self.at
        self.skip(size)
        return self.data[start : self.at] if size < 1000 else b""

    def value(self, kind: int, depth: int = 0) -> None:
        """Step over one value."""
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == STRING:
            self.skip(self.number("<Q"))
        elif kind == ARRAY and depth < DEEPEST:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in SIZES:
                self.skip(SIZES[inner] * count)
            elif count > len(self.data):
                raise ValueError(f"an array claims {count:,} entries")
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise ValueError(f"a value is of the unknown type {kind}")

    def tensor(self) -> tuple[bytes, int, int]:
        """Read one tensor's entry: (name, offset, bytes)."""
        import gguf

        name, dimensions = self.text(), self.number("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        shape = [self.number("<Q") for _ in range(dimensions)]
        kind, offset = self.number("<I"), self.number("<Q")
        sizes = {int(t): size for t, size in gguf.GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            return name, offset, 0  # a type that this gguf does not know: llama.cpp decides
        block, size = sizes[kind]
        if shape[0] % block:
            raise ValueError(f"a row of {shape[0]:,} values cannot be of type {kind}")
        return name, offset, prod(shape) // block * size
