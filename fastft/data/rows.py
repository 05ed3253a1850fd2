"""Rows to samples, a chunk at a time: parse, convert, render, encode, prove, count. Runs in worker
processes too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fastft.data.encode import Coder, Encoded, Planned, encode_planned, plan_turns
from fastft.data.formats import Example, Format, convert
from fastft.data.messages import BadRowError
from fastft.data.read import Bad, Chunk
from fastft.data.store import ARRAYS, Packed, flattened
from fastft.data.template import ChatTemplate, TemplateRefusedError, UnusableRowError

SIGNATURE = 16  # min-hashes a row; see near-duplicates in split.py
_SHINGLE = 5  # characters
KEEP_LINES = 10
KEEP_EXAMPLES = 64
KEEP_KEYS = 100

SECRETS = {
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "OpenAI-like key": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,}",
    "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    "AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "JSON web token": r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{10,}",
}
_ANY_SECRET = re.compile(
    "|".join(f"(?P<s{i}>{pattern})" for i, pattern in enumerate(SECRETS.values()))
)
# quick
_MAYBE_SECRET = re.compile(r"hf_|sk-|gh[pousr]_|github_pat_|A[KS]IA|AIza|xox|-----BEGIN|eyJ")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides how a row becomes samples."""

    max_seq_length: int
    train_on: str
    long_text: str
    over_long: str
    check_secrets: bool
    turns: str = "all"


@dataclasses.dataclass
class Conversation:
    """A raw sample: the messages before the last answer, and that answer."""

    prompt: list[dict[str, Any]]
    reference: str
    tools: list[Any] | None = None


@dataclasses.dataclass
class Counts:
    """What is counted on the way; `add` joins the counts of two chunks."""

    rows_total: int = 0
    dropped: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    truncated: int = 0
    over_long: int = 0
    truncated_tokens: int = 0
    unrolled: int = 0
    unrolled_tokens: int = 0
    one_pass_tokens: int = 0
    """Of the unrolled conversations: their tokens as rows, and if each were read once."""
    lossy: int = 0
    control_characters: int = 0
    special_token_text: int = 0
    tools_left_out: int = 0
    turns: int = 0
    reasoning_turns: int = 0
    secret_rows: int = 0
    secrets: dict[str, int] = dataclasses.field(default_factory=dict)
    secret_lines: list[int] = dataclasses.field(default_factory=list)
    unread_keys: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Keys of messages that are not read -> count and first lines."""

    def drop(self, line: int, reason: str, message: str) -> None:
        """Count a row that cannot be used."""
        message = message if len(message) <= 500 else message[:500] + "..."
        _count(self.dropped.setdefault(reason, {"example": message}), line)

    def unread(self, line: int, keys: Iterable[str]) -> None:
        """Count keys of a used row's messages that are not read."""
        for key in keys:
            if key in self.unread_keys or len(self.unread_keys) < KEEP_KEYS:
                _count(self.unread_keys.setdefault(key, {}), line)

    def add(self, other: Counts) -> None:
        """Add the counts of a later chunk."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, int):
                setattr(self, field.name, mine + theirs)
        for mine_of, theirs_of in (
            (self.dropped, other.dropped),
            (self.unread_keys, other.unread_keys),
        ):
            for name, entry in theirs_of.items():
                known = mine_of.setdefault(name, {**entry, "count": 0, "lines": []})
                known["count"] += entry["count"]
                known["lines"] = (known["lines"] + entry["lines"])[:KEEP_LINES]
        for kind, count in other.secrets.items():
            self.secrets[kind] = self.secrets.get(kind, 0) + count
        self.secret_lines = (self.secret_lines + other.secret_lines)[:KEEP_LINES]


def _count(entry: dict[str, Any], line: int) -> None:
    entry["count"] = entry.get("count", 0) + 1
    lines = entry.setdefault("lines", [])
    if len(lines) < KEEP_LINES:
        lines.append(line)


@dataclasses.dataclass
class RowMarks:
    """One entry a used row: its line, hashes of its content and of what is asked, min-hashes (N,
    16), samples made.
    """

    lines: np.ndarray
    content: np.ndarray
    asked: np.ndarray
    exact: np.ndarray
    """A hash of the row's samples: what is read and what is trained, to the token."""
    signatures: np.ndarray
    samples: np.ndarray

    def subset(self, keep: np.ndarray) -> RowMarks:
        """Return the marks of the rows in the mask `keep` (N,)."""
        return RowMarks(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))

    @classmethod
    def joined(cls, parts: list[RowMarks]) -> RowMarks:
        """Return the marks of several chunks as one."""
        if not parts:
            return _marks([])
        return cls(
            *(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls))
        )


@dataclasses.dataclass
class ChunkResult:
    """What a chunk became: flat arrays and their lengths, marks of the rows, counts, a few raw
    conversations.
    """

    flat: list[np.ndarray]
    lengths: list[np.ndarray]
    marks: RowMarks
    counts: Counts
    examples: list[tuple[int, Conversation]]


class RowMaker:
    """Makes chunks of samples. Holds the tokenizer, the template and the format; picklable by its
    arguments.
    """

    def __init__(
        self, tokenizer: Any, template: ChatTemplate, format: Format, settings: Settings
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.format, self.settings = format, settings
        self.coder = Coder.of(tokenizer, template)
        self._kept_keys: list[int] = []
        self._bos: list[int] = []
        self._longest_token: int | None = None
        first = tokenizer("a")["input_ids"][:1]
        if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]:
            self._bos = first

    def chunk(self, chunk: Chunk) -> ChunkResult:
        """Return the samples and counts of a chunk."""
        counts, packed, marks = Counts(), [], []
        examples: list[tuple[int, Conversation]] = []
        read: list[tuple[int, Example, list[Planned]]] = []
        for line, row in chunk.parsed():
            counts.rows_total += 1
            with self._counted(chunk, line, counts):
                read.append((line, *self._planned(row, padded=chunk.padded)))
        # One call for the whole chunk: the tokenizer's threads share it.
        if self.format.name == "text":
            texts = [example.text for _, example, _ in read if example.text is not None]
        else:
            texts = [sequence.text for _, _, planned in read for sequence in planned]
        self.coder.prefetch(texts, as_text=self.format.name == "text")
        for line, example, planned in read:
            made: list[Packed] = []
            with self._counted(chunk, line, counts):
                made = self._samples(example, planned, counts)
            if not made:
                continue
            counts.unread(line, example.unread)
            packed.extend(made)
            asked, whole, said = self._look(example, line, counts)
            content = _hash(whole)
            marks.append((line, content, _hash(asked), _hash_of(made), signature(said), len(made)))
            if example.text is None and self._may_be_kept(content):
                examples.append((content, _conversation(example)))
        kept = heapq.nsmallest(KEEP_EXAMPLES, examples, key=lambda item: item[0])
        return ChunkResult(*flattened(packed), _marks(marks), counts, kept)

    @contextlib.contextmanager
    def _counted(self, chunk: Chunk, line: int, counts: Counts) -> Iterator[None]:
        """Count a row that cannot be used under its reason."""
        where = f"{chunk.file}: " if chunk.file else ""
        try:
            yield
        except (BadRowError, UnusableRowError) as error:
            counts.drop(line, error.reason, f"{where}{error}")
        except TemplateRefusedError as error:
            counts.drop(line, "template_refused", f"{where}{error}")
        except RecursionError:
            counts.drop(line, "bad_json", f"{where}lists or objects nested too deep")

    def _planned(self, row: Any, *, padded: bool) -> tuple[Example, list[Planned]]:
        """Return a row as an example, and the sequences that it becomes."""
        if isinstance(row, Bad):
            raise BadRowError(row.reason, row.message)
        heading = self.template.input_heading
        example = convert(row, self.format, input_heading=heading, padded=padded)
        if example.text is not None:
            return example, []
        example = self._bounded(example)
        return example, plan_turns(
            self.coder,
            example.messages,
            example.tools,
            train_all=self.settings.train_on == "everything",
            last_only=self.settings.turns == "last",
        )

    def _may_be_kept(self, key: int) -> bool:
        """Whether `key` is among the smallest KEEP_EXAMPLES of this maker's rows so far; only
        those travel on.
        """
        if len(self._kept_keys) == KEEP_EXAMPLES and -key < self._kept_keys[0]:
            return False
        push = heapq.heappush if len(self._kept_keys) < KEEP_EXAMPLES else heapq.heappushpop
        push(self._kept_keys, -key)
        return True

    def _samples(
        self, example: Example, planned: Sequence[Planned], counts: Counts
    ) -> list[Packed]:
        if example.text is not None:
            return [self._document(example.text, counts)]
        sequences = [encode_planned(self.coder, sequence) for sequence in planned]
        made = [self._fitted(sequence, counts) for sequence in sequences]
        kept = [sample for sample in made if sample is not None]
        if not kept:
            limit = self.settings.max_seq_length
            if self.settings.over_long == "drop" and any(
                len(s.input_ids) > limit for s in sequences
            ):
                raise UnusableRowError(
                    "over_long", f"{len(sequences[0].input_ids)} tokens, max_seq_length is {limit}"
                )
            raise UnusableRowError(
                "answer_cut_off",
                f"the prompt alone fills max_seq_length {limit}: truncation leaves nothing of "
                "the answer to train on",
            )
        counts.unrolled += len(kept) > 1
        if len(kept) > 1:
            counts.unrolled_tokens += sum(len(sample.tokens) for sample in kept)
            counts.one_pass_tokens += max(len(sample.tokens) for sample in kept)
        counts.lossy += any(s.lossy for s in sequences)
        counts.tools_left_out += bool(example.tools) and not self.template.writes_tools
        answers = [m for m in example.messages if m["role"] == "assistant"]
        counts.turns += len(answers)
        counts.reasoning_turns += sum(bool(m.get("reasoning_content")) for m in answers)
        return kept

    def _bounded(self, example: Example) -> Example:
        """Return a conversation without what surely lies behind max_seq_length, so that a row of
        30 MB costs no more than one that just fills it.

        A token is at most as long as the longest of the vocabulary, so what lies behind
        `max_seq_length` times this many characters cannot be among the tokens that are kept.
        """
        limit = self.settings.max_seq_length
        lengths = [len(message["content"]) for message in example.messages]
        if sum(lengths) < limit * 16:
            return example
        if self._longest_token is None:
            vocabulary = self.coder.backend.get_vocab()
            self._longest_token = max(map(len, vocabulary), default=1)
        most = limit * max(self._longest_token, 16)
        if sum(lengths) <= most + 1:
            return example
        if self.settings.over_long == "drop":
            raise UnusableRowError(
                "over_long", f"{sum(lengths):,} characters; max_seq_length is {limit} tokens"
            )
        kept, room = [], most
        for message, length in zip(example.messages, lengths, strict=True):
            if length > room:
                if message["role"] == "assistant":
                    kept.append({**message, "content": message["content"][: room + 1]})
                break
            kept.append(message)
            room -= length
        if not any(m["role"] == "assistant" and m.get("weight", 1) != 0 for m in kept):
            raise UnusableRowError(
                "answer_cut_off",
                f"the prompt alone has more than {most:,} characters, which fills max_seq_length "
                f"{limit}: truncation leaves nothing of the answer to train on",
            )
        return dataclasses.replace(example, messages=kept)

    def _fitted(self, sequence: Encoded, counts: Counts) -> Packed | None:
        """Cut an over-long sequence, or return None where it is dropped or nothing trained would
        be left.
        """
        limit, ids, labels = self.settings.max_seq_length, sequence.input_ids, sequence.labels
        if len(ids) > limit:
            counts.over_long += 1
            if self.settings.over_long == "drop":
                return None
            counts.truncated += 1
            counts.truncated_tokens += len(ids) - limit
            ids, labels = ids[:limit], labels[:limit]
        packed = Packed.of(ids, labels)
        return packed if len(packed.trained) else None

    def _document(self, text: str, counts: Counts) -> Packed:
        """A plain text as BOS (where the tokenizer has one) + its tokens + EOS; cut or joined
        later.
        """
        ids = self.coder.text_ids(text)
        if not ids or not text.strip():
            raise UnusableRowError("empty_text", "the text is empty")
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids = [*self._bos, *ids, *eos]
        limit = self.settings.max_seq_length
        if len(ids) > limit and self.settings.long_text != "split":
            counts.over_long += 1
            if self.settings.long_text == "drop":
                raise UnusableRowError("over_long", f"{len(ids)} tokens, max_seq_length is {limit}")
            counts.truncated += 1
            counts.truncated_tokens += len(ids) - limit
            ids = ids[:limit]
        return Packed.of(ids, ids)

    def _look(self, example: Example, line: int, counts: Counts) -> tuple[str, str, str]:
        """Count what a person should know about the texts; return what is asked, the whole, and it
        without system.

        All three are normalised. One system prompt for all rows would make them near-duplicates of
        each other.
        """
        texts = (
            [example.text] if example.text is not None else [_text_of(m) for m in example.messages]
        )
        joined = "\n".join([*texts, str(example.tools)] if example.tools else texts)
        counts.control_characters += _CONTROL.search(joined) is not None
        counts.special_token_text += self.template.mentions_control(joined)
        if self.settings.check_secrets and _MAYBE_SECRET.search(joined):
            found = {str(match.lastgroup) for match in _ANY_SECRET.finditer(joined)}
            for group in found:
                kind = list(SECRETS)[int(group[1:])]
                counts.secrets[kind] = counts.secrets.get(kind, 0) + 1
            counts.secret_rows += bool(found)
            if found and len(counts.secret_lines) < KEEP_LINES:
                counts.secret_lines.append(line)
        if example.text is not None:
            whole = normalised(joined)
            return whole, whole, whole
        # In parts, each once: normalising does not reach over the line feeds between them.
        first = int(example.messages[0]["role"] == "system")
        system, asked, answer = (
            normalised("\n".join(part)) for part in (texts[:first], texts[first:-1], texts[-1:])
        )
        said = f"{asked} {answer}".strip()
        return f"{system} {asked}".strip(), f"{system} {said}".strip(), said


def _text_of(message: dict[str, Any]) -> str:
    """All that is said in a message: reasoning, content and tool calls."""
    reasoning = message.get("reasoning_content")
    text = f"{reasoning}\n{message['content']}" if reasoning else message["content"]
    return text + str(message.get("tool_calls") or "")


def normalised(text: str) -> str:
    """Return `text` without differences that do not matter: compatibility forms, case, runs of
    white space.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split()).casefold()


def signature(text: str) -> np.ndarray:
    """Return 16 min-hashes (uint32) of the 5-character shingles; the share that agrees estimates
    Jaccard similarity.

    Broder, "On the resemblance and containment of documents" (1997).
    """
    codes = np.frombuffer(
        text[:20_000].ljust(_SHINGLE).encode("utf-32-le", "surrogatepass"), dtype=np.uint32
    )
    count = len(codes) - _SHINGLE + 1
    rolled = codes[:count].astype(np.uint64)
    for i in range(1, _SHINGLE):
        rolled *= np.uint64(0x100000001B3)
        rolled += codes[i : count + i]
    # (16, shingles), modulo 2^64: the minimum runs along memory, ten times as fast as across it.
    mixed = rolled[None] * _MULTIPLIERS[:, None]
    mixed += _OFFSETS[:, None]
    return (mixed.min(axis=1) >> np.uint64(32)).astype(np.uint32)


_RANDOM = np.random.default_rng(20260101)
_MULTIPLIERS = _RANDOM.integers(1, 2**63, SIGNATURE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _RANDOM.integers(0, 2**63, SIGNATURE, dtype=np.uint64)


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _conversation(example: Example) -> Conversation:
    last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
    prompt = [{k: v for k, v in m.items() if k != "weight"} for m in example.messages[:last]]
    return Conversation(prompt, example.messages[last]["content"], example.tools)


def _hash_of(samples: list[Packed]) -> int:
    total = hashlib.blake2b(digest_size=8)
    for sample in samples:
        for name in ARRAYS:
            total.update(getattr(sample, name).tobytes())
            total.update(b"|")
    return int.from_bytes(total.digest(), "little")


def _marks(rows: list[tuple[int, int, int, int, np.ndarray, int]]) -> RowMarks:
    lines, content, asked, exact, signatures, samples = (
        zip(*rows, strict=True) if rows else ([] for _ in range(6))
    )
    return RowMarks(
        np.array(lines, np.uint64), np.array(content, np.uint64), np.array(asked, np.uint64),
        np.array(exact, np.uint64),
        np.array(signatures, np.uint32).reshape(-1, SIGNATURE), np.array(samples, np.int64),
    )  # fmt: skip
