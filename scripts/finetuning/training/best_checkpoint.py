"""The best checkpoint, not the last: which metric says so, when to stop early, and where it lies after a restart."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerState

from finetuning.arguments import TrainingArguments
from finetuning.run_folder import CHECKPOINT

SCORE = "score"  # of the answers: 0 for the best trivial answer, 1 for perfect (`finetuning.tasks.exam`)


def settle_best(training_args: TrainingArguments, *, answers_are_scored: bool) -> None:
    """Make `load_best_model_at_end` fit what a run has: called before anything is loaded.

    Without evaluations of the checkpoints the last weights are the run's; without scored answers the lowest loss on the
    validation rows is the best. Both are said. Raises ValueError where early stopping has nothing to go by.
    """
    args, tell = training_args, PartialState().print
    if args.load_best_model_at_end and not args.evaluates_its_checkpoints:
        if args.eval_strategy == "no":
            reason = "evaluates nothing while it trains"
        elif args.save_strategy == "no":
            reason = "saves no checkpoint"
        else:
            reason = (
                "saves at steps at which it does not evaluate (save_strategy, save_steps; eval_strategy, eval_steps)"
            )
        tell(f"This run {reason}: its last weights are kept, not its best")
        args.load_best_model_at_end = False
    if not args.load_best_model_at_end:
        args.metric_for_best_model = args.greater_is_better = None
        if args.early_stopping_patience is not None:
            raise ValueError(
                f"early_stopping_patience: {args.early_stopping_patience} stops when the best checkpoint is that old, and this "
                "run keeps none: set load_best_model_at_end: true, with eval_strategy and save_strategy alike"
            )
    elif args.metric_for_best_model.removeprefix("eval_") == SCORE and not answers_are_scored:
        tell("No answers are scored while training: the best checkpoint is the one with the lowest eval_loss")
        args.metric_for_best_model, args.greater_is_better = "loss", False


def best_metric(args: TrainingArguments) -> str:
    """`metric_for_best_model` as evaluations log it, with `eval_`."""
    return f"eval_{args.metric_for_best_model.removeprefix('eval_')}"


def find_best(args: TrainingArguments, state: TrainerState) -> str | None:
    """The best checkpoint so far; also after the run's folder was moved, when the path in `state` is an old one."""
    if not state.best_global_step:
        return None
    folder = Path(args.output_dir) / f"{CHECKPOINT}{state.best_global_step}"
    return str(folder) if folder.is_dir() else None


def kept_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """The step of the weights that a finished run keeps; None where they are those of its last step."""
    return state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None


class StopEarly(EarlyStoppingCallback):
    """Ends a training after `early_stopping_patience` evaluations without a better metric, over restarts, too.

    transformers tells callbacks of an evaluation before the answers are scored: `look` is called by the trainer after.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Take the count of evaluations without a better metric from before a restart."""
        before = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if before:
            self.early_stopping_patience_counter = before["attributes"]["early_stopping_patience_counter"]
            # Killed behind the evaluation that stopped it, a run is at its end.
            control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs) -> None:
        """Nothing: the answers are not scored yet, `look` comes after."""
        pass

    def look(self, args: TrainingArguments, state: TrainerState, control: Any, metrics: dict[str, float]) -> None:
        """Compare the metric, and stop the training where it has not become better for too long."""
        super().on_evaluate(args, state, control, metrics)
        if control.should_training_stop:
            PartialState().print(
                f"Stopping early at step {state.global_step}: {self.early_stopping_patience} evaluations without a better "
                f"{best_metric(args)}"
            )
