"""The wheel: one package, every command, recipes and tokenizers; and that it works where no checkout is."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
from fixtures_model import ROOT, run_python

import parameter_golf
from common import UserError
from parameter_golf import __main__ as golf
from parameter_golf import shipped, whole

TREE = "parameter_golf.tree"
LEFT_OUT = {"tests", "parameter_golf", "dev.soak", "dev.null_gpu"}  # of the packages of a checkout
READ_BY_CODE = (".json", ".html", ".jinja")  # files of dev/ that are no modules
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NAIVE = "2026-11-21_NaiveBaseline"
# The naive recipe in miniature, on the tiny data of the tests.
SMALL = {
    "run.iterations": 2,
    "run.max_wallclock_seconds": 0,
    "run.run_id": "tiny",
    "run.val_batch_tokens": 512,
    "data.vocab_size": 300,
    "data.seq_len": 16,
    "data.batch_tokens": 128,
    "model.num_layers": 2,
    "model.model_dim": 32,
    "model.compute_dtype": "float32",
    "eval.limit_seconds": 0,
    "quant.code_wrap": "lzma",
}


def named_packages() -> set[str]:
    """The packages of pyproject.toml, by their names in a checkout."""
    named = SETTINGS["tool"]["setuptools"]["packages"]
    return {name.removeprefix(f"{TREE}.") for name in named} - {TREE}


def test_the_list_of_packages_is_whole():
    """A new folder of modules is in the wheel, or in LEFT_OUT."""
    found = {path.parent.relative_to(ROOT) for path in ROOT.glob("[!.]*/**/__init__.py")}
    names = {".".join(path.parts) for path in found if path.parts[0] not in ("runs", "records")}
    assert named_packages() - {"parameter_golf"} == names - LEFT_OUT


def test_what_is_in_the_wheel_imports_nothing_that_is_not():
    """A module of tests or of what is left out would be missing outside a checkout."""
    left_out = tuple(f"{name}." for name in LEFT_OUT if name != "parameter_golf")
    missing = []
    for path in (path for name in named_packages() for path in (ROOT / name.replace(".", "/")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            missing += [f"{path}: {name}" for name in names if f"{name}.".startswith(left_out)]
    assert missing == []


def test_files_that_modules_read_are_in_the_wheel():
    """Templates and tables beside the modules of dev/."""
    stated = set(SETTINGS["tool"]["setuptools"]["package-data"][TREE])
    kept = [path for path in (ROOT / "dev").rglob("*") if path.suffix in READ_BY_CODE]
    names = {path.relative_to(ROOT).as_posix() for path in kept}
    assert {name for name in names if "null_gpu" not in name} == {name for name in stated if "dev/" in name}


def test_extras_are_the_files_that_make_installs():
    """One source for each list, and every line is what a wheel may state."""
    files = SETTINGS["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert {"desk", "gpu", "dev", "lm-eval"} <= files.keys()
    for row in [*files.values(), SETTINGS["tool"]["setuptools"]["dynamic"]["dependencies"]]:
        for name in row["file"]:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            assert not [
                line for line in lines if line.startswith("-") or (" #" in line and line[0] != "#")
            ], name


@pytest.mark.parametrize("command", [command for group in golf.COMMANDS.values() for command in group])
def test_every_command_is_a_module_that_runs(command):
    """With a guard of its own: golf runs it as python -m would."""
    spec = find_spec(command.module)
    assert spec, command.module
    place = Path(spec.origin)
    place = place.with_name("__main__.py") if place.name == "__init__.py" else place
    assert '__name__ == "__main__"' in place.read_text(encoding="utf-8")
    assert golf.find_module(command.name) == command.module == golf.find_module(command.module)


def test_the_help_fits_a_terminal_and_teaches():
    """All commands, an example, where things go."""
    text = golf.describe_commands()
    assert max(map(len, text.splitlines())) <= 110
    assert all(f"\n  {name} " in text for name in golf.MODULES)
    assert "golf run" in text and "runs/" in text and "python -m MODULE" in text
    done = run_python("-m", "parameter_golf")
    assert (done.returncode, done.stdout) == (0, text)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("tarin", "Did you mean train?"),
        ("nothing.at.all", "golf --help"),
        ("eval.nothing", "golf --help"),
        ("", "golf --help"),
    ],
)
def test_another_word_is_one_sentence(word, hint):
    """Also for what looks like a module."""
    done = run_python("-m", "parameter_golf", word)
    assert done.returncode == 1 and hint in done.stderr and "Traceback" not in done.stderr


def test_shipped_recipes_and_tokenizers_have_names(monkeypatch, tmp_path):
    """A record's name after --recipe, paths below records/ and tokenizers/; what is here stays what it is."""
    monkeypatch.chdir(tmp_path)
    place = f"records/track_cpu/{NAIVE}/recipe.toml"
    recipe = str(ROOT / place)
    for words in (["--recipe", NAIVE], ["--recipe", place], ["--recipe", str(Path(place).parent)]):
        assert shipped.resolve_words(words) == ["--recipe", recipe]
    assert shipped.resolve_words([f"--recipe={NAIVE}", place]) == [f"--recipe={recipe}", recipe]
    assert shipped.resolve_words(["data.tokenizer_path=tokenizers/sp2048"]) == [
        f"data.tokenizer_path={ROOT / 'tokenizers/sp2048'}"
    ]
    assert shipped.resolve_words(["--against", NAIVE]) == ["--against", recipe]
    same = [
        "--against",
        "runs/mine",
        "--recipe",
        "mine.toml",
        "records/none",
        "--recipe=",
        "run.seed=3",
        "tokenizers/../common.py",
        NAIVE,
    ]
    assert shipped.resolve_words(same) == same
    Path(place).parent.mkdir(parents=True)
    Path(place).write_text("")
    assert shipped.resolve_words(["--recipe", place]) == ["--recipe", place]
    with pytest.raises(UserError, match=f"Did you mean {NAIVE}"):
        shipped.resolve_words(["--recipe", "2026-11-21_NaiveBasline"])


def test_the_whole_path_is_that_of_make_run():
    """Data of the recipe's vocabulary, training, scoring; a recipe of other data says how to make them."""
    recipes = shipped.recipe_files()
    steps = whole.list_steps(str(recipes[whole.DEFAULT]), ["run.seed=3"])
    assert steps[0] == ["data.builtin", "--vocab-size", "2048", "--out", "data/datasets/builtin_sp2048"]
    assert [step[0] for step in steps[1:]] == ["train_gpt", "eval"] and steps[1][-1] == "run.seed=3"
    with pytest.raises(UserError, match=r"golf download.*golf train"):
        whole.list_steps(str(recipes["2026-03-17_NaiveBaseline"]), [])


def test_a_program_with_modules_of_those_names_is_told(monkeypatch):
    """Its own `data` would be taken for ours, or ours for its."""
    other = type(sys)("data")
    other.__file__ = "/elsewhere/data.py"
    monkeypatch.setitem(sys.modules, "data", other)
    with pytest.raises(ImportError, match=r"imported /elsewhere/data\.py .*golf --help"):
        parameter_golf.enter_tree()


# The wheel itself


def call(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a folder without the checkout's modules."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of a fresh environment with the wheel alone; what it needs is this environment's."""
    pytest.importorskip("setuptools", "77", reason="the wheel is built by setuptools 77 or newer")
    place = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "runs", "datasets", "tests", "__pycache__", "*.egg-info")
    source = shutil.copytree(ROOT, place / "source", ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = call([*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-q", "-w", place], place)
    assert built.returncode == 0, built.stderr
    venv.create(place / "venv", symlinks=True)
    python = place / "venv" / "bin" / "python"
    (wheel,) = place.glob("*.whl")
    done = call([*pip, "--python", python, "install", "--no-deps", "--no-index", "-q", wheel], place)
    assert done.returncode == 0, done.stderr
    return place / "venv"


@pytest.fixture(scope="module")
def golf_command(installed):
    """Return what runs `golf WORDS` in a folder; other packages are found in this environment."""
    site = next(installed.glob("lib/python*/site-packages"))
    names = {path.name.partition("-")[0] for path in site.iterdir()}
    assert names == {"parameter_golf"}, "the wheel has other names at the top of site-packages"
    (site / "host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(folder: Path, *words, **environment) -> subprocess.CompletedProcess:
        return call([installed / "bin" / "golf", *words], folder, **environment)

    return run


@pytest.mark.desk
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_trains_scores_and_samples_in_an_empty_folder(golf_command, installed, tiny_data, tmp_path):
    """From a shipped recipe to a score that a fresh process makes again; the wheel weighs its code."""
    assert golf_command(tmp_path, "--help").stdout == golf.describe_commands()
    assert golf_command(tmp_path, "--version").stdout == f"golf {SETTINGS['project']['version']}\n"
    assert NAIVE in golf_command(tmp_path, "recipes").stdout
    doctor = golf_command(tmp_path, "doctor")
    assert doctor.returncode == 0 and "a run takes" in doctor.stdout
    places = {"data.data_path": tiny_data, "data.tokenizer_path": tiny_data / "tokenizer.model"}
    fields = [f"{name}={value}" for name, value in (SMALL | places).items()]
    trained = golf_command(tmp_path, "train", "--recipe", NAIVE, *fields)
    assert trained.returncode == 0, trained.stderr
    program = (tmp_path / "runs" / "tiny" / "train_gpt.py").read_bytes()
    assert 10_000 < len(program) < 100_000
    scored = golf_command(tmp_path, "eval")
    assert scored.returncode == 0 and "recorded val_bpb" in scored.stdout, scored.stderr
    said = golf_command(tmp_path, "sample", "runs/tiny", "--prompt", "ab", "--max-tokens", "2")
    assert said.returncode == 0 and said.stdout.startswith("ab")
    program = "import parameter_golf as g; print(g.load('runs/tiny').bits_per_byte('bead'))"
    own = call([installed / "bin" / "python", "-c", program], tmp_path)
    assert own.returncode == 0 and 0 < float(own.stdout) < 30, own.stderr


@pytest.mark.desk
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_program_that_uses_the_wheel_is_type_checked(golf_command, installed, tmp_path):
    """py.typed: a checker knows what the public functions take and return."""
    program = tmp_path / "program.py"
    program.write_text(
        "from parameter_golf import load\n\nbits: float = load('runs/a').bits_per_byte('text')\n"
        "wrong: int = load('runs/a').generate(3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", installed / "bin" / "python", program]
    found = call([*command, "--cache-dir", tmp_path / "cache"], tmp_path).stdout
    assert 'expression has type "str", variable has type "int"' in found
    assert 'incompatible type "int"; expected "str"' in found
    assert "Found 2 errors in 1 file" in found
