#!/usr/bin/env bash
# Trains a row of the paper's Table 1 (m4), 2 (m15) or 3 (opus100).
#
# usage: bash scripts/train.sh BENCHMARK ROW [options] [options of fairseq-train]
#   bash scripts/train.sh m4 smoe-2-2-2-2                     the paper's size, on all GPUs
#   bash scripts/train.sh m4 "MoE+EOM" --scale small          a size for two CPU cores
#   bash scripts/train.sh m15 dense --max-update 50000 --dry-run
#   bash scripts/train.sh m4 --help                           all options
#
#   torchrun --nproc-per-node 4 --no-python bash scripts/train.sh m4 dense     several processes
#   sbatch --nodes 4 --gpus-per-node 8 scripts/train.slurm m15 smoe-4-12       a cluster
#
# Prints the fairseq-train command and replaces itself with it. Run again, it resumes from the last
# checkpoint. It needs the data of the benchmark: see data-prep/README.md.
set -euo pipefail
if (($# == 0)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
fi
exec python -m fairseq_smoe train "$@"
