"""The plan against torch: shapes as transformers builds them, activations as autograd keeps them."""

import contextlib
import json

import pytest

from fastft.families import FAMILIES
from fastft.planning import (
    Situation,
    memory,
    shape_from_config,
)
from fastft.planning.memory import layer_bytes_per_token
from tests.plans import LLAMA


def test_shape_equals_what_transformers_builds(tmp_path):
    """For each family: parameters and trainable parameters of the real model with real peft."""
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = {"gemma2": {"head_dim": 16}, "gemma3_text": {"head_dim": 16}, "qwen3": {"head_dim": 32}}
    extra["gpt_oss"] = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    for family in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt_oss",
        "olmo2",
        "smollm3",
    ):
        values = LLAMA | {
            "model_type": family,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        settings = AutoConfig.for_model(**(values | extra.get(family, {})))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
        shape = shape_from_config(json.loads(settings.to_json_string(use_diff=False)), family)
        assert shape.parameters == sum(p.numel() for p in model.parameters()), family
        peft_model = get_peft_model(
            model, LoraConfig(r=4, target_modules="all-linear", use_dora=False)
        )
        real = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
        assert shape.lora_parameters(4) == real, family


KEPT = [
    ("fused-short", "llama", "bfloat16"), ("fused-short", "llama", "float32"),
    ("peft", "llama", "bfloat16"), ("peft", "llama", "float32"), ("peft", "qwen3", "bfloat16"),
    ("fused", "llama", "bfloat16"), ("fused", "llama", "float32"), ("fused", "qwen3", "bfloat16"),
    ("fused", "gemma3_text", "bfloat16"), ("fused", "phi3", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("kernels", "family", "dtype"), KEPT)
def test_saved_activations_are_what_autograd_keeps(kernels, family, dtype):
    """Count every tensor that one forward pass over a padding-free row saves, against layer_bytes_per_token."""
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastft.kernels.fused import FusedLayers
    from fastft.kernels.varlen import padding_free

    values = LLAMA | {
        "model_type": family,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
    }
    values |= {"pad_token_id": 0} if family == "phi3" else {"head_dim": 32}
    settings = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=True
    )
    kernels, _, short = kernels.partition("-")
    tokens = 256 if short else 512
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # Copies of weights (autocast) are not of the size of a row.
        if (
            storage.data_ptr() not in own
            and storage.nbytes() % tokens == 0
            and tensor.numel() >= tokens
        ):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 500, (1, tokens))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    fused = (
        contextlib.nullcontext()
        if kernels == "peft"
        else FusedLayers(model, getattr(torch, dtype)).active()
    )
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, autocast, padding_free(model), fused:
        row = {
            "position_ids": torch.arange(tokens)[None],
            "cu_seq_lens_q": torch.tensor([0, tokens]),
        }
        hidden = model.get_base_model().model(ids, use_cache=False, **row).last_hidden_state
    assert hidden.requires_grad
    shape = shape_from_config(json.loads(settings.to_json_string(use_diff=False)), family)
    c = 2 if dtype == "bfloat16" else 4
    s = Situation(
        device="cpu", kernels=kernels, tokens=tokens, longest=tokens, rank=4, compute_bytes=c
    )
    predicted = 3 * tokens * sum(layer_bytes_per_token(shape, s).values())
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.06)


def test_the_plan_knows_what_the_fused_layers_stand_for():
    pytest.importorskip("torch")
    from fastft.kernels import fused, row_attention

    assert memory.HEAD_ROWS == fused.HEAD_ROWS
    assert memory.KEEP_PROBABILITIES == row_attention.KEEP_PROBABILITIES


def test_omitted_values_are_what_transformers_takes():
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    for family, values in ((row.model_type, row.omitted) for row in FAMILIES.values()):
        real = AutoConfig.for_model(family)
        assert values == {key: getattr(real, key) for key in values}, family
