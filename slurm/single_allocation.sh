#!/usr/bin/env bash
#SBATCH --job-name=flearn
#SBATCH --output=flearn-%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
: "${SLURM_JOB_ID:?submit it with: sbatch [OPTION ...] slurm/single_allocation.sh [CONFIG] [OPTION ...]}"

# The whole run inside one allocation, for sites with long queues.
# Every task of the allocation is a rank, and the stages run one after another. Told of its time limit,
# `flearn run` saves, and asks for another turn; where that is refused, submit the same command again.
# How many GPUs, which partition: options of sbatch, such as --gres=gpu:4.
set -euo pipefail

[[ ${1:--} != -* ]] || set -- configs/llama2_7b_zsre.yaml "$@"
cd "${SLURM_SUBMIT_DIR:?}"
export PATH=$PWD/.venv/bin:$PATH
# For launch/commands/run.py: a task of this job is a rank. For submitit: which scheduler's variables say so.
export FLEARN_ALLOCATION=1 SUBMITIT_EXECUTOR=slurm
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" flearn run "$@"
