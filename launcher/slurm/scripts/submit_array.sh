# Hands many scripts to sbatch as one array, once: $1 folder of all records, $2 folder of the array, $3 its name, $4
# submission, $5 throttle (`%8` or nothing), $6 number of elements. On stdin a tar with RUN/job.sh (and RUN/secrets) for
# each run, `header` (the lines for SLURM) and `list` (a run id a line, in the order of the indices), and `end`, empty,
# last. Prints the array's id. Exit codes as of submit.sh. No process is started for a single element: there may be
# thousands, and login nodes are slow at that.
records=$1 folder=$2 name=$3 submission=$4 throttle=$5 count=$6
trap '' HUP
umask 077
mkdir -p -- "$records" "$folder" && cd -- "$folder" || exit 46
exec 9> lock
flock -w 60 9 2>/dev/null
trap 'rm -rf new' EXIT # with the secrets of what was not sent
rm -rf new && mkdir new && tar -x -f - -C new && [ -e new/end ] || exit 46
mv -f new/header new/list . && rm -f new/end || exit 46
mapfile -t runs < list
if [ ! -e id ] && [ -e sending ]; then
    id=$(squeue --me --noheader --states=all --name "$name" --format '%F' | sort -u | tail -n 1) || exit 46
    [ -z "$id" ] || printf '%s\n' "$id" > id
fi
if [ ! -e id ]; then
    earlier=()
    for run in "${runs[@]}"; do
        [ -d "$records/$run" ] || continue
        if [ -e "$records/$run/job.sh" ] && ! cmp -s "new/$run/job.sh" "$records/$run/job.sh"; then
            printf '%s\n' "$run" >&2
            exit 47
        fi
        earlier+=("$run")
    done
    for run in "${earlier[@]}"; do
        rm -f -- "$records/$run/secrets" "$records/$run/cancelled"
        mv -f "new/$run"/* "$records/$run/" && rmdir "new/$run" || exit 46
    done
    printf '%s\n' new/* > fresh
    [ "${#earlier[@]}" = "$count" ] || xargs -d '\n' mv -t "$records" -- < fresh || exit 46
    if [ "$submission" != 1 ]; then
        for run in "${runs[@]}"; do printf '%s\n' "$submission" > "$records/$run/submission"; done
    fi
    cat header - > array.sh << 'ARRAY'

# One element: its own script, as if it had been sent alone; SLURM's output of it is linked into its record.
record=$records/$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$folder/list")
ln -sf -- "$folder/$SLURM_ARRAY_TASK_ID.out" "$record/slurm-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.out"
exec bash -- "$record/job.sh"
ARRAY
    touch sending # find.sh looks here for what has no id yet
    environment=()
    for variable in HOME USER LOGNAME SHELL PATH LANG LC_ALL TERM TZ LD_LIBRARY_PATH MODULEPATH MODULESHOME LMOD_CMD LMOD_DIR SLURM_CONF; do
        [ -z "${!variable+x}" ] || environment+=("$variable=${!variable}")
    done
    id=$(env -i "${environment[@]}" sbatch --parsable --array="0-$((count - 1))$throttle" < array.sh 2> .said)
    code=$?
    cat .said >&2
    if [ "$code" != 0 ] || [ -z "$id" ]; then
        grep -qi 'timed out\|unable to contact' .said && exit 49
        for run in "${earlier[@]}"; do rm -f -- "$records/$run/secrets"; done
        sed "s|^new|${records//|/\\|}|" fresh | grep -v '/\*$' | xargs -r -d '\n' rm -rf --
        rm -f sending
        exit 48
    fi
    printf '%s\n' "${id%%;*}" > .id && mv .id id
fi
id=$(cat id)
for ((index = 0; index < count; index++)); do
    printf '%s_%d\n' "$id" "$index" > "$records/${runs[index]}/id-$submission"
done
rm -f sending fresh .said
printf '%s\n' "$id"
