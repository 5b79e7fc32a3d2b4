# Would this job be taken? $1 root, $2 output (empty: none here), $3 partition, $4 python (empty: in a container), $5 library,
# $6 image (empty: none), $7 tool of containers, then the folders of data. Prints lines of a word and text, parted by a tab.
root=$1 output=$2 partition=$3 python=$4 library=$5 image=$6 tool=$7
shift 7
command -v sbatch > /dev/null || { printf 'sbatch\t\n'; exit 0; }
for folder in "$root" "$output"; do
    [ -n "$folder" ] || continue
    there=$folder # nothing is to stay of a job that is refused, so the folder itself is not made
    until [ -e "$there" ]; do there=$(dirname -- "$there"); done
    tried=$there/.cvlaunch-$$-$RANDOM
    said=$( (touch -- "$tried" && rm -f -- "$tried") 2>&1) ||
        printf 'folder\t%s\n' "$(printf '%s' "$said" | tail -n 1)"
    printf 'free\t%s\n' "$(df -P -k -- "$there" 2>/dev/null | awk 'NR == 2 { print $4 }')"
done
if [ -n "$python" ] && [ ! -x "$python" ]; then printf 'python\t%s\n' "$python"; fi
if [ -n "$library" ] && [ ! -d "$library" ]; then printf 'library\t%s\n' "$library"; fi
if [ -n "$image" ] && [ ! -e "$image" ]; then printf 'image\t%s\n' "$image"; fi
if [ -n "$tool" ] && ! command -v "$tool" > /dev/null; then printf 'tool\t%s\n' "$tool"; fi
for folder; do
    [ -d "$folder" ] || printf 'data\t%s\n' "$folder"
done
IFS=, read -ra names <<< "$partition"
[ -n "$partition" ] || names=('')
for name in "${names[@]}"; do
    if said=$(scontrol -o show partition ${name:+"$name"} 2>&1); then
        printf '%s\n' "$said" | while read -r line; do printf 'partition\t%s\n' "$line"; done
    else
        printf 'refused\t%s\n' "$(printf '%s' "$said" | tail -n 1)"
        break # no controller may take long to be noticed
    fi
done
