"""How the next token is chosen: the defaults of `fastft chat` and of every call. Imports nothing
heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastft.errors import FastFTError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 3407

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"--max-new-tokens is {self.max_new_tokens}, it must be at least 1")
        if not 0 <= self.temperature <= 5:
            problems.append(
                f"--temperature is {self.temperature}, it must lie between 0 (greedy) and 5"
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"--top-p is {self.top_p}, it must be above 0 and at most 1")
        if problems:
            raise FastFTError("; ".join(problems) + ".")
