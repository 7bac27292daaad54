#!/usr/bin/env bash
# Train on several machines over ssh: one `tele train` on each, all output here. msrun and torchrun alike.
#
#   HOSTS="node1 node2" deploy/ssh/train.sh --backend ms --config telechat2-7b --layout tp8.dp2 --out runs/first \
#       --resume auto --restarts 3
#
# HOSTS    machines in the order of their ranks; the first is --master, by a name or an address that all of them know
# PORT     of the first machine, with the one after it (default 29500)
# WORKDIR  folder on every machine to start in (default: this one); --out must be on a file system that all of them share
# TELE     the command (default: tele)
# Logs in without a password: keys, or an agent. Ctrl-C ends all machines after a step and a checkpoint.
set -euo pipefail

read -r -a hosts <<<"${HOSTS:?name the machines, e.g. HOSTS=\"node1 node2\"}"
master="${hosts[0]}:${PORT:-29500}"
folder=$(printf '%q' "${WORKDIR:-$PWD}")
pids=()
# A terminal (-tt) passes the interrupt on: without one, ssh would leave the remote process alive.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for rank in "${!hosts[@]}"; do
    words=(train "$@" --nnodes "${#hosts[@]}" --node-rank "$rank" --master "$master")
    ssh -tt -o BatchMode=yes "${hosts[rank]}" "cd $folder && exec ${TELE:-tele} $(printf '%q ' "${words[@]}")" </dev/null &
    pids+=("$!")
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid" || { ended=$?; code=$((code == 0 ? ended : code)); }
done
exit "$code"
