"""One optimizer step's gradient: its sequences cut into micro-batches, through whatever memory
there is.

Used by both trainers (`fastft train`'s and `FastSFTTrainer`). Import this after the engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from fastft.data.batches import (
    MicroBatch,
    Rows,
    Segment,
    micro_batches,
    same_segments,
    supervised_tokens,
    unique_tokens,
)
from fastft.engines.base import Engine
from fastft.errors import CouldNotFinishError, is_out_of_memory
from fastft.kernels.fused import FusedLayers
from fastft.kernels.varlen import padding_free
from fastft.training.dropout import dropout_by_sequence
from fastft.training.sharded import is_sharded


@dataclass
class StepPolicy:
    """How a step is cut. `micro_batch_tokens` may shrink while the run goes on; what is learnt
    does not change.
    """

    micro_batch_tokens: int
    rows: Rows
    pad_token_id: int
    recompute_above: int | None = None
    """On a model that recomputes its layers: rows of at most so many tokens do not; None: all do.
    """
    rope_changes_at: int | None = None
    """The most tokens of a sequence for the model's first set of rope frequencies, where it has two
    (`varlen.rope_changes_at`)."""
    stretch: bool = True
    """Whether a row of a tree may be longer than rows are without sharing (`Stepper.stretch`)."""
    prefetch: bool = False
    """On a GPU: rows are copied from pinned memory, and the next step's are made while this one is
    computed (see `Stepper.meanwhile`)."""


@dataclass(frozen=True)
class Filler:
    """So many passes every process makes in a step; those without sequences of their own compute
    `segment` again, times zero.
    """

    passes: int
    segment: Segment


class Stepper:
    """Computes the gradient of a step on one model."""

    def __init__(
        self,
        model: Any,
        engine: Engine,
        policy: StepPolicy,
        *,
        device: Any,
        on_note: Callable[[str], None],
        fused: FusedLayers | None = None,
        scale: Any = None,
    ) -> None:
        """`scale`: what `backward` multiplies the loss by (float16): a GradScaler, a number, or
        None.
        """
        self.model, self.engine, self.policy, self.fused, self.scale = (
            model,
            engine,
            policy,
            fused,
            scale,
        )
        self.device, self.on_note = device, on_note
        self.unique_tokens = 0
        """Tokens that the last `gradient` computed: one that sequences share counts once."""
        self.meanwhile: Callable[[], None] | None = None
        """Called once a step has been launched, before the host waits for its loss."""
        self._ready: tuple[list[Segment], StepPolicy, list[MicroBatch]] | None = None

    def with_policy(self, policy: StepPolicy) -> Stepper:
        """Return a stepper like this one that cuts by `policy`."""
        return Stepper(
            self.model,
            self.engine,
            policy,
            device=self.device,
            on_note=self.on_note,
            fused=self.fused,
            scale=self.scale,
        )

    def gradient(
        self,
        model: Any,
        segments: list[Segment],
        backward: Callable[[torch.Tensor], None],
        context: Callable[[], Any],
        *,
        supervised: int | None = None,
        drawn: tuple[int, int] | None = None,
        filler: Filler | None = None,
    ) -> float:
        """Add the gradient of `segments` to the parameters; returns their loss: the sum of their
        token losses over `supervised`, the supervised tokens of the whole step (of which
        `segments` may be one process's share; by default all).

        `drawn` is the (seed, step) that dropout is keyed by, or None for torch's own dropout;
        `filler` makes up the passes that a sharded base needs (sharded.py).
        `model` is what is called (accelerate's wrapper), `context` makes what a forward pass runs
        in. After an out-of-memory the same step starts again with half the budget, so gradients
        must be empty on entry. Raises CouldNotFinishError where a single sequence does not fit.
        """
        rng = _rng_state()
        of = supervised_tokens(segments) if supervised is None else supervised
        while True:
            try:
                return self._accumulate(model, segments, backward, context, of, drawn, filler)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._refuse_to_retry(error)
            # Outside the except block: the traceback would keep the activations alive.
            self._shrink(segments)
            model.zero_grad(set_to_none=True)
            # the same dropout masks as if the smaller budget had been there from the start
            _restore_rng(rng)

    def _accumulate(
        self,
        model: Any,
        segments: list[Segment],
        backward: Callable[[torch.Tensor], None],
        context: Callable[[], Any],
        supervised: int,
        drawn: tuple[int, int] | None,
        filler: Filler | None,
    ) -> float:
        self.engine.announce_scale(self.model, self.scale)
        # MPS has no float64
        wide = torch.float32 if torch.device(self.device).type == "mps" else torch.float64
        loss_sum = torch.zeros((), device=self.device, dtype=wide)
        by_sequence = (
            contextlib.nullcontext() if drawn is None else dropout_by_sequence(self.model, *drawn)
        )
        self.unique_tokens = 0
        most = self.policy.recompute_above
        recomputed = [] if most is None else recomputed_layers(self.model)
        with self.layers(), self.engine.loss_mode(self.model), by_sequence as dropout:
            for batch, factor in self._passes(segments, filler):
                if dropout is not None:
                    dropout(batch.spans)
                keep = most is not None and batch.unique_tokens <= most
                with (
                    keeping_activations(recomputed if keep else []),
                    self._keeping(batch),
                    context(),
                ):
                    loss = self._loss_of(model, batch, supervised)
                backward(loss * factor if factor != 1.0 else loss)
                loss_sum += loss.detach() * factor
                if factor:  # what only fills a pass counts for nothing
                    self.unique_tokens += batch.unique_tokens
        if self.meanwhile is not None:
            self.meanwhile()
        return loss_sum.item()

    def _keeping(self, batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        return self.fused.keeping(batch.keeps) if self.fused else contextlib.nullcontext()

    def _loss_of(self, model: Any, batch: MicroBatch, divisor: int) -> torch.Tensor:
        """The sum of a micro-batch's token losses over `divisor`."""
        inputs = dict(batch.inputs)
        if "trie_pairs" not in inputs or (self.fused is not None and self.fused.has_loss):
            loss: torch.Tensor = model(**inputs, num_items_in_batch=divisor, use_cache=False).loss
            return loss
        # transformers' own head on the states that predict something, softcaps and scales included.
        states, targets, counts = inputs.pop("trie_pairs")
        logits = model(**inputs, logits_to_keep=states, use_cache=False).logits
        losses = F.cross_entropy(logits[0].float(), targets, reduction="none")
        return (losses * counts).sum() / divisor

    def _passes(
        self, segments: list[Segment], filler: Filler | None
    ) -> Iterator[tuple[MicroBatch, float]]:
        """Yield the micro-batches, each with what its loss counts: 1, or 0 for what is made up."""
        made = 0
        for batch in self._take_ready(segments) or self.batches(segments):
            made += 1
            yield batch, 1.0
        if filler is not None:
            for _ in range(filler.passes - made):
                yield next(self.batches([filler.segment])), 0.0

    def _refuse_to_retry(self, error: BaseException) -> None:
        """Raise CouldNotFinishError where the base is sharded: the others would wait for passes
        that a smaller budget does not make.
        """
        if is_sharded(self.model):
            raise CouldNotFinishError(
                f"out of memory with {self.policy.micro_batch_tokens} tokens a micro-batch"
                f"{_memory_numbers()}, and with train.shard_base no process can go on by itself. "
                f"Set train.micro_batch_tokens to {max(self.policy.micro_batch_tokens // 2, 1)} "
                "and run the same command again."
            ) from error

    def loss(self, segments: list[Segment]) -> float:
        """Return the sum of the token losses of `segments`; the caller sets mode, precision and
        no_grad.

        After an out-of-memory the same segments again with half the budget, as in `gradient`.
        """
        while True:
            try:
                return self._loss(segments)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._refuse_to_retry(error)
            self._shrink(segments)

    def _loss(self, segments: list[Segment]) -> float:
        with self.layers():
            return sum(
                self._loss_of(self.model, batch, 1).item() for batch in self.batches(segments)
            )

    def make_ready(self, segments: list[Segment]) -> None:
        """Make the micro-batches of `segments` now; the next `gradient` takes them, if it is for
        these and the policy has not changed by then.
        """
        self._ready = segments, replace(self.policy), list(self.batches(segments))

    def _take_ready(self, segments: list[Segment]) -> list[MicroBatch] | None:
        """The micro-batches that were made ready for `segments`, once; None for none."""
        ready, self._ready = self._ready, None
        if ready is None or ready[1] != self.policy or not same_segments(ready[0], segments):
            return None
        return ready[2]

    def batches(self, segments: list[Segment]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of `segments` under the policy as it is now."""
        policy = self.policy
        return micro_batches(
            segments,
            policy.micro_batch_tokens,
            rows=policy.rows,
            pad_token_id=policy.pad_token_id,
            device=self.device,
            rope_changes_at=policy.rope_changes_at,
            pinned=policy.prefetch and torch.device(self.device).type == "cuda",
            stretch=self.stretch,
        )

    @property
    def stretch(self) -> float | None:
        """How many times as many tokens a row of a tree can have as a row without sharing, and keep
        no more (`FusedLayers.stretch`); None where trees are cut as any row is.
        """
        policy = self.policy
        if self.fused is None or self.fused.stretch == 1.0 or not policy.stretch:
            return None
        if policy.rows != "trie" or policy.rope_changes_at or recomputed_layers(self.model):
            return None
        return self.fused.stretch

    @contextlib.contextmanager
    def layers(self) -> Iterator[None]:
        """Inside, the model attends within its rows' boundaries and computes with the fused
        layers, where there are any.
        """
        with contextlib.ExitStack() as stack:
            if self.policy.rows in ("varlen", "trie"):
                stack.enter_context(padding_free(self.model))
            if self.fused is not None:
                stack.enter_context(self.fused.active())
            yield

    def _shrink(self, segments: list[Segment]) -> None:
        """Halve the budget after an out-of-memory; raises CouldNotFinishError where rows cannot
        get smaller.
        """
        longest = max(len(segment) for segment in segments)
        whole = (
            unique_tokens(segments)
            if self.policy.rows == "trie"
            else sum(len(segment) for segment in segments)
        )
        before = min(self.policy.micro_batch_tokens, whole)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        kept = self.policy.recompute_above
        some_kept = kept is not None and any(len(s) <= kept for s in segments if s.supervised)
        stretched = self.stretch is not None
        self.policy.stretch = False  # what is at work in a tree's row is of the whole tree
        if before <= longest and not some_kept and not stretched:
            raise CouldNotFinishError(
                f"out of memory on a single sequence of {longest} tokens{_memory_numbers()}. "
                "Set model.max_seq_length below "
                f"{longest}, train.gradient_checkpointing: true, or model.quantization: nf4. "
                "The last checkpoint is whole."
            )
        self.policy.micro_batch_tokens = max(before // 2, 1)
        if kept is not None:  # what is longer than a row from now on is recomputed
            self.policy.recompute_above = min(kept, before) // 2
        self.on_note(
            f"out of memory with {before} tokens a micro-batch{_memory_numbers()}; the same "
            f"sequences again with {self.policy.micro_batch_tokens} (the effective batch stays)"
        )


def recomputed_layers(model: Any) -> list[Any]:
    """Return the modules of `model` that are set to compute their layers again in the backward
    pass, whoever set them.
    """
    return [m for m in model.modules() if vars(m).get("gradient_checkpointing")]


@contextlib.contextmanager
def keeping_activations(recomputed: list[Any]) -> Iterator[None]:
    """Inside, a forward pass through the modules `recomputed` keeps what its backward pass needs.

    A layer reads its setting when it computes forward; the backward pass, which may come after this
    context, goes by what the forward pass left.
    """
    before = [module.gradient_checkpointing for module in recomputed]
    for module in recomputed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module, value in zip(recomputed, before, strict=True):
            module.gradient_checkpointing = value


def _memory_numbers() -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated()
        return f" ({peak / 2**30:.1f} GiB peak, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"
    import psutil

    memory = psutil.virtual_memory()
    return f" ({memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB RAM free)"


def _rng_state() -> tuple[Any, Any]:
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
    )


def _restore_rng(state: tuple[Any, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
