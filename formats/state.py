"""A nested state of dicts, lists, arrays and plain values in a safetensors file; reading it runs no code."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import UserError, atomic_file


def map_leaves(tree, kind: type, convert: Callable):
    """Return the tree with every leaf of a type converted."""
    if isinstance(tree, kind):
        return convert(tree)
    if isinstance(tree, dict):
        return {key: map_leaves(value, kind, convert) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [map_leaves(value, kind, convert) for value in tree]
    return tree


def write_state(path: Path, state: dict, facts: dict[str, str]) -> None:
    """Write a state whose arrays are numpy's, whole or not at all, with facts that read_state gives back."""
    arrays: dict[str, np.ndarray] = {}

    def spell(tree):
        if isinstance(tree, np.ndarray):
            arrays[str(len(arrays))] = np.ascontiguousarray(tree)
            return {"array": str(len(arrays) - 1), "shape": tree.shape}
        if isinstance(tree, dict):
            return {"dict": [[key, spell(value)] for key, value in tree.items()]}  # keys may be integers
        return [spell(value) for value in tree] if isinstance(tree, list) else tree

    layout = json.dumps(spell(map_leaves(state, tuple, list)))
    blob = safetensors_library().numpy.save(arrays, metadata={**facts, "layout": layout})
    with atomic_file(path) as file:
        file.write(blob)


def read_state(path: Path) -> tuple[dict, dict[str, str]]:
    """Read a state and its facts; a truncated or foreign file is an error."""
    library = safetensors_library()
    try:
        blob = Path(path).read_bytes()
        arrays = library.numpy.load(blob)
        facts = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
        layout = json.loads(facts.pop("layout"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint. run.save_every=N writes one every N steps.") from error
    except (ValueError, KeyError, library.SafetensorError) as error:
        raise UserError(
            f"{path}: expected a checkpoint, found a damaged or foreign file: {error}."
        ) from error

    def build(tree):
        if isinstance(tree, list):
            return [build(value) for value in tree]
        if not isinstance(tree, dict):
            return tree
        if "array" in tree:
            return arrays[tree["array"]].reshape(tree["shape"])
        return {key: build(value) for key, value in tree["dict"]}

    return build(layout), facts


def safetensors_library():
    """Import the library, which only checkpoints need."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise UserError("checkpoints need a package: pip install safetensors") from error
    return safetensors
