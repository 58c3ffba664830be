#!/bin/bash
# sbatch that checks a training job before it queues: the words after train.slurm or sweep.slurm are read on this
# machine, and a wrong recipe, flag or strategy is told now and not when the nodes have been waited for.
#
#   slurm/submit.sh --nodes=2 --gpus-per-node=8 slurm/train.slurm scripts/train_llava.py deepspeed_zero2 \
#       scripts/configs/llava_lora.yaml
#   slurm/submit.sh --gpus-per-node=1 slurm/sweep.slurm scripts/train_llava.py single_gpu \
#       scripts/configs/llava_lora.yaml slurm/sweep_llava.yaml
#
# All flags before the job file are sbatch's own. A sweep gets its --array from its grid when none is given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/environment.sh
source "${ENVIRONMENT_FILE:-slurm/environment.sh}"
mkdir -p slurm/logs

options=() array=''
while [[ $# -gt 0 && $1 != *.slurm ]]; do
    [[ $1 != --array* && $1 != -a* ]] || array=given
    options+=("$1")
    shift
done
case ${1:-} in
    */train.slurm)
        "${PREFIX[@]}" python scripts/check_recipe.py "${@:2:2}" --config "${@:4}" >&2
        if [[ -n ${PLAN_GPU:-} ]]; then # a job that does not fit ends here
            nodes=1 gpus=1
            for option in "${options[@]}"; do
                case $option in
                    --nodes=*) nodes=${option#*=} ;;
                    --gpus-per-node=*) gpus=${option##*[=:]} ;;
                esac
            done
            "${PREFIX[@]}" python scripts/plan.py --gpu "$PLAN_GPU" --gpus "$((nodes * gpus))" --strategy "$3" --config "${@:4}" >&2
        fi
        ;;
    */sweep.slurm)
        points=$("${PREFIX[@]}" python scripts/sweep.py "${@:2}" --count | tail -n 1) # libraries print before it
        [[ -n $array ]] || options+=("--array=0-$((points - 1))")
        ;;
    *.slurm) ;;
    *)
        echo "submit.sh: no job file (slurm/*.slurm) among: ${options[*]}" >&2
        exit 2
        ;;
esac
exec sbatch "${options[@]}" "$@"
