"""What a session does otherwise on the MLX engine: load, choose rows, make the loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastft.data.batches import segments_of
from fastft.engines import loading
from fastft.engines.mlx import MlxModel, load_mlx
from fastft.errors import FastFTError
from fastft.hardware import Choice
from fastft.training import ranks
from fastft.training.mlx_loop import MlxTrainer, row_error
from fastft.training.step import StepPolicy

if TYPE_CHECKING:
    from fastft.data.batches import Rows
    from fastft.training.session import Opened, Prepared, Sequences, Session

FARTHEST = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest relative distance of a row's gradient from that of its sequences alone."""


@dataclass
class Unwatched:
    """Stands for the memory watch, whose plan was not measured on MLX."""

    advice: str | None = None

    def stop(self) -> None:
        """Nothing watches, so nothing is ended."""


def load(
    session: Session, opened: Opened, data: Sequences, choices: dict[str, Choice]
) -> tuple[MlxModel, Rows]:
    """Return the session's model with LoRA on it, in MLX, and how it takes its rows; notes why in
    `choices`.
    """
    config = session.config
    if ranks.world().size > 1 or config.train.shard_base:
        raise FastFTError(
            "model.engine mlx trains in one process with the whole base. Start one process, with "
            "train.shard_base: false, or set model.engine: auto."
        )
    model = load_mlx(
        config.model,
        config.lora,
        quantization=choices["quantization"].value,
        dtype=choices["dtype"].value,
        seed=config.train.seed,
        gradient_checkpointing=bool(choices["gradient_checkpointing"].value),
        train_token_ids=loading.tokens_to_train(config.lora, opened.tokenizer, data.template),
    )
    rows = _choose_rows(session, model, data, choices)
    choices["fused_layers"] = Choice(False, "MLX's own kernels")
    return model, rows


def make_trainer(session: Session, prepared: Prepared, warmup_steps: int) -> MlxTrainer:
    """Return the trainer with its callbacks."""
    settings, total = session.config.train, session.total_steps(prepared.data)
    trackers, arguments = _trackers(session, prepared, total)
    trainer = MlxTrainer(
        prepared.model,
        settings,
        train_dataset=prepared.data.train,
        eval_dataset=session.held_out(prepared.data.eval),
        policy=prepared.policy,
        total_steps=total,
        warmup_steps=warmup_steps,
        checkpoints=session.run.checkpoints,
        on_log=session.on_log,
        save_extra=partial(session.save_extra, prepared.tokenizer),
        order=session.order,
        judge=session.judge(prepared),
        trackers=trackers,
        arguments=arguments,
    )
    trainer.add_callback(session.steering(trainer, total))
    return trainer


def _trackers(session: Session, prepared: Prepared, total: int) -> tuple[list[Any], Any]:
    """Return transformers' callbacks for train.report_to, and the arguments that they read."""
    if not session.config.train.report_to:
        return [], None
    from transformers.integrations import get_reporting_integration_callbacks

    names = list(session.config.train.report_to)
    return get_reporting_integration_callbacks(names), session.arguments(prepared, total)


def _choose_rows(
    session: Session, model: MlxModel, data: Sequences, choices: dict[str, Choice]
) -> Any:
    """Return trie, varlen, or padded (here: one sequence at a time), and note why.

    Rows are looked at on the run's own first sequences: their gradient against that of each
    sequence alone, in the run's precision and on this machine.
    """
    settings = session.config.train
    wanted, share = settings.padding_free, settings.share_prefixes
    refusal = None if model.rows else "mlx-lm's attention of this model cannot be cut"
    if wanted is not False and refusal is None:
        budget = choices["micro_batch_tokens"].value
        policy = StepPolicy(budget, "varlen" if share is False else "trie", 0)
        found = row_error(model, segments_of(session.steps(data)[0]), policy)
        most = FARTHEST[choices["dtype"].value]
        if found is not None and not found <= most:
            refusal = f"a row's gradient is {found:.2g} away from its sequences' (at most {most:g})"
    if wanted is True and refusal is not None:
        raise FastFTError(
            f"train.padding_free is on, but {refusal}. Set it to auto: one sequence at a time."
        )
    if wanted is False or refusal is not None:
        reason = f"one sequence at a time, because {refusal}" if refusal else "asked for"
        choices["padding_free"] = Choice(False, reason)
        choices["share_prefixes"] = Choice(False, "one sequence at a time")
        return "padded"
    choices["padding_free"] = Choice(True, "a row's gradient is its sequences', checked here")
    choices["share_prefixes"] = Choice(
        share is not False, "asked for" if share != "auto" else "beginnings are computed once"
    )
    return "varlen" if share is False else "trie"
