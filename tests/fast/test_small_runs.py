"""What a run of a few examples needs: steps that change something, and a word about them."""

import pytest

from fastft.config import TrainConfig, make_config
from fastft.errors import FastFTError
from fastft.planning.time import steps_of_run
from fastft.runs.folder import best_step, out_of_patience
from fastft.runs.report import _evaluations
from fastft.runs.target import resolve
from fastft.training.session import total_steps, warmup_steps


@pytest.mark.parametrize(
    ("total", "given", "scheduler", "expected"),
    [(1, None, "cosine", 0), (33, None, "cosine", 0), (34, None, "cosine", 2), (1000, None, "cosine", 30),
     (1000, None, "constant", 0), (5, 1, "cosine", 1)],
)  # fmt: skip
def test_no_run_warms_up_for_one_step_unless_it_is_told_to(total, given, scheduler, expected):
    settings = TrainConfig(warmup_steps=given, scheduler=scheduler)
    assert warmup_steps(settings, total) == expected


def test_a_run_without_max_steps_sees_every_sequence_as_often_as_its_epochs_say():
    settings = TrainConfig(effective_batch_size=8, epochs=1.5)
    assert [total_steps(settings, sequences) for sequences in (1, 8, 9, 80)] == [2, 2, 3, 15]
    assert total_steps(TrainConfig(max_steps=7), 80) == 7


def test_a_folder_that_only_data_has_seen_says_what_to_do(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "data.png").touch()
    with pytest.raises(
        FastFTError, match=r"nothing was trained in .* yet. Start with: fastft train"
    ):
        resolve(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FastFTError, match=r"neither a run .*It holds: .*notes.txt"):
        resolve(tmp_path)


def test_the_plan_counts_the_steps_that_training_makes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n' * 9)
    train = {"epochs": 3, "effective_batch_size": 8}
    config = make_config(
        {"model": {"name": "x"}, "data": {"source": str(rows), "eval_fraction": 0}, "train": train}
    )
    assert steps_of_run(config)[0] == total_steps(config.train, 9) == 6


def test_a_loss_that_is_no_number_is_never_the_best():
    history = [
        {"step": s, "eval_loss": loss} for s, loss in ((1, float("nan")), (2, 3.0), (3, 2.0))
    ]
    assert best_step(history) == 3
    assert not out_of_patience(history, 2)


def test_the_report_holds_metrics_that_changed_on_the_way():
    entries = [
        {"step": 1, "eval_loss": 1.0, "exact_match": 0.5, "contains": 0.6, "samples": []},
        {"step": 2, "eval_loss": 0.9, "exact_match": 0.7, "samples": []},
    ]
    table = "\n".join(_evaluations(entries))
    assert "| 1 | 1.0000 | 50.0% | 60.0% |" in table
    assert "| 2 | 0.9000 | 70.0% |  |" in table
