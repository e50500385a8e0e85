#!/usr/bin/env bash
#SBATCH --job-name=vpm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vpm-%j.log
# A SLURM job with one process per GPU. Submit from the root of the checkout with its environment active:
#
#   sbatch launch/slurm.sh --config configs/market.py --workdir runs/market
#   sbatch --nodes=1 launch/slurm.sh --config configs/market_released.py --workdir runs/released
#   COMMAND=evaluate sbatch launch/slurm.sh --workdir runs/market
#
# Options of sbatch override the lines above; the rest goes to the command. Every node needs the dataset; the first node
# holds the workdir. Two minutes before the time limit SLURM sends SIGTERM: the run saves, exits with code 143, and is
# requeued to resume. JAX reads its process number from SLURM.
set -uo pipefail

srun --kill-on-bad-exit=0 python -m "vpm_jax.${COMMAND:-train}" --distributed "$@"
code=$?
if ((code == 143)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
