#!/bin/sh
# Makes the passwords of docker-compose.yml at the first start, and leaves them as they are later.
# REDIS_PASSWORD and GRAFANA_PASSWORD, where set, are taken instead of random ones.
set -eu
root=${1:-/secrets}
umask 022

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
# keep FILE VALUE: writes it unless it is there.
keep() { [ -s "$1" ] || printf '%s' "$2" > "$1"; }

keep "$root/redis/password" "${REDIS_PASSWORD:-$(random)}"
password=$(cat "$root/redis/password")
case $password in
  *[!A-Za-z0-9_-]*) echo "REDIS_PASSWORD: letters, digits, - and _ only" >&2
    rm "$root/redis/password"; exit 1 ;;
esac
printf 'requirepass %s\n' "$password" > "$root/redis/redis.conf"
printf 'redis://:%s@redis:6379/0' "$password" > "$root/gateway/redis_url"
keep "$root/gateway/cache_secret" "$(random)"
keep "$root/gateway/cache_encryption_key" "$(random)"
keep "$root/grafana/password" "${GRAFANA_PASSWORD:-$(random)}"
