"""Are padding-free rows exact on this model, with these kernels, on this machine? Found out, not
assumed.

On a CPU the tests answer it for the families of fastft/families.py. For any other family, and on a
GPU, where the attention is that of whatever Unsloth, xformers, FlashAttention or torch offer for
the card, an ignored boundary is wrong without any message. So before training, a few sequences of
the run's own data go through the model four times:

    alone     each sequence by itself: what the gradient has to be
    padded    as a padded batch: how much of a difference is rounding
    in a row  all of them in one padding-free row
    joined    as one long sequence, each seeing those before it: a row whose boundaries are ignored

Rows are used only where their gradient is that of the sequences alone, and clearly not on the way
to `joined`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastft.data import trie
from fastft.data.batches import Rows, Segment, supervised_tokens, unique_tokens
from fastft.engines.base import Engine
from fastft.errors import FastFTError
from fastft.hardware import Choice
from fastft.kernels.varlen import is_known_family, text_config
from fastft.training.step import Stepper, StepPolicy

MOST_TOKENS, MOST_SEQUENCES = 512, 8
ERROR, LOSS_ERROR, MARGIN = 1e-3, 1e-2, 4.0
FLOAT16_SCALE = 1024.0
NONE_FOUND = ("fit into one row", "share a beginning and fit into one row")


@dataclass(frozen=True)
class RowCheck:
    """How far a padding-free row is from its sequences computed alone."""

    sequences: int
    tokens: int
    error: float  # 1 - cosine of the gradients, row against alone; 0 is equal
    rounding: float  # the same of a padded batch against alone
    norm_ratio: float  # |gradient of the row| / |gradient alone|; 1 is equal
    loss_error: float  # relative; the larger one of training and evaluation
    leak: float  # 1 - cosine of the gradients, joined against alone
    longest: int = 0  # tokens of the longest of these sequences
    long_tokens: int = 0  # of a second row, around the data's longest sequence; 0: not needed
    long_error: float = 0.0  # its 1 - cosine against its sequences alone

    @property
    def exact(self) -> bool:
        """Whether the row is the same up to rounding, and sequences that saw each other would have
        been noticed.

        The gradient's cosine may be off by 0.001, or by twice what a padded batch is off (mixtures
        of experts, where rounding changes a route), its length and the loss by 1 %; ignored
        boundaries must be at least four times as far away as what was found.
        """
        same = (
            max(self.error, self.long_error) <= max(ERROR, 2 * self.rounding)
            and abs(self.norm_ratio - 1) <= LOSS_ERROR
            and self.loss_error <= LOSS_ERROR
        )
        return same and self.leak >= MARGIN * self.error

    @property
    def reason(self) -> str:
        """One line with the figures, for the choice that is printed and recorded."""
        return (
            f"{'exact' if self.exact else 'not exact'} here: {self.sequences} sequences in "
            f"one row of {self.tokens} tokens give "
            f"a gradient 1 - cos = {self.error:.1e} from theirs alone (a padded batch: "
            f"{self.rounding:.1e}, ignored boundaries: "
            f"{self.leak:.1e}), its length x{self.norm_ratio:.4f}, the loss off by "
            f"{100 * self.loss_error:.2f} %"
            + (
                f"; a row of {self.long_tokens:,} tokens: 1 - cos = {self.long_error:.1e}"
                if self.long_tokens
                else ""
            )
        )


def choose_rows(
    wanted: bool | str,
    model: Any,
    engine: Engine,
    check: Callable[[Rows], RowCheck | None],
    *,
    tested: bool,
    longest: int,
) -> tuple[Rows, Choice]:
    """Return how the model gets its rows, and the choice to print: without padding where that is
    exact.

    `wanted` is True, False or "auto". `check` looks whether such rows are exact on this machine.
    `tested`: tests hold the known families' rows here (a CPU), so these need no look. `longest`:
    most tokens of a sequence of the run. Raises FastFTError where rows without padding are asked
    for and not exact.
    """
    if wanted is False:
        return "padded", Choice(False, "asked for")
    rows, config = engine.accept_rows(model), text_config(model)
    known = rows != "varlen" or is_known_family(model)
    if known and tested:
        reason, exact = f"exact for {config.model_type}", True
    elif not known and (reason := _unfit(config)):
        exact = False
    else:
        exact, reason = _checked(check, rows, None if known else _window(config), longest)
        engine.forget_check(model)
    if exact:
        return rows, Choice(True, reason)
    if wanted is True:
        raise FastFTError(
            f"train.padding_free is on, but {reason}. Set it to auto: padded batches."
        )
    return "padded", Choice(False, f"padded batches, because {reason}")


def _unfit(config: Any) -> str:
    """Say why no look at short sequences could show rows to be exact; empty where one could."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if not kinds:
        return ""
    return (
        f"{config.model_type} has layers of kind {', '.join(sorted(kinds))}, which do not take "
        "the boundaries of sequences"
    )


def _window(config: Any) -> int | None:
    return getattr(config, "sliding_window", None)


def choose_sharing(
    wanted: bool | str,
    model: Any,
    engine: Engine,
    check: Callable[[Rows], RowCheck | None],
    *,
    rows: Rows,
    tested: bool,
    longest: int,
) -> tuple[Rows, Choice]:
    """Return `rows`, or trie rows where beginnings that a step's sequences share are computed once,
    and the choice to print.

    `rows` are what `choose_rows` returned, the other arguments its own. Raises FastFTError where
    sharing is asked for and impossible.
    """
    if wanted is False:
        return rows, Choice(False, "asked for")
    reason, config = _why_not_shared(model, rows), text_config(model)
    known = is_known_family(model)
    if not reason and known and tested:
        return "trie", Choice(True, f"exact for {config.model_type}")
    if not reason:
        exact, reason = _checked(check, "trie", None if known else _window(config), longest)
        engine.forget_check(model)
        if exact:
            return "trie", Choice(True, reason)
    if wanted is True:
        raise FastFTError(f"train.share_prefixes is on, but {reason}. Set it to auto or false.")
    return rows, Choice(False, reason)


def _why_not_shared(model: Any, rows: Rows) -> str:
    """Return why no beginning may be computed once here, or an empty string."""
    if rows == "padded":
        return "sequences are padded here (see padding_free)"
    if rows == "packed":
        return "Unsloth's attention for rows without padding knows no ancestors"
    config, dropout = text_config(model), _dropout(model)
    if dropout > 0:
        return (
            f"with dropout {dropout:g} each sequence needs a mask of its own; lora.dropout: 0 "
            "allows it"
        )
    if getattr(config, "output_router_logits", False):
        return "the router's loss counts every sequence's own tokens"
    return ""


def _dropout(model: Any) -> float:
    """The highest dropout of the model: its layers', or its attention's, which is a function's."""
    layers = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    attention = getattr(text_config(model), "attention_dropout", 0.0) or 0.0
    return float(max([*layers, attention]))


def _checked(
    check: Callable[[Rows], RowCheck | None], rows: Rows, window: int | None, longest: int
) -> tuple[bool, str]:
    """Return whether rows are exact, and the reason; a kernel that fails on them is a reason too.

    `window` is the sliding window of a family that no test knows: where the run has sequences
    beyond it and the check had none, it has shown nothing about it.
    """
    try:
        found = check(rows)
    except FastFTError:
        raise
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return (
            False,
            f"a row without padding failed: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}",
        )
    if found is None:
        return False, f"no two sequences of the first step {NONE_FOUND[rows == 'trie']}"
    if found.exact and window and longest > window >= found.longest:
        return False, (
            f"the longest of the sequences looked at has {found.longest} tokens, the model's "
            f"sliding window {window}: what happens beyond it was not seen"
        )
    return found.exact, found.reason


def check_rows(
    stepper: Stepper,
    segments: Sequence[Segment],
    context: Callable[[], AbstractContextManager[Any]],
    *,
    longest: Sequence[Segment] = (),
) -> RowCheck | None:
    """Compare a row of some of `segments` with its sequences alone; None where no two of them fit
    into a row.

    `stepper` has the rows to be checked in its policy and is left as it was, gradients empty.
    `context` makes the mixed precision of training. `longest` are the segments of the data's
    longest sample: where they are longer than that row, a second row around them is compared, so
    that sliding windows and kernels for large rows are seen, too.
    """
    budget = stepper.policy.micro_batch_tokens
    shared = stepper.policy.rows == "trie"
    chosen = _choose_sharing(segments, budget) if shared else _choose(segments, budget)
    if len(chosen) < 2:
        return None
    tokens = sum(len(segment) for segment in chosen)
    in_a_row = replace(stepper.policy, micro_batch_tokens=tokens)
    alone = replace(stepper.policy, micro_batch_tokens=1, rows="padded")
    with _eagerly(stepper.model):
        expected_loss, expected = _gradient(stepper, alone, chosen, context)
        _, padded = _gradient(stepper, replace(stepper.policy, rows="padded"), chosen, context)
        loss, found = _gradient(stepper, in_a_row, chosen, context)
        _, joined = _gradient(stepper, alone, [_join(chosen)], context)
        expected_eval, found_eval = (
            _evaluate(stepper, policy, chosen, context) for policy in (alone, in_a_row)
        )
    row = _long_row(chosen, longest, stepper.policy.micro_batch_tokens)
    return RowCheck(
        sequences=len(chosen),
        tokens=tokens,
        error=_distance(found, expected),
        rounding=_distance(padded, expected),
        norm_ratio=_norm(found) / _norm(expected) if _norm(expected) else float("inf"),
        loss_error=max(_relative(loss, expected_loss), _relative(found_eval, expected_eval)),
        leak=_distance(joined, expected),
        longest=max(len(segment) for segment in chosen),
        long_tokens=sum(map(len, row)),
        long_error=_compare_long(stepper, alone, row, context) if row else 0.0,
    )


def _long_row(chosen: list[Segment], longest: Sequence[Segment], budget: int) -> list[Segment]:
    """Return a row around the longest segment, with one of `chosen` before and after it if they
    fit; empty where it is no longer than the row that was compared already.
    """
    useful = [segment for segment in longest if segment.supervised]
    if not useful or max(map(len, useful)) <= sum(map(len, chosen)):
        return []
    long = max(useful, key=len)
    first, second = sorted(chosen, key=len)[:2]
    return [first, long, second] if len(first) + len(long) + len(second) <= budget else [long]


def _compare_long(
    stepper: Stepper,
    alone: StepPolicy,
    row: list[Segment],
    context: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Return 1 - cosine of the gradient of `row` against that of its sequences alone."""
    with _eagerly(stepper.model):
        _, expected = _gradient(stepper, alone, row, context)
        in_a_row = replace(stepper.policy, micro_batch_tokens=sum(map(len, row)))
        return _distance(_gradient(stepper, in_a_row, row, context)[1], expected)


@contextlib.contextmanager
def _eagerly(model: Any) -> Iterator[None]:
    """Disable dropout and compilation for a check.

    Compiling the layers for these few passes alone would cost 25 s (16 bit) to 100 s (4 bit) on a
    GPU, and rows without padding do not run compiled in training.
    """
    compiles = "torch._dynamo" in sys.modules  # whatever compiles a layer imports it
    eager = torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
    with _without_dropout(model), eager:
        yield


def _choose(segments: Sequence[Segment], budget: int) -> list[Segment]:
    """Return a few sequences that fit into one row together, in their order; the shortest two
    where none do at first.
    """
    most = min(budget, MOST_TOKENS)
    useful = [segment for segment in segments if segment.supervised]
    chosen: list[Segment] = []
    for segment in useful:
        if len(chosen) < MOST_SEQUENCES and sum(map(len, chosen)) + len(segment) <= most:
            chosen.append(segment)
    if len(chosen) >= 2:
        return chosen
    shortest = sorted(useful, key=len)[:2]
    return shortest if sum(map(len, shortest)) <= budget else []


def _choose_sharing(segments: Sequence[Segment], budget: int) -> list[Segment]:
    """Return a few sequences around the longest beginning that two of them share; none where their
    row would be above the budget.
    """
    useful = [segment for segment in segments if segment.supervised]
    order, shared = trie.sort_by_prefix([segment.input_ids for segment in useful])
    if not len(shared) or shared.max() < trie.SHORTEST:
        return []
    at = int(shared.argmax())
    chosen = [useful[i] for i in order[at - 1 : at + 1]]
    most = min(budget, max(MOST_TOKENS, unique_tokens(chosen)))
    for index in [*order[at + 1 :], *order[: at - 1]][: MOST_SEQUENCES - 2]:
        if unique_tokens([*chosen, useful[index]]) <= most:
            chosen.append(useful[index])
    return chosen if unique_tokens(chosen) <= most else []


def _join(segments: Sequence[Segment]) -> Segment:
    return Segment(
        np.concatenate([s.input_ids for s in segments]),
        np.concatenate([s.labels for s in segments]),
    )


def _gradient(
    stepper: Stepper,
    policy: StepPolicy,
    segments: list[Segment],
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, list[torch.Tensor]]:
    """Return (loss, gradients on the CPU in float32) of `segments` under `policy`."""
    model = stepper.model
    model.train()
    model.zero_grad(set_to_none=True)
    used = stepper.with_policy(policy)
    # float16 loses gradients below 6e-8; the factor is the same for all that is compared.
    used.scale = FLOAT16_SCALE if _computes_in_float16(context) else None
    factor = used.scale or 1.0
    loss = used.gradient(model, segments, lambda loss: (loss * factor).backward(), context)
    gradients = [
        p.grad.detach().float().cpu()
        for p in model.parameters()
        if p.requires_grad and p.grad is not None
    ]
    model.zero_grad(set_to_none=True)
    return loss, gradients


@torch.no_grad()
def _evaluate(
    stepper: Stepper,
    policy: StepPolicy,
    segments: list[Segment],
    context: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Return the loss as evaluation computes it: some kernels take another way there."""
    stepper.model.eval()
    with context():
        return stepper.with_policy(policy).loss(segments) / supervised_tokens(segments)


def _computes_in_float16(context: Callable[[], AbstractContextManager[Any]]) -> bool:
    with context():
        return any(
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
            for kind in ("cuda", "cpu", "mps")
        )


@contextlib.contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Disable dropout so both computations see the same network; restore train mode and clear
    gradients on exit, also after an error.
    """
    layers = [
        (module, module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)
    ]
    for module, _ in layers:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in layers:
            module.p = p
        # of a row that failed half-way; the step would add its own to them
        model.zero_grad(set_to_none=True)
        model.train()


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Return 1 - cosine of two gradients; infinite where one has no length or is not finite."""
    dot = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    cosine = dot / (_norm(a) * _norm(b)) if _norm(a) and _norm(b) else float("nan")
    return max(1 - cosine, 0.0) if np.isfinite(cosine) else float("inf")


def _norm(gradients: list[torch.Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradients) ** 0.5


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if b and np.isfinite(a) else float("inf")
