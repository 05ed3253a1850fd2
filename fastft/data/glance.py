"""A first look at a data file for `fastft init`: how many rows, how long in tokens.

Reads the whole file once for its number of rows, and the texts of a sample of them. Imports
neither torch nor transformers: lengths are counted with the base's tokenizer where it lies on this
machine, else estimated from the characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fastft.data.read import Bad, kind_of, missing, open_source

SAMPLED = 400
"""Rows whose length is looked at: the first ones, and every so many after them."""
WIDE_TOKENS, NARROW_TOKENS = 0.9, 0.28
"""Tokens a character, roughly: of Japanese, Chinese and Korean, and of everything else."""
TURN_TOKENS = 8
"""What a chat template adds to a message, roughly."""


@dataclass(frozen=True)
class Glance:
    """What a look at the data gave."""

    rows: int
    median_tokens: int
    long_tokens: int
    """The 99th percentile."""
    counted: bool
    """Whether a tokenizer counted them; else they are estimated from the characters."""

    @property
    def max_seq_length(self) -> int:
        """The smallest usual length that holds 99 of 100 rows, 256 to 8,192 tokens."""
        return next((n for n in (256, 512, 1024, 2048, 4096) if n >= self.long_tokens), 8192)

    @property
    def epochs(self) -> int:
        """Passes over the data: few rows are read more than once."""
        return 3 if self.rows < 3000 else 1

    def __str__(self) -> str:
        how = "" if self.counted else "about "
        return (
            f"{self.rows:,} rows, {how}{self.median_tokens:,} tokens each "
            f"({how}{self.long_tokens:,} for the longest 1 %)"
        )


def glance(source: str, model: str) -> Glance | None:
    """Return what `source` holds, in tokens of the base `model`; None where it is no local file or
    folder (a Hub id is looked at by `fastft data`).

    Raises FastFTError where the file cannot be read, or is named like a data file and is not there.
    """
    if not Path(source).expanduser().exists():
        if kind_of(Path(source)) is not None:
            raise missing(source)
        return None
    tokens, rows = _tokenizer(model), 0
    lengths: list[int] = []
    for chunk in open_source(source).chunks():
        rows += len(chunk.rows)
        if len(lengths) < SAMPLED:
            some = chunk.parsed() if len(lengths) < SAMPLED // 2 else list(chunk.parsed())[:20]
            lengths += [_length(row, tokens or _estimate) for _, row in some if _has_text(row)]
    lengths = sorted(lengths) or [0]
    at = [lengths[len(lengths) // 2], lengths[min(len(lengths) - 1, len(lengths) * 99 // 100)]]
    return Glance(rows, at[0], at[1], counted=tokens is not None)


def _has_text(row: Any) -> bool:
    return not isinstance(row, Bad) and any(True for _ in _texts(row))


def _length(row: Any, count: Callable[[str], int]) -> int:
    return sum(count(text[:200_000]) + TURN_TOKENS for text in _texts(row))


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a row, at whatever depth; the short names of roles are none."""
    if isinstance(value, str):
        if value not in {"user", "assistant", "system", "human", "gpt", "tool"}:
            yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(_texts(inner) for inner in value.values())
    elif isinstance(value, list):
        yield from chain.from_iterable(_texts(inner) for inner in value)


def _tokenizer(model: str) -> Callable[[str], int] | None:
    """Return a function that counts tokens, where the base's tokenizer.json is on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    folder = Path(model).expanduser()
    found: Any = folder / "tokenizer.json"
    if not folder.is_dir():
        found = try_to_load_from_cache(model, "tokenizer.json") if model.count("/") == 1 else None
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    tokenizer = Tokenizer.from_file(str(found))

    def count(text: str) -> int:
        whole = text.encode("utf-8", "replace").decode()  # half a character is no text
        return len(tokenizer.encode(whole, add_special_tokens=False).ids)

    return count


def _estimate(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return round(wide * WIDE_TOKENS + (len(text) - wide) * NARROW_TOKENS)
