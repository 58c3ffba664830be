#!/usr/bin/env bash
# One would guess: with FSDP and `FSDP_CPU_RAM_EFFICIENT_LOADING`, `from_pretrained` reads the weights in the first process
# of a machine only, and the others have room for what they will be sent.
# Seen: every process reads them. In another type than the file's each holds a copy of its own in main memory.
# Versions: torch 2.13.0, transformers 5.23.0, numpy 2.4.6; torch is the CPU build where pip finds one. Python 3.11, Linux.
# Source: https://huggingface.co/docs/accelerate/usage_guides/fsdp, cpu_ram_efficient_loading
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
cat >probe.py <<'PYTHON'
import multiprocessing
import os
import re
from importlib.metadata import version

LAUNCH = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29533", "ACCELERATE_USE_FSDP": "true",
          "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def in_memory():
    """MiB of this process that lie in no file."""
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\s*(\d+)", file.read())[1]) / 1024


def load(rank, found):
    os.environ |= LAUNCH | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    import torch
    from transformers import LlamaForCausalLM

    torch.distributed.init_process_group("gloo")
    before = in_memory()
    model = LlamaForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    found[rank] = (weight.device.type, weight.float().mean().item(), in_memory() - before)
    torch.distributed.barrier()


if __name__ == "__main__":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    print(*(f"{name} {version(name)}" for name in ("torch", "transformers")), sep=", ")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000))
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, 0.5)
    model.save_pretrained("model")
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2 / 2**20
    context = multiprocessing.get_context("spawn")
    found = context.Manager().dict()
    processes = [context.Process(target=load, args=(rank, found)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for rank, (device, mean, grown) in sorted(found.items()):
        print(f"process {rank}: on {device}, mean {mean}, {grown:.0f} MiB more in memory of {weights:.0f} MiB of bf16 weights")
        assert device == "cpu" and mean == 0.5 and grown > 0.9 * weights
PYTHON
venv/bin/python probe.py
