# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What setup, bed, Tests/run and Tests/demo share: where things are, and how to say so.
# Source it from a bash script that has `set -euo pipefail`.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck disable=SC2034 # for those who source this
test_vm=$repo/Tests/TestVM

# Everything downloaded or built lands here; deleting the folder is always safe.
LACUNA_CACHE=${LACUNA_CACHE:-$repo/.cache}
mkdir -p "$LACUNA_CACHE"
LACUNA_CACHE=$(cd "$LACUNA_CACHE" && pwd -P)
export LACUNA_CACHE

# Progress and errors carry the script's name: their lines appear between those of others.
me=$(basename "$0")
say() { printf '%s: %s\n' "$me" "$*"; }
warn() { printf '%s: %s\n' "$me" "$*" >&2; }
die() {
    warn "$@"
    exit 1
}

# Kernels are named by their series. The first is the bed's outer machine and the guest of most tests; the guests of the
# others boot each of them. An empty series means the first.
# shellcheck disable=SC2034
kernel_series=(6.1 6.12)
# For single tests: Debian 12's kernel for all machines, which has options that the one for clouds leaves out.
# shellcheck disable=SC2034
extra_series=(6.1-generic)

# series_suffix [SERIES]: what the series adds to the names of its files; nothing for the first.
series_suffix() { [[ -z ${1:-} || $1 == "${kernel_series[0]}" ]] || printf -- '-%s\n' "$1"; }

# The release of the unpacked kernel; fails while there is none. The file is written after the tree is in place.
kernel_release() {
    local release='' file
    file=$LACUNA_CACHE/kernel$(series_suffix "${1:-}").release
    [[ -r $file ]] && read -r release <"$file"
    [[ -n $release && -d $LACUNA_CACHE/kernel-$release ]] && printf '%s\n' "$release"
}

# The folder the kernel packages are unpacked in (boot/, lib/modules/, usr/src/).
kernel_tree() {
    local release
    release=$(kernel_release "${1:-}") && printf '%s\n' "$LACUNA_CACHE/kernel-$release"
}

# The kernel image.
guest_kernel() {
    local release
    release=$(kernel_release "${1:-}") && printf '%s\n' "$LACUNA_CACHE/kernel-$release/boot/vmlinuz-$release"
}

# The folder of what is built for a guest with that kernel, and its initramfs.
guest_folder() { printf '%s\n' "$LACUNA_CACHE/guest$(series_suffix "${1:-}")"; }
guest_initramfs() { printf '%s\n' "$(guest_folder "${1:-}")/initramfs.gz"; }

# built NAME: the static, stripped executable of that name.
built() { printf '%s\n' "$LACUNA_CACHE/bin/$1"; }

# Whether this machine can run an unmodified guest kernel. The processor flag counts as well as the device: there are
# hosts whose /dev/kvm opens and yet runs paravirtualised kernels only.
# LACUNA_BED=direct or LACUNA_BED=emulated decides instead, to reproduce elsewhere what one machine showed.
bed_is_direct() {
    case ${LACUNA_BED:-} in
    direct) return 0 ;;
    emulated) return 1 ;;
    '') grep -qwE 'svm|vmx' /proc/cpuinfo && { : <>/dev/kvm; } 2>/dev/null ;;
    *) die "LACUNA_BED is '$LACUNA_BED'; it may be 'direct', 'emulated' or unset" ;;
    esac
}

# sources PATH...: every source file below, NUL-separated, in a fixed order, without what a build leaves behind.
sources() {
    find -H "$@" \( -name '.build*' -o -name '.tmp_versions' \) -prune -o \( -type f -o -type l \) \
        ! -name '*.o' ! -name '*.ko' ! -name '*.mod' ! -name '*.mod.c' ! -name '*.cmd' ! -name '*.d' \
        ! -name Module.symvers ! -name modules.order ! -name '.*.sw?' -print0 | LC_ALL=C sort -z
}

# fingerprint PATH...: one word that changes when a source's name, mode or content does. Content, not time: a fresh clone
# and a branch switch both change times without changing anything else.
fingerprint() {
    {
        sources "$@" | xargs -0 -r stat -c '%a %N'
        # A link to a folder has no content to read; its target is part of the line above.
        sources "$@" | xargs -0 -r sha256sum 2>/dev/null || true
    } | sha256sum | cut -c 1-64
}
