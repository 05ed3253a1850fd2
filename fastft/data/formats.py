"""What shape a dataset's rows have, and how each becomes messages (or a plain text).

The format is detected from the columns of the first rows and said with the evidence. A row that
does not fit it is not guessed at: it is refused with a reason, and counted.

    messages           {"messages": [{"role", "content"}, ...], "system", "tools": [...]}
    sharegpt           {"conversations": [{"from", "value"}, ...]}
    alpaca             {"instruction", "input", "output"}
    prompt_completion  {"prompt", "completion"}    both text, or both lists of messages
    question_answer    {"question", "answer"}
    text               {"text"}, or a bare string a line
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastft.data.read import Bad, parse_json
from fastft.data.template import Message, parse_arguments
from fastft.errors import FastFTError, did_you_mean

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
"""Format -> the columns it needs, in the order in which they are looked for."""

OPTIONAL = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
    "prompt_completion": ("system", "tools"),
    "question_answer": ("system",),
    "text": (),
}
ALIASES = {
    "conversation": "conversations", "response": "output", "functions": "tools", "system_prompt": "system",
    "context": "input",
}  # fmt: skip
"""Other names that are common for a column, used where the real one is missing."""

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "system": "system", "developer": "system", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip

_JSON_TEXT = re.compile(r'\s*\[\s*\{\s*"(?:role|content)"\s*:')
_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class BadRowError(FastFTError):
    """A row that cannot be used; `reason` is the key it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class FormatError(FastFTError):
    """The columns of a dataset fit no format, or not the mapping of them."""


@dataclasses.dataclass
class Example:
    """One row as messages (with tools), or as a plain text."""

    messages: list[Message] = dataclasses.field(default_factory=list)
    tools: list[Any] | None = None
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """The detected (or configured) format, and why."""

    name: str
    columns: Mapping[str, str]
    """What the format calls a column -> what the file calls it."""
    evidence: str
    unused: tuple[str, ...] = ()
    """Columns of the file that are not read."""


def detect(
    rows: Sequence[Any], *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Format:
    """Return the format of a dataset from its first rows.

    Raises FormatError that lists the columns there are and those that each format needs.
    """
    columns = dict(columns or {})
    seen: dict[str, int] = {}
    for row in rows:
        for key in (
            row if isinstance(row, Mapping) else ["(bare text)"] if isinstance(row, str) else []
        ):
            seen[str(key)] = seen.get(str(key), 0) + 1
    present = [name for name in seen if name != "(bare text)"]
    _check_columns(columns, format, present)
    resolved = {name: _find(name, columns, seen) for name in _all_names()}
    fits: dict[str, int] = {}  # format -> rows that have its columns
    for name in [format] if format != "auto" else _order(columns):
        if all(resolved[column] is not None for column in FORMATS[name]) and _looks_right(
            name, rows, resolved
        ):
            fits[name] = min(seen[str(resolved[column])] for column in FORMATS[name])
    if fits:
        # The first of those that most rows have; a few rows of another shape do not decide.
        name = max(fits, key=lambda name: (_mapped(name, columns), fits[name]))
        # An optional column that no looked-at row has may come later; it is then called by its own
        # name.
        used = {c: str(resolved[c] or c) for c in (*FORMATS[name], *OPTIONAL[name])}
        what = " and ".join(used[c] for c in FORMATS[name])
        how = "asked for" if format != "auto" else "detected"
        evidence = f"{how}: {fits[name]} of the first {len(rows)} rows have {what}"
        return Format(
            name, used, evidence, tuple(c for c in present if c.strip() and c not in used.values())
        )
    if seen.get("(bare text)") and format in ("auto", "text"):
        return Format(
            "text",
            {},
            f"detected: {seen['(bare text)']} of the first {len(rows)} rows are bare texts",
        )
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    raise FormatError(
        f"cannot tell what the rows mean{'' if format == 'auto' else f' as {format}'}: their "
        "columns are "
        f"{listed(present) or '(none)'}. Formats and the columns they need: {known}. Map "
        "yours with data.columns, "
        "for example columns: {prompt: my_question, completion: my_answer}."
    )


def convert(row: Any, format: Format, *, input_heading: str | None = None) -> Example:
    """Return the row as an Example. Raises BadRowError with the reason it is counted under."""
    if isinstance(row, str) and format.name == "text":
        return Example(text=_text(row, "text"))
    if not isinstance(row, Mapping):
        raise BadRowError(
            "not_an_object", f"a row must be an object with columns, not {type(row).__name__}"
        )
    value = {name: row.get(column) for name, column in format.columns.items()}
    missing = [format.columns[name] for name in FORMATS[format.name] if value.get(name) is None]
    if missing:
        raise BadRowError(
            "missing_column",
            f"no {', '.join(missing)} in this row (it has {listed(map(str, row)) or 'nothing'})",
        )
    example = _CONVERTERS[format.name](value, input_heading)
    if example.text is None:
        _check(example)
    return example


def _messages(value: dict[str, Any], _: str | None) -> Example:
    messages = [_message(m) for m in _list(value["messages"], "messages")]
    return Example(_with_system(messages, value), _tools(value.get("tools")))


def _sharegpt(value: dict[str, Any], _: str | None) -> Example:
    messages: list[Message] = []
    for turn in _list(value["conversations"], "conversations"):
        if isinstance(turn, Mapping) and "from" in turn:
            turn = {**turn, "role": turn["from"], "content": turn.get("value")}
        messages.append(_message(turn))
    return Example(_with_system(messages, value), _tools(value.get("tools")))


def _alpaca(value: dict[str, Any], heading: str | None) -> Example:
    asked = _text(value["instruction"], "instruction")
    given = _text(value.get("input"), "input", optional=True)
    if given.strip():
        asked = f"{asked}\n\n{heading}\n{given}" if heading else f"{asked}\n\n{given}"
    return _pair(asked, value["output"], value, "output")


def _prompt_completion(value: dict[str, Any], _: str | None) -> Example:
    prompt, completion = value["prompt"], value["completion"]
    if _is_messages(prompt) and _is_messages(completion):
        asked, answered = _list(prompt, "prompt"), _list(completion, "completion")
        messages = [_message(m) for m in (*asked, *answered)]
        # Only the completion is trained.
        for message in messages[: len(asked)]:
            if message["role"] == "assistant":
                message["weight"] = 0
        return Example(_with_system(messages, value), _tools(value.get("tools")))
    example = _pair(_text(prompt, "prompt"), completion, value, "completion")
    return dataclasses.replace(example, tools=_tools(value.get("tools")))


def _is_messages(value: Any) -> bool:
    """Whether this is a list of messages: as such, as the object of lists that `datasets` makes,
    as text in a CSV.
    """
    return isinstance(value, list | tuple | Mapping) or (
        isinstance(value, str) and bool(_JSON_TEXT.match(value))
    )


def _question_answer(value: dict[str, Any], _: str | None) -> Example:
    return _pair(_text(value["question"], "question"), value["answer"], value, "answer")


def _plain(value: dict[str, Any], _: str | None) -> Example:
    return Example(text=_text(value["text"], "text"))


_CONVERTERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "text": _plain,
}


def _pair(asked: str, answer: Any, value: dict[str, Any], column: str) -> Example:
    messages = [
        _message({"role": "user", "content": asked}),
        _message({"role": "assistant", "content": _text(answer, column)}),
    ]
    return Example(_with_system(messages, value))


def _with_system(messages: list[Message], value: Mapping[str, Any]) -> list[Message]:
    """Return `messages` begun by the text of the `system` column, unless they have a system
    message of their own.
    """
    system = _text(value.get("system"), "system", optional=True)
    if not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _message(raw: Any) -> Message:
    """Return a message with role, content (text) and, where there are any, reasoning, tool calls
    and their ids.
    """
    if not isinstance(raw, Mapping):
        raise BadRowError(
            "bad_message",
            f"a message must be an object with role and content, not {type(raw).__name__}",
        )
    name = raw.get("role", raw.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:60] + "..."
        raise BadRowError("unknown_role", f"unknown role {shown}{did_you_mean(shown, ROLES)}")
    content = raw.get("content", raw.get("value"))
    if role == "function_call":
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": _calls([parse_arguments(content)]),
        }
    message: Message = {
        "role": role,
        "content": _content(content, optional=bool(raw.get("tool_calls"))),
    }
    if raw.get("tool_calls"):
        message["tool_calls"] = _calls(raw["tool_calls"])
    if role == "assistant":
        _reasoning(message, raw)
        if raw.get("weight") not in (None, 0, 1):
            raise BadRowError(
                "bad_message",
                f"the weight of a message must be 0 or 1, it is {raw['weight']!r:.60}",
            )
        if raw.get("weight") == 0 or raw.get("train") is False:
            message["weight"] = 0
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if raw.get(key) is not None:
                message[key] = str(raw[key])
    return message


def _reasoning(message: Message, raw: Mapping[str, Any]) -> None:
    given = next(
        (
            raw[k]
            for k in ("reasoning_content", "thinking", "reasoning")
            if isinstance(raw.get(k), str)
        ),
        "",
    )
    inline = _THINK.fullmatch(message["content"])
    if not given and inline:
        given, message["content"] = inline.group(1), inline.group(2).strip()
    if given.strip():
        message["reasoning_content"] = given.strip()


def _content(content: Any, *, optional: bool) -> str:
    """Return a message's content as text; a list of parts is joined where all are text."""
    if isinstance(content, list | tuple):
        texts = []
        for part in content:
            if isinstance(part, Mapping) and part.get("type", "text") in (
                "text",
                "input_text",
                "output_text",
            ):
                texts.append(_text(part.get("text"), "content"))
            elif isinstance(part, str):
                texts.append(_text(part, "content"))
            else:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise BadRowError(
                    "not_text", f"a part of the content is {kind}; fastft trains on text only"
                )
        return "".join(texts)
    return _text(content, "content", optional=optional)


def _calls(calls: Any) -> list[Any]:
    """Return tool calls in OpenAI's shape, with arguments as a dict."""
    made = []
    for call in _list(calls, "tool_calls"):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError("bad_tool_call", "a tool call needs function.name")
        arguments = _clean(
            parse_arguments(function.get("arguments", function.get("parameters", {})) or {})
        )
        made_call = {
            "type": "function",
            "function": {"name": _text(function["name"], "name"), "arguments": arguments},
        }
        if isinstance(call, Mapping) and call.get("id"):
            made_call["id"] = str(call["id"])
        made.append(made_call)
    return made


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        tools = parse_json(tools) if tools.strip() else None
        if isinstance(tools, Bad):
            raise BadRowError("bad_tools", f"tools is {tools.message}")
    if not tools:
        return None
    made = []
    for tool in _list(tools, "tools"):
        if not isinstance(tool, Mapping):
            raise BadRowError("bad_tools", f"a tool must be an object, not {type(tool).__name__}")
        tool = _clean(dict(tool))
        made.append(tool if "function" in tool else {"type": "function", "function": tool})
    return made


def _clean(value: Any) -> Any:
    """Drop the nulls that Arrow puts into objects whose keys differ from row to row; check all
    texts.
    """
    if isinstance(value, Mapping):
        return {str(k): _clean(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return _text(value, "value") if isinstance(value, str) else value


def _list(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):  # CSV holds lists as JSON text
        value = parse_json(value)
        if isinstance(value, Bad):
            raise BadRowError("not_a_list", f"{column} is text, not a list, and {value.message}")
    if (
        isinstance(value, Mapping)
        and value
        and all(isinstance(v, list | tuple) for v in value.values())
    ):
        # `datasets` turns a list of objects into an object of lists.
        keys = list(value)
        if len({len(items) for items in value.values()}) > 1:
            lengths = ", ".join(f"{len(items)} {key}" for key, items in value.items())
            raise BadRowError(
                "not_a_list", f"{column} is an object of lists of different lengths ({lengths})"
            )
        value = [dict(zip(keys, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise BadRowError("not_a_list", f"{column} must be a list, not {type(value).__name__}")
    return list(value)


def _text(value: Any, column: str, *, optional: bool = False) -> str:
    """Return text; numbers and truth values are written out, anything else is refused."""
    if value is None and optional:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if value != value:
            raise BadRowError("missing_column", f"{column} is empty")
        if value in (float("inf"), float("-inf")):
            raise BadRowError("not_text", f"{column} must be text, it is an infinite number")
        return str(value)
    if not isinstance(value, str):
        what = "empty" if value is None else f"{type(value).__name__}"
        raise BadRowError("not_text", f"{column} must be text, it is {what}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(
            "lone_surrogate",
            f"{column} holds half a character (a lone surrogate, or a byte that is not UTF-8) "
            f"at {error.start}",
        ) from error
    return value.replace("\r\n", "\n").replace("\r", "\n")


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
    known = _all_names() if format == "auto" else (*FORMATS[format], *OPTIONAL[format])
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
    return tuple(dict.fromkeys(c for name in FORMATS for c in (*FORMATS[name], *OPTIONAL[name])))


def _order(columns: Mapping[str, str]) -> list[str]:
    """Formats whose columns the user mapped come first."""
    return sorted(FORMATS, key=lambda name: -_mapped(name, columns))


def _mapped(name: str, columns: Mapping[str, str]) -> int:
    """Return how many columns of the format `name` the user mapped."""
    return sum(c in columns for c in (*FORMATS[name], *OPTIONAL[name]))


def listed(names: Iterable[str], most: int = 20) -> str:
    """Return the names as one short text: a file without a header has its first row as names."""
    shown = [name if len(name) <= 60 else name[:60] + "..." for name in names]
    shown = [
        name.encode("utf-8", "backslashreplace").decode() for name in shown
    ]  # half characters cannot be printed
    return ", ".join(shown[:most]) + (
        f" and {len(shown) - most:,} more" if len(shown) > most else ""
    )


def _find(name: str, columns: Mapping[str, str], seen: Mapping[str, int]) -> str | None:
    if name in columns:
        return columns[name]
    lowered = {key.strip().lower(): key for key in seen}
    for candidate in (name, *(alias for alias, real in ALIASES.items() if real == name)):
        if candidate in seen:
            return candidate
        if candidate in lowered:
            return lowered[candidate]
    return None


def _looks_right(name: str, rows: Sequence[Any], resolved: Mapping[str, str | None]) -> bool:
    """Whether a list column holds lists: `messages` with from/value is sharegpt, and the other way
    round.
    """
    if name not in ("messages", "sharegpt"):
        return True
    column = resolved[FORMATS[name][0]]
    values = [row.get(column) for row in rows if isinstance(row, Mapping) and row.get(column)]
    return not values or any(
        isinstance(v, list | tuple | Mapping) or (isinstance(v, str) and v.lstrip()[:1] == "[")
        for v in values
    )
