"""Chat templates by name, written for fastft after the published formats, and which one a base
model gets.

Each is a Jinja source; `bos_token` is put in front where the tokenizer itself starts texts with
it, so that it appears exactly once. Special tokens in them must be in the vocabulary: fastft never
adds tokens on its own.
"""

from __future__ import annotations

_TURNS = (
    "{%- for message in messages -%}"
    "{{- START + (ROLE) + MIDDLE + (message['content'] | trim) + END -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- START + ANSWER + MIDDLE -}}{%- endif -%}"
)


def _turns(
    start: str, middle: str, end: str, answer: str = "assistant", role: str = "message['role']"
) -> str:
    """Return the template of a format that writes every message alike: start, role, middle,
    content, end.
    """
    values = {"START": start, "MIDDLE": middle, "END": end, "ANSWER": answer}
    source = _TURNS.replace("(ROLE)", f"({role})")
    return "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in values.items()) + source


_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] + "
    "'\\n\\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- set turns = "
    "messages -%}{%- endif -%}"
)

_MISTRAL = (
    _SYSTEM + "{%- for message in turns -%}"
    "{%- if message['role'] == 'assistant' -%}{{- ' ' + (message['content'] | trim) + eos_token -}}"
    "{%- else -%}{{- '[INST] ' + (system if loop.first else '') + (message['content'] | "
    "trim) + ' [/INST]' -}}"
    "{%- endif -%}{%- endfor -%}"
)


_INSTRUCTION = (
    "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\\n\\n' -}}"
    "{%- set turns = messages[1:] -%}"
    "{%- else -%}{{- SYSTEM + '\\n\\n' -}}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}{%- if message['role'] == 'assistant' -%}"
    "{{- ANSWERED + '\\n' + (message['content'] | trim) + eos_token -}}"
    "{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{%- else -%}{{- ASKED + '\\n' + (message['content'] | trim) + '\\n\\n' -}}{%- endif "
    "-%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ANSWERED + '\\n' -}}{%- endif -%}"
)


def _instruction(system: str, asked: str, answered: str) -> str:
    """Return an Alpaca-like template: headings in plain text, the answer ended by EOS.

    The `### Input` part of a row comes as part of the user's message; see formats.py.
    """
    values = {"SYSTEM": system, "ASKED": asked, "ANSWERED": answered}
    return (
        "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in values.items())
        + _INSTRUCTION
    )


_PLAIN = (
    # The answer starts with a space: that is how words begin inside a text, so a base model has
    # seen those tokens.
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{- 'Assistant: ' + (message['content'] | trim) + eos_token -}}"
    "{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}"
    "{%- elif message['role'] == 'system' -%}{{- (message['content'] | trim) + '\\n\\n' -}}"
    "{%- else -%}{{- 'User: ' + (message['content'] | trim) + '\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)

_QWEN3 = (
    "{%- set last = namespace(asked=-1) -%}"
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set last.asked = "
    "loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' and loop.index0 > last.asked -%}"
    "{{- '<think>\\n' + ((message['reasoning_content'] or '') | trim) + '\\n</think>\\n\\n' "
    "-}}{%- endif -%}"
    "{{- (message['content'] | trim) + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- "
    "'<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    "{%- endif -%}"
)

NAMED: dict[str, str] = {
    "chatml": _turns("<|im_start|>", "\n", "<|im_end|>\n"),
    "llama3": _turns("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    "gemma": _SYSTEM + "{%- for message in turns -%}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' -}}"
    "{{- (system if loop.first else '') + (message['content'] | trim) + '<end_of_turn>\\n' "
    "-}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}",
    "mistral": _MISTRAL,
    "phi3": _turns("<|", "|>\n", "<|end|>\n"),
    "qwen3": _QWEN3,
    "alpaca": _instruction(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.",
        "### Instruction:",
        "### Response:",
    ),
    "alpaca_ja": _instruction(
        "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。",
        "### 指示:",
        "### 応答:",
    ),
    "plain": _PLAIN,
}
"""Name -> Jinja source."""

INPUT_HEADINGS = {"alpaca": "### Input:", "alpaca_ja": "### 入力:"}
"""The heading under which an Alpaca-like template shows the input of a row; elsewhere an empty
line separates it.
"""
