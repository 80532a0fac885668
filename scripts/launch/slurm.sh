#!/bin/bash
# Serves a model over the GPUs of several nodes: sbatch scripts/launch/slurm.sh MODEL [options of tpjax serve]
#
# No addresses by hand: JAX finds them in SLURM's environment. One task for each GPU, because JAX gives a task the
# GPU of its SLURM_LOCALID alone. The server is on the first node, at port 8000; /ready says when it has loaded.
#SBATCH --job-name=tpjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@60
set -uo pipefail
[[ $# -ge 1 ]] || { echo "usage: sbatch $0 MODEL [options of tpjax serve]" >&2; exit 2; }

# Where all nodes see it, if there is such a place: the compile cache (process 0 alone writes it) and models of a hub.
export TPJAX_CACHE="${TPJAX_CACHE:-$HOME/.cache/tpjax}"
# JAX finds its coordinator through no proxy.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# A process that is lost ends all of them within 30 s, with a status that is not 0, and they start again in this
# allocation; a node that is lost ends the job, which --requeue starts again. SIGTERM, from scancel or 60 s before the
# time limit, drains: status 0. Status 2 is bad input, which no second try mends.
while true; do
    srun --kill-on-bad-exit=1 tpjax serve "$@" --host 0.0.0.0 --distributed
    status=$?
    [[ $status -eq 0 || $status -eq 2 ]] && exit "$status"
    echo "tpjax ended with status $status; it starts again in 5 s" >&2
    sleep 5
done
