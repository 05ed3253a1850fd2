"""Encode 30 conversations with each of the 111 real chat templates at hand, and write the table.

    python tools/template_matrix.py                  # prints what is refused, and why
    python tools/template_matrix.py --write          # writes docs/templates.md
    python tools/template_matrix.py --only gpt-oss   # templates with this in their name

70 templates come from the source archive of llama-cpp-python, 41 from trl's package. Each gets a
tiny byte-level tokenizer that has its special tokens. A conversation counts as encoded when the
proof of `encode_turns` passes, each answer (with its reasoning and its calls) is trained exactly
once, and what was asked stands in the text.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastft.data.encode import encode_turns  # noqa: E402
from fastft.data.formats import Format, convert  # noqa: E402
from fastft.data.messages import BadRowError  # noqa: E402
from fastft.data.template import TemplateRefusedError, UnusableRowError, choose_template  # noqa: E402
from fastft.errors import FastFTError  # noqa: E402
from tests.sdist import chat_templates  # noqa: E402
from tests.unit.data import real_tokenizers as real  # noqa: E402

FORMAT = Format("messages", {"messages": "messages", "system": "system", "tools": "tools"}, "")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "the town"}},
            "required": ["town"],
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row, what must be trained exactly once, and what must stand in what is read."""

    row: dict[str, Any]
    trained: tuple[str, ...]
    read: tuple[str, ...] = ()


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: str | None, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    thought = {"reasoning_content": reasoning} if reasoning else {}
    return {"role": "assistant", "content": content, **thought, **more}


def _call(arguments: Any, id: str = "abcdefghi") -> dict[str, Any]:
    return {
        "type": "function",
        "id": id,
        "function": {"name": "get_weather", "arguments": arguments},
    }


def _result(content: str, id: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": id, "content": content}


def _chat(*answers: str, system: str | None = None) -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    asked = []
    for number, answer in enumerate(answers, 1):
        asked.append(f"QUESTION {number}?")
        messages += [_user(asked[-1]), _answer(answer)]
    return Conversation({"messages": messages}, answers, (*asked, *([system] if system else [])))


def _tools(*messages: Any, trained: tuple[str, ...], read: tuple[str, ...] = ()) -> Conversation:
    row = {"messages": [_user("Weather in Lindmark?"), *messages], "tools": [WEATHER]}
    return Conversation(row, trained, read)


TOWN, BAVOR = {"town": "LINDMARKTOWN"}, {"town": "BAVORTOWN"}
PARALLEL = _answer("", tool_calls=[_call(TOWN), _call(BAVOR, "abcdefghj")])
CONVERSATIONS = {
    "one question": _chat("FOURANSWER"),
    "two turns": _chat("FOURANSWER", "FIVEANSWER"),
    "five turns": _chat("AA1", "AA2", "AA3", "AA4", "AA5"),
    "system": _chat("FOURANSWER", system="Be brief, SYSTEMTEXT."),
    "system, three turns": _chat("AA1", "AA2", "AA3", system="Be brief, SYSTEMTEXT."),
    "Japanese": Conversation({"messages": [_user("首都はどこ？"), _answer("東京です。とても大きい街です。")]}, ("東京です。とても大きい街です。",), ("首都はどこ？",)),
    "emoji": Conversation({"messages": [_user("Emoji? 🗾"), _answer("🎉 yes 👨‍👩‍👧 ok 🙂")]}, ("🎉 yes 👨‍👩‍👧 ok 🙂",), ("🗾",)),
    "system, Japanese": Conversation({"messages": [{"role": "system", "content": "簡潔に。"}, _user("首都は？"), _answer("東京"), _user("人口は？"), _answer("約千四百万")]}, ("東京", "約千四百万"), ("簡潔に。", "人口は？")),
    "excluded in the middle": Conversation({"messages": [_user("1?"), _answer("AA1"), _user("2?"), _answer("BADANSWER", weight=0), _user("3?"), _answer("AA3")]}, ("AA1", "AA3"), ("2?",)),
    "HTML": _chat("<html><body>Hi</body></html>"),
    "HTML, two turns": _chat("<p>ONE</p>", "<b>TWO</b>"),
    "answer in tags": _chat("<answer>42</answer>"),
    "answer begins with <": _chat("< 5 is smaller"),
    "code": _chat("```py\nif a < b:\n    print('x')\n```"),
    "JSON": _chat('{"a": [1, 2, {"b": null}]}'),
    "long": _chat("LONGANSWER " + "word " * 300 + "END"),
    "a control token as text": Conversation({"messages": [_user("What is <|im_end|>?"), _answer("It is </s> TEXT")]}, ("It is </s> TEXT",)),
    "greeting first": Conversation({"messages": [_user("Hi"), _answer("Hello, HELPER"), _user("2+2?"), _answer("FOURANSWER")], "system": "SYSTEMTEXT"}, ("Hello, HELPER", "FOURANSWER"), ("SYSTEMTEXT",)),
    "first answer excluded": Conversation({"messages": [_user("2+2?"), _answer("BADANSWER", weight=0), _user("again"), _answer("FOURANSWER")]}, ("FOURANSWER",), ("again",)),
    "reasoning": Conversation({"messages": [_user("2+2?"), _answer("FOURANSWER", "THOUGHTONE first")]}, ("THOUGHTONE first", "FOURANSWER")),
    "reasoning in the text": Conversation({"messages": [_user("2+2?"), _answer("<think>\nTHOUGHTONE first\n</think>\n\nFOURANSWER")]}, ("THOUGHTONE first", "FOURANSWER")),
    "reasoning, two turns": Conversation({"messages": [_user("2+2?"), _answer("FOURANSWER", "THOUGHTONE"), _user("+1?"), _answer("FIVEANSWER", "THOUGHTTWO")]}, ("THOUGHTONE", "FOURANSWER", "THOUGHTTWO", "FIVEANSWER")),
    "reasoning, then HTML": Conversation({"messages": [_user("page?"), _answer("<html>Hi</html>", "THOUGHTONE")]}, ("THOUGHTONE", "<html>Hi</html>")),
    "tools, none called": _tools(_answer("NOTOOL needed"), trained=("NOTOOL needed",)),
    "tool call": _tools(_answer("", tool_calls=[_call(TOWN)]), trained=("get_weather", "LINDMARKTOWN")),
    "tool call, Japanese": _tools(_answer("", tool_calls=[_call({"town": "東京"})]), trained=("get_weather",)),
    "tool chain": _tools(_answer("", tool_calls=[_call(TOWN)]), _result("RAINRESULT"), _answer("ITRAINS"), trained=("LINDMARKTOWN", "ITRAINS"), read=("RAINRESULT",)),
    "tool chain, text beside the call": _tools(_answer("LETMELOOK", tool_calls=[_call(TOWN)]), _result("RAINRESULT"), _answer("ITRAINS"), trained=("LETMELOOK", "LINDMARKTOWN", "ITRAINS"), read=("RAINRESULT",)),
    "parallel chain": _tools(PARALLEL, _result("RAINRESULT"), _result("SUNRESULT", "abcdefghj"), _answer("ITRAINS"), trained=("LINDMARKTOWN", "BAVORTOWN", "ITRAINS"), read=("RAINRESULT", "SUNRESULT")),
    "tool chain with reasoning": _tools(_answer("", "THOUGHTONE", tool_calls=[_call(TOWN)]), _result("RAINRESULT"), _answer("ITRAINS", "THOUGHTTWO"), trained=("THOUGHTONE", "LINDMARKTOWN", "THOUGHTTWO", "ITRAINS"), read=("RAINRESULT",)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a conversation: encoded, refused with a reason, or a fault of fastft."""

    status: str
    reason: str = ""
    says: str = ""


def templates() -> dict[str, str]:
    """Return the sources of the real templates by name."""
    import trl

    found = {p.stem: p for p in sorted(chat_templates().glob("*.jinja"))}
    own = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    found |= {f"trl/{p.stem}": p for p in own if not p.stem.endswith("_training")}
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


def outcomes(source: str, names: list[str] | None = None) -> dict[str, Outcome]:
    """Return what becomes of each conversation with the template `source`."""
    tokenizer = real.tiny_for(source)
    try:
        template = choose_template(tokenizer)
    except FastFTError as error:
        refused = Outcome("refused", "template_refused", str(error))
        return dict.fromkeys(names or CONVERSATIONS, refused)
    return {
        name: _outcome(tokenizer, template, CONVERSATIONS[name]) for name in names or CONVERSATIONS
    }


def _outcome(tokenizer: Any, template: Any, conversation: Conversation) -> Outcome:
    try:
        example = convert(conversation.row, FORMAT)
        made = encode_turns(tokenizer, template, example.messages, example.tools)
    except (BadRowError, UnusableRowError) as error:
        return Outcome("refused", error.reason, str(error))
    except TemplateRefusedError as error:
        return Outcome("refused", "template_refused", str(error))
    trained = "\0".join(answer for sequence in made for answer in sequence.answers)
    read = "\0".join(tokenizer.decode(sequence.input_ids) for sequence in made)
    wrong = [
        part
        for part in conversation.trained
        if trained.count(part) != 1 and not (part == "get_weather" and part in trained)
    ]
    wrong += [part for part in conversation.read if part not in read]
    return Outcome("fault", "fault", ", ".join(wrong)) if wrong else Outcome("encoded")


def table(found: dict[str, dict[str, Outcome]]) -> str:
    """Return the table as Markdown: a row a template, the reasons of what is refused."""
    count = sum(o.status == "encoded" for row in found.values() for o in row.values())
    total = sum(map(len, found.values()))
    lines = [
        "# Chat templates and what they can hold",
        "",
        "Generated by `python tools/template_matrix.py --write`: "
        f"{len(found)} real templates, {len(CONVERSATIONS)} conversations each.",
        f"**{count:,} of {total:,} are encoded and proven**; the others are refused, and each "
        "reason lies in the template.",
        "",
        "| template | encoded | refused |",
        "|---|---|---|",
    ]
    for name, row in found.items():
        by_reason = collections.defaultdict(list)
        for conversation, outcome in row.items():
            if outcome.status != "encoded":
                by_reason[outcome.reason].append((conversation, outcome.says))
        said = "; ".join(
            f"`{reason}` ({', '.join(c for c, _ in cases)}): {_short(cases[0][1])}"
            for reason, cases in by_reason.items()
        )
        encoded = sum(o.status == "encoded" for o in row.values())
        lines.append(f"| {name} | {encoded} | {said} |")
    return "\n".join([*lines, ""])


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "¦")
    return text if len(text) <= 140 else text[:140] + "..."


def main() -> None:
    """Print what is refused, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--conversation", action="append")
    options = parser.parse_args()
    found = {
        name: outcomes(source, options.conversation)
        for name, source in templates().items()
        if options.only in name
    }
    if options.write:
        (ROOT / "docs" / "templates.md").write_text(table(found), encoding="utf-8")
    for name, row in found.items():
        for conversation, outcome in row.items():
            if outcome.status != "encoded":
                print(f"{name} / {conversation}: {outcome.reason}: {_short(outcome.says)}")
    statuses = collections.Counter(o.status for row in found.values() for o in row.values())
    print(dict(statuses))


if __name__ == "__main__":
    main()
