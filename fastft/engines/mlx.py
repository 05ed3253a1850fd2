"""The MLX engine: Apple's array library, through mlx-lm's models.

For Apple Silicon; MLX also runs on a Linux CPU, which is how it is tested (nobody of us has run it
on a Mac). mlx-lm loads the base; what is fastft's own here:

- LoRA on the same layers as elsewhere, its parameters counted by the same closed form;
- rows without padding, in which beginnings that sequences share stand once (`fastft.data.trie`):
  rotary positions and attention are computed for each node of the row by itself, with the nodes
  above it, so no sequence sees another (`Boundaries`);
- logits only where a token carries loss;
- the adapter is peft's: `adapter_arrays` and `load_adapter` translate names and transpose.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from fastft import hub
from fastft.config import LoraConfig, ModelConfig
from fastft.errors import FastFTError, did_you_mean

BITS = {"nf4": 4, "int8": 8}
GROUP = 64  # weights that share a scale, in a quantised base
ROPES = {"RoPE", "Llama3RoPE", "SuScaledRoPE", "YarnRoPE"}
"""Rotary embeddings whose angles depend on the position alone, so that a row can be cut."""


class MlxEngine:
    """Stands where the other engines do; loading and training are `MlxModel`'s."""

    name = "mlx"

    def patches(self) -> dict[str, str]:
        """Return the versions that decide the numbers."""
        from importlib.metadata import version

        return {
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "device": str(mx.default_device()),
        }


ENGINE = MlxEngine()


@dataclass(frozen=True)
class Node:
    """A stretch of a row that its sequences have in common, or one sequence alone."""

    start: int
    end: int
    position: int
    """Of its first token in its sequences."""
    above: tuple[tuple[int, int], ...] = ()
    """(start, end) of the nodes before it in its sequences, in order."""


@dataclass
class Boundaries:
    """What the present forward pass is cut into; None outside of rows."""

    nodes: list[Node] | None = None
    keep: mx.array | None = None
    """Positions of the row whose hidden states go on to the output head; None: all."""


@dataclass
class _Window:
    """Stands for an attention mask inside of rows: how far back a token sees."""

    size: int | None


@dataclass
class MlxModel:
    """A base of mlx-lm with LoRA on it: what the training loop and `final/` work with."""

    model: Any
    config: Any
    """transformers' config of the base."""
    lora: LoraConfig
    targets: list[str]
    """Paths of the layers with LoRA, in mlx-lm's model."""
    boundaries: Boundaries
    rows: bool
    """Whether several sequences can stand in one row."""
    name: str
    revision: str | None
    embedding_scale: float = 1.0
    """What mlx-lm's rounding of the embedding scale is corrected by (gemma3 in float32)."""
    modules: list[Any] = field(default_factory=list)
    """Python modules of mlx-lm whose attention is replaced inside of rows."""

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(array.size for _, array in tree_flatten(self.model.trainable_parameters()))

    # --- computing

    def loss_sum(
        self, ids: mx.array, states: mx.array, targets: mx.array, counts: mx.array
    ) -> mx.array:
        """Return the sum of the token losses (nats, float32) of one row.

        `ids` (1, T) int32; `states` (P,): positions that predict, `targets` (P,) their next tokens,
        `counts` (P,) how many sequences have this pair. Logits are computed there only.
        """
        self.boundaries.keep = states
        logits = self.logits(ids)[0].astype(mx.float32)  # (P, vocabulary)
        self.boundaries.keep = None
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return ((mx.logsumexp(logits, axis=-1) - chosen) * counts).sum()

    def logits(self, ids: mx.array, cache: Any = None) -> mx.array:
        """Return logits (1, T, vocabulary), or (1, N, vocabulary) where positions are chosen."""
        if self.embedding_scale == 1.0:
            return self.model(ids, cache=cache)
        embedded = _inner(self.model).embed_tokens(ids) * self.embedding_scale
        return self.model(ids, cache=cache, input_embeddings=embedded)

    @contextlib.contextmanager
    def row(self, nodes: list[Node]) -> Iterator[None]:
        """Inside, a forward pass is one row of `nodes`."""
        if len(nodes) == 1:
            yield  # a sequence alone is what mlx-lm computes anyway
            return
        assert self.rows, "this model takes one sequence at a time"
        kept = [(m, m.create_attention_mask, m.scaled_dot_product_attention) for m in self.modules]
        self.boundaries.nodes = nodes
        for module, _, attend in kept:
            module.create_attention_mask = _no_mask
            module.scaled_dot_product_attention = _attend_within(self.boundaries, attend)
        try:
            yield
        finally:
            self.boundaries.nodes = None
            for module, mask, attend in kept:
                module.create_attention_mask, module.scaled_dot_product_attention = mask, attend

    def greedy(self, prompt: Sequence[int], ends: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the ids that follow `prompt`, greedily, up to and without an end token."""
        from mlx_lm.models.cache import make_prompt_cache

        training = self.model.training
        self.model.eval()
        cache, ids, said = make_prompt_cache(self.model), list(prompt), []
        for _ in range(max_new_tokens):
            logits = self.logits(mx.array([ids], dtype=mx.int32), cache)[0, -1]
            token = int(logits.argmax().item())
            if token in ends:
                break
            said.append(token)
            ids = [token]
        self.model.train(training)
        return said

    # --- what `exporting.adapter.write_adapter` asks of a peft model

    def save_pretrained(self, folder: str, safe_serialization: bool = True) -> None:
        """Write adapter_model.safetensors and adapter_config.json, as peft does."""
        from peft import LoraConfig as PeftConfig

        assert safe_serialization
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(
            str(out / "adapter_model.safetensors"), adapter_arrays(self), metadata={"format": "pt"}
        )
        PeftConfig(
            base_model_name_or_path=self.name,
            revision=self.revision,
            task_type="CAUSAL_LM",
            inference_mode=True,
            r=self.lora.r,
            lora_alpha=self.lora.alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora.dropout,
            use_rslora=self.lora.use_rslora,
            target_modules=_peft_targets(self.targets),
        ).save_pretrained(folder)

    def get_base_model(self) -> Any:
        """Return what holds the base's config and generation config."""
        from types import SimpleNamespace

        from transformers import GenerationConfig

        try:
            generation = GenerationConfig.from_pretrained(
                self.name, revision=self.revision or "main"
            )
        except OSError:  # a base without that file
            generation = GenerationConfig.from_model_config(self.config)
        return SimpleNamespace(config=self.config, generation_config=generation)


# --- loading


def load_mlx(
    config: ModelConfig,
    lora: LoraConfig,
    *,
    quantization: str,
    dtype: str,
    seed: int,
    gradient_checkpointing: bool,
    train_token_ids: Sequence[int],
) -> MlxModel:
    """Return the config's base model with LoRA attached, ready to train.

    `quantization`: none, nf4 (here: MLX's own 4 bit, groups of 64) or int8 (8 bit). `dtype`:
    float32 or bfloat16, of the base; A and B are float32. A is drawn with numpy from `seed`, so
    the start is another than the other engines'. Raises FastFTError for settings that MLX cannot
    do, for models that mlx-lm does not know or computes otherwise than transformers does, and
    where the number of trainable parameters is not the closed form's.
    """
    from transformers import AutoConfig

    from fastft.models import explained

    _refuse(lora, train_token_ids)
    folder = _folder(config.name, config.revision)
    with explained(config.name):
        hf_config = AutoConfig.from_pretrained(str(folder))
    translated = _config_of(hf_config, config.max_seq_length)
    from mlx_lm.utils import load_model

    try:
        model, _ = load_model(folder, lazy=True, model_config=translated)
    except ValueError as error:
        raise FastFTError(
            f"mlx-lm cannot load {config.name}: {error} Try model.engine: stock."
        ) from error
    model.set_dtype(getattr(mx, dtype))
    head = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] == "lm_head"]
    if quantization in BITS:
        _quantise(model, BITS[quantization], head)
    targets = _targets(model, lora.target_modules, head)
    expected = _attach(model, targets, lora, seed)
    boundaries = Boundaries()
    modules = _row_modules(model)
    rows = bool(modules) and _cut_positions(model, boundaries)
    _select(model, boundaries)
    if gradient_checkpointing:
        for layer in model.layers:
            _checkpoint(layer)
    mx.eval(model.parameters())
    made = MlxModel(
        model, hf_config, lora, targets, boundaries, rows, config.name, config.revision,
        embedding_scale=_embedding_scale(model, dtype), modules=modules,
    )  # fmt: skip
    assert made.trainable == expected, (made.trainable, expected)
    return made


def _folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model; of a Hub id, the one in the local cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    with hub.hub_errors(f"model {name!r}"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*hub.MODEL_FILES]))


def _refuse(lora: LoraConfig, train_token_ids: Sequence[int]) -> None:
    """Raise FastFTError for what this engine does not do."""
    cannot = []
    if lora.use_dora:
        cannot.append("lora.use_dora: true (set it to false)")
    if lora.target_parameters:
        cannot.append("lora.target_parameters (leave the experts out)")
    if lora.init not in ("default", "gaussian"):
        cannot.append(f"lora.init: {lora.init} (set it to default)")
    if train_token_ids:
        cannot.append(
            f"trained token rows ({len(train_token_ids)} tokens; set lora.train_tokens: [], or a "
            "data.chat_template whose tokens the base knows)"
        )
    if cannot:
        raise FastFTError(
            f"model.engine mlx does not do {'; '.join(cannot)}. Or take model.engine: stock."
        )


def _config_of(hf_config: Any, max_seq_length: int) -> dict[str, Any]:
    """Return what mlx-lm reads otherwise than transformers 5 writes it: rotary settings, windows.

    Raises FastFTError for windows that mlx-lm would leave out.
    """
    values = hf_config.to_dict()
    if "text_config" in values:
        return {"text_config": _text_values(values["text_config"], max_seq_length)} | {
            key: values[key] for key in ("vocab_size",) if values.get(key)
        }
    return _text_values(values, max_seq_length)


def _text_values(values: dict[str, Any], max_seq_length: int) -> dict[str, Any]:
    values = {key: value for key, value in values.items() if value is not None}
    kinds, ropes = values.get("layer_types") or [], values.pop("rope_parameters", None) or {}
    if "full_attention" in ropes or "sliding_attention" in ropes:
        whole, local = ropes["full_attention"], ropes.get("sliding_attention", {})
        values["rope_local_base_freq"] = local.get("rope_theta", whole["rope_theta"])
        values["sliding_window_pattern"] = _period(kinds)
    else:
        whole = ropes
        if values.get("sliding_window") and values["model_type"] == "mistral":
            kinds = ["sliding_attention"]
        if "sliding_attention" in kinds and values["sliding_window"] < max_seq_length:
            raise FastFTError(
                f"mlx-lm leaves out the sliding window ({values['sliding_window']} tokens) of "
                f"{values['model_type']}. Set model.max_seq_length to at most that, or "
                "model.engine: stock."
            )
        values.pop("layer_types", None)
    if "rope_theta" in whole:
        values["rope_theta"] = whole["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        values["rope_scaling"] = whole
    return values


def _period(kinds: list[str]) -> int:
    """Return n where every n-th layer attends to everything; FastFTError for another pattern."""
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    for at, kind in enumerate(kinds):
        if (kind == "full_attention") != ((at + 1) % period == 0):
            raise FastFTError(
                f"mlx-lm knows one full layer after every {period - 1} sliding ones; layer {at} of "
                "this model is another. Set model.engine: stock."
            )
    return period


def _quantise(model: Any, bits: int, head: list[str]) -> None:
    """Quantise every linear layer but the head, as bitsandbytes does on the other engines."""
    odd = []

    def wanted(path: str, module: Any) -> bool:
        if not isinstance(module, nn.Linear) or path in head:
            return False
        if module.weight.shape[-1] % GROUP:
            odd.append(f"{path} ({module.weight.shape[-1]} inputs)")
            return False
        return True

    nn.quantize(model, group_size=GROUP, bits=bits, class_predicate=wanted)
    if odd:
        raise FastFTError(
            f"MLX quantises groups of {GROUP} weights, and {len(odd)} layers do not divide by it: "
            f"{', '.join(odd[:3])}. Set model.quantization: none."
        )


def _embedding_scale(model: Any, dtype: str) -> float:
    """Return by how much mlx-lm's embedding scale is off: it rounds sqrt(hidden size) to bfloat16,
    transformers only where the weights are bfloat16.
    """
    inner = _inner(model)
    if dtype != "float32" or "gemma" not in type(inner).__module__:
        return 1.0
    exact = inner.args.hidden_size**0.5
    return exact / mx.array(exact, mx.bfloat16).astype(mx.float32).item()


# --- LoRA


class LoraLinear(nn.Module):
    """A frozen linear layer (16 bit or quantised) plus alpha / r times B A, A and B in float32."""

    def __init__(self, linear: Any, a: mx.array, b: mx.array, scale: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(dropout)
        self.lora_a = a  # (inputs, r)
        self.lora_b = b  # (r, outputs)

    def __call__(self, x: mx.array) -> mx.array:
        """Return (..., outputs) in the type of `x`."""
        low = self.dropout(x).astype(mx.float32) @ self.lora_a
        return self.linear(x) + (self.scale * (low @ self.lora_b)).astype(x.dtype)


def _sizes(linear: Any) -> tuple[int, int]:
    """Return (inputs, outputs)."""
    outputs, inputs = linear.weight.shape
    return (inputs * 32 // linear.bits if hasattr(linear, "bits") else inputs), outputs


def _targets(model: Any, wanted: str | list[str], head: list[str]) -> list[str]:
    """Return the paths of the layers that LoRA is put on, in the model's order."""
    linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)]
    linear = sorted((path for path in linear if path not in head), key=_natural)
    if wanted == "all-linear":
        return linear
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    leaves = sorted({path.rsplit(".", 1)[-1] for path in linear})
    missing = [n for n in names if not any(p == n or p.endswith("." + n) for p in linear)]
    if missing or not names:
        what = ", ".join(f"{n!r}{did_you_mean(n, leaves)}" for n in missing) or "an empty list"
        raise FastFTError(
            f"lora.target_modules: the model has no {what}. It has: {', '.join(leaves)}; or use "
            "all-linear."
        )
    return [p for p in linear if any(p == n or p.endswith("." + n) for n in names)]


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _attach(model: Any, targets: list[str], lora: LoraConfig, seed: int) -> int:
    """Put LoRA on `targets`, freeze the rest; returns the closed-form number of parameters, sum of
    r (inputs + outputs) (arXiv 2106.09685, section 4.1).
    """
    scale = lora.alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    modules = dict(model.named_modules())
    model.freeze()
    made, expected = [], 0
    for at, path in enumerate(targets):
        inputs, outputs = _sizes(modules[path])
        rng = np.random.default_rng([seed, at])
        if lora.init == "gaussian":
            a = rng.normal(scale=1 / lora.r, size=(inputs, lora.r))
        else:  # peft's: kaiming uniform with a = sqrt(5), which is this bound
            a = rng.uniform(-(inputs**-0.5), inputs**-0.5, size=(inputs, lora.r))
        b = mx.zeros((lora.r, outputs))
        made.append(
            (path, LoraLinear(modules[path], mx.array(a, mx.float32), b, scale, lora.dropout))
        )
        expected += lora.r * (inputs + outputs)
    model.update_modules(tree_unflatten(made))
    return expected


# --- rows


def _inner(model: Any) -> Any:
    """Return the decoder, without the output head."""
    return next(m for _, m in reversed(list(model.named_modules())) if "embed_tokens" in m)


def _row_modules(model: Any) -> list[Any]:
    """Return mlx-lm's Python modules whose attention rows need replaced; none where it is not
    called by the names that we replace.
    """
    names = {type(m).__module__ for _, m in model.named_modules() if _is_attention(m)}
    modules = [sys.modules[name] for name in sorted(names)]
    inner = sys.modules[type(_inner(model)).__module__]
    wanted = ("create_attention_mask", "scaled_dot_product_attention")
    if inner not in modules or not all(hasattr(m, n) for m in modules for n in wanted):
        return []
    return modules


def _is_attention(module: Any) -> bool:
    return "rope" in module and "q_proj" in module


def _no_mask(h: Any, cache: Any = None, window_size: int | None = None, **_: Any) -> _Window:
    return _Window(window_size)


def _attend_within(boundaries: Boundaries, attend: Any) -> Any:
    """Return an attention function that computes each node of the row with those above it."""

    def within(
        queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, **kw: Any
    ) -> Any:
        assert isinstance(mask, _Window)
        parts = []
        for node in boundaries.nodes or []:
            spans = [*node.above, (node.start, node.end)]
            k = mx.concatenate([keys[:, :, a:b] for a, b in spans], axis=2)
            v = mx.concatenate([values[:, :, a:b] for a, b in spans], axis=2)
            seen = _seen(node.end - node.start, node.position, mask.size)
            q = queries[:, :, node.start : node.end]
            parts.append(attend(q, k, v, cache=None, scale=scale, mask=seen, **kw))
        return mx.concatenate(parts, axis=2)

    return within


def _seen(length: int, position: int, window: int | None) -> Any:
    """Return the mask of `length` tokens that begin at `position`, over all tokens up to them."""
    from mlx_lm.models.base import create_causal_mask

    if window is None or position + length <= window:
        return "causal"  # aligned at the end: the last query sees every key
    return create_causal_mask(length, offset=position, window_size=window)


def _cut_positions(model: Any, boundaries: Boundaries) -> bool:
    """Let positions restart at each sequence of a row; False where the rotary embedding is one
    whose angles depend on more than the position.
    """
    ropes = [m["rope"] for _, m in model.named_modules() if _is_attention(m)]
    if not ropes or any(type(rope).__name__ not in ROPES for rope in ropes):
        return False
    for rope in ropes:
        _swap(rope, _rope_within(type(rope), boundaries))
    return True


def _rope_within(kind: Any, boundaries: Boundaries) -> Any:
    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if boundaries.nodes is None:
            return kind.__call__(self, x, *args, **kwargs)
        parts = [
            kind.__call__(self, x[..., node.start : node.end, :], offset=node.position)
            for node in boundaries.nodes
        ]
        return mx.concatenate(parts, axis=-2)

    return call


def _select(model: Any, boundaries: Boundaries) -> None:
    """Let only the chosen positions of the decoder's output go on to the head."""
    inner = _inner(model)
    kind = type(inner)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = kind.__call__(self, *args, **kwargs)
        return out if boundaries.keep is None else out[:, boundaries.keep]

    _swap(inner, call)


def _checkpoint(layer: Any) -> None:
    """Keep only the layer's input for the backward pass, and compute it again there."""
    kind = type(layer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        def run(parameters: Any, x: Any) -> Any:
            self.update(parameters)
            return kind.__call__(self, x, *args[1:], **kwargs)

        return mx.checkpoint(run)(self.trainable_parameters(), args[0])

    _swap(layer, call)


def _swap(module: Any, call: Any) -> None:
    """Give one module another __call__, which Python looks up on its class."""
    kind = type(module)
    module.__class__ = type(
        kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__}
    )


# --- peft's names


def _peft_path(path: str) -> str:
    """Return transformers' path of a layer: multimodal models nest the language model otherwise."""
    inside = "language_model.model."
    return f"model.language_model.{path.removeprefix(inside)}" if path.startswith(inside) else path


def _peft_targets(targets: list[str]) -> list[str] | str:
    """Return target_modules: layer names, or an expression that leaves a vision tower alone."""
    leaves = sorted({path.rsplit(".", 1)[-1] for path in targets})
    if any(path.startswith("language_model.") for path in targets):
        return rf"model\.language_model\..*\.({'|'.join(leaves)})"
    return leaves


def adapter_arrays(model: MlxModel) -> dict[str, mx.array]:
    """Return the adapter under peft's names: lora_A (r, inputs) and lora_B (outputs, r)."""
    modules, arrays = dict(model.model.named_modules()), {}
    for path in model.targets:
        name = f"base_model.model.{_peft_path(path)}"
        arrays[f"{name}.lora_A.weight"] = mx.contiguous(modules[path].lora_a.T)
        arrays[f"{name}.lora_B.weight"] = mx.contiguous(modules[path].lora_b.T)
    return arrays


def load_adapter(model: MlxModel, folder: Path) -> None:
    """Give the model the adapter in `folder`, of whichever engine; FastFTError where it does not
    fit, with every difference.
    """
    found = mx.load(str(folder / "adapter_model.safetensors"))
    expected = {name: array.shape for name, array in adapter_arrays(model).items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not of this model" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise FastFTError(
            f"the adapter {folder} does not fit: {len(problems)} problems - "
            f"{'; '.join(problems[:5])}"
        )
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if (config["r"], config["lora_alpha"]) != (model.lora.r, model.lora.alpha):
        raise FastFTError(
            f"the adapter {folder} has r {config['r']} and alpha {config['lora_alpha']}, not "
            f"{model.lora.r} and {model.lora.alpha}."
        )
    modules = dict(model.model.named_modules())
    for path in model.targets:
        name = f"base_model.model.{_peft_path(path)}"
        modules[path].lora_a = mx.contiguous(found[f"{name}.lora_A.weight"].T.astype(mx.float32))
        modules[path].lora_b = mx.contiguous(found[f"{name}.lora_B.weight"].T.astype(mx.float32))
    mx.eval(model.model.parameters())
