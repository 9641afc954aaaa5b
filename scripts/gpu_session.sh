#!/usr/bin/env bash
# All that needs a GPU, in at most nine minutes: tests, a round over a plain step, attention over very many keys, how fast text is written and
# a draft trained; a draft. A stage has
# seconds of its own and ends with them; what it printed by then is kept, and the next begins. A result that is there is not made again.
# Run: scripts/gpu_session.sh [--tiny] OUT_DIRECTORY [STAGE ..]
#      (tests, round, rates and tree by default; --tiny rehearses stages on a CPU). Needs no network, no package but those of eyas[test], and no
#      installation.
# The stages `write` and `train` run only where they are named, in the last of the calls that `scripts/gpu_carry.py pack` prints (three, for
# the embedded target), or after it. `write` lets the target write for WRITE_SECONDS (90), WRITE_MORE has further words for
# scripts/gpu_write.py. `train` takes TRAIN_SECONDS (360) of training and at most 165 around them; TRAIN_BATCH (4096 tokens), TRAIN_RATE
# (4e-3) and TRAIN_WARM_UP (100 steps) may be set, and in TRAIN_MORE further words for scripts/gpu_train.py, "--set seed=1" say.
set -uo pipefail
tiny=() device=cuda
[ "${1:-}" = --tiny ] && { tiny=(--quick) device=cpu TRAIN_SECONDS=${TRAIN_SECONDS:-10} WRITE_SECONDS=${WRITE_SECONDS:-10}; shift; }
out=$(mkdir -p "${1:?an output directory}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
until=$((SECONDS + 540)) wanted=" $* " failed=0

stage() { # name seconds result command ..
    local name=$1 most=$2 result=$out/$3 began=$SECONDS left=$((until - SECONDS)) code
    shift 3
    [ "$wanted" = "  " ] || [[ $wanted == *" $name "* ]] || return 0
    [ -s "$result" ] && { echo "$name: there already" | tee -a "$out/session.txt"; return 0; }
    [ "$left" -gt 10 ] || { echo "$name: no time left" | tee -a "$out/session.txt"; failed=1; return 0; }
    timeout -k 5 $((most < left ? most : left)) "$@" >"$out/$name.log" 2>&1
    code=$?
    [ "$code" = 0 ] || { failed=1; rm -f "$result"; }
    echo "$name: exit $code after $((SECONDS - began)) s" | tee -a "$out/session.txt"
    tail -n 12 "$out/$name.log"
}

{
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no GPU"
    python3 -c 'import torch, transformers; print("torch", torch.__version__, "cuda", torch.version.cuda, "transformers", transformers.__version__)'
} | tee -a "$out/session.txt"

stage tests 150 tests.xml python3 -m pytest -q -p no:cacheprovider -m gpu --junit-xml "$out/tests.xml" tests/test_gpu.py tests/test_fused.py tests/parallel/test_gpu_shards.py
stage round 200 round.json python3 benchmarks/gpu_round.py "${tiny[@]}" --device "$device" --out "$out/round.json"
stage rates 100 rates.json python3 benchmarks/gpu_training.py "${tiny[@]}" --device "$device" --out "$out/rates.json"
stage tree 100 tree.json python3 benchmarks/gpu_tree_attention.py "${tiny[@]}" --device "$device" --out "$out/tree.json"
[[ $wanted != *" write "* ]] || stage write $((${WRITE_SECONDS:=90} + 60)) write.json python3 scripts/gpu_write.py "${tiny[@]}" \
    --device "$device" --out "$out" --seconds "$WRITE_SECONDS" ${WRITE_MORE:-}
[[ $wanted != *" train "* ]] || stage train $((${TRAIN_SECONDS:=360} + 165)) train.json python3 scripts/gpu_train.py \
    "${tiny[@]}" --device "$device" --out "$out" --seconds "$TRAIN_SECONDS" --batch "${TRAIN_BATCH:-4096}" \
    --learning-rate "${TRAIN_RATE:-4e-3}" --warm-up "${TRAIN_WARM_UP:-100}" ${TRAIN_MORE:-}
exit $failed
