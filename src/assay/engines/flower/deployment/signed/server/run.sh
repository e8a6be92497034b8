#!/bin/sh
# Start the swarm, or go on after the last pool the relay has kept. Further keys of app/pyproject.toml: ./run.sh timeout=900
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
keys=
for word do # options go to `flwr run`, keys to the run config
    shift
    case $word in -*) set -- "$@" "$word" ;; *) keys="$keys $word" ;; esac
done
exec flwr run ../app assay "$@" --run-config "folder=\"$PWD\"$keys"
