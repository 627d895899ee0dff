"""Print a changed syntax tree near its source: a statement that nothing changed is copied, comments and all.

A changed statement is printed from the tree with the comments that stood on its lines; of one with blocks,
the header and each statement in them are judged alone. Formatting comes after: lines need only be valid.
"""

import ast
import copy
import io
import re
import tokenize

from pack.names import Function, walk
from pack.printing import to_text
from pack.specialize.syntax import clone, is_option, is_string, parameters

LONGEST_PIECE = 88  # characters of a printed string that stand on one line
FIELD = r"\{\{|\}\}|\{(?:[^{}]|\{[^{}]*\})*\}|"  # of a formatted string
WORD = r"(?:%s\\[^n]|[^ \\])*(?:\\n| +|$)"  # of a string's spelling, and the space behind it


def place(node: ast.AST) -> tuple[int, ...]:
    """Name a statement of a file by where it is."""
    return tuple(getattr(node, name, 0) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset"))


def first_line(node: ast.stmt) -> int:
    """Return the line on which a statement starts, decorators included."""
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])


def is_right(lines: list[str], node: ast.stmt) -> bool:
    """Whether lines, indented or not, are just this statement."""
    nested = "".join(lines[:1]).startswith(" ")
    try:
        made = ast.parse("\n".join(["if 1:"] * nested + lines)).body
    except SyntaxError:
        return False
    made = made[0].body if nested else made
    return len(made) == 1 and to_text(made[0]) == to_text(node)


class Layout:
    """Prints statements of one file. Comments that are taken are not printed again."""

    def __init__(self, text: str):
        self.lines, self.tree = text.split("\n"), ast.parse(text)
        nodes = [node for node in walk(self.tree) if isinstance(node, ast.stmt | ast.ExceptHandler)]
        self.nodes = {place(node): node for node in nodes}
        self.outer = {place(node.body[0]): node for node in nodes if isinstance(node, ast.If)}
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found = [token for token in tokens if token.type == tokenize.COMMENT]
        self.columns = {token.start[0]: token.start[1] for token in found}
        self.comments = {token.start[0]: token.string for token in found}

    def find(self, node: ast.AST) -> ast.AST | None:
        """Return what a statement was in the file."""
        old = self.nodes.get(place(node))
        became_constant = isinstance(old, ast.AnnAssign) and isinstance(node, ast.Assign)
        return old if type(old) is type(node) or became_constant else None

    def is_between(self, number: int) -> bool:
        """Whether a line holds no code: blank, or a comment alone."""
        line = self.lines[number - 1]
        return number > 0 and not line[: self.columns.get(number)].strip()

    def code_above(self, number: int) -> int:
        """Return the nearest line above one that holds code; 0 where none does."""
        return next(at for at in range(number - 1, -1, -1) if not self.is_between(at))

    def leading(self, old: ast.stmt | None) -> list[str]:
        """Take the comment lines above a statement, and those above a decided `if` that it was first in."""
        if old is None:
            return []
        found = [line for line in self.leading(self.outer.get(place(old))) if line]
        for number in range(self.code_above(first_line(old)) + 1, first_line(old)):
            if number not in self.columns:
                found.append("")
            elif self.columns[number] == old.col_offset and number in self.comments:
                found.append(self.comments.pop(number))
        return found

    def copied(self, old: ast.stmt | None, last: int, indent: int) -> list[str]:
        """Copy a statement's lines up to the last wanted, moved to an indentation."""
        lines = self.lines[first_line(old) - 1 : last] if old else []
        shift = indent - old.col_offset if old else 0
        cuts = [min(max(-shift, 0), len(line) - len(line.lstrip())) for line in lines]
        return [" " * shift + line[cut:] for line, cut in zip(lines, cuts)]

    def block(self, body: list[ast.stmt], indent: int) -> list[str]:
        """Print statements below each other."""
        lines = [line for node in body for line in self.statement(node, indent)]
        return lines[not lines[0] :]

    def statement(self, node: ast.stmt, indent: int) -> list[str]:
        """Print a statement with its comments."""
        old = self.find(node)
        lines = [" " * indent + line if line else "" for line in self.leading(old)]
        copied = self.copied(old, old.end_lineno if old else 0, indent)
        if is_right(copied, node):
            return lines + copied
        has_blocks = isinstance(getattr(node, "body", None), list)
        return lines + (self.compound if has_blocks else self.simple)(old, node, indent)

    def simple(self, old: ast.stmt | None, node: ast.stmt, indent: int) -> list[str]:
        """Print a changed statement without blocks, with the comments on those of its lines that are left."""
        text, pad, notes = printed(node), " " * indent, []
        left = {number for one in walk(node) for number in (place(one)[0], place(one)[2])}
        for number in range(old.lineno, old.end_lineno + 1) if old else []:
            code = next(at for at in range(number, old.end_lineno + 1) if not self.is_between(at))
            notes += [self.comments[number]] if number in self.comments and code in left else []
        if old and is_option(old) and isinstance(node, ast.Assign) and len(old.value.args) > 2:
            notes = [f"# {old.value.args[2].value}"]  # the help of a field that became a constant
        return [f"{pad}{text}  {notes[0]}"] if len(notes) == 1 else [pad + line for line in [*notes, text]]

    def compound(self, old: ast.AST | None, node: ast.AST, indent: int, keyword: str = "if") -> list[str]:
        """Print a statement that has blocks; `keyword` stands for its `if`."""
        lines, pad = self.header(old, node, indent), " " * indent
        lines[0] = re.sub(r"^( *)if\b", rf"\1{keyword}", lines[0])
        lines += self.block(node.body, indent + 4)
        for handler in getattr(node, "handlers", []):
            lines += self.compound(self.find(handler), handler, indent)
        for word, name in (("else", "orelse"), ("finally", "finalbody")):
            body = getattr(node, name, [])
            if len(body) == 1 and isinstance(body[0], ast.If) and isinstance(node, ast.If):
                was = self.find(body[0])
                lines += [pad + line for line in self.leading(was) if line]
                lines += self.compound(was, body[0], indent, "elif")
            elif body:
                lines += [f"{pad}{word}:{self.note(body)}", *self.block(body, indent + 4)]
        return lines

    def note(self, body: list[ast.stmt]) -> str:
        """Take the comment behind the colon above a block."""
        old = self.find(body[0])
        number = self.code_above(first_line(old)) if old else 0
        return "  " + self.comments.pop(number) if number in self.comments else ""

    def header(self, old: ast.AST | None, node: ast.AST, indent: int) -> list[str]:
        """Print a compound statement up to its colon."""
        pad, bare = " " * indent, copy.copy(node)
        for name in {"body", "handlers", "orelse", "finalbody"} & set(node._fields):
            setattr(bare, name, [ast.Pass()] if name == "body" else [])
        if isinstance(node, ast.Try):
            lines = ["try:"]
        elif isinstance(node, ast.ExceptHandler):
            lines = to_text(bare).strip().split("\n")[:1]
        else:
            copied = self.copied(old, self.code_above(first_line(old.body[0])) if old else 0, indent)
            copied[:1] = [re.sub(r"^( *)elif\b", r"\1if", line) for line in copied[:1]]
            if is_right([*copied, f"{pad}    pass"], bare):
                return copied
            lines = to_text(ast.fix_missing_locations(bare)).split("\n")[:-1]
        if isinstance(node, Function) and old is not None:
            lines = self.with_notes(lines, bare, old)
        lines[-1] += self.note(node.body)
        return [pad + line for line in lines]

    def with_notes(self, lines: list[str], bare: ast.stmt, old: ast.stmt) -> list[str]:
        """Put the comments that the file has behind parameters into a signature, printed on one line."""
        *decorators, text = lines
        notes = {one.arg: self.comments.get(one.end_lineno) for one in parameters(old.args)}
        made = ast.parse(text + " pass").body[0]
        args = sorted(parameters(made.args), key=place)
        end = text.rindex(")", 0, made.returns.col_offset if made.returns else None)
        for arg, at in reversed([*zip(args, [*(one.col_offset for one in args[1:]), end])]):
            text = f"{text[:at]}  {notes[arg.arg]}\n{text[at:]}" if notes.get(arg.arg) else text
        spread = [*decorators, *text.split("\n")]
        return spread if is_right([*spread, "    pass"], bare) else lines


def printed(node: ast.stmt) -> str:
    """Print a statement from the tree, long strings as several that Python joins."""
    strings = LongStrings()
    text = to_text(strings.visit(clone(node)))
    text = re.sub(r"\(long_string_(\d+)\)|long_string_(\d+)\b", strings.text_of, text)
    return text if is_right(text.split("\n"), node) else to_text(node)


class LongStrings(ast.NodeTransformer):
    """Puts names in the places of long strings; `found` are their texts, cut between words and lines."""

    def __init__(self):
        self.found: list[str] = []

    def visit_JoinedStr(self, node: ast.JoinedStr | ast.Constant) -> ast.expr:
        text = to_text(node)
        if len(text) <= LONGEST_PIECE:
            return node
        head, quote, body = re.fullmatch(r"(f?)('''|\"\"\"|'|\")(.*)\2", text, re.DOTALL).groups()
        pieces = [""]
        for word in filter(None, re.findall(WORD % (FIELD if head else ""), body)):
            if pieces[-1].endswith("\\n") or len(pieces[-1] + word) > LONGEST_PIECE - 3:
                pieces.append("")
            pieces[-1] += word
        heads = [head * ("{" in piece or "}" in piece) for piece in pieces]
        self.found.append(" ".join(f"{head}{quote}{piece}{quote}" for head, piece in zip(heads, pieces)))
        return ast.Name(f"long_string_{len(self.found) - 1}", ast.Load())

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return self.visit_JoinedStr(node) if is_string(node) else node

    def text_of(self, name: re.Match) -> str:
        """Return the text that a name stands for, in brackets."""
        return f"({self.found[int(name[1] or name[2])]})"
