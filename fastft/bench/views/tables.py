"""A result as rows of text, which the terminal, the README and the HTML page all print; and the
terminal itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastft.bench.record import ArmSummary, Peak, Ratio, Result, Spread, TableResult
from fastft.bench.statistics import memory_bytes

TITLES = {"defaults": "Everyone's defaults", "matched": "Matched settings"}

HEADINGS = (
    "arm", "status", "tokens/s", "s/step", "padding", "peak memory", "import", "load", "first step",
    "achieved", "of ceiling",
)  # fmt: skip

LEGEND = (
    "Tokens are non-padding tokens; figures are medians over the repeats, with the 20th to "
    "80th percentile in brackets. "
    "`!` marks a spread above 10 %. Peak memory is VRAM allocated / reserved / seen by the "
    "driver on a GPU, and resident "
    "memory on a CPU. Achieved is the arithmetic that the case needs at least, over the "
    "time; the ceiling is a large matrix "
    "product measured on the same machine."
)


@dataclass(frozen=True)
class Verdict:
    """What may be said about fastft against one arm."""

    arm: str
    ratio: Ratio | None
    reasons: tuple[str, ...] = ()
    """Why there is no ratio: the failing checks, or what became of the arm."""
    parity_failed: bool = False

    @property
    def text(self) -> str:
        """One line for a person."""
        if self.ratio is not None:
            return f"fastft over {self.arm}: {ratio_text(self.ratio)}"
        why = "parity failed: no ratio" if self.parity_failed else "no ratio"
        return f"fastft over {self.arm}: {why}"


def verdicts(table: TableResult) -> list[Verdict]:
    """Return a verdict for each arm but fastft, in the table's order."""
    return [_verdict(table, arm) for arm in table.arms if arm != "fastft"]


def _verdict(table: TableResult, arm: str) -> Verdict:
    if arm in table.ratios:
        return Verdict(arm, table.ratios[arm])
    reasons = [table.withheld[arm]] if arm in table.withheld else []
    failed = False
    for name in (arm, "fastft"):
        gate, summary = table.parity.get(name), table.arms.get(name)
        if gate is not None and not gate.passed:
            failed = True
            reasons += [f"{name}: {check.text}" for check in gate.checks if not check.passed]
        elif summary is None:
            reasons.append(f"{name} was not run")
        elif summary.status != "ok":
            reasons.append(f"{name}: {status_text(summary)}")
    return Verdict(arm, None, tuple(reasons), failed)


def ratio_text(ratio: Ratio) -> str:
    """Return ``4.80x (4.30 to 5.10), memory 0.41x``."""
    interval = "fewer than three rounds: no interval"
    if ratio.speed_low is not None and ratio.speed_high is not None:
        interval = f"{factor(ratio.speed_low)} to {factor(ratio.speed_high)}"
    memory = "" if ratio.memory is None else f", memory {factor(ratio.memory)}x"
    return f"{factor(ratio.speed)}x ({interval}){memory}"


def factor(value: float) -> str:
    """Return a ratio with three figures: 0.41, 4.80, 12.3."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def status_text(summary: ArmSummary) -> str:
    """Return the status, with its reason where it is not ok."""
    return f"{summary.status} ({summary.reason})" if summary.reason else summary.status


def cells(arm: str, summary: ArmSummary) -> list[str]:
    """Return the row of `arm`, one text for each of HEADINGS; a dash where nothing was measured."""
    speed = spread_text(summary.non_padding_tokens_per_sec) + (" !" if summary.noisy else "")
    return [
        arm,
        summary.status,
        speed,
        spread_text(summary.seconds_per_step),
        percent(summary.padding_share),
        peak_text(summary.peak),
        seconds(summary.import_seconds),
        seconds(summary.load_seconds),
        seconds(summary.first_step_seconds),
        flops_text(summary.flops),
        percent(summary.ceiling_share),
    ]


def number(value: float) -> str:
    """Return about three significant figures, with thousands separated: 8,123  419  41.3  1.27
    0.0457.
    """
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.3g}"


def spread_text(spread: Spread | None, show: Callable[[float], str] = number) -> str:
    """Return ``419 (329 to 443)``; of a single run, which has no range, the figure alone."""
    if spread is None:
        return "-"
    between = f" ({show(spread.p20)} to {show(spread.p80)})"
    return show(spread.median) + ("" if spread.p20 == spread.p80 else between)


def percent(share: float | None) -> str:
    """Return ``37 %``."""
    return "-" if share is None else f"{100 * share:.0f} %"


def seconds(value: float | None) -> str:
    """Return ``12.3 s``."""
    return "-" if value is None else f"{number(value)} s"


def gigabytes(size: float | None) -> str:
    """Return ``5.87`` (GB of 1e9 bytes)."""
    return "-" if size is None else number(size / 1e9)


def peak_text(peak: Peak | None) -> str:
    """Return VRAM allocated / reserved / device, or without a GPU what arms are compared by."""
    if peak is None:
        return "-"
    vram = (peak.vram_allocated_bytes, peak.vram_reserved_bytes, peak.vram_device_bytes)
    if all(size is None for size in vram):
        return f"{gigabytes(memory_bytes(peak))} GB"
    return " / ".join(gigabytes(size) for size in vram) + " GB"


def flops_text(flops: float | None) -> str:
    """Return ``268 GFLOP/s`` or ``31.2 TFLOP/s``."""
    if flops is None:
        return "-"
    return f"{number(flops / 1e12)} TFLOP/s" if flops >= 1e12 else f"{number(flops / 1e9)} GFLOP/s"


def stopped(table: TableResult) -> list[str]:
    """Return a line for each arm that did not end well."""
    return [f"{arm}: {status_text(s)}" for arm, s in table.arms.items() if s.status != "ok"]


def heading(result: Result) -> str:
    """Return ``cpu-135m on H200, capped at 15 GB``."""
    return f"{result.case.name} on {result.machine.label}"


def commit_text(result: Result) -> str:
    """Return the commit's first digits, and whether the tree had other changes."""
    if result.commit is None:
        return "unknown commit"
    return f"commit {result.commit[:10]}" + (" with uncommitted changes" if result.dirty else "")


def repeats_text(repeats: int) -> str:
    """Return ``5 repeats``, or ``1 repeat``."""
    return f"{repeats} repeat" + ("" if repeats == 1 else "s")


def capped(result: Result) -> bool:
    """Whether a larger card stood in for the case's own under its memory cap."""
    return result.machine.device == "cuda" and result.machine.cap_bytes is not None


def own_card(result: Result) -> bool:
    """Whether this result may fill the row of the case's card (a CPU case: any CPU)."""
    return not capped(result) and result.machine.card == result.case.card


# --- on the terminal

WIDE = 135
"""Columns of a terminal that the whole table needs."""
NARROW = ("arm", "status", "tokens/s (p20-p80)", "s/step", "padding", "peak", "ceiling")

COLOURS = {"ok": "green", "oom": "red", "timeout": "red", "crashed": "red", "unsupported": "yellow"}


def show(result: Result, console: Any = None) -> None:
    """Print `result` to a rich `console` (default: standard output)."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    console.print(f"[bold]{escape(heading(result))}[/]: {escape(result.case.title)}")
    about = (
        f"{result.date}, {commit_text(result)}, case {result.case_hash}, "
        f"{repeats_text(result.repeats)}"
    )
    console.print(f"[dim]{escape(about)}[/]")
    for name, table in result.tables.items():
        console.print()
        console.print(_table(name, table, narrow=console.width < WIDE))
        for verdict in verdicts(table):
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

    headings, columns = (NARROW, _narrow_cells) if narrow else (HEADINGS, cells)
    grid = Table(title=TITLES[name], title_justify="left", pad_edge=False, box=SIMPLE_HEAD)
    for column in headings:
        grid.add_column(
            column, justify="left" if column in {"arm", "status"} else "right", no_wrap=True
        )
    for arm, summary in table.arms.items():
        row = [escape(cell) for cell in columns(arm, summary)]
        row[1] = f"[{COLOURS[summary.status]}]{row[1]}[/]"
        grid.add_row(*row, style="bold" if arm == "fastft" else None)
    return grid


def _narrow_cells(arm: str, summary: ArmSummary) -> list[str]:
    """Return what fits a terminal of 80 columns; the JSON, the page and the README have the
    rest.
    """
    full = cells(arm, summary)
    per_step = summary.seconds_per_step
    step = "-" if per_step is None else number(per_step.median)
    return [full[0], full[1], full[2], step, full[4], full[5], full[-1]]
