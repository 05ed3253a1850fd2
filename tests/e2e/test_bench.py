"""The benchmark catches arms that cheat or break, and says so in its records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastft.bench.case import Case
from fastft.bench.record import Result, read_result
from tests.e2e.conftest import fastft

FAULTY = {
    "frozen": "Frozen",
    "drops": "DropsEveryThird",
    "never-updates": "NeverUpdates",
    "aborts": "Aborts",
    "allocates": "Allocates",
}
MORE_FAULTY = {
    "other-rank": "OtherRank",
    "counts-padding": "CountsPadding",
    "stops-early": "StopsEarly",
    "raises": "Raises",
}
"""A process each, so they are measured by the long suite."""


def tiny_case(arms: dict[str, str | None], **changes) -> Case:
    """A case of one small layer; `arms` maps names to implementations in tests/bench_arms.py."""
    values = {
        "name": "planted",
        "title": "planted faults",
        "device": "cpu",
        "memory_cap_gb": 8,
        "model": {
            "family": "llama",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 128,
                "max_position_embeddings": 128,
                "tie_word_embeddings": True,
            },
        },
        "dtype": "float32",
        "lora": {"r": 4},
        "lengths": {"median": 20, "shortest": 4, "longest": 60},
        "effective_batch_size": 6,
        "steps": 2,
        "repeats": 1,
        "threads": 1,
        "tables": {
            "defaults": {
                "arms": {
                    name: {
                        "settings": {"training": {"per_device_train_batch_size": 6}},
                        "implementation": f"tests.bench_arms:{implementation}"
                        if implementation
                        else None,
                        "source": "a test",
                    }
                    for name, implementation in arms.items()
                }
            }
        },
    }
    return Case.model_validate(values | changes)


def measure(home: Path, arms: dict[str, str]):
    """The command line on a case with an honest arm and `arms`."""
    path = home / "case.yaml"
    case = tiny_case({"peft": None} | arms)
    path.write_text(json.dumps(case.model_dump(mode="json")), encoding="utf-8")
    return fastft("bench", "--case", str(path), "--out", str(home / "out"), "--json", timeout=900)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    home = tmp_path_factory.mktemp("bench")
    return home, measure(home, FAULTY)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    home = tmp_path_factory.mktemp("bench-more")
    return home, measure(home, MORE_FAULTY)


@pytest.fixture
def planted(request) -> Callable[[str], Result]:
    """The result in which an arm took part, measured when the first test asks for it."""

    def result_with(arm: str) -> Result:
        home, _ = request.getfixturevalue("more" if arm in MORE_FAULTY else "outcome")
        (path,) = (home / "out").glob("planted--*.json")
        return read_result(path)

    return result_with


def failed_checks(result: Result, arm: str) -> set[str]:
    return {
        check.name for check in result.tables["defaults"].parity[arm].checks if not check.passed
    }


def test_the_honest_arm_passes(planted):
    assert planted("peft").tables["defaults"].parity["peft"].passed


@pytest.mark.parametrize(
    ("arm", "caught_by"),
    [
        ("frozen", {"gradient norm"}),
        pytest.param(
            "other-rank", {"trainable parameters", "gradient cosine"}, marks=pytest.mark.long
        ),
        ("drops", {"tokens seen", "gradient cosine"}),
        pytest.param("counts-padding", {"tokens claimed"}, marks=pytest.mark.long),
        ("never-updates", {"adapter change"}),
    ],
)
def test_an_arm_that_does_less_fails_the_gate(planted, arm, caught_by):
    result = planted(arm)
    assert caught_by <= failed_checks(result, arm)
    assert arm not in result.tables["defaults"].ratios
    assert not result.parity_passed


@pytest.mark.parametrize(
    ("arm", "status", "word"),
    [
        pytest.param("raises", "crashed", "planted", marks=pytest.mark.long),
        ("aborts", "crashed", "exit code -6"),
        ("allocates", "oom", "memory"),
        pytest.param("stops-early", "crashed", "after 1 of 3 steps", marks=pytest.mark.long),
    ],
)
def test_a_dead_arm_has_its_record(planted, arm, status, word):
    result = planted(arm)
    (record,) = [r for r in result.records if r.arm == arm]
    assert record.status == status
    assert word in (record.reason or "")
    assert record.log_tail
    assert result.tables["defaults"].arms[arm].status == status


def test_parity_fails_with_exit_1_and_json_only(outcome):
    home, done = outcome
    assert done.code == 1, done.err
    passed = {"peft": True, "frozen": False, "drops": False, "never-updates": False}
    assert done.json["parity"] == {"defaults": passed}
    assert done.json["ratios"] == {"defaults": {}}
    assert "does not do the same work" in done.err
    assert list((home / "out").glob("*.png"))


@pytest.mark.long
def test_smoke_runs_all_cpu_arms_with_both_tables(tmp_path):
    done = fastft("bench", "--case", "smoke", "--out", str(tmp_path), "--json", timeout=600)
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    for table in ("defaults", "matched"):
        result = read_result(next(tmp_path.glob("*.json"))).tables[table]
        # On a busy machine a ratio is withheld, and says why.
        assert set(answer["ratios"][table]) | set(result.withheld) == {"peft", "unsloth"}
        for ratio in answer["ratios"][table].values():
            assert ratio["speed"] > 0
            if ratio["speed_low"] is not None:
                assert ratio["speed_low"] <= ratio["speed"] <= ratio["speed_high"]
    assert list(tmp_path.glob("*.png"))
