"""Which checkpoint is best, by loss or by a metric; and the trackers' names."""

import pytest

from fastft.config import TRACKERS, make_config
from fastft.errors import FastFTError
from fastft.runs.folder import best_step, is_best_so_far, out_of_patience

SECTIONS = {"model": {"name": "m"}, "data": {"source": "d.jsonl"}}


def log(*rows):
    return [
        {"step": step, "eval_loss": loss, "exact_match": share, "best_by": "exact_match"}
        for step, loss, share in rows
    ]


def test_the_best_step_goes_by_the_metric_and_then_by_the_loss():
    history = log((10, 0.9, 0.5), (20, 0.5, 0.8), (30, 0.4, 0.8), (40, 0.3, 0.7))
    assert best_step(history) == 30
    assert best_step([{k: r[k] for k in ("step", "eval_loss")} for r in history]) == 40
    assert is_best_so_far(history[:3])
    assert not is_best_so_far(history)


def test_patience_counts_evaluations_without_a_better_metric():
    history = log((10, 0.5, 0.8), (20, 0.4, 0.7), (30, 0.3, 0.7))
    assert out_of_patience(history, 2)
    assert not out_of_patience(history, 3)
    better_loss = [*history, *log((40, 0.45, 0.8))]  # as good, at a lower loss than step 10
    assert not out_of_patience(better_loss, 1)


def test_best_by_must_be_measured():
    with pytest.raises(FastFTError, match=r"best_by is contains.*add it to train\.eval_metrics"):
        make_config(SECTIONS | {"train": {"best_by": "contains", "eval_metrics": ["exact_match"]}})


def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)
    with pytest.raises(FastFTError, match=r"unknown tracker 'mlflw' \(did you mean 'mlflow'"):
        make_config(SECTIONS | {"train": {"report_to": ["mlflw"]}})
