"""The Modelfile that turns a GGUF file into an Ollama model.

Ollama does not read the Jinja template of a GGUF file as it is: it wants a template in Go's
language, and where a Modelfile has none, `ollama create` takes one of its own that looks alike. So
the format is learnt from what the Jinja template writes, never from a name, and the Go template
writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastft.data import bounded
from fastft.errors import FastFTError
from fastft.files import ours, write_atomically

NO_TEMPLATE = (
    "# The chat template is none that fastft can write in Go's template language, so none stands "
    "here:"
)
INSTRUCTIONS = {
    "FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES",
}  # fmt: skip
PARAMETERS = {
    "num_ctx": int,
    "num_predict": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repeat_penalty": float,
    "repeat_last_n": int,
    "seed": int,
    "stop": str,
}
"""Ollama's parameters and the type of each (its Modelfile reference)."""


Render = Callable[[list[dict[str, str]]], str]
"""Writes a conversation as the model was trained on it, up to where the answer begins."""


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around the messages.

        start U (turn A next U)* answer           without a system message
        system_start S system_end U ...           with one, before the first question
        start U ... next system_start S system_end U answer     or before the last (system_last)

    Everything the format writes by itself (a date, a system message of its own, an empty thinking
    block) is part of these texts. BOS is not: Ollama's tokenizer adds it.
    """

    start: str
    answer: str
    turn: str
    next: str
    system_start: str | None
    """None: the template leaves a system message out."""
    system_end: str
    system_last: bool = False

    def write(self, messages: list[dict[str, str]]) -> str:
        """Return the conversation (it ends with a question) as this format writes it."""
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        if system and self.system_start is not None:
            system = self.system_start + system + self.system_end
        elif system:
            system = ""
        turns = [m["content"] for m in messages if m["role"] != "system"]
        text = self.start
        if system and not self.system_last:
            text = system
        for number, content in enumerate(turns):
            is_answer, is_last = number % 2 == 1, number == len(turns) - 1
            if is_last and self.system_last:
                text += system
            text += content + (self.next if is_answer else self.answer if is_last else self.turn)
        return text

    @property
    def stop(self) -> str:
        """The special token that ends an answer; empty where none does."""
        found = re.match(r"\s*(<[^<>\s]+>|\[[A-Z_/]+\])", self.next)
        return found[1] if found else ""


def write_modelfile(
    out: Path | str,
    gguf_path: Path | str,
    tokenizer: Any,
    *,
    stops: Iterable[str] = (),
    parameters: dict[str, Any] | None = None,
    system: str | None = None,
    adapter: Path | str | None = None,
    name: str | None = None,
    render: Render | None = None,
) -> Path:
    """Write `out`/Modelfile for the GGUF file (and a LoRA GGUF `adapter`) and return its path.

    `tokenizer`: the trained transformers tokenizer. `render`: what writes a conversation as it was
    trained, without BOS; by default the tokenizer's chat template. `stops`: further texts that end
    an answer. `parameters`: Ollama's, for example {"temperature": 0.7, "num_ctx": 4096}. Where Go
    cannot write the same bytes, no TEMPLATE is written and a comment says so (see
    `has_template`): Ollama then takes a template of its own that looks like the one in the GGUF
    file, which may be another format. Raises FastFTError for unknown parameters, and for a
    Modelfile that fastft did not write or that was changed since.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "Modelfile"
    ours.refuse_foreign([path])
    text = modelfile_text(
        relative(gguf_path, out),
        tokenizer,
        stops=stops,
        parameters=parameters or {},
        system=system,
        adapter=relative(adapter, out) if adapter else None,
        create=create_line(path, name or Path(gguf_path).stem.lower()),
        render=render,
    )
    write_atomically(path, ours.signed(text))
    if problems := check_modelfile(path):
        raise AssertionError(f"a Modelfile that we wrote is wrong: {problems}")
    return path


def create_line(modelfile: Path | str, name: str) -> str:
    """Return the command that makes the Ollama model; run it in the Modelfile's folder.

    Ollama's names have ASCII letters and digits only: of another name what is left, or "fastft-"
    and six digits of its SHA-256, so that two projects in Japanese do not become one model.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")
    short = plain or f"fastft-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return f"ollama create {short} -f {Path(modelfile).name}"


def relative(path: Path | str, folder: Path) -> str:
    """Return `path` as FROM wants it: relative to the Modelfile's folder where it lies below, else
    absolute.
    """
    path = Path(path).resolve()
    inside = path.is_relative_to(folder.resolve())
    return "./" + path.relative_to(folder.resolve()).as_posix() if inside else str(path)


def modelfile_text(
    source: str,
    tokenizer: Any,
    *,
    stops: Iterable[str],
    parameters: dict[str, Any],
    system: str | None,
    adapter: str | None,
    create: str,
    render: Render | None = None,
) -> str:
    """Return the Modelfile as text."""
    unknown = sorted(set(parameters) - set(PARAMETERS))
    if unknown:
        raise FastFTError(
            f"Ollama has no parameter {', '.join(unknown)}. Known: {', '.join(sorted(PARAMETERS))}."
        )
    has_chat = render is not None or getattr(tokenizer, "chat_template", None)
    chat = learn(render or of_tokenizer(tokenizer)) if has_chat else None
    lines = [f"# {create}", f"FROM {source}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    ends = list(stops)
    if chat:
        ends.append(chat.stop)
        lines += [
            "# the same bytes as the chat template that the model was trained with",
            f'TEMPLATE """{go_template(chat)}"""',
        ]
    else:
        lines += [NO_TEMPLATE, "# Ollama takes one of its own that looks alike, or plain text."]
    ends.append(tokenizer.eos_token or "")
    lines += [
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}"
        for stop in dict.fromkeys(filter(None, ends))
    ]
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def learn(render: Render) -> ChatFormat | None:
    """Return the format that `render` writes, or None where it has none that Go could write.

    The texts around the messages are read off conversations of marked words; then longer ones
    must come out byte for byte. A template that changes its history, or a message's own text, has
    no such format.
    """
    asked, answered, again, system = _MARKS
    once = _cut(render, [("user", asked)])
    twice = _cut(render, [("user", asked), ("assistant", answered), ("user", again)])
    if once is None or twice is None:
        return None
    start, turn, following, answer = twice
    if once != [start, answer]:
        return None
    found = ChatFormat(start, answer, turn, following, start, "\n\n")
    first = _cut(render, [("system", system), ("user", asked)])
    probes = _PROBES
    if first is not None:
        found = _with_system(found, render, first)
    elif _quietly(render, _conversation(("system", system), ("user", asked))) is not None:
        found = replace(found, system_start=None)
    else:  # it refuses one: as other programs do, in front of the first question
        probes = [probe for probe in _PROBES if probe[0]["role"] != "system"]
    exact = all(_quietly(render, probe) == found.write(probe) for probe in probes)
    return found if exact else None


def _with_system(found: ChatFormat, render: Render, first: list[str]) -> ChatFormat:
    """Return the format with its system message, which stands before the first question or the
    last; which of the two, the probes decide.
    """
    asked, answered, again, system = _MARKS
    before, between, _ = first
    turns = [("system", system), ("user", asked), ("assistant", answered), ("user", again)]
    if _cut(render, turns, order=[asked, answered, system, again]) is None:
        return replace(found, system_start=before, system_end=between)
    own = before.removeprefix(found.start)
    return replace(found, system_start=own, system_end=between, system_last=True)


_MARKS = ("QUESTIONONE", "ANSWERONE", "QUESTIONTWO", "SYSTEMTEXT")


def _conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


_PROBES: list[list[dict[str, str]]] = [
    _conversation(*system, *turns)
    for system in ((), (("system", "Be brief: 短く."),))
    for turns in (
        (("user", "One {{ x }} 'y' \"z\"\nline"),),
        (("user", "One"), ("assistant", "Two"), ("user", "三\nlines")),
        (
            ("user", "One"),
            ("assistant", "Two\n\n* three"),
            ("user", "Four"),
            ("assistant", "五"),
            ("user", "Six"),
        ),
    )
]


def _cut(
    render: Render, turns: list[tuple[str, str]], order: list[str] | None = None
) -> list[str] | None:
    """Return what is written before, between and after the contents of `turns`, or None where a
    content does not stand there once, in this order.
    """
    text = _quietly(render, _conversation(*turns))
    pieces = []
    for mark in order or [content for _, content in turns]:
        if text is None or text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text or ""]


def _quietly(render: Render, messages: list[dict[str, str]]) -> str | None:
    """Return what `render` writes; None where the template refuses the messages."""
    import jinja2

    try:
        return render(messages)
    except (jinja2.TemplateError, FastFTError, TypeError):  # TypeError: it loops over no tools
        return None


def of_tokenizer(tokenizer: Any) -> Render:
    """Return what renders with the tokenizer's own chat template, without BOS in front."""

    def render(messages: list[dict[str, str]]) -> str:
        text = bounded.render(tokenizer, messages, add_generation_prompt=True)
        return str(text).removeprefix(tokenizer.bos_token or "")

    return render


def go_template(chat: ChatFormat) -> str:
    """Return the format in Go's template language, over Ollama's .Messages (role, content) and
    .System.

    The last question leaves the answer open; after a last answer nothing follows, so that it is
    continued. Ollama gathers the system messages in .System; in .Messages, where they stand too,
    they are passed over. See text/template in Go's documentation and Ollama's template reference.
    """
    own = f"{_go(chat.system_start or '')}{{{{ $.System }}}}{_go(chat.system_end)}"
    head, in_front = _go(chat.start), ""
    if chat.system_last:
        in_front = f"{{{{- if and $last $.System }}}}{own}{{{{- end }}}}"
    elif chat.system_start is not None:
        head = f"{{{{- if $.System }}}}{own}{{{{- else }}}}{head}{{{{- end }}}}"
    return (
        head
        + "{{- range $i, $m := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}"
        + '{{- if eq .Role "user" }}'
        + in_front
        + "{{ .Content }}"
        + f"{{{{- if $last }}}}{_go(chat.answer)}{{{{- else }}}}{_go(chat.turn)}{{{{- end }}}}"
        + '{{- else if eq .Role "assistant" }}{{ .Content }}'
        + f"{{{{- if not $last }}}}{_go(chat.next)}{{{{- end }}}}"
        + "{{- end }}{{- end }}"
    )


def _go(text: str) -> str:
    """Return literal text as an action, so that neither trimming nor quoting can change it."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def has_template(path: Path | str) -> bool:
    """Return whether a Modelfile that fastft wrote holds a TEMPLATE of the training's bytes."""
    return NO_TEMPLATE not in Path(path).read_text(encoding="utf-8")


def check_modelfile(path: Path | str) -> list[str]:
    """Return what is wrong with a Modelfile; an empty list where nothing is.

    Checked: known instructions and parameters with values of their type, closed quotes, one FROM
    whose file exists, and the template's actions (closed, blocks balanced, only functions and
    variables that Ollama has).
    """
    path = Path(path)
    problems, seen = [], []
    for line, instruction, value in _instructions(path.read_text(encoding="utf-8")):
        seen.append(instruction)
        if instruction not in INSTRUCTIONS:
            problems.append(f"line {line}: unknown instruction {instruction!r}")
        elif value is None:
            problems.append(f"line {line}: the quotes of {instruction} are not closed")
        elif instruction in {"FROM", "ADAPTER"} and not os.path.exists(path.parent / value):
            problems.append(f"line {line}: {value} does not exist")
        elif instruction == "PARAMETER":
            problems += [f"line {line}: {problem}" for problem in _parameter_problems(value)]
        elif instruction == "TEMPLATE":
            problems += [f"line {line}: {problem}" for problem in template_problems(value)]
    if seen.count("FROM") != 1:
        problems.append(f"{seen.count('FROM')} FROM lines, there must be one")
    return problems


def _instructions(text: str) -> list[tuple[int, str, str | None]]:
    """Return (line, instruction, value) of each; value None where triple quotes stay open."""
    found: list[tuple[int, str, str | None]] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, _, value = line.strip().partition(" ")
        if not value.startswith('"""'):
            found.append((number, word.upper(), value))
            continue
        body: str | None = value[3:]
        while body is not None and not body.endswith('"""'):
            following = next(lines, None)
            body = None if following is None else f"{body}\n{following[1]}"
        found.append((number, word.upper(), None if body is None else body[:-3]))
    return found


def _parameter_problems(value: str) -> list[str]:
    key, _, text = value.partition(" ")
    if key not in PARAMETERS:
        return [f"unknown parameter {key!r}"]
    try:
        json.loads(text) if text.startswith('"') else PARAMETERS[key](text)
    except ValueError:
        return [f"{key} {text!r} is not a valid {PARAMETERS[key].__name__}"]
    return []


_ACTION = re.compile(r'\{\{-?\s*((?:"(?:[^"\\]|\\.)*"|[^{}"])*?)\s*-?\}\}')
_WORDS = {"if", "else", "end", "range", "and", "or", "not", "eq", "ne", "len", "index", "slice"}


def template_problems(template: str) -> list[str]:
    """Return what is wrong with a Go template: actions that do not close, unbalanced blocks,
    unknown names.
    """
    problems, depth = [], 0
    for action in _ACTION.findall(template):
        code = re.sub(r'"(?:[^"\\]|\\.)*"', "", action)
        words = re.findall(r"(?<![.$\w])[A-Za-z_]\w*", code)
        problems += [
            f"unknown name {word!r} in {{{{ {action} }}}}" for word in words if word not in _WORDS
        ]
        first = words[0] if words else ""
        depth += first in {"if", "range"}
        depth -= first == "end"
        if depth < 0 or (first == "else" and depth == 0):
            problems.append(f"{{{{ {action} }}}} has no block to belong to")
    if depth > 0:
        problems.append(f"{depth} blocks are not closed with end")
    if re.search(r"\{\{|\}\}", _ACTION.sub("", template)):
        problems.append("an action is not closed")
    return problems
