"""One process at a time: the lock on a folder that is written to."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fastft.errors import FastFTError


@contextlib.contextmanager
def held(path: Path, busy: Callable[[str], FastFTError], *, remove: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; raises `busy(who has it)` where another process does.

    The kernel's lock ends with the process, so a dead holder's lock is taken over. `remove`: the
    file itself is removed at the end. Raises FastFTError where something else than a plain file of
    one name lies there: writing into a link would empty what it points to.
    """
    handle = _open(path)
    try:
        while True:
            handle.seek(0)
            holder = handle.read().strip()
            if not _lock(handle, holder):
                raise busy(holder or "another process")
            if _is_still_there(handle, path):
                break
            handle.close()  # the one before removed it between our opening and our locking
            handle = _open(path)
        _write(handle, f"process {os.getpid()} on {socket.gethostname()} since {_now()}")
        try:
            yield
        finally:
            _write(handle, "")
            if remove:
                path.unlink(missing_ok=True)
    finally:
        handle.close()  # releases the lock


def is_held(path: Path) -> bool:
    """Return whether another process holds the lock file `path`; it is not touched."""
    try:
        with path.open("r", encoding="utf-8", errors="replace") as handle:
            return path.is_file() and not _lock(handle, handle.read().strip(), shared=True)
    except OSError:
        return False


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")


def _open(path: Path) -> IO[str]:
    """Open the lock file without following a link, and without waiting for a pipe's other end."""
    wanted = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    foreign = FastFTError(
        f"{path} is a link or no plain file, so it is not a lock of fastft. Remove it and try "
        "again."
    )
    try:
        descriptor = os.open(path, wanted, 0o644)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
            raise foreign from error
        raise
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        raise foreign
    return os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")


def _is_still_there(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write(handle: IO[str], text: str) -> None:
    handle.seek(0)
    handle.truncate()
    handle.write(text)
    handle.flush()


def _lock(handle: Any, holder: str, *, shared: bool = False) -> bool:
    """Take the kernel's lock on an open file; False where another process has it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # A file system without locks (network drives): ask whether the process that is named lives.
        return not _lives_here(holder)
    return True


def _lives_here(holder: str) -> bool:
    """Whether `holder`, as `held` writes it, is another process of this machine that is alive."""
    named = re.match(r"process (\d+) on (\S+)", holder)
    if not named or named[2] != socket.gethostname() or int(named[1]) == os.getpid():
        return False
    import psutil

    return psutil.pid_exists(int(named[1]))
