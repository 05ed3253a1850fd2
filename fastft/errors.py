"""The errors that fastft raises on purpose, and the exit code each one ends the command with.

A message says what is wrong, the numbers, and the fix. Anything that is not a FastFTError is our
bug.
"""

from __future__ import annotations

import difflib
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
