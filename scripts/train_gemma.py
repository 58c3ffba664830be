"""Fine-tune Gemma on your own questions and answers, with LoRA, QLoRA or in full.

    accelerate launch --config_file accelerate_configs/t4.yaml scripts/train_gemma.py
    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/train_gemma.py \
        --config scripts/configs/gemma_lora.yaml --num_train_epochs 5

Without --config it runs scripts/configs/gemma_qlora.yaml on data/anime: one 16 GB T4 is enough. The same command again
continues an interrupted run. Everything that a recipe says can be overridden by a flag of the same name.
"""

from finetuning import command  # first: see there

# isort: split

from pathlib import Path

from finetuning import start
from finetuning.command_line import refuse_wrong_command

RECIPE = Path(__file__).parent / "configs" / "gemma_qlora.yaml"
if __name__ == "__main__":
    # Before PyTorch is imported, which takes seconds
    command.run(lambda: start.prepare(refuse_wrong_command(RECIPE, __doc__, vision=False)))

from transformers import set_seed

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments, parse_arguments
from finetuning.data.dataset import load_wording, open_dataset, open_split, open_validation, refuse_pictures
from finetuning.data.label_audit import check_first_rows
from finetuning.data.mixture import mix, open_mixed_in
from finetuning.kernels.packed_attention import register_packed_attention
from finetuning.models.loading import load_base_for_training
from finetuning.models.processing import load_config, processing_class_of
from finetuning.models.trainable import describe_trainable, set_trainable
from finetuning.preflight.checks import refuse_what_cannot_work
from finetuning.preflight.strategies import searches_unused_parameters
from finetuning.tasks.anime_facts import AnimeExam, FactReader
from finetuning.tasks.exam import open_exam
from finetuning.training.best_checkpoint import settle_best
from finetuning.training.dry_run import dry_run
from finetuning.training.eva import begin_from_inputs
from finetuning.training.number_loss import make_number_loss
from finetuning.training.planned_run import plan_run
from finetuning.training.prepare_model import prepare_model
from finetuning.training.resume import begin, describe_run, finish
from finetuning.training.stop_signals import end_with_launcher
from finetuning.training.trainer import FineTuningTrainer, TrainingDiverged


def main(script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments) -> None:
    """One training from its recipe to its saved weights. Raises ValueError where it cannot work, TrainingDiverged."""
    start.imported()
    # Run: a fresh start, or the checkpoint of an interrupted one
    config = load_config(model_args.model_name_or_path, model_args.model_revision)
    dataset = open_dataset(script_args.dataset_name, vision=False)
    train_rows = open_split(dataset, script_args.dataset_train_split, script_args.dataset_name)
    refuse_pictures(train_rows, script_args.dataset_name)
    validation_rows = open_validation(dataset, script_args, training_args)
    parts = open_mixed_in(script_args, vision=False, seed=training_args.seed)
    own_rows, train_rows = train_rows, mix(train_rows, parts, script_args)
    training_args.ddp_find_unused_parameters = searches_unused_parameters(script_args, training_args, train_rows)
    refuse_what_cannot_work(script_args, training_args, model_args, config, train_rows)
    plan = plan_run(script_args, training_args, model_args)
    wording = load_wording(script_args.dataset_name)
    if wording and script_args.task is None and script_args.eval_answers:
        exam = AnimeExam(FactReader(wording, own_rows), own_rows, script_args.eval_answers)
    else:
        exam = open_exam(script_args, own_rows, validation_rows)
    settle_best(training_args, answers_are_scored=exam is not None)
    tokenizer = processing_class_of(script_args, training_args, model_args)
    if script_args.dry_run:
        dry_run(script_args, training_args, model_args, config, train_rows, tokenizer)
        return
    checkpoint = begin(script_args, training_args, model_args, config, plan)
    start.ended("checks")

    # Model
    for rows in (train_rows, *parts):  # of a mixture its own first, then the first of each part
        check_first_rows(rows, tokenizer, config, max_length=training_args.max_length)
    register_packed_attention()
    model = load_base_for_training(
        model_args, training_args, trains_base_weights="lora" not in script_args.placement.values()
    )
    start.ended("weights")
    set_seed(training_args.seed)  # here, because some strategies draw random numbers while they load
    model = set_trainable(model, script_args, model_args)
    if model_args.init_lora_weights == "eva" and checkpoint is None:
        begin_from_inputs(model, train_rows, tokenizer)
    placed = describe_trainable(model)
    speed = prepare_model(model, script_args, training_args, rows=train_rows, processing_class=tokenizer)

    # Train
    trainer = FineTuningTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows.select_columns(["messages"]),
        eval_dataset=validation_rows.select_columns(["messages"]) if validation_rows else None,
        processing_class=tokenizer,
        exam=exam,
        eval_max_new_tokens=script_args.eval_max_new_tokens,
        checkpoint_layers=script_args.checkpoint_layers,
        cuda_graphs=script_args.cuda_graphs,
        number_loss=make_number_loss(script_args, tokenizer),
    )
    trainer.accelerator.print(placed, speed, describe_run(trainer), sep="\n")
    start.ended("adapters and Trainer")
    result = trainer.train(resume_from_checkpoint=checkpoint)

    # Save
    finish(trainer, result.metrics)


if __name__ == "__main__":
    end_with_launcher()
    command.run(lambda: main(*parse_arguments(RECIPE)), errors=(ValueError, TrainingDiverged))
