# Put in front of scripts that one at a time may run: lock FILE waits for its turn. The kernel holds the lock for
# whoever has file 9, so that a script that was killed leaves no half-dead uv behind its back.
export LC_ALL=C
lock() {
    exec 9>> "$1" || return
    flock --nonblock --conflict-exit-code 75 9 2> /dev/null && return
    [ $? = 75 ] || return 0
    echo "somebody else is at work on ${1%.lock}: waiting for the end of it" >&2
    flock 9
}
