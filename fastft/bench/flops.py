"""How much arithmetic a LoRA step needs at least, from the model's shape: the numerator of "share
of the ceiling".

Multiply and add count as two. A frozen weight is multiplied twice a token (output, and the input's
gradient: no gradient of its own), that is 4 FLOPs a parameter; a LoRA weight three times, 6.
Attention, causal, forward 2 L^2 q a layer (scores and mix, half of the square each), backward
twice that. Recomputation (gradient checkpointing), padding and a beginning that another sequence
of the step has are not needed work and do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastft.planning.shape import ModelShape


def step_flops(
    shape: ModelShape, parts: Sequence[tuple[int, int]], supervised: int, lora_parameters: int
) -> float:
    """Return the FLOPs of one optimizer step over sequences with the `parts` (tokens, those of
    them that another sequence begins with), `supervised` of which carry loss.

    The head is only needed where there is a loss. `lora_parameters` are those that every token
    meets.
    """
    tokens = sum(length - shared for length, shared in parts)
    head = shape.hidden * shape.vocab
    body = 4.0 * (shape.matmul_parameters - head) * tokens + 4.0 * head * supervised
    pairs = sum(length**2 - shared**2 for length, shared in parts)
    attention = 6.0 * pairs * shape.query_size * shape.layers
    return body + attention + 6.0 * lora_parameters * tokens
