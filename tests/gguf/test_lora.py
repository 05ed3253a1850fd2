"""The adapter as a GGUF file of its own: exact for every scale that peft knows, refused for what it cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastft.errors import FastFTError
from fastft.exporting.gguf import export_gguf
from fastft.exporting.gguf.lora import export_gguf_lora
from tests.families import make_checkpoint
from tests.gguf.oracle import hf_logits, kl, llama_cpp_logits
from tests.unit.test_export_weights import load, train_adapter

SCALES = {
    "plain": {"lora_alpha": 8},
    "rslora": {"use_rslora": True},
    "alpha-pattern": {"alpha_pattern": {"k_proj": 2, "layers.0.mlp.down_proj": 32}},
    "rank-pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
}
IDS = [i % 440 for i in range(5, 400, 11)]


@pytest.mark.parametrize("scale", SCALES)
def test_base_and_lora_in_llama_cpp_is_base_and_adapter_in_peft(scale, tmp_path):
    base = make_checkpoint("llama", tmp_path / "base")
    trained = train_adapter(
        base, tmp_path / "adapter", target_modules="all-linear", **SCALES[scale]
    )
    file = Path(export_gguf(base, tmp_path, ["f32"])[0]["path"])
    merged = Path(
        export_gguf(base, tmp_path / "merged", ["f32"], adapter=tmp_path / "adapter")[0]["path"]
    )
    lora = Path(export_gguf_lora(base, tmp_path / "adapter", tmp_path)["path"])
    expected = hf_logits(trained, IDS)
    assert kl(expected, hf_logits(load(base), IDS)) > 1e-2
    assert kl(expected, llama_cpp_logits(file, IDS, lora)) < 1e-6
    assert kl(expected, llama_cpp_logits(merged, IDS)) < 1e-6


LATER = [pytest.param(name, marks=pytest.mark.long) for name in ("qwen3-moe", "gpt-oss", "gemma4")]


@pytest.mark.parametrize(
    "family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", *LATER]
)
def test_every_family(family, tmp_path):
    window = {"sliding_window": None} if family in {"mistral", "phi3"} else {}
    base = make_checkpoint(family, tmp_path / "base", **window)
    targets = ["q_proj", "k_proj"] if family == "qwen3-moe" else "all-linear"
    if family == "gemma4":  # llama.cpp applies no adapter to a layer beside the decoder's
        train_adapter(base, tmp_path / "all", target_modules="all-linear")
        with pytest.raises(FastFTError, match="per_layer_model_projection"):
            export_gguf_lora(base, tmp_path / "all", tmp_path)
        targets = ["q_proj", "v_proj", "up_proj", "down_proj", "per_layer_input_gate"]
    trained = train_adapter(base, tmp_path / "adapter", target_modules=targets, use_rslora=True)
    file = Path(export_gguf(base, tmp_path, ["f32"])[0]["path"])
    record = export_gguf_lora(base, tmp_path / "adapter", tmp_path / "a.gguf")
    expected = hf_logits(trained, IDS)
    limit = 1e-5 if family.startswith("gemma") else 1e-6
    assert kl(expected, llama_cpp_logits(file, IDS, Path(record["path"]))) < limit
    assert record["bytes"] == Path(record["path"]).stat().st_size


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save.*input_layernorm.weight"),
        ({"trainable_token_indices": [3]}, "trained token rows"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embeddings"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_way_out(lora, words, tmp_path):
    base = make_checkpoint("llama", tmp_path / "base")
    train_adapter(base, tmp_path / "adapter", **({"target_modules": ["q_proj"]} | lora))
    with pytest.raises(FastFTError, match=rf"(?s){words}.*--to gguf:q4_k_m"):
        export_gguf_lora(base, tmp_path / "adapter", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
