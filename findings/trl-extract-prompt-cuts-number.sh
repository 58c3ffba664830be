#!/usr/bin/env bash
# One would guess: `extract_prompt` of a preference pair without a prompt ends the prompt where the answers begin, or at
# least at a word.
# Seen: in text the prompt is all that the two have in common, letter by letter. Of "There are 23 people." against "There are
# 27 people." the 2 goes to the prompt: what is compared is "3 people." with "7 people.", and the prompt's last token is none
# that a model reads in use. Messages are cut between messages. DPOTrainer does this by itself to rows without a prompt.
# Versions: torch 2.13.0, transformers 5.23.0, trl 1.16.0, datasets 5.2.0. Python 3.11.
# Source: https://huggingface.co/docs/trl/main/en/data_utils#trl.extract_prompt
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from trl.data_utils import extract_prompt

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "datasets")), sep=", ")
question, answers = "How many people are there?", ("There are 23 people.", "There are 27 people.")
text = extract_prompt({name: f"{question} {answer}" for name, answer in zip(("chosen", "rejected"), answers)})
messages = extract_prompt(
    {
        name: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for name, answer in zip(("chosen", "rejected"), answers)
    }
)
print("text:", text)
print("messages:", {name: [message["content"] for message in part] for name, part in messages.items()})
assert text == {"prompt": f"{question} There are 2", "chosen": "3 people.", "rejected": "7 people."}
assert messages["prompt"] == [{"role": "user", "content": question}]
assert messages["chosen"][0]["content"] == answers[0]
PYTHON
