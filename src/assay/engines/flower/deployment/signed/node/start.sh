#!/bin/sh
# The node: ./start.sh node-0     further keys of the node config follow: ./start.sh node-0 quorum=3
# Keep it running, and let a supervisor start it again (systemd: Restart=always, RestartSec=20): a node that was killed is
# let in again once Flower counts it as gone, about a minute later. PORT (9094) is for its own processes, here alone.
set -eu
[ $# -ge 1 ] || { echo 'usage: ./start.sh NAME [KEY=VALUE...]' >&2; exit 2; }
name=$1
shift
cd "$(dirname "$0")"
umask 077
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flower-supernode --superlink "${SUPERLINK:-@ADDRESS@}" --root-certificates ca.crt \
    --auth-supernode-private-key node.key --port "${PORT:-9094}" --node-config "node=\"$name\" folder=\"$PWD\" $*"
