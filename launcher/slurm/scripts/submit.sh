# Hands one script to sbatch, once: $1 record, $2 run id, $3 submission, $4 bytes of the script, $5 bytes of the secrets,
# which both come on stdin. Prints the job's id. 47: the record is another job's; 48: sbatch said no (on stderr).
record=$1 run=$2 submission=$3
trap '' HUP # a connection that breaks now must not leave the work half done
umask 022
(umask 077 && mkdir -p -- "$record") && cd -- "$record" || exit 46
exec 9> lock
flock -w 60 9 2>/dev/null # some file systems have no locks
if ! (umask 077 && head -c "$4" > .job.sh && head -c "$5" > .secrets) ||
    [ "$(stat -c '%s' .job.sh)" != "$4" ] || [ "$(stat -c '%s' .secrets)" != "$5" ]; then
    rm -f .job.sh .secrets
    [ -e job.sh ] || rm -rf -- "$record"
    exit 46
fi
if [ -e job.sh ] && ! cmp -s .job.sh job.sh; then
    rm -f .job.sh .secrets
    exit 47
fi
mv .job.sh job.sh
# What an earlier call has done, or was about to do when it was cut off.
if [ ! -e "id-$submission" ] && [ -e "sending-$submission" ]; then
    jobs=$(squeue --me --noheader --states=all --name "$run" --format '%i %Z') || { rm -f .secrets; exit 46; }
    # sent from here, and not from the record of a run of the same name below another root
    id=$(while read -r known folder; do [ "$folder" != "$(pwd -P)" ] || printf '%s\n' "$known"; done <<< "$jobs")
    for known in id-*; do
        [ -e "$known" ] && id=$(printf '%s\n' "$id" | grep -vFx -- "$(cat "$known")")
    done
    [ -z "$id" ] || printf '%s\n' "$id" | tail -n 1 > "id-$submission"
fi
if [ -e "id-$submission" ]; then
    rm -f .secrets
    cat "id-$submission"
    exit 0
fi
touch "sending-$submission"
printf '%s\n' "$submission" > submission
rm -f secrets cancelled
if [ "$5" = 0 ]; then rm -f .secrets; else mv .secrets secrets; fi
environment=()
for name in HOME USER LOGNAME SHELL PATH LANG LC_ALL TERM TZ LD_LIBRARY_PATH MODULEPATH MODULESHOME LMOD_CMD LMOD_DIR SLURM_CONF; do
    [ -z "${!name+x}" ] || environment+=("$name=${!name}")
done
id=$(env -i "${environment[@]}" sbatch --parsable < job.sh 2> .said)
code=$?
cat .said >&2
if [ "$code" != 0 ] || [ -z "$id" ]; then
    # No answer is no refusal: then the mark stays, and the next call looks for the job.
    grep -qi 'timed out\|unable to contact' .said && exit 49
    rm -f secrets "sending-$submission"
    [ -n "$(compgen -G 'id-*')" ] || rm -rf -- "$record" # an earlier job's stays
    exit 48
fi
printf '%s\n' "${id%%;*}" > .id && mv .id "id-$submission"
rm -f "sending-$submission" .said
cat "id-$submission"
