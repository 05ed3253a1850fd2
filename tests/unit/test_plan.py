"""The plan's verdicts: choices, changes, calibration, what is printed, and laws that hold for every run."""

import subprocess
import sys
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.config import load_config, make_config
from fastft.errors import FastFTError
from fastft.hardware import GIB, KNOWN_GPUS, named_gpu, probe
from fastft.planning import (
    KNOWN_MODELS,
    Situation,
    apply_changes,
    known_shape,
    load_shape,
    pick_gradient_checkpointing,
    pick_micro_batch_tokens,
    plan,
    plan_table,
    shape_from_config,
)
from fastft.planning.calibrate import calibrate
from fastft.planning.memory import layer_bytes_per_token, train_terms
from fastft.planning.resolve import Lengths, resolve, settle, train_peak_bytes
from fastft.planning.shape import _known_by_hub_id
from fastft.progress import spoken
from tests.plans import LLAMA, config, peak, write_model

# --- reading models


# --- verdicts and changes


def test_plan_takes_less_than_a_second_and_no_torch(tmp_path):
    """CPU seconds of the whole process, its start included: a busy machine does not make it slower."""
    folder = write_model(tmp_path / "m")
    code = f"""
import sys, time
from fastft.config import make_config
from fastft.hardware import probe
from fastft.planning import plan
plan(make_config({{"model": {{"name": {str(folder)!r}}}, "data": {{"source": "x"}}}}), probe())
print(time.process_time(), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()
    assert torch == "False"
    assert float(seconds) < 1


def test_changes_make_it_fit_in_order_and_apply():
    settings = config(
        "llama-3.1-8b", 8192, train__micro_batch_tokens=32768, train__gradient_checkpointing=False
    )
    hardware = named_gpu("l4")
    before = plan(settings, hardware)
    assert before.verdict == "does_not_fit"
    assert before.changes[-1].enough
    after = plan(make_config(apply_changes(settings, before.changes)), hardware)
    assert after.verdict != "does_not_fit"
    for number in range(len(before.changes)):
        fewer = [change for index, change in enumerate(before.changes) if index != number]
        assert plan(make_config(apply_changes(settings, fewer)), hardware).verdict == "does_not_fit"


def fits(settings, hardware):
    return plan(settings, hardware).verdict != "does_not_fit"


def test_automatic_choices_do_not_make_a_run_misfit():
    """What `auto` picks counts the row that was asked for, and the RAM that offloaded layer inputs take."""
    asked = config("qwen3-4b", 8192, train__micro_batch_tokens=32768, model__quantization="none")
    assert fits(
        asked, named_gpu("a100-40")
    )  # with checkpointing, which one sequence would not need
    assert plan(asked, named_gpu("a100-40")).choices["gradient_checkpointing"][0] is True
    on_t4 = plan(config("mistral-7b", 8192), named_gpu("t4"))
    assert on_t4.verdict != "does_not_fit", on_t4.reason
    large_adapter = config("llama-3.2-3b", lora__r=256, train__micro_batch_tokens=2048)
    card = replace(
        named_gpu("rtx3080"), vram_bytes=int(11.2 * GIB), vram_free_bytes=int(11.2 * GIB)
    )
    quantization, why = plan(large_adapter, card).choices["quantization"]
    assert quantization == "nf4"
    assert "with 16-bit weights a step takes" in why


def test_a_budget_above_a_whole_step_takes_no_more_than_the_step():
    one_step = plan(config("qwen3-0.6b", 1024, train__micro_batch_tokens=8192), named_gpu("t4"))
    more = plan(config("qwen3-0.6b", 1024, train__micro_batch_tokens=10**6), named_gpu("t4"))
    assert more.phases["train"].vram_bytes == one_step.phases["train"].vram_bytes


def test_inits_that_move_the_base_are_not_quantised_by_themselves():
    free = plan(config("llama-3.1-8b", lora__init="pissa"), named_gpu("t4"))
    assert free.choices["quantization"][0] == "none"
    assert free.verdict == "does_not_fit"
    stored = shape_from_config(LLAMA | {"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(
        FastFTError, match=r"lora\.init pissa changes the base weights, which model stores in 4 bit"
    ):
        plan(config("x", lora__init="pissa"), named_gpu("t4"), stored)


def test_float32_is_given_up_before_weights_are_quantised():
    settings = config("llama-3.1-8b", model__dtype="float32", model__quantization="none")
    changes = plan(settings, named_gpu("t4")).changes
    assert [change.key for change in changes] == ["model.dtype", "model.quantization"]
    assert fits(make_config(apply_changes(settings, changes)), named_gpu("t4"))


def test_another_card_comes_with_the_changes_it_needs():
    settings = config(
        "llama-3.3-70b", model__quantization="none", train__micro_batch_tokens=32768,
        train__gradient_checkpointing=False,
    )  # fmt: skip
    card, *others = plan(settings, named_gpu("t4")).changes
    assert card.key == "gpu"
    assert others[-1].enough
    assert fits(make_config(apply_changes(settings, others)), named_gpu(card.new))
    assert not fits(settings, named_gpu(card.new))


def test_a_full_disk_asks_for_room_and_not_for_a_card(tmp_path):
    small = replace(named_gpu("h100"), disk_assumed_bytes=GIB)
    settings = config("qwen3-0.6b", export__to=["merged", "gguf:q8_0"])
    (change,) = plan(settings, small).changes
    assert (change.key, change.old) == ("disk", "1.0 GiB free")
    assert "output_dir" in change.cost
    assert apply_changes(settings, [change]) == settings.model_dump()


def test_time_of_the_run(tmp_path):
    rows = tmp_path / "x.jsonl"
    rows.write_text('{"messages": []}\n' * 100)
    card = named_gpu("l4")

    def run(**more):
        return plan(config("qwen3-0.6b", data__source=str(rows), **more), card)

    whole = run(data__eval_fraction=0.2, train__epochs=3)
    assert whole.steps == 30  # 100 rows x 0.8 x 3 epochs / 8
    assert whole.seconds == pytest.approx(30 * whole.seconds_per_step)
    assert run(train__max_steps=7).steps == 7
    short = run(train__max_minutes=whole.seconds_per_step / 60, train__epochs=9)
    assert (short.steps, short.steps_basis) == (1, "train.max_minutes")
    rows.write_text('{"text": "a"}\n')
    assert run().steps is run().seconds is None  # documents are joined and cut
    assert (spoken(9), spoken(300), spoken(3 * 3600), spoken(10**6)) == (
        "9.0 s",
        "5 min",
        "3.0 h",
        "11.6 days",
    )


def test_a_length_beyond_the_models_positions_is_warned_of():
    def notes(length):
        return " ".join(plan(config("llama-2-7b", length), named_gpu("h100")).notes)

    assert "8,192 is above the 4,096 positions that llama-2-7b was made for" in notes(8192)
    assert "positions" not in notes(4096)


def test_sizes_are_gib_throughout():
    """The free memory of a card is printed as the card's makers and torch count it: 14.7 GiB of a T4."""
    result = plan(config("llama-3.3-70b", 1024), named_gpu("t4"))
    assert "14.7 GiB are free" in result.reason
    assert result.available["vram"] == named_gpu("t4").vram_bytes


def test_full_disk_is_a_verdict_too():
    small = replace(named_gpu("h100"), disk_assumed_bytes=GIB)
    result = plan(config("qwen3-0.6b", export__to=["merged", "gguf:q8_0"]), small)
    assert result.verdict == "does_not_fit"
    assert "disk" in result.reason


def test_checkpointing_is_off_where_memory_allows_and_budgets_fit():
    shape = known_shape("qwen3-4b")
    s = Situation(
        device="cuda", kernels="unsloth", tokens=2048, longest=2048, optimizer="adamw_8bit"
    )
    for card, expected in (("h100", False), ("rtx3060", True)):
        hardware = named_gpu(card)
        choice = pick_gradient_checkpointing("auto", shape=shape, situation=s, hardware=hardware)
        assert choice.value is expected, choice.reason
    hardware = named_gpu("l4")
    chosen = pick_micro_batch_tokens(
        "auto", shape=shape, situation=s, hardware=hardware, whole=64 * s.longest
    )
    assert 2048 <= chosen.value < 64 * 2048
    assert (
        train_peak_bytes(shape, replace(s, tokens=chosen.value)) <= 0.9 * hardware.vram_free_bytes
    )
    assert (
        train_peak_bytes(shape, replace(s, tokens=chosen.value + 1024))
        > 0.9 * hardware.vram_free_bytes
    )
    asked = pick_micro_batch_tokens(
        512, shape=shape, situation=s, hardware=hardware, whole=8 * s.longest
    )
    assert asked == (512, "asked for")


def test_a_family_that_overflows_in_float16_is_planned_in_float32(tmp_path):
    """On a card without bfloat16 Unsloth computes it in float32, with the whole scores of a row."""
    values = LLAMA | {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "layer_types": ["full_attention"] * 2,
    }
    folder = write_model(tmp_path / "gemma3", values)
    run = config(str(folder), 1024, model__quantization="none")
    s = {
        card: resolve(run, named_gpu(card), load_shape(str(folder))).situation
        for card in ("t4", "l4")
    }
    assert (s["t4"].forced_float32, s["t4"].compute_bytes) == (True, 4)
    assert (s["l4"].forced_float32, s["l4"].compute_bytes) == (False, 2)
    scores = [
        layer_bytes_per_token(load_shape(str(folder)), one)["attention scores"]
        for one in s.values()
    ]
    assert scores == [4 * s["t4"].tokens * 2 * 4, 0]  # heads x keys x scores and weights x float32


def test_sequences_that_do_not_fit_otherwise_are_recomputed_alone():
    """On a T4 an 8B recomputes every row for the sake of one long sequence, or that one alone."""
    shape, card, run = known_shape("llama-3.1-8b"), named_gpu("t4"), config("llama-3.1-8b", 2048)
    data = Lengths.of([2000, *[300] * 400], 8)
    found = settle(run, card, shape, "nf4", data)
    choice, s = found.choices["gradient_checkpointing"], found.situation
    assert choice.value == "long", choice.reason
    assert f"above {s.recompute_above:,} tokens" in choice.reason
    assert found.choices["micro_batch_tokens"].value == s.recompute_above < 2000
    # Both kinds of rows fit, and no longer one would without being recomputed.
    free = 0.9 * card.vram_free_bytes
    assert train_peak_bytes(shape, s) <= free
    kept = replace(s, checkpointing="off", tokens=s.recompute_above, longest=s.recompute_above)
    assert train_peak_bytes(shape, kept) == train_peak_bytes(shape, s)
    assert train_peak_bytes(shape, replace(kept, tokens=kept.tokens + 1)) > free
    # Where most tokens are in long sequences it gains nothing, and before the data is read every
    # sequence counts as long.
    alike = settle(run, card, shape, "nf4", Lengths.of([2000] * 400 + [300], 8))
    assert alike.choices["gradient_checkpointing"].value is True
    assert alike.situation.recompute_above == 0
    assert plan(run, card).choices["gradient_checkpointing"][0] is True
    # Where all fits, nothing is recomputed.
    fits = settle(run, named_gpu("h100"), shape, "nf4", data)
    assert fits.choices["gradient_checkpointing"].value is False


def test_recomputing_long_rows_alone_can_be_asked_for_and_refused():
    shape, card = known_shape("llama-3.1-8b"), named_gpu("t4")
    data = Lengths.of([2000] * 400, 8)
    asked = {"train__gradient_checkpointing": "long"}
    found = settle(config("llama-3.1-8b", 2048, **asked), card, shape, "nf4", data)
    assert found.choices["gradient_checkpointing"] == ("long", "asked for")
    most = found.situation.recompute_above
    assert 0 < most < 2000
    small = config("llama-3.1-8b", 2048, **asked, train__micro_batch_tokens=most // 2)
    assert settle(small, card, shape, "nf4", data).situation.recompute_above == most // 2
    with pytest.raises(FastFTError, match=r"long is not possible, because with train\.shard_base"):
        settle(
            config("llama-3.1-8b", 2048, **asked, train__shard_base=True), card, shape, "nf4", data
        )


def test_a_smaller_machine_never_gets_a_larger_budget():
    shape = known_shape("llama-3.2-1b")
    s = Situation(device="cuda", kernels="unsloth", tokens=1024, longest=1024)
    budgets = [
        pick_micro_batch_tokens(
            "auto", shape=shape, situation=s, hardware=replace(named_gpu("h100"), vram_free_bytes=gib * GIB),
            whole=64 * 1024,
        ).value
        for gib in (4, 8, 16, 32, 64)
    ]  # fmt: skip
    assert budgets == sorted(budgets)
    assert len(set(budgets)) > 2


def test_calibration_scales_what_grows_and_says_what_would_fit():
    shape = known_shape("qwen3-0.6b")
    s = Situation(device="cuda", kernels="unsloth", tokens=1024, longest=1024)
    planned = sum(t.bytes for t in train_terms(shape, s) if t.name != "CUDA context")
    right = calibrate(
        shape,
        s,
        tokens=1024,
        measured_bytes=planned,
        largest_tokens=4096,
        limit_bytes=named_gpu("t4").vram_bytes,
    )
    later = sum(
        t.bytes for t in train_terms(shape, replace(s, tokens=4096)) if t.name != "CUDA context"
    )
    assert right.largest_bytes == pytest.approx(later, rel=0.001)
    assert right.fits
    worse = calibrate(
        shape,
        s,
        tokens=1024,
        measured_bytes=planned + 2 * GIB,
        largest_tokens=8192,
        limit_bytes=12 * GIB,
    )
    assert worse.largest_bytes > later
    assert not worse.fits
    assert 1024 <= worse.largest_fitting_tokens < 8192
    assert f"train.micro_batch_tokens to at most {worse.largest_fitting_tokens:,}" in worse.message
    one_row = calibrate(
        shape, replace(s, longest=8192), tokens=1024, measured_bytes=planned + 2 * GIB, largest_tokens=8192,
        limit_bytes=12 * GIB,
    )  # fmt: skip
    assert f"model.max_seq_length of at most {worse.largest_fitting_tokens:,}" in one_row.message
    recomputed = calibrate(
        shape, s, tokens=1024, measured_bytes=planned, largest_tokens=4096, limit_bytes=12 * GIB,
        to_come=replace(s, checkpointing="offload"),
    )  # fmt: skip
    assert recomputed.largest_bytes < right.largest_bytes
    too_small = calibrate(
        shape, s, tokens=1024, measured_bytes=planned, largest_tokens=1024, limit_bytes=GIB // 2
    )
    assert "not even the weights leave room: set model.quantization: nf4" in too_small.message
    quantised = calibrate(
        shape, replace(s, quantization="nf4"), tokens=1024, measured_bytes=planned,
        largest_tokens=1024, limit_bytes=GIB // 2,
    )  # fmt: skip
    assert "take a smaller base, or take a larger machine" in quantised.message


def test_calibration_does_not_blow_up_what_it_cannot_explain():
    """300 MB of a library's caches at 64 tokens are not 300 MB for each 64 tokens to come."""
    shape = shape_from_config(LLAMA)
    s = Situation(device="cpu", kernels="peft", tokens=64, longest=64)
    planned = calibrate(
        shape, s, tokens=64, measured_bytes=GIB, largest_tokens=64, limit_bytes=GIB
    ).predicted_bytes
    found = calibrate(
        shape,
        s,
        tokens=64,
        measured_bytes=planned + 300_000_000,
        largest_tokens=4096,
        limit_bytes=GIB,
    )
    assert 0 < found.largest_bytes - found.measured_bytes < 300_000_000


def test_cpu_counts_ram_and_no_vram(tmp_path):
    folder = write_model(tmp_path / "m")
    result = plan(config(str(folder), 128), replace(probe(), kind="cpu"))
    assert result.peak_vram_bytes == 0
    assert result.peak_ram_bytes > 0
    assert result.trainable_parameters == shape_from_config(LLAMA).lora_parameters(16)


def test_print_and_plot(tmp_path, capsys):
    from rich.console import Console

    result = plan(config("gpt-oss-120b"), named_gpu("t4"))
    result.print(Console(width=160))
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "weights in NF4" in text
    path = result.plot(tmp_path / "plan.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FastFTError, match="cannot be written"):
        result.plot(path / "below-a-file.png")


def test_a_narrow_terminal_shows_every_line_whole(capsys):
    """80 columns: the bar is one line, and what wraps stays in its column."""
    from rich.console import Console

    for card, name in (("l4", "llama-3.1-8b"), (None, "qwen3-0.6b")):
        hardware = named_gpu(card) if card else replace(probe(), kind="cpu")
        plan(config(name, 8192, train__gradient_checkpointing=False), hardware).print(
            Console(width=80)
        )
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert sum(line.rstrip().endswith("GiB free") and "|" in line for line in lines) == 1
        assert ("vram (" in lines[1] + lines[2]) == (card is not None)


@pytest.mark.parametrize("card", [*KNOWN_GPUS, None])
def test_init_writes_a_config_that_fits(card, tmp_path, monkeypatch):
    from fastft.planning.init import commented_config

    machine = replace(
        probe(), kind="cpu", vram_bytes=0, ram_free_bytes=8 * GIB, disk_assumed_bytes=20 * GIB
    )
    monkeypatch.setattr("fastft.planning.init.probe", lambda: machine)
    file = tmp_path / "run.yaml"
    file.write_text(commented_config(gpu=card))
    chosen = load_config(file)
    shape = _known_by_hub_id(chosen.model.name)
    assert shape is not None
    assert plan(chosen, named_gpu(card) if card else machine, shape).verdict == "fits"


def test_long_values_leave_their_cost_room(capsys):
    from rich.console import Console

    result = plan(config("llama-3.1-8b", 2**62), named_gpu("t4"))
    result.print(Console(width=80))
    text = " ".join(capsys.readouterr().out.split())
    assert result.changes[-1].enough
    assert "longer conversations are cut" in text


def test_plan_command_says_no_before_it_prints(tmp_path):
    from fastft.planning import command

    file = tmp_path / "run.yaml"
    file.write_text("model: {name: gpt-oss-120b}\ndata: {source: x.jsonl}\n")
    for keywords, said in (
        ({"plot": tmp_path / "p.txt"}, r"ends in \.png"),
        ({"plot": tmp_path}, "is a folder"),
        ({"apply": tmp_path}, "is a folder"),
        ({"apply": tmp_path / "gone" / "x.yaml"}, "there is no folder"),
        ({"gpu": ""}, "unknown GPU ''"),
    ):
        with pytest.raises(FastFTError, match=said) as found:
            command.run(file, **({"gpu": "t4"} | keywords))
        assert found.value.exit_code == 2
    with pytest.raises(FastFTError, match=r"with gpu h100 it would\. Nothing was written") as found:
        command.run(file, gpu="t4", apply=tmp_path / "new.yaml", show=False)
    assert found.value.exit_code == 1
    assert not (tmp_path / "new.yaml").exists()


# --- laws

ORDER = {"does_not_fit": 0, "tight": 1, "fits": 2}
LENGTHS, RANKS = st.sampled_from([128, 512, 2048, 8192, 32768]), st.sampled_from([1, 16, 256])


@hypothesis.settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(KNOWN_MODELS)), st.sampled_from(sorted(KNOWN_GPUS)), LENGTHS, RANKS,
    st.sampled_from(["auto", "none", "nf4", "int8"]), st.sampled_from(["auto", True, False]),
    st.sampled_from(["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"]), st.sampled_from([None, 1, 4]),
    st.sampled_from([1, 8, 64]), st.sampled_from([1.1, 1.5, 3.0]),
)  # fmt: skip
def test_more_work_never_fits_better_and_more_machine_never_worse(
    name, card, length, rank, quantization, checkpointing, optimizer, rows, batch, factor
):
    def verdict(length=length, rank=rank, batch=batch, vram=1.0, ram=1.0):
        hardware = named_gpu(card)
        hardware = replace(
            hardware, vram_bytes=int(vram * hardware.vram_bytes), vram_free_bytes=int(vram * hardware.vram_free_bytes),
            ram_bytes=int(ram * hardware.ram_bytes), ram_free_bytes=int(ram * hardware.ram_free_bytes),
        )  # fmt: skip
        values = config(
            name, length, model__quantization=quantization, lora__r=rank, train__gradient_checkpointing=checkpointing,
            train__optimizer=optimizer, train__effective_batch_size=batch,
            train__micro_batch_tokens="auto" if rows is None else rows * length,
        )  # fmt: skip
        result = plan(values, hardware)
        config_changes = [change for change in result.changes if "." in change.key]
        if result.changes and len(config_changes) == len(result.changes):
            assert fits(make_config(apply_changes(values, result.changes)), hardware)
        return ORDER[result.verdict]

    here = verdict()
    assert verdict(length=2 * length) <= here
    assert verdict(rank=2 * rank) <= here
    assert verdict(batch=2 * batch) <= here
    assert verdict(vram=factor) >= here
    assert verdict(ram=factor) >= here


@hypothesis.settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(KNOWN_MODELS)), st.sampled_from(["unsloth", "peft", "fused"]), LENGTHS, RANKS,
    st.sampled_from(["none", "nf4", "int8"]), st.sampled_from(["off", "recompute"]), st.booleans(),
)  # fmt: skip
def test_peaks_grow_with_tokens_length_rank_and_precision(
    name, kernels, tokens, rank, quantization, how, dora
):
    shape = known_shape(name)
    s = Situation(
        device="cuda" if kernels == "unsloth" else "cpu", kernels=kernels, tokens=tokens, longest=tokens, rank=rank,
        quantization=quantization, checkpointing=how, use_dora=dora, loss="fused" if kernels == "fused" else "chunked",
    )  # fmt: skip
    here = peak(shape, s)
    assert peak(shape, replace(s, tokens=2 * tokens)) >= here
    assert peak(shape, replace(s, rank=2 * rank)) > here
    assert peak(shape, replace(s, compute_bytes=4)) > here
    assert peak(shape, replace(s, use_dora=True)) >= here
    assert peak(shape, replace(s, target_modules=("q_proj",))) < here


def test_table_has_a_row_for_each_model_method_and_length():
    rows = plan_table()
    assert {row["model"] for row in rows} <= set(KNOWN_MODELS)
    assert len(rows) == 11 * 2 * 3
    by_key = {(row["model"], row["method"], row["tokens"]): row for row in rows}
    assert by_key["llama-3.1-8b", "QLoRA", 2048]["t4"].startswith("yes")
    assert by_key["llama-3.1-8b", "LoRA", 2048]["t4"] == "no"
    assert by_key["gpt-oss-120b", "QLoRA", 1024]["a100-40"] == "no"
    assert by_key["gpt-oss-120b", "QLoRA", 1024]["h100"] != "no"
