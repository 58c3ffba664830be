#!/bin/bash
# Prepare, train, evaluate and merge in one go: four jobs, each of which starts when the one before it has succeeded.
# When one fails, those after it are cancelled.
#
#   TRAIN_OPTIONS="--nodes=2 --gpus-per-node=8" EVALUATE_OPTIONS=--gpus-per-node=4 MERGE_OPTIONS=--gpus-per-node=1 \
#       slurm/chain.sh scripts/train_llava.py deepspeed_zero2 scripts/configs/llava_lora.yaml -- \
#       --frames frames --labels labels.csv --messages messages.txt
#
# Before the --: the words of train.slurm. After it: the flags of the data's preparation; without --, the dataset is
# there already. Dataset and run folder are the recipe's own. sbatch flags of each job: PREPARE_OPTIONS and so on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/environment.sh
source "${ENVIRONMENT_FILE:-slurm/environment.sh}"
mkdir -p slurm/logs

training=()
while [[ $# -gt 0 && $1 != -- ]]; do
    training+=("$1")
    shift
done
case ${training[0]:-} in
    */train_llava.py) prepare=data_prep/prepare_cctv.py evaluate=scripts/evaluate_llava.py ;;
    */train_gemma.py) prepare=data_prep/prepare_anime.py evaluate=scripts/evaluate_gemma.py ;;
    *)
        echo "chain.sh: expected scripts/train_llava.py or scripts/train_gemma.py first, got: ${training[*]:-nothing}" >&2
        exit 2
        ;;
esac
# The dataset and the run's folder, one on a line (after what libraries print), or the end with what is wrong.
facts=$("${PREFIX[@]}" python scripts/check_recipe.py "${training[@]:0:2}" --config "${training[@]:2}" --quiet | tail -n 2)
{ read -r dataset && read -r run; } <<<"$facts"

after=()
submit() { # NAME OPTIONS JOB_FILE WORD...: queue behind the job before
    local name=$1 words
    read -r -a words <<<"$2"
    shift 2
    job=$(sbatch --parsable --job-name="$name" "${after[@]}" "${words[@]}" "$@")
    job=${job%%;*}
    after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
    echo "$name: job $job"
}
if [[ ${1:-} == -- ]]; then
    submit prepare "${PREPARE_OPTIONS:-}" slurm/prepare.slurm "$prepare" "${@:2}" --output "$dataset"
fi
submit train "${TRAIN_OPTIONS:-}" slurm/train.slurm "${training[@]}"
submit evaluate "${EVALUATE_OPTIONS:-}" slurm/evaluate.slurm "$evaluate" --run "$run"
submit merge "${MERGE_OPTIONS:-}" slurm/evaluate.slurm scripts/merge_adapter.py --run "$run" --output "$run-merged"
