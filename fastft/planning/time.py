"""Seconds of a training step: matrix products, memory traffic and calls. The weakest part of a
plan.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel

from fastft.config import RunConfig
from fastft.hardware import Hardware
from fastft.planning.memory import Situation, layer_bytes_per_token
from fastft.planning.shape import ModelShape

GPU_EFFICIENCY = {"cuda": 0.40, "mps": 0.30}
"""Share of the card's matmul rate that a LoRA step reaches: assumed, as nothing was measured on
one yet.
"""
CPU_MATMUL_SHARE = 0.40
"""Share of the matmul ceiling that a CPU's matrix products reach, LoRA's narrow ones and
attention's blocks included.
"""
CPU_TILED_SHARE = 0.46
"""The same where fastft's own products compute (fused layers in bfloat16, with AVX512-BF16)."""
CPU_FLOAT32 = 0.45
"""float32's rate over bfloat16's on a CPU that multiplies bfloat16 natively (AVX512)."""
CPU_TRAFFIC = 0.75e9
"""Bytes of saved activations and logits that a core handles in a second, all element-wise work and
copies included.
"""
CPU_LOGIT_BYTES = {"fused": 8, "chunked": 16, "full": 26}
"""Work of a logit, counted as traffic: fastft's loss makes one pass, transformers' several over
float32 copies.
"""
CPU_LAYER_SECONDS = 0.003
"""Python and torch's dispatch for one layer, forward and backward, whatever its size."""
CPU_NF4_SECONDS = 4.5e-9
"""bitsandbytes unpacks a weight in each pass."""

COUNTED_FILE = 256 * 2**20
"""Bytes of the largest data file whose lines are counted: a plan answers in under a second."""


class StepTime(BaseModel):
    """What a step costs. Times are None where the machine's speed is not tabled."""

    tokens: int
    """Tokens without padding."""
    flops: float
    seconds: float | None
    tokens_per_sec: float | None
    basis: str


def step_time(
    shape: ModelShape, s: Situation, hardware: Hardware, *, sequences: int, mean_length: float
) -> StepTime:
    """Return the time of an optimizer step over `sequences` of `mean_length` tokens.

    On a GPU: FLOPs over an assumed share of the card's rate, and quantised weights dequantised
    through memory once a pass and micro-batch. On a CPU: FLOPs over a share of the ceiling, plus
    the traffic of what is not a matrix product, plus a fixed time a layer and micro-batch; the
    three constants are measured (docs/plan.md).
    """
    tokens = sequences * mean_length
    flops = step_flops(shape, s, tokens=tokens, mean_length=mean_length)
    if hardware.flops is None or s.kernels == "mlx":  # whose speed nobody of us measured
        return StepTime(
            tokens=int(tokens),
            flops=flops,
            seconds=None,
            tokens_per_sec=None,
            basis="speed not tabled",
        )
    micro_batches = max(1.0, tokens / max(s.tokens, 1))
    if hardware.kind == "cpu":
        seconds, basis = _cpu_seconds(shape, s, hardware, flops, tokens, micro_batches)
    else:
        seconds, basis = _gpu_seconds(shape, s, hardware, flops, micro_batches)
    return StepTime(
        tokens=int(tokens),
        flops=flops,
        seconds=seconds,
        tokens_per_sec=tokens / seconds,
        basis=basis,
    )


def step_flops(shape: ModelShape, s: Situation, *, tokens: float, mean_length: float) -> float:
    """Return the FLOPs of `tokens` in sequences of `mean_length`.

    2 a parameter and token forward, 2 for the input gradients, 2 again where layers are recomputed
    (frozen weights need no weight gradients); LoRA the same and 2 for its weights; attention 2 x 2
    x T/2 x Q a layer and token, times the same passes plus one.
    """
    passes = _passes(s)
    attention = 2 * 2 * (mean_length / 2) * shape.query_size * shape.layers * (passes + 1)
    lora = 0 if s.full_finetuning else 2 * (passes + 1) * shape.lora_parameters(*s.lora)
    return tokens * (2 * passes * shape.matmul_parameters + lora + attention)


def _passes(s: Situation) -> int:
    return 2 + (s.checkpointing != "off") + s.full_finetuning


def _cpu_seconds(
    shape: ModelShape,
    s: Situation,
    hardware: Hardware,
    flops: float,
    tokens: float,
    micro_batches: float,
) -> tuple[float, str]:
    assert hardware.flops
    again = _passes(s) / 2
    saved = shape.layers * sum(
        layer_bytes_per_token(shape, replace(s, checkpointing="off")).values()
    )
    logits = CPU_LOGIT_BYTES[s.loss] * shape.vocab
    traffic = tokens * (saved * again + logits) / (CPU_TRAFFIC * hardware.cpu_cores)
    rate = hardware.flops * (CPU_FLOAT32 if hardware.bf16 and s.compute_bytes == 4 else 1)
    tiled = (
        s.kernels == "fused"
        and hardware.bf16
        and s.compute_bytes == 2
        and (s.quantization == "none" or s.multiplies_nf4)
    )
    share = CPU_TILED_SHARE if tiled else CPU_MATMUL_SHARE
    products = flops / (rate * share)
    calls = micro_batches * shape.layers * CPU_LAYER_SECONDS * again
    if s.quantization == "nf4" and not tiled:
        linear = sum(w.parameters for w in shape.of("linear", "expert"))
        calls += micro_batches * _passes(s) * linear * CPU_NF4_SECONDS / hardware.cpu_cores
    basis = (
        f"matrix products {products:.2f} s at {share:.0%} of {rate / 1e12:.2g} TFLOP/s, "
        "copies and element-wise "
        f"work {traffic:.2f} s, calls {calls:.2f} s"
    )
    return products + traffic + calls, basis


def _gpu_seconds(
    shape: ModelShape, s: Situation, hardware: Hardware, flops: float, micro_batches: float
) -> tuple[float, str]:
    assert hardware.flops
    efficiency = GPU_EFFICIENCY[hardware.kind]
    seconds = flops / (hardware.flops * efficiency)
    basis = (
        f"{efficiency:.0%} of the {_flops_text(hardware)} matmul ceiling (assumed, not measured)"
    )
    if s.quantization == "nf4" and hardware.bandwidth:
        packed = sum(w.parameters for w in shape.of("linear", "expert"))
        # Read 0.5 bytes, write 2, read 2 back, at half the bandwidth that the datasheet gives.
        seconds += micro_batches * _passes(s) * packed * 4.5 / (0.5 * hardware.bandwidth)
        basis += ", plus dequantisation through memory"
    return seconds, basis


def _flops_text(hardware: Hardware) -> str:
    return f"{hardware.flops / 1e12:,.0f} TFLOP/s" if hardware.flops else "unknown"


def steps_of_run(
    config: RunConfig, seconds_per_step: float | None = None
) -> tuple[int | None, str]:
    """Return the optimizer steps of a run and where the number comes from; None where only reading
    the data can tell.
    """
    steps, basis = _steps_of_data(config)
    minutes = config.train.max_minutes
    if minutes is not None and seconds_per_step:
        allowed = math.ceil(60 * minutes / seconds_per_step)
        if steps is None or allowed < steps:
            return allowed, "train.max_minutes"
    return steps, basis


def _steps_of_data(config: RunConfig) -> tuple[int | None, str]:
    """From train.max_steps, or the lines of a local JSON Lines file; plain text is joined and cut,
    so its rows say nothing.
    """
    train, source = config.train, Path(config.data.source).expanduser()
    if train.max_steps is not None:
        return train.max_steps, "train.max_steps"
    if (
        source.suffix not in {".jsonl", ".ndjson"}
        or not source.is_file()
        or source.stat().st_size > COUNTED_FILE
    ):
        return None, ""
    with source.open("rb") as file:
        first = file.readline(2**20)
        rows = bool(first.strip()) + sum(1 for line in file if line.strip())
    if (
        not rows
        or config.data.format == "text"
        or (config.data.format == "auto" and _is_plain_text(first))
    ):
        return None, ""
    held_out = 0.0 if config.data.eval_source else config.data.eval_fraction
    an_epoch = math.ceil(rows * (1 - held_out) / train.effective_batch_size)
    return max(
        1, math.ceil(train.epochs * an_epoch)
    ), f"{rows:,} rows in {source.name}, before any is left out"


def _is_plain_text(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and "text" in row
