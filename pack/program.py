"""Pack train_gpt.py and the modules it imports into the smallest file that runs.

    python -m pack --recipe records/.../recipe.toml --out runs/packed/train_gpt.py

bundle (follow first-party imports, merge into one namespace, drop what nothing uses) -> embed the
recipe and fold what it fixes (pack/specialize) -> minify -> compress -> wrap in a stub that decompresses,
registers the program in linecache and runs it. The source stays written for people; bytes are this
package's business alone.
"""

import ast
import builtins
import gc
import importlib.util
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import UserError, atomic_file
from formats.memory import AUTO
from formats.recipe import read_recipe
from pack.mix import DECODER_NAME, decoder_text, encode, shipped_decoder
from pack.names import (
    Definition,
    Function,
    Import,
    blocks,
    bound_names,
    children,
    drop_annotations,
    identifiers,
    last_name,
    needed_statements,
    walk,
)
from pack.printing import minifier_prints_for_oldest, to_text
from pack.rename import rename
from pack.specialize import specialize_tree
from pack.specialize.facts import SMALLEST, Style
from pack.specialize.syntax import is_literal, is_text
from pack.stub import make_stub

REPOSITORY = Path(__file__).resolve().parent.parent
ENTRY = REPOSITORY / "train_gpt.py"
METHODS = ("brotli", "lzma", "mix", "none")
RECIPE_NAME = "PACKED_RECIPE"
IMPORTS_LABEL = "third-party imports"
MAIN_GUARDS = ("__name__ == '__main__'", "'__main__' == __name__")
KEPT_NAMES = ["main", "scorer", RECIPE_NAME]  # global names that people and audits look for


class PackingError(UserError):
    """The source breaks a rule of packing; the message names the place and the way out."""


class SourceModule(NamedTuple):
    """One first-party file without its first-party imports, and which modules it imported."""

    label: str  # path below the root
    tree: ast.Module
    exports: set[str]  # names that another module may import from it
    eager: set[str]  # labels of modules that it imports outside functions


class Statement(NamedTuple):
    """One top-level statement of the bundle and the file it comes from."""

    label: str
    node: ast.stmt


class PackReport(NamedTuple):
    """What `pack` wrote: bytes after each step, and the steps that a missing library left out."""

    out: str
    source_bytes: int
    folded_bytes: int
    minified_bytes: int
    packed_bytes: int
    steps_left_out: list[str]


# ----------------------------------------------------------------------------------------------------------
# Read the entry and the modules it needs
# ----------------------------------------------------------------------------------------------------------


def module_file(name: str, root: Path) -> Path | None:
    """Find the file of a dotted module name below `root`; None for somebody else's module."""
    folder = root.joinpath(*name.split("."))
    for path in (folder / "__init__.py", folder.parent / f"{folder.name}.py"):
        if path.is_file():
            return path
    if (root / name.split(".")[0] / "__init__.py").is_file():
        raise PackingError(
            f"import of {name}: expected such a module below {root}, found none. Correct the import."
        )
    return None


def collect(entry: Path, root: Path) -> list[SourceModule]:
    """Read the entry and every first-party module it needs; each comes after those it imports."""
    found: dict[str, SourceModule] = {}
    _visit(entry.resolve(), root.resolve(), (), found)
    return list(found.values())


def parse_source(path: Path, label: str) -> ast.Module:
    """Parse a program; raises for a file that is none."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"), label)
    except (SyntaxError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or null bytes
        raise PackingError(f"{path}: expected a Python program, found {error}. Name another file.") from error


def _visit(path: Path, root: Path, chain: tuple[str, ...], found: dict[str, SourceModule]) -> None:
    """Add to `found` what the module at `path` imports, then the module; `chain` led here."""
    label = path.relative_to(root).as_posix()
    if label in chain:
        circle = " -> ".join([*chain[chain.index(label) :], label])
        raise PackingError(
            f"modules import each other in a circle: {circle}. Move what they share into a third."
        )
    if label in found:
        return
    tree = parse_source(path, label)
    exports = {name for node in tree.body for name, _ in bound_names(node)}
    eager = set()
    for node, is_lazy in _imports(tree):
        if not _is_first_party(node, root):
            continue
        where = f"{label}:{node.lineno}"
        _check_form(node, where)
        target = module_file(node.module, root)
        target_label = target.relative_to(root).as_posix()
        _visit(target, root, (*chain, label), found)
        for alias in node.names:
            if alias.name not in found[target_label].exports:
                raise PackingError(
                    f"{where}: expected {alias.name} at the top level of {target_label}, found no such name. "
                    "Import functions, classes and constants, not modules."
                )
        if not is_lazy:
            eager.add(target_label)
    _check_lazy_names(tree, root, label)
    _RemoveImports(root).visit(tree)
    found[label] = SourceModule(label, tree, exports, eager)


def _imports(node: ast.AST, is_lazy: bool = False) -> Iterator[tuple[Import, bool]]:
    """Yield each import statement below `node` in source order, and whether it is inside a function."""
    for child in children(node):
        if isinstance(child, Import):
            yield child, is_lazy
        yield from _imports(child, is_lazy or isinstance(child, Function))


def _is_first_party(node: ast.stmt, root: Path) -> bool:
    if isinstance(node, ast.Import):
        return any(module_file(alias.name, root) for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.level > 0 or module_file(node.module, root) is not None)


def _check_form(node: Import, where: str) -> None:
    """Refuse every first-party import that is not `from module import name, name`."""
    is_plain = isinstance(node, ast.ImportFrom) and node.level == 0
    if not is_plain or any(alias.asname or alias.name == "*" for alias in node.names):
        raise PackingError(
            f"{where}: expected `from module import name`, found `{ast.unparse(node)}`. Packed modules "
            "share one namespace: import names as they are, without `as`, `*` or leading dots."
        )


def _check_lazy_names(tree: ast.Module, root: Path, label: str) -> None:
    """Refuse a function that imports a first-party name and binds it again.

    The import statement goes, so the name would be a local variable without a value.
    """
    for function in (node for node in walk(tree) if isinstance(node, Function)):
        imported, bound = set(), set()
        for node in walk(function):
            if isinstance(node, ast.ImportFrom) and _is_first_party(node, root):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                bound.add(node.id)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
        twice = ", ".join(sorted(imported & bound))
        if twice:
            raise PackingError(
                f"{label}:{function.lineno}: expected {function.name} only to import {twice}, found that it "
                "binds the name again. Packed, the import goes and the name is unset: rename the local."
            )


class _RemoveImports(ast.NodeTransformer):
    """Remove first-party imports everywhere; a block that becomes empty gets `pass`."""

    def __init__(self, root: Path):
        self.root = root

    def generic_visit(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, Import) and _is_first_party(node, self.root):
            return None
        filled = [body for _, body in blocks(node) if body]
        super().generic_visit(node)
        for body in filled:
            body[:] = body or [ast.Pass()]
        return node


# ----------------------------------------------------------------------------------------------------------
# Merge them into one namespace
# ----------------------------------------------------------------------------------------------------------


def to_source(statements: list[Statement]) -> str:
    """Write statements as the source of a module."""
    tree = ast.Module([statement.node for statement in statements], [])
    return to_text(ast.fix_missing_locations(tree)) + "\n"


def bundle(entry: Path, root: Path) -> list[Statement]:
    """Merge `entry` and every module below `root` that it imports into one.

    In order: the entry's docstring, `__future__`, third-party imports, the statements of each module and
    last those of the entry, its main guard at the end. What the entry does between its imports, such as
    setting the environment, comes before all imports that it does not need itself.
    """
    modules = collect(entry, root)
    _check_collisions(modules)
    _check_builtins(modules)
    _check_future(modules)
    _check_lazy_libraries(modules)
    entry = modules[-1]
    statements = [Statement(module.label, node) for module in modules for node in module.tree.body]
    imports, docstring, guard, body = [], [], [], []
    for statement in statements:
        label, node = statement
        if isinstance(node, Import):
            imports.append(statement)
        elif label == entry.label and is_main_guard(node):
            guard.append(statement)
        elif node is entry.tree.body[0] and _is_docstring(node):
            docstring.append(statement)
        elif not (is_main_guard(node) or _is_docstring(node) or isinstance(node, ast.Pass)):
            body.append(statement)
    body = _drop_repeated_guards(body) + guard
    always = {i for i, statement in enumerate(body) if statement.label == entry.label}
    body = [body[i] for i in needed_statements([statement.node for statement in body], always)]
    last = max((node.lineno for node in entry.tree.body if isinstance(node, Import)), default=0)
    early = [one for one in body if one.label == entry.label and one.node.lineno < last]
    body = [one for one in body if one not in early]
    merged = _merge_imports(imports, early + body, entry.label)
    needed = set().union(*(identifiers(one.node) for one in early))
    first = [
        one
        for one in merged
        if _is_future(one.node) or not needed.isdisjoint(name for name, _ in bound_names(one.node))
    ]
    return docstring + first + early + [one for one in merged if one not in first] + body


def is_main_guard(node: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__"`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in MAIN_GUARDS


def _is_docstring(node: ast.stmt) -> bool:
    return is_text(node) and isinstance(node.value.value, str)


def _is_guarded_import(node: ast.stmt) -> bool:
    """Whether `node` is `try: import library ... except ImportError: ...`."""
    return isinstance(node, ast.Try) and any(isinstance(inner, Import) for inner in node.body)


def _check_collisions(modules: list[SourceModule]) -> None:
    """Refuse one top-level name for two things in two modules. The same import twice is one thing."""
    owners: dict[str, tuple[str, str]] = {}
    for module in modules:
        for node in module.tree.body:
            if is_main_guard(node):
                continue
            for name, imported in bound_names(node):
                what = ast.unparse(node) if _is_guarded_import(node) else imported or module.label
                owner, owned = owners.setdefault(name, (module.label, what))
                if owned != what and owner != module.label and name != "_":
                    raise PackingError(
                        f"expected one meaning of {name} in the packed program, found two: in {owner} and in "
                        f"{module.label}, line {node.lineno}. Rename one of them."
                    )


def _plain_names(node: ast.AST) -> set[str]:
    return {inner.id for inner in walk(node) if isinstance(inner, ast.Name)}


def _check_builtins(modules: list[SourceModule]) -> None:
    """Refuse a definition that hides a builtin from another module."""
    used = {module.label: _plain_names(module.tree) for module in modules}
    for module in modules:
        for name in sorted(module.exports & set(dir(builtins)) - {"__doc__"}):
            victims = [label for label, names in used.items() if label != module.label and name in names]
            if victims:
                raise PackingError(
                    f"expected no packed module to define a builtin's name that another uses, found {name} "
                    f"in {module.label}, used in {victims[0]}. Rename the definition."
                )


def _check_future(modules: list[SourceModule]) -> None:
    """Refuse `from __future__ import annotations` in some files only: it would turn into all of them."""
    with_it = [module.label for module in modules if "annotations" in _future_names(module)]
    others = [module for module in modules if module.label not in with_it]
    without = [one.label for one in others if any(isinstance(node, ast.AnnAssign) for node in walk(one.tree))]
    if with_it and without:
        raise PackingError(
            "expected `from __future__ import annotations` in all packed modules with annotations or in "
            f"none, found it in {with_it[0]}, not in {without[0]}. Packed, it is in force everywhere: add it."
        )


def _future_names(module: SourceModule) -> set[str]:
    return {alias.name for node in module.tree.body if _is_future(node) for alias in node.names}


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _check_lazy_libraries(modules: list[SourceModule]) -> None:
    """Refuse a library that the readable program imports only when needed and the packed one at its start."""
    by_label = {module.label: module for module in modules}
    at_start, todo = set(), [modules[-1].label]
    while todo:
        label = todo.pop()
        if label not in at_start:
            at_start.add(label)
            todo += by_label[label].eager
    known = set(sys.stdlib_module_names)
    for label in at_start:
        known |= {library for _, library in _libraries(by_label[label])}
    for module in modules:
        for line, library in _libraries(module):
            if library not in known:
                raise PackingError(
                    f"{module.label}:{line}: expected {library} to be imported in the function that needs "
                    "it, found it at the top of a module that is itself imported inside functions only. "
                    "Packed, it would be imported at the start: move the import into the function."
                )


def _libraries(module: SourceModule) -> Iterator[tuple[int, str]]:
    """Yield (line, top package) of each unconditional import of a module."""
    for node in module.tree.body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module.split(".")[0]


def _drop_repeated_guards(body: list[Statement]) -> list[Statement]:
    """Keep the first of `try: import x` statements that several modules spell alike."""
    seen, kept = set(), []
    for statement in body:
        text = ast.unparse(statement.node) if _is_guarded_import(statement.node) else None
        if text is None or text not in seen:
            kept.append(statement)
        seen.add(text)
    return kept


def _merge_imports(imports: list[Statement], body: list[Statement], entry_label: str) -> list[Statement]:
    """Return every needed third-party import once, `__future__` first, one statement a module."""
    used = set().union(*(identifiers(statement.node) for statement in body))
    plain: dict[tuple[str, str | None], ast.alias] = {}
    from_module: dict[str, dict[tuple[str, str | None], ast.alias]] = {"__future__": {}}
    for label, node in imports:
        for alias in node.names:
            bound = alias.asname or alias.name.split(".")[0]
            if label != entry_label and bound not in used and not _is_future(node):
                continue
            group = plain if isinstance(node, ast.Import) else from_module.setdefault(node.module, {})
            group.setdefault((alias.name, alias.asname), alias)
    nodes: list[ast.stmt] = [ast.Import([alias]) for alias in plain.values()]
    nodes += [ast.ImportFrom(name, list(group.values()), 0) for name, group in from_module.items() if group]
    nodes.sort(key=lambda node: not _is_future(node))  # stable
    return [Statement(IMPORTS_LABEL, node) for node in nodes]


# ----------------------------------------------------------------------------------------------------------
# Embed, minify, compress, wrap
# ----------------------------------------------------------------------------------------------------------


def specialize(statements: list[Statement], recipe: dict, style: Style = SMALLEST) -> list[Statement]:
    """Embed a recipe in a bundle and fold what it fixes."""
    _check_literal(recipe, "recipe")
    if not any((RECIPE_NAME, "") in bound_names(statement.node) for statement in statements):
        raise PackingError(
            f"expected the line `{RECIPE_NAME}: dict | None = None` at the top level of the program, found "
            "none. Add it where the recipe is read."
        )
    labels = {id(statement.node): statement.label for statement in statements}
    tree = ast.Module([statement.node for statement in statements], [])
    specialize_tree(tree, recipe, style)
    return [Statement(labels.get(id(node), statements[-1].label), node) for node in tree.body]


def _check_literal(value, where: str) -> None:
    """Refuse a value of TOML that no literal spells: a date, NaN."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_literal(item, f"{where}.{key}")
    elif not is_literal(value):
        raise PackingError(
            f"{where}: expected a string, number, boolean, list or table, found {value!r}. "
            "Write it as a string."
        )


def read_sections(path: Path) -> dict[str, dict]:
    """Read a recipe.toml as {section: {key: value}}."""
    recipe: dict[str, dict] = {}
    for name, value in read_recipe(path).items():
        if name in AUTO and value in ("auto", AUTO[name]):
            raise PackingError(
                f"{path}: expected a number for {name}, found auto. A run finds it: pack the recipe.toml "
                "of its folder."
            )
        section, _, key = name.partition(".")
        recipe.setdefault(section, {})[key] = value
    return recipe


def minify(source: str) -> str:
    """Shorten `source`: no comments, docstrings or unread annotations, short local and global names.

    Attribute and class field names stay: they are state_dict keys, configuration keys and keyword
    arguments. Literals stay where they are: hoisted to global names they compress worse.
    """
    import python_minifier

    tree = ast.parse(source)
    drop_annotations(tree)
    kernel_names = _triton_names(tree)
    reads_docstrings = _shorten_docstrings(tree)
    rename(tree, KEPT_NAMES, kernel_names)
    with minifier_prints_for_oldest():
        return python_minifier.minify(
            to_text(tree),
            remove_annotations=python_minifier.RemoveAnnotationsOptions(
                remove_variable_annotations=True,
                remove_return_annotations=False,
                remove_argument_annotations=False,
                remove_class_attribute_annotations=False,
            ),
            remove_literal_statements=not reads_docstrings,
            rename_locals=False,
            hoist_literals=False,
        )


def _triton_names(tree: ast.Module) -> set[str]:
    """Collect the local names of Triton kernels: a constexpr that gets a second name stops being one."""
    functions = [node for node in walk(tree) if isinstance(node, Function)]
    kernels = [node for node in functions if "jit" in map(last_name, node.decorator_list)]
    arguments = {node.arg for one in kernels for node in walk(one) if isinstance(node, ast.arg)}
    return arguments.union(*map(_plain_names, kernels))


def _shorten_docstrings(tree: ast.Module) -> bool:
    """Remove docstrings; of those that the program reads as `__doc__` the first line stays. Were any read?"""
    attributes = {node.attr for node in walk(tree) if isinstance(node, ast.Attribute)}
    names = _plain_names(tree)
    for node in walk(tree):
        if not isinstance(node, Definition | ast.Module) or not (node.body and _is_docstring(node.body[0])):
            continue
        text = node.body[0].value
        if "__doc__" in attributes or (isinstance(node, ast.Module) and "__doc__" in names):
            text.value = text.value.strip().partition("\n")[0]
        else:
            node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
    ast.fix_missing_locations(tree)
    return "__doc__" in attributes | names


def has_library(name: str) -> bool:
    """Whether `import name` would find something."""
    return importlib.util.find_spec(name) is not None


def best_method() -> str:
    """Name the strongest compression installed here."""
    return "brotli" if has_library("brotli") else "lzma"


def compress(data: bytes, method: str) -> bytes:
    """Compress with the settings whose result makes the shortest literal."""
    if method == "mix":
        with tqdm(desc="mix", total=len(data), unit="char", mininterval=1.0) as bar:
            payload = encode(data.decode(), lambda done: bar.update(round(done * len(data)) - bar.n))
        return payload.encode("latin-1")
    if method == "brotli":
        import brotli

        sizes = ((16, 17), (17, 16), (18, 0))  # logarithms of window and block
        made = [brotli.compress(data, quality=11, lgwin=window, lgblock=block) for window, block in sizes]
    else:
        import lzma

        common = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
        filters = [common | {"lc": lc, "pb": pb} for lc in (3, 4) for pb in (0, 2)]
        made = [lzma.compress(data, lzma.FORMAT_RAW, filters=[one]) for one in filters]
    return min(made, key=lambda packed: len(escape(packed)))


def _deflated(text: str) -> bytes:
    """Compress a short text as a raw deflate stream, with the settings that make the shortest literal."""
    made = []
    for level in range(1, 10):  # of memory: it decides how many symbols share a table
        stream = zlib.compressobj(9, zlib.DEFLATED, -15, level)
        made.append(stream.compress(text.encode()) + stream.flush())
    return min(made, key=lambda packed: len(escape(packed)))


def spell_ascii(source: str) -> str:
    r"""Spell a program in ASCII: characters beyond it, which only string literals hold, become \x, \u, \U."""
    if source.isascii():
        return source
    spelled = source.encode("ascii", "backslashreplace").decode()
    try:
        is_same = ast.dump(ast.parse(spelled)) == ast.dump(ast.parse(source))
    except SyntaxError:
        is_same = False
    if not is_same:
        raise PackingError(
            "wrap mix: expected characters beyond ASCII in plain string literals only, found others. "
            "Spell them as escapes, or use --wrap brotli."
        )
    return spelled


def escape(data: bytes) -> bytes:
    """Spell bytes as a string literal of a latin-1 source file, as few escapes as the language allows.

    Line feeds stay as they are: a checkout that writes CR LF is read as LF again.
    """
    body, end = (data[:-1], b'\\"') if data.endswith(b'"') else (data, b"")
    text = body.replace(b"\\", b"\\\\").replace(b"\r", b"\\r").replace(b'"""', b'""\\"')
    text = re.sub(rb"\0(?=[0-7])", rb"\\000", text).replace(b"\0", b"\\0")
    return b'"""' + text + end + b'"""'


def wrap(source: str, method: str) -> bytes:
    """Make the file that decompresses and runs `source`; `none` gives the source itself."""
    if method not in METHODS:
        raise PackingError(f"wrap: expected one of {', '.join(METHODS)}, found {method}.")
    if method == "none":
        return source.encode()
    values = {"literal": escape(compress(source.encode(), method))}
    if method == "mix":
        values |= {"decoder": escape(_deflated(decoder_text())), "length": len(source)}
    return make_stub(method, zlib.crc32(source.encode()), **values)


def _mix_parts(tree: ast.Module) -> tuple[str, str, int]:
    """Return the decoder's text, the payload and the number of characters of a program of method mix."""
    deflated, assigned = tree.body[1].value.args[0].args[0].func.value.value, tree.body[2].value
    payload, length = (argument.value for argument in assigned.args)
    return zlib.decompress(deflated.encode("latin-1"), -15).decode(), payload, length


def unwrap(packed: bytes) -> str:
    """Read back the source of a file that `wrap` made, without running it."""
    if not packed.startswith(b"#coding:L1\n"):
        return packed.decode()
    tree = ast.parse(packed)
    assigned = next(node for node in tree.body if isinstance(node, ast.Assign))
    if b"import zlib" in packed[:64]:
        text, payload, length = _mix_parts(tree)
        decode = shipped_decoder(text)
        if decode is None:
            raise PackingError("expected a program with a decoder of this packer, found another decoder.")
        source = decode(payload, length)
        if b"%08x" % zlib.crc32(source.encode()) not in packed[-200:]:
            raise PackingError("expected a text with the checksum that the program states, found another.")
        return source
    literals = [node.value for node in walk(assigned) if isinstance(node, ast.Constant)]
    data = max((value for value in literals if isinstance(value, str)), key=len).encode("latin-1")
    if b"import brotli" in packed[:64]:
        import brotli

        return brotli.decompress(data).decode()
    import lzma

    return lzma.decompress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]).decode()


PROOF_LENGTH = 2000  # characters that the shipped decoder of `mix` decodes; `encode` proves the payload whole


def _holds(packed: bytes, source: str, method: str) -> bool:
    """Whether a packed program holds its source."""
    if method != "mix":
        return unwrap(packed) == source
    text, payload, length = _mix_parts(ast.parse(packed))
    names: dict = {}
    exec(text, names)
    start = source[:PROOF_LENGTH]
    return length == len(source) and names[DECODER_NAME](payload, len(start)) == start


@contextmanager
def without_collection() -> Iterator[None]:
    """Do not look for garbage in circles meanwhile: trees hold little, to look takes a second of fourteen."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_collection()
def pack(recipe_path: Path | None, out: Path, entry: Path = ENTRY, method: str = "") -> PackReport:
    """Bundle, embed, fold, minify, compress, check and write the program.

    Without a recipe the program looks for one when it runs, as the readable one does. Without a method the
    recipe's quant.code_wrap says how to compress.
    """
    left_out = []
    statements = bundle(entry, entry.resolve().parent)
    source = folded = to_source(statements)
    if recipe_path is not None:
        recipe = read_sections(recipe_path)
        method = method or recipe.get("quant", {}).get("code_wrap", "")
        folded = to_source(specialize(statements, recipe))
    method = method or "brotli"
    minified = folded
    if has_library("python_minifier"):
        minified = minify(folded)
    else:
        left_out.append("minify: python_minifier is not installed")
    if method == "brotli" and not has_library("brotli"):
        method = "lzma"
        left_out.append("brotli: not installed, lzma instead")
    if method == "mix":
        minified = spell_ascii(minified)
    packed = wrap(minified, method)
    compile(packed, str(out), "exec")
    compile(minified, str(out), "exec")
    if not _holds(packed, minified, method):
        raise PackingError(
            f"{out}: expected the packed program to hold its source, found other text. Try --wrap lzma."
        )
    with atomic_file(out) as file:
        file.write(packed)
    sizes = [len(text.encode()) for text in (source, folded, minified)]
    return PackReport(str(out), *sizes, len(packed), left_out)
