#!/usr/bin/env bash
# The figures of benchmarks/2026-11-24-first-draft.md: acceptance first (no timing), then the interleaved timings on a quiet machine.
# Run: scripts/first_draft_benchmarks.sh MT_BENCH.jsonl OUT_DIRECTORY
set -euo pipefail
prompts=$1 out=$2
mkdir -p "$out"
shared=(--prompts "$prompts" --limit 20 --max-new-tokens 200 --seed 0)
OMP_NUM_THREADS=1 eyas bench "${shared[@]}" --methods eagle3@60x7x10 --out "$out/greedy-tau.json" &
OMP_NUM_THREADS=1 eyas bench "${shared[@]}" --temperature 1 --methods eagle3@60x7x10 --out "$out/sampled-tau.json" &
OMP_NUM_THREADS=1 eyas bench "${shared[@]}" --temperature 1 --methods eagle3@60x7x10+accept-reject --out "$out/accept-reject-tau.json" &
wait
eyas bench "${shared[@]}" --methods plain,eagle3,lookup --out "$out/speed.json"
python "$(dirname "$0")/../benchmarks/against_transformers.py" --prompts "$prompts" --limit 10 | tee "$out/against-transformers.json"
