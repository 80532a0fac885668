#!/bin/bash
# Serves a model over the GPUs of several nodes: sbatch scripts/launch/slurm.sh MODEL [options of tpjax serve]
#
# No addresses by hand: JAX finds them in SLURM's environment. One task for each GPU, because JAX gives a task the
# GPU of its SLURM_LOCALID alone. The server is on the first node; the log says where.
#SBATCH --job-name=tpjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@60
set -euo pipefail
[[ $# -ge 1 ]] || { echo "usage: sbatch $0 MODEL [options of tpjax serve]" >&2; exit 2; }

# Where all nodes see it, if there is such a place: the compile cache (process 0 alone writes it) and models of a hub.
export TPJAX_CACHE="${TPJAX_CACHE:-$HOME/.cache/tpjax}"
# JAX finds its coordinator through no proxy.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# --kill-on-bad-exit: a process that is lost ends all of them within 30 s, with a status that is not 0; SLURM then starts
# the job again if it is asked to (--requeue, and scontrol requeue from an epilogue). SIGTERM drains.
exec srun --kill-on-bad-exit=1 tpjax serve "$@" --host 0.0.0.0 --distributed
