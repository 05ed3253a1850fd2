"""Rows out of files, folders and the Hub, in passes: JSON, JSONL, CSV, TSV, Parquet, Arrow,
`datasets` folders.

A source yields chunks of unparsed rows (lines, or objects), so that parsing happens where
tokenising happens. What cannot be read is a `Bad` row with its line and reason; only a file that
is no dataset at all is an error.
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fastft import hub
from fastft.errors import FastFTError, did_you_mean

CHUNK_ROWS = 1000
CHUNK_BYTES = 1 << 20
MOST_COLUMNS = 10_000
_HEAD = 1 << 22  # bytes looked at to tell encoding and kind
SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".ipc": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
# What a cut, damaged or foreign file makes its reader raise; NotImplementedError: a zip method that
# Python lacks.
_UNREADABLE = (
    OSError,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    NotImplementedError,
)
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}  # fmt: skip

_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval", "evaluation"},
    "test": {"test", "testing"},
}


GIVEN = "rows given in Python"
"""What stands as data.source in the config of a run whose rows came from Python."""


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row that cannot be read, and the reason it is counted under."""

    reason: str
    message: str


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some rows as they stand in the source, with their numbers: lines (bytes) to be parsed, or
    objects.
    """

    lines: list[int]
    rows: list[Any]
    encoding: str | None = None
    file: str = ""
    """Its name, where the source has several files: a line number alone would not say where to
    look.
    """
    padded: bool = False
    """Whether the rows come from Arrow, which fills keys that a row lacks with null."""

    def parsed(self) -> Iterator[tuple[int, Any]]:
        """Yield (line number, row), a row being an object, a text or a `Bad`."""
        for line, row in zip(self.lines, self.rows, strict=True):
            yield line, parse_line(row, self.encoding) if self.encoding else row


class Source:
    """A dataset that can be read several times. `size` is in bytes (None: not known before
    reading).
    """

    def __init__(
        self,
        files: Sequence[Path],
        kind: str,
        name: str,
        notices: list[str],
        documents: str = "auto",
    ) -> None:
        self.files, self.kind, self.name, self.notices = list(files), kind, name, notices
        self.documents = documents
        self.size: int | None = sum(f.stat().st_size for f in self.files)

    def chunks(self) -> Iterator[Chunk]:
        """Yield all rows in order."""
        for file in self.files:
            for chunk in _read_file(file, self.notices, self.documents):
                yield dataclasses.replace(chunk, file=file.name) if len(self.files) > 1 else chunk

    def digest(self) -> str:
        """Return a SHA-256 of the content, without file names."""
        total = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


class TableSource(Source):
    """A `datasets` dataset: from the Hub, or saved in a folder."""

    def __init__(self, dataset: Any, name: str, notices: list[str]) -> None:
        self.dataset, self.name, self.notices, self.kind, self.files = (
            dataset,
            name,
            notices,
            "datasets",
            [],
        )
        # `size_in_bytes` is not known of a dataset that was made of rows and saved; its table
        # always knows.
        self.size = int(dataset.data.nbytes) if hasattr(dataset, "__len__") else None

    def chunks(self) -> Iterator[Chunk]:
        """Yield all rows in order."""
        yield from _in_chunks(enumerate(self.dataset, 1), padded=True)

    def digest(self) -> str:
        """Return a SHA-256 over the rows."""
        total = hashlib.sha256()
        for row in self.dataset:
            total.update(_as_bytes(row))
        return total.hexdigest()


class GivenRows(TableSource):
    """A list of rows that was handed over in Python."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.dataset, self.name, self.notices, self.kind, self.files = rows, GIVEN, [], "rows", []
        self.size = sum(len(_as_bytes(row)) for row in rows)

    def chunks(self) -> Iterator[Chunk]:
        """Yield all rows in order."""
        yield from _in_chunks(enumerate(self.dataset, 1))


def _as_bytes(row: Any) -> bytes:
    """Return the row as JSON, which its fingerprint is of; raises FastFTError where it has none."""
    try:
        text = json.dumps(row, sort_keys=True, default=str, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:  # in itself; keys of several types
        raise FastFTError(
            f"a row of data is not what JSON can hold ({error}): {str(row)[:80]}. Rows are objects "
            "with text keys, lists of messages, or texts."
        ) from error
    return text.encode("utf-8", "surrogatepass")


def open_rows(rows: Any) -> Source:
    """Return a list of rows, or a `datasets.Dataset`, as a source; its digest is of the content.

    Raises FastFTError for what cannot be read twice, and for a dataset of several splits.
    """
    if isinstance(rows, list | tuple):
        return GivenRows(rows)
    if hasattr(rows, "features") and hasattr(rows, "data"):
        return TableSource(rows, GIVEN, [])
    if isinstance(rows, dict):
        raise FastFTError(
            f"data has the splits or keys {', '.join(map(str, rows))}; give one split, or a list "
            "of rows."
        )
    raise FastFTError(
        f"data is a {type(rows).__name__}; give a list of rows or a datasets.Dataset. Data is read "
        "in several passes, so write list(...) around what can be read once only."
    )


def open_source(
    source: str,
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    documents: str = "auto",
) -> Source:
    """Return the dataset at `source`: a file, a folder (of files, or saved by `datasets`), or a
    Hub id. `documents`: what one document of a text file is (see `DataConfig.documents`).

    Raises FastFTError where there is nothing that can be read.
    """
    path = Path(source).expanduser()
    if source == GIVEN:
        raise FastFTError(
            "this run was trained on rows that were given in Python. Call fastft.train with the "
            "same rows again, or set data.source to a file that holds them."
        )
    if path.is_file():
        return _open_files([path], source, documents=documents)
    if path.is_dir():
        if any(
            (path / marker).is_file()
            for marker in ("dataset_dict.json", "state.json", "dataset_info.json")
        ):
            return _saved_folder(path, split)
        files = sorted(
            f
            for f in path.rglob("*")
            if f.is_file() and kind_of(f) is not None and not f.name.startswith(".")
        )
        if not files:
            raise FastFTError(
                f"the folder {source} holds no data file. Known: "
                f"{', '.join(sorted(SUFFIXES))}, also compressed."
            )
        files, notices = _chosen(files, path, split)
        return _open_files(files, source, notices, documents)
    if path.exists():
        # a pipe, a socket, a device: can be read once at most, and data is read in several passes
        raise FastFTError(
            f"{source} is neither a file nor a folder (a pipe?). Write its content into a "
            "file first."
        )
    if (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
        and kind_of(path) is None
        and not source.startswith(".")
    ):
        return _from_hub(source, name, split, streaming)
    raise missing(source)


def missing(source: str) -> FastFTError:
    """Return the error for a data file that is not there: where it was looked for, and the data
    files that are there.
    """
    path = Path(source).expanduser()
    folder = path.absolute().parent
    if folder.is_dir():
        names = sorted(p.name for p in folder.iterdir() if kind_of(p) is not None)
        some = ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])
        hint = did_you_mean(path.name, names) or (some and f"; data files there: {some}")
    else:
        hint = "; that folder does not exist either"
    return FastFTError(
        f"the data file {source} does not exist (looked in {folder}){hint}. Set data.source."
    )


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its name, compression aside; None where the name says
    nothing.
    """
    suffixes = [
        s.lower() for s in path.suffixes if s.lower() not in (".gz", ".bz2", ".xz", ".zst", ".zip")
    ]
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def parse_line(line: bytes, encoding: str) -> Any:
    """Return the JSON value of a line, or a `Bad` row."""
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError as error:
        return Bad(
            "not_utf8",
            f"not {encoding} text (byte {error.start + 1} of the line); save the file as UTF-8",
        )
    return parse_json(text)


def parse_json(text: str) -> Any:
    """Return a JSON value, or a `Bad` row that says what is wrong with it."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        near = text[max(0, error.pos - 10) : error.pos + 30]
        return Bad(
            "bad_json", f"not JSON: {error.msg} at {line}character {error.colno}, near {near!r}"
        )
    except _DuplicateKeyError as error:
        return Bad("duplicate_key", str(error))
    except RecursionError:
        return Bad("bad_json", "not JSON that can be read: lists or objects nested too deep")
    except ValueError as error:  # a number of more than 4,300 digits
        return Bad("bad_json", f"not JSON that can be read: {str(error).split(';')[0]}")


class _DuplicateKeyError(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKeyError(f"the key {twice!r} stands in it twice")
    return made


def _chosen(files: list[Path], folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """Return the files of a folder that are read, and what to say about the others.

    train.jsonl beside test.jsonl are splits, as on the Hub: reading both would train on the test.
    """
    notices = []
    readme = [file for file in files if file.suffix.lower() == ".md"]
    if readme and len(readme) < len(files):
        files = [file for file in files if file not in readme]
        notices.append(
            "not read, since the folder holds data besides: "
            f"{', '.join(f.name for f in readme[:3])}"
        )
    named = {file: _split_of(file.relative_to(folder)) for file in files}
    found = sorted(set(named.values()))
    if len(found) < 2:
        return files, notices
    if split not in found:
        raise FastFTError(
            f"{folder} has no files of the split {split!r}; by their names it has "
            f"{', '.join(found)}."
        )
    chosen = [file for file in files if named[file] == split]
    left = [str(file.relative_to(folder)) for file in files if file not in chosen]
    notices.append(
        f"{len(chosen)} of {len(files)} files are read, those of data.split {split}; not "
        f"read: {', '.join(left[:5])}"
    )
    return chosen, notices


def _split_of(path: Path) -> str:
    """Return the split that a folder of the path or the file is named after, numbers aside; train
    where none is.

    test-00000-of-00001.parquet is test; form_validation.jsonl is no split, only a name with this
    word in it.
    """
    for part in path.parts:
        words = set(re.split(r"[\W_\d]+", part.split(".")[0].lower())) - {"", "of"}
        split = next(
            (split for split, names in _SPLITS.items() if len(words) == 1 and words <= names), None
        )
        if split:
            return split
    return "train"


def _open_files(
    files: list[Path], name: str, said: Sequence[str] = (), documents: str = "auto"
) -> Source:
    for file in files:
        if file.stat().st_size == 0:
            raise FastFTError(
                f"the data file {file} is empty (0 bytes). It should hold one example a line; "
                "see docs/data.md."
            )
    notices = list(said)
    kinds = []
    texts = sum(kind_of(file) == "text" for file in files)
    taken = documents
    for file in files:
        head = _head(file)
        kinds.append(_kind(file, head))
        if kinds[-1] == "text" and documents == "auto" and taken == "auto":
            taken = "file" if texts > 1 else _documents_of(file, head)
            notices.append(_ABOUT_DOCUMENTS[taken])
        encoding = _encoding_of(file, kinds[-1], head)
        if encoding not in (None, "utf-8"):
            notices.append(f"{file.name} is read as {encoding}, not UTF-8")
    kind = "/".join(dict.fromkeys(kinds))
    return Source(files, kind, name, notices, taken)


_ABOUT_DOCUMENTS = {
    "file": "each text file is one document (data.documents: auto; paragraph and line are the "
    "other ways)",
    "paragraph": "each paragraph, as empty lines part them, is one document (data.documents: "
    "auto; set file to keep the text in one piece)",
    "line": "each line is one document (data.documents: auto; set file to keep the text in one "
    "piece)",
}


def _documents_of(file: Path, head: bytes) -> str:
    """Return what one document of the only text file most likely is."""
    text = head.decode(_encoding(head), "ignore").lstrip("\ufeff")
    if kind_of(file) == "text" and file.suffix.lower() == ".md":
        return "file"  # headings and code belong together
    if re.search(r"\S[ \t]*\r?\n[ \t]*\r?\n\s*\S", text):
        return "paragraph"
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    whole = sum(line.endswith(tuple(".!?。！？」』…)\"'")) for line in lines)
    return "line" if len(lines) > 1 and 2 * whole >= len(lines) else "file"


def _head(file: Path) -> bytes:
    try:
        with _open(file) as stream:
            return stream.read(_HEAD)
    except _UNREADABLE as error:
        raise FastFTError(
            f"{file} cannot be read: {str(error).rstrip('.')}. Is it whole?"
        ) from error


def _open(file: Path) -> IO[bytes]:
    """Open a file through its compression, told by its first bytes."""
    with file.open("rb") as stream:
        magic = stream.read(6)
    kind = next((name for mark, name in _COMPRESSED.items() if magic.startswith(mark)), None)
    if kind == "gzip":
        return gzip.open(file)  # type: ignore[return-value]
    if kind == "bz2":
        return bz2.open(file)
    if kind == "xz":
        return lzma.open(file)
    if kind == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    if kind == "zip":
        archive = zipfile.ZipFile(file)
        names = [
            n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX")
        ]
        if len(names) != 1:
            raise FastFTError(
                f"{file} is an archive of {len(names)} files; unpack it and give the folder."
            )
        if archive.getinfo(names[0]).flag_bits & 1:
            raise FastFTError(f"{file} is locked with a password; unpack it and give the file.")
        return archive.open(names[0])
    return file.open("rb")


def _kind(file: Path, head: bytes) -> str:
    """Return jsonl, json, csv, tsv, parquet, arrow or text; the content decides over the name for
    JSON.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1") or head[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    named = kind_of(file)
    if named in ("parquet", "arrow"):
        raise FastFTError(
            f"{file} is named {file.suffix} but does not begin like one; is the download complete?"
        )
    encoding = _encoding(head)
    if b"\0" in head[:8192] and encoding not in ("utf-16", "utf-32"):
        raise FastFTError(
            f"{file} is a binary file, not a dataset (or UTF-16 without its mark: save it as "
            "UTF-8). Known: "
            f"{', '.join(sorted(SUFFIXES))}, also compressed."
        )
    if named == "text" and _is_json_lines(head.decode(encoding, "ignore")):
        return "jsonl"
    if named in ("json", "jsonl", None):
        start = head.decode(encoding, "ignore").lstrip("\ufeff \t\r\n")
        if not start:
            raise FastFTError(f"the data file {file} holds nothing but white space.")
        if start[0] == "[" and (named != "jsonl" or not _first_line_is_json(start)):
            return "json"
        if start[0] == "{":
            one_object = "\n" not in start.strip()
            return (
                "jsonl"
                if named == "jsonl" or (_first_line_is_json(start) and not one_object)
                else "json"
            )
        if named is None:
            raise FastFTError(
                f"cannot tell what kind of file {file} is; name it .jsonl, .json, .csv, .tsv, "
                ".txt or .parquet."
            )
    return str(named)


def _first_line_is_json(text: str) -> bool:
    return not isinstance(parse_json(text.split("\n", 1)[0]), Bad)


def _is_json_lines(text: str) -> bool:
    """Whether the first two lines are JSON objects: then a .txt is no plain text, whatever it is
    called.
    """
    first = [line for line in text[: 1 << 20].lstrip("\ufeff").splitlines() if line.strip()][:2]
    return len(first) == 2 and all(isinstance(parse_json(line), dict) for line in first)


def _encoding_of(file: Path, kind: str, head: bytes) -> str | None:
    return None if kind in ("parquet", "arrow") else _encoding(head)


def _encoding(head: bytes) -> str:
    """Return utf-8, utf-16, utf-32, cp932 or euc_jp. A few broken lines do not make a UTF-8 file
    another encoding.
    """
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if not line.isascii()]
    if len(head) >= _HEAD:
        lines = lines[:-1]
    broken = [line for line in lines if not _decodes(line, "utf-8")]
    if len(broken) * 4 <= len(lines) * 3 and len(broken) < max(len(lines), 1):
        return "utf-8"
    fits = [name for name in ("cp932", "euc_jp") if all(_decodes(line, name) for line in broken)]
    # German, Chinese or Korean bytes decode as well, but to text without any kana: that is refused,
    # not guessed at.
    texts = {name: "".join(line.decode(name) for line in broken[:200]) for name in fits}
    fits = [name for name in fits if re.search("[\u3041-\u3096\u30a1-\u30fa]", texts[name])]
    # Text in the wrong one of the two is full of half-width katakana and rare characters.
    return min(fits, key=lambda name: _oddness(texts[name]), default="utf-8")


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _oddness(text: str) -> int:
    common = sum("\u3040" <= c <= "\u30ff" for c in text)
    return sum("\uff61" <= c <= "\uff9f" or "\ue000" <= c <= "\uf8ff" for c in text) * 2 - common


def _read_file(file: Path, notices: list[str], documents: str) -> Iterator[Chunk]:
    try:
        yield from _chunks_of(file, notices, documents)
    except _UNREADABLE as error:
        raise FastFTError(
            f"{file} cannot be read to its end: {str(error).rstrip('.')}. Is it whole?"
        ) from error


def _chunks_of(file: Path, notices: list[str], documents: str) -> Iterator[Chunk]:
    head = _head(file)
    kind = _kind(file, head)
    if kind == "parquet":
        yield from _in_chunks(_parquet(file), padded=True)
        return
    if kind == "arrow":
        yield from _in_chunks(_arrow(file), padded=True)
        return
    encoding = _encoding(head)
    if kind == "jsonl" and encoding not in ("utf-16", "utf-32"):
        yield from _lines(file, encoding)
    elif kind == "jsonl":
        rows = (
            (n, parse_json(line)) for n, line in enumerate(_text(file, encoding), 1) if line.strip()
        )
        yield from _in_chunks(rows)
    elif kind == "json":
        yield from _in_chunks(_json(file, encoding))
    elif kind == "text":
        yield from _in_chunks(_documents(_text(file, encoding), documents))
    else:
        yield from _in_chunks(_csv(file, encoding, "\t" if kind == "tsv" else ",", notices))


def _lines(file: Path, encoding: str) -> Iterator[Chunk]:
    """Yield unparsed lines, about a megabyte a chunk; empty lines are no rows."""
    numbers: list[int] = []
    rows: list[bytes] = []
    size = 0
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            # Not only at the start: files that were put together with `cat` have a mark in the
            # middle.
            line = line.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n")
            if not line:
                continue
            numbers.append(number)
            rows.append(line)
            size += len(line)
            if size >= CHUNK_BYTES or len(rows) >= CHUNK_ROWS:
                yield Chunk(numbers, rows, encoding)
                numbers, rows, size = [], [], 0
    if rows:
        yield Chunk(numbers, rows, encoding)


def _in_chunks(rows: Iterable[tuple[int, Any]], *, padded: bool = False) -> Iterator[Chunk]:
    numbers: list[int] = []
    kept: list[Any] = []
    for number, row in rows:
        numbers.append(number)
        kept.append(row)
        if len(kept) >= CHUNK_ROWS:
            yield Chunk(numbers, kept, padded=padded)
            numbers, kept = [], []
    if kept:
        yield Chunk(numbers, kept, padded=padded)


def _text(file: Path, encoding: str) -> IO[str]:
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    return io.TextIOWrapper(_open(file), encoding=encoding, errors="surrogateescape", newline="")


def _documents(stream: IO[str], documents: str) -> Iterator[tuple[int, Any]]:
    """Yield the documents of a text with the numbers of their first lines."""
    if documents in ("file", "auto"):
        yield 1, {"text": "".join(stream)}
        return
    first, kept = 1, list[str]()
    for number, line in enumerate(stream, 1):
        if line.strip() and documents == "paragraph":
            first = first if kept else number
            kept.append(line)
        elif kept:
            yield first, {"text": "".join(kept).strip()}
            kept = []
        if line.strip() and documents == "line":
            yield number, {"text": line.strip()}
    if kept:
        yield first, {"text": "".join(kept).strip()}


def _json(file: Path, encoding: str) -> Iterator[tuple[int, Any]]:
    """A JSON file is one list of rows, or an object with one list in it ({"data": [...]})."""
    with _text(file, encoding) as stream:
        value = parse_json(stream.read())
    if isinstance(value, Bad):
        raise FastFTError(f"{file} is {value.message}.")
    if isinstance(value, dict):
        lists = [
            key
            for key, item in value.items()
            if isinstance(item, list) and item and isinstance(item[0], dict)
        ]
        is_row = {"messages", "conversations"} & value.keys()
        value = value[lists[0]] if len(lists) == 1 and not is_row else [value]
    if not isinstance(value, list):
        raise FastFTError(f"{file} holds one {type(value).__name__}, not a list of rows.")
    if not value:
        raise FastFTError(f"{file} holds an empty list.")
    yield from enumerate(value, 1)


def _csv(
    file: Path, encoding: str, delimiter: str, notices: list[str]
) -> Iterator[tuple[int, Any]]:
    """Yield CSV rows as objects; a row with too many or too few fields is bad, not shifted."""
    csv.field_size_limit(1 << 30)
    with _text(file, encoding) as stream:
        first = stream.readline()
        if delimiter not in first:
            other = next((d for d in (";", "\t", ",") if d in first), delimiter)
            if other != delimiter:
                notices.append(f"{file.name} separates its fields with {other!r}")
                delimiter = other
        reader = csv.reader(itertools.chain([first], stream), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                through = (
                    f" (lines {line} to {reader.line_num} are one row)"
                    if reader.line_num > line
                    else ""
                )
                yield (
                    line,
                    Bad("bad_csv", f"not CSV: {error}; is a quotation mark not closed?{through}"),
                )
                continue
            if fields:
                fields[0] = fields[0].lstrip("\ufeff")
            if header is None:
                header = [name.strip() for name in fields]
                _refuse_wide(file, len(header))
                twice = sorted({name for name in header if name and header.count(name) > 1})
                if twice:
                    raise FastFTError(
                        f"{file}: the column {twice[0]!r} stands twice in the first line."
                    )
            elif fields and len(fields) != len(header):
                yield (
                    line,
                    Bad(
                        "ragged_row",
                        f"{len(fields)} fields, but the first line names {len(header)} columns",
                    ),
                )
            elif [name.strip() for name in fields] == header:
                yield line, Bad("repeated_header", "the names of the columns again, not a row")
            elif fields:
                yield line, _csv_row(header, fields)
    if header is None:
        raise FastFTError(f"{file} has no rows.")


def _refuse_wide(file: Path, columns: int) -> None:
    if columns > MOST_COLUMNS:
        raise FastFTError(
            f"{file} has {columns:,} columns; fastft reads at most {MOST_COLUMNS:,}. Keep those "
            "that are asked and answered (is it a table of numbers?)."
        )


def _csv_row(header: list[str], fields: list[str]) -> Any:
    if any(
        "\udc80" <= char <= "\udcff" for field in fields for char in field if not field.isascii()
    ):
        return Bad("not_utf8", "not UTF-8 text; save the file as UTF-8")
    return dict(zip(header, fields, strict=True))


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        opened = pyarrow.parquet.ParquetFile(file)
        _refuse_wide(file, opened.metadata.num_columns)
        for batch in opened.iter_batches(batch_size=CHUNK_ROWS):
            for row in _rows_of(batch):
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise FastFTError(f"{file} is no whole Parquet file: {str(error).rstrip('.')}.") from error


def _arrow(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as mapped:
            if mapped.read(6) == b"ARROW1":
                mapped.seek(0)
                reader = pyarrow.ipc.open_file(mapped)
                batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                mapped.seek(0)
                batches = pyarrow.ipc.open_stream(mapped)
            number = 0
            for batch in batches:
                for row in _rows_of(batch):
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise FastFTError(f"{file} is no whole Arrow file: {str(error).rstrip('.')}.") from error


def _rows_of(batch: Any) -> list[Any]:
    """Return the rows of an Arrow batch, those with broken text as `Bad`: Arrow does not check
    what it is given.
    """
    try:
        return list(batch.to_pylist(maps_as_pydicts="lossy"))
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [Bad("not_utf8", "not UTF-8 text")]
        return [row for i in range(batch.num_rows) for row in _rows_of(batch.slice(i, 1))]


def _saved_folder(path: Path, split: str) -> Source:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise FastFTError(f"the dataset folder {path} cannot be loaded: {error}.") from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise FastFTError(
                f"{path} has no split {split!r}; it has {', '.join(loaded)}. Set data.split."
            )
        loaded = loaded[split]
    assert isinstance(loaded, Dataset)
    return TableSource(loaded, str(path), [])


def _from_hub(source: str, name: str | None, split: str, streaming: bool) -> Source:
    from datasets import DownloadMode, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        with hub.bounded_waits():
            loaded = load_dataset(
                source,
                name,
                split=split,
                streaming=streaming,
                download_mode=DownloadMode.REUSE_DATASET_IF_EXISTS,
            )
    except DatasetNotFoundError as error:
        # the answer behind it is gone; its text says which of two it was
        explained = (hub.gated if "gated" in str(error) else hub.not_found)(f"dataset {source!r}")
        raise FastFTError(f"{explained} Nor is it a file here.") from error
    except ValueError as error:  # unknown split or configuration: the message lists them
        raise FastFTError(f"the dataset {source}: {error}.") from error
    except (OSError, hub.http().HTTPError) as error:
        # the network's errors, and what datasets makes of them
        if hub.is_offline() or hub.status(error) is not None:
            raise hub.explain(error, f"dataset {source!r}") from error
        raise FastFTError(
            f"{source} is no file here, and the Hub cannot be reached: {error}."
        ) from error
    return TableSource(loaded, source, [])
