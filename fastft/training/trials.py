"""The trials of a sweep: which settings they have, and how one of them is trained to a step."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastft.config import RunConfig
from fastft.errors import CouldNotFinishError, FastFTError, InterruptedRunError
from fastft.progress import Reporter
from fastft.runs import checkpoint
from fastft.runs.folder import RunFolder, best_step, place_of
from fastft.training.kept import Kept
from fastft.training.train import train

DRAWS = 20
"""Times as many as trials are asked for, since small ranges give some twice; a range with fewer
values than trials gives fewer trials.
"""
MOST_TRIALS = 1_000
"""In a grid; each is a run of its own."""
NO_PLACE = (math.inf, math.inf)
RANGE = re.compile(r"(?P<low>[-+.\deE]+)\.\.(?P<high>[-+.\deE]+)")


@dataclass
class Trial:
    """One combination of the varied settings."""

    settings: dict[str, str]
    config: RunConfig
    status: str = "waiting"
    """waiting, paused (at a rung), dropped, done or failed."""
    eval_loss: float | None = None
    """The held-out loss of its last evaluation; once it is done, of the best one."""
    metric: float | None = None
    """What that evaluation had in train.best_by, where trials are compared by another than the
    loss (0 to 1, more is better).
    """
    problem: str | None = None
    """Why it failed."""

    @property
    def run(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(self.config.run_dir)

    @property
    def by(self) -> str:
        """What trials are compared by: "loss", or a metric of train.eval_metrics."""
        return self.config.train.best_by

    @property
    def place(self) -> tuple[float, float]:
        """Its place among the trials, smaller is better; infinite without an evaluation."""
        if self.eval_loss is None:
            return NO_PLACE
        return place_of(self.scores | {"best_by": None if self.metric is None else self.by})

    @property
    def scores(self) -> dict[str, Any]:
        """Its held-out loss, and the metric that it is compared by, by their names."""
        found: dict[str, Any] = {"eval_loss": self.eval_loss}
        return found if self.metric is None else found | {self.by: self.metric}

    def takes(self, record: dict[str, Any] | None) -> None:
        """Take over the scores of an evaluation, a line of log.jsonl; None leaves them."""
        if record is not None:
            self.eval_loss = record["eval_loss"]
            self.metric = None if self.by == "loss" else record.get(self.by)

    @property
    def name(self) -> str:
        """What sets it apart, for a person."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


def draw(base: RunConfig, vary: Sequence[str], trials: int | None) -> list[dict[str, str]]:
    """Return the settings of each trial: the whole grid, or `trials` drawn from it.

    Raises FastFTError for settings that are written wrongly, and for ranges without `trials`.
    """
    axes = dict(_axis(text) for text in vary)
    if not axes:
        raise FastFTError("nothing varies. Give for example --vary train.learning_rate=1e-4,3e-4.")
    if len(axes) < len(vary):
        raise FastFTError("a setting is varied twice; give all its values in one --vary.")
    if trials is not None and not 1 <= trials <= MOST_TRIALS:
        raise FastFTError(f"--trials is {trials}; it must be at least 1, at most {MOST_TRIALS:,}.")
    ranges = [key for key, values in axes.items() if isinstance(values, tuple)]
    if ranges and trials is None:
        raise FastFTError(f"{ranges[0]} has a range; say with --trials N how many to draw.")
    generator = np.random.default_rng([base.train.seed, 23])
    if ranges:
        assert trials is not None
        drawn: list[dict[str, str]] = []
        for _ in range(DRAWS * trials):  # each combination once: it is one run's folder
            if len(drawn) == trials:
                break
            one = {key: _one(generator, values) for key, values in axes.items()}
            drawn += [one] if one not in drawn else []
        return drawn
    lists = [values for values in axes.values() if isinstance(values, list)]
    count = math.prod(map(len, lists))
    if count > MOST_TRIALS:
        raise FastFTError(
            f"there are {count:,} combinations, and a sweep has at most {MOST_TRIALS:,} trials. "
            "Vary fewer values."
        )
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]
    if trials is None or trials >= len(grid):
        return grid
    chosen = generator.choice(len(grid), trials, replace=False)
    return [grid[int(index)] for index in sorted(chosen)]


def _axis(text: str) -> tuple[str, list[str] | tuple[float, float]]:
    """Return the setting and its values, or the two ends of its range."""
    key, separator, values = (part.strip() for part in text.partition("="))
    if not separator or not key or not values:
        raise FastFTError(f"--vary {text!r}: write it as --vary lora.r=8,16")
    if key.partition(".")[0] in ("project", "output_dir", "mirror", "export"):
        raise FastFTError(f"--vary {text!r}: this changes nothing of what is trained.")
    if key == "train.best_by":
        raise FastFTError(
            f"--vary {text!r}: trials are compared by train.best_by, so it is the same for all. "
            "Give it with --set."
        )
    found = RANGE.fullmatch(values)
    if found is None:
        listed = [value.strip() for value in values.split(",") if value.strip()]
        if not listed:
            raise FastFTError(f"--vary {text!r} names no value: write it as --vary lora.r=8,16")
        return key, list(dict.fromkeys(listed))
    try:
        low, high = float(found["low"]), float(found["high"])
    except ValueError as error:
        raise FastFTError(f"--vary {text!r}: {error}") from error
    if not 0 < low < high < math.inf:
        raise FastFTError(
            f"--vary {text!r}: a range needs two positive numbers, the smaller first."
        )
    if found["low"].isdigit() and found["high"].isdigit():
        return key, (int(low), int(high))  # whole numbers are drawn whole
    return key, (low, high)


def _one(generator: np.random.Generator, values: list[str] | tuple[float, float]) -> str:
    if isinstance(values, list):
        return values[int(generator.integers(len(values)))]
    low, high = (math.log(end) for end in values)
    drawn = math.exp(generator.uniform(low, high))
    return str(round(drawn)) if isinstance(values[0], int) else f"{drawn:.3g}"


def train_to(trial: Trial, step: int | None, kept: Kept, report: Reporter) -> None:
    """Train one trial to `step`, or to its end; a trial that cannot finish has failed, and the
    others go on.
    """
    newest, _ = checkpoint.newest_whole(trial.run.checkpoints)
    at = checkpoint.step_of(newest) if newest else 0
    if step is not None and (at > step or (at == step and _was_judged(trial, step))):
        trial.status = "paused"
    else:
        report.note(f"{trial.name}: from step {at} to {step or 'the end'}")
        # One that was ended between a rung's checkpoint and its evaluation makes up for that first.
        slice_of = None if step is None else max(1, step - at)
        try:
            quiet = Reporter(report.console, quiet=True)
            result = train(trial.config, stop_after=slice_of, reporter=quiet, kept=kept)
            trial.status = result.status
            if result.status == "paused" and step is None:
                trial.problem = "train.max_minutes ended it"
        except InterruptedRunError:
            raise
        except CouldNotFinishError as error:
            trial.status, trial.problem = "failed", str(error)
            report.warn(f"{trial.name} failed: {error}")
    evaluations = _evaluations(trial)
    if evaluations:
        best = best_step(evaluations) if trial.status == "done" else None
        at_best = [record for record in evaluations if record["step"] == best]
        trial.takes((at_best or evaluations)[-1])
        report.note(f"{trial.name}: {told(trial.scores)}")


def _evaluations(trial: Trial) -> list[dict[str, Any]]:
    return [record for record in trial.run.read_log() if "eval_loss" in record]


def told(scores: dict[str, Any]) -> str:
    """Return the scores of a trial for a person: "exact match 0.50, held-out loss 1.2034"."""
    others = [f"{k.replace('_', ' ')} {v:.2f}, " for k, v in scores.items() if k != "eval_loss"]
    return "".join(others) + f"held-out loss {scores['eval_loss']:.4f}"


def _was_judged(trial: Trial, step: int) -> bool:
    return any("eval_loss" in r for r in trial.run.read_log() if r["step"] == step)


def as_of(trial: Trial, step: int) -> Trial:
    """Return the trial with the scores that it had at `step`, or at the last evaluation before."""
    found = replace(trial, eval_loss=None, metric=None)
    earlier = [record for record in _evaluations(trial) if record["step"] <= step]
    found.takes(earlier[-1] if earlier else None)
    return found
