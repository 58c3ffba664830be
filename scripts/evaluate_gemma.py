"""What does a run know of the titles it was taught, and of titles it never saw? Asks the base and the tuned model.

    python scripts/evaluate_gemma.py --run outputs/gemma-sample
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/evaluate_gemma.py \
        --run outputs/gemma-qlora --dataset data/anime --batch_size 32

Taught titles (split `test`) are asked in words that training never used: right answers are memory. Titles never taught
(split `validation`) cannot be known: what is right there is a guess, and tells how much of the rest is guessing, too.
Writes outputs/<run>/evaluation/facts/ (metrics.json, answers.jsonl, table.md, pictures) and outputs/<run>/report.html.
Other questions and answers than prepare_anime.py's are asked and scored as evaluate_llava.py does, split by split.
Stopped half way, the same command continues; finished, it shows what is there.
"""

import argparse

from finetuning import command, start
from finetuning.flags import ANSWERS_KEPT, evaluation_parser
from finetuning.model_files import refuse_missing_dataset
from finetuning.run_folder import EvaluationFolder, digest_weights, find_again, open_run, untuned_model

LOSS_BATCH = 16  # rows whose loss is computed at once where --batch_size is auto


def main(args: argparse.Namespace) -> None:
    """Ask base and tuned model the titles' questions, score them and write the evaluation into the run."""
    run, arguments = open_run(args.run)
    refuse_missing_dataset(args.dataset, vision=False)
    start.prepare(untuned_model(run), engine=args.engine)
    # PyTorch comes with these: once there is something to evaluate.
    from datasets import Dataset

    from finetuning.data.dataset import load_wording, open_dataset
    from finetuning.device import open_processes
    from finetuning.evaluation.answering import AskedModels, answer_with_both, digest, start_evaluation
    from finetuning.evaluation.page import write_evaluation
    from finetuning.evaluation.perplexity import losses_of_both
    from finetuning.folder_lock import give_back
    from finetuning.pages import model_names, speak
    from finetuning.tasks.anime_facts import TitlesExam
    from finetuning.tasks.evaluate import accepted_changes, engine_settings, evaluate, show

    start.imported()

    # Questions: rows of both splits, cut before the answer
    state = open_processes()
    name = args.dataset or arguments["dataset_name"]
    source = args.dataset or find_again(run, name)
    wording = load_wording(source)
    if wording is None or args.task is not None:
        return evaluate(args, vision=False)
    exam = TitlesExam(open_dataset(source, vision=False), wording, name, args.limit)
    questions = exam.questions
    settings = {
        "dataset": name,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "questions_sha256": digest([[question["question"], question["reference"]] for question in questions]),
        "weights_sha256": digest_weights(run),
    }
    base = untuned_model(run)
    settings |= accepted_changes(run, arguments, base, args) | engine_settings(run, args)
    folder = EvaluationFolder(run, "facts")
    if not start_evaluation(folder, settings, overwrite=args.overwrite):
        # Answers and losses, of both models on the same prompts
        models = AskedModels(run, base, args.base_precision)
        prompts = Dataset.from_list([{"messages": question["messages"]} for question in questions])
        answers, _ = answer_with_both(
            *(models, prompts, folder),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            engine=args.engine,
        )
        losses = losses_of_both(
            models, questions, batch_size=LOSS_BATCH if args.batch_size == "auto" else args.batch_size
        )
        if state.is_main_process:
            say = speak(args.language)
            findings = exam.find(answers, losses, name, model_names(say), say)
            write_evaluation(run, folder, base, findings, settings, language=args.language, is_headline=True)
    elif state.is_main_process:
        print("This evaluation is finished already, and shown here; --overwrite makes it anew.")
    if state.is_main_process:
        show(folder, is_headline=True)
    give_back(folder.folder)
    state.destroy_process_group()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of an evaluation, with this task's sizes."""
    return evaluation_parser(__doc__, max_new_tokens=128).parse_args(argv)


if __name__ == "__main__":
    command.run(lambda: main(parse_arguments()), stopped=ANSWERS_KEPT)
