"""What every room uses: the exception for bad input, command lines, files that are never half written."""

import argparse
import difflib
import errno
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

MOST_SAID = 600  # characters of a usage error
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Bad input. The message says what was expected, what was found and what to do next.

    Commands print it without a traceback and exit with status 1; everything else is a bug and keeps
    its traceback.
    """


def run_command(main: Callable[[], int | None]) -> None:
    """Run a module's `main` as the process: a UserError or a bad file exits with 1, an interrupt with 130.

    A reader that has read enough, as `head` does, ends it without a word.
    """
    try:
        try:
            status = main()
        except SystemExit as ended:  # of --help, whose text is not written yet
            status = ended.code
        if sys.stdout:  # a process may have none
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130  # 128 + SIGINT, as shells report it
    except BrokenPipeError:
        drop_output()
        status = 141  # 128 + SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        if error.filename is None:
            drop_output()
            said = (
                "the disk is full: standard output or a file was not written. Free space and run this again"
            )
        else:
            said = f"{error.filename}: {error.strerror}. Name another file or folder"
        print(f"error: {said}.", file=sys.stderr)
        status = 1
    sys.exit(status)


def drop_output() -> None:
    """Send what is left of standard output nowhere, or the interpreter complains when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class CommandParser(argparse.ArgumentParser):
    """An argument parser that takes options by their whole names and suggests the nearest known one."""

    def __init__(self, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse unknown options here: an action's parser knows the options near them, its caller's not."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 after usage, message and suggestion."""
        message = message[:MOST_SAID]  # who typed 5,000 digits knows them
        known = [option for action in self._actions for option in action.option_strings]
        words = [word.split("=")[0].rstrip(":,") for word in message.split() if word.startswith("-")]
        unknown = [word for word in words if word not in known]
        near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
        super().error(f"{message}. Did you mean {near[0]}?" if near else message)


def at_least_one(text: str) -> int:
    """Read the value of an option that counts something; argparse adds the option's name to the error."""
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:  # 18 digits: what fits in 64 bits
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text[:40]!r}")
    return int(text)


def existing(text: str) -> Path:
    """Read the value of an option that names a file or folder which must be there."""
    if not text or not Path(text).exists():
        raise argparse.ArgumentTypeError(f"expected a file or folder that is there, found {text!r}")
    return Path(text)


def split_numbers(text: str, option: str, kind: type = float) -> list:
    """Read "a,b": numbers from 0 on, below 2^53; raises naming the option for anything else."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= number < 2**53 for number in numbers):
        kinds = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} {text:.60}: expected {kinds} from 0 on, with commas between.")
    return numbers


def require_utf8_name(path: str | Path) -> None:
    """Raise for a name that UTF-8 cannot express: neither a manifest nor a message could hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise UserError(f"{shown}: the name is not UTF-8. Rename the file or folder.") from error


def check_output(out: str | Path, files: Iterable[str | Path], option: str = "--out") -> None:
    """Raise for an output without a name, or one that would replace a file that is read, or one beside it."""
    require_utf8_name(out)
    if not str(out):
        raise UserError(f"{option}: expected a name, found an empty one. Name a file or folder.")
    if os.path.exists(out) and not (os.path.isfile(out) or os.path.isdir(out)):
        raise UserError(
            f"{option} {out}: expected a file or a new name, found a device. Choose another name."
        )
    for path in files if os.path.exists(out) else ():
        beside = os.path.isdir(path) and os.path.isfile(out) and os.path.samefile(Path(out).parent, path)
        if beside or (os.path.exists(path) and os.path.samefile(out, path)):
            raise UserError(f"{option} {out}: this is a file that is read, {path}. Choose another name.")


def choose_named(rows, text: str, option: str) -> list:
    """Return the rows of a table that "a,b" names, in its order, all for ""; raises for an unknown name."""
    names, known = set(text.split(",")) if text else set(), [row.name for row in rows]
    unknown = names - set(known)
    if unknown:
        raise UserError(f"{option}: expected some of {', '.join(known)}, found {', '.join(sorted(unknown))}.")
    return [row for row in rows if row.name in names or not names]


def format_table(columns: dict[str, str], rows: list[tuple]) -> str:
    """Lay rows out below the titles of their columns, which map to formats like "<20" and ">12,.1f"."""
    pads = [spec.replace("+", "").partition(".")[0].rstrip(",") for spec in columns.values()]
    lines = ["".join(map(format, columns, pads))]
    return "\n".join(lines + ["".join(map(format, row, columns.values())) for row in rows])


@contextmanager
def full_disk_named(path: str | Path):
    """Turn the error of a disk without space into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        advice = "Free space and run this again, a run with --resume."
        raise UserError(f"{path}: not written, the disk is full. {advice}") from error


@contextmanager
def atomic_file(path: str | Path):
    """Yield a binary file that takes the name `path` only when the block ends well.

    Several may write one file at once: the last to end wins. What a killed writer left behind is removed
    by the next one that locks the folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(temporary, "xb")  # noqa: SIM115 - what another wrote by that name is not ours to remove
        try:
            with opened as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder outlast a power cut."""
    with suppress(OSError):  # Windows opens no folders, some network file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_text(path: str | Path, text: str | bytes) -> None:
    """Append to a file that has no other writer, whole or not at all."""
    rest = text if isinstance(text, bytes) else text.encode()
    with full_disk_named(path), open(path, "ab", buffering=0) as file:
        length = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            with suppress(OSError):  # a device has no length; the first error is the one to tell
                file.truncate(length)
            raise


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def damage_named(path: str | Path, expected: str, advice: str):
    """Turn what a damaged file makes of the code that interprets it into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: expected {expected}, found a damaged file ({why}). {advice}") from error


def sha256_file(path: str | Path) -> str:
    """Hash a file of any size in constant memory; returns lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def object_of(pairs: list[tuple]) -> dict:
    """Build a JSON object; a key that occurs twice is an error, or one of its values would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key twice in one object, one of {list(value)[:9]}"[:200])
    return value


def finite(digits: str) -> float:
    """Read a JSON number with a point or an exponent; "NaN", "Infinity" and 1e999 are errors."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is no finite number")
    return number


STRICT_JSON = json.JSONDecoder(object_pairs_hook=object_of, parse_float=finite, parse_constant=finite)
LENIENT_JSON = json.JSONDecoder(object_pairs_hook=object_of)
MAYBE_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate, paired or not


def parse_json(
    text: str | bytes, place: str | Path, *, strict: bool = True, advice: str = "Copy or make it again."
):
    """Parse JSON; whatever it cannot be read as is a UserError that names the place and gives the advice.

    Strict: numbers must be finite and strings such that UTF-8 can express them. Always refused are broken
    syntax, a key twice in one object, nesting too deep and numbers too long for Python.
    """
    try:
        text = text if isinstance(text, str) else str(text, "utf-8")
        value = (STRICT_JSON if strict else LENIENT_JSON).decode(text.removeprefix("\ufeff"))
        if strict and MAYBE_HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # UnicodeErrors are ValueErrors
        why = str(error).partition("; use sys.")[0]  # of a number of thousands of digits
        raise UserError(f"{place}: not valid JSON ({why}). {advice}") from error


def read_json(path: str | Path, **how):
    """Read a JSON file as `parse_json` does; raises a UserError where it is missing or unreadable, too."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (OSError, ValueError) as error:  # a folder, no permission, a name that no file can have
        raise UserError(
            f"{path}: expected a JSON file, cannot read it ({error}). Name another one."
        ) from error
    return parse_json(text, path, **how)
