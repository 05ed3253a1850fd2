"""Hostile inputs end in seconds with one message: templates that never end, giant rows, wide tables, damaged caches."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from jinja2 import TemplateError

from fastft.config import DataConfig
from fastft.data import bounded, pipeline, prepare
from fastft.data.template import choose_template
from fastft.errors import FastFTError
from tests.unit.data import real_tokenizers as real

_TURNS = "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + _TURNS,
    "a text that doubles": "{% set ns = namespace(x='x' * 1000000) %}{% for i in range(9999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}" + _TURNS,
    "a giant text": "{{ 'a' * 100000000000 }}" + _TURNS,
    "a power": "{{ 'a' * 10 ** 11 }}" + _TURNS,
    "a power of a power": "{{ 9 ** 9 ** 9 }}" + _TURNS,
    "a wide field": "{{ 'a' | center(10000000000) }}" + _TURNS,
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_ended(monkeypatch, name):
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    monkeypatch.setattr(bounded, "GROWTH_BYTES", 300 << 20)
    tokenizer = real.tiny("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = ENDLESS[name]
    with pytest.raises(FastFTError, match=r"does not come to an end|so it is not run") as caught:
        choose_template(tokenizer)
    assert caught.value.exit_code == 2
    tokenizer.chat_template = _TURNS  # nothing of the limit is left behind
    assert choose_template(tokenizer).render([{"role": "user", "content": "a"}])


def test_a_limit_that_was_dropped_on_its_way_comes_again(monkeypatch):
    """As where it meets a destructor: Python prints it as ignored and goes on."""
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    dropped = 0

    def run_on():
        nonlocal dropped
        while dropped < 2:
            try:
                while True:
                    sum(range(100))
            except bounded.TemplateLimitError:
                dropped += 1
        raise bounded.TemplateLimitError

    with pytest.raises(bounded.TemplateLimitError), bounded.limited():
        run_on()
    assert not bounded._WATCH._watched
    for _ in range(100):  # nothing arrives later
        time.sleep(0.01)


def test_ordinary_arithmetic_is_let_through():
    assert bounded.huge_constant("{{ ' ' * depth }}{{ 2 ** 10 }}{{ 'x' | center(80) }}") is None


@pytest.fixture(scope="module")
def tokenizer():
    made = real.tiny("<|im_start|>", "<|im_end|>")
    made.chat_template = None
    return made


def _prepared(path, tokenizer, **keywords):
    config = DataConfig(source=str(path), eval_fraction=0.0, **keywords)
    return prepare(config, tokenizer, max_seq_length=256, cache_dir=path.parent / "cache")


def _chat(asked, answered):
    return (
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answered},
                ]
            }
        )
        + "\n"
    )


def test_rows_of_megabytes_are_used_or_counted(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    blank, long = "\n" * 3_000_000, "word " * 600_000
    path.write_text(_chat("hi", "ok") + _chat("hi", long) + _chat(long, "ok") + _chat(f"a{blank}b", "ok")
                    + _chat("-eyJ" * 500_000, "ok"))  # fmt: skip
    report = _prepared(path, tokenizer).report
    assert report.rows_used == 2
    assert report.truncated == 1
    assert report.dropped["answer_cut_off"].lines == [3, 4, 5]


def test_a_table_of_100_000_columns_is_refused(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    row = ",".join(map(str, range(100_000)))
    path.write_text(f"{row}\n{row}\n")
    with pytest.raises(FastFTError, match="has 100,000 columns; fastft reads at most 10,000"):
        _prepared(path, tokenizer)


DAMAGE = {
    "a byte of the tokens": lambda folder: _flip(folder / "samples" / "tokens.bin"),
    "the index": lambda folder: _flip(folder / "prepared.json"),
    "cut bounds": lambda folder: (folder / "samples" / "trained.bounds.npy").write_bytes(b"x"),
    "a missing file": lambda folder: (folder / "train.order.npy").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "a manifest of another shape": lambda folder: (folder / "manifest.json").write_text("[1]"),
}  # fmt: skip


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cache_is_made_anew_and_said(tmp_path, tokenizer, monkeypatch, name):
    monkeypatch.setattr(pipeline, "SMALL_BYTES", 0)
    monkeypatch.setattr(pipeline.os, "cpu_count", lambda: 1)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(_chat(f"Q{i}", f"A{i}") for i in range(20)))
    first = _prepared(path, tokenizer)
    again = _prepared(path, tokenizer)
    assert again.report.cached
    (folder,) = (tmp_path / "cache" / "data").iterdir()
    DAMAGE[name](folder)
    mended = _prepared(path, tokenizer)
    assert not mended.report.cached
    assert any(
        "was not whole" in notice and "made anew" in notice for notice in mended.report.notices
    )
    assert [s.input_ids.tolist() for s in mended.train] == [
        s.input_ids.tolist() for s in first.train
    ]
    assert _prepared(path, tokenizer).report.cached


def test_what_a_templates_expression_raises_is_the_templates_error():
    def divides(messages, **keywords):
        return 1 / 0

    tokenizer = SimpleNamespace(chat_template="{{ 1 / 0 }}", apply_chat_template=divides)
    with pytest.raises(TemplateError, match="ZeroDivisionError"):
        bounded.render(tokenizer, [])
