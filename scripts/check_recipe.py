"""Read a training command as the job will, without training: a mistake is told before the job queues.

    python scripts/check_recipe.py scripts/train_llava.py ddp --config scripts/configs/llava_lora.yaml --lora_r 16

The words of slurm/train.slurm. Prints the dataset and the run's folder; exits with 1 and all that is wrong otherwise.
"""

import argparse
import sys
from pathlib import Path

from finetuning.arguments import parse_arguments
from finetuning.launching import launch_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="training command, such as scripts/train_llava.py")
    parser.add_argument("strategy", help="file of accelerate_configs/, without .yaml")
    parser.add_argument("--quiet", action="store_true", help="print the two folders only, one on a line")
    args, flags = parser.parse_known_args()
    problems = launch_problems(args.script, args.strategy)
    try:
        script_args, training_args, _ = parse_arguments(Path(__file__).parent / "configs" / "llava_qlora.yaml", flags)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        sys.exit("check_recipe.py: " + "\n".join(problems))
    if args.quiet:
        print(f"{script_args.dataset_name}\n{training_args.output_dir}")
    else:
        print(f"{args.script} under {args.strategy}: {script_args.dataset_name} -> {training_args.output_dir}")


if __name__ == "__main__":
    main()
