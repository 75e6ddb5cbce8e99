#!/usr/bin/env bash
# The data of OPUS-100: 94 languages <-> English, 99 with --with-train-only-pairs.
#
# usage: bash data-prep/opus100.sh DIR [options of python -m fairseq_smoe prepare]
#   bash data-prep/opus100.sh data/opus100                            downloads the text
#   bash data-prep/opus100.sh data/opus100 --lines-per-shard 250000   in up to four shards
#   bash data-prep/opus100.sh data/opus100 --from opus-100-corpus     text that is there already
#
# The same command again goes on where it was interrupted. data-prep/README.md says more.
set -euo pipefail
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
case "${1:-}" in
    -h | --help) usage && exit ;;
    "" | -*) usage >&2 && exit 2 ;;
esac
exec python -m fairseq_smoe prepare --benchmark opus100 --to "$@"
