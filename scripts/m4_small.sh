#!/usr/bin/env bash
# SMoE-2-2-2-2 against a vanilla MoE of as many experts on the four languages of M4 (Northern Sotho,
# Malay, Tagalog, Catalan, to and from English), at a size that trains on two CPU cores in an hour.
#
# usage: bash scripts/m4_small.sh TEXT OUT UPDATES
#   TEXT     folder with {train,idev,itest,test}.eng-XXX.{eng,XXX}, one sentence a line
#   OUT      folder for data, checkpoints, translations and tables
#   UPDATES  of each model; more than last time goes on from the checkpoints
#   BEAM     environment variable: beam size of the translations (default: 5)
#
# Needs an environment with fairseq-smoe[demo] on PATH. Finished steps are skipped.
set -euo pipefail
if (($# != 3)); then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
fi
text=$1 out=$2 updates=$3
here=$(dirname "$0")
langs=(nso msa tgl cat)
models=(SMoE-2-2-2-2 MoE-8)
declare -A strata=([SMoE-2-2-2-2]=2-2-2-2 [MoE-8]=8)
export OMP_NUM_THREADS=1 # one core for each model
user_dir=$(python -m fairseq_smoe path)

pairs=$(printf ',eng-%s' "${langs[@]}")
directions=()
for lang in "${langs[@]}"; do directions+=("eng-$lang" "$lang-eng"); done

train() {
    fairseq-train "$out/data" --user-dir "$user_dir" --save-dir "$out/$1/checkpoints" --cpu \
        --task smoe_translation --lang-pairs "$(IFS=, && echo "${directions[*]}")" \
        --arch smoe_transformer --encoder-layers 4 --decoder-layers 4 \
        --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 \
        --encoder-attention-heads 4 --decoder-attention-heads 4 --smoe-strata "${strata[$1]}" \
        --dropout 0 --max-source-positions 512 --max-target-positions 512 \
        --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 --moe-gate-loss-wt 0.01 \
        --optimizer adam --adam-betas '(0.9,0.98)' --adam-eps 1e-6 --lr 2e-3 \
        --lr-scheduler inverse_sqrt --warmup-updates 400 --warmup-init-lr 1e-7 \
        --max-tokens 2048 --max-update "$updates" --seed 42 --num-workers 0 \
        --validate-interval-updates 250 --save-interval-updates 250 --keep-interval-updates 3 \
        --no-epoch-checkpoints --log-format json --log-interval 25 --log-file "$out/$1/train.log"
}

# translate TEST MODEL DIRECTION
translate() {
    local result=$out/$1/$2/translations/$3
    local checkpoint=$out/$2/checkpoints/checkpoint_last.pt
    if [[ $result.out -nt $checkpoint ]]; then return; fi
    mkdir -p "$(dirname "$result")"
    fairseq-generate "$out/data" --user-dir "$user_dir" --cpu --gen-subset "$1" \
        --path "$checkpoint" \
        --task smoe_translation --source-lang "${3%-*}" --target-lang "${3#*-}" \
        --beam "${BEAM:-5}" --max-len-a 1.5 --max-len-b 10 --post-process sentencepiece --max-tokens 4000 \
        --requested-capacity-file "$result.json" >"$result.part"
    mv "$result.part" "$result.out"
}

python -m fairseq_smoe prepare --from "$text" --to "$out/data" --pairs "${pairs:1}" \
    --splits train=train valid=idev test=itest test1=test --vocab-size 8000
pids=()
for model in "${models[@]}"; do
    mkdir -p "$out/$model"
    train "$model" >"$out/$model/train.out" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
for test in test test1; do
    for direction in "${directions[@]}"; do
        pids=()
        for model in "${models[@]}"; do
            translate "$test" "$model" "$direction" &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid"; done
    done
    python -m fairseq_smoe compare "${models[@]/#/$out/$test/}" --to "$out/$test"
done
python "$here/validation_losses.py" "${models[@]/#/$out/}" | tee "$out/validation.tsv"
