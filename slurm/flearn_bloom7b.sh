#!/usr/bin/env bash
#SBATCH --job-name=flearn
#SBATCH --output=flearn-%j.log
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=30
: "${SLURM_JOB_ID:?submit it with: sbatch slurm/flearn_bloom7b.sh [CONFIG] [--set KEY=VALUE ...]}"

# Submits an experiment's stages as a chain of jobs, and says where to look.
# This job itself ends within seconds. It needs one CPU, the shared folder that it was submitted from, and the
# project's environment: .venv/, or flearn on the PATH.
# What is particular to your cluster goes into one file: --set cluster.site=slurm/sites/<yours>.yaml
set -euo pipefail

[[ ${1:--} != -* ]] || set -- configs/bloom_7b_zsre.yaml "$@"
cd "${SLURM_SUBMIT_DIR:?}"
PATH=$PWD/.venv/bin:$PATH exec flearn run --on slurm "$@"
