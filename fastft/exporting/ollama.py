"""The Modelfile that turns a GGUF file into an Ollama model.

Ollama does not read the Jinja template of a GGUF file as it is: it wants a template in Go's
language. Known formats are recognised by what their Jinja template writes, never by a name, and
each Go template writes the same text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.files import write_atomically

INSTRUCTIONS = {
    "FROM",
    "PARAMETER",
    "TEMPLATE",
    "SYSTEM",
    "ADAPTER",
    "LICENSE",
    "MESSAGE",
    "REQUIRES",
}
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


@dataclass(frozen=True)
class Turns:
    """A chat format: what stands before and after each message. Ollama's tokenizer adds BOS by
    itself.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    """None: the system message is put in front of the first user message, with `system_gap`
    between.
    """
    stops: tuple[str, ...]
    system_gap: str = "\n\n"
    default_system: str = ""
    between: str = ""
    """What separates an answer from the next question."""


FORMATS: dict[str, Turns] = {
    "chatml": Turns(
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        ("<|im_start|>system\n", "<|im_end|>\n"),
        ("<|im_end|>",),
    ),
    "llama3": Turns(
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|eot_id|>",),
    ),
    "gemma": Turns(
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        None,
        ("<end_of_turn>",),
    ),
    "mistral": Turns(("[INST] ", " [/INST]"), (" ", "</s>"), None, ("</s>",)),
    "phi3": Turns(
        ("<|user|>\n", "<|end|>\n"),
        ("<|assistant|>\n", "<|end|>\n"),
        ("<|system|>\n", "<|end|>\n"),
        ("<|end|>",),
    ),
    "alpaca": Turns(
        ("### Instruction:\n", "\n\n"),
        ("### Response:\n", "EOS"),
        ("", "\n\n"),
        ("EOS",),
        default_system="Below is an instruction that describes a task. Write a response that "
        "appropriately completes "
        "the request.",
        between="\n\n",
    ),
    "alpaca_ja": Turns(
        ("### 指示:\n", "\n\n"),
        ("### 応答:\n", "EOS"),
        ("", "\n\n"),
        ("EOS",),
        default_system="以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。",
        between="\n\n",
    ),
    "plain": Turns(("User: ", "\n"), ("Assistant: ", "EOS"), ("", "\n\n"), ("EOS",), between="\n"),
}
"""Formats that a Go template is known for. EOS stands for the model's own end token."""


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
) -> Path:
    """Write `out`/Modelfile for the GGUF file (and a LoRA GGUF `adapter`) and return its path.

    `tokenizer`: the trained transformers tokenizer; its chat template is matched against the known
    formats. `stops`: further texts that end an answer. `parameters`: Ollama's, for example
    {"temperature": 0.7, "num_ctx": 4096}. Where the chat template is none of the known formats, no
    TEMPLATE is written and a comment says so: Ollama then uses the template inside of the GGUF
    file if it knows it, and plain text if not. Raises FastFTError for unknown parameters.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "Modelfile"
    text = modelfile_text(
        relative(gguf_path, out),
        tokenizer,
        stops=stops,
        parameters=parameters or {},
        system=system,
        adapter=relative(adapter, out) if adapter else None,
        create=create_line(path, name or Path(gguf_path).stem.lower()),
    )
    write_atomically(path, text)
    if problems := check_modelfile(path):
        raise AssertionError(f"a Modelfile that we wrote is wrong: {problems}")
    return path


def create_line(modelfile: Path | str, name: str) -> str:
    """Return the command that makes the Ollama model; run it in the Modelfile's folder."""
    return (
        f"ollama create {re.sub(r'[^a-z0-9._-]+', '-', name.lower()).strip('-._') or 'model'} -f "
        f"{Path(modelfile).name}"
    )


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
) -> str:
    """Return the Modelfile as text."""
    unknown = sorted(set(parameters) - set(PARAMETERS))
    if unknown:
        raise FastFTError(
            f"Ollama has no parameter {', '.join(unknown)}. Known: {', '.join(sorted(PARAMETERS))}."
        )
    known = recognise(tokenizer)
    lines = [f"# {create}", f"FROM {source}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    ends = list(stops)
    if known:
        turns = FORMATS[known]
        eos = tokenizer.eos_token or ""
        ends += [eos if stop == "EOS" else stop for stop in turns.stops]
        lines += [f"# chat format: {known}", f'TEMPLATE """{go_template(turns, eos)}"""']
    else:
        lines.append(
            "# The chat template is none that fastft can write in Go's template language, so "
            "none stands here:"
        )
        lines.append(
            "# Ollama uses the one inside of the GGUF file if it knows it, and plain text if "
            "it does not."
        )
    ends.append(tokenizer.eos_token or "")
    lines += [
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}"
        for stop in dict.fromkeys(filter(None, ends))
    ]
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def recognise(tokenizer: Any) -> str | None:
    """Return which of FORMATS the tokenizer's chat template writes, or None.

    The template must render a conversation of four turns, with and without a system message, to
    exactly the text of the format (a BOS in front aside).
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    for name, turns in FORMATS.items():
        if all(
            _rendered(tokenizer, messages) == expected_text(turns, messages, tokenizer)
            for messages in _PROBES
        ):
            return name
    return None


_PROBES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "One"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three 四"},
    ],
]


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError:
        return None
    return text.removeprefix(tokenizer.bos_token or "").rstrip(" ")


def expected_text(turns: Turns, messages: list[dict[str, str]], tokenizer: Any) -> str:
    """Return the conversation as the format writes it, up to where the answer begins, without BOS.

    A space at the very end is left out: some templates leave it to the answer, others write it.
    """
    eos = tokenizer.eos_token or ""
    text, system = "", turns.default_system
    messages = list(messages)
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    if system and turns.system:
        text += turns.system[0] + system + turns.system[1]
    for index, message in enumerate(messages):
        before, after = turns.user if message["role"] == "user" else turns.assistant
        in_front = system + turns.system_gap if index == 0 and system and not turns.system else ""
        text += before + in_front + message["content"] + after.replace("EOS", eos)
        text += turns.between if message["role"] == "assistant" else ""
    return (text + turns.assistant[0]).rstrip(" ")


def go_template(turns: Turns, eos: str) -> str:
    """Return the format in Go's template language, over Ollama's .Messages (role, content) and
    .System.

    The last message leaves the answer open. See text/template in Go's documentation and Ollama's
    template reference.
    """
    user, assistant = (
        turns.user,
        (turns.assistant[0], turns.assistant[1].replace("EOS", eos) + turns.between),
    )
    if turns.system:
        default = (
            turns.system[0] + turns.default_system + turns.system[1] if turns.default_system else ""
        )
        head = "{{- if .System }}" + _go(turns.system[0]) + "{{ .System }}" + _go(turns.system[1])
        head += ("{{- else }}" + _go(default) if default else "") + "{{- end }}"
        in_front = ""
    else:
        head = "{{- $written := false }}"
        in_front = (
            "{{- if and $.System (not $written) }}{{ $.System }}"
            + _go(turns.system_gap)
            + "{{- end }}"
        )
        in_front += "{{- $written = true }}"
    # Ollama gathers the system messages in .System; in .Messages, where they stand too, they are
    # passed over.
    return (
        head
        + "{{- range .Messages }}"
        + '{{- if eq .Role "user" }}'
        + _go(user[0])
        + in_front
        + "{{ .Content }}"
        + _go(user[1])
        + '{{- else if eq .Role "assistant" }}'
        + _go(assistant[0])
        + "{{ .Content }}"
        + _go(assistant[1])
        + "{{- end }}{{- end }}"
        + _go(assistant[0].rstrip(" "))
    )


def _go(text: str) -> str:
    """Return literal text as an action, so that neither trimming nor quoting can change it."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


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
