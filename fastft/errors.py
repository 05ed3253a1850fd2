"""The errors that fastft raises on purpose, and the exit code each one ends the command with.

A message says what is wrong, the numbers, and the fix. Anything that is not a FastFTError is our
bug.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable


class FastFTError(Exception):
    """The user's input is wrong; the message says how to mend it. Exit code 2."""

    exit_code = 2


class AnswerIsNoError(FastFTError):
    """The command ran and the answer is no: does not fit, does not verify, parity fails. Exit code
    1.
    """

    exit_code = 1


class CouldNotFinishError(FastFTError):
    """Out of memory, NaN, disk full, network: the work stopped, what was saved is whole. Exit code
    3.
    """

    exit_code = 3


class InterruptedRunError(FastFTError):
    """Ctrl-C or SIGTERM: state was saved, the same command goes on. Exit code 130."""

    exit_code = 130


OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "out_of_memory",
    "bad_alloc",
    # cuBLAS and cuDNN allocate their workspaces themselves, beside torch's allocator.
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    # Threads and child processes need memory, too.
    "can't start new thread",
    "cannot allocate memory",
    # A library that is loaded late is mapped, which takes addresses.
    "failed to map segment",
    "threadpoolbuilderror",
)
"""What a failed allocation is called, in lower case, where it is no exception of its own."""

PANIC = "PanicException"
"""What a library in Rust raises where it gives up; derived from BaseException."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
"""What the system says about its own limits, not about what the user gave."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is a failed allocation, on a GPU or of torch's or Python's on the
    CPU.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    says = isinstance(error, RuntimeError | ImportError | OSError)
    says = says or type(error).__name__ in ("SafetensorError", PANIC)
    return says and any(sign in text for sign in OUT_OF_MEMORY)


def explained(error: BaseException) -> FastFTError | None:
    """Return what an error means that nobody expected at its place, where it is the machine's or
    the user's: memory, disk, a file's name or rights. None: it is ours.
    """
    if memory := next(filter(is_out_of_memory, _behind(error)), None):
        return CouldNotFinishError(f"out of memory: {first_line(memory)} ({memory_numbers()}).")
    if isinstance(error, ValueError) and "null byte" in str(error):
        return FastFTError("a file name holds a NUL character; no file is called so.")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f" ({error.filename})" if error.filename else ""
        return CouldNotFinishError(f"{error.strerror}{where}. What was saved before is whole.")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return FastFTError(f"{error.filename}: {error.strerror}. Check the path and its rights.")
    return None


def _behind(error: BaseException) -> list[BaseException]:
    """Return the error and those that it was raised for: a library may say something of its own
    where it met a failed allocation.
    """
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return chain


def memory_numbers() -> str:
    """Return how much memory this process has, may have, and the machine has left."""
    try:
        import psutil

        used, left = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    except (MemoryError, ImportError, OSError):
        return "so little that its numbers cannot be asked"
    words = f"this process holds {used / 2**30:.2f} GiB, {left / 2**30:.2f} GiB are free"
    with contextlib.suppress(ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            words += f", its limit (ulimit -v) is {limit / 2**30:.2f} GiB of addresses"
    return words


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without a full stop; its kind where it says
    nothing.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_of(kind: str, name: str, known: Iterable[str]) -> FastFTError:
    """Return the error for an unknown `name`: it lists the valid ones and the nearest."""
    names = sorted(known)
    return FastFTError(
        f"unknown {kind} {name!r}{did_you_mean(name, names)}. Known: {', '.join(names)}."
    )
