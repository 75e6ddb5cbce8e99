#!/usr/bin/env bash
# Tells in a given time whether a GPU works with this project, how fast it is, and what fits into
# its memory; then trains two models side by side for the time that is left.
#
# usage: bash scripts/check_gpu.sh DATA OUT MINUTES [--device cpu] [STEP...]
#   bash data-prep/m4.sh data/m4
#   bash scripts/check_gpu.sh data/m4 gpu 15
#   bash scripts/check_gpu.sh data/m4 gpu 5 block-grouped_mm block-loop     only these steps
#
# Steps, in this order:
#   doctor            what is installed, and a self-test
#   tests             the tests that need a GPU (pip install ".[test]")
#   block-grouped_mm  speed and memory of a block with either backend of the experts
#   block-loop
#   train             speed and memory of training steps, all rows of Table 1
#   options           the same with options that save time or memory
#   generate          speed of beam search in half precision
#   batch             the largest --max-tokens
#   m15               100 updates of the M15 model
#   m4                Vanilla MoE and SMoE-2-2-2-2 from one seed, side by side, until the time is
#                     over; then their translations are scored
#
# A step that fails, or takes longer than its share of the time, does not keep the others from
# running. OUT/gpu.md has all tables, from the first step on. Run again, it skips steps that are
# complete. Checkpoints are written to OUT-work, which may be deleted. --device cpu tries everything
# at a tiny size without a GPU. Ends with exit code 1 unless all steps are complete.
#
# Environment:
#   PYTHON     (default: python)
#   BENCHMARK  of the step m4, and of DATA: m4, or a .json file like it (default: m4)
#   SUBSET     test set that it translates (default: test)
set -uo pipefail
if (($# < 3)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
fi
data=$(realpath -m "$1") out=$(realpath -m "$2") minutes=$3 device=cuda
shift 3
if [[ ${1:-} == --device ]]; then
    device=${2:-}
    shift 2
fi
steps=(doctor tests block-grouped_mm block-loop train options generate batch m15 m4)
: "${PYTHON:=python}"
export PYTHON
if [[ ! $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    echo "error: MINUTES $minutes: expected a number, e.g. 15" >&2
    exit 2
fi
if [[ $device != cuda && $device != cpu ]]; then
    echo "error: --device $device: expected cuda or cpu" >&2
    exit 2
fi
for asked in "$@"; do
    if [[ " ${steps[*]} " != *" $asked "* ]]; then
        echo "error: STEP $asked: expected ${steps[*]}" >&2
        exit 2
    fi
done
asked=("${@:-${steps[@]}}")
total=$(awk "BEGIN {print int($minutes * 60)}")
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" -c 'import importlib.util as u; assert u.find_spec("fairseq") and u.find_spec("torch")' 2>/dev/null || {
    echo "error: PYTHON $PYTHON: has no fairseq; install this project with it: pip install ." >&2
    exit 2
}
work=$out-work
mkdir -p "$out" "$work"

if [[ $device == cuda ]]; then
    on=() small=() batch=() rows=()
    options=("--chunked-loss 1024" "--optimizer fused_adam")
    block=(--tokens 13000 64000 --experts 8 64 128 --experts-tokens 13000 --rounds 5)
else
    on=(--cpu) rows=(--rows smoe-2-2-2-2)
    options=("--chunked-loss 64 --optimizer fused_adam")
    small=(--cpu --threads 1 --scale tiny --tokens 200 --rounds 2)
    batch=(--cpu --threads 1 --scale tiny --least 200 --most 400 --rounds 2)
    block=(--cpu --threads 1 --strata 2-2 --tokens 64 --experts 2 4 --experts-tokens 64 --rounds 2)
    block+=(--embed-dim 32 --ffn-dim 64 --no-memory)
fi

# step NAME PERCENT COMMAND...: runs it for at most that share of all time
step() {
    local name=$1 limit=$((total * $2 / 100)) left=$((total - SECONDS)) begun=$SECONDS code outcome
    shift 2
    if [[ " ${asked[*]} " != *" $name "* || -e $out/$name/complete ]]; then
        return
    fi
    mkdir -p "$out/$name"
    echo "== $name"
    ((limit < left)) || limit=$left
    if ((limit < 1)); then
        outcome="not begun: the time was over"
    else
        timeout --kill-after=10 "$limit" "$@" >"$out/$name/log.txt" 2>&1
        code=$?
        case $code in
            0) outcome=complete && touch "$out/$name/complete" ;;
            124 | 137) outcome="stopped after $limit s, its share of the time" ;;
            *) outcome="failed with exit code $code, see $name/log.txt" ;;
        esac
    fi
    echo "   $outcome ($((SECONDS - begun)) s)"
    printf '%s\t%s\t%s\n' "$name" "$((SECONDS - begun))" "$outcome" >>"$out/steps.tsv"
    "$PYTHON" scripts/gpu_table.py "$out" >"$out/gpu.md"
}

step doctor 7 "$PYTHON" -m fairseq_smoe doctor --folder "$work" "${on[@]}"
step tests 20 "$PYTHON" -m pytest tests/gpu -m gpu --device "$device" -q -p no:cacheprovider \
    --junitxml "$out/tests/junit.xml"
for backend in grouped_mm loop; do
    step block-$backend 8 "$PYTHON" scripts/bench_block.py "${block[@]}" --backend $backend \
        --to "$out/block-$backend"
done
step train 12 "$PYTHON" scripts/bench_train.py "${small[@]}" "${rows[@]}" --to "$out/train"
step options 8 "$PYTHON" scripts/bench_train.py "${small[@]}" --rows smoe-2-2-2-2 \
    --options "${options[@]}" --to "$out/options"
step generate 8 "$PYTHON" scripts/bench_generate.py "${small[@]}" --to "$out/generate" \
    --rows vanilla-moe smoe-4-4 smoe-2-2-2-2
step batch 6 "$PYTHON" scripts/largest_batch.py "${batch[@]}" --to "$out/batch"
step m15 8 "$PYTHON" scripts/bench_train.py --benchmark m15 --rows vanilla-moe --rounds 100 \
    "${small[@]}" --to "$out/m15"
step m4 100 bash scripts/side_by_side.sh "$data" "$work" "$out/m4" $((total - SECONDS)) "$device"

complete=1
for name in "${asked[@]}"; do
    [[ -e $out/$name/complete ]] || complete=0
done
echo "== $out/gpu.md"
((complete))
