"""A Mac's memory: how much of it Metal takes, and that a plan counts it once for CPU and GPU."""

import pytest

from fastft.errors import FastFTError
from fastft.hardware import GIB, metal_working_set, named_gpu, named_mac
from fastft.planning import Situation, memory, plan
from fastft.planning.resolve import resolve
from fastft.planning.shape import known_shape, shape_from_config
from tests.plans import config


@pytest.mark.parametrize(
    ("ram", "published_mib"),
    [(16, 10922.67), (32, 21845.34), (36, 27648), (64, 49152), (96, 73728)],
)
def test_the_working_set_is_the_one_that_machines_report(ram, published_mib):
    assert metal_working_set(ram * GIB, "0") / 2**20 == pytest.approx(published_mib, rel=1e-4)


def test_the_owners_limit_counts():
    assert metal_working_set(36 * GIB, "32768") == 32 * GIB
    assert metal_working_set(36 * GIB, "999999") == 36 * GIB  # there is no more than that
    assert metal_working_set(36 * GIB, "unknown oid") == 27 * GIB


def test_cpu_and_gpu_share_the_memory():
    mac = named_mac(36)
    assert (mac.kind, mac.vram_bytes, mac.vram_free_bytes) == ("mps", 27 * GIB, 27 * GIB)
    assert named_mac(8).vram_free_bytes == 4 * GIB  # what macOS leaves, below Metal's limit
    found = plan(config("gemma-3-1b", 1024), named_gpu("mac-36GB"))
    train = found.phases["train"]
    names = {term.name for term in train.vram_terms}
    assert names <= {term.name for term in train.ram_terms}
    assert train.ram_bytes > train.vram_bytes > 2 * found.parameters
    assert found.choices["dtype"][0] == "bfloat16"
    assert found.choices["optimizer"][0] == "adamw"
    assert found.seconds_per_step is None


def test_a_mac_plans_for_the_engine_that_it_trains_with():
    mac, shape = named_mac(36), known_shape("gemma-3-4b")
    kinds = {
        engine: resolve(config("gemma-3-4b", 512, model__engine=engine), mac, shape).situation
        for engine in ("auto", "mlx", "stock")
    }
    assert [s.kernels for s in kinds.values()] == ["mlx", "mlx", "peft"]
    four = resolve(config("gemma-3-4b", 512, model__quantization="nf4"), mac, shape)
    assert "4 bit" in four.choices["quantization"].reason
    (packed, *_) = memory.weight_terms(shape, four.situation)
    linear = sum(w.parameters for w in shape.of("linear"))
    assert packed.bytes == pytest.approx(linear * 4.5 / 8, rel=1e-6)
    with pytest.raises(FastFTError, match="float16 needs a loss scaler"):
        plan(config("gemma-3-4b", 512, model__dtype="float16"), mac)
    with pytest.raises(FastFTError, match="adamw_8bit is not in MLX"):
        plan(config("gemma-3-4b", 512, train__optimizer="adamw_8bit"), mac)


def test_what_to_change_on_a_mac_is_a_macs():
    found = plan(config("gemma-3-4b", 512), named_mac(12))
    assert found.verdict == "does_not_fit"
    assert [c.new for c in found.changes if c.key == "model.quantization"] == ["nf4"]
    (another,) = plan(config("gemma-3-4b", 512), named_mac(8)).changes
    assert (another.key, another.new, another.cost) == ("gpu", "mac-16", "another Mac")
    with pytest.raises(FastFTError, match=r"unknown GPU 'mac-'.*mac-36"):
        named_gpu("mac-")


def small(family="llama", layers=4, intermediate=768):
    return shape_from_config(
        {
            "model_type": family, "hidden_size": 256, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "intermediate_size": intermediate, "vocab_size": 4096, "tie_word_embeddings": False,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "compute_bytes", "lengths", "checkpointing", "measured_mb"),
    [
        (small(), 2, [128], "off", 22.6),
        (small(), 2, [256], "off", 46.5),
        (small(), 2, [64] * 4, "off", 44.4),
        (small(), 2, [256], "recompute", 26.3),
        (small(), 4, [256], "off", 55.5),
        (small(), 4, [256], "recompute", 27.4),
        (small(layers=8), 2, [256], "off", 68.1),
        (small(layers=8), 2, [256], "recompute", 26.8),
        (small(intermediate=2048), 2, [256], "off", 66.4),
        (small(intermediate=2048), 2, [256], "recompute", 41.1),
        (small("qwen3"), 2, [256], "off", 47.9),
        (small("qwen3"), 2, [256], "recompute", 26.7),
    ],
)
def test_the_peaks_that_mlx_measured(shape, compute_bytes, lengths, checkpointing, measured_mb):
    """mx.get_peak_memory above the weights (MLX 0.32.4, Linux CPU, r 8, every token trained)."""
    s = Situation(
        device="cpu", kernels="mlx", tokens=sum(lengths), longest=max(lengths), rank=8,
        compute_bytes=compute_bytes, checkpointing=checkpointing, loss="full",
    )  # fmt: skip
    gradients = 4 * memory.trainable(shape, s)
    planned = sum(term.bytes for term in memory.moving_terms(shape, s)) + gradients
    assert 1.0 <= planned / 1e6 / measured_mb <= 1.15
