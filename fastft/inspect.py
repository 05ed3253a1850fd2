"""`fastft data`: see what will be trained on, before anything is trained. Loads a tokenizer, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from fastft.config import RunConfig


def inspect_data(config: RunConfig, *, plot: Path | None = None, console: Console | None = None) -> Any:
    """Print the data report of `config` and return it (a pydantic model). `plot` receives the length histogram as PNG."""
    from fastft.data import prepare
    from fastft.model import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    data = prepare(config.data, tokenizer, max_seq_length=config.model.max_seq_length, seed=config.train.seed)
    data.report.print(console or Console(stderr=True))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        data.report.plot(plot)
    return data.report
