#!/bin/sh
# Once, on the server: a certificate authority of your own, and a certificate for this server signed by it.
# ca.crt goes to every node and is no secret. ca.key and server.key never leave this folder.
set -eu
cd "$(dirname "$0")"
umask 077
for file in ca.key server.key; do
    [ ! -e "$file" ] || { echo "$file is there already; move it away to make a new one" >&2; exit 2; }
done
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 -subj "/CN=Assay deployment CA" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key -out ca.crt
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=@HOST@" -keyout server.key -out server.csr
cat > server.ext <<END
basicConstraints = critical,CA:FALSE
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = @NAMES@
END
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 -extfile server.ext -out server.crt
rm server.csr server.ext
cp ca.crt ../node/ca.crt
