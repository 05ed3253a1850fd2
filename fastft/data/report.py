"""What a person should see before training: rows used and why not, lengths, what is trained,
duplicates, leakage.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from fastft.files import ours

if TYPE_CHECKING:
    from fastft.data.store import TokenDataset

BARS = 36
# Unicode's line and paragraph separators, embeddings, overrides and isolates.
_TURNS = {
    chr(c): f"\\u{c:04x}" for c in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


class Dropped(BaseModel):
    """Rows that were not used for one reason."""

    count: int
    lines: list[int] = Field(description="the first line numbers")
    example: str = Field("", description="what is wrong with the first of them")


class ReportSample(BaseModel):
    """One sample as pieces of text, each trained or not."""

    line: int | None = None
    tokens: int
    pieces: list[tuple[str, bool]]


class Sharing(BaseModel):
    """What sequences of a step have in common, in the first steps of a run (`steps` of them)."""

    steps: int
    tokens: int
    unique_tokens: int = Field(description="computed, where a common beginning is computed once")
    grouped_unique_tokens: int | None = Field(
        None, description="the same with train.order grouped; null where that was not looked at"
    )


class SourceShare(BaseModel):
    """One of several sources: what it gives to the mixture."""

    source: str
    weight: float | None
    rows_total: int
    rows_used: int
    samples: int = Field(description="training samples that it has")
    drawn: int = Field(description="training samples drawn from it an epoch")
    tokens: int = Field(description="tokens of those drawn")
    share: float = Field(description="of all tokens drawn")
    eval_samples: int


class DataReport(BaseModel):
    """The numbers of a prepared dataset. `model_dump()` is what `fastft data --json` prints."""

    source: str
    kind: str = Field(description="jsonl, json, csv ...")
    format: str
    evidence: str
    template: str
    template_why: str
    rows_total: int
    rows_used: int
    dropped: dict[str, Dropped]
    samples: int
    train_samples: int
    eval_samples: int
    tokens: int
    trained_tokens: int
    truncated: int = Field(description="samples cut to max_seq_length")
    truncated_tokens: int
    over_long: int
    duplicates: int = Field(description="rows whose content stood in an earlier row")
    near_duplicates: int
    leakage: int = Field(description="held-out rows that stand in the training rows too")
    max_seq_length: int
    unrolled_tokens: int = Field(
        0, description="tokens of the conversations that became several samples"
    )
    one_pass_tokens: int = Field(0, description="the same conversations, each read once")
    turns: int = Field(0, description="answers in the conversations")
    reasoning_turns: int = Field(0, description="of them, with reasoning")
    lengths: dict[str, int] = Field(description="min, median, mean, p95, p99, max in tokens")
    histogram: list[tuple[int, int, int]] = Field(description="[from, to) in tokens, samples")
    secrets: dict[str, int]
    secret_lines: list[int]
    notices: list[str]
    preview: list[ReportSample]
    sharing: Sharing | None = Field(None, description="fastft data: common beginnings in a step")
    sources: list[SourceShare] = Field(
        default_factory=list, description="where there are several: each one's part"
    )
    seconds: float = 0.0
    rows_per_sec: float = 0.0
    cached: bool = False

    def print(self, console: Any = None) -> None:
        """Print the report with rich, to standard error where no console is given."""
        from rich.console import Console

        console = console or Console(stderr=True)
        _print_table(self, console)
        _print_dropped(self, console)
        _print_histogram(self, console)
        _print_preview(self, console)
        for notice in self.notices:
            console.print(f"note: {notice}", markup=False, highlight=False, style="yellow")

    def plot(self, path: Path | str) -> None:
        """Write the histogram of sample lengths as PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        starts = [a for a, _, _ in self.histogram]
        axes.bar(
            starts,
            [n for _, _, n in self.histogram],
            width=[b - a for a, b, _ in self.histogram],
            align="edge",
            color="#4c78a8",
            edgecolor="white",
            linewidth=0.6,
        )
        axes.axvline(
            self.lengths["median"],
            color="#f58518",
            linewidth=1.5,
            label=f"median {self.lengths['median']:,}",
        )
        if self.truncated or self.lengths["max"] > 0.5 * self.max_seq_length:
            axes.axvline(
                self.max_seq_length,
                color="#e45756",
                linestyle="--",
                label=f"max_seq_length {self.max_seq_length:,}",
            )
        share = self.trained_tokens / max(self.tokens, 1)
        axes.set_title(
            f"{self.samples:,} samples, {self.tokens:,} tokens, {share:.0%} of them trained"
        )
        axes.set_xlabel("tokens in a sample")
        axes.set_ylabel("samples")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        FigureCanvasAgg(figure).print_png(str(path), metadata=ours.PNG)


def many(count: int, what: str) -> str:
    """Return "1 row", "2 rows"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def sizes(train: TokenDataset, evaluation: TokenDataset | None) -> dict[str, Any]:
    """Return what a report says of how many samples and tokens there are."""
    import numpy as np

    both = [train] if evaluation is None else [train, evaluation]
    lengths = np.concatenate([one.lengths for one in both])
    shares = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    quantiles = {name: int(np.percentile(lengths, share)) for name, share in shares.items()}
    return {
        "samples": len(lengths),
        "train_samples": len(train),
        "eval_samples": len(lengths) - len(train),
        "tokens": sum(one.tokens for one in both),
        "trained_tokens": sum(one.trained_tokens for one in both),
        "lengths": quantiles | {"mean": int(lengths.mean())},
        "histogram": histogram(lengths),
    }


def histogram(lengths: Any, bins: int = 20) -> list[tuple[int, int, int]]:
    """Return (from, to, count) in round widths that cover all lengths."""
    import numpy as np

    if len(lengths) == 0:
        return []
    low, high = int(lengths.min()), int(lengths.max()) + 1
    raw = max(1, (high - low) / bins)
    step = next(s for s in (m * 10**e for e in range(9) for m in (1, 2, 5)) if s >= raw)
    first = low - low % step
    edges = np.arange(first, high + step, step)
    counts, _ = np.histogram(lengths, edges)
    return [(int(a), int(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]


def _print_table(report: DataReport, console: Any) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    share = report.trained_tokens / max(report.tokens, 1)
    lengths = report.lengths
    part = report.truncated / max(report.samples, 1)
    cut = f"{report.truncated:,} samples ({part:.1%}), {report.truncated_tokens:,} tokens cut off"
    rows = [
        ("source", f"{report.source} ({report.kind})"),
        ("format", f"{report.format}: {report.evidence}"),
        ("template", f"{report.template}: {report.template_why}"),
        ("rows", f"{report.rows_used:,} of {report.rows_total:,} used"),
        ("samples", f"{report.train_samples:,} to train on, {report.eval_samples:,} held out"),
        (
            "tokens",
            f"{report.tokens:,}, of which {report.trained_tokens:,} are trained ({share:.1%})",
        ),
        (
            "lengths",
            f"median {lengths['median']:,}, 95 % below {lengths['p95']:,}, longest "
            f"{lengths['max']:,} tokens",
        ),
        (
            "truncated",
            cut if report.truncated else f"none (max_seq_length {report.max_seq_length:,})",
        ),
        ("duplicates", f"{report.duplicates:,} exact, {report.near_duplicates:,} near"),
        ("leakage", f"{report.leakage:,} held-out rows also stand in the training rows"),
    ]
    if report.sharing is not None:
        rows.append(("beginnings", _shared(report.sharing)))
    for one in report.sources:
        passes = one.drawn / max(one.samples, 1)
        rows.append(
            (
                "",
                f"{one.source}: {one.drawn:,} of {one.samples:,} samples an epoch ({passes:.2f} "
                f"times each), {one.share:.1%} of the tokens; {one.rows_used:,} of "
                f"{one.rows_total:,} rows used, {one.eval_samples:,} held out",
            )
        )
    if report.secrets:
        rows.append(
            (
                "secrets",
                ", ".join(f"{many(n, 'row')} with a {kind}" for kind, n in report.secrets.items()),
            )
        )
    for name, value in rows:
        warn = (name == "leakage" and report.leakage) or name == "secrets"
        table.add_row(f"[bold]{name}[/bold]", _safe(value), style="red" if warn else None)
    console.print(table)


def _shared(found: Sharing) -> str:
    """One line: what share_prefixes saves, and what grouped order would."""
    times = found.tokens / max(found.unique_tokens, 1)
    text = "the sequences of a step share none"
    if times >= 1.01:
        text = (
            f"{found.unique_tokens:,} of {found.tokens:,} tokens are computed in the first "
            f"{many(found.steps, 'step')}, {times:.2f} times fewer: shared ones once"
        )
    grouped = found.grouped_unique_tokens
    if grouped is not None and grouped < 0.95 * found.unique_tokens:
        text += f"; train.order: grouped makes it {found.tokens / grouped:.2f} times fewer"
    return text


def _print_dropped(report: DataReport, console: Any) -> None:
    from rich.table import Table

    if not report.dropped:
        return
    table = Table(
        "rows not used",
        "count",
        "first lines",
        "what is wrong there",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for reason, drop in sorted(report.dropped.items(), key=lambda item: -item[1].count):
        table.add_row(
            reason, f"{drop.count:,}", ", ".join(map(str, drop.lines[:5])), _safe(drop.example)
        )
    console.print()
    console.print(table, style="yellow")


def _print_histogram(report: DataReport, console: Any) -> None:
    if not report.histogram:
        return
    console.print("\n[bold]tokens in a sample[/bold]")
    most = max(n for _, _, n in report.histogram)
    width = max(len(f"{b:,}") for _, b, _ in report.histogram)
    for start, end, count in report.histogram:
        bar = "█" * round(BARS * count / most) or ("▏" if count else "")
        console.print(
            f"{start:>{width},} to {end - 1:>{width},}  [blue]{bar}[/blue] {count:,}",
            highlight=False,
        )


def _print_preview(report: DataReport, console: Any) -> None:
    from rich.text import Text

    if not report.preview:
        return
    # Without colour (a log file, a pipe, NO_COLOR) the marks would vanish.
    begin, end = ("⟦", "⟧") if console.no_color or console.color_system is None else ("", "")
    console.print(
        f"\n[bold]samples[/bold] (what is trained is {begin}[black on green]marked[/black on "
        f"green]{end}, the rest is "
        "only read)"
    )
    for number, sample in enumerate(report.preview, 1):
        text = Text(f"{number}. ", style="bold")
        for piece, trained in sample.pieces:
            piece = _shortened(_visible(piece))
            if trained:
                text.append(begin + piece.replace("\n", "↵\n") + end, style="black on green")
            else:
                text.append(piece, style="dim")
        text.append(f"  ({sample.tokens:,} tokens)", style="italic")
        console.print(text)
        console.print()


def _shortened(text: str, most: int = 600) -> str:
    return (
        text
        if len(text) <= most
        else f"{text[: most // 2]} … {len(text) - most:,} more characters … {text[-most // 2 :]}"
    )


def _visible(text: str) -> str:
    """Show control characters, and those that turn the direction of writing, instead of sending
    them to the terminal.

    What joins emoji and marks the direction of single letters is not printable either, and is left
    alone.
    """
    return "".join(
        c
        if c in "\n\t" or c.isprintable()
        else f"\\x{ord(c):02x}"
        if ord(c) < 256
        else _TURNS.get(c, c)
        for c in text
    )


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(_visible(text))
