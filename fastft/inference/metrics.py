"""How an answer is scored, and what a mean of scores is worth.

Pure functions over texts and numbers: `fastft eval`, the evaluations during training and the
quickstart all judge with these.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

ANSWER_METRICS = ("exact_match", "contains", "regex")
"""Judge a generated answer."""
CHOICE_METRICS = ("choice", "choice_norm")
"""Compare the likelihoods of the given choices."""
TEXT_METRICS = ("bits_per_byte", "perplexity")
"""Measure how well a text, or the expected answer, is predicted: smaller is better."""
METRICS = (*ANSWER_METRICS, *CHOICE_METRICS, *TEXT_METRICS)

DRAWS = 2000  # of the bootstrap; its interval moves by about 2 % of its width from seed to seed
Z95 = 1.959963984540054  # the 97.5th percentile of the normal distribution


def comparable(text: str) -> str:
    """Return `text` as exact match compares it.

    Unicode NFKC, case folded, outer white space and one final full stop removed. Nothing else is
    forgiven: the right word inside a longer sentence is a miss.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    return text.removesuffix(".").removesuffix("。").strip().casefold()


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where the answer equals one of `accepted` (see `comparable`), else 0.0."""
    return float(comparable(answer) in {comparable(text) for text in accepted})


def contains(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where one of `accepted` stands somewhere in the answer, else 0.0."""
    said = comparable(answer)
    return float(any(comparable(text) in said for text in accepted if comparable(text)))


def matches(answer: str, pattern: str) -> float:
    """Return 1.0 where the regular expression `pattern` is found in the answer, else 0.0.

    Raises FastFTError for a pattern that takes seconds.
    """
    from fastft.data import bounded

    return float(bounded.matches(pattern, answer))


@dataclass(frozen=True)
class Likelihood:
    """How probable a text is to a model."""

    log_probability: float
    """Natural logarithm, summed over its tokens."""
    tokens: int
    bytes: int
    """Of the text in UTF-8."""


@dataclass
class Scores:
    """One metric of one model over the rows: its value is sum(numerators) / sum(denominators).

    A mean has denominators of 1; bits per byte has bits over bytes, perplexity the exponential of
    nats over tokens.
    """

    metric: str
    numerators: list[float] = field(default_factory=list)  # (rows,)
    denominators: list[float] = field(default_factory=list)  # (rows,)

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value is the better one."""
        return self.metric in TEXT_METRICS

    def add(self, score: float) -> None:
        """Append a row's score between 0 and 1."""
        self.numerators.append(score)
        self.denominators.append(1.0)

    def add_likelihood(self, likelihood: Likelihood) -> None:
        """Append a row of bits per byte or perplexity."""
        nats = -likelihood.log_probability
        if self.metric == "bits_per_byte":
            self.numerators.append(nats / math.log(2))
            self.denominators.append(likelihood.bytes)
        else:
            self.numerators.append(nats)
            self.denominators.append(likelihood.tokens)

    def each(self) -> list[float]:
        """Return every row's own value."""
        pairs = zip(self.numerators, self.denominators, strict=True)
        return [float(self._value(top / bottom)) for top, bottom in pairs]

    def value(self) -> float:
        """Return the metric over all rows."""
        return float(self._value(sum(self.numerators) / sum(self.denominators)))

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """Return the 95 % interval of `value`.

        Right-or-wrong scores: Wilson (JASA 22, 1927), which stays open at 0 and 1, where a
        bootstrap has no width. Others: percentile bootstrap over the rows.
        """
        if not self.lower_is_better:
            return _wilson(self.value(), len(self.numerators))
        return _percentiles(self._drawn(_weights(len(self.numerators), seed)))

    def difference(self, other: Scores, seed: int = 0) -> tuple[float, float, float]:
        """Return (this value minus the other's, low, high): a paired percentile bootstrap.

        Both models' scores of a row are drawn together (Efron and Tibshirani 1993, chapter 13), so
        what makes a row hard for both cancels out.
        """
        weights = _weights(len(self.numerators), seed)
        low, high = _percentiles(self._drawn(weights) - other._drawn(weights))
        return self.value() - other.value(), low, high

    def _drawn(self, weights: np.ndarray) -> np.ndarray:
        tops = weights @ np.asarray(self.numerators)  # (draws,)
        return self._value(tops / (weights @ np.asarray(self.denominators)))

    def _value(self, ratio):  # type: ignore[no-untyped-def]  # a float or an array
        return np.exp(ratio) if self.metric == "perplexity" else ratio


def _weights(rows: int, seed: int) -> np.ndarray:
    """Return (draws, rows): how often each row is in each bootstrap sample."""
    drawn = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=DRAWS)
    return drawn.astype(np.float32)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _wilson(share: float, rows: int) -> tuple[float, float]:
    middle = (share + Z95**2 / (2 * rows)) / (1 + Z95**2 / rows)
    half = Z95 * math.sqrt(share * (1 - share) / rows + Z95**2 / (4 * rows**2))
    half /= 1 + Z95**2 / rows
    return max(0.0, middle - half), min(1.0, middle + half)
