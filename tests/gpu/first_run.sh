#!/bin/bash
# The first eight minutes on a GPU, in the order of what is worth knowing most:
#
#     tests/gpu/first_run.sh [FOLDER]        (default: first_run)
#
# Each step has a time limit and goes on where it stopped when the command is repeated.  Results and
# logs are kept in FOLDER; summary.md there is for an issue.  Without a GPU it says so, to its end.
set -u
folder=${1:-first_run}
mkdir -p "$folder" || exit 2
summary=$folder/summary.md
scale=${CPBENCH_FIRST_RUN_SCALE:-1}  # of the time limits

note() { printf '%s\n' "$*" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: runs a command, its output in FOLDER/NAME.log
step() {
    local name=$1 limit=$(($2 * scale)) begun=$SECONDS code
    shift 2
    printf '== %s: %s\n' "$name" "$*"
    timeout --signal=INT --kill-after=20 "$limit" "$@" >"$folder/$name.log" 2>&1
    code=$?
    case $code in
        0) code=ok ;;
        124 | 130 | 137) code="stopped after $limit s" ;;
        *) code="exit code $code: $(tail -n 1 "$folder/$name.log")" ;;
    esac
    note "- **$name** ($((SECONDS - begun)) s): $code"
}

# bench NAME SECONDS OPTIONS...: times operators, then adds the fastest of each problem to the summary
bench() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" cpbench bench --device cuda --out "$folder/$name" --dtype bfloat16 \
        --head-dim 128 --max-seconds 1.5 --timeout 60 "$@"
    if compgen -G "$folder/$name/records/*.jsonl" >/dev/null; then
        cpbench report "$folder/$name" --pivot mask,operator --metric tflops --format md \
            >>"$summary" 2>/dev/null || true
    fi
}

: >"$summary"
note "# First run of cpbench on $(hostname), $(date -u '+%Y-%m-%d %H:%M') UTC"
note "$(cpbench --version)"
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    note "$(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader)"
else
    note "There is no NVIDIA GPU here: every case below is refused, and no figure is a GPU's."
fi
note ""
big=(--num-heads-q 32 --num-heads-kv 8)
step doctor 60 cpbench doctor
step triton 90 cpbench verify --device cuda --operator triton_band,triton_block_sparse \
    --mask causal,sliding_window_causal:window=40 --dtype bfloat16 --out "$folder/triton"
step quick 180 cpbench verify --quick --device cuda --out "$folder/quick"
step tune 90 cpbench tune --device cuda --head-dim 128 --seq-len 8k --kernel backward_dkv
bench dense 60 --operator triton_band,sdpa.flash,sdpa.cudnn,flash_attn.torch,flash_attn.3 \
    --mask causal,full --seq-len 16k "${big[@]}"
bench block_sparse 40 --operator triton_block_sparse,bands --seq-len 16k "${big[@]}" \
    --mask block_sparse_uniform:keep=0.2
bench documents 40 --operator triton_band,bands,flash_attn.torch,flash_attn.3 --seq-len 16k "${big[@]}" \
    --mask causal_document:corpus=pile
bench flex 40 --operator flex,triton_band --mask sliding_window_causal:window=1024 --seq-len 8k \
    "${big[@]}"
bench small 30 --operator triton_band,sdpa.flash --mask causal --seq-len 512 "${big[@]}"
bench one_rank 30 --operator bands --strategy ring --layout zigzag --mask causal --seq-len 8k \
    --world-size 1 "${big[@]}"
note ""
note "Logs and records: $folder. Please paste this file into an issue."
