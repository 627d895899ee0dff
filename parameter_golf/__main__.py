"""`golf COMMAND ...`: every command of the project under one name, also where there is no checkout.

Each command is a module that runs in this process as `python -m MODULE` would. Its own processes find the
modules by PYTHONPATH.
"""

import os
import runpy
import sys
from importlib.util import find_spec
from typing import NamedTuple

from parameter_golf import TREE, __version__, enter_tree

WIDTH = 12  # of the names in the help


class Command(NamedTuple):
    """A row of the help."""

    name: str
    module: str
    about: str


COMMANDS = {
    "From text to a score": (
        Command("run", "parameter_golf.whole", "the whole path on text that is here: data, train, eval"),
        Command("data", "data.builtin", "collect the built-in corpus, train a tokenizer, write shards"),
        Command("prepare", "data.prepare", "write shards from your own text"),
        Command("download", "data.download", "fetch the contest's shards"),
        Command("tokenizer", "data.tokenizer", "train, verify and compare tokenizers"),
        Command("check-data", "data.doctor", "look for damage in a dataset"),
        Command("recipes", "parameter_golf.recipes", "list the recipes and tokenizers that come with this"),
        Command("train", "train_gpt", "train, quantize, pack and score as one recipe says"),
        Command("eval", "eval", "reload an artifact in a fresh process and score it"),
        Command("sample", "eval.sample", "continue a prompt"),
    ),
    "Experiments": (
        Command("trial", "dev.trial", "one change, a few seeds: better or not, by how much"),
        Command("sweep", "dev.sweep", "search settings, on one machine or many"),
        Command("report", "dev.report", "runs and records as one HTML file"),
        Command("stats", "eval.stats", "means, intervals and tests of finished runs"),
        Command("watch", "dev.watch", "runs as they go, in a terminal"),
        Command("track", "dev.track", "feed TensorBoard, trackio or W&B from a run folder"),
        Command("leaderboard", "dev.leaderboard", "the records of a folder records/ as one page"),
    ),
    "Bytes, rules, publishing": (
        Command("pack", "pack", "the smallest file that runs a recipe, or the readable one"),
        Command("size", "pack.size", "what each section of the shipped program weighs"),
        Command("audit", "audit", "check a record folder or attack a program"),
        Command("lm-eval", "eval.lm_eval", "downstream tasks by lm-evaluation-harness"),
        Command("hub", "eval.hub", "save a model as a folder, or publish it with a model card"),
        Command("doctor", "dev.machine", "what this machine has and what a run would use of it"),
    ),
}
MODULES = {command.name: command.module for group in COMMANDS.values() for command in group}
INTRODUCTION = """usage: golf COMMAND [ARGUMENTS]

Train the best small language model whose code plus compressed weights fit in a byte limit.

  golf run                                      train and score a small model; some 5 minutes on two cores
  golf train --recipe 2026-11-21_NaiveBaseline model.num_layers=4
  golf eval                                     the newest run's score again, from the artifact's bytes
  golf COMMAND --help                           what a command takes; golf train --help FIELD explains a field
  torchrun --standalone --nproc_per_node=8 -m parameter_golf train        on eight GPUs
"""
CLOSING = """
Runs go to runs/, data to data/datasets/, both below the folder that you are in. Where a message or
a page says `python -m MODULE` or `python train_gpt.py`, `golf MODULE` and `golf train` do the same.
"""


def describe_commands() -> str:
    """Return the text of `golf --help`."""
    lines = [INTRODUCTION.rstrip()]
    for title, commands in COMMANDS.items():
        lines += ["", title]
        lines += [f"  {command.name:<{WIDTH}}{command.about}" for command in commands]
    return "\n".join(lines) + "\n" + CLOSING


def find_module(name: str) -> str:
    """Return the module of a command's name, or of a module's own; raises a UserError for another word."""
    import difflib

    from common import UserError

    if name in MODULES:
        return MODULES[name]
    room = TREE / name.partition(".")[0]
    if name in MODULES.values() or ((room / "__init__.py").is_file() and find_spec(name)):
        return name
    near = difflib.get_close_matches(name, MODULES, n=1)
    hint = f"Did you mean {near[0]}?" if near else "`golf --help` lists the commands."
    raise UserError(f"golf: expected a command, found {name!r:.60}. {hint}")


def share_tree() -> None:
    """Let the processes that commands start find the modules as well."""
    paths = [str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def main(argv: list[str] | None = None) -> None:
    """Run the command that the command line names."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(describe_commands(), end="")
        return
    if name in ("-V", "--version"):
        print(f"golf {__version__}")
        return
    from parameter_golf.shipped import resolve_words

    module = find_module(name)
    sys.argv = [f"golf {name}", *resolve_words(words)]
    share_tree()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start() -> None:
    """Run as the process."""
    enter_tree()
    from common import run_command

    run_command(main)


if __name__ == "__main__":
    start()
