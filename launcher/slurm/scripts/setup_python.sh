# $1 interpreter, $2 folder of our package, $3 root, $4 program.
export LC_ALL=C PYTHONPATH=$2 PYTHONNOUSERSITE=1
unset PYTHONHOME
cd -- "$3" && exec "$1" -c "$4"
