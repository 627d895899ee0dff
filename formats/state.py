"""A nested state of dicts, lists, arrays and plain values in a safetensors file; reading it runs no code.

The file is sealed: its header holds the SHA-256 of all its bytes, those of the seal itself counted as zeros.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import UserError, atomic_file

SEAL, NO_SEAL = "sha256", "0" * 64
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit
DAMAGES = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of reading a damaged header


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
    blob = safetensors_library().numpy.save(arrays, metadata={**facts, "layout": layout, SEAL: NO_SEAL})
    header = blob[: header_bytes(blob)]
    sealed = header.replace(NO_SEAL.encode(), hashlib.sha256(blob).hexdigest().encode())
    with atomic_file(path) as file:
        file.write(sealed)
        file.write(memoryview(blob)[len(header) :])


def header_bytes(blob: bytes) -> int:
    """Return where a safetensors file's arrays start."""
    return 8 + int.from_bytes(blob[:8], "little")


def split_facts(header: bytes) -> tuple[dict, str]:
    """Return what a file's header says beside its arrays, and its seal; what raises is in DAMAGES."""
    facts = json.loads(header[8:])["__metadata__"]
    return facts, facts.pop(SEAL)


def is_sealed(blob: bytes, seal: str) -> bool:
    """Tell whether a file's bytes are those that were sealed."""
    header = blob[: header_bytes(blob)]
    found = hashlib.sha256(header.replace(seal.encode(), NO_SEAL.encode()))
    found.update(memoryview(blob)[len(header) :])
    return found.hexdigest() == seal


def read_facts(path: Path) -> dict[str, str]:
    """Read the facts alone, unverified; none where the file is damaged."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            facts, _ = split_facts(header + file.read(min(header_bytes(header), LONGEST_HEADER) - 8))
            return {key: value for key, value in facts.items() if key != "layout"}
    except (OSError, *DAMAGES):
        return {}


def read_state(path: Path) -> tuple[dict, dict[str, str]]:
    """Read a state and its facts, once the seal is verified; a damaged or foreign file is an error."""
    library = safetensors_library()
    try:
        blob = Path(path).read_bytes()
        facts, seal = split_facts(blob[: header_bytes(blob)])
        if not is_sealed(blob, seal):
            raise ValueError("its bytes are not those that were written (sha256)")
        arrays = library.numpy.load(blob)
        layout = json.loads(facts.pop("layout"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint. run.save_every=N writes one every N steps.") from error
    except (*DAMAGES, library.SafetensorError) as error:
        why = str(error) if isinstance(error, ValueError) else "no sealed header"
        raise UserError(
            f"{path}: expected a checkpoint, found a damaged or foreign file: {why}. Resume from another one."
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
