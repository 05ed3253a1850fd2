"""What a run of a few examples needs: steps that change something, and a word about them."""

import pytest

from fastft.config import TrainConfig
from fastft.errors import FastFTError
from fastft.runs.target import resolve
from fastft.training.session import total_steps, warmup_steps


@pytest.mark.parametrize(
    ("total", "given", "scheduler", "expected"),
    [(1, None, "cosine", 0), (33, None, "cosine", 0), (34, None, "cosine", 2), (1000, None, "cosine", 30),
     (1000, None, "constant", 0), (5, 1, "cosine", 1)],
)  # fmt: skip
def test_no_run_warms_up_for_one_step_unless_it_is_told_to(total, given, scheduler, expected):
    settings = TrainConfig(warmup_steps=given, scheduler=scheduler)
    assert warmup_steps(settings, total) == expected


def test_a_run_without_max_steps_sees_every_sequence_as_often_as_its_epochs_say():
    settings = TrainConfig(effective_batch_size=8, epochs=1.5)
    assert [total_steps(settings, sequences) for sequences in (1, 8, 9, 80)] == [2, 2, 3, 15]
    assert total_steps(TrainConfig(max_steps=7), 80) == 7


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
