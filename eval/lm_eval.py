"""Run tasks of EleutherAI's lm-evaluation-harness on a trained model.

    python -m eval.lm_eval runs/ID --tasks lambada_openai,hellaswag --limit 200
    python -m eval.lm_eval runs/ID --tasks my_task --include-path DIR      no network where its data are here

RUN is a run folder, a record folder with its artifact, an artifact, a checkpoint, a saved folder or a hub id.
The weights stand still: test-time training and hints of the recipe's scorer are no part of this.
"""

import contextlib
import difflib
import json
import math
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import CommandParser, UserError, at_least_one, existing, format_table, run_command
from data.download import first_line
from eval.hub import load
from eval.likelihood import BATCH_TOKENS, Scorer
from scoring.generate import Sampling

SEED = 1234  # of few-shot examples, as lm-evaluation-harness has it
MAX_NEW_TOKENS = 256  # where a task names no number, as there
GENERATE_ROWS = 32  # prompts that are continued at once
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = {*LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p", "seed"}
COLUMNS = {"task": "<28", "shots": ">6", "  metric": "<28", "value": ">12.4f", "+-": ">10"}


def library():
    """Import lm-evaluation-harness, which nothing else needs."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            f"expected the package lm-eval, found none that can be imported ({error}). It is in the extra "
            "`lm-eval`: make desk, or pip install '.[lm-eval]'"
        ) from error
    return lm_eval


def move_spaces(context: str, text: str) -> tuple[str, str]:
    """Give the spaces at a context's end to the text, as lm-evaluation-harness does for every model."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + text


def read_settings(settings: dict[str, Any]) -> tuple[Sampling, list[str]]:
    """Read a task's generation_kwargs; returns how to draw and the texts that end a continuation."""
    unknown = set(settings) - KNOWN
    if unknown:
        raise UserError(f"generation_kwargs: expected some of {sorted(KNOWN)}, found {sorted(unknown)}.")
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    most = next((int(settings[name]) for name in LENGTHS if settings.get(name) is not None), MAX_NEW_TOKENS)
    top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
    sampling = Sampling(most, temperature, top_k, top_p, int(settings.get("seed") or 0))
    return sampling, [text for text in until if text]


def build_adapter(scorer: Scorer):
    """Return the model as lm-evaluation-harness asks for one; its base class is imported here."""

    base: Any = library().api.model.LM

    class Adapter(base):
        """Answers the three kinds of requests; each is a list and is answered in its order."""

        tokenizer_name = scorer.codec.digest

        def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found = scorer.score_pairs([move_spaces(*request.args) for request in requests])
            return self.remember("loglikelihood", requests, [tuple(one) for one in found])

        def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
            found = scorer.score_pairs([("", request.args[0]) for request in requests])
            return self.remember("loglikelihood_rolling", requests, [one.log_prob for one in found])

        def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            found = [""] * len(requests)
            for members in groups.values():
                how = read_settings(requests[members[0]].args[1])
                for start in range(0, len(members), GENERATE_ROWS):
                    some = members[start : start + GENERATE_ROWS]
                    texts = scorer.continue_prompts([requests[i].args[0] for i in some], *how)
                    for i, text in zip(some, texts):
                        found[i] = text
            return self.remember("generate_until", requests, found)

        def remember(self, kind: str, requests: Sequence, found: list) -> list:
            for request, answer in zip(requests, found):
                self.cache_hook.add_partial(kind, request.args, answer)
            return found

    return Adapter()


def open_manager(names: list[str], folder: Path | None):
    """Index the tasks of a folder, and those of the harness, which takes seconds, only if asked for."""
    manager = library().tasks.TaskManager
    if folder:
        own = manager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return manager(include_path=str(folder) if folder else None)


def load_tasks(names: list[str], folder: Path | None, shots: int | None) -> dict:
    """Load tasks by name; raises a UserError for an unknown one and for one whose data cannot be had."""
    manager = open_manager(names, folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UserError(
                f"--tasks {name:.80}: no such task. {hint}`lm-eval ls tasks` lists those that come with "
                "lm-evaluation-harness; --include-path names a folder with your own."
            )
    try:
        loaded = manager.load(names)
    except Exception as error:  # of the libraries that fetch data sets, each in its own words
        raise UserError(
            f"--tasks {','.join(names)}: cannot be loaded ({type(error).__name__}: {first_line(error)}). "
            "Most tasks fetch their data from a hub: check the network, or name a task whose data are here."
        ) from error
    for task in loaded["tasks"].values():
        stated = task.get_config("num_fewshot")
        if stated is None or (shots is not None and stated != 0):  # a task that says 0 takes no others
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def run_tasks(scorer: Scorer, tasks: dict, limit: int | None) -> dict:
    """Evaluate loaded tasks; returns results, versions and shots by task. Equal calls draw equal examples."""
    random.seed(0)
    np.random.seed(SEED)  # noqa: NPY002 - what lm-evaluation-harness draws from
    with contextlib.redirect_stdout(sys.stderr):  # it prints as it goes; --json leaves one object here
        found = library().evaluator.evaluate(
            build_adapter(scorer), tasks, limit=limit, log_samples=False, verbosity=None
        )
    kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    return {name: found[name] for name in kept if name in found}


def result_rows(found: dict) -> list[tuple]:
    """Return a row for every metric of every task and group."""
    rows = []
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shown = f"{error:.4f}" if isinstance(error, float) else "-"
            label = metric if filtered == "none" else f"{metric} ({filtered})"
            rows.append((task, found.get("n-shot", {}).get(task, "-"), f"  {label}", value, shown))
    return rows


def describe(args: Namespace, scorer: Scorer, found: dict) -> dict:
    """Return what `--json` prints."""
    facts: dict[str, Any] = {"source": str(args.source), "tokenizer_sha256": scorer.codec.digest}
    facts |= {"context_len": scorer.context_len, "limit": args.limit, "lm_eval": library().__version__}
    return plain(facts | found)


def plain(value):
    """Turn results into what JSON has: what is not finite, as the perplexity of a long word, is null."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(prog="python -m eval.lm_eval", description=__doc__)
    add = parser.add_argument
    add("source", metavar="RUN", help="what to load the model from")
    add("--tasks", required=True, metavar="NAME,...", help="tasks, groups or tags")
    add("--include-path", type=existing, metavar="DIR", help="folder with the YAML of your own")
    add("--limit", type=at_least_one, metavar="N", help="examples of each task; default: all")
    add("--num-fewshot", type=int, metavar="N", help="examples before each; default: the task's")
    add("--tokenizer", default="", help="tokenizer file or folder; default: that of the run")
    add("--dtype", default="", help="of activations; default: the recipe's")
    add("--batch-tokens", type=at_least_one, default=BATCH_TOKENS, metavar="N",
        help="tokens that are computed at once (%(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    names = [name for name in args.tasks.split(",") if name]
    if not names or (args.num_fewshot or 0) < 0:
        raise UserError("--tasks, --num-fewshot: expected names with commas between, and a number from 0 on.")
    tasks = load_tasks(names, args.include_path, args.num_fewshot)
    scorer = Scorer.of(load(args.source, args.dtype, args.tokenizer), args.batch_tokens)
    found = run_tasks(scorer, tasks, args.limit)
    if args.json:
        print(json.dumps(describe(args, scorer, found)))
    else:
        print(format_table(COLUMNS, result_rows(found)))


if __name__ == "__main__":
    run_command(main)
