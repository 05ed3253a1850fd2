"""The attacks of `attacks.py`: a share of them by default, all of them in the long suite."""

import pytest

from tests.hostile.attacks import GROUPS, attacks, survey
from tests.hostile.lab import Lab

SHARE = 16  # every 16th attack of each seed's list is made by default


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An attack may name a relative folder, and what it leaves there must not lie in the clone."""
    monkeypatch.chdir(tmp_path)


def test_the_same_seed_gives_the_same_attacks():
    first, again, other = attacks(1), attacks(1), attacks(2)
    assert [attack.name for attack in first] == [attack.name for attack in again]
    assert [attack.name for attack in first] != [attack.name for attack in other]
    assert len(first) >= 500
    assert len(GROUPS) == 10


def test_a_share_of_the_attacks_ends_with_the_promised_code_and_one_message(lab):
    # Not those that go through llama.cpp's converter, or that wait for a limit of time.
    quick = [a for a in attacks(0) if not a.name.startswith(("gguf", "endless"))]
    found = survey(lab, quick[::SHARE])
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.parametrize("name", GROUPS)
def test_every_attack_does(name, lab):
    import random

    found = survey(lab, list(GROUPS[name](random.Random(f"0-{name}"))))
    assert not found, "\n".join(found)


@pytest.mark.long
def test_kills_leave_nothing():
    from tests.hostile.kills import survive

    assert sum(survive(3, seed=1, commands=("data", "export", "verify")).values()) > 0


@pytest.mark.long
def test_failing_disks_and_memory_caps_lose_nothing():
    from tests.hostile.disks import survive

    assert sum(survive(8, seed=1, caps=3).values()) > 0
