# Ends a job: $1 record, $2 id. A job that runs is told, and has its grace; told again, it has SLURM's (KillWait).
record=$1 id=$2 run=${1##*/}
if ! said=$(squeue --noheader --jobs "$id" --format '%T|%j|%k' 2>&1); then
    case $said in
        *"Invalid job id"*) said='' ;;
        *) printf '%s\n' "$said" >&2; exit 1 ;;
    esac
fi
IFS='|' read -r word name comment <<< "$said"
case $id in # it may be another job's by now
    *_*) [[ $name = cvlaunch-* ]] || word='' ;;
    *) [[ $name = "$run" || $comment = "cvlaunch:$run" ]] || word='' ;;
esac
rm -f -- "$record/secrets"
if [ "$word" = RUNNING ] && [ ! -e "$record/cancelled" ]; then
    touch "$record/cancelled"
    exec scancel --batch --signal=USR1 "$id"
fi
[ ! -d "$record" ] || touch "$record/cancelled"
[ -n "$word" ] || exit 0
exec scancel "$id"
