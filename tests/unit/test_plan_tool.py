"""tools/plan_error.py: what is measured, and against which plan."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastft.hardware import GIB, named_gpu, probe
from fastft.planning import (
    plan,
)
from tests.plans import ROOT, config


@pytest.fixture(scope="module")
def plan_error():
    spec = importlib.util.spec_from_file_location("plan_error", ROOT / "tools" / "plan_error.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gpu_record(plan_error, name, card):
    """A record as tools/plan_error.py writes it on a card, with made-up measurements."""
    keys = (
        "name",
        "vram_bytes",
        "vram_free_bytes",
        "capability",
        "ram_bytes",
        "ram_free_bytes",
        "cpu_cores",
    )
    gpu = json.loads(json.dumps({key: getattr(named_gpu(card), key) for key in keys}))
    vram = {"load": GIB, "train": 2 * GIB, "allocated": GIB, "context": GIB // 2}
    measured = {
        "vram": vram,
        "train": 2 * GIB,
        "imports": {"train": GIB},
        "trainable_parameters": 1,
    }
    return {
        "case": plan_error.GPU_CASES[name], "gpu": gpu, "tokenizer_bytes": 0, "measured": measured, "failed": {},
        "environment": {},
    }  # fmt: skip


def test_cpu_rows_do_not_depend_on_where_they_are_planned(plan_error, monkeypatch):
    records = json.loads(plan_error.RESULTS.read_text())
    name = "llama-135m-2048"
    here = plan_error.predict(name, records[name])
    monkeypatch.setattr("fastft.hardware.probe", lambda path=".": named_gpu("t4"))
    assert plan_error.predict(name, records[name]) == here


def test_a_gpu_gets_the_cases_that_fit_it(plan_error, monkeypatch):
    records = {key: {} for key in plan_error.CASES}
    monkeypatch.setattr("fastft.hardware.probe", lambda path=".": replace(probe(), kind="cpu"))
    assert plan_error.missing(records) == []
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        plan_error.measure("Llama-3.2-1B LoRA 512", Path("unused"))
    for card, without in (("t4", {"Llama-3.1-8B LoRA 1024"}), ("h100", set())):
        monkeypatch.setattr("fastft.hardware.probe", lambda path=".", card=card: named_gpu(card))
        assert without <= set(plan_error.GPU_CASES) - set(plan_error.missing(records))
        assert len(plan_error.missing(records)) >= 6
        done = records | {plan_error.record_key("Llama-3.2-1B LoRA 512"): {}}
        assert "Llama-3.2-1B LoRA 512" not in plan_error.missing(done)
    assert len(plan_error.missing(records)) == len(plan_error.GPU_CASES) >= 8


def test_a_gpu_row_is_planned_for_its_own_card_and_reported(plan_error, tmp_path, monkeypatch):
    name = "Llama-3.2-3B QLoRA 2048"
    record = gpu_record(plan_error, name, "l4")
    key = f"{name}, {named_gpu('l4').name}"
    record["predicted"] = plan_error.predict_gpu(key, record)
    chosen = config(
        "llama-3.2-3b", model__quantization="nf4", train__effective_batch_size=1, train__micro_batch_tokens=2048,
        train__gradient_checkpointing=False,
    )  # fmt: skip
    assert record["predicted"]["train"] + record["predicted"]["context"] == plan(
        chosen, named_gpu("l4")
    ).phases["train"].vram_bytes  # fmt: skip
    monkeypatch.setattr(plan_error, "TABLE", tmp_path / "t.md")
    monkeypatch.setattr(plan_error, "PLOT", tmp_path / "p.png")
    plan_error.report({key: record})
    text = (tmp_path / "t.md").read_text()
    planned = record["predicted"]["train"] / GIB
    assert (
        f"| {key} | train | {planned:.2f} GiB | 2.00 GiB | {planned / 2 - 1:+.0%} | 0.50 GiB |"
        in text
    )
    assert f"| {name} | train | | not measured" not in text
    assert "| Llama-3.1-8B LoRA 1024 | train | | not measured" in text


def test_only_training_counts_for_the_peak_of_training(plan_error):
    """The order of the calls: loading's peak is read, its cache given back and the mark reset before the first step."""
    calls = []
    vram = plan_error.Vram()
    vram.cuda = SimpleNamespace(
        max_memory_reserved=lambda: calls.append("peak") or 7 * len(calls),
        empty_cache=lambda: calls.append("empty"),
        reset_peak_memory_stats=lambda: calls.append("reset"),
        mem_get_info=lambda: (60, 100),
        memory_reserved=lambda: 30,
        max_memory_allocated=lambda: 5,
    )
    trainer = SimpleNamespace(training_step=lambda: calls.append("step"))
    plan_error._count_cpu_seconds(trainer, vram.before_the_first_step)
    trainer.training_step()
    trainer.training_step()
    assert calls == ["peak", "empty", "reset", "step", "step"]
    assert vram.peaks()["vram"] == {"load": 7, "train": 42, "allocated": 5, "context": 10}
