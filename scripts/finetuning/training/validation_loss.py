"""eval_loss as the mean over the supervised tokens of the validation set, whatever the batches.

transformers averages the means of batches, each counted by its rows. The same model on the same rows then has another
eval_loss for every per_device_eval_batch_size, number of processes and packing. Here sums go from batch to batch.
"""

import torch
from torch import Tensor

from finetuning import upstream
from finetuning.training.whole_rows import WholeRowsTrainer


@upstream.overrides
class ValidationLossTrainer(WholeRowsTrainer):
    """Trainer whose validation loss, entropy and accuracy of tokens are means over supervised tokens.

    The loss is the negative log-likelihood (nats a token), also where training smooths labels or weighs tokens.
    """

    # Loss, number, entropy and right ones of the supervised tokens so far: (4,), fp64.
    _validation_sums: Tensor | float = 0.0

    def validation_loss(self, model: torch.nn.Module, inputs: dict, num_supervised: Tensor) -> Tensor:
        """Mean loss of a batch, and its rows' sums noted. `num_supervised` (rows,): supervised tokens of each row."""
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        numbers = [outputs.log_probs.neg(), torch.ones_like(outputs.log_probs), outputs.entropy, outputs.is_top1]
        numbers = torch.stack([number.flatten()[outputs.label_mask.flatten()].double() for number in numbers], dim=1)
        of_row = torch.arange(len(num_supervised), device=numbers.device).repeat_interleave(num_supervised)
        sums = numbers.new_zeros(len(num_supervised), 4).index_add(0, of_row, numbers)
        # By row, so that accelerate drops those that it repeats to fill the last batch of every process.
        self._validation_sums = self._validation_sums + self.accelerator.gather_for_metrics(sums).sum(0)
        return sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """transformers' loop; then the means over all supervised tokens take the place of its mean of means."""
        self._validation_sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, count, entropy, right = self._validation_sums.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(count, 1)
        metrics = {"entropy": entropy / max(count, 1), "mean_token_accuracy": right / max(count, 1)}
        self._metrics["eval"] |= {name: [value] for name, value in metrics.items()}
        self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]
        return output
