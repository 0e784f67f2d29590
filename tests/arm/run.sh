#!/usr/bin/env bash
# Builds the tests for 64-bit ARM on an x86-64 Debian and runs them under QEMU, on processors with and without the
# instructions that the kernels choose between:
#
#   tests/arm/run.sh                unit tests and golden vectors
#   tests/arm/run.sh kernels ...    only the unit tests whose names contain one of the words
#
# Needs cargo, g++-aarch64-linux-gnu and qemu-user, which it installs where it may. The compiler is the installed one
# if it has ARM's standard library, else Debian's rustc-web, unpacked into target/arm (0.5 GB) and not installed. Where
# any of this cannot be had, it says so and ends well. NICE=15 and JOBS=1 are for machines with other work to do.
set -euo pipefail
cd "$(dirname "$0")/../.."

target=aarch64-unknown-linux-gnu
folder=$PWD/target/arm

# QEMU's processors, and the instruction set that must be chosen on each.
declare -A cpus=([cortex-a53]=neon [cortex-a76]=neondot [max]=neoni8mm)

skip() {
    printf 'skipped: %s\n' "$*"
    exit 0
}

install_tools() {
    command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null && return
    command -v apt-get >/dev/null && [[ $(id -u) == 0 ]] ||
        skip 'g++-aarch64-linux-gnu and qemu-user are not installed'
    apt-get update -qq && apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user ||
        skip 'g++-aarch64-linux-gnu and qemu-user cannot be installed'
}

# The packages of rustc-web, of one version; its LLVM and its runtime are named after their versions.
fetch_packages() {
    local version release llvm
    [[ $(id -u) != 0 ]] || apt-get update -qq || return
    version=$(apt-cache policy rustc-web | sed -n 's/^ *Candidate: //p')
    dpkg --compare-versions "$version" ge "$(sed -n 's/^rust-version = "\(.*\)"/\1/p' ../../../Cargo.toml)" || return
    release=$(cut -d. -f1,2 <<<"$version")
    llvm=$(apt-cache depends "libstd-rust-web-$release" | grep -om1 'libllvm[0-9]*') || return
    apt-get download -qq {rustc-web,"libstd-rust-web-$release",libstd-rust-web-dev}="$version" "$llvm" || return
    # ARM's library, by package lists of its own, so that the system's stay as they are.
    mkdir -p lists/partial cache/archives/partial && : >status
    local arm=(-oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oDir::State::Lists="$PWD/lists"
        -oDir::Cache="$PWD/cache" -oDir::State::status="$PWD/status")
    apt-get "${arm[@]}" update -qq && apt-get "${arm[@]}" download -qq "libstd-rust-web-dev=$version"
}

# Sets RUSTC to a compiler that has ARM's standard library.
choose_compiler() {
    [[ -d $("${RUSTC:-rustc}" --print target-libdir --target $target) ]] && return
    export RUSTC=$folder/rustc
    [[ -x $RUSTC ]] && return
    [[ $(uname -m) == x86_64 ]] && command -v apt-get >/dev/null || skip "no standard library for $target"
    rm -rf "$folder/packages" "$folder/toolchain" && mkdir -p "$folder/packages"
    (cd "$folder/packages" && fetch_packages) || skip "no packages of rustc-web for $target"
    local package
    for package in "$folder"/packages/*.deb; do
        dpkg -x "$package" "$folder/toolchain"
    done
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%q exec %q "$@"\n' "$folder/toolchain/usr/lib/x86_64-linux-gnu" \
        "$folder/toolchain/usr/bin/rustc" >"$RUSTC.new"
    chmod +x "$RUSTC.new" && mv "$RUSTC.new" "$RUSTC"
    rm -rf "$folder/packages"
}

# Usage: run_tests CPU ISA cargo-test arguments...
run_tests() {
    local cpu=$1 isa=$2
    shift 2
    printf '\n== %s on %s: %s\n' "$isa" "$cpu" "$*"
    # The tests check that the variable chooses, so a processor without the instruction set fails.
    TRANSNORMER_ISA=$isa \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu $cpu -L /usr/aarch64-linux-gnu" \
        nice -n "${NICE:-0}" cargo test --release --locked --jobs "${JOBS:-$(nproc)}" -p transnormer \
        --target $target --target-dir "$folder/build" "$@"
}

install_tools
choose_compiler
"${RUSTC:-rustc}" --version

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
# Built quickly: the emulator takes most of the time.
export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16

for cpu in cortex-a53 cortex-a76 max; do
    run_tests "$cpu" "${cpus[$cpu]}" --lib -- "$@"
done
(($# == 0)) || exit 0
# One processor: these models are in f32, for which all three have the same instructions. QEMU starts no program from a
# program, which is how the test that is left out reaches every instruction set.
run_tests max neoni8mm --test golden -- --nocapture --skip every_instruction_set
