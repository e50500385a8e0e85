#!/usr/bin/env bash
# Runs one job as several processes on one machine, each with its share of every batch:
#
#   launch/local.sh 2 python -m vpm_jax.train --config configs/synthetic.py --workdir runs/synthetic
#   launch/local.sh 2 python -m vpm_jax.evaluate --workdir runs/synthetic
#
# First the number of processes, then a command that accepts --coordinator, --processes and --process. Process I gets
# GPU I. (A single process uses all GPUs, which is simpler on one machine.) Ctrl-C and SIGTERM reach all processes, which
# finish the step and save. The exit code is that of the first process that failed.
set -uo pipefail

if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
count=$1
shift

port=${PORT:-}
while [[ -z $port ]]; do
  port=$((20000 + RANDOM % 20000))
  if (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; then port=""; fi # in use
done

gpus=()
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
fi
if ((${#gpus[@]} && ${#gpus[@]} < count)); then
  echo "error: $count processes need $count GPUs, found ${#gpus[@]}: start fewer, or hide the GPUs by JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=" >&2
  exit 1
fi

pids=()
# Background processes ignore Ctrl-C, so this script forwards it.
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((i = 0; i < count; i++)); do
  CUDA_VISIBLE_DEVICES=${gpus[i]:-${CUDA_VISIBLE_DEVICES:-}} \
    "$@" --coordinator "localhost:$port" --processes "$count" --process "$i" &
  pids+=($!)
done

failed=0
for pid in "${pids[@]}"; do
  wait "$pid"
  code=$?
  while ((code > 128)) && kill -0 "$pid" 2>/dev/null; do # a signal to this script ended the wait; the process is alive
    wait "$pid"
    code=$?
  done
  if ((!failed)); then failed=$code; fi
done
exit "$failed"
