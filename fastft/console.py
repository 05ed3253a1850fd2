"""How a command answers: JSON on the real standard output, words for a person, libraries quiet."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from fastft.errors import CouldNotFinishError, InterruptedRunError
from fastft.secrets import redact

LONGEST_MESSAGE = 4000  # characters; what a file holds may be quoted, but not all of it


class _Stream(io.RawIOBase):
    """Standard output or error that nobody has to listen to.

    A reader that went away (`| head -1`), a full disk or a closed descriptor ends no training; what
    could not be written is counted.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.problem = descriptor, 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[os.write(self.descriptor, left) :]
        except OSError as error:
            self.problem = error.errno or errno.EIO
        return size


class _Redacted(io.TextIOWrapper):
    """Text that goes through `redact` on its way out."""

    def write(self, text: str) -> int:
        super().write(redact(text))
        return len(text)


def robust_streams() -> None:
    """Make `sys.stdout` and `sys.stderr` such that writing to them never fails, and opens no file
    in their place where the shell had closed them.

    Characters that the terminal's encoding lacks are written as escapes.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(opened)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        encoding = getattr(old, "encoding", None) or "utf-8"
        raw = io.BufferedWriter(_Stream(descriptor), 8192)
        new = _Redacted(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, new)


@contextlib.contextmanager
def claimed_stdout() -> Iterator[None]:
    """Point file descriptor 1 at standard error, so that no library can spoil the JSON; keep the
    real one aside.
    """
    global _answer
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    before, sys.stdout = sys.stdout, sys.stderr
    _answer = os.fdopen(os.dup(real), "w", encoding="utf-8", errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk was said; a reader may have gone
            _answer.close()
        sys.stdout = before
        os.dup2(real, 1)
        os.close(real)


_answer: Any = None


def answer_descriptor() -> int:
    """Return the file descriptor that the JSON goes to, inside `claimed_stdout`."""
    return int(_answer.fileno())


def print_result(result: Any, as_json: bool, text: str | None = None) -> None:
    """Print a command's result: JSON on the real standard output, or `text` for a person."""
    values = _plain(result)
    if as_json:
        text = redact(json.dumps(values, ensure_ascii=False)) + "\n"
        try:
            _answer.write(text)
            _answer.flush()
        except BrokenPipeError:  # whoever asked has gone
            return
        except OSError as error:
            raise CouldNotFinishError(
                f"the result could not be written to standard output: {error.strerror}."
            ) from error
        return
    if text is None:
        text = json.dumps(values, indent=1, ensure_ascii=False)
    if text:
        print(redact(text))


def then(*commands: list[Any] | str) -> str:
    """Return the lines that end a command's answer: what to type next, from where one stands.

    A list is a command's words, which are quoted where the shell needs it.
    """
    lines = [c if isinstance(c, str) else shlex.join(map(str, c)) for c in commands]
    return "\nnext: " + "\n      ".join(lines)


def _plain(result: Any) -> Any:
    if hasattr(result, "to_dict"):
        return result.to_dict()
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return dataclasses.asdict(result)
    if hasattr(result, "model_dump"):
        return result.model_dump(mode="json")
    return result


def say_error(error: Any, debug: bool) -> None:
    """Print an error's one message on standard error; with `debug`, where it comes from."""
    if debug:
        traceback.print_exc()
    word = "" if isinstance(error, InterruptedRunError) else "error: "
    text = str(error)
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]} ... ({len(text) - LONGEST_MESSAGE:,} characters more)"
    print(f"{word}{redact(text)}", file=sys.stderr)


def quiet_libraries() -> None:
    """Silence progress bars and warnings that are nothing to the user; --debug shows them."""
    warnings.simplefilter("ignore")
    for variable, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "BITSANDBYTES_NOWELCOME": "1",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(variable, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log file needs no bars
    for name in (
        "torch.utils._pytree",
        "bitsandbytes",
        "transformers",
        "datasets",
        "peft",
        "trl",
        "torchao",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
