"""Print a changed syntax tree in the words of its source: layout and comments stay where the code stayed.

A node that folding left alone keeps its position, so its text is copied. Where a statement changed, the text
of the parts that changed is replaced in place; what cannot be replaced so is printed from the tree. Every
statement that is put together is parsed again and must be the one that was asked for.
"""

import ast
import copy
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import accumulate

from pack.names import Function, children, walk
from pack.printing import to_text
from pack.specialize.syntax import is_option

INDENT = "    "
BLOCKS = ("body", "handlers", "orelse", "finalbody")
LOOSE = (ast.BoolOp, ast.BinOp, ast.Compare, ast.IfExp, ast.UnaryOp, ast.Lambda, ast.NamedExpr, ast.Yield)
LISTS = (ast.Call, ast.Dict, ast.Tuple, ast.List, ast.Set, ast.BoolOp)
LONGEST_PIECE = 88  # characters of a string, printed, that stand on one line
Edit = tuple[int, int, str]  # offsets in the text, what stands there instead


def is_same(first, second) -> bool:
    """Whether two trees are equal, wherever they stand."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(is_same, first, second))
    if not isinstance(first, ast.AST) or not isinstance(second, ast.AST):
        return type(first) is type(second) and first == second
    if type(first) is not type(second):
        return False
    names = (name for name in first._fields if name not in ("ctx", "kind", "type_comment"))
    return all(is_same(getattr(first, name, None), getattr(second, name, None)) for name in names)


def place(node: ast.AST) -> tuple:
    """Name a node of a file by what and where it is."""
    ends = (getattr(node, "end_lineno", 0), getattr(node, "end_col_offset", 0))
    return (type(node), getattr(node, "lineno", 0), getattr(node, "col_offset", 0), *ends)


def first_line(node: ast.stmt) -> int:
    """Return the line on which a statement starts, decorators included."""
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])


def without_blocks(node: ast.stmt) -> ast.stmt:
    """Return a compound statement's header: with nothing in its blocks."""
    made = copy.copy(node)
    for name in BLOCKS:
        if hasattr(made, name):
            setattr(made, name, [ast.Pass()] if name == "body" else [])
    return made


def string_lines(text: str) -> set[int]:
    """Return the lines of a text that begin inside a string."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING or "FSTRING" in tokenize.tok_name[token.type]:
            found.update(range(token.start[0] + 1, token.end[0] + 1))
    return found


def shifted(lines: list[str], shift: int, fixed: set[int]) -> list[str]:
    """Move lines by so many columns, but those of these numbers."""
    made = []
    for number, line in enumerate(lines, start=1):
        if line and number not in fixed:
            line = " " * shift + line if shift > 0 else line[min(-shift, len(line) - len(line.lstrip())) :]
        made.append(line)
    return made


def moved(text: str, shift: int) -> list[str]:
    """Return the lines of a statement moved by so many columns; none where it is not whole."""
    try:
        return shifted(text.split("\n"), shift, string_lines(text + "\n") if shift else set())
    except (tokenize.TokenError, SyntaxError):
        return []


def string_pieces(node: ast.JoinedStr | ast.Constant) -> list[str]:
    """Print a string; a long one as several that Python joins, cut behind line ends and between words."""
    whole = to_text(node)
    is_text = isinstance(node, ast.JoinedStr) or isinstance(node.value, str)
    if len(whole) <= LONGEST_PIECE or not is_text:
        return [whole]
    parts: list[ast.expr] = []
    for part in node.values if isinstance(node, ast.JoinedStr) else [node]:
        words = re.findall(r"[^ \n]*(?:\n| +|$)", part.value) if isinstance(part, ast.Constant) else [part]
        parts += [word if isinstance(word, ast.AST) else ast.Constant(word) for word in words if word]
    pieces: list[str] = []
    run: list[ast.expr] = []
    for part in parts:
        ends_line = bool(run) and isinstance(run[-1], ast.Constant) and run[-1].value.endswith("\n")
        if run and (ends_line or len(printed_string([*run, part])) > LONGEST_PIECE):
            pieces.append(printed_string(run))
            run = []
        run.append(part)
    return [*pieces, printed_string(run)]


def printed_string(parts: list[ast.expr]) -> str:
    """Print parts of an f-string as one string."""
    merged: list[ast.expr] = []
    for part in parts:
        if merged and isinstance(part, ast.Constant) and isinstance(merged[-1], ast.Constant):
            merged[-1] = ast.Constant(merged[-1].value + part.value)
        else:
            merged.append(part)
    plain = len(merged) == 1 and isinstance(merged[0], ast.Constant)
    return to_text(merged[0] if plain else ast.JoinedStr(merged))


class SourceText:
    """A file: its text, which node stands where, and its comments."""

    def __init__(self, text: str):
        self.text, self.lines = text, text.split("\n")
        self.starts = [0, *accumulate(len(line) + 1 for line in self.lines)]
        self.tree = ast.parse(text)
        self.nodes = {place(node): node for node in walk(self.tree) if hasattr(node, "lineno")}
        self.comments: dict[int, tuple[int, str]] = {}  # line -> (column, text)
        self.in_string = string_lines(text)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                self.comments[token.start[0]] = (token.start[1], token.string)
        self.outer: dict[int, ast.stmt] = {}  # id of a block's first statement -> the `if` it stands in
        self.last: set[int] = set()  # ids of last statements of blocks
        for node in walk(self.tree):
            for name in BLOCKS:
                body = getattr(node, name, None)
                if isinstance(body, list) and body:
                    self.last.add(id(body[-1]))
                    if isinstance(node, ast.If) and name == "body":
                        self.outer[id(body[0])] = node

    def find(self, node: ast.AST) -> ast.AST | None:
        """Return the node of the file that a node was."""
        return self.nodes.get(place(node))

    def start(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def is_own_line(self, number: int) -> bool:
        """Whether a line holds a comment and nothing else."""
        return number in self.comments and not self.lines[number - 1][: self.comments[number][0]].strip()

    def is_blank(self, number: int) -> bool:
        return not self.lines[number - 1].strip() and number not in self.in_string

    def above(self, number: int) -> int:
        """Return the first of the comment lines and blank lines right above a line."""
        while number > 1 and (self.is_own_line(number - 1) or self.is_blank(number - 1)):
            number -= 1
        return number

    def leading(self, node: ast.stmt) -> list[str]:
        """Return the comment lines above a statement, and blank lines as ""."""
        first = first_line(node)
        found = []
        for number in range(self.above(first), first):
            if self.is_blank(number):
                found.append("")
            elif self.comments[number][0] == node.col_offset:
                found.append(self.comments[number][1])
        return found

    def trailing(self, node: ast.stmt) -> list[str]:
        """Return the comment lines below the last statement of a block."""
        found, number = [], node.end_lineno + 1
        while id(node) in self.last and number < len(self.lines):
            if self.is_own_line(number) and self.comments[number][0] == node.col_offset:
                found.append(self.comments[number][1])
            elif not self.is_blank(number):
                break
            number += 1
        return found

    def header_end(self, node: ast.stmt) -> int:
        """Return the line of a compound statement's colon."""
        return self.above(first_line(node.body[0])) - 1

    def segment(self, first: int, last: int, shift: int) -> list[str]:
        """Return lines moved by so many columns, what is inside strings left where it is."""
        return shifted(self.lines[first - 1 : last], shift, {one - first + 1 for one in self.in_string})

    # What differs between a node of the file and what became of it, as edits of the text

    def edited(self, old: ast.AST, new: ast.AST, first: int, last: int, brackets: bool) -> str | None:
        """Return the text between two offsets with what differs replaced; None where it cannot be."""
        edits = self.differences(old, new, brackets)
        if edits is None:
            return None
        text, at = "", first
        for start, end, piece in sorted(edits):
            if not (at <= start <= end <= last):
                return None
            text, at = text + self.text[at:start] + piece, end
        return text + self.text[at:last]

    def differences(self, old: ast.AST, new: ast.AST, brackets: bool) -> list[Edit] | None:
        """List what turns a node's text into that of another; None where only a new text does."""
        if is_same(old, new):
            return []
        if type(old) is not type(new) or isinstance(old, ast.JoinedStr | ast.Constant | ast.arguments):
            return None
        edits: list[Edit] = []
        for olds, news in self.paired_fields(old, new):
            if len(olds) != len(news):
                found = self.removals(old, olds, news, brackets)
            else:
                found = self.replacements(olds, news, brackets)
            if found is None:
                return None
            edits += found
        return edits

    def paired_fields(self, old: ast.AST, new: ast.AST) -> Iterator[tuple[list, list]]:
        """Yield the parts of two nodes of one kind, list by list."""
        if isinstance(old, ast.Call):
            yield [old.func], [new.func]
            yield [*old.args, *old.keywords], [*new.args, *new.keywords]
            return
        if isinstance(old, ast.Dict):
            yield list(zip(old.keys, old.values)), list(zip(new.keys, new.values))
            return
        for name in old._fields:
            if name not in ("ctx", "kind", "type_comment", *(BLOCKS if isinstance(old, ast.stmt) else ())):
                parts = [getattr(node, name, None) for node in (old, new)]
                yield tuple(part if isinstance(part, list) else [part] for part in parts)

    def replacements(self, olds: list, news: list, brackets: bool) -> list[Edit] | None:
        """List the edits that turn parts into as many others."""
        edits: list[Edit] = []
        for old, new in zip(olds, news):
            if isinstance(old, tuple):
                found = self.replacements(list(old), list(new), brackets)
            else:
                found = self.replacement(old, new, brackets)
            if found is None:
                return None
            edits += found
        return edits

    def replacement(self, old, new, brackets: bool) -> list[Edit] | None:
        """List the edits that turn one part into another."""
        if is_same(old, new):
            return []
        if not isinstance(old, ast.AST) or not isinstance(new, ast.AST):
            return None
        found = self.differences(old, new, brackets)
        if found is not None or not isinstance(old, ast.expr):
            return found
        text = self.expression(new, brackets)
        if brackets and (isinstance(new, LOOSE) or "\n" in text):
            text = f"({text})"
        return [(self.start(old), self.end(old), text)]

    def expression(self, node: ast.expr, brackets: bool) -> str:
        """Print an expression: in the words of the file where it is from there."""
        old = self.find(node)
        if old is not None:
            text = self.edited(old, node, self.start(old), self.end(old), brackets)
            if text is not None and not ("\n" in text and isinstance(node, LOOSE)):
                return text
        if isinstance(node, ast.JoinedStr | ast.Constant):
            return "\n".join(string_pieces(node))
        return to_text(node)

    def removals(self, owner: ast.AST, olds: list, news: list, brackets: bool) -> list[Edit] | None:
        """List the edits that leave some items of a list, perhaps changed."""
        kept = self.matched(olds, news)
        if kept is None or not news or not isinstance(owner, LISTS):
            return None
        edits = self.replacements([olds[i] for i in kept], news, brackets)
        if edits is None:
            return None
        spans = [self.span(item) for item in olds]
        tail = max(kept) + 1
        for i in range(tail):
            if i not in kept:
                edits.append((self.lead(spans[i][0]), self.lead(spans[i + 1][0]), ""))
        if tail < len(olds):
            edits.append(self.tail_removal(spans, tail, isinstance(owner, ast.Tuple) and len(news) == 1))
        return edits

    def tail_removal(self, spans: list[tuple[int, int]], tail: int, keeps_comma: bool) -> Edit:
        """Return the edit that removes the last items, with their comments, not those of the item before."""
        before, end = spans[tail - 1][1], spans[-1][1]
        between = self.text[before : spans[tail][0]]
        if "#" not in between and not keeps_comma:
            return before, end, ""
        rest = self.text[end : self.text.index("\n", end)] if "\n" in self.text[end:] else self.text[end:]
        if rest.lstrip().startswith(","):
            end += rest.index(",") + 1
            rest = rest[rest.index(",") + 1 :]
        if rest.lstrip().startswith("#"):
            end += len(rest)
        return self.lead(spans[tail][0]), end, ""

    def span(self, item) -> tuple[int, int]:
        """Return where an item of a display or call starts and ends; a dict's are pairs."""
        if isinstance(item, tuple):
            return self.start(item[0] or item[1]), self.end(item[1])
        return self.start(item), self.end(item)

    def lead(self, start: int) -> int:
        """Return where the comment lines above an item start, or the item, when none are."""
        number = self.text.count("\n", 0, start) + 1
        if self.text[self.starts[number - 1] : start].strip():
            return start
        while self.is_own_line(number - 1):
            number -= 1
            start = self.starts[number - 1] + self.comments[number][0]
        return start

    def matched(self, olds: list, news: list) -> list[int] | None:
        """Find for each item which one of the file it was; None where that cannot be told."""
        found, at = [], 0
        for new in news:
            while at < len(olds) and not self.is_from(olds[at], new):
                at += 1
            if at == len(olds):
                return None
            found.append(at)
            at += 1
        return found

    def is_from(self, old, new) -> bool:
        if isinstance(old, tuple):
            return is_same(old[0], new[0])
        return place(old) == place(new) or is_same(old, new)


class Printer:
    """Prints statements of one file; `survivors` are all of its statements that are left."""

    def __init__(self, source: SourceText, statements: list[ast.stmt]):
        self.source = source
        inner = (node for one in statements for node in walk(one) if isinstance(node, ast.stmt))
        self.survivors = {id(source.find(node)) for node in inner}

    def block(self, body: list[ast.stmt], indent: int) -> list[str]:
        """Print statements below each other."""
        lines: list[str] = []
        for node in body:
            made = self.statement(node, indent)
            lines += made[1:] if not lines and made and not made[0] else made
        return lines

    def statement(self, node: ast.stmt, indent: int) -> list[str]:
        """Print a statement with its comments."""
        old = self.source.find(node)
        if old is None:
            return self.fresh(node, indent)
        lead = self.leading(old)
        tail = self.source.trailing(old)
        shown = [" " * indent + line if line else "" for line in lead]
        return [*shown, *self.body_of(old, node, indent), *(" " * indent + line for line in tail)]

    def leading(self, old: ast.stmt) -> list[str]:
        """Return the comments above a statement, and above conditions around it that were decided."""
        found = self.source.leading(old)
        outer = self.source.outer.get(id(old))
        if outer is not None and id(outer) not in self.survivors:
            found = self.leading(outer) + [line for line in found if line]
        return found

    def body_of(self, old: ast.stmt, node: ast.stmt, indent: int) -> list[str]:
        """Print a statement that was `old` in the file."""
        source, shift = self.source, indent - old.col_offset
        if is_same(old, node):
            lines = source.segment(first_line(old), old.end_lineno, shift)
            if self.is_right(lines, node):
                return lines
            lines[0] = lines[0].replace("elif", "if", 1)  # the branches before it were decided
            if self.is_right(lines, node):
                return lines
        if isinstance(node, ast.Match) or not hasattr(node, "body"):
            return self.simple(old, node, indent)
        if source.header_end(old) < first_line(old):
            return self.fresh(node, indent)
        return self.compound(old, node, indent)

    def is_right(self, lines: list[str], node: ast.stmt) -> bool:
        """Whether lines are a statement."""
        width = len(lines[0]) - len(lines[0].lstrip())
        text = "\n".join(lines)
        if width:
            text = "if 1:\n" + text
        try:
            made = ast.parse(text + "\n").body[0]
        except SyntaxError:
            return False
        made = made.body[0] if width else made
        return is_same(made, node) or to_text(made) == to_text(node)

    def simple(self, old: ast.stmt, node: ast.stmt, indent: int) -> list[str]:
        """Print a changed statement without blocks."""
        source = self.source
        first, last = source.starts[old.lineno - 1], source.starts[old.end_lineno] - 1
        if not source.text[first : source.start(old)].strip():
            for brackets in (False, True):
                text = source.edited(old, node, first, last, brackets)
                lines = moved(text, indent - old.col_offset) if text is not None else []
                if lines and self.is_right(lines, node):
                    return lines
        made = self.fresh(node, indent)
        inner = range(old.lineno, old.end_lineno + 1)
        notes = [source.comments[number][1] for number in inner if number in source.comments]
        if len(notes) == 1 and len(made) == 1:
            return [f"{made[0]}  {notes[0]}"]
        return made

    def fresh(self, node: ast.stmt, indent: int) -> list[str]:
        """Print a statement that is not in the file; what is in its blocks may be."""
        if isinstance(getattr(node, "body", None), list) and not isinstance(node, ast.Match):
            return self.compound(None, node, indent)
        line = " " * indent + to_text(node)
        help_text = self.field_help(node)
        return [f"{line}  # {help_text}" if help_text else line]

    def field_help(self, node: ast.stmt) -> str:
        """Return the help of a config field that became a constant."""
        was = (
            self.source.nodes.get((ast.AnnAssign, *place(node)[1:])) if isinstance(node, ast.Assign) else None
        )
        if was is not None and is_option(was) and len(was.value.args) > 2:
            return was.value.args[2].value
        return ""

    def compound(self, old: ast.stmt | None, node: ast.stmt, indent: int, keyword: str = "") -> list[str]:
        """Print a statement that has blocks."""
        lines = self.header(old, node, indent, keyword) + self.block(node.body, indent + len(INDENT))
        for handler in getattr(node, "handlers", []):
            was = self.source.find(handler)
            lines += self.compound(was, handler, indent)
        orelse = getattr(node, "orelse", [])
        if len(orelse) == 1 and isinstance(node, ast.If) and self.is_elif(orelse[0]):
            was = self.source.find(orelse[0])
            lead = self.source.leading(was) if was else []
            lines += [" " * indent + line for line in lead if line]
            lines += self.compound(was, orelse[0], indent, "elif")
        elif orelse:
            lines += [" " * indent + "else:" + self.note_above(orelse[0]), *self.block(orelse, indent + 4)]
        if getattr(node, "finalbody", []):
            lines += [" " * indent + "finally:", *self.block(node.finalbody, indent + 4)]
        return lines

    def note_above(self, node: ast.stmt) -> str:
        """Return the comment behind the `else:` above a statement."""
        old = self.source.find(node)
        number = self.source.above(first_line(old)) - 1 if old else 0
        if number in self.source.comments and self.source.lines[number - 1].lstrip().startswith("else:"):
            return "  " + self.source.comments[number][1]
        return ""

    def is_elif(self, node: ast.stmt) -> bool:
        """Whether the only statement of an `else:` prints as `elif`."""
        old = self.source.find(node)
        if not isinstance(node, ast.If):
            return False
        return old is None or self.source.text.startswith("elif", self.source.start(old))

    def header(self, old: ast.stmt | None, node: ast.stmt, indent: int, keyword: str) -> list[str]:
        """Print a compound statement up to its colon; `keyword` replaces `if`."""
        bare = without_blocks(node)
        lines = []
        if old is not None and self.source.header_end(old) >= first_line(old):
            lines = self.copied_header(old, bare, indent)
        if not lines:
            lines = self.printed_header(bare, indent)
            note = self.source.comments.get(self.source.header_end(old)) if old is not None else None
            lines[-1] += f"  {note[1]}" if note else ""
        if isinstance(node, ast.If):
            word = lines[0].split()[0].removesuffix(":").partition("(")[0]
            lines[0] = lines[0].replace(word, keyword or "if", 1)
        return lines

    def copied_header(self, old: ast.stmt, bare: ast.stmt, indent: int) -> list[str]:
        """Return the header's text from the file, with what changed replaced; nothing where it cannot be."""
        source = self.source
        first, last = first_line(old), source.header_end(old)
        was = without_blocks(old)
        if is_same(was, bare):
            return source.segment(first, last, indent - old.col_offset)
        if isinstance(bare, ast.ExceptHandler | ast.Try):
            return []
        for brackets in (False, True):
            text = source.edited(was, bare, source.starts[first - 1], source.starts[last] - 1, brackets)
            if text is None:
                continue
            lines = [line[min(old.col_offset, len(line) - len(line.lstrip())) :] for line in text.split("\n")]
            check = [lines[0].replace("elif", "if", 1), *lines[1:], INDENT + "pass"]
            if self.is_right(check, bare):
                return [" " * indent + line if line else line for line in lines]
        return []

    def printed_header(self, bare: ast.stmt, indent: int) -> list[str]:
        """Print a header from the tree; parameters with comments in the file stand a line each."""
        if isinstance(bare, ast.ExceptHandler):
            kind = f" {to_text(bare.type)}" if bare.type else ""
            return [" " * indent + f"except{kind}{f' as {bare.name}' if bare.name else ''}:"]
        if isinstance(bare, ast.Try):
            return [" " * indent + "try:"]
        text = to_text(ast.fix_missing_locations(bare)).rstrip()
        lines = text.split("\n")[:-1]
        if isinstance(bare, Function):
            notes = self.parameter_notes(bare)
            if notes:
                lines[-1:] = self.spread(lines[-1], bare, notes)
        return [" " * indent + line for line in lines]

    def parameter_notes(self, node: Function) -> dict[str, str]:
        """Map parameters to the comments that the file has behind them."""
        found = {}
        for arg in (one for one in walk(node.args) if isinstance(one, ast.arg)):
            old = self.source.find(arg)
            if old is not None and old.end_lineno in self.source.comments and old.lineno > node.lineno:
                found[arg.arg] = self.source.comments[old.end_lineno][1]
        return found

    def spread(self, signature: str, node: Function, notes: dict[str, str]) -> list[str]:
        """Print a signature with a line for each parameter, and the comments behind them."""
        empty = copy.copy(node)
        empty.args = ast.arguments([], [], None, [], [], None, [])
        empty.decorator_list = []
        head, _, end = to_text(empty).split("\n")[0].partition("()")
        parts = split_parameters(to_text(node.args))
        names = [re.match(r"[*\w]*", part)[0].strip("*") for part in parts]
        lines = [f"{INDENT}{part},  {notes.get(name, '')}".rstrip() for part, name in zip(parts, names)]
        return [f"{head}(", *lines, f"){end}"]


def split_parameters(text: str) -> list[str]:
    """Cut the text of a signature's parameters at the commas between them."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def comment_owners(source: SourceText) -> Iterator[tuple[str, ast.stmt]]:
    """Yield each comment and the innermost statement on whose lines, or right above which, it stands."""
    owner: dict[int, ast.stmt] = {}
    for node in _statements(source.tree):
        for number in range(source.above(first_line(node)), node.end_lineno + 1):
            owner[number] = node
    for number, (_, text) in source.comments.items():
        if number in owner:
            yield text, owner[number]


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield statements, outer ones first."""
    if isinstance(node, ast.stmt):
        yield node
    for child in children(node):
        yield from _statements(child)
