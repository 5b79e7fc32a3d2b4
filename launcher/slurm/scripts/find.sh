# The newest job of each run: $1 folder of all records; on stdin a run id a line. Prints `RUN ID` for those that there are.
# One squeue at most, and no process for a single run. 49: the controller did not answer.
records=$1
looked='' sought='' id='' submission='' array='' index='' folder=''
declare -A every live sent # the id of the newest job by name, of the newest by name that has not ended, and by its folder
declare -A element # run → name and index in an array whose id nobody has noted for all
look() {
    [ -z "$looked" ] || return 0
    looked=$(squeue --me --noheader --states=all --sort=i --format '%F|%T|%j|%Z') || exit 49
    while IFS='|' read -r id state name folder; do
        [ -n "$folder" ] || continue
        every[$name]=$id sent[$folder]=$id
        case $state in
            COMPLETED | CANCELLED | FAILED | TIMEOUT | PREEMPTED | NODE_FAIL | OUT_OF_MEMORY | DEADLINE | BOOT_FAIL | REVOKED) ;;
            *) live[$name]=$id ;;
        esac
    done <<< "$looked"
    looked=yes
}
seek() {
    [ -z "$sought" ] || return 0
    sought=yes
    for mark in "${records%/*}"/arrays/*/sending; do
        [ -e "$mark" ] || continue
        mapfile -t runs < "${mark%/*}/list"
        name=${mark%/*} name=${name##*/}
        for index in "${!runs[@]}"; do element["${runs[index]}"]="$name $index"; done
    done
}
first_line() { # of file $2, into variable $1; nothing if it is not there
    printf -v "$1" '%s' ''
    [ ! -e "$2" ] || read -r "$1" < "$2"
}
while read -r run; do
    found='' record=$records/$run
    first_line submission "$record/submission"
    submission=${submission:-1}
    first_line found "$record/id-$submission"
    [ -n "$found" ] || [ ! -e "$record/job.sh" ] || seek
    if [ -z "$found" ] && [ -n "${element[$run]:-}" ]; then
        read -r array index <<< "${element[$run]}"
        first_line id "${records%/*}/arrays/$array/id"
        if [ -z "$id" ]; then
            look
            id=${every[$array]}
        fi
        [ -z "$id" ] || found=${id}_$index
    elif [ -z "$found" ]; then
        look
        # Without a record it can only wait still: a script that somebody has sent by hand.
        found=${live[$run]}
        if [ -e "$record/sending-$submission" ]; then # by this call, and neither below another root nor earlier
            found=${sent[$(cd -- "$record" && pwd -P)]}
            [ -z "$found" ] || ! grep -qxF -- "$found" "$record"/id-* 2> /dev/null || found=''
        fi
    fi
    [ -z "$found" ] || printf '%s %s\n' "$run" "$found"
done
