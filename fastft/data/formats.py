"""What shape a dataset's rows have, and how each becomes messages (or a plain text).

The format is detected from the columns of the first rows and said with the evidence. A row that
does not fit it is not guessed at: it is refused with a reason, and counted.

    messages           {"messages": [{"role", "content"}, ...], "system", "tools": [...]}
    sharegpt           {"conversations": [{"from", "value"}, ...]}
    alpaca             {"instruction", "input", "output"}
    prompt_completion  {"prompt", "completion"}    both text, or both lists of messages
    question_answer    {"question", "answer"}
    text               {"text"}, or a bare string a line

How one message is read: messages.py. Data that is no list of answers to learn: labels.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastft.data.labels import Labels, find_labels
from fastft.data.messages import (
    MEDIA,
    BadRowError,
    as_text,
    read_messages,
    read_tools,
    text_message,
    without_padding,
)
from fastft.data.template import Message
from fastft.errors import FastFTError, did_you_mean

_SYSTEM = ("system_prompt", "system_message", "systemInstruction", "system_instruction",
           "システム")  # fmt: skip
_CONTEXT = ("context", "article", "passage", "paragraph", "document", "background", "文脈", "本文")
_EVERYWHERE: dict[str, tuple[str, ...]] = {
    "system": _SYSTEM,
    "tools": ("functions",),
    "history": ("履歴",),
}

# Columns that may carry a part of what is asked. One that is not read must stand in what is.
_CARRIERS = re.compile(
    "|".join((*_CONTEXT, "history", "question", "query", "prompt", "instruction", "input",
              "choices", "options", "passages", "documents", "articles", "質問", "指示", "入力")),
    re.IGNORECASE,
)  # fmt: skip
_JSON_TEXT = re.compile(r'\s*\[\s*\{\s*"(?:role|content)"\s*:')


class FormatError(FastFTError):
    """The columns of a dataset fit no format, or not the mapping of them."""


@dataclasses.dataclass
class Example:
    """One row as messages (with tools), or as a plain text."""

    messages: list[Message] = dataclasses.field(default_factory=list)
    tools: list[Any] | None = None
    text: str | None = None
    unread: frozenset[str] = frozenset()
    """Keys of its messages that are not read."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The detected (or configured) format, and why."""

    name: str
    columns: Mapping[str, str]
    """What the format calls a column -> what the file calls it."""
    evidence: str
    unused: tuple[str, ...] = ()
    """Columns of the file that are not read."""
    ignored: frozenset[str] = frozenset()
    """Columns of which the user said that they carry nothing to learn from."""
    labels: Labels = dataclasses.field(default_factory=Labels)
    """What is taken of data that labels its answers."""

    @functools.cached_property
    def settled(self) -> frozenset[str]:
        """Columns that are read, or of which it is known that nothing is lost without them."""
        return frozenset((*self.columns.values(), *self.ignored))


Converter = Callable[[dict[str, Any], Format, str | None], Example]
"""From a row's values, the format as it was found, and the heading of an input to an example."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one format is: its columns, and how a row of it is read."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    """Other names that are common for a column, used where the real one is missing."""
    convert: Converter

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them, in the order in which they are looked for."""
        return self.needed + self.optional


def detect(
    rows: Sequence[Any],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    take: str | None = None,
    ignore: Sequence[str] = (),
    must_take: bool = True,
) -> Format:
    """Return the format of a dataset from its first rows.

    Raises FormatError that lists the columns there are and those that each format needs, and
    LabelledDataError for data that is no list of answers to learn.
    """
    columns = dict(columns or {})
    labels = find_labels(
        rows, take=take, ignore=ignore, columns=columns, wants=format, must_take=must_take
    )
    looked_at = [row for row in (_applied(labels, row) for row in rows) if row is not None]
    seen: dict[str, int] = {}
    bare = {"text": 0, "list": 0}
    for row in looked_at:
        for key in row if isinstance(row, Mapping) else ():
            seen[str(key)] = seen.get(str(key), 0) + 1
        bare["text"] += isinstance(row, str)
        bare["list"] += isinstance(row, list | tuple)
    present = [name for name in seen if name not in ignore]
    _check_columns(columns, format, present)
    found = {
        name: resolved
        for name in ([format] if format != "auto" else _order(columns))
        if (resolved := _resolved(name, columns, seen, ignore)) is not None
        and _looks_right(name, looked_at, resolved)
    }
    if found:
        made = _best(found, columns, seen, looked_at, present, format)
        return dataclasses.replace(made, labels=labels, ignored=frozenset(ignore))
    for kind, name in (("text", "text"), ("list", "messages")):
        if bare[kind] and format in ("auto", name):
            how = f"detected: {bare[kind]} of the first {len(looked_at)} rows are bare {kind}s"
            return Format(name, {}, how, labels=labels, ignored=frozenset(ignore))
    raise FormatError(_unknown_columns(looked_at, present, format))


def _applied(labels: Labels, row: Any) -> Any:
    try:
        return labels.apply(row)
    except BadRowError:
        return None


def _best(
    found: Mapping[str, dict[str, str]],
    columns: Mapping[str, str],
    seen: Mapping[str, int],
    rows: Sequence[Any],
    present: list[str],
    format: str,
) -> Format:
    """Return the first of the formats that most rows have; a few rows of another shape do not
    decide.
    """
    fits = {name: min(seen[used[c]] for c in FORMATS[name].needed) for name, used in found.items()}
    name = max(found, key=lambda name: (_mapped(name, columns), fits[name]))
    # An optional column that no looked-at row has may come later; it is then called by its own
    # name.
    used = {c: c for c in FORMATS[name].optional if c not in found[name].values()} | found[name]
    what = " and ".join(used[c] for c in FORMATS[name].needed)
    how = "asked for" if format != "auto" else "detected"
    evidence = f"{how}: {fits[name]} of the first {len(rows)} rows have {what}"
    unused = tuple(c for c in present if c.strip() and c not in used.values())
    return Format(name, used, evidence, unused)


def _unknown_columns(rows: Sequence[Any], present: list[str], format: str) -> str:
    """Say what is needed, and the line that mends it with the user's own names."""
    texts = [
        c for c in present
        if any(isinstance(row, Mapping) and isinstance(row.get(c), str) for row in rows)
    ] or present  # fmt: skip
    mine = [_yaml_name(c) for c in texts[:2]] or ["my_question", "my_answer"]
    fix = (
        f"{{prompt: {mine[0]}, completion: {mine[1]}}}" if len(mine) > 1 else f"{{text: {mine[0]}}}"
    )
    known = "; ".join(f"{name}: {', '.join(shape.needed)}" for name, shape in FORMATS.items())
    return (
        f"cannot tell what the rows mean{'' if format == 'auto' else f' as {format}'}: their "
        f"columns are {listed(present) or '(none)'}. Say which of them is asked and which is "
        f"answered, for example:\n    data:\n      columns: {fix}\n"
        f"Formats and the columns they need: {known}."
    )


def _yaml_name(name: str) -> str:
    name = name.encode("utf-8", "backslashreplace").decode()[:60]
    return name if re.fullmatch(r"\w[\w .-]*", name) else repr(name)


def convert(
    row: Any, format: Format, *, input_heading: str | None = None, padded: bool = False
) -> Example:
    """Return the row as an Example. Raises BadRowError with the reason it is counted under.

    `padded`: the row comes from Arrow, which fills keys that a row lacks with null.
    """
    if isinstance(row, str) and format.name == "text":
        return Example(text=as_text(row, "text"))
    if isinstance(row, list | tuple) and format.name == "messages":
        row = {format.columns.get("messages", "messages"): row}
    if not isinstance(row, Mapping):
        raise BadRowError(
            "not_an_object", f"a row must be an object with columns, not {type(row).__name__}"
        )
    if padded:
        row = without_padding(row)
    row = format.labels.apply(row)
    columns = format.columns or {"messages": "messages"}
    value = {name: row.get(column) for name, column in columns.items()}
    missing = [columns.get(n, n) for n in FORMATS[format.name].needed if value.get(n) is None]
    if missing:
        raise BadRowError(
            "missing_column",
            f"no {', '.join(missing)} in this row (it has {listed(map(str, row)) or 'nothing'})",
        )
    example = FORMATS[format.name].convert(value, format, input_heading)
    if example.text is None:
        _check(example)
        _check_nothing_lost(row, format, example)
    return example


def _messages(value: dict[str, Any], format: Format, _: str | None) -> Example:
    name = FORMATS[format.name].needed[0]
    messages, unread = read_messages(value[name], name)
    return _example(messages, value, unread)


def _alpaca(value: dict[str, Any], _: Format, heading: str | None) -> Example:
    asked = as_text(value["instruction"], "instruction")
    given = as_text(value.get("input"), "input", optional=True)
    if given.strip():
        asked = f"{asked}\n\n{heading}\n{given}" if heading else f"{asked}\n\n{given}"
    return _pair(asked, value["output"], value, "output")


def _prompt_completion(value: dict[str, Any], format: Format, _: str | None) -> Example:
    prompt, completion = value["prompt"], value["completion"]
    if _is_messages(prompt) and _is_messages(completion):
        asked, unread = read_messages(prompt, "prompt")
        answered, more = read_messages(completion, "completion")
        # Only the completion is trained.
        for message in asked:
            if message["role"] == "assistant":
                message["weight"] = 0
        return _example([*asked, *answered], value, unread | more)
    asked_text = _with_context(as_text(prompt, "prompt"), value, format)
    return _pair(asked_text, completion, value, "completion")


def _is_messages(value: Any) -> bool:
    """Whether this is a list of messages: as such, as the object of lists that `datasets` makes,
    as text in a CSV.
    """
    return isinstance(value, list | tuple | Mapping) or (
        isinstance(value, str) and bool(_JSON_TEXT.match(value))
    )


def _question_answer(value: dict[str, Any], format: Format, _: str | None) -> Example:
    asked = _with_context(as_text(value["question"], "question"), value, format)
    return _pair(asked, value["answer"], value, "answer")


def _plain(value: dict[str, Any], _: Format, __: str | None) -> Example:
    return Example(text=as_text(value["text"], "text"))


FORMATS: dict[str, Shape] = {
    "messages": Shape(
        ("messages",), ("system", "tools"),
        {"messages": ("contents", "dialog", "dialogue", "dialogs", "dialogues", "turns")},
        _messages,
    ),
    "sharegpt": Shape(
        ("conversations",), ("system", "tools"), {"conversations": ("conversation",)}, _messages
    ),
    "alpaca": Shape(
        ("instruction", "output"), ("input", "system", "history"),
        {
            "instruction": ("指示",),
            "input": ("入力", *_CONTEXT, "question", "query", "質問"),
            "output": ("出力", "応答", "回答", "response", "completion", "answer"),
        },
        _alpaca,
    ),
    "prompt_completion": Shape(
        ("prompt", "completion"), ("input", "system", "tools", "history"),
        {"completion": ("response", "output", "answer"), "input": ("入力", *_CONTEXT)},
        _prompt_completion,
    ),
    "question_answer": Shape(
        ("question", "answer"), ("input", "system", "history"),
        {
            "question": ("質問", "query", "problem", "問題", "user", "human", "input"),
            "answer": ("回答", "response", "output", "completion", "answers", "応答", "出力",
                       "solution", "assistant", "gpt", "bot", "答え"),
            "input": _CONTEXT,
        },
        _question_answer,
    ),
    "text": Shape(("text",), (), {}, _plain),
}  # fmt: skip
"""Every format, in the order in which they are looked for. A new one is a row here, and its name in
`data.format` (config.py).
"""


def _with_context(asked: str, value: Mapping[str, Any], format: Format) -> str:
    """Put a passage before the question that is asked about it, an input after its prompt."""
    given = as_text(value.get("input"), format.columns.get("input", "input"), optional=True)
    if not given.strip():
        return asked
    after = format.columns.get("input") in ("input", "入力")
    return f"{asked}\n\n{given}" if after else f"{given}\n\n{asked}"


def _pair(asked: str, answer: Any, value: dict[str, Any], column: str) -> Example:
    before: list[Message] = []
    unread: set[str] = set()
    if value.get("history") not in (None, "", [], ()):
        before, unread = read_messages(value["history"], "history")
    messages = [
        *before,
        text_message("user", asked),
        text_message("assistant", as_text(_one_answer(answer, column), column)),
    ]
    return _example(messages, value, unread)


def _one_answer(answer: Any, column: str) -> Any:
    """Return the answer of a list of equal ones, as question answering sets hold it."""
    if isinstance(answer, Mapping) and isinstance(answer.get("text"), list | tuple):
        answer = answer["text"]
    if not isinstance(answer, list | tuple):
        return answer
    if len({str(one) for one in answer}) != 1:
        raise BadRowError(
            "several_answers" if answer else "empty_answer",
            f"{column} holds {len(answer)} answers; which of them is meant?",
        )
    return answer[0]


def _example(messages: list[Message], value: Mapping[str, Any], unread: set[str]) -> Example:
    return Example(
        _with_system(messages, value), read_tools(value.get("tools")), unread=frozenset(unread)
    )


def _with_system(messages: list[Message], value: Mapping[str, Any]) -> list[Message]:
    """Return `messages` begun by the text of the `system` column, unless they have a system
    message of their own.
    """
    system = value.get("system")
    if isinstance(system, Mapping | list):  # Gemini: {"parts": [{"text": ...}]}
        made, _ = (
            read_messages([{"role": "system", "parts": system}], "system")
            if isinstance(system, list)
            else read_messages([{"role": "system", **system}], "system")
        )
        system = made[0]["content"]
    system = as_text(system, "system", optional=True)
    if not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


@functools.cache
def _kind_of_column(column: str) -> str:
    """Return media, carrier (of a part of the question), or other."""
    if MEDIA.match(column.lower()):
        return "media"
    return "carrier" if _CARRIERS.fullmatch(column) else "other"


def _check_nothing_lost(row: Mapping[str, Any], format: Format, example: Example) -> None:
    """Refuse a row whose other columns hold a picture, or a part of the question that is not
    asked.
    """
    if row.keys() <= format.settled:
        return
    said: str | None = None
    for column in row.keys() - format.settled:
        kind, value = _kind_of_column(str(column)), row[column]
        if kind == "media" and isinstance(value, str | bytes | list | tuple | Mapping) and value:
            raise BadRowError(
                "not_text", f"the column {column} holds no text; fastft trains on text only"
            )
        for text in _texts(value) if kind == "carrier" else ():
            if said is None:
                said = "".join("".join(m["content"] for m in example.messages).split())
            if "".join(text.split()) not in said:
                raise BadRowError(
                    "column_not_read",
                    f"the column {column} seems to belong to the question and is not read; map "
                    f"it with data.columns, or say data.ignore: [{column}]",
                )


def _texts(value: Any) -> list[str]:
    """Return all texts in a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) and value.strip() else []


def _check(example: Example) -> None:
    """Refuse conversations in which nothing could be learned or asked."""
    roles = [m["role"] for m in example.messages]
    if not roles:
        raise BadRowError("empty_conversation", "the conversation has no messages")
    answers = [m for m in example.messages if m["role"] == "assistant"]
    if not answers:
        raise BadRowError("no_answer", "nobody answers: the conversation has no assistant's turn")
    if not any(m["content"].strip() or m.get("tool_calls") for m in answers):
        raise BadRowError("empty_answer", "the answer is empty")
    if any(not m["content"].strip() and not m.get("tool_calls") for m in answers):
        raise BadRowError("empty_answer", "one of the answers is empty")
    first = next((role for role in roles if role != "system"), None)
    if first == "assistant" and (len(answers) == 1 or "user" not in roles):
        raise BadRowError("no_prompt", "the answer has nothing before it that asks for it")
    if "system" in roles[1:]:
        raise BadRowError(
            "role_order",
            f"a system message stands at place {roles.index('system', 1) + 1}, it belongs first",
        )
    if not any(
        m["content"].strip() for m in example.messages if m["role"] in ("user", "system", "tool")
    ):
        raise BadRowError("empty_prompt", "what is asked is empty")
    previous = None
    for place, role in enumerate(roles, 1):
        if role in ("user", "assistant") and role == previous == "user":
            raise BadRowError(
                "role_order", f"two {role} messages follow each other at place {place}"
            )
        previous = role


def _check_columns(columns: Mapping[str, str], format: str, present: list[str]) -> None:
    known = _all_names() if format == "auto" else FORMATS[format].columns
    problems = [
        f"unknown name {n!r}{did_you_mean(n, known)}; known: {', '.join(known)}"
        for n in columns
        if n not in known
    ]
    problems += [
        f"{name}: {column!r} is not in the first rows{did_you_mean(column, present)}; their "
        f"columns: {listed(present)}"
        for name, column in columns.items()
        if name in known and column not in present
    ]
    if problems:
        raise FormatError("data.columns: " + "; ".join(problems) + ".")


def _all_names() -> tuple[str, ...]:
    return tuple(dict.fromkeys(c for shape in FORMATS.values() for c in shape.columns))


def _order(columns: Mapping[str, str]) -> list[str]:
    """Formats whose columns the user mapped come first."""
    return sorted(FORMATS, key=lambda name: -_mapped(name, columns))


def _mapped(name: str, columns: Mapping[str, str]) -> int:
    """Return how many columns of the format `name` the user mapped."""
    return sum(c in columns for c in FORMATS[name].columns)


def _resolved(
    name: str, columns: Mapping[str, str], seen: Mapping[str, int], ignore: Sequence[str]
) -> dict[str, str] | None:
    """Return what the file calls the columns of the format `name`; None where a needed one is
    missing.
    """
    used: dict[str, str] = {}
    lowered = {key.strip().lower(): key for key in seen if key not in ignore}
    for column in FORMATS[name].columns:
        aliases = FORMATS[name].aliases.get(column) or _EVERYWHERE.get(column, ())
        taken = set(used.values()) | {v for k, v in columns.items() if k != column}
        found = columns.get(column) or next(
            (
                lowered[candidate.lower()]
                for candidate in (column, *aliases)
                if candidate.lower() in lowered and lowered[candidate.lower()] not in taken
            ),
            None,
        )
        if found is not None:
            used[column] = found
        elif column in FORMATS[name].needed:
            return None
    return used


def listed(names: Iterable[str], most: int = 20) -> str:
    """Return the names as one short text: a file without a header has its first row as names."""
    shown = [name if len(name) <= 60 else name[:60] + "..." for name in names]
    # half characters cannot be printed
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in shown]
    return ", ".join(shown[:most]) + (
        f" and {len(shown) - most:,} more" if len(shown) > most else ""
    )


def _looks_right(name: str, rows: Sequence[Any], resolved: Mapping[str, str]) -> bool:
    """Whether a list column holds lists: `messages` with from/value is sharegpt, and the other way
    round.
    """
    if name not in ("messages", "sharegpt"):
        return True
    column = resolved[FORMATS[name].needed[0]]
    values = [row.get(column) for row in rows if isinstance(row, Mapping) and row.get(column)]
    return not values or any(
        isinstance(v, list | tuple | Mapping) or (isinstance(v, str) and v.lstrip()[:1] == "[")
        for v in values
    )
