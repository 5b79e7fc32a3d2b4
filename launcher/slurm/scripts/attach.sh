# A command beside a job's: $1 record, $2 job id, $3 run id, $4 our package, $5 --pty or nothing, $6 number of words in front,
# these words, the text of beside.py, the command.
record=$1 job=$2 run=$3 pty=$5 count=$6
[ -z "$4" ] || export PYTHONPATH=$4
shift 6
front=("${@:1:count}")
shift "$count"
{ read -r root && read -r scratch && read -r seen; } < "$record/places-$job" || { echo "it has not begun yet" >&2; exit 1; }
shopt -u patsub_replacement 2>/dev/null
front=("${front[@]//@root@/$root}")
front=("${front[@]//@scratch@/$scratch}")
text=$1
shift
exec srun ${pty:+"$pty"} --jobid="$job" --overlap --nodes=1 --ntasks=1 --mpi=none --quiet --export=ALL \
    "${front[@]}" -c "$text" "$run" "$seen" "$@"
