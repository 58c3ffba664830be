"""TRL's SFTTrainer, watched: speed and data wait in every log, answers scored at every evaluation, an end to a bad loss."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import MLflowCallback, TrackioCallback, WandbCallback
from transformers.trainer import TRAINING_ARGS_NAME

from finetuning import run_folder, tracking, upstream
from finetuning.data.augmentation import augment_batches
from finetuning.data.collator import CollateSupervisedRows
from finetuning.data.dataset import describe_rows
from finetuning.distributed.barrier import barriers_without_timeout
from finetuning.distributed.deepspeed_zero import shorten_optimizer_step
from finetuning.distributed.fsdp2 import keep_fp32_reductions
from finetuning.distributed.full_weights import full_trained_weights, full_weights
from finetuning.distributed.machines import watch_machines
from finetuning.distributed.sharded_layers import num_sharded
from finetuning.failures import sentence
from finetuning.inference.generation import generate_answers
from finetuning.kernels.cuda_graphs import CudaGraphs
from finetuning.kernels.linear_cross_entropy import use_supervised_rows
from finetuning.manifest import follow_umask
from finetuning.models.parts import base_model_of, cache_named_parameters, switch_mode_only_on_change
from finetuning.models.picture_parameters import add_to_adapter
from finetuning.strategy import Strategy
from finetuning.training.activation_checkpointing import LayerCheckpointing
from finetuning.training.best_checkpoint import StopEarly, find_best
from finetuning.training.learning_rates import LearningRatesTrainer
from finetuning.training.log_lines import LogLines
from finetuning.training.number_loss import NumberLoss, outputs_and_number_loss
from finetuning.training.read_ahead import end_readers, read_next_epoch_ahead
from finetuning.training.resume import refuse_other_layout, refuse_other_sharding
from finetuning.training.step_metrics import RunSums, ShowProgress, StepMetrics, Watched
from finetuning.training.stop_signals import StopRequest, StopTogether, leave_interrupted, obey_parent_only


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the rows, and says what to try.

    On a GPU it is raised one batch later, so that no step waits to see its loss. Nothing is saved in between.
    """


def diverged(loss: float, watched: Watched, texts: list[str], split: str) -> TrainingDiverged:
    """The error for a batch whose loss is not finite: its step, its rows by number and text, and what to try."""
    named = [
        f"  row {watched.rows[position] if watched.rows else '(packed)'}: {' '.join(text.split())[-160:]}"
        for position, text in enumerate(texts)
    ]
    advice = (
        "Try, in this order: a lower learning_rate or a longer warmup_steps; bf16 in place of fp16 where the GPU has it; "
        "max_grad_norm: 0.3; then look at these rows. The last checkpoint is intact: the same command with these changes "
        "and a new --output_dir starts again."
    )
    head = f"the loss is {loss} at step {watched.step}. {split} rows of this batch:"
    return TrainingDiverged("\n".join([head, *named, advice]))


@upstream.overrides
class FineTuningTrainer(LearningRatesTrainer):
    """SFTTrainer that can be interrupted, logs throughput, refuses a loss that is not finite, and asks while it trains.

    Args (the rest is SFTTrainer's):
        exam: what is asked at each evaluation; None for nothing. It has `questions` (rows whose `messages` end with a
            user turn, and `images`), `score(answers) -> (metrics without the eval_ prefix, AnswerTable)`,
            `score_distributions(model, processing_class, batch_size) -> metrics`, `headlines` (metric -> label, for
            progress.json) and `describe(metrics)` (one sentence on the last evaluation).
        checkpoint_layers: decoder layers computed again in the backward pass: `auto`, `all` or a number.
        cuda_graphs: run a text model's passes as CUDA graphs (`finetuning.kernels.cuda_graphs`).
        number_loss: added to the loss of training (`finetuning.training.number_loss`), and logged under its name.
        image_augmentation: how training pictures are changed at random (`finetuning.data.augmentation`); empty: not at all.

    Logged beside TRL's metrics: `restarts` of the run, `samples_per_second` and `tokens_per_second` over all processes, `data_wait` (share of
    the time that this process waited for its next batch), `peak_memory_gib` (CUDA only: the largest of all processes,
    and each one's).
    """

    def __init__(
        self,
        *args,
        exam: Any | None = None,
        eval_max_new_tokens: int = 32,
        checkpoint_layers: str = "all",
        cuda_graphs: bool = False,
        number_loss: NumberLoss | None = None,
        image_augmentation: Sequence[str] = (),
        **kwargs,
    ):
        model, training_args = kwargs["model"], kwargs["args"]
        chooses_layers = takes_over_checkpointing(training_args, Strategy.from_environment())
        # SFTTrainer turns the adapters of a quantised model into bf16, which loses small updates and which a T4 lacks:
        # the fp32 masters are put back.
        masters = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.stop_request, self._restarts = StopRequest(), 0
        with barriers_without_timeout():  # the first process tokenises text, and the others then read what it stored
            super().__init__(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if name in masters and parameter.dtype != masters[name].dtype:
                parameter.data = masters[name].to(parameter.device)
        if self.accelerator.is_fsdp2:
            quantised = getattr(base_model_of(model), "is_loaded_in_4bit", False)
            keep_fp32_reductions(self.accelerator.state.fsdp_plugin, quantised=quantised)
        # Nothing that is looked at in a step may have to come from the GPU first.
        self.data_collator = CollateSupervisedRows(self.data_collator)
        self.image_augmentation = image_augmentation
        self.number_loss = number_loss
        if number_loss is not None:
            self.data_collator = number_loss.collate(self.data_collator)
        use_supervised_rows(base_model_of(model))
        self.step_metrics = StepMetrics(self._refuse_bad_loss)
        self.run_sums = RunSums()
        self.exam = exam
        self.stop_early = StopEarly(patience) if (patience := training_args.early_stopping_patience) else None
        self._resumed_at, self.loaders = 0, []
        self.eval_max_new_tokens = eval_max_new_tokens
        self.layer_checkpointing = LayerCheckpointing(self, checkpoint_layers) if chooses_layers else None
        add_callbacks(self, cuda_graphs=cuda_graphs)
        self._num_weights: int | None = None
        switch_mode_only_on_change(model)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train; after a stop signal, save and leave the process with code 75: the same command continues."""
        attempts = run_folder.read_progress(Path(self.args.output_dir)).get("attempts", [])
        self._restarts = max(len(attempts) - 1, 0)
        if resume_from_checkpoint is not None:
            refuse_other_layout(Path(resume_from_checkpoint), self.strategy)
            if self.args.deepspeed_plugin is not None:
                refuse_other_sharding(Path(resume_from_checkpoint), self.args.deepspeed_plugin.deepspeed_config)
            self.run_sums.continue_from(Path(resume_from_checkpoint))
            upstream.replace(self, "_total_train_tokens", self.run_sums.num_tokens)
            self._resumed_at = int(Path(resume_from_checkpoint).name.rpartition("-")[2])
        self.step_metrics.start_interval(self._total_train_tokens)
        with self.stop_request, watch_machines():
            result = super().train(resume_from_checkpoint, **kwargs)
        self.step_metrics.read_arrived(wait=True)
        end_readers(self.loaders)
        if self.stop_request.agreed and self.state.global_step < self.state.max_steps:
            leave_interrupted(self, self.stop_request.reason)
        return result

    def _finalize_training(self, trial, num_train_samples, start_time):
        # Loss, time and steps of the attempts before, up to the checkpoint that this one continued.
        if self.run_sums.seconds:
            upstream.replace(self, "_initial_global_step", 0)
            upstream.replace(self, "_total_loss_scalar", self._total_loss_scalar + self.run_sums.loss)
        return super()._finalize_training(trial, num_train_samples, start_time - self.run_sums.seconds)

    def get_batch_samples(self, *args, **kwargs):
        started = time.perf_counter()
        with rows_named(self.train_dataset):
            batches = super().get_batch_samples(*args, **kwargs)
        self.step_metrics.waited += time.perf_counter() - started
        return batches

    def _get_num_items_in_batch(self, batch_samples, device):
        # Counted on the GPU: a count that is copied there would wait for the whole step before.
        labels = [{"labels": batch["labels"].to(device, non_blocking=True)} for batch in batch_samples]
        return super()._get_num_items_in_batch(labels, device)

    def training_step(self, model, inputs, *args, **kwargs):
        """A step; out of memory on one GPU, once more with more layers checkpointed, where no gradients were there before."""
        may_repeat = (
            self.layer_checkpointing is not None
            and self.accelerator.num_processes == 1
            and all(parameter.grad is None for group in self.optimizer.param_groups for parameter in group["params"])
        )
        while True:
            try:
                return super().training_step(model, dict(inputs), *args, **kwargs)
            except torch.OutOfMemoryError:
                if not may_repeat:
                    raise
            self.step_metrics.forget_unfinished(inputs["input_ids"])
            model.zero_grad(set_to_none=True)
            self.layer_checkpointing.take_more()

    def _clip_grad_norm(self, model):
        # DeepSpeed's engine has clipped; accelerate would wait for its whole step to hand out a number for the log.
        return model.get_global_grad_norm() if self.strategy.is_deepspeed else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        # The log reads a tensor when it comes to it; transformers would read DeepSpeed's at every step.
        return super()._get_grad_norm(model) if grad_norm is None else grad_norm

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        # Gradients stay where DDP averages them: it would copy each back when the last message has come.
        accelerator_args = super()._build_accelerator_args(**kwargs)
        accelerator_args["kwargs_handlers"][0].gradient_as_bucket_view = True
        return accelerator_args

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x tokens x weights, counted once: transformers counts at every step, 15 ms for a 7B model with adapters."""
        if self._num_weights is None:
            model = self.accelerator.unwrap_model(self.model)
            self._num_weights = model.num_parameters(exclude_embeddings=True) + num_sharded(model)
        return 6 * inputs["input_ids"].numel() * self._num_weights

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss, and what the logs need of it, without a host sync. Raises TrainingDiverged for a bad one."""
        rows, num_supervised = inputs.pop("rows", None), inputs.pop("num_supervised")
        targets = inputs.pop("numbers", None)
        self.step_metrics.num_rows += len(inputs["input_ids"])
        plain = self.args.loss_type == "nll" and self.label_smoother is None and not self.aux_loss_enabled
        if self.model.training and plain and not return_outputs:
            return self._loss_without_waiting(model, inputs, rows, num_items_in_batch, targets)
        if self.model.training or return_outputs:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            result = self.validation_loss(model, inputs, num_supervised)
        loss = result[0] if isinstance(result, tuple) else result
        self._refuse_bad_loss(loss.item(), Watched(self.state.global_step + 1, rows, inputs["input_ids"]))
        return result

    def _loss_without_waiting(self, model, inputs, rows: list[int] | None, num_items_in_batch, targets) -> torch.Tensor:
        """TRL's loss; its metrics, and whether it is finite, are looked at when the GPU has come so far."""
        outputs, of_numbers = outputs_and_number_loss(model, inputs, self.number_loss, targets)
        supervised = outputs.label_mask.sum()
        average_over = supervised if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / average_over.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients
        if self.number_loss is not None:  # a mean over the batch, of which a step may have several
            loss = loss + self.number_loss.weight * of_numbers / self.current_gradient_accumulation_steps
        with torch.no_grad():
            real = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["position_ids"])
            numbers = [loss, supervised, outputs.entropy.sum(), outputs.is_top1.sum(), real.sum(), of_numbers]
            numbers = torch.stack([number.double() for number in numbers])
            self.step_metrics.watch(self.state.global_step + 1, rows, inputs["input_ids"], numbers)
        return loss

    def _note_metrics(self) -> None:
        """TRL's metrics of the batches since the last call, over all processes."""
        sums = self.step_metrics.gather(self.accelerator)
        if sums is None:
            return
        supervised = sums[:, 0].clamp(min=1)
        metrics = self._metrics["train"]
        metrics["entropy"] += (sums[:, 1] / supervised).tolist()
        metrics["mean_token_accuracy"] += (sums[:, 2] / supervised).tolist()
        if self.number_loss is not None:
            metrics["number_loss"] += (sums[:, 4] / self.accelerator.num_processes).tolist()
        upstream.replace(self, "_total_train_tokens", self._total_train_tokens + int(sums[:, 3].sum()))
        metrics["num_tokens"] = [self._total_train_tokens]

    def _refuse_bad_loss(self, loss: float, watched: Watched) -> None:
        if not math.isfinite(loss):
            texts = self._tokenizer.batch_decode(watched.input_ids, skip_special_tokens=True)
            raise diverged(loss, watched, texts, "Training" if self.model.training else "Validation")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self._note_metrics()
        if "loss" in logs:
            logs["restarts"] = self._restarts
            logs |= self.step_metrics.speed(self.accelerator, self._total_train_tokens)
        super().log(logs, start_time)
        if "loss" in logs:
            self.step_metrics.start_interval(self._total_train_tokens)

    def evaluate(self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """The loss on validation rows, then the scores of answers; all metrics are returned."""
        started = time.perf_counter()
        self.step_metrics.read_arrived(wait=True)
        with rows_named(self.eval_dataset):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.exam is not None:
            scores, table = answers_scored(self)
            scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
            self.log(dict(scores))
            metrics |= scores
            if self.is_world_process_zero():
                tracking.log_answers(self, table)
        self._weigh(metrics)
        # An evaluation is no training time.
        self.step_metrics.leave_out(time.perf_counter() - started)
        return metrics

    def _weigh(self, metrics: dict[str, float]) -> None:
        """Let the scored answers decide on the best checkpoint and on stopping early; transformers saw the loss alone."""
        # An evaluation right after a restart is one that a stop signal put off: its checkpoint may be the best one.
        put_off = self.state.global_step and self.state.global_step == self._resumed_at
        if put_off and self._determine_best_metric(metrics, None):
            self.state.best_model_checkpoint = find_best(self.args, self.state)
        if self.stop_early is not None:
            self.stop_early.look(self.args, self.state, self.control, metrics)

    def _save_checkpoint(self, model, trial) -> None:
        self._note_metrics()  # of a bad loss nothing is saved
        since_last_log = self.accelerator.gather(self._tr_loss).mean().item()
        self.run_sums.note(self._total_loss_scalar + since_last_log, self._total_train_tokens)
        super()._save_checkpoint(model, trial)

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        make_ready(self, loader.base_dataloader, training=kwargs.get("is_training", False))
        return loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        trained = self.accelerator.unwrap_model(self.model)
        if isinstance(trained, PeftModel) and not self.strategy.replicates:
            trained = full_trained_weights(self.model)
            self._save(output_dir, state_dict=trained)
        elif self.accelerator.is_fsdp2 and not _internal_call:
            # The end of a full fine-tune; its checkpoints hold shards, and transformers would leave those only.
            self._save(output_dir, state_dict=full_weights(self.accelerator, self.model))
        else:
            super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            complete_saved(Path(output_dir or self.args.output_dir), trained)


def complete_saved(folder: Path, trained: torch.nn.Module | dict[str, torch.Tensor]) -> None:
    """What transformers and PEFT left of a saved model in `folder`, made whole and readable; `trained` as `add_to_adapter`'s."""
    add_to_adapter(folder, trained)
    follow_umask(folder.glob("*.safetensors"))
    # A pickle that nothing here reads: arguments.yaml says the same, to people too.
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)


@contextmanager
def rows_named(rows: Dataset) -> Iterator[None]:
    """What the collator says of a row gets the dataset and the split that it is of; other errors are passed on."""
    try:
        yield
    except ValueError as error:
        said = sentence(error)
        if not said.startswith("row "):
            raise
        raise ValueError(
            f"{describe_rows(rows)}, {said.rstrip()}. Correct it and prepare again; a picture that does not decode is passed "
            "over with --skip_bad_rows 1, and the same command continues from the last checkpoint"
        ) from error


def make_ready(trainer: FineTuningTrainer, loader: DataLoader, *, training: bool) -> None:
    """Loader processes that obey their parent alone, change training pictures, and read the next epoch ahead; in place.

    `loader` is the one inside accelerate's wrapper, which takes no new attributes.
    """
    listen = partial(obey_parent_only, signals=trainer.stop_request.signals, then=loader.worker_init_fn)
    upstream.replace(loader, "worker_init_fn", listen)
    if training and trainer.image_augmentation:
        augment_batches(loader, trainer.image_augmentation, trainer.args.seed)
    read_next_epoch_ahead(loader)
    trainer.loaders.append(loader)


def add_callbacks(trainer: FineTuningTrainer, *, cuda_graphs: bool) -> None:
    """What happens at logs, steps and evaluations beside TRL's own, in this order."""
    headlines = trainer.exam.headlines if trainer.exam else {}
    trainer.pop_callback(ProgressCallback)
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(LogLines(headlines))
    if trackers := list(filter(None, map(trainer.pop_callback, (MLflowCallback, TrackioCallback)))):
        trainer.args.run_name = trainer.args.run_name or Path(trainer.args.output_dir).name
        trainer.add_callback(tracking.NeverStops(*trackers))
    if trainer.pop_callback(WandbCallback):
        trainer.add_callback(tracking.WandbCallbackThatReturns())
    trainer.add_callback(StopTogether(trainer.stop_request))
    shown = ShowProgress(headlines)
    for callback in filter(None, (trainer.stop_early, shown, trainer.layer_checkpointing)):
        trainer.add_callback(callback)
    if cuda_graphs:  # after the choice of the layers
        trainer.add_callback(CudaGraphs(trainer))
    trainer.add_callback(SpareTheHost(trainer))
    trainer.add_callback(trainer.run_sums)


def takes_over_checkpointing(training_args: Any, strategy: Strategy) -> bool:
    """Whether the layers to recompute are chosen here: without sharded weights. The Trainer's own switches are then off."""
    if (
        not training_args.gradient_checkpointing
        or training_args.gradient_checkpointing_kwargs
        or strategy.shards_weights
    ):
        return False
    # Both names of one switch: transformers would checkpoint the vision tower too, and have it asked for gradients that
    # nobody uses.
    upstream.replace(training_args, "gradient_checkpointing", False)
    upstream.replace(training_args, "activation_checkpointing", False)
    return True


def answers_scored(trainer: FineTuningTrainer) -> tuple[dict[str, float], Any]:
    """The exam's questions answered by the model as it is: metrics without the eval_ prefix, and the table of answers."""
    model, exam, distributions = trainer.accelerator.unwrap_model(trainer.model), trainer.exam, {}
    with trainer.accelerator.autocast():
        answers = generate_answers(
            model,
            trainer.processing_class,
            exam.questions,
            batch_size="auto",
            max_new_tokens=trainer.eval_max_new_tokens,
        )
        # Sharded weights need the same passes on every process, and counts are dealt out.
        if not trainer.strategy.shards_weights:
            distributions = exam.score_distributions(
                model, trainer.processing_class, trainer.args.per_device_eval_batch_size
            )
    scores, table = exam.score(answers)
    return scores | distributions, table


class SpareTheHost(TrainerCallback):
    """No walk through thousands of modules, or to hundreds of parameters, that a step can do without."""

    def __init__(self, trainer: FineTuningTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Cache names of parameters, or shorten DeepSpeed's step, now that a checkpoint has been read."""
        # Now, because until here a checkpoint may have been read. FSDP2 replaces its parameters as it goes.
        if self.trainer.strategy.replicates:
            cache_named_parameters(self.trainer.model_wrapped)
        elif self.trainer.strategy.is_deepspeed:
            shorten_optimizer_step(self.trainer.model_wrapped)
