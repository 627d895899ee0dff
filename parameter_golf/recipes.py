"""List the recipes and tokenizers that come with the package: `golf recipes`."""

from common import CommandParser, format_table, run_command
from parameter_golf import TREE
from parameter_golf.shipped import recipe_files


def main(argv: list[str] | None = None) -> None:
    """Print a table of recipes and a line of tokenizers."""
    parser = CommandParser(prog="golf recipes", description=__doc__)
    parser.parse_args(argv)
    rows = [(name, path.parent.parent.name) for name, path in recipe_files().items()]
    print(format_table({"recipe": "<54", "track": "<20"}, rows))
    tokenizers = sorted(path.name for path in TREE.glob("tokenizers/*") if path.is_dir())
    print(f"\ntokenizers, as data.tokenizer_path=tokenizers/NAME: {', '.join(tokenizers)}")


if __name__ == "__main__":
    run_command(main)
