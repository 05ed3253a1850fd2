"""Seconds of a training step, from FLOPs, memory traffic and an efficiency: the weakest part of a plan."""

from __future__ import annotations

from pydantic import BaseModel

from fastft.hardware import Hardware
from fastft.plan.memory import Situation
from fastft.plan.shape import ModelShape

EFFICIENCY = {"cuda": 0.40, "cpu": 0.33, "mps": 0.30}
"""Share of the matmul ceiling that a LoRA step reaches. CPU: measured, a 135M Llama at 419 tokens/s of 1,300;
GPU and Metal: assumed, as nothing was measured on one yet."""


class StepTime(BaseModel):
    """What a step costs. Times are None where the machine's speed is not tabled."""

    tokens: int
    """Tokens without padding."""
    flops: float
    seconds: float | None
    tokens_per_sec: float | None
    basis: str


def step_time(shape: ModelShape, s: Situation, hardware: Hardware, *, sequences: int, mean_length: float) -> StepTime:
    """Return the time of an optimizer step over `sequences` of `mean_length` tokens.

    FLOPs: 2 a parameter and token forward, 2 for the input gradients, 2 again where layers are recomputed (frozen
    weights need no weight gradients); attention 2 x 2 x T/2 x Q a layer and token, times the same passes plus one.
    Quantised weights are dequantised through memory once a pass and micro-batch.
    """
    tokens = sequences * mean_length
    passes = 2 + (s.checkpointing != "off") + s.full_finetuning
    attention = 2 * 2 * (mean_length / 2) * shape.query_size * shape.layers * (passes + 1)
    flops = tokens * (2 * passes * shape.matmul_parameters + attention)
    efficiency = EFFICIENCY[hardware.kind]
    measured = "measured on a 135M Llama" if hardware.kind == "cpu" else "assumed, not measured"
    basis = f"{efficiency:.0%} of the {_flops_text(hardware)} matmul ceiling ({measured})"
    if hardware.flops is None:
        return StepTime(tokens=int(tokens), flops=flops, seconds=None, tokens_per_sec=None, basis="speed not tabled")
    seconds = flops / (hardware.flops * efficiency)
    if s.quantization == "nf4" and hardware.bandwidth:
        micro_batches = max(1.0, tokens / max(s.tokens, 1))
        packed = sum(w.parameters for w in shape.of("linear", "expert"))
        # Read 0.5 bytes, write 2, read 2 back, at half the bandwidth that the datasheet gives.
        seconds += micro_batches * passes * packed * 4.5 / (0.5 * hardware.bandwidth)
        basis += ", plus dequantisation through memory"
    return StepTime(tokens=int(tokens), flops=flops, seconds=seconds, tokens_per_sec=tokens / seconds, basis=basis)


def _flops_text(hardware: Hardware) -> str:
    return f"{hardware.flops / 1e12:.2g} TFLOP/s" if hardware.flops else "unknown"
