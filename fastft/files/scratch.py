"""Temporary folders that a killed process does not leave behind for good.

The folder's name holds the process that made it. Whoever makes the next one of the same kind in
the same place removes those of dead processes of this machine and of this user, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder below `parent` (default: the system's temporary folder); it is removed
    when the block ends, or by the next call with this `prefix` where the process was killed.
    """
    place = Path(parent or tempfile.gettempdir())
    remove_leftovers(prefix, place)
    folder = Path(tempfile.mkdtemp(prefix=_start(prefix) + f"{os.getpid()}-", dir=place))
    handle = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_leftovers(prefix: str, place: Path) -> None:
    """Remove the folders with this prefix whose process is dead."""
    import psutil

    pattern = re.compile(re.escape(_start(prefix)) + r"(\d+)-\w+")
    for entry in place.glob(f"{prefix}*"):
        named = pattern.fullmatch(entry.name)
        if not named or entry.is_symlink() or not entry.is_dir() or not _is_mine(entry):
            continue
        if psutil.pid_exists(int(named[1])):
            continue
        # The number may be that of another container's process with the same host name: a folder
        # in use is locked.
        handle = _locked(entry)
        if handle is not None:
            shutil.rmtree(entry, ignore_errors=True)
            os.close(handle)


def _start(prefix: str) -> str:
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f"{prefix}{host}-"


def _is_mine(folder: Path) -> bool:
    return os.name == "nt" or folder.stat().st_uid == os.getuid()


def _locked(folder: Path) -> int | None:
    """Return a descriptor that holds the kernel's lock on `folder`; None where another process
    has it, or where folders cannot be locked.
    """
    if os.name == "nt":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
