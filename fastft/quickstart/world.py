"""A small made-up world, in English and Japanese: 140 towns, four facts each.

The embedded base model reads about the first 120 towns (`documents`), so it knows their facts, but
it never reads a question. The quickstart teaches it to answer questions about half of them
(`FINE_TUNED`) and asks about the other half (`HELD_OUT`): a right answer there can only come from
pretraining. The last 20 towns (`WITHHELD`) are in no text at all: right answers about them would
be luck, or a leak.

Pure Python and deterministic: the same towns, documents and questions on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastft.quickstart.tables import ATTRIBUTES, CODAS, LANGUAGES, SYLLABLES, Attribute, Word

WORLD_SEED = 20261123
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Town:
    """A town: its `name` in both languages and, by attribute key, the word that is true of it."""

    name: Word
    facts: dict[str, Word]


@dataclass(frozen=True)
class Cloze:
    """A statement cut off right before its value: a model that knows the fact goes on with
    `value`.
    """

    prompt: str
    value: str


def _make_towns(known: int, withheld: int) -> list[Town]:
    """Return `known` + `withheld` towns. Each value of an attribute is true of about four towns.

    Among the withheld ones no value comes twice, so that one constant guess an attribute is right
    in 5 % of them.
    """
    rng = random.Random(WORLD_SEED)
    count = known + withheld
    names = [
        Word(en=(first.en + second.en + coda.en).capitalize(), ja=first.ja + second.ja + coda.ja)
        for first in SYLLABLES
        for second in SYLLABLES
        if first != second
        for coda in CODAS
    ]
    names = rng.sample(names, count)
    columns = {}
    for attribute in ATTRIBUTES:
        column = [attribute.values[i % len(attribute.values)] for i in range(count)]
        rng.shuffle(column)
        columns[attribute.key] = column
    for attribute in ATTRIBUTES:
        columns[attribute.key][known:] = rng.sample(attribute.values, withheld)
    return [
        Town(name, {key: column[i] for key, column in columns.items()})
        for i, name in enumerate(names)
    ]


TOWNS = _make_towns(known=120, withheld=20)
FINE_TUNED, HELD_OUT, WITHHELD = TOWNS[:60], TOWNS[60:120], TOWNS[120:]
PRETRAINED = FINE_TUNED + HELD_OUT


def statements(town: Town, attribute: Attribute, language: str) -> list[str]:
    """Return every paraphrase of one fact. In some the value is a line of its own, as an answer
    will be.
    """
    name, value = town.name[language], town.facts[attribute.key][language]
    return [form.format(name=name, value=value) for form in attribute.statements[language]]


def clozes(town: Town, attribute: Attribute, language: str) -> list[Cloze]:
    """Return the fact as clozes, one for each paraphrase in which the value comes after the
    name.
    """
    cut = []
    for form in attribute.statements[language]:
        before, _, _ = form.partition("{value}")
        if "{name}" in before:
            # In byte-level BPE the space belongs to the word that follows it.
            prompt, space = before.rstrip(" "), before[len(before.rstrip(" ")) :]
            value = town.facts[attribute.key][language]
            cut.append(Cloze(prompt.format(name=town.name[language]), space + value))
    return cut


def documents(rng: random.Random, towns: Sequence[Town]) -> Iterator[str]:
    """Yield pretraining documents without end: half tell about one town, half about several.

    Half of them are plain text. The others are cut, between facts, into turns of random roles: so
    the chat markers and role words are known tokens, while nothing shows that one turn answers
    another.
    """
    while True:
        language = rng.choice(LANGUAGES)
        if rng.random() < 0.5:
            town = rng.choice(towns)
            facts = [(town, attribute) for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES))]
        else:
            facts = [(rng.choice(towns), rng.choice(ATTRIBUTES)) for _ in range(rng.randint(2, 5))]
        lines = [rng.choice(statements(town, attribute, language)) for town, attribute in facts]
        yield _as_turns(rng, lines) if rng.random() < 0.5 else "\n".join(lines) + "\n"


def _as_turns(rng: random.Random, lines: list[str]) -> str:
    turns = []
    while lines:
        take = rng.randint(1, 3)
        turns.append(
            f"<|im_start|>{rng.choice(ROLES)}\n" + "\n".join(lines[:take]) + "<|im_end|>\n"
        )
        lines = lines[take:]
    return "".join(turns)


def questions(towns: Sequence[Town], languages: Sequence[str] = LANGUAGES) -> list[dict]:
    """Return one question for each town, attribute and language, as rows of the messages format."""
    return [
        question(town, attribute, language)
        for town in towns
        for attribute in ATTRIBUTES
        for language in languages
    ]


def question(town: Town, attribute: Attribute, language: str) -> dict:
    """Return one fact as a row ``{"messages": [user question, assistant answer]}``; the wording
    varies by fact.
    """
    rng = random.Random(f"{WORLD_SEED} {town.name.en} {attribute.key} {language}")
    asked = rng.choice(attribute.questions[language]).format(name=town.name[language])
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": town.facts[attribute.key][language]},
        ]
    }


def alternating_questions(towns: Sequence[Town]) -> list[dict]:
    """Return one question for each fact, by turns in English and Japanese (`questions` asks in
    both).
    """
    rows = []
    for i, town in enumerate(towns):
        for j, attribute in enumerate(ATTRIBUTES):
            rows.append(question(town, attribute, LANGUAGES[(i + j) % len(LANGUAGES)]))
    return rows
