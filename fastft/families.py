"""What fastft knows of each model family: one frozen row a `model_type`, and nothing anywhere else.

The attention kernels, the fused layers, the plan, the GGUF writer and the certificate all derive
from these rows. A family without a row still trains: plain transformers computes it, the plan
takes it for Llama-like, rows without padding are looked at on the run's own first sequences, and
llama.cpp's own converter writes its GGUF.

How to add one: docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ALL_FUSED = frozenset({"norm", "attention", "mlp", "head"})


@dataclass(frozen=True)
class Gguf:
    """What llama.cpp calls the family, where fastft's own writer knows it exactly."""

    arch: str
    """general.architecture; also names the writer's entry for the family's own metadata."""
    rope_types: frozenset[str] = frozenset({"default", "linear"})
    """The rope types of transformers that the file can express."""
    permuted: bool = False
    """Rotary halves of q and k are interleaved, as llama.cpp's Llama wants them."""
    biases: frozenset[str] = frozenset()
    """GGUF names of the tensors that may have a bias."""
    activation: str = "silu"
    partial_rotary: bool = False
    """Whether partial_rotary_factor can be written."""
    ignores_window: bool = False
    """llama.cpp attends to everything where transformers has a sliding window."""
    own_head: bool = True
    """Whether the file can hold an output head apart from the embedding."""


@dataclass(frozen=True)
class Family:
    """One model_type of transformers: its layers, and what of fastft is exact for it."""

    model_type: str
    classes: str
    """What transformers' class names begin with: Llama of LlamaAttention, LlamaForCausalLM."""
    layer_classes: str = ""
    """What those of its layers begin with, where that is something else: Gemma4Text."""
    norms: Literal["plain", "plus_one"] = "plain"
    """Whether an RMSNorm multiplies by its weight, or by one plus its weight."""
    norms_a_layer: int = 2
    qk_norms: Literal["none", "head", "projection"] = "none"
    """Norms of queries and keys: one of a head's width, or one of the whole projection's."""
    tied: bool = False
    """Embedding and head are one tensor where the config does not say (transformers' default)."""
    attention_bias: bool = False
    """q, k and v have biases where the config does not say."""
    output_bias: bool = True
    """o_proj has one, too, where the others have."""
    joined_projections: bool = False
    """qkv_proj and gate_up_proj instead of the single ones (phi3)."""
    rows: Literal["exact", "check"] = "check"
    """exact: tests hold rows without padding to the padded gradient on a CPU. check: looked at on
    the run's own first sequences.
    """
    fused: frozenset[str] = frozenset()
    """Which of norm, attention, mlp and head fastft.kernels.fused computes."""
    window_in_config: bool = False
    """The attention reads its sliding window from the config, not from itself."""
    head_divisor: str = ""
    """Config key of what the logits are divided by (granite's logits_scaling)."""
    written_out_scores: bool = False
    """Softcaps or sinks: scores of all pairs of positions are kept for the backward pass."""
    experts: Literal["none", "rows", "columns"] = "none"
    """How transformers holds the experts of a mixture, where fastft knows it: rows: gate_up_proj
    (experts, 2 x width, hidden), the gate's rows first. columns: (experts, hidden, 2 x width), gate
    and up alternate, with biases (gpt_oss).
    """
    mlp_tensors: int = 3
    """Tensors of the MLP's width that autograd keeps of a layer on transformers' modules."""
    chunked_loss_on_cpu: bool = False
    """Unsloth's CPU path computes the loss in chunks."""
    whole_logits_on_gpu: bool = False
    """On a GPU, too, Unsloth computes the loss over the logits of all tokens at once."""
    float16_overflows: bool = False
    """Unsloth computes it in float32 on a card without bfloat16, attention written out."""
    omitted: dict[str, Any] = field(default_factory=dict)
    """What the text_config of published multimodal checkpoints leaves out."""
    wrappers: tuple[str, ...] = ()
    """Multimodal classes whose language model the family is, where fastft's own writer may take it
    out of them.
    """
    gguf: Gguf | None = None

    @property
    def norm_shift(self) -> float:
        """What is added to a norm's weight before it multiplies."""
        return 1.0 if self.norms == "plus_one" else 0.0


_QKV_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
_LLAMA_ROPES = frozenset({"default", "llama3", "linear"})
_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
_GELU = "gelu_pytorch_tanh"

_ROWS = (
    Family(
        "llama",
        "Llama",
        rows="exact",
        fused=ALL_FUSED,
        chunked_loss_on_cpu=True,
        omitted=_7B | {"intermediate_size": 11008},
        gguf=Gguf(
            "llama",
            _LLAMA_ROPES,
            permuted=True,
            biases=_QKV_BIASES | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
        ),
    ),
    Family(
        "mistral",
        "Mistral",
        rows="exact",
        fused=ALL_FUSED,
        window_in_config=True,
        chunked_loss_on_cpu=True,
        wrappers=("Mistral3ForConditionalGeneration",),
        omitted=_7B | {"intermediate_size": 14336, "num_key_value_heads": 8},
        gguf=Gguf("llama", _LLAMA_ROPES, permuted=True, ignores_window=True),
    ),
    Family(
        "qwen2",
        "Qwen2",
        attention_bias=True,
        output_bias=False,
        rows="exact",
        fused=ALL_FUSED,
        chunked_loss_on_cpu=True,
        gguf=Gguf("qwen2", biases=_QKV_BIASES),
    ),
    Family(
        "qwen3",
        "Qwen3",
        qk_norms="head",
        rows="exact",
        fused=ALL_FUSED,
        chunked_loss_on_cpu=True,
        gguf=Gguf("qwen3"),
    ),
    Family(
        "gemma",
        "Gemma",
        norms="plus_one",
        tied=True,
        rows="exact",
        fused=ALL_FUSED - {"attention"},
        chunked_loss_on_cpu=True,
    ),
    Family(
        "gemma2",
        "Gemma2",
        norms="plus_one",
        norms_a_layer=4,
        tied=True,
        rows="exact",
        fused=ALL_FUSED - {"attention"},
        written_out_scores=True,
        gguf=Gguf("gemma2", frozenset({"default"}), activation=_GELU, own_head=False),
    ),
    Family(
        "gemma3_text",
        "Gemma3",
        norms="plus_one",
        norms_a_layer=4,
        qk_norms="head",
        tied=True,
        rows="exact",
        fused=ALL_FUSED - {"attention"},
        chunked_loss_on_cpu=True,
        float16_overflows=True,
        omitted={
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
            "vocab_size": 262208,
        },
        wrappers=("Gemma3ForConditionalGeneration",),
        gguf=Gguf("gemma3", activation=_GELU),
    ),
    Family(
        "phi3",
        "Phi3",
        joined_projections=True,
        rows="exact",
        fused=frozenset({"norm", "head"}),
        chunked_loss_on_cpu=True,
        whole_logits_on_gpu=True,
        gguf=Gguf(
            "phi3", frozenset({"default", "longrope"}), partial_rotary=True, ignores_window=True
        ),
    ),
    Family(
        "gpt_oss",
        "GptOss",
        attention_bias=True,
        rows="exact",
        fused=frozenset({"head"}),
        written_out_scores=True,
        float16_overflows=True,
        experts="columns",
        mlp_tensors=6,
        gguf=Gguf(
            "gpt-oss",
            frozenset({"default", "yarn"}),
            biases=_QKV_BIASES | {"attn_output", "ffn_gate_inp"},
        ),
    ),
    Family(
        "smollm3",
        "SmolLM3",
        tied=True,
        rows="exact",
        fused=ALL_FUSED,
        chunked_loss_on_cpu=True,
        gguf=Gguf("smollm3", _LLAMA_ROPES, permuted=True),
    ),
    Family(
        "granite",
        "Granite",
        rows="exact",
        fused=ALL_FUSED,
        head_divisor="logits_scaling",
        gguf=Gguf("granite", _LLAMA_ROPES, permuted=True),
    ),
    Family(
        "ministral3",
        "Ministral3",
        rows="exact",
        fused=ALL_FUSED,
        window_in_config=True,
        wrappers=("Mistral3ForConditionalGeneration",),
        gguf=Gguf("mistral3", frozenset({"yarn"}), permuted=True, ignores_window=True),
    ),
    Family(
        "qwen3_moe",
        "Qwen3Moe",
        qk_norms="head",
        float16_overflows=True,
        experts="rows",
        gguf=Gguf("qwen3moe"),
    ),
    Family(
        "gemma4_text",
        "Gemma4",
        layer_classes="Gemma4Text",
        norms_a_layer=4,
        qk_norms="head",
        tied=True,
        wrappers=("Gemma4ForConditionalGeneration",),
        gguf=Gguf(
            "gemma4",
            frozenset({"default", "proportional"}),
            activation=_GELU,
            partial_rotary=True,
        ),
    ),
    # Known to the plan alone.
    Family("mixtral", "Mixtral"),
    Family("olmo2", "Olmo2", qk_norms="projection", chunked_loss_on_cpu=True),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}


def family_of(model_type: str) -> Family:
    """Return the row of `model_type`; for one that has none, a row that promises nothing."""
    return FAMILIES.get(model_type) or Family(model_type, "")


# Where multimodal checkpoints keep their language model (files before and since transformers 5),
# and what its own CausalLM class calls the same place.
_TEXT_PARTS = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)


def text_name(name: str) -> str | None:
    """Return what the language model's own class calls the tensor `name` of a multimodal
    checkpoint; None for a tensor of another part of it (a vision tower, a projector).
    """
    for prefix, own in _TEXT_PARTS:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configs call the number of a layer's experts."""

# Mixtures whose experts were layers in transformers 4 and are parameters since 5. An adapter that
# names such a layer is meant for the experts, says peft, also where a dense or shared layer has
# the same name: on these, plain peft can neither train nor load LoRA.
_EXPERTS_WERE_LAYERS = frozenset({
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
    "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe",
    "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "solar_open",
})  # fmt: skip
_LAYERS_OF_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "gate"})


def taken_for_experts(model_type: str) -> frozenset[str]:
    """Return the names of layers that peft takes for the experts of the family."""
    return _LAYERS_OF_EXPERTS if model_type in _EXPERTS_WERE_LAYERS else frozenset()


def gguf_arch(model_type: str) -> str:
    """Return llama.cpp's name of a family; where no row says, it is taken to be the same."""
    gguf = family_of(model_type).gguf
    return gguf.arch if gguf else model_type
