"""Real templates and 30 conversations each: encoded and proven, or refused for a reason that lies in the template."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import template_matrix as matrix

from fastft.data.encode import IGNORE, Coder, encode_turns
from fastft.data.formats import convert
from fastft.data.template import choose_template
from tests.unit.data import real_tokenizers as real

# What these cannot hold, by their source: a call beside text, reasoning beside a call, several calls.
SLICE = {
    "google-gemma-4-31B-it": set(),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": set(),
    "Qwen-QwQ-32B": set(),
    "openbmb-MiniCPM5-1B": set(),
    "MiniMax-M2": set(),
    "NVIDIA-Nemotron-Nano-v2": set(),
    "deepseek-ai-DeepSeek-V3.2": set(),
    "CohereForAI-c4ai-command-r-plus-tool_use": set(),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": {"tool chain, text beside the call"},
    "openai-gpt-oss-120b": {"parallel chain"},
    "LFM2.5-8B-A1B": set(),
    "Apriel-1.6-15b-Thinker-fixed": set(),
    "mistralai-Mistral-Nemo-Instruct-2407": {"tool chain, text beside the call", "tool chain with reasoning"},
    "trl/gemma4": set(),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICE)
def test_a_real_template_holds_what_it_can(name):
    found = matrix.outcomes(matrix.templates()[name])
    assert {c for c, o in found.items() if o.status == "refused"} == SLICE[name]
    assert not [(c, o.says) for c, o in found.items() if o.status == "fault"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_real_templates_and_the_table_in_the_docs():
    assert len(matrix.CONVERSATIONS) == 30
    found = {name: matrix.outcomes(source) for name, source in matrix.templates().items()}
    assert len(found) == 111
    statuses = [outcome.status for row in found.values() for outcome in row.values()]
    assert "fault" not in statuses
    assert statuses.count("encoded") >= 3150
    docs = Path(__file__).parents[3] / "docs" / "templates.md"
    assert docs.read_text(encoding="utf-8") == matrix.table(found)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_masks_of_others_differ_only_as_the_docs_explain():
    """In a process of its own, since Unsloth patches what it imports."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(root / "tools" / "compare_masks.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout[done.stdout.index("# Masks") :]
    assert "unexplained" not in table
    assert (root / "docs" / "masks.md").read_text(encoding="utf-8").strip() == table.strip()


def _only(name, row):
    tokenizer = real.tiny_for(matrix.templates()[name])
    template = choose_template(tokenizer)
    example = convert(row, matrix.FORMAT)
    return tokenizer, template, encode_turns(tokenizer, template, example.messages, example.tools)


def test_the_prompt_of_a_running_tool_chain_is_the_one_that_generation_asks_with():
    row = matrix.CONVERSATIONS["tool chain with reasoning"].row
    tokenizer, template, (whole,) = _only("openai-gpt-oss-120b", row)
    example = convert(row, matrix.FORMAT)
    prompt = template.render(example.messages[:3], example.tools, prompt=True)
    last = int((whole.labels == IGNORE).nonzero()[0][-1]) + 1  # where the last answer begins
    assert whole.input_ids[:last].tolist() == Coder.of(tokenizer, template).encode(prompt)
    assert "THOUGHTONE" in tokenizer.decode(whole.input_ids[:last]), "the analysis is kept"
    assert "THOUGHTTWO" in whole.answers[1]
    assert whole.answers[0].endswith("<|call|>")


@pytest.mark.parametrize("name", ["deepseek-ai-DeepSeek-V3.1", "Qwen-QwQ-32B"])
def test_reasoning_that_the_template_would_cut_is_trained(name):
    _, _, (sequence,) = _only(name, matrix.CONVERSATIONS["reasoning, then HTML"].row)
    (answer,) = sequence.answers
    assert answer.count("<think>") == 0, "the prompt opens it"
    assert answer.index("THOUGHTONE") < answer.index("</think>") < answer.index("<html>Hi</html>")


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"])
def test_a_thinking_mark_inside_an_answer_is_text(name):
    answer = "Write </think> to end it."
    row = {
        "messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": answer}]
    }
    _, _, (sequence,) = _only(name, row)
    (trained,) = sequence.answers
    assert answer in trained
    if "R1" in name:
        assert trained.startswith("\n</think>\n\nWrite"), "the thought is closed before it"


def test_ids_that_mistral_refuses_are_rewritten_alike():
    call = {
        "type": "function",
        "id": "call_0123456789",
        "function": {"name": "get_weather", "arguments": {"town": "L"}},
    }
    other = {**call, "id": "x"}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call, other]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call_0123456789", "content": "RAIN"},
        {"role": "tool", "name": "get_weather", "content": "SUN"},
        {"role": "assistant", "content": "Wet."},
    ]  # fmt: skip
    tokenizer, template, sequences = _only(
        "mistralai-Mistral-Nemo-Instruct-2407", {"messages": messages, "tools": [matrix.WEATHER]}
    )
    text = tokenizer.decode(sequences[0].input_ids)
    first, second = (
        template.render(messages[:2], [matrix.WEATHER]).split('"id": "')[i][:9] for i in (1, 2)
    )
    assert len({first, second}) == 2
    assert text.count(first) == text.count(second) == 2, "the call and its result agree"
    assert text.index(first, text.index("RAIN")) > 0


@pytest.mark.parametrize(
    "name", ["trl/smolvlm", "trl/deepseekv3", "fireworks-ai-llama-3-firefunction-v2"]
)
def test_what_a_template_wants_is_given(name):
    """Contents as parts, arguments as JSON text, a `functions` variable."""
    _, template, sequences = _only(name, matrix.CONVERSATIONS["two turns"].row)
    assert [a for s in sequences for a in s.answers if "ANSWER" in a]
    assert template.wants_parts == (name == "trl/smolvlm")
    assert (template.call_shape == ("", True)) == (name == "trl/deepseekv3")
