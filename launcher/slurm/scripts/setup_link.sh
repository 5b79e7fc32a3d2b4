# $1 root, $2 name, $3 hash: points the link at a folder that is there.
set -eu
export LC_ALL=C
part=$(mktemp -d -- "$1/.link.XXXXXX")
trap 'rm -rf -- "$part"' EXIT
ln -s -- "$2-$3" "$part/link"
mv -T -- "$part/link" "$1/$2"
