#!/usr/bin/env bash
# One would guess: ROUGE of two equal sentences is 1, of two sentences without a common word 0, in any language.
# Seen: every letter but a-z and 0-9 is dropped before words are counted. Two equal Korean answers score 0, and two
# that contradict each other score 1 where they hold the same number.
# Versions: rouge-score 0.1.2. Python 3.11.
# Source: https://github.com/google-research/google-research/tree/master/rouge, tokenize.py
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile rouge-score==0.1.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer

print(*(f"{name} {version(name)}" for name in ("rouge-score",)), sep=", ")
scorer = RougeScorer(["rougeL"])
pairs = {
    "equal": ("주인공은 해적왕이 되려는 소년입니다.", "주인공은 해적왕이 되려는 소년입니다."),
    "contradicting, same year": ("1999년에 방영을 시작했습니다.", "1999년에 방영이 끝났습니다."),
}
scores = {name: scorer.score(*pair)["rougeL"].fmeasure for name, pair in pairs.items()}
print("rougeL:", scores)
assert scores == {"equal": 0.0, "contradicting, same year": 1.0}
PYTHON
