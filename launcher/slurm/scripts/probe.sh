# $1 fields of sinfo, $2 of associations, $3 of QOS. Prints sections: `@@ NAME`, what was said, `@@ = EXIT CODE`.
export LC_ALL=C
section() {
    printf '@@ %s\n' "$1"
    shift
    timeout 60 "$@" 2>&1 < /dev/null
    code=$?
    printf '\n@@ = %s\n' "$code"
    return "$code"
}
command -v sbatch > /dev/null || exit 0
section version sbatch --version
section config scontrol show config || exit 0
section partitions scontrol --oneliner show partition
section nodes sinfo --noheader --exact --format="$1"
section accounts sacctmgr --noheader --parsable2 show assoc where "user=$(id -un)" "format=$2"
section qos sacctmgr --noheader --parsable2 show qos "format=$3"
printf '@@ facts\n'
srun --help 2> /dev/null | grep -q -e --container-image && echo 'tool pyxis'
for tool in apptainer singularity enroot ch-run podman; do
    path=$(command -v "$tool") && echo "tool $tool $path"
done
echo "user $(id -un)"
[ -z "${LMOD_VERSION:-}" ] || echo "modules Lmod $LMOD_VERSION"
[ -n "${LMOD_VERSION:-}" ] || [ -z "${MODULESHOME:-}" ] || echo "modules Environment Modules"
for folder in "${WORK:-}" "${SCRATCH:-}" "$HOME"; do
    case $folder in /*) [ -w "$folder" ] && echo "folder $folder" ;; esac
done
python=$(python3 --version 2> /dev/null) && echo "python ${python#Python }"
printf '@@ = 0\n'
