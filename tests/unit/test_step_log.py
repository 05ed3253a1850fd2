"""The line that each step leaves in log.jsonl."""

import json

import pytest
import torch

from fastft.training.callbacks import _PeakSampler
from fastft.training.loop import step_record


@pytest.mark.parametrize(
    ("skipped", "norm"), [(False, 1.5), (True, float("inf")), (True, float("nan"))]
)
def test_a_step_that_float16_skipped_is_valid_json_without_a_norm(skipped, norm):
    step = {"loss": 2.0, "tokens": 100, "seconds": 0.5}
    record = step_record(3, step, {"learning_rate": 1e-4, "grad_norm": norm}, skipped=skipped)
    json.dumps(record, allow_nan=False)
    assert (record["step"], record["lr"], record["tokens_per_sec"]) == (3, 1e-4, 200)
    assert record["grad_norm"] == (None if skipped else norm)
    assert record["peak_memory_bytes"] > 0


def test_only_steps_count_for_the_peak_that_the_plan_is_compared_with(monkeypatch):
    """What loading, the check of rows and an evaluation reserved is given back before."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: len(calls))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 1000 + len(calls))
    sampler = _PeakSampler()
    sampler.start()
    assert calls == ["empty_cache", "reset_peak_memory_stats"]
    assert sampler.stop() == 1002


def test_shared_beginnings_are_counted_where_the_step_knows_them():
    step = {"loss": 2.0, "tokens": 100, "unique_tokens": 60, "seconds": 0.5}
    assert step_record(1, step, {"learning_rate": 0.0}, skipped=False)["unique_tokens"] == 60
