"""python -m tests.twin.gradients CARD QUANTIZATIONS CHECKPOINT...: rows against their sequences.

Prints one JSON object a checkpoint and quantization: 1 - cosine of the gradients (row, padded batch,
sequences joined), the losses of three steps, how the family computes on the card, and where CPU and
GPU tensors met. CARD "none": the losses of the same steps in float32 by plain transformers and peft.
"""

from __future__ import annotations

import contextlib
import json
import sys
import zlib
from typing import Any

from tests.twin.twin import install

LENGTHS = (34, 18, 7)
LEARNING_RATE = 1e-2


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


def draw_adapter(model: Any) -> None:
    """Give LoRA weights that are the same in every process, by their names; neither side is zero,
    so both get a gradient.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = zlib.crc32(name[name.index(".layers.") :].encode())
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_((noise * 0.05).to(parameter.device, parameter.dtype))


def round_to_nf4(base: Any) -> None:
    """Give the linear layers of a float32 model the values that QLoRA computes with."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    head = base.get_output_embeddings()
    for module in base.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed, state = quantize_4bit(
                module.weight.data.half(), quant_type="nf4", compress_statistics=True
            )
            module.weight.data = dequantize_4bit(packed, state).float()


def load(
    checkpoint: str, quantization: str, *, change: Any = None, **model: str
) -> tuple[Any, Any, Any, int]:
    """Return (stepper, base model, choices, trainable parameters), as `fastft train` loads them;
    `change` changes the base before LoRA is attached.
    """
    from fastft.config import make_config
    from fastft.engines import loading
    from fastft.hardware import probe
    from fastft.kernels.varlen import rope_changes_at
    from fastft.training.step import Stepper, StepPolicy
    from tests.twin.card import STATE

    settings = {"name": checkpoint, "quantization": quantization, "max_seq_length": 256, **model}
    config = make_config(
        {
            "project": "t",
            "model": settings,
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
    if change is not None:
        change(base)
    model, trainable = loading.attach_lora(
        base, engine, config.lora, seed=1, gradient_checkpointing=False, train_token_ids=[]
    )
    draw_adapter(model)
    model.train()
    policy = StepPolicy(
        10_000, engine.accept_rows(model), 0, rope_changes_at=rope_changes_at(model)
    )
    stepper = Stepper(model, engine, policy, device=model.device, on_note=print)
    return stepper, base, choices, trainable


def three_steps(stepper: Any, context: Any, scale: float | None = None) -> list[float]:
    """Return the losses of three steps with AdamW, all sequences in each."""
    import torch

    trained = [p for p in stepper.model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0), []
    stepper.scale, factor = scale, scale or 1.0
    for _ in range(3):
        loss = stepper.gradient(
            stepper.model, segments(), lambda loss: (loss * factor).backward(), context
        )
        losses.append(loss)
        for parameter in trained:
            parameter.grad.div_(factor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def measure(checkpoint: str, quantization: str) -> dict[str, Any]:
    """Load, attach LoRA, compare a row with its sequences, and take three steps."""
    import torch

    from fastft.training.exactness import FLOAT16_SCALE, check_rows
    from tests.twin.card import STATE

    stepper, base, choices, trainable = load(checkpoint, quantization)
    dtype = getattr(torch, choices["dtype"].value)
    calls_before = _loss_calls()

    def context() -> Any:
        return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)

    found = check_rows(stepper, segments(), context)
    assert found is not None
    scale = FLOAT16_SCALE if dtype == torch.float16 else None
    return {
        "losses": three_steps(stepper, context, scale),
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


def reference(checkpoint: str, quantization: str) -> dict[str, Any]:
    """The losses of the same three steps in float32, without Unsloth."""
    change = round_to_nf4 if quantization == "nf4" else None
    stepper, *_ = load(checkpoint, "none", change=change, engine="stock", dtype="float32")
    losses = three_steps(stepper, contextlib.nullcontext)
    return {"checkpoint": checkpoint, "quantization": quantization, "losses": losses}


def main(card: str, quantizations: str, *checkpoints: str) -> None:
    if card != "none":
        install(card)
    for checkpoint in checkpoints:
        for quantization in quantizations.split(","):
            found = (reference if card == "none" else measure)(checkpoint, quantization)
            print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
