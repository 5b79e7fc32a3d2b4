# The newest job of each run: $1 folder of all records; on stdin a run id a line. Prints `RUN ID` for those that there are.
while read -r run; do
    id='' states=''
    if cd -- "$1/$run" 2>/dev/null; then
        submission=$(cat submission 2>/dev/null || echo 1)
        [ ! -e "id-$submission" ] || id=$(cat "id-$submission")
        [ ! -e "sending-$submission" ] || states=all # it may have ended since it was sent
    fi
    # Without a record it can only wait still: a script that somebody has sent by hand.
    [ -n "$id" ] || id=$(squeue --me --noheader ${states:+--states=$states} --name "$run" --format %i | tail -n 1)
    [ -z "$id" ] || printf '%s %s\n' "$run" "$id"
done
