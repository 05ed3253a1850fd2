"""The words of the quickstart's world, read from words.yaml: syllables of town names, attributes,
their values and how they are told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

LANGUAGES = ("en", "ja")


@dataclass(frozen=True)
class Word:
    """A word in English and in Japanese; `word["ja"]` reads one of them."""

    en: str
    ja: str

    def __getitem__(self, language: str) -> str:
        return {"en": self.en, "ja": self.ja}[language]


@dataclass(frozen=True)
class Attribute:
    """Something that is true of a town: the possible values, and how it is told and asked in each
    language.
    """

    key: str
    values: tuple[Word, ...]
    statements: dict[str, list[str]]
    questions: dict[str, list[str]]


def _words(pairs: str) -> tuple[Word, ...]:
    """Read ``"heron サギ, otter カワウソ"``."""
    return tuple(Word(*pair.split()) for pair in pairs.split(","))


_TABLES = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))

SYLLABLES, CODAS = _words(_TABLES["syllables"]), _words(_TABLES["codas"])
ATTRIBUTES = tuple(
    Attribute(key, **{**fields, "values": _words(fields["values"])})
    for key, fields in _TABLES["attributes"].items()
)
