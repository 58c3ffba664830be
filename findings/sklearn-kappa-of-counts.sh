#!/usr/bin/env bash
# One would guess: cohen_kappa_score with linear or quadratic weights weighs a disagreement of two annotators about a count
# by how far apart their counts are.
# Seen: by how many of the counts that occur anywhere lie between them. With frames of 0, 1, 2 and 50 people, 2 against 50
# costs what 1 against 2 costs, so the annotator who misses 48 people agrees as well as the one who misses one. A frame with
# another count, on which both agree, changes what the same disagreement costs. labels=range(51) gives the distances of the
# numbers.
# Versions: scikit-learn 1.9.1. Python 3.11.
# Source: https://scikit-learn.org/stable/modules/model_evaluation.html#cohen-s-kappa
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile scikit-learn==1.9.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from sklearn.metrics import cohen_kappa_score

print(*(f"{name} {version(name)}" for name in ("scikit-learn",)), sep=", ")
first = [0, 0, 1, 1, 2, 2, 50, 50]
misses_one = [0, 0, 1, 1, 2, 1, 50, 50]
misses_48 = [0, 0, 1, 1, 2, 2, 50, 2]
seen = {}
for labels in (None, range(51)):
    for weights in ("linear", "quadratic"):
        seen[labels, weights] = [
            round(float(cohen_kappa_score(first, other, weights=weights, labels=labels)), 2)
            for other in (misses_one, misses_48)
        ]
        print(f"{weights}, labels={labels}, agreement where 1 and where 48 people are missed: {seen[labels, weights]}")
assert seen[None, "linear"] == [0.9, 0.89] and seen[None, "quadratic"] == [0.95, 0.94]
assert seen[range(51), "linear"] == [0.99, 0.62] and seen[range(51), "quadratic"] == [1.0, 0.62]

# A frame of 20 people, on which both agree, stands between 2 and 50 from then on.
first, misses_one, misses_48 = ([*counts, 20] for counts in (first, misses_one, misses_48))
more = [round(float(cohen_kappa_score(first, other, weights="linear")), 2) for other in (misses_one, misses_48)]
print(f"linear, with a frame of 20 that both count right: {more}")
assert more == [0.93, 0.85]
PYTHON
