"""The line that each step leaves in log.jsonl."""

import json
from types import SimpleNamespace

import pytest

from fastft.training.loop import StepTrainer


@pytest.mark.parametrize(
    ("skipped", "norm"), [(False, 1.5), (True, float("inf")), (True, float("nan"))]
)
def test_a_step_that_float16_skipped_says_so_and_is_valid_json(skipped, norm):
    records, notes = [], []
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=3),
        progress=SimpleNamespace(step={"loss": 2.0, "tokens": 100, "seconds": 0.5}),
        accelerator=SimpleNamespace(optimizer_step_was_skipped=skipped),
        stepper=SimpleNamespace(on_note=notes.append),
        on_log=records.append,
        report_every=10,
    )
    StepTrainer.log(trainer, {"loss": 2.0, "learning_rate": 1e-4, "grad_norm": norm})
    (record,) = records
    json.dumps(record, allow_nan=False)
    assert record["grad_norm"] == (None if skipped else norm)
    assert [note.startswith("step 3: the gradient overflowed") for note in notes] == [
        True
    ] * skipped
