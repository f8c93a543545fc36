# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What the tests in this folder share. Each is a script of its own that ends with status 0 if all is well.

# shellcheck source=Tests/TestVM/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../TestVM/lib.sh"

host_tests=$repo/Tests/Host
work=$(mktemp -d "${TMPDIR:-/tmp}/lacuna-host.XXXXXX")
# Processes to end, and with a minus in front whole groups.
children=()
cleanup() {
    local child
    for child in ${children[@]+"${children[@]}"}; do kill -- "$child" 2>/dev/null || true; done
    for child in ${children[@]+"${children[@]}"}; do wait "${child#-}" 2>/dev/null || true; done
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# fail WHY [FILE]: ends the test.
fail() {
    warn "$1"
    [[ -z ${2:-} ]] || tail -n 30 "$2" >&2 || true
    exit 1
}

# eventually SECONDS WHAT COMMAND...: runs COMMAND again until it succeeds; for states that nobody announces.
eventually() {
    local limit=$1 what=$2 end=$((SECONDS + $1))
    shift 2
    until "$@"; do
        [[ $SECONDS -lt $end ]] || fail "after $limit s still not: $what"
        sleep 0.05
    done
}

# expect WHAT LEFT OPERATOR RIGHT: whole numbers.
expect() {
    if [ "$2" "$3" "$4" ]; then
        say "$1: $2"
    else
        fail "$1: $2 is not $3 $4"
    fi
}

# field NAME: the number of that name in the JSON on standard input.
field() { sed -nE "s/.*\"$1\" *: *([0-9]+).*/\\1/p" | head -n 1; }
