# $1 root, $2 name, $3 hash, $4 number of files; .tar.gz on stdin. Puts the package beside others, points the link at it.
set -eu
root=$1 name=$2 hash=$3 files=$4
whole=$root/$name-$hash
lock "$root/.$name.lock"
part=$(mktemp -d -- "$root/.$name.XXXXXX")
trap 'rm -rf -- "$part"' EXIT
mkdir -- "$part/new"
tar --extract --gzip --no-same-owner --directory "$part/new"
if [ "$(find "$whole" -type f ! -name '*.pyc' 2> /dev/null | wc -l)" != "$files" ]; then
    if [ -e "$whole" ]; then mv -T -- "$whole" "$part/old"; fi
    mv -T -- "$part/new" "$whole"
fi
ln -s -- "$name-$hash" "$part/link"
mv -T -- "$part/link" "$root/$name"
