"""Steps of data preparation. They share with training what must be the same: opening a picture, reading a count."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
