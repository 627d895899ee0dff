"""Train a recipe and validate its weights, averaged, in float: no packing, no quantizer, no artifact.

    python -m dev.desk.weights --recipe R run.run_id=ID section.key=value ...

Two ways of training are compared by this in less than half the time of whole runs. What it leaves is a run
folder with weights.json in place of result.json, so that nobody takes its score for one of bytes.
"""

import os
import time
from contextlib import ExitStack
from pathlib import Path

from common import CommandParser, UserError, run_command
from data.intact import ShardVerifier
from dev.desk.runs import WEIGHTS_NAME
from durable.seals import write_sealed
from durable.stops import Stops
from formats.preflight import check_text
from scoring.bpb import BpbMeter
from train_gpt import (
    Config,
    Environment,
    Log,
    Ranks,
    Start,
    Training,
    check_start,
    hold_folder,
    load_config,
    load_validation,
    log_setup,
    origin,
    place_values,
    read_environment,
    train,
    validate,
    warm_up,
    write_recipe,
)


def train_weights(cfg: Config, environment: Environment, held: ExitStack) -> None:
    """Train, validate, and write weights.json; the run folder is held until the end."""
    started = time.perf_counter()
    check_start(cfg, environment, Start())
    text = load_validation(cfg.data)
    check_text(cfg, text)
    ranks = Ranks(environment, cfg.run.device)
    training = Training(cfg, ranks, text.bos_id)
    folder = Path(cfg.run.out_dir, cfg.run.run_id)
    log = Log(folder, ranks.is_main, cfg.watch.tensorboard)
    if ranks.is_main:
        hold_folder(folder, Start(), held)
        (folder / WEIGHTS_NAME).unlink(missing_ok=True)
        write_recipe(folder, cfg)
    share = environment.local_rank, environment.local_world_size
    verifier = training.verifier = ShardVerifier(training.loader.files, share)
    ranks.stops.fault = lambda: verifier.fault
    ranks.stops.kept = f"{folder} keeps the log; nothing to go on from"
    log_setup(cfg, training, text, log)
    warm_up(training, log)
    ready = time.perf_counter()
    scores: list[BpbMeter] = []

    def measure() -> BpbMeter:
        scores.append(validate(training.model, cfg, text, ranks))
        return scores[-1]

    facts = train(training, log, measure)
    ranks.close()
    if ranks.is_main:
        names = "val_loss", "val_bpb", "num_tokens", "num_bytes"
        score = {name: getattr(scores[-1], name) for name in names} | {"mode": "float weights"}
        seconds = {"set-up and warm-up": ready - started}
        seconds["training and validation"] = time.perf_counter() - ready
        facts |= {"score": score, "seconds": seconds, "origin": origin(training), "seed": cfg.run.seed}
        facts |= {"places": place_values(cfg), "metrics_crc32": log.seal, "over_limits": []}
        write_sealed(folder / WEIGHTS_NAME, facts | {"config_hash": facts["origin"]["config_hash"]})
        log.line(f"run_folder:{folder}")


def main(argv: list[str] | None = None) -> None:
    """Train without an artifact."""
    parser = CommandParser(prog="python -m dev.desk.weights", description=__doc__)
    parser.add_argument("--recipe", required=True, help="recipe.toml or a folder with one")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single fields")
    args = parser.parse_args(argv)
    environment = read_environment()._replace(stops=Stops())
    environment.stops.install(environment.launched)
    cfg = load_config(args.recipe, environment.overrides, args.overrides)
    if not cfg.run.run_id or not cfg.data.micro_batches or cfg.run.val_loss_every < 0:
        raise UserError(
            "expected run.run_id, a number of data.micro_batches and run.val_loss_every from 0 on, found "
            f"{cfg.run.run_id!r}, {cfg.data.micro_batches or 'auto'} and {cfg.run.val_loss_every}. Set them."
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ExitStack() as held:
        train_weights(cfg, environment, held)


if __name__ == "__main__":
    run_command(main)
