"""examples/rag.py with a model that reads: documents that no training ever saw, asked 20 questions.

The base is the quickstart's after tools/pretrain_reader.py (FASTFT_TEST_READER names one that is
there); `fastft train` then teaches it the form of examples/rag.py.
"""

import json
import os
import random

import pretrain_reader
import pytest
import rag
import yaml

from fastft.quickstart import MAX_ANSWER_TOKENS, exact_match, world
from fastft.quickstart.tables import LANGUAGES
from tests.e2e.conftest import fastft

pytestmark = pytest.mark.long


def write_documents(folder, towns, rng):
    """A file a town and language that tells its four facts."""
    folder.mkdir(parents=True)
    for town in towns:
        for language in LANGUAGES:
            text = "\n".join(pretrain_reader.told(rng, town, language))
            (folder / f"{town.name.en}.{language}.txt").write_text(text, "utf-8")


def training_rows(folder, capsys):
    """What `rag.py data` makes of questions about 1,000 invented towns and their documents, in five
    folders (the search looks at every document of a folder for each question).
    """
    rng, made = random.Random(1), []
    names = rng.sample(pretrain_reader.town_names(), 1000)
    for number in range(5):
        place = folder / str(number)
        part = [pretrain_reader.random_town(rng, [name]) for name in names[number::5]]
        write_documents(place / "docs", part, rng)
        lines = []
        for row in world.questions(part):
            question, answer = (turn["content"] for turn in row["messages"])
            lines.append(json.dumps({"question": question, "answer": answer}, ensure_ascii=False))
        (place / "questions.jsonl").write_text("\n".join(lines), "utf-8")
        rag.main(["--passages", "1", "data", str(place / "questions.jsonl"), str(place / "docs")])
        made.append(capsys.readouterr().out)
    (folder / "train.jsonl").write_text("".join(made), "utf-8")
    return folder / "train.jsonl"


def test_questions_about_documents_that_training_never_saw(tmp_path, capsys):
    base = os.environ.get("FASTFT_TEST_READER")
    if base is None:
        base = tmp_path / "reader"
        assert min(pretrain_reader.pretrain(base).values()) > 0.4
    config = tmp_path / "run.yaml"
    values = {
        "project": "reader",
        "output_dir": str(tmp_path / "runs"),
        "model": {"name": str(base), "max_seq_length": 256, "quantization": "none"},
        "data": {
            "source": str(training_rows(tmp_path / "rows", capsys)),
            "chat_template": "chatml",
            "eval_fraction": 0.02,
        },
        "lora": {"r": 32, "alpha": 32, "train_tokens": []},
        "train": {"effective_batch_size": 16, "max_steps": 450, "learning_rate": 2e-3},
    }
    config.write_text(yaml.safe_dump(values))
    done = fastft("train", config, "--json", timeout=900)
    assert done.code == 0, done.err[-2000:]

    from fastft.inference.generate import Sampling, ask, messages_of, open_chat

    write_documents(tmp_path / "docs", world.WITHHELD, random.Random(2))
    search, chat = rag.bm25(rag.read_passages(tmp_path / "docs")), open_chat(done.json["run"])
    rows = [row["messages"] for row in world.alternating_questions(world.WITHHELD)]
    asked = [rows[4 * town + town % 4] for town in range(20)]
    questions, answers = zip(*((q["content"], a["content"]) for q, a in asked), strict=True)
    found = [rag.ask(chat, search, question, 1) for question in questions]
    reading = exact_match([text for text, _ in found], answers)
    alone = [ask(chat, messages_of(q), Sampling(MAX_ANSWER_TOKENS)).text for q in questions]
    guessing = exact_match(alone, answers)
    print(f"with passages {reading:.0%}, without {guessing:.0%}")
    assert guessing <= 0.1  # measured 0 %
    assert reading >= guessing + 0.2  # measured 40 %
