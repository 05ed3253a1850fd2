"""What a person sees while fastft works: on standard error, so that standard output stays the
answer's.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from fastft.hardware import Choice
from fastft.secrets import redact

SECONDS_BETWEEN_LINES = 5.0
"""How often a log file (no terminal) gets a line."""


@dataclass
class Pace:
    """Where a run stands, and when it will be done at the pace of this process's steps so far."""

    total: int | None
    first: int | None = None
    started: float = 0.0

    def place(self, step: int) -> str:
        """Return "step 12 of 480, 3 min left"; without a total or a pace yet, what is known."""
        if self.first is None:
            self.first, self.started = step, time.monotonic()
        if self.total is None:
            return f"step {step}"
        done = step - self.first
        if not done:
            return f"step {step} of {self.total}"
        left = (self.total - step) * (time.monotonic() - self.started) / done
        return f"step {step} of {self.total}, {spoken(left)} left"


def spoken(seconds: float) -> str:
    """Return a time as people say it: 8.1 s, 12 min, 3.5 h, 2.1 days."""
    for size, unit, digits in ((86_400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{digits}f} {unit}"
    return f"{seconds:.1f} s"


def sized(count: int) -> str:
    """Return a number of bytes as people say it: 812 bytes, 40.1 KiB, 1.2 MiB, 3.4 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


class Reporter:
    """Prints choices, notes, a progress bar; `quiet` keeps only warnings."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet = quiet
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._pace = Pace(None)

    def choice(self, name: str, choice: Choice) -> None:
        """Print an automatic choice once, with its reason."""
        value, reason = escape(str(choice.value)), escape(choice.reason)
        self.note(f"{name}: [bold]{value}[/bold] [dim]({reason})[/dim]", markup=True)

    def note(self, text: str, *, markup: bool = False) -> None:
        """Print a line."""
        if not self.quiet:
            self.console.print(redact(text), markup=markup)

    def warn(self, text: str) -> None:
        """Print a line that must be seen."""
        self.console.print(f"warning: {redact(text)}", style="yellow", markup=False)

    def data(self, report: Any) -> None:
        """Print one line on the data; `fastft data` prints the whole report."""
        share = report.trained_tokens / max(report.tokens, 1)
        self.note(
            f"data: {report.rows_used:,} of {report.rows_total:,} rows ({report.format}), "
            f"{report.tokens:,} tokens, "
            f"{share:.0%} of them trained"
        )
        if report.leakage:
            self.warn(
                f"{report.leakage:,} held-out rows also stand in the training rows: the "
                "held-out loss is too good"
            )
        for reason, drop in report.dropped.items():
            count, lines = (
                (drop["count"], drop["lines"])
                if isinstance(drop, dict)
                else (drop.count, drop.lines)
            )
            rows = "1 row is" if count == 1 else f"{count:,} rows are"
            first = ", ".join(map(str, lines[:5]))
            self.warn(f"{rows} not used: {reason} (first lines: {first})")

    @contextlib.contextmanager
    def training(self, total_steps: int) -> Iterator[None]:
        """Show the progress bar of a training run (plain lines where nobody watches a terminal)."""
        columns = (
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._pace = Pace(total_steps)
        if self.quiet or not self.console.is_terminal:
            yield
            return
        with Progress(*columns, console=self.console) as bar:
            self._bar, self._task = bar, bar.add_task("training", total=total_steps, numbers="")
            try:
                yield
            finally:
                self._bar = None

    @contextlib.contextmanager
    def bytes(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show the progress of a long write; yields a function of (bytes done, bytes total)."""
        if self.quiet or not self.console.is_terminal:
            yield self._byte_lines(what)
            return
        with Progress(
            TextColumn(f"[bold]{what}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self.console,
        ) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def _byte_lines(self, what: str) -> Callable[[int, int | None], None]:
        """Return the function of (bytes done, total) for a log file: a line every few seconds."""
        last = started = time.monotonic()

        def show(done: int, total: int | None) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < SECONDS_BETWEEN_LINES:
                return
            last, speed = now, done / 1e6 / max(now - started, 1e-3)
            share = f" of {total / 1e6:,.0f} MB ({done / total:.0%})" if total else " MB"
            self.note(f"{what}: {done / 1e6:,.0f}{share}, {speed:.1f} MB/s")

        return show

    def step(self, record: dict[str, Any]) -> None:
        """Show one line of log.jsonl."""
        if "eval_loss" in record:
            judged = [
                f", {name.replace('_', ' ')} {record[name]:.1%}"
                for name in ("exact_match", "contains")
                if name in record
            ]
            loss = f"held-out loss {record['eval_loss']:.4f}"
            return self.note(f"step {record['step']}: {loss}{''.join(judged)}")
        memory = record["peak_memory_bytes"] / 2**30
        numbers = (
            f"loss {record['loss']:.4f}  {record['tokens_per_sec']:,.0f} tok/s  {memory:.1f} GiB"
        )
        if self._bar is not None:
            return self._bar.update(self._task, completed=record["step"], numbers=numbers)
        place = self._pace.place(record["step"])
        if time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()  # a log file does not need every step
            self.note(f"{place}: {numbers}")

    def samples(self, record: dict[str, Any]) -> None:
        """Show the sample answers before and after, side by side."""
        before, after = record.get("samples_before") or [], record.get("samples_after") or []
        if self.quiet or not after:
            return
        table = Table("held-out prompt", "before", "after", "reference", show_lines=True)
        for old, new in zip(before, after, strict=False):
            table.add_row(
                *(
                    _short(t)
                    for t in (
                        new["prompt"][-1]["content"],
                        old["answer"],
                        new["answer"],
                        new["reference"],
                    )
                )
            )
        self.console.print(table)


def silent() -> Reporter:
    """Return a reporter that says nothing at all: that of a process that is not the first."""
    return Reporter(Console(file=io.StringIO()), quiet=True)


def _short(text: Any, limit: int = 160) -> str:
    text = text if isinstance(text, str) else str(text)
    return escape(text if len(text) <= limit else text[: limit - 1] + "…")
