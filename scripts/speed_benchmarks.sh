#!/usr/bin/env bash
# The speed figures: ours by every method and precision, what a round is made of, starting, and the planner against hindsight.
# About an hour on two cores; nothing else should run. A result that is there is not made again.
# Run: scripts/speed_benchmarks.sh DIRECTORY_OF_PROMPTS OUT_DIRECTORY
#      (mt_bench.jsonl, humaneval.jsonl and gsm8k.jsonl lie in the first)
# Other engines: eyas bench --peers --prompts mt_bench.jsonl --limit 20 --out OUT_DIRECTORY/peers.json
set -euo pipefail
prompts=$1 out=$2 here=$(cd "$(dirname "$0")/../benchmarks" && pwd)
mkdir -p "$out"

bench() { # name prompts further options
    [ -s "$out/$1.json" ] || eyas bench --prompts "$2" --limit 20 --max-new-tokens 200 --seed 0 --out "$out/$1.json" "${@:3}"
}
script() { # name script further options
    [ -s "$out/$1.json" ] || python "$here/$2.py" "${@:3}" --out "$out/$1.json"
}

for precision in bf16 int8 q4; do # passes are timed, and planners learn, before anything is measured
    for temperature in 0 1; do
        eyas generate "What do hawks eat?" --precision "$precision" --temperature "$temperature" --seed 1 --max-new-tokens 200 >/dev/null
    done
done
for precision in bf16 int8 q4; do
    script "round-$precision" round_profile --prompts "$prompts/mt_bench.jsonl" --precision "$precision"
    bench "greedy-$precision" "$prompts/mt_bench.jsonl" --precision "$precision" --methods plain,eagle3,eagle3+copy,lookup
done
bench sampled-bf16 "$prompts/mt_bench.jsonl" --temperature 1 --methods plain,eagle3,eagle3+copy
bench accept-reject "$prompts/mt_bench.jsonl" --temperature 1 --methods eagle3@60x7x10,eagle3@60x7x10+accept-reject
for precision in bf16 int8; do
    bench "summaries-$precision" "$here/summary_prompts.jsonl" --precision "$precision" --methods plain,eagle3,eagle3+copy
done
script startup startup
script regret-bf16 planner_regret "$prompts"
script regret-int8 planner_regret "$prompts" --precision int8
script sameness sameness "$prompts/mt_bench.jsonl" "$prompts/gsm8k.jsonl"
