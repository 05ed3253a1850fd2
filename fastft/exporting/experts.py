"""The experts of a mixture: one parameter of three dimensions for all of them in transformers, one
matrix an expert in most published checkpoints, and one tensor of three dimensions for each of
gate, up and down in GGUF.

`rows` and `columns` are the two layouts that transformers has (`Family.experts`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PARTS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
"""Matrix of an expert -> the parameter of the module that holds it."""


def single(parameter: torch.Tensor, part: str, layout: str) -> torch.Tensor:
    """Return one matrix of every expert, as a linear layer has it.

    `parameter`: gate_up_proj or down_proj, (experts, 2 x width, hidden) and (experts, hidden,
    width) for "rows"; for "columns" the last two are exchanged, and gate and up alternate. A bias
    has two dimensions, (experts, outputs). Returns (experts, outputs, inputs), or (experts,
    outputs).
    """
    if layout == "columns" and parameter.ndim == 3:
        parameter = parameter.transpose(1, 2)
    if part == "down_proj":
        return parameter
    first = part == "gate_proj"
    if layout == "columns":
        return parameter[:, 0 if first else 1 :: 2]
    half = parameter.shape[1] // 2
    return parameter[:, :half] if first else parameter[:, half:]


def single_shape(shape: tuple[int, ...], part: str, layout: str) -> tuple[int, ...]:
    """Return the shape of `single` of a parameter of `shape`."""
    if len(shape) == 3 and layout == "columns":
        shape = (shape[0], shape[2], shape[1])
    return shape if part == "down_proj" else (shape[0], shape[1] // 2, *shape[2:])
