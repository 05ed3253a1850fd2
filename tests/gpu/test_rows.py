"""Unsloth's GPU kernels on rows without padding: the gradient is plain peft's, and where it is not, the check says so."""

import json

import pytest

from tests.e2e.conftest import run_python
from tests.families import FAMILIES

pytestmark = pytest.mark.gpu

GRADIENT = """
import json, sys
import torch
from dataclasses import asdict, replace
from fastft.engines import loading
from fastft.config import make_config
from fastft.data.batches import Segment
from fastft.engines import get_engine
from fastft.training.exactness import check_rows
from fastft.hardware import probe
from fastft.training.step import Stepper, StepPolicy
import numpy as np

what = json.loads(sys.argv[2])
settings = {"name": sys.argv[1], "engine": what["engine"], "dtype": what["dtype"], "quantization": what["quantization"],
    "max_seq_length": what["max_seq_length"]}
config = make_config({"project": "t", "model": settings, "data": {"source": "none"}, "lora": {"r": 8, "dropout": 0.0}}, where="here")
hardware, checkpointing = probe(), what["checkpointing"]
choices = loading.choose_loading(config, hardware)
base, _, engine = loading.load_for_training(config.model, hardware, gradient_checkpointing=checkpointing, choices=choices)
peft_model, trainable = loading.attach_lora(base, engine, config.lora, seed=1, gradient_checkpointing=checkpointing, train_token_ids=what["tokens"])
generator = torch.Generator().manual_seed(1)
with torch.no_grad():
    for name, parameter in sorted(peft_model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter))
numbers, segments = np.random.default_rng(0), []
for length in (60, 33, 40, 24, 100, 12):
    ids = numbers.integers(0, 250, length)
    labels = ids.copy()
    labels[: 1 + length // 4] = -100
    segments.append(Segment(ids, labels))
dtype = getattr(torch, choices["dtype"].value)
context = lambda: torch.autocast("cuda", dtype, enabled=dtype != torch.float32)
rows = engine.accept_rows(peft_model)
stepper = Stepper(peft_model, engine, StepPolicy(1000, rows, 0), device="cuda", on_note=print)
found = check_rows(stepper, segments, context)
rows = rows if found.exact else "padded"
scale = 1024.0 if dtype == torch.float16 else 1.0
stepper = Stepper(peft_model, engine, StepPolicy(1000, rows, 0), device="cuda", on_note=print, scale=scale if scale != 1 else None)
peft_model.train()
loss = stepper.gradient(peft_model, segments, lambda loss: (loss * scale).backward(), context)
gradient = {n: (p.grad.float() / scale).cpu() for n, p in peft_model.named_parameters() if p.grad is not None}
torch.save(gradient, sys.argv[3])
print(json.dumps({"rows": rows, "exact": found.exact, "reason": found.reason, "loss": loss, "trainable": trainable, "dtype": str(dtype),
    "checkpoint": torch.utils.checkpoint.checkpoint.__name__}))
"""


def gradient(base, path, engine, dtype, **changes):
    what = {
        "engine": engine,
        "dtype": dtype,
        "quantization": "none",
        "checkpointing": False,
        "tokens": [],
        "max_seq_length": 128,
    }
    return run_python(GRADIENT, base, json.dumps(what | changes), path)


def cosine(a, b):
    import torch

    left, right = torch.load(a), torch.load(b)
    assert sorted(left) == sorted(right)
    a, b = (
        torch.cat([gradients[name].double().flatten() for name in sorted(left)])
        for gradients in (left, right)
    )
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())


def halves():
    import torch

    return [
        "float16",
        *(
            ["bfloat16"]
            if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
            else []
        ),
    ]


@pytest.mark.parametrize("dtype", halves())
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_plain_pefts(family, dtype, checkpoint_of, tmp_path):
    base = checkpoint_of(family)
    plain = gradient(base, tmp_path / "plain", "stock", "float32")
    fast = gradient(base, tmp_path / "fast", "unsloth", dtype)
    alike, ratio = cosine(tmp_path / "fast", tmp_path / "plain")
    assert fast["trainable"] == plain["trainable"]
    assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-2), fast["reason"]
    # A mixture of experts may choose another expert after rounding.
    assert alike > (0.9 if family == "gpt-oss" else 0.995), fast["reason"]
    assert ratio == pytest.approx(1, abs=0.2 if family == "gpt-oss" else 0.02)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_unsloths_own_families_take_rows_without_padding(family, checkpoint_of, tmp_path):
    found = gradient(checkpoint_of(family), tmp_path / "fast", "unsloth", "auto")
    assert found["rows"] == "packed", found["reason"]


def test_checkpoints_are_offloaded_and_give_the_same_gradient(checkpoint_of, tmp_path):
    base = checkpoint_of("llama")
    gradient(base, tmp_path / "off", "unsloth", "auto", max_seq_length=1024)
    on = gradient(base, tmp_path / "on", "unsloth", "auto", max_seq_length=1024, checkpointing=True)
    assert (
        on["checkpoint"] == "unsloth_checkpoint"
    )  # below 512 tokens Unsloth recomputes without offloading
    assert on["rows"] == "packed", on["reason"]
    assert cosine(tmp_path / "on", tmp_path / "off")[0] > 0.999


def test_rows_of_new_tokens_train(checkpoint_of, tmp_path):
    base = checkpoint_of("qwen3")
    plain = gradient(base, tmp_path / "plain", "stock", "float32", tokens=[3, 5, 7])
    fast = gradient(base, tmp_path / "fast", "unsloth", "auto", tokens=[3, 5, 7])
    assert fast["trainable"] == plain["trainable"]
    assert cosine(tmp_path / "fast", tmp_path / "plain")[0] > 0.995


def test_nf4_rows(checkpoint_of, tmp_path):
    found = gradient(
        checkpoint_of("llama"), tmp_path / "nf4", "unsloth", "auto", quantization="nf4"
    )
    assert found["rows"] == "packed", found["reason"]
