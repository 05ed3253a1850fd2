"""When to evaluate, save and stop: decided after each step, from the config and the run's own
history.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastft.config import RunConfig
from fastft.data.batches import row_sizes, segments_of
from fastft.errors import CouldNotFinishError
from fastft.hardware import probe
from fastft.planning import ModelShape, Situation
from fastft.planning.calibrate import calibrate
from fastft.progress import Reporter
from fastft.runs import checkpoint
from fastft.runs.folder import best_step, is_best_so_far, out_of_patience
from fastft.runs.mirror import Mirror
from fastft.training import ranks
from fastft.training.loop import peak_memory_bytes


class Steering(TrainerCallback):
    """Sets Trainer's flags at the end of each step.

    The history of held-out losses is read from log.jsonl on a resume, so early stopping and the
    best checkpoint survive a kill without any state of their own.
    """

    def __init__(
        self,
        trainer: Any,
        config: RunConfig,
        history: list[dict[str, Any]],
        stop_after: int | None,
        started: float,
        folder: Path,
        report: Reporter,
        total_steps: int,
        mirror: Mirror | None = None,
    ) -> None:
        self.trainer, self.settings, self.history = trainer, config.train, history
        self.stop_after, self.started, self.folder, self.report = (
            stop_after,
            started,
            folder,
            report,
        )
        self.total_steps, self.mirror = total_steps, mirror
        self.steps_now = 0
        self.said_how_long = False
        trainer.asks_to_stop = self._asks_to_stop

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before a gradient that is not finite reaches the weights (in float16 the loss
        scaler skips such a step).
        """
        if not args.fp16:
            refuse_what_is_not_finite(self.trainer.model, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Decide on stopping, evaluating and saving."""
        self.steps_now += 1
        last = state.global_step >= self.total_steps
        reason = self._reason_to_pause()
        if reason and not last:
            self.report.note(reason)
            control.should_training_stop = control.should_save = True
        if self.trainer.held_out is not None and (
            last or state.global_step % self.settings.eval_steps == 0
        ):
            control.should_evaluate = True
        control.should_save = control.should_save or last
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Keep the best checkpoint, stop where nothing gets better; runs before Trainer looks at
        should_save (a checkpoint that was due is written before the evaluation, and not again).
        """
        if is_best_so_far(self.history):
            control.should_save = True
        patience = self.settings.early_stopping_patience
        if out_of_patience(self.history, patience):
            what = self.settings.best_by.replace("_", " ")
            self.report.note(f"no better held-out {what} in {patience} evaluations; stopping early")
            self.trainer.stopped_early = True
            control.should_training_stop = control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune old checkpoints (keep recent and best) once a newer one is complete; then update
        the mirror. Only the first process does it.
        """
        if not ranks.first():
            return
        best = {step} if (step := best_step(self.history)) is not None else set()
        copying = self.mirror.copying if self.mirror else set()
        checkpoint.prune(self.folder, self.settings.save_total_limit, best | copying)
        if self.mirror:
            self.mirror.request(self.settings.save_total_limit, best)
        seconds = self.trainer.progress.saving_seconds
        if seconds and not self.said_how_long:
            self.said_how_long = True
            size = sum(
                p.stat().st_size
                for p in (self.folder / f"checkpoint-{state.global_step}").rglob("*")
            )
            self.report.note(
                f"saving a checkpoint takes {seconds[0]:.2f} s ({size / 2**20:,.1f} MiB)"
            )

    def _reason_to_pause(self) -> str | None:
        # Several processes stop after the same step: by what was sent with its gradient.
        alone = ranks.world().size == 1
        interrupted, late = self._asks_to_stop() if alone else self.trainer.agreed
        if interrupted:
            self.trainer.stopped_by_signal = True
            return "interrupted; saving"
        if self.stop_after is not None and self.steps_now >= self.stop_after:
            return f"--stop-after {self.stop_after}: saving"
        if late:
            saving = self._saving_seconds()
            took = f" (the slowest so far took {saving:.1f} s)" if saving else ""
            return f"train.max_minutes {self.settings.max_minutes:g}: saving{took}"
        return None

    def _asks_to_stop(self) -> list[bool]:
        """Whether this process was told to stop, and whether its time is up."""
        minutes = self.settings.max_minutes
        needed = time.monotonic() - self.started + self._saving_seconds()
        return [
            bool(self.trainer.stopped_by_signal),
            minutes is not None and needed >= 60 * minutes,
        ]

    def _saving_seconds(self) -> float:
        """The slowest checkpoint so far: the next must be in time too."""
        return max(self.trainer.progress.saving_seconds, default=0.0)


def refuse_what_is_not_finite(model: Any, step: int) -> None:
    """Raise CouldNotFinishError where the gradient on `model` holds infinity or NaN."""
    import torch

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if gradients and not math.isfinite(torch.nn.utils.get_total_norm(gradients).item()):
        raise CouldNotFinishError(
            f"the gradient is not finite at step {step}; nothing of this step was kept. Try a "
            "smaller train.learning_rate, a longer warm-up, or model.dtype: float32."
        )


class MemoryCheck(TrainerCallback):
    """Compares the plan with the memory of the first two steps, and stops a run whose longest
    batch will not fit.

    `advice` is None, or why the run was stopped and what to change; the state is saved then.
    """

    STEPS = 2

    def __init__(
        self,
        trainer: Any,
        shape: ModelShape,
        situation: Situation,
        *,
        adjustable: bool,
        report: Reporter,
        record: Callable[..., None],
        limit_bytes: Callable[[], int],
    ) -> None:
        """`limit_bytes` says how much memory this process may have in all, when it is asked."""
        self.trainer, self.shape, self.situation = trainer, shape, situation
        self.limit_bytes = limit_bytes
        self.adjustable, self.report, self.record = adjustable, report, record
        self.steps_now = 0
        self.largest, self.longest = 0, 0
        self.sampler: _PeakSampler | None = None
        self.advice: str | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the memory from the first step on, and note the largest micro-batch."""
        if self.steps_now >= self.STEPS:
            return
        if self.sampler is None:
            self.sampler = _PeakSampler()
            self.sampler.start()
        steps, policy = self.trainer.steps, self.trainer.policy
        step = segments_of(steps[state.global_step % len(steps)])
        segments = ranks.share(step, trie=self.trainer.split_as_trie)
        sizes = row_sizes(
            segments,
            policy.micro_batch_tokens,
            policy.rows,
            policy.rope_changes_at,
            self.trainer.stepper.stretch,
        )
        self.largest, self.longest = self._fullest([(self.largest, self.longest), *sizes])

    def _fullest(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """The largest row that keeps its activations, which takes more than one that is recomputed;
        the largest of all where there is no such row.
        """
        most = self.trainer.policy.recompute_above
        kept = [size for size in sizes if most is not None and 0 < size[0] <= most]
        return max(kept or sizes)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After the second step: say predicted and measured, and whether what is to come fits."""
        self.steps_now += 1
        if self.steps_now != self.STEPS or self.sampler is None:
            return control
        if self.largest:
            self._compare(state)
        asked = [advice for advice in ranks.everybodys(self.advice) if advice]
        if asked:
            self.advice = asked[0]
            control.should_training_stop = control.should_save = True
        return control

    def _compare(self, state: Any) -> None:
        """Compare plan and measurement; lowers the budget, or sets `advice` where that is not
        enough.
        """
        assert self.sampler is not None
        measured = self.sampler.stop()
        policy, longest = self.trainer.policy, self._longest_sequence()
        situation = replace(self.situation, longest=longest, recompute_above=0)
        most, kept = policy.recompute_above or 0, self._keeps(self.largest)
        seen = replace(situation, checkpointing="off", longest=self.longest)
        judge = partial(
            calibrate,
            self.shape,
            seen if kept else situation,
            tokens=self.largest,
            longest=self.longest,
            measured_bytes=measured,
            limit_bytes=self.limit_bytes(),
        )
        to_come = min(self._largest_to_come(), most) if kept else self._largest_to_come()
        found, shortest = judge(largest_tokens=max(self.largest, to_come)), 1 if kept else longest
        if kept and longest > most:
            recomputed = judge(largest_tokens=longest, to_come=situation)
            if not recomputed.fits:  # a sequence is never cut, so no budget helps
                found, shortest = recomputed, longest
        self.record(memory=asdict(found) | {"fits": found.fits})
        if found.fits:
            self.report.note(found.message)
        elif self.adjustable and found.largest_fitting_tokens >= shortest:
            policy.micro_batch_tokens = found.largest_fitting_tokens
            if kept:
                policy.recompute_above = found.largest_fitting_tokens
            self.report.warn(
                f"{found.too_much}; micro-batches have at most "
                f"{found.largest_fitting_tokens:,} tokens from here on (the effective batch stays)"
            )
        elif state.global_step < state.max_steps:
            self.advice = found.message

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the watch where the run ended before its second step."""
        self.stop()

    def stop(self) -> None:
        """End the watch; also after an error, of which transformers tells no callback."""
        if self.sampler is not None:
            self.sampler.stop()

    def _keeps(self, tokens: int) -> bool:
        """Whether a row of so many tokens keeps its activations where longer ones do not."""
        most = self.trainer.policy.recompute_above
        return most is not None and tokens <= most

    def _longest_sequence(self) -> int:
        return int(self.trainer.steps.dataset.lengths.max())

    def _largest_to_come(self) -> int:
        """The most tokens that any micro-batch of this run can have, however its sequences are
        shuffled.
        """
        lengths = sorted(self.trainer.steps.dataset.lengths, reverse=True)
        whole = int(sum(lengths[: self.trainer.steps.effective_batch_size]))
        return max(min(self.trainer.policy.micro_batch_tokens, whole), self._longest_sequence())


class _PeakSampler(threading.Thread):
    """The largest resident memory since it was started (reserved VRAM on a GPU), in bytes.

    On a GPU torch counts; what loading, checking and evaluating had reserved is given back first.
    On a CPU the kernel's own high-water mark also holds what loading and the held-out loss took
    before, so the present value is read every few milliseconds; where the high-water mark grew
    meanwhile, that is the exact peak.
    """

    INTERVAL = 0.005

    def __init__(self) -> None:
        super().__init__(daemon=True)
        import psutil
        import torch

        self.process, self.done, self.peak = psutil.Process(), threading.Event(), 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.before = peak_memory_bytes()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self.done.wait(self.INTERVAL):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def stop(self) -> int:
        """End the thread; returns the peak."""
        import torch

        self.done.set()
        self.join()
        if torch.cuda.is_available():
            return torch.cuda.max_memory_reserved()
        after = peak_memory_bytes()
        return after if after > self.before else max(self.peak, self.process.memory_info().rss)


def free_for_this_process() -> int:
    """Return the bytes that this process may have in all: what it has, and what is free (its part
    of that, where several share a machine's RAM).
    """
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free = probe().ram_free_bytes // ranks.world().local_size
    return free + psutil.Process().memory_info().rss
