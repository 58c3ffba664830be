"""Which test fails when an entry of `finetuning.upstream` is switched off; as a script, shows that each of them does.

    PYTHONPATH=tests:scripts python tests/support/proofs.py                   every entry: some minutes
    PYTHONPATH=tests:scripts python tests/support/proofs.py Trainer.log ...   these

One entry by hand: pytest TEST --without Trainer.log
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
UPSTREAM = "test_upstream.py"
RESTARTED = f"{UPSTREAM}::test_a_restarted_run_tells_of_its_last_attempt_alone_without_ours"
LOADED = "commands/test_train_llava.py::test_a_full_run_continues_from_its_weights_and_keeps_the_best"
UNPACKED = (
    "kernels/test_lora_projections.py::test_weights_quantised_twice_are_unpacked_as_one_stack_and_stay_quantised_twice"
)
PLACEHOLDERS = f"{UPSTREAM}::test_each_pass_counts_the_image_tokens_without_ours"
FUSED = f"{UPSTREAM}::test_projections_run_one_by_one_without_our_layer"
COSTS = f"{UPSTREAM}::test_a_step_costs_more_without"
LAYERS = "training/test_activation_checkpointing.py::test_the_first_layers_are_computed_again_and_gradients_stay"
WORKERS = f"{UPSTREAM}::test_slurms_signal_ends_the_loader_processes_without_ours"
AUGMENTED = "data/test_augmentation.py::test_each_epoch_changes_a_row_anew_and_a_resumed_one_as_the_first_would_have"
READING = "faults/test_safe_reading.py"
PROOFS = {
    # training/
    "Trainer._run_epoch": "training/test_best_checkpoint.py::test_training_stops_early_by_the_answers_score",
    "Trainer.get_batch_samples": f"{UPSTREAM}::test_the_wait_for_data_is_timed",
    "Trainer._get_num_items_in_batch": f"{UPSTREAM}::test_supervised_tokens_are_counted_where_the_loss_is",
    "Trainer._clip_grad_norm": COSTS,
    "Trainer._get_grad_norm": COSTS,
    "Trainer._build_accelerator_args": f"{UPSTREAM}::test_ddp_keeps_gradients_where_it_averages_them",
    "Trainer.floating_point_ops": COSTS,
    "Trainer._get_dataloader": WORKERS,
    "Trainer._get_output_dir": f"{UPSTREAM}::test_a_checkpoint_that_fails_half_way_lies_where_a_restart_looks_without_our_folder",
    "Trainer._save_checkpoint": f"{UPSTREAM}::test_a_checkpoint_is_not_proven_whole_without_ours",
    "Trainer._load_from_checkpoint": LOADED,
    "Trainer._load_best_model": LOADED,
    "Trainer.train": f"{UPSTREAM}::test_tokens_are_counted_from_zero_after_a_restart_without_ours",
    "Trainer._finalize_training": RESTARTED,
    "Trainer.training_step": f"{UPSTREAM}::test_a_step_out_of_memory_ends_the_run_without_ours",
    "Trainer.compute_loss": "kernels/test_linear_cross_entropy.py::test_a_training_step_asks_nothing",
    "Trainer.log": f"{UPSTREAM}::test_a_log_has_no_speed_without_ours",
    "Trainer.evaluate": f"{UPSTREAM}::test_an_evaluation_asks_nothing_without_ours",
    "SFTTrainer._prepare_dataset": "training/test_validation_loss.py::test_rows_that_would_be_cut_are_refused_by_number_unless_the_recipe_cuts_them",
    "Trainer.create_optimizer": "training/test_learning_rates.py::test_the_first_step_moves_each_part_by_its_own_rate",
    "Trainer.evaluation_loop": "training/test_validation_loss.py::test_eval_loss_is_the_mean_over_tokens_for_every_batch_size_and_packing",
    "Trainer.save_model": f"{UPSTREAM}::test_a_pickle_and_the_card_of_a_model_named_none_lie_beside_the_weights_without_ours",
    "Trainer.create_model_card": f"{UPSTREAM}::test_a_pickle_and_the_card_of_a_model_named_none_lie_beside_the_weights_without_ours",
    "TrainingArguments.gradient_checkpointing": f"{UPSTREAM}::test_transformers_would_checkpoint_as_well_without_the_two_switches",
    "TrainingArguments.activation_checkpointing": f"{UPSTREAM}::test_transformers_would_checkpoint_as_well_without_the_two_switches",
    "GradientCheckpointingLayer.gradient_checkpointing": LAYERS,
    "GradientCheckpointingLayer._gradient_checkpointing_func": LAYERS,
    "SFTTrainer._total_train_tokens": f"{UPSTREAM}::test_tokens_are_counted_from_zero_after_a_restart_without_ours",
    "Trainer._initial_global_step": RESTARTED,
    "Trainer._total_loss_scalar": RESTARTED,
    "DataLoader.worker_init_fn": WORKERS,
    "DataLoader.__iter__": "training/test_read_ahead.py::test_the_next_epoch_is_asked_for_when_this_one_has_ended",
    # data/
    "DataLoader.collate_fn": AUGMENTED,
    "SeedableRandomSampler.__iter__": AUGMENTED,
    "SeedableRandomSampler.__class__": AUGMENTED,
    "ProcessorMixin._adjust_assistant_masks_indices": "data/test_collator.py::test_answers_are_found_in_lists_as_in_tensors",
    # models/
    "Module.train": COSTS,
    "Module.named_parameters": COSTS,
    "PreTrainedConfig._attn_implementation": "preflight/test_checks.py::test_attention_that_a_config_names_is_not_asked_for",
    "core_model_loading._weight_conversions": f"{UPSTREAM}::test_weights_of_zero_3_are_saved_under_names_of_no_class_without_ours",
    "Linear4bit.support_avx512bf16_for_cpu": f"{UPSTREAM}::test_4_bit_weights_would_be_repacked_for_a_cpu_at_the_first_answer",
    # kernels/
    "LlamaDecoderLayer.forward": FUSED,
    "MistralDecoderLayer.forward": FUSED,
    "Qwen2DecoderLayer.forward": FUSED,
    "GemmaDecoderLayer.forward": FUSED,
    "Gemma3DecoderLayer.forward": FUSED,
    "Linear.forward": f"{UPSTREAM}::test_a_layer_of_the_tower_asks_its_adapters_one_by_one_without_ours",
    "Tensor.data": "kernels/test_lora_projections.py::test_stack_follows_weights_that_are_replaced",
    "QuantState.absmax": UNPACKED,
    "QuantState.nested": "kernels/test_lora_layers.py::test_nf4_gradients_equal_peft",
    "Module.forward": "kernels/test_model_patches.py::test_a_frozen_tower_sees_in_training_what_it_sees_in_inference",
    "LlavaOnevisionModel.get_placeholder_mask": PLACEHOLDERS,
    "LlavaModel.get_placeholder_mask": PLACEHOLDERS,
    "VipLlavaModel.get_placeholder_mask": PLACEHOLDERS,
    "LlavaNextModel.get_placeholder_mask": PLACEHOLDERS,
    "Gemma3Model.get_placeholder_mask": PLACEHOLDERS,
    # distributed/
    "PartialState.wait_for_everyone": f"{UPSTREAM}::test_processes_wait_in_a_collective_without_our_barrier",
    "FullyShardedDataParallelPlugin.mixed_precision_policy": f"{UPSTREAM}::test_fsdp2_reduces_in_16_bits_without_our_policy",
    "PreTrainedModel._no_split_modules": f"{UPSTREAM}::test_fsdp2_wraps_a_frozen_tower_layer_by_layer_without_our_names",
    "stage_1_and_2.is_invalid_grad_norm": COSTS,
    "stage3.is_invalid_grad_norm": COSTS,
    "filesystem.pickle": f"{READING}::test_a_description_that_would_run_code_is_refused",
    "DefaultLoadPlanner.load_bytes": f"{READING}::test_bytes_in_a_sharded_checkpoint_that_would_run_code_are_refused",
    "TorchCheckpointEngine.load": f"{READING}::test_the_reader_can_be_replaced_again_in_one_process",
    "DeepSpeedZeroOptimizer._update_model_bit16_weights": COSTS,
    "DeepSpeedZeroOptimizer.scaled_global_norm": COSTS,
    "modules.quant_state": f"{UPSTREAM}::test_4_bit_weights_in_a_buffer_do_not_say_how_they_are_read_without_our_mark",
}  # fmt: skip
# Compares a launched training with and without, in itself.
COMPARES_ITSELF = COSTS


def fails_without(entry: str, test: str) -> bool:
    """Whether the test fails with the entry switched off, in a process that has imported the libraries already."""
    child = os.fork()
    if child == 0:
        import pytest

        os._exit(
            pytest.main([str(TESTS / test), "--without", entry, "-q", "-x", "-p", "no:cacheprovider", "--tb=line"])
        )
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def main(entries: list[str]) -> None:
    import torch  # noqa: F401 - once, for all of them
    import trl  # noqa: F401

    useless = []
    for entry in entries or [entry for entry, test in PROOFS.items() if test != COMPARES_ITSELF]:
        print(f"---- {entry}", flush=True)
        if not fails_without(entry, PROOFS[entry]):
            useless.append(entry)
    sys.exit(f"these proofs pass without their entry: {', '.join(useless)}" if useless else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
