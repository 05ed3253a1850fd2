"""What fastft can do with each text model_type of transformers, found out on a small random model.

usage: python -m tests.e2e.bases_worker stock [MODEL_TYPE ...]     prints a line of JSON for each

Every type is looked at in a process of its own, forked from this one, so that a type whose code
fails (or ends the process, as llama.cpp may) says so and the others go on.
"""

import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto

from fastft.config import LoraConfig
from fastft.engines import loading
from fastft.errors import FastFTError
from fastft.planning import load_shape
from fastft.training.exactness import check_rows, choose_rows
from fastft.training.step import Stepper, StepPolicy
from tests.e2e.models_worker import ENGINE, FLOAT32, RANK, sequences, three_steps
from tests.families import FAMILIES, NEWEST, _randomise, make_tokenizer

KNOWN = FAMILIES | NEWEST
VOCABULARY = 704  # rows enough for every tokenizer of tests/families.py
SECONDS = 150
MOST_PARAMETERS = 30_000_000
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    # compressed keys and values
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # state spaces and linear attention
    "state_size": 8,
    "num_kv_shared_layers": 0,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # inputs of a layer
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
}
"""What a config is made small by, where its class has the field."""
EVEN_UNSET = {"head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok"}
"""Fields that are given a value also where the class leaves them to others."""
WITHOUT_WINDOW = {"mistral", "ministral", "phi3", "starcoder2"}
"""Families for which llama.cpp knows no sliding window."""
MORE = {spec.model_type: spec.config | {"num_hidden_layers": 2} for spec in KNOWN.values()} | {
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
}
"""What single types need besides."""
MORE["smollm3"] = {"no_rope_layers": None, "no_rope_layer_interval": 4}
MORE["qwen3_5_moe_text"] = {"rope_parameters": KNOWN["qwen3.5"].config["rope_parameters"]}
NO_TEXT = {"trocr", "whisper", "aria_text", "bert-generation"}
"""Parts of a model for something else than text."""
OTHER_TOKENIZERS = ("spm", "gemma")
"""Kinds that are tried where llama.cpp's converter refuses the first: it wants one of its own of
some families.
"""


def text_types() -> list[str]:
    """Every model_type with a causal language model of transformers that is a base for text:
    without those that fill masks or translate, and without wrappers of several models.
    """
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    others = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    others = {*others, *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    found = []
    for model_type in causal:
        config = transformers.CONFIG_MAPPING[model_type]
        if model_type not in others | NO_TEXT and not config.sub_configs:
            found.append(model_type)
    return found


def tiny_config(model_type):
    """Return the type's config made small, with everything else as transformers has it."""
    kind = transformers.CONFIG_MAPPING[model_type]
    default, values = kind().to_dict(), {}
    for name, value in SMALL.items():
        own = kind.attribute_map.get(name, name)
        if own in default and (default[own] is not None or own in EVEN_UNSET):
            values[own] = value
    if "kv_lora_rank" in default:  # every head has its own keys there
        values["num_key_value_heads"] = values["num_attention_heads"]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    window = {"sliding_window": None} if model_type in WITHOUT_WINDOW else {}
    return kind(**(values | ids | MORE.get(model_type, {}) | window))


def build(model_type, folder):
    """Write the type's small random checkpoint into `folder`; return its parameters."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size < MOST_PARAMETERS, f"{size:,} parameters: the config was not made small"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model)
    model.save_pretrained(folder)
    known = [spec for spec in KNOWN.values() if spec.model_type == model_type]
    spec = (known or [FAMILIES["llama"]])[0]
    make_tokenizer(spec, folder, spec.tokenizer)
    return size


def load(folder):
    model, _ = ENGINE.from_pretrained(
        str(folder), dtype=torch.float32, load_in_4bit=False, max_seq_length=128
    )
    return model


def examine(model_type, folder):
    """Do one thing after the other; each writes what it found before the next begins."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    found = {}

    def note(**more):
        found.update(more)
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")

    base = folder / "base"
    note(doing="build")
    note(parameters=build(model_type, base), doing="lora")
    model, trainable = loading.attach_lora(
        load(base),
        ENGINE,
        LoraConfig(r=RANK),
        seed=1,
        gradient_checkpointing=False,
        train_token_ids=[],
    )
    note(trainable=trainable, doing="plan")
    try:
        note(planned=load_shape(str(base)).lora_parameters(RANK))
    except FastFTError as error:
        note(planned=None, planned_why=str(error))
    note(doing="rows")
    stepper = Stepper(model, ENGINE, StepPolicy(1000, "varlen", 0), device="cpu", on_note=str)
    rows, choice = choose_rows(
        "auto",
        model,
        ENGINE,
        lambda rows: check_rows(stepper, sequences(), FLOAT32),
        tested=True,
        longest=128,
    )
    note(rows=rows, rows_why=choice.reason, doing="train")
    note(losses=three_steps(model, stepper.with_policy(StepPolicy(1000, rows, 0))))
    export(base, folder, model, note)
    note(doing="")


def export(base, folder, model, note):
    """Merge the adapter and write it as GGUF, and measure both against the trained model."""
    from fastft.exporting.merged import export_merged

    ids = torch.tensor([[i % 240 for i in range(5, 400, 11)]])
    note(doing="merge")
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids, use_cache=False).logits
    model.save_pretrained(str(folder / "adapter"))
    try:
        export_merged(base, folder / "adapter", folder / "merged", dtype="float32")
        with torch.no_grad():
            merged = load(folder / "merged").eval()(input_ids=ids, use_cache=False).logits
        note(merged=float((merged - trained).abs().max()))
    except FastFTError as error:
        note(merged=None, merged_why=str(error))
    note(doing="gguf")
    for kind in ("", *OTHER_TOKENIZERS):
        if written := write_gguf(base, folder, kind, note):
            compare_gguf(Path(written), ids, trained, note)
            return


def write_gguf(base, folder, kind, note):
    """Return the f32 file's path, or None with the converter's reason noted."""
    from fastft.exporting.gguf import export_gguf, upstream
    from tests.sdist import llama_cpp_sdist

    upstream.upstream_folder = lambda: llama_cpp_sdist() / "vendor" / "llama.cpp"
    if kind:
        make_tokenizer(FAMILIES["gemma2" if kind == "gemma" else "mistral"], base, kind)
    try:
        (record,) = export_gguf(base, folder / "gguf", ["f32"], adapter=folder / "adapter")
    except FastFTError as error:
        if not kind:
            note(gguf=None, gguf_why=str(error))
        return None
    note(gguf=record["writer"], gguf_why="; ".join(record["notes"]))
    return record["path"]


def compare_gguf(path, ids, trained, note):
    from tests.gguf.oracle import kl, llama_cpp_logits

    note(doing="llama.cpp")
    note(kl=kl(trained[0], llama_cpp_logits(path, ids[0].tolist())))


def _last(words):
    """Return what a step died of: the last line that speaks of an error, else the last line."""
    lines = words.strip().splitlines() or ["no word"]
    errors = [line for line in lines if "rror" in line and "failed to load model" not in line]
    return (errors or lines)[-1]


def survey(model_type):
    """Return what was found of a type, with the last words where a step ended badly."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = multiprocessing.get_context("fork").Process(
            target=examine, args=(model_type, folder)
        )
        child.start()
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
        found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        if found["doing"]:
            words = (folder / "log").read_text(encoding="utf-8", errors="replace")
            found["failed"] = _last(words)
        return {key: _tidy(value, name) for key, value in found.items()}


def _tidy(value, folder):
    """Return a text without the paths of this machine, and not longer than a reader wants it."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\S*/(?=(?:site-packages|vendor)/)", "", value.replace(folder, ""))[:400]


if __name__ == "__main__":
    for model_type in sys.argv[2:] or text_types():
        print(json.dumps({model_type: survey(model_type)}), flush=True)
