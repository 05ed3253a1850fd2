"""The gate before any ratio: whether an arm did the same work, and learnt the same, as plain peft
in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from fastft.bench.case import Tolerances
from fastft.bench.record import Check, Parity, Record

CHANGE = 2.0
"""Largest allowed ratio between this arm's adapter change and the reference's: AdamW's variants
differ by less, a step that is left out or an optimizer that does nothing by more.
"""


@dataclass(frozen=True)
class Evidence:
    """A run's record and the file with its first step's LoRA gradient."""

    record: Record
    gradient: Path


Parts = list[tuple[int, int]]
"""A step's sequences: tokens, and how many of them another sequence begins with (Workload.parts)"""


def judge(run: Evidence, reference: Evidence, steps: list[Parts], tolerances: Tolerances) -> Parity:
    """Compare a run with the float32 reference; `steps` are the sequences of each step.

    Every check is made, so that a failure tells all that differs.
    """
    ours, theirs = run.record, reference.record
    checks = [
        _parameters(ours.trainable_parameters, theirs.trainable_parameters),
        *_tokens(ours, steps),
        _first_loss(ours, theirs, tolerances.loss),
        _trace(ours, theirs, tolerances.trace),
        *_gradient(run.gradient, reference.gradient, tolerances.cosine),
        _changed(ours.adapter_change, theirs.adapter_change),
    ]
    return Parity(passed=all(check.passed for check in checks), checks=checks)


def judge_across(
    full: Record,
    baseline: Record | None,
    small: Parity,
    steps: list[Parts],
    trainable: int,
    limit: float,
) -> Parity:
    """For a model too large for float32: the gate of the same shape with few layers, and step 1 at
    full size.

    `baseline` is the full-size run that the first loss is compared with (plain peft's, in the
    case's own precision; another arm's where that died, None where no other arm lived),
    `trainable` the adapter's parameters there.
    """
    checks = [
        *small.checks,
        _parameters(full.trainable_parameters, trainable, " at full size"),
        *_tokens(full, steps),
        _first_loss_at_full_size(full, baseline, limit),
        _norms_of_steps(full),
        _changed(full.adapter_change, None),
    ]
    return Parity(passed=small.passed and all(check.passed for check in checks), checks=checks)


def _check(
    name: str,
    passed: bool,
    text: str,
    value: float | None,
    expected: float | None = None,
    limit: float | None = None,
) -> Check:
    return Check(name=name, passed=passed, value=value, expected=expected, limit=limit, text=text)


def _parameters(mine: int | None, other: int | None, where: str = "") -> Check:
    text = f"{mine:,} trainable parameters{where}, the reference has {other:,}"
    return _check(f"trainable parameters{where}", mine == other, text, mine, other, 0)


def _tokens(ours: Record, steps: list[Parts]) -> list[Check]:
    tokens = [sum(length for length, _ in parts) for parts in steps]
    least = [sum(length - shared for length, shared in parts) for parts in steps]
    shares = ours.patches.get("share_prefixes", "").startswith("True")
    return [_tokens_seen(ours, least if shares else tokens, tokens), _claimed(ours, sum(tokens))]


def _tokens_seen(ours: Record, least: list[int], tokens: list[int]) -> Check:
    """That each step's tokens went through the model: all of `tokens`, or at least the `least` of
    them where an arm computes what sequences share once.
    """
    seen = [step.tokens for step in ours.steps]
    pairs = list(zip(least, seen, tokens, strict=False))
    wrong = next((i for i, (a, b, c) in enumerate(pairs) if not a <= b <= c), None)
    text = (
        f"{sum(seen):,} non-padding tokens went through the model, the steps hold {sum(tokens):,}"
    )
    if least != tokens:
        text += f", {sum(least):,} of them distinct"
    if wrong is not None:
        text += f" (first in step {wrong + 1}: {seen[wrong]:,} of {tokens[wrong]:,})"
    passed = len(seen) == len(tokens) and wrong is None
    return _check("tokens seen", passed, text, sum(seen), sum(tokens), sum(tokens) - sum(least))


def _claimed(ours: Record, tokens: int) -> Check:
    claimed = ours.claimed_tokens
    count = "no count" if claimed is None else f"{claimed:,} tokens of {tokens:,}"
    text = f"the arm claims {count}"
    return _check("tokens claimed", claimed is None or claimed == tokens, text, claimed, tokens, 0)


def _first_loss(ours: Record, theirs: Record, limit: float) -> Check:
    return _relative("step-1 loss", ours.steps[0].loss, theirs.steps[0].loss, limit)


def _first_loss_at_full_size(full: Record, baseline: Record | None, limit: float) -> Check:
    name = "step-1 loss at full size"
    if baseline is None:
        loss = full.steps[0].loss
        text = f"{name} {loss}: no other arm lived to compare it with"
        return _check(name, loss is not None and math.isfinite(loss), text, loss, limit=limit)
    return _relative(
        f"{name} against {baseline.arm}", full.steps[0].loss, baseline.steps[0].loss, limit
    )


def _norms_of_steps(full: Record) -> Check:
    """That no step's gradient is zero, as the trainer logs its norm (float16's scale may overflow
    and skip a step).
    """
    norms = [step.grad_norm for step in full.steps]
    wrong = [i + 1 for i, norm in enumerate(norms) if norm == 0]
    zero = f"; zero in steps {wrong}" if wrong else ""
    text = f"gradient norms of {len(norms)} steps at full size{zero}"
    return _check("gradient norms", not wrong, text, len(wrong), 0, 0)


def _changed(mine: float | None, other: float | None) -> Check:
    """That the steps moved the adapter, and about as far as the reference's (`other`; None: at
    all).
    """
    moved = mine is not None and math.isfinite(mine) and mine > 0
    text = f"the steps changed the adapter by {mine}"
    if moved and other is not None:
        assert mine is not None
        text = (
            f"the steps changed the adapter by {mine:.3g} (L2), the reference's by {other:.3g}, "
            f"at most {CHANGE:g}x apart"
        )
        moved = other / CHANGE <= mine <= other * CHANGE
    return _check("adapter change", moved, text, mine, other, CHANGE)


def _relative(name: str, value: float | None, expected: float | None, limit: float) -> Check:
    if value is None or expected is None or not math.isfinite(value):
        return _check(name, False, f"{name} is {value}", None, expected, limit)
    difference = abs(value - expected) / abs(expected)
    text = (
        f"{name} {value:.5f}, the reference has {expected:.5f}: {difference:.1e} apart, at most "
        f"{limit:.0e}"
    )
    return _check(name, difference <= limit, text, value, expected, limit)


def _trace(ours: Record, theirs: Record, limit: float) -> Check:
    mine, other = [s.loss for s in ours.steps], [s.loss for s in theirs.steps]
    if len(mine) != len(other) or any(loss is None or not math.isfinite(loss) for loss in mine):
        text = f"loss trace: {len(mine)} steps, the reference has {len(other)}; losses {mine}"
        return _check("loss trace", False, text, None, limit=limit)
    worst = max(
        abs(a - b) / abs(b)
        for a, b in zip(mine, other, strict=True)
        if a is not None and b is not None
    )
    text = f"loss trace of {len(mine)} steps: at most {worst:.1e} apart, limit {limit:.0e}"
    return _check("loss trace", worst <= limit, text, worst, 0.0, limit)


def _gradient(ours: Path, theirs: Path, least: float) -> list[Check]:
    """Cosine of the gradients, all tensors as one vector, and that none of the norms is zero."""
    mine, other = load_file(ours) if ours.exists() else {}, load_file(theirs)
    missing = sorted(set(other) - set(mine))
    norm = math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in mine.values()))
    without = f"; {len(missing)} tensors without gradient" if missing else ""
    text = f"gradient norm {norm:.3g}{without}"
    norms = _check("gradient norm", norm > 0 and not missing, text, norm, limit=0)
    same_shape = not missing and all(mine[name].shape == other[name].shape for name in other)
    if not same_shape or norm == 0:
        text = "LoRA gradient: other tensors than the reference's, or none"
        return [norms, _check("gradient cosine", False, text, None, limit=least)]
    dot = sum(float(np.sum(mine[n].astype(np.float64) * other[n])) for n in other)
    expected = math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in other.values()))
    cosine = dot / (norm * expected)
    text = f"cosine of the LoRA gradient with the reference's {cosine:.6f}, at least {least}"
    return [norms, _check("gradient cosine", cosine >= least, text, cosine, 1.0, least)]
