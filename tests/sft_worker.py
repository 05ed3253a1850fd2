"""FastSFTTrainer in one process of several: torchrun tests/sft_worker.py BASE FOLDER; the first prints its losses."""

import json
import sys


def main(base: str, folder: str) -> None:
    import fastft

    language_model, trainer_class = fastft.FastLanguageModel, fastft.FastSFTTrainer

    # After fastft has joined the other processes.
    import torch
    from datasets import Dataset
    from trl import SFTConfig

    from fastft.training import ranks

    rows = [
        {"text": f"Count to {i % 11}: {' '.join(map(str, range(i % 11 + 1)))}."} for i in range(27)
    ]
    model, tokenizer = language_model.from_pretrained(
        base, max_seq_length=128, dtype=torch.float32, load_in_4bit=False
    )
    model = language_model.get_peft_model(
        model, r=8, lora_alpha=16, lora_dropout=0.1, bias="none", random_state=1,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], use_gradient_checkpointing=False,
    )  # fmt: skip
    arguments = SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=9, learning_rate=5e-3,
        logging_steps=1, bf16=False, seed=3, output_dir=folder, report_to="none", save_steps=4, max_length=64,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, tokenizer=tokenizer, train_dataset=Dataset.from_list(rows), args=arguments,
        micro_batch_tokens=(48, 90, 30)[ranks.world().rank],
    )  # fmt: skip
    trainer.train()
    if ranks.first():
        print(json.dumps({"losses": trainer.loss_trace, "processes": ranks.world().size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
