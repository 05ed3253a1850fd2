"""`prepare`: from the data section of a config to tokenised, masked, proven samples and the report
on them.

    source -> chunks of rows -> (worker) samples -> store -> groups of duplicates -> train and eval
    -> report

Nothing but hashes of the rows and a few raw conversations is kept in memory; the samples are in
memory where the source is small and in files of the cache, read sample by sample, where it is
large.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastft.config import DataConfig
from fastft.data import cache
from fastft.data import split as splitting
from fastft.data.encode import IGNORE
from fastft.data.formats import Format, FormatError, detect, listed
from fastft.data.labels import LabelledDataError
from fastft.data.light import light
from fastft.data.mix import each_config, mix
from fastft.data.read import Bad, Source, open_rows, open_source
from fastft.data.report import DataReport, Dropped, ReportSample, many, sizes
from fastft.data.rows import KEEP_EXAMPLES, Conversation, Counts, RowMaker, RowMarks, Settings
from fastft.data.store import Packed, TokenDataset, Writer, in_memory
from fastft.data.template import ChatTemplate, choose_template
from fastft.data.workers import map_in_order
from fastft.errors import FastFTError

VERSION = 4
"""Part of the fingerprint: raised where the same rows become other samples."""
SMALL_BYTES = 32 << 20
"""Sources up to this size are tokenised here and held in memory; larger ones in workers, into the
cache.
"""
LOOKED_AT = 200


@dataclasses.dataclass
class Prepared:
    """What training needs to know of its data."""

    train: TokenDataset
    eval: TokenDataset | None
    report: DataReport
    template: ChatTemplate
    fingerprint: str
    held_out: list[Conversation]
    """A few raw conversations: of the held-out rows, or of the training rows where nothing is held
    out.
    """

    def eval_conversations(self, count: int) -> list[Conversation]:
        """Return up to `count` raw samples: the messages before the last answer, and that answer
        for reference.
        """
        return self.held_out[:count]


@dataclasses.dataclass
class _Side:
    """One source, tokenised: all its samples, and what was counted."""

    samples: TokenDataset
    marks: RowMarks
    counts: Counts
    examples: list[tuple[int, Conversation]]
    format: Format
    source: Source


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    max_seq_length: int,
    seed: int = 0,
    cache_dir: Path | None = None,
    project_secrets_check: bool = True,
    processes: int | None = None,
    rows: Any = None,
) -> Prepared:
    """Read, tokenise, mask, prove and split the data of `config`. The order of samples is the
    source's.

    `seed` decides what is drawn where there are several sources with weights, and nothing else:
    the split depends on the content only. `rows` (a list, or a `datasets.Dataset`)
    are read instead of the config's source.
    Large data is kept below `cache_dir` (default: FASTFT_CACHE or ~/.cache/fastft),
    found again by its fingerprint. Raises FastFTError where nothing can be trained on, or, with
    `strict`, where any row cannot.
    """
    if config.sources and rows is None:
        one = functools.partial(
            prepare,
            tokenizer=tokenizer,
            max_seq_length=max_seq_length,
            cache_dir=cache_dir,
            project_secrets_check=project_secrets_check,
            processes=processes,
        )
        parts = [one(each) for each in each_config(config)]
        mixed = mix(config.sources, parts, seed)
        _timed(mixed.report, sum(part.report.seconds for part in parts))
        return mixed
    started = time.perf_counter()
    template = choose_template(tokenizer, config.chat_template)
    ways = (config.train_on, config.long_text, config.over_long)
    settings = Settings(max_seq_length, *ways, project_secrets_check, config.turns)
    source, own_eval = _opened(config, rows)
    fingerprint = _fingerprint(config, tokenizer, template, settings, source, own_eval)
    large = config.streaming or source.size is None or source.size > SMALL_BYTES
    folder = _cache_folder(cache_dir) / fingerprint[:16] if large else None
    damage = None
    if folder is not None and folder.is_dir():
        damage = cache.problem(folder)
        if damage is None:
            return _from_cache(folder, template, fingerprint)
    processes = processes or ((os.cpu_count() or 1) if large else 1)
    tokenise = functools.partial(_tokenise, config, tokenizer, template, settings, processes)
    with cache.WorkFolder(folder) as work:
        main = tokenise(source, work and work / "samples")
        other = None
        if own_eval is not None:
            other = tokenise(own_eval, work and work / "eval_samples", is_eval=True)
        prepared = _divide(config, template, settings, main, other, fingerprint, work)
        _timed(prepared.report, time.perf_counter() - started)
        if damage is not None:
            prepared.report.notices.append(
                f"the tokenised data in {folder} was not whole ({damage}) and was made anew"
            )
        if work is not None:
            _keep(work, prepared)
    if folder is not None:
        return dataclasses.replace(
            _from_cache(folder, template, fingerprint), report=prepared.report
        )
    return prepared


def _opened(config: DataConfig, rows: Any) -> tuple[Source, Source | None]:
    """Return the source, or `rows` in its place, and the eval source where there is one."""
    given = functools.partial(
        open_source, name=config.name, split=config.split, documents=config.documents
    )
    if rows is None:
        source = given(config.source, streaming=config.streaming)
    else:
        source = open_rows(rows)
    return source, given(config.eval_source) if config.eval_source else None


def _timed(report: DataReport, seconds: float) -> None:
    report.seconds = round(seconds, 3)
    report.rows_per_sec = round(report.rows_total / max(seconds, 1e-9), 1)


def _keep(work: Path, prepared: Prepared) -> None:
    """Write what `_from_cache` reads."""
    found = {
        "report": prepared.report.model_dump(),
        "thinking": prepared.template.thinking,
        "held_out": [dataclasses.asdict(c) for c in prepared.held_out],
    }
    cache.write(work, {"train": prepared.train, "eval": prepared.eval}, found)


def _fingerprint(
    config: DataConfig,
    tokenizer: Any,
    template: ChatTemplate,
    settings: Settings,
    source: Source,
    own_eval: Source | None,
) -> str:
    parts = {
        "version": VERSION,
        "content": source.digest(),
        "eval": own_eval.digest() if own_eval else config.eval_fraction,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        if getattr(tokenizer, "is_fast", False)
        else None,
        "template": template.source,
        "format": config.format,
        "columns": config.columns,
        "take": config.take,
        "deduplicate": config.deduplicate,
        **({"strict": True} if config.strict else {}),  # else a cache would hide its refusals
        "documents": config.documents,
        "ignore": sorted(config.ignore),
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "check_secrets"},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _cache_folder(cache_dir: Path | None) -> Path:
    return (
        Path(cache_dir or os.environ.get("FASTFT_CACHE") or "~/.cache/fastft").expanduser() / "data"
    )


def _tokenise(
    config: DataConfig,
    tokenizer: Any,
    template: ChatTemplate,
    settings: Settings,
    processes: int,
    source: Source,
    folder: Path | None,
    *,
    is_eval: bool = False,
) -> _Side:
    """Return the source's samples; raises FastFTError where `_refuse` does."""
    first = _first_rows(source)
    columns = config.columns
    if is_eval and not any(
        c in row for row in first if isinstance(row, dict) for c in columns.values()
    ):
        columns = {}  # the mapping is the training file's; this one has columns of its own
    try:
        format = detect(
            first,
            format=config.format,
            columns=columns,
            take=config.take,
            ignore=config.ignore,
            must_take=not is_eval,
        )
    except (FormatError, LabelledDataError) as error:
        raise FastFTError(f"{source.name}: {error}") from error
    if processes > 1:
        tokenizer = light(tokenizer)
    # A fresh copy of the template: what was cached on it while probing need not travel to the
    # workers.
    maker = _Job(tokenizer, dataclasses.replace(template, tokenizer=tokenizer), format, settings)
    writer = Writer(folder) if folder is not None else None
    flats: list[list[np.ndarray]] = []
    lengths: list[list[np.ndarray]] = []
    marks: list[RowMarks] = []
    counts = Counts()
    examples: list[tuple[int, Conversation]] = []
    for result in map_in_order(maker, source.chunks(), processes):
        if writer:
            writer.add_many(*result.flat, *result.lengths)
        else:
            flats.append(result.flat)
            lengths.append(result.lengths)
        if len(result.marks.lines):
            marks.append(result.marks)
        counts.add(result.counts)
        examples += result.examples
        examples = heapq.nsmallest(KEEP_EXAMPLES, examples, key=lambda item: item[0])
    samples = writer.close() if writer else TokenDataset.joined(flats, lengths)
    side = _Side(samples, RowMarks.joined(marks), counts, examples, format, source)
    _refuse(config, side)
    return side


class _Job:
    """A RowMaker that is made where it works, in the worker."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._maker: RowMaker | None = None

    def chunk(self, chunk: Any) -> Any:
        if self._maker is None:
            self._maker = RowMaker(*self._arguments)
        return self._maker.chunk(chunk)


def _first_rows(source: Source) -> list[Any]:
    """Return the first rows that can be read. Raises where none can."""
    rows: list[Any] = []
    bad: list[str] = []
    for chunk in source.chunks():
        for line, row in chunk.parsed():
            if isinstance(row, Bad):
                bad.append(f"line {line}: {row.message}")
            else:
                rows.append(row)
            if len(rows) >= LOOKED_AT:
                return rows
        if rows and len(bad) + len(rows) >= LOOKED_AT:
            break
    if rows:
        return rows
    if bad:
        raise FastFTError(
            f"{source.name}: none of its {len(bad):,} rows can be read. First: "
            f"{'; '.join(bad[:3])}."
        )
    raise FastFTError(f"{source.name} has no rows.")


def _refuse(config: DataConfig, side: _Side) -> None:
    """Refuse data without a usable row, and with `strict` data with an unusable one."""
    dropped = side.counts.dropped
    used = len(side.marks.lines)
    if used and not (config.strict and dropped):
        return
    reasons = "".join(
        f"\n  - {reason}: {entry['count']:,} rows (lines "
        f"{', '.join(map(str, entry['lines'][:5]))}): {entry['example']}"
        for reason, entry in sorted(dropped.items(), key=lambda item: -item[1]["count"])
    )
    if not used:
        raise FastFTError(
            f"{side.source.name}: no row of {side.counts.rows_total:,} can be trained on "
            f"({side.format.name}: "
            f"{side.format.evidence}).{reasons}"
        )
    raise FastFTError(
        f"{side.source.name}: {side.counts.rows_total - used:,} of {side.counts.rows_total:,} "
        "rows cannot be used, and "
        f"data.strict is on.{reasons}"
    )


def _divide(
    config: DataConfig,
    template: ChatTemplate,
    settings: Settings,
    main: _Side,
    other: _Side | None,
    fingerprint: str,
    work: Path | None,
) -> Prepared:
    if config.deduplicate:
        main = _without_copies(main)
    groups = splitting.group_rows(main.marks)
    held = np.zeros(len(main.marks.lines), bool)
    if not other:
        held = splitting.held_out(main.marks, groups, config.eval_fraction)
    of_sample = np.repeat(held, main.marks.samples)
    train = main.samples[np.flatnonzero(~of_sample)]
    evaluation = main.samples[np.flatnonzero(of_sample)]
    train_marks = main.marks.subset(~held)
    held_marks = other.marks if other else main.marks.subset(held)
    if other:
        evaluation = other.samples
    if main.format.name == "text" and settings.long_text == "split":
        train = _joined_documents(train, settings.max_seq_length, work and work / "train")
    if (other or main).format.name == "text" and settings.long_text == "split":
        evaluation = _joined_documents(evaluation, settings.max_seq_length, work and work / "eval")
    held_pieces = 0
    if main.format.name == "text" and not other and not len(evaluation) and len(train) >= 20:
        # One long document, or a few: the end of it is held out.
        held_pieces = round(len(train) * config.eval_fraction)
        if held_pieces:
            train, evaluation = train[:-held_pieces], train[-held_pieces:]
    reasoned, turns = main.counts.reasoning_turns, main.counts.turns
    thinks = reasoned * 2 >= turns > 0 and reasoned > 0
    template = template.with_thinking(thinks) if main.format.name != "text" else template
    leak = splitting.leaked(train_marks, held_marks) if len(held_marks.lines) else 0
    report = _report(config, template, settings, main, train, evaluation, groups, leak)
    if held_pieces:
        report.notices.append(
            f"the documents are too few to hold some out, so the last {held_pieces:,} pieces of "
            f"{len(train) + held_pieces:,} are held out"
        )
    elif not other and len(evaluation):
        report.notices += splitting.explain_share(held, groups, config.eval_fraction)
    if other:
        report.notices += _eval_notices(other)
    conversations = _conversations(main, other, held)
    if not len(evaluation) and (config.eval_fraction > 0 or other):
        report.notices.append(
            f"nothing is held out: {len(main.marks.lines)} rows are too few for "
            f"{config.eval_fraction}"
        )
    return Prepared(
        train, evaluation if len(evaluation) else None, report, template, fingerprint, conversations
    )


def _without_copies(side: _Side) -> _Side:
    """Return the side without rows that give the same samples as an earlier one."""
    _, first = np.unique(side.marks.exact, return_index=True)
    keep = np.zeros(len(side.marks.exact), bool)
    keep[first] = True
    counts = dataclasses.replace(side.counts, dropped=dict(side.counts.dropped))
    for line in side.marks.lines[~keep].tolist():
        counts.drop(line, "duplicate", "an earlier row gives exactly the same samples")
    samples = side.samples[np.flatnonzero(np.repeat(keep, side.marks.samples))]
    return dataclasses.replace(side, samples=samples, marks=side.marks.subset(keep), counts=counts)


def _joined_documents(documents: TokenDataset, length: int, folder: Path | None) -> TokenDataset:
    samples = join_documents(documents, length)
    if folder is None:
        return in_memory(samples)
    writer = Writer(folder)
    for sample in samples:
        writer.add(sample)
    return writer.close()


def join_documents(documents: TokenDataset, length: int) -> Iterator[Packed]:
    """Yield sequences of at most `length` tokens made of whole and cut documents, one attention
    segment a piece.

        documents   A A A A A A A   B B B      length 6
        sequences   A A A A A A | a A . B B B  -> [6], [2, 3]
        (a: the last token again, for context, without loss)

    Each token of a document carries loss exactly once. A piece that goes on begins with the token
    before it, whose label is masked, so that the cut costs no prediction.
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    room = length
    for number in range(len(documents)):
        tokens = documents[number].input_ids
        at = 0
        while at < len(tokens):
            context = 1 if at else 0
            if room < 2 + context and room < len(tokens) - at + context:
                yield _closed(ids, labels)
                ids, labels, room = [], [], length
            take = min(len(tokens) - at, room - context)
            piece = tokens[at - context : at + take]
            mask = piece.copy()
            mask[:context] = IGNORE
            ids.append(piece)
            labels.append(mask)
            at += take
            room -= len(piece)
            if room == 0:
                yield _closed(ids, labels)
                ids, labels, room = [], [], length
    if ids:
        yield _closed(ids, labels)


def _closed(ids: list[np.ndarray], labels: list[np.ndarray]) -> Packed:
    return Packed.of(np.concatenate(ids), np.concatenate(labels), [len(piece) for piece in ids])


def _conversations(main: _Side, other: _Side | None, held: np.ndarray) -> list[Conversation]:
    if other:
        return [conversation for _, conversation in other.examples]
    of_held = set(main.marks.content[held].tolist())
    chosen = [conversation for key, conversation in main.examples if key in of_held]
    return chosen or [conversation for _, conversation in main.examples]


def _report(
    config: DataConfig,
    template: ChatTemplate,
    settings: Settings,
    main: _Side,
    train: TokenDataset,
    evaluation: TokenDataset,
    groups: splitting.Groups,
    leak: int,
) -> DataReport:
    counts = main.counts
    return DataReport(
        source=main.source.name,
        kind=main.source.kind,
        format=main.format.name,
        evidence=main.format.evidence,
        template=template.name,
        template_why=template.why,
        rows_total=counts.rows_total,
        rows_used=len(main.marks.lines),
        dropped={reason: Dropped(**entry) for reason, entry in counts.dropped.items()},
        truncated=counts.truncated,
        truncated_tokens=counts.truncated_tokens,
        over_long=counts.over_long,
        duplicates=groups.duplicates,
        near_duplicates=groups.near_duplicates,
        leakage=leak,
        max_seq_length=settings.max_seq_length,
        unrolled_tokens=counts.unrolled_tokens,
        one_pass_tokens=counts.one_pass_tokens,
        turns=counts.turns,
        reasoning_turns=counts.reasoning_turns,
        secrets=counts.secrets,
        secret_lines=counts.secret_lines,
        notices=_notices(config, template, main),
        preview=_preview(template, train),
        **sizes(train, evaluation),
    )


def _notices(config: DataConfig, template: ChatTemplate, main: _Side) -> list[str]:
    counts = main.counts
    notices = list(dict.fromkeys(main.source.notices))
    if main.format.unused:
        notices.append(
            f"columns that are not read: {listed(main.format.unused)}; data.columns maps them "
            "where they belong"
        )
    for key, entry in counts.unread_keys.items():
        lines = ", ".join(map(str, entry["lines"][:5]))
        notices.append(
            f"a key of messages that is not read: {key} ({many(entry['count'], 'row')}; lines "
            f"{lines})"
        )
    if main.format.name != "text":
        notices += template.notices
        if template.switch:
            state = "on" if template.thinking else "off"
            notices.append(
                f"this template can think: {counts.reasoning_turns:,} of {counts.turns:,} "
                "answers come with reasoning, "
                f"so thinking is {state} unless it is asked for otherwise"
            )
    if counts.unrolled:
        times = counts.unrolled_tokens / max(counts.one_pass_tokens, 1)
        notices.append(
            f"{many(counts.unrolled, 'conversation')} became several samples: this template "
            "writes earlier answers "
            "differently once they are history, so each answer is trained as it is generated. "
            f"That costs {counts.unrolled_tokens:,} tokens where one pass has "
            f"{counts.one_pass_tokens:,} ({times:.1f} times); data.turns: last trains only the "
            "last answer of each, in one pass"
        )
    copies = len(main.marks.exact) - len(np.unique(main.marks.exact))
    if copies * 10 > len(main.marks.exact):
        notices.append(
            f"{copies:,} of {len(main.marks.exact):,} rows "
            f"({copies / len(main.marks.exact):.0%}) are exact copies of an earlier row, which "
            "is learned more often than the others; data.deduplicate: true removes them"
        )
    said = [
        (
            counts.tools_left_out,
            "with tools, which this template does not write: they are left out",
        ),
        (counts.lossy, "with characters that the tokenizer does not know"),
        (counts.control_characters, "with control characters, which are kept"),
        (counts.special_token_text, "with a special token spelled out, which is read as text"),
    ]
    notices += [f"{many(count, 'row')} {what}" for count, what in said if count]
    if counts.secrets:
        lines = ", ".join(map(str, counts.secret_lines[:5]))
        notices.append(
            f"{many(counts.secret_rows, 'row')} with what looks like a key (lines {lines}); a "
            "model learns keys by heart"
        )
    if config.train_on == "everything":
        notices.append("train_on: everything, so what is asked is trained too")
    return notices


def _eval_notices(other: _Side) -> list[str]:
    """Say of an own evaluation source what the numbers of the report, which are the training
    source's, do not.
    """
    counts, name = other.counts, other.source.name
    notices = [f"eval_source: {notice}" for notice in dict.fromkeys(other.source.notices)]
    if counts.dropped:
        why = "; ".join(
            f"{reason} {entry['count']:,} (lines {', '.join(map(str, entry['lines'][:5]))}): "
            f"{entry['example']}"
            for reason, entry in counts.dropped.items()
        )
        lost = counts.rows_total - len(other.marks.lines)
        notices.append(
            f"eval_source {name}: {lost:,} of {counts.rows_total:,} rows are not used: {why}"
        )
    if counts.truncated:
        notices.append(
            f"eval_source {name}: {counts.truncated:,} samples are cut to max_seq_length"
        )
    return notices


def _preview(template: ChatTemplate, train: TokenDataset) -> list[ReportSample]:
    """Return the first, the middle and the last sample as pieces of text, trained or not."""
    chosen = sorted({0, len(train) // 2, len(train) - 1})
    made = []
    for index in chosen:
        sample = train[index]
        ids, mask = sample.input_ids[:2000], (sample.labels != IGNORE)[:2000]
        edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
        pieces = [
            (template.tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False), bool(mask[a]))
            for a, b in itertools.pairwise(edges)
        ]
        made.append(ReportSample(tokens=len(sample.input_ids), pieces=pieces))
    return made


def _from_cache(folder: Path, template: ChatTemplate, fingerprint: str) -> Prepared:
    datasets, values = cache.read(folder)
    if values["thinking"] is not None:
        template = template.with_thinking(values["thinking"])
    report = DataReport.model_validate(values["report"] | {"cached": True})
    held_out = [Conversation(**c) for c in values["held_out"]]
    return Prepared(
        datasets["train"], datasets.get("eval"), report, template, fingerprint, held_out
    )
