#!/usr/bin/env bash
# A Cloud TPU pod slice with one process per host:
#
#   launch/tpu_pod.sh NAME ZONE setup                                            # copy and install the checkout
#   launch/tpu_pod.sh NAME ZONE train --config configs/market.py --workdir runs/market
#   launch/tpu_pod.sh NAME ZONE evaluate --workdir runs/market
#   launch/tpu_pod.sh NAME ZONE stop                                             # SIGTERM: save and exit
#
# NAME is a TPU VM created with `gcloud compute tpus tpu-vm create`. Every host needs the dataset (~/vpm_jax/data, or
# --config.data.root). The first host holds the workdir: copy it before the slice is deleted, or use a --workdir on a
# mounted disk. After a preemption the same command resumes. JAX gets its host number from the metadata server.
set -euo pipefail

if (($# < 3)); then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d' >&2
  exit 2
fi
name=$1 zone=$2 what=$3
shift 3

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

case $what in
  setup)
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name:vpm_jax.tar.gz" --zone="$zone" --worker=all
    on_all "mkdir -p vpm_jax && tar xzf vpm_jax.tar.gz -C vpm_jax && cd vpm_jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
    ;;
  train | evaluate)
    quoted=""
    if (($#)); then printf -v quoted ' %q' "$@"; fi # without arguments printf would write ''
    on_all "cd vpm_jax && exec .venv/bin/python -m vpm_jax.$what --distributed$quoted"
    ;;
  stop)
    on_all "pkill -TERM -f 'python -m vpm_jax[.]' || true"
    ;;
  *)
    echo "error: $what is not one of setup, train, evaluate, stop" >&2
    exit 2
    ;;
esac
