"""The benchmark catches arms that cheat or break, and says so in its records."""

from __future__ import annotations

import json

import pytest

from fastft.bench.case import Case
from fastft.bench.record import Result, read_result
from tests.e2e.conftest import fastft

FAULTY = {
    "frozen": "Frozen",
    "other-rank": "OtherRank",
    "drops": "DropsEveryThird",
    "counts-padding": "CountsPadding",
    "never-updates": "NeverUpdates",
    "stops-early": "StopsEarly",
    "raises": "Raises",
    "aborts": "Aborts",
    "allocates": "Allocates",
}


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


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The command line on a case with an honest arm and all the others."""
    home = tmp_path_factory.mktemp("bench")
    path = home / "case.yaml"
    path.write_text(
        json.dumps(tiny_case({"peft": None} | FAULTY).model_dump(mode="json")), encoding="utf-8"
    )
    return home, fastft(
        "bench", "--case", str(path), "--out", str(home / "out"), "--json", timeout=900
    )


@pytest.fixture(scope="module")
def planted(outcome) -> Result:
    (path,) = (outcome[0] / "out").glob("planted--*.json")
    return read_result(path)


def failed_checks(result: Result, arm: str) -> set[str]:
    return {
        check.name for check in result.tables["defaults"].parity[arm].checks if not check.passed
    }


def test_the_honest_arm_passes(planted):
    assert planted.tables["defaults"].parity["peft"].passed


@pytest.mark.parametrize(
    ("arm", "caught_by"),
    [
        ("frozen", {"gradient norm"}),
        ("other-rank", {"trainable parameters", "gradient cosine"}),
        ("drops", {"tokens seen", "gradient cosine"}),
        ("counts-padding", {"tokens claimed"}),
        ("never-updates", {"adapter change"}),
    ],
)
def test_an_arm_that_does_less_fails_the_gate(planted, arm, caught_by):
    assert caught_by <= failed_checks(planted, arm)
    assert arm not in planted.tables["defaults"].ratios
    assert not planted.parity_passed


@pytest.mark.parametrize(
    ("arm", "status", "word"),
    [
        ("raises", "crashed", "planted"),
        ("aborts", "crashed", "exit code -6"),
        ("allocates", "oom", "memory"),
        ("stops-early", "crashed", "after 1 of 3 steps"),
    ],
)
def test_a_dead_arm_has_its_record(planted, arm, status, word):
    (record,) = [r for r in planted.records if r.arm == arm]
    assert record.status == status
    assert word in (record.reason or "")
    assert record.log_tail
    assert planted.tables["defaults"].arms[arm].status == status


def test_parity_fails_with_exit_1_and_json_only(outcome):
    home, done = outcome
    assert done.code == 1, done.err
    passed = {"peft": True} | dict.fromkeys(
        ("frozen", "other-rank", "drops", "counts-padding", "never-updates"), False
    )
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
        assert set(answer["ratios"][table]) == {"peft", "unsloth"}
        for ratio in answer["ratios"][table].values():
            assert ratio["speed_low"] <= ratio["speed"] <= ratio["speed_high"]
    assert list(tmp_path.glob("*.png"))
