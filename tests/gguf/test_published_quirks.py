"""Checkpoints as they are really published: a token without a row, a language model inside a
multimodal class, a tied head that was trained apart. Each is a case that users met.
"""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastft.config import LoraConfig
from fastft.engines import loading
from fastft.engines.rows import untrained_rows
from fastft.engines.stock import ENGINE
from fastft.errors import FastFTError
from fastft.exporting.gguf import export_gguf
from fastft.exporting.gguf.architectures import describe
from fastft.exporting.gguf.imatrix import gguf_names
from fastft.exporting.gguf.lora import export_gguf_lora
from fastft.exporting.merged import export_merged
from fastft.exporting.weights import Weights
from fastft.models import tokenizer_of
from fastft.planning import load_shape
from tests.families import FAMILIES, SENTENCES, make_checkpoint, make_multimodal, make_tokenizer
from tests.gguf.oracle import hf_logits, kl, llama_cpp_logits
from tests.unit.test_export_weights import load, train_adapter

IDS = [i % 440 for i in range(3, 500, 9)]


def add_token(base: Path, text: str, special: bool = True) -> int:
    """Give the tokenizer one added token above the last embedding row; return its id."""
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    path = base / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": rows, "content": text, "special": special, **flags})
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    return rows


def test_a_token_above_the_last_row_is_left_out(tmp_path):
    base = make_checkpoint("gemma3", tmp_path / "base")
    rows = add_token(base, "<image_soft_token>")
    (record,) = export_gguf(base, tmp_path / "out", ["f32"])
    assert any("<image_soft_token> left out" in note for note in record["notes"])
    found = llama_cpp_logits(Path(record["path"]), IDS)
    assert found.shape[1] == rows
    assert kl(hf_logits(load(base), IDS), found) < 1e-5


@pytest.mark.parametrize("text", ["<start_of_turn>", "<eos>"])
def test_a_needed_token_without_a_row_is_refused(tmp_path, text):
    base = make_checkpoint("gemma3", tmp_path / "base")
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    path = base / "tokenizer.json"
    spec = path.read_text(encoding="utf-8")
    index = next(t["id"] for t in json.loads(spec)["added_tokens"] if t["content"] == text)
    spec = spec.replace(f'"id": {index},', f'"id": {rows},')
    spec = re.sub(rf'("{re.escape(text)}"): {index}\b', rf"\1: {rows}", spec)
    path.write_text(spec, encoding="utf-8")
    with pytest.raises(FastFTError, match=rf"{re.escape(text)}.* is needed"):
        export_gguf(base, tmp_path / "out", ["f32"])


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A gemma-3-4b in small, and an adapter that was attached as `fastft train` does it."""
    home = tmp_path_factory.mktemp("multimodal")
    base = make_multimodal(home / "base")
    model, _ = ENGINE.from_pretrained(str(base), dtype=torch.float32)
    trained, count = loading.attach_lora(
        model, ENGINE, LoraConfig(r=2), seed=1, gradient_checkpointing=False, train_token_ids=[]
    )
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    trained.save_pretrained(home / "adapter")
    return home, trained.eval(), count


def test_lora_goes_on_the_language_model_alone(multimodal):
    home, _, count = multimodal
    names = load_file(home / "adapter" / "adapter_model.safetensors")
    assert all(".language_model.layers." in name for name in names)
    assert len(names) == 2 * 2 * 7
    assert count == sum(tensor.numel() for tensor in names.values())


@pytest.mark.parametrize(
    ("targets", "path", "layers"),
    [
        (["q_proj", "v_proj"], "language_model", 4),
        (["q_proj", "lm_head"], "language_model", 3),
        (r".*vision_tower.*\.q_proj", "vision_tower", 1),
    ],
)
def test_names_mean_the_language_model_and_patterns_what_they_say(
    multimodal, targets, path, layers
):
    home, _, _ = multimodal
    model, _ = ENGINE.from_pretrained(str(home / "base"), dtype=torch.float32)
    peft_model, _ = loading.attach_lora(
        model,
        ENGINE,
        LoraConfig(r=2, target_modules=targets),
        seed=1,
        gradient_checkpointing=False,
        train_token_ids=[],
    )
    found = [n for n, _ in peft_model.named_parameters() if n.endswith("lora_A.default.weight")]
    assert len(found) == layers
    assert all(f".{path}." in name or ".lm_head." in name for name in found)


def test_a_multimodal_model_is_merged_and_its_language_model_written(multimodal, tmp_path):
    home, trained, _ = multimodal
    expected = hf_logits(trained, IDS)
    export_merged(home / "base", home / "adapter", tmp_path / "merged", dtype="float32")
    assert kl(expected, hf_logits(load(tmp_path / "merged"), IDS)) < 1e-9
    (record,) = export_gguf(home / "base", tmp_path, ["f32"], adapter=home / "adapter")
    assert record["writer"] == "streaming"
    assert any("language model alone" in note for note in record["notes"])
    assert kl(expected, llama_cpp_logits(Path(record["path"]), IDS)) < 1e-5
    linear = [n for n in Weights(home / "base").names if n.endswith("proj.weight")]
    names = gguf_names(load(home / "base"), linear)
    assert "blk.1.attn_q.weight" in names.values()


def test_modules_beside_the_layers_are_the_language_models_too(tmp_path):
    """Gemma 4 has a linear layer beside its decoder layers."""
    base = make_multimodal(tmp_path / "base", "gemma4")
    model, _ = ENGINE.from_pretrained(str(base), dtype=torch.float32)
    trained, count = loading.attach_lora(
        model, ENGINE, LoraConfig(r=2), seed=1, gradient_checkpointing=False, train_token_ids=[]
    )
    assert count == load_shape(str(base)).lora_parameters(2)
    names = [n for n, p in trained.named_parameters() if p.requires_grad]
    assert any(".language_model.per_layer_model_projection." in name for name in names)
    assert not any("vision" in name for name in names)


@pytest.mark.parametrize("layout", ["vision_tower.vision_model.", "vision_tower."])
def test_an_adapter_with_vision_keys_is_merged_where_the_base_has_them(
    multimodal, tmp_path, layout
):
    home, _, _ = multimodal
    base = tmp_path / "base"
    base.mkdir()
    for file in (home / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    renamed = {n.replace("vision_tower.", layout, 1): t for n, t in weights.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    train_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    changed = Weights(base, tmp_path / "adapter").changed
    assert any(name.startswith(f"{layout}encoder.layers.0.self_attn.q_proj") for name in changed)
    notes = describe(Weights(base, tmp_path / "adapter")).notes
    assert any("which only the merged model holds" in note for note in notes)


def test_a_tied_head_that_was_trained_apart_stays_apart(tmp_path):
    base = make_checkpoint("qwen3", tmp_path / "base")
    path = base / "model.safetensors"
    weights = load_file(path)
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone()
    save_file(weights, path, metadata={"format": "pt"})
    assert "lm_head.weight" not in Weights(base).names
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(7))
    weights["lm_head.weight"] = embedding + 0.1 * noise
    save_file(weights, path, metadata={"format": "pt"})
    expected = hf_logits(load(base), IDS)
    (record,) = export_gguf(base, tmp_path, ["f32"])
    assert kl(expected, llama_cpp_logits(Path(record["path"]), IDS)) < 1e-6
    trained = train_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    export_merged(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = load(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    assert kl(hf_logits(trained, IDS), hf_logits(merged, IDS)) < 1e-9


def test_gemma2_may_have_an_odd_number_of_layers(tmp_path):
    base = make_checkpoint("gemma2", tmp_path / "base", num_hidden_layers=3)
    (record,) = export_gguf(base, tmp_path, ["f32"])
    assert record["writer"] == "streaming"
    assert kl(hf_logits(load(base), IDS), llama_cpp_logits(Path(record["path"]), IDS)) < 1e-5


def test_rows_that_were_never_trained_are_found():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(20_000, 32, generator=generator)
    embedding[7] = embedding[19_000]  # a copy of an unused one
    embedding[8] = 0.001 * embedding[8]  # never moved from near zero
    embedding[9] = 1.5 * embedding[3]  # the same direction
    assert untrained_rows(embedding, [5, 6, 7, 8, 9, 10]) == [7, 8, 9]
    assert untrained_rows(embedding, []) == []


@pytest.mark.parametrize("kind", ["unigram", "unigram-nfkc"])
def test_a_unigram_of_japanese_bases_is_written_exactly(tmp_path, kind):
    from transformers import AutoTokenizer

    from fastft.inference.llamacpp import open_gguf
    from fastft.verification.checks import known_limit

    base = make_checkpoint("mistral", tmp_path / "base", tokenizer=kind, sliding_window=None)
    (record,) = export_gguf(base, tmp_path / "out", ["f32"])
    assert record["writer"] == "streaming"
    tokenizer = AutoTokenizer.from_pretrained(base)
    with open_gguf(record["path"], n_ctx=64, exact=True) as model:
        for text in SENTENCES[:40]:
            assert model.tokens(text, add_special=True) == tokenizer(text).input_ids, text
        covered = "😀 鑫 名前"  # no piece covers the first two: bytes there, one unknown token here
        expected = tokenizer(covered).input_ids
        got = model.tokens(covered, add_special=True)
        assert got != expected
        assert "Unigram has no bytes" in known_limit(model, covered, got, expected, True)
        assert known_limit(model, covered, got, expected[:-1], True) is None
    ids = [i % 400 for i in range(3, 500, 9)]
    assert kl(hf_logits(load(base), ids), llama_cpp_logits(Path(record["path"]), ids)) < 1e-6


@pytest.mark.parametrize("kind", ["unigram", "unigram-nfkc", "llama3", "spm"])
def test_the_class_that_a_config_names_does_not_change_the_tokens(tmp_path, kind):
    """Published Unigrams and byte-level BPEs name LlamaTokenizer, which transformers 5 rebuilds."""
    from transformers import AutoTokenizer

    family = "llama" if kind == "llama3" else "mistral"
    right = make_tokenizer(FAMILIES[family], tmp_path, kind)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    expected = [right(text).input_ids for text in SENTENCES[:9]]
    found = tokenizer_of(tmp_path)
    assert [found(text).input_ids for text in SENTENCES[:9]] == expected
    found.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in SENTENCES[:9]] == expected
    if kind != "spm":
        rebuilt = AutoTokenizer.from_pretrained(tmp_path)  # else tokenizer_of has become needless
        assert [rebuilt(text).input_ids for text in SENTENCES[:9]] != expected
    if kind == "unigram":
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(FastFTError, match=r"as a BPE, but it is a Unigram: .*tokenizer\.json"):
            tokenizer_of(tmp_path)


@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe"])
def test_experts_stay_as_they_are_and_it_is_said(tmp_path, family):
    base = make_checkpoint(family, tmp_path / "base")
    attach = partial(loading.attach_lora, seed=1, gradient_checkpointing=False, train_token_ids=[])
    model, _ = ENGINE.from_pretrained(str(base), dtype=torch.float32)
    with pytest.raises(FastFTError, match=r"no 'gate_proj'.*experts are parameters"):
        attach(model, ENGINE, LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    peft_model, count = attach(model, ENGINE, LoraConfig(r=2))
    assert count == load_shape(str(base)).lora_parameters(2)
    trained = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert all(".self_attn." in name for name in trained)
    assert not peft_model.peft_config["default"].target_parameters


def test_layers_that_peft_takes_for_experts_are_left_out(tmp_path):
    """GLM 4.5's shared expert and dense layers have the names that its experts had once."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "vocab_size": 128, "n_routed_experts": 4}
    config = Glm4MoeConfig(num_experts_per_tok=2, pad_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    attach = partial(loading.attach_lora, seed=1, gradient_checkpointing=False, train_token_ids=[])
    model = load(tmp_path / "base")
    with pytest.raises(FastFTError, match=r"up_proj: of glm4_moe peft takes these names"):
        attach(model, ENGINE, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    trained, count = attach(model, ENGINE, LoraConfig(r=2))
    assert count == load_shape(str(tmp_path / "base")).lora_parameters(2)
    assert not any(".gate." in name for name, p in trained.named_parameters() if p.requires_grad)
    trained.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("family", ["gpt-oss", "qwen3-moe"])
def test_experts_are_trained_by_name(tmp_path, family):
    base = make_checkpoint(family, tmp_path / "base")
    attach = partial(loading.attach_lora, seed=1, gradient_checkpointing=False, train_token_ids=[])
    model, _ = ENGINE.from_pretrained(str(base), dtype=torch.float32)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for wrong, words in (
        ({"target_parameters": ["experts.w1"]}, r"no 'experts\.w1'\. It has: mlp\.experts\.down"),
        ({"target_parameters": names, "dropout": 0.1}, r"cannot be combined with lora\.dropout"),
    ):
        with pytest.raises(FastFTError, match=words):
            attach(model, ENGINE, LoraConfig(r=2, **wrong))
    with pytest.raises(FastFTError, match=r"no 'experts\.w1'\. It has: mlp\.experts\.gate_up_proj"):
        load_shape(str(base)).lora_parameters(2, "all-linear", ["experts.w1"])
    trained, count = attach(model, ENGINE, LoraConfig(r=2, target_parameters=names))
    assert count == load_shape(str(base)).lora_parameters(2, "all-linear", names)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    trained.save_pretrained(tmp_path / "adapter")
    expected = hf_logits(trained.eval(), IDS)
    export_merged(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert kl(expected, hf_logits(load(tmp_path / "merged"), IDS)) < 1e-9
    (record,) = export_gguf(base, tmp_path, ["f32"], adapter=tmp_path / "adapter")
    assert record["writer"] == "streaming"
    assert kl(expected, llama_cpp_logits(Path(record["path"]), IDS)) < 1e-6
    with pytest.raises(FastFTError, match="trained experts"):
        export_gguf_lora(base, tmp_path / "adapter", tmp_path)


def test_a_mixture_that_does_not_normalise_is_refused(tmp_path):
    base = make_checkpoint("qwen3-moe", tmp_path / "base", norm_topk_prob=False)
    with pytest.raises(FastFTError, match="norm_topk_prob is false cannot be held by GGUF"):
        export_gguf(base, tmp_path, ["f32"])


GEMMA4_KINDS = {
    "no-cap": {},  # llama.cpp caps at 30 unless the file says 0
    "no-layer-inputs": {"hidden_size_per_layer_input": 0},
    "shared-keys": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
    },
    "keys-are-values": {
        "attention_k_eq_v": True,
        "per_layer_config": {"1": {"head_dim": 32, "num_key_value_heads": 1}},
    },
}


@pytest.mark.long
@pytest.mark.parametrize("kind", GEMMA4_KINDS)
def test_every_kind_of_gemma4_is_written_exactly(tmp_path, kind):
    cap = {} if kind == "no-cap" else {"final_logit_softcapping": 30.0}
    base = make_checkpoint("gemma4", tmp_path / "base", **GEMMA4_KINDS[kind], **cap)
    (record,) = export_gguf(base, tmp_path, ["f32"])
    assert record["writer"] == "streaming"
    assert kl(hf_logits(load(base), IDS), llama_cpp_logits(Path(record["path"]), IDS)) < 1e-6


def test_unsloth_would_train_a_named_head_in_full():
    class Unsloth:
        name = "unsloth"

    with pytest.raises(FastFTError, match=r"modules_to_save.*engine: stock"):
        loading._refuse_whole_embeddings(Unsloth(), ["q_proj", "lm_head"])
