"""What a launch consists of besides its recipe: a training command and a strategy."""

from pathlib import Path

import yaml

COMMANDS = Path(__file__).parent.parent
CONFIGS = "accelerate_configs"
STRATEGIES = COMMANDS.parent / CONFIGS


def launch_problems(script: str, strategy: str, processes: int | None = None) -> list[str]:
    """What is wrong with a training command, a file of accelerate_configs/ and a number of processes, if known."""
    commands = sorted(path.name for path in COMMANDS.glob("train_*.py"))
    problems = []
    if not Path(script).is_file() or Path(script).name not in commands:
        problems.append(f"{script}: no training command; there are {', '.join(f'scripts/{name}' for name in commands)}")
    path = STRATEGIES / f"{strategy}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in STRATEGIES.glob("*.yaml"))
        problems.append(f"{strategy}: no strategy; accelerate_configs/ has {', '.join(known)}")
    elif (processes or 1) > 1 and yaml.safe_load(path.read_text(encoding="utf-8"))["distributed_type"] == "NO":
        problems.append(f"{strategy} is for one process, and this job has {processes}: try ddp")
    return problems


def strategy_of(name: str) -> tuple[str, tuple[str, ...]]:
    """A file of accelerate_configs/ -> what `hardware.strategy` will call it, and what it keeps in main memory."""
    config = yaml.safe_load((STRATEGIES / f"{name}.yaml").read_text(encoding="utf-8"))
    deepspeed, fsdp = config.get("deepspeed_config"), config.get("fsdp_config")
    if deepspeed:
        keys = {"optimizer": "offload_optimizer_device", "weights": "offload_param_device"}
        offloads = tuple(what for what, key in keys.items() if deepspeed.get(key, "none") != "none")
        return f"ZeRO-{deepspeed['zero_stage']}", offloads
    if fsdp:
        return f"FSDP{fsdp['fsdp_version']}", ("optimizer", "weights") if fsdp.get("fsdp_offload_params") else ()
    return "one process" if config["distributed_type"] == "NO" else "DDP", ()
