"""Several sources: the draw, what is reported apart, and that a mixture is the same each time. Also turns and copies."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastft.config import DataConfig, make_config
from fastft.data import pipeline, prepare
from fastft.data.encode import IGNORE
from fastft.data.mix import draw
from fastft.errors import FastFTError
from tests.unit.data import real_tokenizers as real


@pytest.fixture(scope="module")
def tokenizer():
    made = real.tiny("<|im_start|>", "<|im_end|>")
    made.chat_template = None
    return made


def _chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def _file(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([100, 300], [3, 1], [300, 100]),
        ([10, 20, 30], [1, 1, 1], [20, 20, 20]),
        ([5, 7], None, [5, 7]),
        ([3, 0], [1, 1], [2, 0]),
        ([7, 11, 13], [0.5, 0.3, 0.2], [16, 9, 6]),
    ],
)
def test_the_draw_follows_the_weights(sizes, weights, counts):
    drawn = draw(sizes, weights, seed=1)
    assert [len(part) for part in drawn] == counts
    for size, part in zip(sizes, drawn, strict=True):
        times = np.bincount(part, minlength=size) if size else np.zeros(0)
        assert len(times) == 0 or times.max() - times.min() <= 1, "each sample equally often"
    again = draw(sizes, weights, seed=1)
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))


def _mixture(tmp_path, tokenizer, seed=1, **keywords):
    chats = _file(tmp_path / "chats.jsonl", [_chat(f"Q{i}", f"CHAT{i}") for i in range(60)])
    pairs = _file(
        tmp_path / "pairs.jsonl",
        [{"frage": f"F{i}", "antwort": f"PAIR{i}"} for i in range(20)] + ["oops"],
    )
    held = _file(tmp_path / "held.jsonl", [_chat(f"E{i}", "HELD") for i in range(3)])
    sources = [
        {"source": chats, "weight": 1},
        {
            "source": pairs,
            "weight": 3,
            "columns": {"prompt": "frage", "completion": "antwort"},
            "eval_source": held,
        },
    ]
    config = DataConfig(sources=sources, eval_fraction=0.1, **keywords)
    return prepare(config, tokenizer, max_seq_length=128, seed=seed, cache_dir=tmp_path / "cache")


def _texts(tokenizer, dataset):
    return [tokenizer.decode(s.labels[s.labels != IGNORE]) for s in dataset]


def test_sources_are_mixed_and_reported_apart(tmp_path, tokenizer, monkeypatch):
    made = _mixture(tmp_path, tokenizer)
    chats, pairs = made.report.sources
    assert (pairs.rows_used, pairs.rows_total, pairs.eval_samples) == (20, 21, 3)
    assert chats.rows_used == 60
    assert abs(pairs.drawn - 3 * chats.drawn) <= 3
    texts = _texts(tokenizer, made.train)
    assert sum("PAIR" in text for text in texts) == pairs.drawn
    assert sum("CHAT" in text for text in texts) == chats.drawn
    assert len(made.train) == made.report.train_samples == chats.samples + pairs.samples
    assert made.report.tokens == sum(len(s.input_ids) for s in (*made.train, *made.eval))
    assert made.train.trained_tokens == sum(int((s.labels != IGNORE).sum()) for s in made.train)
    assert made.report.dropped["not_an_object"].count == 1
    assert len(made.eval) == chats.eval_samples + 3
    assert "HELD<|im_end|>" in _texts(tokenizer, made.eval)
    # The same again, another draw with another seed, and the same out of files read in passes.
    assert _texts(tokenizer, _mixture(tmp_path, tokenizer).train) == texts
    other = _mixture(tmp_path, tokenizer, seed=2)
    assert other.fingerprint != made.fingerprint
    assert _texts(tokenizer, other.train) != texts
    monkeypatch.setattr(pipeline.os, "cpu_count", lambda: 1)
    streamed = _mixture(tmp_path, tokenizer, streaming=True)
    assert _texts(tokenizer, streamed.train) == texts
    assert streamed.fingerprint == made.fingerprint
    assert _mixture(tmp_path, tokenizer, streaming=True).report.cached


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, r"data\.source is missing"),
        ({"source": "a", "sources": [{"source": "b"}]}, "either source or sources"),
        ({"sources": [{"source": "a", "weight": 1}, {"source": "b"}]}, "every source a weight"),
        ({"sources": [{"source": "a", "weight": -1}]}, "greater than 0"),
        ({"sources": [{"source": "a"}], "eval_source": "b"}, "eval_source in each"),
        ({"sources": [{"src": "a"}]}, "unknown key"),
    ],
)
def test_a_wrong_list_of_sources_is_said(data, says):
    with pytest.raises(FastFTError, match=says):
        make_config({"model": {"name": "m"}, "data": data})


def test_sources_may_lie_elsewhere_on_resume_and_weights_may_not_change():
    from fastft.runs.checkpoint import refuse_differences

    def config(folder, weight):
        sources = [
            {"source": f"{folder}/a.jsonl", "weight": weight},
            {"source": f"{folder}/b.jsonl", "weight": 1},
        ]
        return make_config({"model": {"name": "m"}, "data": {"sources": sources}})

    (moved,) = refuse_differences(config("here", 2).model_dump(), config("there", 2))
    assert "there/a.jsonl" in moved
    with pytest.raises(FastFTError, match=r"data\.sources was"):
        refuse_differences(config("here", 2).model_dump(), config("here", 3))


def test_only_the_last_answer_is_trained_when_asked_for(tmp_path):
    tokenizer = real.tiny_for(real.template("openai-gpt-oss-120b"))
    path = _file(tmp_path / "a.jsonl", [_chat("Q1", "AA1", "Q2", "AA2", "Q3", "AA3")] * 2)
    made = {}
    for turns in ("all", "last"):
        config = DataConfig(source=path, eval_fraction=0.0, turns=turns)
        made[turns] = prepare(config, tokenizer, max_seq_length=512)
    assert len(made["all"].train) == 6
    texts = _texts(tokenizer, made["last"].train)
    assert len(texts) == 2
    assert all("AA3" in text and "AA1" not in text for text in texts)
    report = made["all"].report
    assert report.unrolled_tokens == report.tokens
    assert report.one_pass_tokens == made["last"].report.tokens
    assert "times); data.turns: last" in " ".join(report.notices)
    assert made["last"].report.unrolled_tokens == 0


def test_exact_copies_are_advised_on_and_removed(tmp_path, tokenizer):
    rows = (
        [_chat(f"Q{i}", f"A{i}") for i in range(8)] + [_chat("Q1", "A1")] * 3 + [_chat("q1", "A1")]
    )
    path = _file(tmp_path / "a.jsonl", rows)
    kept = prepare(DataConfig(source=path, eval_fraction=0.0), tokenizer, max_seq_length=128)
    assert "3 of 12 rows (25%) are exact copies" in " ".join(kept.report.notices)
    config = DataConfig(source=path, eval_fraction=0.0, deduplicate=True)
    made = prepare(config, tokenizer, max_seq_length=128)
    assert made.report.dropped["duplicate"].lines == [9, 10, 11]
    assert len(made.train) == made.report.rows_used == 9, "q1 is not Q1"
    few = _file(tmp_path / "b.jsonl", [_chat(f"Q{i}", f"A{i}") for i in range(30)] + rows[:1])
    notices = prepare(
        DataConfig(source=few, eval_fraction=0.0), tokenizer, max_seq_length=128
    ).report.notices
    assert "copies" not in " ".join(notices)


DOCUMENTS = {
    "lines": ("First line one.\nSecond line.\nThird line.\n", "auto", ["First line one.", "Second line.", "Third line."], "each line"),
    "paragraphs": ("One\nof two.\n\n\nTwo.\n", "auto", ["One\nof two.", "Two."], "each paragraph"),
    "a wrapped text": ("This text goes\non and on\nto its end.\n", "auto", ["This text goes\non and on\nto its end.\n"], "each text file"),
    "as a file": ("a\n\nb", "file", ["a\n\nb"], None),
    "as lines": ("a\n\n b\nc", "line", ["a", "b", "c"], None),
    "as paragraphs": ("a\nb\n \nc\n\n", "paragraph", ["a\nb", "c"], None),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_of_a_text_is(tmp_path, tokenizer, name):
    text, documents, expected, says = DOCUMENTS[name]
    path = tmp_path / "a.txt"
    path.write_text(text)
    config = DataConfig(
        source=str(path), documents=documents, long_text="truncate", eval_fraction=0.0
    )
    made = prepare(config, tokenizer, max_seq_length=128)
    assert [tokenizer.decode(s.input_ids).removesuffix("</s>") for s in made.train] == expected
    said = [notice for notice in made.report.notices if "is one document" in notice]
    assert len(said) == (1 if says else 0)
    assert not says or said[0].startswith(says)


def test_of_one_long_document_the_end_is_held_out(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("A sentence that goes on\nover many lines " * 400)
    made = prepare(DataConfig(source=str(path)), tokenizer, max_seq_length=64)
    assert made.eval is not None
    assert any("the last" in notice and "held out" in notice for notice in made.report.notices)
    assert made.report.eval_samples == len(made.eval) == round(0.05 * made.report.samples)
