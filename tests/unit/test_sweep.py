"""Which trials a sweep has, where its rungs are, and what it drops."""

import json
from pathlib import Path

import pytest

from fastft.config import make_config
from fastft.errors import FastFTError
from fastft.progress import silent
from fastft.training.kept import Kept
from fastft.training.sweep import (
    Sweep,
    _drop_the_worse_half,
    _refuse_another_sweep,
    _rungs,
)
from fastft.training.sweep_views import plot, ranked, table
from fastft.training.trials import Trial, draw


def config(**train):
    return make_config({"model": {"name": "m"}, "data": {"source": "x.jsonl"}, "train": train})


def trial(folder: Path, losses, status="paused", **settings):
    run = folder / "-".join(map(str, settings.values()))
    run.mkdir()
    lines = [json.dumps({"step": step, "eval_loss": loss}) for step, loss in losses.items()]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    made = config().model_copy(update={"output_dir": str(folder), "project": run.name})
    values = list(losses.values())
    return Trial(settings, made, status, values[-1] if values else None)


def test_a_grid_has_every_combination_once():
    found = draw(config(), ["lora.r=8,16,8", "train.learning_rate=1e-4, 3e-4"], None)
    assert found == [
        {"lora.r": r, "train.learning_rate": rate} for r in ("8", "16") for rate in ("1e-4", "3e-4")
    ]


def test_trials_are_drawn_by_the_seed():
    axes = ["lora.r=8,16,32", "train.learning_rate=1e-4,2e-4,3e-4"]
    drawn = draw(config(seed=1), axes, 4)
    assert len({tuple(settings.values()) for settings in drawn}) == 4
    assert drawn == draw(config(seed=1), axes, 4)
    assert drawn != draw(config(seed=2), axes, 4)
    rates = [float(s["lr"]) for s in draw(config(), ["lr=1e-5..1e-3"], 400)]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    # On a logarithmic scale half of them lie below the geometric mean: 400 draws, 5 sigma.
    assert sum(rate < 1e-4 for rate in rates) == pytest.approx(200, abs=50)


@pytest.mark.parametrize(
    ("vary", "trials", "words"),
    [
        ([], None, "nothing varies"),
        (["lora.r"], None, "--vary lora.r=8,16"),
        (["lora.r=8", "lora.r=16"], None, "varied twice"),
        (["output_dir=a,b"], None, "changes nothing"),
        (["train.best_by=loss,contains"], None, "the same for all"),
        (["train.learning_rate=1e-5..1e-3"], None, "--trials N"),
        (["train.learning_rate=1e-3..1e-5"], 3, "the smaller first"),
        (["lora.r=8,16"], 0, "at least 1"),
    ],
)
def test_what_cannot_be_drawn_says_why(vary, trials, words):
    with pytest.raises(FastFTError, match=words.replace("(", r"\(")):
        draw(config(), vary, trials)


@pytest.mark.parametrize(
    ("trials", "steps", "every", "expected"),
    [
        (4, 40, 5, [10, 20]),
        (4, 40, 8, [16, 24]),  # rounded up to an evaluation: 10 to 16, 20 to 24
        (8, 80, 10, [10, 20, 40]),
        (4, 40, 30, [30]),
        (4, 40, 50, []),
        (1, 40, 5, []),
    ],
)
def test_rungs_are_evaluations(trials, steps, every, expected):
    made = [Trial({}, config(max_steps=steps, eval_steps=every)) for _ in range(trials)]
    assert _rungs(made[0].config, made, Kept()) == expected


def test_the_worse_half_is_dropped(tmp_path):
    losses = {"a": 1.5, "b": 1.1, "c": 1.3, "d": 1.2, "e": 1.4}
    made = [trial(tmp_path, {5: 9.0, 10: loss}, name=name) for name, loss in losses.items()]
    made.append(trial(tmp_path, {}, status="failed", name="f"))
    _drop_the_worse_half(made, 10, silent())
    assert {t.settings["name"] for t in made if t.status == "dropped"} == {"a", "e"}
    assert made[-1].status == "failed"


def judged(folder, name, evaluations, status="paused"):
    """A trial that is compared by its exact matches: [(step, loss, share right)]."""
    run = folder / name
    run.mkdir()
    lines = [
        {"step": step, "eval_loss": loss, "exact_match": share, "best_by": "exact_match"}
        for step, loss, share in evaluations
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = config(eval_metrics=["exact_match"], best_by="exact_match")
    made = made.model_copy(update={"output_dir": str(folder), "project": name})
    found = Trial({"name": name}, made, status)
    found.takes(lines[-1])
    return found


def test_what_best_by_names_decides(tmp_path):
    """The metric of the settings, at rungs, in the order and in the picture; then the loss."""
    losing = judged(tmp_path, "a", [(5, 1.0, 0.2), (10, 0.9, 0.3)])
    tied = judged(tmp_path, "b", [(5, 1.3, 0.6), (10, 1.2, 0.6)])
    winning = judged(tmp_path, "c", [(5, 1.4, 0.1), (10, 1.1, 0.6)])
    trials = [losing, tied, winning]
    _drop_the_worse_half(trials, 5, silent())
    assert [t.status for t in trials] == ["paused", "paused", "dropped"]
    for trial in trials:
        trial.status = "done"
    found = Sweep(tmp_path, trials, [5], best=winning)
    assert ranked(found) == [winning, tied, losing]
    assert found.as_dict()["trials"][2]["exact_match"] == 0.6
    assert "exact match" in [column.header for column in table(found).columns]
    plot(found, tmp_path / "metric.png")
    assert (tmp_path / "metric.png").stat().st_size > 10_000


def test_the_picture_and_the_order(tmp_path):
    made = [
        trial(tmp_path, {5: 2.0, 10: 1.4}, status="dropped", r="8", rate="1e-4"),
        trial(tmp_path, {5: 1.9, 10: 1.2, 20: 1.0}, status="done", r="16", rate="3e-4"),
        trial(tmp_path, {}, status="failed", r="8", rate="3e-4"),
    ]
    found = Sweep(tmp_path, made, [10], best=made[1])
    assert [t.status for t in ranked(found)] == ["done", "dropped", "failed"]
    plot(found, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    empty = Sweep(tmp_path, made[2:], [])
    plot(empty, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_another_sweep_in_the_same_folder_is_refused(tmp_path):
    made = [trial(tmp_path, {5: 1.0}, r="8")]
    (tmp_path / "sweep.json").write_text(json.dumps(Sweep(tmp_path, made, []).as_dict()))
    _refuse_another_sweep(Sweep(tmp_path, made, []))
    with pytest.raises(FastFTError, match="over other settings"):
        _refuse_another_sweep(Sweep(tmp_path, [Trial({"r": "16"}, made[0].config)], []))


def test_what_was_loaded_is_made_once():
    kept, made = Kept(), []

    def make():
        made.append(1)
        return len(made)

    assert [kept.once("data", {"a": 1}, make) for _ in range(3)] == [1, 1, 1]
    assert kept.once("data", {"a": 2}, make) == 2
    assert kept.once("data", {"a": 1}, make) == 3  # only the latest is held


def test_whole_numbers_are_drawn_whole_and_nothing_is_no_value():
    assert len(draw(config(), ["lora.r=1..3"], 20)) == 3  # each is one run's folder
    drawn = draw(config(), ["lora.r=8..64"], 20)
    assert all(8 <= int(settings["lora.r"]) <= 64 for settings in drawn)
    with pytest.raises(FastFTError, match="names no value"):
        draw(config(), ["lora.r=,"], None)
