#!/usr/bin/env bash
# The data of the 4-language benchmark (Northern Sotho, Malay, Tagalog, Catalan <-> English).
#
# usage: bash data-prep/m4.sh DIR [options of python -m fairseq_smoe prepare]
#   bash data-prep/m4.sh data/m4                          downloads the text
#   bash data-prep/m4.sh data/m4 --from m15.tar.xz        takes text that is there already
#   bash data-prep/m4.sh data/m4 --recipe data-prep/recipe-m4.txt    published corpora of a list
#
# The same command again goes on where it was interrupted. data-prep/README.md says more.
source "$(dirname "$0")/common.sh"
prepare_benchmark m4 "$@"
