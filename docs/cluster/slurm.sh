#!/usr/bin/env bash
# LoRA on two nodes of eight GPUs:  sbatch slurm.sh lora_finetune --config my.yaml
# One launcher runs on each node. Submit the same command again to go on; --requeue does so by itself after a node fails.
#SBATCH --job-name=torchft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# 120 s before the time is over every launcher gets SIGTERM: the run finishes its step, saves, and exits.
#SBATCH --signal=TERM@120
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

# `replicate` keeps the sums of weights within a node, where they are fast, and only gradients cross the network.
srun tune run "$@" \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head_node:29500" \
    --rdzv-conf read_timeout=120 \
    --max-restarts 3 \
    "parallel.replicate=$SLURM_NNODES"
