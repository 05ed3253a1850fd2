"""Cases, statistics and arithmetic of the benchmark."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from fastft.bench import runner
from fastft.bench.case import Lengths, known_cases, load_case
from fastft.bench.flops import step_flops
from fastft.bench.record import Noise, Record, Step
from fastft.bench.statistics import not_idle, paired_ratio, spread
from fastft.bench.workload import FIRST_TOKEN, draw, draw_lengths, load, save
from fastft.errors import FastFTError
from fastft.planning.shape import ModelShape, Weight

PROMISED = {
    "smoke", "cpu-135m", "cpu-0.5b", "t4-llama3.1-8b-qlora", "l4-llama3.1-8b-qlora", "a100-llama3.1-8b-qlora",
    "a100-llama3.1-8b-lora", "a100-qwen-14b-qlora", "h200-llama3.1-8b-qlora", "t4-gemma3-4b-qlora",
    "h100-llama3.1-8b-qlora", "h100-llama3.2-1b-lora", "rtx4090-llama3.1-8b-qlora", "rtx3060-llama3.2-3b-qlora",
}  # fmt: skip


def a_record(arm: str, repeat: int, seconds: list[float]) -> Record:
    steps = [
        Step(seconds=s, loss=1.0, grad_norm=1.0, tokens=100, padded_tokens=150) for s in seconds
    ]
    return Record(
        table="defaults", arm=arm, repeat=repeat, order=0, status="ok", warmup_steps=1, steps=steps
    )


def test_every_promised_case_is_there_and_sound():
    cases = {name: load_case(str(path)) for name, path in known_cases().items()}
    assert set(cases) >= PROMISED
    for name, case in cases.items():
        assert case.name == name
        for table in case.tables.values():
            assert all(arm.source for arm in table.arms.values())


def test_a_case_is_another_one_when_anything_in_it_changes():
    case = load_case("smoke")
    assert case.hash == load_case("smoke").hash
    assert case.hash != case.model_copy(update={"steps": case.steps + 1}).hash


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(FastFTError, match="unknown case 'smok' \\(did you mean 'smoke'"):
        load_case("smok")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nstep: 3\n", encoding="utf-8")
    with pytest.raises(FastFTError, match=r"title: Field required.*step: Extra inputs"):
        load_case(str(bad))
    folder = bad.with_name("folder.yaml")
    folder.mkdir()
    with pytest.raises(FastFTError, match="is a folder"):
        load_case(str(folder))
    with pytest.raises(FastFTError, match="unknown arm of case smoke"):
        runner.run_case(load_case("smoke"), arms=["nobody"])


def test_a_gpu_case_says_that_it_needs_a_gpu():
    if runner.probe().kind == "cuda":
        pytest.skip("this machine has a GPU")
    with pytest.raises(FastFTError, match="needs an NVIDIA GPU"):
        runner.run_case(load_case("t4-llama3.1-8b-qlora"))


def test_the_same_sequences_every_time(tmp_path):
    case = load_case("smoke")
    work = draw(case, case.lengths, 8, 1024)
    again = draw(case, case.lengths, 8, 1024)
    save(work, tmp_path / "work.npz")
    back = load(tmp_path / "work.npz")
    for a, b, c in zip(work.input_ids, again.input_ids, back.input_ids, strict=True):
        assert (a == b).all()
        assert (a == c).all()
        assert a.min() >= FIRST_TOKEN, (
            "padding and control tokens never occur, so that padding can be counted"
        )
    assert work.steps == case.warmup_steps + case.steps
    assert sum(work.tokens(i) for i in range(work.steps)) == sum(map(len, work.input_ids))
    assert work.supervised(0) == work.tokens(0) - 8, "all but the first token of each sequence"


@pytest.mark.parametrize("name", ["system", "context", "multiturn"])
def test_what_a_step_has_to_compute_at_least(name):
    case = load_case(f"cpu-135m-{name}")
    work = draw(case, case.lengths, case.effective_batch_size, 2000)
    for index in range(work.steps):
        beginnings = {
            tuple(ids[: i + 1]) for ids in work.input_ids[work.step(index)] for i in range(len(ids))
        }
        parts = work.parts(index)
        assert sum(length for length, _ in parts) == work.tokens(index)
        assert sum(length - shared for length, shared in parts) == len(beginnings)


def test_lengths_follow_their_distribution(tmp_path):
    rng = np.random.default_rng(0)
    drawn = draw_lengths(Lengths(median=120, sigma=0.8, shortest=16, longest=1024), 20_000, rng)
    assert abs(np.median(drawn) - 120) < 4
    assert abs(np.log(drawn[(drawn > 16) & (drawn < 1024)]).std() - 0.8) < 0.06
    assert drawn.min() == 16
    assert drawn.max() == 1024
    own = tmp_path / "lengths.txt"
    own.write_text("7\n9\n", encoding="utf-8")
    assert set(draw_lengths(Lengths(file=str(own), shortest=2), 50, rng)) == {7, 9}
    own.write_text("seven\n", encoding="utf-8")
    with pytest.raises(FastFTError, match="one whole number a line"):
        draw_lengths(Lengths(file=str(own)), 5, rng)


def test_prompts_carry_no_loss():
    case = load_case("smoke")
    work = draw(case, Lengths(fixed=20, prompt_share=0.5), 4, 1024)
    assert work.supervised(0) == 4 * 10


def test_spread():
    found = spread([1, 2, 3, 4, 5, 6])
    assert (found.median, found.p20, found.p80) == (3.5, 2.0, 5.0)
    assert found.relative == pytest.approx(3 / 3.5)


def test_the_ratio_is_paired_by_round():
    # The machine is twice as slow in round 1; the paired ratio does not see it.
    slow = [1, 2, 1]
    ours = [a_record("fastft", i, [9, s, s]) for i, s in enumerate(slow)]
    theirs = [a_record("peft", i, [9, 3 * s, 3 * s]) for i, s in enumerate(slow)]
    ratio = paired_ratio(ours, theirs)
    assert ratio.speed == ratio.speed_low == ratio.speed_high == 3
    two = paired_ratio(ours[:2], theirs[:2])
    assert (two.speed, two.speed_low, two.speed_high) == (3, None, None), "no interval from two"


def test_no_ratio_where_others_had_the_cores():
    def records(arm, share):
        noise = Noise(load_average_before=0, load_average_after=0, others_share=share)
        return [a_record(arm, i, [1, 1]).model_copy(update={"noise": noise}) for i in range(3)]

    assert not_idle(records("fastft", 0.1), records("peft", None)) is None
    said = not_idle(records("fastft", 0.02), records("peft", 0.31))
    assert "up to 31% of the cores" in said


def test_the_same_arm_twice_gives_an_interval_around_one():
    contains = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        noise = [[list(rng.lognormal(0, 0.1, 5)) for _ in range(5)] for _ in range(2)]
        a, b = (
            [a_record(name, i, seconds) for i, seconds in enumerate(n)]
            for name, n in zip("ab", noise, strict=True)
        )
        ratio = paired_ratio(a, b, draws=500)
        contains += ratio.speed_low <= 1 <= ratio.speed_high
    assert contains / 200 >= 0.9


def test_flops_of_a_closed_form():
    # One layer of one 8 x 8 matrix, a head of 8 x 10; two sequences of 3 and 5 tokens, 6 of them with a loss.
    shape = ModelShape("m", "llama", 8, 1, 2, 1, 4, 8, 10, False, (
        Weight("q_proj", (8, 8), 1, "linear"), Weight("lm_head", (10, 8), 1, "head")))  # fmt: skip
    expected = 4 * 64 * 8 + 4 * 80 * 6 + 6 * (9 + 25) * 8 * 1 + 6 * 100 * 8
    assert step_flops(shape, [(3, 0), (5, 0)], 6, 100) == expected
    # Five tokens that begin as another sequence does with two of them: these are computed once.
    shared = 4 * 64 * 6 + 4 * 80 * 6 + 6 * (9 + 25 - 4) * 8 * 1 + 6 * 100 * 6
    assert step_flops(shape, [(3, 0), (5, 2)], 6, 100) == shared


def test_a_worker_that_never_ends_is_ended(tmp_path):
    module = ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"]
    assert runner._start(module, tmp_path / "log", {}, 1, timeout=1) is None


def test_the_runner_imports_no_torch():
    code = "import sys, fastft.bench.runner, fastft.bench.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "../../evil"}, "name"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 1e30}, "learning_rate"),
        ({"tolerances": {"loss": float("nan")}}, "tolerances.loss"),
        ({"lengths": {"median": 60, "sigma": float("inf")}}, "lengths.sigma"),
        ({"environment": {"A=B": "1"}}, "'A=B'"),
    ],
)
def test_values_that_would_end_a_run_half_way_are_refused(tmp_path, changes, named):
    values = load_case("smoke").model_dump(mode="json", exclude_none=True)
    if "environment" in changes:
        values["tables"]["defaults"]["arms"]["fastft"] |= changes
    else:
        values |= changes
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(FastFTError, match=re.escape(named)):
        load_case(str(path))


def test_a_sequence_always_has_a_token_that_carries_loss():
    case = load_case("smoke")
    lengths = case.lengths.model_copy(update={"prompt_share": 0.999})
    drawn = draw(case, lengths, 4, 1000)
    assert all((labels != -100).sum() >= 1 for labels in drawn.labels)
