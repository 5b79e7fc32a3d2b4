# $1 root, $2 folder, $3 uv, then the Pythons to try, the best first; a lock on stdin. A folder without its mark
# `complete` is none: it is made anew.
root=$1 env=$2 uv=$3
shift 3
lock "$env.lock" || exit
if [ -e "$env/complete" ] && "$env/bin/python" -c ''; then
    echo 'cvlaunch: there'
    exit
fi
export UV_CACHE_DIR="${UV_CACHE_DIR:-$root/.cache/uv}" UV_PYTHON_INSTALL_DIR="${UV_PYTHON_INSTALL_DIR:-$root/python}"
export UV_NO_PROGRESS=1 UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-120}"
rm -rf -- "$env" || exit
cd -- "$root" || exit
for python; do
    "$uv" venv --quiet --no-project --python "$python" -- "$env" < /dev/null && break
done
[ -x "$env/bin/python" ] || exit 1
lock=$env/requirements.lock
cat > "$lock" || exit
"$uv" pip sync --require-hashes --compile-bytecode --python "$env/bin/python" "$lock" < /dev/null || exit
date > "$env/complete"
