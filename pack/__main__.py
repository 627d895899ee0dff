"""Pack a recipe into the smallest file that runs, or write the readable one: `python -m pack --help`."""

import json
from argparse import Namespace
from pathlib import Path

from common import CommandParser, check_output, run_command
from formats.preflight import check_folder, check_recipe, check_recipe_path
from formats.recipe import read_recipe
from pack.cache import cached_pack
from pack.program import ENTRY, METHODS, PackingError, pack
from pack.readable import write_readable


def print_readable(options: Namespace) -> None:
    """Write the readable file and say how long it is."""
    if options.recipe is None:
        raise PackingError("--readable: expected --recipe R, found none. The file is that of one recipe.")
    report = write_readable(options.recipe, options.out, options.entry)
    if options.json:
        print(json.dumps(report._asdict()))
    else:
        print(f"readable:{report.out} lines:{report.lines} bytes:{report.bytes}")


def main(argv: list[str] | None = None) -> None:
    """Pack from the command line."""
    parser = CommandParser(
        prog="python -m pack",
        description="Pack train_gpt.py and the modules it imports into one small file that runs like it: "
        "`python F` or `torchrun F`. Its size on disk is the code size of a record.",
    )
    add = parser.add_argument
    add("--recipe", type=Path, help="recipe.toml to embed (default: none; it is read at run time)")
    add("--out", type=Path, default=Path("runs/packed/train_gpt.py"), help="file to write (%(default)s)")
    add("--entry", type=Path, default=ENTRY, help="program to pack; imports start from its folder")
    add(
        "--wrap",
        choices=METHODS,
        default="",
        help="compression: brotli (the program then needs that package), lzma (standard library, about 5 %% "
        "larger), mix (standard library, 16 to 19 %% smaller; 4 seconds more to pack and 3 to start) or none "
        "(readable); default: the recipe's quant.code_wrap, else brotli",
    )
    add(
        "--readable",
        action="store_true",
        help="write the one file that the recipe runs for people: names, docstrings and comments kept, what "
        "the recipe switches off left out, not compressed",
    )
    add("--cache", type=Path, metavar="DIR", help="folder that keeps results: equal sources are packed once")
    add("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(argv)
    if not options.entry.is_file():
        raise PackingError(f"{options.entry}: no such program. --entry names the file to pack.")
    if options.out.is_dir():
        raise PackingError(
            f"--out {options.out}: expected a file to write, found a folder. Name a file in it."
        )
    check_output(options.out, [*options.entry.parent.glob("*.py"), *filter(None, [options.recipe])])
    check_folder("--out", options.out.parent)
    if options.cache:
        check_folder("--cache", options.cache)
    if options.recipe:
        check_recipe_path(str(options.recipe))
        check_recipe(str(options.recipe), read_recipe(options.recipe))
    if options.readable:
        print_readable(options)
        return
    job = options.recipe, options.out, options.entry, options.wrap
    report = cached_pack(*job, options.cache) if options.cache else pack(*job)
    if options.json:
        print(json.dumps(report._asdict()))
        return
    print(
        f"packed:{report.out} source_bytes:{report.source_bytes} "
        f"folded_bytes:{report.folded_bytes} minified_bytes:{report.minified_bytes} "
        f"packed_bytes:{report.packed_bytes} steps_left_out:{'; '.join(report.steps_left_out) or 'none'}"
    )


if __name__ == "__main__":
    run_command(main)
