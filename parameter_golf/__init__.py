"""Parameter golf as a package: the command `golf`, and trained models for other programs.

    from parameter_golf import load

    model = load("runs/ID")                         a run or record folder, an artifact, a hub id OWNER/NAME
    print(model.generate("Once upon a time", max_tokens=40))
    print(model.bits_per_byte("A text that it has not seen."))

The project's own modules lie in a folder of this package and have short names (data, eval, common). They are
put on the path when they are first needed: by `golf` in a process of its own, by `load` in yours.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from parameter_golf.models import Model

__all__ = ["TREE", "Model", "__version__", "enter_tree", "load"]

HERE = Path(__file__).resolve().parent
# What train_gpt.py, data/, eval/ and the rest lie in: a folder of the wheel, or the checkout.
TREE = HERE / "tree" if (HERE / "tree").is_dir() else HERE.parent

try:
    __version__ = version("parameter-golf")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0"


def enter_tree() -> None:
    """Put the project's modules first on the path; raises ImportError where others have their names."""
    files, rooms = TREE.glob("*.py"), TREE.glob("*/__init__.py")
    names = {path.stem for path in files} | {path.parent.name for path in rooms} - {HERE.name}
    for name in sorted(names):
        found = getattr(sys.modules.get(name), "__file__", None)
        if found and not Path(found).resolve().is_relative_to(TREE):
            raise ImportError(
                f"parameter_golf has a module {name}, and this program has imported {found} by that name. "
                "Use parameter_golf in a process of its own: `golf --help`."
            )
    if str(TREE) not in sys.path:
        sys.path.insert(0, str(TREE))


def load(source: str | Path, tokenizer: str | Path = "", device: str = "auto") -> Model:
    """Load a trained model from a run folder, an artifact, a checkpoint, a saved folder or a hub id.

    tokenizer is a file or folder, where it is not at the place that the run states. Raises ValueError with
    what was expected, what was found and what to do next.
    """
    enter_tree()
    from eval.hub import load as load_model

    return Model(load_model(source, tokenizer=str(tokenizer), device=device))
