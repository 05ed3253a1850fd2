"""The training loop of the MLX engine: the same steps, schedule, order and checkpoints as
`loop.py`, computed by MLX.

transformers' Trainer drives torch models only, so the loop stands here as a whole: it is short,
since everything around it (when to evaluate, save and stop; the log; what lies on disk) is shared.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from transformers import TrainerControl, TrainerState, get_scheduler

from fastft.config import TrainConfig
from fastft.data import trie
from fastft.data.batches import (
    IGNORE,
    Order,
    Segment,
    StepBatches,
    groups,
    segments_of,
    supervised_tokens,
)
from fastft.engines.mlx import MlxModel, Node, load_adapter
from fastft.errors import CouldNotFinishError
from fastft.hardware import peak_resident_bytes
from fastft.runs import checkpoint
from fastft.training.loop import Progress
from fastft.training.step import StepPolicy


class MlxTrainer:
    """What the session and its callbacks need of a trainer, for an MLX model."""

    def __init__(
        self,
        model: MlxModel,
        settings: TrainConfig,
        *,
        train_dataset: Any,
        eval_dataset: Any | None,
        policy: StepPolicy,
        total_steps: int,
        warmup_steps: int,
        checkpoints: Path,
        on_log: Callable[[dict[str, Any]], None],
        save_extra: Callable[[Path], None],
        order: Order = "shuffled",
        judge: Callable[[], dict[str, Any]] = dict,
        trackers: list[Any] | None = None,
        arguments: Any = None,
    ) -> None:
        """`trackers`: transformers' callbacks of train.report_to, `arguments` what they read."""
        self.model, self.settings, self.policy = model, settings, policy
        self.steps = StepBatches(
            train_dataset, settings.effective_batch_size, settings.seed, order=order
        )
        self.epoch = 0
        self.held_out, self.judge = eval_dataset, judge
        self.on_log, self.save_extra, self.checkpoints = on_log, save_extra, checkpoints
        self.progress, self.args = Progress(), arguments
        self.state, self.control = TrainerState(max_steps=total_steps), TrainerControl()
        self.callbacks: list[Any] = list(trackers or [])
        self.asks_to_stop: Callable[[], list[bool]] = list
        self.agreed: list[bool] = []
        self.stopped_by_signal = self.stopped_early = False
        self.optimizer = AdamW(
            settings.learning_rate,
            betas=[0.9, 0.999],
            eps=1e-8,
            weight_decay=settings.weight_decay,
            bias_correction=True,  # as torch has it; MLX's default is without
        )
        self.optimizer.init(model.model.trainable_parameters())
        self.rates = _rates(settings, warmup_steps, total_steps)
        self.loss_and_gradient = nn.value_and_grad(model.model, model.loss_sum)

    def add_callback(self, callback: Any) -> None:
        """Have `callback` (transformers' interface) called."""
        self.callbacks.append(callback)

    # --- the loop

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run the steps that are left."""
        if resume_from_checkpoint is not None:
            self._resume(Path(resume_from_checkpoint))
        self.progress.started = time.monotonic()
        self._call("on_train_begin")
        while self.state.global_step < self.state.max_steps:
            step = self.state.global_step
            epoch, at = divmod(step, len(self.steps))
            if epoch != self.epoch:
                self.steps.set_epoch(epoch)
                self.epoch = epoch
            self.control = TrainerControl()  # what is asked for is asked for after each step
            self._call("on_step_begin")
            self._step(segments_of(self.steps[at]))
            self._call("on_step_end")
            if self.control.should_save or self.state.global_step % self.settings.save_steps == 0:
                self._save()
            if self.control.should_evaluate:
                self.control.should_save = False
                self.evaluate()
                if self.control.should_save:  # the evaluation asks for it
                    self._save()
            if self.control.should_training_stop:
                break
        self._call("on_train_end")

    def _call(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            told = getattr(callback, event)(self.args, self.state, self.control, **more)
            self.control = told or self.control

    def _step(self, segments: list[Segment]) -> None:
        """One optimizer step; nothing of it is kept where loss or gradient is not finite."""
        started = time.perf_counter()
        self.model.model.train()
        # Dropout's masks follow from seed and step alone, so a resumed step draws the same.
        mx.random.seed((self.settings.seed << 32) + self.state.global_step)
        loss, gradient, unique = gradient_of(
            self.model, self.loss_and_gradient, segments, self.policy
        )
        arrays = [array.astype(mx.float32) for _, array in tree_flatten(gradient)]
        norm = math.sqrt(sum(mx.square(array).sum().item() for array in arrays))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise CouldNotFinishError(
                f"the loss is {loss} and the gradient's norm {norm} at step "
                f"{self.state.global_step + 1}; nothing of this step was kept. Try a smaller "
                "train.learning_rate, a longer warm-up, or model.dtype: float32."
            )
        most = self.settings.max_grad_norm
        if most and norm > most:  # torch.nn.utils.clip_grad_norm_'s factor
            gradient = tree_map(lambda array: array * (most / (norm + 1e-6)), gradient)
        rate = self.rates[self.state.global_step]
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.model.model, gradient)
        mx.eval(self.model.model.trainable_parameters(), self.optimizer.state)
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / len(self.steps)
        seconds, tokens = time.perf_counter() - started, sum(map(len, segments))
        self.progress.tokens += tokens
        self.progress.trained_tokens += supervised_tokens(segments)
        self._log(
            {
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": tokens,
                "tokens_per_sec": tokens / seconds,
                "unique_tokens": unique,
                "seconds": seconds,
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )

    # --- evaluation, log

    def evaluate(self) -> None:
        """Log the mean loss of the held-out data, with what `judge` says of the answers."""
        if self.held_out is None:
            return
        metrics = {"eval_loss": self.mean_loss(self.held_out), **self.judge()}
        self._log(metrics)
        self._call("on_evaluate", metrics=metrics)

    def mean_loss(self, dataset: Any) -> float:
        """Return the mean loss per supervised token over `dataset`."""
        training = self.model.model.training
        self.model.model.eval()
        total, supervised = 0.0, 0
        for first in range(0, len(dataset), 32):
            some = [dataset[i] for i in range(first, min(first + 32, len(dataset)))]
            segments = segments_of(some)
            for ids, pairs, nodes in rows_of(segments, self.policy):
                with self.model.row(nodes):
                    total += self.model.loss_sum(ids, *pairs).item()
            supervised += supervised_tokens(segments)
        self.model.model.train(training)
        return total / max(supervised, 1)

    def _log(self, record: dict[str, Any]) -> None:
        record = {"step": self.state.global_step, **record}
        self.on_log(record)
        evaluated = "eval_loss" in record
        if evaluated or self.state.global_step % self.settings.logging_steps == 0:
            prefix = "eval_" if evaluated else ""
            numbers = {
                prefix + name.removeprefix("eval_"): value
                for name, value in record.items()
                if isinstance(value, float)
            }
            self._call("on_log", logs=numbers)

    # --- checkpoints

    def take(self, folder: Path) -> None:
        """Give the model the adapter of the checkpoint `folder`."""
        load_adapter(self.model, folder)

    def _save(self) -> None:
        """Write checkpoint-N, whole or not at all, once a step. The files are called as the other
        engines'.
        """
        if self.state.global_step != self._saved_step:
            self._write_checkpoint()
        self._call("on_save")

    _saved_step: int | None = None

    def _write_checkpoint(self) -> None:
        started, step = time.perf_counter(), self.state.global_step
        with checkpoint.sealed(self.checkpoints / f"checkpoint-{step}") as folder:
            self.model.save_pretrained(str(folder))
            state = {name: _torch(array) for name, array in tree_flatten(self.optimizer.state)}
            torch.save(state, folder / "optimizer.pt")
            torch.save({"rates": self.rates}, folder / "scheduler.pt")
            torch.save({"seed": self.settings.seed, "step": step}, folder / "rng_state.pth")
            self.state.save_to_json(str(folder / "trainer_state.json"))
            self.save_extra(folder)
        self._saved_step = step
        self.progress.saving_seconds.append(time.perf_counter() - started)

    def _resume(self, folder: Path) -> None:
        """Take everything from the checkpoint `folder`."""
        load_adapter(self.model, folder)
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        self.optimizer.state = tree_unflatten([(name, _mlx(t)) for name, t in state.items()])
        values = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        self.state.global_step = values["global_step"]
        mx.eval(self.optimizer.state)


Row = tuple[mx.array, tuple[mx.array, ...], list[Node]]
"""(ids (1, T), (states, targets, counts) (P,) each, the nodes that the row consists of)."""


def rows_of(segments: list[Segment], policy: StepPolicy) -> Iterator[Row]:
    """Yield the rows of a step: shared beginnings once (trie), sequences side by side (varlen), or
    one sequence at a time.
    """
    if policy.rows in ("trie", "varlen"):
        chosen = groups(segments, policy.micro_batch_tokens, policy.rows)
    else:
        chosen = [[segment] for segment in segments if segment.supervised]
    for group in chosen:
        never = max(map(len, group)) + 1  # so that each sequence is a node of its own
        row = trie.row_of(
            [segment.input_ids for segment in group],
            [segment.labels for segment in group],
            ignore=IGNORE,
            shortest=trie.SHORTEST if policy.rows == "trie" else never,
        )
        pairs = (row.states, row.targets, row.counts)
        ids = mx.array(row.input_ids[None].astype(np.int32))
        yield ids, tuple(mx.array(p.astype(np.int32)) for p in pairs), nodes_of(row.trie)


def gradient_of(
    model: MlxModel, loss_and_gradient: Any, segments: list[Segment], policy: StepPolicy
) -> tuple[float, Any, int]:
    """Return (mean loss over the step's supervised tokens, its gradient, computed tokens)."""
    supervised, total, unique, gradient = supervised_tokens(segments), 0.0, 0, None
    for ids, pairs, nodes in rows_of(segments, policy):
        with model.row(nodes):
            loss, found = loss_and_gradient(ids, *pairs)
            found = tree_map(lambda array: array / supervised, found)
            gradient = found if gradient is None else tree_map(mx.add, gradient, found)
            mx.eval(loss, gradient)  # inside: MLX computes late, and the row is cut here
        total += loss.item()
        unique += ids.size
    return total / supervised, gradient, unique


def row_error(model: MlxModel, segments: list[Segment], policy: StepPolicy) -> float | None:
    """Return how far the gradient of rows is from that of the sequences alone, relative to it;
    None where no two sequences come into one row. Dropout is off meanwhile.
    """
    if sum(1 for _ in rows_of(segments, policy)) == sum(s.supervised > 0 for s in segments):
        return None
    model.model.eval()
    compute = nn.value_and_grad(model.model, model.loss_sum)
    alone = StepPolicy(policy.micro_batch_tokens, "padded", policy.pad_token_id)
    (_, rows, _), (_, one, _) = (
        gradient_of(model, compute, segments, chosen) for chosen in (policy, alone)
    )
    pairs = list(zip(tree_flatten(rows), tree_flatten(one), strict=True))
    apart = sum(mx.square(a - b).sum().item() for (_, a), (_, b) in pairs)
    whole = sum(mx.square(b).sum().item() for _, (_, b) in pairs)
    return math.sqrt(apart / whole) if whole else math.inf


def nodes_of(tree: trie.Trie) -> list[Node]:
    """Return the nodes of a trie as the engine takes them."""
    spans = [(int(a), int(a + n)) for a, n in zip(tree.start, tree.length, strict=True)]
    return [
        Node(*spans[at], int(tree.position[at]), tuple(spans[n] for n in tree.path(at)[:-1]))
        for at in range(len(spans))
    ]


def peak_memory_bytes() -> int:
    """Return the peak of MLX's own allocations on Metal, of resident memory on a CPU."""
    return mx.get_peak_memory() if sys.platform == "darwin" else peak_resident_bytes()


def _rates(settings: TrainConfig, warmup_steps: int, total_steps: int) -> list[float]:
    """Return transformers' learning rate of each step, and one more for after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    schedule = get_scheduler(settings.scheduler, optimizer, warmup_steps, total_steps)
    rates = []
    for _ in range(total_steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def _torch(array: mx.array) -> torch.Tensor:
    values = np.array(array)
    if array.dtype == mx.uint64:  # the optimizer's count of steps: numpy has two such types
        values = values.astype(np.uint64)
    return torch.from_numpy(values)


def _mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.numpy())
