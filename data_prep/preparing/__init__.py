"""Steps of data preparation. They share with training what must be the same: opening a picture, reading a count."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from finetuning import command as command
from finetuning.failures import harmless as harmless
from finetuning.failures import sentence as sentence
from finetuning.flags import Parser as Parser
