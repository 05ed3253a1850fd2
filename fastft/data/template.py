"""Which chat template is used and why, how messages become its text, and how a generation is asked
for.

Training and generation go through the same `ChatTemplate`: `render` for a whole conversation or a
prompt, `generation_prompt` for the token ids that a model answers to. How text becomes tokens and
masks: encode.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fastft.data.bounded import (
    GROWTH_BYTES,
    OUTPUT_CHARACTERS,
    SECONDS,
    TemplateLimitError,
    huge_constant,
    limited,
)
from fastft.data.named_templates import INPUT_HEADINGS, NAMED
from fastft.errors import FastFTError, one_of

Message = dict[str, Any]
Messages = Sequence[Message]

TRAINING_DATE = datetime.date(2026, 1, 1)
"""Some templates write today's date. Training uses one fixed day, so that a resumed run sees the
same tokens.
"""

THINKING_SWITCHES = ("enable_thinking", "thinking")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# private use: in nobody's template
_USER, _ANSWER, _THOUGHT = ("\U000f0ff0u", "\U000f0ff0a", "\U000f0ff0t")


class TemplateRefusedError(FastFTError):
    """The template raised an error for these messages (roles that must alternate, no system role
    ...).
    """


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template bound to a tokenizer, and what was found out about it by rendering
    probes.
    """

    name: str
    source: str
    why: str
    tokenizer: Any = dataclasses.field(repr=False, compare=False)
    needs_tokens: tuple[str, ...] = ()
    """Special tokens it writes that a base model has not been trained on."""
    thinking: bool | None = None
    """How generation is asked for where the template can think: on, off; None: it has no such
    switch.
    """
    notices: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """The same as `why`."""
        return self.why

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """All strings that are control tokens of the tokenizer, which in a user's text are only
        text.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        return frozenset(
            str(t)
            for t in (*self.tokenizer.all_special_tokens, *(t for t in added if t.special))
            if str(t)
        )

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token, the longest first."""
        names = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def _control_starts(self) -> tuple[str, ...]:
        return tuple({token[0] for token in self.control_tokens})

    def mentions_control(self, text: str) -> bool:
        """Whether a control token is spelled out in `text`. Most texts lack even a first character
        of one.
        """
        starts = self._control_starts
        if len(starts) <= 8 and not any(start in text for start in starts):
            return False
        return self.control_pattern.search(text) is not None

    @cached_property
    def switch(self) -> str | None:
        """The name of the variable that turns thinking on and off, where it changes anything."""
        for name in THINKING_SWITCHES:
            if name in self.source:
                probe = [{"role": "user", "content": _USER}]
                texts = {
                    self._plain_render(probe, prompt=True, switches={name: value})
                    for value in (True, False)
                }
                if len(texts) == 2:
                    return name
        return None

    @cached_property
    def reasoning_key(self) -> str | None:
        """Under which key of a message the template reads its reasoning; None: it knows of none."""
        for key in REASONING_KEYS:
            answer = {"role": "assistant", "content": _ANSWER, key: _THOUGHT}
            text = self._try([{"role": "user", "content": _USER}, answer], self._switched(True))
            if text is not None and text.count(_THOUGHT) == 1 and text.count(_ANSWER) == 1:
                return key
        # Some write the thought only beside a call.
        empty, as_text = self.call_shape
        arguments = f'{{"x": "{_ANSWER}"}}' if as_text else {"x": _ANSWER}
        return next(
            (
                k
                for k in REASONING_KEYS
                if self._calls(arguments, content=empty, **{k: _USER + "t"})
            ),
            None,
        )

    @cached_property
    def folds_system(self) -> bool:
        """Whether the template refuses or forgets a system message: it then goes before the first
        user message.
        """
        system = {"role": "system", "content": _THOUGHT}
        rest = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
        if self._try(rest) is None:
            return False
        text = self._try([system, *rest])
        return text is None or _THOUGHT not in text

    @cached_property
    def always_asks(self) -> str:
        """What stands after a question where the template asks for an answer whether it is told to
        or not (Command-R7B); empty where it does as it is told.
        """
        probe: list[Message] = [{"role": "user", "content": _USER}]
        try:
            asked, history = self.render(probe, prompt=True), self.render(probe)
        except TemplateRefusedError:
            return ""
        return history.rpartition(_USER)[2] if asked == history else ""

    @cached_property
    def heading_tokens(self) -> frozenset[str]:
        """The control tokens of the generation prompt: they begin a turn, and end none."""
        probe: list[Message] = [{"role": "user", "content": _USER}]
        try:
            asked, history = self.render(probe, prompt=True), self.render(probe)
        except TemplateRefusedError:
            return frozenset()
        heading = asked.removeprefix(history) if asked.startswith(history) else ""
        return frozenset(match.group() for match in self.control_pattern.finditer(heading))

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template writes a content only as a list of parts (those for pictures do)."""
        if self._answers(_ANSWER):
            return False
        return self._answers([{"type": "text", "text": _ANSWER}])

    @cached_property
    def splits_at(self) -> str | None:
        """The mark behind which the template looks for the answer in a content: </think> ..."""
        found = re.search(r"split\(\s*(['\"])([^'\"\n]{3,60})\1\s*\)\s*\[-1\]", self.source)
        return found.group(2) if found else None

    @cached_property
    def call_shape(self) -> tuple[str | None, bool]:
        """How the template wants a call: the content beside it where there is none ("" or null),
        and whether its arguments must be JSON text.
        """
        as_text = f'{{"x": "{_ANSWER}"}}'
        for content in ("", None):
            for arguments in ({"x": _ANSWER}, as_text):
                if self._calls(arguments, content=content):
                    return content, arguments is as_text
        return "", False

    @cached_property
    def wants_nine_characters(self) -> bool:
        """Whether the template refuses ids of calls that are not nine characters (Mistral's)."""
        empty, as_text = self.call_shape
        arguments = f'{{"x": "{_ANSWER}"}}' if as_text else {"x": _ANSWER}
        return not self._calls(arguments, "call_0123456789", empty) and self._calls(
            arguments, content=empty
        )

    def _answers(self, content: Any) -> bool:
        asked = content if isinstance(content, str) else [{"type": "text", "text": _USER}]
        text = self._try(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": content}]
        )
        return text is not None and _ANSWER in text

    def _calls(
        self, arguments: Any, id: str = "abcdefghi", content: str | None = "", **more: str
    ) -> bool:
        call = {"type": "function", "id": id, "function": {"name": "f", "arguments": arguments}}
        messages: list[Message] = [
            {"role": "user", "content": _USER},
            {"role": "assistant", "content": content, "tool_calls": [call], **more},
            {"role": "tool", "name": "f", "tool_call_id": id, "content": _THOUGHT},
        ]
        if self.wants_parts:
            return False
        text = self._try(messages) or self._try(messages[:2])
        return text is not None and all(part in text for part in (_ANSWER, *more.values()))

    @cached_property
    def needs_values(self) -> tuple[str, ...]:
        """What the template cannot do without: tools (a list, if an empty one), functions."""
        probe = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
        for needed in ((), ("tools",), ("functions",)):
            try:
                self._rendered(probe, None, needed)
            except TemplateRefusedError:
                continue
            return needed
        return ()

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the tools that a conversation may use."""
        tool = {
            "type": "function",
            "function": {"name": _THOUGHT, "description": _THOUGHT, "parameters": {}},
        }
        try:
            return _THOUGHT in self._plain_render(
                [{"role": "user", "content": _USER}], [tool], prompt=True
            )
        except TemplateRefusedError:
            # it wants to see more of a tool than that, so it does write them
            return True

    @cached_property
    def input_heading(self) -> str | None:
        """The heading of an Alpaca row's input, None where an empty line separates it from the
        instruction.
        """
        return INPUT_HEADINGS.get(self.name)

    @cached_property
    def end_token_ids(self) -> list[int]:
        """Ids that end an assistant's turn: what generation must stop at."""
        ids = []
        call = {
            "type": "function",
            "id": "abcdefghi",
            "function": {"name": "f", "arguments": {"x": _ANSWER}},
        }
        shapes: list[Message] = [
            {"role": "assistant", "content": _ANSWER},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        for shape in shapes:
            try:
                end = turn_end(
                    self,
                    [{"role": "user", "content": _USER}],
                    shape,
                    None,
                    self._switched(self.thinking),
                )
            except (TemplateRefusedError, UnusableRowError):
                continue  # this template knows no tool calls
            token = end.token if end.token is not None else self.tokenizer.eos_token
            if token is not None:
                ids.append(self.tokenizer.convert_tokens_to_ids(token))
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return list(dict.fromkeys(ids))

    def with_thinking(self, thinking: bool) -> ChatTemplate:
        """Return the template that thinks, or does not, unless it is asked otherwise; unchanged
        without a switch.

        The choice is written into the source, so that every program that renders the saved
        template agrees.
        """
        if self.switch is None:
            return self
        source = re.sub(
            r"^\{#- fastft.*? -#\}.*?\{\{ '' \}\}", "", self.source, count=1, flags=re.DOTALL
        )
        value = str(thinking).lower()
        pin = (
            f"{{#- fastft: trained with {self.switch}={value} -#}}{{%- if {self.switch} is "
            f"not defined -%}}"
            f"{{%- set {self.switch} = {value} -%}}{{%- endif -%}}{{{{ '' }}}}"
        )
        made = dataclasses.replace(self, source=pin + source, thinking=thinking)
        return made

    def render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        *,
        prompt: bool = False,
        thinking: bool | None = None,
        date: datetime.date = TRAINING_DATE,
    ) -> str:
        """Return the text of `messages`; with `prompt`, ended by what an answer is asked for with.

        Raises TemplateRefusedError with the template's own words.
        """
        if self.folds_system:
            messages = _fold_system(messages)
        if self.wants_nine_characters:
            messages = _with_short_ids(messages)
        messages = [self._adapted(message) for message in messages]
        if not messages:
            raise TemplateRefusedError("no messages")
        thinking = self.thinking if thinking is None else thinking
        return self._plain_render(
            messages, tools, prompt=prompt, date=date, switches=self._switched(thinking)
        )

    def save(self, tokenizer: Any) -> None:
        """Make it the tokenizer's own template, so that it is saved with it."""
        tokenizer.chat_template = self.source

    def _switched(self, thinking: bool | None) -> dict[str, bool]:
        return {} if thinking is None or self.switch is None else {self.switch: thinking}

    def _adapted(self, message: Message) -> Message:
        """Put a message's reasoning where this template looks for it, else in front of the
        answer.
        """
        message = {k: v for k, v in message.items() if k != "weight"}
        reasoning = message.pop("reasoning_content", None)
        if reasoning and self.reasoning_key:
            message[self.reasoning_key] = reasoning
        elif reasoning:
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        if message.get("tool_calls"):
            empty, text_arguments = self.call_shape
            message["content"] = message["content"] or empty
            if text_arguments:
                message["tool_calls"] = list(map(_as_text_arguments, message["tool_calls"]))
        if self.wants_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _plain_render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        *,
        prompt: bool = False,
        date: datetime.date = TRAINING_DATE,
        switches: dict[str, bool] | None = None,
    ) -> str:
        return self._rendered(
            messages, tools, self.needs_values, prompt=prompt, date=date, switches=switches
        )

    def _rendered(
        self,
        messages: Messages,
        tools: Sequence[Any] | None,
        needed: tuple[str, ...],
        *,
        prompt: bool = False,
        date: datetime.date = TRAINING_DATE,
        switches: dict[str, bool] | None = None,
    ) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        values: dict[str, Any] = dict(switches or {})
        if "functions" in needed:  # Firefunction's
            values |= {
                "functions": json.dumps(tools or [], ensure_ascii=False),
                "datetime": str(date),
            }
        given = list(tools) if tools else [] if needed else None
        try:
            with limited():
                text: str = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=given,
                    chat_template=self.source,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    strftime_now=date.strftime,
                    **values,
                )
            if len(text) > OUTPUT_CHARACTERS:
                raise TemplateLimitError
            return text
        except (TemplateLimitError, MemoryError) as error:
            raise FastFTError(
                f"the chat template {self.name} does not come to an end: it ran for {SECONDS:g} "
                f"seconds, or took more than {GROWTH_BYTES >> 30} GiB or "
                f"{OUTPUT_CHARACTERS:,} characters. Is it the model's own?"
            ) from error
        except TemplateSyntaxError:
            raise  # no messages could mend that
        except (
            TemplateError,
            TypeError,
            LookupError,
            ValueError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise TemplateRefusedError(
                f"the chat template refuses these messages: {error}"
            ) from error

    def _try(self, messages: Messages, switches: dict[str, bool] | None = None) -> str | None:
        try:
            return self._plain_render(messages, switches=switches)
        except TemplateRefusedError:
            return None


def choose_template(tokenizer: Any, name: str | None = None) -> ChatTemplate:
    """Return the chat template: `name` (a named one, or a Jinja file), else the tokenizer's own,
    else a default.

    A base model without a template gets ChatML where its vocabulary has the tokens of it,
    otherwise `plain` ("User: ... / Assistant: ...", ended by EOS), which needs no new token.
    Raises FastFTError for an unknown name, a template that cannot be rendered, or one whose
    special tokens the vocabulary lacks.
    """
    own = tokenizer.chat_template
    if name is None and own:
        source = own if isinstance(own, str) else own.get("default") or next(iter(own.values()))
        return _checked(
            ChatTemplate("tokenizer", source, "the tokenizer's own", tokenizer), own=True
        )
    if name is None:
        has_chatml = {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys()
        name = "chatml" if has_chatml else "plain"
        why = "the tokenizer has no chat template; " + (
            "its vocabulary has the tokens of ChatML"
            if has_chatml
            else "plain text ended by EOS needs no new token"
        )
    else:
        why = "asked for by data.chat_template"
    source = NAMED[name] if name in NAMED else _from_file(name)
    if name in NAMED and _adds_bos(tokenizer):
        source = "{{- bos_token -}}" + source
    return _checked(ChatTemplate(name, source, why, tokenizer), own=bool(own))


def parse_arguments(arguments: Any) -> Any:
    """Return a tool call's arguments as a dict where they are one written as JSON text."""
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            # no JSON, a number of 5,000 digits, nested too deep: text, then
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def _as_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if isinstance(function.get("arguments"), str):
        return call
    text = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _with_short_ids(messages: Messages) -> list[Message]:
    """Return the messages with nine letters and digits as the id of each call, the same where it
    is answered. A result without an id answers the first call that has none yet.
    """
    made: list[Message] = []
    waiting: list[str] = []
    number = 0
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                number += 1
                short = _short_id(call.get("id") or f"call {number}")
                waiting.append(short)
                calls.append({**call, "id": short})
            message["tool_calls"] = calls
        elif message["role"] == "tool":
            given = message.get("tool_call_id")
            short = _short_id(given) if given else waiting[0] if waiting else _short_id("none")
            if short in waiting:
                waiting.remove(short)
            message["tool_call_id"] = short
        made.append(message)
    return made


def _short_id(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9]{9}", name):
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _fold_system(messages: Messages) -> list[Message]:
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, *rest = messages
    for index, message in enumerate(rest):
        if message["role"] == "user":
            rest[index] = {**message, "content": f"{system['content']}\n\n{message['content']}"}
            return rest
    return [{"role": "user", "content": system["content"]}, *rest]


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]


def _from_file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        if path.suffix or "/" in name:
            raise FastFTError(
                f"data.chat_template: the file {name} does not exist. Named templates: "
                f"{', '.join(NAMED)}."
            )
        raise one_of("chat template", name, NAMED)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FastFTError(
            f"data.chat_template: {name} is no text that can be read: {error}."
        ) from error


def _checked(template: ChatTemplate, *, own: bool) -> ChatTemplate:
    """Render a probe: a template that cannot be rendered, or whose tokens are missing, is found
    here.
    """
    from jinja2 import TemplateSyntaxError

    huge = huge_constant(template.source)
    if huge is not None:
        raise FastFTError(
            f"chat template {template.name}, {huge}: that would make something huge in one step, "
            "so it is not run."
        )
    probe: list[Message] = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = template.render(probe)
    except TemplateSyntaxError as error:
        raise FastFTError(
            f"chat template {template.name}, line {error.lineno}: {error.message}"
        ) from error
    except TemplateRefusedError as error:
        raise TemplateRefusedError(
            f"chat template {template.name} cannot write one question and its answer: "
            f"{error.__cause__ or error}"
        ) from error
    if _ANSWER not in text:
        raise FastFTError(
            f"chat template {template.name} does not write the assistant's answer; it renders "
            f"{text!r}."
        )
    tokenizer = template.tokenizer
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token * 2):
        raise FastFTError(
            f"chat template {template.name} begins with {tokenizer.bos_token} twice; take one "
            "of them out."
        )
    vocabulary = tokenizer.get_vocab()
    # Marks like <|im_end|> that the vocabulary does not hold would silently become many ordinary
    # tokens.
    marks = set(re.findall(r"<\|[a-z_0-9]+\|>|<(?:start|end)_of_turn>", text))
    missing = sorted(mark for mark in marks if mark not in vocabulary)
    if missing and template.name in NAMED:
        fits = [n for n, s in NAMED.items() if not _lacking(s, vocabulary)]
        raise FastFTError(
            f"chat template {template.name} writes {', '.join(missing)}, which this "
            "tokenizer's vocabulary lacks. "
            f"Templates that fit it: {', '.join(fits)}."
        )
    known = {tokenizer.bos_token, tokenizer.eos_token}
    if own:
        source = tokenizer.chat_template
        source = source if isinstance(source, str) else " ".join(source.values())
        known |= {t for t in template.control_tokens if t in source}
    written = dict.fromkeys(m.group() for m in template.control_pattern.finditer(text))
    needs = tuple(t for t in written if t not in known)
    notices: tuple[str, ...] = (
        (f"the template lacks {', '.join(missing)} in the vocabulary",) if missing else ()
    )
    if template.folds_system:
        notices += (
            "this template has no system role; a system message goes in front of the first "
            "user message",
        )
    return dataclasses.replace(
        template, needs_tokens=needs, notices=(*notices, *_unasked(template, probe))
    )


def _unasked(template: ChatTemplate, probe: list[Message]) -> list[str]:
    """Say where a template knows no generation prompt, so that the heading of an answer must be
    learned too.
    """
    try:
        prompt, whole = template.render(probe[:1], prompt=True), template.render(probe)
    except TemplateRefusedError:
        return []
    heading = whole.removeprefix(prompt).split(_ANSWER)[0]
    if not heading.strip() or not whole.startswith(prompt) or prompt != template.render(probe[:1]):
        return []
    return [
        "this template has no generation prompt (add_generation_prompt changes nothing): "
        f"{heading!r} is trained as "
        "part of each answer, and the model must write it itself"
    ]


def _lacking(source: str, vocabulary: dict[str, int]) -> bool:
    marks = set(re.findall(r"<\|[a-z_0-9]+\|>|<(?:start|end)_of_turn>|<think>", source))
    if source is NAMED["phi3"]:
        marks = {"<|user|>", "<|assistant|>", "<|end|>"}
    return any(mark not in vocabulary for mark in marks)


class UnusableRowError(FastFTError):
    """A conversation that cannot be trained on; `reason` is the key it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class TurnEnd:
    """What a template writes after an answer: `tail`, from `token` (the one that ends the turn)
    on.
    """

    token: str | None
    tail: str


SENTINEL = "\U000f0ff2"


def turn_end(
    template: ChatTemplate,
    before: Messages,
    shape: Message,
    tools: Sequence[Any] | None,
    switches: dict[str, bool],
) -> TurnEnd:
    """Return how the template ends a turn of this shape (with tool calls or not, with reasoning or
    not).
    """
    thinking = next(iter(switches.values()), None)
    probe = _with_sentinel(shape)
    text = template.render([*before, probe], tools, thinking=thinking)
    if SENTINEL not in text:
        raise UnusableRowError(
            "answer_not_rendered", f"the chat template {template.name} leaves the answer out"
        )
    tail = text[text.rindex(SENTINEL) + 1 :]
    controls = list(template.control_pattern.finditer(tail))
    if not controls:
        return TurnEnd(None, tail)
    shared = 0
    follow: list[Message] = [{"role": "user", "content": "x"}]
    if shape.get("tool_calls"):
        follow.insert(0, {"role": "tool", "content": "x", "name": "f", "tool_call_id": "abcdefghi"})
    for message in follow:
        try:
            longer = template.render([*before, probe, message], tools, thinking=thinking)
        except TemplateRefusedError:
            continue
        if SENTINEL not in longer:
            continue  # a template that forgets earlier answers
        other = longer[longer.rindex(SENTINEL) + 1 :]
        shared = next(
            (i for i, (a, b) in enumerate(zip(tail, other, strict=False)) if a != b),
            min(len(tail), len(other)),
        )
        break
    if template.always_asks:
        # The tail then goes on with the heading of the next answer, which ends nothing.
        heading = template.always_asks
        own = next(
            n for n in range(len(heading), -1, -1) if tail.endswith(heading[len(heading) - n :])
        )
        next_turn = template.control_pattern.search(tail, len(tail) - own)
        shared = min(shared, next_turn.end()) if next_turn else shared
    ends = [match for match in controls if match.end() <= shared] or controls[:1]
    while len(ends) > 1 and ends[-1].group() in template.heading_tokens:
        ends.pop()  # with it the next turn begins
    return TurnEnd(ends[-1].group(), tail[ends[-1].start() :])


def _with_sentinel(shape: Message) -> Message:
    """Return the answer with its content, and its last tool call's arguments, replaced by the
    sentinel.
    """
    probe = dict(shape)
    if probe.get("content") or not probe.get("tool_calls"):
        probe["content"] = SENTINEL
    if probe.get("tool_calls"):
        *first, last = probe["tool_calls"]
        is_text = isinstance(last["function"].get("arguments"), str)
        function = {**last["function"], "arguments": SENTINEL if is_text else {"x": SENTINEL}}
        probe["tool_calls"] = [*first, {**last, "function": function}]
    return probe
