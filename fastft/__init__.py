"""fastft: Unsloth-first LoRA and QLoRA fine-tuning, from a dataset to a file that llama.cpp runs."""

__version__ = "0.1.0"
