"""Weights: base plus adapter, tensor by tensor, against what peft itself computes."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastft import models
from fastft.errors import FastFTError
from fastft.exporting.merged import export_merged
from fastft.exporting.weights import Checkpoint, Weights, resolve_base
from tests.families import make_checkpoint

LINEAR = ["q_proj", "k_proj", "down_proj"]
# name: (family, LoraConfig keywords, new vocabulary size or None, embeddings come out untied)
CASES = {
    "plain": ("llama", {"target_modules": "all-linear"}, None, False),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}, None, False),
    "alpha-pattern": (
        "mistral",
        {"target_modules": LINEAR, "alpha_pattern": {"k_proj": 3, "0.mlp.*": 32}},
        None,
        False,
    ),
    "rank-pattern": (
        "mistral",
        {"target_modules": LINEAR, "rank_pattern": {"layers.1.*.q_proj": 2}},
        None,
        False,
    ),
    "both-patterns-rslora": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"k_proj": 5},
            "use_rslora": True,
        },
        None,
        False,
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}, None, False),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}, None, False),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}, None, False),
    "saved-norms": (
        "llama",
        {"target_modules": LINEAR, "modules_to_save": ["norm", "input_layernorm"]},
        None,
        False,
    ),
    "saved-both": (
        "llama",
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
        None,
        False,
    ),
    "saved-tied-embedding": (
        "qwen2",
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
        None,
        True,
    ),
    "saved-tied-head": (
        "qwen2",
        {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
        None,
        True,
    ),
    "saved-tied-both": (
        "qwen2",
        {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
        None,
        True,
    ),
    "saved-tied-together": (
        "qwen2",
        {
            "target_modules": LINEAR,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        None,
        False,
    ),
    "token-rows": (
        "llama",
        {"target_modules": LINEAR, "trainable_token_indices": [3, 7, 450]},
        None,
        False,
    ),
    "token-rows-tied": (
        "qwen2",
        {"target_modules": LINEAR, "trainable_token_indices": [3, 7]},
        None,
        False,
    ),
    "token-rows-head": (
        "llama",
        {
            "target_modules": LINEAR,
            "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 5]},
        },
        None,
        False,
    ),
    "embedding-lora": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        None,
        False,
    ),
    "embedding-lora-tied": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}, None, True),
    "embedding-and-head-lora-tied": (
        "qwen2",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        None,
        True,
    ),
    "resized": ("llama", {"target_modules": LINEAR}, 480, False),
    "resized-tied": ("qwen2", {"target_modules": LINEAR}, 480, False),
    "gpt-oss-attention": ("gpt-oss", {"target_modules": "all-linear"}, None, False),
    "gemma3": ("gemma3", {"target_modules": "all-linear"}, None, False),
    "phi3": ("phi3", {"target_modules": "all-linear"}, None, False),
    "qwen3.5": ("qwen3.5", {"target_modules": "all-linear"}, None, False),
    "gemma4": ("gemma4", {"target_modules": ["q_proj", "up_proj"]}, None, False),
    "smollm3": ("smollm3", {"target_modules": "all-linear"}, None, False),
    "granite": ("granite", {"target_modules": "all-linear"}, None, False),
    "qwen3-moe-attention": ("qwen3-moe", {"target_modules": ["q_proj", "v_proj"]}, None, False),
    "olmo3": ("olmo3", {"target_modules": "all-linear"}, None, False),
    "regular-expression": ("llama", {"target_modules": r".*\.1\..*_proj"}, None, False),
    "excluded": ("llama", {"target_modules": LINEAR, "exclude_modules": ["k_proj"]}, None, False),
    "some-layers": (
        "qwen3",
        {"target_modules": LINEAR, "layers_to_transform": [1], "layers_pattern": "layers"},
        None,
        False,
    ),
    "dora-rslora-pattern": (
        "qwen3",
        {
            "target_modules": LINEAR,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
        },
        None,
        False,
    ),
    "resized-and-saved": (
        "llama",
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
        480,
        False,
    ),
    "resized-and-saved-tied": (
        "qwen2",
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
        480,
        True,
    ),
    "gaussian": ("llama", {"target_modules": LINEAR, "init_lora_weights": "gaussian"}, None, False),
    "dora-biases": (
        "qwen2",
        {"target_modules": LINEAR, "use_dora": True, "bias": "lora_only"},
        None,
        False,
    ),
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES |= {
    "gpt-oss-experts": (
        "gpt-oss",
        {"target_modules": ["q_proj"], "target_parameters": BOTH},
        None,
        False,
    ),
    "qwen3-moe-experts": (
        "qwen3-moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": BOTH,
            "rank_pattern": {r".*\.mlp\.experts\.down_proj": 2},
            "use_rslora": True,
        },
        None,
        False,
    ),
    "a-layer-as-parameter": (
        "llama",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
        None,
        False,
    ),
    # peft takes the names of the layers that transformers 4 had for the parameters of now
    "qwen3-moe-all-linear": ("qwen3-moe", {"target_modules": "all-linear"}, None, False),
}
REFUSED = {
    "pissa": ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "moved weights out"),
    "dora-embedding": (
        {"target_modules": ["embed_tokens"], "use_dora": True},
        "DoRA on an embedding",
    ),
}
"""What is not merged tensor by tensor, and the reason that is given."""


def load(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def train_adapter(
    base: Path, folder: Path, vocabulary: int | None = None, scale: float = 0.1, **lora
):
    """Save an adapter with random weights in every trained tensor; return the peft model in float32."""
    from peft import LoraConfig, get_peft_model

    model = load(base)
    torch.manual_seed(7)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    # peft adds names to the lists that it is given; the table of kinds must stay as it is.
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | copy.deepcopy(lora)
    model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    model.save_pretrained(folder)
    return model.eval()


IDS = torch.tensor([[3, 7, 5, 21, 400, 3, 250, 17, 430, 99]])
# peft adds LoRA of a tied embedding (or head) to the one tensor of both when it merges, though
# it trained the one of them alone: its merged model is not the one it trained.
MERGED_OTHERWISE_BY_PEFT = {"embedding-lora-tied", "embedding-and-head-lora-tied"}


def compare_merge(case: str, folder: Path) -> dict[str, Any]:
    """Merge an adapter of the kind `case` with fastft and with peft, in float32.

    Return the largest differences: `logits` of fastft's merged model from the trained model's,
    `tensors` from those of peft's own merge, and `moved`, how far the adapter moved the base's
    logits; `tied` is what the merged config says, None where the base's embedding is not tied.
    """
    family, lora, vocabulary, _ = CASES[case]
    base = make_checkpoint(family, folder / "base")
    trained = train_adapter(base, folder / "adapter", vocabulary, **lora)
    export_merged(base, folder / "adapter", folder / "merged", dtype="float32")
    merged, plain = load(folder / "merged"), load(base)
    with torch.no_grad():
        expected, got, before = (model(IDS).logits for model in (trained, merged, plain))
    by_peft, ours = trained.merge_and_unload().state_dict(), merged.state_dict()
    assert set(ours) == set(by_peft)
    assert got.shape == expected.shape
    tied = plain.config.tie_word_embeddings
    return {
        "logits": float((got - expected).abs().max()),
        "tensors": max(float((ours[n] - by_peft[n]).abs().max()) for n in ours),
        "moved": float((before - expected[..., : before.shape[-1]]).abs().max()),
        "tied": merged.config.tie_word_embeddings if tied else None,
    }


def refusal(case: str, folder: Path) -> str:
    """Return what fastft says of an adapter of the kind `case` instead of merging it."""
    lora, _ = REFUSED[case]
    base = make_checkpoint("llama", folder / "base")
    train_adapter(base, folder / "adapter", **lora)
    with pytest.raises(FastFTError) as refused:
        Weights(base, folder / "adapter")
    return str(refused.value)


# peft looks for the pattern among layers alone, and uses it for the parameter all the same
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_merged_model_is_the_trained_model_and_pefts_own_merge(case, tmp_path):
    found = compare_merge(case, tmp_path)
    assert found["logits"] < 1e-4
    assert found["moved"] > 1e-2  # the adapter does something
    assert (found["tensors"] < 3e-6) is (case not in MERGED_OTHERWISE_BY_PEFT)
    if found["tied"] is not None:
        assert found["tied"] is not CASES[case][3]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_merged_is_refused_with_the_reason(case, tmp_path):
    assert re.search(REFUSED[case][1], refusal(case, tmp_path))


def test_rows_are_rows_of_the_whole(tmp_path):
    base = make_checkpoint("qwen2", tmp_path / "base", dtype="bfloat16")
    lora = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": False}
    train_adapter(base, tmp_path / "lora", **lora)
    train_adapter(
        base,
        tmp_path / "dora",
        target_modules=["q_proj"],
        use_dora=True,
        trainable_token_indices=[9, 10, 40],
    )
    for adapter in ("lora", "dora"):
        weights = Weights(base, tmp_path / adapter)
        for name in weights.changed:
            whole = weights.tensor(name)
            parts = [weights.tensor(name, slice(i, i + 10)) for i in range(0, len(whole), 10)]
            torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "name"), [("bfloat16", "auto"), ("float32", "float16"), ("bfloat16", "float32")]
)
def test_merged_tensor_is_the_rounded_sum(dtype, name, tmp_path):
    base = make_checkpoint("llama", tmp_path / "base", dtype=dtype)
    train_adapter(base, tmp_path / "adapter", target_modules="all-linear", r=8)
    files = export_merged(
        base, tmp_path / "adapter", tmp_path / "merged", dtype=name, max_shard_bytes=100_000
    )
    stored = getattr(torch, dtype if name == "auto" else name)
    originals, merged = Checkpoint(base), Checkpoint(tmp_path / "merged")
    adapter = Checkpoint(tmp_path / "adapter", "adapter_model.safetensors")
    assert sum(f.suffix == ".safetensors" for f in files) > 2
    for tensor in originals.names:
        expected = originals.read(tensor).float()
        key = "base_model.model." + tensor.removesuffix("weight") + "lora_{}.weight"
        if key.format("A") in adapter:
            expected = (
                expected
                + adapter.read(key.format("B")).float()
                @ adapter.read(key.format("A")).float()
                * 1.0
            )
        assert torch.equal(merged.read(tensor), expected.to(stored)), tensor
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == str(stored).removeprefix("torch.")


def test_merged_folder_is_complete_and_leaves_no_temporary_files(tmp_path):
    from transformers import AutoTokenizer

    base = make_checkpoint("mistral", tmp_path / "base")
    train_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    out = tmp_path / "out" / "merged"
    files = export_merged(base, tmp_path / "adapter", out)
    names = {f.name for f in files}
    assert names == {p.name for p in out.iterdir()}
    assert {
        "tokenizer.model",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= names
    assert [p.name for p in out.parent.iterdir()] == ["merged"]
    text = "吾輩は猫である。  two  spaces"
    assert (
        AutoTokenizer.from_pretrained(out)(text).input_ids
        == AutoTokenizer.from_pretrained(base)(text).input_ids
    )


def test_the_trained_tokenizer_wins_over_the_bases(tmp_path):
    from transformers import AutoTokenizer

    base = make_checkpoint("qwen2", tmp_path / "base")
    train_adapter(base, tmp_path / "adapter", 480, target_modules=LINEAR)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ 'mine' }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    export_merged(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.convert_tokens_to_ids("<tool>") == len(tokenizer) - 1
    assert merged.chat_template == "{{ 'mine' }}"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 480


def test_nf4_adapter_merges_onto_the_16_bit_base_and_a_quantised_base_is_refused(tmp_path):
    import copy

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = make_checkpoint("llama", tmp_path / "base", dtype="bfloat16", hidden_size=128)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    config.bnb_4bit_compute_dtype = torch.float32
    quantized = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=copy.copy(config), dtype=torch.bfloat16
    )
    quantized.save_pretrained(tmp_path / "nf4")
    train_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    with pytest.raises(FastFTError, match=r"quantised \(bitsandbytes\).*--base"):
        Weights(tmp_path / "nf4", tmp_path / "adapter")
    weights = Weights(tmp_path / "nf4", tmp_path / "adapter", dequantize=True)
    exact = Weights(base, tmp_path / "adapter")
    assert set(weights.names) == set(exact.names)
    name = "model.layers.0.self_attn.q_proj.weight"
    relative = (weights.tensor(name) - exact.tensor(name)).norm() / exact.tensor(name).norm()
    assert weights.shape(name) == exact.shape(name)
    assert 0.01 < relative < 0.15  # NF4's own rounding, and nothing more


def test_refusals_name_the_problem_and_the_fix(tmp_path):
    base = make_checkpoint("llama", tmp_path / "base")
    adapter = tmp_path / "adapter"
    train_adapter(base, adapter, target_modules=LINEAR)
    other = make_checkpoint("llama", tmp_path / "other", hidden_size=128)
    with pytest.raises(
        FastFTError,
        match=r"another base.*6 problems(.|\n)*\[64, 64\], the base's tensor \[128, 128\]",
    ):
        Weights(other, adapter)
    shallow = make_checkpoint("llama", tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(FastFTError, match=r"layers\.1\..*does not have"):
        Weights(shallow, adapter)
    for change in ("fan_in_fan_out", "peft_type"):
        _rewrite(adapter, tmp_path / change, **{change: "IA3"})
        with pytest.raises(FastFTError, match=change):
            Weights(base, tmp_path / change)
    _rewrite(adapter, tmp_path / "pissa", init_lora_weights="pissa_niter_4")
    with pytest.raises(FastFTError, match="path_initial_model_for_weight_conversion"):
        Weights(base, tmp_path / "pissa")
    _rewrite(adapter, tmp_path / "rank", r=5)
    with pytest.raises(FastFTError, match=r"rank 4 in the file, 5 in adapter_config\.json"):
        Weights(base, tmp_path / "rank")


def test_broken_checkpoints_are_refused(tmp_path):
    base = make_checkpoint("llama", tmp_path / "base")
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(FastFTError, match=r"pickle weights only \(pytorch_model\.bin\)"):
        Weights(pickled)
    with pytest.raises(FastFTError, match=r"has no config\.json"):
        Weights(tmp_path)
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(FastFTError, match="cut off"):
        Weights(base)
    sharded = make_checkpoint("llama", tmp_path / "sharded", shard_bytes=100_000)
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(FastFTError, match=r"lacks 1 of \d+ weight files: model-00002"):
        Weights(sharded)


def test_base_of_an_adapter(tmp_path, monkeypatch):
    base = make_checkpoint("llama", tmp_path / "base")
    adapter = tmp_path / "adapter"
    train_adapter(base, adapter, target_modules=LINEAR)
    assert resolve_base(adapter) == base
    assert resolve_base(adapter, tmp_path) == tmp_path
    _rewrite(adapter, tmp_path / "gone", base_model_name_or_path="/nowhere/model")
    with pytest.raises(FastFTError, match=r"/nowhere/model.*--base"):
        resolve_base(tmp_path / "gone")
    _rewrite(adapter, tmp_path / "hub", base_model_name_or_path="unsloth/tiny-unsloth-bnb-4bit")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **_: asked.append(repo) or str(base)
    )
    assert resolve_base(tmp_path / "hub") == base
    assert asked == ["unsloth/tiny"]


def test_only_an_export_is_replaced(tmp_path):
    base = make_checkpoint("llama", tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(FastFTError, match="was not written by fastft"):
        export_merged(base, None, base)
    assert (base / "model.safetensors").read_bytes() == before
    out = tmp_path / "merged"
    export_merged(base, None, out, max_shard_bytes=50_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    export_merged(base, None, out, dtype="bfloat16")
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]


def test_a_full_disk_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    base = make_checkpoint("llama", tmp_path / "base")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    with pytest.raises(FastFTError, match=r"needs .* free, .* has 1,000"):
        export_merged(base, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path):
    import subprocess

    base = make_checkpoint("llama", tmp_path / "base")
    code = (
        "import os, sys, pathlib; from fastft.exporting import merged, weights\n"
        "real = weights.Weights.tensor\n"
        "def dying(self, name, rows=None):\n"
        "    if name.endswith('1.mlp.up_proj.weight'): os._exit(9)\n"
        "    return real(self, name, rows)\n"
        "weights.Weights.tensor = dying\n"
        "merged.export_merged(pathlib.Path(sys.argv[1]), None, pathlib.Path(sys.argv[2]), max_shard_bytes=50000)"
    )
    out = tmp_path / "merged"
    done = subprocess.run([sys.executable, "-c", code, str(base), str(out)], check=False)
    assert done.returncode == 9
    assert not out.exists()
    assert any(p.name == ".writing-merged" for p in tmp_path.iterdir())
    export_merged(base, None, out)
    assert load(out).config.hidden_size == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "merged"]


def _rewrite(adapter: Path, copy: Path, **changes) -> None:
    shutil.copytree(adapter, copy)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *itertools.product(
            [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2],
            [float("nan"), float("-inf")],
        ),
        (torch.float8_e4m3fn, float("nan")),  # which has no infinity
    ],
)
def test_the_last_number_of_a_large_tensor_is_looked_at_too(tmp_path, monkeypatch, kind, wrong):
    """Piece by piece: an adapter that holds a head would be half a gigabyte at once."""
    monkeypatch.setattr(models, "PIECE", 64)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {
        "a": torch.ones(3, 5, dtype=torch.int64),
        "empty": torch.ones(0, 4),
        "b": torch.ones(7, 11, dtype=kind),
    }
    save_file(tensors, path)
    models.check_finite(path)
    tensors["b"][-1, -1] = wrong
    save_file(tensors, path)
    with pytest.raises(FastFTError, match="b holds numbers that are not finite"):
        models.check_finite(path)
