# Sourced by the scripts of the benchmarks; explains the sourcing script by the comment at its head.
set -euo pipefail

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# prepare_benchmark NAME DIR [options]
prepare_benchmark() {
    case "${2:-}" in
        -h | --help) usage && exit ;;
        "" | -*) usage >&2 && exit 2 ;;
    esac
    exec python -m fairseq_smoe prepare --benchmark "$1" --to "${@:2}"
}
