"""The few file operations that checkpoints and the mirror are made of.

A mirror lies on a file system that nobody can trust (a network drive that fills, vanishes, cuts
files short), so every touch of it goes through a `Files`: tests hand in one that fails in a chosen
way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

CHUNK_BYTES = (
    2**20
)  # so that a copy gives way to training, and a stall is seen, at least once a MiB


class Files:
    """The real file system. Everything raises OSError, and nothing makes a missing parent folder."""

    def read(self, path: Path) -> Iterator[bytes]:
        """Yield the content of `path` in pieces of at most CHUNK_BYTES."""
        with path.open("rb", buffering=0) as file:
            _forget_cached(
                file.fileno()
            )  # what is read back shall come from the disk, where the system allows it
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write `chunks` to `path` and have the kernel put them on the disk."""
        with path.open("wb", buffering=0) as file:
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    left = left[file.write(left) :]
            with contextlib.suppress(
                OSError
            ):  # not every network file system knows fsync; reading back decides
                os.fsync(file.fileno())

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name; a file that has it already is replaced."""
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Delete a file or a folder with all in it; nothing happens where there is none."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        """Make one folder; its parent must exist (a drive that is not mounted is not to be made
        up).
        """
        path.mkdir(exist_ok=True)

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder, sorted."""
        return sorted(os.listdir(folder))

    def size(self, path: Path) -> int:
        """Return the bytes of a file; raises FileNotFoundError where there is none."""
        return path.stat().st_size

    def free_bytes(self, folder: Path) -> int:
        """Return how many bytes can still be written below `folder`."""
        return shutil.disk_usage(folder).free

    def digest(self, path: Path) -> tuple[str, int]:
        """Return (hex sha256, bytes) of a file as it is read."""
        sha256, size = hashlib.sha256(), 0
        for chunk in self.read(path):
            sha256.update(chunk)
            size += len(chunk)
        return sha256.hexdigest(), size


LOCAL = Files()


def flush(path: Path) -> None:
    """Have the kernel put a file or folder on the disk, so that a power cut does not undo the
    order of writing and renaming.
    """
    with contextlib.suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def carry_foreign(old: Path, new: Path, is_ours: Callable[[str], bool]) -> None:
    """Copy into `new` what `old` holds beyond fastft's own files, links as links.

    `is_ours` gets each path relative to `old`, with slashes. A file that `new` has already stays
    as it is.
    """
    for path in sorted(old.rglob("*")):
        relative = path.relative_to(old)
        if (path.is_dir() and not path.is_symlink()) or is_ours(relative.as_posix()):
            continue
        target = new / relative
        if not target.exists() and not target.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)


def _forget_cached(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
