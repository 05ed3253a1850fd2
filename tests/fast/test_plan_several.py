"""The plan of several cards: what each of them holds, and what passes between them."""

import pytest

from fastft.config import make_config
from fastft.errors import FastFTError
from fastft.hardware import GIB, named_gpu
from fastft.planning import known_shape, plan, several

CONFIG = make_config(
    {"model": {"name": "Qwen/Qwen3-8B", "max_seq_length": 2048}, "data": {"source": "x.jsonl"}}
)


def test_two_cards_have_half_the_sequences_and_a_buffer_each():
    shape = known_shape("qwen3-8b")
    one = plan(CONFIG, named_gpu("t4"), shape)
    two = plan(CONFIG, several.machine_with(named_gpu("t4"), 2), shape, gpus=2)
    buffer = [t for t in two.phases["train"].vram_terms if t.name == "all-reduce buffer"]
    assert [t.bytes for t in buffer] == [4 * 43_646_976]  # r 16 on every linear layer
    assert two.available["ram"] == 28 * GIB  # Kaggle's notebook
    assert two.phases["export"].ram_bytes == one.phases["export"].ram_bytes
    assert two.tokens_per_step == one.tokens_per_step
    # The ring sends the buffer once where there are two: 2 (N - 1)/N = 1.
    sending = 4 * 43_646_976 / several.LINK_BYTES_PER_SECOND
    assert 0.5 <= (two.seconds_per_step - sending) / one.seconds_per_step <= 0.6
    assert any("VRAM is per card" in note for note in two.notes)


def test_a_spread_base_lies_in_parts():
    """Qwen3-8B in 16 bit: 15.3 GiB on one card; on four a quarter of its layers, and two of 36."""
    sixteen = CONFIG.model_copy(
        update={
            "model": CONFIG.model.model_copy(update={"quantization": "none"}),
            "train": CONFIG.train.model_copy(update={"shard_base": True}),
        }
    )
    shape = known_shape("qwen3-8b")
    terms = plan(sixteen, several.machine_with(named_gpu("l4"), 4), shape, gpus=4).phases["train"]
    held = {t.name: t.bytes for t in terms.vram_terms}
    layers = 2 * 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    whole = 2 * shape.parameters
    assert held["two layers together"] == pytest.approx(2 * layers / 36, rel=1e-6)
    assert held["weights"] == pytest.approx(whole - layers * 3 / 4, rel=1e-6)


def test_more_cards_than_sequences_are_named():
    few = CONFIG.model_copy(
        update={"train": CONFIG.train.model_copy(update={"effective_batch_size": 2})}
    )
    found = plan(few, several.machine_with(named_gpu("l4"), 4), known_shape("qwen3-8b"), gpus=4)  # fmt: skip
    assert any("2 of 4 cards" in note for note in found.notes)


@pytest.mark.parametrize("gpus", [0, -1])
def test_no_cards_are_no_plan(gpus):
    with pytest.raises(FastFTError, match="at least 1"):
        plan(CONFIG, named_gpu("t4"), known_shape("qwen3-8b"), gpus=gpus)
