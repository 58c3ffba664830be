#!/usr/bin/env bash
# One would guess: a model that was loaded in 4 bits and dequantised is trained as one that never was quantised:
# adapters in fp32 beside a base in fp32.
# Seen: `dequantize()` leaves `is_loaded_in_4bit` True. SFTTrainer takes the model for a 4-bit one and turns the
# adapters into bf16, where a step of 1e-5 is lost.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2, trl 1.16.0, bitsandbytes 0.50.2, datasets 5.2.0, tokenizers
# 0.23.3; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py; https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py, dequantize
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0 bitsandbytes==0.50.2 datasets==5.2.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "tokenizers")), sep=", ")
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4}, "<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
LlamaForCausalLM(
    LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
).save_pretrained("base")
found = {}
for how in ("never quantised", "dequantised"):
    if how == "dequantised":
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = LlamaForCausalLM.from_pretrained("base", quantization_config=quantised).dequantize()
    else:
        model = LlamaForCausalLM.from_pretrained("base")
    trainer = SFTTrainer(
        model,
        SFTConfig("run", use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_dict({"text": ["a b"] * 4}),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    parts = {"adapters": set(), "base": set()}
    for name, parameter in trainer.model.named_parameters():
        parts["adapters" if "lora_" in name else "base"].add(str(parameter.dtype))
    found[how] = parts
    print(how, parts, "is_loaded_in_4bit:", getattr(model, "is_loaded_in_4bit", False))
assert found["never quantised"]["adapters"] == {"torch.float32"}
assert found["dequantised"] == {"adapters": {"torch.bfloat16"}, "base": {"torch.float32"}}
PYTHON
