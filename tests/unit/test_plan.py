"""The plan: closed forms, what people know, what others measured, and errors that say what is missing."""

import contextlib
import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from fastft.config import make_config
from fastft.errors import FastFTError
from fastft.hardware import GIB, named_gpu, probe
from fastft.plan import (
    KNOWN_MODELS,
    Situation,
    apply_changes,
    calibrate,
    known_shape,
    load_shape,
    memory,
    pick_gradient_checkpointing,
    pick_micro_batch_tokens,
    plan,
    plan_table,
    shape_from_config,
)
from fastft.plan.disk import adapter_bytes, gguf_bytes
from fastft.plan.memory import layer_bytes_per_token, train_terms, trainable, weight_terms
from fastft.plan.resolve import train_peak_bytes

ROOT = Path(__file__).parents[2]
PUBLISHED = yaml.safe_load((ROOT / "benchmarks" / "published_memory.yaml").read_text(encoding="utf-8"))
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 500, "tie_word_embeddings": False,
}  # fmt: skip


def config(name, length=2048, **more):
    values = {"model": {"name": name, "max_seq_length": length}, "data": {"source": "x.jsonl"}, "output_dir": "."}
    for key, value in more.items():
        section, _, leaf = key.partition("__")
        values.setdefault(section, {})[leaf] = value
    return make_config(values)


def peak(shape, s):
    return sum(term.bytes for term in train_terms(shape, s))


# --- what people know


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248), ("llama-3.3-70b", 70_553_706_496),
     ("llama-3.2-1b", 1_235_814_400), ("llama-65b", 65_285_660_672), ("mistral-7b", 7_241_732_096),
     ("qwen3-0.6b", 596_049_920), ("gpt-oss-20b", 20_914_757_184), ("gpt-oss-120b", 116_829_156_672)],
)  # fmt: skip
def test_published_parameter_counts(name, parameters):
    assert known_shape(name).parameters == parameters


def test_gpt_oss_checkpoints_have_their_published_size():
    assert known_shape("gpt-oss-20b").checkpoint_bytes == pytest.approx(13.76e9, rel=0.01)
    assert known_shape("gpt-oss-120b").checkpoint_bytes == pytest.approx(65.25e9, rel=0.01)


def test_7b_in_fp16_is_14_gb_of_weights():
    s = Situation(device="cuda", kernels="unsloth", tokens=1, longest=1)
    for name in ("llama-2-7b", "mistral-7b"):
        assert sum(t.bytes for t in weight_terms(known_shape(name), s)) == pytest.approx(14e9, rel=0.05)


def test_qlora_of_65b_fits_one_48_gb_card():
    """QLoRA's claim (arXiv 2305.14314): 65B on one 48 GB card, at its length of 512."""
    result = plan(config("llama-65b", 512, lora__r=64), replace(named_gpu("a6000"), disk_assumed_bytes=10**12))
    assert result.choices["quantization"][0] == "nf4"
    assert result.phases["train"].vram_bytes <= named_gpu("a6000").vram_bytes


def test_full_finetuning_of_8b_does_not_fit_40_gb():
    s = Situation(
        device="cuda", kernels="unsloth", tokens=512, longest=512, full_finetuning=True, lora_bytes=2,
        checkpointing="offload",
    )  # fmt: skip
    assert trainable(known_shape("llama-3.1-8b"), s) == 8_030_261_248
    assert peak(known_shape("llama-3.1-8b"), s) > 40 * GIB


def test_gpt_oss_120b_does_not_train_on_an_a100_40():
    result = plan(config("gpt-oss-120b", 1024), named_gpu("a100-40"))
    assert result.verdict == "does_not_fit"
    assert result.phases["train"].vram_bytes > 55e9
    assert [change.key for change in result.changes] == ["gpu"]
    assert result.changes[0].new in {"a100-80", "h100"}


def test_gpt_oss_20b_trains_on_a_colab_t4():
    """Unsloth's published claim: gpt-oss-20b QLoRA in 14 GB."""
    result = plan(config("gpt-oss-20b", 1024, train__micro_batch_tokens=1024), named_gpu("t4"))
    assert result.phases["train"].vram_bytes < 14 * GIB


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["name"])
def test_published_measurements_within_15_percent(row):
    situation = dict(row["situation"])
    if "target_modules" in situation:
        situation["target_modules"] = tuple(situation["target_modules"])
    s = Situation(**situation, allocator_slack=row["counts"] == "reserved")
    terms = train_terms(known_shape(row["model"]), s)
    predicted = sum(t.bytes for t in terms if t.name != "CUDA context") / GIB
    assert predicted == pytest.approx(row["measured"], rel=0.15)


# --- closed forms


def test_lora_parameters_closed_form():
    shape = known_shape("llama-3.1-8b")
    assert shape.lora_parameters(16) == 41_943_040  # what Unsloth prints for this model
    assert shape.lora_parameters(16, ["q_proj", "v_proj"]) == 32 * 16 * ((4096 + 4096) + (4096 + 1024))
    dora = shape.lora_parameters(16, use_dora=True) - shape.lora_parameters(16)
    assert dora == 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert shape.lora_parameters(16, train_tokens=3) == 41_943_040 + 3 * 4096
    assert known_shape("gpt-oss-20b").lora_parameters(8) == 24 * 8 * 2 * (2880 + 4096 + 2880 + 512)


def test_split_names_mean_the_fused_layers():
    phi = shape_from_config(LLAMA | {"model_type": "phi3"})
    assert phi.lora_parameters(4, ["q_proj", "k_proj", "v_proj"]) == 2 * 4 * (64 + 128)
    with pytest.raises(FastFTError, match=r"no 'wq'.*It has: .*qkv_proj"):
        phi.lora_targets(["wq"])


def test_micro_batches_need_more_the_larger_they_are_and_checkpointing_less():
    shape = known_shape("qwen3-0.6b")
    for device, kernels in (("cpu", "peft"), ("cuda", "unsloth")):
        s = Situation(device=device, kernels=kernels, tokens=1024, longest=1024)
        sizes = [peak(shape, replace(s, tokens=t)) for t in (1024, 2048, 4096)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2]
        assert peak(shape, replace(s, tokens=4096, checkpointing="recompute")) < sizes[2]
        if device == "cuda":  # on a CPU, peft's modules and the holes of quantising take what NF4 saves
            assert peak(shape, replace(s, quantization="nf4")) < sizes[0]


def test_every_term_says_where_it_comes_from():
    result = plan(config("llama-3.1-8b", export__to=["merged", "gguf:q4_k_m", "gguf-lora"]), named_gpu("t4"))
    for phase in result.phases.values():
        terms = [*phase.vram_terms, *phase.ram_terms, *phase.disk_terms]
        assert all(term.name and term.formula and term.source for term in terms)
        for place in ("vram", "ram", "disk"):
            total = sum(term.bytes for term in getattr(phase, f"{place}_terms"))
            assert total == getattr(phase, f"{place}_bytes")


def test_an_adapted_head_is_saved_with_its_base_weight():
    """peft writes lm_head's own weight into the adapter where LoRA is on it."""
    shape = known_shape("llama-2-7b")
    s = Situation(device="cpu", kernels="fused", tokens=512, longest=512, target_modules=("q_proj", "lm_head"))
    without = replace(s, target_modules=("q_proj",))
    lora = 16 * (4096 + 32000) * 4
    assert adapter_bytes(shape, s) - adapter_bytes(shape, without) == lora + 32000 * 4096 * 2


def test_fused_qkv_gets_the_type_of_its_values():
    """llama.cpp gives phi3's attn_qkv q5_k in a q4_k_m file: one bit a weight more than q4_k."""
    phi = shape_from_config(LLAMA | {"model_type": "phi3", "hidden_size": 1024, "intermediate_size": 2816})
    small, more = (gguf_bytes(phi, kind) for kind in ("q4_k_s", "q4_k_m"))
    qkv = sum(w.parameters for w in phi.weights if w.name == "qkv_proj")
    assert more - small >= qkv / 8


def test_gguf_sizes():
    """Published files: Llama-3.1-8B Q4_K_M is 4.92 GB and Q8_0 8.54 GB; f16 is two bytes a parameter."""
    shape = known_shape("llama-3.1-8b")
    assert gguf_bytes(shape, "q4_k_m") == pytest.approx(4.92e9, rel=0.02)
    assert gguf_bytes(shape, "q8_0") == pytest.approx(8.54e9, rel=0.02)
    assert gguf_bytes(shape, "f16") == pytest.approx(16.07e9, rel=0.02)
    with pytest.raises(FastFTError, match=r"did you mean 'q4_k_m'"):
        gguf_bytes(shape, "q4_km")


# --- against the real libraries


def test_shape_equals_what_transformers_builds(tmp_path):
    """For each family: parameters and trainable parameters of the real model with real peft."""
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = {"gemma2": {"head_dim": 16}, "gemma3_text": {"head_dim": 16}, "qwen3": {"head_dim": 32}}
    extra["gpt_oss"] = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    for family in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt_oss",
        "olmo2",
        "smollm3",
    ):
        values = LLAMA | {"model_type": family, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        settings = AutoConfig.for_model(**(values | extra.get(family, {})))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
        shape = shape_from_config(json.loads(settings.to_json_string(use_diff=False)), family)
        assert shape.parameters == sum(p.numel() for p in model.parameters()), family
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=False))
        real = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
        assert shape.lora_parameters(4) == real, family


KEPT = [
    ("peft", "llama", "bfloat16"), ("peft", "llama", "float32"), ("peft", "qwen3", "bfloat16"),
    ("fused", "llama", "bfloat16"), ("fused", "llama", "float32"), ("fused", "qwen3", "bfloat16"),
    ("fused", "gemma3_text", "bfloat16"), ("fused", "phi3", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("kernels", "family", "dtype"), KEPT)
def test_saved_activations_are_what_autograd_keeps(kernels, family, dtype):
    """Count every tensor that one forward pass over a padding-free row saves, against layer_bytes_per_token."""
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastft.engines.attention import padding_free
    from fastft.engines.fused import FusedLayers

    values = LLAMA | {"model_type": family, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3}
    values |= {"pad_token_id": 0} if family == "phi3" else {"head_dim": 32}
    settings = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=True)
    tokens = 512
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # Copies of weights (autocast) are not of the size of a row.
        if storage.data_ptr() not in own and storage.nbytes() % tokens == 0 and tensor.numel() >= tokens:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 500, (1, tokens))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    fused = contextlib.nullcontext() if kernels == "peft" else FusedLayers(model, getattr(torch, dtype)).active()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, autocast, padding_free(model), fused:
        row = {"position_ids": torch.arange(tokens)[None], "cu_seq_lens_q": torch.tensor([0, tokens])}
        hidden = model.get_base_model().model(ids, use_cache=False, **row).last_hidden_state
    assert hidden.requires_grad
    shape = shape_from_config(json.loads(settings.to_json_string(use_diff=False)), family)
    c = 2 if dtype == "bfloat16" else 4
    s = Situation(device="cpu", kernels=kernels, tokens=tokens, longest=tokens, rank=4, compute_bytes=c)
    predicted = 3 * tokens * sum(layer_bytes_per_token(shape, s).values())
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.06)


def test_the_plan_knows_what_the_fused_layers_stand_for():
    pytest.importorskip("torch")
    from fastft.engines import fused

    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
    classes |= {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}
    assert {f"{classes[family]}Attention" for family in memory.FUSED_ATTENTION} == fused.ATTENTIONS
    assert {f"{classes[family]}MLP" for family in memory.FUSED_MLP} == fused.MLPS
    assert memory.FUSED_HEAD == fused.HEADS
    assert (memory.HEAD_ROWS, memory.KEEP_PROBABILITIES) == (fused.HEAD_ROWS, fused.KEEP_PROBABILITIES)


# --- reading models


def write_model(folder, values=LLAMA, tensors=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if tensors:
        import numpy as np
        from safetensors.numpy import save_file

        shape = shape_from_config(values)
        arrays = {}
        for weight in shape.weights:
            for number in range(weight.count):
                prefix = f"model.layers.{number}." if weight.count > 1 else "model."
                name = "lm_head" if weight.name == "lm_head" else prefix + weight.name
                arrays[f"{name}.weight"] = np.zeros(weight.shape, np.float16)
        save_file(arrays, folder / "model.safetensors")
    return folder


def test_local_folder_is_read_from_its_headers(tmp_path):
    folder = write_model(tmp_path / "m")
    shape = load_shape(str(folder))
    assert shape.stored == "float16"
    assert shape.parameters == shape_from_config(LLAMA).parameters
    assert shape.checkpoint_bytes == (folder / "model.safetensors").stat().st_size
    assert shape.local


def test_headers_win_over_the_config_and_say_so(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 200}))
    shape = load_shape(str(folder))
    assert shape.parameters == shape_from_config(LLAMA).parameters
    assert any("headers" in note for note in shape.notes)
    assert shape.lora_parameters(4) == shape_from_config(LLAMA).lora_parameters(4)


def test_nonsense_is_refused_with_what_is_missing(tmp_path):
    broken = write_model(tmp_path / "a", {"model_type": "llama", "hidden_size": 8, "vocab_size": 3}, tensors=False)
    with pytest.raises(FastFTError, match="lacks num_hidden_layers, num_attention_heads, intermediate_size"):
        load_shape(str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(FastFTError, match="not valid JSON"):
        load_shape(str(broken))
    whole = write_model(tmp_path / "b")
    (whole / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(FastFTError, match="not a safetensors file"):
        load_shape(str(whole))
    strange = shape_from_config(LLAMA | {"model_type": "brandnew"})
    assert any("taken for a Llama-like" in note for note in strange.notes)
    with pytest.raises(FastFTError, match=r"unknown GPU 't5'.*Known: "):
        named_gpu("t5")


def test_hub_model_by_headers_alone(tmp_path):
    """A loopback Hub serves config.json and ranges of the weights; the bytes served stay far below the file."""
    folder = write_model(tmp_path / "m", LLAMA | {"vocab_size": 20_000})
    served = {"bytes": 0}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            if "/api/models/" in self.path:
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                return self.send(json.dumps({"id": "own/er", "sha": "a" * 40, "siblings": files}).encode(), body)
            file = folder / self.path.split("?")[0].rsplit("/", 1)[-1]
            if not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            return self.send(file.read_bytes(), body)

        def send(self, data, body):
            total, wanted = len(data), self.headers.get("Range")
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"' + "b" * 40 + '"')
            self.send_header("X-Repo-Commit", "a" * 40)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.end_headers()
            if body:
                served["bytes"] += len(data)
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from fastft.plan import load_shape; s = load_shape('own/er');"
        "print(s.parameters, s.stored, s.checkpoint_bytes, s.local)"
    )
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    environment |= {"PATH": "/usr/bin:/bin", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    shape = load_shape(str(folder))
    parameters, stored, size, local = done.stdout.split()
    assert (int(parameters), stored, local) == (shape.parameters, "float16", "False")
    assert int(size) == 2 * shape.parameters
    assert served["bytes"] < (folder / "model.safetensors").stat().st_size / 4


def test_without_the_hub_known_models_still_plan(tmp_path):
    code = (
        "from fastft.plan import load_shape; s = load_shape('Qwen/Qwen3-4B'); print(s.parameters, '; '.join(s.notes))"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(f"{known_shape('qwen3-4b').parameters} sizes from fastft's own table"), done.stderr
    code = code.replace("Qwen/Qwen3-4B", "no/such")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "the Hub cannot be reached" in done.stderr


# --- verdicts and changes


def test_plan_takes_less_than_a_second_and_no_torch(tmp_path):
    folder = write_model(tmp_path / "m")
    code = f"""
import sys, time
start = time.perf_counter()
from fastft.config import make_config
from fastft.hardware import probe
from fastft.plan import plan
plan(make_config({{"model": {{"name": {str(folder)!r}}}, "data": {{"source": "x"}}}}), probe())
print(time.perf_counter() - start, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()
    assert torch == "False"
    assert float(seconds) < 1


def test_changes_make_it_fit_in_order_and_apply():
    settings = config("llama-3.1-8b", 8192, train__micro_batch_tokens=32768, train__gradient_checkpointing=False)
    hardware = named_gpu("l4")
    before = plan(settings, hardware)
    assert before.verdict == "does_not_fit"
    assert before.changes[-1].enough
    after = plan(make_config(apply_changes(settings, before.changes)), hardware)
    assert after.verdict != "does_not_fit"
    for number in range(len(before.changes)):
        fewer = [change for index, change in enumerate(before.changes) if index != number]
        assert plan(make_config(apply_changes(settings, fewer)), hardware).verdict == "does_not_fit"


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
    s = Situation(device="cuda", kernels="unsloth", tokens=2048, longest=2048, optimizer="adamw_8bit")
    for card, expected in (("h100", False), ("rtx3060", True)):
        hardware = named_gpu(card)
        choice = pick_gradient_checkpointing("auto", shape=shape, situation=s, hardware=hardware)
        assert choice.value is expected, choice.reason
    hardware = named_gpu("l4")
    chosen = pick_micro_batch_tokens("auto", shape=shape, situation=s, hardware=hardware, effective_batch_size=64)
    assert 2048 <= chosen.value < 64 * 2048
    assert train_peak_bytes(shape, replace(s, tokens=chosen.value)) <= 0.9 * hardware.vram_free_bytes
    assert train_peak_bytes(shape, replace(s, tokens=chosen.value + 1024)) > 0.9 * hardware.vram_free_bytes
    asked = pick_micro_batch_tokens(512, shape=shape, situation=s, hardware=hardware, effective_batch_size=8)
    assert asked == (512, "asked for")


def test_a_smaller_machine_never_gets_a_larger_budget():
    shape = known_shape("llama-3.2-1b")
    s = Situation(device="cuda", kernels="unsloth", tokens=1024, longest=1024)
    budgets = [
        pick_micro_batch_tokens(
            "auto", shape=shape, situation=s, hardware=replace(named_gpu("h100"), vram_free_bytes=gib * GIB),
            effective_batch_size=64,
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
        shape, s, tokens=1024, measured_bytes=planned, largest_tokens=4096, limit_bytes=named_gpu("t4").vram_bytes
    )
    later = sum(t.bytes for t in train_terms(shape, replace(s, tokens=4096)) if t.name != "CUDA context")
    assert right.largest_bytes == pytest.approx(later, rel=0.001)
    assert right.fits
    worse = calibrate(
        shape, s, tokens=1024, measured_bytes=planned + 2 * GIB, largest_tokens=8192, limit_bytes=12 * GIB
    )
    assert worse.largest_bytes > later
    assert not worse.fits
    assert 1024 <= worse.largest_fitting_tokens < 8192
    assert f"train.micro_batch_tokens of at most {worse.largest_fitting_tokens:,}" in worse.message
    one_row = calibrate(
        shape, replace(s, longest=8192), tokens=1024, measured_bytes=planned + 2 * GIB, largest_tokens=8192,
        limit_bytes=12 * GIB,
    )  # fmt: skip
    assert f"model.max_seq_length of at most {worse.largest_fitting_tokens:,}" in one_row.message
    too_small = calibrate(shape, s, tokens=1024, measured_bytes=planned, largest_tokens=1024, limit_bytes=GIB // 2)
    assert "not even the weights leave room" in too_small.message


def test_calibration_does_not_blow_up_what_it_cannot_explain():
    """300 MB of a library's caches at 64 tokens are not 300 MB for each 64 tokens to come."""
    shape = shape_from_config(LLAMA)
    s = Situation(device="cpu", kernels="peft", tokens=64, longest=64)
    planned = calibrate(shape, s, tokens=64, measured_bytes=GIB, largest_tokens=64, limit_bytes=GIB).predicted_bytes
    found = calibrate(shape, s, tokens=64, measured_bytes=planned + 300_000_000, largest_tokens=4096, limit_bytes=GIB)
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


def test_table_has_a_row_for_each_model_method_and_length():
    rows = plan_table()
    assert {row["model"] for row in rows} <= set(KNOWN_MODELS)
    assert len(rows) == 11 * 2 * 3
    by_key = {(row["model"], row["method"], row["tokens"]): row for row in rows}
    assert by_key["llama-3.1-8b", "QLoRA", 2048]["t4"].startswith("yes")
    assert by_key["llama-3.1-8b", "LoRA", 2048]["t4"] == "no"
    assert by_key["gpt-oss-120b", "QLoRA", 1024]["a100-40"] == "no"
    assert by_key["gpt-oss-120b", "QLoRA", 1024]["h100"] != "no"
