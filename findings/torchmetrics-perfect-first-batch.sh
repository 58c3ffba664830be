#!/usr/bin/env bash
# One would guess: a MetricCollection gives for each of its metrics what the metric gives by itself.
# Seen: after its first update it puts metrics of equal states into one group, and from then on only the group's first is
# updated. MAPE and symmetric MAPE are apart where the first batch has an error in it. Where every count of the first batch
# is right both sums are 0: the two become one, and the symmetric error of all batches is reported as the other. The same
# batches in another order give another symmetric error. compute_groups=False keeps them apart.
# Versions: torch 2.13.0, torchmetrics 1.9.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://lightning.ai/docs/torchmetrics/stable/pages/overview.html#metriccollection
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 torchmetrics==1.9.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from torchmetrics import MetricCollection
from torchmetrics.regression import MeanAbsolutePercentageError, SymmetricMeanAbsolutePercentageError

print(*(f"{name} {version(name)}" for name in ("torch", "torchmetrics")), sep=", ")
right = torch.tensor([12.0, 3.0]), torch.tensor([12.0, 3.0])
wrong = torch.tensor([4.0, 9.0]), torch.tensor([3.0, 2.0])


def errors(batches, **how) -> dict[str, float]:
    metrics = MetricCollection(
        {"mape": MeanAbsolutePercentageError(), "symmetric": SymmetricMeanAbsolutePercentageError()}, **how
    )
    for counts, truth in batches:
        metrics.update(counts, truth)
    return {name: round(float(value), 3) for name, value in metrics.compute().items()}


wrong_first, right_first = errors([wrong, right]), errors([right, wrong])
apart = errors([right, wrong], compute_groups=False)
print(f"a wrong batch, then a right one: {wrong_first}")
print(f"the right one first:             {right_first}")
print(f"the same, compute_groups=False:  {apart}")
assert wrong_first == apart == {"mape": 0.958, "symmetric": 0.39}
assert right_first == {"mape": 0.958, "symmetric": 0.958}
PYTHON
