"""examples/rag.py on the quickstart's world: documents about towns that no training ever saw."""

import json
import random

import pytest
import rag

from fastft.quickstart import world
from fastft.quickstart.tables import ATTRIBUTES, LANGUAGES


def write_documents(folder, towns):
    """A file a town and language: its four facts, one paragraph."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for town in towns:
        for language in LANGUAGES:
            lines = [rng.choice(world.statements(town, a, language)[:4]) for a in ATTRIBUTES]
            rng.shuffle(lines)
            (folder / f"{town.name.en}.{language}.txt").write_text("\n".join(lines), "utf-8")


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


def test_data_gets_its_passages_and_trains(tmp_path, capsys):
    """`rag.py data` writes rows that `fastft data` reads as a passage before its question."""
    from fastft.data.formats import convert, detect

    write_documents(tmp_path / "docs", world.WITHHELD[:5])
    question, answer = world.question(world.WITHHELD[0], ATTRIBUTES[0], "en")["messages"]
    row = {"question": question["content"], "answer": answer["content"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    rag.main(["--passages", "1", "data", str(tmp_path / "q.jsonl"), str(tmp_path / "docs")])
    made = json.loads(capsys.readouterr().out)
    assert answer["content"] in made["context"]
    asked = convert(made, detect([made])).messages[0]["content"]
    passage = rag.Passage("x", made["context"])
    assert asked == f"{rag.context_of([passage])}\n\n{row['question']}"  # what `ask` sends
