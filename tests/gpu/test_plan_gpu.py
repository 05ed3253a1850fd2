"""VRAM peaks of real training runs on the card that is here, against the plan: within 10 %.

Random models of real sizes between 0.6B and 8B, LoRA and QLoRA, 512 to 8,192 tokens: tools/plan_error.py's cases, each
in a process of its own. The largest writes 16 GB to the temporary folder.
"""

import importlib.util
from pathlib import Path

import pytest

from fastft.hardware import probe

spec = importlib.util.spec_from_file_location(
    "plan_error", Path(__file__).parents[2] / "tools" / "plan_error.py"
)
assert spec is not None
assert spec.loader is not None
plan_error = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan_error)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(probe().kind != "cuda", reason="needs an NVIDIA GPU that torch can use"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("plan-error")


@pytest.mark.parametrize("name", plan_error.GPU_CASES)
def test_vram_peak_is_within_10_percent_of_the_plan(name, work):
    if not plan_error.fits_here(name):
        pytest.skip("the plan says that it does not fit this machine")
    record = plan_error.measure(name, work)
    assert not record["failed"], record["failed"]
    planned, measured = (
        plan_error.predict_gpu(plan_error.record_key(name), record),
        record["measured"],
    )
    assert planned["trainable_parameters"] == measured["trainable_parameters"]
    assert planned["train"] == pytest.approx(measured["vram"]["train"], rel=0.10)
