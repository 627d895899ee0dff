"""The dynamic audit: what the sandbox allows, what the miniature world knows, what is judged from outside."""

import base64
import contextlib
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from audit import recorded, run, sandbox, world
from audit.__main__ import audit_data, main
from audit.matrix import FOLDER, program_text
from audit.sandbox import Box, Limits
from audit.unwrap import parse_source
from common import UserError
from data.codecs import load_codec

QUICK = Limits(seconds=30)
HANGS = 60  # seconds that no ended program and no bounded look at one takes on any machine
HOSTILE = {
    "a fork bomb": "import os\nwhile True:\n    os.fork()\n",
    "a fork bomb that swallows errors": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    ),
    "an endless loop": "while True:\n    pass\n",
    "a flood of output": "while True:\n    print('x' * 1000)\n",
    "a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)\ntime.sleep(99)\n",
}


def run_source(tmp_path, source, limits=QUICK, **settings):
    """Run a program in a sandbox with an empty data folder."""
    folder = tmp_path / "program"
    folder.mkdir(exist_ok=True)
    (folder / "train_gpt.py").write_text(source)
    with Box(folder / "train_gpt.py") as box:
        data = box.root / "data" / "1"
        data.mkdir()
        return box.run(data, settings, limits)


def num_left(uid):
    return len(list(sandbox.list_processes(uid)))


def running_commands():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            yield path.read_bytes()


# The sandbox


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_ended(tmp_path, name):
    """Bounded time and processes; nothing of it goes on afterwards."""
    started = time.monotonic()
    ran = run_source(tmp_path, HOSTILE[name], Limits(seconds=1.0, processes=24))
    assert ran.failure
    assert time.monotonic() - started < HANGS
    time.sleep(0.2)
    if os.getuid() == 0:
        assert num_left(sandbox.FIRST_UID + os.getpid() % 100_000) == 0


def test_an_audit_that_is_ended_leaves_nothing(tmp_path):
    """Its folder goes and its program ends, as when it comes to its own end."""
    program = tmp_path / "train_gpt.py"
    program.write_text(HOSTILE["an endless loop"])
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o711)  # the sandbox's user passes through
        command = [sys.executable, "-m", "audit", "--run", str(program)]
        audit = subprocess.Popen(
            command, env=os.environ | {"TMPDIR": place}, cwd=Path(__file__).parent.parent
        )
        while not (runs := list(Path(place).glob("golf-audit-*/run1/*"))) and audit.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        audit.terminate()
        assert (bool(runs), audit.wait(HANGS), os.listdir(place)) == (True, 143, [])
        assert not [command for command in running_commands() if place.encode() in command]


def test_memory_is_bounded(tmp_path):
    """A process gets no more addresses than its limit, and all together no more memory."""
    ran = run_source(tmp_path, "x = bytearray(1 << 33)\nprint('got it')\n", QUICK._replace(memory=1 << 30))
    assert "MemoryError" in ran.text
    assert "got it" not in ran.text


def test_a_bomb_in_a_wrapper_is_not_unpacked(tmp_path):
    """Looking at a program decompresses within bounds; running it meets the limit of memory."""
    blob = base64.b85encode(lzma.compress(bytes(40_000_000), preset=0)).decode()
    (tmp_path / "train_gpt.py").write_text(
        f"import lzma,base64\nexec(lzma.decompress(base64.b85decode('{blob}')))"
    )
    started = time.monotonic()
    with Box(tmp_path / "train_gpt.py") as box:
        plan = run.plan_run(box, None)
    assert plan.vocab_size == run.TOY_VOCAB
    assert time.monotonic() - started < HANGS


def test_files_are_bounded(tmp_path):
    """A disk is not filled."""
    source = "f = open('x', 'wb')\nf.write(bytes(3_000_000))\nf.flush()\nprint('wrote it')\n"
    assert "wrote it" not in run_source(tmp_path, source, QUICK._replace(file_bytes=1 << 20)).text


def test_no_secret_of_the_environment_reaches_a_program(tmp_path, monkeypatch):
    """Neither by inheritance nor through /proc."""
    monkeypatch.setenv("GOLF_SECRET_TOKEN", "tulip")
    source = (
        "import glob, os\nprint(sorted(os.environ))\n"
        "for name in glob.glob('/proc/[0-9]*/environ'):\n    try:\n        print(open(name, 'rb').read())\n"
        "    except OSError:\n        pass\n"
    )
    ran = run_source(tmp_path, source, DATA_PATH="d")
    assert ran.status == 0
    assert "DATA_PATH" in ran.text
    assert "SECRET" not in ran.text
    assert "tulip" not in ran.text


def test_nothing_outside_can_be_written_or_read(tmp_path):
    """Files of the machine, of its users and of other programs are out of reach; its own folder is not."""
    private = tmp_path / "private.txt"
    private.write_text("tulip")
    target = tmp_path / "written.txt"
    os.chmod(tmp_path, 0o777)  # the mode must not be what protects it
    source = (
        f"import os\nopen('own.txt', 'w').write('x')\nprint('own', os.path.exists('own.txt'))\n"
        f"for path, mode in (('{private}', 'r'), ('{target}', 'w'), ('/tmp/golf_written', 'w')):\n"
        "    try:\n        print(open(path, mode).read() if mode == 'r' else open(path, mode).write('x'))\n"
        "    except OSError as error:\n        print('refused', type(error).__name__)\n"
    )
    ran = run_source(tmp_path, source)
    assert "own True" in ran.text
    assert ran.text.count("refused Permission") == 3, ran.text
    assert "tulip" not in ran.text
    assert not target.exists()
    assert not Path("/tmp/golf_written").exists()


def test_a_program_has_no_network_and_no_rights(tmp_path):
    """Not even the loopback of the machine, nor root."""
    if not sandbox.namespace_command():
        pytest.skip("no network namespace can be had here")
    source = (
        "import os, socket\nprint('uid', os.getuid())\n"
        "try:\n    socket.create_connection(('192.0.2.1', 80), 2)\n"
        "except OSError as error:\n    print('no', error)\n"
        "try:\n    os.setuid(0)\n    print('root')\nexcept OSError:\n    print('no root')\n"
    )
    ran = run_source(tmp_path, source)
    assert "unreachable" in ran.text
    if os.getuid() == 0:
        assert "uid 0" not in ran.text
        assert "no root" in ran.text
    assert any(row[1] == "socket.connect" for row in ran.trace)


def test_files_and_commands_are_traced(tmp_path):
    """K18 rests on what is opened, started and called, with the time."""
    source = "import subprocess\nopen('a.bin', 'wb').write(b'x')\nopen('a.bin', 'rb').read()\n"
    source += "subprocess.run(['true'], check=False)\n"
    rows = run_source(tmp_path, source).trace
    assert [(Path(row[2]).name, row[3]) for row in rows if "a.bin" in row[2]] == [
        ("a.bin", "w"),
        ("a.bin", "r"),
    ]
    assert any(row[1] == "subprocess.Popen" and row[2] == "true" for row in rows)


def test_a_reader_that_is_redirected_gets_the_other_file(tmp_path):
    """The replay's core: reads of the artifact's name get the first run's bytes, writes do not."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "train_gpt.py").write_text(
        "from pathlib import Path\nPath('a.bin').write_bytes(b'new')\nprint(Path('a.bin').read_bytes())\n"
    )
    with Box(folder / "train_gpt.py") as box:
        data = box.root / "data" / "1"
        data.mkdir()
        (data / "kept.bin").write_bytes(b"old")
        ran = box.run(data, {}, QUICK, redirected={"a.bin": str(data / "kept.bin")})
        assert (ran.folder / "a.bin").read_bytes() == b"new"
    assert "b'old'" in ran.text
    assert "redirected_reads:1" in ran.text


def test_a_box_leaves_nothing_behind(tmp_path):
    """The copy and all runs go with it."""
    (tmp_path / "train_gpt.py").write_text("print(1)\n")
    with Box(tmp_path / "train_gpt.py") as box:
        assert box.entry.is_file()
    assert not box.root.exists()


def test_folders_around_a_program_are_bounded(tmp_path, monkeypatch):
    """Links are not followed, hidden files are not copied, too much is an error."""
    (tmp_path / "train_gpt.py").write_text("print(1)\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / ".secret").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with Box(tmp_path / "train_gpt.py") as box:
        assert [path.name for path in (box.root / "program").iterdir()] == ["train_gpt.py"]
    monkeypatch.setattr(sandbox, "MAX_COPY", 4)
    with pytest.raises(UserError, match="folder of its own"):
        Box(tmp_path / "train_gpt.py")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no line with val_loss"), (b"print('caf\xe9')\n", "codec"), (b"1/0\n", "ZeroDivision")],
)
def test_programs_that_do_not_run_get_no_verdict(tmp_path, content, said):
    """NOT RUN with the reason: never a bare pass for what did not run."""
    (tmp_path / "train_gpt.py").write_bytes(content)
    try:
        found = run.run_program(tmp_path / "train_gpt.py")
    except UserError as error:
        assert "Python program" in str(error)
        return
    assert {finding.verdict for finding in found.values()} == {"NOT RUN"}
    assert said in found["K12"].evidence[0]


def test_a_missing_program_is_an_error(tmp_path):
    """The message says what to name."""
    with pytest.raises(UserError, match="Name a train_gpt"):
        run.run_program(tmp_path / "train_gpt.py")


LIES = {
    "brackets": "b'[' * 200_000 + b'\\n'",
    "no JSON": "b'\\xff\\xfe\\n'",
    "a huge window": """b'{"protocol": "harness", "window": 1e99, "whole": 3}\\n'""",
    "other types": """b'{"protocol": "x"}\\n{"nats": [[1], "a"], "events": 7}\\n'""",
}


@pytest.mark.parametrize("name", LIES)
def test_lies_on_the_pipe_are_a_verdict_not_a_crash(tmp_path, name):
    """A program can write anything to the descriptors that it inherits, and to its own trace."""
    source = (
        "import os\nif not os.path.exists('a.bin'):\n    open('a.bin', 'wb').write(b'x')\n"
        "open('trace.jsonl', 'a').write('[[1]]\\n[1,2,3,4]\\n')\n"
        "print('final_x_exact val_loss:3.00000000 val_bpb:1.00000000')\n"
        f"for fd in range(3, 500):\n    try:\n        os.write(fd, {LIES[name]})\n"
        "    except OSError:\n        pass\n"
    )
    (tmp_path / "train_gpt.py").write_text(source)
    found = run.run_program(tmp_path / "train_gpt.py")
    assert found["K17"].verdict == "FAIL", found
    assert found["K9"].verdict == "FAIL"


# The miniature world


@pytest.mark.numeric
@pytest.mark.parametrize("vocab_size", [16, 64, 1024])
def test_the_world_states_its_own_bytes_and_nats(tmp_path, vocab_size):
    """Its tokenizer is a SentencePiece file, its bytes the contest's, its entropy below that of noise."""
    made = world.make_world(vocab_size, 300, 400)
    (tmp_path / "t.model").write_bytes(world.tokenizer_file(vocab_size))
    codec = load_codec(tmp_path / "t.model", vocab_size, "sentencepiece")
    assert codec.bos_id == world.BOS_ID
    assert (codec.token_bytes(made.val)[1:] == world.target_bytes(made.val, vocab_size)).all()
    assert made.source_nats(made.val) / 399 < made.noise_nats(made.val) / 399 - 0.3
    assert made.val[0] == world.BOS_ID
    assert set(made.noise(400, seed=1)[1:].tolist()) <= set(range(world.FIRST_WORD, vocab_size))


@pytest.mark.numeric
def test_the_source_is_a_probability():
    """Rows sum to one, and the source's own average cost is its entropy."""
    source = world.make_source(13)
    assert source.step.sum(1) == pytest.approx(np.ones(14))
    stream = source.draw(4000, seed=1)
    rows = np.bincount(stream[:-1], minlength=14) / 3999
    logs = np.log(np.where(source.step > 0, source.step, 1))
    assert source.nats(stream).mean() == pytest.approx(-(rows[:, None] * source.step * logs).sum(), rel=0.05)


# Judged from outside: no scorer is offered


def foreign(tmp_path, name):
    """A case without the protocol's names: its scorer is called otherwise."""
    text = program_text(name).replace("score", "charge").replace("import charge", "import score")
    for file in ("toy",):
        (tmp_path / f"{file}.py").write_text((FOLDER / f"{file}.py").read_text().replace("score", "charge"))
    (tmp_path / "train_gpt.py").write_text(text)
    return run.run_program(tmp_path / "train_gpt.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "failed", "replay"),
    [
        ("train_then_score_fixed", set(), "PASS"),
        ("train_then_score", {"K12", "K22"}, "PASS"),
        ("outcome_gate", {"K12", "K22"}, "PASS"),
        ("hidden_file", set(), "SUSPECT"),
        ("train_data_at_eval", {"K18"}, "SUSPECT"),
    ],
)
def test_totals_and_a_replay_judge_programs_that_offer_nothing(tmp_path, name, failed, replay):
    """Continuations of a text share its probability; a replaced artifact must bring its score along."""
    found = foreign(tmp_path, name)
    assert {check for check, finding in found.items() if finding.verdict == "FAIL"} == failed
    assert found["K13"].verdict == "NOT RUN"
    assert found["K17"].verdict == replay


def test_recorded_costs_are_found_in_the_text():
    """Windows of any layout; targets of other texts are nobody's."""
    tokens = world.make_world(16, 10, 200).val
    targets = tokens[1:].tolist()
    places = {tuple(targets[i : i + recorded.RUN_TOKENS]): i for i in range(len(targets) - 11)}
    called = [0] * 5 + targets[20:60] + targets[50:90] + [0, 0]
    found = recorded.locate(called, targets, places)
    assert [place for _, place in found] == [*range(20, 60), *range(50, 90)]
    assert found[0] == (5, 20)


def write_record(folder, rows):
    folder.mkdir()
    (folder / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n[1]\n")


def test_recorded_costs_are_compared_up_to_the_cut(tmp_path):
    """A cost that moves with the future fails; one that is printed and not recorded explains nothing."""
    tokens = world.make_world(16, 10, 101).val
    targets, logs = tokens[1:].tolist(), [[-27726] * 16] * 100
    write_record(tmp_path / "a", [[False, targets, [2.0] * 100, logs], [True, targets, [1.0] * 100, []]])
    write_record(tmp_path / "b", [[False, targets, [2.0] * 40 + [2.5] * 60, logs]])
    a, b = (recorded.read_losses(tmp_path / name, tokens) for name in "ab")
    assert a.is_complete
    assert a.num_learned == 100
    assert recorded.explains(a, 2.001)
    assert not recorded.explains(a, 1.9)
    assert recorded.compare(a, b, 40, "x").verdict == "PASS"
    assert recorded.compare(a, b, 41, "x").verdict == "FAIL"
    assert recorded.compare_rows(a, b, 50).verdict == "PASS"


SHIMMED = """
import torch, torch.nn.functional as F
from flash_attn_interface import flash_attn_func
device = torch.device("cuda", 0)
torch.cuda.set_device(device)
x = torch.ones(1, 3, 2, 4).to(device).cuda()
model = torch.compile(torch.nn.Linear(4, 5)).cuda()
with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
    y = model(flash_attn_func(x, x, x, causal=True))
torch.cuda.synchronize()
print(torch.zeros(2, device="cuda:0").device.type, tuple(y.shape), torch.cuda.max_memory_allocated())
F.cross_entropy(torch.zeros(3, 5), torch.tensor([1, 2, 3], device="cuda"))
"""


@pytest.mark.slow
def test_scripts_for_cuda_run_on_a_cpu(tmp_path):
    """Devices, streams, compilation and FlashAttention have stand-ins; costs are recorded."""
    (tmp_path / "train_gpt.py").write_text(SHIMMED)
    with Box(tmp_path / "train_gpt.py") as box:
        data = box.root / "data" / "1"
        data.mkdir()
        ran = box.run(data, {}, Limits(seconds=60), shims=str(box.root / "inside"))
        rows = [json.loads(line) for line in (ran.folder / "recorded.jsonl").read_text().splitlines()]
    assert ran.lines[-1][1] == "cpu (1, 3, 2, 5) 0", ran.text
    assert rows[0][:2] == [False, [1, 2, 3]]
    assert rows[0][2] == pytest.approx([np.log(5)] * 3)


def test_a_window_ends_where_another_begins():
    """A chance match past the end of a window may not take the next window's first target away."""
    targets = [*range(100), 16, *range(200, 230)]
    targets[48] = 16
    places = {tuple(targets[i : i + recorded.RUN_TOKENS]): i for i in range(len(targets) - 11)}
    found = recorded.locate(targets[16:48] + targets[16:48], targets, places)
    assert [place for _, place in found] == [*range(16, 48), *range(16, 48)]


def test_knowing_the_length_of_the_text_is_a_suspicion_knowing_its_words_a_failure():
    """Merged records let learning rates fall over the chunks of the text."""
    passed, failed = run.Finding("PASS", []), run.Finding("FAIL", ["x"])
    assert run.excuse_length({"K13": passed, "K14": failed})["K14"].verdict == "SUSPECT"
    assert run.excuse_length({"K13": failed, "K14": failed})["K14"].verdict == "FAIL"


# The command


def test_settings_of_this_harness_are_read_without_running_it():
    """A packed program has its recipe in its defaults; the source takes the toy's size."""
    packed = "PACKED_RECIPE = {'eval': {}}\nclass D:\n    vocab_size: int = option(512, 'VOCAB_SIZE', '')\n"
    assert run.harness_fields(parse_source(packed)) == {"PACKED_RECIPE": {"eval": {}}, "vocab_size": 512}
    assert run.harness_fields(parse_source("vocab_size: int = option(512)\n")) == {}


def test_clock_of_the_log_is_held_against_ours():
    """Minutes, seconds and milliseconds, as logs print them."""
    assert run.claimed_ms("1/20 train_loss: 9.0 train_time: 0.5m tok/s: 1") == 30_000
    assert run.claimed_ms("step:1/4 train_loss:0.0 train_time:12ms") == 12


def test_doctor_of_the_data_answers_for_k9_and_k10(tiny_data):
    """One implementation: the audit quotes data.doctor."""
    found = audit_data(tiny_data, None)
    assert {check: finding.verdict for check, finding in found.items()} == {"K9": "PASS", "K10": "PASS"}
    assert "validation documents" in " ".join(found["K10"].evidence)


def test_command_reports_a_program_as_a_folder_is_reported(tmp_path, capsys):
    """The same rows, verdicts and exit status; --json is one object."""
    for name in ("toy", "spaces_twice"):
        (tmp_path / f"{name}.py").write_text((FOLDER / f"{name}.py").read_text())
    assert main(["--run", str(tmp_path / "spaces_twice.py"), "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    rows = {row["id"]: row for row in report["checks"]}
    assert rows["K9"]["verdict"] == report["worst"] == "FAIL"
    assert rows["K12"]["verdict"] == "PASS"
    assert set(rows["K12"]) == {"id", "verdict", "evidence", "rule", "precedents", "fix"}


def test_command_without_anything_to_audit_says_what_it_takes():
    """No traceback, no silent success."""
    with pytest.raises(UserError, match="--run PROGRAM"):
        main([])


@pytest.mark.slow
def test_a_packed_program_of_ours_passes(tmp_path, packed_tiny):
    """The record's own program: every dynamic check that applies says PASS."""
    found = run.run_program(packed_tiny)
    assert {check: f.verdict for check, f in found.items()} == dict.fromkeys(run.DYNAMIC, "PASS"), found


@pytest.fixture(scope="module")
def packed_tiny(tmp_path_factory) -> Path:
    """A packed program with a small recipe that scores in sliding windows."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "recipe.toml").write_text(
        '[run]\ncompile = "off"\n'
        "[data]\nvocab_size = 64\nseq_len = 16\nbatch_tokens = 128\nmicro_batches = 1\n"
        "[model]\nnum_layers = 2\nmodel_dim = 32\nnum_heads = 2\nnum_kv_heads = 2\n"
        '[eval]\nmode = "sliding"\nstride = 8\nkeep_tail = true\n'
    )
    (folder / "program").mkdir()
    out = folder / "program" / "train_gpt.py"
    command = [sys.executable, "-m", "pack", "--recipe", str(folder / "recipe.toml"), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
    return out


def test_a_lock_that_a_run_leaves_is_no_artifact(tmp_path):
    """It may be younger than the artifact, of which the youngest is taken."""
    (tmp_path / "artifact.bin").write_bytes(b"weights")
    (tmp_path / ".lock").touch()
    ran = sandbox.Ran(0, "", [], [], tmp_path, 1.0)
    assert run.find_artifacts(ran) == [tmp_path / "artifact.bin"]
