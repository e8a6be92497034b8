#!/bin/sh
# The node: ./start.sh rows.jsonl     further keys of the node config follow: ./start.sh rows.jsonl threads=2
# Keep it running, and let a supervisor start it again (systemd: Restart=always, RestartSec=20): a node that was killed is
# let in again once Flower counts it as gone, about a minute later. PORT (9094) is for its own processes, here alone.
set -eu
[ $# -ge 1 ] && [ -e "$1" ] || { echo 'usage: ./start.sh ROWS.jsonl [KEY=VALUE...]' >&2; exit 2; }
case $1 in /*) rows=$1 ;; *) rows=$PWD/$1 ;; esac
shift
cd "$(dirname "$0")"
umask 077
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flower-supernode --superlink "${SUPERLINK:-@ADDRESS@}" --root-certificates ca.crt \
    --auth-supernode-private-key node.key --port "${PORT:-9094}" --node-config "data=\"$rows\" $*"
