"""Warnings that the pinned libraries cause among themselves, silenced by their exact words.

Nobody who reads one of these can do anything about it. Every other warning is shown. `tests/test_command.py` holds that the
installed libraries still have these words. Standard library only.
"""

import logging
import re
import warnings
from typing import NamedTuple


class Known(NamedTuple):
    """A warning: where it is in a library's source, its words there, and why nobody can act on it."""

    module: str
    words: str
    reason: str


# By Python's warnings:
WARNED = [
    Known(
        "transformers.training_args",
        "is deprecated and will be removed in v6. Use `",
        "TRL 1.16 sets gradient_checkpointing by its old name",
    ),
    Known(
        "transformers.modeling_utils",
        "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` ",
        "PEFT 0.21 and TRL 1.16 read the old name",
    ),
    Known(
        "torch.distributed.distributed_c10d",
        "`torch.distributed.all_gather_into_tensor` is deprecated.",
        "accelerate 1.15 and DeepSpeed 0.19 call the old name",
    ),
    Known(
        "torch.nn.parallel.distributed",
        "`broadcast_buffers` is deprecated. Use `forward_sync_buffers` ",
        "accelerate 1.15 passes the old name on",
    ),
]
# By a logger, whose name is the third word:
LOGGED = {
    "transformers.utils.import_utils": Known(
        "transformers.utils.import_utils",
        "for backward compatibility. Install torchvision to use the default backend, ",
        "torchvision is no requirement: pictures are read with Pillow, as the published processors did",
    ),
    "transformers.trainer_utils": Known(
        "transformers.trainer_utils",
        "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config and generation config. ",
        "TRL sets the token that ends a turn, and transformers 5.23 writes it into the model's config, as it should",
    ),
    "DeepSpeed": Known(
        "deepspeed.accelerator.real_accelerator",
        "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
        "transformers imports DeepSpeed, which looks for a GPU, on machines that have none",
    ),
}


def silence() -> None:
    """Show none of these; called before the libraries are imported."""
    for known in WARNED:
        warnings.filterwarnings("ignore", f".*{re.escape(known.words)}", FutureWarning)
    for logger, known in LOGGED.items():
        logging.getLogger(logger).addFilter(lambda record, words=known.words: words not in record.getMessage())
