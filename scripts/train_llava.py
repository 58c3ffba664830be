"""Fine-tune LLaVA on your own images and questions, with LoRA, QLoRA or in full.

    accelerate launch --config_file accelerate_configs/t4.yaml scripts/train_llava.py
    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/train_llava.py \
        --config scripts/configs/llava_lora.yaml --learning_rate 2e-5

Without --config it runs scripts/configs/llava_qlora.yaml on data/cctv: one 16 GB T4 is enough. The same command again
continues an interrupted run. Everything that a recipe says can be overridden by a flag of the same name.
"""

from finetuning import command  # first: see there

# isort: split

from pathlib import Path

from finetuning import start
from finetuning.command_line import refuse_wrong_command

RECIPE = Path(__file__).parent / "configs" / "llava_qlora.yaml"
if __name__ == "__main__":
    # Before PyTorch is imported, which takes seconds
    command.run(lambda: start.prepare(refuse_wrong_command(RECIPE, __doc__, vision=True)))

from transformers import set_seed

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments, parse_arguments
from finetuning.data.bad_rows import pass_over_bad_rows
from finetuning.data.collator import LlavaDataCollator
from finetuning.data.dataset import open_dataset, open_split, open_validation
from finetuning.data.label_audit import check_first_rows
from finetuning.data.mixture import mix, open_mixed_in
from finetuning.data.shared_prefix import SharedPrefixCollator, group_by_image, uses_shared_prefix
from finetuning.models.loading import load_base_for_training
from finetuning.models.processing import follow_tiles, load_config, processing_class_of
from finetuning.models.trainable import describe_trainable, set_trainable
from finetuning.preflight.checks import refuse_what_cannot_work
from finetuning.preflight.strategies import rows_without_image, searches_unused_parameters
from finetuning.tasks.exam import counting_questions, open_exam
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
    dataset = open_dataset(script_args.dataset_name, vision=True)
    train_rows = open_split(dataset, script_args.dataset_train_split, script_args.dataset_name)
    validation_rows = open_validation(dataset, script_args, training_args)
    parts = open_mixed_in(script_args, vision=True, seed=training_args.seed)
    own_rows, train_rows = train_rows, mix(train_rows, parts, script_args)
    skipped: list[dict] = []
    if script_args.skip_bad_rows:
        train_rows, validation_rows, skipped = pass_over_bad_rows(
            script_args.skip_bad_rows, train_rows, validation_rows
        )
    training_args.ddp_find_unused_parameters = searches_unused_parameters(script_args, training_args, train_rows)
    refuse_what_cannot_work(script_args, training_args, model_args, config, train_rows)
    plan = plan_run(script_args, training_args, model_args)
    exam = open_exam(script_args, own_rows, validation_rows)
    settle_best(training_args, answers_are_scored=exam is not None)
    processor = processing_class_of(script_args, training_args, model_args)
    if script_args.dry_run:
        dry_run(script_args, training_args, model_args, config, train_rows, processor)
        return
    checkpoint = begin(script_args, training_args, model_args, config, plan, skipped_rows=skipped)
    start.ended("checks")

    # Model
    if script_args.image_max_tiles is not None:
        follow_tiles(config, processor)
    for rows in (train_rows, *parts):  # of a mixture its own first, then the first of each part
        check_first_rows(rows, processor, config)
    model = load_base_for_training(
        model_args, training_args, trains_base_weights="lora" not in script_args.placement.values()
    )
    start.ended("weights")
    if script_args.image_max_tiles is not None:
        follow_tiles(model.config, processor)
    set_seed(training_args.seed)  # here, because some strategies draw random numbers while they load
    model = set_trainable(model, script_args, model_args)
    if model_args.init_lora_weights == "eva" and checkpoint is None:
        begin_from_inputs(model, train_rows, processor)
    placed = describe_trainable(model)
    shares_prefix = uses_shared_prefix(script_args, train_rows, config)
    lacks_pictures = any(rows is not None and rows_without_image(rows) for rows in (train_rows, validation_rows))
    speed = prepare_model(
        *(model, script_args, training_args),
        rows=train_rows,
        processing_class=processor,
        shares_prefix=shares_prefix,
        lacks_pictures=lacks_pictures,
    )

    # Train
    counting = counting_questions(train_rows, script_args.task) if script_args.number_loss == "crps" else []
    training_args.remove_unused_columns = False  # the collator takes what it needs, and keeps the row's number
    trainer = FineTuningTrainer(
        model=model,
        args=training_args,
        data_collator=(SharedPrefixCollator if shares_prefix else LlavaDataCollator)(
            processor, training_args.pad_to_multiple_of, config
        ),
        train_dataset=group_by_image(train_rows) if shares_prefix else train_rows,
        eval_dataset=validation_rows,
        processing_class=processor,
        exam=exam,
        eval_max_new_tokens=script_args.eval_max_new_tokens,
        checkpoint_layers=script_args.checkpoint_layers,
        number_loss=make_number_loss(script_args, processor, counting),
        image_augmentation=script_args.image_augmentation or (),
    )
    trainer.accelerator.print(placed, speed, describe_run(trainer), sep="\n")
    start.ended("adapters and Trainer")
    result = trainer.train(resume_from_checkpoint=checkpoint)

    # Save
    finish(trainer, result.metrics)


if __name__ == "__main__":
    end_with_launcher()
    command.run(lambda: main(*parse_arguments(RECIPE)), errors=(ValueError, TrainingDiverged))
