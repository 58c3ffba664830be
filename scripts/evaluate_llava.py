"""How good are a run's answers about pictures, and did training help? Asks base and tuned model held-out questions.

    python scripts/evaluate_llava.py --run outputs/llava-sample
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/evaluate_llava.py \
        --run outputs/llava-qlora --dataset data/cctv --split test --batch_size 16

Which task the rows are (counting, yes or no, a choice, ...) is read off the data, as in training. Writes
outputs/<run>/evaluation/<split>/ (metrics.json, answers.jsonl, table.md, pictures) and outputs/<run>/report.html, a page
that opens in any browser; of another dataset than the run's own outputs/<run>/evaluation/<dataset>/<split>/. Stopped half
way, the same command continues; finished, it shows what is there.
"""

import argparse

from finetuning import command, start
from finetuning.flags import ANSWERS_KEPT, evaluation_parser
from finetuning.model_files import refuse_missing_dataset
from finetuning.run_folder import open_run, untuned_model


def main(args: argparse.Namespace) -> None:
    """Evaluate the run. Raises ValueError where run or dataset is missing, before PyTorch is imported."""
    run, _ = open_run(args.run)
    refuse_missing_dataset(args.dataset, vision=True)
    start.prepare(untuned_model(run), engine=args.engine)
    from finetuning.tasks.evaluate import evaluate  # PyTorch comes with it: once there is something to evaluate

    start.imported()
    evaluate(args, vision=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of an evaluation, with this task's sizes."""
    return evaluation_parser(__doc__, max_new_tokens=32).parse_args(argv)


if __name__ == "__main__":
    command.run(lambda: main(parse_arguments()), stopped=ANSWERS_KEPT)
