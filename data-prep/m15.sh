#!/usr/bin/env bash
# The data of the 15-language benchmark (M15 of the paper).
#
# usage: bash data-prep/m15.sh DIR [options of python -m fairseq_smoe prepare]
#   bash data-prep/m15.sh data/m15                          downloads the text
#   bash data-prep/m15.sh data/m15 --from m15.tar.xz        takes text that is there already
#
# The same command again goes on where it was interrupted. data-prep/README.md says more.
source "$(dirname "$0")/common.sh"
prepare_benchmark m15 "$@"
