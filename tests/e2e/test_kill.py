"""The kill test (tests/kill_test.py), short and long."""

import random

import pytest

from tests.kill_test import survive


def test_a_few_kills(tmp_path):
    done = survive(tmp_path, 3, random.randrange(10**6))
    assert done["kills"] == 3


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_kills(tmp_path):
    done = survive(tmp_path, 50, random.randrange(10**6))
    assert done["kills"] == 50
    assert all(done[moment] >= 10 for moment in ("step", "checkpoint", "mirror", "export"))
