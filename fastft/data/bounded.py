"""Limits of time and memory for what somebody else wrote and is run here: chat templates, which
are programs, and regular expressions.

Jinja's sandbox keeps a template from reading files, not from counting to ten to the tenth or from
doubling a text until the memory is full. A watching thread asks a few times a second whether a
template has been running for too long, or the process has grown by too much, and ends it by an
exception between two of its steps. What one step would do with a huge constant is found before it
runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from fastft.errors import FastFTError

SECONDS = 20.0
"""How long one rendering may take; real templates take a thousandth of it, on long chats too."""
GROWTH_BYTES = 2 << 30
"""How much memory may be added to the process while a template runs."""
OUTPUT_CHARACTERS = 1 << 28
_LARGEST_NUMBER = 10_000_000
_POLL_SECONDS = 0.1
_TELL_AGAIN_SECONDS = 0.5


class TemplateLimitError(Exception):
    """A template ran for too long, or filled the memory."""


class _Watch:
    """The watching thread, started at the first rendering."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, float] = {}  # thread -> when it must have ended
        self._before = 0  # bytes of the process while nothing was watched
        self._told: dict[int, float] = {}  # thread -> when it was last told to end
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def begin(self, thread: int) -> None:
        with self._lock:
            if self._thread is None or self._process != os.getpid():
                # threads do not survive a fork
                self._process, self._before = os.getpid(), _resident()
                self._thread = threading.Thread(
                    target=self._run, name="template limits", daemon=True
                )
                self._thread.start()
            self._watched[thread] = time.monotonic() + SECONDS

    def end(self, thread: int) -> None:
        """Stop watching, and take back what is on its way to the thread."""
        with self._lock:
            self._watched.pop(thread, None)
            self._told.pop(thread, None)
            _raise_in(thread, None)

    def _run(self) -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            with self._lock:
                now, resident = time.monotonic(), _resident()
                young = all(
                    now < end - SECONDS + 2 * _POLL_SECONDS for end in self._watched.values()
                )
                if young:  # none has run for two looks yet: growth so far is somebody else's
                    self._before = resident
                most = self._before + GROWTH_BYTES
                for thread, deadline in self._watched.items():
                    over = thread in self._told or now > deadline or resident > most
                    # Again and again: where it meets a destructor, Python drops the exception.
                    if over and now > self._told.get(thread, -math.inf) + _TELL_AGAIN_SECONDS:
                        self._told[thread] = now
                        _raise_in(thread, TemplateLimitError)


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Raise `error` between two steps of another thread; None takes back what has not arrived."""
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


_WATCH = _Watch()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TemplateLimitError in this block when it takes more than SECONDS or GROWTH_BYTES."""
    thread = threading.get_ident()
    _WATCH.begin(thread)
    try:
        yield
    finally:
        ended = False
        while not ended:
            # The exception may be on its way when the block has just ended, and arrive in here.
            with contextlib.suppress(TemplateLimitError):
                _WATCH.end(thread)
                ended = True


@lru_cache(maxsize=64)
def huge_constant(source: str) -> str | None:
    """Return the arithmetic of a template that makes something huge in one step; None as a rule."""
    from jinja2 import Environment, nodes
    from jinja2.exceptions import TemplateSyntaxError

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(source)
    except TemplateSyntaxError:
        return None  # tags of the renderer's own; rendering says what is wrong
    for power in tree.find_all(nodes.Pow):
        base, exponent = (
            side.value if isinstance(side, nodes.Const) else None
            for side in (power.left, power.right)
        )
        small = (
            isinstance(base, int | float)
            and isinstance(exponent, int | float)
            and abs(exponent) * math.log10(max(abs(base), 2)) <= math.log10(_LARGEST_NUMBER)
        )
        if not small:
            return f"line {power.lineno}: a power"
    numbers = [
        (product.lineno, side)
        for product in tree.find_all(nodes.Mul)
        for side in (product.left, product.right)
    ]
    numbers += [(f.lineno, argument) for f in tree.find_all(nodes.Filter) for argument in f.args]
    for line, number in numbers:
        value = number.value if isinstance(number, nodes.Const) else None
        if isinstance(value, int | float) and abs(value) > _LARGEST_NUMBER:
            return f"line {line}: the number {value:,}"
    return None


def render(tokenizer: Any, messages: list[dict[str, Any]], **keywords: Any) -> str:
    """Return the conversation as the tokenizer's own template writes it, within the limits.

    Raises FastFTError where it does not keep to them, and jinja2's TemplateError where the template
    fails, also by what its own expressions raise (1 / 0).
    """
    from jinja2 import TemplateError, TemplateRuntimeError

    huge = huge_constant(str(tokenizer.chat_template))
    try:
        if huge is not None:
            raise TemplateLimitError(f"{huge} makes something huge in one step")
        with limited():
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **keywords)
        if len(text) > OUTPUT_CHARACTERS:
            raise TemplateLimitError(f"it wrote {len(text):,} characters")
        return text
    except (TemplateLimitError, MemoryError) as error:
        why = str(error) or f"it ran for more than {SECONDS:.0f} s or filled the memory"
        raise FastFTError(f"the chat template cannot be used: {why}.") from error
    except TemplateError:
        raise
    except OWN_ERRORS as error:
        raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


OWN_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What the expressions of a template may raise."""
PATTERN_SECONDS = 2.0
"""Of the processor's time."""


def matches(pattern: str, text: str, *, whole: bool = False) -> bool:
    """Return whether the regular expression `pattern` is found in `text`, or is all of it.

    Raises FastFTError where that takes more than PATTERN_SECONDS: one such as (a+)+$ tries every
    way to cut a text into pieces. What passes here may be given to peft, which uses `re` too.
    """
    try:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            with _processor_time():
                return (re.fullmatch if whole else re.search)(pattern, text) is not None
        import regex  # has a limit of its own, and knows shortcuts that `re` does not

        find = regex.fullmatch if whole else regex.search
        return find(pattern, text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError as error:
        raise FastFTError(
            f"the pattern {pattern[:200]!r} takes more than {PATTERN_SECONDS:g} s on "
            f"{text[:80]!r}: it repeats something that is itself repeated. Write it without, "
            "as a+ for (a+)+."
        ) from error
    except (re.error, RecursionError, OverflowError) as error:
        raise FastFTError(f"the pattern {pattern[:200]!r} is no expression: {error}.") from error


@contextlib.contextmanager
def _processor_time() -> Iterator[None]:
    """Raise TimeoutError in this block after PATTERN_SECONDS; `re` looks for signals as it goes."""

    def end(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATTERN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _resident() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # no /proc: the time alone is limited
        return 0
