"""Modelfiles: the Go template writes what the chat template writes, and the syntax test finds faults."""

import json
import re

import pytest

from fastft.data.named_templates import NAMED
from fastft.errors import FastFTError
from fastft.exporting.ollama import (
    FORMATS,
    check_modelfile,
    create_line,
    go_template,
    recognise,
    write_modelfile,
)
from tests.families import CHATML, GEMMA_TURNS, INST
from tests.sdist import chat_templates

CONVERSATIONS = [
    [{"role": "user", "content": "One"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}],
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
    """A small interpreter of what our Go templates use: if, else if, else, range, and, not, eq, variables, text."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    actions = re.findall(r'\{\{-?\s*((?:"(?:[^"\\]|\\.)*"|[^"}])*?)\s*-?\}\}', template)
    assert (
        re.sub(r'\{\{-?\s*(?:"(?:[^"\\]|\\.)*"|[^"}])*?\s*-?\}\}', "", template) == ""
    )  # no text outside of actions
    variables = {}

    def value(code, dot):
        words = re.findall(r'\([^)]*\)|"(?:[^"\\]|\\.)*"|\S+', code)
        if words[0] == "eq":
            return value(words[1], dot) == value(words[2], dot)
        if words[0] == "and":
            return all(value(word, dot) for word in words[1:])
        if words[0] == "not":
            return not value(words[1], dot)
        known = {".System": system, "$.System": system, "true": True, "false": False}
        if dot is not None:
            known |= {".Role": dot["role"], ".Content": dot["content"]}
        word = words[0]
        if word.startswith("("):
            return value(word[1:-1], dot)
        return (
            json.loads(word)
            if word.startswith('"')
            else known[word]
            if word in known
            else variables[word]
        )

    def block(at, dot, live):
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
                    here = (
                        live and not done and bool(value(condition, dot))
                        if condition
                        else live and not done
                    )
                    inner, at = block(at + 1, dot, here)
                    taken, done = (inner, True) if here else (taken, done)
                    if actions[at] == "end":
                        break
                    condition = actions[at].removeprefix("else").strip().removeprefix("if").strip()
                text += taken
            elif code.startswith("range "):
                after = block(at + 1, messages[0], False)[1]
                text += "".join(block(at + 1, m, True)[0] for m in messages) if live else ""
                at = after
            elif live and (found := re.fullmatch(r"(\$\w+) :?= (.+)", code)):
                variables[found[1]] = value(found[2], dot)
            elif live:
                text += value(code, dot)
            at += 1
        return text, at

    return block(0, None, True)[0]


TEMPLATES = {name: source for name, source in NAMED.items() if name != "qwen3"} | {
    "chatml (no trim)": CHATML,
    "gemma (published form)": GEMMA_TURNS,
    "mistral (published form)": INST,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_what_the_chat_template_writes(name, tmp_path):
    tokenizer = Tokenizer(TEMPLATES[name])
    known = recognise(tokenizer)
    assert known == name.split(" ")[0]
    template = go_template(FORMATS[known], tokenizer.eos_token)
    for messages in CONVERSATIONS:
        if messages[0]["role"] == "system" and "published" in name:
            continue  # these refuse a system role, or place it elsewhere
        expected = tokenizer.apply_chat_template(messages).removeprefix("<s>")
        assert run_go(template, messages).rstrip(" ") == expected.rstrip(" ")


def test_real_templates_are_recognised_or_left_alone():
    def known(file, bos, eos):
        return recognise(Tokenizer((chat_templates() / file).read_text(encoding="utf-8"), bos, eos))

    assert known("google-gemma-2-2b-it.jinja", "<bos>", "<eos>") == "gemma"
    assert known("microsoft-Phi-3.5-mini-instruct.jinja", "<s>", "<|endoftext|>") == "phi3"
    # These write a system message of their own where none is given, so that plain ChatML or Llama 3 would be wrong.
    assert known("Qwen-Qwen2.5-7B-Instruct.jinja", "", "<|im_end|>") is None
    assert (
        known("meta-llama-Llama-3.1-8B-Instruct.jinja", "<|begin_of_text|>", "<|eot_id|>") is None
    )


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
        tmp_path, tmp_path / "m.gguf", Tokenizer("{{ messages[0]['content'] }}??")
    )
    text = path.read_text(encoding="utf-8")
    assert "TEMPLATE" not in text.replace("# ", "").split("FROM")[0]
    assert "\nTEMPLATE" not in text
    assert "The chat template is none that fastft can write" in text
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
