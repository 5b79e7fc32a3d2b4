#!/bin/bash -l
#SBATCH --job-name=command-0000000000
#SBATCH --comment=cvlaunch:command-0000000000
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --partition=gpu,gpu-long
#SBATCH --account=vision
#SBATCH --qos=high
#SBATCH --reservation=course
#SBATCH --constraint='ib&hdr'
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=8192M
#SBATCH --gres=gpu:a100-sxm4:2
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=me@example.com
#SBATCH --exclusive
#SBATCH --nice=100
#SBATCH --licenses=matlab@flex:2
#SBATCH '--wckey=a '"'"'b'"'"' $c'

# A run of cvlaunch. It ends with its own exit code: 0 done, 64 bad configuration, 75 stopped with a checkpoint (then it
# goes back into the queue by itself), 143 cancelled. How it ended stands in $record/status-<job>.json, too.
# shellcheck disable=SC2016,SC2054,SC2317 # values stand as they are; binds have commas; what traps run is reached

record=/scratch/me/cvlaunch/jobs/command-0000000000
max_starts=20
longest_stop=180
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
code=1 srun='' watchdog='' secrets='' slurm='' failed='' preempted='' woken=0

say() { printf 'cvlaunch: %s\n' "$*" >&2; }
fail() { say "$2"; code=$1; exit "$1"; }

# Whatever ends this script: first how it ended, by rename, then what must not stay behind.
finish() {
    trap '' TERM USR1 INT
    [ -z "$watchdog" ] || kill "$watchdog" 2>/dev/null
    if [ "$(cat -- "$record/begun-$job")" != "$restarts" ]; then # SLURM gave this node up, and has started the job anew
        rm -rf -- "$scratch"
        exit "$code"
    fi
    local again=false
    if [ -n "$watchdog" ] || stopped_early; then ask_slurm; fi
    if stopped_early && (( restarts + 1 < max_starts )) && [ ! -e "$root/control/cancel" ] && [[ "$slurm" = "RUNNING "* ]]; then
        again=true
        [ -z "$secrets" ] || (umask 077 && printf '%s' "$secrets" > "$record/secrets")
    fi
    [ -n "$failed" ] || keep "$root/output/result.json" "result-$job.json"
    keep "$root/input/control/notice-$job.json" "notice-$job.json"
    leave_status "$again"
    on_each_node rm -rf -- "$scratch"
    if $again && ! scontrol requeue "$job"; then
        leave_status false
        rm -f -- "$record/secrets"
    fi
    exit "$code"
}

# 75 is "with a new checkpoint"; the runner may also have been stopped before there was one.
stopped_early() {
    [ -z "$failed" ] || return 1
    [ "$code" = 75 ] || { own "$root/output/result.json" && grep -q '"PREEMPTED"' "$root/output/result.json"; }
}

own() {
    fresh "$1" && grep -qF "\"native_id\": \"$job\"" "$1"
}

exit_code_in() {
    sed -n 's/^ *"exit_code": *\([0-9]*\).*/\1/p' "$1"
}

fresh() {
    [ -e "$1" ] && [ ! "$1" -ot "$record/begun-$job" ]
}

# SLURM's state of this start, and why. COMPLETING: it is SLURM that ends it, or somebody with scancel; what it has
# preempted it puts back itself.
ask_slurm() {
    local line
    for _ in 1 2 3 4 5 6; do
        if line=$(scontrol --oneliner show job "$job"); then
            [[ "$line" != *" PreemptTime="[1-9]* ]] || preempted=1
            [[ "$line " != *" Restarts=$restarts "* ]] || { line=${line#* JobState=} && slurm=${line%% Dependency=*}; }
            return
        fi
        sleep 10 # the controller is away for a moment
    done
}

keep() {
    ! fresh "$1" || cp -f -- "$1" "$record/$2"
}

leave_status() {
    printf '{"job": "%s", "start": %d, "code": %d, "signal": %d, "ended": %d, "node": "%s", "slurm": "%s", "requeued": %s}\n' \
        "$job" "$((restarts + 1))" "$code" "$((code > 128 ? code - 128 : 0))" "$(date +%s)" "${SLURMD_NODENAME:-$(hostname)}" "$slurm" "$1" \
        > "$record/.status-$job" && mv -f -- "$record/.status-$job" "$record/status-$job.json"
}

on_each_node() {
    env -u TMPDIR srun --nodes=2 --ntasks-per-node=1 --mpi=none "$@" < /dev/null
}

# To the runner, which saves and ends within its grace; srun passes USR1 on to it. At last, the end is made.
stop() {
    woken=1
    [ -z "$srun" ] || kill -USR1 "$srun" 2>/dev/null
    if [ -z "$watchdog" ]; then
        { sleep "$longest_stop"; kill -KILL "$srun" 2>/dev/null; } &
        watchdog=$!
    fi
}

mkdir -p -- "$record" || exit 73
printf '%s\n' "$restarts" > "$record/begun-$job"
rm -f -- "$record/status-$job.json" "$record/result-$job.json" "$record/notice-$job.json" # of an earlier start
[ -e "$record/job.sh" ] || cp -- "$0" "$record/job.sh" # sent by hand; $0 is SLURM's copy
root=/out/command-0000000000
scratch_variable=SLURM_TMPDIR
scratch=${!scratch_variable:-/tmp}'/my files'/cvlaunch-$job-$restarts
trap finish EXIT
trap stop USR1 TERM
CVLAUNCH_SUBMISSION=$(cat -- "$record/submission" 2>/dev/null || echo 1)
[ -e "$record/id-$CVLAUNCH_SUBMISSION" ] || echo "$job" > "$record/id-$CVLAUNCH_SUBMISSION"
on_each_node mkdir -p -m 700 -- "$scratch" "$scratch/tmp" || fail 73 "no scratch folder $scratch on $(hostname)"
mkdir -p -- "$root" || fail 73 "no folder $root on $(hostname)"

module load CUDA/12.4 || fail 64 'no module CUDA/12.4'
module load Apptainer || fail 64 'no module Apptainer'
eval 'export HTTPS_PROXY=http://$SITE_PROXY:3128' || fail 64 'this line of the target'"'"'s `setup` failed: export HTTPS_PROXY=http://$SITE_PROXY:3128'
eval 'ulimit -n 65536 || ulimit -n 4096' || fail 64 'this line of the target'"'"'s `setup` failed: ulimit -n 65536 || ulimit -n 4096'
export USER=${USER:-$(id -un)} PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1
unset PYTHONHOME PYTHONPATH
PYTHONPATH=$(readlink -f -- /scratch/me/cvlaunch/cvlaunch-VERSION) || fail 64 'there is no /scratch/me/cvlaunch/cvlaunch-VERSION; run: cvlaunch targets setup'
export PYTHONPATH
export CVLAUNCH_INTERFACE=ib0
export AWS_PROFILE=lab
seen=$root
export TMPDIR=$scratch/tmp
printf '%s\n' "$root" "$scratch" "$seen" > "$record/places-$job" # for cvlaunch exec
export CVLAUNCH_SUBMISSION CVLAUNCH_NATIVE_ID=$job
export CVLAUNCH_ROOT=$seen CVLAUNCH_NOTICE=$seen/input/control/notice-$job.json
CVLAUNCH_JOB_JSON=$(cat <<'CVLAUNCH_JOB'
{"run_id": "command-0000000000", "name": "echo", "job_digest": "2d564f4a7c09f8aeefbbfcda64271e4e249666527ef58f7333b1891dcfa03e7a", "output": "ssh://login1/out", "command": ["python", "-c", "print('it''s')", "${CVLAUNCH_DATA_TRAIN}"], "train": null, "env": {}, "secrets": {}, "channels": [{"name": "near", "uri": "file:///data/near shapes", "access": "path", "fingerprint": null, "files": null, "size": null}], "code": null, "image": null, "nodes": 2, "gpus": 2, "processes": 2, "movers": {"checkpoints": "in_place", "model": "in_place", "output": "in_place"}, "retries": 0, "max_attempts": 20, "timeout_s": 604800.0, "grace_s": 120.0, "tags": {}, "storage": {}, "cvlaunch": "0.0.0", "contract": 1}
CVLAUNCH_JOB
)
export CVLAUNCH_JOB_JSON
# SLURM 22.05 to 23.02 hands the CPUs of a task on to srun by this alone.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

command=(
    srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --mpi=none --export=ALL
    /opt/python/bin/python
    -m
    launcher.runner
)
[ "$woken" = 0 ] || fail 75 "stopped before it began"
"${command[@]}" < /dev/null &
srun=$!
while :; do # bash runs a trap only between commands, and remembers how a child has ended
    woken=0
    wait "$srun"
    code=$?
    [ "$woken" = 1 ] || break
done
# srun ends with 0 where a node fails, and with the highest code of all nodes: the first runner's word counts.
if own "$root/output/result.json"; then
    code=$(exit_code_in "$root/output/result.json")
elif [ "$code" = 0 ] && ! fresh "$root/input/control/notice-$job.json"; then
    fail 1 "srun ended without a word of the runner: a node failed, something killed it, or a disk is full"
fi
# Where the runner of one node fails, srun stops the others, which save as if they were to go on.
[ "$code" != 75 ] || [ -n "$watchdog" ] || ask_slurm
if [ "$code" = 75 ] && [ -z "$watchdog$preempted" ] && [[ "$slurm" = "RUNNING "* ]]; then
    failed=1 code=1
    for result in "$root"/nodes/*/output/result.json; do
        if own "$result" && grep -q '"FAILED"' "$result"; then
            keep "$result" "result-$job.json"
            code=$(exit_code_in "$result")
        fi
    done
    say "a node failed, and srun stopped the others; the logs say more"
fi
exit "$code"
