#!/usr/bin/env bash
# Transcoders of FLUX.1[schnell] on one machine with 8 GPUs of 80 GB: one process drives them all.
#
#   bash configs/launch/one-machine.sh
#
# from a directory with this repository's configs, flux-schnell and captions.jsonl. Killed or not, given again it goes
# on; Ctrl-C and SIGTERM save.
set -euo pipefail

exec difffract train configs/train-flux-schnell.yaml --max-restarts 5 \
  --set mesh=data=1,site=2,feature=4 --set out=run-flux-schnell
