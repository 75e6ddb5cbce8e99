#!/usr/bin/env bash
# Translates and scores the test sets of all directions, with the model of a row of the paper's
# Table 1 (m4), 2 (m15) or 3 (opus100). The model is loaded once per process.
#
# usage: bash scripts/evaluate.sh BENCHMARK ROW [options of python -m fairseq_smoe evaluate]
#   bash scripts/evaluate.sh m4 smoe-2-2-2-2
#   bash scripts/evaluate.sh m4 "MoE+EOM" --scale small --seed 1 --subset valid,test
#   bash scripts/evaluate.sh --run my-run --checkpoint my-run/checkpoints/checkpoint_last.pt
#   bash scripts/evaluate.sh --help                           all options
#
# Run again, it skips what is done. It needs a model trained by scripts/train.sh with the same
# BENCHMARK, ROW, --scale and --seed, or by fairseq-train.
set -euo pipefail
if (($# == 0)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
fi
exec python -m fairseq_smoe evaluate "$@"
