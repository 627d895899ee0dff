"""Seals: a file that was altered since it was written is refused in a sentence, not read as something else.

A JSON file and a recipe hold the SHA-256 of all else that they say; each line of a log of events holds the
CRC-32 of the log so far. `python -m durable.reseal FILE...` seals files again that a person changed.
"""

import hashlib
import json
import os
import re
import zlib
from pathlib import Path

from common import (
    UserError,
    append_text,
    atomic_file,
    parse_json,
    read_json,
    write_json,
)

DIGEST = "digest"
EVENT_SEAL = re.compile(rb'"crc32": ([0-9]+)\}\n$')
EVENT_SEAL_BYTES = 64  # of a line's end, enough for the seal
EVENT = re.compile(r'(\{.*), "crc32": ([0-9]{1,10})\}')
AGAIN = "`python -m durable.reseal {}` accepts it as it is now."


def digest_of(facts: dict) -> str:
    """Hash all that facts say but their digest: SHA-256 of their JSON with sorted keys."""
    stated = {key: value for key, value in facts.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(stated, sort_keys=True, default=repr).encode()).hexdigest()


def check_digest(path: str | Path, facts, advice: str) -> None:
    """Raise unless facts that a file holds are an object with their own digest."""
    stated = facts.get(DIGEST) if isinstance(facts, dict) else None
    if stated is None or stated != digest_of(facts):
        found = "none" if stated is None else "another: the file was altered since it was written"
        raise UserError(f"{path}: expected the digest of what it says, found {found}. {advice}")


def write_sealed(path: str | Path, facts: dict) -> dict:
    """Write facts as JSON with their digest, whole or not at all; returns both."""
    sealed = {**facts, DIGEST: digest_of(facts)}
    write_json(path, sealed)
    return sealed


def read_sealed(path: str | Path, advice: str) -> dict:
    """Read what write_sealed wrote; `advice` is the next step where the file is altered."""
    facts = read_json(path, strict=False)  # a loss may be NaN
    check_digest(path, facts, f"{advice} {AGAIN.format(path)}")
    return facts


# Logs of events


def seal_event(event: dict, before: int) -> tuple[str, int]:
    """Spell an event that follows others whose seal is `before` (0: none): its line, and the seal so far."""
    text = json.dumps(event)
    seal = zlib.crc32(text.encode(), before)
    return f'{text[:-1]}, "crc32": {seal}}}\n', seal


def append_event(path: Path, event: dict) -> None:
    """Append an event to a log that has no other writer, whole or not at all."""
    append_text(path, seal_event(event, last_seal(path))[0])


def last_seal(path: Path) -> int:
    """Return the seal of a log of events, 0 where there is none."""
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(-min(EVENT_SEAL_BYTES, path.stat().st_size), os.SEEK_END)
        found = EVENT_SEAL.search(file.read())
    return int(found[1]) if found else 0


def unseal_event(line: str, before: int) -> tuple[dict, int] | None:
    """Return an event, an object with kind and step, and the seal so far; None for another line."""
    found = EVENT.fullmatch(line)
    if not found or zlib.crc32(f"{found[1]}}}".encode(), before) != int(found[2]):
        return None
    event = parse_json(f"{found[1]}}}", "event", strict=False)  # a loss may be NaN
    is_event = isinstance(event.get("kind"), str) and isinstance(event.get("step"), int)
    return (event, int(found[2])) if is_event else None


def split_events(path: Path) -> tuple[list[dict], str]:
    """Read a log of events up to the first that is altered; returns a sentence on that one, or "", too.

    What a kill cut off, a last line without its end, is left out and no fault.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    events: list[dict] = []
    seal = 0
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        found = unseal_event(line, seal)
        if found is None:
            return events, f"{path}:{number}: expected an event as it was written, found one altered."
        events.append(found[0])
        seal = found[1]
    return events, ""


def read_events(path: Path) -> list[dict]:
    """Read a log of events; raises for one that is altered."""
    events, fault = split_events(path)
    if fault:
        raise UserError(f"{fault} Move the file away to do without it. {AGAIN.format(path)}")
    return events


def write_events(path: Path, events: list[dict]) -> None:
    """Write a log of events anew, whole or not at all."""
    seal, lines = 0, []
    for event in events:
        line, seal = seal_event(event, seal)
        lines.append(line)
    with atomic_file(path) as file:
        file.write("".join(lines).encode())
