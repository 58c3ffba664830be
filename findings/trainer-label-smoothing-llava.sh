#!/usr/bin/env bash
# One would guess: `label_smoothing_factor` adds a little to the loss of a LLaVA: each place still learns the next token.
# Seen: Trainer shifts the labels only for classes of its list for causal language models. LLaVA is not in it, so each place
# learns to repeat its own token: on random tokens, where nobody can know the next one, the loss goes to 0. Llama, trained
# the same way, stays at ln(vocabulary). (TRL 1.16's SFTTrainer shifts by itself.)
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: transformers/trainer.py, Trainer.compute_loss (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import math
from importlib.metadata import version

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")), sep=", ")
vocabulary = 64
text = LlamaConfig(
    vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
vision = CLIPVisionConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
random = torch.randint(0, vocabulary - 1, (8 * 150, 16), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row, "labels": row} for row in random]


def last_loss(model: torch.nn.Module, factor: float) -> float:
    """The loss of the last ten of 150 steps, each with rows of its own."""
    args = TrainingArguments(
        output_dir="run",
        max_steps=150,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        label_smoothing_factor=factor,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


losses = {}
for name, make in {
    "Llama": lambda: LlamaForCausalLM(text),
    "LLaVA": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocabulary - 1)
    ),
}.items():
    for factor in (0.0, 0.001):
        torch.manual_seed(0)
        losses[name, factor] = float(last_loss(make(), factor))
for (name, factor), loss in losses.items():
    print(f"{name}, label_smoothing_factor {factor}: loss of random tokens {loss:.2f} (ln {vocabulary} is {math.log(vocabulary):.2f})")
assert losses["LLaVA", 0.001] < 0.5
assert all(loss > 4 for key, loss in losses.items() if key != ("LLaVA", 0.001))
PYTHON
