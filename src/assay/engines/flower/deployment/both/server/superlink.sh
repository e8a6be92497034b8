#!/bin/sh
# Flower's SuperLink. Keep it running: start it again with the same command, superlink.db holds the registered nodes.
# On this machine only (HOST): Flower authenticates nodes, and asks nobody who wants to start runs or register nodes.
# Who reaches the whole port can run code on the server and on every node. README.md says how nodes get in.
set -eu
cd "$(dirname "$0")"
umask 077
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flower-superlink --host "${HOST:-127.0.0.1}" --port "${PORT:-@PORT@}" --database superlink.db \
    --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \
    --enable-supernode-auth --disable-runtime-dependency-installation
