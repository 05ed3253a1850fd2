"""Who a process is among several, what it computes of a step, and dropout that does not care."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastft import cli
from fastft.data.batches import Segment
from fastft.errors import FastFTError
from fastft.training import ranks
from fastft.training.dropout import dropout_by_sequence, mixed
from fastft.training.launch import _exit_code

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}


def segment(length):
    return Segment(np.zeros(length, np.int64), np.zeros(length, np.int64))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ranks.World()),
        (TORCHRUN, ranks.World(1, 2, 1, 2, "torchrun")),
        # srun starts one torchrun a machine: torchrun's numbers count.
        (SLURM | TORCHRUN, ranks.World(1, 2, 1, 2, "torchrun")),
        (SLURM | {"SLURM_TASKS_PER_NODE": "4(x2)"}, ranks.World(5, 8, 1, 4, "Slurm")),
        # A batch script, or a notebook inside an allocation: nobody else was started.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ranks.World()),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, ranks.World()),
    ],
)
def test_launchers_say_who_a_process_is(environment, expected):
    assert ranks.found(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK=(absent)"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "--processes"),
    ],
)
def test_half_a_launch_is_refused(environment, words):
    with pytest.raises(FastFTError) as caught:
        ranks.found(environment)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[07-09,12],big1", "gpu07"), ("node3", "node3"), ("a1,a2", "a1"), ("c[1,3]-ib", "c1-ib"), ("", "")],
)  # fmt: skip
def test_the_first_machine_of_a_slurm_list(nodes, host):
    assert ranks.first_host(nodes) == host


def test_a_step_is_split_by_tokens_and_nothing_is_lost():
    lengths = np.random.default_rng(0).integers(1, 500, 40)
    step = [segment(int(n)) for n in lengths]
    for parts in (1, 2, 3, 7):
        shares = ranks.split(step, parts)
        assert sorted(id(s) for share in shares for s in share) == sorted(map(id, step))
        loads = [sum(map(len, share)) for share in shares]
        assert max(loads) <= 4 / 3 * max(lengths.sum() / parts, lengths.max())
    assert [len(share) for share in ranks.split(step[:2], 3)] == [1, 1, 0]


def test_sequences_with_a_common_beginning_stay_together():
    prefix = [np.full(200, 7), np.full(200, 8)]
    step = [
        Segment(ids := np.concatenate([prefix[k % 2], np.full(10 + k, 20 + k)]), ids)
        for k in range(8)
    ]
    for share in ranks.split(step, 2, trie=True):
        assert len({int(s.input_ids[0]) for s in share}) == 1
        assert len(share) == 4
    assert any(len({int(s.input_ids[0]) for s in share}) == 2 for share in ranks.split(step, 3))


@pytest.mark.parametrize(
    ("codes", "expected", "words"),
    [
        ({1: -9}, 3, "process 1 was killed by SIGKILL"),
        ({0: ranks.LOST, 1: -9}, 3, "process 1 was killed by SIGKILL"),
        ({0: ranks.LOST}, 3, "one of them hangs"),
        ({0: ranks.HANGS, 1: -9}, 3, "one of them hangs"),
        ({0: ranks.LOST, 1: 3}, 3, ""),
        ({0: 2, 1: 2}, 2, ""),
    ],
)
def test_the_launcher_says_what_no_process_could(codes, expected, words, capsys):
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}
    assert _exit_code(failures, 2) == expected
    said = capsys.readouterr().err
    assert words in said
    assert bool(said) == bool(words)


def test_a_launchers_end_during_the_last_words_is_no_accident(monkeypatch):
    """Its SIGTERM reaches a process that has just lost another one and waits to be seen."""

    def told_to_end(seconds):
        raise KeyboardInterrupt

    monkeypatch.setenv(ranks.OWN_LAUNCHER, "1")
    monkeypatch.setattr(cli.time, "sleep", told_to_end)
    assert cli._end_with(ranks.LostProcessError("gone"), debug=False) == ranks.LOST


# --- dropout


@contextlib.contextmanager
def layer(p=0.25, seed=1, step=5):
    model = torch.nn.Sequential(torch.nn.Dropout(p)).train()
    with dropout_by_sequence(model, seed, step) as tell:
        yield model, tell


def test_a_sequences_mask_does_not_depend_on_its_row():
    row = torch.ones(1, 90, 300)
    with layer() as (model, tell):
        tell([(0, 0, 30, 7), (0, 30, 20, 2), (0, 50, 40, 4)])
        together, again = model(row), model(row)
        tell([(0, 0, 40, 4)])
        alone = model(row[:, :40])
        tell([(0, 0, 40, 4), (1, 0, 20, 2)])
        padded = model(torch.ones(2, 40, 300))
    assert torch.equal(together, again)  # a recomputation draws the same
    assert torch.equal(alone[0], together[0, 50:])
    assert torch.equal(padded[1, :20], together[0, 30:50])
    dropped = (together == 0).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / row.numel()) ** 0.5)
    assert together[together != 0].unique().item() == pytest.approx(1 / 0.75)
    assert torch.equal(model(row) == 0, model(row) == 0) is False  # torch's own again


def test_masks_differ_by_seed_step_place_and_layer():
    def mask(seed=1, step=5, place=0, number=0):
        model = torch.nn.Sequential(*(torch.nn.Dropout(0.5) for _ in range(2))).train()
        with dropout_by_sequence(model, seed, step) as tell:
            tell([(0, 0, 64, place)])
            return model[number](torch.ones(1, 64, 64)) == 0

    first = mask()
    for other in (mask(seed=2), mask(step=6), mask(place=1), mask(number=1)):
        # Two independent masks of p = 0.5 agree in half of the places: 4,096 draws, 5 sigma.
        assert (first == other).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert torch.equal(first, mask())


def test_dropout_in_evaluation_and_of_other_shapes():
    with layer() as (model, tell):
        tell([(0, 0, 8, 0)])
        of_an_expert = model(torch.ones(5, 400))
        assert 0 < (of_an_expert == 0).float().mean().item() < 0.5
        model.eval()
        assert torch.equal(model(torch.ones(1, 8, 4)), torch.ones(1, 8, 4))


def test_seeds_are_spread():
    seeds = {mixed(s, t, p, n) for s in range(6) for t in range(6) for p in range(6) for n in range(6)}  # fmt: skip
    assert len(seeds) == 6**4
    assert all(0 <= seed < 2**63 for seed in seeds)
