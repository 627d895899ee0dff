"""What a part of the battery is given: its settings, and where it writes what it finds, line by line.

A line is written as soon as it is known, so that a part that is killed keeps what it had measured:
{"began": name}, then {"name": name, "value": ...} or {"name": name, "error": text}.
"""

import json
import math
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

STACK_SIGNAL = signal.SIGUSR1  # asks a part's process for its stack, before it is killed
MARGIN_SECONDS = 4.0  # of a part's time, to tell how its own child ended
DIGITS = 8  # of numbers that are kept: more than any clock resolves
LONGEST_ERROR = 600  # characters of an error that stay with its measurement; the rest is in stderr


class Job(NamedTuple):
    """One part's run."""

    function: str  # "module:function"
    records: str  # file of its lines
    work: str  # folder for what it needs and nobody keeps: shards, runs, caches; shared by all parts
    data: str  # dataset folder of the user's; empty: made-up text
    carried: str  # folder of what is measured beside this project; empty: nothing
    rehearse: bool  # in miniature, on a CPU
    seconds: float  # until it is killed
    started: float  # time.time() then

    def seconds_left(self) -> float:
        """Return how long it may still take."""
        return self.started + self.seconds - time.time()

    def seconds_for_child(self) -> float:
        """Return how long a process may take that this part waits for: it is to see its end."""
        return max(self.seconds_left() - MARGIN_SECONDS, 1.0)

    def write(self, line: dict) -> None:
        """Append a line, whole and at once."""
        with open(self.records, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(line), allow_nan=False) + "\n")

    def record(self, name: str, value) -> None:
        """Keep a result."""
        self.write({"name": name, "value": value})

    def fault(self, name: str, text: str) -> None:
        """Note that something is wrong: the part counts as failed, whatever else it finds."""
        self.write({"name": name, "error": text[:LONGEST_ERROR]})

    def measure(self, name: str, action: Callable[[], object]):
        """Run one measurement and keep what it returns; its error costs only itself. Returns the value."""
        self.write({"began": name})
        try:
            value = action()
        except Exception as error:  # whatever a driver, a compiler or a kernel raises
            traceback.print_exc()
            self.fault(name, f"{type(error).__name__}: {error}".strip())
            return None
        self.record(name, value)
        return value


class Records(NamedTuple):
    """What a part's lines say."""

    results: dict  # name -> value
    errors: dict[str, str]  # name -> text
    unfinished: str  # the measurement that was under way at the last line; empty for none


def read_records(path: Path) -> Records:
    """Read a part's lines; what is cut off, is no JSON or says nothing is left out."""
    results, errors, unfinished = {}, {}, ""
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text, parse_constant=str)
        except (ValueError, RecursionError):
            continue
        match line:
            case {"began": str(name)}:
                unfinished = name
            case {"name": str(name), "value": value}:
                results[name], unfinished = value, ""
            case {"name": str(name), "error": str(text)}:
                errors[name], unfinished = text, ""
    return Records(results, errors, unfinished)


def plain(value):
    """Turn a value into what JSON can hold: numbers that are not finite and unknown objects become text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int):
        return value
    return str(value).encode("utf-8", "replace").decode()  # halves of surrogate pairs have no UTF-8
