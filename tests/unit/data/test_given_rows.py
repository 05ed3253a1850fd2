"""Rows that are handed over in Python: the same samples as from a file, and a fingerprint of their content."""

import json

import pytest

from fastft.config import DataConfig
from fastft.data.pipeline import prepare
from fastft.data.read import GIVEN, open_rows, open_source
from fastft.errors import FastFTError
from tests.unit.data import real_tokenizers as real

ROWS = [{"prompt": f"Q {n}", "completion": f"A {n}"} for n in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return real.tiny("<|im_start|>", "<|im_end|>")


def test_rows_a_dataset_and_a_file_give_the_same_samples(tokenizer, tmp_path):
    from datasets import Dataset

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    config = DataConfig(source=str(path), eval_fraction=0)
    made = [
        prepare(config, tokenizer, max_seq_length=64, rows=rows)
        for rows in (None, ROWS, tuple(ROWS), Dataset.from_list(ROWS))
    ]
    ids = [[list(map(int, sample.input_ids)) for sample in data.train] for data in made]
    assert ids[0] == ids[1] == ids[2] == ids[3]
    assert len(ids[0]) == len(ROWS)
    assert made[1].fingerprint == made[2].fingerprint == made[3].fingerprint
    changed = prepare(config, tokenizer, max_seq_length=64, rows=[*ROWS[:-1], ROWS[0]])
    assert changed.fingerprint != made[1].fingerprint


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (iter(ROWS), "read in several passes"),
        ({"train": ROWS, "test": ROWS}, "splits or keys train, test"),
        ("rows.jsonl", "data is a str"),
        ([{1: "a", "b": "c"}], "not what JSON can hold"),
    ],
)
def test_what_cannot_be_read_or_not_twice_is_refused(rows, words):
    with pytest.raises(FastFTError, match=words):
        open_rows(rows)


def test_a_run_of_given_rows_says_so_when_it_is_asked_to_read_them():
    with pytest.raises(FastFTError, match="rows that were given in Python"):
        open_source(GIVEN)
