"""Answers from your own documents: look passages up, put them before the question, name them.

    python examples/rag.py ask RUN DOCS "What is the flag animal of Sedok?"     # or FILE.gguf
    python examples/rag.py data questions.jsonl DOCS > train.jsonl             # then: fastft train

DOCS is a folder of .txt and .md files. The search is BM25 over words, and over character n-grams
where a script has no spaces (Japanese); it needs no model. --embeddings NAME takes a
sentence-transformers model instead. `data` puts the passages that the search finds before each
question of a file of {"question", "answer"} rows: a model that is trained on such rows reads
passages instead of guessing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError

LONGEST = 600  # characters of a passage; longer paragraphs are cut
K1, B = 1.2, 0.75  # BM25's usual constants (Robertson and Zaragoza 2009, section 3.5)

Search = Callable[[str, int], list["Passage"]]


@dataclass(frozen=True)
class Passage:
    """A paragraph of a document."""

    source: str
    text: str


def read_passages(folder: Path) -> list[Passage]:
    """Return the paragraphs (parted by empty lines) of every .txt and .md file below `folder`."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".md")):
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            text = paragraph.strip()
            pieces = [text[i : i + LONGEST] for i in range(0, len(text), LONGEST)]
            found += [Passage(str(path.relative_to(folder)), piece) for piece in pieces]
    if not found:
        sys.exit(f"error: {folder} holds no .txt or .md file with text in it.")
    return found


UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"  # Thai, kana, ideographs


def grams(text: str) -> Counter[str]:
    """Return how often each word occurs; where words are not parted, each 2 and 3 characters."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(rf"[^\W{UNSPACED}]+", text)
    for run in re.findall(f"[{UNSPACED}]+", text):
        words += [run[i : i + n] for n in (2, 3) for i in range(len(run) - n + 1)]
    return Counter(words)


def bm25(passages: list[Passage]) -> Search:
    """Return the search by BM25 over words and character n-grams."""
    counts = [grams(passage.text) for passage in passages]
    sizes = [sum(count.values()) for count in counts]
    mean = sum(sizes) / len(sizes)
    holding = Counter(gram for count in counts for gram in count)
    weight = {g: math.log(1 + (len(counts) - n + 0.5) / (n + 0.5)) for g, n in holding.items()}

    def score(asked: Counter[str], at: int) -> float:
        room = K1 * (1 - B + B * sizes[at] / mean)
        shared = asked.keys() & counts[at].keys()
        return sum(weight[g] * counts[at][g] * (K1 + 1) / (counts[at][g] + room) for g in shared)

    def search(question: str, many: int) -> list[Passage]:
        asked = grams(question)
        order = sorted(range(len(passages)), key=lambda at: (-score(asked, at), at))
        return [passages[at] for at in order[:many]]

    return search


def embeddings(passages: list[Passage], name: str) -> Search:
    """Return the search by the cosine of sentence-transformers' embeddings."""
    from sentence_transformers import SentenceTransformer, util

    model = SentenceTransformer(name)
    stored = model.encode([passage.text for passage in passages], convert_to_tensor=True)

    def search(question: str, many: int) -> list[Passage]:
        near = util.semantic_search(
            model.encode(question, convert_to_tensor=True), stored, top_k=many
        )
        return [passages[hit["corpus_id"]] for hit in near[0]]

    return search


def context_of(passages: list[Passage]) -> str:
    """Return the passages as they stand before a question; the best one is nearest to it."""
    return "\n\n".join(passage.text for passage in reversed(passages))


def ask(chat: Any, search: Search, question: str, many: int) -> tuple[str, list[str]]:
    """Return (answer, sources). The prompt is what `fastft data` makes of context + question."""
    from fastft.inference.generate import Sampling, messages_of
    from fastft.inference.generate import ask as answer

    passages = search(question, many)
    said = answer(chat, messages_of(f"{context_of(passages)}\n\n{question}"), Sampling())
    return said.text, list(dict.fromkeys(passage.source for passage in passages))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=3, help="passages before a question")
    parser.add_argument("--embeddings", help="a sentence-transformers model instead of BM25")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, first in (("ask", "run"), ("data", "questions")):
        sub = verbs.add_parser(verb)
        sub.add_argument(first)
        sub.add_argument("docs", type=Path)
    verbs.choices["ask"].add_argument("question")
    given = parser.parse_args(arguments)
    try:
        _answer(given)
    except (FastFTError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _answer(given: argparse.Namespace) -> None:
    passages = read_passages(given.docs)
    search = embeddings(passages, given.embeddings) if given.embeddings else bm25(passages)
    if given.verb == "ask":
        from fastft.inference.generate import open_chat

        text, sources = ask(open_chat(given.run), search, given.question, given.passages)
        print(f"{text}\n({', '.join(sources)})")
        return
    for line in Path(given.questions).read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        row = json.loads(line)
        found = context_of(search(row["question"], given.passages))
        print(json.dumps({"context": found, **row}, ensure_ascii=False))


if __name__ == "__main__":
    main()
