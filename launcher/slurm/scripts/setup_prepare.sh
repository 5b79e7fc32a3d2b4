# $1 root, $2 folder of our package, $3 link to it. Makes the folders, tries to write, prints what is there.
export LC_ALL=C
root=$1 whole=$2 link=$3
mkdir -p -- "$root" "$root/runs" "$root/jobs" "$root/images" || exit
tried=$(mktemp -- "$root/.tried.XXXXXX") || exit
printf '%65536s' x > "$tried"
code=$?
rm -f -- "$tried"
[ "$code" = 0 ] || exit "$code"
uv=$(command -v uv) || uv=$root/bin/uv
[ -x "$uv" ] || uv=
printf 'system %s\nmachine %s\n' "$(uname -s)" "$(uname -m)"
printf 'files %s\n' "$(find "$whole" -type f ! -name '*.pyc' 2> /dev/null | wc -l)"
printf 'link %s\nuv %s\n' "$(readlink -- "$link")" "$uv"
