"""One training session, from a config to a loop that is ready to run.

    session = Session(config, probe())
    opened = session.open()                   # the tokenizer, and which base this is
    data = session.read_data(opened)          # before the weights: faults are found in seconds
    prepared = session.prepare(opened, data)  # the model with its adapter; all choices made
    loop = session.loop(prepared)
    loop.run()

`fastft train` adds the run's life around it (resume, record, final/); the benchmark hands in its
own sequences instead of `read_data`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastft import hub
from fastft.config import MOVES_THE_BASE, RunConfig, TrainConfig, long_warmup
from fastft.engines import get_engine, loading
from fastft.engines.base import Engine
from fastft.errors import FastFTError
from fastft.hardware import Choice, Hardware
from fastft.models import load_tokenizer
from fastft.planning import several
from fastft.progress import Reporter
from fastft.runs.adapter import keep_initial
from fastft.runs.fingerprint import base_fingerprint
from fastft.runs.folder import INITIAL_ADAPTER, RunFolder
from fastft.runs.live import LivePlot
from fastft.runs.mirror import Mirror
from fastft.training import ranks
from fastft.training.kept import Kept
from fastft.training.sharded import is_sharded, local_bytes, shard

if TYPE_CHECKING:
    from fastft.data import Prepared as PreparedData
    from fastft.data.batches import Order, Rows, StepBatches
    from fastft.kernels.fused import FusedLayers
    from fastft.planning import Situation
    from fastft.training.callbacks import MemoryCheck
    from fastft.training.exactness import RowCheck
    from fastft.training.loop import StepTrainer
    from fastft.training.mlx_loop import MlxTrainer
    from fastft.training.mlx_session import Unwatched
    from fastft.training.step import StepPolicy

LOOKED_AT = 16
"""Steps of which the shared beginnings are looked at before the first one."""

FEW_STEPS = 20
"""A run of fewer steps mostly leaves the model as it was."""


class Sequences(Protocol):
    """What a session trains on: `fastft.data.prepare` returns it, and so may any other source."""

    @property
    def train(self) -> Any:
        """Samples with input_ids, labels and segments; `lengths` holds the tokens of each."""

    @property
    def eval(self) -> Any | None:
        """The held-out samples, or None."""

    @property
    def template(self) -> Any | None:
        """The chat template, whose special tokens are trained where it was added; None for none."""


@dataclass(frozen=True)
class Opened:
    """What is known before any weight is read."""

    engine: Engine
    tokenizer: Any
    base: dict[str, Any]
    """The base model's fingerprint."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a session trains with; nothing of it is missing once `prepare` returned."""

    engine: Engine
    tokenizer: Any
    base: dict[str, Any]
    data: Any
    """What was handed to `prepare` (see `Sequences`)."""
    model: Any
    """The peft model."""
    trainable: int
    """Its trainable parameters, checked against the closed form."""
    initial: Path | None
    """The untrained adapter, kept where its init moved the base's weights."""
    rows: Rows
    fused: FusedLayers | None
    choices: dict[str, Choice]
    """Every automatic choice with its reason, as it was made in the end."""
    situation: Situation
    """What the plan expects of a step, by the data's real lengths."""
    prefetch: bool = False
    """Whether the next step's rows are made while this one is computed."""

    @property
    def policy(self) -> StepPolicy:
        """How a step of this session is cut into micro-batches (a new one each time)."""
        return self.policy_for(self.rows)

    def policy_for(self, rows: Rows) -> StepPolicy:
        """Return the policy with another kind of rows."""
        from fastft.kernels.varlen import rope_changes_at
        from fastft.training.step import StepPolicy

        budget = self.choices["micro_batch_tokens"].value
        long = self.choices["gradient_checkpointing"].value == "long"
        return StepPolicy(
            budget,
            rows,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            recompute_above=self.situation.recompute_above if long else None,
            rope_changes_at=rope_changes_at(self.model),
            prefetch=self.prefetch,
        )


@dataclass(frozen=True)
class Loop:
    """A trainer that is ready, and the watch over its memory."""

    trainer: StepTrainer | MlxTrainer
    memory: MemoryCheck | Unwatched

    def run(self, resume_from: Path | None = None) -> None:
        """Train to the end, or until a signal, a time limit or the watch stops it."""
        try:
            with stop_signals(self.trainer):
                self.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        finally:
            self.memory.stop()


class Session:
    """One call of `train` on one run. It holds what is given; what is made is returned."""

    def __init__(
        self,
        config: RunConfig,
        hardware: Hardware,
        *,
        choices: dict[str, Choice] | None = None,
        report: Reporter | None = None,
        stop_after: int | None = None,
        started: float | None = None,
        mirror: Mirror | None = None,
        shuffle: bool = True,
        limit_bytes: Callable[[], int] | None = None,
        rows: Any = None,
        kept: Kept | None = None,
    ) -> None:
        """`choices`: those of `loading.choose_loading`, where they were made already.

        `started` is the time.monotonic() that train.max_minutes counts from. `shuffle=False` takes
        the sequences in their own order. `limit_bytes` says how much memory this process may have
        in all; by default, what the driver or the system says is free. `rows` are read instead of
        the config's data source. `kept` holds what other sessions of this process have loaded.
        """
        self.config, self.hardware = config, hardware
        self.choices = choices or loading.choose_loading(config, hardware)
        self.run = RunFolder(config.run_dir, writes=ranks.first())
        self.report = report or Reporter()
        self.stop_after = stop_after
        self.started = time.monotonic() if started is None else started
        self.mirror, self.shuffle, self.limit_bytes, self.rows = mirror, shuffle, limit_bytes, rows
        self.kept = kept or Kept()
        self.history: list[dict[str, Any]] = []
        """The lines of log.jsonl up to the present step."""
        self.live = LivePlot(config.project)

    def open(self) -> Opened:
        """Return the engine, the tokenizer, and which base this is."""
        engine = get_engine(self.choices["engine"].value)
        model = self.config.model

        def opened() -> Opened:
            hub.download_model(model.name, model.revision, progress=self.report.bytes)
            base = base_fingerprint(model.name, model.revision)
            return Opened(engine, load_tokenizer(model), base)

        # By the data's settings too: the chat template is written into the tokenizer.
        made_of = [model.model_dump(), self.config.data.model_dump()]
        return self.kept.once("opened", made_of, opened)

    def read_data(self, opened: Opened) -> PreparedData:
        """Return the config's data, tokenised and split; `opened` proves that the engine came
        first.

        Unsloth must be imported before transformers, which the data layer imports.
        """
        from fastft.data import prepare

        config = self.config
        tokenise = partial(
            prepare,
            config.data,
            opened.tokenizer,
            max_seq_length=config.model.max_seq_length,
            seed=config.train.seed,
            rows=self.rows,
        )
        made_of = [config.data.model_dump(), config.model.model_dump(), config.train.seed]
        with ranks.first_before_the_others("tokenising the data"):
            data: PreparedData = self.kept.once("data", made_of, tokenise)
        ranks.refuse_unlike("their data", data.fingerprint[:12])
        self._refuse_tokens_without_row(opened.tokenizer, data)
        # What was trained with is what every later program renders with.
        data.template.save(opened.tokenizer)
        self.report.data(data.report)
        if data.eval is None and (config.data.eval_source or config.data.eval_fraction > 0):
            self.report.warn(
                "nothing is held out (too few different rows for it): no held-out loss, no "
                "best checkpoint"
            )
        return data

    def _refuse_tokens_without_row(self, tokenizer: Any, data: PreparedData) -> None:
        """Raise FastFTError where a text has a token for which the model has no embedding row."""
        from fastft.models import tokens_without_row
        from fastft.planning import load_shape

        rows = load_shape(self.config.model.name, self.config.model.revision).vocab
        beyond = tokens_without_row(tokenizer, rows)
        if not beyond:
            return
        parts = [data.train] if data.eval is None else [data.train, data.eval]
        for part in parts:
            for number, sample in enumerate(part):
                found = [text for text, i in beyond.items() if i in sample.input_ids]
                if found:
                    raise FastFTError(
                        f"sequence {number + 1} of the data spells {found[0]!r}, a token for which "
                        f"the model has no embedding row (it has {rows:,}). Remove it from "
                        "the data."
                    )

    def prepare(self, opened: Opened, data: Sequences) -> Prepared:
        """Load the base, attach LoRA, and choose how rows and layers are computed."""
        config, choices = self.config, dict(self.choices)
        situation = loading.settle_batching(self._share, self.hardware, choices, data.train.lengths)
        if choices["engine"].value == "mlx":
            return self._prepare_mlx(opened, data, choices, situation)
        checkpointing = bool(choices["gradient_checkpointing"].value)
        _refuse_to_shard(config, choices)

        def load() -> tuple[Any, Engine, Choice]:
            # A base that no card holds is read into RAM and goes to the cards in parts; one in NF4
            # is quantised by the card that keeps a part of it.
            in_ram = config.train.shard_base and choices["quantization"].value == "none"
            base, _, engine = loading.load_for_training(
                config.model,
                self.hardware,
                gradient_checkpointing=checkpointing,
                choices=choices,
                in_ram=in_ram,
            )
            return base, engine, choices["dtype"]  # which loading may have changed

        chosen = [choices[name].value for name in ("engine", "quantization", "dtype")]
        made_of = [config.model.model_dump(), checkpointing, chosen]
        base, engine, choices["dtype"] = self.kept.base(made_of, load)
        model, trainable = loading.attach_lora(
            base,
            engine,
            config.lora,
            seed=config.train.seed,
            gradient_checkpointing=checkpointing,
            train_token_ids=self._token_rows(base, opened.tokenizer, data),
        )
        self.kept.adapted(model, moves_the_base=config.lora.init in MOVES_THE_BASE)
        ranks.start_alike(model.parameters())
        if config.train.shard_base:
            shard(model, self.hardware.kind)
            held = local_bytes(model) / 2**20
            self.report.note(
                f"base spread over {ranks.world().size} processes, {held:,.0f} MiB in each"
            )
        initial = self.run.path / INITIAL_ADAPTER if config.lora.init in MOVES_THE_BASE else None
        if initial is not None and self.run.writes:
            initial = keep_initial(model, initial)
        loaded = Prepared(
            engine,
            opened.tokenizer,
            opened.base,
            data,
            model,
            trainable,
            initial,
            "padded",
            None,
            choices,
            situation,
            prefetch=config.train.prefetch and self.hardware.kind == "cuda",
        )
        prepared = self._choose_layers(self._choose_rows(loaded))
        self._make_room_for_trees(prepared)
        if config.train.shard_base:
            ranks.refuse_unlike(
                "their rows or token budget, which train.shard_base needs alike; set "
                "train.micro_batch_tokens and train.share_prefixes: false",
                [prepared.rows, prepared.choices["micro_batch_tokens"].value],
            )
        self._report(prepared)
        return prepared

    def _prepare_mlx(
        self, opened: Opened, data: Sequences, choices: dict[str, Choice], situation: Situation
    ) -> Prepared:
        from fastft.training.mlx_session import load

        model, rows = load(self, opened, data, choices)
        prepared = Prepared(
            opened.engine,
            opened.tokenizer,
            opened.base,
            data,
            model,
            model.trainable,
            None,
            rows,
            None,
            choices,
            situation,
        )
        self._report(prepared)
        return prepared

    def _token_rows(self, base: Any, tokenizer: Any, data: Sequences) -> list[int]:
        """The tokens whose embedding rows are trained, too; says which the base never learnt."""
        from fastft.engines.rows import special_tokens_of, untrained_rows

        untrained: list[int] = []
        if data.template is not None and self.config.lora.train_tokens == "auto":
            special = special_tokens_of(data.train, tokenizer)
            untrained = untrained_rows(base.get_input_embeddings().weight, special)
        if untrained:
            names = ", ".join(tokenizer.convert_ids_to_tokens(untrained))
            moved = self.config.lora.init in MOVES_THE_BASE
            self.report.warn(
                f"the base never learnt {names}: their embedding rows are those of unused tokens. "
                + (
                    f"They are not trained with lora.init {self.config.lora.init}: answers may "
                    "never end. Set lora.init: default."
                    if moved
                    else "They are trained, too, so that answers end (lora.train_tokens: auto)."
                )
            )
            untrained = [] if moved else untrained
        return loading.tokens_to_train(self.config.lora, tokenizer, data.template, untrained)

    def _choose_rows(self, loaded: Prepared) -> Prepared:
        from fastft.training.exactness import choose_rows, choose_sharing

        settings, check = self.config.train, partial(self.check_rows, loaded)
        tested, longest = self.hardware.kind == "cpu", self.config.model.max_seq_length
        model, engine = loaded.model, loaded.engine
        rows, loaded.choices["padding_free"] = choose_rows(
            settings.padding_free, model, engine, check, tested=tested, longest=longest
        )
        rows, loaded.choices["share_prefixes"] = choose_sharing(
            settings.share_prefixes, model, engine, check, rows=rows, tested=tested, longest=longest
        )
        return replace(loaded, rows=rows)

    def _make_room_for_trees(self, loaded: Prepared) -> None:
        """Raise the budget, where memory allows it, to what the sequences of a step that share a
        beginning take together: a row that is cut computes the beginning again. Fastft's own layers
        need no more room for a tree (`Stepper.stretch`).
        """
        fixed = loaded.situation.recompute_above  # a larger row would be recomputed
        automatic = self.config.train.micro_batch_tokens == "auto" and not fixed
        recomputed = loaded.choices["gradient_checkpointing"].value
        stretches = loaded.fused is not None and loaded.fused.stretch > 1 and not recomputed
        if loaded.rows != "trie" or not automatic or stretches:
            return
        from fastft.data import trie
        from fastft.data.batches import segments_of
        from fastft.planning import load_shape
        from fastft.planning.resolve import Lengths, pick_micro_batch_tokens

        steps = self.steps(loaded.data)
        firsts = [segments_of(steps[i]) for i in range(min(len(steps), LOOKED_AT))]
        trees = [trie.build([s.input_ids for s in step]).largest_tree for step in firsts]
        budget = loaded.choices["micro_batch_tokens"]
        if max(trees, default=0) <= budget.value:
            return
        batch = self._share.train.effective_batch_size
        loaded.choices["micro_batch_tokens"] = pick_micro_batch_tokens(
            "auto",
            shape=load_shape(self.config.model.name, self.config.model.revision),
            situation=loaded.situation,
            hardware=self.hardware,
            whole=Lengths.of(loaded.data.train.lengths, batch).step,
            together=max(trees),
        )

    @property
    def _share(self) -> RunConfig:
        """The config of what this process computes of each step."""
        return several.share_of(self.config, ranks.world().size)

    def steps(self, data: Sequences) -> StepBatches:
        """Return the optimizer steps of an epoch."""
        from fastft.data.batches import StepBatches

        settings = self.config.train
        return StepBatches(
            data.train, settings.effective_batch_size, settings.seed, order=self.order
        )

    @property
    def order(self) -> Order:
        """How the sequences come: the config's order, or their own."""
        return self.config.train.order if self.shuffle else "given"

    def check_rows(self, loaded: Prepared, rows: Rows) -> RowCheck | None:
        """Compare a row of the first step's sequences with each of them alone, in the run's
        precision; None where no two of them fit into one row.
        """
        import torch

        from fastft.data.batches import segments_of
        from fastft.training.exactness import check_rows
        from fastft.training.step import Stepper

        device = loaded.model.device
        dtype = getattr(torch, loaded.choices["dtype"].value)
        stepper = Stepper(
            loaded.model,
            loaded.engine,
            loaded.policy_for(rows),
            device=device,
            on_note=self.report.warn,
        )
        steps = self.steps(loaded.data)
        longest = loaded.data.train[int(np.argmax(loaded.data.train.lengths))]
        mixed = dtype != torch.float32
        return check_rows(
            stepper,
            segments_of(steps[0]),
            lambda: torch.autocast(device.type, dtype, enabled=mixed),
            longest=segments_of([longest]),
        )

    def _choose_layers(self, loaded: Prepared) -> Prepared:
        """Fastft's own layers, where the model has some that they stand for: on a CPU, weights in
        the computing type or (with AVX512-BF16) in NF4.
        """
        import torch

        from fastft.kernels import native
        from fastft.kernels.fused import FusedLayers

        choices, wanted = loaded.choices, self.config.train.fused_layers
        if wanted is False or self.hardware.kind != "cpu" or is_sharded(loaded.model):
            why = "CPU only" if self.hardware.kind != "cpu" else "the base is sharded"
            choices["fused_layers"] = Choice(False, "asked for" if wanted is False else why)
            return loaded
        fused = FusedLayers(loaded.model, getattr(torch, choices["dtype"].value))
        kernels = native.why_not()
        reason = f"{len(fused.forwards)} modules" + (
            f", torch's element-wise operations ({kernels})" if kernels else ""
        )
        choices["fused_layers"] = Choice(bool(fused.forwards), reason)
        return replace(loaded, fused=fused if fused.forwards else None)

    def _report(self, prepared: Prepared) -> None:
        for name, choice in prepared.choices.items():
            self.report.choice(name, choice)
        self.report.note(f"{prepared.trainable:,} trainable parameters")
        steps = self.total_steps(prepared.data)
        if misfit := long_warmup(self.config.train, steps):
            self.report.warn(misfit)
        if self.config.train.max_steps is None and steps < FEW_STEPS:
            self.report.note(
                f"{steps} steps are few, the model will hardly change; a higher train.epochs "
                "makes more of them"
            )

    def total_steps(self, data: Sequences) -> int:
        """Return the optimizer steps of the whole run."""
        return total_steps(self.config.train, len(data.train))

    def loop(self, prepared: Prepared) -> Loop:
        """Return the trainer with its callbacks; `run` starts it."""
        from fastft.training.loop import StepTrainer

        if prepared.engine.name == "mlx":
            from fastft.training.mlx_session import Unwatched, make_trainer

            steps = warmup_steps(self.config.train, self.total_steps(prepared.data))
            return Loop(make_trainer(self, prepared, steps), Unwatched())
        settings, total = self.config.train, self.total_steps(prepared.data)
        trainer = StepTrainer(
            prepared.model,
            self.arguments(prepared, total),
            engine=prepared.engine,
            train_dataset=prepared.data.train,
            eval_dataset=self.held_out(prepared.data.eval),
            effective_batch_size=settings.effective_batch_size,
            policy=prepared.policy,
            on_log=self.on_log,
            on_note=self.report.warn if ranks.first() else ranks.note_of_this_process,
            save_extra=partial(self.save_extra, prepared.tokenizer),
            report_every=settings.logging_steps,
            fused=prepared.fused,
            order=self.order,
            judge=self.judge(prepared),
        )
        trainer.add_callback(self.steering(trainer, total))
        memory = self._memory_check(trainer, prepared.situation)
        trainer.add_callback(memory)
        return Loop(trainer, memory)

    def steering(self, trainer: Any, total: int) -> Any:
        """Return the callback that decides when to evaluate, save and stop."""
        from fastft.training.callbacks import Steering

        return Steering(
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

    def judge(self, prepared: Prepared) -> Callable[[], dict[str, Any]]:
        """What an evaluation measures besides the loss; nothing unless asked for."""
        from fastft.training.judging import judge_answers

        if not self.config.train.eval_metrics:
            return dict
        return partial(judge_answers, prepared, self.config.train)

    def arguments(self, prepared: Prepared, total: int) -> Any:
        """Return transformers' arguments for the loop, and for the trackers."""
        from fastft.training.loop import training_arguments

        settings, choices = self.config.train, prepared.choices
        return training_arguments(
            self.run.checkpoints,
            dtype=choices["dtype"].value,
            seed=settings.seed,
            learning_rate=settings.learning_rate,
            scheduler=settings.scheduler,
            warmup_steps=warmup_steps(settings, total),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            optimizer=optimizer_name(choices["optimizer"].value, self.hardware.kind),
            max_steps=total,
            epochs=settings.epochs,
            save_steps=settings.save_steps,
            report_to=list(settings.report_to) if self.run.writes else [],
            log_dir=self.run.path / "tensorboard",
            use_cpu=self.hardware.kind == "cpu",
        )

    def held_out(self, held: Any | None) -> Any | None:
        """What is measured at each evaluation: the held-out samples, or a fixed draw of
        `train.max_eval_samples` of them.
        """
        most = self.config.train.max_eval_samples
        if held is None or most is None or len(held) <= most:
            return held
        self.report.note(
            f"the held-out loss is that of {most:,} of {len(held):,} samples "
            "(train.max_eval_samples)"
        )
        drawn = np.random.default_rng(self.config.train.seed).choice(len(held), most, replace=False)
        return held[np.sort(drawn)]

    def _memory_check(self, trainer: StepTrainer, situation: Situation) -> MemoryCheck:
        """The plan of this run, to be compared with its first steps."""
        from fastft.planning import load_shape
        from fastft.training.callbacks import MemoryCheck, free_for_this_process

        return MemoryCheck(
            trainer,
            load_shape(self.config.model.name, self.config.model.revision),
            situation,
            adjustable=self.config.train.micro_batch_tokens == "auto"
            and not is_sharded(trainer.model),
            report=self.report,
            record=self.run.update_record,
            limit_bytes=self.limit_bytes or free_for_this_process,
        )

    def save_extra(self, tokenizer: Any, folder: Path) -> None:
        """Put into a checkpoint what else it takes to go on from it alone."""
        tokenizer.save_pretrained(folder)
        self.run.keep_state(folder)

    def on_log(self, record: dict[str, Any]) -> None:
        """Keep a line of log.jsonl, and show it."""
        self.run.append_log(record)
        self.history.append(record)
        self.report.step(record)
        self.live.show(self.history)


def _refuse_to_shard(config: RunConfig, choices: dict[str, Choice]) -> None:
    """Raise FastFTError where train.shard_base cannot do what it says."""
    if not config.train.shard_base:
        return
    if ranks.world().size == 1:
        raise FastFTError(
            "train.shard_base spreads the base over several processes, and this is one. Start "
            "with --processes N or torchrun, or set train.shard_base: false."
        )
    if config.train.eval_metrics:
        raise FastFTError(
            "train.shard_base cannot be combined with train.eval_metrics: an answer needs every "
            "process in every token. Use `fastft eval` after training."
        )
    if choices["engine"].value != "stock":
        raise FastFTError(
            f"train.shard_base needs model.engine: stock, and it is {choices['engine'].value}: "
            "Unsloth's kernels read the weights of a whole base."
        )
    ranks.refuse_unlike(
        "their token budget, which train.shard_base needs alike; set train.micro_batch_tokens",
        choices["micro_batch_tokens"].value,
    )


def total_steps(settings: TrainConfig, sequences: int) -> int:
    """Return the optimizer steps of a run: max_steps, or epochs times the steps that hold every
    sequence once.
    """
    if settings.max_steps is not None:
        return settings.max_steps
    an_epoch = math.ceil(sequences / settings.effective_batch_size)
    return max(1, math.ceil(settings.epochs * an_epoch))


def warmup_steps(settings: TrainConfig, total: int) -> int:
    """Return the steps over which the learning rate rises."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    if settings.scheduler == "constant":
        return 0
    steps = math.ceil(settings.warmup_ratio * total)
    # The first of them has the rate 0, so one alone would only waste a step.
    return steps if steps > 1 else 0


def optimizer_name(chosen: str, device: str) -> str:
    """Return transformers' name of the optimizer: fused AdamW has kernels for CUDA and CPU only."""
    if chosen == "adamw":
        return "adamw_torch" if device == "mps" else "adamw_torch_fused"
    return chosen


@contextlib.contextmanager
def stop_signals(trainer: StepTrainer | MlxTrainer) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: finish the step, save, stop. Second: stop at once (the last
    checkpoint is whole).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        # A launcher repeats its SIGTERM, and kills by itself what does not end.
        repeated = number == signal.SIGTERM and ranks.world().size > 1
        if trainer.stopped_by_signal and not repeated:
            raise KeyboardInterrupt
        trainer.stopped_by_signal = True
        if ranks.world().size == 1:  # several agree first, and the first of them says so
            # Not print: the signal may have come in the middle of another one.
            os.write(2, b"stopping after this step; once more to stop at once\n")

    previous = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def overrides_forgotten() -> Iterator[None]:
    """Forget at the end what transformers tells bitsandbytes about a model.

    With an 8-bit optimizer it enters each embedding into the GlobalOptimManager, which keeps it for
    ever: a gigabyte on the card for a model of 8B. What was entered before stays.
    """
    before = list(_overrides())
    try:
        yield
    finally:
        _overrides()[:] = before


def _overrides() -> list[Any]:
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return []
    return bitsandbytes.optim.GlobalOptimManager.get_instance().module_weight_config_triple


def give_back_memory() -> None:
    """Free what a finished session still holds, so that the next one finds the whole card.

    A trainer and its model refer to each other, so only the collector frees them; and torch keeps
    freed VRAM for itself, out of other processes' reach.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
