"""`fastft sweep`: several settings on one loaded base, the worse half dropped on the way.

    trials of 40 steps, four of them     step 10      step 20      step 40
      lora.r=8   learning_rate=1e-4      1.31         dropped
      lora.r=8   learning_rate=3e-4      1.19         1.02         0.98    the best
      lora.r=16  learning_rate=1e-4      1.28         dropped
      lora.r=16  learning_rate=3e-4      1.21         1.04         dropped

Each trial is an ordinary run: its own folder, which `fastft train` continues and `fastft export`
exports. It is trained to a rung, saved, and goes on from there in its turn, so a trial's losses
are those of the same settings alone, and a sweep that was killed goes on where it was. Loading,
tokenising and planning happen once, and in memory there is one base and one adapter at a time.

Rungs: successive halving (Jamieson and Talwalkar 2016, "Non-stochastic best arm identification
and hyperparameter optimization", AISTATS), by the trial's own evaluations: the held-out loss, or
the metric that train.best_by names.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastft.config import RunConfig, load_config
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.files import ours, read_json, write_atomically
from fastft.hardware import probe
from fastft.progress import Reporter
from fastft.training import ranks
from fastft.training.kept import Kept
from fastft.training.trials import Trial, as_of, draw, told, train_to

LONGEST_NAME = 200
"""Characters of a trial's folder: most file systems hold 255 bytes, and files beside it are
written under a longer name first.
"""


@dataclass
class Sweep:
    """A sweep's trials and where it writes."""

    folder: Path
    trials: list[Trial]
    rungs: list[int]
    """Steps at which the worse half of the trials that are left is dropped."""
    seconds: float = 0.0
    best: Trial | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        trials = [
            {
                "run": str(trial.run.path),
                "settings": trial.settings,
                "status": trial.status,
            }
            | trial.scores
            | ({"problem": trial.problem} if trial.problem else {})
            for trial in self.trials
        ]
        best = str(self.best.run.path) if self.best else None
        return {"trials": trials, "best": best, "rungs": self.rungs, "seconds": self.seconds}


def sweep(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    vary: Sequence[str],
    trials: int | None = None,
    keep_all: bool = False,
    on_ray: bool = False,
    reporter: Reporter | None = None,
) -> Sweep:
    """Train the combinations of `vary` ("lora.r=8,16"), and return them with the best one.

    `trials` draws so many of them at random, with the config's train.seed; ranges
    ("train.learning_rate=1e-5..1e-3", on a logarithmic scale) need it. `keep_all` drops none.
    They are trained here, one after the other, or spread over the processes of a launcher, or
    `on_ray`. The same call goes on where an earlier one was stopped. Raises FastFTError
    (settings), CouldNotFinishError where every trial failed, InterruptedRunError.
    """
    started, report = time.monotonic(), reporter or Reporter()
    base = load_config(config, list(overrides))
    ranks.join(base.train.lost_after_minutes)
    folder = Path(base.output_dir) / f"{base.project}-sweep"
    drawn = draw(base, vary, trials)
    made = [_trial(config, overrides, base, folder, settings) for settings in drawn]
    _refuse_like_names(made)
    result = Sweep(folder, made, [])
    kept = Kept()
    run_all: Callable[[list[Trial], int | None], None]
    run_all = partial(_train_here, kept=kept, report=report)
    if on_ray:
        from fastft.training.sweep_ray import RayTrials

        run_all = RayTrials(folder / "ray", gpu=probe(folder).kind == "cuda")
    if ranks.first():
        _refuse_another_sweep(result)
    result.rungs = [] if keep_all else _rungs(base, made, kept)
    _say(report, f"{len(made)} trials in {folder}; rungs at steps {result.rungs or '(none)'}")
    for step in [*result.rungs, None]:
        left = [trial for trial in made if trial.status not in ("dropped", "failed")]
        run_all(left, step)
        if step is not None:
            _drop_the_worse_half(left, step, report)
        _write(result)
    finished = [t for t in made if t.status == "done" and t.eval_loss is not None]
    result.best = min(finished, key=lambda t: (t.place, t.name), default=None)
    result.seconds = round(time.monotonic() - started, 1)
    _write(result)
    if all(trial.status == "failed" for trial in made):
        raise CouldNotFinishError(f"every trial failed; the first: {made[0].problem}")
    return result


# --- which trials


def _trial(
    config: str | Path,
    overrides: Sequence[str],
    base: RunConfig,
    folder: Path,
    settings: dict[str, str],
) -> Trial:
    name = re.sub(
        r"[^\w.+-]+", "-", "_".join(f"{k.split('.')[-1]}-{v}" for k, v in settings.items())
    )
    varied = [f"{key}={value}" for key, value in settings.items()]
    made = load_config(
        config,
        [
            *overrides,
            *varied,
            f"project={json.dumps(name)}",
            f"output_dir={json.dumps(str(folder))}",
        ],
    )
    # Copies of every trial would fill a mirror.
    return Trial(settings, made.model_copy(update={"mirror": None}))


def _refuse_like_names(trials: list[Trial]) -> None:
    """Raise FastFTError where two trials would be one run, or a name is too long for a folder."""
    names: dict[str, Trial] = {}
    for trial in trials:
        name = trial.config.project
        if len(name) > LONGEST_NAME:
            raise FastFTError(
                f"the trial {trial.name[:80]}... needs a folder name of {len(name)} characters, "
                f"and {LONGEST_NAME} are possible. Vary shorter values."
            )
        other = names.setdefault(name, trial)
        if other is not trial:
            raise FastFTError(
                f"the trials {other.name} and {trial.name} would both be the run {name}. Vary "
                "values that differ in letters or digits."
            )


def _refuse_another_sweep(result: Sweep) -> None:
    """Raise FastFTError where the folder holds the trials of other settings, or foreign files."""
    path = result.folder / "sweep.json"
    if not path.exists():
        ours.refuse_foreign([result.folder / "sweep.png"])
        return
    found = read_json(path, "Delete it, and the sweep goes on with the runs beside it.")
    trials = found.get("trials")
    if not isinstance(trials, list) or not all(isinstance(t, dict) for t in trials):
        raise FastFTError(f"{path} is no record of a sweep. Move it away, or use another name.")
    before = [trial.get("settings") for trial in trials]
    now = [trial.settings for trial in result.trials]
    if before != now:
        raise FastFTError(
            f"{result.folder} holds a sweep over other settings ({len(before)} trials, the first "
            f"{next(iter(before), None)}; now {len(now)}, the first {now[0]}). Use "
            "another project name."
        )


# --- how far


def _rungs(base: RunConfig, trials: list[Trial], kept: Kept) -> list[int]:
    """Return the steps of the rungs: a half, a quarter ... of the run, one for each halving.

    Each is one of the trials' own evaluations, so that no trial does anything that it would not
    do alone.
    """
    total = min(_total_steps(trial.config, kept) for trial in trials)
    every = max(trial.config.train.eval_steps for trial in trials)
    halvings = math.ceil(math.log2(len(trials)))
    wanted = [math.ceil(total / 2**k / every) * every for k in range(halvings, 0, -1)]
    return sorted({step for step in wanted if step < total})


def _total_steps(config: RunConfig, kept: Kept) -> int:
    """Return the optimizer steps of a run; the data is read for it where they count epochs."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    from fastft.progress import silent
    from fastft.training.session import Session

    session = Session(config, probe(config.output_dir), report=silent(), kept=kept)
    return session.total_steps(session.read_data(session.open()))


def _drop_the_worse_half(trials: list[Trial], step: int, report: Reporter) -> None:
    """Drop those that train.best_by says are worse at `step`; of an odd number one more stays."""
    alive = [(as_of(trial, step), trial) for trial in trials if trial.status != "failed"]
    alive.sort(key=lambda pair: (pair[0].place, pair[0].name))
    for then, trial in alive[math.ceil(len(alive) / 2) :]:
        trial.status = "dropped"
        scores = "no evaluation" if then.eval_loss is None else told(then.scores)
        _say(report, f"step {step}: {trial.name} is dropped ({scores})")


# --- training them


def _train_here(trials: list[Trial], step: int | None, kept: Kept, report: Reporter) -> None:
    """Train this process's part of the trials to `step`; every process then knows how all went."""
    here = ranks.world()
    for trial in trials[here.rank :: here.size]:
        with ranks.alone():
            train_to(trial, step, kept, report)
    mine = {t.name: (t.status, t.eval_loss, t.metric, t.problem) for t in trials}
    for rank, states in enumerate(ranks.gather_when_ready(mine)):
        for trial in trials[rank :: here.size]:
            trial.status, trial.eval_loss, trial.metric, trial.problem = states[trial.name]


def _write(result: Sweep) -> None:
    """Write sweep.json and sweep.png; the first process does."""
    if not ranks.first():
        return
    from fastft.training.sweep_views import plot

    result.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(result.folder / "sweep.json", json.dumps(result.as_dict(), indent=1))
    plot(result, result.folder / "sweep.png")


def _say(report: Reporter, text: str) -> None:
    if ranks.first():
        report.note(text)
