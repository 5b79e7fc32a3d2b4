# How jobs ended, or whether they did: $1 folder of all records; on stdin `RUN ID` a line. Prints lines of a letter, an id
# and text, parted by tabs: S status, R the runner's result, N its notice, X cancelled, O a line of SLURM's output,
# C scontrol's account, A sacct's. scontrol is asked once for an array, and no process is started for an element that has
# succeeded: there may be thousands, and login nodes are slow at that.
export SLURM_TIME_FORMAT=%s SLURM_BITSTR_LEN=0
records=$1 text='' submission='' last='' secrets=()
declare -A asked wanted known missing # to ask scontrol for; id → run; arrays that it has; to ask sacct for
tell() { # the file's text in one line; false if it is not there
    text=''
    [ -e "$2" ] || return 1
    IFS= read -r -d '' text < "$2"
    printf '%s\t%s\t%s\n' "$1" "$id" "${text//$'\n'/}"
}
last_words() { # what a job itself has said; else why, by srun's word
    local line said='' error=''
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in
            slurmstepd*) error=$line ;;
            'srun: error:'*) [[ $error == slurmstepd* ]] || error=$line ;; # the node knows more
            '' | srun:*) ;;
            *) said=$line ;;
        esac
    done
    text=${said:-$error}
    printf '%s' "${text//[$'\t\r']/ }"
}
while read -r run id; do
    cd -- "$records/$run" 2>/dev/null || { missing[${id%%_*}]=yes; continue; }
    asked[${id%%_*}]=yes wanted[$id]=$run
    tell S "status-$id.json"
    if [[ $text != *'"code": 0,'* ]] && [ -e "slurm-$id.out" ]; then
        printf 'O\t%s\t%s\n' "$id" "$(tail -c 4096 -- "slurm-$id.out" | last_words)"
    fi 2>/dev/null
    tell R "result-$id.json"
    tell N "notice-$id.json"
    [ ! -e cancelled ] || printf 'X\t%s\t\n' "$id"
done
forget_secrets() { # of a job that ended before its script could take them
    submission='' last=''
    read -r submission 2>/dev/null < "$records/$1/submission"
    read -r last 2>/dev/null < "$records/$1/id-${submission:-1}"
    [ "$last" != "$2" ] || [ ! -e "$records/$1/secrets" ] || secrets+=("$records/$1/secrets")
}
account() { # id, scontrol's line
    local run=${wanted[$1]:-}
    [ -n "$run" ] || return
    printf 'C\t%s\t%s\n' "$1" "$2"
    unset "wanted[$1]"
    case $2 in
        *" JobState=CANCELLED "* | *" JobState=DEADLINE "* | *" JobState=BOOT_FAIL "*) forget_secrets "$run" "$1" ;;
    esac
}
for job in "${!asked[@]}"; do
    while IFS= read -r text; do
        if ! [[ $text =~ \ ArrayTaskId=([0-9,:-]+) ]]; then
            account "$job" "$text"
            continue
        fi
        known[$job]=yes
        [ "${BASH_REMATCH[1]}" != 4294967294 ] || continue # what is left of an array without its elements
        for part in ${BASH_REMATCH[1]//,/ }; do # of elements that never started there may be one line for many: 3,7-11
            step=${part#*:} part=${part%:*}
            [[ $step != "$part" ]] || step=1
            for ((index = ${part%-*}; index <= ${part#*-}; index += step)); do
                account "${job}_$index" "$text"
            done
        done
    done < <(scontrol -o show job "$job" 2>/dev/null)
done
for id in "${!wanted[@]}"; do
    record=$records/${wanted[$id]}
    [ ! -e "$record/status-$id.json" ] || continue
    missing[${id%%_*}]=yes
    # An element that was cancelled before it began leaves no trace but this: its array is there, and it is not.
    if [ -n "${known[${id%%_*}]:-}" ] && [ ! -e "$record/begun-$id" ]; then
        printf 'X\t%s\t\n' "$id"
        forget_secrets "${wanted[$id]}" "$id"
    fi
done
[ "${#secrets[@]}" = 0 ] || printf '%s\0' "${secrets[@]}" | xargs -0 rm -f --
[ "${#missing[@]}" != 0 ] || exit 0
printf -v list '%s,' "${!missing[@]}"
sacct --allocations --noheader --parsable2 --starttime now-90days --jobs "${list%,}" \
    --format JobID,JobName,State,ExitCode,Start,End,NodeList 2>/dev/null |
    while IFS='|' read -r id rest; do printf 'A\t%s\t%s\n' "$id" "$rest"; done
exit 0
