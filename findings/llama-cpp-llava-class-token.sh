#!/usr/bin/env bash
# One would guess: llama.cpp shows a LLaVA-1.5 what transformers shows it: the features of all patches, in their places.
# Seen: its graph puts the class token behind the patches, while positions and the rows that are read as features count
# as if it came first. So each patch has its neighbour's position, the first is lost, and the class token is read as the
# last. A small trained LLaVA gave 44 of 50 answers of transformers, and all 50 with the two operands swapped; what its
# tokens' log-probabilities differed by fell from 0.48 to 0.002. Shown here in the source: a build takes twenty minutes.
# Versions: llama.cpp as in the source package of llama-cpp-python 0.3.36. Python 3.11, tar, grep.
# Source: https://github.com/ggml-org/llama.cpp/issues/25814
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" download --quiet --no-deps --no-binary :all: --dest "$folder" llama-cpp-python==0.3.36
tar -xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder" --wildcards '*/tools/mtmd/*.cpp'
cd "$folder"/llama_cpp_python-0.3.36/vendor/llama.cpp/tools/mtmd

echo "the class token comes last:"
grep -n 'inp = ggml_concat(ctx0, inp, model.class_embedding, 1);' models/llava.cpp
echo "the rows that are read begin at the second:"
grep -n 'int patch_offset = model.class_embedding ? 1 : 0;' clip.cpp
grep -n 'patches\[i\] = i + patch_offset;' clip.cpp
