"""What the commands of scripts/ share. A folder imports only from those above it; root modules import no folder.

arguments, recipe_file, device, strategy, run_folder, tracking, upstream    modules of this folder
data           rows, pictures and dialogues -> batches
models         loading, the parts of a model, what is trainable
kernels        fused LoRA, attention, loss and what else makes a step fast
distributed    DeepSpeed ZeRO, FSDP2, sharded layers, full weights, barriers
inference      answers, and distributions over counts
preflight      all that can be refused before weights are loaded
training       the Trainer, checkpoints, resuming
evaluation     reports, plots, intervals
tasks          one file per task: questions, scores, tables
export         merging an adapter into its base, the model card
"""
