"""A plan on the terminal, as a PNG, and the README's table of models and cards.

Sizes are GiB (2^30 bytes) everywhere, as nvidia-smi, torch and the sizes of cards mean them: a "15
GB" T4 has 14.74 GiB.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import FastFTError
from fastft.hardware import GIB, Hardware, named_gpu
from fastft.planning.memory import Situation, Term
from fastft.planning.resolve import train_peak_bytes
from fastft.planning.shape import ModelShape, known_shape
from fastft.progress import spoken

if TYPE_CHECKING:
    from fastft.planning import Plan
    from fastft.planning.advise import Change

COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f",
    "#bab0ac", "#1b9e77", "#a0cbe8", "#ffbe7d", "#8cd17d", "#ff9d9a", "#d4a6c8", "#79706e",
)  # fmt: skip
VERDICTS = {
    "fits": "[bold green]fits[/]",
    "tight": "[bold yellow]tight[/]",
    "does_not_fit": "[bold red]does not fit[/]",
}
BAR_WIDTH = 60
WIDE = 52
"""A column wider than this may wrap, or it would leave the last one no room in 80 columns."""


def print_plan(plan: Plan, console: Any = None) -> None:
    """Print the verdict, the phases, the bar of the training step, time, choices, changes and
    notes.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    console.print(
        f"{escape(plan.model)} on {escape(plan.hardware)}: {VERDICTS[plan.verdict]} ({plan.reason})"
    )
    table = Table("phase", box=None, pad_edge=False)
    places = ("vram", "ram", "disk") if plan.peak_vram_bytes else ("ram", "disk")
    for place in places:
        table.add_column(_heading(plan, place), justify="right")
    for name, phase in plan.phases.items():
        table.add_row(name, *(_gib(getattr(phase, f"{place}_bytes")) for place in places))
    console.print(table)
    place = "vram" if plan.phases["train"].vram_bytes else "ram"
    terms = getattr(plan.phases["train"], f"{place}_terms")
    console.print(f"\ntraining step, {place.upper()}:")
    console.print(_bar(terms, plan.available[place], console.width), no_wrap=True)
    bars = [
        (f"  [{c}]█[/]", _gib(t.bytes), t.name, f"[dim]{escape(t.formula)}[/]")
        for t, c in _coloured(terms)
    ]
    console.print(_aligned(bars))
    if plan.seconds_per_step is None:
        console.print(f"\ntime: unknown ({plan.time_basis})")
    else:
        speed = f"{plan.tokens_per_step:,} tokens, {plan.tokens_per_sec:,.0f} tokens/s"
        console.print(
            f"\nabout {spoken(plan.seconds_per_step)} a step ({speed}): {escape(plan.time_basis)}"
        )
    if plan.seconds is not None:
        steps = f"{plan.steps:,} step{'' if plan.steps == 1 else 's'} ({escape(plan.steps_basis)})"
        console.print(
            f"the run: about {spoken(plan.seconds)} for {steps}; less where sequences are shorter"
        )
    choices = plan.choices.items()
    rows = [(f"  {name}", str(value), f"[dim]{escape(why)}[/]") for name, (value, why) in choices]
    console.print(_aligned(rows))
    if plan.changes:
        one = len(plan.changes) == 1
        console.print(f"\nto make it fit{'' if one else ', in this order'}:")
        console.print(
            _aligned([_change_row(i, change) for i, change in enumerate(plan.changes, 1)])
        )
    if plan.notes:
        notes = [("[dim]note:[/]", f"[dim]{escape(note)}[/]") for note in plan.notes]
        console.print(_aligned(notes))


def _aligned(rows: Sequence[tuple[str, ...]]) -> Any:
    """Rows in columns; the last column wraps within itself, so that a narrow terminal stays
    readable.
    """
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    for number, cells in enumerate(zip(*rows, strict=True)):
        sizes = number == 1 and len(rows[0]) == 4
        narrow = number < len(rows[0]) - 1 and max(map(len, cells)) <= WIDE
        grid.add_column(no_wrap=narrow, justify="right" if sizes else "left")
    for row in rows:
        grid.add_row(*row)
    return grid


def _change_row(number: int, change: Change) -> tuple[str, ...]:
    from rich.markup import escape

    new = "none" if change.new is None else change.new
    return (
        f"  {number}.",
        escape(f"{change.key}: {change.old} -> {new}"),
        f"[dim]{escape(change.cost)}[/]",
    )


def _heading(plan: Plan, place: str) -> str:
    return f"{place} ({plan.available[place] / GIB:.1f} GiB free)"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size else "-"


def _by_size(terms: list[Term]) -> list[Term]:
    return sorted((t for t in terms if t.bytes), key=lambda t: -t.bytes)


def _coloured(terms: list[Term]) -> list[tuple[Term, str]]:
    return [(term, COLOURS[i % len(COLOURS)]) for i, term in enumerate(_by_size(terms))]


def _bar(terms: list[Term], available: int, columns: int) -> str:
    """One line: a block a term, scaled to what is free; `|` marks the end of what is drawn."""
    total = sum(t.bytes for t in terms)
    says = f"| {total / GIB:.1f} of {available / GIB:.1f} GiB free"
    width = max(10, min(BAR_WIDTH, columns - len(says) - 2))
    scale = width / max(total, available, 1)
    line, used = "", 0.0
    for term, colour in _coloured(terms):
        start, used = round(used), used + term.bytes * scale
        line += f"[{colour}]{'█' * (round(used) - start)}[/]"
    return f"  {line}{'·' * (width - round(used))}{says}"


def plot_plan(plan: Plan, path: Path) -> Path:
    """Write one stacked bar for each phase (VRAM, or RAM on a CPU), with the free memory as a
    line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    place = "vram" if plan.phases["train"].vram_bytes else "ram"
    phases = {name: getattr(phase, f"{place}_terms") for name, phase in plan.phases.items()}
    phases = {name: terms for name, terms in phases.items() if terms}  # a merge needs no VRAM
    names = list(dict.fromkeys(term.name for terms in phases.values() for term in terms))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, terms in enumerate(phases.values()):
        left = 0.0
        for term in terms:
            colour = COLOURS[names.index(term.name) % len(COLOURS)]
            axes.barh(row, term.bytes / GIB, left=left, color=colour, label=term.name)
            left += term.bytes / GIB
    axes.axvline(plan.available[place] / GIB, color="black", linestyle="--", label="free")
    axes.set_yticks(range(len(phases)), list(phases))
    axes.invert_yaxis()
    axes.set_xlabel(f"{place.upper()}, GiB")
    axes.set_title(f"{plan.model} on {plan.hardware}: {plan.verdict.replace('_', ' ')}")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(
        handles.values(), handles.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise FastFTError(
            f"{path} cannot be written: {error.strerror}. Name another file."
        ) from error
    return path


TABLE_MODELS = (
    "qwen3-0.6b", "llama-3.2-1b", "qwen3-1.7b", "llama-3.2-3b", "qwen3-4b", "llama-3.1-8b",
    "qwen3-14b", "qwen3-32b", "llama-3.3-70b", "gpt-oss-20b", "gpt-oss-120b",
)  # fmt: skip
TABLE_CARDS = ("rtx3060", "t4", "l4", "rtx4090", "a100-40", "a100-80", "h100", "h200")
TABLE_LENGTHS = (1024, 2048, 8192)


def plan_table() -> list[dict[str, Any]]:
    """Return one row for each model, method and length: the peak of a training step and whether it
    fits each card.

    One sequence a row, LoRA of rank 16 on all linear layers, checkpointing where it is needed,
    8-bit AdamW on a GPU; the last column is the RAM that the same run needs on a CPU with
    bfloat16.
    """
    rows = []
    for model in TABLE_MODELS:
        shape = known_shape(model)
        for method, length in itertools.product(("LoRA", "QLoRA"), TABLE_LENGTHS):
            gpu = replace(_table_situation(method, length, "cuda"), checkpointing="offload")
            cpu = replace(_table_situation(method, length, "cpu"), checkpointing="recompute")
            row = {"model": model, "method": method, "tokens": length}
            row["vram_bytes"] = train_peak_bytes(shape, gpu)
            row |= {card: _fits(shape, method, length, named_gpu(card)) for card in TABLE_CARDS}
            rows.append(row | {"cpu_ram_bytes": train_peak_bytes(shape, cpu)})
    return rows


def _table_situation(method: str, length: int, device: str) -> Situation:
    return Situation(
        device="cuda" if device == "cuda" else "cpu",
        kernels="unsloth" if device == "cuda" else "fused",
        tokens=length,
        longest=length,
        quantization="nf4" if method == "QLoRA" else "none",
        multiplies_nf4=device == "cpu",
        rank=16,
        optimizer="adamw_8bit" if device == "cuda" else "adamw",
        loss="chunked" if device == "cuda" else "fused",
    )


def _fits(shape: ModelShape, method: str, length: int, hardware: Hardware) -> str:
    """Return yes (fast: no checkpointing needed), yes with it, tight, or no."""
    s = _table_situation(method, length, "cuda")
    free = hardware.vram_free_bytes
    if train_peak_bytes(shape, s) <= 0.9 * free:
        return "yes, fast"
    peak = train_peak_bytes(shape, replace(s, checkpointing="offload"))
    return "yes" if peak <= 0.9 * free else "tight" if peak <= free else "no"


def table_markdown(rows: list[dict[str, Any]]) -> str:
    """Return `plan_table`'s rows as a Markdown table."""
    head = ["model", "method", "tokens", "VRAM", *TABLE_CARDS, "RAM on a CPU"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        sizes = [f"{row[key] / GIB:.1f} GiB" for key in ("vram_bytes", "cpu_ram_bytes")]
        cells = [row["model"], row["method"], f"{row['tokens']:,}", sizes[0]]
        lines.append(" | ".join([*cells, *(row[card] for card in TABLE_CARDS), sizes[1]]))
    return "\n".join(f"| {line} |" for line in lines)
