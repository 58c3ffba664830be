"""Read a training command as the job will, without training: a mistake is told before the job queues.

    python scripts/check_recipe.py scripts/train_llava.py ddp --config scripts/configs/llava_lora.yaml --lora_r 16

The words of slurm/train.slurm. Prints the dataset, the run's folder, and what each GPU must hold at least; exits with 1 and
all that is wrong otherwise.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning import command
from finetuning.command_line import read_command
from finetuning.flags import Parser
from finetuning.strategy import Strategy, launch_problems

if TYPE_CHECKING:
    from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments

RECIPE = Path(__file__).parent / "configs" / "llava_qlora.yaml"


def main() -> None:
    """Print what the job will do. Raises ValueError with all that is wrong."""
    parser = Parser(__doc__)
    parser.add_argument("script", help="training command, such as scripts/train_llava.py")
    parser.add_argument("strategy", help="file of accelerate_configs/, without .yaml")
    parser.add_argument("--quiet", action="store_true", help="print the two folders only, one on a line")
    args, flags = parser.parse_known_args()
    problems = launch_problems(args.script, args.strategy)
    try:
        words, _ = read_command(RECIPE, flags)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    from finetuning.arguments import parse_arguments  # PyTorch comes with it, once the words are right

    recipe = parse_arguments(RECIPE, words)
    memory = "" if args.quiet else memory_line(args.strategy, *recipe)
    dataset, run = recipe[0].dataset_name, recipe[1].output_dir
    print(f"{dataset}\n{run}" if args.quiet else f"{args.script} under {args.strategy}: {dataset} -> {run}\n{memory}")


def memory_line(
    name: str, script_args: "ScriptArguments", training_args: "TrainingArguments", model_args: "ModelArguments"
) -> str:
    """What each GPU must hold under the strategy `name`. Raises ValueError where the placement cannot be had."""
    from finetuning.models.processing import load_config
    from finetuning.preflight.memory import GIB, describe_job, least_memory, place_without_weights

    try:
        config = load_config(model_args.model_name_or_path, model_args.model_revision)
    except ValueError as error:
        return f"What its GPUs must hold is not known: {error}"
    placed = place_without_weights(config, script_args, training_args, model_args)
    strategy = Strategy.from_file(name)
    if "weights" in strategy.offloads:
        return "Weights, gradients and optimizer lie in main memory; only activations must fit on the GPUs"
    job = describe_job(placed, script_args, training_args, model_args)
    sizes = {
        number: sum(least_memory(replace(job, strategy=replace(strategy, num_processes=number))).values()) / GIB
        for number in ((2, 4, 8) if strategy.shards else (1,))
    }
    shown = ", ".join(f"{size:.1f} GiB" + (f" as one of {n}" if n > 1 else "") for n, size in sizes.items())
    return f"Each GPU must hold at least {shown}, before it sees a row; activations come on top"


if __name__ == "__main__":
    command.run(main)
