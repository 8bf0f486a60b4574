#!/bin/bash
# Builds an arm64 Python 3.11 for user-mode emulation: setup.sh ROOT SITE [pi4|pi5]
# ROOT gets a Debian 12 arm64 userland, SITE the aarch64 wheels of the device at the versions of constraints.txt.
# No chroot, no binfmt, no maintainer scripts. A second run with the same versions does nothing.
set -euo pipefail
root=$(realpath -m "$1") site=$(realpath -m "$2") board=${3:-pi4}
here=$(cd "$(dirname "$0")" && pwd)
constraints=$here/../../constraints.txt
python=${PYTHON:-python3}
debs=(python3.11 libstdc++6 libgomp1)
wheels=(numpy numba onnxruntime ai-edge-litert safetensors pillow pytest)

fail() { echo "deploy/arm64/setup.sh: $*" >&2; exit 1; }
current() { [ -f "$1/.stamp" ] && [ "$(cat "$1/.stamp")" = "$2" ]; }

tools() {
  command -v qemu-aarch64 >/dev/null && command -v gcc >/dev/null && return
  [ "$(id -u)" = 0 ] || fail "qemu-user or gcc is missing: run 'sudo apt-get install qemu-user gcc libc6-dev' first."
  apt-get -qq -o Acquire::Retries=3 update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
    -o Acquire::Retries=3 install --no-install-recommends qemu-user gcc libc6-dev >/dev/null 2>&1 ||
    fail "apt-get could not install qemu-user; is a Debian package mirror reachable?"
}

userland() { # into $1
  mkdir -p "$1/lists/partial" "$1/cache/archives/partial" "$1/root"
  : >"$1/status"
  local apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State="$1"
    -o Dir::State::status="$1/status" -o Dir::Cache="$1/cache" -o Debug::NoLocking=1
    -o APT::Sandbox::User= -o Acquire::Retries=3)
  "${apt[@]}" update && "${apt[@]}" -y --download-only --no-install-recommends install "${debs[@]}" >/dev/null ||
    fail "apt-get could not fetch the arm64 packages (${debs[*]}); this needs Debian 12 and its package mirror."
  local deb
  for deb in "$1"/cache/archives/*.deb; do dpkg -x "$deb" "$1/root"; done
  ln -sfn python3.11 "$1/root/usr/bin/python3"
  gcc -O2 -Wall -shared -fPIC -o "$1/root/libicount.so" "$here/icount.c"
}

packages() { # into $1
  local glibc options=()
  for glibc in 17 26 27 28 31 34 35; do options+=(--platform "manylinux_2_${glibc}_aarch64"); done
  "$python" -m pip install -q --target "$1" "${options[@]}" --platform manylinux2014_aarch64 --platform any \
    --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none --only-binary=:all: \
    -c "$constraints" "${wheels[@]}"
}

# Under the workstation's own cpuinfo onnxruntime 1.31 and LiteRT 2.3 crash: the guest must see its board's.
cpuinfo() {
  local id features i cpu=$root/sys/devices/system/cpu
  case $board in
    pi4) id="0x0 0xd08 3" features="fp asimd evtstrm crc32 cpuid" ;;
    pi5) id="0x4 0xd0b 1" features="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp" ;;
    *) fail "unknown board '$board', expected pi4 or pi5." ;;
  esac
  mkdir -p "$root/proc" "$cpu"
  for i in 0 1 2 3; do
    printf 'processor\t: %d\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' $i "$features"
    printf 'CPU variant\t: %s\nCPU part\t: %s\nCPU revision\t: %d\n\n' $id
  done >"$root/proc/cpuinfo"
  printf 'Model\t\t: Raspberry Pi %s Model B\n' "${board#pi}" >>"$root/proc/cpuinfo"
  for i in possible present online; do echo 0-3 >"$cpu/$i"; done
}

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the emulated kit is for x86-64 Linux, this is $(uname -sm)."
command -v apt-get >/dev/null && command -v dpkg >/dev/null || fail "apt-get and dpkg are missing: this needs Debian 12."
tools
mkdir -p "$(dirname "$root")" "$(dirname "$site")"
exec 9>"$root.lock" && flock 9
work=$root.partial
rm -rf "$work" && mkdir "$work"
trap 'rm -rf "$work"' EXIT

stamp="${debs[*]} $(cat "$0" "$here/icount.c" | sha256sum)"
if ! current "$root" "$stamp"; then
  userland "$work"
  rm -rf "$root" && mv "$work/root" "$root"
  echo "$stamp" >"$root/.stamp"
fi
stamp="${wheels[*]} $(cat "$0" "$constraints" | sha256sum)"
if ! current "$site" "$stamp"; then
  packages "$work/site"
  rm -rf "$site" && mv "$work/site" "$site"
  echo "$stamp" >"$site/.stamp"
fi
cpuinfo
