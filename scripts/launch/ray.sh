#!/bin/bash
# Serves replicas of a model on the machines of a Ray cluster, each replica a process on one machine:
#
#   scripts/launch/ray.sh head MODEL [NAME=VALUE ...]   # on the first machine: tp=4 accelerator=GPU max_replicas=8
#   scripts/launch/ray.sh join HEAD:6379                # on the others; replicas come to them as they are needed
#
# Arguments are those of tpjax.deploy.ray; api_key_file=FILE has keys of clients, one a line. Ray checks the replicas'
# health, starts those that fail again, and adds some when requests queue. MODEL is a path that every machine has, or a
# model of a hub; TPJAX_CACHE, if it is set when Ray starts on a machine, is where that keeps what it fetches and
# compiles. Ports: 6379, 8000 for clients, and those that Ray takes between the machines, all of them open to nobody else:
# whoever reaches them runs what they like.
set -euo pipefail
usage() { echo "usage: $0 head MODEL [NAME=VALUE ...] | $0 join HEAD:PORT" >&2; exit 2; }
[[ $# -ge 2 ]] || usage
case $1 in
    head)
        ray start --head --port 6379
        serve start --http-host 0.0.0.0
        exec serve run tpjax.deploy.ray:build_app model="$2" "${@:3}"
        ;;
    join) exec ray start --address "$2" --block ;;
    *) usage ;;
esac
