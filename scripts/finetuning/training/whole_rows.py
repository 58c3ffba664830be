"""Rows of text are whole, or are cut because the recipe says so: how long each is, is known before the first step."""

from copy import copy

import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset

from finetuning import upstream
from finetuning.arguments import TrainingArguments
from finetuning.training.checkpoints import CheckpointingTrainer

NAMED = 5  # rows that the message names


@upstream.overrides
class WholeRowsTrainer(CheckpointingTrainer):
    """SFTTrainer that cuts no row of text at `max_length` unless `truncate` says so."""

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # The strategies bfd_split and wrapped divide a long row, and lose nothing of it.
        if args.max_length is not None and not (packing and args.packing_strategy != "bfd"):
            uncut = copy(args)
            uncut.max_length, uncut.shuffle_dataset = None, False
            dataset = super()._prepare_dataset(dataset, processing_class, uncut, False, formatting_func, dataset_name)
            refuse_cut_rows(dataset, args, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


def refuse_cut_rows(tokenized: Dataset, args: TrainingArguments, name: str) -> None:
    """Raise ValueError where rows of `tokenized` (`input_ids`) are longer than `max_length`; with `truncate` say how many."""
    lengths = pc.list_value_length(
        tokenized.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    ).to_numpy()
    long = (lengths > args.max_length).nonzero()[0]
    if not len(long):
        return
    found = f"{len(long):,} of {len(lengths):,} {name} rows are longer than max_length: {args.max_length}"
    if args.truncate:
        PartialState().print(f"{found} tokens: they are cut there (truncate: true)")
        return
    rows = ", ".join(map(str, long[:NAMED])) + (", ..." if len(long) > NAMED else "")
    raise ValueError(
        f"{found} tokens (rows {rows}; the longest has {lengths.max():,}). Cut there, they would lose the ends of their "
        f"answers, or all of them: set max_length: {lengths.max()}, shorten these rows, or set truncate: true"
    )
