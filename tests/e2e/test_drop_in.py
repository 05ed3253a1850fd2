"""The code cells of an Unsloth notebook run with only the import line changed; every keyword is passed on."""

import json

import pytest

from tests.e2e.conftest import fastft, run_python

NOTEBOOK = """
import sys, json
from fastft import FastLanguageModel
import torch
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = sys.argv[1],
    max_seq_length = 256,
    dtype = None,
    load_in_4bit = False,
)
model = FastLanguageModel.get_peft_model(
    model,
    r = 16,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha = 16,
    lora_dropout = 0,
    bias = "none",
    use_gradient_checkpointing = "unsloth",
    random_state = 3407,
    use_rslora = False,
    loftq_config = None,
)
from datasets import Dataset
rows = [{"conversations": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]} for i in range(16)]
dataset = Dataset.from_list(rows)
def formatting(batch):
    return {"text": [tokenizer.apply_chat_template(c, tokenize = False, add_generation_prompt = False) for c in batch["conversations"]]}
dataset = dataset.map(formatting, batched = True)
from trl import SFTTrainer, SFTConfig
trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    args = SFTConfig(
        dataset_text_field = "text",
        per_device_train_batch_size = 2,
        gradient_accumulation_steps = 2,
        warmup_steps = 1,
        max_steps = 4,
        learning_rate = 2e-3,
        logging_steps = 1,
        optim = "adamw_8bit",
        seed = 3407,
        output_dir = sys.argv[2],
        report_to = "none",
        save_strategy = "no",
    ),
)
from unsloth.chat_templates import train_on_responses_only
trainer = train_on_responses_only(trainer, instruction_part = "<|im_start|>user\\n", response_part = "<|im_start|>assistant\\n")
labels = trainer.train_dataset[0]["labels"]
stats = trainer.train()
FastLanguageModel.for_inference(model)
inputs = tokenizer.apply_chat_template([{"role": "user", "content": "What is 3?"}], tokenize = True, add_generation_prompt = True, return_tensors = "pt", return_dict = True)
out = model.generate(**inputs, max_new_tokens = 4, use_cache = True)
FastLanguageModel.for_training(model)
model.save_pretrained(sys.argv[2] + "/lora_model")
tokenizer.save_pretrained(sys.argv[2] + "/lora_model")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps({"losses": losses, "masked": labels.count(-100), "labels": len(labels), "class": type(model).__name__,
                  "new": int(out.shape[1] - inputs["input_ids"].shape[1])}))
"""


def test_an_unsloth_notebook_runs_with_only_the_import_changed(checkpoint_of, tmp_path):
    result = run_python(NOTEBOOK, checkpoint_of("qwen3"), tmp_path)
    assert result["class"] == "PeftModelForCausalLM"
    assert result["losses"][-1] < result["losses"][0]
    assert 0 < result["masked"] < result["labels"]
    assert result["new"] >= 1
    said = fastft(
        "chat", tmp_path / "lora_model", "--prompt", "What is 3?", "--max-new-tokens", 4, "--json"
    )
    assert said.code == 0, said.err


SIGNATURES = """
import inspect, json
from fastft import FastLanguageModel
import fastft.engines.unsloth as engine
import torch
from fastft.engines import get_engine

seen = {}
class Recorder:
    @staticmethod
    def from_pretrained(*args, **kwargs):
        seen["from_pretrained"] = kwargs
        return torch.nn.Module(), None
    @staticmethod
    def get_peft_model(model, *args, **kwargs):
        seen["get_peft_model"] = kwargs
        return torch.nn.Module()

real = engine.UnslothFastLanguageModel
keywords = {}
for name in ("from_pretrained", "get_peft_model"):
    parameters = inspect.signature(getattr(real, name)).parameters.values()
    keywords[name] = {p.name: object() for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "model"}
engine.UnslothFastLanguageModel = Recorder
import fastft.engines.loading as model_module
model_module.check_checkpoint = lambda *a, **k: None
model_module.check_target_modules = lambda *a, **k: None
model_module.unknown_target_modules = lambda *a, **k: []
given = keywords["from_pretrained"] | {"load_in_8bit": False}
model, _ = FastLanguageModel.from_pretrained(**given)
FastLanguageModel.get_peft_model(model, **keywords["get_peft_model"])
same = {"from_pretrained": seen["from_pretrained"] == given, "get_peft_model": seen["get_peft_model"] == keywords["get_peft_model"]}
print(json.dumps({"same": same, "count": {k: len(v) for k, v in keywords.items()}}))
"""


def test_every_keyword_of_unsloths_two_methods_is_passed_on():
    result = run_python(SIGNATURES)
    assert result["same"] == {"from_pretrained": True, "get_peft_model": True}
    assert result["count"]["from_pretrained"] > 10
    assert result["count"]["get_peft_model"] > 10


@pytest.mark.parametrize("engine", ["unsloth", pytest.param("stock", marks=pytest.mark.long)])
def test_nf4_trains_on_the_cpu_and_merges_onto_the_16_bit_base(
    engine, checkpoint_of, write_config, tmp_path
):
    """Real bitsandbytes NF4; the merged folder loads in plain transformers and holds no quantised tensor."""
    base = checkpoint_of("qwen3", hidden_size=256)
    config = write_config(
        base,
        model={"quantization": "nf4", "dtype": "auto", "engine": engine},
        lora={"dropout": 0.0},
    )
    outcome = fastft("train", config, "--json")
    assert outcome.code == 0, outcome.err[-2000:]
    assert outcome.json["eval_loss_after"] < outcome.json["eval_loss_before"]
    run = tmp_path / "runs" / "t"
    assert json.loads((run / "run.json").read_text())["choices"]["quantization"]["value"] == "nf4"
    merged = fastft("export", run, "--to", "merged", "--no-verify", "--json")
    assert merged.code == 0, merged.err
    code = (
        "import sys, json, torch\nfrom transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(json.dumps([str(m.dtype), bool(torch.isfinite(m(torch.arange(9)[None]).logits).all()),"
        " getattr(m.config, 'quantization_config', None) is None]))"
    )
    dtype, finite, plain = run_python(code, run / "export" / "merged")
    assert (finite, plain) == (True, True)
    assert dtype in {"torch.bfloat16", "torch.float32"}


EVERY_NAME = """
import json, types
import fastft
names = sorted(fastft._UNSLOTH)
first = fastft.FastLanguageModel
import unsloth
here = [n for n in dir(unsloth) if not n.startswith("_") and not isinstance(getattr(unsloth, n), types.ModuleType)]
wrong, missing = [], {}
for name in sorted({*here, *names}):
    try:
        found = getattr(fastft, name)
    except ImportError as error:
        missing[name] = str(error)
        continue
    if name not in fastft._PUBLIC and found is not getattr(unsloth, name):
        wrong.append(name)
try:
    from fastft import PatchDPOTrainer
    said = ""
except ImportError as error:
    said = str(error)
print(json.dumps({"wrong": wrong, "missing": missing, "here": here, "said": said}))
"""


def test_every_public_name_of_unsloth_is_fastfts_too():
    found = run_python(EVERY_NAME)
    assert found["wrong"] == []
    assert not set(found["missing"]) & set(found["here"])
    assert {"FastModel", "UnslothTrainer", "is_bfloat16_supported"} <= set(found["here"])
    assert all("GPU path" in reason for reason in found["missing"].values())
    assert "PatchDPOTrainer on cpu" in found["said"]


BESIDE_STOCK = """
import json
import fastft.engines.stock
try:
    from fastft import FastModel
except ImportError as error:
    print(json.dumps(str(error)))
"""


def test_unsloths_names_are_refused_beside_the_stock_engine():
    assert "this process already runs the stock engine" in run_python(BESIDE_STOCK)


NOTEBOOKS = """
import json, sys
from IMPORTED import FastModel, FastLanguageModel, is_bfloat16_supported
from datasets import Dataset
from trl import SFTTrainer, SFTConfig

losses = {}
for name in sys.argv[1:]:
    loader = FastModel if "gemma" in name else FastLanguageModel
    model, tokenizer = loader.from_pretrained(
        model_name = name, max_seq_length = 128, load_in_4bit = False, full_finetuning = False,
    )
    keywords = dict(
        r = 8, lora_alpha = 8, lora_dropout = 0, bias = "none", random_state = 3407,
        use_gradient_checkpointing = "unsloth",
        target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    if loader is FastModel:
        keywords |= dict(finetune_vision_layers = False, finetune_language_layers = True)
    model = loader.get_peft_model(model, **keywords)
    rows = [{"text": f"What is {i}? It is {i}." + tokenizer.eos_token} for i in range(12)]
    trainer = SFTTrainer(
        model = model, tokenizer = tokenizer, train_dataset = Dataset.from_list(rows),
        args = SFTConfig(
            dataset_text_field = "text", per_device_train_batch_size = 2, max_steps = 3,
            learning_rate = 2e-3, logging_steps = 1, seed = 3407, report_to = "none",
            output_dir = name + "-out", save_strategy = "no", bf16 = is_bfloat16_supported(),
        ),
    )
    trainer.train()
    losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps(losses))
"""


@pytest.mark.long
def test_cells_of_moe_and_small_gemma_notebooks_give_unsloths_losses(checkpoint_of):
    bases = [checkpoint_of(family) for family in ("gpt-oss", "qwen3-moe", "gemma3")]
    ours, theirs = (
        run_python(NOTEBOOKS.replace("IMPORTED", package), *bases)
        for package in ("fastft", "unsloth")
    )
    assert ours == theirs
    assert all(len(losses) == 3 and losses[2] < losses[0] for losses in ours.values())
