"""How long does a training take to its first step, and what with? Runs the command to the end of that step, and leaves.

    python benchmarks/start_time.py scripts/train_llava.py --config scripts/configs/llava_sample.yaml \
        --output_dir outputs/start

The command gets its own arguments. Prints a line for each stage: seconds from the start of the process to its end, and of
the stage alone. Nothing is saved.
"""

import importlib
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Stage -> the function that is its work, where the commands look it up.
STAGES = {
    "dataset": "finetuning.data.dataset.open_dataset",
    "checks": "finetuning.preflight.checks.refuse_what_cannot_work",
    "processor": "finetuning.models.processing.load_processing_class",
    "first rows": "finetuning.data.label_audit.check_first_rows",
    "weights": "finetuning.models.loading.load_base_for_training",
    "adapters": "finetuning.models.trainable.set_trainable",
    "kernels": "finetuning.training.prepare_model.prepare_model",
    "trainer": "finetuning.training.trainer.FineTuningTrainer.__init__",
}


def since_start() -> float:
    """Seconds since this process was started (Linux: field 22 of /proc/self/stat, in ticks since the boot)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def note(stage: str, seconds: float) -> None:
    """One line of the timeline."""
    print(f"{since_start():8.2f} s  {stage:<12} {seconds:6.2f} s", flush=True)


def watch(stage: str, name: str) -> None:
    """Let the function `name` (module.function or module.Class.method) note how long its first call took."""
    path, method = name.split("."), name.rpartition(".")[2]
    depth = len(path) - (2 if path[-2][:1].isupper() else 1)
    owner = importlib.import_module(".".join(path[:depth]))
    for part in path[depth:-1]:
        owner = getattr(owner, part)
    function = getattr(owner, method)

    def with_time(*args, **kwargs):
        started = time.perf_counter()
        result = function(*args, **kwargs)
        wait_for_gpu()
        note(stage, time.perf_counter() - started)
        return result

    setattr(owner, method, with_time)


def wait_for_gpu() -> None:
    """Let the host wait for all that was launched."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def leave_after_first_step() -> Callable:
    """A callback that notes when the first step began and ended, and leaves."""
    from transformers import TrainerCallback

    class Leave(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            wait_for_gpu()
            note("first step", time.perf_counter() - self.began)
            sys.stdout.flush()
            os._exit(0)  # loader processes and threads with it; nothing is saved

    return Leave()


def main() -> None:
    """Run the command and print when each part of its start was over, in seconds."""
    command, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(command).parent.resolve()))
    before = since_start()
    for stage, name in STAGES.items():
        watch(stage, name)
    note("imports", since_start() - before)
    from finetuning.training.trainer import FineTuningTrainer

    begin = FineTuningTrainer.__init__

    def with_leave(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.add_callback(leave_after_first_step())

    FineTuningTrainer.__init__ = with_leave
    sys.argv = [command, *arguments]
    runpy.run_path(command, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main()
