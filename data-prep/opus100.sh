#!/usr/bin/env bash
# The data of OPUS-100: 94 languages <-> English, 99 with --with-train-only-pairs.
#
# usage: bash data-prep/opus100.sh DIR [options of python -m fairseq_smoe prepare]
#   bash data-prep/opus100.sh data/opus100                            downloads the text
#   bash data-prep/opus100.sh data/opus100 --lines-per-shard 250000   in up to four shards
#   bash data-prep/opus100.sh data/opus100 --from opus-100-corpus     text that is there already
#
# The same command again goes on where it was interrupted. data-prep/README.md says more.
source "$(dirname "$0")/common.sh"
prepare_benchmark opus100 "$@"
