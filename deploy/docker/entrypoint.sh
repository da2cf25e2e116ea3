#!/bin/sh
# Runs `miaotui ARGUMENTS`. A variable NAME_FILE is read into NAME, so that secrets can be files.
set -eu
for variable in REDIS_URL MIAOTUI_GATEWAY_CACHE_SECRET \
  MIAOTUI_GATEWAY_CACHE_ENCRYPTION_KEY MIAOTUI_GATEWAY_DOCUMENTS \
  MIAOTUI_SHARD_PASSAGE_REDIS_URL MIAOTUI_SHARD_PASSAGE_REDIS_SECRET \
  MIAOTUI_SHARD_PASSAGE_REDIS_ENCRYPTION_KEY; do
  eval "file=\${${variable}_FILE:-}"
  if [ -n "$file" ]; then
    value=$(cat "$file")
    export "$variable=$value"
    unset "${variable}_FILE"
  fi
done
exec miaotui "$@"
