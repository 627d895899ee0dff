"""Recipes and tokenizers that come with the package: by name, where no checkout is at hand."""

import difflib
from pathlib import Path

from common import UserError
from parameter_golf import TREE

FOLDERS = ("records", "tokenizers")
RECIPE = "recipe.toml"


def recipe_files() -> dict[str, Path]:
    """Return the recipe of each record by the name of its folder."""
    return {path.parent.name: path for path in sorted(TREE.glob(f"records/*/*/{RECIPE}"))}


def resolve_words(words: list[str]) -> list[str]:
    """Replace, in a command line, what names a shipped recipe or tokenizer by its place.

    The value of --recipe or --against may be a record's name; any word, or what follows its "=", a path that
    begins with records/ or tokenizers/. What is there below the current folder stays.
    """
    resolved = []
    for before, word in zip(["", *words], words):
        name, equals, value = word.rpartition("=")
        option = name or before
        if option == "--against" and value in recipe_files() and not Path(value).exists():
            value = str(recipe_files()[value])
        place = resolve_recipe(value) if option == "--recipe" else resolve_path(value)
        resolved.append(name + equals + place)
    return resolved


def resolve_path(text: str) -> str:
    """Return the place of a shipped file or folder, or the text itself."""
    is_shipped = text.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and ".." not in Path(text).parts
    return str(TREE / text) if is_shipped and not Path(text).exists() and (TREE / text).exists() else text


def resolve_recipe(text: str) -> str:
    """Return the place of a recipe that is named; raises for a bare name that no recipe has."""
    path, recipes = Path(resolve_path(text)), recipe_files()
    if path.is_dir() and (path / RECIPE).is_file():
        return str(path / RECIPE)
    if path.exists() or path.name != text or path.suffix:
        return str(path) if text else text
    if text in recipes:
        return str(recipes[text])
    near = difflib.get_close_matches(text, recipes, n=1)
    hint = f"Did you mean {near[0]}?" if near else "`golf recipes` lists them."
    raise UserError(f"--recipe {text:.80}: expected a file, or the name of a recipe. {hint}")
