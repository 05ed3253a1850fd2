"""python -m tests.twin.gradients CARD CHECKPOINT QUANTIZATION...: a packed row against its sequences.

Prints one JSON object a quantization: 1 - cosine of the gradients (row, padded batch, sequences
joined), how the family computes on the card, and where CPU and GPU tensors met.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.twin.twin import install

LENGTHS = (61, 33, 17, 80, 24)


def segments(lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    """Random sequences whose last three quarters are trained on."""
    import numpy as np

    from fastft.data.batches import Segment

    numbers, found = np.random.default_rng(0), []
    for length in lengths:
        ids = numbers.integers(5, 250, length)
        labels = ids.copy()
        labels[: 1 + length // 4] = -100
        found.append(Segment(ids, labels))
    return found


def stir(model: Any) -> None:
    """Move LoRA away from its start, where B is zero and A gets no gradient."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(noise.to(parameter.device, parameter.dtype))


def measure(checkpoint: str, quantization: str) -> dict[str, Any]:
    """Load, attach LoRA and compare; as `fastft train` does it."""
    import torch

    from fastft.config import make_config
    from fastft.engines import loading
    from fastft.hardware import probe
    from fastft.training.exactness import check_rows
    from fastft.training.step import Stepper, StepPolicy
    from tests.twin.card import STATE

    config = make_config(
        {
            "project": "t",
            "model": {"name": checkpoint, "quantization": quantization, "max_seq_length": 256},
            "data": {"source": "none"},
            "lora": {"r": 4, "dropout": 0.0},
        },
        where="here",
    )
    hardware = probe()
    choices = loading.choose_loading(config, hardware)
    STATE.mixed.clear()
    base, _, engine = loading.load_for_training(
        config.model, hardware, gradient_checkpointing=False, choices=choices
    )
    model, trainable = loading.attach_lora(
        base, engine, config.lora, seed=1, gradient_checkpointing=False, train_token_ids=[]
    )
    stir(model)
    dtype = getattr(torch, choices["dtype"].value)
    calls_before = _loss_calls()
    stepper = Stepper(
        model, engine, StepPolicy(10_000, engine.accept_rows(model), 0), device=model.device,
        on_note=print,
    )  # fmt: skip
    found = check_rows(
        stepper, segments(), lambda: torch.autocast("cuda", dtype, enabled=dtype != torch.float32)
    )
    assert found is not None
    return {
        "checkpoint": checkpoint,
        "quantization": quantization,
        "trainable": trainable,
        "error": found.error,
        "rounding": found.rounding,
        "leak": found.leak,
        "loss_error": found.loss_error,
        "exact": found.exact,
        "reason": found.reason,
        "dtype": choices["dtype"].value,
        "attention": base.config.get_text_config()._attn_implementation,
        "fused_loss_calls": _loss_calls() - calls_before,
        "nf4_calls": sum(STATE.bitsandbytes.values()),
        "mixed": list(STATE.mixed),
    }


def _loss_calls() -> int:
    from unsloth_zoo.fused_losses.fused_linear import CALLS

    return CALLS["ce"]


def main(card: str, checkpoint: str, *quantizations: str) -> None:
    install(card)
    for quantization in quantizations:
        print("RESULT " + json.dumps(measure(checkpoint, quantization)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
