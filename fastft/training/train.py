"""`fastft train`: from a config to a run folder with a trained adapter, through kills and restarts.

choose -> hold the run's lock -> tokenizer and data -> base model and LoRA -> before -> train ->
after -> final/
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.config import MOVES_THE_BASE, RunConfig
from fastft.engines import get_engine, loading
from fastft.engines.base import Engine
from fastft.errors import CouldNotFinishError, FastFTError, InterruptedRunError
from fastft.exporting.adapter import keep_initial, write_adapter
from fastft.hardware import Choice, Hardware, probe
from fastft.progress import Reporter
from fastft.runs import checkpoint
from fastft.runs.fingerprint import base_fingerprint, differences
from fastft.runs.folder import (
    INITIAL_ADAPTER,
    RunFolder,
    best_step,
    machine,
    now,
    out_of_patience,
    versions,
)
from fastft.runs.mirror import FLUSH_SECONDS, INTERRUPTED_FLUSH_SECONDS, Mirror

if TYPE_CHECKING:
    from fastft.data.batches import Rows
    from fastft.training.exactness import RowCheck
    from fastft.training.step import StepPolicy

FEW_STEPS = 20
"""Below so many a run mostly leaves the model as it was."""


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` ended."""

    run: str
    """The run's folder."""
    status: str
    """done, or paused (--stop-after, max_minutes): the same command goes on."""
    steps: int
    total_steps: int
    train_loss: float | None
    """Mean loss per trained token over the last tenth of the steps."""
    eval_loss_before: float | None
    eval_loss_after: float | None
    tokens_per_sec: float | None
    """Without padding, median over this call's steps."""
    seconds: float
    final: str | None
    """The adapter's folder, once the run is done."""


def train(
    config: RunConfig, *, stop_after: int | None = None, reporter: Reporter | None = None
) -> RunResult:
    """Train as `config` says, or go on where an earlier call of the same run stopped; returns how
    it ended.

    `stop_after` ends after so many more steps and leaves the schedule as it is. Raises FastFTError
    (input), CouldNotFinishError (out of memory, NaN, disk), InterruptedRunError (Ctrl-C, SIGTERM);
    state is saved.
    """
    started = time.monotonic()
    report = reporter or Reporter()
    if stop_after is not None and stop_after < 1:
        raise FastFTError(f"--stop-after is {stop_after}; it must be at least 1.")
    # Absolute, so that the run, its adapter and its certificates find their base from every folder.
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": loading.location(config.model.name)})
        }
    )
    _refuse_what_is_not_there(config)
    hardware = probe(config.output_dir)
    choices = loading.choose_loading(config, hardware)
    run = RunFolder(config.run_dir)
    with checkpoint.hold(run.path), _mirrored(config, run, report) as mirror:
        newest, warnings = checkpoint.newest_whole(run.checkpoints)
        for warning in [*warnings, *run.repair_state(newest)]:
            report.warn(warning)
        session = _Session(config, run, hardware, choices, report, stop_after, started, mirror)
        if not run.is_started():
            return session.start()
        session.moved = checkpoint.refuse_differences(run.read_config().model_dump(), config)
        return session.go_on(newest)


class _Session:
    """One call of `train` on one run: what `start` and `go_on` share."""

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        hardware: Hardware,
        choices: dict[str, Choice],
        report: Reporter,
        stop_after: int | None,
        started: float,
        mirror: Mirror | None,
    ) -> None:
        self.mirror = mirror
        self.moved: list[str] = []  # paths that are others than when the run was started
        self.config, self.run, self.hardware, self.choices, self.report = (
            config,
            run,
            hardware,
            choices,
            report,
        )
        self.stop_after, self.started = stop_after, started
        self.history: list[dict[str, Any]] = []
        self.initial: Path | None = (
            None  # the untrained adapter, where its init moved the base's weights
        )

    # --- the two ways in

    def start(self) -> RunResult:
        """A new run."""
        self._load_tokenizer()
        self._load_data()
        self._load_model()
        self.run.write_config(self.config)
        self.run.update_record(
            run_id=uuid.uuid4().hex, started=now(), base=self.base, machine=machine(), versions=versions(),
            hardware=_plain(asdict(self.hardware)), seed=self.config.train.seed,
            choices={k: {"value": c.value, "reason": c.reason} for k, c in self.choices.items()},
            patches=self.engine.patches(), trainable_parameters=self.trainable,
            dataset={"fingerprint": self.data.fingerprint, **self.data.report.model_dump(include=DATASET_KEYS)},
            template={"name": self.data.template.name, "why": self.data.template.why},
        )  # fmt: skip
        self._keep_samples()
        trainer = self._trainer()
        before = trainer.mean_loss(trainer.held_out) if trainer.held_out is not None else None
        self.run.update_record(eval_loss_before=before, samples_before=self._sample_answers())
        if before is not None:
            self.report.note(f"held-out loss before training: {before:.4f}")
        return self._run(trainer, resume_from=None)

    def go_on(self, newest: Path | None) -> RunResult:
        """A run that exists: finished, to be resumed from `newest`, or killed before its first
        checkpoint.
        """
        record = self.run.read_record()
        self._load_tokenizer()
        self._refuse_another_base(record)
        self._load_data()
        was = record.get("dataset", {}).get("fingerprint") or "unknown"
        if self.data.fingerprint != was:
            raise FastFTError(
                f"the data of the run in {self.run.path} has changed since it was started "
                f"(fingerprint {was[:12]}, now "
                f"{self.data.fingerprint[:12]}: content, tokenizer, template or data "
                "settings). Put it back to go on, or "
                "start a new run with another project name."
            )
        self.run.write_config(self.config)  # with what may change, and the paths of this machine
        at = checkpoint.step_of(newest) if newest else 0
        self.history = [entry for entry in self.run.read_log() if entry["step"] <= at]
        stopped_early = bool(record.get("stopped_early")) or out_of_patience(
            self.history, self.config.train.early_stopping_patience
        )
        trained = newest is not None and (at >= self._total_steps() or stopped_early)
        if trained and record.get("status") == "done":
            problem = checkpoint.what_is_wrong(
                self.run.final, required=("adapter_model.safetensors",)
            )
            if problem is None:
                self.report.note(
                    f"this run is finished ({at} steps); its adapter is in {self.run.final}"
                )
                return _result_of(self.run, "done")
            self.report.warn(
                f"final/ is damaged ({problem}); it is written again from the checkpoint of "
                f"step {at}"
            )
        self.run.cut_log(at)
        self._load_model()
        trainer = self._trainer()
        self.report.note(
            f"resuming after step {at}"
            if newest
            else "the run was stopped before its first checkpoint; starting over"
        )
        self._note_differences(record, at)
        if not self.run.samples.is_file():
            self._keep_samples()
        if record.get("versions") != versions():
            self.report.warn(
                "the run was started with other versions "
                f"({_changed(record.get('versions', {}), versions())}); losses may differ"
            )
            self.run.update_record(versions_on_resume=versions())
        if "samples_before" not in record:
            before = trainer.mean_loss(trainer.held_out) if trainer.held_out is not None else None
            self.run.update_record(eval_loss_before=before, samples_before=self._sample_answers())
        if trained:
            trainer._load_from_checkpoint(str(newest))
            trainer.state.global_step, trainer.stopped_early = at, stopped_early
            self._finish(trainer)
            return _result_of(self.run, "done", time.monotonic() - self.started)
        return self._run(trainer, resume_from=newest)

    # --- the parts

    def _load_tokenizer(self) -> None:
        """The tokenizer and which base this is, before anything that takes long."""
        self.engine: Engine = get_engine(self.choices["engine"].value)
        self.tokenizer = loading.load_tokenizer(self.config.model)
        self.base = base_fingerprint(self.config.model.name, self.config.model.revision)

    def _refuse_another_base(self, record: dict[str, Any]) -> None:
        """Raise FastFTError where the base is not the one that the run was started with."""
        name, was = self.config.model.name, record.get("base")
        moved = any(line.startswith("model.name") for line in self.moved)
        if was is None and moved:
            raise FastFTError(
                f"{'; '.join(self.moved)}, and this run was started by a version that did not "
                "record which base that was. "
                "Put the path back to go on."
            )
        found = differences(was, self.base) if was is not None else []
        if found:
            raise FastFTError(
                f"the base model {name} is not the one that the run in {self.run.path} was "
                "started with:\n"
                + "\n".join(f"  - {line}" for line in found)
                + "\nPut the old one back to go on (for a Hub id: set model.revision to its "
                "commit), or start a new run with "
                "another project name."
            )

    def _note_differences(self, record: dict[str, Any], at: int) -> None:
        """Write down in run.json what is another machine's: it can move the last digits, never the
        order of the data.
        """
        machines = [
            record.get("machine") or {},
            *(entry["machine"] for entry in record.get("resumed", [])),
        ]
        here, last = machine(), machines[-1]
        chosen = {k: f"{v['value']} -> {c.value}" for k, v in record.get("choices", {}).items()
                  if (c := self.choices.get(k)) is not None and c.value != v["value"]}  # fmt: skip
        if here == last and not self.moved and not chosen:
            return
        entry = {
            "after_step": at,
            "at": now(),
            "machine": here,
            "paths": self.moved,
            "choices": chosen,
        }
        self.run.update_record(resumed=[*record.get("resumed", []), entry])
        changed = [
            f"{key} {last.get(key)} -> {here[key]}" for key in here if here[key] != last.get(key)
        ]
        changed += [*self.moved, *(f"{key} {change}" for key, change in chosen.items())]
        self.report.note(
            f"going on elsewhere: {'; '.join(changed)}; the order of the data is the same"
        )

    def _load_data(self) -> None:
        """The data, before the weights: a fault in it is found in seconds."""
        config = self.config
        # After the engine: Unsloth must be imported before transformers, which the data layer
        # imports.
        from fastft.data import prepare

        self.data = prepare(
            config.data,
            self.tokenizer,
            max_seq_length=config.model.max_seq_length,
            seed=config.train.seed,
        )
        self.data.template.save(
            self.tokenizer
        )  # what was trained with is what every later program renders with
        self.report.data(self.data.report)
        if self.data.eval is None and (config.data.eval_source or config.data.eval_fraction > 0):
            self.report.warn(
                "nothing is held out (too few different rows for it): no held-out loss, no "
                "best checkpoint"
            )

    def _load_model(self) -> None:
        config = self.config
        checkpointing = self.choices["gradient_checkpointing"].value
        base, _, self.engine = loading.load_for_training(
            config.model, self.hardware, gradient_checkpointing=checkpointing, choices=self.choices
        )
        train_ids = loading.tokens_to_train(config.lora, self.tokenizer, self.data.template)
        self.model, self.trainable = loading.attach_lora(
            base,
            self.engine,
            config.lora,
            seed=config.train.seed,
            gradient_checkpointing=checkpointing,
            train_token_ids=train_ids,
        )
        if config.lora.init in MOVES_THE_BASE:
            self.initial = keep_initial(self.model, self.run.path / INITIAL_ADAPTER)
        self._choose_batching()
        for name, choice in self.choices.items():
            self.report.choice(name, choice)
        self.report.note(f"{self.trainable:,} trainable parameters")
        if self.config.train.max_steps is None and (steps := self._total_steps()) < FEW_STEPS:
            self.report.note(
                f"{steps} steps are few, the model will hardly change; a higher train.epochs "
                "makes more of them"
            )

    def _choose_batching(self) -> None:
        from fastft.training.exactness import choose_rows

        check = None if self.hardware.kind == "cpu" else self._check_rows
        self.rows, self.choices["padding_free"] = choose_rows(
            self.config.train.padding_free, self.model, self.engine, check
        )
        self._choose_fused()

    def _check_rows(self, rows: Rows) -> RowCheck | None:
        """Compare a row of the first step's sequences with each of them alone, in the run's
        precision.
        """
        import torch

        from fastft.data.batches import StepBatches, segments_of
        from fastft.training.exactness import check_rows
        from fastft.training.step import Stepper

        dtype, device = getattr(torch, self.choices["dtype"].value), self.model.device
        stepper = Stepper(
            self.model, self.engine, self._policy(rows), device=device, on_note=self.report.warn
        )
        steps = StepBatches(
            self.data.train, self.config.train.effective_batch_size, self.config.train.seed
        )
        mixed = dtype != torch.float32
        return check_rows(
            stepper,
            segments_of(steps[0]),
            lambda: torch.autocast(device.type, dtype, enabled=mixed),
        )

    def _policy(self, rows: Rows) -> StepPolicy:
        from fastft.training.step import StepPolicy

        budget = self.choices["micro_batch_tokens"].value
        return StepPolicy(budget, rows, pad_token_id=self.tokenizer.pad_token_id or 0)

    def _choose_fused(self) -> None:
        """Fastft's own layers, where the model has some that they stand for: CPU, weights not
        quantised.
        """
        import torch

        from fastft.kernels import native
        from fastft.kernels.fused import FusedLayers

        wanted, self.fused = self.config.train.fused_layers, None
        if wanted is False or self.hardware.kind != "cpu":
            why = "asked for" if wanted is False else "CPU only"
            self.choices["fused_layers"] = Choice(False, why)
            return
        fused = FusedLayers(self.model, getattr(torch, self.choices["dtype"].value))
        if fused.forwards:
            self.fused = fused
        kernels = native.why_not()
        reason = f"{len(fused.forwards)} modules" + (
            f", torch's element-wise operations ({kernels})" if kernels else ""
        )
        self.choices["fused_layers"] = Choice(bool(fused.forwards), reason)

    def _trainer(self) -> Any:
        from fastft.training.loop import StepTrainer, training_arguments

        settings, total = self.config.train, self._total_steps()
        arguments = training_arguments(
            self.run.checkpoints, dtype=self.choices["dtype"].value, seed=settings.seed,
            learning_rate=settings.learning_rate, scheduler=settings.scheduler, warmup_steps=self._warmup_steps(),
            weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm,
            optimizer=self._optimizer_name(), max_steps=total,
            epochs=settings.epochs, save_steps=settings.save_steps, report_to=list(settings.report_to),
            log_dir=self.run.path / "tensorboard", use_cpu=self.hardware.kind == "cpu",
        )  # fmt: skip
        trainer = StepTrainer(
            self.model,
            arguments,
            engine=self.engine,
            train_dataset=self.data.train,
            eval_dataset=self._held_out(),
            effective_batch_size=settings.effective_batch_size,
            policy=self._policy(self.rows),
            on_log=self._on_log,
            on_note=self.report.warn,
            save_extra=self._save_extra,
            report_every=settings.logging_steps,
            fused=self.fused,
        )
        from fastft.training.callbacks import Steering

        trainer.add_callback(
            Steering(
                trainer,
                self.config,
                self.history,
                self.stop_after,
                self.started,
                self.run.checkpoints,
                self.report,
                total,
                self.mirror,
            )
        )
        self.memory = self._memory_check(trainer)
        trainer.add_callback(self.memory)
        return trainer

    def _held_out(self) -> Any | None:
        """What is measured at each evaluation: the held-out samples, or a fixed draw of
        `train.max_eval_samples` of them.
        """
        held, most = self.data.eval, self.config.train.max_eval_samples
        if held is None or most is None or len(held) <= most:
            return held
        self.report.note(
            f"the held-out loss is that of {most:,} of {len(held):,} samples "
            "(train.max_eval_samples)"
        )
        drawn = np.random.default_rng(self.config.train.seed).choice(len(held), most, replace=False)
        return held[np.sort(drawn)]

    def _memory_check(self, trainer: Any) -> Any:
        """The plan of this run, to be compared with its first steps."""
        from fastft.planning import load_shape, resolve
        from fastft.training.callbacks import MemoryCheck

        shape = load_shape(self.config.model.name, self.config.model.revision)
        return MemoryCheck(
            trainer,
            shape,
            resolve(self.config, self.hardware, shape).situation,
            adjustable=self.config.train.micro_batch_tokens == "auto",
            report=self.report,
            record=self.run.update_record,
        )

    def _run(self, trainer: Any, resume_from: Path | None) -> RunResult:
        """The loop itself, then final/ and the report; or a clean stop."""
        total = self._total_steps()
        try:
            with _stop_signals(trainer), self.report.training(total):
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        finally:
            self.run.plot_loss()
        self.run.update_record(
            seconds_training=self.run.read_record().get("seconds_training", 0)
            + time.monotonic()
            - trainer.progress.started,
            seconds_saving=trainer.progress.saving_seconds,
            micro_batch_tokens_used=trainer.policy.micro_batch_tokens,
        )
        if trainer.stopped_by_signal:
            raise InterruptedRunError(
                f"stopped after step {trainer.state.global_step} of {total}; state saved. The "
                "same command goes on."
            )
        if self.memory.advice:
            self.run.update_record(
                status="paused", steps=trainer.state.global_step, total_steps=total
            )
            raise CouldNotFinishError(
                f"stopped after step {trainer.state.global_step} of {total} (state saved): "
                f"{self.memory.advice}."
            )
        if trainer.state.global_step < total and not trainer.stopped_early:
            self.run.update_record(
                status="paused", steps=trainer.state.global_step, total_steps=total
            )
            self.report.note(
                f"paused after step {trainer.state.global_step} of {total}; the same command "
                "goes on"
            )
            return _result_of(self.run, "paused", time.monotonic() - self.started)
        self._finish(trainer)
        return _result_of(self.run, "done", time.monotonic() - self.started)

    def _finish(self, trainer: Any) -> None:
        """Take the best checkpoint, judge it, write final/, the plot and the report."""
        from fastft.runs.report import write_report

        best = self._best_whole_step(trainer.state.global_step)
        if best is not None and best != trainer.state.global_step:
            self.report.note(
                f"the held-out loss was lowest at step {best}; that checkpoint becomes final/"
            )
            trainer._load_from_checkpoint(str(self.run.checkpoints / f"checkpoint-{best}"))
        after = next(
            (r["eval_loss"] for r in self.history if r["step"] == best and "eval_loss" in r), None
        )
        self.run.update_record(
            eval_loss_after=after, best_step=best, stopped_early=trainer.stopped_early,
            steps=trainer.state.global_step, total_steps=self._total_steps(), samples_after=self._sample_answers(),
        )  # fmt: skip
        write_adapter(
            self.model, self.tokenizer, self.run.final, config=self.config, record=self.run.read_record(),
            end_token_ids=list(self.data.template.end_token_ids), initial=self.initial,
        )  # fmt: skip
        self.run.update_record(status="done", finished=now())
        write_report(self.run)
        self.report.samples(self.run.read_record())

    def _best_whole_step(self, last: int) -> int | None:
        """The step with the lowest held-out loss of those whose checkpoint is whole (or is the
        model as it is now).
        """
        history = list(self.history)
        while (best := best_step(history)) is not None and best != last:
            problem = checkpoint.what_is_wrong(self.run.checkpoints / f"checkpoint-{best}")
            if problem is None:
                break
            self.report.warn(
                f"checkpoint-{best} had the lowest held-out loss, but {problem}; the next "
                "best is taken"
            )
            history = [record for record in history if record["step"] != best]
        return best

    # --- small answers

    def _total_steps(self) -> int:
        """Optimizer steps of the whole run: max_steps, or epochs times the steps that hold every
        sequence once.
        """
        settings = self.config.train
        if settings.max_steps is not None:
            return settings.max_steps
        return max(
            1,
            math.ceil(
                settings.epochs * math.ceil(len(self.data.train) / settings.effective_batch_size)
            ),
        )

    def _warmup_steps(self) -> int:
        settings = self.config.train
        if settings.warmup_steps is not None:
            return settings.warmup_steps
        steps = (
            math.ceil(settings.warmup_ratio * self._total_steps())
            if settings.scheduler != "constant"
            else 0
        )
        return (
            steps if steps > 1 else 0
        )  # the first of them has the rate 0: one alone would only waste a step

    def _optimizer_name(self) -> str:
        """Transformers' name of the optimizer; fused AdamW has kernels for CUDA and CPU, not for
        MPS.
        """
        name = self.choices["optimizer"].value
        return {"adamw": "adamw_torch" if self.hardware.kind == "mps" else "adamw_torch_fused"}.get(
            name, name
        )

    def _save_extra(self, folder: Path) -> None:
        """Put into a checkpoint what else it takes to go on from it alone."""
        self.tokenizer.save_pretrained(folder)
        self.run.keep_state(folder)

    def _on_log(self, record: dict[str, Any]) -> None:
        self.run.append_log(record)
        self.history.append(record)
        self.report.step(record)

    def _keep_samples(self, count: int = 64) -> None:
        """Write samples.jsonl: held-out sequences (else trained ones) that the certificates are
        measured on.
        """
        dataset = self.data.eval if self.data.eval is not None else self.data.train
        rows = (dataset[i] for i in range(min(count, len(dataset))))
        lines = [
            json.dumps(
                {"input_ids": [int(t) for t in r.input_ids], "labels": [int(t) for t in r.labels]}
            )
            for r in rows
        ]
        checkpoint.write_atomically(self.run.samples, "\n".join(lines) + "\n")

    def _sample_answers(self, count: int = 3) -> list[dict[str, Any]]:
        """Greedy answers to held-out prompts, as the model is now."""
        from fastft.inference.generate import answer

        samples = []
        for conversation in self.data.eval_conversations(count):
            text = answer(
                self.model, self.engine, self.tokenizer, self.data.template, conversation.prompt,
                max_new_tokens=96, tools=conversation.tools,
            )  # fmt: skip
            samples.append(
                {"prompt": conversation.prompt, "reference": conversation.reference, "answer": text}
            )
        return samples


DATASET_KEYS = {
    "format",
    "rows_total",
    "rows_used",
    "dropped",
    "tokens",
    "trained_tokens",
    "truncated",
    "duplicates",
    "leakage",
}


def _refuse_what_is_not_there(config: RunConfig) -> None:
    """Raise FastFTError for settings that would silently do nothing here."""
    if config.mirror is not None:
        mirror = Path(config.mirror).expanduser().absolute() / config.project
        if mirror == config.run_dir.absolute():
            raise FastFTError(
                f"mirror and output_dir are the same folder, {config.mirror}. A copy belongs "
                "elsewhere."
            )
    missing = [name for name in config.train.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise FastFTError(
            f"train.report_to: {', '.join(missing)} is not installed. pip install "
            f"{' '.join(missing)}, or remove it."
        )


@contextlib.contextmanager
def _mirrored(config: RunConfig, run: RunFolder, report: Reporter) -> Iterator[Mirror | None]:
    """Bring here what the mirror has newer, and leave it up to date, also where the run was
    interrupted or stopped.
    """
    if config.mirror is None:
        yield None
        return
    mirror = Mirror(
        run,
        Path(config.mirror).expanduser().absolute() / config.project,
        note=report.note,
        warn=report.warn,
    )
    mirror.restore()
    seconds = INTERRUPTED_FLUSH_SECONDS
    try:
        yield mirror
        seconds = FLUSH_SECONDS
    except FastFTError as error:
        if error.exit_code == FastFTError.exit_code:  # the input is wrong: nothing was done
            seconds = 0.0
        raise
    except KeyboardInterrupt:  # asked twice: stop at once
        seconds = 0.0
        raise
    finally:
        if seconds and run.has_record():
            mirror.close(seconds)
            run.update_record(mirror=mirror.facts())


@contextlib.contextmanager
def _stop_signals(trainer: Any) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: finish the step, save, stop. Second: stop at once (the last
    checkpoint is whole).
    """
    trainer.stopped_by_signal = False
    trainer.stopped_early = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        if trainer.stopped_by_signal:
            raise KeyboardInterrupt
        trainer.stopped_by_signal = True
        print("stopping after this step; once more to stop at once", file=sys.stderr)

    previous = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _result_of(run: RunFolder, status: str, seconds: float = 0.0) -> RunResult:
    record, log = run.read_record(), run.read_log()
    losses = [entry["loss"] for entry in log if "loss" in entry]
    speeds = sorted(entry["tokens_per_sec"] for entry in log if "tokens_per_sec" in entry)
    tail = losses[-max(1, len(losses) // 10) :]
    return RunResult(
        run=str(run.path),
        status=status,
        steps=record.get("steps", len(losses)),
        total_steps=record.get("total_steps", len(losses)),
        train_loss=sum(tail) / len(tail) if tail else None,
        eval_loss_before=record.get("eval_loss_before"),
        eval_loss_after=record.get("eval_loss_after"),
        tokens_per_sec=speeds[len(speeds) // 2] if speeds else None,
        seconds=round(seconds, 1),
        final=str(run.final) if status == "done" else None,
    )


def _changed(before: dict[str, str], after: dict[str, str]) -> str:
    names = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
    return ", ".join(f"{n} {before.get(n, 'absent')} -> {after.get(n, 'absent')}" for n in names)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }
