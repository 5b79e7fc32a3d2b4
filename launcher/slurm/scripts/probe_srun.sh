# $1 script, $2 to $4 its arguments, then options of srun.
export LC_ALL=C
script=$1 host=$2 port=$3 root=$4
shift 4
exec srun "$@" bash -c "$script" bash "$host" "$port" "$root" < /dev/null
