#!/bin/bash
# sbatch that checks a training job before it queues: the words after train.slurm or sweep.slurm are read on this
# machine, and a wrong recipe, flag or strategy is told now and not when the nodes have been waited for.
#
#   slurm/submit.sh --nodes=2 --gpus-per-node=8 slurm/train.slurm scripts/train_llava.py deepspeed_zero2 \
#       scripts/configs/llava_lora.yaml
#   slurm/submit.sh --gpus-per-node=1 slurm/sweep.slurm scripts/train_llava.py single_gpu \
#       scripts/configs/llava_lora.yaml slurm/sweep_llava.yaml
#
# All flags before the job file are sbatch's own. A sweep gets its --array from its grid when none is given. A job of less
# than 15 minutes is warned a third of its time before its end, since five minutes could be all of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/environment.sh
source "${ENVIRONMENT_FILE:-slurm/environment.sh}"
mkdir -p slurm/logs

# Slurm's ways to say a time (minutes, minutes:seconds, hours:minutes:seconds, days-hours...) in seconds.
seconds_of() {
    local days=0 parts=()
    if [[ $1 == *-* ]]; then
        days=${1%%-*}
        IFS=: read -ra parts <<<"${1#*-}:0:0"
    else
        IFS=: read -ra parts <<<"$1"
        ((${#parts[@]} > 2)) || parts=(0 "${parts[@]}" 0)
    fi
    echo $(((10#$days * 24 + 10#${parts[0]}) * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}

options=() array='' limit=${SBATCH_TIMELIMIT:-} signal='' before=''
while [[ $# -gt 0 && $1 != *.slurm ]]; do
    [[ $1 != --array* && $1 != -a* ]] || array=given
    case $before$1 in
        --time=* | --time?*) limit=${1#--time=} ;;
        -t?*) limit=${1#-t} ;;
        --signal=* | --signal?*) signal=${1#--signal=} ;;
    esac
    before=''
    [[ $1 != --time && $1 != -t && $1 != --signal ]] || before=$1
    options+=("$1")
    shift
done
# The warning: at most a third of the job's time before its end, or what is trained would be less than what is lost.
if [[ ${1:-} == *train.slurm || ${1:-} == *sweep.slurm ]] && [[ $limit =~ ^[0-9:-]+$ ]]; then
    seconds=$(seconds_of "$limit")
    early=${signal##*@}
    if ((seconds < 180)); then
        echo "submit.sh: --time $limit is too short: a job needs three minutes at least to load a model, train and save" >&2
        exit 2
    elif [[ -z $signal ]]; then
        ((seconds >= 900)) || options+=("--signal=B:USR2@$((seconds / 3))")
    elif [[ $early =~ ^[0-9]+$ ]] && ((early > seconds / 3)); then
        echo "submit.sh: --signal=$signal warns $early s before the end of a job of $seconds s: $((seconds / 3)) at most" >&2
        exit 2
    fi
fi
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
