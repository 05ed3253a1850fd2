"""The training loop: transformers' Trainer, with one optimizer step = `effective_batch_size`
sequences.

Import this module after the engine: Unsloth must come before transformers. What Trainer keeps
doing: optimizer, schedule, gradient clipping, mixed precision, RNG and optimizer state. What
differs: its "batch" is a whole optimizer step, which `training_step` cuts into micro-batches;
checkpoints are sealed; a step whose loss is not finite, or that does not fit, is stopped before it
can touch the weights.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fastft.data.batches import Order, Segment, StepBatches, segments_of, supervised_tokens
from fastft.engines.base import Engine
from fastft.errors import CouldNotFinishError
from fastft.files import disk_error
from fastft.hardware import peak_resident_bytes
from fastft.kernels.fused import FusedLayers
from fastft.runs import checkpoint
from fastft.training import ranks
from fastft.training.sharded import is_sharded, passes_needed, put_down
from fastft.training.step import Filler, Stepper, StepPolicy


@dataclass
class Progress:
    """What the loop knows at any moment; callbacks read it, `training_step` writes it."""

    tokens: int = 0  # without padding, since this process began
    trained_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    # loss, tokens, seconds of the step just done
    step: dict[str, Any] = field(default_factory=dict)
    saving_seconds: list[float] = field(default_factory=list)


class StepTrainer(Trainer):
    """Trainer whose dataset is one of optimizer steps. See the module's docstring."""

    model: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        engine: Engine,
        train_dataset: Any,
        eval_dataset: Any | None,
        effective_batch_size: int,
        policy: StepPolicy,
        on_log: Callable[[dict[str, Any]], None],
        on_note: Callable[[str], None],
        save_extra: Callable[[Path], None],
        report_every: int = 1,
        fused: FusedLayers | None = None,
        order: Order = "shuffled",
        judge: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.steps = StepBatches(train_dataset, effective_batch_size, args.seed, order=order)
        super().__init__(model=model, args=args, train_dataset=self.steps, data_collator=_the_step)
        self.remove_callback(PrinterCallback)
        self.add_callback(_SetEpoch(self.steps))
        self.engine = engine
        self.held_out, self.judge = eval_dataset, judge
        self.policy = policy
        self.on_log = on_log
        self.save_extra = save_extra
        self.report_every = report_every
        self.stepper = Stepper(
            model,
            engine,
            policy,
            device=self.args.device,
            on_note=on_note,
            fused=fused,
            scale=self.accelerator.scaler,
        )
        if policy.prefetch:
            self.stepper.meanwhile = self._make_next_ready
        # All split a step alike: by what is shared only where every process makes trie rows.
        self.split_as_trie = all(rows == "trie" for rows in ranks.everybodys(policy.rows))
        self.progress = Progress()
        # torch.compile, which Unsloth uses on a GPU, cannot look into generators: there dropout is
        # by sequence only where several processes need it to be.
        self._keys_dropout = self.args.device.type == "cpu" or ranks.world().size > 1
        self.asks_to_stop: Callable[[], list[bool]] = list
        """What this process asks of all (Steering sets it); `agreed` is what any of them asked."""
        self.agreed: list[bool] = []
        self.stopped_by_signal = False
        self.stopped_early = False

    # --- one step

    def get_train_dataloader(self) -> DataLoader:
        """Return the steps in order, one a time; the order of the sequences is StepBatches'."""
        return DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=_the_step)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[Any], None]:
        """Return the next step's samples; the tokens are counted in `training_step`."""
        return [step for _, step in zip(range(num_batches), epoch_iterator, strict=False)], None

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Accumulate the gradient of one whole step; returns its loss, the mean over its
        supervised tokens.
        """
        started = time.perf_counter()
        segments = segments_of(inputs)
        model.train()
        spread = is_sharded(self.model)
        with ranks.putting_layers_together() if spread else contextlib.nullcontext():
            mine = self.stepper.gradient(
                model,
                ranks.share(segments, trie=self.split_as_trie),
                self.accelerator.backward,
                self.compute_loss_context_manager,
                supervised=supervised_tokens(segments),
                drawn=(self.args.seed, self.state.global_step) if self._keys_dropout else None,
                filler=self._filler(segments),
            )
        loss, self.agreed, unique = ranks.add_up(
            self.model.parameters(),
            mine,
            self.asks_to_stop(),
            tokens=self.stepper.unique_tokens,
        )
        if not math.isfinite(loss):
            raise CouldNotFinishError(self._not_finite(loss))
        seconds, tokens = time.perf_counter() - started, sum(len(segment) for segment in segments)
        self.progress.step = {
            "loss": loss,
            "tokens": tokens,
            "unique_tokens": unique,
            "seconds": seconds,
        }
        self.progress.tokens += tokens
        self.progress.trained_tokens += supervised_tokens(segments)
        return torch.tensor(loss, device=self.args.device)

    def _make_next_ready(self) -> None:
        """Make the rows of the epoch's next step, while the GPU computes this one."""
        done = self.state.global_step + 1
        if done < self.state.max_steps and done % len(self.steps):
            segments = segments_of(self.steps[done % len(self.steps)])
            self.stepper.make_ready(ranks.share(segments, trie=self.split_as_trie))

    def _filler(self, segments: list[Segment]) -> Filler | None:
        """The passes that a sharded base needs of every process; None for a base that is whole."""
        useful = [segment for segment in segments if segment.supervised]
        if not is_sharded(self.model) or not useful:
            return None
        policy = self.policy
        passes = passes_needed(
            segments, policy.micro_batch_tokens, policy.rows, policy.rope_changes_at
        )
        return Filler(passes, min(useful, key=len))

    def _not_finite(self, loss: float) -> str:
        step, rate = self.state.global_step + 1, self._get_learning_rate()
        return (
            f"the loss is {loss} at step {step} (learning rate {rate:.2g}); nothing of this "
            "step was kept. Try a smaller "
            "train.learning_rate, a longer warm-up, train.max_grad_norm: 0.3, or "
            "model.dtype: float32 where float16 was used. "
            "`fastft data` shows whether the data is sound."
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers' estimate would count the list of samples."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        pass

    # --- evaluation and logs

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return {"eval_loss": mean loss per supervised token of the held-out data} and log it,
        with what `judge` says of the answers.
        """
        if self.held_out is None:
            return {}
        if self.control.should_save:
            # First what was learnt: an evaluation may take long, and the machine may end in it.
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        # The first process may generate for many minutes: no time limit for the others' wait.
        judged = ranks.gather_when_ready(self.judge() if ranks.first() else None)[0]
        metrics = {"eval_loss": self.mean_loss(self.held_out), **judged}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def mean_loss(self, dataset: Any) -> float:
        """Return the mean loss per supervised token over `dataset`, in the training's precision;
        each process measures its part.
        """
        was_training = self.model.training
        self.model.eval()
        total, supervised = 0.0, 0.0
        # A sharded base needs all processes in each pass: each then measures everything.
        alone = is_sharded(self.model)
        world = ranks.World() if alone else ranks.world()
        for first in range(32 * world.rank, len(dataset), 32 * world.size):
            segments = segments_of(
                [dataset[i] for i in range(first, min(first + 32, len(dataset)))]
            )
            with self.autocast():
                total += self.stepper.loss(segments)
            supervised += supervised_tokens(segments)
        self.model.train(was_training)
        if alone:
            put_down(self.model)
        else:
            total, supervised = ranks.total(total, supervised)
        return total / max(supervised, 1)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the mixed precision that training uses (also before accelerate has wrapped the
        model).
        """
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return torch.autocast(self.args.device.type, dtype) if dtype else contextlib.nullcontext()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand every step to `on_log`, and every `report_every`-th on to the trackers."""
        if "train_runtime" in logs:
            return
        number, skipped = self.state.global_step, self.accelerator.optimizer_step_was_skipped
        if "eval_loss" in logs:
            record = {"step": number} | logs
            # Trackers take numbers; transformers shows a name with this prefix among evaluations.
            logs = {
                f"eval_{name.removeprefix('eval_')}": value
                for name, value in logs.items()
                if isinstance(value, float)
            }
        else:
            record = step_record(number, self.progress.step, logs, skipped=skipped)
            logs = logs | {
                "tokens_per_sec": record["tokens_per_sec"],
                "peak_memory_gib": record["peak_memory_bytes"] / 2**30,
            }
            if skipped and ranks.first():
                self.stepper.on_note(skipped_step(number))
        self.on_log(record)
        if "eval_loss" in logs or number % self.report_every == 0:
            super().log(logs, start_time)

    # --- checkpoints

    def take(self, folder: Path) -> None:
        """Give the model the adapter of the checkpoint `folder`."""
        self._load_from_checkpoint(str(folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write checkpoint-N under a temporary name, seal it, rename it; the first process does.

        Once a step: what an evaluation asks for may have been written before it.
        """
        step = self.state.global_step
        if not ranks.first() or step == self._saved_step:
            return
        started = time.perf_counter()
        root = Path(str(self.args.output_dir))
        aside = root / f".writing-{step}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            # Trainer writes to _get_output_dir()/checkpoint-N.
            self._aside = aside
            super()._save_checkpoint(model, trial)
            inner = aside / f"checkpoint-{step}"
            self.save_extra(inner)
            checkpoint.seal(inner, root / f"checkpoint-{step}")
            shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise disk_error(error, root) from error
        except RuntimeError as error:  # torch.save and safetensors wrap a full disk like this
            shutil.rmtree(aside, ignore_errors=True)
            if not any(
                word in str(error).lower() for word in ("write", "space", "inline_container")
            ):
                raise
            raise disk_error(OSError(None, str(error).splitlines()[0]), root) from error
        finally:
            self._aside = None
        self._saved_step = step
        self.progress.saving_seconds.append(time.perf_counter() - started)

    _aside: Path | None = None
    _saved_step: int | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)


class _SetEpoch(TrainerCallback):
    """Draw the epoch's order before its first step (also when a resume begins in the middle)."""

    def __init__(self, steps: StepBatches) -> None:
        self.steps = steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.set_epoch(int(state.epoch or 0))


def _the_step(steps: list[Any]) -> Any:
    """Collate function: the loader's "batch" is exactly one step."""
    (step,) = steps
    return step


def step_record(
    number: int, step: dict[str, Any], logs: dict[str, float], *, skipped: bool
) -> dict[str, Any]:
    """Return the line of log.jsonl for one optimizer step, from what the loop (`Progress.step`) and
    transformers (`logs`) know of it. `skipped`: its gradient overflowed in float16, which makes its
    norm infinity or NaN, and JSON has neither.
    """
    record = {
        "step": number,
        "loss": step["loss"],
        "lr": logs["learning_rate"],
        "grad_norm": None if skipped else logs.get("grad_norm"),
        "tokens": step["tokens"],
        "tokens_per_sec": step["tokens"] / step["seconds"],
    }
    if "unique_tokens" in step:
        record["unique_tokens"] = step["unique_tokens"]
    return record | {"seconds": step["seconds"], "peak_memory_bytes": peak_memory_bytes()}


def skipped_step(number: int) -> str:
    """Return what is said of a step that the loss scaler skipped."""
    return (
        f"step {number}: the gradient overflowed in float16, so the weights stay as they were and "
        "the loss scale is halved (usual in the first steps)"
    )


def peak_memory_bytes() -> int:
    """Return the peak of allocated VRAM, or of resident memory where there is no GPU, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def training_arguments(
    folder: Path,
    *,
    dtype: str,
    seed: int,
    learning_rate: float,
    scheduler: str,
    warmup_steps: int,
    weight_decay: float,
    max_grad_norm: float,
    optimizer: str,
    max_steps: int,
    epochs: float,
    save_steps: int,
    report_to: list[str],
    log_dir: Path,
    use_cpu: bool,
) -> TrainingArguments:
    """Return transformers' arguments for the loop; `max_steps` and `epochs` agree by
    construction.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_dir)
    arguments = TrainingArguments(
        output_dir=str(folder),
        # of steps: StepBatches holds effective_batch_size sequences in each
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=max_steps,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        optim=optimizer,
        seed=seed,
        data_seed=seed,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_steps,
        # when to evaluate is train.py's decision, which also marks the best checkpoint
        eval_strategy="no",
        report_to=report_to or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=use_cpu,
    )
    # One process computes on one card: with two visible, Trainer would wrap the model in
    # nn.DataParallel, which scatters the boundaries of padding-free rows over the cards.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
