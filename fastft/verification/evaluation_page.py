"""How the findings of `fastft eval` are shown: a table in the terminal, and a page to share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastft.inference.metrics import TEXT_METRICS

TEMPLATES = Path(__file__).parent / "templates"
MOST_CHANGED = 200  # rows on the page; result.json holds all of them


def shown(metric: str, value: float) -> str:
    """Return a metric's value as people read it: shares in per cent, the others with four
    digits.
    """
    return f"{value:.4g}" if metric in TEXT_METRICS else f"{value:.1%}"


def changed_by(metric: str, value: float) -> str:
    """Return a difference with its sign; of shares in percentage points."""
    return f"{value:+.4g}" if metric in TEXT_METRICS else f"{100 * value:+.1f} pp"


def page(found: dict[str, Any]) -> str:
    """Return the findings of `evaluate` as one HTML page that needs no other file."""
    return (
        templates(TEMPLATES)
        .get_template("evaluation.html.jinja")
        .render(
            found=found,
            metrics=list(found["models"][0]["scores"]),
            changed=found["changed"][:MOST_CHANGED],
            shown=shown,
            changed_by=changed_by,
            lower=TEXT_METRICS,
        )
    )


def templates(folder: Path, *, html: bool = True) -> Any:
    """Return the jinja2 environment of the templates in `folder`: in HTML everything is escaped,
    and a name that nobody gives is an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, autoescape=html,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=not html,
    )  # fmt: skip


def tables(found: dict[str, Any]) -> list[Any]:
    """Return the findings as rich tables: each model's values, and what differs between them."""
    from rich.table import Column, Table

    names = list(found["models"][0]["scores"])
    values = Table(Column("model", overflow="fold"), *names, title=f"{found['rows']:,} questions")
    for model in found["models"]:
        cells = []
        for name in names:
            score = model["scores"][name]
            low, high = shown(name, score["low"]), shown(name, score["high"])
            cells.append(f"{shown(name, score['value'])} [dim]({low} to {high})[/dim]")
        values.add_row(model["name"], *cells)
    if not found["comparisons"]:
        return [values]
    folded = (Column(name, overflow="fold") for name in ("model", "beside"))
    pairs = Table(*folded, "metric", "difference", "rows better / worse", "")
    for entry in found["comparisons"]:
        name = entry["metric"]
        low, high = changed_by(name, entry["low"]), changed_by(name, entry["high"])
        pairs.add_row(
            entry["model"],
            entry["against"],
            name,
            f"{changed_by(name, entry['difference'])} [dim]({low} to {high})[/dim]",
            f"{entry['better']} / {entry['worse']}",
            entry["verdict"],
        )
    return [values, pairs]
