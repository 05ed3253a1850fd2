"""How files are written and told apart, once for the whole package.

`written_aside` is how anything is made: under another name first, so that a reader sees the old or
the new, never a part. `sha256` is what tells files apart. A mirror lies on a file system that
nobody can trust (a network drive that fills, vanishes, cuts files short), so every touch of it goes
through a `Files`: tests hand in one that fails in a chosen way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastft.errors import CouldNotFinishError, FastFTError
from fastft.secrets import redact

# so that a copy gives way to training, and a stall is seen, at least once a MiB
CHUNK_BYTES = 2**20


class Files:
    """The real file system. Everything raises OSError, and nothing makes a missing parent
    folder.
    """

    def read(self, path: Path) -> Iterator[bytes]:
        """Yield the content of `path` in pieces of at most CHUNK_BYTES."""
        with path.open("rb", buffering=0) as file:
            # what is read back shall come from the disk, where the system allows it
            _forget_cached(file.fileno())
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write `chunks` to `path` and have the kernel put them on the disk."""
        with path.open("wb", buffering=0) as file:
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    left = left[file.write(left) :]
            with contextlib.suppress(OSError):
                # not every network file system knows fsync; reading back decides
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


@contextlib.contextmanager
def written_aside(
    path: Path, is_ours: Callable[[str], bool] = lambda name: True, *, ending: str = ""
) -> Iterator[Path]:
    """Yield a name beside `path` for a new file or folder, which becomes `path` when the block ends
    well and vanishes otherwise.

    What lies in a folder that is replaced and is not `is_ours(name)` is carried over. What a killed
    process left is tidied first. `ending` keeps an unfinished file from being taken for a whole one
    by its name's ending.
    """
    aside = path.with_name(f".writing-{path.name}{ending}")
    recover(path)
    LOCAL.remove(aside)
    try:
        yield aside
        put_in_place(aside, path, is_ours)
    except BaseException:
        LOCAL.remove(aside)
        raise


def recover(path: Path) -> None:
    """Put the old folder back where a kill fell between the two renames of `put_in_place`."""
    if _old(path).is_dir() and not path.exists():
        os.replace(_old(path), path)
    LOCAL.remove(_old(path))


def put_in_place(
    aside: Path, path: Path, is_ours: Callable[[str], bool] = lambda name: True
) -> None:
    """Have the kernel put the file or folder `aside` on the disk, then give it the name `path`."""
    if path.is_dir():
        carry_foreign(path, aside, is_ours)
    for written in (*aside.rglob("*"), aside):
        if not written.is_symlink():
            flush(written)
    if path.is_dir():
        # Renamed, not deleted in place: nobody sees half of it.
        os.replace(path, _old(path))
    os.replace(aside, path)
    flush(path.parent)
    LOCAL.remove(_old(path))


def _old(path: Path) -> Path:
    return path.with_name(f".writing-old-{path.name}")


LONGEST_JSON = 512 * 2**20
"""Bytes; the largest tokenizer.json in use has 35 MB."""


def read_json(
    path: Path, advice: str = "Restore the file, or download it again."
) -> dict[str, Any]:
    """Return the JSON object in a file that anybody may have written.

    Raises FastFTError where it cannot be read, is no plain file (a pipe would be waited for), no
    text, no JSON or no object; `advice` ends the message.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST_JSON:
            raise FastFTError(
                f"{path} is no plain file of at most {LONGEST_JSON:,} bytes. {advice}"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastFTError(f"{path} cannot be read: {error.strerror}. {advice}") from error
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise FastFTError(f"{path} is not valid JSON: {why}. {advice}") from error
    if not isinstance(values, dict):
        raise FastFTError(f"{path} is not valid JSON for its name: no object. {advice}")
    return values


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all and without any key that stands in it; an
    OSError becomes a clear message.
    """
    with clear_errors(path.parent), written_aside(path) as aside:
        aside.write_text(redact(text), encoding="utf-8", newline="\n")


def sha256(path: Path) -> str:
    """Return the hex sha256 of a file, or of the names and hashes of all files below a folder.

    Hidden files are left out: a file manager puts them into a folder by itself.
    """
    if path.is_dir():
        total = hashlib.sha256()
        for inner in sorted(p for p in path.rglob("[!.]*") if p.is_file()):
            total.update(f"{inner.relative_to(path).as_posix()}\0{sha256(inner)}\n".encode())
        return total.hexdigest()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def clear_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says while something is written below `folder` into one clear
    message.
    """
    try:
        yield
    except PermissionError as error:
        raise FastFTError(
            f"{folder} cannot be written: permission denied. Set output_dir to a folder of yours."
        ) from error
    except NotADirectoryError as error:
        raise FastFTError(f"{folder} cannot be made: a file stands in the way.") from error
    except FileExistsError as error:
        raise FastFTError(f"{folder} cannot be made: a file of that name exists.") from error
    except OSError as error:
        raise disk_error(error, folder) from error


def disk_error(error: OSError, folder: Path) -> CouldNotFinishError:
    """Return the clear form of an OSError while writing: how much is free and what to do."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    what: object = error.strerror or error
    if isinstance(error, shutil.Error) and error.args and error.args[0]:
        what = error.args[0][0][-1]  # of a folder that was copied: the first file's own message
    return CouldNotFinishError(
        f"could not write below {folder}: {what} ({free / 2**20:,.0f} MiB "
        "free). The last checkpoint is "
        "whole. Make room or set output_dir to another disk, then run the same command again."
    )
