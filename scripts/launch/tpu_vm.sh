#!/bin/bash
# Serves a model over all hosts of a TPU slice: scripts/launch/tpu_vm.sh NAME ZONE MODEL [options of tpjax serve]
#
# NAME is of a slice made with `gcloud compute tpus tpu-vm create`, on whose hosts tpjax[tpu,serve] is installed. The
# server is on worker 0, at its port 8000: ssh -L 8000:localhost:8000; /ready says when it has loaded. MODEL is a path
# that every host has (a mounted bucket or disk), or a model of a hub, which every host then fetches for itself, as it
# compiles for itself: TPJAX_CACHE on the mounted disk does both once. Run this in tmux: it ends with your connection.
set -euo pipefail
[[ $# -ge 3 ]] || { echo "usage: $0 NAME ZONE MODEL [options of tpjax serve]" >&2; exit 2; }
name=$1 zone=$2
shift 2
options=$(printf '%q ' "$@")

# One process for each host: JAX finds the others in the TPU's metadata. A process that was killed leaves libtpu's lock
# file, and the next one would say that the TPU is in use; nobody else's process is touched. Any loss ends all hosts'
# processes with a status that is not 0, and each starts again; 0 is the end of a drain, 2 bad input.
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
    export TPJAX_CACHE=\${TPJAX_CACHE:-\$HOME/.cache/tpjax}
    while true; do
        pgrep -x tpjax >/dev/null || rm -f /tmp/libtpu_lockfile
        tpjax serve $options --distributed
        status=\$?
        [ \$status -eq 0 ] || [ \$status -eq 2 ] && exit \$status
        sleep 5
    done"
