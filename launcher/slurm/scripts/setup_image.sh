# $1 root, $2 file, $3 reference, $4 tool, $5 ending, $6 what makes $made (launcher.slurm.setup.PULLS). 127: no tool.
# shellcheck disable=SC2034 # $6 reads it
reference=$3
root=$1 file=$2 tool=$4 ending=$5
lock "$file.lock" || exit
if [ -e "$file" ]; then
    echo 'cvlaunch: there'
    exit
fi
command -v "$tool" > /dev/null || exit 127
cache=$root/.cache
mkdir -p -- "$cache" || exit
part=$root/images/.part-${file##*/}
rm -rf -- "$part" && mkdir -- "$part" || exit
trap 'chmod -R u+w -- "$part"; rm -rf -- "$part"' EXIT
made=$part/made$ending
pull() {
    eval "$6"
}
pull "$@" < /dev/null || exit
mv -T -- "$made" "$file"
