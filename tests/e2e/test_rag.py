"""examples/rag.py on the quickstart's world: documents about towns that no training ever saw."""

import contextlib
import io
import json
import random

import pytest
import rag
import yaml

from fastft.quickstart import MAX_ANSWER_TOKENS, base_path, exact_match, world
from fastft.quickstart.tables import ATTRIBUTES, CODAS, LANGUAGES, SYLLABLES, Word
from tests.e2e.conftest import fastft


def write_documents(folder, towns):
    """A file a town and language: its four facts, one paragraph."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for town in towns:
        for language in LANGUAGES:
            # The last two forms have the value on a line of its own, as an answer has it: the first
            # token is then the same, which a model of 3.6M parameters needs.
            lines = [rng.choice(world.statements(town, a, language)[-2:]) for a in ATTRIBUTES]
            rng.shuffle(lines)
            (folder / f"{town.name.en}.{language}.txt").write_text("\n".join(lines), "utf-8")


def invented_towns(count):
    """Towns with names and facts of their own: what is said of them can only be read."""
    rng = random.Random(1)
    taken = {town.name.en for town in world.TOWNS}
    towns = []
    while len(towns) < count:
        a, b, c = rng.choice(SYLLABLES), rng.choice(SYLLABLES), rng.choice(CODAS)
        name = Word((a.en + b.en + c.en).capitalize(), a.ja + b.ja + c.ja)
        if name.en not in taken:
            taken.add(name.en)
            towns.append(world.Town(name, {a.key: rng.choice(a.values) for a in ATTRIBUTES}))
    return towns


@pytest.fixture(scope="module")
def asked():
    """20 questions about towns that are in no training text, with their answers."""
    rows = [r["messages"] for r in world.alternating_questions(world.WITHHELD)]
    chosen = [rows[4 * town + town % 4] for town in range(20)]
    return [(question["content"], answer["content"]) for question, answer in chosen]


def test_the_search_finds_the_town_that_is_asked_about(asked, tmp_path):
    write_documents(tmp_path / "docs", world.WITHHELD)
    search = rag.bm25(rag.read_passages(tmp_path / "docs"))
    assert len(asked) == 20
    first = [answer in search(question, 1)[0].text for question, answer in asked]
    two = [any(answer in p.text for p in search(question, 2)) for question, answer in asked]
    assert sum(first) >= 18
    assert sum(two) >= 19


def test_long_paragraphs_are_cut_and_sources_are_relative(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.md").write_text("x" * 1000 + "\n\n\n\nshort")
    found = rag.read_passages(tmp_path)
    assert [(p.source, len(p.text)) for p in found] == [
        ("a/b.md", 600),
        ("a/b.md", 400),
        ("a/b.md", 5),
    ]
    with pytest.raises(SystemExit, match=r"no \.txt or \.md"):
        rag.read_passages(tmp_path / "a/none")


@pytest.mark.long
def test_a_tuned_model_answers_from_documents_that_training_never_saw(asked, tmp_path):
    towns = invented_towns(150)
    write_documents(tmp_path / "docs", towns)
    write_documents(tmp_path / "unseen", world.WITHHELD)
    rows = [row["messages"] for row in world.questions(towns)]
    questions = [{"question": q["content"], "answer": a["content"]} for q, a in rows]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in questions))
    with contextlib.redirect_stdout(io.StringIO()) as made:
        rag.main(["--passages", "1", "data", str(tmp_path / "q.jsonl"), str(tmp_path / "docs")])
    (tmp_path / "train.jsonl").write_text(made.getvalue(), "utf-8")
    config = {
        "project": "rag",
        "output_dir": str(tmp_path),
        "model": {"name": str(base_path()), "quantization": "none", "max_seq_length": 128},
        "data": {"source": str(tmp_path / "train.jsonl"), "chat_template": "chatml"},
        "lora": {"train_tokens": [], "r": 32},
        "train": {
            "effective_batch_size": 16,
            "max_steps": 400,
            "learning_rate": 3e-3,
            "eval_steps": 100,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = fastft("train", tmp_path / "run.yaml", timeout=590)
    assert done.code == 0, done.err[-2000:]

    from fastft.inference.generate import HuggingFaceChat, Sampling, ask
    from fastft.runs.target import resolve

    chat = HuggingFaceChat(resolve(tmp_path / "rag"), dtype="float32")
    search = rag.bm25(rag.read_passages(tmp_path / "unseen"))
    answers = [answer for _, answer in asked]
    found = [rag.ask(chat, search, question, 1) for question, _ in asked]
    alone = [
        ask(chat, [{"role": "user", "content": question}], Sampling(MAX_ANSWER_TOKENS)).text
        for question, _ in asked
    ]
    with_passages = exact_match([text for text, _ in found], answers)
    without = exact_match(alone, answers)
    print(f"exact match with passages {with_passages:.0%}, without {without:.0%}")
    assert with_passages >= without + 0.5
    assert all(len(sources) == 1 for _, sources in found)
