"""What a row means: excluded turns, labelled data, common shapes, and nothing lost in silence."""

from __future__ import annotations

import json

import pytest

from fastft.config import DataConfig
from fastft.data import prepare
from fastft.data.encode import IGNORE
from fastft.data.formats import convert, detect
from fastft.data.messages import BadRowError
from fastft.errors import FastFTError
from tests.unit.data import real_tokenizers as real

ASK, BAD, GOOD = "Where is box 0?", "BADANSWER", "GOODANSWER 箱0は棚の上"


@pytest.fixture(scope="module")
def tokenizer():
    made = real.tiny("<|im_start|>", "<|im_end|>")
    made.chat_template = None
    return made


def _rows(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return str(path)


def _prepared(tmp_path, tokenizer, rows, **keywords):
    config = DataConfig(source=_rows(tmp_path / "a.jsonl", rows), eval_fraction=0.0, **keywords)
    return prepare(config, tokenizer, max_seq_length=512)


def _trained(tokenizer, prepared):
    return [tokenizer.decode(s.labels[s.labels != IGNORE]) for s in prepared.train]


def _pair(asked, answered, **more):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered, **more}]


EXCLUDED = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}, {"loss": 0},
            {"loss_mask": 0}, {"loss_weight": 0}, {"loss_weight": 0.0}, {"loss_scale": 0}, {"trainable": False},
            {"masked": True}, {"loss": "false"}, {"weight": "0"}]  # fmt: skip


@pytest.mark.parametrize("mark", EXCLUDED, ids=str)
def test_an_excluded_turn_is_not_trained(tmp_path, tokenizer, mark):
    row = {"messages": _pair(ASK, BAD, **mark) + _pair("again", GOOD, loss=True, weight=1)}
    made = _prepared(tmp_path, tokenizer, [row])
    assert _trained(tokenizer, made) == [f"{GOOD}<|im_end|>"]
    assert BAD in tokenizer.decode(made.train[0].input_ids), "it is still read"
    assert not any("not read" in notice for notice in made.report.notices)


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"loss_weight": 2}, {"loss": "maybe"}, {"mask": 1}], ids=str)  # fmt: skip
def test_a_share_of_a_weight_is_refused(tmp_path, tokenizer, mark):
    row = {"messages": _pair(ASK, BAD, **mark)}
    made = _prepared(tmp_path, tokenizer, [{"messages": _pair(ASK, GOOD)}, row])
    assert made.report.dropped["bad_message"].lines == [2]


def test_a_key_that_is_not_read_is_named_with_its_lines(tmp_path, tokenizer):
    rows = [{"messages": _pair(ASK, GOOD)}] + [{"messages": _pair(ASK, GOOD, mood="calm")}] * 2
    notices = " ".join(_prepared(tmp_path, tokenizer, rows).report.notices)
    assert "a key of messages that is not read: mood (2 rows; lines 2, 3)" in notices


PAIRS = {
    "texts": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": ASK, "chosen": _pair(ASK, GOOD), "rejected": _pair(ASK, BAD)},
    "answers as messages": {"prompt": _pair(ASK, "")[:1], "chosen": _pair(ASK, GOOD)[1:], "rejected": _pair(ASK, BAD)[1:]},
    "no prompt": {"chosen": _pair(ASK, GOOD), "rejected": _pair(ASK, BAD)},
    "scored": {"prompt": ASK, "chosen": _pair(ASK, GOOD), "rejected": _pair(ASK, BAD), "score_chosen": 8.0, "score_rejected": 2.0},
    "transcripts": {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}"},
    "swift": {"messages": _pair(ASK, GOOD), "rejected_response": BAD},
    "swift messages": {"messages": _pair(ASK, GOOD), "rejected_messages": _pair(ASK, BAD)},
    "LLaMA-Factory": {"conversations": [{"from": "human", "value": ASK}], "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
    "alpaca": {"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD},
    "alpaca, two outputs": {"instruction": ASK, "input": "", "output": [GOOD, BAD]},
    "question and j, k": {"question": ASK, "response_j": GOOD, "response_k": BAD},
    "numbered": {"prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 1},
    "prompt, response, rejected": {"prompt": ASK, "response": GOOD, "rejected_response": BAD},
    "KTO": {"prompt": ASK, "completion": GOOD, "label": True},
    "KTO messages": {"messages": _pair(ASK, GOOD), "label": True},
    "kto_tag": {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}], "kto_tag": "true"},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_are_named_and_the_good_answer_can_be_taken(tmp_path, tokenizer, name):
    row = PAIRS[name]
    label = next((key for key in ("label", "kto_tag") if key in row), None)
    rows = [row] * 3 + ([{**row, label: False}] if label else [])
    with pytest.raises(FastFTError, match=r"data\.take: chosen") as caught:
        _prepared(tmp_path, tokenizer, rows)
    assert ("KTO" if label else "DPO") in str(caught.value)
    assert str(caught.value).count("\n") == 0, "one message"
    made = _prepared(tmp_path, tokenizer, rows, take="chosen")
    assert _trained(tokenizer, made) == [f"{GOOD}<|im_end|>"] * 3
    assert made.report.rows_used == 3
    everything = "".join(tokenizer.decode(sample.input_ids) for sample in made.train)
    assert BAD not in everything
    assert everything.count(ASK) == 3
    if label:
        assert made.report.dropped["not_chosen"].lines == [4]


REFUSED = {
    "a class": ([{"text": ASK, "label": 1}] * 3, "classification set: label is the class of text"),
    "a class in words": ([{"sentence": ASK, "label": "positive"}] * 3, "classification set"),
    "pairs of sentences": ([{"premise": ASK, "hypothesis": GOOD, "label": 0}], "classification set"),
    "a score": ([{"prompt": ASK, "response": GOOD, "score": 3.5}] * 2, r"score is a number .* data\.ignore: \[score\]"),
    "rewards": ([{"prompt": ASK, "responses": [GOOD, BAD], "rewards": [1, 0]}], "preference set"),
    "answers without a better one": ([{"prompt": ASK, "response_a": GOOD, "response_b": BAD}], "preference set"),
    "pictures": ([{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": GOOD}]}], "this is a set of pictures"),
    "pictures and captions": ([{"image": {"bytes": "x", "path": None}, "text": GOOD}], "this is a set of pictures"),
    "sound": ([{"audio": {"path": "a.wav"}, "text": GOOD}], "pictures, sound or video: the column audio"),
    "unknown columns in Japanese": ([{"問い合わせ": ASK, "対応": GOOD}], "columns: {prompt: 問い合わせ, completion: 対応}"),
    "take without labels": ([{"prompt": ASK, "completion": GOOD}], "no column says which answers are chosen"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_list_of_answers_is_said(tmp_path, tokenizer, name):
    rows, says = REFUSED[name]
    with pytest.raises(FastFTError, match=says) as caught:
        _prepared(tmp_path, tokenizer, rows, take="chosen" if name.startswith("take") else None)
    assert caught.value.exit_code == 2


def test_the_ways_out_of_a_refusal_work(tmp_path, tokenizer):
    scored = [{"prompt": ASK, "response": GOOD, "score": 3.5}] * 2
    assert len(_prepared(tmp_path, tokenizer, scored, ignore=["score"]).train) == 2
    pair = [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}]
    made = _prepared(
        tmp_path, tokenizer, pair, columns={"prompt": "prompt", "completion": "chosen"}
    )
    assert _trained(tokenizer, made) == [f"{GOOD}<|im_end|>"]
    classes = [{"text": ASK, "label": 1}] * 2
    made = _prepared(
        tmp_path, tokenizer, classes, columns={"prompt": "text", "completion": "label"}
    )
    assert _trained(tokenizer, made) == ["1<|im_end|>"] * 2


def test_an_evaluation_file_need_not_be_labelled(tmp_path, tokenizer):
    held = _rows(tmp_path / "held.jsonl", [{"messages": _pair(ASK, GOOD)}] * 2)
    made = _prepared(tmp_path, tokenizer, [PAIRS["texts"]] * 2, take="chosen", eval_source=held)
    assert (len(made.train), len(made.eval)) == (2, 2)


DROPPED = {
    "an image part": ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, *_pair("", GOOD)[1:]]}, "not_text"),
    "a video part": ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "x"}]}, *_pair("", GOOD)[1:]]}, "not_text"),
    "a place-holder": ({"messages": _pair("<image>\nWhat is it?", GOOD)}, "not_text"),
    "a place-holder of a model": ({"messages": _pair("<|vision_start|><|image_pad|>What?", GOOD)}, "not_text"),
    "a column of images": ({"messages": _pair("What is it?", GOOD), "images": ["a.png"]}, "not_text"),
    "images of a message": ({"messages": [{"role": "user", "content": "a", "images": ["x"]}, *_pair("", GOOD)[1:]]}, "not_text"),
    "a passage beside messages": ({"messages": _pair("What is it?", GOOD), "context": "THE PASSAGE"}, "column_not_read"),
    "choices beside a question": ({"messages": _pair("Which?", GOOD), "choices": ["RED", "BLUE"]}, "column_not_read"),
    "a list of strings": ({"messages": ["a", "b"]}, "bad_message"),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_a_row_that_would_lose_something_is_counted(tmp_path, tokenizer, name):
    row, reason = DROPPED[name]
    rows = [{"messages": _pair(f"Q{i}", GOOD)} for i in range(3)] + [row]
    made = _prepared(tmp_path, tokenizer, rows)
    assert {r: d.lines for r, d in made.report.dropped.items()} == {reason: [4]}
    with pytest.raises(FastFTError, match=reason):
        _prepared(tmp_path, tokenizer, rows, strict=True)


def test_a_column_that_repeats_the_question_is_no_loss(tmp_path, tokenizer):
    row = {"prompt": ASK, "prompt_id": "x", "messages": _pair(ASK, GOOD)}
    assert len(_prepared(tmp_path, tokenizer, [row], format="messages").train) == 1
    lost = {"messages": _pair(ASK, GOOD), "context": "THE PASSAGE"}
    assert len(_prepared(tmp_path, tokenizer, [lost], ignore=["context"]).train) == 1


U, A = {"role": "user", "content": ASK}, {"role": "assistant", "content": GOOD}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ONE = [("user", ASK), ("assistant", GOOD)]
TWO = [("user", "q1"), ("assistant", "a1"), *ONE]
CALLED = [("user", ASK), ("assistant", ""), ("tool", "35"), ("assistant", GOOD)]
# name: (row, its roles and contents)
SHAPES = {
    "prompt, response": ({"prompt": ASK, "response": GOOD}, ONE),
    "query, response, history": ({"query": ASK, "response": GOOD, "history": [["q1", "a1"]]}, TWO),
    "instruction, output, history": ({"instruction": ASK, "input": "", "output": GOOD, "history": [["q1", "a1"]]}, TWO),
    "history as messages": ({"question": ASK, "answer": GOOD, "history": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]}, TWO),
    "an empty history": ({"query": ASK, "response": GOOD, "history": []}, ONE),
    "question, response": ({"question": ASK, "response": GOOD}, ONE),
    "input, output": ({"input": ASK, "output": GOOD}, ONE),
    "instruction, response": ({"instruction": ASK, "response": GOOD}, ONE),
    "instruction, question, answer": ({"instruction": "Be brief", "question": ASK, "answer": GOOD}, [("user", f"Be brief\n\n{ASK}"), ONE[1]]),
    "problem, solution": ({"problem": ASK, "solution": GOOD}, ONE),
    "Japanese": ({"質問": ASK, "回答": GOOD}, ONE),
    "Japanese alpaca": ({"指示": "訳して", "入力": ASK, "出力": GOOD}, [("user", f"訳して\n\n{ASK}"), ONE[1]]),
    "Japanese alpaca, 応答": ({"指示": ASK, "入力": "", "応答": GOOD}, ONE),
    "SQuAD": ({"context": "P", "question": ASK, "answers": {"text": [GOOD], "answer_start": [0]}}, [("user", f"P\n\n{ASK}"), ONE[1]]),
    "an article": ({"article": "P", "question": ASK, "answer": GOOD}, [("user", f"P\n\n{ASK}"), ONE[1]]),
    "a prompt and a context": ({"prompt": ASK, "context": "P", "completion": GOOD}, [("user", f"P\n\n{ASK}"), ONE[1]]),
    "human, assistant": ({"human": ASK, "assistant": GOOD}, ONE),
    "turns of human and assistant": ({"conversation": [{"human": "q1", "assistant": "a1"}, {"human": ASK, "assistant": GOOD}]}, TWO),
    "Chatbot": ({"conversations": [{"from": "User", "value": ASK}, {"from": "Chatbot", "value": GOOD}]}, ONE),
    "pairs": ({"messages": [["q1", "a1"], [ASK, GOOD]]}, TWO),
    "roles and texts": ({"messages": [["user", ASK], ["assistant", GOOD]]}, ONE),
    "a bare list": ([U, A], ONE),
    "role and text": ({"messages": [{"role": "user", "text": ASK}, {"role": "assistant", "text": GOOD}]}, ONE),
    "parts with text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}, A]}, ONE),
    "parts with value": ({"messages": [{"role": "user", "content": [{"type": "text", "value": ASK}]}, A]}, ONE),
    "parts with text.value": ({"messages": [{"role": "user", "content": [{"type": "text", "text": {"value": ASK}}]}, A]}, ONE),
    "Gemini": ({"systemInstruction": {"role": "system", "parts": [{"text": "S"}]}, "contents": [{"role": "user", "parts": [{"text": ASK}]}, {"role": "model", "parts": [{"text": GOOD}]}]}, [("system", "S"), *ONE]),
    "Gemini's calls": ({"contents": [{"role": "user", "parts": [{"text": ASK}]}, {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"x": 1}}}]}, {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": "35"}}]}, {"role": "model", "parts": [{"text": GOOD}]}]}, CALLED),
    "Anthropic's calls": ({"messages": [U, {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "35"}]}, A]}, CALLED),
    "function_call of a message": ({"messages": [U, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}, {"role": "function", "name": "f", "content": "35"}, A]}, CALLED),
    "function_call as a role": ({"conversations": [{"from": "human", "value": ASK}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}, {"from": "tool_response", "value": "35"}, {"from": "gpt", "value": GOOD}]}, CALLED),
    "a result as an object": ({"messages": [U, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": {"t": 35}}, A]}, [*CALLED[:2], ("tool", '{"t": 35}'), CALLED[3]]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_common_shapes_are_read_as_they_are_meant(name):
    row, expected = SHAPES[name]
    example = convert(row, detect([row]))
    assert [(m["role"], m["content"]) for m in example.messages] == expected
    assert not example.unread
    for message in example.messages:
        if message["role"] == "assistant" and not message["content"]:
            assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_calls_in_turns_of_their_own_are_parallel():
    calls = [
        {"from": "function_call", "value": json.dumps({"name": n, "arguments": {}})} for n in "fg"
    ]
    results = [{"from": "observation", "value": n} for n in "12"]
    row = {
        "conversations": [
            {"from": "human", "value": ASK},
            *calls,
            *results,
            {"from": "gpt", "value": GOOD},
        ]
    }
    example = convert(row, detect([row]))
    assert [c["function"]["name"] for c in example.messages[1]["tool_calls"]] == ["f", "g"]
    assert [m["role"] for m in example.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]


ARGUMENTS = {"a": None, "b": "", "c": 0, "d": False, "e": [None], "f": {"g": None}}


def test_a_null_argument_stays_and_padding_goes(tmp_path):
    tools = [{"name": "f", "parameters": {"a": {"default": None}}}]
    row = {"messages": [U, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ARGUMENTS}}]}],
           "tools": tools}  # fmt: skip
    example = convert(row, detect([row]))
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    assert example.tools[0]["function"] == tools[0]
    padded = convert(row, detect([row]), padded=True)
    assert padded.messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "b": "", "c": 0, "d": False, "e": [None], "f": {}}  # fmt: skip


def test_arguments_in_a_parquet_map_stay_arguments(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    from fastft.data.read import open_source

    call = pyarrow.struct(
        [
            ("name", pyarrow.string()),
            ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string())),
        ]
    )
    turn = pyarrow.struct(
        [
            ("role", pyarrow.string()),
            ("content", pyarrow.string()),
            ("tool_calls", pyarrow.list_(call)),
        ]
    )
    rows = [
        [
            U,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"name": "f", "arguments": [("x", "1"), ("y", "2")]}],
            },
        ]
    ]
    table = pyarrow.table({"messages": pyarrow.array(rows, pyarrow.list_(turn))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (chunk,) = open_source(str(tmp_path / "a.parquet")).chunks()
    example = convert(chunk.rows[0], detect(chunk.rows), padded=chunk.padded)
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": "1", "y": "2"}


def test_reasoning_in_each_form_is_the_same_reasoning():
    forms = [
        {"content": GOOD, "reasoning_content": "R"}, {"content": GOOD, "thinking": "R"}, {"content": GOOD, "thought": "R"},
        {"content": f"<think>\nR\n</think>\n\n{GOOD}"}, {"content": f"<think>R</think>{GOOD}", "reasoning": "R"},
        {"content": [{"type": "thinking", "thinking": "R"}, {"type": "text", "text": GOOD}]},
    ]  # fmt: skip
    for form in forms:
        row = {"messages": [U, {"role": "assistant", **form}]}
        message = convert(row, detect([row])).messages[1]
        assert (message["content"], message["reasoning_content"]) == (GOOD, "R"), form


def test_labelled_rows_of_a_wrong_shape_are_counted():
    good = {"messages": [U], "chosen": GOOD, "rejected": BAD}
    format = detect([good], take="chosen")
    for messages in (5, True, "x", {"role": ["user"]}):
        with pytest.raises(BadRowError):
            convert({**good, "messages": messages}, format)


def test_several_different_answers_are_refused():
    row = {"question": ASK, "answers": {"text": ["a", "b"]}}
    with pytest.raises(BadRowError, match="2 answers"):
        convert(row, detect([row]))
