"""`fastft data`: see what will be trained on, before anything is trained. Loads a tokenizer, no
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastft.config import ModelConfig, RunConfig, read_yaml
from fastft.errors import FastFTError
from fastft.files import ours
from fastft.models import explained

if TYPE_CHECKING:
    from fastft.data import DataReport, Prepared
    from fastft.data.report import Sharing

SHARING_STEPS = 32
"""Steps of which the common beginnings are looked at."""
GROUPED_SAMPLES = 20_000
"""Samples up to which `fastft data` tries train.order: grouped: sorting them takes a second."""


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
    report.sharing = sharing_of(config, found.train)
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
    """Return data.png of the run, or None, with the reason, where that is a run of other data or
    the picture is somebody else's.
    """
    folder = config.run_dir
    path, why = folder / "data.png", None
    if (folder / "run.yaml").is_file():
        trained = (read_yaml(folder / "run.yaml").get("data") or {}).get("source")
        if trained != config.data.source:
            why = (
                f"{folder} is a run of other data ({trained}), so nothing was written into it. "
                "Give this config a project name of its own."
            )
    if why is None and (path.is_symlink() or path.exists()) and not ours.is_ours(path):
        why = f"{path} was not written by fastft, so it stays as it is and no plot was written."
    if why is not None:
        console.print(why, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return path if why is None else None


def sharing_of(config: RunConfig, samples: Any) -> Sharing | None:
    """Return what the sequences of a step have in common in the first steps of a run; None without
    samples. The grouped order is looked at only in a set that is sorted in a moment.
    """
    from fastft.data.batches import StepBatches, segments_of, unique_tokens
    from fastft.data.report import Sharing

    if not len(samples):
        return None
    settings, found = config.train, {}
    grouped = settings.order == "grouped" or len(samples) <= GROUPED_SAMPLES
    for order in ("shuffled", "grouped") if grouped else ("shuffled",):
        steps = StepBatches(samples, settings.effective_batch_size, settings.seed, order=order)
        firsts = [segments_of(steps[i]) for i in range(min(len(steps), SHARING_STEPS))]
        found[order] = (
            sum(len(segment) for step in firsts for segment in step),
            sum(unique_tokens(step) for step in firsts),
        )
    tokens, unique = found[settings.order]
    as_grouped = found.get("grouped")
    if as_grouped and settings.order == "shuffled":
        # Other sequences are in these steps, so what is saved is carried over as a share.
        as_grouped = (tokens, round(tokens * as_grouped[1] / max(as_grouped[0], 1)))
    return Sharing(
        steps=min(len(steps), SHARING_STEPS),
        tokens=tokens,
        unique_tokens=unique,
        grouped_unique_tokens=as_grouped[1] if as_grouped else None,
    )


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
    steps = config.train.max_steps
    if steps is not None and steps * batch < train_samples:
        notes.append(
            f"train.max_steps {steps:,} with {batch:,} sequences a step see {steps * batch:,} of "
            f"the {train_samples:,} samples ({steps * batch / train_samples:.0%})"
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
        with explained(config.name):
            found = AutoConfig.from_pretrained(config.name, revision=config.revision)
    except (OSError, ValueError):
        # no config.json beside the tokenizer, or its own code: loading the model will tell
        return None
    return getattr(found.get_text_config(), "max_position_embeddings", None)
