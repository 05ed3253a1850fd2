"""When to evaluate, save and stop: decided after each step, from the config and the run's own history."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastft import checkpoint
from fastft.config import RunConfig
from fastft.progress import Reporter


class Steering(TrainerCallback):
    """Sets Trainer's flags at the end of each step.

    The history of held-out losses is read from log.jsonl on a resume, so early stopping and the best
    checkpoint survive a kill without any state of their own.
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
    ) -> None:
        self.trainer, self.settings, self.history = trainer, config.train, history
        self.stop_after, self.started, self.folder, self.report = stop_after, started, folder, report
        self.total_steps = total_steps
        self.steps_now = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Decide on stopping, evaluating and saving."""
        self.steps_now += 1
        last = state.global_step >= self.total_steps
        reason = self._reason_to_pause()
        if reason and not last:
            self.report.note(reason)
            control.should_training_stop = control.should_save = True
        if self.trainer.held_out is not None and (last or state.global_step % self.settings.eval_steps == 0):
            control.should_evaluate = True
        control.should_save = control.should_save or last
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Keep the best checkpoint, stop where nothing gets better; runs before Trainer looks at should_save."""
        losses = [record["eval_loss"] for record in self.history if "eval_loss" in record]
        best_at = losses.index(min(losses))
        if best_at == len(losses) - 1:
            control.should_save = True
        patience = self.settings.early_stopping_patience
        if patience is not None and len(losses) - 1 - best_at >= patience:
            self.report.note(f"no better held-out loss in {patience} evaluations; stopping early")
            self.trainer.stopped_early = True
            control.should_training_stop = control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete what is neither new nor best, only now that a newer checkpoint is whole."""
        evaluations = [(r["eval_loss"], -r["step"]) for r in self.history if "eval_loss" in r]
        best = {-min(evaluations)[1]} if evaluations else set()
        checkpoint.prune(self.folder, self.settings.save_total_limit, best)

    def _reason_to_pause(self) -> str | None:
        if self.trainer.stopped_by_signal:
            return "interrupted; saving"
        if self.stop_after is not None and self.steps_now >= self.stop_after:
            return f"--stop-after {self.stop_after}: saving"
        minutes = self.settings.max_minutes
        if minutes is not None and time.monotonic() - self.started >= 60 * minutes:
            return f"train.max_minutes {minutes:g}: saving"
        return None
