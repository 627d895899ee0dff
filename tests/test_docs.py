"""README and docs/ tell the truth: length, links, symbols, fields, commands, numbers and the picture."""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import pytest
from fixtures_model import make_documents
from run_unchanged import shrink
from torch.distributed.run import get_args_parser

from common import read_json
from data.assets import ASSETS
from data.codecs import load_codec
from dev import plot
from formats.recipe import config_fields, format_toml
from train_gpt import Config

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 900
TECHNIQUES = (
    "GQA BigramHash SmearGate XSA depth_recurrence Parallel_Muon EMA SWA int6_STE_QAT GPTQ LZMA zstd rANS "
    "sliding_window test-time_training"
)
SECTIONS = "run|data|model|optim|schedule|average|quant|eval|watch"
PROGRAMS = ("python", "make", "torchrun", "pip")
FOREIGN = ("git", "gh")  # not ours to check
OWN_VARIABLES = {"RUN_ID", "OMP_NUM_THREADS"}
EXAMPLES = "add-a-trick.md"  # whose fields its patches add
# Really run here, in this process, from the repository root.
FAST_COMMANDS = (
    "python train_gpt.py --help model.xsa_last",
    "python train_gpt.py --help quant",
    "python train_gpt.py --help run.attention",
    "python train_gpt.py --recipe records/track_cpu/2026-11-21_Sp2048_LoraScoring/recipe.toml "
    "quant.target_bytes=900000 --describe",
    "python train_gpt.py --recipe records/reference_systems/A_bwetaf53/recipe.toml --describe",
    "python -m eval.stats records/track_cpu/2026-11-21_Sp2048_LoraScoring "
    "--against records/track_cpu/2026-11-21_NaiveBaseline",
)
# Commands of pages that a small checkout runs one after the other. Left out: what needs the built-in corpus.
RUNNABLE = ("own-text.md", "tokenizers.md", "scorers.md", "quantizers.md")
NEEDS_CORPUS = "records/track_cpu/2026-11-21_Sp2048_LoraScoring --documents"
SMALL_VOCAB = 320


def fenced_lines(text: str) -> list[str]:
    """Return the lines of all fenced blocks, continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def simple_commands(line: str) -> list[str]:
    """Cut a shell line into its commands: at && and ;, without comment and redirection."""
    line = re.sub(r"\s+#.*", "", line)
    line = re.sub(r"^for .*?; do ", "", line).removesuffix("; done")
    return [re.sub(r"\s*>.*", "", part).strip() for part in re.split(r"&&|;", line)]


def split_command(command: str) -> tuple[dict[str, str], list[str]]:
    """Split a command into the variables before it and its words."""
    words = shlex.split(command)
    count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


@cache
def commands() -> list[tuple[str, str]]:
    """List (page, command) of all commands: in fenced blocks, and named in a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        named = re.findall(r"`((?:python|make|torchrun) [^`]+)`", prose)
        named += [f"python {words}" for words in re.findall(r"`(train_gpt\.py -[^`]+)`", prose)]
        for command in [part for line in fenced_lines(text) + named for part in simple_commands(line)]:
            _, words = (
                split_command(command) if command.startswith((*PROGRAMS, "DATA_", "MODEL_")) else ({}, [])
            )
            if words and words[0] in PROGRAMS:
                found.append((page.relative_to(ROOT).as_posix(), command))
    return found


@cache
def help_of(module: str, *action: str) -> str:
    """Return the help that `python -m MODULE ACTION --help` prints."""
    found = importlib.import_module(module)
    main = getattr(found, "main", None) or importlib.import_module(f"{module}.__main__").main
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*action, "--help"])
    return said.getvalue()


@cache
def defined_names(file: Path) -> set[str]:
    """Return what a module defines at its top level."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def first_party_files() -> list[Path]:
    rooms = ("durable", "data", "formats", "kernels", "quantizers", "scoring", "eval", "pack", "audit", "dev")
    return [ROOT / "train_gpt.py", *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of tables with a `code` column, from the technique on."""
    rows, is_feature = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if "|" in line else []
        if "code" in cells:
            is_feature, column = True, cells.index("code")
        elif not cells:
            is_feature = False
        elif is_feature and not set(line) <= set("|- "):
            rows.append([cells[0], cells[column]])
    return rows


def is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def check_options(words: list[str], help_text: str) -> list[str]:
    """Return the options among words that a help text does not list."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    known = set(re.findall(r"--[a-z][a-z-]*", help_text))
    return [option for option in options if option not in known]


def check_fields(words: list[str]) -> list[str]:
    """Return the words that set a field that there is not."""
    fields = config_fields(Config)
    named = [word.partition("=")[0] for word in words if re.match(rf"({SECTIONS})\.[a-z0-9_]+=", word)]
    return [name for name in named if name not in fields]


def check_paths(words: list[str]) -> list[str]:
    """Return the paths in folders of this repository that are not there; NAME and 2026-12 are examples."""
    paths = [word for word in words if word.startswith(("records/", "requirements/", "tokenizers/"))]
    paths += [word.partition("=")[2] for word in words if re.match(r"[A-Z]+=records/", word)]
    examples = ("NAME", "2026-12")
    return [
        path for path in paths if not any(text in path for text in examples) and not (ROOT / path).exists()
    ]


def test_the_readme_is_short_and_names_every_technique():
    """Ten minutes of reading, and nothing that the project is asked for missing."""
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    missing = [name for name in TECHNIQUES.split() if name.replace("_", " ") not in text]
    assert not missing


def test_links_lead_somewhere():
    """Relative links of every page, pictures included."""
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http") and not (page.parent / target.partition("#")[0]).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_the_map_of_the_readme_is_the_tree():
    """A room that is renamed, added or dropped changes its line."""
    block = re.search(r"## Map\n\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    named = {line.split()[0].rstrip("/") for line in block.splitlines()}
    there = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    there |= {"train_gpt.py", "common.py", "tests", "records", "tokenizers", "launch"}
    assert not named - there
    assert not there - named


def test_symbols_of_the_feature_tables_are_in_the_code():
    """The README names them; docs/features.md links the file that defines each."""
    everywhere = set().union(*map(defined_names, first_party_files()))
    rows = table_rows(README.read_text(encoding="utf-8"))
    assert len(rows) >= 15
    for technique, code in rows:
        for name in re.findall(r"`([^`]+)`", code):
            assert name in everywhere or is_module(name), f"{technique}: {name}"
    page = ROOT / "docs" / "features.md"
    rows = table_rows(page.read_text(encoding="utf-8"))
    assert len(rows) >= 40
    for technique, code in rows:
        links = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", code)
        assert links, technique
        for name, target in links:
            assert name in defined_names((page.parent / target).resolve()), f"{technique}: {name} in {target}"


def test_fields_named_in_the_docs_are_in_the_config():
    """`section.field` in backticks is a field or a module."""
    fields, unknown = config_fields(Config), []
    for page in PAGES:
        if page.name == EXAMPLES:
            continue
        for name in re.findall(
            rf"`((?:{SECTIONS})\.[a-z0-9_]+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")
        ):
            if name not in fields and not is_module(name):
                unknown.append(f"{page.name}: {name}")
    assert not unknown


def test_every_switch_has_its_place_in_the_docs():
    """A technique that is off by default is found by nobody who does not read of it."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != EXAMPLES)
    for name, item in config_fields(Config).items():
        if item.default is False or item.default in ("none", "off"):
            assert name in text, f"{name}: add its row to docs/features.md"


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_name_what_there_is(page, command):
    """Modules, targets, variables, options, fields and recipes of every command."""
    variables, words = split_command(command)
    contest_names = {item.metadata["env"] for item in config_fields(Config).values()}
    assert set(variables) <= contest_names | OWN_VARIABLES
    assert not check_fields(words) + check_paths([*words, variables.get("TOKENIZER_PATH", "")])
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
        assert words[1] in targets
        used = set(re.findall(r"\$\(([A-Z]+)\)|,\$\(([A-Z]+)\)", makefile))
        names = {name for pair in used for name in pair} | set(re.findall(r"\$\(if \$\(([A-Z]+)\)", makefile))
        assert {word.partition("=")[0] for word in words[2:]} <= names
        return
    if words[0] == "pip":
        return
    if words[0] == "torchrun":
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        launcher = {option for action in get_args_parser()._actions for option in action.option_strings}
        launcher |= {option.replace("-", "_").replace("__", "--", 1) for option in launcher}
        words = ["python", *[word for word in words[1:] if word.partition("=")[0] not in launcher & options]]
    if words[1] == "-m":
        assert is_module(words[2]), words[2]
        action = words[3:4] if words[2] == "data.tokenizer" else []
        assert not check_options(words[3:], help_of(words[2], *action))
    else:
        assert words[1] == "train_gpt.py" or words[1].startswith("runs/")
        assert not check_options(words[2:], help_of("train_gpt"))


@pytest.mark.parametrize("command", FAST_COMMANDS)
def test_fast_commands_run(command, monkeypatch, capsys):
    """Those that only read what is committed."""
    assert command in {found for _, found in commands()}
    monkeypatch.chdir(ROOT)
    _, words = split_command(command)
    module, arguments = (words[2], words[3:]) if words[1] == "-m" else ("train_gpt", words[2:])
    try:
        status = importlib.import_module(module).main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert not status
    assert capsys.readouterr().out


def test_the_leaderboard_is_that_of_the_records():
    """Means, deviations and bytes are those of submission.json."""
    text = README.read_text(encoding="utf-8")
    for path in sorted(ROOT.glob("records/track_cpu/*/submission.json")):
        rows = list(read_json(path)["seed_results"].values())
        scores = [row["val_bpb"] for row in rows]
        wanted = f"{fmean(scores):.4f} +- {stdev(scores):.4f}, n = {len(scores)}"
        largest = f"{max(row['artifact_bytes'] for row in rows):,}"
        line = next(
            line
            for line in text.splitlines()
            if f"records/track_cpu/{path.parent.name}" in line and "|" in line
        )
        assert wanted in line, path.parent.name
        assert largest in line, path.parent.name
        assert f"{fmean(scores):.4f}" in (ROOT / "docs" / "records-and-audit.md").read_text(encoding="utf-8")


def test_the_table_of_tokenizers_is_that_of_their_reports():
    """Entries, bytes a token and bytes of the file."""
    text = (ROOT / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[(\w+)\]\(\S+\) \| `(\w+)` \| (\S+) \| (\S+) \| \S+ \| (\S+) \|$", text, re.MULTILINE
    )
    assert [row[0] for row in rows] == list(ASSETS)
    for name, *shown in rows:
        report = read_json(ROOT / "tokenizers" / name / "report.json")["report"]
        size = load_codec(ROOT / "tokenizers" / name).path.stat().st_size
        facts = [f"{report['vocab_size']:,}", f"{report['bytes_per_token']:.4f}", f"{size:,}"]
        assert shown == [report["kind"], *facts]


def test_the_picture_is_what_the_command_draws(tmp_path):
    """After a new record: make plot."""
    out = tmp_path / "progress.svg"
    plot.main(["--out", str(out)])
    assert out.read_bytes() == plot.PICTURE.read_bytes()
    described = re.search(r"!\[(.*?)\]", README.read_text(encoding="utf-8"))[1]
    numbers = re.findall(r"\d\.\d{4}", described)
    assert numbers and all(number in out.read_text(encoding="ascii") for number in numbers)


@pytest.fixture(scope="module")
def small_checkout(tmp_path_factory) -> Path:
    """A copy of the source with the CPU recipe at the size of a test, and text beside it."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    left_out = shutil.ignore_patterns("datasets", "hub_cache", "__pycache__", "*.model")
    for path in [*ROOT.glob("*/__init__.py")]:
        shutil.copytree(path.parent, folder / path.parent.name, ignore=left_out)
    shutil.copytree(ROOT / "tokenizers", folder / "tokenizers")
    for name in ("train_gpt.py", "common.py"):
        shutil.copy(ROOT / name, folder / name)
    recipe = "records/track_cpu/2026-11-21_Sp2048_LoraScoring/recipe.toml"
    small = shrink(tomllib.loads((ROOT / recipe).read_text(encoding="utf-8")))
    small["run"]["save_every"] = 6
    small["data"]["vocab_size"] = SMALL_VOCAB
    small["quant"]["code_wrap"] = "lzma"
    small["eval"]["tilt_static_entries"] = 100
    (folder / recipe).parent.mkdir(parents=True)
    (folder / recipe).write_text(format_toml(small))
    for name, count, seed in (("train", 200, 0), ("val", 4, 1)):  # adaptive scoring takes seconds a document
        lines = [json.dumps({"text": text}) for text in make_documents(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pages_on_own_text_tokenizers_scorers_and_quantizers_run(small_checkout):
    """Command by command, in the order of the pages, as a reader would type them; only sizes are smaller."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for name in RUNNABLE:
        for line in fenced_lines((ROOT / "docs" / name).read_text(encoding="utf-8")):
            if NEEDS_CORPUS in line:
                continue
            line = line.replace("--vocab-size 2048", f"--vocab-size {SMALL_VOCAB}").replace(
                " --describe", " --describe >/dev/null"
            )
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=small_checkout,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{name}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
