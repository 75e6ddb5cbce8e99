#!/usr/bin/env bash
# Trains rows of a benchmark one after another, and translates and scores their test sets. Writes
# tables with significance, and figures with their numbers as CSV, to one folder.
#
# usage: bash scripts/reproduce.sh BENCHMARK SCALE UPDATES DATA OUT ROW[:SEED]...
#   bash data-prep/m4.sh data/m4-small --scale small
#   bash scripts/reproduce.sh m4 small 3000 data/m4-small m4-tables vanilla-moe smoe-2-2-2-2 smoe-2-2-2-2:1
#
# Environment:
#   RUNS      folder of all trainings (default: runs)
#   SUBSETS   test sets, as fairseq's --gen-subset (default: test)
#   ANALYSE   data sets to analyse (default: valid,train)
#   METRICS   metrics, each of which gets a table (default: piece-bleu bleu chrf++)
#   TRAIN     more options of scripts/train.sh
#   EVALUATE  more options of scripts/evaluate.sh
#
# After an interruption, run the same command to continue. Needs pip install ".[plot]".
set -euo pipefail
if (($# < 6)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
fi
benchmark=$1 scale=$2 updates=$3 data=$4 out=$5
shift 5
rows=("$@")
: "${RUNS:=runs}" "${SUBSETS:=test}" "${ANALYSE:=valid,train}" "${METRICS:=piece-bleu bleu chrf++}"
read -ra train_options <<<"${TRAIN:-}"
read -ra evaluate_options <<<"${EVALUATE:-}"
here=$(dirname "$0")
runs=()

for row in "${rows[@]}"; do
    name=${row%:*} seed=42
    [[ $row == *:* ]] && seed=${row#*:}
    run=$RUNS/$(basename "$benchmark" .json)-$scale/$name-seed$seed
    model=("$benchmark" "$name" --scale "$scale" --seed "$seed" --runs "$RUNS" --data "$data")
    last=(--checkpoint "$run/checkpoints/checkpoint_last.pt")
    bash "$here/train.sh" "${model[@]}" --max-update "$updates" "${train_options[@]}"
    bash "$here/evaluate.sh" "${model[@]}" "${last[@]}" --subset "$SUBSETS" "${evaluate_options[@]}"
    python -m fairseq_smoe analyse "${model[@]}" "${last[@]}" --subset "$ANALYSE"
    runs+=("$run")
done

for subset in ${SUBSETS//,/ }; do
    for metric in $METRICS; do
        python -m fairseq_smoe tabulate "$benchmark" --scale "$scale" --runs "$RUNS" \
            --subset "$subset" --metric "$metric" --to "$out/$subset-$metric"
    done
done
python -m fairseq_smoe plot "${runs[@]}" --to "$out/pictures"
