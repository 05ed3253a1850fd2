"""The line that each step leaves in log.jsonl."""

import json

import pytest

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


def test_shared_beginnings_are_counted_where_the_step_knows_them():
    step = {"loss": 2.0, "tokens": 100, "unique_tokens": 60, "seconds": 0.5}
    assert step_record(1, step, {"learning_rate": 0.0}, skipped=False)["unique_tokens"] == 60
