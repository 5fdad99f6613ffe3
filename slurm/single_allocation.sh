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
: "${SLURM_JOB_ID:?submit it with: sbatch [--gres=gpu:4 ...] slurm/single_allocation.sh [CONFIG] [--set KEY=VALUE ...]}"

# The whole run inside one allocation, for sites with long queues: every task of the allocation is a rank, and the stages
# run one after another. Told of its time limit, `flearn run` saves, and asks for another turn; the same command also goes on by hand.
# How many GPUs, which partition: options of sbatch.
set -euo pipefail

[[ ${1:--} != -* ]] || set -- configs/llama2_7b_zsre.yaml "$@"
cd "${SLURM_SUBMIT_DIR:?}"
export PATH=$PWD/.venv/bin:$PATH
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) WORLD_SIZE=$SLURM_NTASKS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

export FLEARN_REQUEUE=1

# A task that sees one GPU (--gpus-per-task) takes that.
# shellcheck disable=SC2016 # each task sets its own rank
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'gpus=${CUDA_VISIBLE_DEVICES:-,}; [[ $gpus == *,* ]] && local_rank=$SLURM_LOCALID
             RANK=$SLURM_PROCID LOCAL_RANK=${local_rank:-0} exec flearn run "$@"' flearn "$@"
