#!/usr/bin/env bash
# One would guess: the weighted interval score of a forecast of counts is the same on every machine with this version of
# scoringrules.
# Seen: with numba installed it is the score of the paper that the documentation names. Without numba, which pip does not
# install with it, half of the median itself is added where half of its distance to the truth belongs: an exact forecast of
# 30 people scores 10 instead of 0.
# Versions: scoringrules 0.10.0, numpy 2.4.6, numba 0.68.1. Python 3.11.
# Source: https://doi.org/10.1371/journal.pcbi.1008618; scoringrules/core/interval/_score.py, weighted_interval_score
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile scoringrules==0.10.0 numpy==2.4.6
cd "$folder"
cat > score.py <<'PYTHON'
import json
import sys

import numpy as np
import scoringrules

truth = 30.0
forecasts = {"exact": (30.0, 30.0, 30.0), "good": (31.0, 28.0, 34.0), "far too low": (10.0, 8.0, 12.0)}
alpha = np.array([0.1])


def by_the_paper(median: float, lower: float, upper: float) -> float:
    """0.5 |y - m| and alpha / 2 times the interval score, divided by K + 0.5; K = 1."""
    outside = max(lower - truth, 0.0) + max(truth - upper, 0.0)
    return (0.5 * abs(truth - median) + alpha[0] / 2 * (upper - lower + 2 / alpha[0] * outside)) / 1.5


scores = {}
for name, (median, lower, upper) in forecasts.items():
    score = scoringrules.weighted_interval_score(
        np.array([truth]), np.array([median]), np.array([[lower]]), np.array([[upper]]), alpha
    )
    scores[name] = [round(float(np.squeeze(score)), 2), round(float(by_the_paper(median, lower, upper)), 2)]
json.dump(scores, sys.stdout)
PYTHON
without=$("$folder/venv/bin/python" score.py)
"$folder/venv/bin/pip" install --quiet --no-compile numba==0.68.1 numpy==2.4.6
"$folder/venv/bin/python" - "$without" "$("$folder/venv/bin/python" score.py)" <<'PYTHON'
import json
import sys
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("scoringrules", "numpy", "numba")), sep=", ")
without, with_numba = (json.loads(text) for text in sys.argv[1:])
for name, (score, expected) in without.items():
    print(f"{name}: {score} without numba, {with_numba[name][0]} with it, {expected} by the paper")
assert all(score == expected for score, expected in with_numba.values())
assert {name: score for name, (score, _) in without.items()} == {"exact": 10.0, "good": 10.53, "far too low": 15.47}
PYTHON
