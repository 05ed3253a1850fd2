"""`fastft data`: see what will be trained on, before anything is trained. Loads a tokenizer, no
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastft.config import ModelConfig, RunConfig, read_yaml
from fastft.errors import FastFTError

if TYPE_CHECKING:
    from fastft.data import DataReport, Prepared


def inspect_data(
    config: RunConfig,
    *,
    data: Any = None,
    plot: Path | bool | None = None,
    console: Console | None = None,
) -> DataReport:
    """Print the data report of `config` and return it. `data` (a list of rows, or a
    `datasets.Dataset`) is read instead of the config's source; `plot` receives the length
    histogram as PNG; True: data.png in the run's folder, unless that is a run of other data.
    """
    from fastft.data import prepare
    from fastft.models import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    found: Prepared = prepare(
        config.data,
        tokenizer,
        max_seq_length=config.model.max_seq_length,
        seed=config.train.seed,
        rows=data,
    )
    report = found.report
    report.notices += misfits(config, len(found.train), max_positions(config.model))
    console = console or Console(stderr=True)
    report.print(console)
    if plot is True:
        plot = _place_of_plot(config, console)
    if plot:
        try:
            plot.parent.mkdir(parents=True, exist_ok=True)
            report.plot(plot)
        except OSError as error:
            raise FastFTError(
                f"the plot {plot} cannot be written: {error}. Set output_dir to another folder."
            ) from error
        console.print(
            f"the lengths as a picture: {plot}", markup=False, highlight=False, soft_wrap=True
        )
    return report


def _place_of_plot(config: RunConfig, console: Console) -> Path | None:
    """Return data.png of the run, or None, with the reason, where that is a run of other data."""
    folder = config.run_dir
    if (folder / "run.yaml").is_file():
        trained = (read_yaml(folder / "run.yaml").get("data") or {}).get("source")
        if trained != config.data.source:
            console.print(
                f"{folder} is a run of other data ({trained}), so nothing was written into it. "
                "Give this config a project name of its own.",
                style="yellow",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            return None
    return folder / "data.png"


def misfits(config: RunConfig, train_samples: int, positions: int | None) -> list[str]:
    """Return what does not fit between the settings, the number of training samples and the
    model's positions.
    """
    notes = []
    batch, longest = config.train.effective_batch_size, config.model.max_seq_length
    if batch > train_samples:
        notes.append(
            f"train.effective_batch_size {batch:,} is more than the {train_samples:,} samples "
            "there are: each step "
            f"holds all of them once, so an epoch is one step; set at most {train_samples:,}, "
            "or train more epochs"
        )
    if positions is not None and longest > positions:
        notes.append(
            f"model.max_seq_length {longest:,} is above the {positions:,} positions that the "
            "model was made for: it "
            f"answers badly beyond them; set at most {positions:,}"
        )
    return notes


def max_positions(config: ModelConfig) -> int | None:
    """Return the longest sequence that the model was made for, from its config.json; None where
    that is not known.
    """
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.name, revision=config.revision)
    except (
        OSError,
        ValueError,
    ):  # no config.json beside the tokenizer, or its own code: loading the model will tell
        return None
    return getattr(found.get_text_config(), "max_position_embeddings", None)
