#!/usr/bin/env bash
# One would guess: TRL's collator for vision models leaves image tokens out of the loss, since no model is to write
# them.
# Seen: unless assistant_only_loss is set, only padding is left out. Every image token is a label: of a row with one
# picture of 336x336 and a short answer 576 of 584 supervised tokens are <image>.
# Versions: torch 2.13.0, transformers 5.23.0, trl 1.16.0, datasets 5.2.0, pillow 13.0.0; torch is the CPU build
# where pip finds one. Python 3.11.
# Source: https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py,
# DataCollatorForVisionLanguageModeling
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile \
  torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0 pillow==13.0.0
cd "$folder"
export HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "datasets", "pillow")), sep=", ")
words = ["<unk>", "<pad>", "<image>", "USER:", "ASSISTANT:", "How", "many", "people?", "There", "are", "4."]
inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
)
template = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else ' ASSISTANT: ' }}{% for part in m.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)
pictures = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
processor = LlavaProcessor(
    pictures,
    tokenizer,
    patch_size=14,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
    chat_template=template,
)
row = {
    "images": [Image.new("RGB", (336, 336))],
    "messages": [{"role": "user", "content": "How many people?"}, {"role": "assistant", "content": "There are 4."}],
}
labels = DataCollatorForVisionLanguageModeling(processor)([row])["labels"]
image = int((labels == words.index("<image>")).sum())
print(f"{int((labels != -100).sum())} tokens are supervised, {image} of them <image>")
assert image == 576
PYTHON
