#!/bin/sh
# Let a node in: ./register.sh "St. Mary" st-mary.pub
# The name is what report and summary call it; nothing else rests on it. The key is its identity.
set -eu
[ $# -eq 2 ] || { echo 'usage: ./register.sh NAME KEY.pub' >&2; exit 2; }
case $2 in /*) key=$2 ;; *) key=$PWD/$2 ;; esac
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flwr supernode register "$key" assay --name "$1"
