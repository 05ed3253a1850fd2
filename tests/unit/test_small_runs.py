"""What a run of a few examples needs: steps that change something, and a word about them."""

from types import SimpleNamespace

import pytest

from fastft.errors import FastFTError
from fastft.runs.target import resolve
from fastft.training.train import _Session


@pytest.mark.parametrize(
    ("total", "given", "scheduler", "expected"),
    [(1, None, "cosine", 0), (33, None, "cosine", 0), (34, None, "cosine", 2), (1000, None, "cosine", 30),
     (1000, None, "constant", 0), (5, 1, "cosine", 1)],
)  # fmt: skip
def test_no_run_warms_up_for_one_step_unless_it_is_told_to(total, given, scheduler, expected):
    settings = SimpleNamespace(warmup_steps=given, warmup_ratio=0.03, scheduler=scheduler)
    session = SimpleNamespace(config=SimpleNamespace(train=settings), _total_steps=lambda: total)
    assert _Session._warmup_steps(session) == expected


def test_a_folder_that_only_data_has_seen_says_what_to_do(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "data.png").touch()
    with pytest.raises(
        FastFTError, match=r"nothing was trained in .* yet. Start with: fastft train"
    ):
        resolve(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FastFTError, match=r"neither a run .*It holds: .*notes.txt"):
        resolve(tmp_path)
