# Ends a job: $1 record, $2 id. A job that runs is told, and has its grace; told again, it has SLURM's (KillWait).
record=$1 id=$2
word=$(squeue --noheader --jobs "$id" --format %T 2> /dev/null)
rm -f -- "$record/secrets"
if [ "$word" = RUNNING ] && [ ! -e "$record/cancelled" ]; then
    touch "$record/cancelled"
    exec scancel --batch --signal=USR1 "$id"
fi
[ ! -d "$record" ] || touch "$record/cancelled"
case $word in
    '' | COMPLETED | CANCELLED | FAILED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY | DEADLINE | BOOT_FAIL) exit 0 ;;
esac
exec scancel "$id"
