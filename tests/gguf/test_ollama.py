"""Modelfiles: the Go template writes what the chat template writes, and the syntax test finds faults."""

import json
import re

import jinja2
import pytest

from fastft.data.named_templates import NAMED
from fastft.errors import FastFTError
from fastft.exporting.ollama import (
    check_modelfile,
    create_line,
    go_template,
    has_template,
    learn,
    of_tokenizer,
    template_problems,
    write_modelfile,
)
from tests.families import CHATML, GEMMA_TURNS, INST
from tests.sdist import chat_templates

CONVERSATIONS = [
    [{"role": "user", "content": "One"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ],
    [
        {"role": "user", "content": 'One "quoted" {{ x }}\nline'},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "三"},
    ],
]


class Tokenizer:
    """As much of a tokenizer as a Modelfile needs."""

    def __init__(self, template, bos="<s>", eos="</s>"):
        self.chat_template, self.bos_token, self.eos_token = template, bos, eos

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        from transformers.utils.chat_template_utils import render_jinja_template

        special = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        options = {
            "chat_template": self.chat_template,
            "add_generation_prompt": add_generation_prompt,
        }
        return render_jinja_template(conversations=[messages], **options, **special)[0][0]


def run_go(template, messages):
    """A small interpreter of what our Go templates use: if, else if, else, range, and, not, eq, len, slice, text."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    action = r'\{\{-?\s*((?:"(?:[^"\\]|\\.)*"|[^"}])*?)\s*-?\}\}'
    actions = re.findall(action, template)
    assert re.sub(action, "", template) == ""  # no text outside of actions

    def value(code, scope):
        words = re.findall(r'\((?:[^()]|\([^)]*\))*\)|"(?:[^"\\]|\\.)*"|\S+', code)
        first, rest = words[0], words[1:]
        if first == "eq":
            return value(rest[0], scope) == value(rest[1], scope)
        if first == "and":
            return all(value(word, scope) for word in rest)
        if first == "not":
            return not value(rest[0], scope)
        if first == "len":
            return len(value(rest[0], scope))
        if first == "slice":
            return value(rest[0], scope)[value(rest[1], scope) :]
        if first.startswith("("):
            return value(first[1:-1], scope)
        if first.startswith('"'):
            return json.loads(first)
        return int(first) if first.isdigit() else scope[first]

    def block(at, scope, live):
        """Run from `at` to the matching end or else; returns (text, index of that action)."""
        text = ""
        while at < len(actions):
            code = actions[at]
            if code == "end" or code.split()[0] == "else":
                return text, at
            if code.startswith("if "):
                taken, done = "", False
                condition = code[3:]
                while True:
                    here = live and not done and (not condition or bool(value(condition, scope)))
                    inner, at = block(at + 1, scope, here)
                    taken, done = (inner, True) if here else (taken, done)
                    if actions[at] == "end":
                        break
                    condition = actions[at].removeprefix("else").strip().removeprefix("if").strip()
                text += taken
            elif code.startswith("range $i, $m := .Messages"):
                after = block(at + 1, scope, False)[1]
                for number, message in enumerate(messages if live else []):
                    inner = scope | {".Role": message["role"], ".Content": message["content"]}
                    text += block(at + 1, inner | {"$i": number}, True)[0]
                at = after
            elif live and (found := re.fullmatch(r"(\$\w+) :?= (.+)", code)):
                scope[found[1]] = value(found[2], scope)
            elif live:
                text += value(code, scope)
            at += 1
        return text, at

    return block(0, {"$.System": system, "$.Messages": messages}, True)[0]


TEMPLATES = NAMED | {
    "chatml (no trim)": CHATML,
    "gemma (published form)": GEMMA_TURNS,
    "mistral (published form)": INST,
}


def differences(tokenizer):
    """How many of CONVERSATIONS the learnt Go template writes otherwise; None where none is learnt."""
    render = of_tokenizer(tokenizer)
    learnt = learn(render)
    if learnt is None:
        return None
    template = go_template(learnt)
    assert template_problems(template) == []
    wrong = 0
    for messages in CONVERSATIONS:
        try:
            expected = render(messages)
        except jinja2.TemplateError:
            continue  # it refuses a system role
        wrong += run_go(template, messages) != expected
    return wrong


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_what_the_chat_template_writes(name):
    assert differences(Tokenizer(TEMPLATES[name])) == 0


# Their Jinja loops over tools that are not there, or writes the messages as JSON inside of a text.
WITHOUT = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2",
}


def test_published_templates_are_written_exactly_or_not_at_all():
    found = {}
    for path in sorted(chat_templates().glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        found[path.stem] = differences(Tokenizer(source, "<BOS>", "<EOS>"))
    assert {name for name, wrong in found.items() if wrong is None} == WITHOUT
    assert {name for name, wrong in found.items() if wrong} == set()
    assert len(found) - len(WITHOUT) >= 45


@pytest.mark.parametrize(
    ("file", "stop", "start"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", "<|im_end|>", "<|im_start|>system\nYou are Qwen"),
        ("meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>", "<|start_header_id|>system"),
        ("google-gemma-2-2b-it", "<end_of_turn>", "<start_of_turn>user\n"),
        ("microsoft-Phi-3.5-mini-instruct", "<|end|>", "<|user|>\n"),
    ],
)
def test_what_a_format_begins_and_ends_with(file, stop, start):
    source = (chat_templates() / f"{file}.jinja").read_text(encoding="utf-8")
    learnt = learn(of_tokenizer(Tokenizer(source, "<BOS>", "<EOS>")))
    assert learnt.stop == stop
    assert learnt.start.startswith(start)


def test_a_template_that_counts_its_messages_is_not_learnt():
    counting = "{{ messages | length }}{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert learn(of_tokenizer(Tokenizer(counting))) is None


def test_a_modelfile_is_written_and_is_right(tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    path = write_modelfile(
        tmp_path,
        tmp_path / "model.Q4_K_M.gguf",
        Tokenizer(NAMED["chatml"], "", "<|im_end|>"),
        parameters={"temperature": 0.7, "num_ctx": 4096},
        system='Answer "briefly".',
    )
    text = path.read_text(encoding="utf-8")
    assert check_modelfile(path) == []
    assert "FROM ./model.Q4_K_M.gguf\n" in text
    assert text.count('PARAMETER stop "<|im_end|>"') == 1
    assert 'SYSTEM """Answer "briefly"."""' in text
    assert "PARAMETER num_ctx 4096" in text
    assert create_line(path, "My Model") == "ollama create my-model -f Modelfile"


def test_an_unknown_template_is_said_not_guessed(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    path = write_modelfile(
        tmp_path,
        tmp_path / "m.gguf",
        Tokenizer("{{ messages[0]['content'] }}{{ messages | length }}"),
    )
    text = path.read_text(encoding="utf-8")
    assert "TEMPLATE" not in text.replace("# ", "").split("FROM")[0]
    assert "\nTEMPLATE" not in text
    assert not has_template(path)
    assert check_modelfile(path) == []
    with pytest.raises(FastFTError, match="no parameter tmperature"):
        write_modelfile(
            tmp_path, tmp_path / "m.gguf", Tokenizer(CHATML), parameters={"tmperature": 1}
        )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("FROM ./none.gguf", "does not exist"),
        ("PARAMETER stop x", "0 FROM lines"),
        ("FROM ./m.gguf\nPARAMETER temperature warm", "not a valid float"),
        ("FROM ./m.gguf\nPARAMETER temprature 1", "unknown parameter 'temprature'"),
        ("FROM ./m.gguf\nTEMPLAT x", "unknown instruction 'TEMPLAT'"),
        ('FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}', "quotes of TEMPLATE are not closed"),
        ('FROM ./m.gguf\nTEMPLATE """{{ if .System }}x"""', "1 blocks are not closed"),
        ('FROM ./m.gguf\nTEMPLATE """{{ end }}"""', "has no block to belong to"),
        ('FROM ./m.gguf\nTEMPLATE """{{ .System"""', "an action is not closed"),
        ('FROM ./m.gguf\nTEMPLATE """{{ upper .System }}"""', "unknown name 'upper'"),
    ],
)
def test_the_syntax_test_finds_faults(tmp_path, text, problem):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "Modelfile").write_text(text)
    assert any(problem in found for found in check_modelfile(tmp_path / "Modelfile")), (
        check_modelfile(tmp_path / "Modelfile")
    )
