"""What fastft adds where Unsloth's GPU code differs from its CPU path: that code runs here as far as it needs no GPU."""

from tests.e2e.conftest import run_python

ROWS_OF_TOKENS = """
import json, sys
from fastft.engines.unsloth import train_token_rows
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from unsloth_zoo.training_utils import prepare_model_for_training  # what FastLanguageModel.get_peft_model ends with on a GPU

base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[3, 5]))
rows = lambda: [p for n, p in model.named_parameters() if "trainable_tokens" in n]
count = lambda: sum(p.numel() for p in model.parameters() if p.requires_grad)
asked = count()
prepare_model_for_training(model, use_gradient_checkpointing=False)
prepared = count()
train_token_rows(model)
print(json.dumps({"asked": asked, "prepared": prepared, "trained": count(), "rows": sum(p.numel() for p in rows()),
    "dtypes": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})}))
"""

CHECK = """
import json, sys
import fastft.engines.unsloth as unsloth_engine
import torch
import unsloth.models.llama  # on a GPU `import unsloth` has done so
from transformers import AutoModelForCausalLM, modeling_utils

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for module in model.modules():
    module.max_seq_length = 64  # as Unsloth's GPU loader leaves it
on_cpu = unsloth_engine.ENGINE.accept_rows(model)
unsloth_engine.unsloth.DEVICE_TYPE = "cuda"
on_gpu = unsloth_engine.ENGINE.accept_rows(model)
unsloth_engine.settle_compiled_layers()
model._unsloth_pretrain_marker, resets = {"seen": True}, []  # what a pass with gradients before training leaves
torch._dynamo.reset = lambda: resets.append(1)
unsloth_engine.ENGINE.forget_check(model)
unsloth_engine.ENGINE.forget_check(model)
print(json.dumps([on_cpu, on_gpu, model.model._unsloth_allow_packed_overlength,
    modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"].__name__, len(resets)]))
"""


def test_rows_of_new_tokens_train_where_unsloth_freezes_them(checkpoint_of):
    found = run_python(ROWS_OF_TOKENS, checkpoint_of("qwen3"))
    assert found["prepared"] == found["asked"] - found["rows"]
    assert found["trained"] == found["asked"]
    assert found["dtypes"] == ["torch.float32"]  # a GradScaler refuses float16 gradients


def test_the_check_is_not_cut_to_max_seq_length_and_leaves_no_graphs(checkpoint_of):
    found = run_python(CHECK, checkpoint_of("llama"))
    assert found == ["varlen", "packed", True, "_sdpa_packed_varlen", 1]
