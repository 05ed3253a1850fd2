"""How fastft knows its own files again: nothing that it did not write is ever replaced.

A text ends with a line that holds the sha256 of what stands above it, so one that somebody changed
is theirs. A GGUF file and a picture name fastft in their headers. Folders have a manifest
(runs/checkpoint.py) or a mark in their weights (exporting/merged.py).
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from fastft.errors import FastFTError
from fastft.secrets import redact

NAME = "fastft"
GGUF_KEY = "general.quantized_by"
PNG = {"Author": NAME}
"""What matplotlib's `savefig(metadata=...)` writes into a picture."""
HEAD_BYTES = 2**16
_SIGNATURE = re.compile(
    r"^.*written by fastft, sha256 of what stands above: ([0-9a-f]{64}).*\n\Z", re.MULTILINE
)


def signed(text: str, comment: str = "# {}") -> str:
    """Return `text` without any key that stands in it, and with a last line that signs it.

    `comment` is a comment of the file's language, with {} for its content.
    """
    text = redact(text)
    line = f"written by fastft, sha256 of what stands above: {_sha256(text)}"
    return text + comment.format(line) + "\n"


def is_ours(path: Path) -> bool:
    """Whether the file `path` is as fastft wrote it: a .gguf, a .png, or a text that is signed."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if path.suffix == ".gguf":
            return _gguf_text(GGUF_KEY) + struct.pack("<I", 8) + _gguf_text(NAME) in head
        if path.suffix == ".png":
            return f"Author\0{NAME}".encode() in head
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    found = _SIGNATURE.search(text)
    return found is not None and _sha256(text[: found.start()]) == found[1]


def refuse_foreign(paths: Iterable[Path]) -> None:
    """Raise one FastFTError that names each of `paths` that exists and is not fastft's."""
    foreign = [path for path in paths if (path.is_symlink() or path.exists()) and not is_ours(path)]
    if foreign:
        names = ", ".join(path.name for path in foreign)
        raise FastFTError(
            f"{names} in {foreign[0].parent} would be replaced, but was not written by fastft or "
            "was changed since. Move it away, or choose another --out."
        )


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
