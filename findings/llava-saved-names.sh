#!/usr/bin/env bash
# One would guess: save_pretrained of one class and one release writes one set of tensor names.
# Seen: a LLaVA made from a configuration is saved with vision_tower.embeddings..., one loaded from the published
# names with vision_tower.vision_model.embeddings.... Readers that know only the published names take the first for
# a model without a vision tower.
# Versions: torch 2.13.0, transformers 5.23.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/llava-hf/llava-1.5-7b-hf, model.safetensors.index.json
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

print(*(f"{name} {version(name)}" for name in ("torch", "transformers")), sep=", ")
vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
)
text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49))


def saved(model: LlavaForConditionalGeneration, folder: str) -> dict:
    """Tensors by the names in the folder's file."""
    model.save_pretrained(folder)
    return load_file(f"{folder}/model.safetensors")


made = saved(model, "made")
published = {
    name.replace("vision_tower.vision_model.", "vision_tower.").replace(
        "vision_tower.", "vision_tower.vision_model."
    ): tensor
    for name, tensor in made.items()
}
Path("published").mkdir()
Path("published/config.json").write_text(Path("made/config.json").read_text())
save_file(published, "published/model.safetensors", {"format": "pt"})
loaded = saved(LlavaForConditionalGeneration.from_pretrained("published"), "loaded")
for origin, tensors in (("made in memory", made), ("loaded from the published names", loaded)):
    print(f"{origin}: {next(name for name in sorted(tensors) if 'patch_embedding' in name)}")
assert not any("vision_model" in name for name in made)
assert loaded.keys() == published.keys()
PYTHON
