#!/usr/bin/env bash
# Fetches the programs that the tests need and this machine lacks: Debian packages, unpacked in
# VENV/debian/TOOL. Nothing is installed in the system and no service is started. VENV/debian/bin holds a wrapper
# for each program; tests/conftest.py puts that folder into PATH. A missing tool is no error: its tests are
# skipped, and the last lines of the test run give the reason from VENV/debian/missing/TOOL.
set -euo pipefail
shopt -s nullglob

venv=$(realpath "${1:?usage: fetch-tools.sh VENV}")
home=$venv/debian
work=$home/work
# Debian keeps the server programs of PostgreSQL out of PATH.
for folder in /usr/lib/postgresql/*/bin; do PATH+=:$folder; done

# Each line: the tool, its programs, the packages. The font covers Chinese, which web pages and pictures show;
# libatomic1 is for Playwright.
tools="
    redis-server | redis-server           | redis-server
    prometheus   | prometheus promtool    | prometheus
    chromium     | chromium               | chromium fonts-wqy-microhei libatomic1
    postgresql   | initdb pg_ctl postgres | postgresql
    systemd      | systemd-analyze        | systemd
    zstd         | zstdcat                | zstd
    jq           | jq                     | jq
"

# Answers within 20 s or counts as broken: a stub of another packaging system may wait for its daemon.
works() {
    local program
    for program in "$@"; do timeout 20 "$program" --version >/dev/null 2>&1 </dev/null || return 1; done
}

# Succeeds if the machine has all programs, or an earlier run fetched them.
present() { works "${@/#/$home/bin/}" || works "$@"; }

# apt's sandbox user cannot write here, and other users than root cannot take the system's lock.
# Without the limits a machine without network waits for minutes.
apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o APT::Sandbox::User=root -o Debug::NoLocking=1 \
        -o Acquire::Retries=1 -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10 \
        -o "Dir::Cache=$work/cache" "${own_lists[@]}" "$@" >"$work/log" 2>&1 </dev/null
}
own_lists=()

# The system's package lists may be absent or outdated: then we fetch our own once and leave the system's alone.
# A failed update is no error yet: one source may be down while another one has the package.
update_lists() {
    [[ ${#own_lists[@]} == 0 ]] || return 1
    mkdir -p "$work/lists/partial"
    own_lists=(-o "Dir::State::lists=$work/lists")
    apt_get update || true
    ! compgen -G "$work/lists/*_Packages*" >/dev/null || return 0
    no_lists="cannot fetch package lists: $(apt_error)"
    return 1
}
no_lists=

# Downloads packages and those of their dependencies that the machine lacks.
download() { apt_get install --no-install-recommends --download-only "$@"; }

# The first error of apt, on one line.
apt_error() {
    { grep -m1 '^E:' "$work/log" || grep -m1 '^W: Failed' "$work/log" || tail -1 "$work/log"; } | cut -c 4-200
}

# unpack TOOL: replaces its folder by the content of the downloaded packages, without documentation and icons.
unpack() {
    local deb
    rm -rf "${home:?}/$1"
    mkdir -p "$home/$1"
    for deb in "$work"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$home/$1" --no-same-owner \
            --exclude=./usr/share/{doc,man,locale,icons,help,javascript}
        rm "$deb"
    done
}

# Chromium takes its fonts from the packages and from the machine, whose own configuration may be absent.
configure_fonts() {
    cat >"$1/fonts.conf" <<END
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <dir>$1/usr/share/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir>$1/fontcache</cachedir>
</fontconfig>
END
}

# path_of TOOL PROGRAM: its unpacked file. Chromium's usr/bin/chromium is a script for an installed browser.
path_of() {
    local root=$home/$1 path
    for path in "$root/usr/lib/$2/$2" "$root"/usr/lib/postgresql/*/bin/"$2" "$root"{/usr,}/bin/"$2"; do
        [[ ! -x $path ]] || break
    done
    echo "$path"
}

# wrap TOOL PROGRAM PATH: makes the command PROGRAM that runs PATH with the unpacked libraries.
wrap() {
    local root=$home/$1 program=$2 path=$3 libraries
    libraries=$(find "$root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
    # The wrapper may be a hard link to that of another environment.
    rm -f "$home/bin/$program"
    # redis-server and zstdcat choose their function by the name they are run by, which the path keeps.
    cat >"$home/bin/$program" <<END
#!/bin/sh
export LD_LIBRARY_PATH="$libraries"
[ ! -e "$root/fonts.conf" ] || export FONTCONFIG_FILE="$root/fonts.conf"
exec "$path" "\$@"
END
    chmod +x "$home/bin/$program"
}

# fetch TOOL PROGRAMS PACKAGES: prints nothing on success, else the reason.
fetch() {
    local tool=$1 programs packages program
    read -ra programs <<<"$2"
    read -ra packages <<<"$3"
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo "not installed, and this is no Debian to take it from"
        return
    fi
    # Without network each further try would wait for its timeouts.
    if [[ $no_lists ]]; then
        echo "$no_lists"
        return
    fi
    rm -f "$work"/cache/archives/*.deb
    if ! download "${packages[@]}" && ! { update_lists && download "${packages[@]}"; }; then
        if [[ $no_lists ]]; then echo "$no_lists"; else apt_error; fi
        return
    fi
    unpack "$tool"
    for program in "${programs[@]}"; do wrap "$tool" "$program" "$(path_of "$tool" "$program")"; done
    if [[ $tool == chromium ]]; then
        configure_fonts "$home/$tool"
        # The Node.js inside Playwright is linked to libatomic.
        wrap "$tool" playwright-node "$(echo "$venv"/lib/python3*/site-packages/playwright/driver/node)"
    fi
    for program in "${programs[@]}"; do
        works "$home/bin/$program" && continue
        echo "unpacked, but it does not run: $("$home/bin/$program" --version 2>&1 | tail -1)"
        rm -f "${programs[@]/#/$home/bin/}"
        return
    done
}

trap 'rm -rf "$work"' EXIT
while IFS='|' read -r tool programs packages; do
    tool=${tool// /}
    read -ra names <<<"$programs"
    [[ -n $tool ]] || continue
    if present "${names[@]}"; then
        rm -f "$home/missing/$tool"
        continue
    fi
    started_s=$SECONDS
    mkdir -p "$home"/{bin,missing} "$work/cache/archives/partial"
    fetch "$tool" "$programs" "$packages" >"$work/reason"
    if [[ -s $work/reason ]]; then
        mv "$work/reason" "$home/missing/$tool"
        echo "== no $tool: $(<"$home/missing/$tool"); its tests are skipped"
    else
        rm -f "$home/missing/$tool"
        size=$(du -sm "$home/$tool" | cut -f1)
        echo "== unpacked Debian's $tool in $home/$tool: $size MB, $((SECONDS - started_s)) s"
    fi
done <<<"$tools"
