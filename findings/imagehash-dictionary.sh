#!/usr/bin/env bash
# One would guess: an ImageHash is hashable, so a dictionary or set of them finds duplicates of a hundred thousand
# pictures at once.
# Seen: hash() of an ImageHash of 64 bits takes a few hundred values, because bits are folded into sums of eight
# powers of two. A dictionary of them compares each picture with a growing share of all others; str(hash) as the key
# does not.
# Versions: ImageHash 4.3.2. Python 3.11.
# Source: https://github.com/JohannesBuchner/imagehash, ImageHash.__hash__
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile ImageHash==4.3.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import imagehash
import numpy

print(*(f"{name} {version(name)}" for name in ("ImageHash",)), sep=", ")
random = numpy.random.default_rng(0)
hashes = [imagehash.ImageHash(bits) for bits in random.integers(0, 2, (20_000, 8, 8)).astype(bool)]
buckets, texts = len({hash(h) for h in hashes}), len({str(h) for h in hashes})
print(f"20,000 random hashes of 64 bits: {texts:,} different texts, {buckets:,} different values of hash()")
assert texts == 20_000
assert buckets < 2_041
PYTHON
