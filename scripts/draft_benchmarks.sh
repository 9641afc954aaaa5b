#!/usr/bin/env bash
# What a draft is accepted on three sets of prompts: trees and chains, greedy and at temperature 1; then timings on a quiet machine.
# Two runs at a time of one thread each, for acceptance is a count; a result that is there is not made again.
# Run: scripts/draft_benchmarks.sh DIRECTORY_OF_PROMPTS OUT_DIRECTORY [DRAFT]
#      (mt_bench.jsonl, humaneval.jsonl and gsm8k.jsonl lie in the first; the bundled draft by default)
set -euo pipefail
export prompts=$1 out=$2 draft=${3:-bundled}
mkdir -p "$out"

measure() { # name set temperature methods
    [ -s "$out/$1.json" ] && return
    OMP_NUM_THREADS=1 eyas bench --draft "$draft" --prompts "$prompts/$2.jsonl" --limit 20 --max-new-tokens 200 --seed 0 \
        --temperature "$3" --methods "$4" --out "$out/$1.json" >"$out/$1.log" 2>&1
}
export -f measure

for set in mt_bench humaneval gsm8k; do
    echo "$set-greedy $set 0 eagle3@60x7x10,eagle3@chain:3,eagle3@chain:7"
done >"$out/runs"
for set in mt_bench humaneval gsm8k; do
    echo "$set-sampled $set 1 eagle3@60x7x10"
done >>"$out/runs"
echo "mt_bench-accept-reject mt_bench 1 eagle3@60x7x10+accept-reject" >>"$out/runs"
xargs -P 2 -L 1 bash -c 'measure "$@"' measure <"$out/runs"
rm "$out/runs"

[ -s "$out/speed.json" ] || eyas bench --draft "$draft" --prompts "$prompts/mt_bench.jsonl" --limit 20 --max-new-tokens 200 --seed 0 \
    --methods plain,eagle3,lookup --out "$out/speed.json"
