"""The whole path as `make run` walks it: collect text, train tokenizer and model, pack, reload, score."""

import subprocess
import sys

from common import CommandParser, UserError, run_command
from formats.recipe import read_recipe
from parameter_golf.shipped import recipe_files

DEFAULT = "2026-11-21_Sp2048_LoraScoring"
BUILTIN = "data/datasets/builtin_sp"  # and the number of the tokenizer's entries


def list_steps(recipe: str, overrides: list[str]) -> list[list[str]]:
    """Return the modules to run with their arguments; raises for a recipe whose data nobody makes here."""
    values = read_recipe(recipe)
    place, entries = str(values.get("data.data_path", "")), values.get("data.vocab_size")
    if place != f"{BUILTIN}{entries}":
        raise UserError(
            f"{recipe}: expected a recipe of the built-in corpus (data.data_path={BUILTIN}N), found "
            f"{place or 'none'}. Make its data by `golf download` or `golf prepare`, then `golf train` and "
            "`golf eval`."
        )
    return [
        ["data.builtin", "--vocab-size", str(entries), "--out", place],
        ["train_gpt", "--recipe", recipe, *overrides],
        ["eval", "--budget"],
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the steps until one fails; returns its status."""
    parser = CommandParser(prog="golf run", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single fields")
    parser.add_argument("--recipe", default=str(recipe_files()[DEFAULT]), help=f"default: {DEFAULT}")
    args = parser.parse_args(argv)
    for module, *words in list_steps(args.recipe, args.overrides):
        status = subprocess.run([sys.executable, "-m", module, *words], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    run_command(main)
