"""Fold what a recipe fixes: a branch that the recipe can never take is not shipped.

`specialize_tree` writes the recipe into the config classes, replaces what is thereby constant, takes the
branches that constants decide and drops what nothing names any more, until nothing changes. What cannot be
proved constant stays. Error messages end with their first sentence, and annotations go; a Style keeps them.
PACKED_RECIPE becomes all that the recipe changes, PACKED_ENVIRONMENT the environment names of all that it
fixes; of these fields the classes keep, as constants, what the program still reads. Taken on trust, all of it
house style:

- A config class declares its fields with `option` (formats/recipe.py); a field that is not live has the
  recipe's value in every instance. A class that the program also makes with arguments of its own is left
  alone, and so is a field that it gives to `replace`.
- An annotation that names a class of the program is true.
- Reading a name or an attribute has no effect.
- A table with an upper-case name changes only where the program writes `NAME[...] = value`, `NAME.update()`
  or the like; the keys that look it up are spelled in the program.
- A table has the keys that it is asked for, `get` aside; an attribute is stored before it is read.
- An argument or a condition that nothing needs would not have failed; calls give methods what they take.
- A list that a comprehension fills with instances gets no others from a function that it is given to.
- A function is not replaced through `globals()`.
- A computed attribute name is spelled in a string, or matches the f-string given to getattr.
- Nobody but the program calls its methods, but for the hooks of torch.nn.Module (pack/specialize/drop.py).
"""

import ast

from tqdm import tqdm

from pack.names import bound_names, by_kind, drop_annotations, needed_statements, walk
from pack.specialize.annotations import trim_annotations
from pack.specialize.drop import drop_entries, drop_imports, drop_members, drop_rows
from pack.specialize.errors import shorten_errors
from pack.specialize.facts import PACKED_ENVIRONMENT, PACKED_RECIPE, SMALLEST, ProgramFacts, Style
from pack.specialize.infer import infer, infer_pure
from pack.specialize.inline_config import inline_config
from pack.specialize.params import drop_parameters
from pack.specialize.specializer import Specializer
from pack.specialize.syntax import literal, outline

MAX_ROUNDS = 50
ROUNDS = "{desc}: round {n}, {elapsed}"  # usually eleven


def specialize_tree(tree: ast.Module, recipe: dict, style: Style = SMALLEST) -> None:
    """Fold a module in place; statements of its top level that stay keep their identity."""
    program = ProgramFacts(tree, {section: dict(values) for section, values in recipe.items()}, style)
    if not style.whole_errors:
        shorten_errors(tree)
    program.look_around()
    inline_config(program)
    packed = {PACKED_RECIPE: program.recipe, PACKED_ENVIRONMENT: " ".join(program.environment)}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for name in packed.keys() & {name for name, _ in bound_names(node)}:
                node.value = literal(packed[name])
    program.look_around()
    infer_pure(program)
    before = None
    for _ in tqdm(range(MAX_ROUNDS), desc="fold", unit=" rounds", bar_format=ROUNDS, disable=None):
        folder = Specializer(program)
        tree.body = folder.block(tree.body)
        program.index()
        drop_members(program)
        program.index()
        kinds = by_kind(walk(tree))
        drop_rows(program, kinds)
        drop_entries(program, kinds)
        drop_parameters(program, kinds)
        tree.body = [tree.body[i] for i in needed_statements(tree.body, set())]
        drop_imports(tree)
        program.look_around()
        infer(program, folder.seen)
        facts = (program.attributes, program.candidates, program.params, program.returns)
        state = outline(tree), repr((facts, sorted(program.pure)))
        if state == before:
            break
        before = state
    if style.annotations:
        trim_annotations(tree)
    else:
        drop_annotations(tree)  # they were facts; what they alone name goes, too
        tree.body = [tree.body[i] for i in needed_statements(tree.body, set())]
    drop_imports(tree)
    ast.fix_missing_locations(tree)
