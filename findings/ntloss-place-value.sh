#!/usr/bin/env bash
# One would guess: a number token loss grows with the distance of numbers, so for 23 the answer 33 costs ten times
# what 24 costs.
# Seen: it compares digit with digit. 33 and 24 cost the same, and for 29 the near 30 costs ten times the far 39.
# Versions: torch 2.13.0, transformers 5.23.0, tokenizers 0.23.3, ntloss 0.3.2; torch is the CPU build where pip
# finds one. Python 3.11.
# Source: https://pypi.org/project/ntloss/
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 ntloss==0.3.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import copy
from importlib.metadata import version

import torch
from ntloss import NTLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "ntloss")), sep=", ")
words = ["<unk>", *"0123456789"]
inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
loss = NTLoss(copy.deepcopy(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")), vocab_size=len(words))


def cost(given: str, truth: str) -> float:
    """Loss where the model is sure of `given`, (1 row, 2 digits, vocabulary) logits."""
    logits = torch.full((1, 2, len(words)), -50.0)
    for place, digit in enumerate(given):
        logits[0, place, words.index(digit)] = 50.0
    return loss(logits, torch.tensor([[words.index(digit) for digit in truth]])).item()


costs = {pair: cost(*pair) for pair in (("24", "23"), ("33", "23"), ("39", "29"), ("30", "29"))}
for (given, truth), value in costs.items():
    print(f"{given} for {truth}: {value:.3f}")
assert abs(costs["24", "23"] - costs["33", "23"]) < 1e-4
assert costs["30", "29"] > 9 * costs["39", "29"]
PYTHON
