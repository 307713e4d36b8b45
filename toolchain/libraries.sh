#!/bin/sh
# Compiled libraries, kept in the user's cache for the next checkout. Cargo decides what of them is still good.
#
#   libraries.sh restore TARGET        unpacks an archive into a target folder in which hostd was not built yet
#   libraries.sh save TARGET < LIST    makes an archive of the files and folders listed, with paths below TARGET
#   libraries.sh key TARGET            says what the libraries are compiled from and by, in 16 letters
#
# Only a target folder of this project's own has them: in one that is shared others' libraries would be lost.
#
# An archive is KEY-SHA256.tar. One of another key may have libraries that are good. One that is damaged is removed; the two used last are kept. WASMGATE_NO_CACHE=1 does without. A shell runs this, for .ci/run
# calls it before cargo has built anything.
set -eu
export LC_ALL=C
most_archives=2
most_kib=4194304 # of one archive's files

[ -z "${WASMGATE_NO_CACHE:-}" ] || exit 0
if [ -z "${XDG_CACHE_HOME:-}${HOME:-}" ]; then
    echo "libraries: neither XDG_CACHE_HOME nor HOME says where they are kept" >&2
    exit 0
fi
command=$1 target=$2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/wasmgate/libraries

project=$(dirname "$0")/..
# Without the compilers for BPF and wasm, which set-up installs, so that one key does before it and after.
key=$({ cat "$project"/Cargo.* "$project"/*/Cargo.* "$project"/*/*/Cargo.toml && rustc -vV; } |
    sha256sum | cut -c 1-16)

[ "$(cd "$(dirname "$target")" && pwd -P)" = "$(cd "$project" && pwd -P)" ] || exit 0

# Archives of a key, or of any; the one that was used last comes first.
archives() { find "$cache/" -maxdepth 1 -type f -name "$1-*.tar" -printf '%T@ %p\n' 2>/dev/null | sort -rn | cut -d ' ' -f 2-; }

# What the compiler calls a library depends on where the checkout is, where a build script writes a part of it. So an archive's
# libraries fit each other and no others: they take the place of all that are there, while no cargo is at work.
replace() {
    mkdir -p "$target/release"
    exec 9>"$target/release/.cargo-lock"
    flock 9
    for folder in bpf wasm release/deps release/build release/.fingerprint; do
        [ -e "$aside/$folder" ] || continue
        case $folder in bpf | wasm) [ ! -e "$target/$folder" ] || continue ;; esac
        rm -rf "${target:?}/$folder"
        mv "$aside/$folder" "$target/$folder"
    done
    if [ -e "$aside/libraries" ]; then
        mv "$aside/libraries" "$target/libraries"
    else
        : >"$target/libraries"
    fi
}

trap 'exit 130' INT TERM HUP
case $command in
key)
    echo "$key"
    ;;
restore)
    [ ! -e "$target/libraries" ] && [ ! -e "$target/release/hostd" ] || exit 0
    aside=$target/libraries.$$
    trap 'rm -rf "$aside"' EXIT
    { archives "$key" && archives '*'; } | while read -r archive; do
        sum=$(sha256sum <"$archive" | cut -d ' ' -f 1) || continue
        [ -e "$archive" ] || continue
        if [ "${archive##*-}" != "$sum.tar" ]; then
            echo "libraries: $archive is damaged, and removed" >&2
            rm -f "$archive" || :
            continue
        fi
        # Of another key's what is still good is told by what is built with it; the nested builds tell nothing.
        case $archive in
        */"$key"-*) set -- ;;
        *) set -- --anchored --exclude=bpf --exclude=wasm --exclude=libraries ;;
        esac
        mkdir -p "$aside"
        if ! tar -x -f "$archive" -C "$aside" "$@"; then
            echo "libraries: $archive can't be unpacked" >&2
            exit 0
        fi
        replace
        touch -c "$archive" || :
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
