"""What a model is made of, from its config.json and safetensors headers. No weight is ever read.

A `ModelShape` is a list of `Weight`s: name of the leaf, logical shape, how often it occurs, and
its role. The role decides everything later: what gets LoRA, what is quantised, what a token
multiplies with.
"""

from __future__ import annotations

import math
import os
import re
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fastft import hub
from fastft.errors import FastFTError, did_you_mean
from fastft.families import EXPERTS, FAMILIES, family_of, taken_for_experts
from fastft.files import read_json
from fastft.models import read_header

Role = Literal["embedding", "head", "linear", "expert", "router", "norm", "other"]
STORED_BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1,
    "BOOL": 1,
}  # fmt: skip
STORED_16_BIT = frozenset({"BF16", "F16", "F32"})
PACKED = frozenset({"U8", "I8", "I32", "F8_E4M3", "F8_E5M2"})  # bitsandbytes, MXFP4, GPTQ, AWQ, FP8


@dataclass(frozen=True)
class Weight:
    """A parameter tensor that occurs `count` times; linear layers have shape (out, in), experts
    (experts, in, out).
    """

    name: str
    shape: tuple[int, ...]
    count: int
    role: Role

    @property
    def parameters(self) -> int:
        """Parameters of all occurrences together."""
        return math.prod(self.shape) * self.count


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder and its weights; see `load_shape`."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    weights: tuple[Weight, ...]
    experts: int = 0
    experts_per_token: int = 0
    sliding_window: int | None = None
    max_positions: int | None = None
    """Longest sequence that the model was made for (max_position_embeddings), where the config
    says.
    """
    stored: str = "bfloat16"
    """How the checkpoint stores its weights: bfloat16, float16, float32, nf4 or mxfp4."""
    checkpoint_bytes: int = 0
    """Size of the safetensors files."""
    kept_in_16_bit: int = 0
    """Parameters of linear layers and experts that a 4-bit checkpoint does not quantise (its
    skipped modules).
    """
    tokenizer_bytes: int = 0
    """Size of the tokenizer's files, where the model is a local folder."""
    local: bool = True
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        return sum(w.parameters for w in self.weights)

    @cached_property
    def matmul_parameters(self) -> int:
        """Parameters that one token is multiplied with: linear layers, the head, and only the
        experts it visits.
        """
        dense = sum(w.parameters for w in self.weights if w.role in {"linear", "router", "head"})
        head = self.hidden * self.vocab if self.tied else 0
        share = self.experts_per_token / self.experts if self.experts else 0
        visited = int(share * sum(w.parameters for w in self.weights if w.role == "expert"))
        return dense + head + visited

    @property
    def query_size(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys (or values) of all key-value heads."""
        return self.kv_heads * self.head_dim

    def of(self, *roles: Role) -> list[Weight]:
        """Return the weights with one of these roles."""
        return [w for w in self.weights if w.role in roles]

    def lora_targets(self, target_modules: str | list[str]) -> list[Weight]:
        """Return the linear layers that LoRA is put on; all-linear leaves out the head, experts
        and routers.

        Raises FastFTError for names that the model does not have.
        """
        linear = [w for w in self.of("linear") if len(w.shape) == 2]
        if target_modules == "all-linear":
            others = taken_for_experts(self.family)
            return [w for w in linear if w.name.rsplit(".", 1)[-1] not in others]
        wanted = [target_modules] if isinstance(target_modules, str) else target_modules
        if not wanted:
            raise FastFTError(
                "lora.target_modules is empty, so nothing would be trained; name some, or "
                "all-linear."
            )
        known = {w.name for w in linear} | {"lm_head"}
        wanted = [FUSED.get(n, n) if n not in known else n for n in wanted]
        missing = [n for n in wanted if n not in known]
        if missing:
            listed = ", ".join(f"{n!r}{did_you_mean(n, known)}" for n in missing)
            has = ", ".join(sorted(known))
            raise FastFTError(
                f"lora.target_modules: {self.name} has no {listed}. It has: {has}; or use "
                "all-linear."
            )
        head = (
            [Weight("lm_head", (self.vocab, self.hidden), 1, "head")] if "lm_head" in wanted else []
        )
        return [w for w in linear if w.name in wanted] + head

    def expert_targets(self, target_parameters: Sequence[str]) -> list[Weight]:
        """Return the expert parameters that LoRA is put on (lora.target_parameters).

        Raises FastFTError for names that the model does not have.
        """
        experts = {f"mlp.{w.name}": w for w in self.of("expert")}
        found = {
            name: [w for full, w in experts.items() if f".{full}".endswith(f".{name}")]
            for name in target_parameters
        }
        missing = [repr(name) for name, weights in found.items() if not weights]
        if missing:
            has = f"It has: {', '.join(experts)}." if experts else "It is no mixture of experts."
            raise FastFTError(
                f"lora.target_parameters: {self.name} has no {', '.join(missing)}. {has}"
            )
        return list({w.name: w for weights in found.values() for w in weights}.values())

    def lora_parameters(
        self,
        r: int,
        target_modules: str | list[str] = "all-linear",
        target_parameters: Sequence[str] = (),
        *,
        use_dora: bool = False,
        train_tokens: int = 0,
    ) -> int:
        """Trainable parameters: r (in + out) a layer (arXiv 2106.09685, 4.1), DoRA + out, each
        token row + hidden; of an expert parameter r (in + out) an expert.
        """
        targets = self.lora_targets(target_modules)
        experts = self.expert_targets(target_parameters)
        dense = sum(w.count * (r * sum(w.shape) + (w.shape[0] if use_dora else 0)) for w in targets)
        mixed = sum(w.count * w.shape[0] * r * sum(w.shape[1:]) for w in experts)
        return dense + mixed + train_tokens * self.hidden


# Where a family fuses layers, the split names mean the fused one.
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
NEEDED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
)  # fmt: skip
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token")
OPTIONAL_NUMBERS = (
    "num_key_value_heads", "head_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
    "n_shared_experts", "sliding_window", "max_position_embeddings", *EXPERTS, *EXPERTS_PER_TOKEN,
)  # fmt: skip
LARGEST = 100_000_000
"""No size in a config.json of today is near it."""
_ATTENTION_LEAVES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"})


def shape_from_config(config: dict[str, Any], name: str = "model") -> ModelShape:
    """Return the shape that a config.json describes.

    Raises FastFTError listing every field that is missing, or every value that cannot be. An
    unknown family is taken for Llama-like, and `notes` says so.
    """
    outer = config
    config = _language_model(config, name)
    _check(config, name)
    family, hidden = config["model_type"], config["hidden_size"]
    heads = config["num_attention_heads"]
    experts = _first(config, EXPERTS)
    notes = []
    if family not in FAMILIES:
        like = f"a Llama-like decoder with {experts} experts" if experts else "a Llama-like decoder"
        notes.append(f"{family} is not a family fastft knows: taken for {like}")
    method = (config.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if method not in {"bitsandbytes", "mxfp4"}:
        notes.append(
            f"stored as {method}, which is not planned for: counted as the same model in 16 "
            "bit or NF4"
        )
    if outer.get("vision_config"):
        notes.append("only the language model is counted, not the vision tower")
    tied, window = config.get("tie_word_embeddings"), config.get("sliding_window")
    shape = ModelShape(
        name=name,
        family=family,
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=(experts and config.get("moe_intermediate_size"))
        or config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=family_of(family).tied if tied is None else bool(tied),
        weights=(),
        experts=experts,
        experts_per_token=_first(config, EXPERTS_PER_TOKEN),
        sliding_window=window if config.get("use_sliding_window", True) else None,
        max_positions=config.get("max_position_embeddings"),
        stored=_stored(config),
        notes=tuple(notes),
    )
    shape = replace(shape, weights=tuple(_decoder_weights(shape, config)))
    if shape.stored == "nf4":
        shape = replace(
            shape, kept_in_16_bit=_kept_in_16_bit(shape.weights, _skipped_modules(config))
        )
    return replace(shape, checkpoint_bytes=_stored_size(shape))


def _language_model(config: Any, name: str) -> dict[str, Any]:
    """The config of the decoder: of a multimodal model its text_config, with the defaults that it
    leaves out.
    """
    if not isinstance(config, dict):
        raise FastFTError(
            f"the config.json of {name} is not a JSON object. Download the model again."
        )
    text = config.get("text_config")
    if text is None:
        return config
    if not isinstance(text, dict):
        raise FastFTError(
            f"the config.json of {name}: text_config is not a JSON object. Download the model "
            "again."
        )
    family = text.get("model_type", config.get("model_type"))
    omitted = family_of(family).omitted if isinstance(family, str) else {}
    return {**omitted, **config, **text}


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int:
    return next((config[key] for key in keys if config.get(key)), 0)


def _check(config: dict[str, Any], name: str) -> None:
    """Raise FastFTError for what is missing, and else for every value that no model can have, all
    at once.
    """
    missing = [key for key in (*NEEDED, "model_type") if config.get(key) is None]
    if _any(config, EXPERTS) and config.get("moe_intermediate_size") is not None:
        missing = [key for key in missing if key != "intermediate_size"]  # Qwen3.5-MoE has none
    if _any(config, EXPERTS) and not _any(config, EXPERTS_PER_TOKEN):
        missing.append(EXPERTS_PER_TOKEN[0])
    if missing:
        what = ", ".join(missing)
        raise FastFTError(
            f"the config.json of {name} lacks {what}; without them nothing can be said about "
            "its size."
        )
    wrong = [
        f"{key} is {config[key]!r}, not a whole number from {least} to {LARGEST:,}"
        for key, least in [*((key, 1) for key in NEEDED), *((key, 0) for key in OPTIONAL_NUMBERS)]
        if config.get(key) is not None and not _whole(config[key], least)
    ]
    kinds: dict[str, type] = {"model_type": str, "dtype": str, "torch_dtype": str}
    kinds |= {"tie_word_embeddings": bool, "quantization_config": dict}
    wrong += [
        f"{key} is {config[key]!r}, not a {kind.__name__}"
        for key, kind in kinds.items()
        if config.get(key) is not None and not isinstance(config[key], kind)
    ]
    if not wrong:
        wrong = _impossible(config)
    if wrong:
        raise FastFTError(f"the config.json of {name} is no model's: {'; '.join(wrong)}.")


def _any(config: dict[str, Any], keys: tuple[str, ...]) -> bool:
    return any(config.get(key) for key in keys)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def _impossible(config: dict[str, Any]) -> list[str]:
    """Heads that do not divide what they share, and more experts a token than there are."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    wrong, kv_heads = [], config.get("num_key_value_heads") or heads
    if not config.get("head_dim") and hidden % heads:
        wrong.append(
            f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there "
            "is no head_dim"
        )
    if heads % kv_heads:
        wrong.append(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    experts, chosen = _first(config, EXPERTS), _first(config, EXPERTS_PER_TOKEN)
    if chosen > experts > 0:
        wrong.append(f"{chosen} experts a token, but only {experts} in all")
    return wrong


def _skipped_modules(config: dict[str, Any]) -> list[str]:
    """Modules that a bitsandbytes checkpoint keeps in 16 bit, as "model.layers.3.mlp" or
    "mlp.down_proj".
    """
    skipped = (config.get("quantization_config") or {}).get("llm_int8_skip_modules") or []
    return [str(module) for module in skipped]


def _kept_in_16_bit(weights: tuple[Weight, ...], skipped: list[str]) -> int:
    """Parameters of the linear layers that are, or lie below, one of `skipped`."""
    kept = 0
    for weight in weights:
        block = "self_attn" if weight.name in _ATTENTION_LEAVES else "mlp"
        names = [f".model.layers.{number}.{block}.{weight.name}." for number in range(weight.count)]
        hit = sum(
            any(f".{module.removeprefix('language_model.')}." in name for module in skipped)
            for name in names
        )
        kept += hit * (weight.parameters // weight.count) if weight.role == "linear" else 0
    return kept


def _stored(config: dict[str, Any]) -> str:
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "")
    if method == "mxfp4":
        return "mxfp4"
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        return "nf4"
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").replace("torch.", "")


def _decoder_weights(s: ModelShape, config: dict[str, Any]) -> list[Weight]:
    """The weights of the known families, in the layout of transformers 5."""
    n, family = s.layers, family_of(s.family)
    bias = bool(config.get("attention_bias", family.attention_bias))
    weights = [
        Weight("embed_tokens", (s.vocab, s.hidden), 1, "embedding"),
        Weight("norm", (s.hidden,), 1, "norm"),
    ]
    if not s.tied:
        weights.append(Weight("lm_head", (s.vocab, s.hidden), 1, "head"))
    if family.joined_projections:
        weights.append(Weight("qkv_proj", (s.query_size + 2 * s.kv_size, s.hidden), n, "linear"))
    else:
        for leaf, out in (("q_proj", s.query_size), ("k_proj", s.kv_size), ("v_proj", s.kv_size)):
            weights.append(Weight(leaf, (out, s.hidden), n, "linear"))
            weights += [Weight(f"{leaf}.bias", (out,), n, "other")] if bias else []
    weights.append(Weight("o_proj", (s.hidden, s.query_size), n, "linear"))
    if bias and family.output_bias:
        weights.append(Weight("o_proj.bias", (s.hidden,), n, "other"))
    weights.append(Weight("layernorms", (s.hidden,), family.norms_a_layer * n, "norm"))
    if family.qk_norms == "head":
        weights.append(Weight("qk_norms", (s.head_dim,), 2 * n, "norm"))
    if family.qk_norms == "projection":
        weights += [
            Weight("q_norm", (s.query_size,), n, "norm"),
            Weight("k_norm", (s.kv_size,), n, "norm"),
        ]
    if not s.experts:
        return weights + _mlp_weights(s, n, s.intermediate)
    shared = (
        config.get("shared_expert_intermediate_size")
        or (config.get("n_shared_experts") or 0) * s.intermediate
    )
    return weights + _expert_weights(s, n) + (_mlp_weights(s, n, shared) if shared else [])


def _mlp_weights(s: ModelShape, n: int, width: int) -> list[Weight]:
    if family_of(s.family).joined_projections:
        up = [Weight("gate_up_proj", (2 * width, s.hidden), n, "linear")]
    else:
        up = [Weight(leaf, (width, s.hidden), n, "linear") for leaf in ("gate_proj", "up_proj")]
    return [*up, Weight("down_proj", (s.hidden, width), n, "linear")]


def _expert_weights(s: ModelShape, n: int) -> list[Weight]:
    weights = [
        Weight("router", (s.experts, s.hidden), n, "router"),
        Weight("experts.gate_up_proj", (s.experts, s.hidden, 2 * s.intermediate), n, "expert"),
        Weight("experts.down_proj", (s.experts, s.intermediate, s.hidden), n, "expert"),
    ]
    if s.family == "gpt_oss":
        biases: dict[str, tuple[int, ...]] = {"router.bias": (s.experts,), "sinks": (s.heads,)}
        biases |= {
            "gate_up_proj_bias": (s.experts, 2 * s.intermediate),
            "down_proj_bias": (s.experts, s.hidden),
        }
        weights += [Weight(leaf, size, n, "other") for leaf, size in biases.items()]
    return weights


def _stored_size(s: ModelShape) -> int:
    """Bytes of a checkpoint stored as `s.stored`; 4-bit formats keep all but linear layers (or
    experts) in 16 bit.
    """
    if s.stored == "mxfp4":
        # 4 bits and one 8-bit scale for 32 values: OCP Microscaling 1.0, section 5.2
        packed = sum(w.parameters for w in s.of("expert"))
        return int(packed * 4.25 / 8) + 2 * (s.parameters - packed)
    if s.stored == "nf4":
        packed = sum(w.parameters for w in s.of("linear", "expert")) - s.kept_in_16_bit
        return int(packed * NF4_BITS / 8) + 2 * (s.parameters - packed)
    return s.parameters * (4 if s.stored == "float32" else 2)


# 4 bits, one 8-bit constant for 64 values, one float32 for 256 of those: QLoRA (arXiv 2305.14314),
# section 3.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def read_headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return {tensor: (stored dtype, shape)} of a .safetensors file, reading only its header."""
    entries, _ = read_header(path, whole=False)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def with_headers(
    shape: ModelShape, tensors: dict[str, tuple[str, tuple[int, ...]]], size: int
) -> ModelShape:
    """Return `shape` checked against the tensors that the checkpoint really has; these win where
    they differ.

    For packed checkpoints, whose headers hold bytes and not weights, the config's logical shapes
    stay; which linear layers a 4-bit one keeps in 16 bit is read from them.
    """
    shape = replace(shape, checkpoint_bytes=size)
    if shape.stored == "nf4":
        whole = {
            n: d
            for n, (dtype, d) in tensors.items()
            if n.endswith(".weight") and dtype in STORED_16_BIT
        }
        kept = sum(math.prod(d) for n, d in whole.items() if _role(n, d) in {"linear", "expert"})
        return replace(
            shape, kept_in_16_bit=min(kept, sum(w.parameters for w in shape.of("linear", "expert")))
        )
    if shape.stored == "mxfp4" or any(dtype in PACKED for dtype, _ in tensors.values()):
        return shape
    real = {
        n: (d, s)
        for n, (d, s) in tensors.items()
        if not (shape.tied and n.endswith("lm_head.weight"))
    }
    shape = replace(shape, stored=_dtype_by_size(real))
    if sum(math.prod(dims) for _, dims in real.values()) == shape.parameters:
        return shape
    grouped = Counter((_leaf(name), dims, _role(name, dims)) for name, (_, dims) in real.items())
    weights = tuple(
        Weight(leaf, dims, count, role) for (leaf, dims, role), count in grouped.items()
    )
    note = (
        f"{shape.name}: weights taken from the safetensors headers, which differ from what the "
        "config suggests"
    )
    return replace(shape, weights=weights, notes=(*shape.notes, note))


def _dtype_by_size(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    """The stored dtype that holds most of the parameters."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    total: Counter[str] = Counter()
    for dtype, dims in tensors.values():
        total[dtype] += math.prod(dims)
    return names.get(total.most_common(1)[0][0], "bfloat16")


def _leaf(name: str) -> str:
    stem = name.removesuffix(".weight")
    if "experts" in stem:
        return "experts." + stem.split(".")[-1]
    return re.sub(r".*\.\d+\.", "", stem).rsplit(".", 1)[-1]


def _role(name: str, dims: tuple[int, ...]) -> Role:
    if re.search(r"vision|visual|audio|projector", name):
        return "other"
    if "experts" in name and len(dims) >= 2:
        return "expert"
    if re.search(r"\.(router|gate)(\.\w+)?\.weight$", name):
        return "router"
    if len(dims) != 2:
        return "norm" if "norm" in name else "other"
    if re.search(r"embed|wte", name):
        return "embedding"
    return "head" if name.endswith(("lm_head.weight", "output.weight")) else "linear"


def load_shape(name: str, revision: str | None = None) -> ModelShape:
    """Return the shape of a model folder or Hub id. From the Hub come config.json and the headers,
    never weights.

    Raises FastFTError where there is no such model, its config.json lacks what is needed, or the
    Hub cannot be reached and the model is not one of KNOWN_MODELS.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _local_shape(folder)
    if name.lower() in KNOWN_MODELS:
        return known_shape(name)
    if folder.exists():
        raise FastFTError(
            f"model.name {name!r} is a file; give the folder that holds config.json, or a Hub id."
        )
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) or name.startswith("."):
        raise FastFTError(
            f"model.name {name!r} is neither a folder that exists nor a Hub id (owner/name)."
        )
    return _hub_shape(name, revision)


def _local_shape(folder: Path) -> ModelShape:
    path = folder / "config.json"
    if not path.is_file():
        raise FastFTError(f"{folder} has no config.json, so it is not a model folder.")
    config = _read_config(path)
    tokenizer = sum(file.stat().st_size for file in folder.glob("*token*") if file.is_file())
    shape = replace(shape_from_config(config, folder.name), tokenizer_bytes=tokenizer)
    files = _weight_files(folder)
    if not files:
        return shape
    tensors = {k: v for file in files for k, v in read_headers(file).items()}
    return with_headers(shape, tensors, sum(file.stat().st_size for file in files))


def _read_config(path: Path) -> dict[str, Any]:
    return read_json(path, "Download the model again.")


def _weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files, and not what lies beside them (adapters, a second copy in
    another layout).
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FastFTError(f"{index} is damaged: {error}. Download the model again.") from error
        gone = [file.name for file in files if not file.is_file()]
        if gone:
            raise FastFTError(
                f"{folder} lacks {len(gone)} of {len(files)} files: {', '.join(gone)}. "
                "Download it again."
            )
        return files
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _hub_shape(name: str, revision: str | None) -> ModelShape:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
    )

    try:
        cached = (
            try_to_load_from_cache(name, "config.json", revision=revision) if "/" in name else None
        )
        if isinstance(cached, str) and any(Path(cached).parent.glob("*.safetensors")):
            return replace(_local_shape(Path(cached).parent), name=name)
        _reach_hub()
        with hub.bounded_waits():
            config = _read_config(Path(hf_hub_download(name, "config.json", revision=revision)))
            metadata = get_safetensors_metadata(name, revision=revision)
    except (HFValidationError, RepositoryNotFoundError) as error:
        # a gated repository is one that is not found
        raise hub.explain(error, f"model {name!r}") from error
    except NotASafetensorsRepoError as error:
        raise FastFTError(
            f"model {name!r} has no safetensors weights; fastft does not load pickles."
        ) from error
    except (LocalEntryNotFoundError, hub.http().HTTPError, OSError) as error:
        if hub.status(error) in {401, 403}:
            raise hub.explain(error, f"model {name!r}") from error
        known = _known_by_hub_id(name)
        if known is None and hub.status(error) is not None:
            raise hub.explain(error, f"model {name!r}") from error
        if known is None:
            raise FastFTError(
                f"model {name!r}: no such folder, and the Hub cannot be reached "
                f"({type(error).__name__}). Give a "
                f"local folder, or one of: {', '.join(sorted(KNOWN_MODELS))}."
            ) from error
        note = "sizes from fastft's own table: the Hub was not reached"
        return replace(known, name=name, local=False, notes=(note,))
    shape = replace(shape_from_config(config, name), local=False)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in metadata.files_metadata.values():
        tensors |= {k: (str(t.dtype), tuple(t.shape)) for k, t in file.tensors.items()}
    size = sum(math.prod(dims) * STORED_BYTES.get(dtype, 2) for dtype, dims in tensors.values())
    return with_headers(shape, tensors, size)


def _reach_hub(timeout: float = 3.0) -> None:
    """Raise OSError where the Hub's host does not answer; huggingface_hub would retry for half a
    minute.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = urllib.parse.urlparse(endpoint)
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
    except ValueError as error:
        raise FastFTError(
            f"HF_ENDPOINT {hub.shown_endpoint()!r} is no address: {error}. Unset it, or mend it."
        ) from error
    if urllib.request.getproxies() or not url.hostname:
        return  # a proxy decides, and names may only resolve there
    socket.create_connection((url.hostname, port), timeout=timeout).close()


def _model(
    family: str, *sizes: int, tied: Any = False, head_dim: Any = 128, **more: Any
) -> dict[str, Any]:
    keys = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "vocab_size",
    )  # fmt: skip
    sized = dict(zip(keys, sizes, strict=True))
    known = {"model_type": family, "tie_word_embeddings": tied, "head_dim": head_dim}
    return known | sized | more


_40K, _128K = {"max_position_embeddings": 40960}, {"max_position_embeddings": 131072}
_OSS: dict[str, Any] = {"head_dim": 64, "num_experts_per_tok": 4, **_128K}
_OSS["quantization_config"] = {"quant_method": "mxfp4"}
_GEMMA_3_1B = {"head_dim": 256, "sliding_window": 512, "max_position_embeddings": 32768}
_GEMMA_3_4B = {"head_dim": 256, "sliding_window": 1024, "max_position_embeddings": 131072}
# Dimensions from the models' published config.json files; of a multimodal one, its text model's.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _model("qwen3", 1024, 28, 16, 8, 3072, 151936, tied=True, **_40K),
    "qwen3-1.7b": _model("qwen3", 2048, 28, 16, 8, 6144, 151936, tied=True, **_40K),
    "qwen3-4b": _model("qwen3", 2560, 36, 32, 8, 9728, 151936, tied=True, **_40K),
    "qwen3-8b": _model("qwen3", 4096, 36, 32, 8, 12288, 151936, **_40K),
    "qwen3-14b": _model("qwen3", 5120, 40, 40, 8, 17408, 151936, **_40K),
    "qwen3-32b": _model("qwen3", 5120, 64, 64, 8, 25600, 151936, **_40K),
    "llama-3.2-1b": _model("llama", 2048, 16, 32, 8, 8192, 128256, tied=True, head_dim=64, **_128K),
    "llama-3.2-3b": _model("llama", 3072, 28, 24, 8, 8192, 128256, tied=True, **_128K),
    "llama-3.1-8b": _model("llama", 4096, 32, 32, 8, 14336, 128256, **_128K),
    "llama-3.3-70b": _model("llama", 8192, 80, 64, 8, 28672, 128256, **_128K),
    "llama-2-7b": _model("llama", 4096, 32, 32, 32, 11008, 32000, max_position_embeddings=4096),
    "llama-65b": _model("llama", 8192, 80, 64, 64, 22016, 32000, max_position_embeddings=2048),
    "mistral-7b": _model("mistral", 4096, 32, 32, 8, 14336, 32000, max_position_embeddings=32768),
    "gemma-3-1b": _model("gemma3_text", 1152, 26, 4, 1, 6912, 262144, tied=True, **_GEMMA_3_1B),
    "gemma-3-4b": _model("gemma3_text", 2560, 34, 8, 4, 10240, 262208, tied=True, **_GEMMA_3_4B),
    "gpt-oss-20b": _model("gpt_oss", 2880, 24, 64, 8, 2880, 201088, num_local_experts=32, **_OSS),
    "gpt-oss-120b": _model("gpt_oss", 2880, 36, 64, 8, 2880, 201088, num_local_experts=128, **_OSS),
}


def known_shape(name: str) -> ModelShape:
    """Return the shape of one of KNOWN_MODELS."""
    return replace(shape_from_config(KNOWN_MODELS[name.lower()], name.lower()), local=False)


def _known_by_hub_id(name: str) -> ModelShape | None:
    last = re.sub(r"^meta-", "", name.lower().rsplit("/", 1)[-1])
    keys = [key for key in KNOWN_MODELS if last == key or last.startswith(key + "-")]
    if not keys:
        return None
    config = KNOWN_MODELS[max(keys, key=len)]
    if last.endswith("bnb-4bit"):
        config = config | {
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
        }
    return replace(shape_from_config(config, name), local=False)
