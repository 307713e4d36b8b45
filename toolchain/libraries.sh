#!/bin/sh
# Compiled libraries, kept in the user's cache for the next checkout. Cargo decides what of them is still good.
#
#   libraries.sh restore TARGET        unpacks an archive into a target folder that has had none
#   libraries.sh save TARGET < LIST    makes an archive of the files and folders listed, with paths below TARGET
#
# An archive is KEY-SHA256.tar; KEY stands for what the libraries are compiled from and by. One of another key may have some that are
# good. One that is damaged is removed; the two used last are kept. WASMGATE_NO_CACHE=1 does without. A shell runs this, for it has
# to be there before cargo has built anything.
set -eu
most_archives=2
most_kib=4194304 # of one archive's files

[ -z "${WASMGATE_NO_CACHE:-}" ] || exit 0
command=$1 target=$2
cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/wasmgate/libraries

project=$(dirname "$0")/..
# Without the compilers for BPF and wasm, which set-up installs, so that one key does before it and after.
key=$({ cat "$project"/Cargo.toml "$project"/Cargo.lock "$project"/ebpf/Cargo.toml "$project"/ebpf/Cargo.lock && rustc -vV; } |
    sha256sum | cut -c 1-16)

# Archives of a key, or of any; the one that was used last comes first.
archives() { find "$cache" -name "$1-*.tar" -printf '%T@ %p\n' 2>/dev/null | sort -rn | cut -d ' ' -f 2-; }

case $command in
restore)
    [ ! -e "$target/libraries" ] || exit 0
    { archives "$key" && archives '*'; } | while read -r archive; do
        [ -e "$archive" ] || continue
        sum=${archive##*-}
        if [ "$(sha256sum <"$archive" | cut -d' ' -f1)" != "${sum%.tar}" ]; then
            echo "libraries: $archive is damaged, and removed" >&2
            rm -f "$archive"
            continue
        fi
        mkdir -p "$target"
        if ! tar -x -f "$archive" -C "$target"; then
            echo "libraries: $archive can't be unpacked" >&2
            rm -rf "$target/release" "$target/bpf" "$target/wasm"
            exit 0
        fi
        touch -c "$archive"
        echo "libraries: those of an earlier build, from $cache"
        exit 0
    done
    ;;
save)
    mkdir -p "$cache"
    find "$cache" -name '.new.*' -mmin +60 -delete
    new=$cache/.new.$$
    trap 'rm -f "$new" "$new.list"' EXIT
    cat >"$new.list"
    size=$(cd "$target" && tr '\n' '\0' <"$new.list" | du -ck --files0-from=- | tail -n 1 | cut -f1)
    if [ "$size" -gt "$most_kib" ]; then
        echo "libraries: not kept, they have $size KiB of $most_kib that may be" >&2
        exit 0
    fi
    # Cargo compares times to the nanosecond.
    tar -c -f "$new" --format=posix --pax-option=delete=atime,delete=ctime -C "$target" --files-from="$new.list"
    sum=$(sha256sum <"$new" | cut -d' ' -f1)
    mv "$new" "$cache/$key-$sum.tar"
    archives "$key" | tail -n +2 | while read -r archive; do rm -f "$archive"; done
    archives '*' | tail -n +$((most_archives + 1)) | while read -r archive; do rm -f "$archive"; done
    ;;
*)
    echo "libraries: no command $command" >&2
    exit 2
    ;;
esac
