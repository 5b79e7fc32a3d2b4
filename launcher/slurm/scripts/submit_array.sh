# Hands many scripts to sbatch as one array, once: $1 folder of all records, $2 folder of the array, $3 its name, $4
# submission, $5 throttle (`%8` or nothing), $6 number of elements. On stdin a tar with RUN/job.sh (and RUN/secrets) for
# each run, `header` (the lines for SLURM) and `list` (a run id a line, in the order of the indices), and `end`, empty,
# last. Prints the array's id. Exit codes as of submit.sh.
records=$1 folder=$2 name=$3 submission=$4 throttle=$5 count=$6
trap '' HUP
umask 077
mkdir -p -- "$records" "$folder" && cd -- "$folder" || exit 46
exec 9> lock
flock -w 60 9 2>/dev/null
rm -rf new && mkdir new && tar -x -f - -C new && [ -e new/end ] || exit 46
mv -f new/header new/list .
if [ ! -e id ] && [ -e sending ]; then
    id=$(squeue --me --noheader --states=all --name "$name" --format '%F' | sort -u | tail -n 1) || exit 46
    [ -z "$id" ] || printf '%s\n' "$id" > id
fi
if [ ! -e id ]; then
    while read -r run; do
        if [ -e "$records/$run/job.sh" ] && ! cmp -s "new/$run/job.sh" "$records/$run/job.sh"; then
            printf '%s\n' "$run" >&2
            exit 47
        fi
    done < list
    while read -r run; do
        mkdir -p -- "$records/$run"
        mv -f "new/$run"/* "$records/$run/"
        printf '%s\n' "$submission" > "$records/$run/submission"
    done < list
    cat header - > array.sh << 'ARRAY'

# One element: its own script, as if it had been sent alone; SLURM's output of it is linked into its record.
record=$records/$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$folder/list")
ln -sf -- "$folder/$SLURM_ARRAY_TASK_ID.out" "$record/slurm-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.out"
exec bash -- "$record/job.sh"
ARRAY
    touch sending
    environment=()
    for name in HOME USER LOGNAME SHELL PATH LANG LC_ALL TERM TZ LD_LIBRARY_PATH MODULEPATH MODULESHOME LMOD_CMD LMOD_DIR SLURM_CONF; do
        [ -z "${!name+x}" ] || environment+=("$name=${!name}")
    done
    id=$(env -i "${environment[@]}" sbatch --parsable --array="0-$((count - 1))$throttle" < array.sh 2> .said)
    code=$?
    cat .said >&2
    if [ "$code" != 0 ] || [ -z "$id" ]; then
        grep -qi 'timed out\|unable to contact' .said && exit 49
        while read -r run; do rm -rf -- "${records:?}/$run"; done < list
        rm -f sending
        exit 48
    fi
    printf '%s\n' "${id%%;*}" > .id && mv .id id
fi
id=$(cat id)
index=0
while read -r run; do
    printf '%s_%d\n' "$id" "$index" > "$records/$run/id-$submission"
    index=$((index + 1))
done < list
rm -rf new sending .said
printf '%s\n' "$id"
