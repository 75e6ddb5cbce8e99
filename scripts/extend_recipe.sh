#!/usr/bin/env bash
# Measures the recipe that adds a language: M4 without Tagalog learns Tagalog in four ways, beside a
# model that had it from the start. Writes results/extend/table.md.
#
# usage: bash scripts/extend_recipe.sh TEXT WORK
#   TEXT  folder or archive with train.eng-tgl.tgl, ... of the four languages of M4
#   WORK  folder for data and trainings; what is complete there is not done again
#
# About an hour on one core.
set -euo pipefail
if (($# != 2)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
text=$1 work=$2 definitions=$here/results/extend
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
smoe() { python -m fairseq_smoe "$@"; }

train() { # NAME DEFINITION DATA [options]
    local name=$1 definition=$2 data=$3
    shift 3
    [[ -e $work/runs/$name/done ]] && return
    smoe train "$definitions/$definition.json" vanilla-moe --data "$data" --run "$work/runs/$name" \
        --batch-tokens 2000 --max-tokens 2000 --cpu --seed 1 --log-format json --log-interval 100 \
        --no-epoch-checkpoints --keep-interval-updates 1 "$@"
    touch "$work/runs/$name/done"
}

for name in without-tgl joint; do
    smoe prepare --benchmark "$definitions/$name.json" --from "$text" --to "$work/data-$name"
    train "$name" "$name" "$work/data-$name"
done

before=$work/runs/without-tgl/checkpoints/checkpoint_best.pt
if [[ ! -e $work/new/checkpoint.pt ]]; then
    smoe extend "$before" --with-text "$text" --pairs eng-tgl --new-pieces 1000 \
        --splits train=train valid=idev test=test test1=itest --to "$work/new"
fi
if [[ ! -e $work/new-experts/checkpoint.pt ]]; then
    smoe extend "$work/new/checkpoint.pt" --add-experts 1:4 --to "$work/new-experts"
fi
# a quarter of the first training's rate, for half as long
tune=(--finetune-from-model "$work/new/checkpoint.pt" --lr 1e-3 --max-update 2000
    --warmup-steps 200 --hold-steps 1300 --decay-steps 500)
new=eng-tgl,tgl-eng
old=eng-nso,nso-eng,eng-msa,msa-eng,eng-cat,cat-eng
first_row=$(($(wc -l <"$work/data-without-tgl/dict.txt") + 4)) # fairseq has four tokens of its own
train everything joint "$work/new/data" "${tune[@]}" --lang-pairs $new
train new-rows joint "$work/new/data" "${tune[@]}" --lang-pairs $new \
    --train-only "embed_tokens[$first_row:]"
train new-experts joint "$work/new/data" "${tune[@]}" --lang-pairs $new \
    --finetune-from-model "$work/new-experts/checkpoint.pt" --smoe-strata 12 \
    --train-only "embed_tokens[$first_row:],experts[8:],gates"
# half of the sentences are new; the others by the sizes of their corpora
train mixed joint "$work/new/data" "${tune[@]}" --lang-pairs $new,$old \
    --sampling-weights "{'main:eng-tgl': 0.25, 'main:tgl-eng': 0.25, 'main:eng-cat': 0.173,
        'main:cat-eng': 0.173, 'main:eng-msa': 0.0495, 'main:msa-eng': 0.0495,
        'main:eng-nso': 0.0275, 'main:nso-eng': 0.0275}"

for name in without-tgl joint everything new-rows new-experts mixed; do
    data=$work/new/data directions=$new,$old
    [[ $name == without-tgl ]] && directions=$old
    [[ $name == without-tgl || $name == joint ]] && data=$work/data-$name
    smoe evaluate --run "$work/runs/$name" --data "$data" --directions "$directions" \
        --subset test1 --cpu
done
python "$here/scripts/extend_table.py" "$work/runs" --to "$definitions"
