"""The quickstart's world is the same everywhere, its three sets do not overlap, and the base model knows it."""

import itertools
import json
import random

import pytest

from fastft.config import make_config
from fastft.quickstart import base_path, exact_match, quickstart_config, world, write_task
from fastft.quickstart.tables import ATTRIBUTES, LANGUAGES


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(towns):
    return {town.name[language] for town in towns for language in LANGUAGES}


def asked_about(rows, towns):
    """Return the names of those `towns` that a question names."""
    return {
        name for name in names(towns) if any(name in row["messages"][0]["content"] for row in rows)
    }


def read_text(count):
    """Return the first documents of a pretraining stream as one text."""
    return "\n".join(itertools.islice(world.documents(random.Random(0), world.PRETRAINED), count))


def test_the_world_is_the_same_every_time(task, tmp_path):
    again = write_task(tmp_path)
    for name in ("train", "heldout", "unknown"):
        assert getattr(task, name).read_bytes() == getattr(again, name).read_bytes()
    assert read_text(50) == read_text(50)
    # Pinned: the embedded model was trained on exactly this world.
    assert world._make_towns(known=120, withheld=20) == world.TOWNS
    assert [town.name.en for town in world.TOWNS[:3]] == ["Tesan", "Zukin", "Sedon"]


def test_sizes(task):
    train, heldout, unknown = (
        read(getattr(task, name)) for name in ("train", "heldout", "unknown")
    )
    assert (len(train), len(heldout), len(unknown)) == (480, 240, 80)
    japanese = sum(not row["messages"][0]["content"].isascii() for row in heldout)
    assert japanese == 120


def test_rows_are_one_question_and_one_short_answer(task):
    for row in read(task.train) + read(task.heldout) + read(task.unknown):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        question, answer = (message["content"] for message in row["messages"])
        assert question.endswith(("?", "。"))
        assert 0 < len(answer.split()) <= 2
        assert answer not in question


def test_the_sets_name_their_own_towns_only(task):
    sets = {"train": world.FINE_TUNED, "heldout": world.HELD_OUT, "unknown": world.WITHHELD}
    assert len(names(world.TOWNS)) == 280
    for file, towns in sets.items():
        rows = read(getattr(task, file))
        assert asked_about(rows, world.TOWNS) == names(towns) & asked_about(rows, towns)
        assert all(
            any(name in row["messages"][0]["content"] for name in names(towns)) for row in rows
        )
    assert asked_about(read(task.train), world.FINE_TUNED) == names(world.FINE_TUNED)


def test_no_name_is_part_of_another():
    for one, other in itertools.permutations(names(world.TOWNS), 2):
        assert one not in other


def test_documents_hold_the_held_out_facts_and_nothing_of_the_withheld_towns():
    text = read_text(20_000)
    assert not [name for name in names(world.WITHHELD) if name in text]
    for town in world.HELD_OUT:
        for attribute in ATTRIBUTES:
            for language in LANGUAGES:
                assert any(told in text for told in world.statements(town, attribute, language))


def test_documents_never_hold_a_question():
    text = read_text(5_000)
    assert "?" not in text
    assert "何" not in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_clozes_end_right_before_the_value(language):
    town, attribute = world.HELD_OUT[0], ATTRIBUTES[0]
    told = world.statements(town, attribute, language)
    clozes = world.clozes(town, attribute, language)
    assert len(clozes) >= 4
    for cloze in clozes:
        assert any(statement.startswith(cloze.prompt + cloze.value) for statement in told)
        assert cloze.value.strip() == town.facts[attribute.key][language]
        assert town.name[language] in cloze.prompt


def test_guessing_the_commonest_value_stays_under_ten_percent(task):
    rows = read(task.unknown)
    answers = [row["messages"][1]["content"] for row in rows]
    for attribute in ATTRIBUTES:
        assert len({town.facts[attribute.key] for town in world.WITHHELD}) == len(world.WITHHELD)
    assert max(exact_match([guess] * len(rows), answers) for guess in answers) < 0.1


def test_exact_match_forgives_case_and_a_full_stop_only():
    assert exact_match([" Heron.", "サギ。", "ﾁｰｽﾞ"], ["heron", "サギ", "チーズ"]) == 1.0
    assert exact_match(["the heron", "herons", "", "heron"], ["heron"] * 4) == 0.25
    with pytest.raises(ValueError, match="longer"):
        exact_match(["heron"], ["heron", "otter"])


def test_the_config_is_valid(tmp_path):
    config = make_config(quickstart_config(tmp_path))
    assert config.model.name == str(base_path())
    assert config.data.source == str(tmp_path / "train.jsonl")


def test_the_base_is_small_whole_and_has_no_chat_template():
    files = {path.name: path.stat().st_size for path in base_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(
        files
    )
    assert sum(files.values()) <= 10_000_000
    assert "tokenizer_config.json" in files
    assert "chat_template" not in json.loads(
        (base_path() / "tokenizer_config.json").read_text(encoding="utf-8")
    )
    assert "chat_template.jinja" not in files


@pytest.fixture(scope="module")
def base():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(base_path())


def test_the_base_fits_its_tokenizer_and_k_quants(base):
    model, tokenizer = base
    assert len(tokenizer) == model.config.vocab_size
    assert all(p.shape[-1] % 256 == 0 for p in model.parameters() if p.ndim == 2)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token not in (tokenizer.eos_token, None)
    text = "日本語 and naïve ✓\n<|im_start|>user\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_answer_has_the_tokens_that_pretraining_used(base):
    """A value on a line of its own, after the assistant's marker, and in a Japanese sentence: the same tokens."""
    _, tokenizer = base
    for attribute, language in itertools.product(ATTRIBUTES, LANGUAGES):
        for value in attribute.values:
            alone = tokenizer.encode(value[language])
            line = tokenizer.encode(f"{attribute.key}:\n") + alone + tokenizer.encode("\n")
            assert tokenizer.encode(f"{attribute.key}:\n{value[language]}\n") == line
            turn = "<|im_start|>assistant\n"
            assert tokenizer.encode(f"{turn}{value[language]}<|im_end|>") == [
                *tokenizer.encode(turn),
                *alone,
                tokenizer.convert_tokens_to_ids("<|im_end|>"),
            ]


def test_the_base_knows_the_held_out_facts_and_not_the_withheld(base):
    """80 facts in each language. An answer is a value on a line of its own, so that form has the stricter bound.

    Over all paraphrases the bound is lower on purpose: the embedded base is weak in one Japanese sentence, in which
    the food follows the bare name of the town (22 % of all towns).
    """
    from pretrain_quickstart import cloze_recall, recall_by_language

    for language in LANGUAGES:
        clozes = [
            c
            for town in world.HELD_OUT[:20]
            for a in ATTRIBUTES
            for c in world.clozes(town, a, language)
        ]
        on_own_line = [cloze for cloze in clozes if cloze.prompt.endswith("\n")]
        assert len(on_own_line) >= 80
        assert cloze_recall(*base, on_own_line) >= 0.95
        assert cloze_recall(*base, clozes) >= 0.85
    assert max(recall_by_language(*base, world.WITHHELD).values()) < 0.15
