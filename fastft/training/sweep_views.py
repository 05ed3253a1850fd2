"""A sweep as a table and as a picture: how each trial went, and which settings did well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.files import ours

if TYPE_CHECKING:
    from fastft.training.sweep import Sweep
    from fastft.training.trials import Trial


def table(sweep: Sweep) -> Any:
    """Return the trials as a table, the best first."""
    from rich.table import Table

    settings = list(sweep.trials[0].settings)
    judged = _judged_by(sweep)
    columns = dict.fromkeys([judged, "held-out loss"])
    shown = Table(*settings, *columns, "steps", "status", title=str(sweep.folder))
    for trial in ranked(sweep):
        loss = "" if trial.eval_loss is None else f"{trial.eval_loss:.4f}"
        metric = "" if trial.metric is None else f"{trial.metric:.2f}"
        scores = [loss] if len(columns) == 1 else [metric, loss]
        style = "bold" if trial is sweep.best else None
        steps = str(max((r["step"] for r in trial.run.read_log()), default=0))
        status = trial.status + (" (the best)" if trial is sweep.best else "")
        shown.add_row(*trial.settings.values(), *scores, steps, status, style=style)
    return shown


def ranked(sweep: Sweep) -> list[Trial]:
    """Return the trials, those that got furthest first, and of these the best first."""
    order = ("done", "paused", "dropped", "waiting", "failed")
    return sorted(
        sweep.trials,
        key=lambda t: (order.index(t.status), t.place),
    )


def _judged_by(sweep: Sweep) -> str:
    """What the trials are compared by, as it is shown."""
    by = sweep.trials[0].by
    return "held-out loss" if by == "loss" else by.replace("_", " ")


def plot(sweep: Sweep, path: Path) -> None:
    """Draw what the trials are compared by over the steps, and the settings as parallel
    coordinates.

    A line is a trial, with one colour in both halves: the better its last evaluation, the darker.
    Nothing is drawn before the first evaluation.
    """
    curves = {id(t): _curve(t) for t in sweep.trials}
    losses = [curve[-1][1] for curve in curves.values() if curve]
    if not losses:
        return
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    settings = list(sweep.trials[0].settings)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 0.6 + 0.35 * len(settings)])
    shade, scale = colormaps["viridis"], Normalize(min(losses), max(losses) or 1)
    for trial in sorted(sweep.trials, key=lambda t: t is sweep.best):
        if not curves[id(trial)]:
            continue
        steps, values = zip(*curves[id(trial)], strict=True)
        best = trial is sweep.best
        worse = scale(values[-1]) if trial.by == "loss" else 1 - scale(values[-1])
        # Not the lightest seventh of the colours: on white it cannot be seen.
        look = {"color": shade(0.85 * worse), "linewidth": 3 if best else 1.3}
        left.plot(steps, values, marker="o", markersize=3, label=trial.name, **look)
        right.plot(range(len(settings) + 1), _heights(sweep, trial, values[-1], losses), **look)
    for rung in sweep.rungs:
        left.axvline(rung, color="tab:gray", linestyle=":", linewidth=1)
    judged = _judged_by(sweep)
    unit = " per trained token" if judged == "held-out loss" else ", share of right answers"
    left.set(xlabel="optimizer step", ylabel=judged + unit)
    left.set_title("dotted: the worse half is dropped" if sweep.rungs else "", fontsize=9)
    left.grid(alpha=0.3)
    if len(sweep.trials) <= 12:
        left.legend(fontsize=7)
    _label_axes(right, sweep, settings, losses)
    figure.savefig(path, dpi=120, metadata=ours.PNG)


def _curve(trial: Trial) -> list[tuple[int, float]]:
    by = "eval_loss" if trial.by == "loss" else trial.by
    before = trial.run.read_record().get("eval_loss_before") if trial.by == "loss" else None
    first = [(0, before)] if before is not None else []
    found = [(r["step"], r[by]) for r in trial.run.read_log() if by in r]
    return [*first, *found] if found else []


def _values(sweep: Sweep, setting: str) -> list[str]:
    """The values of a setting, numbers by size."""
    values = {trial.settings[setting] for trial in sweep.trials}
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _heights(sweep: Sweep, trial: Trial, loss: float, losses: list[float]) -> list[float]:
    """Where a trial's line crosses each upright axis, from 0 (bottom) to 1."""
    heights = []
    for setting, value in trial.settings.items():
        values = _values(sweep, setting)
        heights.append(values.index(value) / max(len(values) - 1, 1))
    span = max(losses) - min(losses)
    return [*heights, (loss - min(losses)) / span if span else 0.5]


def _label_axes(axes: Any, sweep: Sweep, settings: list[str], losses: list[float]) -> None:
    for x, setting in enumerate(settings):
        values = _values(sweep, setting)
        shown = values if len(values) <= 8 else [values[0], values[-1]]
        for value in shown:
            y = values.index(value) / max(len(values) - 1, 1)
            axes.text(x + 0.03, y + 0.015, value, fontsize=8)
    for y, loss in ((0.0, min(losses)), (1.0, max(losses))):
        axes.text(len(settings) + 0.03, y + 0.015, f"{loss:.3f}", fontsize=8)
    axes.set_xticks(range(len(settings) + 1), [*settings, _judged_by(sweep)], fontsize=8)
    axes.set_yticks([])
    axes.set(ylim=(-0.06, 1.1), xlim=(-0.1, len(settings) + 0.35))
    for x in range(len(settings) + 1):
        axes.axvline(x, color="black", linewidth=0.8)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
