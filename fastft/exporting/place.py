"""Where exports go: one process at a time, and nothing that fastft did not write is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fastft.errors import CouldNotFinishError, FastFTError
from fastft.files import carry_foreign, flush
from fastft.locks import held

LOCK = ".fastft-export.lock"


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made where it is not there, against every other export and verify.

    Raises FastFTError where another process has it, or where the folder cannot be written.
    """

    def busy(holder: str) -> FastFTError:
        return FastFTError(
            f"{folder} is being written by {holder}. Wait for it, or choose another --out."
        )

    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder / LOCK, busy, remove=True))
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise FastFTError(
                f"{folder} cannot be written: {error.strerror}. Choose a folder of yours with --out."
            ) from error
        except OSError as error:
            if error.errno in {errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}:
                raise FastFTError(
                    f"{folder} cannot be written: {error.strerror}. Choose another --out."
                ) from error
            raise
        yield


@contextlib.contextmanager
def whole_or_nothing(
    out: Path, needed_bytes: int, is_ours: Callable[[str], bool]
) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` when the block ends well, and
    vanishes otherwise.

    What lies in an `out` that is replaced and is not `is_ours(name)` is carried over. What a
    killed process left behind under such a name is removed. Raises FastFTError where the disk has
    fewer than `needed_bytes` free, and CouldNotFinishError where it fills up.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _tidy(out)
    check_disk(out, needed_bytes)
    folder = out.parent / f".{out.name}.{os.getpid()}.partial"
    folder.mkdir()
    try:
        yield folder
        _swap(folder, out, is_ours)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise CouldNotFinishError(
            f"the disk of {out} is full ({needed_bytes:,} bytes were to be written)."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tidy(out: Path) -> None:
    """Remove what a killed process left; put back the old folder where the kill fell between the
    two renames.
    """
    for left in sorted(out.parent.glob(f".{out.name}.*.partial")):
        if not re.fullmatch(r"\.\d+(\.old)?\.partial", left.name[len(out.name) + 1 :]):
            continue
        if left.name.endswith(".old.partial") and not out.exists():
            left.rename(out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _swap(folder: Path, out: Path, is_ours: Callable[[str], bool]) -> None:
    """Put `folder` in the place of `out`, with what is foreign in it; flushed before and after."""
    if out.is_dir():
        carry_foreign(out, folder, is_ours)
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            flush(path)
    old = out.parent / f".{out.name}.{os.getpid()}.old.partial"
    if out.exists():
        out.rename(old)
    folder.rename(out)
    flush(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_disk(out: Path, needed_bytes: int) -> None:
    """Raise FastFTError with the numbers where the disk of `out` has fewer than `needed_bytes`
    free.
    """
    place = next(p for p in (out, *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise FastFTError(
            f"{out} needs {needed_bytes:,} bytes free, {place} has {free:,}. Free some, or "
            "choose another --out."
        )
