"""Scores, intervals and question files of `fastft eval`: closed forms and hand-made rows, no model."""

import json
import math

import numpy as np
import pytest

from fastft.errors import FastFTError
from fastft.inference import metrics
from fastft.inference.metrics import Likelihood, Scores
from fastft.verification.evaluation import below, parse_floors
from fastft.verification.questions import read_questions


def scores(metric, values):
    made = Scores(metric)
    for value in values:
        made.add(value)
    return made


def questions(tmp_path, *rows):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return read_questions(str(path))


@pytest.mark.parametrize(
    ("answer", "exact", "inside"),
    [
        ("Bavor", 1, 1),
        (" bavor. ", 1, 1),
        ("Ｂａｖｏｒ", 1, 1),  # full width: NFKC
        ("It is Bavor.", 0, 1),
        ("Bavo", 0, 0),
        ("", 0, 0),
    ],
)
def test_answers_are_compared_after_normalisation_and_nothing_more(answer, exact, inside):
    assert metrics.exact_match(answer, ["Bavor"]) == exact
    assert metrics.contains(answer, ["Bavor"]) == inside


def test_any_of_the_accepted_answers_counts():
    assert metrics.exact_match("東京。", ["Tokyo", "東京"]) == 1
    assert metrics.contains("x", ["", " ."]) == 0  # an empty text stands in every answer


def test_bits_per_byte_and_perplexity_are_the_closed_forms():
    # 3 tokens of probability 1/2 each for 4 bytes: 3 bits over 4 bytes, perplexity 2.
    bits, perplexity = Scores("bits_per_byte"), Scores("perplexity")
    for made in (bits, perplexity):
        made.add_likelihood(Likelihood(-2 * math.log(2), 2, 1))
        made.add_likelihood(Likelihood(-1 * math.log(2), 1, 3))
    assert bits.value() == pytest.approx(0.75)
    assert perplexity.value() == pytest.approx(2.0)
    low, high = bits.interval()
    assert low <= 0.75 <= high
    assert bits.each() == pytest.approx([2.0, 1 / 3])


def test_the_interval_of_a_share_stays_open_where_all_rows_agree():
    low, high = scores("exact_match", [1.0] * 20).interval()
    assert (round(low, 4), round(high, 4)) == (0.8389, 1.0)  # Wilson: n / (n + z^2)
    assert scores("exact_match", [0.0] * 20).interval()[1] == pytest.approx(1 - low)


def test_a_planted_difference_is_told_apart_and_chance_is_not():
    rng = np.random.default_rng(5)
    right = (rng.random(400) < 0.8).astype(float)
    planted = np.where(rng.random(400) < 0.1, 0.0, right)  # a tenth of its answers spoilt
    other = right.copy()  # as many rows lost as won
    other[np.flatnonzero(right == 1)[:8]], other[np.flatnonzero(right == 0)[:8]] = 0.0, 1.0
    good = scores("exact_match", right)
    difference, low, high = scores("exact_match", planted).difference(good)
    assert difference < 0
    assert low < difference < high < 0
    _, low, high = scores("exact_match", other).difference(good)
    assert low < 0 < high
    # Paired: the same shares in another order of rows have a wider interval.
    paired = scores("exact_match", planted).difference(good)
    shuffled = scores("exact_match", rng.permutation(planted)).difference(good)
    assert paired[2] - paired[1] < shuffled[2] - shuffled[1]


def test_columns_choose_the_metrics(tmp_path):
    asked = {"question": "2 + 2?", "answer": "4"}
    assert questions(tmp_path, asked).metrics(["auto"]) == ["exact_match", "contains"]
    assert questions(tmp_path, {"text": "a b"}).metrics(["auto"]) == ["bits_per_byte", "perplexity"]
    only_pattern = {"question": "When?", "pattern": r"\b20\d\d\b"}
    found = questions(tmp_path, only_pattern)
    assert found.metrics(["auto"]) == ["regex"]
    assert found.questions[0].reference == ""
    choice = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
    assert questions(tmp_path, choice).metrics(["auto"]) == ["choice", "choice_norm"]
    assert questions(tmp_path, choice).metrics(["exact_match"]) == ["exact_match"]
    both = questions(tmp_path, asked).metrics(["auto", "perplexity"])
    assert both == ["exact_match", "contains", "perplexity"]
    with pytest.raises(FastFTError, match=r"--data nope\.jsonl does not exist"):
        read_questions("nope.jsonl")
    with pytest.raises(FastFTError, match=r"cannot be judged by choice.*exact_match, contains"):
        questions(tmp_path, asked).metrics(["choice"])
    with pytest.raises(FastFTError, match=r"unknown metric 'exact'.*exact_match"):
        questions(tmp_path, asked).metrics(["exact"])


@pytest.mark.parametrize(
    ("answer", "right"), [(1, 1), ("B", 1), ("four", 1), ("1", 1), ("A", 0), ("three", 0)]
)
def test_the_right_choice_is_a_number_a_letter_or_its_text(tmp_path, answer, right):
    row = {"question": "2 + 2?", "choices": ["three", "four"], "answer": answer}
    found = questions(tmp_path, row).questions[0]
    assert (found.right, found.reference) == (right, row["choices"][right])


def test_arc_choices_and_messages_are_read(tmp_path):
    arc = {"text": ["three", "four"], "label": ["1", "2"]}
    row = {"messages": [{"role": "user", "content": "2 + 2?"}], "choices": arc, "answer": "2"}
    found = questions(tmp_path, row).questions[0]
    assert found.right == 1
    assert found.messages == [{"role": "user", "content": "2 + 2?"}]


def test_rows_that_cannot_be_asked_are_counted_with_their_reason(tmp_path):
    good = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
    found = questions(
        tmp_path, good, good | {"answer": 2}, good | {"choices": ["4"]}, {"question": "?"}
    )
    assert [q.line for q in found.questions] == [1]
    assert list(found.dropped) == [2, 3, 4]
    assert "none of the 2 choices" in found.dropped[2]
    broken = questions(
        tmp_path, {"question": "a", "answer": "b", "pattern": "("}, {"question": "a", "answer": "b"}
    )
    assert "no expression" in broken.dropped[1]


def test_accepted_answers_and_earlier_turns(tmp_path):
    row = {"question": "Capital of Japan?", "answers": ["Tokyo", "東京"]}
    assert questions(tmp_path, row).questions[0].accepted == ("Tokyo", "東京")
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found = questions(tmp_path, chat).questions[0]
    assert [m["content"] for m in found.messages] == ["a", "b", "c"]
    assert found.accepted == ("d",)


def test_floors():
    found = {
        "models": [
            {"name": "base", "kind": "base", "scores": {"exact_match": {"value": 0.0}}},
            {
                "name": "adapter",
                "kind": "adapter",
                "scores": {"exact_match": {"value": 0.8}, "perplexity": {"value": 3.0}},
            },
        ]
    }
    assert below(found, parse_floors(["exact_match=0.8", "perplexity=3"])) == []
    assert len(below(found, parse_floors(["exact_match=0.81", "perplexity=2.9"]))) == 2
    with pytest.raises(FastFTError, match="METRIC=VALUE"):
        parse_floors(["exact_match"])
    with pytest.raises(FastFTError, match="not measured"):
        below(found, {"contains": 0.5})
