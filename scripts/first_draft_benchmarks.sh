#!/usr/bin/env bash
# The figures of benchmarks/2026-11-24-first-draft.md: acceptance first (no timing), then the interleaved timings on a quiet machine.
# Run: scripts/first_draft_benchmarks.sh MT_BENCH.jsonl OUT_DIRECTORY
set -euo pipefail
prompts=$1 out=$2
mkdir -p "$out"
OMP_NUM_THREADS=1 eyas bench --prompts "$prompts" --limit 20 --max-new-tokens 200 --seed 0 --methods eagle3@60x7x10 --out "$out/greedy-tau.json" &
OMP_NUM_THREADS=1 eyas bench --prompts "$prompts" --limit 20 --max-new-tokens 200 --seed 0 --temperature 1 \
    --methods eagle3@60x7x10,eagle3@60x7x10+accept-reject --out "$out/sampled-tau.json" &
wait
eyas bench --prompts "$prompts" --limit 20 --max-new-tokens 200 --seed 0 \
    --methods plain,eagle3,lookup --out "$out/speed.json"
python "$(dirname "$0")/../benchmarks/against_transformers.py" --prompts "$prompts" --limit 10 | tee "$out/against-transformers.json"
