"""What a backward pass needs, kept as what it was computed from where that is cheap to repeat.

An RMSNorm keeps its input for its own backward pass. Whatever reads its output could keep that as
well; it keeps nothing, and the output is computed again (one pass over memory, the same kernel, the
same numbers). For a Llama that is a sixth of what a layer keeps, with norms of q and k a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastft.kernels import native


@dataclass(frozen=True)
class Normed:
    """The output of an RMSNorm, by its input."""

    x: torch.Tensor  # (rows, n), detached
    weight: torch.Tensor  # (n,), frozen
    eps: float
    plus_one: bool

    def tensor(self) -> torch.Tensor:
        """Return the output (rows, n)."""
        return native.rms_forward(self.x, self.weight, self.eps, self.plus_one)[0]


Kept = torch.Tensor | Normed | None


def keep(ctx: Any, *values: Kept) -> None:
    """Save `values` for the backward pass of an autograd function; once a pass."""
    ctx.norms = [
        (value.weight, value.eps, value.plus_one) if isinstance(value, Normed) else None
        for value in values
    ]
    ctx.save_for_backward(*(v.x if isinstance(v, Normed) else v for v in values))


def kept(ctx: Any) -> list[Any]:
    """Return what `keep` was given, as tensors."""
    return [
        value if norm is None else Normed(value, *norm).tensor()
        for value, norm in zip(ctx.saved_tensors, ctx.norms, strict=True)
    ]
