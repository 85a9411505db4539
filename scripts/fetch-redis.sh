#!/usr/bin/env bash
# Gives the tests a Redis server as VENV/bin/redis-server-debian: the one in PATH, or Debian's, unpacked inside VENV.
# Nothing is installed in the system and no service is started. Without one, the tests that want it are skipped.
set -euo pipefail

venv=$(realpath "${1:?usage: fetch-redis.sh VENV}")
wrapper=$venv/bin/redis-server-debian
root=$venv/debian-redis
# What redis-server is linked to beyond the C library; a machine that has one already just has it twice.
packages=(redis-server redis-tools liblzf1 libjemalloc2 libatomic1)

give_up() {
    echo "== no redis-server: $1; the tests that want a real Redis are skipped"
    exit 0
}

works() { "$1" --version >/dev/null 2>&1; }

works "$wrapper" && exit 0
mkdir -p "$venv/bin"
if works redis-server; then
    ln -sfn "$(command -v redis-server)" "$wrapper"
    exit 0
fi
command -v apt-get >/dev/null && command -v dpkg >/dev/null || give_up "none in PATH, and this is no Debian to take it from"

echo "== unpacking Debian's redis-server into $root"
debs=$root/debs
mkdir -p "$debs/lists/partial" "$debs/cache/archives/partial"
# The sandbox user of apt could not write here.
apt_get() { apt-get -qq -o APT::Sandbox::User=root "$@" >"$debs/log" 2>&1; }
# The system's package lists may be absent or old: then we fetch lists of our own, without touching the system's.
fetch() { (cd "$debs" && apt_get "$@" download "${packages[@]}"); }
own=(-o "Dir::State::lists=$debs/lists" -o "Dir::Cache=$debs/cache")
fetch || { apt_get "${own[@]}" update && fetch "${own[@]}"; } || give_up "$(tail -1 "$debs/log")"
for deb in "$debs"/*.deb; do dpkg -x "$deb" "$root"; done
rm -rf "$debs"

libraries=$(dirname "$(find "$root" -name 'liblzf.so.1' | head -1)")
# The binary is redis-check-rdb too and asks its own name which of them to be.
cat >"$wrapper" <<END
#!/bin/sh
LD_LIBRARY_PATH="$libraries" exec "$root/usr/bin/redis-server" "\$@"
END
chmod +x "$wrapper"
works "$wrapper" || give_up "$("$wrapper" --version 2>&1 | tail -1)"
"$wrapper" --version
