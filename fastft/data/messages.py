"""One row's messages, in the shapes that people publish, as fastft's own messages.

    {"role", "content"}    {"from", "value"}    {"role", "parts": [...]}    {"human", "assistant"}
    ["question", "answer"]    legacy function_call    content parts with text, thinking, tool use

A key of a message that is not read is remembered by name, so that the report can say it. What a
message excludes from training stays excluded, whatever the tool that wrote it calls the key.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from fastft.data.read import Bad, parse_json
from fastft.data.template import Message, parse_arguments
from fastft.errors import FastFTError, did_you_mean

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "ユーザー": "user", "ユーザ": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "chatbot": "assistant", "ai": "assistant", "アシスタント": "assistant",
    "system": "system", "developer": "system", "システム": "system", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "tool_response": "tool", "tool_result": "tool", "tool_results": "tool", "tool_output": "tool",
    "function_result": "tool", "function_call": "function_call", "tool_call": "function_call",
    "tool_calls": "function_call", "function_calls": "function_call",
}  # fmt: skip

LOSS_KEYS = (
    "weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight", "loss_scale",
)  # fmt: skip
"""Keys by which a message says whether it is trained: axolotl, ms-swift, OpenAI, Together."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning", "thought")
TURN_PAIRS = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("user", "bot"),
              ("question", "answer"), ("query", "response"), ("prompt", "response"),
              ("input", "output"), ("instruction", "output"))  # fmt: skip
"""Keys of an object that is a question and its answer in one turn."""

_CONTENT_KEYS = ("content", "value", "text", "message", "parts")
_NAMES_OF_ROLE = ("role", "from")
_READ = frozenset(
    (*_NAMES_OF_ROLE, *_CONTENT_KEYS, *LOSS_KEYS, *REASONING_KEYS, "masked", "mask", "tool_calls",
     "function_call", "tool_call_id", "name")
)  # fmt: skip
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
MEDIA = re.compile(r"image|video|audio|picture|photo|inline_?data|file_?data|input_file")
_PLACEHOLDER = re.compile(
    r"^[ \t]*<(image|video|audio)>|<(image|video|audio)>[ \t]*$"
    r"|<\|(?:image|video|audio)(?:_pad|_1)?\|>|<\|vision_start\|>|<image_soft_token>|<start_of_image>",
    re.MULTILINE,
)


class BadRowError(FastFTError):
    """A row that cannot be used; `reason` is the key it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_messages(turns: Any, column: str) -> tuple[list[Message], set[str]]:
    """Return the messages of a list of turns, and the keys of them that are not read."""
    messages: list[Message] = []
    unread: set[str] = set()
    for raw in as_list(turns, column):
        for turn in _turns_of(raw):
            made = _message(turn, unread)
            if messages and messages[-1].pop("_of_a_call", False) and made[0].get("_of_a_call"):
                # Calls in turns of their own that follow each other are parallel calls.
                messages[-1]["tool_calls"] += made[0]["tool_calls"]
                messages[-1]["_of_a_call"] = True
                continue
            messages += made
    for message in messages:
        message.pop("_of_a_call", None)
    return messages, unread


def text_message(role: str, content: str) -> Message:
    """Return a message of plain text; a block of thought that an answer begins with is its
    reasoning.
    """
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        _take_reasoning(message, {}, "", set())
    return message


def as_list(value: Any, column: str) -> list[Any]:
    """Return a list of turns or tools, also from JSON text (CSV) and an object of lists."""
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


def as_text(value: Any, column: str, *, optional: bool = False) -> str:
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
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRowError(
                "lone_surrogate",
                f"{column} holds half a character (a lone surrogate, or a byte that is not UTF-8) "
                f"at {error.start}",
            ) from error
    return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value


def read_tools(tools: Any) -> list[Any] | None:
    """Return the tools of a row in OpenAI's shape; Gemini's declarations are unpacked."""
    if isinstance(tools, str):
        tools = parse_json(tools) if tools.strip() else None
        if isinstance(tools, Bad):
            raise BadRowError("bad_tools", f"tools is {tools.message}")
    if not tools:
        return None
    made = []
    for tool in as_list(tools, "tools"):
        if not isinstance(tool, Mapping):
            raise BadRowError("bad_tools", f"a tool must be an object, not {type(tool).__name__}")
        declared = tool.get("functionDeclarations", tool.get("function_declarations"))
        for one in declared if isinstance(declared, list) else [tool]:
            one = _checked(one)
            made.append(one if "function" in one else {"type": "function", "function": one})
    return made


def without_padding(value: Any) -> Any:
    """Drop the nulls that Arrow puts into objects whose keys differ from row to row.

    Only for rows that Arrow holds: in JSON, a null was written by somebody.
    """
    if isinstance(value, Mapping):
        return {k: without_padding(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_padding(item) for item in value]
    return value


def _checked(value: Any) -> Any:
    """Return arguments or a tool as they are, with all texts checked."""
    if isinstance(value, Mapping):
        return {str(k): _checked(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(item) for item in value]
    return as_text(value, "value") if isinstance(value, str) else value


def _turns_of(raw: Any) -> list[Mapping[str, Any]]:
    """Return the turns in one item of a list: one as a rule, two where it is a pair."""
    if isinstance(raw, list | tuple):
        if len(raw) != 2 or not all(isinstance(part, str) for part in raw):
            raise BadRowError(
                "bad_message",
                f"a list among the messages must be [question, answer], it has {len(raw)} items",
            )
        if raw[0].strip().lower() in ROLES:
            return [{"role": raw[0], "content": raw[1]}]
        return [{"role": "user", "content": raw[0]}, {"role": "assistant", "content": raw[1]}]
    if not isinstance(raw, Mapping):
        raise BadRowError(
            "bad_message",
            f"a message must be an object with role and content, not {type(raw).__name__}",
        )
    if any(name in raw for name in _NAMES_OF_ROLE):
        return [raw]
    lowered = {str(key).lower(): key for key in raw}
    for asked, answered in TURN_PAIRS:
        if asked in lowered and answered in lowered:
            rest = {k: v for k, v in raw.items() if k not in (lowered[asked], lowered[answered])}
            return [
                *(
                    [{"role": "system", "content": rest.pop("system")}]
                    if rest.get("system")
                    else []
                ),
                {"role": "user", "content": raw[lowered[asked]]},
                {**rest, "role": "assistant", "content": raw[lowered[answered]]},
            ]
    return [raw]


def _message(raw: Mapping[str, Any], unread: set[str]) -> list[Message]:
    """Return the messages of one turn: one as a rule, more where it holds several tool results."""
    name = raw.get("role", raw.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:60] + "..."
        raise BadRowError("unknown_role", f"unknown role {shown}{did_you_mean(shown, ROLES)}")
    for key, value in raw.items():
        if key not in _READ and value not in (None, "", [], {}):
            if MEDIA.match(str(key).lower()):
                raise BadRowError("not_text", f"a message has {key}; fastft trains on text only")
            unread.add(str(key)[:60])
    content = next((raw[k] for k in _CONTENT_KEYS if raw.get(k) is not None), None)
    excluded = _is_excluded(raw, role, unread)
    if role == "function_call":
        calls = [
            {"role": "assistant", "content": "", "tool_calls": _calls_in_text(content),
             "_of_a_call": True}
        ]  # fmt: skip
        return [{**calls[0], "weight": 0}] if excluded else calls
    if role == "tool" and isinstance(content, Mapping) and not {"type", "text"} & content.keys():
        content = json.dumps(content, ensure_ascii=False)  # a result given as an object
    parts = _Parts.of(content)
    calls = [*_raw_calls(raw), *parts.calls]
    message: Message = {
        "role": role,
        "content": as_text(parts.text, "content", optional=bool(calls or parts.results)),
    }
    if calls and role == "assistant":
        message["tool_calls"] = _calls(calls)
    if role == "user" and "<" in message["content"]:
        _refuse_placeholders(message["content"])
    if role == "assistant":
        _take_reasoning(message, raw, parts.thought, unread)
        if excluded:
            message["weight"] = 0
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if raw.get(key) is not None:
                message[key] = str(raw[key])
    if not parts.results:
        return [message]
    return [*parts.results, message] if message["content"].strip() else parts.results


def _is_excluded(raw: Mapping[str, Any], role: str, unread: set[str]) -> bool:
    """Whether the message says that it is not trained.

    Raises BadRowError for a weight that is neither 0 nor 1, and for `mask`, of which nobody can
    tell whether 1 means hidden or learned.
    """
    excluded = False
    for key in (*LOSS_KEYS, "masked"):
        value = raw.get(key)
        if value is None:
            continue
        known = _TRUTH.get(str(value).strip().lower())
        if known is None:
            raise BadRowError(
                "bad_message",
                f"the {key} of a message must be 0 or 1 (or true, false), it is {value!r:.60}; "
                "fastft trains a message or leaves it out",
            )
        if role not in ("assistant", "function_call") and known and key != "masked":
            unread.add(f"{key} of a {role}'s message")
        excluded |= known if key == "masked" else not known
    if raw.get("mask") is not None and role in ("assistant", "function_call"):
        raise BadRowError(
            "bad_message",
            "a message has `mask`, which may mean hidden or learned; name it train (true, false)",
        )
    return excluded


def _take_reasoning(
    message: Message, raw: Mapping[str, Any], thought: str, unread: set[str]
) -> None:
    """Move an answer's reasoning, given under a key or in <think>, to `reasoning_content`."""
    given = thought
    for key in REASONING_KEYS:
        value = raw.get(key)
        if value is None or value == "":
            continue
        value = as_text(value, key)
        if given and value.strip() != given.strip():
            unread.add(key)
        given = given or value
    inline = _THINK.fullmatch(message["content"])
    if inline and (not given or inline.group(1).strip() == given.strip()):
        given, message["content"] = inline.group(1), inline.group(2).strip()
    if given.strip():
        message["reasoning_content"] = given.strip()


def _refuse_placeholders(text: str) -> None:
    found = _PLACEHOLDER.search(text)
    if found:
        raise BadRowError(
            "not_text",
            f"the place-holder {found.group().strip()} stands for something that is no text; "
            "fastft trains on text only",
        )


@dataclasses.dataclass
class _Parts:
    """What a list of content parts holds: text, thought, tool calls, tool results."""

    text: Any = None
    thought: str = ""
    calls: list[Any] = dataclasses.field(default_factory=list)
    results: list[Message] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, content: Any) -> _Parts:
        """Read OpenAI's, Anthropic's and Gemini's parts; anything that is no text is refused."""
        if isinstance(content, Mapping):
            content = [content]
        if not isinstance(content, list | tuple):
            return cls(text=content)
        made, texts = cls(), []
        for part in content:
            if isinstance(part, str):
                texts.append(as_text(part, "content"))
            elif isinstance(part, Mapping):
                text = made._add(part)
                if text is not None:
                    texts.append(text)
            else:
                raise BadRowError(
                    "not_text",
                    f"a part of the content is {type(part).__name__}; fastft trains on text only",
                )
        made.text = "".join(texts) if texts or not (made.calls or made.results) else None
        return made

    def _add(self, part: Mapping[str, Any]) -> str | None:
        """Keep a part that is no text; return the text of one that is."""
        kind = part.get("type")
        call = part.get("functionCall", part.get("function_call"))
        result = part.get("functionResponse", part.get("function_response"))
        if kind == "tool_use":
            self.calls.append(
                {"name": part.get("name"), "arguments": part.get("input"), "id": part.get("id")}
            )
        elif isinstance(call, Mapping):
            self.calls.append({"name": call.get("name"), "arguments": call.get("args")})
        elif kind == "tool_result":
            content = _Parts.of(part.get("content")).text
            self.results.append(_result(content, part.get("tool_use_id"), None))
        elif isinstance(result, Mapping):
            self.results.append(_result(result.get("response"), None, result.get("name")))
        elif kind in ("thinking", "reasoning") or part.get("thought") is True:
            said = part.get("thinking") or part.get("reasoning") or part.get("text")
            self.thought += as_text(said, "thinking")
        elif kind in (None, "text", "input_text", "output_text"):
            text = next((part[k] for k in ("text", "value", "content") if part.get(k) is not None),
                        None)  # fmt: skip
            if isinstance(text, Mapping):  # {"text": {"value": ...}}
                text = text.get("value")
            if text is None and kind is None:
                kind = next(iter(part), "empty")
                raise BadRowError(
                    "not_text", f"a part of the content is {kind!s:.60}; fastft trains on text only"
                )
            return as_text(text, "content")
        else:
            raise BadRowError(
                "not_text", f"a part of the content is {kind!s:.60}; fastft trains on text only"
            )
        return None


def _result(content: Any, call: Any, name: Any) -> Message:
    if isinstance(content, Mapping | list | tuple):
        content = json.dumps(content, ensure_ascii=False)
    message: Message = {"role": "tool", "content": as_text(content, "content", optional=True)}
    message |= {"tool_call_id": str(call)} if call else {}
    return message | ({"name": str(name)} if name else {})


def _raw_calls(raw: Mapping[str, Any]) -> list[Any]:
    calls = as_list(raw["tool_calls"], "tool_calls") if raw.get("tool_calls") else []
    return [*calls, raw["function_call"]] if raw.get("function_call") else calls


def _calls_in_text(content: Any) -> list[Any]:
    """Return the calls of a turn whose content is a call, or a list of them, as JSON."""
    value = parse_json(content) if isinstance(content, str) else content
    return _calls(value if isinstance(value, list | tuple) else [value])


def _calls(calls: Any) -> list[Any]:
    """Return tool calls in OpenAI's shape, with arguments as a dict."""
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError("bad_tool_call", "a tool call needs function.name")
        given = function.get("arguments", function.get("parameters"))
        if isinstance(given, list | tuple) and all(
            isinstance(item, list | tuple) and len(item) == 2 for item in given
        ):
            given = dict(given)  # a map of Arrow's
        if given is None or given == "":
            given = {}
        made_call = {
            "type": "function",
            "function": {
                "name": as_text(function["name"], "name"),
                "arguments": _checked(parse_arguments(given)),
            },
        }
        if isinstance(call, Mapping) and call.get("id"):
            made_call["id"] = str(call["id"])
        made.append(made_call)
    return made
