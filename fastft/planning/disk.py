"""Bytes on disk: checkpoints, final/, merged folder and GGUF files, from the formats' own
arithmetic.
"""

from __future__ import annotations

from fastft.errors import FastFTError, did_you_mean
from fastft.planning.memory import Situation, Term, trainable
from fastft.planning.shape import ModelShape, Weight

# Bits a weight: bytes of a block x 8 / weights in it, from the block layouts in ggml-common.h.
GGUF_BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q5_k": 5.5, "q4_k": 4.5,
    "q3_k": 3.4375, "q2_k": 2.625, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5,
    "iq4_xs": 4.25,
}  # fmt: skip
# What most tensors get, and what the more sensitive half (attention values, MLP down) of the layers
# gets.
_MIXES = {
    "q2_k": ("q2_k", "q3_k"),
    "q3_k_s": ("q3_k", "q3_k"),
    "q3_k_m": ("q3_k", "q4_k"),
    "q3_k_l": ("q3_k", "q5_k"),
    "q4_k_s": ("q4_k", "q5_k"),
    "q4_k_m": ("q4_k", "q6_k"),
    "q5_k_s": ("q5_k", "q5_k"),
    "q5_k_m": ("q5_k", "q6_k"),
}
_FUSED_QKV = {"q3_k_m": "q4_k", "q3_k_l": "q4_k", "q4_k_m": "q5_k", "q5_k_m": "q6_k"}
GGUF_TYPES = sorted({*(k for k in GGUF_BITS if not k.endswith("_k")), "q6_k", *_MIXES})


def gguf_bytes(shape: ModelShape, kind: str) -> int:
    """Return the size of a GGUF file of type `kind`.

    The mixes follow llama.cpp's llama_tensor_get_type: the more-bits type for attn_v and ffn_down
    in the first and last eighth of the layers and every third between (all of attn_v and half of
    ffn_down differ by type), q6_k for the output. Raises FastFTError listing the known types.
    """
    if kind not in GGUF_TYPES:
        raise FastFTError(
            f"unknown GGUF type {kind!r}{did_you_mean(kind, GGUF_TYPES)}. Known: "
            f"{', '.join(GGUF_TYPES)}."
        )
    return int(sum(_weight_bits(shape, w, kind) for w in shape.weights) / 8) + vocabulary_bytes(
        shape
    )


def _weight_bits(shape: ModelShape, w: Weight, kind: str) -> float:
    if len(w.shape) == 1 or w.role in {"norm", "router", "other"}:
        return 32.0 * w.parameters
    if kind not in _MIXES:
        return GGUF_BITS[kind] * w.parameters
    base, more = (GGUF_BITS[name] for name in _MIXES[kind])
    if w.role == "head" or (w.role == "embedding" and shape.tied):
        base = more = GGUF_BITS["q6_k"]
    if w.name == "qkv_proj":  # fused, so all of it is as sensitive as its values
        base = more = GGUF_BITS[_FUSED_QKV.get(kind, _MIXES[kind][0])]
    sensitive = w.name in {"v_proj", "down_proj", "experts.down_proj"}
    share = _more_bits(shape.layers) / shape.layers if sensitive and kind.endswith("_m") else 0.0
    if sensitive and kind.endswith("_s") and kind != "q3_k_s":
        share = min(1.0, (4 if w.name == "v_proj" else shape.layers // 8) / shape.layers)
    if w.shape[-1] % 256:  # K-quants work on 256 weights; such rows fall back to a 32-weight type
        base, more = (
            GGUF_BITS[{4.5: "q5_0", 5.5: "q5_1", 6.5625: "q8_0"}.get(b, "iq4_nl")]
            for b in (base, more)
        )
    return w.parameters * (base + share * (more - base))


def _more_bits(layers: int) -> int:
    """How many layers llama.cpp's use_more_bits picks."""
    eighth = layers // 8
    return sum(i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2 for i in range(layers))


def vocabulary_bytes(shape: ModelShape) -> int:
    """Tokens, types and merges in a GGUF file: about 12 + 8 + 4 bytes a token, and 8 + 9 a merge
    for byte-level BPE.
    """
    return shape.vocab * 24 + (shape.vocab * 17 if shape.vocab > 40_000 else shape.vocab * 4)


def tokenizer_bytes(shape: ModelShape) -> int:
    """The tokenizer's files: their real size where the model is a folder, else about 75 bytes an
    entry.
    """
    return shape.tokenizer_bytes or shape.vocab * 75


TENSOR_OVERHEAD = 1300
"""Bytes of a LoRA matrix besides its numbers: three entries in optimizer.pt's archive and one in
the adapter's header.
"""
SAMPLES = 64
"""Sequences that a run keeps for its certificates, as text of about 7 bytes for an id and for a
label.
"""


def checkpoint_bytes(shape: ModelShape, s: Situation) -> int:
    """One checkpoint: adapter, two moments, tokenizer, and the run's samples (taken as half as
    long as allowed).
    """
    moments = 2 * s.lora_bytes if s.optimizer == "adamw" else 2.06
    matrices = 2 * sum(w.count for w in shape.lora_targets(s.lora[1]))
    numbers = (
        adapter_bytes(shape, s) + int(trainable(shape, s) * moments) + matrices * TENSOR_OVERHEAD
    )
    return numbers + tokenizer_bytes(shape) + SAMPLES * s.longest // 2 * 14


def checkpoint_term(shape: ModelShape, s: Situation, kept: int) -> Term:
    """Checkpoints: adapter and two moments; the best and the one being written come on top of
    those kept.
    """
    one = checkpoint_bytes(shape, s)
    formula = f"({kept} kept + best + one being written) x {one:,} bytes"
    return Term(
        name="checkpoints",
        bytes=(kept + 2) * one,
        formula=formula,
        source="adapter, optimizer, tokenizer",
    )


def adapter_bytes(shape: ModelShape, s: Situation) -> int:
    """adapter_model.safetensors without its header; where the head is adapted, peft writes its
    base weight beside it.
    """
    head = shape.vocab * shape.hidden * s.compute_bytes if "lm_head" in s.lora[1] else 0
    return trainable(shape, s) * s.lora_bytes + head


def export_term(shape: ModelShape, s: Situation, target: str) -> Term:
    """The files of one export target."""
    if target == "merged":
        size = shape.parameters * (4 if shape.stored == "float32" else 2)
        return Term(
            name="merged",
            bytes=size,
            formula=f"{shape.parameters:,} x bytes as stored",
            source="safetensors",
        )
    if target.startswith("gguf:") or target == "ollama":
        kind = target.partition(":")[2] or "q4_k_m"
        size = gguf_bytes(shape, kind)
        return Term(
            name=f"GGUF {kind}",
            bytes=size,
            formula="sum of tensors x bits of their type + vocabulary",
            source="llama.cpp's type rules",
        )
    size = adapter_bytes(shape, s)
    kind_name = "GGUF adapter" if target == "gguf-lora" else "adapter"
    return Term(
        name=kind_name,
        bytes=size,
        formula="trained parameters x bytes",
        source="safetensors or GGUF",
    )
