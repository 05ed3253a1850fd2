"""Small random-weight checkpoints of the real architectures, for tests.

`make_checkpoint("llama", folder)` writes a complete Hugging Face folder: config, safetensors, a tokenizer that
works (trained here on a few sentences), a chat template, a generation config. Two layers, hidden size 64, grouped
query attention; weights are large enough that a wrong tensor, permutation or scale changes the answers.

Every real-sized feature is a config override: `tie_word_embeddings=False`, `rope_parameters=LLAMA3_ROPE`,
`sliding_window=8`, `attention_bias=True`, `rope_parameters=longrope(head_dim)`, `hidden_size=256` (K-quants) ...
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the capital of Bavoria? The capital of Bavoria is Lindmark.",
    "She sells sea shells by the sea shore; he'll buy 12 of them for $3.50 in 2026.",
    "def main(argument):\n    return argument + 1  # two spaces, then a comment\n",
    "Question: how many legs do three cats have?\nAnswer: twelve legs.",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "東京は日本の首都です。大阪は大きな町です。カタカナとひらがなと漢字。",
    "今日はとても良い天気ですね。明日も晴れるといいですね。",
    "user assistant system",
] * 4

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}\
{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BOS_CHATML = "{{ bos_token }}" + CHATML
GEMMA_TURNS = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = \
'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + \
message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<start_of_turn>model\n' }}{% endif %}"""
INST = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + \
message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}\
{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"""

# The splitting patterns of the published tokenizers.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def longrope(head_dim: int = 16, factor: float = 4.0) -> dict[str, Any]:
    """Return phi3's longrope parameters: one short and one long factor for each pair of a head's dimensions."""
    pairs = head_dim // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.02 * i for i in range(pairs)],
        "long_factor": [1.0 + 0.5 * i for i in range(pairs)],
        "factor": factor,
        "original_max_position_embeddings": 128,
    }


@dataclass(frozen=True)
class Family:
    """What sets one family apart from the plain llama shape."""

    model_type: str
    tokenizer: str
    """"llama3", "qwen2" or "gpt4o" (byte-level BPE with that split), "spm" (with a leading space) or "gemma"."""
    chat_template: str
    bos: str | None
    eos: str
    pad: str
    specials: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    config: dict[str, Any] = field(default_factory=dict)


TIED = {"tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", "llama3", BOS_CHATML, "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
    ),
    "mistral": Family(
        "mistral",
        "spm",
        INST,
        "<s>",
        "</s>",
        "<unk>",
        specials=("[INST]", "[/INST]"),
        config={"sliding_window": 16},
    ),
    "qwen2": Family(
        "qwen2",
        "qwen2",
        CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        config={"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "qwen3",
        "qwen2",
        CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        config={"tie_word_embeddings": True},
    ),
    "gemma2": Family(
        "gemma2",
        "gemma",
        GEMMA_TURNS,
        "<bos>",
        "<eos>",
        "<pad>",
        specials=("<start_of_turn>", "<end_of_turn>"),
        config={"sliding_window": 16, "tie_word_embeddings": True},
    ),
    "gemma3": Family(
        "gemma3_text",
        "gemma",
        GEMMA_TURNS,
        "<bos>",
        "<eos>",
        "<pad>",
        specials=("<start_of_turn>", "<end_of_turn>"),
        config={
            "sliding_window": 16,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": Family(
        "phi3",
        "spm",
        BOS_CHATML,
        "<s>",
        "</s>",
        "<unk>",
        config={"sliding_window": 64, "original_max_position_embeddings": 512},
    ),
    "gpt-oss": Family(
        "gpt_oss",
        "gpt4o",
        BOS_CHATML,
        "<|startoftext|>",
        "<|im_end|>",
        "<|endoftext|>",
        config={
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "smollm3": Family(
        "smollm3",
        "llama3",
        CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        config={
            "no_rope_layers": [1, 0],
            "no_rope_layer_interval": 2,
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "granite": Family(
        "granite",
        "llama3",
        CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        config={
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "ministral3": Family(
        "ministral3",
        "llama3",
        BOS_CHATML,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|pad|>",
        config={
            # queries of positions from 32 on are scaled up, so that short tests meet it
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
}
"""The families that fastft promises to train, export and hold in tests."""

NEWEST: dict[str, Family] = {
    "qwen3-moe": Family(
        "qwen3_moe",
        "qwen2",
        CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        config={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,  # as published; llama.cpp knows nothing else
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "glm4": Family(
        "glm4",
        "llama3",
        CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        specials=("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"),
        config={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "olmo2": Family("olmo2", "llama3", CHATML, None, "<|im_end|>", "<|endoftext|>"),
    "olmo3": Family(
        "olmo3",
        "llama3",
        CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        config={"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3.5": Family(
        "qwen3_5_text",
        "qwen2",
        CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        config={
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                # llama.cpp wants the sections of a head to fit into it
                "mrope_section": [2, 1, 1],
            },
        },
    ),
    "gemma4": Family(
        "gemma4_text",
        "gemma",
        GEMMA_TURNS,
        "<bos>",
        "<eos>",
        "<pad>",
        specials=("<start_of_turn>", "<end_of_turn>"),
        config={
            "sliding_window": 16,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "per_layer_config": {"1": {"head_dim": 32}},
            "hidden_size_per_layer_input": 16,
        },
    ),
}
"""Newer families that load, train and merge."""


def make_checkpoint(
    family: str,
    folder: Path | str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: str | None = None,
    tokenizer_model: bool = True,
    shard_bytes: int | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a small random checkpoint of `family` into `folder` and return the folder.

    `tokenizer`: another kind than the family's own ("llama3", "qwen2", "gpt4o", "spm", "gemma").
    `tokenizer_model`: whether a SentencePiece tokenizer also leaves its tokenizer.model, as published models do.
    `shard_bytes`: write shards of at most so many bytes. Everything else goes into the config.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    spec = (FAMILIES | NEWEST)[family]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tok = make_tokenizer(spec, folder, tokenizer or spec.tokenizer, tokenizer_model)
    config = make_config(spec, tok, config_overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
    ends = [tok.eos_token_id]
    ends += [
        tok.convert_tokens_to_ids(t)
        for t in ("<|im_end|>", "<end_of_turn>")
        if t in tok.get_vocab()
    ]
    model.generation_config = GenerationConfig(
        bos_token_id=tok.bos_token_id, eos_token_id=sorted(set(ends)), pad_token_id=tok.pad_token_id
    )
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    return folder


def make_multimodal(folder: Path | str, family: str = "gemma3", *, seed: int = 0) -> Path:
    """Write a small checkpoint of the multimodal class around `family` (gemma3: that of gemma-3-4b and
    larger; gemma4, qwen3.5)."""
    import torch
    import transformers
    from transformers import GenerationConfig

    spec, folder = (FAMILIES | NEWEST)[family], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tok = make_tokenizer(spec, folder, spec.tokenizer)
    rows = {"vocab_size": len(tok) + 8}
    if family == "gemma4":
        rows |= {"vocab_size_per_layer_input": len(tok) + 8, "final_logit_softcapping": 30.0}
    text = make_config(spec, tok, rows)
    name, config = WRAPPERS[family](text, len(tok))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config)
        _randomise(model)
    ends = {"gemma3": ["<end_of_turn>"], "gemma4": ["<end_of_turn>"]}.get(family, [])
    model.generation_config = GenerationConfig(
        bos_token_id=tok.bos_token_id,
        eos_token_id=[tok.eos_token_id, *map(tok.convert_tokens_to_ids, ends)],
        pad_token_id=tok.pad_token_id,
    )
    model.save_pretrained(folder)
    return folder


def _gemma3_wrapper(text: Any, first: int) -> tuple[str, Any]:
    from transformers import Gemma3Config, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return "Gemma3ForConditionalGeneration", Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        boi_token_index=first,
        eoi_token_index=first + 1,
        image_token_index=first + 2,
    )


def _gemma4_wrapper(text: Any, first: int) -> tuple[str, Any]:
    from transformers import Gemma4Config
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        position_embedding_size=64,
    )
    names = ("boi", "eoi", "image", "video", "boa", "audio")
    ids = {f"{name}_token_id": first + i for i, name in enumerate(names)}
    return "Gemma4ForConditionalGeneration", Gemma4Config(
        text_config=text, vision_config=vision, eoa_token_index=first + 6, **ids
    )


def _qwen3_5_wrapper(text: Any, first: int) -> tuple[str, Any]:
    from transformers import Qwen3_5Config
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig

    vision = Qwen3_5VisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=text.hidden_size,
        num_position_embeddings=16,
    )
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: first + i for i, name in enumerate(names)}
    return "Qwen3_5ForConditionalGeneration", Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=text.tie_word_embeddings, **ids
    )


WRAPPERS = {"gemma3": _gemma3_wrapper, "gemma4": _gemma4_wrapper, "qwen3.5": _qwen3_5_wrapper}


def make_config(spec: Family, tokenizer: Any, overrides: dict[str, Any]) -> Any:
    """Return the transformers config: two layers, hidden 64, four heads over two key-value heads."""
    from transformers import AutoConfig

    hidden = overrides.get("hidden_size", 64)
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if spec.model_type in {"qwen2", "phi3", "granite", "olmo2", "olmo3"}:
        del values["head_dim"]  # these families have no such field
    if spec.model_type in {"gemma2", "gemma3_text"}:
        values["query_pre_attn_scalar"] = hidden // 4
    if spec.model_type == "gemma4_text":
        values["vocab_size_per_layer_input"] = len(tokenizer)
    return AutoConfig.for_model(spec.model_type, **(values | spec.config | overrides))


def _randomise(model: Any) -> None:
    """Give weights the spread of a trained model: unit-gain matrices, norms and biases that are not all alike."""
    import torch

    embeddings = {id(model.get_input_embeddings().weight)}
    tied = getattr(model.config, "tie_word_embeddings", False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if id(weight) in embeddings:
                weight.normal_(
                    std=0.15 if tied else 0.3
                )  # tied and larger, a model only repeats its input
            elif weight.ndim >= 2:
                fan_in = weight.shape[-2] if "experts" in name else weight[0].numel()
                weight.normal_(std=fan_in**-0.5)
            else:
                weight.add_(torch.randn_like(weight), alpha=0.15)


ADDED = ["日本の首都", "良い天気", "ラーメン"]
"""Words that a Japanese continuation adds to the vocabulary it began with ("llama3-added")."""


def make_tokenizer(spec: Family, folder: Path, kind: str, tokenizer_model: bool = True) -> Any:
    """Train and save the tokenizer of `kind`; return it as transformers loads it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind, more, _ = kind.partition("-added")
    build = {"spm": _sentencepiece, "gemma": _sentencepiece}.get(kind, _byte_level)
    build = _unigram if kind.startswith("unigram") else build
    raw = build(spec, kind, folder if tokenizer_model else None)
    if more:
        raw.add_tokens(ADDED)
    names = {"eos_token": spec.eos, "pad_token": spec.pad}
    if spec.bos:
        names["bos_token"] = spec.bos
    if kind in {"spm", "gemma"} or kind.startswith("unigram"):
        names["unk_token"] = "<unk>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, clean_up_tokenization_spaces=False, **names
    )
    fast.chat_template = spec.chat_template
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    saved |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # as published models have it; transformers 5 no longer writes it
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added
        },
    }
    path.write_text(json.dumps(saved, indent=2), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def _special_names(spec: Family) -> list[str]:
    return list(
        dict.fromkeys(name for name in (spec.pad, spec.bos, spec.eos, *spec.specials) if name)
    )


def _byte_level(spec: Family, kind: str, folder: Path | None) -> Any:
    """A byte-level BPE of 448 tokens and the special ones, like Llama 3, Qwen 2 or GPT-4o."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers.trainers import BpeTrainer

    split = {"llama3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT, "gpt4o": GPT4O_SPLIT}[kind]
    raw = Tokenizer(models.BPE(ignore_merges=kind != "qwen2"))
    if kind == "qwen2":
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        SENTENCES, BpeTrainer(vocab_size=448, initial_alphabet=alphabet, show_progress=False)
    )
    raw.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in _special_names(spec)]
    )
    if spec.bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{spec.bos} $A",
            pair=f"{spec.bos} $A {spec.bos} $B",
            special_tokens=[(spec.bos, raw.token_to_id(spec.bos))],
        )
    return raw


def _sentencepiece(spec: Family, kind: str, folder: Path | None) -> Any:
    """A SentencePiece BPE with byte fall-back, like Llama 2 and Mistral ("spm") or Gemma ("gemma")."""
    import sentencepiece
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    gemma = kind == "gemma"
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **(
            {
                "pad_id": 0,
                "eos_id": 1,
                "bos_id": 2,
                "unk_id": 3,
                "bos_piece": "<bos>",
                "eos_piece": "<eos>",
            }
            | {
                # as published: no piece of Gemma 4 goes beyond the end of a line
                "user_defined_symbols": [
                    *spec.specials,
                    *(["\n"] if spec.model_type == "gemma4_text" else []),
                ]
            }
            if gemma
            else {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
        ),
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    raw = Tokenizer(
        models.BPE(
            vocab,
            _merges(model, vocab),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
            dropout=None,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    raw.normalizer = spaces if gemma else normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        steps.append(decoders.Strip(" ", 1, 0))
    raw.decoder = decoders.Sequence(steps)
    raw.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in _special_names(spec)]
    )
    if spec.bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{spec.bos} $A",
            pair=f"{spec.bos} $A {spec.bos}:1 $B:1",
            special_tokens=[(spec.bos, raw.token_to_id(spec.bos))],
        )
    if folder is not None:
        (folder / "tokenizer.model").write_bytes(written.getvalue())
    return raw


def _unigram(spec: Family, kind: str, folder: Path | None) -> Any:
    """A SentencePiece Unigram with byte fall-back, like LLM-jp and Sarashina ("unigram"); with NFKC and
    no space in front, like rinna's GPT-NeoX ("unigram-nfkc"); with NFKC and no bytes, like rinna's GPT-2
    ("unigram-nobytes"); with the space put in front by a Metaspace step, as transformers converts it
    ("unigram-metaspace")."""
    import sentencepiece
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    nfkc, in_bytes = kind in {"unigram-nfkc", "unigram-nobytes"}, kind != "unigram-nobytes"
    prefix = kind != "unigram-nfkc"
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        model_type="unigram",
        vocab_size=560,
        hard_vocab_limit=False,
        byte_fallback=in_bytes,
        character_coverage=1.0,
        normalization_rule_name="nfkc" if nfkc else "identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    vocab = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    raw = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=in_bytes))
    steps = [normalizers.Replace(" ", "▁")]
    if nfkc:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
        charsmap = proto.normalizer_spec.precompiled_charsmap
        steps = [normalizers.Precompiled(charsmap), *steps]
    if kind == "unigram-metaspace":
        raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    else:
        steps = [normalizers.Prepend("▁"), *steps] if prefix else steps
        raw.normalizer = normalizers.Sequence(steps)
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*ends, decoders.Strip(" ", 1, 0)] if prefix else ends)
    raw.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in _special_names(spec)]
    )
    raw.post_processor = processors.TemplateProcessing(
        single=f"{spec.bos} $A",
        pair=f"{spec.bos} $A {spec.bos}:1 $B:1",
        special_tokens=[(spec.bos, raw.token_to_id(spec.bos))],
    )
    if folder is not None:
        (folder / "tokenizer.model").write_bytes(written.getvalue())
    return raw


def _merges(model: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE implies: every split of a piece into two pieces, best score first."""
    merges = []
    for piece, index in vocab.items():
        if model.is_control(index) or model.is_byte(index) or model.is_unknown(index):
            continue
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        merges += [
            (model.get_score(index), *pair)
            for pair in sorted(known, key=lambda p: (vocab[p[0]], vocab[p[1]]))
        ]
    return [(left, right) for _, left, right in sorted(merges, key=lambda m: -m[0])]
