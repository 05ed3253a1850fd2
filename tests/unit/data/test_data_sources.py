"""Every source format and file type gives the same samples; awkward data is read as a person expects, or refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zipfile

import numpy as np
import pytest

from fastft.config import DataConfig
from fastft.data import prepare
from fastft.data.read import open_source
from fastft.errors import FastFTError
from tests.unit.data import real_tokenizers as real

PAIRS = [
    ("Where is Bavor?", "北にあります。🎉"),
    ('What, "then"?\nSay it.', "Two words; no more\tthan two."),
]


@pytest.fixture(scope="module")
def tokenizer():
    made = real.tiny("<|im_start|>", "<|im_end|>")
    made.chat_template = None
    return made


def _prepare(path, tokenizer, **keywords):
    length = keywords.pop("max_seq_length", 256)
    config = DataConfig(source=str(path), **({"eval_fraction": 0.0} | keywords))
    return prepare(config, tokenizer, max_seq_length=length, seed=1)


def _lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _as_messages(q, a):
    return [{"role": "user", "content": q}, {"role": "assistant", "content": a}]


SHAPES = {
    "messages": lambda q, a: {"messages": _as_messages(q, a)},
    "sharegpt": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "question_answer": lambda q, a: {"question": q, "answer": a},
}
FILES = ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "datasets", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst",
         "jsonl.zip", "csv.gz", "bom", "crlf", "utf-16", "cp932", "euc_jp", "folder"]  # fmt: skip


def _write(folder, kind, rows):
    """Write the rows as a file of this kind; return what `data.source` is."""
    text = _lines(rows)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(text, encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind in ("csv", "tsv", "csv.gz"):
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        flat = [
            {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows
        ]
        writer.writerows(flat)
        data = stream.getvalue().encode()
        path.write_bytes(gzip.compress(data) if kind == "csv.gz" else data)
    elif kind in ("parquet", "arrow", "datasets"):
        import datasets

        made = datasets.Dataset.from_list(rows)
        if kind == "datasets":
            made.save_to_disk(str(path))
        elif kind == "parquet":
            made.to_parquet(str(path))
        else:
            import pyarrow

            table = made.data.table
            with (
                pyarrow.OSFile(str(path), "wb") as sink,
                pyarrow.ipc.new_file(sink, table.schema) as writer,
            ):
                writer.write_table(table)
    elif kind == "folder":
        path.mkdir()
        (path / "a.jsonl").write_text(_lines(rows[:1]), encoding="utf-8")
        (path / "b.jsonl").write_text(_lines(rows[1:]), encoding="utf-8")
    elif kind in ("bom", "crlf", "utf-16", "cp932", "euc_jp"):
        path = folder / f"rows_{kind}.jsonl"
        text = text.replace("\n", "\r\n") if kind == "crlf" else text
        path.write_bytes(text.encode({"bom": "utf-8-sig", "crlf": "utf-8"}.get(kind, kind)))
    else:
        _compress(path, kind.split(".")[1], text.encode())
    return path


def _compress(path, how, data):
    if how == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows.jsonl", data)
    elif how == "zst":
        import pyarrow

        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[how](data))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_conversation_gives_the_same_samples(tmp_path, tokenizer, shape, kind):
    pairs = [(q, a.replace("🎉", "")) for q, a in PAIRS] if kind in ("cp932", "euc_jp") else PAIRS
    reference = tmp_path / "reference.jsonl"
    reference.write_text(_lines([SHAPES["messages"](q, a) for q, a in pairs]), encoding="utf-8")
    expected = _prepare(reference, tokenizer)
    made = _prepare(_write(tmp_path, kind, [SHAPES[shape](q, a) for q, a in pairs]), tokenizer)
    assert made.report.format == shape
    assert len(made.train) == len(expected.train) == len(pairs)
    for mine, theirs in zip(made.train, expected.train, strict=True):
        np.testing.assert_array_equal(mine.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(mine.labels, theirs.labels)
    if kind in ("cp932", "euc_jp", "utf-16"):
        assert any(kind in notice for notice in made.report.notices)


GOOD = {"messages": _as_messages("Hi", "Hello")}
TEXT_ROWS = [{"text": "abc"}] * 3


def _m(*turns, **more):
    return {"messages": [{"role": r, "content": c} for r, c in turns], **more}


# name: (file name, content, {reason: lines} dropped, rows used); a good row first, so that the format is known.
COUNTED = {
    "one bad line in the middle": ("a.jsonl", _lines([GOOD]) + "{oops\n" + _lines([GOOD]), {"bad_json": [2]}, 2),
    "one line is not UTF-8": ("a.jsonl", _lines([GOOD, GOOD]).encode() + b'{"messages": "\xff\xfe"}\n' + _lines([_m(("user", "東京"), ("assistant", "はい"))]).encode(), {"not_utf8": [3]}, 3),
    "half a last line": ("a.jsonl", _lines([GOOD, GOOD])[:-20], {"bad_json": [2]}, 1),
    "empty lines": ("a.jsonl", "\n\n" + _lines([GOOD]) + "\n  \n" + _lines([GOOD]), {}, 2),
    "mixed formats": ("a.jsonl", _lines([GOOD, SHAPES["alpaca"]("a", "b"), GOOD]), {"missing_column": [2]}, 2),
    "ragged CSV rows": ("a.csv", "prompt,completion\na,b\nc\nd,e,f\ng,h\n", {"ragged_row": [3, 4]}, 2),
    "unclosed quote in a CSV": ("a.csv", 'prompt,completion\na,b\n"c,d\n', {"bad_csv": [3]}, 1),
    "semicolons in a CSV": ("a.csv", "prompt;completion\na;b\n", {}, 1),
    "empty answer": ("a.jsonl", _lines([GOOD, _m(("user", "a"), ("assistant", "  "))]), {"empty_answer": [2]}, 1),
    "null answer": ("a.jsonl", _lines([GOOD, _m(("user", "a"), ("assistant", None))]), {"not_text": [2]}, 1),
    "empty question": ("a.jsonl", _lines([GOOD, _m(("user", ""), ("assistant", "b"))]), {"empty_prompt": [2]}, 1),
    "no messages": ("a.jsonl", _lines([GOOD, {"messages": []}]), {"empty_conversation": [2]}, 1),
    "ends with the user": ("a.jsonl", _lines([GOOD, _m(("user", "a"), ("assistant", "b"), ("user", "c"))]), {}, 2),
    "only the user speaks": ("a.jsonl", _lines([GOOD, _m(("user", "a"))]), {"no_answer": [2]}, 1),
    "only the assistant speaks": ("a.jsonl", _lines([GOOD, _m(("assistant", "a"))]), {"no_prompt": [2]}, 1),
    "system in the middle": ("a.jsonl", _lines([GOOD, _m(("user", "a"), ("system", "s"), ("assistant", "b"))]), {"role_order": [2]}, 1),
    "two questions in a row": ("a.jsonl", _lines([GOOD, _m(("user", "a"), ("user", "b"), ("assistant", "c"))]), {"role_order": [2]}, 1),
    "unknown role": ("a.jsonl", _lines([GOOD, _m(("usr", "a"), ("assistant", "b"))]), {"unknown_role": [2]}, 1),
    "nested content parts": ("a.jsonl", _lines([GOOD, _m(("user", [{"type": "text", "text": "a"}]), ("assistant", "b"))]), {}, 2),
    "an image among the parts": ("a.jsonl", _lines([GOOD, _m(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b"))]), {"not_text": [2]}, 1),
    "numbers where text belongs": ("a.jsonl", _lines([{"prompt": "1+1", "completion": 2}, {"prompt": 3, "completion": 4.5}]), {}, 2),
    "an object where text belongs": ("a.jsonl", _lines([{"prompt": "a", "completion": "b"}, {"prompt": {"x": 1}, "completion": "b"}]), {"not_text": [2]}, 1),
    "duplicate keys": ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "c", "completion": "b"}\n', {"duplicate_key": [2]}, 1),
    "a lone surrogate": ("a.jsonl", _lines([GOOD]) + '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}\n', {"lone_surrogate": [2]}, 1),
    "control characters": ("a.jsonl", _lines([_m(("user", "a\x00\x1b[31mb"), ("assistant", "b\x07"))]), {}, 1),
    "a million characters": ("a.jsonl", _lines([GOOD, _m(("user", "a"), ("assistant", "long " * 200_000))]), {}, 2),
    "a million characters asked": ("a.jsonl", _lines([GOOD, _m(("user", "long " * 200_000), ("assistant", "a"))]), {"answer_cut_off": [2]}, 1),
    "a bare string among objects": ("a.jsonl", _lines([GOOD, "hello"]), {"not_an_object": [2]}, 1),
    "a message that is a string": ("a.jsonl", _lines([GOOD, {"messages": ["hi", "there"]}]), {"bad_message": [2]}, 1),
    "messages is text": ("a.jsonl", _lines([GOOD, {"messages": "hi"}]), {"not_a_list": [2]}, 1),
    "null column": ("a.jsonl", _lines([GOOD, {"messages": None}]), {"missing_column": [2]}, 1),
    "weight 0 everywhere": ("a.jsonl", _lines([GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}]), {"no_answer": [2]}, 1),
    "a broken tool call": ("a.jsonl", _lines([GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]}]), {"bad_tool_call": [2]}, 1),
    "tool calls that the template would lose": ("a.jsonl", _lines([GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}]), {"answer_not_rendered": [2]}, 1),
    "JSON lines named .json": ("a.json", _lines([GOOD, GOOD]), {}, 2),
    "a JSON list named .jsonl": ("a.jsonl", json.dumps([GOOD, GOOD], indent=1), {}, 2),
    "rows below a key": ("a.json", json.dumps({"version": 1, "data": [GOOD, GOOD]}), {}, 2),
    "too deep": ("a.jsonl", _lines([GOOD]) + "[" * 100_000 + "\n", {"bad_json": [2]}, 1),
    "column names in capitals": ("a.csv", "Question,Answer\na,b\n", {}, 1),
    "a number of 5,000 digits": ("a.jsonl", _lines([GOOD]) + '{"messages": ' + "9" * 5000 + "}\n", {"bad_json": [2]}, 1),
    "infinity": ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": Infinity}\n{"prompt": "a", "completion": NaN}\n', {"not_text": [2], "missing_column": [3]}, 1),
    "an object of lists": ("a.jsonl", _lines([{"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}, {"messages": {"role": ["user", "assistant"], "content": ["a"]}}]), {"not_a_list": [2]}, 1),
    "tools nested too deep": ("a.jsonl", _lines([GOOD]) + json.dumps({**GOOD, "tools": 0})[:-2] + '[{"x":' + "[" * 700 + "]" * 700 + "}]}\n", {"bad_json": [2]}, 1),
    "tools as endless text": ("a.jsonl", _lines([GOOD, {**GOOD, "tools": "[" * 100_000}, {"messages": "[" * 100_000}]), {"bad_tools": [2], "not_a_list": [3]}, 1),
    "arguments of 5,000 digits": ("a.jsonl", _lines([GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "9" * 5000}}]}]}]), {"answer_not_rendered": [2]}, 1),
    "a byte order mark in the middle": ("a.jsonl", _lines([GOOD]).encode() + b"\xef\xbb\xbf" + _lines([GOOD]).encode(), {}, 2),
    "two CSV files one after the other": ("a.csv", "prompt,completion\na,b\n\ufeffprompt,completion\nc,d\n", {"repeated_header": [3]}, 2),
    "empty columns in a CSV": ("a.csv", "prompt,completion,,\na,b,,\n", {}, 1),
    "messages as text in a CSV": ("a.csv", 'prompt,completion\n"[{""role"": ""user"", ""content"": ""a""}]","[{""role"": ""assistant"", ""content"": ""b""}]"\n', {}, 1),
    "JSON lines named .txt": ("a.txt", _lines([GOOD, GOOD]), {}, 2),
    "UTF-32": ("a.jsonl", _lines([GOOD, GOOD]).encode("utf-32"), {}, 2),
    "most rows decide the format": ("a.jsonl", _lines([GOOD] + [SHAPES["alpaca"]("a", "b")] * 5), {"missing_column": [1]}, 5),
    "half a character in a column's name": ("a.jsonl", _lines([GOOD]) + '{"\\ud800": 1}\n', {"missing_column": [2]}, 1),
    "a role of 100,000 characters": ("a.jsonl", _lines([GOOD, _m(("u" * 100_000, "a"), ("assistant", "b"))]), {"unknown_role": [2]}, 1),
    "half a weight": ("a.jsonl", _lines([GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}]), {"bad_message": [2]}, 1),
    "a character that stands for special tokens here": ("a.jsonl", _lines([GOOD, _m(("user", "a \U000f1000"), ("assistant", "b"))]), {"special_token_text": [2]}, 1),
    "joined emoji, and text from right to left": ("a.jsonl", _lines([_m(("user", "\u202eשלום\u202c"), ("assistant", "👨\u200d👩\u200d👧 \u200f\u2028"))]), {}, 1),
    "an empty text": ("a.jsonl", _lines([*TEXT_ROWS, {"text": "  "}]), {"empty_text": [4]}, 3),
}  # fmt: skip


def _zip(files, *, locked=False, damage=False):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    data = bytearray(stream.getvalue())
    if locked:  # the flag of an encrypted member, in both headers
        data[6] |= 1
        data[data.rfind(b"PK\x01\x02") + 8] |= 1
    if damage:
        data[60] ^= 255
    return bytes(data)


# name: (file name, content or None, what the message says)
REFUSED = {
    "missing file": ("nowhere.jsonl", None, "does not exist"),
    "empty file": ("a.jsonl", b"", "empty"),
    "only white space": ("a.jsonl", b"\n \n", "white space"),
    "binary file": ("a.jsonl", bytes(range(256)) * 20, "binary"),
    "a picture": ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0", "binary"),
    "broken gzip": ("a.jsonl.gz", gzip.compress(b"x" * 9999)[:40], "cannot be read"),
    "broken Parquet": ("a.parquet", b"PAR1" + b"\0" * 50, "Parquet"),
    "not Parquet": ("a.parquet", b"hello", "does not begin like one"),
    "unknown columns": ("a.jsonl", _lines([{"foo": 1, "bar": 2}]).encode(), "foo, bar"),
    "broken JSON": ("a.json", b'[{"prompt": "a", ', "not JSON"),
    "an empty list": ("a.json", b"[]", "empty list"),
    "one number": ("a.json", b"[1, 2]", "columns"),
    "every line broken": ("a.jsonl", b"{a\n{b\n", "none of its 2 rows"),
    "all answers empty": ("a.jsonl", _lines([_m(("user", "a"), ("assistant", ""))] * 3).encode(), "empty_answer: 3 rows"),
    "all masked": ("a.jsonl", _lines([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}]).encode(), "no_answer"),
    "a column twice": ("a.csv", b"prompt,prompt\na,b\n", "stands twice"),
    "header only": ("a.csv", b"prompt,completion\n", "no rows"),
    "damaged gzip": ("a.jsonl.gz", (lambda data: data[:40] + bytes([data[40] ^ 255]) + data[41:])(gzip.compress(json.dumps(list(range(999))).encode())), "cannot be read"),
    "damaged zip": ("a.zip", _zip({"a.jsonl": _lines([{"a": i} for i in range(999)])}, damage=True), "cannot be read"),
    "a zip with a password": ("a.zip", _zip({"a.jsonl": "x"}, locked=True), "password"),
    "a zip of two files": ("a.zip", _zip({"a.jsonl": "x", "b.jsonl": "y"}), "an archive of 2 files"),
    "UTF-16 without its mark": ("a.jsonl", _lines([GOOD]).encode("utf-16-le"), "UTF-16 without its mark"),
    "German in Windows' encoding": ("a.jsonl", _lines([{"prompt": "Wie groß?", "completion": "größer"}]).encode("cp1252"), "save the file as UTF-8"),
    "Chinese in GBK": ("a.jsonl", _lines([{"prompt": "北京在哪里", "completion": "中国的北方"}]).encode("gbk"), "save the file as UTF-8"),
    "Korean in EUC-KR": ("a.jsonl", _lines([{"prompt": "서울은 어디", "completion": "한국에 있습니다"}]).encode("euc-kr"), "save the file as UTF-8"),
    "a page instead of data": ("a.jsonl", b"<!doctype html>", "near '<!doctype html>'"),
    "something behind the list": ("a.json", json.dumps([GOOD], indent=1).encode() + b"\n]", "line 15, character 1"),
    "a CSV without header": ("a.csv", b"x" * 5000 + b",b\nc,d\n", r"columns are x{60}\.\.\., b\."),
    "unknown kind": ("a.xyz", b"hello there", "cannot tell what kind"),
}  # fmt: skip


def test_there_are_enough_awkward_datasets():
    assert len(COUNTED) + len(REFUSED) >= 30


@pytest.mark.parametrize("name", COUNTED)
def test_awkward_rows_are_counted_with_their_lines(tmp_path, tokenizer, name):
    file, content, dropped, used = COUNTED[name]
    path = tmp_path / file
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    made = _prepare(path, tokenizer)
    assert {reason: drop.lines for reason, drop in made.report.dropped.items()} == dropped
    assert made.report.rows_used == used
    assert made.report.rows_total == used + sum(map(len, dropped.values()))
    assert all(drop.example for drop in made.report.dropped.values())
    assert made.train.trained_tokens > 0
    if dropped:
        reason, lines = next(iter(dropped.items()))
        with pytest.raises(FastFTError, match=rf"{reason}: \d+ rows \(lines {lines[0]}") as caught:
            _prepare(path, tokenizer, strict=True)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_dataset_is_refused_in_one_message(tmp_path, tokenizer, name):
    file, content, says = REFUSED[name]
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FastFTError, match=says) as caught:
        _prepare(path, tokenizer)
    assert caught.value.exit_code == 2


def test_a_pipe_is_refused(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FastFTError, match="neither a file nor a folder"):
        _prepare(tmp_path / "pipe", tokenizer)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_archive_that_breaks_off_late_is_refused(tmp_path, tokenizer, kind):
    """Beyond what is looked at to tell the kind of a file."""
    pick = np.random.default_rng(0)
    rows = "".join(f"{n},{n}\n" for n in pick.integers(0, 10**12, 400_000))
    text = "prompt,completion\n" + rows if kind == "csv" else rows.replace(",", "")
    path = tmp_path / f"a.{kind}.gz"
    path.write_bytes(gzip.compress(text.encode(), 1)[:-500])
    with pytest.raises(FastFTError, match="cannot be read to its end"):
        list(open_source(str(path)).chunks())


def test_a_zstd_csv_cannot_be_wound_back(tmp_path, tokenizer):
    _compress(tmp_path / "a.csv.zst", "zst", b"prompt,completion\na,b\n")
    assert _prepare(tmp_path / "a.csv.zst", tokenizer).report.rows_used == 1


def test_an_unclosed_quote_says_what_it_swallows(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\na,b\n"c,d\n' + "e,f\n" * 10)
    assert (
        "lines 3 to 13 are one row" in _prepare(path, tokenizer).report.dropped["bad_csv"].example
    )


def test_broken_text_in_parquet_is_a_bad_row(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"ok", b"\xff\xfe", b"fine"], pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a", "b", "c"], "completion": broken}), tmp_path / "a.parquet"
    )
    report = _prepare(tmp_path / "a.parquet", tokenizer).report
    assert {reason: drop.lines for reason, drop in report.dropped.items()} == {"not_utf8": [2]}
    assert report.rows_used == 2


def _folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content, encoding="utf-8")
    return path


def test_a_folder_with_splits_is_not_read_as_one(tmp_path, tokenizer):
    test = _lines([_m(("user", "T"), ("assistant", "t"))])
    files = {
        "README.md": "# A",
        "data/train-00000.jsonl": _lines([GOOD]) * 2,
        "data/test-00000.jsonl": test,
    }
    folder = _folder(tmp_path / "data", files)
    report = _prepare(folder, tokenizer).report
    assert report.rows_total == 2
    assert any("test-00000.jsonl" in notice for notice in report.notices)
    assert any("README.md" in notice for notice in report.notices)
    assert _prepare(folder, tokenizer, split="test").report.rows_total == 1
    with pytest.raises(FastFTError, match="it has test, train"):
        _prepare(folder, tokenizer, split="validation")
    files = {"train.jsonl": _lines([GOOD]), "form_validation.jsonl": _lines([GOOD])}
    assert _prepare(_folder(tmp_path / "other", files), tokenizer).report.rows_total == 2


def test_a_bad_row_of_a_folder_names_its_file(tmp_path, tokenizer):
    folder = _folder(
        tmp_path / "rows", {"a.jsonl": _lines([GOOD]) * 3, "b.jsonl": _lines([GOOD]) + "oops\n"}
    )
    dropped = _prepare(folder, tokenizer).report.dropped["bad_json"]
    assert dropped.lines == [2]
    assert dropped.example.startswith("b.jsonl: ")


LOST = {
    "a first input after 200 rows": ([{"instruction": f"do {i}", "output": "b"} for i in range(250)], {"instruction": "a", "input": "XYZ", "output": "b"}),
    "the context of Dolly": ([], {"instruction": "a", "context": "XYZ", "response": "b"}),
    "system beside messages": ([], {"system": "XYZ", **GOOD}),
    "system beside lists": ([], {"system": "XYZ", "prompt": _as_messages("a", "b")[:1], "completion": _as_messages("a", "b")[1:]}),
    "an object of lists as prompt": ([], {"prompt": {"role": ["user", "assistant", "user"], "content": ["a", "b", "XYZ"]}, "completion": {"role": ["assistant"], "content": ["c"]}}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_nothing_of_a_row_is_lost(tmp_path, tokenizer, name):
    before, row = LOST[name]
    (tmp_path / "a.jsonl").write_text(_lines([*before, row]))
    made = _prepare(tmp_path / "a.jsonl", tokenizer)
    last = made.train[len(before)]
    assert "XYZ" in tokenizer.decode(last.input_ids)
    assert "XYZ" not in tokenizer.decode(last.labels[last.labels >= 0])
    assert len(tokenizer.decode(last.labels[last.labels >= 0]).removesuffix("<|im_end|>")) in (
        1,
        5,
    )  # b, c or Hello


def test_what_is_not_read_is_said(tmp_path, tokenizer):
    row = {"instruction": "a", "output": "b", "source": "web", "id": 1}
    (tmp_path / "a.jsonl").write_text(_lines([row]))
    assert "not read: source, id" in " ".join(
        _prepare(tmp_path / "a.jsonl", tokenizer).report.notices
    )
    (tmp_path / "b.jsonl").write_text(_lines([{**GOOD, "tools": [{"name": "f"}]}]))
    assert "1 row with tools" in " ".join(_prepare(tmp_path / "b.jsonl", tokenizer).report.notices)


def test_what_an_eval_source_loses_is_said(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(_lines([GOOD] * 3))
    (tmp_path / "b.jsonl").write_text(_lines([GOOD]) + "oops\n" * 5)
    said = " ".join(
        _prepare(
            tmp_path / "a.jsonl", tokenizer, eval_source=str(tmp_path / "b.jsonl")
        ).report.notices
    )
    assert "5 of 6 rows are not used: bad_json 5 (lines 2, 3" in said
    (tmp_path / "c.jsonl").write_text(_lines([{"foo": 1}]))
    with pytest.raises(FastFTError, match=r"c\.jsonl: cannot tell what the rows mean"):
        _prepare(tmp_path / "a.jsonl", tokenizer, eval_source=str(tmp_path / "c.jsonl"))


def test_each_side_is_cut_by_its_own_format(tmp_path, tokenizer):
    (tmp_path / "chat.jsonl").write_text(_lines([GOOD] * 3))
    (tmp_path / "text.jsonl").write_text(_lines([{"text": "word " * 2000}]))
    made = _prepare(tmp_path / "chat.jsonl", tokenizer, eval_source=str(tmp_path / "text.jsonl"))
    assert int(made.eval.lengths.max()) <= 256
    made = _prepare(tmp_path / "text.jsonl", tokenizer, eval_source=str(tmp_path / "chat.jsonl"))
    assert len(made.eval) == 3
    assert made.eval.trained_tokens < made.eval.tokens


def test_columns_map_anything(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(_lines([{"frage": "a", "antwort": "b", "regel": "s"}]))
    made = _prepare(
        path, tokenizer, columns={"prompt": "frage", "completion": "antwort", "system": "regel"}
    )
    assert [m["role"] for m in made.eval_conversations(1)[0].prompt] == ["system", "user"]
    with pytest.raises(FastFTError, match="did you mean 'frage'"):
        _prepare(path, tokenizer, columns={"prompt": "frag", "completion": "antwort"})
    with pytest.raises(FastFTError, match="did you mean 'prompt'"):
        _prepare(path, tokenizer, columns={"promt": "frage"})


@pytest.mark.parametrize(
    ("name", "heading"), [("alpaca", "### Input:"), ("alpaca_ja", "### 入力:"), ("chatml", "\n\n")]
)
def test_alpaca_input_has_its_place(tmp_path, tokenizer, name, heading):
    path = tmp_path / "a.jsonl"
    path.write_text(
        _lines([{"instruction": "訳して", "input": "dog", "output": "犬"}]), encoding="utf-8"
    )
    made = _prepare(path, tokenizer, chat_template=name)
    text = tokenizer.decode(made.train[0].input_ids)
    assert heading in text
    assert "dog" in text


def test_secrets_are_counted(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    key = "hf_" + "a1B2" * 8
    path.write_text(_lines([GOOD, _m(("user", "a"), ("assistant", f"use {key}"))]))
    report = _prepare(path, tokenizer).report
    assert report.secrets == {"Hugging Face token": 1}
    assert report.secret_lines == [2]
    assert key not in " ".join(report.notices)
    thought = {
        "messages": [
            GOOD["messages"][0],
            {**GOOD["messages"][1], "reasoning_content": f"{key} AKIA{'A' * 16}"},
        ]
    }
    path.write_text(_lines([GOOD, thought, {**GOOD, "tools": [{"name": "f", "description": key}]}]))
    report = _prepare(path, tokenizer).report
    assert report.secrets == {"Hugging Face token": 2, "AWS access key": 1}
    assert any(
        notice.startswith("2 rows with what looks like a key (lines 2, 3)")
        for notice in report.notices
    )


def test_train_on_everything_and_over_long(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(_lines([GOOD, _m(("user", "a"), ("assistant", "b " * 100))]))
    made = _prepare(path, tokenizer, train_on="everything")
    assert made.train.trained_tokens == made.train.tokens
    cut = _prepare(path, tokenizer, max_seq_length=64)
    assert (cut.report.truncated, int(cut.train.lengths.max())) == (1, 64)
    dropped = _prepare(path, tokenizer, max_seq_length=64, over_long="drop")
    assert {k: v.lines for k, v in dropped.report.dropped.items()} == {"over_long": [2]}
