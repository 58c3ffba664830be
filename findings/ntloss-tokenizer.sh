#!/usr/bin/env bash
# One would guess: a loss that is given a tokenizer reads it.
# Seen: NTLoss adds ten digits to the tokenizer that it is given. The vocabulary of a Llama-like one has them
# already, so its length stays, no warning comes, and from then on the ids of "23 people" are read back as "2 3
# people". A copy must be passed.
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
from importlib.metadata import version

from ntloss import NTLoss
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "ntloss")), sep=", ")
words = ["<unk>", "▁", *"0123456789", *"peol"]
inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # as Llama's
inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
ids = tokenizer("23 people").input_ids
before = tokenizer.decode(ids), len(tokenizer), len(tokenizer.added_tokens_decoder)
NTLoss(tokenizer)
after = tokenizer.decode(ids), len(tokenizer), len(tokenizer.added_tokens_decoder)
print("text of the same ids, vocabulary, added tokens: before", before, "after", after)
assert before == ("23 people", len(words), 1)
assert "2 3 people" in after[0]
assert after[1:] == (len(words), 11)
PYTHON
