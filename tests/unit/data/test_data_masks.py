"""The mask proof on real templates: trained is what the template renders for generation; faults are caught."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft.data.encode import (
    IGNORE,
    Coder,
    check_mask,
    encode_conversation,
    encode_turns,
    generation_prompt,
)
from fastft.data.template import UnusableRowError, choose_template
from fastft.errors import FastFTError
from tests.unit.data import real_tokenizers as real

USER = {"role": "user", "content": "Where is Bavor?\nTell me: 東京から遠い? 🗾"}
ANSWER = {"role": "assistant", "content": "In the north. 北にあります。🎉"}
MORE = {"role": "user", "content": "And Kelmo?"}
LAST = {"role": "assistant", "content": "Nobody knows.\n\n```py\nprint('x')\n```"}
SYSTEM = {"role": "system", "content": "Be brief. 簡潔に。"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "abcdefghi",
            "function": {"name": "look_up", "arguments": {"q": "東京 🎉"}},
        }
    ],
}
RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "abcdefghi", "content": "35"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up.",
            "parameters": {
                "type": "object",
                "properties": {"q": {"type": "string", "description": "what"}},
                "required": ["q"],
            },
        },
    }
]
CASES = {
    "single": ([USER, ANSWER], None),
    "multi": ([USER, ANSWER, MORE, LAST], None),
    "system": ([SYSTEM, USER, ANSWER, MORE, LAST], None),
    "tools": ([USER, CALL, RESULT, ANSWER], TOOLS),
}
# Template: (how its tokenizer is made, what ends a turn, what ends a tool call or None where it knows none).
FAMILIES = {
    "chatml": (lambda: _own(real.qwen(), "Qwen-Qwen2.5-7B-Instruct"), "<|im_end|>", "<|im_end|>"),
    "llama-3.1": (
        lambda: _own(real.llama3(), "meta-llama-Llama-3.1-8B-Instruct"),
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "gemma-2": (
        lambda: real.tiny_for(real.template("google-gemma-2-2b-it")),
        "<end_of_turn>",
        None,
    ),
    "gemma-4": (
        lambda: real.tiny_for(real.template("google-gemma-4-31B-it")),
        "<turn|>",
        "<|tool_response>",
    ),
    "mistral-nemo": (
        lambda: real.tiny_for(real.template("mistralai-Mistral-Nemo-Instruct-2407")),
        "</s>",
        "</s>",
    ),
    "phi-3.5": (lambda: _own(real.phi3(), "microsoft-Phi-3.5-mini-instruct"), "<|end|>", None),
    "gpt-oss": (
        lambda: real.tiny_for(real.template("openai-gpt-oss-120b")),
        "<|return|>",
        "<|call|>",
    ),
    "qwen3": (lambda: _own(real.qwen(), "Qwen-Qwen3-0.6B"), "<|im_end|>", "<|im_end|>"),
    "qwen3.5": (lambda: _own(real.qwen(), "Qwen3.5-4B"), "<|im_end|>", "<|im_end|>"),
    "deepseek-r1": (lambda: _r1(), "<｜end▁of▁sentence｜>", None),
    "named chatml": (lambda: (real.qwen(), "chatml"), "<|im_end|>", None),
    "named llama3": (lambda: (real.llama3(), "llama3"), "<|eot_id|>", None),
    "named gemma": (
        lambda: (real.tiny("<start_of_turn>", "<end_of_turn>", adds_bos=True), "gemma"),
        "<end_of_turn>",
        None,
    ),
    "named mistral": (lambda: (real.tiny(adds_bos=True), "mistral"), "</s>", None),
    "named phi3": (lambda: (real.phi3(), "phi3"), "<|end|>", None),
    "named qwen3": (lambda: (real.qwen(), "qwen3"), "<|im_end|>", None),
    "alpaca": (lambda: (real.llama3(), "alpaca"), "<|eot_id|>", None),
    "alpaca_ja": (lambda: (real.tiny(adds_bos=True), "alpaca_ja"), "</s>", None),
    "plain": (lambda: (real.tiny(), "plain"), "</s>", None),
}


def _own(tokenizer, name):
    tokenizer.chat_template = real.template(name)
    return tokenizer


def _r1():
    return real.tiny_for(
        real.template("deepseek-ai-DeepSeek-R1-Distill-Llama-8B") + "{#- <｜end▁of▁sentence｜> -#}"
    )


def _load(family):
    made = FAMILIES[family][0]()
    if isinstance(made, tuple):
        tokenizer, name = made
        tokenizer.chat_template = None
        return tokenizer, choose_template(tokenizer, name)
    return made, choose_template(made)


def _independent_answer(template, messages, tools, index):
    """What generation would have to write: rendered here without the code under test."""
    thinking = bool(messages[index].get("reasoning_content")) if template.switch else None
    prompt = template.render(messages[:index], tools, prompt=True, thinking=thinking)
    whole = template.render(messages[: index + 1], tools, thinking=thinking)
    return prompt, whole


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "deepseek-r1"])
def test_trained_tokens_are_what_the_template_renders(family, case):
    messages, tools = CASES[case]
    tokenizer, template = _load(family)
    _, end, call_end = FAMILIES[family]
    if case == "tools" and call_end is None:
        if "tool_calls" not in template.source or family == "gemma-2":
            return _assert_tools_are_not_lost(tokenizer, template, messages, tools)
        call_end = end
    coder = Coder.of(tokenizer, template)
    sequences = encode_turns(tokenizer, template, messages, tools)
    trained = 0
    for sequence in sequences:
        ids, mask = np.array(sequence.input_ids), np.array(sequence.labels) != IGNORE
        bos = tokenizer.bos_token_id
        assert bos is None or (ids[:2] == bos).sum() <= 1, "BOS stands at the start once"
        edges = np.flatnonzero(np.diff(np.r_[False, mask, False].astype(int))).reshape(-1, 2)
        trained += len(edges)
        for (first, last), answer in zip(edges, sequence.answers, strict=True):
            matches = [
                (prompt, whole)
                for prompt, whole in (
                    _independent_answer(template, messages, tools, i)
                    for i, m in enumerate(messages)
                    if m["role"] == "assistant"
                )
                if whole[len(prompt) :].startswith(answer) or family.startswith("gemma-4")
            ]
            assert matches, f"{answer!r} is not what the template renders"
            assert coder.same(coder.decode(ids, first, last), answer)
            stop = end if not (case == "tools" and "look_up" in answer) else call_end
            assert ids[last - 1] == tokenizer.convert_tokens_to_ids(stop), (
                "the end token is trained, and last"
            )
            # What generation is asked with is exactly what stands before the answer.
            prompts = [coder.encode(prompt) for prompt, _ in matches]
            assert ids[:first].tolist() in prompts
    assert trained == sum(m["role"] == "assistant" for m in messages), (
        "each answer is trained exactly once"
    )


def _assert_tools_are_not_lost(tokenizer, template, messages, tools):
    """A template that knows no tool calls must not swallow them: the row is refused with a reason."""
    with pytest.raises(FastFTError, match="template"):
        encode_turns(tokenizer, template, messages, tools)


@pytest.mark.parametrize(
    "family", ["chatml", "llama-3.1", "gemma-2", "phi-3.5", "gpt-oss", "qwen3", "alpaca"]
)
@pytest.mark.parametrize("fault", ["late", "early", "short", "long", "none", "marker"])
def test_planted_faults_are_caught(family, fault):
    tokenizer, template = _load(family)
    messages = [SYSTEM, USER, ANSWER]
    ids, labels = encode_conversation(tokenizer, template, messages)
    check_mask(tokenizer, template, messages, ids, labels)  # sound before
    ids, labels = list(ids), list(labels)
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    last = max(i for i, label in enumerate(labels) if label != IGNORE)
    if fault == "late":
        labels[first] = IGNORE
    elif fault == "early":
        labels[first - 1] = ids[first - 1]
    elif fault == "short":
        labels[last] = IGNORE  # the end token is not trained
    elif fault == "long":
        ids, labels = [*ids, ids[last]], [*labels, ids[last]]
    elif fault == "none":
        labels = [IGNORE] * len(labels)
    else:
        labels = _marker_mask(tokenizer, template, messages, ids)
    with pytest.raises(UnusableRowError, match="trained tokens"):
        check_mask(tokenizer, template, messages, ids, labels)


def _marker_mask(tokenizer, template, messages, ids):
    """The way of marker strings: everything after the marker of the answer is trained, up to the end of the text."""
    word = "<|message|>" if "<|message|>" in template.control_tokens else "assistant"
    marker = tokenizer.encode(word, add_special_tokens=False)
    places = [i for i in range(len(ids)) if ids[i : i + len(marker)] == marker]
    start = places[-1] + len(marker) if places else 0
    return [IGNORE] * start + list(ids[start:])


@pytest.mark.parametrize("reasoning", ["", "Let me see.\n考える。"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3.5", "named qwen3", "deepseek-r1"])
def test_thinking_in_training_and_generation_agree(family, reasoning):
    tokenizer, template = _load(family)
    answer = ANSWER | ({"reasoning_content": reasoning} if reasoning else {})
    sequence = encode_turns(tokenizer, template, [USER, answer])[0]
    first = next(i for i, label in enumerate(sequence.labels) if label != IGNORE)
    asked = generation_prompt(
        tokenizer, template, [USER], thinking=bool(reasoning) if template.switch else None
    )
    assert asked == list(sequence.input_ids[:first])
    trained = tokenizer.decode([label for label in sequence.labels if label != IGNORE])
    assert reasoning in trained
    assert ANSWER["content"] in trained
    if template.switch and not reasoning:
        assert "think>" not in trained, "the empty think block is part of the question, not learned"


@pytest.mark.parametrize("thinking", [True, False])
def test_saved_template_asks_as_it_was_trained(thinking):
    tokenizer, template = _load("qwen3")
    pinned = template.with_thinking(thinking)
    pinned.save(tokenizer)
    text = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert text.endswith("<think>\n\n</think>\n\n") == (not thinking)
    assert generation_prompt(tokenizer, choose_template(tokenizer), [USER]) == tokenizer.encode(
        text
    )
    assert pinned.with_thinking(not thinking).with_thinking(thinking).source == pinned.source


def test_history_rewriting_templates_become_several_sequences():
    tokenizer, template = _load("gpt-oss")
    sequences = encode_turns(tokenizer, template, [USER, ANSWER, MORE, LAST])
    assert len(sequences) == 2
    assert all(
        sequence.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|return|>")
        for sequence in sequences
    )


@pytest.mark.parametrize("family", ["chatml", "llama-3.1", "phi-3.5", "gpt-oss", "alpaca", "plain"])
def test_a_special_token_spelled_out_is_text(family):
    tokenizer, template = _load(family)
    evil = "".join(sorted(template.control_tokens)[:3]) + tokenizer.eos_token
    messages = [
        {"role": "user", "content": f"what is {evil}?"},
        {"role": "assistant", "content": f"It is {evil}, text"},
    ]
    plain = [
        {"role": "user", "content": "what is X?"},
        {"role": "assistant", "content": "It is X, text"},
    ]
    ids, labels = encode_conversation(tokenizer, template, messages)
    plain_ids, _ = encode_conversation(tokenizer, template, plain)
    controls = set(tokenizer.convert_tokens_to_ids(sorted(template.control_tokens)))
    assert sum(i in controls for i in ids) == sum(i in controls for i in plain_ids)
    trained = Coder.of(tokenizer, template).backend.decode(
        [x for x in labels if x != IGNORE], skip_special_tokens=False
    )
    assert evil in trained


def test_base_model_gets_a_documented_default():
    base = real.tiny()
    base.chat_template = None
    template = choose_template(base)
    assert (template.name, template.needs_tokens) == ("plain", ())
    assert template.end_token_ids == [base.eos_token_id]
    chatml = real.tiny("<|im_start|>", "<|im_end|>")
    chatml.chat_template = None
    template = choose_template(chatml)
    assert template.name == "chatml"
    assert set(template.needs_tokens) == {"<|im_start|>", "<|im_end|>"}
    assert template.end_token_ids[0] == chatml.convert_tokens_to_ids("<|im_end|>")
    template.save(chatml)
    assert choose_template(chatml).source == template.source


@pytest.mark.parametrize(
    ("name", "says"),
    [("chatlm", "did you mean 'chatml'"), ("nowhere.jinja", "does not exist"), ("llama3", "lacks")],
)
def test_unknown_or_unfit_template_is_refused(name, says):
    tokenizer = real.tiny()
    with pytest.raises(FastFTError, match=says):
        choose_template(tokenizer, name)


_TURN = "<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n"
_LOOP = "{% for m in messages %}" + _TURN + "{% endfor %}"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# name: (source, what the error says)
BAD_TEMPLATES = {
    "wrong syntax": ("one\n{% for m in messages %}{% endif %}", "line 2: Encountered unknown tag"),
    "unknown filter": ("{{ 'a' | foo }}" + _LOOP, "line 1: No filter named 'foo'"),
    "empty": ("", "does not write the assistant's answer"),
    "not UTF-8": (b"caf\xe9", "no text that can be read"),
    "divides by zero": (_LOOP + "{{ 1/0 }}", "question and its answer: division by zero"),
    "endless": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "question and its answer: maximum recursion"),
    "counts too far": ("{% for i in range(10**7) %}{% endfor %}" + _LOOP, "question and its answer: Range too big"),
    "raises": (_LOOP + "{{ raise_exception('nope') }}", "question and its answer: nope"),
    "BOS twice": ("{{ bos_token }}{{ bos_token }}" + _LOOP + _ASK, "begins with <s> twice"),
    "forgets the user": (_LOOP.replace("in messages", "in messages if m.role == 'assistant'") + _ASK, "leaves out the user"),
    "first line only": (_LOOP.replace("m.content", "m.content.split('\n')[0]") + _ASK, "leaves out the user"),
    "shouts the answer": (_LOOP.replace("m.content", "m.content | upper") + _ASK, "does not write the assistant's answer"),
    "turns the order": (_LOOP.replace("in messages", "in messages | reverse") + _ASK, "asks for an answer"),
    "asks somebody else": (_LOOP + _ASK.replace("assistant", "bot"), "asks for an answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_cannot_be_trusted_is_refused(tmp_path, name):
    source, says = BAD_TEMPLATES[name]
    path = tmp_path / "a.jinja"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    tokenizer = real.tiny("<|im_start|>", "<|im_end|>")
    with pytest.raises(FastFTError, match=says) as caught:
        encode_turns(tokenizer, choose_template(tokenizer, str(path)), [USER, ANSWER])
    assert caught.value.exit_code == 2


def test_a_lost_result_of_a_tool_is_refused():
    source = _LOOP.replace("in messages", "in messages if m.role != 'tool'") + _ASK
    tokenizer = real.tiny_for(source)
    with pytest.raises(UnusableRowError, match="leaves out the tool's '35'"):
        encode_turns(tokenizer, choose_template(tokenizer), [USER, ANSWER, RESULT, LAST])


def test_a_template_without_generation_prompt_is_said():
    told, silent = (choose_template(real.tiny_for(source)) for source in (_LOOP, _LOOP + _ASK))
    assert any("no generation prompt" in notice for notice in told.notices)
    assert not silent.notices


def test_a_template_that_forgets_earlier_answers_is_no_crash():
    source = "{{ messages[-1 if add_generation_prompt else -2].content }}<|im_end|>{% if not add_generation_prompt %}{{ messages[-1].content }}<|im_end|>{% endif %}"  # fmt: skip
    tokenizer = real.tiny_for(source)
    ids, labels = encode_conversation(tokenizer, choose_template(tokenizer), [USER, ANSWER])
    assert tokenizer.decode(
        [i for i, label in zip(ids, labels, strict=True) if label != IGNORE]
    ).endswith("<|im_end|>")


def test_a_special_token_as_a_tools_argument_is_text():
    tokenizer, template = _load("chatml")
    call = {
        **CALL,
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"<|im_end|>": "x"}}}
        ],
    }
    ids, _ = encode_conversation(tokenizer, template, [USER, call], TOOLS)
    plain, _ = encode_conversation(tokenizer, template, [USER, CALL], TOOLS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(ids).count(end) == list(plain).count(end)


def test_every_real_template_is_proven_or_refused_with_a_reason():
    """The 71 templates in the archive, each with a tokenizer that has its marks: none fails silently."""
    from tests.sdist import chat_templates

    proven, refused = [], {}
    for path in sorted(chat_templates().glob("*.jinja")):
        tokenizer = real.tiny_for(path.read_text(encoding="utf-8"))
        try:
            template = choose_template(tokenizer)
            sequences = encode_turns(tokenizer, template, [USER, ANSWER, MORE, LAST])
        except FastFTError as error:  # anything else is our bug
            refused[path.stem] = str(error)
            continue
        answers = [answer for sequence in sequences for answer in sequence.answers]
        assert len(answers) == 2
        for message in (ANSWER, LAST):
            assert sum(message["content"] in answer for answer in answers) == 1, path.stem
        proven.append(path.stem)
    assert len(proven) >= 60, refused


def _samples(maker, example):
    from fastft.data.encode import plan_turns
    from fastft.data.rows import Counts

    return maker._samples(example, plan_turns(maker.coder, example.messages), Counts())


texts = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Co", "Cn")), min_size=1, max_size=30
).filter(lambda text: text.strip() and "<" not in text)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    system=st.none() | texts,
    family=st.sampled_from(
        ["chatml", "gemma-2", "gpt-oss", "qwen3", "alpaca", "plain", "llama-3.1"]
    ),
    limit=st.integers(8, 200),
)
def test_random_conversations(turns, system, family, limit):
    from fastft.data.formats import FORMATS, Format, convert
    from fastft.data.rows import RowMaker, Settings

    tokenizer, template = _load(family)
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    coder = Coder.of(tokenizer, template)
    sequences = encode_turns(tokenizer, template, messages)
    said = []
    for sequence in sequences:
        ids, labels = np.array(sequence.input_ids), np.array(sequence.labels)
        edges = np.flatnonzero(np.diff(np.r_[False, labels != IGNORE, False].astype(int))).reshape(
            -1, 2
        )
        for (first, last), answer in zip(edges, sequence.answers, strict=True):
            assert coder.same(coder.decode(ids, first, last), answer)
        assert len(edges) == len(sequence.answers)
        said += sequence.answers
        # No token of a user's turn is trained: untrained text holds all that was asked up to there.
        rest = coder.backend.decode(ids[labels == IGNORE].tolist(), skip_special_tokens=False)
        asked_here = [
            asked
            for asked, _ in turns[
                : 1 if len(sequences) == len(turns) > 1 and sequence is sequences[-1] else None
            ]
        ]
        if family != "chatml" and family != "qwen3":  # their tokenizer normalises (NFC)
            assert all(asked.strip() in rest for asked in asked_here[:1])
    for _, answered in turns:
        assert any(
            coder.same(answered.strip(), answered.strip()) and answered.strip() in answer
            for answer in said
        )
    # Cutting keeps the labels that are left, and never invents one.
    assert set(FORMATS) >= {"messages"}
    maker = RowMaker(
        tokenizer,
        template,
        Format("messages", {"messages": "messages"}, ""),
        Settings(limit, "responses", "split", "truncate", False),
    )
    example = convert({"messages": messages}, maker.format)
    if all((np.array(s.labels)[:limit] == IGNORE).all() for s in sequences):
        with pytest.raises(UnusableRowError, match="leaves nothing of the answer"):
            _samples(maker, example)
        return
    cut = _samples(maker, example)
    whole = [s for s in sequences if (np.array(s.labels)[:limit] != IGNORE).any()]
    for sample, sequence in zip(cut, whole, strict=True):
        assert sample.tokens.tolist() == list(sequence.input_ids[:limit])
        kept = np.full(len(sample.tokens), IGNORE)
        for first, last in sample.trained.reshape(-1, 2):
            kept[first:last] = sample.tokens[first:last]
        assert kept.tolist() == list(sequence.labels[:limit])
