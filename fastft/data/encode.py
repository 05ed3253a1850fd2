r"""From messages to token ids and a mask that is proven, sample by sample.

What is trained is defined by generation: for the assistant's message i, the template is asked for
the prompt before it (`P`, with the generation prompt) and for the conversation through it. What
follows `P` there, up to the token that ends the turn, is trained (where the two do not begin
alike: turns.py):

    text    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>
            |---------------- P --------------------------------||-- trained ----|
    labels  -100 ...                                              ids of the trained tokens

No marker string is searched for. The end of the turn is found by rendering an answer made of a
private-use character and looking at what the template writes after it. The proof decodes the
trained tokens and compares.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastft.data.template import (
    TRAINING_DATE,
    ChatTemplate,
    Message,
    Messages,
    UnusableRowError,
)
from fastft.data.turns import Found, Turn, read_turn
from fastft.errors import FastFTError

IGNORE = -100
_GUARD = (
    0xF1000  # private use, plane 15: stands for a control token that somebody wrote into a text
)


@dataclasses.dataclass
class Encoded:
    """One sequence: ids (L,), labels (L,) of the tokens themselves (-100: no loss), the texts that
    are trained.
    """

    input_ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    answers: list[str]
    lossy: bool = False
    """Whether the tokenizer lacks characters of the answer (they became its unknown token)."""


class Coder:
    """A fast tokenizer used without its surprises: no BOS added, no truncation, guards resolved."""

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise FastFTError(
                f"{type(tokenizer).__name__} is no fast tokenizer (no tokenizer.json): token "
                "positions are not known. "
                "Convert it once: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        self.tokenizer, self.template = tokenizer, template
        self.backend = tokenizer.backend_tokenizer
        self.controls = sorted(template.control_tokens, key=len, reverse=True)
        self.guards = {token: chr(_GUARD + i) for i, token in enumerate(self.controls)}
        last = chr(_GUARD + max(len(self.controls) - 1, 0))
        self.guard_pattern = re.compile(f"[{chr(_GUARD)}-{last}]")
        self.unguard_table = {ord(char): token for token, char in self.guards.items()}
        self._plain_ids: dict[str, list[int]] = {}
        self._suffix_ids: dict[str, list[int]] = {}
        self.found = Found()
        self._prefetched: dict[tuple[str, bool], Any] = {}
        probe = "a  b\n c"
        self.keeps_spaces = (
            self.backend.decode(self.ids(probe), skip_special_tokens=False).strip() == probe
        )

    @classmethod
    def of(cls, tokenizer: Any, template: ChatTemplate) -> Coder:
        """Return the coder of the pair, made once."""
        known = template.__dict__.get("_coder")
        if known is None or known.tokenizer is not tokenizer:
            known = template.__dict__["_coder"] = cls(tokenizer, template)
        return known

    def guard(self, value: Any) -> Any:
        """Return `value` (text, or anything made of texts) with control tokens in it replaced by
        guards.
        """
        if isinstance(value, str):
            if self._is_guarded(value):
                raise UnusableRowError(
                    "special_token_text",
                    "it holds a private-use character (U+F1000 ...) that fastft works with",
                )
            if not self.template.mentions_control(value):
                return value
            return self.template.control_pattern.sub(
                lambda match: self.guards[match.group()], value
            )
        if isinstance(value, dict):
            return {self.guard(key): self.guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard(item) for item in value]
        return value

    def unguard(self, text: str) -> str:
        """Return `text` with the guards replaced by what they stand for."""
        return text.translate(self.unguard_table) if self._is_guarded(text) else text

    def _is_guarded(self, text: str) -> bool:
        return not text.isascii() and self.guard_pattern.search(text) is not None

    def ids(self, text: str) -> list[int]:
        """Return the ids of template text, in which control tokens count."""
        return self._encoding(text).ids

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of somebody's text, in which control tokens are text."""
        return self._encode_as_text(text).ids

    def prefetch(self, texts: Sequence[str], *, as_text: bool = False) -> None:
        """Tokenise many texts in one call, on all cores; later calls for them take the result."""
        if self.backend.truncation is not None:
            self.backend.no_truncation()
        self.backend.encode_special_tokens = as_text
        try:
            made = self.backend.encode_batch(list(texts), add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = False
        keys = [(text, as_text) for text in texts]
        self._prefetched = dict(zip(keys, made, strict=True))

    def _encoding(self, text: str) -> Any:
        known = self._prefetched.pop((text, self.backend.encode_special_tokens), None)
        if known is not None:
            return known
        if self.backend.truncation is not None:  # somebody's earlier call left it on
            self.backend.no_truncation()
        return self.backend.encode(text, add_special_tokens=False)

    def _encode_as_text(self, text: str) -> Any:
        # A switch, not a second tokenizer: a large vocabulary takes 100 MB.
        self.backend.encode_special_tokens = True
        try:
            return self._encoding(text)
        finally:
            self.backend.encode_special_tokens = False

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text, guards resolved."""
        return self.encode_spans(text, [])[0]

    def encode_spans(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text` and, for character spans (in order), their token spans.

        Where a token would reach over the edge of a span (the prompt's last and the answer's first
        character in one token), the text is encoded in two parts: that is what generation sees.
        """
        encoding = self._encoding(text)
        ids = encoding.ids
        token_spans = []
        for start, end in spans:
            first, last = self._edge(encoding, text, start), self._edge(encoding, text, end)
            if first is None or last is None:
                return self._encode_cut(text, spans, start if first is None else end)
            token_spans.append((first, last))
        if self._is_guarded(text):
            return self._resolve(text, ids, encoding.offsets, token_spans)
        return ids, token_spans

    def _edge(self, encoding: Any, text: str, position: int) -> int | None:
        """Return the first token that starts at or after `position`; None where a token reaches
        over it.
        """
        for char in range(position, len(text)):
            token = encoding.char_to_token(char)
            if token is None:
                continue  # white space that the tokenizer drops belongs to no token
            begin, _ = encoding.token_to_chars(token)
            if begin >= position:
                return token
            # Some control tokens take the white space after them (Phi-3's do): the edge lies behind
            # the token.
            swallows = (
                char > position or text[begin:position].strip() in self.template.control_tokens
            )
            return token + 1 if swallows else None
        return len(encoding.ids)

    def _encode_cut(
        self, text: str, spans: Sequence[tuple[int, int]], edge: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode the parts before and after `edge` on their own; the proof finds out where that
        changes the text.
        """
        left, left_spans = self.encode_spans(text[:edge], [s for s in spans if s[1] <= edge])
        rest = [(max(s, edge) - edge, e - edge) for s, e in spans if e > edge]
        right, right_spans = self.encode_spans(text[edge:], rest)
        moved = [(a + len(left), b + len(left)) for a, b in right_spans]
        return left + right, left_spans + moved

    def _resolve(
        self,
        text: str,
        ids: list[int],
        offsets: list[tuple[int, int]],
        spans: list[tuple[int, int]],
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Put the ordinary tokens of a control token's spelling where its guard stands."""
        out: list[int] = []
        moved = [0] * (len(ids) + 1)
        previous = -1
        for token, (start, end) in enumerate(offsets):
            moved[token] = len(out)
            known = self.unguard_table.get(ord(text[start])) if start < end else None
            if known is None:
                if any(ord(char) in self.unguard_table for char in text[start:end]):
                    raise UnusableRowError(
                        "special_token_text",
                        "a control token in the text merges with its neighbours",
                    )
                out.append(ids[token])
            elif start != previous:  # several byte tokens may share one guard
                out.extend(self._spelled(known))
                previous = start
        moved[len(ids)] = len(out)
        return out, [(moved[a], moved[b]) for a, b in spans]

    def _spelled(self, token: str) -> list[int]:
        """Return the ordinary ids of a control token's spelling, as it stands inside a text."""
        if token not in self._plain_ids:
            encoding = self._encode_as_text("\n" + token)
            ids = [i for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > 1]
            self._plain_ids[token] = ids
        return self._plain_ids[token]

    def decode(self, ids: np.ndarray, start: int, end: int) -> str:
        """Return the text of tokens start..end as it stands in the whole (some decoders drop a
        first space).
        """
        before = max(0, start - 8)
        prefix = self.backend.decode(ids[before:start].tolist(), skip_special_tokens=False)
        return self.backend.decode(ids[before:end].tolist(), skip_special_tokens=False)[
            len(prefix) :
        ]

    def same(self, decoded: str, expected: str) -> bool:
        """Whether `decoded` is `expected`, up to what the tokenizer normalises away (NFC, spaces,
        the unknown).
        """
        if decoded == expected:
            return True
        normalizer = self.backend.normalizer
        if normalizer is not None:
            expected = normalizer.normalize_str(expected).replace("▁", " ")
        pair = [unicodedata.normalize("NFC", text) for text in (decoded, expected)]
        if not self.keeps_spaces:
            pair = ["".join(text.split()) for text in pair]
        unknown = self.tokenizer.unk_token
        if unknown and unknown in pair[0]:
            return _fits(pair[0].split(unknown), pair[1])
        return pair[0] == pair[1] or pair[0].lstrip(" ") == pair[1].lstrip(" ")


def encode_turns(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Any] | None = None,
    *,
    train_all: bool = False,
    last_only: bool = False,
) -> list[Encoded]:
    """Return the sequences in which each of the assistant's turns is trained exactly once, the
    longest first.

    Mostly that is one. Where a template writes an earlier turn otherwise than it was generated
    (Qwen3 drops old thinking, gpt-oss ends old turns with another token), that turn is trained in
    a sequence that ends with it. `train_all`: every token carries loss, and there is one sequence.
    `last_only`: of the answers, only the last that may be trained is.
    Raises UnusableRowError with the reason, TemplateRefusedError with the template's words.
    """
    coder = Coder.of(tokenizer, template)
    planned = plan_turns(coder, messages, tools, train_all=train_all, last_only=last_only)
    return [encode_planned(coder, sequence) for sequence in planned]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A sequence before it is tokenised: its text, and the turns of it that are trained (None:
    everything is).
    """

    text: str
    turns: list[Turn] | None
    adds_eos: bool = False


def plan_turns(
    coder: Coder,
    messages: Messages,
    tools: Sequence[Any] | None = None,
    *,
    train_all: bool = False,
    last_only: bool = False,
) -> list[Planned]:
    """Return the sequences of `encode_turns`, rendered and not yet tokenised, so that those of
    many rows can be tokenised in one call.
    """
    guarded = [coder.guard(message) for message in messages]
    tools = coder.guard(list(tools)) if tools else None
    if train_all:
        return [_everything(coder, guarded, tools)]
    trained = [i for i, m in enumerate(guarded) if _is_trained(guarded, i, m)]
    if not trained:
        raise UnusableRowError(
            "no_answer", "no assistant's turn with something before it that could be trained"
        )
    chosen = trained[-1:] if last_only else trained
    left = [read_turn(coder.template, coder.found, guarded, tools, i) for i in chosen]
    sequences = []
    while left:
        last = left.pop()
        text = last.prompt + last.answer
        here = [turn for turn in left if _stands_in(turn, text)]
        left = [turn for turn in left if turn not in here]
        sequences.append(Planned(text, [*here, last], last.adds_eos))
    return sequences


def encode_planned(coder: Coder, planned: Planned) -> Encoded:
    """Tokenise a planned sequence, mask it, and prove it."""
    if planned.turns is None:
        return _encode_everything(coder, planned)
    return _sequence(coder, planned.text, planned.turns)


def prove(
    coder: Coder,
    input_ids: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    answers: Sequence[str],
) -> None:
    """Raise UnusableRowError unless the runs of trained tokens decode to exactly `answers`, in
    order.
    """
    ids, targets = np.asarray(input_ids), np.asarray(labels)
    mask = targets != IGNORE
    edges = np.flatnonzero(
        np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
    ).tolist()
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    wrong = bool((targets[mask] != ids[mask]).any())
    decoded = [coder.decode(ids, a, b) for a, b in runs]
    if len(decoded) != len(answers):
        # answers that follow each other without a token between are one run
        decoded, answers = ["".join(decoded)], ["".join(answers)]
    for got, expected in zip(decoded, answers, strict=True):
        if wrong or not coder.same(got, expected):
            raise UnusableRowError(
                "mask_not_proven",
                f"the trained tokens read {got[-80:]!r}, but the template renders "
                f"{expected[-80:]!r}",
            )


def check_mask(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Messages,
    input_ids: Sequence[int],
    labels: Sequence[int],
    tools: Sequence[Any] | None = None,
) -> None:
    """Raise UnusableRowError unless this mask, whoever made it, is what the template renders for
    the last turns.

    The proof for masks from elsewhere: the answers are rendered anew from `messages`.
    """
    coder = Coder.of(tokenizer, template)
    expected = encode_turns(tokenizer, template, messages, tools)[0]
    prove(coder, input_ids, labels, expected.answers)


def _is_trained(messages: Messages, index: int, message: Message) -> bool:
    """The assistant's messages, unless they have weight 0 or nothing stands before them that asks
    for them.
    """
    asked = any(m["role"] != "system" for m in messages[:index])
    return message["role"] == "assistant" and message.get("weight", 1) != 0 and asked


def _stands_in(turn: Turn, text: str) -> bool:
    return (
        not turn.adds_eos
        and text.startswith(turn.prompt)
        and text.startswith(turn.answer, len(turn.prompt))
    )


def _sequence(coder: Coder, text: str, turns: list[Turn]) -> Encoded:
    """Encode `text` with the answers of `turns` trained, and prove it."""
    spans = [(len(t.prompt), len(t.prompt) + len(t.answer)) for t in turns]
    ids, token_spans = coder.encode_spans(text, spans)
    answers = [coder.unguard(turn.answer) for turn in turns]
    if turns[-1].adds_eos and coder.tokenizer.eos_token_id is not None:
        token_spans.append((len(ids), len(ids) + 1))
        ids = [*ids, coder.tokenizer.eos_token_id]
        answers[-1] += coder.tokenizer.eos_token
    input_ids = np.array(ids, np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    for first, last in token_spans:
        labels[first:last] = input_ids[first:last]
    _prove_prompt(coder, turns[-1].prompt, input_ids, token_spans[len(turns) - 1][0])
    prove(coder, input_ids, labels, answers)
    unknown = coder.tokenizer.unk_token_id
    return Encoded(
        input_ids, labels, answers, lossy=unknown is not None and bool((labels == unknown).any())
    )


def _prove_prompt(coder: Coder, prompt: str, ids: np.ndarray, first: int) -> None:
    """The tokens before the answer are those that generation is asked with (from the last control
    token on).
    """
    controls = list(coder.template.control_pattern.finditer(prompt))
    suffix = prompt[controls[-1].start() :] if controls else prompt
    expected = coder._suffix_ids.get(suffix)
    if expected is None:
        expected = coder.encode(suffix)
        if len(suffix) < 200 and len(coder._suffix_ids) < 1000:
            coder._suffix_ids[suffix] = expected
    if ids[max(0, first - len(expected)) : first].tolist() != expected:
        raise UnusableRowError(
            "prompt_not_proven",
            f"the tokens of {suffix[-60:]!r} differ between training and generation",
        )


def _everything(coder: Coder, messages: Messages, tools: Sequence[Any] | None) -> Planned:
    """One sequence with loss on every token (`train_on: everything`)."""
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        turn = read_turn(coder.template, coder.found, messages, tools, len(messages) - 1)
        return Planned(turn.prompt + turn.answer, None, turn.adds_eos)
    return Planned(coder.template.render(messages, tools), None)


def _encode_everything(coder: Coder, planned: Planned) -> Encoded:
    ids = coder.encode(planned.text)
    answer = coder.unguard(planned.text)
    if planned.adds_eos and coder.tokenizer.eos_token_id is not None:
        ids, answer = [*ids, coder.tokenizer.eos_token_id], answer + coder.tokenizer.eos_token
    input_ids = np.array(ids, np.int32)
    prove(coder, input_ids, input_ids, [answer])
    return Encoded(input_ids, input_ids.copy(), [answer])


def _fits(parts: list[str], text: str) -> bool:
    """Whether `text` begins with the first part, ends with the last, and holds the others in
    order.
    """
    if not text.startswith(parts[0]) or not text.endswith(parts[-1]):
        return False
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def generation_prompt(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Any] | None = None,
    *,
    thinking: bool | None = None,
    date: datetime.date = TRAINING_DATE,
) -> list[int]:
    """Return the ids that ask for an answer to `messages`: exactly those that stand before a
    trained answer.

    `thinking` None: as it was trained. A special token spelled out in a message is text.
    """
    coder = Coder.of(tokenizer, template)
    guarded = [coder.guard(message) for message in messages]
    return coder.encode(template.render(guarded, tools, prompt=True, thinking=thinking, date=date))


def encode_conversation(
    tokenizer: Any, template: ChatTemplate, messages: Messages, tools: Sequence[Any] | None = None
) -> tuple[list[int], list[int]]:
    """Return `(input_ids, labels)` of the conversation up to its last answer; labels are -100
    where there is no loss.

    A template may write an earlier turn differently once it is history (without its thinking,
    say). Such a turn is not trained here but in a sequence of its own: see `encode.encode_turns`,
    which returns them all.
    """
    last = encode_turns(tokenizer, template, messages, tools)[0]
    return last.input_ids.tolist(), last.labels.tolist()
