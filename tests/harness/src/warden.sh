# Removes what a run of tests has left: $1 is the number of its process. It waits for the end of its standard input, which
# comes however that process ends; one that was not killed has left nothing.
#
# A run's are: the namespaces wgRUN-*, the folders $TMPDIR/wasmgate-RUN-* with what is mounted in them, the processes in
# those namespaces, those that were told of such a folder, and containers whose root is in one.
temp=${TMPDIR:-/tmp}

# No pattern is found in the arguments of the process that looks for it.
processes() {
    for netns in /run/netns/wg"$1"-*; do
        [ -e "$netns" ] && ip netns pids "${netns##*/}"
    done
    grep -alE "[w]asmgate-$1-" /proc/[0-9]*/cmdline /proc/[0-9]*/environ | cut -d/ -f3
    grep -alE "^([^ ]+ ){3}([^ ]*[w]asmgate-$1-[^ ]* / |[^ ]+ / .*[w]asmgate-$1-)" /proc/[0-9]*/mountinfo | cut -d/ -f3
}

clean() {
    own=$(stat -Lc %i /proc/self/ns/net)
    inodes=
    # What is killed may have been about to start something else.
    while found=$(processes "$1") && [ -n "$found" ]; do
        for process in $found; do
            netns=$(stat -Lc %i "/proc/$process/ns/net") || continue
            [ "$netns" = "$own" ] || inodes="$inodes $netns "
            kill -9 "$process"
        done
        sleep 0.2
    done
    # Also those that a container runtime has made.
    for netns in /run/netns/*; do
        inode=$(stat -Lc %i "$netns") || continue
        case "${netns##*/} $inodes" in
        wg"$1"-* | *" $inode "*) ip netns del "${netns##*/}" ;;
        esac
    done
    awk -v folder="$temp/wasmgate-$1-" 'index($2, folder) == 1 { print $2 }' /proc/self/mounts | sort -r |
        while read -r mount; do umount -l "$mount"; done
    rm -rf "$temp"/wasmgate-"$1"-*
}

exec 2>/dev/null
# Runs whose warden was killed as well.
for left in /run/netns/wg*-* "$temp"/wasmgate-*-*; do
    run=$(expr "${left##*/}" : '[a-z-]*\([0-9]*\)-')
    [ -n "$run" ] && [ ! -d "/proc/$run" ] && clean "$run"
done
cat >/dev/null
clean "$1"
