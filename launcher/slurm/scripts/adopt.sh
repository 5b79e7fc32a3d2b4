# A job that somebody has sent: $1 folder of all records, $2 its run id or SLURM's id. Prints its id, then its script.
name=$2 id='' script=''
case $name in */* | .*) exit 44 ;; esac
case $name in
    [0-9]*) # no run id begins with a digit
        id=$name
        for record in "$1"/*/id-*; do
            [ -e "$record" ] && [ "$(cat -- "$record")" = "$id" ] && script=${record%/*}/job.sh
        done
        ;;
    *)
        script=$1/$name/job.sh
        for record in "$1/$name"/id-*; do
            [ ! -e "$record" ] || id=$(cat -- "$record")
        done
        [ -n "$id" ] || id=$(squeue --me --noheader --name "$name" --format %i | tail -n 1)
        ;;
esac
[ -n "$id" ] || exit 44
printf '%s\n' "$id"
if [ -e "$script" ]; then
    exec cat -- "$script"
fi
copy=$(mktemp) && rm -f -- "$copy" || exit
scontrol write batch_script "$id" "$copy" > /dev/null || exit 44
[ -s "$copy" ] || exit 44
cat -- "$copy"
rm -f -- "$copy"
