"""launch/: every file is parsed by what will read it; its scripts run against stand-ins for schedulers."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures_model import TINY

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SKY_FILES = sorted(LAUNCH.glob("*.yaml"))
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
# What the trainer's launcher is in these tests: it writes down its words, then ends or waits for SIGTERM.
STAND_INS = {
    "python": 'printf "%s\\n" "$@" > "$CALLS/words"; [ -z "${LASTS:-}" ] && exit 0\n'
    'trap "echo TERM >> $CALLS/signals; exit ${STATUS:-143}" TERM\n'
    "while :; do sleep 0.05; done",
    "srun": 'echo $$ > "$CALLS/step"; while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": '[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "$@" >> "$CALLS/scontrol"',
    "scancel": 'echo "$@" >> "$CALLS/scancel"; kill -TERM "$(cat "$CALLS/step")"',
}


def tool(name: str) -> str:
    """Find a program on the path or beside this Python; the test is skipped without it."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return found or pytest.skip(f"no {name} here")


@pytest.fixture
def stand_ins(tmp_path) -> dict[str, str]:
    """An environment in which schedulers and the launcher are scripts that write down how they are called."""
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG")}
    paths = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return kept | {"PATH": paths, "PYTHON": "python", "CALLS": str(tmp_path)}


def run_script(name: str, env: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    command = ["bash", f"launch/{name}", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def words_of(env: dict[str, str]) -> list[str]:
    return Path(env["CALLS"], "words").read_text().splitlines()


def wait_for(path: Path) -> str:
    """Wait until a stand-in has written a file."""
    for _ in range(400):
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.025)
    raise AssertionError(f"{path} was never written")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_without_warnings(script):
    subprocess.run(["bash", "-n", script], check=True)
    checked = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_commands_that_the_files_show_name_files_that_there_are():
    """A comment that shows a command is what people copy."""
    text = "".join(path.read_text() for path in [*LAUNCH.iterdir()] if path.is_file())
    shown = set(re.findall(r"\b(?:launch|records|docs)/[\w./-]*\w", text))
    assert {name for name in shown if not (ROOT / name).exists()} == set()
    assert "launch/slurm.sbatch" in shown and "launch/sky_spot.yaml" in shown


def test_one_machine_trains_alone(stand_ins):
    """What is typed comes last, where it wins."""
    done = run_script("train.sh", stand_ins | {"JOB": "mine", "SAVE_EVERY": "50"}, "run.save_every=9")
    assert done.returncode == 0, done.stderr
    words = words_of(stand_ins)
    assert {"torch.distributed.run", "--nnodes=1", "--nproc-per-node=auto", "--node-rank=0"} <= {*words}
    assert words[words.index("train_gpt.py") :] == [
        "train_gpt.py", "run.run_id=mine", "run.out_dir=runs", "run.resume=auto", "run.save_every=50",
        "run.save_every=9",
    ]  # fmt: skip


def test_the_second_machine_joins_the_first(stand_ins):
    run_script("train.sh", stand_ins | {"NODES": "2", "NODE": "1", "HEAD": "10.0.0.5", "GPUS": "8"})
    expected = {"--nnodes=2", "--node-rank=1", "--nproc-per-node=8", "--master-addr=10.0.0.5"}
    assert expected <= {*words_of(stand_ins)}


@pytest.mark.parametrize("settings", [{"NODES": "2"}, {"PYTHON": "/nowhere/python"}])
def test_what_cannot_start_is_said_in_a_sentence(stand_ins, settings):
    done = run_script("train.sh", stand_ins | settings)
    assert done.returncode == 1 and done.stderr.startswith("launch: expected ")
    assert not Path(stand_ins["CALLS"], "words").exists()


def test_a_slurm_job_trains_on_its_nodes(stand_ins):
    done = run_script("slurm.sbatch", stand_ins | JOB | {"SLURM_GPUS_ON_NODE": "4"}, "--recipe", "a b.toml")
    assert done.returncode == 0, done.stderr
    words = words_of(stand_ins)
    expected = {"--nnodes=2", "--node-rank=1", "--nproc-per-node=4", "--master-addr=node1"}
    assert expected | {"--master-port=20007"} <= {*words}
    assert "run.run_id=slurm_7" in words and words[-2:] == ["--recipe", "a b.toml"]
    assert not Path(stand_ins["CALLS"], "scontrol").exists(), "a finished job is not queued again"


def test_a_slurm_array_trains_a_seed_each(stand_ins):
    run_script("slurm.sbatch", stand_ins | JOB | {"SLURM_ARRAY_TASK_ID": "42"})
    assert "run.seed=42" in words_of(stand_ins)


@pytest.mark.parametrize("status, queued_again", [("143", True), ("0", False)])
def test_a_slurm_job_that_runs_out_of_time_saves_and_queues_again(stand_ins, status, queued_again):
    """SIGUSR1 comes to the script alone; the ranks must get SIGTERM, and the job must wait for them."""
    calls, env = Path(stand_ins["CALLS"]), stand_ins | JOB | {"LASTS": "1", "STATUS": status}
    job = subprocess.Popen(["bash", "launch/slurm.sbatch"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    wait_for(calls / "words")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert (calls / "signals").read_text() == "TERM\n"
    assert (calls / "scancel").read_text() == "--signal=TERM 7\n"
    assert (calls / "scontrol").exists() == queued_again
    assert not queued_again or (calls / "scontrol").read_text() == "requeue 7\n"


def test_a_slurm_job_whose_training_fails_fails(stand_ins):
    Path(stand_ins["CALLS"], "bin", "python").write_text("#!/bin/bash\nexit 3\n")
    assert run_script("slurm.sbatch", stand_ins | JOB).returncode == 3
    assert not Path(stand_ins["CALLS"], "scontrol").exists()


def test_slurm_takes_the_script():
    """Asks the controller whether it could ever run; which answers "not available" for lack of GPUs, too."""
    asked = subprocess.run(
        [tool("sbatch"), "--test-only", "launch/slurm.sbatch"], cwd=ROOT, capture_output=True, text=True
    )
    if "configuration source" in asked.stderr or "contact" in asked.stderr:
        pytest.skip("no Slurm controller answers here")
    assert "to start at" in asked.stderr or "configuration is not available" in asked.stderr, asked.stderr


def test_machines_of_skypilot_find_each_other(stand_ins):
    job = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    job |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "sky-2026-11-28-18-30-00-1_golf_1"}
    done = run_script(
        "sky_run.sh", stand_ins | job | {"ARGS": "--recipe R  run.seed=7", "OUT_DIR": "/golf_runs"}
    )
    assert done.returncode == 0, done.stderr
    words = words_of(stand_ins)
    expected = {"--nnodes=2", "--node-rank=1", "--nproc-per-node=8", "--master-addr=10.0.0.1"}
    assert expected <= {*words}
    assert "run.out_dir=/golf_runs" in words and f"run.run_id={job['SKYPILOT_TASK_ID']}" in words
    assert words[-3:] == ["--recipe", "R", "run.seed=7"]


@pytest.mark.parametrize("path", SKY_FILES, ids=lambda path: path.name)
def test_skypilot_reads_its_files(path):
    """By SkyPilot itself, from whichever Python its command belongs to: schema, resources, mounts."""
    interpreter = Path(tool("sky")).read_text(errors="replace").partition("\n")[0].removeprefix("#!")
    code = (
        "import sky, sys, yaml\n"
        "settings = yaml.safe_load(open(sys.argv[1]))\n"
        "envs = [('BUCKET', 'golf-test')] if 'BUCKET' in settings['envs'] else None\n"
        "task = sky.Task.from_yaml_config(settings, env_overrides=envs)\n"
        "(resources,) = task.resources\n"
        "print(resources.accelerators, resources.use_spot, list(task.storage_mounts))\n"
    )
    read = subprocess.run([interpreter, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    is_spot = path.stem == "sky_spot"
    assert read.stdout.split("\n")[0] == f"{{'H100': 8}} {is_spot} {['/golf_runs'] * is_spot}", read.stderr


@pytest.mark.parametrize("path", SKY_FILES, ids=lambda path: path.name)
def test_files_of_skypilot_start_scripts_that_there_are(path):
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load(path.read_text())
    for part in ("setup", "run"):
        assert (ROOT / task[part].removeprefix("bash ")).is_file()
    unread = [name for name in task["envs"] if not any(f"${{{name}" in text.read_text() for text in
              [*SCRIPTS, path])]  # fmt: skip
    assert not unread, "a variable that no script reads does nothing"


def copied_names(dockerfile: str) -> set[str]:
    """Name what a Dockerfile copies from the checkout."""
    lines = re.findall(r"^COPY (?:--\S+ )*(.*)", dockerfile, re.MULTILINE)
    return {name for line in lines for name in line.split()[:-1]}


def test_the_image_has_what_setup_needs_and_no_more():
    """A file that the layer of the environment lacks stops the build; the rest would make it again often."""
    text, ignored = (LAUNCH / "Dockerfile").read_text(), (LAUNCH / "Dockerfile.dockerignore").read_text()
    copied = copied_names(text)
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    rule = re.search(r"^\$\(STAMP\): (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    needed = {word for word in rule.split() if "$" not in word}
    assert {name for name in needed if name not in copied and name.split("/")[0] not in copied} == set()
    assert copied & {*ignored.splitlines()} == set()
    missing = {"data/datasets", "data/tokenizers", "runs", ".git", ".venv*"} - {*ignored.splitlines()}
    assert not missing, "gigabytes would be sent to the builder"


def test_hadolint_has_nothing_to_say():
    checked = subprocess.run([tool("hadolint"), LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stdout, checked.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_machines_train_one_run_and_know_when_it_is_finished(tiny_data, tmp_path):
    """Two launchers that only share a folder and an address: what a cluster gives them."""
    fields = {**TINY, "data.data_path": tiny_data, "data.tokenizer_path": tiny_data / "tokenizer.model"}
    words = [f"{name}={value}" for name, value in fields.items()]
    env = os.environ | {"NODES": "2", "HEAD": "127.0.0.1", "PORT": "29677", "GPUS": "1", "JOB": "both"}
    env |= {"OUT_DIR": str(tmp_path), "SAVE_EVERY": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    for expected in ("run_folder:", "the run is finished"):
        nodes = [
            subprocess.Popen(
                ["bash", "launch/train.sh", *words], cwd=ROOT, env=env | {"NODE": node},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for node in "01"
        ]  # fmt: skip
        said = [node.communicate(timeout=280)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        assert expected in said[0], "the first machine has rank 0"
    assert "world_size:2" in (tmp_path / "both" / "train.log").read_text()


@pytest.mark.desk
def test_the_notebook_is_its_script():
    """The script is what people edit and review; `jupytext --to ipynb` makes the notebook from it."""
    jupytext = pytest.importorskip("jupytext")
    script, notebook = (jupytext.read(LAUNCH / f"quickstart.{end}") for end in ("py", "ipynb"))
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in script.cells]
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.desk
@pytest.mark.timeout(600)
def test_the_notebook_runs(tiny_data, tmp_path, monkeypatch):
    """In miniature: other parameters, and every cell as it stands."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(LAUNCH / "quickstart.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    fields = [f"{name}={value}" for name, value in TINY.items() if name != "run.max_wallclock_seconds"]
    parameters.source += (
        f"\nDATA = {str(tiny_data)!r}\nSECONDS, FIELDS, RUNS = 0, {fields}, {str(tmp_path)!r}"
    )
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(LAUNCH)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert re.search(r"\d\.\d{4} bits a byte after 6 steps", said) and "limit" in said
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells
               for output in cell.get("outputs", ())), "no plot"  # fmt: skip
    assert {"notebook_baseline", "notebook_changed"} <= {path.name for path in tmp_path.iterdir()}
