# $1 root; uv, packed by gzip, on stdin.
set -eu
export LC_ALL=C
mkdir -p -- "$1/bin"
part=$(mktemp -d -- "$1/bin/.uv.XXXXXX")
trap 'rm -rf -- "$part"' EXIT
gzip --decompress > "$part/uv"
chmod 755 -- "$part/uv"
"$part/uv" --version > /dev/null
mv -T -- "$part/uv" "$1/bin/uv"
