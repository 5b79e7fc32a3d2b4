# $1 root; a lock for pip on stdin.
set -eu
export LC_ALL=C
mkdir -p -- "$1/bin"
part=$(mktemp -d -- "$1/bin/.uv.XXXXXX")
trap 'rm -rf -- "$part"' EXIT
cat > "$part/lock"
python3 -m pip install --quiet --no-cache-dir --no-deps --require-hashes --target "$part/made" -r "$part/lock" >&2
"$part/made/bin/uv" --version > /dev/null
mv -T -- "$part/made/bin/uv" "$1/bin/uv"
