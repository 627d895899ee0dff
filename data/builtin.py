"""The built-in corpus: documentation that every environment already holds, so that no network is needed.

The help topics of the interpreter and the docstrings of the standard library and of the packages that
torch brings. Sources are parsed, never imported or run. `python -m data.builtin --help`.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import CommandParser, UserError, at_least_one, check_output, run_command, sha256_file, write_json
from data.codecs import TokenCodec, load_codec
from data.documents import Document
from data.prepare import fill_dataset, print_table
from data.shards import READY_NAME, REPORT_NAME, read_manifest
from data.staging import staged
from data.train_tokenizer import train_tokenizer
from data.verify import verify_codec

CORPUS_NAME = "builtin"
CORPUS_VERSION = 2  # raise it when a change of this file changes the text
PACKAGES = (
    "torch",
    "numpy",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "fsspec",
    "filelock",
    "typing_extensions",
)
TOPICS_MODULE = "pydoc_data.topics"
# Tests hold few docstrings, and those that they hold are often broken on purpose.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
NUM_PROCESSES = 2
PARSE_CHUNK = 32  # modules sent to a process at a time
VAL_EVERY = 10  # one in ten of the standard library's documents is validation
SHARED_CHARS = 80  # a passage this long that is in validation may not be in training
TOKENIZER_NAME = "tokenizer.model"
WAIT_S = 600  # for another process that is building the same corpus


class Module(NamedTuple):
    """One source file."""

    name: str  # dotted
    path: Path
    standard: bool  # of the standard library


class Entry(NamedTuple):
    """One docstring, cleaned, and the line that heads it."""

    heading: str
    docstring: str


class Chapter(NamedTuple):
    """What becomes one document: a module's docstrings, or one help topic."""

    name: str
    standard: bool
    entries: tuple[Entry, ...]


class Corpus(NamedTuple):
    """Both splits, in the order in which they are written."""

    train: list[Chapter]
    val: list[Chapter]


# ---- Finding sources --------------------------------------------------------------------------------


def walk_modules(root: Path, prefix: str, standard: bool) -> Iterator[Module]:
    """Yield the Python files below a folder in name order, `prefix` before their dotted names."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        package = Path(folder).relative_to(root).parts
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix == ".py":
                parts = (prefix, *package, "" if stem == "__init__" else stem)
                yield Module(".".join(filter(None, parts)), Path(folder, file), standard)


def find_standard_library() -> list[Module]:
    """List the standard library's modules."""
    return list(walk_modules(Path(sysconfig.get_paths()["stdlib"]), "", standard=True))


def find_package(name: str) -> list[Module]:
    """List the modules of an installed top-level package or module; none where it is not installed."""
    spec = importlib.util.find_spec(name)  # of a top-level name: looks for files, imports nothing
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        return [Module(name, Path(spec.origin), standard=False)]
    roots = map(Path, spec.submodule_search_locations)
    return [module for root in roots for module in walk_modules(root, name, standard=False)]


def find_modules() -> list[Module]:
    """List every module of the corpus."""
    return find_standard_library() + [module for name in PACKAGES for module in find_package(name)]


def package_versions() -> dict[str, str]:
    """Name the installed packages of the corpus and their versions."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# ---- Parsing ----------------------------------------------------------------------------------------


def parse_module(module: Module) -> list[Chapter]:
    """Parse one file to its chapter; to many for the help topics, to none where nothing is documented."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            tree = ast.parse(module.path.read_bytes())
    # Templates, files of other Python versions, broken links and sources nested too deep are no loss.
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    if module.name == TOPICS_MODULE:
        return parse_topics(module, tree)
    entries = tuple(find_docstrings(tree, module.name))
    return [Chapter(module.name, module.standard, entries)] if entries else []


def parse_topics(module: Module, tree: ast.Module) -> list[Chapter]:
    """Read the literal `topics = {name: text}` of the interpreter's help."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            topics = sorted(ast.literal_eval(node.value).items())
            entries = {f"{module.name}.{name}": Entry("", inspect.cleandoc(text)) for name, text in topics}
            return [Chapter(name, module.standard, (entry,)) for name, entry in entries.items()]
    return []


def find_docstrings(node: ast.AST, name: str) -> Iterator[Entry]:
    """Yield the docstrings of a module or class and of what it defines, in source order."""
    docstring = ast.get_docstring(node)  # cleaned as by inspect.cleandoc
    if docstring and is_text(docstring):
        yield Entry(name + signature(node), docstring)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A module's name heads its document once; within it, names start at the module.
            inside = child.name if isinstance(node, ast.Module) else f"{name}.{child.name}"
            yield from find_docstrings(child, inside)


def is_text(docstring: str) -> bool:
    """Tell whether UTF-8 can write it; escapes such as "\\ud800" make docstrings that it cannot."""
    try:
        docstring.encode()
    except UnicodeEncodeError:
        return False
    return True


def signature(node: ast.AST) -> str:
    """Write the parameters of a function, names only: defaults and annotations are code, not prose."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    arguments = node.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return f"({', '.join(names)})"


def parse_modules(modules: list[Module], num_processes: int = NUM_PROCESSES) -> list[Chapter]:
    """Parse all modules, in processes of their own, and order the chapters by the hash of their names."""
    with ProcessPoolExecutor(num_processes) as pool:
        parsed = pool.map(parse_module, modules, chunksize=PARSE_CHUNK)
        progress = tqdm(parsed, desc="parse", total=len(modules), unit=" modules", mininterval=1.0)
        chapters = [chapter for chapters in progress for chapter in chapters]
    return sorted(chapters, key=lambda chapter: (hash_name(chapter.name), chapter.name))


def hash_name(name: str) -> int:
    """Hash a chapter's name; unlike hash() it is the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


# ---- Splitting --------------------------------------------------------------------------------------


def collect_documents(modules: list[Module]) -> tuple[list[Document], list[Document]]:
    """Parse modules and write the documents of both splits, (train, val)."""
    corpus = make_corpus(parse_modules(modules))
    train, val = ([write_document(chapter) for chapter in chapters] for chapters in corpus)
    return train, val


def hash_texts(documents: list[Document]) -> tuple[str, int]:
    """Return the sha256 of documents, a zero byte after each, and their bytes without those."""
    texts = [document.text.encode() for document in documents]
    return hashlib.sha256(b"".join(text + b"\0" for text in texts)).hexdigest(), sum(map(len, texts))


def make_corpus(chapters: list[Chapter]) -> Corpus:
    """Split the chapters, drop repeated docstrings, and keep validation out of training."""
    is_val = [chapter.standard and hash_name(chapter.name) % VAL_EVERY == 0 for chapter in chapters]
    val = [chapter for chapter, chosen in zip(chapters, is_val) if chosen]
    train = [chapter for chapter, chosen in zip(chapters, is_val) if not chosen]
    seen: set[str] = set()
    val = drop_entries(val, lambda docstring: is_repeated(docstring, seen))
    train = drop_entries(train, lambda docstring: is_repeated(docstring, seen))
    shared = find_shared(list_docstrings(train), list_docstrings(val))
    return Corpus(drop_entries(train, shared.__contains__), val)


def is_repeated(docstring: str, seen: set[str]) -> bool:
    """Tell whether `seen` holds the docstring; add it."""
    repeated = docstring in seen
    seen.add(docstring)
    return repeated


def list_docstrings(chapters: Iterable[Chapter]) -> list[str]:
    """List the docstrings of chapters in order."""
    return [entry.docstring for chapter in chapters for entry in chapter.entries]


def drop_entries(chapters: list[Chapter], unwanted: Callable[[str], bool]) -> list[Chapter]:
    """Leave out the entries whose docstring is unwanted, and the chapters left with none."""
    kept = []
    for chapter in chapters:
        entries = tuple(entry for entry in chapter.entries if not unwanted(entry.docstring))
        if entries:
            kept.append(chapter._replace(entries=entries))
    return kept


def find_shared(train: list[str], val: list[str]) -> set[str]:
    """Find the training docstrings that share a passage of SHARED_CHARS characters with validation."""
    passages = {passage for docstring in val for passage in get_passages(docstring)}
    return {docstring for docstring in train if not passages.isdisjoint(get_passages(docstring))}


def get_passages(docstring: str) -> Iterator[str]:
    """Yield every passage of SHARED_CHARS characters."""
    return (docstring[at : at + SHARED_CHARS] for at in range(len(docstring) - SHARED_CHARS + 1))


def write_document(chapter: Chapter) -> Document:
    """Join a chapter's docstrings, each below its heading, with blank lines between."""
    parts = [part for entry in chapter.entries for part in entry if part]
    return Document("\n\n".join(parts) + "\n", chapter.name)


# ---- Building ---------------------------------------------------------------------------------------


def describe_sources(vocab_size: int) -> dict:
    """Name everything that decides what the corpus is, without reading it."""
    return {
        "corpus": CORPUS_NAME,
        "corpus_version": CORPUS_VERSION,
        "python": platform.python_version(),
        "packages": package_versions(),
        "vocab_size": vocab_size,
    }


def is_complete(out: Path, manifest: dict) -> bool:
    """Tell whether the files of a dataset are there: shards and tokenizer byte for byte, and its report."""
    try:
        entries = [*manifest["train"]["shards"], *manifest["val"]["shards"], manifest["tokenizer"]]
        files = {entry["file"]: entry["sha256"] for entry in entries}
    except (KeyError, TypeError):
        return False
    return (out / REPORT_NAME).is_file() and all(
        (out / name).is_file() and sha256_file(out / name) == stated for name, stated in files.items()
    )


def is_current(out: Path, wanted: dict) -> bool:
    """Tell whether `out` already holds the wanted corpus; raise when it holds another dataset."""
    try:
        manifest = read_manifest(out)
    except UserError as error:
        print(f"{out}: making the built-in corpus again: {error}")
        return False
    if manifest is None:
        return False
    found = manifest.get("sources", {})
    if found.get("corpus") != CORPUS_NAME:
        raise UserError(
            f"{out}: holds a dataset that is not the built-in corpus. Choose another --out folder."
        )
    changed = [key for key, value in wanted.items() if found.get(key) != value]
    if changed:
        print(f"{out}: making the built-in corpus again, changed: {', '.join(changed)}")
    elif not is_complete(out, manifest):
        print(f"{out}: making the built-in corpus again, files are missing or damaged")
    else:
        return True
    return False


def build(out: str | Path, vocab_size: int, list_modules: Callable[[], list[Module]] = find_modules) -> bool:
    """Make the corpus, its tokenizer and its shards in `out`; False when they are there already."""
    out = Path(out)
    sources = describe_sources(vocab_size)
    if not (out / READY_NAME).is_dir() and is_current(out, sources):
        return False
    with staged(out, WAIT_S) as staging:
        if is_current(out, sources):  # made by another process in the meantime
            return False
        train, val = collect_documents(list_modules())
        sources["sha256"], _ = hash_texts(train + val)
        sources["train_bytes"], sources["val_bytes"] = hash_texts(train)[1], hash_texts(val)[1]
        codec = fill_with_tokenizer(staging / TOKENIZER_NAME, train, val, sources)
        write_json(staging / REPORT_NAME, verify_codec(codec, val))
    return True


def fill_with_tokenizer(
    tokenizer: Path, train: list[Document], val: list[Document], sources: dict, kind: str = "sentencepiece"
) -> TokenCodec:
    """Train a tokenizer of sources["vocab_size"] entries, write the shards beside it; returns its codec."""
    train_tokenizer((document.text for document in train), sources["vocab_size"], tokenizer, kind)
    codec = load_codec(tokenizer)
    fill_dataset(tokenizer.parent, codec, train, val, sources)
    return codec


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser(
        formatter_class=argparse.HelpFormatter,
        prog="python -m data.builtin",
        description="Make the built-in corpus: help topics and docstrings of this Python environment, a "
        "tokenizer trained on them, and their shards. Needs no network. Run again, it does nothing unless "
        "Python, a package or the vocabulary size changed.",
    )
    add, entries = parser.add_argument, "tokenizer entries (default: %(default)s)"
    add("--out", required=True, metavar="DIR", help="folder for shards, tokenizer and manifest")
    add("--vocab-size", type=at_least_one, default=1024, metavar="N", help=entries)
    options = parser.parse_args(argv)
    check_output(options.out, [])
    start = time.perf_counter()
    if build(options.out, options.vocab_size):
        print_table(options.out, read_manifest(options.out))
        print(f"made in {time.perf_counter() - start:.1f} s")
    else:
        print(f"{options.out}: the built-in corpus is already there; nothing to do")


if __name__ == "__main__":
    run_command(main)
