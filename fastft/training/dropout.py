"""LoRA dropout that belongs to the sequence: the same mask in whatever row and process it is.

torch draws a mask for a whole row, in the order of the calls, so the mask of a sequence depends on
what shares its row: on the token budget, on retries after an out-of-memory, on the number of
processes. Here each (seed, step, sequence, layer) has a generator of its own:

    row        a0 a1 a2 b0 b1 c0 c1 c2 c3
    sequence   7        2     4             its place in the step, as the step was drawn
    mask       G(seed, step, 7, layer), G(seed, step, 2, layer), G(seed, step, 4, layer)

A recomputation for gradient checkpointing draws the same mask again. CPU and GPU generators
differ, as they do in torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

Spans = Sequence[tuple[int, int, int, int]]
"""(row, start, tokens, place in the step) of each sequence of a micro-batch."""

_WORD = 2**64 - 1


class _Masks:
    """Draws the masks of one optimizer step."""

    def __init__(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step
        self.spans: Spans = ()
        self.generators: dict[torch.device, torch.Generator] = {}

    def drop(self, layer: torch.nn.Dropout, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return `x` (B, T, H) with a share p of its elements zeroed, the others times 1/(1 - p).

        What is not shaped like the micro-batch (an expert's tokens) gets torch's own dropout.
        """
        if not layer.training or layer.p == 0.0:
            return x
        rows = max((row for row, *_ in self.spans), default=0) + 1
        tokens = max((start + length for _, start, length, _ in self.spans), default=0)
        if not self.spans or x.dim() != 3 or x.shape[0] != rows or x.shape[1] < tokens:
            return F.dropout(x, layer.p, training=True)
        generator = self.generators.setdefault(x.device, torch.Generator(x.device))
        # Where no sequence lies (padding, a row's tail) nothing is dropped: it carries no loss.
        mask = torch.ones_like(x)
        for row, start, length, place in self.spans:
            generator.manual_seed(mixed(self.seed, self.step, place, number))
            part = mask[row, start : start + length]
            part.copy_(torch.empty_like(part).bernoulli_(1 - layer.p, generator=generator))
        return x * mask.div_(1 - layer.p)


@contextlib.contextmanager
def dropout_by_sequence(model: Any, seed: int, step: int) -> Iterator[Callable[[Spans], None]]:
    """Inside, the dropout layers of `model` draw by sequence; yields what is told the spans of
    each micro-batch before its forward pass.
    """
    masks = _Masks(seed, step)
    layers = [m for m in model.modules() if type(m) is torch.nn.Dropout and m.p > 0]
    for number, layer in enumerate(layers):
        layer.forward = partial(masks.drop, layer, number)  # type: ignore[method-assign]
    try:
        yield partial(setattr, masks, "spans")
    finally:
        for layer in layers:
            del layer.forward


def mixed(*numbers: int) -> int:
    """Return a 63-bit seed of several integers, whose every bit depends on every one of them.

    splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1
