"""Where exports go: one process at a time, and nothing that fastft did not write is lost."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fastft.errors import CouldNotFinishError, FastFTError
from fastft.files import written_aside
from fastft.files.locks import held

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
                f"{folder} cannot be written: {error.strerror}. Choose a folder of yours with "
                "--out."
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
    try:
        with written_aside(out, is_ours) as folder:
            check_disk(out, needed_bytes)
            folder.mkdir()
            yield folder
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise CouldNotFinishError(
            f"the disk of {out} is full ({needed_bytes:,} bytes were to be written)."
        ) from error


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
