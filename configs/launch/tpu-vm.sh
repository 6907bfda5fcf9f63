#!/usr/bin/env bash
# Transcoders of FLUX.1[schnell] on a v5p-32 (16 chips, 4 hosts), started on all of its workers by one command from here:
#
#   TPU=my-tpu ZONE=us-east5-a BUCKET=gs://my-bucket/flux bash configs/launch/tpu-vm.sh
#
# BUCKET holds flux-schnell, captions.jsonl and configs/train-flux-schnell.yaml, and gets the run; the workers have
# nothing else in common. Each has difffract_jax[tpu,gcs] in ~/.venv, and is to act for an account that may write there.
# Every worker runs the same line; JAX finds the others by the TPU's metadata. Given again, it goes on.
set -euo pipefail

gcloud compute tpus tpu-vm ssh "${TPU:?name of the TPU}" --zone "${ZONE:?zone of the TPU}" --worker=all --command="
  source ~/.venv/bin/activate
  exec difffract train '${BUCKET:?as in gs://my-bucket/flux}/train-flux-schnell.yaml' --join auto --max-restarts 5 \
    --set mesh=data=1,site=2,feature=8 --set model='$BUCKET/flux-schnell' \
    --set prompts='$BUCKET/captions.jsonl' --set out='$BUCKET/run'"
