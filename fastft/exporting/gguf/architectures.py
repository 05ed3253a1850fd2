"""What the families that we write ourselves look like in GGUF: tensor names, transforms, metadata.

Which these are, and what is told of each in one word, stands in fastft/families.py.

Everything is closed: an unknown architecture, tensor, rope type or config field raises
`Unsupported`, and the caller hands the model to the upstream converter. Key names and transforms
are those of llama.cpp's converter, which the tests compare with byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastft.errors import FastFTError
from fastft.exporting.experts import PARTS, single, single_shape
from fastft.exporting.weights import HEAD, Weights
from fastft.families import FAMILIES, Family, Gguf, gguf_arch, text_name
from fastft.models import explained

if TYPE_CHECKING:
    import torch


class Unsupported(FastFTError):
    """The streaming writer does not know this model exactly."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: where its rows come from and what is done to them.

    `shape` is in numpy's order: (rows, row length), (length,), or (experts, rows, row length).
    """

    name: str
    shape: tuple[int, ...]
    source: str = ""
    heads: int = 0
    """rotary halves of so many heads are interleaved: row 2 i + j of a head comes from row j *
    half + i
    """
    shift: float = 0.0
    """added to every value: Gemma's norms multiply by 1 + weight"""
    values: tuple[float, ...] = ()
    """computed from the config instead of read"""
    stacked: tuple[str, ...] = ()
    """one matrix of each expert, stacked, in place of `source`"""
    part: str = ""
    """the matrix of each expert that is taken out of `source`: gate_proj, up_proj, down_proj"""
    layout: str = ""
    """how `source` holds its experts, as `Family.experts` has it"""

    @property
    def step(self) -> int:
        """Rows must be read in multiples of this."""
        return self.shape[0] // self.heads if self.heads else 1

    def rows(self, weights: Weights, first: int, last: int) -> torch.Tensor:
        """Return rows `first` to `last` in float32."""
        import torch

        if self.values:
            return torch.tensor(self.values[first:last], dtype=torch.float32)
        if self.stacked:
            return torch.stack([weights.tensor(name) for name in self.stacked[first:last]])
        if self.part:
            return single(weights.tensor(self.source, slice(first, last)), self.part, self.layout)
        part = weights.tensor(self.source, slice(first, last))
        if self.heads:
            part = (
                part.reshape(-1, 2, self.step // 2, *self.shape[1:])
                .swapaxes(1, 2)
                .reshape(part.shape)
            )
        return part + self.shift if self.shift else part


@dataclass(frozen=True)
class Model:
    """A model as GGUF describes it: `metadata` maps keys to (value, type name), without the
    tokenizer's.
    """

    arch: str
    tensors: list[Tensor]
    metadata: dict[str, tuple[Any, str]]
    notes: list[str]
    """what llama.cpp will do otherwise than transformers, in words for the certificate"""


ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
}  # fmt: skip
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GATED_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TWO_NORMS = {"post_attention_layernorm": "ffn_norm"}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FUSED = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


# Of gemma4, where hidden_size_per_layer_input is not 0.
PER_LAYER_INPUT = {
    "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}  # fmt: skip
PER_LAYER_TABLES = {
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}
WITHOUT_SUFFIX = frozenset({"self_attn.sinks", "layer_scalar"})
"""Parameters of a layer whose names do not end in .weight."""

Metadata = dict[str, tuple[Any, str]]


def _sizes(arch: str, config: dict[str, Any], metadata: Metadata) -> None:
    """What llama.cpp's converter says of everything that is built like Llama."""
    metadata[f"{arch}.vocab_size"] = (config["vocab_size"], "UINT32")
    metadata[f"{arch}.rope.dimension_count"] = (_head_dim(config), "UINT32")


def _smollm3(config: dict[str, Any], metadata: Metadata) -> None:
    _sizes("smollm3", config, metadata)
    layers = config["num_hidden_layers"]
    if list(config["no_rope_layers"]) != [int((i + 1) % 4 != 0) for i in range(layers)]:
        raise Unsupported(
            f"no_rope_layers {config['no_rope_layers']}: llama.cpp's smollm3 leaves out every "
            "fourth layer's rotation"
        )


def _granite(config: dict[str, Any], metadata: Metadata) -> None:
    _sizes("granite", config, metadata)
    scales = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    for name, field in scales.items():
        metadata[f"granite.{name}"] = (config[field], "FLOAT32")


def _ministral3(config: dict[str, Any], metadata: Metadata) -> None:
    _sizes("mistral3", config, metadata)
    rope = _rope(config)
    # llama.cpp takes mscale for 1 and truncates the range of interpolated frequencies.
    if (rope.get("mscale"), rope.get("truncate", True)) != (
        1.0,
        True,
    ) or "attention_factor" in rope:
        raise Unsupported("yarn with an mscale other than 1, an attention_factor or no truncation")
    metadata["mistral3.rope.scaling.type"] = ("yarn", "STRING")
    written = {
        "rope.scaling.factor": "factor",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
        "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
        "attention.temperature_scale": "llama_4_scaling_beta",
    }
    for name, field in written.items():
        metadata[f"mistral3.{name}"] = (rope[field], "FLOAT32")
    original = rope["original_max_position_embeddings"]
    metadata["mistral3.rope.scaling.original_context_length"] = (original, "UINT32")


def _gemma2(config: dict[str, Any], metadata: Metadata) -> None:
    # llama.cpp's own value for gemma2 is 10000; another one is refused below
    del metadata["gemma2.rope.freq_base"]
    if _rope(config, "full_attention").get("rope_theta", 10000.0) != 10000.0:
        raise Unsupported(f"rope_theta {_rope(config, 'full_attention')['rope_theta']} in gemma2")
    _attention_scale(config, layers_27b=46)
    kinds = ["sliding_attention", "full_attention"]
    if config["layer_types"] != [kinds[i % 2] for i in range(config["num_hidden_layers"])]:
        raise Unsupported("layer_types: gemma2 alternates sliding and full attention")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not config.get(key):
            raise Unsupported(f"{key} {config.get(key)}: llama.cpp's gemma2 always caps")
    metadata["gemma2.attn_logit_softcapping"] = (config["attn_logit_softcapping"], "FLOAT32")
    metadata["gemma2.final_logit_softcapping"] = (config["final_logit_softcapping"], "FLOAT32")
    metadata["gemma2.attention.sliding_window"] = (config["sliding_window"], "UINT32")


def _gemma3(config: dict[str, Any], metadata: Metadata) -> None:
    _attention_scale(config, layers_27b=62)
    if config.get("attn_logit_softcapping"):
        raise Unsupported("attn_logit_softcapping in gemma3")
    if config.get("use_bidirectional_attention"):
        raise Unsupported("use_bidirectional_attention")
    if config.get("final_logit_softcapping"):
        metadata["gemma3.final_logit_softcapping"] = (config["final_logit_softcapping"], "FLOAT32")
    metadata["gemma3.attention.sliding_window"] = (config["sliding_window"], "UINT32")
    metadata["gemma3.rope.freq_base_swa"] = (
        _rope(config, "sliding_attention")["rope_theta"],
        "FLOAT32",
    )
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    if sliding != [(i + 1) % 6 != 0 for i in range(len(sliding))]:
        metadata["gemma3.attention.sliding_window_pattern"] = (sliding, "BOOLS")


def _phi3(config: dict[str, Any], metadata: Metadata) -> None:
    rope = _rope(config)
    original = (
        rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
    )
    dims = (
        int((rope.get("partial_rotary_factor") or 1.0) * config["hidden_size"])
        // config["num_attention_heads"]
    )
    metadata["phi3.rope.scaling.original_context_length"] = (original, "UINT32")
    metadata["phi3.rope.dimension_count"] = (dims, "UINT32")
    metadata["phi3.attention.sliding_window"] = (config.get("sliding_window") or 0, "UINT32")
    if rope.get("rope_type") == "longrope":
        # transformers' _compute_longrope_parameters
        scale = rope.get("factor") or config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        metadata["phi3.rope.scaling.attn_factor"] = (
            rope.get("attention_factor") or factor,
            "FLOAT32",
        )


def _experts(arch: str, config: dict[str, Any], metadata: Metadata, width: str) -> None:
    """What llama.cpp's converter says of every mixture; `width`: the config's key of an expert's
    intermediate size.
    """
    metadata[f"{arch}.expert_count"] = (config["num_local_experts"], "UINT32")
    metadata[f"{arch}.expert_used_count"] = (config["num_experts_per_tok"], "UINT32")
    metadata[f"{arch}.expert_feed_forward_length"] = (config[width], "UINT32")


def _qwen3_moe(config: dict[str, Any], metadata: Metadata) -> None:
    _experts("qwen3moe", config, metadata, "moe_intermediate_size")
    if config["mlp_only_layers"] or config["decoder_sparse_step"] != 1:
        raise Unsupported("layers without experts in qwen3_moe")
    if not config["norm_topk_prob"]:
        raise FastFTError(  # the upstream converter would write it, and it would answer otherwise
            "a qwen3_moe whose norm_topk_prob is false cannot be held by GGUF: llama.cpp always "
            "normalises the weights of the chosen experts. Export `merged`."
        )


def _gpt_oss(config: dict[str, Any], metadata: Metadata) -> None:
    _experts("gpt-oss", config, metadata, "intermediate_size")
    kinds = ["sliding_attention", "full_attention"]
    if config["layer_types"] != [kinds[i % 2] for i in range(config["num_hidden_layers"])]:
        raise Unsupported("layer_types: gpt-oss alternates sliding and full attention")
    if config["tie_word_embeddings"]:
        raise Unsupported("tied embeddings: llama.cpp's gpt-oss has a head of its own")
    metadata["gpt-oss.attention.sliding_window"] = (config["sliding_window"], "UINT32")
    rope = _rope(config)
    if rope.get("rope_type") == "yarn":
        if "attention_factor" in rope or rope.get("mscale") or rope.get("mscale_all_dim"):
            raise Unsupported("yarn with an mscale or attention_factor in gpt-oss")
        metadata["gpt-oss.rope.scaling.type"] = ("yarn", "STRING")
        for name, field in (
            ("factor", "factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            metadata[f"gpt-oss.rope.scaling.{name}"] = (rope[field], "FLOAT32")
        original = rope["original_max_position_embeddings"]
        metadata["gpt-oss.rope.scaling.original_context_length"] = (original, "UINT32")


def _gemma4(config: dict[str, Any], metadata: Metadata) -> None:
    if config.get("enable_moe_block"):
        raise Unsupported("enable_moe_block in gemma4")
    if config.get("use_bidirectional_attention") == "all":
        raise Unsupported("use_bidirectional_attention")
    kinds, layers = config["layer_types"], config["num_hidden_layers"]
    full = _full_layers(config)
    if len({tuple(sorted(values.items())) for values in full}) != 1 or not (
        set(full[0]) <= {"head_dim", "num_key_value_heads"}
    ):
        raise Unsupported(f"per_layer_config {config.get('per_layer_config')} in gemma4")
    wide, narrow = full[0].get("head_dim", config["head_dim"]), config["head_dim"]
    if _rope(config).get("rope_type") != "proportional":
        raise Unsupported("full attention without proportional rope in gemma4")
    if _rope(config, "sliding_attention").get("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported("partial_rotary_factor of the sliding layers in gemma4")
    numbers = {
        "attention.sliding_window": config["sliding_window"],
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
        "attention.key_length": wide, "attention.value_length": wide, "rope.dimension_count": wide,
        "attention.key_length_swa": narrow, "attention.value_length_swa": narrow,
        "rope.dimension_count_swa": narrow,
    }  # fmt: skip
    metadata |= {f"gemma4.{name}": (value, "UINT32") for name, value in numbers.items()}
    sliding = [kind == "sliding_attention" for kind in kinds]
    metadata["gemma4.attention.sliding_window_pattern"] = (sliding, "BOOLS")
    theta = _rope(config, "sliding_attention")["rope_theta"]
    metadata["gemma4.rope.freq_base_swa"] = (theta, "FLOAT32")
    # Without the key llama.cpp caps at 30; the upstream converter leaves it out (KL 1e-4).
    cap = config.get("final_logit_softcapping") or 0.0
    metadata["gemma4.final_logit_softcapping"] = (cap, "FLOAT32")
    if config.get("use_double_wide_mlp"):
        first = layers - config["num_kv_shared_layers"]
        width = config["intermediate_size"]
        widths = [width if i < first else 2 * width for i in range(layers)]
        metadata["gemma4.feed_forward_length"] = (widths, "INT32S")
    if "num_key_value_heads" in full[0]:
        heads = [
            config["num_key_value_heads"] if swa else full[0]["num_key_value_heads"]
            for swa in sliding
        ]
        metadata["gemma4.attention.head_count_kv"] = (heads, "INT32S")


def _full_layers(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the config says of each full-attention layer alone (gemma4)."""
    own = {int(i): values for i, values in (config.get("per_layer_config") or {}).items()}
    full = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    if set(own) - set(full):
        raise Unsupported("per_layer_config of sliding layers in gemma4")
    return [own.get(i, {}) for i in full]


# What a family's config says beyond the fields that all share, by general.architecture.
EXTRA: dict[str, Callable[[dict[str, Any], Metadata], None]] = {
    "llama": partial(_sizes, "llama"),
    "smollm3": _smollm3,
    "granite": _granite,
    "mistral3": _ministral3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "qwen3moe": _qwen3_moe,
    "gpt-oss": _gpt_oss,
    "gemma4": _gemma4,
}
WRITTEN = {f"{row.classes}ForCausalLM": row for row in FAMILIES.values() if row.gguf}
"""Class name in a config's `architectures` -> the family's row."""
# Fields that say how a model was trained or is to be sampled, and those that transformers reads
# under another name or not at all (swiglu_limit: gpt_oss has 7 in its code).
HARMLESS = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
    "quantization_config", "pretraining_tp", "rope_scaling", "rope_theta", "rope_local_base_freq",
    "sliding_window_pattern", "max_window_layers", "cache_implementation", "hidden_act",
    "hidden_activation", "unsloth_fixed", "unsloth_version", "model_name",
    "original_max_position_embeddings", "resid_pdrop", "embd_pdrop", "attention_dropout",
    "head_dim", "global_head_dim", "num_global_key_value_heads", "experts_per_token",
    "initial_context_length", "swiglu_limit",
}  # fmt: skip


def describe(weights: Weights) -> Model:
    """Return how `weights` look in GGUF. Raises Unsupported with everything that is not known,
    collected.
    """
    family, config = _read_config(weights)
    metadata = _metadata(family, config)
    EXTRA.get(gguf_arch(family.model_type), lambda config, metadata: None)(config, metadata)
    tensors = [*_rope_tensors(family, config), *_tensors(family, config, weights)]
    return Model(gguf_arch(family.model_type), tensors, metadata, _notes(family, config, weights))


def _read_config(weights: Weights) -> tuple[Family, dict[str, Any]]:
    """Return the family and the config with transformers' own defaults filled in."""
    from transformers import AutoConfig

    raw = weights.config
    named = raw.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else "?"
    if isinstance(raw.get("text_config"), dict):
        raw = raw["text_config"]
        family = FAMILIES.get(str(raw.get("model_type")))
        known = family is not None and family.gguf is not None and name in family.wrappers
    else:
        family = WRITTEN.get(name)
        known = family is not None and raw.get("model_type") == family.model_type
    if family is None or not known:
        raise Unsupported(
            f"architecture {name} (model_type {raw.get('model_type')}); known: {', '.join(WRITTEN)}"
        )
    plain = AutoConfig.for_model(family.model_type)
    defaults = {*plain.to_dict(), *plain.attribute_map}
    strange = [
        k
        for k, v in raw.items()
        if k not in defaults and k not in HARMLESS and not k.startswith("_") and v
    ]
    if strange:
        raise Unsupported(
            f"config fields that are not known for {name}: {', '.join(sorted(strange))}"
        )
    values = {
        k: v
        for k, v in raw.items()
        if k not in {"architectures", "model_type", "dtype", "torch_dtype"}
    }
    with explained(str(weights.base)):
        config = AutoConfig.for_model(family.model_type, **values).to_dict()
    _check_config(family, config)
    return family, config


def _gguf(family: Family) -> Gguf:
    assert family.gguf is not None, "only families with a GGUF row are described"
    return family.gguf


def _layer_names(family: Family, config: dict[str, Any], layer: int) -> dict[str, str]:
    """Return {module in a transformers layer: GGUF name}, without the experts."""
    names = FUSED if family.joined_projections else ATTENTION
    if family.experts == "none":
        names = names if family.joined_projections else names | GATED_MLP
    else:
        names = names | {ROUTERS[family.experts]: "ffn_gate_inp"}
    names = names | (QK_NORMS if family.qk_norms == "head" else {})
    names = names | (FOUR_NORMS if family.norms_a_layer == 4 else TWO_NORMS)
    if family.model_type == "gpt_oss":
        own = {"self_attn.sinks": "attn_sinks", "post_attention_layernorm": "post_attention_norm"}
        return names | own
    if family.model_type == "gemma4_text":
        return _gemma4_names(names, config, layer)
    return names


ROUTERS = {"rows": "mlp.gate", "columns": "mlp.router"}


def _gemma4_names(names: dict[str, str], config: dict[str, Any], layer: int) -> dict[str, str]:
    """The last layers may take keys and values of earlier ones, and full attention its values from
    its keys.
    """
    absent = set()
    if config.get("attention_k_eq_v") and config["layer_types"][layer] == "full_attention":
        absent = {"self_attn.v_proj"}
    if layer >= config["num_hidden_layers"] - config["num_kv_shared_layers"]:
        absent = {"self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm"}
    names = {module: name for module, name in names.items() if module not in absent}
    inputs = PER_LAYER_INPUT if config["hidden_size_per_layer_input"] else {}
    return names | inputs | {"layer_scalar": "layer_output_scale"}


def _check_config(family: Family, config: dict[str, Any]) -> None:
    problems, gguf = [], _gguf(family)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != gguf.activation:
        problems.append(f"activation {activation}, not {gguf.activation}")
    kinds = {
        _rope(config, kind).get("rope_type", "default")
        for kind in ("full_attention", "sliding_attention")
    }
    unknown = kinds - gguf.rope_types
    if unknown:
        problems.append(f"rope type {', '.join(sorted(unknown))}")
    partial = _rope(config).get("partial_rotary_factor", 1.0) not in {None, 1.0}
    if partial and not gguf.partial_rotary:
        problems.append(f"partial_rotary_factor {_rope(config)['partial_rotary_factor']}")
    if config.get("use_sliding_window"):
        problems.append("use_sliding_window")
    if problems:
        raise Unsupported(f"{family.model_type} with " + "; ".join(problems))


def _attention_scale(config: dict[str, Any], layers_27b: int) -> None:
    # llama.cpp knows the 27B model by its number of layers and scales by hidden / heads there.
    at_27b = config["num_hidden_layers"] == layers_27b
    expected = (
        config["hidden_size"] / config["num_attention_heads"] if at_27b else _head_dim(config)
    )
    if config["query_pre_attn_scalar"] != expected:
        raise Unsupported(
            f"query_pre_attn_scalar {config['query_pre_attn_scalar']}: llama.cpp divides by "
            f"{expected}"
        )


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: dict[str, Any], kind: str = "full_attention") -> dict[str, Any]:
    """Return the rope parameters of one kind of attention layer, as transformers 5 keeps them."""
    found = config.get("rope_parameters") or {}
    inner = found.get(kind) if kind in found else found
    return inner if isinstance(inner, dict) else {}


def _metadata(family: Family, config: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    arch, rope = gguf_arch(family.model_type), _rope(config)
    heads = config["num_attention_heads"]
    found: dict[str, tuple[Any, str]] = {
        f"{arch}.block_count": (config["num_hidden_layers"], "UINT32"),
        f"{arch}.context_length": (config["max_position_embeddings"], "UINT32"),
        f"{arch}.embedding_length": (config["hidden_size"], "UINT32"),
        f"{arch}.feed_forward_length": (config["intermediate_size"], "UINT32"),
        f"{arch}.attention.head_count": (heads, "UINT32"),
        f"{arch}.attention.head_count_kv": (config.get("num_key_value_heads") or heads, "UINT32"),
        f"{arch}.rope.freq_base": (rope.get("rope_theta", 10000.0), "FLOAT32"),
        f"{arch}.attention.layer_norm_rms_epsilon": (config["rms_norm_eps"], "FLOAT32"),
    }
    if config.get("head_dim") and arch != "phi3":
        found[f"{arch}.attention.key_length"] = (config["head_dim"], "UINT32")
        found[f"{arch}.attention.value_length"] = (config["head_dim"], "UINT32")
    if rope.get("rope_type") == "linear":
        found[f"{arch}.rope.scaling.type"] = ("linear", "STRING")
        found[f"{arch}.rope.scaling.factor"] = (rope["factor"], "FLOAT32")
    return found


def _rope_tensors(family: Family, config: dict[str, Any]) -> list[Tensor]:
    rope = _rope(config)
    if rope.get("rope_type") == "proportional":
        # Pairs beyond the rotated share are divided by so much that they stand still.
        pairs = _full_layers(config)[0].get("head_dim", config["head_dim"]) // 2
        rotated = int(pairs * rope.get("partial_rotary_factor", 1.0))
        factors = (1.0,) * rotated + (1e30,) * (pairs - rotated)
        return [Tensor("rope_freqs.weight", (pairs,), values=factors)]
    if rope.get("rope_type") == "llama3":
        factors = _llama3_factors(rope, _head_dim(config))
        return [Tensor("rope_freqs.weight", (len(factors),), values=factors)]
    if rope.get("rope_type") == "longrope":
        long, short = (
            tuple(float(f) for f in rope[key]) for key in ("long_factor", "short_factor")
        )
        return [
            Tensor("rope_factors_long.weight", (len(long),), values=long),
            Tensor("rope_factors_short.weight", (len(short),), values=short),
        ]
    return []


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Return what each frequency is divided by: 1 for high ones, `factor` for low ones, smooth
    between.

    The formula is transformers' `_compute_llama3_parameters`; the frequencies are float32 there
    and here.
    """
    import torch

    frequencies = 1.0 / (
        rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    )
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for wavelength in 2 * math.pi / frequencies:
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(float(factor))
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return tuple(factors)


def _tensors(family: Family, config: dict[str, Any], weights: Weights) -> list[Tensor]:
    """Name every tensor of the checkpoint; what is left over or missing is reported all at once."""
    wanted, allowed = _expected(family, config)
    names = {
        own: n
        for own, n in _own_names(weights).items()
        if not n.endswith((".rotary_emb.inv_freq", ".attention.masked_bias"))
    }
    experts, taken, missing = _expert_tensors(family, config, weights, names)
    names = {own: n for own, n in names.items() if own not in taken}
    strange = [n for n in names if n not in wanted and n not in allowed]
    missing += [n for n in wanted if n not in names]
    if strange or missing:
        raise Unsupported(
            f"tensors unknown: {strange[:5]}, missing: {missing[:5]} in {family.model_type}"
        )
    if "lm_head.weight" in names and not _gguf(family).own_head:
        raise FastFTError(  # the upstream converter would drop the head without a word
            f"{family.model_type} with a head of its own (embeddings trained apart) cannot be "
            f"held by GGUF: llama.cpp's {family.model_type} "
            "always uses the embedding as its head. Train with ensure_weight_tying, or "
            "export `merged`."
        )
    known = wanted | allowed
    plain = [_tensor(family, config, weights, n, known[own]) for own, n in names.items()]
    return plain + experts


def _expected(family: Family, config: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return {checkpoint name: GGUF name} of what must be there, and of what may be."""
    wanted = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if config.get("hidden_size_per_layer_input"):
        wanted |= PER_LAYER_TABLES
    allowed = {"lm_head.weight": "output.weight"}
    for i in range(config["num_hidden_layers"]):
        for module, name in _layer_names(family, config, i).items():
            suffix = "" if module in WITHOUT_SUFFIX else ".weight"
            wanted[f"model.layers.{i}.{module}{suffix}"] = f"blk.{i}.{name}.weight"
            if name in _gguf(family).biases:
                allowed[f"model.layers.{i}.{module}.bias"] = f"blk.{i}.{name}.bias"
    return wanted, allowed


def _expert_tensors(
    family: Family, config: dict[str, Any], weights: Weights, names: dict[str, str]
) -> tuple[list[Tensor], set[str], list[str]]:
    """Return the experts' tensors, the checkpoint's names that they are made of, and those that
    are missing. A checkpoint holds one matrix an expert, or one parameter for all.
    """
    found: list[Tensor] = []
    taken: set[str] = set()
    missing: list[str] = []
    layers = range(config["num_hidden_layers"] if family.experts != "none" else 0)
    for i, part in ((i, part) for i in layers for part in PARTS):
        home, name = f"model.layers.{i}.mlp.experts", f"blk.{i}.ffn_{part[:-5]}_exps"
        each = [f"{home}.{e}.{part}.weight" for e in range(config["num_local_experts"])]
        fused = [f"{home}.{PARTS[part]}"]
        fused += [f"{fused[0]}_bias"] if family.experts == "columns" else []
        if each[0] in names:
            missing += [n for n in each if n not in names]
            stacked = tuple(names.get(n, "") for n in each)
            shape = (len(each), *weights.shape(stacked[0]))
            found.append(Tensor(f"{name}.weight", shape, stacked=stacked))
            taken.update(each)
            continue
        missing += [n for n in fused if n not in names]
        for own, suffix in zip(fused, ("weight", "bias"), strict=False):
            if own in names:
                shape = single_shape(weights.shape(names[own]), part, family.experts)
                found.append(
                    Tensor(
                        f"{name}.{suffix}",
                        shape,
                        source=names[own],
                        part=part,
                        layout=family.experts,
                    )
                )
        taken.update(fused)
    return found, taken, missing


def _own_names(weights: Weights) -> dict[str, str]:
    """Return {name in the language model's own class: name in the checkpoint}, in its order."""
    if "text_config" not in weights.config:
        return {name: name for name in weights.names}
    return {own: name for name in weights.names if (own := text_name(name))}


def _tensor(
    family: Family, config: dict[str, Any], weights: Weights, source: str, name: str
) -> Tensor:
    heads, permuted = 0, _gguf(family).permuted
    if permuted and ".attn_q." in name:
        heads = config["num_attention_heads"]
    elif permuted and ".attn_k." in name:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    shift = family.norm_shift if name.endswith("norm.weight") else 0.0
    return Tensor(name, weights.shape(source), source=source, heads=heads, shift=shift)


def _notes(family: Family, config: dict[str, Any], weights: Weights) -> list[str]:
    notes = []
    left_out = len(weights.names) - len(_own_names(weights))
    if left_out:
        notes.append(
            f"the language model alone: {left_out} tensors of the checkpoint's other parts "
            "(images) are not in this file"
        )
    inside = set(_own_names(weights).values())
    if lost := [name for name in weights.changed if name not in inside and not name.endswith(HEAD)]:
        notes.append(
            f"the adapter also trained {len(lost)} tensors of these other parts ({lost[0]} ...), "
            "which only the merged model holds"
        )
    window = config.get("sliding_window")
    if _gguf(family).ignores_window and window and window < config["max_position_embeddings"]:
        notes.append(
            f"llama.cpp has no sliding window for {family.model_type}: answers are exact up "
            f"to {window} tokens"
        )
    rope = _rope(config)
    if rope.get("rope_type") == "yarn" and not rope.get("truncate", True):
        notes.append(
            "llama.cpp rounds the range of the frequencies that yarn stretches, this model does "
            "not (truncate: false): its answers differ by a little"
        )
    if rope.get("rope_type") == "longrope":
        original = (
            rope.get("original_max_position_embeddings")
            or config["original_max_position_embeddings"]
        )
        notes.append(
            f"llama.cpp takes the long rope factors where its context is above {original} "
            "tokens, transformers where "
            f"the text is: for exact answers to shorter texts, use a context of {original}"
        )
    return notes
