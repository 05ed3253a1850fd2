"""The models that `fastft eval` asks, behind one door: transformers + peft, or llama.cpp."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastft.data.encode import UnusableRowError
from fastft.errors import FastFTError
from fastft.inference.metrics import Likelihood
from fastft.inference.sampling import Sampling
from fastft.verification.questions import Question

if TYPE_CHECKING:
    import numpy as np

BATCH_TOKENS = 8192  # of one generation, prompts and answers together
WINDOW = 2048  # tokens of a long text that are seen at once, where the model can see as many


class Judged(Protocol):
    """A model under examination."""

    name: str
    """base, adapter, model, or the file's name."""
    kind: str
    """base, adapter, model or gguf."""

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Return the greedy answer to each question."""
        ...

    def likelihood(self, question: Question, answer: str) -> Likelihood:
        """Return how probable `answer` is after the question, its end token not counted; of a
        plain text, all of it.
        """
        ...

    def close(self) -> None:
        """Free what nobody else uses."""
        ...


class TransformersJudged:
    """A base, with its adapter or without; both share one loaded model (`HuggingFaceChat`)."""

    def __init__(self, chat: Any, name: str, *, without_adapter: bool = False) -> None:
        self.chat, self.name, self.kind = chat, name, "base" if without_adapter else name
        self.without_adapter = without_adapter

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Return the greedy answers, in padded batches of questions of like length."""
        chat = self.chat
        sizes = []
        for question in questions:
            with _naming(question):
                sizes.append(len(chat.prompt_of(question.messages, question.tools)))
        order = sorted(range(len(questions)), key=lambda i: (sizes[i], i))
        found = [""] * len(questions)
        with self._as_asked():
            while order:
                longest = sizes[order[min(len(order), 64) - 1]] + max_new_tokens
                count = max(1, min(64, BATCH_TOKENS // longest))
                now, order = order[:count], order[count:]
                said = chat.answer_all(
                    [questions[i].messages for i in now],
                    tools=[questions[i].tools for i in now],
                    max_new_tokens=max_new_tokens,
                )
                for i, text in zip(now, said, strict=True):
                    found[i] = text
        return found

    def likelihood(self, question: Question, answer: str) -> Likelihood:
        """See `Judged`. The tokens are those that training would put loss on."""
        ids, first = self._encoded(question, answer)
        most = self._context()
        if question.messages and len(ids) > most:
            raise FastFTError(
                f"line {question.line}: question and answer have {len(ids):,} tokens, the model's "
                f"positions end at {most:,}. Shorten it, or leave it out."
            )
        with self._as_asked():
            if question.messages:
                total = self._log_probability(ids, first)
            else:
                windows = _windows(ids, min(WINDOW, most))
                total = sum(self._log_probability(window, start) for window, start in windows)
        return Likelihood(total, len(ids) - first, len(answer.encode("utf-8")))

    def close(self) -> None:
        """Nothing: base and adapter share one model."""

    def _encoded(self, question: Question, answer: str) -> tuple[list[int], int]:
        """Return (ids, index of the first that is judged)."""
        tokenizer, template = self.chat.tokenizer, self.chat.template
        if not question.messages:
            bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
            start = eos if bos is None else bos
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            return ([start, *ids], 1) if start is not None else (ids, 1)
        from fastft.data.encode import encode_conversation

        spoken = [*question.messages, {"role": "assistant", "content": answer}]
        try:
            ids, labels = encode_conversation(tokenizer, template, spoken, question.tools)
        except UnusableRowError as error:
            raise FastFTError(
                f"line {question.line}: the answer {answer!r:.60} cannot be encoded: {error}"
            ) from error
        trained = [i for i, label in enumerate(labels) if label != -100]
        first = last = trained[-1]
        while first - 1 in trained:
            first -= 1
        while ids[last] not in template.end_token_ids and last > first:
            last -= 1
        end = last if ids[last] in template.end_token_ids else len(ids)
        return ids[:end], first

    def _log_probability(self, ids: list[int], first: int) -> float:
        import torch

        model = self.chat.model
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
            rows = torch.log_softmax(logits[first - 1 : -1].float(), dim=-1)
            chosen = torch.tensor(ids[first:], device=rows.device)[:, None]
            return float(rows.gather(1, chosen).double().sum())

    def _context(self) -> int:
        config = self.chat.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)

    def _as_asked(self) -> contextlib.AbstractContextManager[Any]:
        off = self.without_adapter
        return self.chat.model.disable_adapter() if off else contextlib.nullcontext()


class GgufJudged:
    """A GGUF file in llama.cpp, with its own tokenizer and template."""

    kind = "gguf"

    def __init__(self, path: Path, *, gpu_layers: int | str, n_ctx: int | None) -> None:
        from fastft.inference.llamacpp import GgufChat

        self.name, self.chat = path.name, GgufChat(path, gpu_layers=gpu_layers, n_ctx=n_ctx)
        self.model = self.chat.model

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Return the greedy answers, one after the other."""
        answers, sampling = [], Sampling(max_new_tokens)
        for question in questions:
            with _naming(question):
                said = self.chat.stream(question.messages, sampling, question.tools)
                answers.append("".join(said).strip())
        return answers

    def likelihood(self, question: Question, answer: str) -> Likelihood:
        """See `Judged`."""
        size = len(answer.encode("utf-8"))
        if not question.messages:
            start = self.model.bos if self.model.bos >= 0 else self.model.eos
            text = self.model.tokens(answer, add_special=False, parse_special=False)
            ids = [start, *text] if start >= 0 else text
            parts = list(_windows(ids, min(WINDOW, self.model.n_ctx)))
            total = sum(self._log_probability(part, first) for part, first in parts)
            return Likelihood(total, len(ids) - 1, size)
        before = self.model.chat_tokens(question.messages, tools=question.tools)
        ids = self.model.chat_tokens(question.messages, tools=question.tools, then=answer)
        first = _same(before, ids)
        return Likelihood(self._log_probability(ids, first), len(ids) - first, size)

    def close(self) -> None:
        """Free the model."""
        self.chat.close()

    def _log_probability(self, ids: list[int], first: int) -> float:
        import numpy as np

        total, at = 0.0, 0
        for rows in self.model.logits(ids):  # (some positions, n_vocab)
            for row in rows[: len(ids) - 1 - at]:
                if at + 1 >= first:
                    total += float(row[ids[at + 1]]) - _log_sum_exp(np, row)
                at += 1
        return total


@contextlib.contextmanager
def _naming(question: Question) -> Iterator[None]:
    """Say of which line of the file a FastFTError is."""
    try:
        yield
    except FastFTError as error:
        raise type(error)(f"line {question.line}: {error}") from error


def _log_sum_exp(np: Any, row: np.ndarray) -> float:
    wide = row.astype(np.float64)
    largest = wide.max()
    return float(largest + np.log(np.exp(wide - largest).sum()))


def _same(before: list[int], ids: list[int]) -> int:
    """Return how many ids both begin with, at least 1: the token where the answer begins may be
    merged with what stands before it.
    """
    pairs = zip(before, ids, strict=False)
    return max(1, next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(ids))))


def _windows(ids: list[int], size: int) -> Iterator[tuple[list[int], int]]:
    """Yield (ids of a window, index of the first that is judged): each id but the first is judged
    once, as in lm-eval's rolling likelihood.
    """
    for start in range(0, max(len(ids) - 1, 1), size - 1):
        yield ids[start : start + size], 1


def open_judged(
    target: str | Path,
    *,
    base: str | None,
    dtype: str,
    gpu_layers: int | str,
    n_ctx: int | None,
    with_base: bool,
) -> list[Judged]:
    """Return the models behind `target`: one of a GGUF file or a model folder; base and adapter of
    a run or an adapter folder.
    """
    path = Path(target).expanduser()
    if path.suffix == ".gguf":
        return [GgufJudged(path, gpu_layers=gpu_layers, n_ctx=n_ctx)]
    from fastft.inference.generate import HuggingFaceChat
    from fastft.runs.target import resolve

    resolved = resolve(target, base=base)
    chat = HuggingFaceChat(resolved, dtype=dtype)
    if resolved.adapter is None:
        return [TransformersJudged(chat, "model")]
    found: list[Judged] = [TransformersJudged(chat, "adapter")]
    if with_base:
        found.insert(0, TransformersJudged(chat, "base", without_adapter=True))
    return found
