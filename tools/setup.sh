#!/bin/sh
# setup.sh runtime|dev: have the Debian packages and the Python environment that Mullion needs; quick when they are there.
#
#   runtime  what `make run` needs
#   dev      that, and what the tests, the checks and the benchmarks need
#
# Debian packages are installed by apt-get (with sudo when not root); Python packages go into .venv, in the versions and
# with the checksums of requirements/*.lock. What was done is remembered in .stamps by the checksum of what it was made from.
set -eu
cd "$(dirname "$0")/.."

level=${1:?usage: tools/setup.sh runtime|dev}

# docs/dependencies.md says what each is for.
packages="python3-venv qemu-system-x86 qemu-utils ovmf swtpm syslinux mtools dosfstools e2fsprogs util-linux fuse3"
compiler_packages="gcc libc6-dev libpython3-dev" # for the compiled data path; without them the one in Python serves
lock=requirements/runtime.lock
case $level in
runtime) ;;
dev)
    packages="$packages libnbd-bin file nbdkit 7zip fdisk genisoimage libvhdi-utils binutils openssh-server python3-swift restic borgbackup ntfs-3g"
    lock=requirements/dev.lock
    ;;
*)
    echo "setup: $level is neither runtime nor dev" >&2
    exit 2
    ;;
esac

say() {
    echo "setup: $*" >&2
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        env DEBIAN_FRONTEND=noninteractive "$@"
    elif command -v sudo >/dev/null; then
        sudo DEBIAN_FRONTEND=noninteractive "$@"
    else
        say "neither root nor sudo: have somebody with rights run: $*"
        exit 1
    fi
}

# quietly LOG COMMAND...: its output is shown only when it fails.
quietly() {
    log=$1
    shift
    if "$@" >"$log" 2>&1; then
        rm -f "$log"
    else
        status=$?
        cat "$log" >&2
        return $status
    fi
}

# missing_packages NAME...: those of them that are not installed, in $missing.
missing_packages() {
    missing=
    for package; do
        case $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true) in
        *" installed") ;;
        *) missing="$missing $package" ;;
        esac
    done
}

# First as things are; with fresh package lists only if that fails, because they are missing or name versions that are gone.
install_packages() {
    install="apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120"
    # shellcheck disable=SC2086 # both are lists of words
    as_root $install $missing >"$work/apt.log" 2>&1 && return
    say "fetching package lists"
    quietly "$work/update.log" as_root apt-get update -qq || say "not all package lists could be fetched; trying all the same"
    # shellcheck disable=SC2086
    quietly "$work/apt.log" as_root $install $missing
}

mkdir -p .stamps
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
    # shellcheck disable=SC2086 # lists of words
    missing_packages $packages $compiler_packages
    if [ -n "$missing" ]; then
        say "installing Debian packages:$missing"
        if ! install_packages; then
            # shellcheck disable=SC2086
            missing_packages $packages
            if [ -n "$missing" ] && ! install_packages; then
                say "apt-get could not install them; mend what it says above, then try again"
                exit 1
            fi
        fi
    fi
else
    say "this is not Debian: make sure of the equivalents of these packages yourself: $packages $compiler_packages"
fi

# Debian's Python is built with profile-guided optimization: the data path runs 1.5 times as fast (docs/adr/0008).
python=
for candidate in /usr/bin/python3 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    say "Python 3.11 or newer is needed; Debian 12 has it: apt-get install python3"
    exit 1
fi

stamp=.stamps/$level-$({ pwd && "$python" -VV && cat "$lock" pyproject.toml; } | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ] || ! .venv/bin/python -c 'import mullion' 2>/dev/null; then
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || [ "$(.venv/bin/python -VV)" != "$("$python" -VV)" ]; then
        rm -rf .venv
        "$python" -m venv .venv
    fi
    say "installing Python packages of $lock"
    pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore .venv/bin/python -m pip"
    # shellcheck disable=SC2086 # a list of words
    if ! { quietly "$work/pip.log" $pip install --require-hashes -r "$lock" &&
        quietly "$work/pip.log" $pip install --no-deps --no-build-isolation -e .; }; then
        say "pip could not install them; if it says that it cannot connect, check the network, then try again"
        exit 1
    fi
    rm -f ".stamps/$level-"*
    : >"$stamp"
fi

# Where it cannot be built, the data path in Python serves; `mullion version` says so. Tests need both.
twins=.stamps/twins-$({ pwd && "$python" -VV && cat src/mullion/*/*.pyx tools/build_twins.py; } | sha256sum | cut -c1-16)
if [ ! -e "$twins" ] || [ -z "$(find src/mullion -name '_*.so')" ]; then
    say "compiling the data path"
    if .venv/bin/python tools/build_twins.py; then
        rm -f .stamps/twins-*
        : >"$twins"
    elif [ "$level" = dev ]; then
        exit 1
    else
        say "the data path in Python serves, at two to three times the processor time a request"
    fi
fi
