"""The program of a folder: its layers after unwrapping, the local files it takes in, and what it may do."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from audit.folder import ARTIFACTS, SubmissionFolder
from audit.reach import MARKS, Live, last_name, live_nodes, read_settings
from audit.unwrap import Constants, Unknown, Unreadable, parse_source

MAX_LAYERS = 12
MAX_SOURCE = 1_000_000  # bytes of one layer
MAX_NODES = 120_000  # syntax nodes of all layers; the contest's largest program has 37,000
CODE_SUFFIXES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".so", ".pyc", ".sh", ".ptx"}
TEXT_SUFFIXES = {".md", ".log", ".txt", ".json", ".toml", ".yml", ".yaml", ".png"}  # no payload if opened
TOKENIZER_SUFFIXES = {".model", ".vocab"}  # data by the contest's practice, not counted
OPAQUE_CALLS = ("marshal.loads", "types.CodeType", "types.FunctionType")
ENVIRONMENT = re.compile(r"(?:^|[\s`])([A-Z][A-Z0-9_]+)=([^\s`\\]+)")


class Program(NamedTuple):
    """A program as read; `error` says why there is none."""

    entry: str
    error: str
    layers: dict[str, ast.Module]  # name -> tree; an unwrapped layer is named "train_gpt.py > exec"
    opaque: list[str]  # code that only running it would show
    newer: list[str]  # layers in a syntax that this Python cannot parse
    live: list[Live]
    num_dead: int  # nodes that the configuration rules out
    code: dict[str, int]  # local code files that it takes in -> bytes on disk
    data: dict[str, int]  # other local files that it names, tokenizers and text excepted -> bytes

    @property
    def code_bytes(self) -> int:
        return sum(self.code.values())


class Unwrapped:
    """What following a program from its entry has brought up."""

    def __init__(self, folder: SubmissionFolder):
        self.folder = folder
        self.layers: dict[str, ast.Module] = {}
        self.opaque: list[str] = []
        self.newer: list[str] = []
        self.error = ""  # why the entry itself is no Python
        self.read: set[str] = set()  # files whose text is executed
        self.nodes_left = MAX_NODES

    def read_local(self, path: str) -> bytes:
        """Return the bytes of a file of the folder that the program executes."""
        plain = path.removeprefix("./")
        if plain not in self.folder.files or self.folder.files[plain].kind != "file":
            raise Unknown(f"file {path[:60]}")
        self.read.add(plain)
        return self.folder.read(plain)

    def follow(self, entry: str) -> None:
        """Parse the entry and, in turn, what each layer executes and imports locally."""
        todo: list[tuple[str, str, bytes | str]] = [(entry, entry, self.folder.read(entry))]
        while todo:
            name, home, source = todo.pop(0)
            if name in self.layers:
                continue
            if len(self.layers) >= MAX_LAYERS or len(source) > MAX_SOURCE:
                self.opaque.append(f"{name}: {len(source):,} bytes: over this audit's bounds")
                continue
            try:
                tree = parse_source(source)
            except SyntaxError as error:
                self._blame(name, error, is_entry=name == entry)
                continue
            self.nodes_left -= sum(1 for _ in ast.walk(tree))
            if self.nodes_left < 0:
                self.opaque.append(f"{name}: more than {MAX_NODES:,} syntax nodes: over this audit's bounds")
                return
            self.layers[name] = tree
            todo += self._inner_layers(name, home)

    def _blame(self, name: str, error: SyntaxError, is_entry: bool) -> None:
        message = f"{name}:{error.lineno}: {error.msg}"
        if sys.version_info < (3, 12) and (error.msg or "").startswith("f-string"):
            self.newer.append(message)
        elif is_entry:
            self.error = message
        else:
            self.opaque.append(message)

    def _inner_layers(self, name: str, home: str) -> Iterator[tuple[str, str, bytes | str]]:
        """Yield (name, file, source) of what a layer of the file `home` executes and imports locally."""
        constants = Constants(self.layers[name], home, self.read_local)
        for node in ast.walk(self.layers[name]):
            called = constants.dotted(node.func) if isinstance(node, ast.Call) else ""
            if called in OPAQUE_CALLS:
                self.opaque.append(f"{name}:{node.lineno}: {called}")
            if called == "exec" and node.args:
                try:
                    inner = constants.value(node.args[0])
                except Unreadable as problem:
                    self.opaque.append(f"{name}:{node.lineno}: exec of {problem}")
                except Unknown:
                    self.opaque.append(f"{name}:{node.lineno}: exec of a computed value")
                else:
                    if isinstance(inner, bytes | str) and not constants.learn(inner):
                        yield f"{name} > exec", home, inner
            for path in _local_files(self.folder, node):
                if path.endswith(".py"):
                    yield path, path, self.folder.read(path)


def find_entry(folder: SubmissionFolder) -> str:
    """Return train_gpt.py, else the largest train*.py, else the largest script; "" without any."""
    scripts = [path for path in folder.named("*.py") if "/" not in path]
    if "train_gpt.py" in scripts:
        return "train_gpt.py"
    trainers = [path for path in scripts if path.startswith("train")]
    return max(trainers or scripts, key=lambda path: folder.files[path].size, default="")


def read_program(folder: SubmissionFolder, logged: dict[str, str], readme: str) -> Program:
    """Unwrap and follow the entry script; `logged` is the configuration that ran, by its log."""
    entry = find_entry(folder)
    if not entry:
        return Program("", "no Python script", {}, [], [], [], 0, {}, {})
    try:
        return _read_program(folder, entry, logged, readme)
    except RecursionError:
        opaque = [f"{entry}: nested too deeply for a reader"]
        return Program(entry, "", {}, opaque, [], [], 0, {entry: folder.files[entry].size}, {})


def _read_program(folder: SubmissionFolder, entry: str, logged: dict[str, str], readme: str) -> Program:
    found = Unwrapped(folder)
    found.follow(entry)
    layers = found.layers
    environment = {} if logged else dict(ENVIRONMENT.findall(readme))
    settings = read_settings(list(layers.values()), logged, environment)
    live = live_nodes(layers, settings)
    names = {entry} | found.read | {path for item in live for path in _local_files(folder, item.node)}
    names |= {layer for layer in layers if layer in folder.files}
    sizes = {path: folder.files[path].size for path in sorted(names)}
    suffix = {path: PurePosixPath(path).suffix for path in sizes}
    code = {path: size for path, size in sizes.items() if suffix[path] in CODE_SUFFIXES}
    passive = CODE_SUFFIXES | TEXT_SUFFIXES | TOKENIZER_SUFFIXES
    artifacts = set(folder.named(ARTIFACTS))  # K6 weighs them
    data = {p: size for p, size in sizes.items() if suffix[p] not in passive and p not in artifacts}
    num_dead = sum(not isinstance(n, MARKS) for tree in layers.values() for n in ast.walk(tree)) - len(live)
    return Program(entry, found.error, layers, found.opaque, found.newer, live, num_dead, code, data)


def _local_files(folder: SubmissionFolder, node: ast.AST) -> Iterator[str]:
    """Yield the folder's files that a node takes in: an import, or a string inside a call's arguments."""
    modules = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = node.module or ""
        modules = [package, *(f"{package}.{alias.name}".lstrip(".") for alias in node.names)]
    for module in modules:
        path = module.replace(".", "/")
        yield from (file for file in (f"{path}.py", f"{path}/__init__.py") if file in folder.files)
    if isinstance(node, ast.Call):
        for argument in [*node.args, *(key.value for key in node.keywords)]:
            for part in ast.walk(argument) if not isinstance(argument, ast.Call) else [argument]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield from _named_files(folder, part.value)


def _named_files(folder: SubmissionFolder, text: str) -> list[str]:
    """The folder's files that a string names: by path, else by bare name."""
    plain = text.removeprefix("./")
    if not plain or len(plain) > 200 or "." not in plain:
        return []
    if plain in folder.files:
        return [plain]
    return [path for path in folder.files if path.rpartition("/")[2] == plain]


def third_party_imports(program: Program) -> set[str]:
    """Return the top names of live imports that neither Python nor the folder brings along."""
    found = set()
    for _, _, node in program.live:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    local = {path.removesuffix(".py").partition("/")[0] for path in program.code}
    return found - local - set(sys.stdlib_module_names)


# ----------------------------------------------------------------------------------------------------------
# Patterns that deserve a question. Names can be changed and look-alikes are legal: a match is a suspicion.
# ----------------------------------------------------------------------------------------------------------

TARGET_NAME = re.compile(r"(?:^|_)(?:tgt|target|targets|tgts|next_tok|next_token)(?:$|_|s$|\d)")
VAL_NAME = re.compile(r"^val_(?:tokens|data|stream|ids|shard|shards)$")
NETWORK = {
    "requests",
    "urllib",
    "urllib3",
    "http",
    "socket",
    "ftplib",
    "huggingface_hub",
    "kernels",
    "aiohttp",
}
COMMANDS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"}
COMMANDS |= {"subprocess.check_call", "os.system", "os.popen"}
HARMLESS_COMMANDS = {"nvidia-smi", "git", "nvcc", "pyminify"}  # they look or measure


class Suspicion(NamedTuple):
    """A pattern found in live code."""

    what: str
    where: str
    rule: str


def suspicions(program: Program) -> list[Suspicion]:
    """Return the suspicious patterns of the live code, at most one of a kind and line."""
    found: dict[tuple, Suspicion] = {}
    for layer, function, node in program.live:
        for what, rule in _patterns(node):
            where = f"{layer}:{node.lineno}" + (f" in {function.name}" if function else "")
            found[what, layer, node.lineno] = Suspicion(what, where, rule)
    for function_name, where in train_on_val(program):
        what = f"{function_name} takes a gradient on validation tokens before the artifact is written"
        rule = "C3; README: CANNOT access validation data during training"
        found[what, where] = Suspicion(what, where, rule)
    return list(found.values())


def _patterns(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
        products = [x for x in ast.walk(node) if isinstance(x, ast.BinOp) and isinstance(x.op, ast.Mult)]
        if any(_names(product, TARGET_NAME) for product in products):
            yield "a hash key holds the target", "C2: only the true token is looked up, nothing is normalized"
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in sorted({name.partition(".")[0] for name in names} & NETWORK):
            yield f"imports {name}", "README: no external downloads or network calls during evaluation"


def _names(node: ast.AST, pattern: re.Pattern) -> bool:
    """Whether a name or attribute below a node matches."""
    return any(pattern.search(last_name(inner)) for inner in ast.walk(node))


def external_commands(program: Program) -> set[str]:
    """Return the programs that live code starts; "?" for a computed one."""
    found = set()
    for _, _, node in program.live:
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in COMMANDS:
            first = node.args[0]
            if isinstance(first, ast.List) and first.elts:
                first = first.elts[0]
            found.add(first.value.split(" ")[0] if isinstance(first, ast.Constant) else "?")
    return found - HARMLESS_COMMANDS


def train_on_val(program: Program) -> list[tuple[str, str]]:
    """Return (function, where) of calls, above the writing of the artifact, that train on validation tokens.

    In a function that calls both: the first must reach a `.backward()` whose loss comes from validation
    tokens, the second must reach torch.save or a file opened for writing bytes.
    """
    by_function: dict[Any, list[Live]] = {}
    for item in program.live:
        by_function.setdefault(item.function, []).append(item)
    named: dict[str, list] = {}
    for function in by_function:
        named.setdefault(function.name if function else "<module>", []).append(function)
    calls = {
        function: [(last_name(n.func), n.lineno) for _, _, n in items if isinstance(n, ast.Call)]
        for function, items in by_function.items()
    }
    stored = {f: [i.node.lineno for i in items if _is_write(i.node)] for f, items in by_function.items()}
    trains = _reaching({f for f, items in by_function.items() if _learns_from_val(items)}, calls)
    writes = _reaching({f for f, lines in stored.items() if lines}, calls)
    found = set()
    for function, items in by_function.items():
        last = [line for name, line in calls[function] if writes & set(named.get(name, ()))]
        latest = max(last + stored[function], default=0)
        for name, line in calls[function]:
            if line < latest and trains & set(named.get(name, ())):
                found.add((name, f"{items[0].layer}:{line}"))
    return sorted(found)


def _reaching(seeds: set, calls: dict) -> set:
    """Return the functions from which a chain of calls by name leads to one of `seeds`."""
    found = set(seeds)
    while True:
        names = {function.name for function in found if function}
        more = {f for f, called in calls.items() if any(name in names for name, _ in called)}
        if more <= found:
            return found
        found |= more


def _is_write(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    modes = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
    return ast.unparse(node.func) == "torch.save" or (last_name(node.func) == "open" and modes == ["wb"])


def _learns_from_val(items: list[Live]) -> bool:
    """Whether a `.backward()` here works on a loss that local assignments derive from val tokens."""
    losses, bound = [], []
    for node in (item.node for item in items):
        match node:
            case ast.Call(func=ast.Attribute(value=loss, attr="backward")):
                losses.append(loss)
            case ast.Assign():
                bound += [(target, node.value) for target in node.targets]
            case ast.AnnAssign() if node.value is not None:
                bound.append((node.target, node.value))
            case ast.For():
                bound.append((node.target, node.iter))
    tainted: set[str] = set()

    def is_tainted(node: ast.expr) -> bool:
        return _names(node, VAL_NAME) or bool(tainted & _plain_names(node))

    while losses:
        more = set().union(*(_plain_names(target) for target, value in bound if is_tainted(value)))
        if more <= tainted:
            break
        tainted |= more
    return any(map(is_tainted, losses))


def _plain_names(node: ast.expr) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
