"""The selftest without its heavy parts: verdicts, time limits, what is kept, the page."""

import json

import pytest

from fastft.bench import probes
from fastft.errors import FastFTError
from fastft.hardware import named_gpu
from fastft.verification.reference import place_for
from fastft.verification.selftest import Check, Part, parts_for, selftest

MEMORY = {"predicted_bytes": 2_000_000_000, "measured_bytes": 1_900_000_000}
STEP = {"rows_seconds": 1.0, "rows_tokens": 1000, "padded_seconds": 1.5, "padded_tokens": 1500}


def test_a_plan_that_is_off_is_named():
    assert probes.judge_plan("plan: x", MEMORY, "cuda").verdict == "pass"
    off = probes.judge_plan("plan: x", MEMORY | {"measured_bytes": 1_500_000_000}, "cuda")
    assert off.verdict == "fail"
    assert "+33%" in off.advice
    assert "1.40 GiB" in off.advice
    under = probes.judge_plan("plan: x", MEMORY | {"measured_bytes": 2_400_000_000}, "cuda")
    assert under.verdict == "fail"


def test_rows_on_a_slow_path_are_named():
    assert probes.judge_speed(STEP).verdict == "pass"
    slow = probes.judge_speed(STEP | {"rows_seconds": 2.0})
    assert slow.verdict == "warn"
    assert slow.numbers["row_token_over_padded_token"] == pytest.approx(2.0)
    assert "2.00 times" in slow.advice


def test_parts_end_in_time_and_are_written_as_they_end(tmp_path):
    parts = [
        Part("half a case", "plan", {"name": "half a case"}, 60),
        Part("unknown part", "nothing", None, 60),
    ]
    said = []
    found = selftest(
        minutes=2, out=tmp_path, say=said.append, parts=parts, hardware=named_gpu("t4")
    )
    verdicts = {check.name: check.verdict for check in found.checks}
    assert verdicts["plan: half a case"] == "fail"
    assert verdicts["unknown part"] == "fail"
    assert found.verdict == "fail"
    assert found.card == "Tesla T4"
    assert json.loads((tmp_path / "selftest.json").read_text())["verdict"] == "fail"
    page = (tmp_path / "selftest.md").read_text()
    assert "WRONG" in page
    assert "What to do" in page
    assert "KeyError" in page


def test_without_time_nothing_is_begun(tmp_path):
    from fastft.verification.selftest import run_part

    (check,) = run_part(Part("x", "rows", None, 60), tmp_path, 1.0)
    assert check == Check(name="x", verdict="skip", advice=check.advice)
    with pytest.raises(FastFTError, match="at least 1"):
        selftest(minutes=0.5)
    with pytest.raises(FastFTError, match="nan"):
        selftest(minutes=float("nan"))


def test_a_certificate_is_computed_on_the_gpu_where_the_model_fits():
    gib = 2**30
    assert place_for(3 * 10**9, int(14.7 * gib), 64 * gib) == ("float32", "cuda")
    assert place_for(8 * 10**9, int(14.7 * gib), 64 * gib) == ("float32", "cpu")
    assert place_for(8 * 10**9, 22 * gib, 12 * gib) == ("bfloat16", "cuda")
    assert place_for(8 * 10**9, 0, 64 * gib) == ("float32", "cpu")
    assert place_for(70 * 10**9, 22 * gib, 64 * gib) == ("bfloat16", "cpu")


def test_a_card_is_tested_by_what_it_can_do():
    names = [part.name for part in parts_for(named_gpu("t4"))]
    assert any("float16" in name for name in names)
    assert not any("bfloat16" in name for name in names)
    assert sum(name.startswith("plan") for name in names) == 3
    both = [part.name for part in parts_for(named_gpu("h100"))]
    assert any("bfloat16" in name for name in both)
    assert any(" float16" in name for name in both)
