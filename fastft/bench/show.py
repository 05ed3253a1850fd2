"""One result on the terminal: both tables, what may be said of them, and the notes."""

from __future__ import annotations

from typing import Any

from fastft.bench import tables
from fastft.bench.record import Result, TableResult

COLOURS = {"ok": "green", "oom": "red", "timeout": "red", "crashed": "red", "unsupported": "yellow"}


def show(result: Result, console: Any = None) -> None:
    """Print `result` to a rich `console` (default: standard output)."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    console.print(f"[bold]{escape(tables.heading(result))}[/]: {escape(result.case.title)}")
    about = f"{result.date}, {tables.commit_text(result)}, case {result.case_hash}, {result.repeats} repeats"
    console.print(f"[dim]{escape(about)}[/]")
    for name, table in result.tables.items():
        console.print()
        console.print(_table(name, table))
        for verdict in tables.verdicts(table):
            colour = "bold" if verdict.ratio else "bold red" if verdict.parity_failed else "yellow"
            console.print(f"[{colour}]{escape(verdict.text)}[/]")
            for reason in verdict.reasons:
                console.print(f"    {escape(reason)}")
    for note in result.notes:
        console.print(f"[dim]note: {escape(note)}[/]")


def _table(name: str, table: TableResult) -> Any:
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=tables.TITLES[name], title_justify="left", pad_edge=False)
    for column in tables.HEADINGS:
        grid.add_column(column, justify="left" if column in {"arm", "status"} else "right")
    for arm, summary in table.arms.items():
        row = [escape(cell) for cell in tables.cells(arm, summary)]
        row[1] = f"[{COLOURS[summary.status]}]{row[1]}[/]"
        grid.add_row(*row, style="bold" if arm == "fastft" else None)
    return grid
