"""From a file to the questions that a model is judged by.

Every format that can be trained on can be asked: what stands before the last answer is the
question, that answer is the expected one. Three more columns are read: `choices` (with `answer` as
a number from 0, a letter or the text of the right one), `answers` (all that count as right), and
`pattern` (a regular expression that a right answer holds).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.data.formats import BadRowError, Format, convert, detect
from fastft.data.read import Bad, kind_of, open_source, parse_json
from fastft.errors import FastFTError, one_of
from fastft.inference.metrics import CHOICE_METRICS, METRICS, TEXT_METRICS

SHOWN = 5  # lines of unusable rows that a message names


@dataclass(frozen=True)
class Question:
    """One row of the file."""

    line: int
    messages: list[dict[str, Any]]
    """What is asked; empty for a plain text, which is only measured."""
    reference: str
    """The expected answer, or the text."""
    accepted: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int = -1
    """Which of `choices` is right."""
    pattern: str | None = None
    tools: list[Any] | None = None

    @property
    def asked(self) -> str:
        """The question as a person sees it: the last message."""
        return str(self.messages[-1]["content"]) if self.messages else self.reference


@dataclass(frozen=True)
class QuestionFile:
    """The questions of a file, and what was left out."""

    questions: list[Question]
    format: str
    dropped: dict[int, str]
    """Line -> why it cannot be used."""

    def metrics(self, wanted: list[str]) -> list[str]:
        """Return the metrics to measure: those `wanted`, where "auto" is what the columns call for.

        Raises FastFTError for unknown names and for metrics that the columns do not allow.
        """
        unknown = [name for name in wanted if name not in (*METRICS, "auto")]
        if unknown:
            raise one_of("metric", unknown[0], [*METRICS, "auto"])
        allowed = self._allowed()
        refused = [name for name in wanted if name != "auto" and name not in allowed]
        if refused:
            raise FastFTError(
                f"the rows ({self.format}) cannot be judged by {', '.join(refused)}. They allow: "
                f"{', '.join(allowed)}. choice needs the columns choices and answer, regex "
                "the column pattern, exact_match and contains an answer."
            )
        chosen = self._chosen(allowed) if "auto" in wanted else []
        return [name for name in METRICS if name in wanted or name in chosen]

    def _allowed(self) -> list[str]:
        first = self.questions[0]
        if not first.messages:
            return list(TEXT_METRICS)
        names = ["exact_match", "contains"] if all(q.accepted for q in self.questions) else []
        names += ["regex"] if all(q.pattern for q in self.questions) else []
        names += CHOICE_METRICS if all(q.choices for q in self.questions) else []
        return [*names, *(TEXT_METRICS if all(q.reference for q in self.questions) else ())]

    def _chosen(self, allowed: list[str]) -> list[str]:
        for kind in (CHOICE_METRICS, ("regex",), ("exact_match", "contains"), TEXT_METRICS):
            if set(kind) <= set(allowed):
                return list(kind)
        raise AssertionError(allowed)


def read_questions(source: str, *, limit: int | None = None) -> QuestionFile:
    """Return the questions in `source` (a file, a folder, a Hub id), at most `limit` of them.

    Raises FastFTError where no row can be used. Unusable rows are left out and counted.
    """
    path = Path(source).expanduser()
    if kind_of(path) is not None and not path.exists():
        raise FastFTError(f"--data {source} does not exist (looked in {path.absolute().parent}).")
    rows: list[tuple[int, Any]] = []
    for chunk in open_source(source).chunks():
        rows += chunk.parsed()
        if limit is not None and len(rows) >= limit:
            rows = rows[:limit]
            break
    good = []
    for _, row in rows:
        with contextlib.suppress(BadRowError):  # said below, with its line
            if not isinstance(row, Bad):
                good.append(_completed(row))
    many = any(isinstance(row, Mapping) and row.get("choices") is not None for row in good)
    form = None if many or not good else detect(good[:200])
    found, dropped = [], {}
    for line, row in rows:
        try:
            if isinstance(row, Bad):
                raise BadRowError(row.reason, row.message)
            found.append(_choice_question(line, row) if form is None else _ask(line, row, form))
        except BadRowError as error:
            dropped[line] = str(error)
    if not found:
        first = [f"line {line}: {why}" for line, why in list(dropped.items())[:SHOWN]]
        raise FastFTError(
            f"{source} has no row that can be asked. {'; '.join(first) or 'It has no rows.'}"
        )
    return QuestionFile(found, "multiple choice" if form is None else form.name, dropped)


def _completed(row: Any) -> Any:
    """Return the row with an answer where it has only `answers` or a `pattern`."""
    if not isinstance(row, Mapping) or "question" not in row or row.get("answer") is not None:
        return row
    answer = _accepted(row)[0] if row.get("answers") else row.get("pattern")
    return row if answer is None else {**row, "answer": answer}


def _ask(line: int, row: Any, form: Format) -> Question:
    example = convert(_completed(row), form)
    if example.text is not None:
        if not example.text.strip():
            raise BadRowError("empty_text", "the text is empty")
        return Question(line, [], example.text)
    last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=0)
    if last == 0:
        raise BadRowError("no_answer", "there is no answer after a question")
    asked = [{k: v for k, v in m.items() if k != "weight"} for m in example.messages[:last]]
    pattern, accepted = _pattern(row), _accepted(row)
    # A row of question and pattern alone has no expected answer of its own.
    only_pattern = pattern is not None and not accepted and row.get("answer") is None
    expected = "" if only_pattern else str(example.messages[last]["content"])
    accepted = accepted or ((expected,) if expected else ())
    return Question(line, asked, expected, accepted, pattern=pattern, tools=example.tools)


def _accepted(row: Any) -> tuple[str, ...]:
    value = row.get("answers") if isinstance(row, Mapping) else None
    if value is None:
        return ()
    texts = _texts(value, "answers")
    if not texts:
        raise BadRowError("bad_answers", "answers is an empty list")
    return tuple(texts)


def _pattern(row: Any) -> str | None:
    pattern = row.get("pattern") if isinstance(row, Mapping) else None
    if pattern is None:
        return None
    try:
        re.compile(str(pattern))
    except re.error as error:
        raise BadRowError("bad_pattern", f"pattern {pattern!r} is no expression: {error}") from None
    return str(pattern)


def _choice_question(line: int, row: Any) -> Question:
    if not isinstance(row, Mapping) or row.get("choices") is None or row.get("answer") is None:
        raise BadRowError("missing_column", "the row needs choices and answer")
    choices, labels = _choices(row["choices"])
    right = _index(row["answer"], choices, labels)
    name = next((name for name in ("question", "prompt", "messages") if row.get(name)), None)
    if name is None:
        raise BadRowError("missing_column", "the row has no question (or prompt, or messages)")
    if name == "messages":
        made: dict[str, Any] = {"messages": row["messages"], "system": row.get("system")}
        answer = [{"role": "assistant", "content": choices[right]}]
        asked = [*_as_list(row["messages"], "messages"), *answer]
        example = convert(made | {"messages": asked}, detect([made]))
    else:
        made = {"question": row[name], "answer": choices[right], "system": row.get("system")}
        example = convert(made, detect([made]))
    return Question(
        line, example.messages[:-1], choices[right], (choices[right],), tuple(choices), right
    )


def _choices(value: Any) -> tuple[list[str], list[str]]:
    """Return the choices' texts and their labels: a list of texts, or ARC's {"text", "label"}."""
    if isinstance(value, Mapping):
        choices = _texts(value.get("text"), "choices.text")
        labels = [str(label) for label in _as_list(value.get("label") or [], "choices.label")]
        if labels and len(labels) != len(choices):
            raise BadRowError(
                "bad_choices", f"there are {len(choices)} choices and {len(labels)} labels"
            )
        return choices, labels or list(_letters(len(choices)))
    choices = _texts(value, "choices")
    return choices, list(_letters(len(choices)))


def _letters(count: int) -> Iterator[str]:
    return iter([chr(ord("A") + i) for i in range(min(count, 26))])


def _texts(value: Any, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) and not value.lstrip().startswith("[") else value
    texts = _as_list(texts, name)
    if not all(isinstance(text, str | int | float) and str(text).strip() for text in texts):
        raise BadRowError("bad_choices", f"{name} must be a list of texts, none of them empty")
    return [str(text) for text in texts]


def _as_list(value: Any, name: str) -> list[Any]:
    """Return a list, also one that a CSV file holds as JSON text."""
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise BadRowError("not_a_list", f"{name} must be a list, not {type(value).__name__}")
    return list(value)


def _index(answer: Any, choices: list[str], labels: list[str]) -> int:
    if len(choices) < 2:
        raise BadRowError("bad_choices", "a question needs at least two choices")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
    elif isinstance(answer, str):
        for names in (choices, labels, [str(i) for i in range(len(choices))]):
            if answer.strip() in names:
                return names.index(answer.strip())
    raise BadRowError(
        "bad_answer",
        f"answer {answer!r:.60} is none of the {len(choices)} choices: give a number from 0, a "
        "letter, or the text of the choice",
    )
