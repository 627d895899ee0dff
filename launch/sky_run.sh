#!/bin/bash
# Train on the machines that SkyPilot rented; ARGS holds the recipe and single fields.
set -eu
cd "$(dirname "$0")/.."
export NODES=${SKYPILOT_NUM_NODES:-1} NODE=${SKYPILOT_NODE_RANK:-0} GPUS=${SKYPILOT_NUM_GPUS_PER_NODE:-auto}
[ "$NODES" = 1 ] || HEAD=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
export HEAD=${HEAD:-localhost}
export JOB=${JOB:-$SKYPILOT_TASK_ID} # stays the same when a managed job is recovered
read -r -a words <<<"${ARGS:-}"
exec bash launch/train.sh ${words[@]+"${words[@]}"}
