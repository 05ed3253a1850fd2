"""One result on the terminal: both tables, what may be said of them, and the notes."""

from __future__ import annotations

from typing import Any

from fastft.bench.record import ArmSummary, Result, TableResult
from fastft.bench.views import tables

WIDE = 135
"""Columns of a terminal that the whole table needs."""
NARROW = ("arm", "status", "tokens/s (p20-p80)", "s/step", "padding", "peak", "ceiling")

COLOURS = {"ok": "green", "oom": "red", "timeout": "red", "crashed": "red", "unsupported": "yellow"}


def show(result: Result, console: Any = None) -> None:
    """Print `result` to a rich `console` (default: standard output)."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    console.print(f"[bold]{escape(tables.heading(result))}[/]: {escape(result.case.title)}")
    about = (
        f"{result.date}, {tables.commit_text(result)}, case {result.case_hash}, "
        f"{tables.repeats_text(result.repeats)}"
    )
    console.print(f"[dim]{escape(about)}[/]")
    for name, table in result.tables.items():
        console.print()
        console.print(_table(name, table, narrow=console.width < WIDE))
        for verdict in tables.verdicts(table):
            colour = "bold" if verdict.ratio else "bold red" if verdict.parity_failed else "yellow"
            console.print(f"[{colour}]{escape(verdict.text)}[/]")
            for reason in verdict.reasons:
                console.print(f"    {escape(reason)}")
    for note in result.notes:
        console.print(f"[dim]note: {escape(note)}[/]")


def _table(name: str, table: TableResult, *, narrow: bool) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    headings, cells = (NARROW, _narrow_cells) if narrow else (tables.HEADINGS, tables.cells)
    grid = Table(title=tables.TITLES[name], title_justify="left", pad_edge=False, box=SIMPLE_HEAD)
    for column in headings:
        grid.add_column(
            column, justify="left" if column in {"arm", "status"} else "right", no_wrap=True
        )
    for arm, summary in table.arms.items():
        row = [escape(cell) for cell in cells(arm, summary)]
        row[1] = f"[{COLOURS[summary.status]}]{row[1]}[/]"
        grid.add_row(*row, style="bold" if arm == "fastft" else None)
    return grid


def _narrow_cells(arm: str, summary: ArmSummary) -> list[str]:
    """Return what fits a terminal of 80 columns; the JSON, the page and the README have the rest."""
    full = tables.cells(arm, summary)
    per_step = summary.seconds_per_step
    step = "-" if per_step is None else tables.number(per_step.median)
    return [full[0], full[1], full[2], step, full[4], full[5], full[-1]]
