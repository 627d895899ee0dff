"""What folding can know of a value, and what it has learned about a program."""

import ast
import builtins
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pack.names import PURE_DECORATORS, bound_names, by_kind, free_names, last_name, walk
from pack.specialize.syntax import changed_names, class_names, named_values, unnamed_makers

PLAIN_BASES = {"NamedTuple", "Module", "Linear"}  # whose methods nobody overrides but a class of the program
MAKERS = {
    "__new__",
    "__getattr__",
    "__getattribute__",
}  # methods by which other objects stand behind instances
PACKED_RECIPE = "PACKED_RECIPE"  # holds what the recipe changes
PACKED_ENVIRONMENT = "PACKED_ENVIRONMENT"  # holds the environment names of what it fixes, by spaces


class Style(NamedTuple):
    """What specializing leaves to a program's readers; a program that counts in bytes has none of it."""

    whole_errors: bool = False  # error messages beyond their first sentence
    annotations: bool = False
    field_help: bool = False  # of config fields that stay
    constants: bool = False  # names of upper-case constants


SMALLEST = Style()
FOR_READERS = Style(True, True, True, True)


@dataclass(frozen=True)
class Known:
    """A constant: None, bool, int, float, str or a tuple of such."""

    value: object


@dataclass(frozen=True)
class Instance:
    """An object of a class of the program; "" is some object that is not None."""

    name: str = ""


@dataclass(frozen=True)
class Items:
    """A list, or the like, of instances of a class of the program."""

    name: str


@dataclass(frozen=True)
class Table:
    """A dict display with constant keys that nothing changes."""

    node: ast.Dict


Fact = Known | Instance | Items | Table | None  # None: unknown


def join(facts: list[Fact]) -> Fact:
    """Return what is true of all values; unknown when they differ (1, 1.0 and True do)."""
    return facts[0] if facts and len({repr(fact) for fact in facts}) == 1 else None


@dataclass
class Observations:
    """What a round sees in the whole program."""

    stores: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # attribute: (class, Fact)
    calls: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # name: (facts, {name: Fact})
    escapes: set[str] = field(default_factory=set)  # names that are read other than to call them
    returns: dict[str, Fact] = field(default_factory=dict)  # function: what all its returns give
    replaced: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # field: Facts
    is_dynamic: bool = False  # attributes are set or fields replaced under computed names


@dataclass
class ProgramFacts:
    """A module and what earlier rounds proved about it."""

    tree: ast.Module
    recipe: dict
    style: Style = SMALLEST
    environment: list[str] = field(default_factory=list)  # names of fields that the recipe fixes
    configs: dict[str, dict] = field(default_factory=dict)  # config class: {field: value, or its class}
    attributes: dict[tuple[str, str], Fact] = field(default_factory=dict)  # (class, attribute)
    params: dict[tuple[str, str], Fact] = field(default_factory=dict)  # (function or class, parameter)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    pure: dict[str, Callable] = field(default_factory=dict)  # functions that can be run here
    values: dict[str, ast.expr | None] = field(default_factory=dict)  # module names bound once: their value
    candidates: dict[tuple[str, str], Fact] = field(default_factory=dict)  # of attributes: what calls give
    returns: dict[str, Instance | Items] = field(default_factory=dict)  # function: what it gives
    unseen: set[str] = field(default_factory=set)  # classes of which calls without their name make instances
    changed: set[str] = field(default_factory=set)  # names whose items the program changes
    relatives: set[str] = field(default_factory=set)  # classes for which others may stand in
    stored: set[str] | None = None  # attributes that are ever set from outside a class body; None: any

    def index(self) -> None:
        """Find the definitions; a name that is bound twice has none, a value that changes is none."""
        counts = Counter(name for node in self.tree.body for name, _ in bound_names(node))
        once = [node for node in self.tree.body if all(counts[name] == 1 for name, _ in bound_names(node))]
        self.classes = {node.name: node for node in once if isinstance(node, ast.ClassDef)}
        self.functions = {node.name: node for node in once if isinstance(node, ast.FunctionDef)}
        values = dict.fromkeys(counts)
        for node in once:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                values |= dict(named_values(node))
        self.values = values | dict.fromkeys(values.keys() & self.changed)

    def look_around(self) -> None:
        """Find what forbids to believe definitions. Folding only takes from it: once a round is enough."""
        kinds = by_kind(walk(self.tree))
        self.changed = changed_names(kinds)
        self.index()
        self.unseen = unnamed_makers(kinds)
        self.unseen = set(self.classes) if "" in self.unseen else self.unseen
        self.relatives = self.find_relatives(kinds)

    def is_nominal(self, name: str) -> bool:
        """Whether instances of a class, as far as others call them that, are of it or inherit from it."""
        node = self.classes.get(name)
        if node is None or node.keywords or not set(map(last_name, node.decorator_list)) <= PURE_DECORATORS:
            return False
        bases = set(map(last_name, node.bases)) - (PLAIN_BASES - self.classes.keys())
        return not MAKERS & {key for key, _ in class_names(node)} and all(map(self.is_nominal, bases))

    def find_relatives(self, kinds: dict[type, list]) -> set[str]:
        """Name the classes for which others may stand in: by inheritance, or as protocols and the like.

        Where a base is computed, it may be any class. `kinds` holds the program's nodes by kind.
        """
        found = set()
        for name, node in self.classes.items():
            bases = set(map(last_name, node.bases))
            found |= {name} if bases & self.classes.keys() or not self.is_nominal(name) else set()
        imports = [*kinds[ast.Import], *kinds[ast.ImportFrom]]
        imported = {name for node in imports for name, _ in bound_names(node)}
        known = self.classes.keys() | imported | vars(builtins).keys() - {"type"}
        named = [set().union(*map(free_names, node.bases)) for node in kinds[ast.ClassDef]]
        made = [node for node in kinds[ast.Call] if len(node.args) == 3 and last_name(node) == "type"]
        for names in [*named, *({"type"} for _ in made)]:
            found |= names & self.classes.keys() if names <= known else set(self.classes)
        return found
