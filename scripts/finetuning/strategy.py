"""How a launch divides the work: one process, DDP, DeepSpeed's ZeRO or PyTorch's FSDP. No other module compares strategies."""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from finetuning.flags import did_you_mean, nearest_path

COMMANDS = Path(__file__).parent.parent
CONFIGS = "accelerate_configs"
STRATEGIES = COMMANDS.parent / CONFIGS
# In the environment of a launch by ZeRO-3 or FSDP2 once frozen layers are sharded here: the kind. accelerate then sees DDP.
SHARDS_LAYERS_ONLY = "FINETUNING_SHARDS_LAYERS_ONLY"
# What each stage of ZeRO shards beside the stages before it (arXiv 1910.02054, section 5).
SHARDED_FROM_STAGE = {"optimizer": 1, "gradients": 2, "weights": 3}


@dataclass(frozen=True)
class Strategy:
    """How the work is divided between processes.

    Attributes:
        kind: `one process`, `DDP`, `ZeRO` or `FSDP`.
        stage: ZeRO's stage (0 to 3) or FSDP's version (1 or 2); 0 for the others.
        num_processes: of the launch, over all machines.
        offloads: what lies in main memory: `optimizer`, `weights`, both or nothing.
        shards_layers_only: ZeRO-3 or FSDP2 of which frozen decoder layers alone are sharded (`distributed.layers_only`); the
            library has no part in it.
    """

    kind: str
    stage: int = 0
    num_processes: int = 1
    offloads: tuple[str, ...] = ()
    shards_layers_only: bool = False

    @classmethod
    def from_environment(cls) -> "Strategy":
        """The strategy of this launch, from the variables that `accelerate launch` sets: known before anything is loaded."""

        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if is_set("ACCELERATE_USE_DEEPSPEED"):
            keys = {"optimizer": "OPTIMIZER", "weights": "PARAM"}
            offloads = tuple(
                what
                for what, key in keys.items()
                if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{key}_DEVICE", "none") != "none"
            )
            return cls("ZeRO", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), processes, offloads)
        if is_set("ACCELERATE_USE_FSDP"):
            offloads = ("optimizer", "weights") if is_set("FSDP_OFFLOAD_PARAMS") else ()
            return cls("FSDP", int(os.environ.get("FSDP_VERSION", "1")), processes, offloads)
        if kind := os.environ.get(SHARDS_LAYERS_ONLY):
            return cls(kind, {"ZeRO": 3, "FSDP": 2}[kind], processes, shards_layers_only=True)
        return cls("DDP", num_processes=processes) if processes > 1 else cls("one process")

    @classmethod
    def from_file(cls, name: str) -> "Strategy":
        """What a launch by `accelerate_configs/<name>.yaml` will be; `num_processes` is the file's, 1 where it says none."""
        config = yaml.safe_load((STRATEGIES / f"{name}.yaml").read_text(encoding="utf-8"))
        deepspeed, fsdp = config.get("deepspeed_config"), config.get("fsdp_config")
        processes = config.get("num_processes", 1)
        if deepspeed:
            keys = {"optimizer": "offload_optimizer_device", "weights": "offload_param_device"}
            offloads = tuple(what for what, key in keys.items() if deepspeed.get(key, "none") != "none")
            return cls("ZeRO", deepspeed["zero_stage"], processes, offloads)
        if fsdp:
            offloads = ("optimizer", "weights") if fsdp.get("fsdp_offload_params") else ()
            return cls("FSDP", fsdp["fsdp_version"], processes, offloads)
        return cls("one process" if config["distributed_type"] == "NO" else "DDP", num_processes=processes)

    def __str__(self) -> str:
        """The name in messages: `one process`, `DDP`, `ZeRO-2`, `FSDP2`."""
        return {"ZeRO": f"ZeRO-{self.stage}", "FSDP": f"FSDP{self.stage}"}.get(self.kind, self.kind)

    @property
    def is_one_process(self) -> bool:
        """One process on one device."""
        return self.kind == "one process"

    @property
    def is_ddp(self) -> bool:
        """DistributedDataParallel: the full model in each process."""
        return self.kind == "DDP"

    @property
    def is_deepspeed(self) -> bool:
        """DeepSpeed's own ZeRO, any stage."""
        return self.kind == "ZeRO" and not self.shards_layers_only

    @property
    def is_fsdp(self) -> bool:
        """PyTorch's own FSDP, any version."""
        return self.kind == "FSDP" and not self.shards_layers_only

    @property
    def replicates(self) -> bool:
        """Whether each process holds a full, plain model, optimizer and all: one process, or DDP."""
        return self.is_one_process or self.is_ddp

    @property
    def shards(self) -> tuple[str, ...]:
        """Of `optimizer`, `gradients` and `weights` those of which each process holds a share only."""
        if self.shards_layers_only:
            return ("weights",)
        stage = 3 if self.is_fsdp else self.stage
        return tuple(what for what, first in SHARDED_FROM_STAGE.items() if stage >= first)

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds the full model: every forward pass is then one of all processes together."""
        return "weights" in self.shards

    @property
    def layout(self) -> str:
        """Who lays out a checkpoint's optimizer state: strategies of one layout can read each other's."""
        if self.shards_layers_only:
            return "one process or DDP"
        return {"ZeRO": "DeepSpeed", "FSDP": str(self)}.get(self.kind, "one process or DDP")


def is_set(name: str) -> bool:
    """Whether a variable of the environment says yes, as accelerate's `parse_flag_from_env`, without importing PyTorch."""
    return os.environ.get(name, "").lower() in ("y", "yes", "t", "true", "on", "1")


def divide_batch(global_batch_size: int, largest: int, processes: int) -> tuple[int, int]:
    """Rows a step -> (rows a process takes at once, at most `largest`; how many times it does before a step).

    Raises ValueError with the nearest sizes that can be had when the processes cannot share the rows evenly.
    """
    share, rest = divmod(global_batch_size, processes)
    if rest or not share:
        nearest = [size for size in (share * processes, (share + 1) * processes) if size]
        raise ValueError(
            f"global_batch_size: {global_batch_size} rows a step cannot be shared evenly by {processes} processes: set it "
            f"to {' or '.join(map(str, nearest))}, or launch a number of processes that divides {global_batch_size}"
        )
    at_once = max(rows for rows in range(1, min(largest, share) + 1) if share % rows == 0)
    return at_once, share // at_once


def launch_problems(script: str, strategy: str, processes: int | None = None) -> list[str]:
    """What is wrong with a training command, a file of accelerate_configs/ and a number of processes, if known."""
    commands = sorted(path.name for path in COMMANDS.glob("train_*.py"))
    problems = []
    if not Path(script).is_file() or Path(script).name not in commands:
        problems.append(
            f"{script}: no training command{nearest_path(script) or '.'} There are {', '.join(f'scripts/{name}' for name in commands)}"
        )
    if not (STRATEGIES / f"{strategy}.yaml").is_file():
        known = sorted(path.stem for path in STRATEGIES.glob("*.yaml"))
        problems.append(
            f"{strategy}: no strategy{did_you_mean(strategy, known) or '.'} accelerate_configs/ has {', '.join(known)}"
        )
    elif (processes or 1) > 1 and Strategy.from_file(strategy).is_one_process:
        problems.append(f"{strategy} is for one process, and this job has {processes}: try ddp")
    return problems
