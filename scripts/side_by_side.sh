#!/usr/bin/env bash
# Trains Vanilla MoE and SMoE-2-2-2-2 side by side from one seed for a given time, then scores their
# translations.
#
# usage: bash scripts/side_by_side.sh DATA RUNS OUT SECONDS [cuda|cpu]
#
# Writes checkpoints to RUNS, and the logs and scores to OUT. Training ends early enough to translate
# within SECONDS. "cpu" trains models of scale tiny.
#
# Environment:
#   PYTHON     (default: python)
#   BENCHMARK  whose models these are, and whose data DATA has (default: m4)
#   SUBSET     test set (default: test)
set -uo pipefail
if (($# < 4)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
fi
data=$1 runs=$2 out=$3 seconds=$4 device=${5:-cuda}
: "${PYTHON:=python}" "${BENCHMARK:=m4}" "${SUBSET:=test}"
rows=(vanilla-moe smoe-2-2-2-2)
if [[ $device == cuda ]]; then
    translation=(--fp16)
    # a warm-up that a training of minutes comes to the end of
    training=(--bf16 --max-tokens 13000 --warmup-updates 1000)
else
    translation=(--cpu)
    training=(--cpu --scale tiny --max-update 10)
    training+=(--max-source-positions 200 --max-target-positions 200)
fi
mkdir -p "$out"
hours=$(awk "BEGIN {print 0.6 * $seconds / 3600}")

trainings=()
for row in "${rows[@]}"; do
    "$PYTHON" -m fairseq_smoe train "$BENCHMARK" "$row" --seed 1 --data "$data" --run "$runs/$row" \
        "${training[@]}" --stop-time-hours "$hours" >"$out/$row.txt" 2>&1 &
    trainings+=($!)
done
for i in "${!rows[@]}"; do
    wait "${trainings[i]}" || {
        code=$?
        echo "error: ${rows[i]} was not trained, see $out/${rows[i]}.txt:" >&2
        tail -n 3 "$out/${rows[i]}.txt" >&2
    }
done
[[ -z ${code:-} ]] || exit "$code"
for row in "${rows[@]}"; do
    "$PYTHON" -m fairseq_smoe evaluate --run "$runs/$row" "${translation[@]}" --subset "$SUBSET" \
        --checkpoint "$runs/$row/checkpoints/checkpoint_last.pt" || exit
    mkdir -p "$out/$row"
    cp "$runs/$row/train.log" "$runs/$row/evaluation/$SUBSET/scores.json" "$out/$row"
done
