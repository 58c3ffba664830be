#!/usr/bin/env bash
# One would guess: a minor release keeps the names of the arguments that a model passes to its decoder layers, or an
# old name raises.
# Seen: 5.24.0 passes cache where 5.23.0 passed past_key_values. A layer of one's own that takes the old name, and
# the rest as keywords, runs without a cache: no error, no warning, other tokens.
# Versions: transformers 5.23.0, transformers 5.24.0, torch 2.13.0; torch is the CPU build where pip finds one.
# Python 3.11.
# Source: https://github.com/huggingface/transformers, models/llama/modeling_llama.py of both releases
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, __version__
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class Layer(LlamaDecoderLayer):
    """The published layer with the signature of 5.23.0."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, position_embeddings=None, **kwargs):
        normed = self.input_layernorm(hidden_states)
        attention = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        if past_key_values is not None:
            attention["past_key_values"] = past_key_values
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, **attention)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=100,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
prompt = torch.arange(3, 11)[None]
published = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
for layer in model.model.layers:
    layer.__class__ = Layer
own = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
print(
    f"torch {torch.__version__}, transformers {__version__}: the layer's tokens are",
    "the same" if torch.equal(published, own) else "others",
)
PYTHON
for release in 5.23.0 5.24.0; do
  python3.11 -m venv "$folder/$release"
  "$folder/$release/bin/pip" install --quiet --no-compile torch==2.13.0 "transformers==$release"
  "$folder/$release/bin/python" "$folder/probe.py" | tee -a "$folder/seen.txt"
done
grep -q '5.23.0: .* the same$' "$folder/seen.txt"
grep -q '5.24.0: .* others$' "$folder/seen.txt"
