"""The plan: closed forms, what people know, what others measured, and errors that say what is missing."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastft.config import load_config, make_config
from fastft.errors import FastFTError
from fastft.families import FAMILIES
from fastft.hardware import GIB, KNOWN_GPUS, named_gpu, probe
from fastft.planning import (
    KNOWN_MODELS,
    Situation,
    apply_changes,
    known_shape,
    load_shape,
    memory,
    pick_gradient_checkpointing,
    pick_micro_batch_tokens,
    plan,
    plan_table,
    shape_from_config,
)
from fastft.planning.calibrate import calibrate
from fastft.planning.disk import adapter_bytes, gguf_bytes
from fastft.planning.memory import layer_bytes_per_token, train_terms, trainable, weight_terms
from fastft.planning.resolve import train_peak_bytes
from fastft.planning.shape import _known_by_hub_id, with_headers
from fastft.progress import spoken

ROOT = Path(__file__).parents[2]
PUBLISHED = yaml.safe_load(
    (ROOT / "benchmarks" / "published_memory.yaml").read_text(encoding="utf-8")
)
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 500, "tie_word_embeddings": False,
}  # fmt: skip


def config(name, length=2048, **more):
    values = {
        "model": {"name": name, "max_seq_length": length},
        "data": {"source": "x.jsonl"},
        "output_dir": ".",
    }
    for key, value in more.items():
        section, _, leaf = key.partition("__")
        values.setdefault(section, {})[leaf] = value
    return make_config(values)


def peak(shape, s):
    return sum(term.bytes for term in train_terms(shape, s))


# --- what people know


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248), ("llama-3.3-70b", 70_553_706_496),
     ("llama-3.2-1b", 1_235_814_400), ("llama-65b", 65_285_660_672), ("mistral-7b", 7_241_732_096),
     ("qwen3-0.6b", 596_049_920), ("gpt-oss-20b", 20_914_757_184), ("gpt-oss-120b", 116_829_156_672)],
)  # fmt: skip
def test_published_parameter_counts(name, parameters):
    assert known_shape(name).parameters == parameters


def test_gpt_oss_checkpoints_have_their_published_size():
    assert known_shape("gpt-oss-20b").checkpoint_bytes == pytest.approx(13.76e9, rel=0.01)
    assert known_shape("gpt-oss-120b").checkpoint_bytes == pytest.approx(65.25e9, rel=0.01)


def test_7b_in_fp16_is_14_gb_of_weights():
    s = Situation(device="cuda", kernels="unsloth", tokens=1, longest=1)
    for name in ("llama-2-7b", "mistral-7b"):
        assert sum(t.bytes for t in weight_terms(known_shape(name), s)) == pytest.approx(
            14e9, rel=0.05
        )


def test_qlora_of_65b_fits_one_48_gb_card():
    """QLoRA's claim (arXiv 2305.14314): 65B on one 48 GB card, at its length of 512."""
    result = plan(
        config("llama-65b", 512, lora__r=64), replace(named_gpu("a6000"), disk_assumed_bytes=10**12)
    )
    assert result.choices["quantization"][0] == "nf4"
    assert result.phases["train"].vram_bytes <= named_gpu("a6000").vram_bytes


def test_full_finetuning_of_8b_does_not_fit_40_gb():
    s = Situation(
        device="cuda", kernels="unsloth", tokens=512, longest=512, full_finetuning=True, lora_bytes=2,
        checkpointing="offload",
    )  # fmt: skip
    assert trainable(known_shape("llama-3.1-8b"), s) == 8_030_261_248
    assert peak(known_shape("llama-3.1-8b"), s) > 40 * GIB


def test_gpt_oss_120b_does_not_train_on_an_a100_40():
    result = plan(config("gpt-oss-120b", 1024), named_gpu("a100-40"))
    assert result.verdict == "does_not_fit"
    assert result.phases["train"].vram_bytes > 55e9
    assert [change.key for change in result.changes] == ["gpu"]
    assert result.changes[0].new in {"a100-80", "h100"}


def test_gpt_oss_20b_trains_on_a_colab_t4():
    """Unsloth's published claim: gpt-oss-20b QLoRA in 14 GB."""
    result = plan(config("gpt-oss-20b", 1024, train__micro_batch_tokens=1024), named_gpu("t4"))
    assert result.phases["train"].vram_bytes < 14 * GIB


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["name"])
def test_published_measurements_within_15_percent(row):
    situation = dict(row["situation"])
    if "target_modules" in situation:
        situation["target_modules"] = tuple(situation["target_modules"])
    s = Situation(**situation, allocator_slack=row["counts"] == "reserved")
    terms = train_terms(known_shape(row["model"]), s)
    predicted = sum(t.bytes for t in terms if t.name != "CUDA context") / GIB
    assert predicted == pytest.approx(row["measured"], rel=0.15)


# --- closed forms


def test_lora_parameters_closed_form():
    shape = known_shape("llama-3.1-8b")
    assert shape.lora_parameters(16) == 41_943_040  # what Unsloth prints for this model
    assert shape.lora_parameters(16, ["q_proj", "v_proj"]) == 32 * 16 * (
        (4096 + 4096) + (4096 + 1024)
    )
    dora = shape.lora_parameters(16, use_dora=True) - shape.lora_parameters(16)
    assert dora == 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert shape.lora_parameters(16, train_tokens=3) == 41_943_040 + 3 * 4096
    assert known_shape("gpt-oss-20b").lora_parameters(8) == 24 * 8 * 2 * (2880 + 4096 + 2880 + 512)


def test_split_names_mean_the_fused_layers():
    phi = shape_from_config(LLAMA | {"model_type": "phi3"})
    assert phi.lora_parameters(4, ["q_proj", "k_proj", "v_proj"]) == 2 * 4 * (64 + 128)
    with pytest.raises(FastFTError, match=r"no 'wq'.*It has: .*qkv_proj"):
        phi.lora_targets(["wq"])


def test_micro_batches_need_more_the_larger_they_are_and_checkpointing_less():
    shape = known_shape("qwen3-0.6b")
    for device, kernels in (("cpu", "peft"), ("cuda", "unsloth")):
        s = Situation(device=device, kernels=kernels, tokens=1024, longest=1024)
        sizes = [peak(shape, replace(s, tokens=t)) for t in (1024, 2048, 4096)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2]
        assert peak(shape, replace(s, tokens=4096, checkpointing="recompute")) < sizes[2]
        if (
            device == "cuda"
        ):  # on a CPU, peft's modules and the holes of quantising take what NF4 saves
            assert peak(shape, replace(s, quantization="nf4")) < sizes[0]


def test_every_term_says_where_it_comes_from():
    result = plan(
        config("llama-3.1-8b", export__to=["merged", "gguf:q4_k_m", "gguf-lora"]), named_gpu("t4")
    )
    for phase in result.phases.values():
        terms = [*phase.vram_terms, *phase.ram_terms, *phase.disk_terms]
        assert all(term.name and term.formula and term.source for term in terms)
        for place in ("vram", "ram", "disk"):
            total = sum(term.bytes for term in getattr(phase, f"{place}_terms"))
            assert total == getattr(phase, f"{place}_bytes")


def test_an_adapted_head_is_saved_with_its_base_weight():
    """peft writes lm_head's own weight into the adapter where LoRA is on it."""
    shape = known_shape("llama-2-7b")
    s = Situation(
        device="cpu", kernels="fused", tokens=512, longest=512, target_modules=("q_proj", "lm_head")
    )
    without = replace(s, target_modules=("q_proj",))
    lora = 16 * (4096 + 32000) * 4
    assert adapter_bytes(shape, s) - adapter_bytes(shape, without) == lora + 32000 * 4096 * 2


def test_fused_qkv_gets_the_type_of_its_values():
    """llama.cpp gives phi3's attn_qkv q5_k in a q4_k_m file: one bit a weight more than q4_k."""
    phi = shape_from_config(
        LLAMA | {"model_type": "phi3", "hidden_size": 1024, "intermediate_size": 2816}
    )
    small, more = (gguf_bytes(phi, kind) for kind in ("q4_k_s", "q4_k_m"))
    qkv = sum(w.parameters for w in phi.weights if w.name == "qkv_proj")
    assert more - small >= qkv / 8


def test_gguf_sizes():
    """Published files: Llama-3.1-8B Q4_K_M is 4.92 GB and Q8_0 8.54 GB; f16 is two bytes a parameter."""
    shape = known_shape("llama-3.1-8b")
    assert gguf_bytes(shape, "q4_k_m") == pytest.approx(4.92e9, rel=0.02)
    assert gguf_bytes(shape, "q8_0") == pytest.approx(8.54e9, rel=0.02)
    assert gguf_bytes(shape, "f16") == pytest.approx(16.07e9, rel=0.02)
    with pytest.raises(FastFTError, match=r"did you mean 'q4_k_m'"):
        gguf_bytes(shape, "q4_km")


# --- against the real libraries


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


# --- reading models


def write_model(folder, values=LLAMA, tensors=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if tensors:
        import numpy as np
        from safetensors.numpy import save_file

        shape = shape_from_config(values)
        arrays = {}
        for weight in shape.weights:
            for number in range(weight.count):
                prefix = f"model.layers.{number}." if weight.count > 1 else "model."
                name = "lm_head" if weight.name == "lm_head" else prefix + weight.name
                arrays[f"{name}.weight"] = np.zeros(weight.shape, np.float16)
        save_file(arrays, folder / "model.safetensors")
    return folder


def test_local_folder_is_read_from_its_headers(tmp_path):
    folder = write_model(tmp_path / "m")
    shape = load_shape(str(folder))
    assert shape.stored == "float16"
    assert shape.parameters == shape_from_config(LLAMA).parameters
    assert shape.checkpoint_bytes == (folder / "model.safetensors").stat().st_size
    assert shape.local


def test_headers_win_over_the_config_and_say_so(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 200}))
    shape = load_shape(str(folder))
    assert shape.parameters == shape_from_config(LLAMA).parameters
    assert any("headers" in note for note in shape.notes)
    assert shape.lora_parameters(4) == shape_from_config(LLAMA).lora_parameters(4)


def test_nonsense_is_refused_with_what_is_missing(tmp_path):
    broken = write_model(
        tmp_path / "a", {"model_type": "llama", "hidden_size": 8, "vocab_size": 3}, tensors=False
    )
    with pytest.raises(
        FastFTError, match="lacks num_hidden_layers, num_attention_heads, intermediate_size"
    ):
        load_shape(str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(FastFTError, match="not valid JSON"):
        load_shape(str(broken))
    whole = write_model(tmp_path / "b")
    (whole / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(FastFTError, match="not a safetensors file"):
        load_shape(str(whole))
    strange = shape_from_config(LLAMA | {"model_type": "brandnew"})
    assert any("taken for a Llama-like" in note for note in strange.notes)
    with pytest.raises(FastFTError, match=r"unknown GPU 't5'.*Known: "):
        named_gpu("t5")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number from 1"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"hidden_size": 10**15}, "hidden_size is 1000000000000000"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"intermediate_size": [96, 96]}, r"intermediate_size is \[96, 96\]"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 64 is no multiple of num_attention_heads 5"),
        ({"head_dim": "x"}, "head_dim is 'x'"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is 'long'"),
        ({"model_type": 5}, "model_type is 5, not a str"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not a bool"),
        ({"quantization_config": "nf4"}, "quantization_config is 'nf4', not a dict"),
        ({"text_config": "x"}, "text_config is not a JSON object"),
        ({"num_local_experts": 8}, "lacks num_experts_per_tok"),
        ({"num_local_experts": 8, "num_experts_per_tok": 9}, "9 experts a token, but only 8"),
        ({"num_local_experts": "8", "num_experts_per_tok": 2}, "num_local_experts is '8'"),
    ],
)  # fmt: skip
def test_values_that_no_model_has_are_refused(changed, said):
    with pytest.raises(FastFTError, match=said):
        shape_from_config(LLAMA | changed)


def test_all_impossible_values_are_said_at_once():
    with pytest.raises(FastFTError, match=r"hidden_size is 0.*vocab_size is -1"):
        shape_from_config(LLAMA | {"hidden_size": 0, "vocab_size": -1})
    for whole in ([1, 2], None):
        with pytest.raises(FastFTError, match="not a JSON object"):
            shape_from_config(whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./gone", "a/b/c/d", "a b/c", "owner/twice--dashed"]
)
def test_a_name_that_is_neither_folder_nor_hub_id_says_so(name):
    with pytest.raises(FastFTError, match=r"neither a folder( that exists)? nor a Hub id"):
        load_shape(name)


def test_a_file_is_not_a_model_folder(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(FastFTError, match=r"is a file; give the folder that holds config\.json"):
        load_shape(str(file))


def test_files_beside_the_model_do_not_count(tmp_path):
    """Mistral's folders hold a second copy, others an adapter."""
    folder = write_model(tmp_path / "m")
    once = load_shape(str(folder))
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert load_shape(str(folder)) == once


def test_a_missing_shard_is_said(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(FastFTError, match=r"lacks 1 of 2 files: model-2\.safetensors"):
        load_shape(str(folder))
    index.write_text("[]")
    with pytest.raises(FastFTError, match="is damaged"):
        load_shape(str(folder))


@pytest.mark.parametrize(
    "header", [[], {"a": 1}, {"a": {"dtype": "F16"}}, {"a": {"dtype": "F16", "shape": 3}}]
)
def test_a_header_of_another_form_is_damaged(tmp_path, header):
    folder = write_model(tmp_path / "m", tensors=False)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FastFTError, match="damaged header"):
        load_shape(str(folder))


def test_empty_target_modules_are_refused():
    with pytest.raises(FastFTError, match=r"lora\.target_modules is empty"):
        plan(config("qwen3-0.6b", lora__target_modules=[]), named_gpu("t4"))


def test_what_gemma3_leaves_out_of_its_text_config_is_known():
    """google/gemma-3-4b-it's text_config has no heads and no vocabulary: they are the family's defaults."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    shape = shape_from_config(
        {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    )
    assert shape.parameters == 3_880_263_168  # as `language_model` of the published checkpoint
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (8, 4, 256, True)
    assert any("not the vision tower" in note for note in shape.notes)


def test_omitted_values_are_what_transformers_takes():
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    for family, values in ((row.model_type, row.omitted) for row in FAMILIES.values()):
        real = AutoConfig.for_model(family)
        assert values == {key: getattr(real, key) for key in values}, family


@pytest.mark.parametrize(
    ("family", "values", "billions"),
    [
        ("qwen2_moe", {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5632,
                           "vocab_size": 151936, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                           "shared_expert_intermediate_size": 5632}, 14.3),
        ("deepseek_v3", {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "intermediate_size": 18432,
                             "vocab_size": 129280, "n_routed_experts": 256, "num_experts_per_tok": 8,
                             "moe_intermediate_size": 2048, "n_shared_experts": 1}, 671),
        ("mixtral", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                         "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}, 46.7),
        ("qwen3_moe", {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
                           "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "num_experts": 128,
                           "num_experts_per_tok": 8, "moe_intermediate_size": 768}, 30.5),
    ],
)  # fmt: skip
def test_experts_are_counted_whatever_they_are_called(family, values, billions):
    """Published sizes; DeepSeek's own attention and its dense first layers are not modelled, and its experts decide."""
    shape = shape_from_config({"model_type": family} | values)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.06)


def test_modules_that_a_4_bit_checkpoint_skips_stay_in_16_bit(tmp_path):
    skipped = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    skipped["llm_int8_skip_modules"] = [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.0.self_attn.q_proj",
    ]
    shape = shape_from_config(LLAMA | {"quantization_config": skipped})
    kept = 3 * 64 * 96 + 64 * 64
    assert shape.kept_in_16_bit == kept
    s = Situation(device="cuda", kernels="unsloth", tokens=1, longest=1, quantization="nf4")
    all_packed = weight_terms(replace(shape, kept_in_16_bit=0), s)
    more = sum(t.bytes for t in weight_terms(shape, s)) - sum(t.bytes for t in all_packed)
    assert more == pytest.approx(kept * (2 - memory.NF4_BITS / 8), abs=2)
    # The headers say the same: what is not packed bytes was skipped.
    headers = {
        "model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 64)),
        "model.layers.0.self_attn.k_proj.weight": ("U8", (1024, 1)),
        "model.embed_tokens.weight": ("BF16", (500, 64)),
        "lm_head.weight": ("BF16", (500, 64)),
    }
    assert with_headers(shape, headers, 1).kept_in_16_bit == 64 * 64


def test_packed_checkpoints_of_other_tools_keep_their_logical_size():
    shape = shape_from_config(LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert any("stored as gptq" in note for note in shape.notes)
    headers = {"model.layers.0.self_attn.q_proj.qweight": ("I32", (8, 64))}
    assert with_headers(shape, headers, 1).parameters == shape_from_config(LLAMA).parameters


def test_hub_model_by_headers_alone(tmp_path):
    """A loopback Hub serves config.json and ranges of the weights; the bytes served stay far below the file."""
    folder = write_model(tmp_path / "m", LLAMA | {"vocab_size": 20_000})
    served = {"bytes": 0}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            if "/api/models/" in self.path:
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                return self.send(
                    json.dumps({"id": "own/er", "sha": "a" * 40, "siblings": files}).encode(), body
                )
            file = folder / self.path.split("?")[0].rsplit("/", 1)[-1]
            if not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            return self.send(file.read_bytes(), body)

        def send(self, data, body):
            total, wanted = len(data), self.headers.get("Range")
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"' + "b" * 40 + '"')
            self.send_header("X-Repo-Commit", "a" * 40)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.end_headers()
            if body:
                served["bytes"] += len(data)
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from fastft.planning import load_shape; s = load_shape('own/er');"
        "print(s.parameters, s.stored, s.checkpoint_bytes, s.local)"
    )
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
    }
    environment |= {
        "PATH": "/usr/bin:/bin",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    shape = load_shape(str(folder))
    parameters, stored, size, local = done.stdout.split()
    assert (int(parameters), stored, local) == (shape.parameters, "float16", "False")
    assert int(size) == 2 * shape.parameters
    assert served["bytes"] < (folder / "model.safetensors").stat().st_size / 4


def test_without_the_hub_known_models_still_plan(tmp_path):
    code = "from fastft.planning import load_shape; s = load_shape('Qwen/Qwen3-4B'); print(s.parameters, '; '.join(s.notes))"
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.startswith(
        f"{known_shape('qwen3-4b').parameters} sizes from fastft's own table"
    ), done.stderr
    packed = code.replace("Qwen/Qwen3-4B", "unsloth/Qwen3-4B-unsloth-bnb-4bit").replace(
        "s.parameters", "s.stored"
    )
    done = subprocess.run(
        [sys.executable, "-c", packed], capture_output=True, text=True, env=environment
    )
    assert done.stdout.startswith("nf4 "), done.stderr
    code = code.replace("Qwen/Qwen3-4B", "no/such")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "the Hub cannot be reached" in done.stderr


# --- verdicts and changes


def test_plan_takes_less_than_a_second_and_no_torch(tmp_path):
    """CPU seconds of the whole process, its start included: a busy machine does not make it slower."""
    folder = write_model(tmp_path / "m")
    code = f"""
import sys, time
from fastft.config import make_config
from fastft.hardware import probe
from fastft.planning import plan
plan(make_config({{"model": {{"name": {str(folder)!r}}}, "data": {{"source": "x"}}}}), probe())
print(time.process_time(), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()
    assert torch == "False"
    assert float(seconds) < 1


def test_changes_make_it_fit_in_order_and_apply():
    settings = config(
        "llama-3.1-8b", 8192, train__micro_batch_tokens=32768, train__gradient_checkpointing=False
    )
    hardware = named_gpu("l4")
    before = plan(settings, hardware)
    assert before.verdict == "does_not_fit"
    assert before.changes[-1].enough
    after = plan(make_config(apply_changes(settings, before.changes)), hardware)
    assert after.verdict != "does_not_fit"
    for number in range(len(before.changes)):
        fewer = [change for index, change in enumerate(before.changes) if index != number]
        assert plan(make_config(apply_changes(settings, fewer)), hardware).verdict == "does_not_fit"


def fits(settings, hardware):
    return plan(settings, hardware).verdict != "does_not_fit"


def test_automatic_choices_do_not_make_a_run_misfit():
    """What `auto` picks counts the row that was asked for, and the RAM that offloaded layer inputs take."""
    asked = config("qwen3-4b", 8192, train__micro_batch_tokens=32768, model__quantization="none")
    assert fits(
        asked, named_gpu("a100-40")
    )  # with checkpointing, which one sequence would not need
    assert plan(asked, named_gpu("a100-40")).choices["gradient_checkpointing"][0] is True
    on_t4 = plan(config("mistral-7b", 8192), named_gpu("t4"))
    assert on_t4.verdict != "does_not_fit", on_t4.reason
    large_adapter = config("llama-3.2-3b", lora__r=256, train__micro_batch_tokens=2048)
    card = replace(
        named_gpu("rtx3080"), vram_bytes=int(11.7 * GIB), vram_free_bytes=int(11.7 * GIB)
    )
    quantization, why = plan(large_adapter, card).choices["quantization"]
    assert quantization == "nf4"
    assert "with 16-bit weights a step takes" in why


def test_a_budget_above_a_whole_step_takes_no_more_than_the_step():
    one_step = plan(config("qwen3-0.6b", 1024, train__micro_batch_tokens=8192), named_gpu("t4"))
    more = plan(config("qwen3-0.6b", 1024, train__micro_batch_tokens=10**6), named_gpu("t4"))
    assert more.phases["train"].vram_bytes == one_step.phases["train"].vram_bytes


def test_inits_that_move_the_base_are_not_quantised_by_themselves():
    free = plan(config("llama-3.1-8b", lora__init="pissa"), named_gpu("t4"))
    assert free.choices["quantization"][0] == "none"
    assert free.verdict == "does_not_fit"
    stored = shape_from_config(LLAMA | {"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(
        FastFTError, match=r"lora\.init pissa changes the base weights, which model stores in 4 bit"
    ):
        plan(config("x", lora__init="pissa"), named_gpu("t4"), stored)


def test_float32_is_given_up_before_weights_are_quantised():
    settings = config("llama-3.1-8b", model__dtype="float32", model__quantization="none")
    changes = plan(settings, named_gpu("t4")).changes
    assert [change.key for change in changes] == ["model.dtype", "model.quantization"]
    assert fits(make_config(apply_changes(settings, changes)), named_gpu("t4"))


def test_another_card_comes_with_the_changes_it_needs():
    settings = config(
        "llama-3.3-70b", model__quantization="none", train__micro_batch_tokens=32768,
        train__gradient_checkpointing=False,
    )  # fmt: skip
    card, *others = plan(settings, named_gpu("t4")).changes
    assert card.key == "gpu"
    assert others[-1].enough
    assert fits(make_config(apply_changes(settings, others)), named_gpu(card.new))
    assert not fits(settings, named_gpu(card.new))


def test_a_full_disk_asks_for_room_and_not_for_a_card(tmp_path):
    small = replace(named_gpu("h100"), disk_assumed_bytes=GIB)
    settings = config("qwen3-0.6b", export__to=["merged", "gguf:q8_0"])
    (change,) = plan(settings, small).changes
    assert (change.key, change.old) == ("disk", "1.0 GiB free")
    assert "output_dir" in change.cost
    assert apply_changes(settings, [change]) == settings.model_dump()


def test_time_of_the_run(tmp_path):
    rows = tmp_path / "x.jsonl"
    rows.write_text('{"messages": []}\n' * 100)
    card = named_gpu("l4")

    def run(**more):
        return plan(config("qwen3-0.6b", data__source=str(rows), **more), card)

    whole = run(data__eval_fraction=0.2, train__epochs=3)
    assert whole.steps == 30  # 100 rows x 0.8 x 3 epochs / 8
    assert whole.seconds == pytest.approx(30 * whole.seconds_per_step)
    assert run(train__max_steps=7).steps == 7
    short = run(train__max_minutes=whole.seconds_per_step / 60, train__epochs=9)
    assert (short.steps, short.steps_basis) == (1, "train.max_minutes")
    rows.write_text('{"text": "a"}\n')
    assert run().steps is run().seconds is None  # documents are joined and cut
    assert (spoken(9), spoken(300), spoken(3 * 3600), spoken(10**6)) == (
        "9.0 s",
        "5 min",
        "3.0 h",
        "11.6 days",
    )


def test_a_length_beyond_the_models_positions_is_warned_of():
    def notes(length):
        return " ".join(plan(config("llama-2-7b", length), named_gpu("h100")).notes)

    assert "8,192 is above the 4,096 positions that llama-2-7b was made for" in notes(8192)
    assert "positions" not in notes(4096)


def test_sizes_are_gib_throughout():
    """The free memory of a card is printed as the card's makers and torch count it: 14.7 GiB of a T4."""
    result = plan(config("llama-3.3-70b", 1024), named_gpu("t4"))
    assert "14.7 GiB are free" in result.reason
    assert result.available["vram"] == named_gpu("t4").vram_bytes


def test_full_disk_is_a_verdict_too():
    small = replace(named_gpu("h100"), disk_assumed_bytes=GIB)
    result = plan(config("qwen3-0.6b", export__to=["merged", "gguf:q8_0"]), small)
    assert result.verdict == "does_not_fit"
    assert "disk" in result.reason


def test_checkpointing_is_off_where_memory_allows_and_budgets_fit():
    shape = known_shape("qwen3-4b")
    s = Situation(
        device="cuda", kernels="unsloth", tokens=2048, longest=2048, optimizer="adamw_8bit"
    )
    for card, expected in (("h100", False), ("rtx3060", True)):
        hardware = named_gpu(card)
        choice = pick_gradient_checkpointing("auto", shape=shape, situation=s, hardware=hardware)
        assert choice.value is expected, choice.reason
    hardware = named_gpu("l4")
    chosen = pick_micro_batch_tokens(
        "auto", shape=shape, situation=s, hardware=hardware, effective_batch_size=64
    )
    assert 2048 <= chosen.value < 64 * 2048
    assert (
        train_peak_bytes(shape, replace(s, tokens=chosen.value)) <= 0.9 * hardware.vram_free_bytes
    )
    assert (
        train_peak_bytes(shape, replace(s, tokens=chosen.value + 1024))
        > 0.9 * hardware.vram_free_bytes
    )
    asked = pick_micro_batch_tokens(
        512, shape=shape, situation=s, hardware=hardware, effective_batch_size=8
    )
    assert asked == (512, "asked for")


def test_a_smaller_machine_never_gets_a_larger_budget():
    shape = known_shape("llama-3.2-1b")
    s = Situation(device="cuda", kernels="unsloth", tokens=1024, longest=1024)
    budgets = [
        pick_micro_batch_tokens(
            "auto", shape=shape, situation=s, hardware=replace(named_gpu("h100"), vram_free_bytes=gib * GIB),
            effective_batch_size=64,
        ).value
        for gib in (4, 8, 16, 32, 64)
    ]  # fmt: skip
    assert budgets == sorted(budgets)
    assert len(set(budgets)) > 2


def test_calibration_scales_what_grows_and_says_what_would_fit():
    shape = known_shape("qwen3-0.6b")
    s = Situation(device="cuda", kernels="unsloth", tokens=1024, longest=1024)
    planned = sum(t.bytes for t in train_terms(shape, s) if t.name != "CUDA context")
    right = calibrate(
        shape,
        s,
        tokens=1024,
        measured_bytes=planned,
        largest_tokens=4096,
        limit_bytes=named_gpu("t4").vram_bytes,
    )
    later = sum(
        t.bytes for t in train_terms(shape, replace(s, tokens=4096)) if t.name != "CUDA context"
    )
    assert right.largest_bytes == pytest.approx(later, rel=0.001)
    assert right.fits
    worse = calibrate(
        shape,
        s,
        tokens=1024,
        measured_bytes=planned + 2 * GIB,
        largest_tokens=8192,
        limit_bytes=12 * GIB,
    )
    assert worse.largest_bytes > later
    assert not worse.fits
    assert 1024 <= worse.largest_fitting_tokens < 8192
    assert f"train.micro_batch_tokens of at most {worse.largest_fitting_tokens:,}" in worse.message
    one_row = calibrate(
        shape, replace(s, longest=8192), tokens=1024, measured_bytes=planned + 2 * GIB, largest_tokens=8192,
        limit_bytes=12 * GIB,
    )  # fmt: skip
    assert f"model.max_seq_length of at most {worse.largest_fitting_tokens:,}" in one_row.message
    too_small = calibrate(
        shape, s, tokens=1024, measured_bytes=planned, largest_tokens=1024, limit_bytes=GIB // 2
    )
    assert "not even the weights leave room" in too_small.message


def test_calibration_does_not_blow_up_what_it_cannot_explain():
    """300 MB of a library's caches at 64 tokens are not 300 MB for each 64 tokens to come."""
    shape = shape_from_config(LLAMA)
    s = Situation(device="cpu", kernels="peft", tokens=64, longest=64)
    planned = calibrate(
        shape, s, tokens=64, measured_bytes=GIB, largest_tokens=64, limit_bytes=GIB
    ).predicted_bytes
    found = calibrate(
        shape,
        s,
        tokens=64,
        measured_bytes=planned + 300_000_000,
        largest_tokens=4096,
        limit_bytes=GIB,
    )
    assert 0 < found.largest_bytes - found.measured_bytes < 300_000_000


def test_cpu_counts_ram_and_no_vram(tmp_path):
    folder = write_model(tmp_path / "m")
    result = plan(config(str(folder), 128), replace(probe(), kind="cpu"))
    assert result.peak_vram_bytes == 0
    assert result.peak_ram_bytes > 0
    assert result.trainable_parameters == shape_from_config(LLAMA).lora_parameters(16)


def test_print_and_plot(tmp_path, capsys):
    from rich.console import Console

    result = plan(config("gpt-oss-120b"), named_gpu("t4"))
    result.print(Console(width=160))
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "weights in NF4" in text
    path = result.plot(tmp_path / "plan.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FastFTError, match="cannot be written"):
        result.plot(path / "below-a-file.png")


def test_a_narrow_terminal_shows_every_line_whole(capsys):
    """80 columns: the bar is one line, and what wraps stays in its column."""
    from rich.console import Console

    for card, name in (("l4", "llama-3.1-8b"), (None, "qwen3-0.6b")):
        hardware = named_gpu(card) if card else replace(probe(), kind="cpu")
        plan(config(name, 8192, train__gradient_checkpointing=False), hardware).print(
            Console(width=80)
        )
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert sum(line.rstrip().endswith("GiB free") and "|" in line for line in lines) == 1
        assert ("vram (" in lines[1] + lines[2]) == (card is not None)


@pytest.mark.parametrize("card", [*KNOWN_GPUS, None])
def test_init_writes_a_config_that_fits(card, tmp_path, monkeypatch):
    from fastft.planning.init import commented_config

    machine = replace(
        probe(), kind="cpu", vram_bytes=0, ram_free_bytes=8 * GIB, disk_assumed_bytes=20 * GIB
    )
    monkeypatch.setattr("fastft.planning.init.probe", lambda: machine)
    file = tmp_path / "run.yaml"
    file.write_text(commented_config(gpu=card))
    chosen = load_config(file)
    shape = _known_by_hub_id(chosen.model.name)
    assert shape is not None
    assert plan(chosen, named_gpu(card) if card else machine, shape).verdict == "fits"


def test_long_values_leave_their_cost_room(capsys):
    from rich.console import Console

    result = plan(config("llama-3.1-8b", 10**30), named_gpu("t4"))
    result.print(Console(width=80))
    text = " ".join(capsys.readouterr().out.split())
    assert result.changes[-1].enough
    assert "longer conversations are cut" in text


def test_plan_command_says_no_before_it_prints(tmp_path):
    from fastft.planning import command

    file = tmp_path / "run.yaml"
    file.write_text("model: {name: gpt-oss-120b}\ndata: {source: x.jsonl}\n")
    for keywords, said in (
        ({"plot": tmp_path / "p.txt"}, r"ends in \.png"),
        ({"plot": tmp_path}, "is a folder"),
        ({"apply": tmp_path}, "is a folder"),
        ({"apply": tmp_path / "gone" / "x.yaml"}, "there is no folder"),
        ({"gpu": ""}, "unknown GPU ''"),
    ):
        with pytest.raises(FastFTError, match=said) as found:
            command.run(file, **({"gpu": "t4"} | keywords))
        assert found.value.exit_code == 2
    with pytest.raises(FastFTError, match=r"with gpu h100 it would\. Nothing was written") as found:
        command.run(file, gpu="t4", apply=tmp_path / "new.yaml", show=False)
    assert found.value.exit_code == 1
    assert not (tmp_path / "new.yaml").exists()


# --- the published error


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


# --- laws

ORDER = {"does_not_fit": 0, "tight": 1, "fits": 2}
LENGTHS, RANKS = st.sampled_from([128, 512, 2048, 8192, 32768]), st.sampled_from([1, 16, 256])


@hypothesis.settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(KNOWN_MODELS)), st.sampled_from(sorted(KNOWN_GPUS)), LENGTHS, RANKS,
    st.sampled_from(["auto", "none", "nf4", "int8"]), st.sampled_from(["auto", True, False]),
    st.sampled_from(["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"]), st.sampled_from([None, 1, 4]),
    st.sampled_from([1, 8, 64]), st.sampled_from([1.1, 1.5, 3.0]),
)  # fmt: skip
def test_more_work_never_fits_better_and_more_machine_never_worse(
    name, card, length, rank, quantization, checkpointing, optimizer, rows, batch, factor
):
    def verdict(length=length, rank=rank, batch=batch, vram=1.0, ram=1.0):
        hardware = named_gpu(card)
        hardware = replace(
            hardware, vram_bytes=int(vram * hardware.vram_bytes), vram_free_bytes=int(vram * hardware.vram_free_bytes),
            ram_bytes=int(ram * hardware.ram_bytes), ram_free_bytes=int(ram * hardware.ram_free_bytes),
        )  # fmt: skip
        values = config(
            name, length, model__quantization=quantization, lora__r=rank, train__gradient_checkpointing=checkpointing,
            train__optimizer=optimizer, train__effective_batch_size=batch,
            train__micro_batch_tokens="auto" if rows is None else rows * length,
        )  # fmt: skip
        result = plan(values, hardware)
        config_changes = [change for change in result.changes if "." in change.key]
        if result.changes and len(config_changes) == len(result.changes):
            assert fits(make_config(apply_changes(values, result.changes)), hardware)
        return ORDER[result.verdict]

    here = verdict()
    assert verdict(length=2 * length) <= here
    assert verdict(rank=2 * rank) <= here
    assert verdict(batch=2 * batch) <= here
    assert verdict(vram=factor) >= here
    assert verdict(ram=factor) >= here


@hypothesis.settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(KNOWN_MODELS)), st.sampled_from(["unsloth", "peft", "fused"]), LENGTHS, RANKS,
    st.sampled_from(["none", "nf4", "int8"]), st.sampled_from(["off", "recompute"]), st.booleans(),
)  # fmt: skip
def test_peaks_grow_with_tokens_length_rank_and_precision(
    name, kernels, tokens, rank, quantization, how, dora
):
    shape = known_shape(name)
    s = Situation(
        device="cuda" if kernels == "unsloth" else "cpu", kernels=kernels, tokens=tokens, longest=tokens, rank=rank,
        quantization=quantization, checkpointing=how, use_dora=dora, loss="fused" if kernels == "fused" else "chunked",
    )  # fmt: skip
    here = peak(shape, s)
    assert peak(shape, replace(s, tokens=2 * tokens)) >= here
    assert peak(shape, replace(s, rank=2 * rank)) > here
    assert peak(shape, replace(s, compute_bytes=4)) > here
    assert peak(shape, replace(s, use_dora=True)) >= here
    assert peak(shape, replace(s, target_modules=("q_proj",))) < here


def test_table_has_a_row_for_each_model_method_and_length():
    rows = plan_table()
    assert {row["model"] for row in rows} <= set(KNOWN_MODELS)
    assert len(rows) == 11 * 2 * 3
    by_key = {(row["model"], row["method"], row["tokens"]): row for row in rows}
    assert by_key["llama-3.1-8b", "QLoRA", 2048]["t4"].startswith("yes")
    assert by_key["llama-3.1-8b", "LoRA", 2048]["t4"] == "no"
    assert by_key["gpt-oss-120b", "QLoRA", 1024]["a100-40"] == "no"
    assert by_key["gpt-oss-120b", "QLoRA", 1024]["h100"] != "no"
