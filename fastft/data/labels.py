"""Data that is no list of answers to learn: preferences, KTO labels, scores, classes, pictures.

Trained as if it were, a model would learn the rejected answers too. Such data is named for what it
is, with the way out: `data.take: chosen`, `data.columns`, or `data.ignore`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastft.data.messages import MEDIA, BadRowError, as_list
from fastft.errors import FastFTError

_CHOSEN = re.compile(
    r"(chosen|preferred|accepted|winner|winning)(_\w+)?|response_j|\w+_chosen", re.IGNORECASE
)
_REJECTED = re.compile(
    r"(rejected|reject|dispreferred|loser|losing)(_\w+)?|response_k|\w+_rejected", re.IGNORECASE
)
_BETTER = re.compile(r"(better|preferred|chosen|best)_(response_)?(id|index|idx)", re.IGNORECASE)
_NUMBERED = re.compile(r"(response|answer|output|completion)_(\d|a|b)", re.IGNORECASE)
_KTO = re.compile(r"label|kto_tag|kto_label|is_good|is_chosen|desirable|thumbs_?up", re.IGNORECASE)
_SCORE = re.compile(r"(\w+_)?(score|reward|rating)s?(_\w+)?|helpfulness|correctness", re.IGNORECASE)
_CLASS = re.compile(r"labels?|class|sentiment|intent|label_text", re.IGNORECASE)
_GOOD = {True, "true", "1", "good", "desirable", "chosen", "yes", "positive"}
_BAD = {False, -1, "false", "0", "-1", "bad", "undesirable", "rejected", "no", "negative"}
_ANSWERS = re.compile(
    r"completion|answers?|response|output|messages|conversations?|contents|assistant"
    r"|回答|応答|出力|答え", re.IGNORECASE
)  # fmt: skip
_TURN = re.compile(r"(?:^|\n)[ \t]*(Human|Assistant|User)[ \t]*:[ \t]*", re.IGNORECASE)
_TAKE = "Set data.take: chosen to train on the good answers alone"


class LabelledDataError(FastFTError):
    """The data is no list of answers to learn, and nobody said what to take of it."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the columns of a dataset label, and what is taken of it."""

    kind: str = "none"
    """none, pairs (chosen and rejected), numbered (answers and the better one's number), kto."""
    chosen: str | None = None
    dropped: tuple[str, ...] = ()

    def apply(self, row: Any) -> Any:
        """Return the row with the good answer as its answer. Raises BadRowError for a row without
        one.
        """
        if self.kind == "none" or not isinstance(row, Mapping):
            return row
        rest = {k: v for k, v in row.items() if k not in self.dropped and k != self.chosen}
        if self.kind == "kto":
            if _told(row.get(self.chosen or "")) is not True:
                raise BadRowError("not_chosen", "the label calls this answer a bad one")
            return rest
        if self.kind == "numbered":
            return {**rest, "completion": _numbered(row, str(self.chosen), self.dropped)}
        return rest if self.chosen is None else _with_answer(rest, row.get(self.chosen))


def find_labels(
    rows: Sequence[Any],
    *,
    take: str | None,
    ignore: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    wants: str = "auto",
    must_take: bool = True,
) -> Labels:
    """Return what the first rows label. `columns` is data.columns; `wants` is data.format;
    `must_take` False: without labels, `take` changes nothing.

    Raises LabelledDataError, which says what the data is and what to do, unless `take` or `ignore`
    chose already.
    """
    objects = [row for row in rows if isinstance(row, Mapping)]
    values: dict[str, list[Any]] = {}
    for row in objects:
        for key, value in row.items():
            if value is not None and str(key) not in ignore:
                values.setdefault(str(key), []).append(value)
    most = {name for name, seen in values.items() if 2 * len(seen) > len(objects)}
    free = [name for name in values if name not in (columns or {}).values()]
    _refuse_media(free, most, values)
    answer_named = any(_ANSWERS.fullmatch(name) for name in columns or {})
    found = _pairs(free, answer_named, values, take) or _marks(free, most, values, take)
    if found is None and wants in ("auto", "text"):
        _refuse_classes(free, values)
    if found is None and take is not None and must_take:
        raise LabelledDataError(
            f"data.take: {take}, but no column says which answers are chosen. The columns: "
            f"{', '.join(values) or '(none)'}. Remove data.take, or name the answer with "
            "data.columns."
        )
    return found or Labels()


def _refuse_media(names: list[str], most: set[str], values: Mapping[str, list[Any]]) -> None:
    media = [n for n in names if MEDIA.match(n.lower()) and n in most and any(values[n])]
    if media:
        raise LabelledDataError(
            f"this is a set of pictures, sound or video: the column {media[0]} of most rows holds "
            "some. fastft trains on text only: take those columns and the rows that need them out "
            f"of the file, or, where the text alone makes sense, set data.ignore: [{media[0]}]."
        )


def _pairs(
    names: list[str], answer_named: bool, values: Mapping[str, list[Any]], take: str | None
) -> Labels | None:
    better = next((n for n in names if _BETTER.fullmatch(n)), None)
    chosen = next((n for n in names if _CHOSEN.fullmatch(n) and n != better), None)
    rejected = tuple(n for n in names if _REJECTED.fullmatch(n))
    both = [n for n in names if n.lower() in ("output", "outputs", "responses", "completions")
            and all(isinstance(v, list | tuple) for v in values[n])]  # fmt: skip
    numbered = tuple(n for n in names if _NUMBERED.fullmatch(n))
    if not (rejected or chosen or len(numbered) > 1 or both):
        return None
    if answer_named:
        return Labels()  # data.columns says which one is meant
    what = chosen or next(iter(rejected or numbered or both))
    if take is None or (numbered and better is None and not chosen):
        fix = f"{_TAKE}, or name" if take is None and not (numbered and not better) else "Name"
        raise LabelledDataError(
            "this is a preference set (DPO): "
            f"{', '.join(dict.fromkeys([what, *rejected, *numbered]))} hold better and worse "
            f"answers, and plain fine-tuning would learn both alike. {fix} the answer to learn, "
            f"for example data.columns: {{prompt: {_asking(names)}, completion: {what}}}."
        )
    if numbered and better:
        return Labels("numbered", better, numbered)
    scores = tuple(n for n in names if _SCORE.fullmatch(n))
    return Labels("pairs", chosen or (both[0] if both and not rejected else None),
                  (*rejected, *scores))  # fmt: skip


def _marks(
    names: list[str], most: set[str], values: Mapping[str, list[Any]], take: str | None
) -> Labels | None:
    """Find KTO labels and scores beside answers."""
    if not any(_ANSWERS.fullmatch(n) for n in values):
        return None
    kto = next(
        (n for n in names if _KTO.fullmatch(n) and n in most
         and all(_told(v) is not None for v in values[n])), None
    )  # fmt: skip
    if kto is not None:
        if take is None:
            good = sum(_told(v) is True for v in values[kto])
            raise LabelledDataError(
                f"this is a set of judged answers (KTO): {kto} calls {good} of the first "
                f"{len(values[kto])} answers good, and plain fine-tuning would learn the others "
                f"too. {_TAKE}, or data.ignore: [{kto}] to train on every row."
            )
        return Labels("kto", kto)
    scored = next(
        (n for n in names if (_SCORE.fullmatch(n) or _KTO.fullmatch(n)) and n in most
         and all(_is_number(v) for v in values[n])), None
    )  # fmt: skip
    if scored is not None:
        raise LabelledDataError(
            f"the answers of this set are judged: {scored} is a number in most rows, for example "
            f"{values[scored][0]!r:.40}, and plain fine-tuning would learn good and bad ones "
            "alike. Keep the rows that you want to learn in a file of their own, or set "
            f"data.ignore: [{scored}] to train on every row."
        )
    return None


def _refuse_classes(names: list[str], values: Mapping[str, list[Any]]) -> None:
    """Refuse a text and its class: no answer is asked for and none is given."""
    if any(_ANSWERS.fullmatch(n) for n in values):
        return
    label = next((n for n in names if _CLASS.fullmatch(n)), None)
    texts = [n for n in names if n != label and any(isinstance(v, str) for v in values[n])]
    if label is None or not texts or any(isinstance(v, str) and len(v) > 40 for v in values[label]):
        return
    raise LabelledDataError(
        f"this is a classification set: {label} is the class of {texts[0]} (for example "
        f"{values[label][0]!r:.40}). Training on {texts[0]} alone would never learn it. Write the "
        "task as question and answer, with the class in words, or map it with data.columns: "
        f"{{prompt: {texts[0]}, completion: {label}}}; to train on the texts alone, set "
        f"data.ignore: [{label}]."
    )


def _told(value: Any) -> bool | None:
    """Whether a label says good (True) or bad (False); None where it says something else."""
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | float | bool):
        return None
    return True if key in _GOOD else False if key in _BAD else None


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(v, int | float) for v in value)
    return isinstance(value, int | float)


def _asking(names: list[str]) -> str:
    known = ("prompt", "question", "instruction", "query", "input", "messages")
    return next((n for n in names if n.lower() in known), "YOUR_QUESTION")


def _numbered(row: Mapping[str, Any], better: str, answers: tuple[str, ...]) -> Any:
    number = row.get(better)
    chosen = next((a for a in answers if a.rsplit("_", 1)[1] == str(number).strip().lower()), None)
    if chosen is None:
        raise BadRowError("not_chosen", f"{better} is {number!r:.40}, which names no answer")
    return row.get(chosen)


def _with_answer(row: dict[Any, Any], chosen: Any) -> dict[Any, Any]:
    """Put the chosen answer where the other columns of the row ask for it."""
    listed = next((k for k in ("messages", "conversations", "conversation") if row.get(k)), None)
    if isinstance(chosen, list | tuple) and chosen and isinstance(chosen[0], str):
        chosen = chosen[0]  # [better, worse]
    if isinstance(chosen, Mapping) or (
        isinstance(chosen, list | tuple) and all(isinstance(c, Mapping) for c in chosen)
    ):
        turns = [chosen] if isinstance(chosen, Mapping) else list(chosen)
        asked = any(t.get("role", t.get("from")) in ("user", "human") for t in turns)
        if listed and not asked:
            return {**row, listed: [*as_list(row[listed], listed), *turns]}
        if asked:
            return {k: v for k, v in row.items() if k != "prompt"} | {"messages": turns}
        prompt = row.pop("prompt", row.pop("question", None))
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return {**row, "messages": [*before, *turns]}
    if listed:
        return {
            **row,
            listed: [*as_list(row[listed], listed), {"role": "assistant", "content": chosen}],
        }
    if isinstance(chosen, str) and not _asks(row):
        return {**row, "messages": _transcript(chosen)}
    return {**row, "output" if "instruction" in row else "completion": chosen}


def _asks(row: Mapping[Any, Any]) -> bool:
    return any(str(k).lower() in ("prompt", "question", "instruction", "query", "input", "指示",
                                  "質問") for k in row)  # fmt: skip


def _transcript(text: str) -> list[dict[str, str]]:
    """Return the turns of a text that is written as `Human: ... Assistant: ...`."""
    parts = _TURN.split(text)
    turns = [
        {"role": "assistant" if role.lower() == "assistant" else "user", "content": said.strip()}
        for role, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if len(turns) < 2 or parts[0].strip():
        raise BadRowError("no_prompt", "the chosen answer has nothing before it that asks for it")
    return turns
