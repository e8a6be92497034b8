#!/bin/sh
# Once, at the node: ./key.sh node-0
# node.key says to Flower who connects: send node.key.pub to the relay's operator. node.pem signs what the node says:
# send node.line to all other nodes, by a way of your own, for the relay is not trusted. The two keys stay in this folder.
set -eu
[ $# -eq 1 ] || { echo 'usage: ./key.sh NAME, one of node-0 to node-@LAST@' >&2; exit 2; }
cd "$(dirname "$0")"
umask 077
for file in node.key node.pem; do
    [ ! -e "$file" ] || { echo "$file is there already; move it away to make a new one" >&2; exit 2; }
done
ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f node.key
openssl genpkey -algorithm ed25519 -out node.pem
public=$(openssl pkey -in node.pem -pubout -outform DER | tail -c 32 | od -An -tx1 | tr -d ' \n')
echo "$1 = \"$public\"" > node.line
