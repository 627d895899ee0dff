"""Files of every kind are mutated, their bytes or their meaning: each loads equal, or is refused in one line.

The rows are in dev/soak/readers.py. A kind without a seal may answer as well; it may not end in a traceback,
take long or fill memory.
"""

import copy
import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from common import UserError
from dev.soak.flips import replaced
from dev.soak.place import Bench, Place
from dev.soak.process import Miss
from dev.soak.readers import READERS, Reader, make_sound
from formats.recipe import config_fields
from train_gpt import Config

SECONDS = 10.0
GROWTH_MIB = 1000
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 1000, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 10**30]
FLOATS = [0.5, -0.5, 1e-9, 1e19, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", "x", "true", "1:2:3:4:5:6", "0:0:0:0:0:0", "none", "rans", "../../x", "\ud800", "9" * 5000]
LEAVES = [None, True, False, *NUMBERS, *FLOATS, *TEXTS, [], [0], [[]], [[0] * 6], {}, {"a": 1}]
SPELLED = [
    "9" * 5000,
    "-1",
    "1e999",
    "nan",
    '""',
    "[]",
    "{}",
    "true",
    "[" * 2000,
    '"\\ud800"',
    "\x00",
    "1e-320",
]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


# ---- Mutations --------------------------------------------------------------------------------------


def mutate_bytes(blob: bytes, dice: Random) -> bytes:
    """Flip, cut, splice, double, reverse and blank bytes."""
    for _ in range(dice.randint(1, 3)):
        first = dice.randint(0, len(blob))
        last = min(len(blob), first + dice.randint(0, dice.choice([1, 8, 300, len(blob)])))
        piece, kind = bytearray(blob[first:last]), dice.randrange(8)
        if kind == 0 and piece:
            piece[0] ^= 1 << dice.randrange(8)
        if kind == 1:
            last = len(blob)
        others = [b"", piece * 2, piece[::-1], dice.randbytes(len(piece)), bytes(len(piece)), b"\xff" * 8]
        blob = blob[:first] + (others[kind - 2] if kind > 1 else piece if kind == 0 else b"") + blob[last:]
    return blob


def places(tree, path=()) -> list[tuple]:
    """List the path of every value in a tree of objects and lists."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in ((*path, key), *places(tree[key], (*path, key)))]


def mutate_tree(tree, dice: Random) -> None:
    """Change, remove, double, rename and exchange values of a tree, in place."""
    for _ in range(dice.randint(1, 3)):
        found = places(tree)
        if not found:
            return
        path = dice.choice(found)
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        kind, key = dice.randrange(6), path[-1]
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(dice.randint(0, len(parent)), copy.deepcopy(parent[key]))
        elif kind == 1:
            parent[dice.choice(TEXTS[:5])] = parent.pop(key)
        elif kind == 2 and isinstance(parent[key], int):
            parent[key] += dice.choice([-1, 1, 16, 1 << 33])
        elif kind == 3 and isinstance(parent, list):
            parent.append(parent.pop(key))
        else:
            parent[key] = copy.deepcopy(dice.choice(LEAVES))


def mutate_json(blob: bytes, dice: Random) -> bytes:
    """Mutate what a JSON file says."""
    tree = json.loads(blob)
    mutate_tree(tree, dice)
    return json.dumps(tree).encode(errors="surrogatepass")


def mutate_lines(blob: bytes, dice: Random) -> bytes:
    """Drop, double, exchange, cut and blank lines of a text, and write other numbers."""
    lines = blob.decode().split("\n")
    for _ in range(dice.randint(1, 3)):
        kind, one, other = dice.randrange(6), dice.randrange(len(lines)), dice.randrange(len(lines))
        if kind == 0 and len(lines) > 1:
            del lines[one]
        elif kind == 1:
            lines.insert(other, lines[one])
        elif kind == 2:
            lines[one], lines[other] = lines[other], lines[one]
        elif kind == 3:
            lines = lines[: one + 1]
        elif found := list(NUMBER.finditer(lines[one])):
            spot = dice.choice(found)
            new = str(dice.choice([*NUMBERS, *FLOATS])) if kind == 4 else dice.choice(SPELLED)
            lines[one] = lines[one][: spot.start()] + new + lines[one][spot.end() :]
    return "\n".join(lines).encode(errors="surrogatepass")


def mutate_json_line(blob: bytes, dice: Random) -> bytes:
    """Mutate what one line of a file of JSON lines says."""
    lines = blob.split(b"\n")
    one = dice.randrange(len(lines) - 1)
    lines[one] = mutate_json(lines[one], dice)
    return b"\n".join(lines)


MEANINGS: dict[str, tuple[Callable[[bytes, Random], bytes], ...]] = {
    ".json": (mutate_json, mutate_json, mutate_lines),
    ".jsonl": (mutate_json_line, mutate_lines),
    ".toml": (mutate_lines,),
    ".log": (mutate_lines,),
    ".txt": (mutate_lines,),
    ".tiktoken": (mutate_lines,),
}


def mutate(path: Path, dice: Random) -> bytes:
    """Return a file's bytes mutated, in the half of cases by what they mean where its kind has a meaning."""
    blob, meanings = path.read_bytes(), MEANINGS.get(path.suffix, ())
    if meanings and dice.random() < 0.6:
        return dice.choice(meanings)(blob, dice)
    return mutate_bytes(blob, dice)


# ---- Judging ----------------------------------------------------------------------------------------


def peak_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def judge(reader: Reader, path: Path, sound) -> str:
    """Read a mutated file; returns what it ended in, "refused" or "answered"; raises a Miss for all else."""
    before, started = peak_mib(), time.monotonic()
    try:
        found = reader.read(path)
    except UserError as error:
        ended = "refused"
        if not names_place(str(error), path):
            raise Miss(f"{reader.name}: a sentence that names no file: {error}"[:300]) from error
    except BaseException as error:  # whatever it makes of a reader is what is looked for
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise Miss(f"{reader.name}: a traceback: {type(error).__name__}: {error}"[:300]) from error
    else:
        ended = "answered"
        if reader.is_sealed and found != sound:
            raise Miss(f"{reader.name}: other values were accepted")
    if time.monotonic() - started > SECONDS:
        raise Miss(f"{reader.name}: {ended} after {time.monotonic() - started:.0f} s")
    if peak_mib() - before > GROWTH_MIB:
        raise Miss(f"{reader.name}: {ended} with {peak_mib() - before:.0f} MiB more memory")
    return ended


def names_place(sentence: str, path: Path) -> bool:
    """Tell whether a sentence names the file, its folder, or a field of a recipe, and says something."""
    named = [path.name, str(path.parent), path.parent.name]
    named += config_fields(Config) if path.suffix == ".toml" else []
    return len(sentence) > 20 and "\n" not in sentence.strip() and any(name in sentence for name in named)


class Sound:
    """Sound files of all kinds, and what each of them says."""

    def __init__(self, folder: Path):
        self.folder = make_sound(folder)
        self.values = {reader.name: reader.read(folder / reader.place) for reader in READERS}

    def try_one(self, reader: Reader, dice: Random) -> str:
        """Mutate the file of a kind and read it; returns what it ended in."""
        path = self.folder / reader.place
        with replaced(path, mutate(path, dice)):
            return judge(reader, path, self.values[reader.name])


def case(rng: Random, bench: Bench, place: Place, most: int) -> int:
    """Mutate one file; kinds take turns."""
    if bench.sound is None:
        bench.sound = Sound(bench.open_place("mutated").folder / "sound")
    bench.sound.try_one(READERS[place.number % len(READERS)], rng)
    return 1
