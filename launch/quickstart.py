# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a tiny language model under a byte and a time limit
#
# From text to a score that you can check: collect text, train a tokenizer, train a model, quantize it,
# weigh it, score the weighed bytes; then change one thing. Needs two CPU cores, no GPU, and about six
# minutes. Works in Colab, Kaggle and Jupyter; `python launch/quickstart.py` runs the same without a
# notebook.

# %%
import json
import os
import subprocess
import sys
from pathlib import Path

# %% tags=["parameters"]
REPOSITORY = ""  # where to clone from, if this notebook is alone: the address where you found it
RECIPE = "records/track_cpu/2026-11-21_NaiveBaseline/recipe.toml"  # the contest's baseline, cut to two cores
DATA = "data/datasets/builtin_sp1024"  # made below from the docstrings of the installed packages
RUNS = "runs"  # the folder of run folders
SECONDS = 60  # of training, each of two runs
FIELDS = []  # more fields for both runs, such as "run.seed=7"; `python train_gpt.py --help` lists them
CHANGE = "model.xsa_last=3"  # the one thing that the second run does otherwise

# %% [markdown]
# ## The code
#
# In a clone nothing happens here but the installation of what is missing.

# %%
if not any((folder / "train_gpt.py").is_file() for folder in (Path.cwd(), *Path.cwd().parents)):
    if not REPOSITORY:
        raise SystemExit("This notebook is not in a clone: set REPOSITORY above, and run this again.")
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "golf"], check=True)
    os.chdir("golf")
ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "train_gpt.py").is_file())
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))


def python(*words):
    """Run a command of the project; the notebook stops where it fails."""
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], check=True)


python("-m", "pip", "install", "--quiet", "-r", "requirements.txt", "matplotlib")

# %% [markdown]
# ## Text, tokenizer, shards
#
# Your own text instead: `docs/own-text.md`.

# %%
if not (Path(DATA) / "manifest.json").is_file():
    python("-m", "data.builtin", "--vocab-size", 1024, "--out", DATA)

# %% [markdown]
# ## Train, quantize, weigh, score
#
# A run is one recipe and what changes of it. The score is bits per byte of text that the model has not
# seen, computed from the artifact's bytes. Lower is better.


# %%
def train(run_id, *fields):
    """Train the recipe with some fields changed; returns the folder with all that the run leaves."""
    data = (f"data.data_path={DATA}", f"data.tokenizer_path={DATA}/tokenizer.model")
    place = (f"run.out_dir={RUNS}", f"run.run_id={run_id}", "run.overwrite=1")
    clock = (f"run.max_wallclock_seconds={SECONDS}", "run.enforce_limits=0")
    python("train_gpt.py", "--recipe", RECIPE, *data, *place, *clock, *FIELDS, *fields)
    return Path(RUNS) / run_id


baseline = train("notebook_baseline")

# %%
result = json.loads((baseline / "result.json").read_text())
print(f"{result['score']['val_bpb']:.4f} bits a byte after {result['steps']} steps")
for part, num_bytes in result["ledger"]:
    print(f"{num_bytes:>10,} bytes  {part}")

# %% [markdown]
# ## Change one thing

# %%
changed = train("notebook_changed", CHANGE)


# %%
def plot(*folders):
    """Draw the training losses of runs; returns what they left."""
    import matplotlib.pyplot as plt

    from dev.desk.runs import read_runs

    runs = read_runs(folders)
    axes = plt.figure(figsize=(7, 4)).add_subplot()
    for run in runs:
        points = [(event["step"], event["train_loss"]) for event in run.events if event["kind"] == "train"]
        axes.plot(*zip(*points), label=run.name)
    axes.set(xlabel="step", ylabel="training loss, nats a token")
    axes.legend()
    plt.show()
    return runs


runs = plot(baseline, changed)

# %% [markdown]
# ## Is it better?
#
# One run a side says little: seeds differ by about 0.02 bits a byte here. `python -m dev.trial` trains
# pairs of seeds until the answer is clear; `python -m dev.report runs/notebook_baseline
# runs/notebook_changed --out report.html` shows where the two differ.

# %%
for run in runs:
    print(f"{run.name:<20} {run.val_bpb:.4f} bits a byte, {sum(run.ledger.values()):,} bytes")

# %% [markdown]
# ## Let it write

# %%
python("-m", "eval.sample", baseline, "--prompt", "Return the", "--max-tokens", 40)

# %% [markdown]
# ## Go on
#
# On a GPU take a recipe of `records/track_10min_16mb` and the contest's text (`python -m data.download`);
# on clusters and rented machines start from `launch/README.md`.
