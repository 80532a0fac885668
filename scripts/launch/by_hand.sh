#!/bin/bash
# Serves a model over two machines, or more, without a cluster manager. On each of them:
#
#   scripts/launch/by_hand.sh 10.0.0.1:29500 2 0 MODEL   # on 10.0.0.1, which has the server
#   scripts/launch/by_hand.sh 10.0.0.1:29500 2 1 MODEL   # on the other
#
# The same model, options and versions on all: a machine that differs is refused by name. All TCP ports between the
# machines have to be open, to nobody else: NCCL and tpjax take free ones. Where a machine has several networks,
# NCCL_SOCKET_IFNAME says which one to use.
set -uo pipefail
[[ $# -ge 4 ]] || { echo "usage: $0 HOST:PORT PROCESSES NUMBER MODEL [options of tpjax serve]" >&2; exit 2; }
coordinator=$1 processes=$2 number=$3
shift 3

# Any loss ends all processes, with a status that is not 0: each machine starts its own again, and they meet anew. Status
# 2 is bad input, which no second try mends; 0 is the end of a drain.
while true; do
    tpjax serve "$@" --host 0.0.0.0 --coordinator "$coordinator" --num-processes "$processes" --process-id "$number" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null; stopping=1' TERM INT
    wait "$child"; status=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
    [[ $status -eq 0 || $status -eq 2 || -n ${stopping-} ]] && exit "$status"
    echo "tpjax ended with status $status; it starts again in 5 s" >&2
    sleep 5
done
