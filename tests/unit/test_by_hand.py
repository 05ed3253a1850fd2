"""A run against a training loop that is written out here: every setting of the optimizer counts."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastft.config import make_config
from fastft.data.batches import StepBatches, segments_of
from fastft.errors import CouldNotFinishError
from fastft.hardware import probe
from fastft.progress import Reporter
from fastft.runs.checkpoint import newest_whole
from fastft.runs.folder import RunFolder
from fastft.training.loop import StepTrainer
from fastft.training.session import Session
from fastft.training.train import train
from tests.families import make_checkpoint

SETTINGS = {
    "learning_rate": 0.05, "scheduler": "linear", "warmup_steps": 2, "weight_decay": 0.5,
    "max_grad_norm": 0.02, "effective_batch_size": 4, "epochs": 2, "seed": 7,
    "eval_steps": 100, "save_steps": 100,
}  # fmt: skip
ROWS = 12  # three steps an epoch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_hand")
    base = make_checkpoint("llama", folder / "base")
    texts = [f"What is {i} and {i * i}? {'again ' * (i % 5)}" for i in range(ROWS)]
    rows = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}]}
        for t in texts
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder, base


def config_of(made, project, eval_fraction=0.0, **changes):
    folder, base = made
    values = {
        "project": project, "output_dir": str(folder / "runs"),
        "model": {"name": str(base), "engine": "stock", "dtype": "float32", "max_seq_length": 64},
        "data": {"source": str(folder / "rows.jsonl"), "eval_fraction": eval_fraction},
        "lora": {"r": 4, "alpha": 16, "target_modules": ["q_proj", "down_proj"]} | changes,
        "train": SETTINGS | {"fused_layers": False},
    }  # fmt: skip
    return make_config(values)


def prepared(made, project, **changes):
    config = config_of(made, project, **changes)
    session = Session(config, probe(str(made[0])), report=Reporter(quiet=True))
    session.run.path.mkdir(parents=True, exist_ok=True)
    opened = session.open()
    return session, session.prepare(opened, session.read_data(opened))


def trained(session, ready):
    """Train, and return the losses that were logged."""
    session.loop(ready).run()
    return [line["loss"] for line in session.run.read_log() if "loss" in line]


def losses_by_hand(ready):
    """AdamW with decoupled decay (arXiv 1711.05101), clipping by the global norm, linear warm-up
    and decay, and the order that (seed, epoch) draws.
    """
    model = ready.model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=SETTINGS["weight_decay"])
    steps, warm = StepBatches(ready.data.train, 4, SETTINGS["seed"]), SETTINGS["warmup_steps"]
    total, found = 2 * len(steps), []
    for number in range(total):
        epoch, within = divmod(number, len(steps))
        steps.set_epoch(epoch)
        rising, falling = number / warm, (total - number) / (total - warm)
        optimizer.param_groups[0]["lr"] = SETTINGS["learning_rate"] * min(rising, falling)
        segments = segments_of(steps[within])
        supervised = sum(segment.supervised for segment in segments)
        loss = torch.zeros(())
        for segment in segments:
            ids = torch.tensor(segment.input_ids)[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            labels = torch.tensor(segment.labels)[1:]
            loss = loss + F.cross_entropy(logits, labels, reduction="sum") / supervised
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, SETTINGS["max_grad_norm"])
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_run_is_the_loop_written_out_by_hand(made):
    session, ready = prepared(made, "plain")
    start = {n: p.detach().clone() for n, p in ready.model.named_parameters() if p.requires_grad}
    found = trained(session, ready)
    with torch.no_grad():
        for name, weight in ready.model.named_parameters():
            if name in start:
                weight.copy_(start[name])
    expected = losses_by_hand(ready)
    assert found == pytest.approx(expected, rel=2e-4)
    assert max(expected) / min(expected) > 1.02  # the settings had something to change


def test_dropout_changes_what_is_learnt(made):
    losses = [trained(*prepared(made, f"dropout-{share}", dropout=share)) for share in (0.0, 0.5)]
    assert losses[0][-1] != pytest.approx(losses[1][-1], rel=1e-4)


def test_a_checkpoint_that_is_due_is_written_before_the_evaluation(made, monkeypatch):
    """The machine ends in an evaluation, in the middle and at the end of a run: no step is trained
    again, and the evaluation is made up for.
    """
    steps = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "epochs": 1}
    values = config_of(made, "ended", eval_fraction=0.2).model_dump() | {"train": SETTINGS | steps}
    config, run = make_config(values), RunFolder(make_config(values).run_dir)
    mean_loss, trained, ends_at = StepTrainer.mean_loss, [], [2, 4]

    def ending(trainer, dataset):
        if trainer.state.global_step in ends_at:
            ends_at.remove(trainer.state.global_step)
            raise CouldNotFinishError("the machine ends")
        return mean_loss(trainer, dataset)

    monkeypatch.setattr(StepTrainer, "mean_loss", ending)
    for step in (2, 4):
        with pytest.raises(CouldNotFinishError, match="the machine ends"):
            train(config, reporter=Reporter(quiet=True))
        assert newest_whole(run.checkpoints)[0].name == f"checkpoint-{step}"
        trained += [record["step"] for record in run.read_log() if "loss" in record]
    assert trained == [1, 2, 1, 2, 3, 4]
    train(config, reporter=Reporter(quiet=True))
    whole = make_config(values | {"project": "whole"})
    train(whole, reporter=Reporter(quiet=True))
    logs = run.read_log(), RunFolder(whole.run_dir).read_log()
    for name in ("loss", "eval_loss"):
        found, expected = ([(r["step"], r[name]) for r in log if name in r] for log in logs)
        assert found == expected
        assert expected[-1][0] == 4


def test_each_epoch_has_an_order_of_its_own():
    steps = StepBatches(list(range(50)), 5, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        steps.set_epoch(epoch)
        orders.append([item for step in range(len(steps)) for item in steps[step]])
    other = StepBatches(list(range(50)), 5, seed=4)
    assert orders[0] != [item for step in range(len(other)) for item in other[step]]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert all(sorted(order) == list(range(50)) for order in orders)
