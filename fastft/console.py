"""How a command answers: JSON on the real standard output, words for a person, libraries quiet."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from fastft.errors import InterruptedRunError
from fastft.secrets import redact


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
    _answer = os.fdopen(os.dup(real), "w", encoding="utf-8")
    try:
        yield
    finally:
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
        _answer.write(redact(json.dumps(values, ensure_ascii=False)) + "\n")
        return
    if text is None:
        text = json.dumps(values, indent=1, ensure_ascii=False)
    if text:
        print(redact(text))


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
    print(f"{word}{redact(str(error))}", file=sys.stderr)


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
