# On a compute node: $1 host and $2 port to reach, $3 root.
export LC_ALL=C
echo "node $(hostname)"
echo "shm $(df -PB1 /dev/shm | awk 'NR == 2 {print $2}')"
echo "tmp $(df -PB1 "${TMPDIR:-/tmp}" | awk 'NR == 2 {print $4}')"
python=$(python3 --version 2> /dev/null) && echo "python ${python#Python }"
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | head -n 1) && echo "driver $driver"
# shellcheck disable=SC2016 # the inner shell's own
timeout 15 bash -c '< "/dev/tcp/$1/$2"' bash "$1" "$2" 2> /dev/null && echo "network yes"
[ -z "${HTTPS_PROXY:-${https_proxy:-}}" ] || echo "proxy yes"
root=$3
[ -e "$root" ] || root=${root%/*}
tried=$(mktemp -d -- "$root/.cvlaunch.XXXXXX" 2> /dev/null) && rmdir -- "$tried" && echo "root yes"
exit 0
