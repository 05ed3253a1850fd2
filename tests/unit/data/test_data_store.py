"""Joined documents, splits, the cache, workers and the report."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.config import DataConfig
from fastft.data import prepare
from fastft.data.encode import IGNORE, encode_turns
from fastft.data.light import LightTokenizer
from fastft.data.pipeline import join_documents
from fastft.data.report import histogram
from fastft.data.rows import SIGNATURE, RowMarks
from fastft.data.split import explain_share, group_rows, held_out
from fastft.data.store import FileArray, Packed, in_memory
from fastft.data.template import choose_template
from fastft.errors import CouldNotFinishError
from tests.unit.data import real_tokenizers as real

WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "frost",
    "grove",
    "haven",
    "iris",
    "jade",
    "kite",
    "lemon",
    "maple",
    "north",
    "olive",
    "pearl",
    "quartz",
    "river",
]


# Writes BOS, tools and special tokens, so that it shows whether a tokenizer's own values arrive.
CHAT = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = real.tiny("<|im_start|>", "<|im_end|>")
    made.chat_template = None
    return made


def _rows(count, seed=0):
    pick = random.Random(seed)
    for number in range(count):
        asked, said = " ".join(pick.choices(WORDS, k=12)), " ".join(pick.choices(WORDS, k=20))
        yield {"question": f"{number} {asked}?", "answer": f"{said}."}


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(4, 30))
def test_joined_documents_train_every_token_once(lengths, limit):
    numbers = iter(range(10_000))
    documents = [[next(numbers) for _ in range(length)] for length in lengths]
    joined = in_memory(join_documents(in_memory(Packed.of(d, d) for d in documents), limit))
    trained: list[int] = []
    for sample in joined:
        assert len(sample.input_ids) == sample.segments.sum() <= limit
        trained += [label for label in sample.labels.tolist() if label != IGNORE]
        for piece in np.split(sample.input_ids, np.cumsum(sample.segments)[:-1]):
            # A segment lies in one document: ids are consecutive, and no document's end is inside.
            assert (np.diff(piece) == 1).all()
            assert sum(set(piece.tolist()) <= set(d) for d in documents) == 1
    assert trained == [token for document in documents for token in document]


def test_plain_text_end_to_end(tmp_path, tokenizer):
    source = _write(tmp_path / "a.jsonl", [{"text": "one two three " * n} for n in (1, 30, 2)])
    made = prepare(DataConfig(source=source, eval_fraction=0), tokenizer, max_seq_length=64, seed=0)
    ends = sum(int((s.input_ids == tokenizer.eos_token_id).sum()) for s in made.train)
    assert (made.report.format, ends) == ("text", 3)
    assert made.train.trained_tokens == made.train.tokens - sum(
        int((s.labels == IGNORE).sum()) for s in made.train
    )
    cut = prepare(
        DataConfig(source=source, eval_fraction=0, long_text="truncate"),
        tokenizer,
        max_seq_length=64,
        seed=0,
    )
    assert (len(cut.train), cut.report.truncated) == (3, 1)
    less = prepare(
        DataConfig(source=source, eval_fraction=0, long_text="drop"),
        tokenizer,
        max_seq_length=64,
        seed=0,
    )
    assert {k: v.lines for k, v in less.report.dropped.items()} == {"over_long": [2]}


def _held_out(made):
    return {c.prompt[-1]["content"] for c in made.eval_conversations(10_000)}


def test_split_is_stable_when_rows_are_added(tmp_path, tokenizer):
    few = prepare(
        DataConfig(source=_write(tmp_path / "a.jsonl", _rows(200)), eval_fraction=0.1),
        tokenizer,
        max_seq_length=512,
        seed=0,
    )
    more_rows = [*_rows(50, seed=9), *_rows(200)]
    more = prepare(
        DataConfig(source=_write(tmp_path / "b.jsonl", more_rows), eval_fraction=0.1),
        tokenizer,
        max_seq_length=512,
        seed=0,
    )
    assert 5 <= len(few.eval) <= 40
    assert _held_out(few) <= _held_out(more)
    assert len(few.train) + len(few.eval) == 200
    assert few.report.leakage == more.report.leakage == 0


def test_duplicates_and_near_duplicates_stay_on_one_side(tmp_path, tokenizer):
    rows = []
    for row in _rows(120):
        rows += [
            row,
            row,
            {**row, "answer": row["answer"].upper()},
            {**row, "answer": row["answer"] + "!"},
        ]
    made = prepare(
        DataConfig(source=_write(tmp_path / "a.jsonl", rows), eval_fraction=0.2),
        tokenizer,
        max_seq_length=512,
        seed=0,
    )
    assert made.report.duplicates == 240  # the second copy, and the one that differs in case only
    assert made.report.near_duplicates >= 0
    assert made.report.leakage == 0
    sides = [
        {tokenizer.decode(s.input_ids).lower().split("?")[0] for s in side}
        for side in (made.train, made.eval)
    ]
    assert not sides[0] & sides[1]


def test_one_system_prompt_makes_no_duplicates(tmp_path, tokenizer):
    system = {"role": "system", "content": "You are the assistant of ACME. " * 20}
    rows = [
        {
            "messages": [
                system,
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in _rows(200)
    ]
    source = _write(tmp_path / "a.jsonl", rows)
    report = prepare(
        DataConfig(source=source, eval_fraction=0.1), tokenizer, max_seq_length=2048
    ).report
    assert (report.duplicates, report.near_duplicates, report.leakage) == (0, 0, 0)


@pytest.mark.parametrize("size", [1, 12])
def test_a_group_is_held_out_no_more_often_than_a_row(size):
    pick = np.random.default_rng(5)
    count = 4000 * size
    marks = RowMarks(
        np.arange(count), *pick.integers(0, 2**64, (3, count), dtype=np.uint64),
        pick.integers(0, 2**32, (count, SIGNATURE), dtype=np.uint32), np.ones(count, np.int64),
    )  # fmt: skip
    marks.asked = np.repeat(marks.asked[::size], size)  # the same question `size` times
    groups = group_rows(marks)
    assert len(np.unique(groups.group)) == 4000
    held = held_out(marks, groups, 0.05)
    assert 0.04 < held.mean() < 0.06
    assert explain_share(held, groups, 0.05) == []


def test_an_unusual_held_out_share_is_explained(tmp_path, tokenizer):
    rows = list(_rows(200))
    for number in range(20, 60):  # two groups of 20 among 180 rows
        rows[number]["question"] = f"the same question number {number // 40}"
    shares = []
    for salt in range(40):
        salted = [{**row, "answer": f"{row['answer']} {salt}"} for row in rows]
        source = _write(tmp_path / f"{salt}.jsonl", salted)
        made = prepare(DataConfig(source=source, eval_fraction=0.05), tokenizer, max_seq_length=512)
        shares.append(len(made.eval))
        said = [notice for notice in made.report.notices if "are held out, where" in notice]
        assert bool(said) == (abs(len(made.eval) - 10) > 9), (len(made.eval), said)
        if said:
            assert "40 rows stand in 2 such groups, the largest of 20" in said[0]
            break
    assert said, shares


def test_leakage_of_an_own_eval_file_is_counted(tmp_path, tokenizer):
    rows = list(_rows(50))
    other = [*rows[:3], *_rows(10, seed=5)]
    config = DataConfig(
        source=_write(tmp_path / "a.jsonl", rows), eval_source=_write(tmp_path / "b.jsonl", other)
    )
    made = prepare(config, tokenizer, max_seq_length=512, seed=0)
    assert (len(made.train), len(made.eval), made.report.leakage) == (50, 13, 3)


def test_one_question_for_all_rows_does_not_end_the_split(tmp_path, tokenizer):
    rows = [{"question": "Write a poem.", "answer": row["answer"]} for row in _rows(300)]
    made = prepare(
        DataConfig(source=_write(tmp_path / "a.jsonl", rows), eval_fraction=0.1),
        tokenizer,
        max_seq_length=512,
        seed=0,
    )
    assert 10 <= len(made.eval) <= 60


def test_workers_and_cache_give_the_same_samples(tmp_path, tokenizer):
    source = _write(tmp_path / "a.jsonl", [*_rows(1500), {"question": "no answer"}])
    memory = prepare(DataConfig(source=source), tokenizer, max_seq_length=512, seed=0)
    streaming = DataConfig(source=source, streaming=True)
    fresh = prepare(
        streaming, tokenizer, max_seq_length=512, seed=0, cache_dir=tmp_path, processes=2
    )
    again = prepare(streaming, tokenizer, max_seq_length=512, seed=0, cache_dir=tmp_path)
    assert not fresh.report.cached
    assert again.report.cached
    for made in (fresh, again):
        assert made.fingerprint == memory.fingerprint
        assert [len(made.train), len(made.eval)] == [len(memory.train), len(memory.eval)]
        for side in ("train", "eval"):
            for mine, theirs in zip(getattr(made, side), getattr(memory, side), strict=True):
                np.testing.assert_array_equal(mine.input_ids, theirs.input_ids)
                np.testing.assert_array_equal(mine.labels, theirs.labels)
        assert made.report.dropped["missing_column"].lines == [1501]
        assert made.eval_conversations(3) == memory.eval_conversations(3)


@pytest.mark.parametrize(
    "change", ["content", "template", "length", "columns", "tokenizer", "nothing"]
)
def test_fingerprint(tmp_path, tokenizer, change):
    source = _write(tmp_path / "a.jsonl", _rows(10))
    config, length, other = DataConfig(source=source), 512, tokenizer
    before = prepare(config, tokenizer, max_seq_length=length, seed=0).fingerprint
    if change == "content":
        _write(tmp_path / "a.jsonl", _rows(11))
    elif change == "template":
        config = DataConfig(source=source, chat_template="alpaca")
    elif change == "length":
        length = 256
    elif change == "columns":
        config = DataConfig(source=source, columns={"prompt": "answer", "completion": "question"})
    elif change == "tokenizer":
        other = real.tiny("<|im_start|>", "<|im_end|>", "<|more|>")
        other.chat_template = None
    after = prepare(config, other, max_seq_length=length, seed=1).fingerprint
    assert (before == after) == (change == "nothing")


def test_report_is_printed_plotted_and_dumped(tmp_path, tokenizer):
    from rich.console import Console

    rows = [
        *_rows(60),
        {"question": "\x1b[31mred \u202eturned", "answer": "[bold]not markup[/bold]"},
        {"question": "x"},
    ]
    made = prepare(
        DataConfig(source=_write(tmp_path / "a.jsonl", rows)), tokenizer, max_seq_length=512, seed=0
    )
    console = Console(
        record=True, width=120, file=(tmp_path / "out.txt").open("w"), force_terminal=True
    )
    made.report.print(console)
    shown = console.export_text()
    for expected in (
        "61 of 62 used",
        "missing_column",
        "question_answer",
        "held out",
        "samples",
        "[bold]not markup[/bold]",
    ):
        assert expected in shown
    assert "\x1b[31mred" not in shown
    assert "\u202e" not in shown
    made.report.plot(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    dumped = json.loads(json.dumps(made.report.model_dump()))
    keys = "format rows_total rows_used dropped tokens trained_tokens truncated duplicates leakage"
    assert set(keys.split()) <= dumped.keys()
    assert dumped["dropped"]["missing_column"] | {"example": ""} == {
        "count": 1,
        "lines": [62],
        "example": "",
    }
    plain = Console(record=True, width=400, file=(tmp_path / "plain.txt").open("w"), no_color=True)
    made.report.print(plain)
    text = plain.export_text()
    assert "is ⟦marked⟧" in text
    assert text.count("<|im_end|>⟧") == len(
        made.report.preview
    )  # each answer ends with its end token, inside the mark
    assert "⟦" not in shown
    # The preview's marked pieces are the trained tokens.
    for sample in made.report.preview:
        assert any(trained and "<|im_end|>" in piece for piece, trained in sample.pieces)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_histogram_holds_every_sample(lengths):
    bars = histogram(np.array(lengths))
    assert sum(count for _, _, count in bars) == len(lengths)
    assert len(bars) <= 42


def test_data_that_does_not_fit_the_settings_is_said(tmp_path, tokenizer):
    from rich.console import Console
    from safetensors.numpy import save_file

    from fastft.config import make_config
    from fastft.data.inspect import inspect_data

    tokenizer.save_pretrained(tmp_path / "model")
    shape = {
        "model_type": "llama",
        "max_position_embeddings": 256,
        "hidden_size": 64,
        "num_hidden_layers": 1,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "model" / "model.safetensors")
    source = _write(tmp_path / "a.jsonl", _rows(6))

    def notes(batch, longest):
        values = {
            "model": {"name": str(tmp_path / "model"), "max_seq_length": longest},
            "data": {"source": source},
        }
        config = make_config({**values, "train": {"effective_batch_size": batch}})
        with (tmp_path / "out.txt").open("w") as out:
            return " ".join(inspect_data(config, console=Console(file=out)).notices)

    said = notes(8, 512)
    assert "effective_batch_size 8 is more than the 6 samples" in said
    assert "max_seq_length 512 is above the 256 positions" in said
    assert "effective_batch_size" not in (said := notes(6, 256))
    assert "positions" not in said


def test_samples_are_read_from_their_file_piece_by_piece(tmp_path):
    numbers = np.arange(1000, dtype=np.int32)
    numbers.tofile(tmp_path / "a.bin")
    array = FileArray(tmp_path / "a.bin")
    for start, stop in ((0, 0), (0, 7), (993, 1000), (0, None), (500, 2000)):
        assert array[start:stop].tolist() == numbers[start:stop].tolist()
    assert pickle.loads(pickle.dumps(array))[3:5].tolist() == [3, 4]
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(CouldNotFinishError, match="became shorter"):
        array[3:5]
    (tmp_path / "a.bin").unlink()
    with pytest.raises(CouldNotFinishError, match="cannot be read"):
        array[3:5]


def test_the_workers_tokenizer_is_the_real_one_without_torch(tmp_path):
    tokenizer = real.tiny_for(CHAT, adds_bos=True)
    template = choose_template(tokenizer)
    messages = [
        {"role": "user", "content": "hello 東京 <|end|>"},
        {"role": "assistant", "content": "world"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    expected = encode_turns(tokenizer, template, messages, tools)[0]
    (tmp_path / "job").write_bytes(
        pickle.dumps(dataclasses.replace(template, tokenizer=LightTokenizer(tokenizer)))
    )
    code = (
        "import pickle, sys; from pathlib import Path; from fastft.data.encode import encode_turns\n"
        "template = pickle.loads(Path(sys.argv[1]).read_bytes()); messages, tools = eval(sys.argv[2])\n"
        "made = encode_turns(template.tokenizer, template, messages, tools)[0]\n"
        "print(made.input_ids.tolist(), made.labels.tolist(), 'torch' in sys.modules, sep='|')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "job"), repr((messages, tools))]
    ids, labels, torch = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split("|")
    assert eval(ids) == expected.input_ids.tolist()
    assert eval(labels) == expected.labels.tolist()
    assert torch.strip() == "False"
