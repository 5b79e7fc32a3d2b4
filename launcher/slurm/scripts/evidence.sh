# How jobs ended, or whether they did: $1 folder of all records; on stdin `RUN ID` a line. Prints lines of a letter, an id
# and text, parted by tabs: S status, R the runner's result, N its notice, X cancelled, O the last line of SLURM's output,
# C scontrol's account, A sacct's.
export SLURM_TIME_FORMAT=%s
missing=
tell() { [ ! -e "$2" ] || printf '%s\t%s\t%s\n' "$1" "$id" "$(tr -d '\n' < "$2")"; }
while read -r run id; do
    cd -- "$1/$run" 2>/dev/null || { missing+=",$id"; continue; }
    tell S "status-$id.json"
    tell R "result-$id.json"
    tell N "notice-$id.json"
    [ ! -e cancelled ] || printf 'X\t%s\t\n' "$id"
    output=slurm-$id.out
    [ ! -e "$output" ] || printf 'O\t%s\t%s\n' "$id" "$(tail -c 4096 "$output" | tr '\t\r' '  ' | grep . | tail -n 1)"
    if account=$(scontrol -o show job "$id" 2>/dev/null | head -n 1) && [ -n "$account" ]; then
        printf 'C\t%s\t%s\n' "$id" "$account"
        case $account in # it ended before its script could take its secrets
            *" JobState=CANCELLED "* | *" JobState=DEADLINE "* | *" JobState=BOOT_FAIL "*)
                [ "$(cat "id-$(cat submission)" 2>/dev/null)" != "$id" ] || rm -f secrets
                ;;
        esac
    elif [ ! -e "status-$id.json" ]; then
        missing+=",$id"
    fi
done
[ -n "$missing" ] || exit 0
sacct --allocations --noheader --parsable2 --starttime now-90days --jobs "${missing#,}" \
    --format JobID,JobName,State,ExitCode,Start,End,NodeList 2>/dev/null |
    while IFS='|' read -r id rest; do printf 'A\t%s\t%s\n' "$id" "$rest"; done
exit 0
