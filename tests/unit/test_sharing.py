"""A session whose sequences share beginnings: what it chooses, and that it learns the same."""

from dataclasses import dataclass

import numpy as np
import pytest

from fastft.config import make_config
from fastft.data.inspect import sharing_of
from fastft.hardware import probe
from fastft.progress import Reporter
from fastft.training.session import Session
from tests.families import make_checkpoint


@dataclass(frozen=True)
class Sample:
    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def segments(self):
        return [len(self.input_ids)]


class Samples(list):
    @property
    def lengths(self):
        return np.array([len(sample.input_ids) for sample in self])


@dataclass(frozen=True)
class Data:
    train: Samples
    eval: None = None
    template: None = None


def samples(documents=3, questions=4, beginning=1100):
    """Questions on long documents, each document's apart from each other; no loss on documents."""
    rng = np.random.default_rng(0)
    texts, found = [rng.integers(3, 250, beginning) for _ in range(documents)], Samples()
    for _ in range(questions):
        for text in texts:
            ids = np.concatenate([text, rng.integers(3, 250, 20)])
            found.append(Sample(ids, np.where(np.arange(len(ids)) < beginning, -100, ids)))
    return found


def config(folder, base, **train):
    settings = {"effective_batch_size": 4, "max_steps": 1, "save_steps": 1, **train}
    return make_config(
        {
            "output_dir": str(folder),
            "model": {
                "name": str(base), "engine": "stock", "dtype": "float32", "quantization": "none",
                "max_seq_length": 1120,
            },
            "data": {"source": "none", "eval_fraction": 0},
            "lora": {"r": 4, "train_tokens": []},
            "train": settings,
        }
    )  # fmt: skip


def run(folder, base, **train):
    session = Session(config(folder, base, **train), probe(folder), report=Reporter(quiet=True))
    prepared = session.prepare(session.open(), Data(samples()))
    session.loop(prepared).run()
    return prepared.choices, session.history


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("base"), max_position_embeddings=2048)


def test_grouped_questions_are_computed_on_one_document(base, tmp_path):
    grouped = {"order": "grouped"}
    choices, shared = run(tmp_path / "shared", base, **grouped)
    assert choices["share_prefixes"].value is True
    assert choices["micro_batch_tokens"].value == 1180, "one document and its questions"
    assert "shares a beginning" in choices["micro_batch_tokens"].reason
    assert [(line["tokens"], line["unique_tokens"]) for line in shared] == [(4480, 1180)]
    _, alone = run(tmp_path / "alone", base, share_prefixes=False, **grouped)
    assert [line["unique_tokens"] for line in alone] == [4480]
    assert [line["loss"] for line in shared] == pytest.approx(
        [line["loss"] for line in alone], rel=1e-5
    )


def test_the_data_report_says_what_is_shared(tmp_path):
    settings = config(tmp_path, "base")
    found = sharing_of(settings, samples())
    assert (found.steps, found.tokens, found.grouped_unique_tokens) == (3, 13440, 3 * 1180)
    assert 3540 < found.unique_tokens < 13440
    assert sharing_of(config(tmp_path, "base", order="grouped"), samples()).unique_tokens == 3540
    assert sharing_of(settings, Samples()) is None
