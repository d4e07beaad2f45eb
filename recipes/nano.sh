#!/bin/sh
# nano from nothing to the files that ship, stage by stage: hours on a CPU, minutes on a GPU.
#   recipes/nano.sh                          the grown world
#   recipes/nano.sh data.world.world=nano    the first world; any key of the recipes may be overridden in all stages
# A stage that was stopped goes on where it was; one that is complete is skipped.
set -e
cd "$(dirname "$0")/.."
for stage in encoders language alignment pretraining continued finetuning; do
    [ -d "runs/nano/$stage/checkpoint" ] || openbagel train "recipes/nano_$stage.yaml" "$@"
done
echo runs/nano/finetuning/checkpoint
