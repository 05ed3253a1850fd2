"""What `fastft train` asks of an engine when it loads a model, seen through an engine that only writes it down."""

import gc
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig

from fastft.config import LoraConfig, ModelConfig
from fastft.engines import loading
from fastft.hardware import Choice, probe
from fastft.training.session import overrides_forgotten

CHOICES = {
    "engine": Choice("unsloth", ""),
    "quantization": Choice("none", ""),
    "dtype": Choice("float16", ""),
}


class Recorder:
    """An engine whose model is one linear layer on `device`."""

    def __init__(self, name, device, **marks):
        self.name, self.device, self.marks = name, device, marks
        self.calls = {}

    def _model(self):
        made = torch.nn.Module()
        made.q_proj = torch.nn.Linear(4, 4)
        made.device, made.get_output_embeddings = torch.device(self.device), lambda: None
        made.config = PreTrainedConfig()
        for mark, value in self.marks.items():
            setattr(made, mark, value)
        return made

    def from_pretrained(self, **keywords):
        self.calls["load"] = keywords
        return self._model(), None

    def get_peft_model(self, base, **keywords):
        self.calls["lora"] = keywords
        base.q_proj.requires_grad_(False)
        base.lora = torch.nn.Parameter(torch.zeros(keywords["r"] * 8))
        return base


@pytest.fixture
def load(monkeypatch):
    monkeypatch.setattr(loading, "check_checkpoint", lambda *a, **k: None)

    def run(engine, checkpointing=True):
        monkeypatch.setattr(loading, "get_engine", lambda name: engine)
        choices = dict(CHOICES)
        config, kind = ModelConfig(name="some/model"), SimpleNamespace(kind=engine.device)
        base, _, used = loading.load_for_training(
            config, kind, gradient_checkpointing=checkpointing, choices=choices
        )
        loading.attach_lora(
            base,
            used,
            LoraConfig(r=2),
            seed=1,
            gradient_checkpointing=checkpointing,
            train_token_ids=[],
        )
        return choices

    return run


@pytest.mark.parametrize(
    ("name", "device", "wanted", "given"),
    [
        ("unsloth", "cuda", True, "unsloth"),
        ("unsloth", "cuda", False, False),
        ("unsloth", "cpu", True, True),
        ("stock", "cuda", True, True),
    ],
)
def test_both_calls_are_told_of_the_same_checkpointing(load, name, device, wanted, given):
    engine = Recorder(name, device)
    load(engine, wanted)
    assert [engine.calls[call]["use_gradient_checkpointing"] for call in ("load", "lora")] == [
        given,
        given,
    ]


def test_unsloth_loads_the_named_model_and_no_copy_of_its_own(load):
    for name, device, asked in (
        ("unsloth", "cuda", True),
        ("unsloth", "cpu", False),
        ("stock", "cuda", False),
    ):
        engine = Recorder(name, device)
        load(engine)
        assert engine.calls["load"].get("use_exact_model_name", False) is asked


def test_on_a_gpu_unsloth_puts_no_lora_on_experts_that_nobody_named(load):
    """Left to itself it adds some to a mixture's experts there, and only there."""
    for name, device, given in (
        ("unsloth", "cuda", []),
        ("unsloth", "cpu", None),
        ("stock", "cuda", None),
    ):
        engine = Recorder(name, device)
        load(engine)
        assert engine.calls["lora"].get("target_parameters") == given


def test_a_family_that_unsloth_keeps_out_of_float16_trains_in_float32(load):
    assert (
        load(Recorder("unsloth", "cuda", _unsloth_forced_float32=True))["dtype"].value == "float32"
    )
    assert (
        load(Recorder("unsloth", "cuda", _unsloth_forced_float32=False))["dtype"].value == "float16"
    )
    assert load(Recorder("stock", "cuda"))["dtype"].value == "float16"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
def test_a_quantised_base_leaves_the_files_that_it_was_read_from(tmp_path):
    from tests.families import make_checkpoint

    base = make_checkpoint("llama", tmp_path / "base")
    choices = {
        "engine": Choice("stock", ""),
        "quantization": Choice("nf4", ""),
        "dtype": Choice("bfloat16", ""),
    }
    model, _, _ = loading.load_for_training(
        ModelConfig(name=str(base)), probe(), gradient_checkpointing=False, choices=choices
    )
    assert model.is_loaded_in_4bit
    assert model.get_output_embeddings().weight.isfinite().all()
    assert str(base) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("recorded", "held"), [("nf4", True), ("none", False)])
def test_a_run_is_talked_to_as_it_was_trained(tmp_path, recorded, held):
    from fastft.inference.generate import HuggingFaceChat
    from fastft.runs.folder import RunFolder
    from fastft.runs.target import Target
    from tests.families import make_checkpoint

    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.update_record(choices={"quantization": {"value": recorded, "reason": "asked for"}})
    base = make_checkpoint("llama", tmp_path / "base")
    chat = HuggingFaceChat(Target(str(base), None, None, run), with_adapter=False)
    assert getattr(chat.model, "is_loaded_in_4bit", False) is held


def test_a_finished_run_is_not_kept_by_bitsandbytes():
    """What transformers' Trainer enters for each embedding where the optimizer has 8 bits."""
    manager = pytest.importorskip("bitsandbytes").optim.GlobalOptimManager.get_instance()
    theirs, ours = torch.nn.Embedding(2, 2), torch.nn.Embedding(2, 2)
    manager.register_module_override(theirs, "weight", {"optim_bits": 32})
    alive = weakref.ref(ours)
    try:
        with overrides_forgotten():
            manager.register_module_override(ours, "weight", {"optim_bits": 32})
        del ours
        gc.collect()
        assert alive() is None
        assert [entry[0] for entry in manager.module_weight_config_triple] == [theirs]
    finally:
        manager.module_weight_config_triple.clear()
