#!/bin/bash
# What train.slurm runs on every node, once: `check` or `train`, then SCRIPT STRATEGY RECIPE [flags].
set -euo pipefail
what=$1 script=$2 strategy=$3 recipe=$4
shift 4
# shellcheck source=slurm/environment.sh
source "${ENVIRONMENT_FILE:-slurm/environment.sh}"

if [[ $what == check ]]; then
    exec "${PREFIX[@]}" python scripts/check_nodes.py "$script" "$strategy" --config "$recipe" "$@"
fi

# Slurm signals every process of a step. The training processes act on it; their launchers must outlive them: this shell
# and accelerate by inheritance, torchrun (which would give the processes 30 s and then kill them) by its own setting.
trap '' TERM USR1 USR2
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT

nodes=()
if ((SLURM_JOB_NUM_NODES * PROCESSES_PER_NODE > 1)); then
    nodes=(--num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$((SLURM_JOB_NUM_NODES * PROCESSES_PER_NODE))"
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
fi
# --quiet: where one process fails, what it said is all there is to say, and accelerate adds no stack trace of its own.
"${PREFIX[@]}" accelerate launch --quiet --config_file "accelerate_configs/$strategy.yaml" "${nodes[@]}" \
    "$script" --config "$recipe" "$@"
