# The README's installation in an image: Python 3.11, the pinned packages, the scripts in /workspace.
#
#   docker build --tag finetuning .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD:/workspace" finetuning \
#       accelerate launch --config_file accelerate_configs/t4.yaml scripts/train_llava.py
#
# --volume puts this checkout in place of the copy: data/, models/ and outputs/ are then yours and stay.
FROM debian:bookworm-slim

# Triton builds a small module with a C compiler and Python's headers when a kernel is first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gcc git libc6-dev make python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3.11 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /workspace
COPY requirements.txt requirements-serve.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-serve.txt

# Whatever user runs it can write its caches.
ENV HOME=/tmp HF_HOME=/workspace/models/hub
COPY . .
CMD ["bash"]
