#!/usr/bin/env bash
# From nothing to the draft that ships with eyas: SmolLM2-135M-Instruct writes, a draft learns, is measured and is put into the package.
#
#   recipes/smollm2-135m.sh WORK [SEED_PROMPTS.jsonl] [--device cuda]
#
# Every stage ends within MINUTES (default 10) and goes on where it was when the script is run again, so a machine that is lent for ten
# minutes at a time can do it; what a stage leaves lies under WORK (text and features in WORK/cache, files under 16 MB each). A stage is done
# when its budget is: TOKENS answer tokens written, SLOTS answer tokens trained; WORK/times.txt has what each took. The draft that ships was
# made by these commands in two runs, the second `--from` the first with new text (eyas/bundled/training.json); on two cores without
# bfloat16 the text took about an hour a million and a half tokens, the training 67 and 62 minutes.
#
# recipes/text holds text that the model wrote in this way, as tokens: `eyas train --text recipes/text/*.safetensors --out DRAFT` trains on it
# without writing (the model reads it once), and scripts/gpu_carry.py takes it to a GPU that is at hand for minutes.
set -euo pipefail
work=${1:?a directory to work in} seeds=${2:-} device=cpu
[[ ${*: -2:1} == --device ]] && device=${*: -1} && [[ $seeds == --device ]] && seeds=
TOKENS=${TOKENS:-3000000} SLOTS=${SLOTS:-8000000} MINUTES=${MINUTES:-10}
mkdir -p "$work"
export EYAS_CACHE=${EYAS_CACHE:-$work/cache}
seconds=$((60 * MINUTES))
words=(train --out "$work/draft" --draft-vocab "${VOCAB:-16384}" --self-play "$TOKENS" --tokens "$SLOTS" --device "$device")
[[ -n $seeds ]] && words+=(--seed-prompts "$seeds")
[[ -n ${APART:-} ]] && words+=(--apart $APART) # evaluation prompts, in files

while [[ ! -f $work/trained ]]; do
    [[ -f $work/draft/checkpoint ]] && resume=(--resume) || resume=()
    started=$(date +%s)
    status=0
    timeout "$seconds" eyas "${words[@]}" "${resume[@]}" || status=$?
    echo "$(date +%FT%T) $(($(date +%s) - started)) s, status $status" >> "$work/times.txt"
    case $status in
        0) touch "$work/trained" ;;
        124 | 130) [[ -n ${ONE_STAGE:-} ]] && exit 0 ;; # time is up: the next stage, or the next loan
        *) exit "$status" ;;
    esac
done
python "$(dirname "$0")/../scripts/bundle_draft.py" "$work/draft"
