#!/bin/sh
# Once, at the node: its key. Send node.key.pub to the server's operator; node.key never leaves this folder.
set -eu
cd "$(dirname "$0")"
[ ! -e node.key ] || { echo "node.key is there already; move it away to make a new one" >&2; exit 2; }
ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f node.key
