#!/bin/bash
# Start the trainer on this machine, alone or as one of several that run this line.
#
#   bash launch/train.sh --recipe records/track_10min_16mb/2026-03-17_NaiveBaseline/recipe.toml run.seed=7
#   NODES=2 NODE=0 HEAD=10.0.0.5 bash launch/train.sh data.micro_batches=16     # and NODE=1 on the other
#
# Started again it goes on with an unfinished run of the same recipe, seed and data. With a JOB, which names the
# run, it says so where that run is finished. What is typed after the line wins over what stands here.
set -eu
cd "$(dirname "$0")/.."

NODES=${NODES:-1}                 # machines, all with this checkout and the data at the same paths
NODE=${NODE:-0}                   # this one's number; the first is where the ranks meet
HEAD=${HEAD:-localhost}           # a name or address of the first one that all of them reach
PORT=${PORT:-29500}               # a free one there
GPUS=${GPUS:-auto}                # processes on this machine; auto: one a GPU, without any one a CPU core
JOB=${JOB:-}                      # names the run, OUT_DIR/JOB; without it date and seed do
OUT_DIR=${OUT_DIR:-runs}          # a folder that outlives the machine, and that all of them share
SAVE_EVERY=${SAVE_EVERY:-200}     # steps between checkpoints: at most so many are lost
PYTHON=${PYTHON:-.venv/bin/python}

[ -x "$(command -v "$PYTHON")" ] ||
    { echo "launch: expected a Python at $PYTHON, found none. Run \`make setup\`, or set PYTHON=..." >&2; exit 1; }
[ "$NODES" = 1 ] || [ "$HEAD" != localhost ] ||
    { echo "launch: expected HEAD=... with NODES=$NODES: the first machine's name or address." >&2; exit 1; }

# The first machine has rank 0, which writes the run folder; a rendezvous by c10d would deal ranks otherwise.
exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --node-rank="$NODE" --nproc-per-node="$GPUS" \
    --master-addr="$HEAD" --master-port="$PORT" \
    train_gpt.py ${JOB:+"run.run_id=$JOB"} "run.out_dir=$OUT_DIR" \
    run.resume=auto "run.save_every=$SAVE_EVERY" "$@"
