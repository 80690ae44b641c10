#!/usr/bin/env bash
# scripts/with_postgresql.sh COMMAND…: run a command with ARROWMOE_TEST_CATALOG_URL set to a PostgreSQL of its own.
# The cluster lives in a temporary directory, listens on loopback only, asks for a password, and is gone at the end.
# Where there is no PostgreSQL and none can be installed, the reason is said and the command runs without it.
set -euo pipefail

if [[ -n "${ARROWMOE_TEST_CATALOG_URL:-}" ]]; then exec "$@"; fi

without() {
  echo "with_postgresql: $1, so tests of the catalog on PostgreSQL are skipped" >&2
  exec "${command[@]}"
}

found() {  # the folder of initdb: on the path, or where Debian puts it, the newest first
  local places
  places=$(dirname "$(readlink -f "$(command -v initdb)")" 2>/dev/null; ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -Vr)
  for place in $places; do
    if [[ -x $place/initdb && -x $place/pg_ctl && -x $place/postgres ]]; then echo "$place"; return; fi
  done
}

installed() {
  [[ $EUID == 0 ]] && command -v apt-get >/dev/null || return 1
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends postgresql; } >&2
}

as_owner() { (cd "$root" && "${user[@]}" env "LC_ALL=C.UTF-8" "$@"); }

started() {  # a port may be taken between asking for a free one and using it: try a few
  local attempt
  for attempt in 1 2 3 4 5; do
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    options="-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories= -c fsync=off -c max_connections=200"
    if as_owner "$bin/pg_ctl" --silent --pgdata="$root/data" --log="$root/log" --wait --options="$options" start; then
      return
    fi
  done
  cat "$root/log" >&2
  return 1
}

stopped() {
  as_owner "$bin/pg_ctl" --pgdata="$root/data" --mode=immediate stop >/dev/null 2>&1 || true
  rm -rf "$root"
}

command=("$@")
bin=$(found)
if [[ -z $bin ]]; then
  installed || without "no PostgreSQL is installed, and it cannot be installed here (that takes root and apt-get)"
  bin=$(found)
fi
[[ -n $bin ]] || without "apt-get installed no PostgreSQL server"

root=$(mktemp -d)
user=()
if [[ $EUID == 0 ]]; then  # PostgreSQL refuses to run as root
  owner=$(id -un postgres 2>/dev/null || echo nobody)
  chown "$owner" "$root"
  user=(setpriv "--reuid=$owner" "--regid=$(id -g "$owner")" --clear-groups)
fi
trap stopped EXIT
trap 'exit 130' INT TERM

secret=$(python3 -c 'import secrets; print(secrets.token_hex(16))')
as_owner bash -c 'umask 077; cat > password' <<<"$secret"
as_owner "$bin/initdb" --pgdata="$root/data" --username=arrowmoe --pwfile="$root/password" --encoding=UTF8 \
  --auth=scram-sha-256 --no-sync >/dev/null
started || { stopped; trap - EXIT; without "PostgreSQL did not start"; }
as_owner env PGPASSWORD="$secret" "$bin/createdb" --host=127.0.0.1 --port="$port" --username=arrowmoe arrowmoe_test

ARROWMOE_TEST_CATALOG_URL="postgresql+psycopg://arrowmoe:$secret@127.0.0.1:$port/arrowmoe_test" "$@"
