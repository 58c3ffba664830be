# shellcheck shell=bash disable=SC2034 # the files that source this one use its variables
# Your site, and nothing but your site: every job and every node of a job sources this file first, from the project's
# root. Keep one of the three ways, or leave this file alone and set ENVIRONMENT_FILE to one of your own.
# Partition, account and the like are SBATCH_* variables of your shell or flags of sbatch (docs/cluster.md).

# How a job calls Python: put before every `python` and `accelerate`. Empty: straight from PATH.
PREFIX=()
# More options for srun, such as those of Pyxis.
SRUN_OPTIONS=()

# 1. modules
# set +u  # modules and conda read variables that are not set
# module purge
# module load python/3.11 cuda/12.6

# 2. a venv (also after modules)
if [[ -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

# 3. a container: Apptainer ...
# PREFIX=(apptainer exec --nv --bind "$PWD" finetuning.sif)
# ... or Pyxis
# SRUN_OPTIONS=(--container-image="$PWD/finetuning.sqsh" --container-mounts="$PWD" --container-workdir="$PWD")

# Compute nodes without internet: models and datasets come from the cache, W&B writes files that you upload later.
# export HF_HUB_OFFLINE=1
# export WANDB_MODE=offline

# The kind of your nodes' GPUs, by its name in scripts/gpus.yaml: submit.sh then prints memory and time of a job before it
# queues, and refuses one that does not fit.
# PLAN_GPU=h100
