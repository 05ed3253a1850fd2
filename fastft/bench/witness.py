"""What happened in a run, seen from outside the arm: tokens through the embedding, seconds, the
gradient, the change.

An arm cannot misreport these. The hook counts what goes into the model, the callback reads the
clock and the gradient; both cost the same in every arm. The loss is the one that the arm's trainer
logs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from fastft.bench.profiling import StepProfile
from fastft.bench.record import Step
from fastft.bench.workload import plain_name
from fastft.training import ranks


class Witness(TrainerCallback):
    """Give it to the arm's Trainer as a callback; `watch` the model before.

    `profiled`: the step (the first is 1) that runs under torch's profiler and ends in `profile`.
    Its time is longer for it, so a run with it is no measurement.
    """

    def __init__(
        self, gradient_path: Path | None, never: np.ndarray, profiled: int | None = None
    ) -> None:
        self.gradient_path = gradient_path
        self.profiled = profiled
        self.profile: dict[str, Any] | None = None
        self._profiler = StepProfile()
        self._padding = torch.from_numpy(never)
        self.steps: list[Step] = []
        self.first_step_seconds: float | None = None
        self.trainable_parameters = 0
        self._counts: list[torch.Tensor] = []
        self._sizes = 0
        self._started = 0.0
        self._pending: Step | None = None
        self.cpu_started = 0.0

    def watch(self, model: Any, start: Path) -> None:
        """Count the trainable parameters, put the starting adapter in, and hook the embedding."""
        self.model = model
        trainable = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.trainable_parameters = sum(p.numel() for p in trainable.values())
        adapters = {plain_name(name): p for name, p in model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, value in load_file(start).items():
                if name in adapters and adapters[name].shape == value.shape:
                    adapters[name].copy_(value)
        self._before = {name: p.detach().float().cpu().clone() for name, p in adapters.items()}
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def adapter_change(self) -> float:
        """Return the L2 norm of what training changed in the adapter since `watch`."""
        now = {plain_name(name): p for name, p in self.model.named_parameters() if "lora_" in name}
        squares = [
            float(((now[name].detach().float().cpu() - old) ** 2).sum())
            for name, old in self._before.items()
        ]
        return sum(squares) ** 0.5

    def _count(self, module: Any, args: tuple[Any, ...]) -> None:
        ids = args[0]
        self._padding = self._padding.to(ids.device)
        # read at the step's end: no GPU waits
        self._counts.append(torch.isin(ids, self._padding, invert=True).sum())
        self._sizes += ids.numel()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._counts, self._sizes = [], 0
        self._started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the first step's gradient (after clipping, which does not turn it)."""
        if self.gradient_path is not None and not self.steps:
            found = {
                plain_name(name): p.grad.detach().float().cpu().contiguous()
                for name, p in self.model.named_parameters()
                if p.requires_grad and p.grad is not None
            }
            save_file(found or {"none": torch.zeros(1)}, self.gradient_path)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock when the device has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if len(self.steps) + 1 == self.profiled:
            self.profile = self._profiler.end()
        # Of all processes, where an arm trains in several.
        tokens, size = ranks.total(sum(int(count) for count in self._counts), self._sizes)
        self.steps.append(
            Step(
                seconds=now - self._started,
                loss=None,
                grad_norm=None,
                tokens=int(tokens),
                padded_tokens=int(size),
            )
        )
        if self.first_step_seconds is None:
            self.first_step_seconds = now - self._started
        if len(self.steps) + 1 == self.profiled:
            self._profiler.begin()
        self._counts, self._sizes, self._started = [], 0, now

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Take the loss and the gradient norm of the step just done, as the trainer logs them."""
        if logs and "loss" in logs and self.steps:
            norm = logs.get("grad_norm")
            self.steps[-1].loss = float(logs["loss"])
            self.steps[-1].grad_norm = float(norm) if norm is not None else None
