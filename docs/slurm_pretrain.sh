#!/bin/bash
# Pretraining on several machines under Slurm:   sbatch docs/slurm_pretrain.sh [flags of 1-pretrain.py]
# To go on after a stop:                         sbatch docs/slurm_pretrain.sh [the same flags] --resume
# Another stage: put its script into the last line. dataset/ and out/ lie where every machine sees them.
#SBATCH --job-name=minimind
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.out

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate

# One task per machine starts torchrun there, and that one process per GPU. All torchruns meet on the first machine, at a port
# that another job on it is unlikely to have. --signal (above) lets every process save two minutes before the time is up.
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
meeting_place=${machines%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$meeting_place" --rdzv_conf join_timeout=60 \
    1-pretrain.py "$@"
