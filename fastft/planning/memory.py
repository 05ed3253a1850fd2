"""Every byte of a run, as named terms with their formula and source. Pure arithmetic.

Symbols in the formulas: T tokens in a micro-batch row, H hidden size, I intermediate size, V
vocabulary, L layers, Q and K widths of all queries and all keys, r rank, c bytes of the compute
type (2 or 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel

from fastft.families import family_of
from fastft.hardware import GIB
from fastft.planning.shape import NF4_BITS, ModelShape


class Term(BaseModel):
    """One named part of a peak: bytes, the formula they come from, and where that formula comes
    from.
    """

    name: str
    bytes: int
    formula: str
    source: str


@dataclass(frozen=True)
class Situation:
    """Everything that decides the memory of a run, resolved: no `auto` is left."""

    device: Literal["cuda", "mps", "cpu"]
    kernels: Literal["unsloth", "fused", "peft", "compiled", "mlx"]
    """unsloth: its CUDA kernels; fused: fastft's own layers on a CPU; peft: transformers' and
    peft's eager modules; compiled: torch.compile; mlx: mlx-lm's layers and fastft's LoRA in MLX.
    """
    tokens: int
    """T: most tokens in one forward pass."""
    longest: int
    """Tokens of the longest sequence."""
    compute_bytes: int = 2
    quantization: Literal["none", "nf4", "int8"] = "none"
    multiplies_nf4: bool = False
    """fastft's own products dequantise NF4 block by block (a CPU with AVX512-BF16, in bfloat16)."""
    rank: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
    use_dora: bool = False
    dropout: float = 0.0
    train_tokens: int = 0
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    lora_bytes: int = 4
    checkpointing: Literal["off", "recompute", "offload"] = "off"
    recompute_above: int = 0
    """With checkpointing: rows of at most so many tokens keep their activations all the same."""
    loss: Literal["chunked", "full", "fused", "budget"] = "chunked"
    """chunked: Unsloth's; fused: fastft's own on a CPU; full: transformers' over whole logits;
    budget: Unsloth's before 2026.10, whose chunks filled half of the free memory of a GPU.
    """
    forced_float32: bool = False
    """Unsloth on a card without bfloat16, in a family that overflows in float16: 16-bit weights,
    all else in float32, attention over a row's whole scores.
    """
    upcast: bool = False
    """peft's prepare_model_for_kbit_training: norms, embeddings and head in float32, so hidden
    states are too.
    """
    full_finetuning: bool = False
    cores: int = 1
    free_bytes: int = 0
    """VRAM left once weights are loaded, which Unsloth's loss sizes its chunks by; 0: plenty."""
    allocator_slack: bool = True

    @property
    def lora(self) -> tuple[int, str | list[str], tuple[str, ...]]:
        """(rank, target modules, target parameters) as ModelShape takes them."""
        targets = self.target_modules
        names = targets if isinstance(targets, str) else list(targets)
        return self.rank, names, self.target_parameters

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one number of the hidden state between layers."""
        return 4 if self.upcast else self.compute_bytes


def trainable(shape: ModelShape, s: Situation) -> int:
    """Return the number of trained parameters."""
    if s.full_finetuning:
        return shape.parameters
    return shape.lora_parameters(*s.lora, use_dora=s.use_dora, train_tokens=s.train_tokens)


def weight_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """Base weights by role: what is quantised, and what stays in 16 bit (embeddings, head, norms,
    routers, biases).
    """
    packed = sum(w.parameters for w in shape.of("linear", "expert"))
    packed -= shape.kept_in_16_bit if s.quantization == "nf4" else 0
    rest = shape.parameters - packed
    terms = []
    if s.quantization != "none" and s.kernels == "mlx":
        bits = MLX_BITS[s.quantization]
        source = "mlx.nn.quantize: groups of 64 weights with a 16-bit scale and offset"
        terms.append(
            _term(
                f"weights in {bits:.0f} bit", packed * bits / 8, f"{packed:,} x {bits} bits", source
            )
        )
    elif s.quantization == "nf4":
        formula = f"{packed:,} x {NF4_BITS:.3f} bits"
        terms.append(
            _term(
                "weights in NF4",
                packed * NF4_BITS / 8,
                formula,
                "QLoRA, arXiv 2305.14314, section 3",
            )
        )
    elif s.quantization == "int8":
        rows = sum(w.shape[0] * w.count for w in shape.of("linear", "expert"))
        terms.append(
            _term(
                "weights in int8",
                packed + 4 * rows,
                f"{packed:,} + 4 x rows",
                "LLM.int8, arXiv 2208.07339",
            )
        )
    else:
        rest += packed
    size = 4 if s.upcast else 2 if s.forced_float32 else s.compute_bytes
    name = "weights" if s.quantization == "none" else f"weights kept in {size * 8} bit"
    return [*terms, _term(name, rest * size, f"{rest:,} x {size} bytes", "parameter count")]


def training_state_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """Trained parameters, their gradients and the optimizer's state."""
    n = trainable(shape, s)
    adapter = (
        []
        if s.full_finetuning
        else [
            _term(
                "LoRA",
                n * s.lora_bytes,
                f"{n:,} x {s.lora_bytes} bytes",
                "arXiv 2106.09685, section 4.1",
            )
        ]
    )
    gradients = _term(
        "gradients",
        n * s.lora_bytes,
        f"{n:,} x {s.lora_bytes} bytes",
        "one for each trained parameter",
    )
    if s.optimizer == "adamw":
        size = 2 * s.lora_bytes
        return [
            *adapter,
            gradients,
            _term(
                "optimizer", n * size, f"{n:,} x {size} bytes", "Adam: two moments, arXiv 1412.6980"
            ),
        ]
    formula = (
        f"{n:,} x 2.06 bytes"  # two 8-bit moments and a float32 constant for 256 values of each
    )
    return [
        *adapter,
        gradients,
        _term("optimizer", n * 2.06, formula, "8-bit Adam, arXiv 2110.02861"),
    ]


def layer_bytes_per_token(shape: ModelShape, s: Situation) -> dict[str, float]:
    """Return what autograd keeps for one layer and token, by part, in bytes.

    Counted with torch's saved-tensor hooks on the eager modules of transformers 5.17 and peft
    0.21, and read from Unsloth's autograd functions for its GPU kernels (LoRA_QKV, LoRA_MLP,
    RMSNorm: inputs, gate and up are kept).
    """
    c, h, q, k = s.compute_bytes, shape.hidden, shape.query_size, shape.kv_size
    i = shape.intermediate * max(1, shape.experts_per_token)
    family = family_of(shape.family)
    norms, qk_norm = family.norms_a_layer, (q + k) if family.qk_norms == "head" else 0
    targets = shape.lora_targets(s.lora[1]) if not s.full_finetuning else shape.of("linear")
    inputs = [w.shape[1] for w in targets if w.name != "lm_head"]
    if s.kernels == "fused":
        return _fused_layer_bytes(shape, s)
    if s.kernels == "mlx":
        return _mlx_layer_bytes(shape, s)
    if s.kernels != "peft":
        # the normed input of attention; Unsloth also keeps the MLP's
        shared = h + (h if s.kernels == "unsloth" else 0)
        lora = (shared + (i if s.kernels == "compiled" else 0)) * c if inputs else 0
        scores = shape.heads * s.tokens * 2 * c if s.forced_float32 else 0
        return {
            "norms": norms * h * s.hidden_bytes,
            "LoRA inputs": lora,
            "attention": (2 * q + 2 * k) * c + qk_norm * c,
            "MLP": 2 * i * c,
            "rank-r products": s.rank * len(inputs) * c if s.kernels == "compiled" else 0,
            "attention scores": scores,
        }
    # Under autocast every targeted layer makes its own 16-bit copy of its input; in float32 q, k
    # and v share one, gate and up another.
    owners = {_SHARED_INPUT.get(w.name, w.name) if c == 4 else w.name: w.shape[1] for w in targets}
    copies = sum(owners.values())
    parts: dict[str, float] = {
        "norms": norms * (4 * h + 4) + 4 * qk_norm,
        "LoRA inputs": copies * c + (copies * (c + 1) if s.dropout else 0),
        # SDPA on a padding-free row: queries, keys and values repeated to all heads, output, its
        # contiguous copy.
        "attention": (4 * q * c + 4 * shape.heads)
        + (q * c if "o_proj" not in {w.name for w in targets} else 0),
        "MLP": family.mlp_tensors * i * c,
        "rank-r products": s.rank * len(inputs) * c,
    }
    if family.written_out_scores:
        # Softcaps and sinks need written-out attention: scores, mask and weights of every pair of
        # positions.
        parts["attention scores"] = shape.heads * min(s.longest, s.tokens) * (2 * c + 4 + 1)
    return parts


MLX_BITS = {"nf4": 4.5, "int8": 8.5}
"""Bits of a weight in MLX's own quantisation: 4 or 8, and two 16-bit numbers for 64 weights."""
MLX_MLP_TENSORS = 5
"""Of a token's intermediate size that MLX keeps in a layer: fitted to measured peaks."""
MLX_LOGIT_BYTES = 19
"""Of a logit that carries loss, at the peak of MLX's loss: measured (18.5 and 19.5)."""
MLX_RECOMPUTED_LAYERS = 4
"""Layers' worth that are live while MLX recomputes one: measured 2.7 to 3.9."""


def _mlx_layer_bytes(shape: ModelShape, s: Situation) -> dict[str, float]:
    """What MLX keeps of one layer and token until its backward pass (compared with
    mx.get_peak_memory on a Linux CPU, docs/mac.md).

    A and B are float32, so with 16-bit weights each targeted layer makes its own float32 copy of
    its input. Attention in training is not MLX's fused kernel: the weights of all pairs are kept.
    """
    c, h, q, k = s.compute_bytes, shape.hidden, shape.query_size, shape.kv_size
    i = shape.intermediate * max(1, shape.experts_per_token)
    family = family_of(shape.family)
    inputs = [w.shape[1] for w in shape.lora_targets(s.lora[1]) if w.name != "lm_head"]
    copies = 4 * sum(inputs) if c == 2 else (2 * h + q) * c  # in float32 they share one
    qk_norm = 2 * (q + k) * c if family.qk_norms == "head" else 0
    return {
        "norms": family.norms_a_layer * h * c + qk_norm,
        "LoRA inputs": copies + (sum(inputs) * c if s.dropout else 0),
        "attention": (3 * q + 2 * k) * c,
        "attention scores": shape.heads * min(s.longest, s.tokens) * c,
        "MLP": MLX_MLP_TENSORS * i * c,
        "rank-r products": 4 * s.rank * len(inputs),
    }


def _mlx_moving_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """Transient memory of a step in MLX: besides the logits one layer's worth is in work, and with
    checkpointing several are while a layer is recomputed.
    """
    parts, measured = layer_bytes_per_token(shape, s), "mx.get_peak_memory (docs/mac.md)"
    layer = s.tokens * sum(parts.values())
    work = _term("one layer at work", layer, f"T {s.tokens:,} x ({_listed(parts)})", measured)
    if s.checkpointing == "off":
        formula = f"L {shape.layers} x what one keeps"
        kept = _term("activations", shape.layers * layer, formula, measured)
        return [kept, work, loss_term(shape, s)]
    again = MLX_RECOMPUTED_LAYERS
    recomputed = _term("recomputed layers", again * layer, f"{again} x one layer", measured)
    inputs, loss = _layer_inputs_term(shape, s), loss_term(shape, s)
    return [inputs, *max([work, loss], [recomputed], key=lambda terms: sum(t.bytes for t in terms))]


KEEP_PROBABILITIES = 256
"""Sequences up to this length keep their attention weights where attention is not compiled
(row_attention).
"""


def _fused_layer_bytes(shape: ModelShape, s: Situation) -> dict[str, float]:
    """What fastft's own autograd functions save (kernels/fused.py), and peft's modules where they
    are not replaced: where `_not_fused`, all but norms and the loss. A fused layer that reads a
    fused norm's output keeps nothing of it (kernels/kept.py).
    """
    c, h, q, k, i = (
        s.compute_bytes,
        shape.hidden,
        shape.query_size,
        shape.kv_size,
        shape.intermediate,
    )
    family = family_of(shape.family)
    peft = layer_bytes_per_token(shape, replace(s, kernels="peft"))
    parts = {"norms": peft["norms"]}
    if "norm" in family.fused:
        qk_norm = (q + k) * c + 4 * (shape.heads + shape.kv_heads)
        parts["norms"] = family.norms_a_layer * (h * c + 4)
        parts["norms"] += qk_norm if family.qk_norms == "head" else 0
    if _not_fused(shape, s):
        return peft | parts
    targets = {w.name for w in shape.lora_targets(s.lora[1])} if not s.full_finetuning else set()
    inputs, low = (
        0.0,
        len([w for w in shape.lora_targets(s.lora[1]) if w.name != "lm_head"]) * s.rank * c,
    )
    normed = 0 if "norm" in family.fused else h
    compiled = c == 2 and shape.head_dim % 16 == 0
    if "attention" in family.fused:
        # q, k and v; cosines and sines once. Compiled attention keeps a float32 a head and its
        # output, which is the input of o; blocks of torch's products copy the output, and keep the
        # weights of short sequences.
        parts["attention"] = (q + 2 * k) * c + 2 * shape.head_dim * c / shape.layers
        if compiled:
            parts["attention"] += 4 * shape.heads
            if "norm" in family.fused and family.qk_norms == "head":
                parts["attention"] -= (q + k) * c  # kept by the norms
        elif s.longest <= KEEP_PROBABILITIES:
            parts["attention"] += shape.heads * s.longest * c
        inputs += normed
    else:
        parts["attention"] = peft["attention"] - (0 if "o_proj" in targets else q * c)
        # Each of q, k and v is a layer of its own, but all keep the very same input.
        inputs += normed if targets & {"q_proj", "k_proj", "v_proj", "qkv_proj"} else 0
    # The output of attention: for its own backward pass, or that of o.
    inputs += q if "o_proj" in targets or compiled or "attention" not in family.fused else 0
    if "mlp" in family.fused:
        parts["MLP"] = 2 * i * c
        inputs += normed
    else:
        parts["MLP"] = peft["MLP"]
        inputs += normed if targets & {"gate_up_proj", "gate_proj", "up_proj"} else 0
        inputs += i if "down_proj" in targets else 0
    if "attention scores" in peft:
        parts["attention scores"] = peft["attention scores"]
    return parts | {"LoRA inputs": inputs * c, "rank-r products": low}


def eager_parts(shape: ModelShape, s: Situation) -> dict[str, float]:
    """Those parts of `layer_bytes_per_token` that transformers' and peft's own modules save."""
    parts = layer_bytes_per_token(shape, s)
    if s.kernels != "fused":
        return parts
    if _not_fused(shape, s):
        return {name: size for name, size in parts.items() if name != "norms"}
    fused = family_of(shape.family).fused
    eager = set() if "attention" in fused else {"attention", "attention scores"}
    eager |= set() if "mlp" in fused else {"MLP"}
    return {name: size for name, size in parts.items() if name in eager}


def _not_fused(shape: ModelShape, s: Situation) -> bool:
    """Whether the LoRA layers are of a kind that fastft leaves to peft."""
    whole = s.quantization == "none" or (s.quantization == "nf4" and s.multiplies_nf4)
    return not whole or s.use_dora or s.dropout > 0 or shape.experts > 0


_SHARED_INPUT = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up",
}  # fmt: skip


def moving_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """Transient memory of a step at its peak.

    Without checkpointing that is the end of the forward pass: all saved tensors, and the larger of
    the loss and one layer's backward. With it, all layer inputs and either the loss or one
    recomputed layer, which never meet.
    """
    if s.kernels == "mlx":
        return _mlx_moving_terms(shape, s)
    loss, layer = [loss_term(shape, s)], _backward_terms(shape, s)
    if s.checkpointing == "off":
        parts = layer_bytes_per_token(shape, s)
        size = shape.layers * s.tokens * sum(parts.values())
        formula = f"L {shape.layers} x T {s.tokens:,} x ({_listed(parts)})"
        kept = [
            _term("activations", size, formula, "saved tensors, counted (layer_bytes_per_token)")
        ]
    else:
        layer = [_recomputed_term(shape, s), *layer]
        kept = [_layer_inputs_term(shape, s)] if s.checkpointing == "recompute" else []
    kept += _expert_copies(shape, s)
    return [*kept, *max(loss, layer, key=lambda terms: sum(term.bytes for term in terms))]


def _expert_copies(shape: ModelShape, s: Situation) -> list[Term]:
    """What a LoRA on experts keeps: peft adds it to the whole parameter in each forward pass, and
    the sum stays until the layer's backward pass.
    """
    experts = [] if s.full_finetuning else shape.expert_targets(s.target_parameters)
    if not experts:
        return []
    layers = 1 if s.checkpointing != "off" else max(w.count for w in experts)
    size = sum(w.parameters // w.count for w in experts) * s.compute_bytes
    formula = f"{layers} layers x {size:,} bytes"
    return [_term("experts with LoRA", layers * size, formula, "peft's ParamWrapper")]


def _backward_terms(shape: ModelShape, s: Situation) -> list[Term]:
    i = shape.intermediate * max(1, shape.experts_per_token)
    size = s.tokens * 3 * (i + shape.hidden) * s.compute_bytes
    terms = [
        _term(
            "backward of one layer",
            size,
            "T x 3 (I + H) x c",
            "gradients of gate, up and their product",
        )
    ]
    if s.quantization != "none":
        largest = max(w.parameters // w.count for w in shape.of("linear"))
        source = "bitsandbytes and Unsloth dequantise one layer at a time"
        terms.append(
            _term("dequantised weight", largest * 2, "largest linear layer x 2 bytes", source)
        )
    return terms


def _recomputed_term(shape: ModelShape, s: Situation) -> Term:
    parts = layer_bytes_per_token(shape, s)
    size = s.tokens * sum(parts.values())
    return _term(
        "activations of one layer",
        size,
        f"T {s.tokens:,} x ({_listed(parts)})",
        "recomputed in backward",
    )


def _layer_inputs_term(shape: ModelShape, s: Situation) -> Term:
    size = shape.layers * s.tokens * shape.hidden * s.hidden_bytes
    formula = f"L {shape.layers} x T {s.tokens:,} x H {shape.hidden:,} x {s.hidden_bytes}"
    return _term("layer inputs", size, formula, "gradient checkpointing, arXiv 1604.06174")


def _listed(parts: dict[str, float]) -> str:
    return " + ".join(f"{name} {size:,.0f}" for name, size in parts.items() if size)


HEAD_ROWS = 256  # logits at a time: fused.HEAD_ROWS
CPU_CHUNK = 16 * 2**20  # logits at a time: UNSLOTH_CPU_CE_CHUNK_ELEMENTS
GPU_LOSS_BUDGET = 4 * GIB  # or half of the free memory, where that is less


def loss_term(shape: ModelShape, s: Situation) -> Term:
    """Logits: a chunk at a time, or all of them in float32 where the loss is not fused."""
    logits, v = s.tokens * shape.vocab, shape.vocab
    if s.kernels == "mlx":
        formula = f"T x V {v:,} x {MLX_LOGIT_BYTES} bytes"
        source = (
            "fastft.engines.mlx: logits, float32, and their gradients; where tokens are trained"
        )
        return _term("logits", logits * MLX_LOGIT_BYTES, formula, source)
    if s.loss == "fused":
        size = (
            min(s.tokens, HEAD_ROWS) * v * s.compute_bytes
            + 2 * s.tokens * shape.hidden * s.compute_bytes
        )
        formula = f"min(T, {HEAD_ROWS}) x V {v:,} x c + 2 T H c"
        return _term(
            "logits in chunks",
            size,
            formula,
            "fastft.kernels.fused, in place; hidden states and their gradient",
        )
    if s.loss == "full" and s.device == "cpu":
        formula = f"T x V {v:,} x (c + 8) bytes"
        source = "transformers' ForCausalLMLoss: logits, their float32 copy, log-softmax"
        return _term("logits", logits * (s.compute_bytes + 8), formula, source)
    if s.loss == "full":
        # Logits, log-softmax and the gradient of each, in float32: all live while log-softmax runs
        # backward. The published GPU runs used versions of transformers that copied the shifted
        # logits.
        return _term(
            "logits",
            logits * 16,
            f"T x V {v:,} x 4 tensors x 4 bytes",
            "transformers' ForCausalLMLoss",
        )
    if s.kernels == "compiled":
        source = "torchtune's CEWithChunkedOutputLoss keeps 16-bit logits"
        return _term("logits", logits * 2, f"T x V {v:,} x 2 bytes", source)
    if s.device == "cpu":
        # Measured: 134 MB above the resident memory for 16 Mi logits, two float32 copies.
        size = min(logits, CPU_CHUNK) * 8 + 2 * s.tokens * shape.hidden * s.compute_bytes
        formula = f"min(T x V {v:,}, {CPU_CHUNK >> 20} Mi) x 8 bytes + 2 T H c"
        return _term(
            "logits in chunks", size, formula, "unsloth_zoo.cpu.ops, chunked cross entropy"
        )
    if s.loss == "budget":
        # 16-bit logits, float32 copy, log-softmax, gradient: 14 bytes. Rows whose logits x 16
        # exceed the budget are cut, so the worst row up to T is the one that just fills it.
        budget = min(GPU_LOSS_BUDGET, s.free_bytes // 2) if s.free_bytes else GPU_LOSS_BUDGET
        size = min(logits * 14, budget * 14 // 16)
        formula = f"min(T x V {v:,} x 14 bytes, 14/16 of {budget / GIB:.1f} GiB)"
        return _term("logits", size, formula, "unsloth_zoo.fused_losses before 2026.10")
    rows, h = unsloth_loss_rows(shape, s), shape.hidden
    formula = f"{rows:,} rows x (V {v:,} + H) x 4 + T x H x {s.compute_bytes}"
    size = rows * (v + h) * 4 + s.tokens * h * s.compute_bytes
    return _term("logits in chunks", size, formula, "unsloth_zoo.fused_losses.fused_linear")


def unsloth_loss_rows(shape: ModelShape, s: Situation) -> int:
    """Return how many tokens' logits Unsloth's loss on a GPU computes at a time (float32 logits,
    overwritten by their gradient), if all T tokens are trained on.

    The largest power of two below T x H / V, but at least 512 tokens or what makes 512 x 151,936
    logits, at most 4,096, and no more than fit into 2 GiB or half of the free memory
    (fused_linear_rows of unsloth_zoo 2026.10.9).
    """
    wanted = _power_of_two_below(s.tokens * shape.hidden / shape.vocab)
    least = min(max(_power_of_two_below(512 * 151_936 / shape.vocab), 512), 4096)
    budget = min(2 * GIB, s.free_bytes // 2) if s.free_bytes else 2 * GIB
    room = max(budget // (4 * shape.vocab), 2)
    return max(min(max(wanted, least), 4096, room, s.tokens), 1)


def _power_of_two_below(x: float) -> int:
    return 1 << math.floor(math.log2(max(x, 1)))


CUDA_CONTEXT = int(0.45 * GIB)
"""What the driver takes of a card for a process: typical, not measured."""
CUDA_SLACK = 0.05
"""Share of what comes and goes that CUDA's allocator rounds up in blocks: assumed."""
HEAP_FRAGMENTATION = {"off": 0.75, "recompute": 0.5, "offload": 0.5}
"""Resident but unused heap, as a share of what transformers' and peft's own modules save: fitted
with glibc 2.36 (see docs/plan.md).
"""
FUSED_FRAGMENTATION = {"off": 0.05, "recompute": 0.0, "offload": 0.0}
"""The same for fastft's fused layers, which make few temporaries between the tensors that they
keep: fitted.
"""
RECOMPUTING_HOLES = 8
"""Layers' worth of what a layer saves that stay as holes where fused layers are recomputed: fitted
to two runs.
"""
TRAINER = int(0.14e9)  # trainer, data and code loaded on first use: fitted
TOKEN_BYTES = 500  # a token and its merge in the tokenizer's tables: fitted
IMPORTS = {"cpu": int(0.62e9), "cuda": int(3.0e9), "mps": int(1.0e9)}
"""RAM of Python and the libraries, in bytes; with CUDA and on MPS typical, not measured."""


def kinds_of_pass(s: Situation) -> list[Situation]:
    """The passes of which one is the fullest: the largest row that keeps its activations, and the
    largest that is recomputed, where a run has both.
    """
    most = s.recompute_above
    if not most or s.checkpointing == "off":
        return [s]
    kept = replace(s, checkpointing="off", tokens=min(s.tokens, most), longest=min(s.longest, most))
    return [kept, s] if s.tokens > most else [kept]


def train_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """Everything in the memory that computes (VRAM, or RAM on a CPU) at the peak of a training
    step.
    """
    passes = [_terms_of_pass(shape, kind) for kind in kinds_of_pass(s)]
    return max(passes, key=lambda terms: sum(term.bytes for term in terms))


def _terms_of_pass(shape: ModelShape, s: Situation) -> list[Term]:
    states = training_state_terms(shape, s)
    if s.optimizer == "paged_adamw_8bit":
        states = states[:-1]  # its pages move to RAM under pressure
    fixed = [*weight_terms(shape, s), *states]
    moving = moving_terms(shape, s)
    return [*fixed, *moving, *overhead_terms(s, moving, shape)]


def overhead_terms(s: Situation, moving: Iterable[Term], shape: ModelShape) -> list[Term]:
    """What the allocator holds beyond the live tensors, and the CUDA context."""
    if not s.allocator_slack or s.kernels == "mlx":
        return []  # MLX gives what it caches back before it runs out
    live = sum(term.bytes for term in moving)
    if s.device == "cpu":
        eager = sum(eager_parts(shape, s).values())
        fused = sum(layer_bytes_per_token(shape, s).values()) - eager
        share, fused_share = (
            HEAP_FRAGMENTATION[s.checkpointing],
            FUSED_FRAGMENTATION[s.checkpointing],
        )
        size = (share * eager + fused_share * fused) * shape.layers * s.tokens
        formula = f"L x T x ({share} x {eager:,.0f} + {fused_share} x {fused:,.0f})"
        if s.kernels == "fused" and s.checkpointing != "off":
            saved = sum(layer_bytes_per_token(shape, replace(s, checkpointing="off")).values())
            size += RECOMPUTING_HOLES * saved * s.tokens
            formula += f" + {RECOMPUTING_HOLES} x T x {saved:,.0f}"
        source = "glibc keeps the holes that freed temporaries leave; measured (docs/plan.md)"
        fitted = "fitted to measured runs (docs/plan.md)"
        return [
            _term("heap fragmentation", size, formula, source),
            _term("trainer and data", TRAINER, "constant", fitted),
            _term(
                "tokenizer",
                shape.vocab * TOKEN_BYTES,
                f"V {shape.vocab:,} x {TOKEN_BYTES} bytes",
                fitted,
            ),
        ]
    slack = _term(
        "allocator slack",
        CUDA_SLACK * live,
        f"{CUDA_SLACK:.0%} of what comes and goes",
        "rounding to 2 MiB blocks",
    )
    context = _term(
        "CUDA context",
        CUDA_CONTEXT if s.device == "cuda" else 0,
        "0.45 GiB",
        "typical: kernels, cuBLAS workspace",
    )
    return [slack, context] if s.device == "cuda" else [slack]


def eval_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """A forward pass without gradients: nothing is saved, but the logits of a row are whole."""
    t, c = s.tokens, s.compute_bytes
    i = shape.intermediate * max(1, shape.experts_per_token)
    states = training_state_terms(shape, s)
    states = [term for term in states if term.name != "gradients"]
    layer = _term(
        "one layer's forward",
        t * (4 * shape.hidden + 3 * i) * c,
        "T x (4 H + 3 I) x c",
        "inputs and products",
    )
    logits = _term(
        "logits",
        t * shape.vocab * (c + 8),
        f"T x V {shape.vocab:,} x (c + 8) bytes",
        "c, float32, log-softmax",
    )
    if s.device != "cpu" or s.loss == "fused" or s.kernels == "mlx":
        logits = loss_term(shape, s)
    moving = [max(layer, logits, key=lambda term: term.bytes)]
    context = (
        [_term("CUDA context", CUDA_CONTEXT, "0.45 GiB", "typical")] if s.device == "cuda" else []
    )
    return [*weight_terms(shape, s), *states, *moving, *context]


def load_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """The weights, and the tensor that is being converted or quantised."""
    largest = max(w.parameters // w.count for w in shape.weights)
    stored = 4 if shape.stored == "float32" else 2
    staging = _term(
        "tensor being loaded", largest * stored, "largest tensor as stored", "loaded one by one"
    )
    context = (
        [_term("CUDA context", CUDA_CONTEXT, "0.45 GiB", "typical")] if s.device == "cuda" else []
    )
    return [*weight_terms(shape, s), staging, *context]


def host_terms(shape: ModelShape, s: Situation, phase: str) -> list[Term]:
    """RAM beside a GPU: libraries, offloaded layer inputs, paged optimizer state, checkpoint pages
    while loading.
    """
    terms = [imports_term(s)]
    if phase == "load":
        largest = max(w.parameters // w.count for w in shape.weights)
        terms.append(
            _term(
                "tensor being loaded",
                largest * 2,
                "largest tensor x 2 bytes",
                "safetensors are mapped",
            )
        )
    if phase == "train" and s.checkpointing == "offload":
        size = shape.layers * s.tokens * shape.hidden * s.hidden_bytes
        terms.append(
            _term(
                "layer inputs",
                size,
                f"L {shape.layers} x T {s.tokens:,} x H x c",
                "Unsloth offloads them to RAM",
            )
        )
    if phase == "train" and s.optimizer == "paged_adamw_8bit":
        terms.append(training_state_terms(shape, s)[-1])
    return terms


def imports_term(s: Situation) -> Term:
    """Python with its libraries loaded."""
    source = {"cpu": "measured: import unsloth, one thread"}.get(s.device, "typical, not measured")
    return _term("Python and libraries", IMPORTS[s.device], "constant", source)


def merge_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """Writing base + LoRA tensor by tensor: 6 bytes a parameter where nothing is added, 12 where a
    delta is.
    """
    changed = {w.name for w in shape.lora_targets(s.lora[1])}
    sizes = {
        w.name: w.parameters // w.count * (12 if w.name in changed else 6) for w in shape.weights
    }
    name = max(sizes, key=lambda leaf: sizes[leaf])
    formula = f"{name}: parameters x {12 if name in changed else 6} bytes"
    return [
        imports_term(s),
        _term(
            "one tensor", sizes[name], formula, "16 bit, float32 W, delta and sum; or W and result"
        ),
    ]


GGUF_CHUNK = 2**20  # values that one thread of the GGUF writer holds: writer.CHUNK_VALUES
GGUF_CHUNK_BYTES = 55
"""Of a value: 16 bit, float32 W, delta, its scaled copy, sum, quantised make 21; each thread's
heap keeps the rest.
"""
GGUF_TOKEN_BYTES = 1500
"""Of a token: the tokenizer, and its vocabulary and merges as Python strings."""


def export_terms(shape: ModelShape, s: Situation) -> list[Term]:
    """The GGUF writer: each thread holds a chunk of rows in 16 bit, float32, its delta and
    quantised.
    """
    values = min(GGUF_CHUNK, max(w.parameters // w.count for w in shape.lora_targets(s.lora[1])))
    formula = f"{s.cores} threads x {values:,} values x {GGUF_CHUNK_BYTES} bytes"
    vocabulary = f"V {shape.vocab:,} x {GGUF_TOKEN_BYTES:,} bytes"
    return [
        imports_term(s),
        _term(
            "chunks of rows",
            s.cores * values * GGUF_CHUNK_BYTES,
            formula,
            "fitted to measured exports",
        ),
        _term(
            "vocabulary", shape.vocab * GGUF_TOKEN_BYTES, vocabulary, "fitted to measured exports"
        ),
    ]


def _term(name: str, size: float, formula: str, source: str) -> Term:
    return Term(name=name, bytes=int(size), formula=formula, source=source)
