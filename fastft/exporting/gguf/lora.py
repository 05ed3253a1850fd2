"""Export the adapter alone, for llama.cpp's --lora: small, and switched on and off over one base
file.

The scale is folded into B and `adapter.lora.alpha` is 0, which llama.cpp takes as "no scale": so
rsLoRA, alpha_pattern and rank_pattern are exact, which one alpha for the whole file could not
hold.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.exporting.gguf.architectures import Model, describe
from fastft.exporting.gguf.writer import make_output, opened
from fastft.exporting.place import check_disk
from fastft.exporting.weights import Change, Weights
from fastft.files import ours


def export_gguf_lora(
    base: Path, adapter: Path, out: Path, *, name: str | None = None
) -> dict[str, Any]:
    """Write `adapter` as one GGUF file (float32) and return its record, as `export_gguf` describes
    it.

    `out`: the file, or a folder for NAME.lora.gguf. Raises FastFTError for what the format cannot
    hold (DoRA, modules_to_save, trained token rows or biases, embeddings), naming the tensors, and
    for a file of that name that fastft did not write; Unsupported for a base that the streaming
    writer does not know.
    """
    weights = Weights(base, adapter)
    check_holdable(weights)
    model = describe(weights)
    parts = _parts(weights, model)
    out = Path(out)
    if out.suffix != ".gguf" or out.is_dir():
        safe = re.sub(r"[^\w.+-]+", "-", name or Path(adapter).resolve().name)
        out = out / f"{safe}.lora.gguf"
    ours.refuse_foreign([out])
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    fields: dict[str, tuple[Any, str]] = {
        "general.type": ("adapter", "STRING"),
        "general.name": (name or Path(adapter).resolve().name, "STRING"),
        ours.GGUF_KEY: (ours.NAME, "STRING"),
        "adapter.type": ("lora", "STRING"),
        "adapter.lora.alpha": (0.0, "FLOAT32"),
        "general.file_type": (0, "UINT32"),
    }
    output = make_output(out, "f32", _shaped(model, shapes), fields, dict.fromkeys(shapes, "f32"))
    check_disk(out, output.size)
    with opened([output]):
        for offset, tensor in zip(output.offsets, parts.values(), strict=True):
            output.write(offset, tensor.contiguous().numpy())
    return {
        "path": str(out),
        "kind": "gguf-lora",
        "bytes": output.size,
        "quantization": "F32",
        "architecture": model.arch,
        "writer": "streaming",
        "notes": list(model.notes),
        "tensors": {part: {"shape": list(shape), "type": "f32"} for part, shape in shapes.items()},
    }


def check_holdable(weights: Weights) -> None:
    """Raise FastFTError, naming the tensors, for what a LoRA GGUF cannot hold."""
    kinds: dict[str, list[str]] = {}
    for target, change in weights.changed.items():
        for what, present in {
            "trained experts": change.experts,
            # a plain product in llama.cpp's graph, to which no adapter is applied
            "LoRA on Gemma 4's per_layer_model_projection": target.endswith(
                "per_layer_model_projection.weight"
            ),
            "DoRA": change.magnitude,
            "whole tensors (modules_to_save, resized embeddings, biases)": change.replace,
            "trained token rows": change.row_values,
            "lora_bias": change.add,
            "LoRA on embeddings": change.embedding,
            "LoRA on a tied head": target.endswith("lm_head.weight") and weights.base_is_tied,
        }.items():
            if present:
                kinds.setdefault(what, []).append(target)
    if kinds:
        lines = "".join(
            f"\n  - {what}: {', '.join(names[:3])} ({len(names)})" for what, names in kinds.items()
        )
        raise FastFTError(
            "a LoRA file for llama.cpp holds updates of linear layers only; "
            f"{weights.adapter} also has:{lines}"
            "\nExport the merged model instead: --to gguf:q4_k_m (or gguf:q8_0), which holds "
            "all of it."
        )


def _parts(weights: Weights, model: Model) -> dict[str, Any]:
    """Return every lora_a (r, in) and lora_b (out, r), in float32, permuted as the base's rows
    are.
    """
    found: dict[str, Any] = {}
    for tensor in model.tensors:
        change = weights.changed.get(tensor.source) or Change()
        if not change.lora:
            continue
        a, b = (weights.lora_part(part) for part in change.lora)
        b = b * change.scale
        if tensor.heads:
            b = b.reshape(tensor.heads, 2, tensor.step // 2, -1).swapaxes(1, 2).reshape(b.shape)
        found[f"{tensor.name}.lora_a"] = a
        found[f"{tensor.name}.lora_b"] = b
    if not found:
        raise FastFTError(f"{weights.adapter} changes nothing.")
    return found


def _shaped(model: Model, shapes: dict[str, tuple[int, ...]]) -> Model:
    from fastft.exporting.gguf.architectures import Tensor

    return Model(
        model.arch,
        [Tensor(name, shape) for name, shape in shapes.items()],
        model.metadata,
        model.notes,
    )
