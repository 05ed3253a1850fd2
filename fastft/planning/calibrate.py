"""The plan against the first real steps, and whether the largest micro-batch to come will still
fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastft.hardware import GIB
from fastft.planning.memory import Situation, Term, imports_term, train_terms
from fastft.planning.resolve import MARGIN
from fastft.planning.shape import ModelShape

BELIEVABLE = (0.5, 2.0)
"""How far the growing part may be off before the rest is taken for something that does not grow (a
library's caches).
"""


@dataclass(frozen=True)
class Calibration:
    """Predicted against measured, and what the largest micro-batch to come will need (bytes)."""

    predicted_bytes: int
    measured_bytes: int
    tokens: int
    largest_tokens: int
    longest: int
    """Tokens of the longest sequence, which is a micro-batch of its own at least."""
    largest_bytes: int
    limit_bytes: int
    largest_fitting_tokens: int
    in_four_bits: bool

    @property
    def fits(self) -> bool:
        """Whether the largest micro-batch to come fits."""
        return self.largest_bytes <= self.limit_bytes

    @property
    def too_much(self) -> str:
        """What will not fit, in numbers, without what to do about it."""
        return (
            f"{self._seen}. {self._need} GiB, but only {self.limit_bytes / GIB:.2f} GiB are "
            "available"
        )

    @property
    def _seen(self) -> str:
        error = self.predicted_bytes / self.measured_bytes - 1
        planned, measured = self.predicted_bytes / GIB, self.measured_bytes / GIB
        return (
            f"A pass of {self.tokens:,} tokens took {measured:.2f} GiB of memory; "
            f"{planned:.2f} GiB were planned ({error:+.0%})"
        )

    @property
    def _need(self) -> str:
        return (
            f"The largest pass still to come ({self.largest_tokens:,} tokens) needs about "
            f"{self.largest_bytes / GIB:.2f}"
        )

    @property
    def message(self) -> str:
        """One line for the log; the advice where it will not fit."""
        if self.fits:
            return f"{self._seen}. {self._need} of the {self.limit_bytes / GIB:.2f} GiB available."
        most = self.largest_fitting_tokens
        if not most:
            less = "take a smaller base" if self.in_four_bits else "set model.quantization: nf4"
            advice = f"not even the weights leave room: {less}, or take a larger machine"
        elif most >= self.longest:
            advice = (
                f"set train.micro_batch_tokens to at most {most:,} and run the same command again "
                "(the gradient stays the same)"
            )
        else:
            advice = (
                f"start a new run with model.max_seq_length of at most {most:,}, or take a larger "
                "machine"
            )
        return f"{self.too_much}. The run stops here: {advice}"


def calibrate(
    shape: ModelShape,
    situation: Situation,
    *,
    tokens: int,
    measured_bytes: int,
    largest_tokens: int,
    limit_bytes: int,
    longest: int | None = None,
    to_come: Situation | None = None,
) -> Calibration:
    """Return how the plan did at a micro-batch of `tokens`, and what `largest_tokens` will need.

    `measured_bytes` is the peak of the steps so far (resident memory on a CPU, reserved VRAM on a
    GPU), `limit_bytes` what the process may have in all, `longest` the longest sequence among
    those `tokens` (default: all of them are one); `to_come` is the situation of `largest_tokens`,
    where that is another one. What does not grow with the tokens is taken from
    the plan; the growing part is scaled by measured over planned, within BELIEVABLE, and what that
    leaves unexplained stays as it is.
    """
    assert min(tokens, largest_tokens) > 0, "no step has been taken yet"

    def parts(kind: Situation, at: int, one: int) -> tuple[int, int]:
        """(bytes that stay, bytes that grow with tokens) at `at` tokens whose longest sequence has
        `one`.
        """
        s = replace(kind, tokens=at, longest=min(one, at))
        terms = [t for t in train_terms(shape, s) if t.name != "CUDA context"]
        growing = _growing(terms)
        fixed = sum(t.bytes for t in terms) - growing
        return fixed + (imports_term(s).bytes if s.device == "cpu" else 0), growing

    fixed, growing = parts(situation, tokens, longest or tokens)
    ratio = min(max((measured_bytes - fixed) / max(growing, 1), BELIEVABLE[0]), BELIEVABLE[1])
    unexplained = measured_bytes - fixed - ratio * growing

    def need(at: int) -> int:
        return int(fixed + unexplained + ratio * parts(to_come or situation, at, at)[1])

    fitting = 0
    if need(1) <= limit_bytes:
        low, high = 1, largest_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high)
                if need(middle) <= (1 - MARGIN / 2) * limit_bytes
                else (low, middle - 1)
            )
        fitting = low
    largest = need(largest_tokens)
    return Calibration(
        predicted_bytes=fixed + growing,
        measured_bytes=measured_bytes,
        tokens=tokens,
        largest_tokens=largest_tokens,
        longest=min(situation.longest, largest_tokens),
        largest_bytes=largest,
        limit_bytes=limit_bytes,
        largest_fitting_tokens=fitting,
        in_four_bits=situation.quantization == "nf4",
    )


def _growing(terms: list[Term]) -> int:
    """What training needs beyond a micro-batch of nothing: activations, loss, and the allocator's
    share of them.
    """
    stays = {"weights", "LoRA", "gradients", "optimizer", "weights in NF4", "weights in int8"}
    stays |= {"trainer and data", "tokenizer"}
    moving = [t for t in terms if t.name not in stays and not t.name.startswith("weights kept")]
    return sum(t.bytes for t in moving)
