r"""One turn of the assistant's: what it is asked for with, and what is trained of it.

Both are rendered: the prompt before the turn (`P`, with the generation prompt) and the conversation
through it (`W`). Mostly W begins with P. Where it does not, the two are compared by structure:

    P   ...<Assistant><think>\n            the generation prompt opens a block of thought
    W   ...<Assistant>Hello!<end>          that finished turns leave out
    ->  ...<Assistant><think>\n the reasoning \n</think>\n\nHello!<end>

    P   ...call, analysis kept...<|start|>assistant    W   ...call...<|start|>assistant...It rains.
    ->  P and what follows the same heading in W: what a model is asked with is the truth

Both are rendered once more with a private-use character as the last message that is answered; what
stands after it is compared tag by tag and word by word, never character by character.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fastft.data.template import (
    SENTINEL,
    ChatTemplate,
    Message,
    Messages,
    TurnEnd,
    UnusableRowError,
    turn_end,
)

_HIDDEN = "\U000f0ff3"  # stands for </think> where the template would cut an answer there
_TAG = r"</?[^<>\s][^<>\n]{0,40}>|\[/?[A-Z_]{2,20}\]"
_PIECE = re.compile(rf"{_TAG}|\n|[^\S\n]+|[^\s<\[]+|.", re.DOTALL)
# A block of thought that is opened, or opened and closed, and holds no thought.
_BLOCK = re.compile(rf"(?:\s|(?:{_TAG})(?:thought|analysis)?)*")
_THOUGHT_TAGS = re.compile(
    r"(?:\s*[<\[][^<>\[\]\n]*(?:think|thought|channel|reason)[^<>\[\]\n]*[>\]](?:thought)?)+",
    re.IGNORECASE,
)
_THINK_CLOSER = "</think>"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One assistant's turn: what it is asked for with, what is trained, whether EOS is added."""

    index: int
    prompt: str
    answer: str
    adds_eos: bool


@dataclasses.dataclass
class Found:
    """What was found out about a template while turns were read: how it ends turns of each shape,
    whether it writes the results of tools.
    """

    ends: dict[Any, TurnEnd] = dataclasses.field(default_factory=dict)
    writes_results: bool | None = None


def read_turn(
    template: ChatTemplate,
    found: Found,
    messages: Messages,
    tools: Sequence[Any] | None,
    index: int,
) -> Turn:
    """Return the assistant's turn `messages[index]` as it is asked for and answered.

    Raises UnusableRowError where the template leaves out a part of the question or of the answer.
    """
    message = messages[index]
    reasoning = bool(message.get("reasoning_content"))
    thinking = reasoning if template.switch else None
    prompt = template.render(messages[:index], tools, prompt=True, thinking=thinking)
    _check_asked(template, found, messages[:index], tools, prompt)
    turn = _Rendered(template, messages[:index], tools, thinking, prompt)
    end = _end_of(template, found, messages, tools, index, thinking)
    # Templates cut answers at </think>, also where it is a word of the answer: it is hidden from
    # them while they render.
    content = message["content"].replace(_THINK_CLOSER, _HIDDEN)
    shown = {**message, "content": content}
    answer = _cut(turn.answer(shown), end).replace(_HIDDEN, _THINK_CLOSER)
    lost = _lost(message, answer)
    if lost is not None and reasoning:
        hidden = _cut(turn.thoughtful_answer(shown), end).replace(_HIDDEN, _THINK_CLOSER)
        if _lost(message, hidden) is None:
            return Turn(index, prompt, hidden, adds_eos=end.token is None)
    if lost is not None:
        reason, part = lost
        raise UnusableRowError(
            reason, f"the chat template {template.name} leaves out {part[:60]!r}"
        )
    return Turn(index, prompt, answer, adds_eos=end.token is None)


def _cut(answer: str, end: TurnEnd) -> str:
    """Return the answer through the token that ends the turn."""
    if end.token is None:
        return answer
    if not answer.endswith(end.tail):
        raise UnusableRowError(
            "template_mismatch",
            f"the answer does not end with {end.tail!r} in the rendered text",
        )
    return answer[: len(answer) - len(end.tail) + len(end.token)]


@dataclasses.dataclass(frozen=True)
class _Rendered:
    """A place in a conversation at which answers are rendered."""

    template: ChatTemplate
    before: Messages
    tools: Sequence[Any] | None
    thinking: bool | None
    prompt: str

    def whole(self, message: Message) -> str:
        return self.template.render([*self.before, message], self.tools, thinking=self.thinking)

    def answer(self, message: Message) -> str:
        """Return what follows the prompt when this message is the answer."""
        whole = self.whole(message)
        if whole.startswith(self.prompt):
            return whole[len(self.prompt) :]
        return self._aligned(message)

    def thoughtful_answer(self, message: Message) -> str:
        """Return the answer with its reasoning before it, hidden from the template."""
        plain = {k: v for k, v in message.items() if k != "reasoning_content"}
        content = f"<think>\n{message['reasoning_content']}\n{_HIDDEN}\n\n{message['content']}"
        answer = self.answer({**plain, "content": content})
        if _opens_thought(self.prompt):
            answer = answer.lstrip().removeprefix(_THINK_CLOSER).lstrip()
            answer = answer.removeprefix("<think>").removeprefix("\n")
        return answer

    def _aligned(self, message: Message) -> str:
        """Return the answer where the whole does not begin with the prompt (see above)."""
        *earlier, last = self.before
        probe = [*earlier, {**last, "content": SENTINEL}]
        asked = self.template.render(probe, self.tools, prompt=True, thinking=self.thinking)
        whole = self.template.render([*probe, message], self.tools, thinking=self.thinking)
        if SENTINEL not in asked or SENTINEL not in whole:
            raise self._mismatch()
        asked = asked[asked.rindex(SENTINEL) + 1 :]
        answered = whole[whole.rindex(SENTINEL) + 1 :]
        upto, start = _shared_pieces(asked, answered)
        rest, tail = asked[upto:], answered[start:]
        moved = None if not rest.strip() else _after_heading(asked, answered)
        if moved is not None:
            return answered[moved:]
        if not rest.strip():
            return tail.lstrip() if rest else tail
        closer = _opens_thought(self.prompt)
        if not _BLOCK.fullmatch(rest):
            # A sentence that opens the thought (Apriel): the answer follows the template's mark.
            closer = self.template.splits_at
            if closer is None or not _begins_with_answer(tail, message):
                raise self._mismatch()
        if upto == 0:
            raise self._mismatch()
        if closer is not None and closer in tail:
            return tail.lstrip()
        written = _THOUGHT_TAGS.match(tail)
        core = tail[written.end() if written else 0 :].lstrip()
        if closer is None:  # the block was opened and closed again in the prompt
            return core
        return f"{message.get('reasoning_content') or ''}\n{closer}\n\n{core}"

    def _mismatch(self) -> UnusableRowError:
        return UnusableRowError(
            "template_mismatch",
            f"the chat template {self.template.name} asks for an answer with "
            f"{self.prompt[-60:]!r}, but writes none there",
        )


def _begins_with_answer(text: str, message: Message) -> bool:
    """Whether `text` begins with what the message says: its content, its thought, or its calls."""
    text = text.lstrip()
    said = [message["content"], message.get("reasoning_content") or ""]
    if any(part.strip() and text.startswith(part.strip()[:20]) for part in said):
        return True
    return text.startswith("<think>") or bool(message.get("tool_calls") and text.startswith("<"))


def _shared_pieces(asked: str, answered: str) -> tuple[int, int]:
    """Return how long the common beginning is in each, in whole tags and words; white space in it
    may differ.

    A block of thought and an answer that begins with a tag of its own share a "<", and no piece.
    """
    upto = start = 0
    for match in _PIECE.finditer(asked):
        piece = match.group()
        if not piece.strip():
            continue
        at = start + len(answered[start:]) - len(answered[start:].lstrip())
        if not answered.startswith(piece, at):
            break
        upto, start = match.end(), at + len(piece)
    while upto < len(asked) and answered.startswith(asked[upto], start) and asked[upto].isspace():
        upto, start = upto + 1, start + 1
    return upto, start


def _after_heading(asked: str, answered: str) -> int | None:
    """Return where the answer begins when the prompt says something more before the heading that
    both have (Command-R+ repeats its instruction there); None as a rule.
    """
    starts = [match.start() for match in _PIECE.finditer(asked)]
    shared, _ = _shared_pieces(asked, answered)
    for start in starts:
        heading = asked[start:]
        if start <= shared or not re.match(_TAG, heading):
            continue
        at = answered.find(heading, 0, shared + len(heading))
        if at >= 0:
            return at + len(heading)
    return None


def _opens_thought(prompt: str) -> str | None:
    """Return what closes the block of thought that the prompt ends in; None where it is in none."""
    tags = re.findall(_TAG, prompt[-60:])
    if not tags or not prompt.rstrip().endswith(tags[-1]):
        return None
    tag = tags[-1]
    if not re.search("think|reason|thought", tag, re.IGNORECASE) or tag[1] == "/":
        return None
    if "|" in tag:
        closer = re.sub("START|begin", lambda m: {"START": "END"}.get(m.group(), "end"), tag)
        return closer if closer != tag else None
    return f"{tag[0]}/{tag[1:]}"


def _lost(message: Message, answer: str) -> tuple[str, str] | None:
    """Return (reason, part) for the first part of a message that the answer lacks."""
    squeezed: str | None = None
    for reason, part, forms in _parts_of(message):
        if not part.strip() or any(form in answer for form in forms):
            continue
        squeezed = "".join(answer.split()) if squeezed is None else squeezed
        if not any("".join(form.split()) in squeezed for form in forms):
            return reason, part
    for name in {c["function"]["name"] for c in message.get("tool_calls") or []}:
        calls = [c for c in message["tool_calls"] if c["function"]["name"] == name]
        if answer.count(name) < len(calls):
            return "answer_not_rendered", f"{name} (called {len(calls)} times)"
    return None


def _parts_of(message: Message) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (reason, part, how it may be written) of all that a message says."""
    for call in message.get("tool_calls") or []:
        yield "answer_not_rendered", call["function"]["name"], [call["function"]["name"]]
        for text in _leaves(call["function"].get("arguments")):
            yield "answer_not_rendered", text, _written(text)
    content = message["content"].strip()
    yield "answer_not_rendered", content, [content]
    reasoning = (message.get("reasoning_content") or "").strip()
    yield "reasoning_not_rendered", reasoning, [reasoning]


def _written(text: str) -> list[str]:
    """Return the ways in which a template writes a text of a call: as it is, in JSON, in XML."""
    if text.isascii() and text.isalnum():
        return [text]
    ascii_only, plain = (json.dumps(text, ensure_ascii=e)[1:-1] for e in (True, False))
    # transformers' tojson; Jinja's own escapes what HTML gives a meaning.
    escaped = plain
    for char in "<>&'":
        escaped = escaped.replace(char, f"\\u{ord(char):04x}")
    return [text, plain, ascii_only, escaped, html.escape(text), repr(text)[1:-1],
            json.dumps(plain, ensure_ascii=False)[1:-1]]  # fmt: skip


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts in a call's arguments, of an object and of JSON text alike."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _check_asked(
    template: ChatTemplate,
    found: Found,
    before: Messages,
    tools: Sequence[Any] | None,
    prompt: str,
) -> None:
    """Raise where the template leaves out what is answered: the user's last message, or a tool's
    last result.
    """
    asked = next((m for m in reversed(before) if m["role"] in ("user", "tool")), None)
    if (
        asked is None
        or asked["content"].strip() in prompt
        or "".join(asked["content"].split()) in "".join(prompt.split())
    ):
        return
    role = asked["role"]
    # A tool's result may be written as JSON: whether it is written at all shows a result that needs
    # no escaping.
    if role == "tool" and found.writes_results is None:
        probe = [{**m, "content": SENTINEL} if m is asked else m for m in before]
        found.writes_results = SENTINEL in template.render(probe, tools, prompt=True)
    if role == "user" or not found.writes_results:
        raise UnusableRowError(
            "question_not_rendered",
            f"the chat template {template.name} leaves out the {role}'s "
            f"{asked['content'].strip()[:60]!r}",
        )


def _end_of(
    template: ChatTemplate,
    found: Found,
    messages: Messages,
    tools: Any,
    index: int,
    thinking: bool | None,
) -> TurnEnd:
    message = messages[index]
    calls = message.get("tool_calls") or []
    text_arguments = bool(calls) and isinstance(calls[-1]["function"].get("arguments"), str)
    shape = (
        len(calls),
        text_arguments,
        bool(message["content"]),
        bool(message.get("reasoning_content")),
        thinking,
    )
    if shape not in found.ends:
        switches = template._switched(thinking)
        found.ends[shape] = turn_end(template, messages[:index], message, tools, switches)
    return found.ends[shape]
