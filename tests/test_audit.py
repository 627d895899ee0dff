"""The folder audit: one clean record, one violation at a time, and folders that mean harm."""

import base64
import json
import lzma
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import brotli
import pytest
from fixtures_audit import BYTES_PER_TOKEN, SOURCE, evidence, score_line, verdicts, write_folder

from audit.__main__ import audit_folder, main
from audit.table import CHECKS
from eval.logs import headlines, parse_log
from pack.program import wrap

SCORES = {1337: 1.15012345, 42: 1.15112345, 2025: 1.14912345}


def make_log(seed, bpb=None, **changes):
    """A log in the contest's old format; keyword arguments replace single facts."""
    facts = {"shards": 80, "tokens": 62_021_632, "stop": 600_050, "model": 15_800_000, "code": len(SOURCE)}
    facts |= {"label": "final_int8_zlib_roundtrip_exact", "per_token": BYTES_PER_TOKEN, "eval_ms": 1400}
    facts |= {"layers": 9, "printed_seed": seed, "more": ""} | changes
    bpb = SCORES[seed] if bpb is None else bpb
    return (
        "import torch\n    seed = int(os.environ.get('SEED', 7))\n"
        f"train_loader:dataset:fineweb10B_sp1024 train_shards:{facts['shards']}\n"
        f"val_loader:shards pattern=./data/fineweb_val_*.bin tokens:{facts['tokens']}\n"
        f"num_layers:{facts['layers']} model_dim:512\nseed:{facts['printed_seed']}\n"
        "step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.01ms\n"
        f"stopping_early: wallclock_cap train_time:{facts['stop']}ms step:13780/20000\n"
        "Serialized model: 67224983 bytes\nTotal submission size: 67272625 bytes\n"
        f"Code size: {facts['code']} bytes\nSerialized model int8+zlib: {facts['model']} bytes (payload:1)\n"
        f"Total submission size int8+zlib: {facts['model'] + facts['code']} bytes\n{facts['more']}"
        + score_line("final_int8_zlib_roundtrip", bpb, facts["per_token"], f" eval_time:{facts['eval_ms']}ms")
        + score_line(facts["label"], bpb, facts["per_token"])
    )


def clean_files():
    """A record that contradicts nothing: path -> text or bytes; submission.json as a dictionary."""
    mean = math.fsum(SCORES.values()) / 3
    files = {f"train_seed{seed}.log": make_log(seed) for seed in SCORES}
    submission = {"author": "A", "github_id": "a", "name": "Clean", "date": "2026-05-01", "val_bpb": mean}
    submission |= {"seeds": list(SCORES), "seed_results": {str(s): {"val_bpb": v} for s, v in SCORES.items()}}
    submission["bytes_total"] = 15_800_000 + len(SOURCE)
    return files | {
        "train_gpt.py": SOURCE,
        "submission.json": submission,
        "README.md": f"# Clean\n\nMean val_bpb {mean:.5f} over three seeds.\n",
    }


def wrap_source(source: str) -> str:
    """The wrapper that the contest's records use."""
    filters = [{"id": lzma.FILTER_LZMA2}]
    packed = base64.b85encode(lzma.compress(source.encode(), lzma.FORMAT_RAW, filters=filters)).decode()
    options = 'format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]'
    return f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{packed}"),{options}))\n'


def all_logs(**changes):
    return {f"train_seed{seed}.log": make_log(seed, **changes) for seed in SCORES}


def claim(**changes):
    return {"submission.json": clean_files()["submission.json"] | changes}


HASHED_CACHE = """
def look_up(ctx_hash, tgt, prime, mask):
    return (ctx_hash ^ (tgt * prime)) & mask
"""
CALLED = "    args = Hyperparameters()\n"
USE_CACHE = CALLED + "    look_up(1, 2, 3, 4)\n"
USE_CACHE_IF_ON = CALLED + "    if args.ngram_order > 0:\n        look_up(1, 2, 3, 4)\n"
CACHE_ON = SOURCE.replace(CALLED, USE_CACHE) + HASHED_CACHE
ADAPT = """
def adapt(model, val_tokens):
    for chunk in val_tokens.split(64):
        loss = model(chunk)
        (loss / 2).backward()
"""
ADAPT_BEFORE = SOURCE.replace("    torch.save", "    adapt(weights, val_tokens)\n    torch.save") + ADAPT
ADAPT_AFTER = (
    SOURCE.replace('final_model.pt")\n', 'final_model.pt")\n    adapt(weights, val_tokens)\n') + ADAPT
)
MONITOR = """
def train(model, loader, val_data):
    val_loss = evaluate(model, val_data)
    print(val_loss)
    loss = model(loader.next())
    loss.backward()
"""
MONITORED = SOURCE.replace("    torch.save", "    train(weights, loader, val_data)\n    torch.save") + MONITOR
BIGRAM = SOURCE.replace(CALLED, CALLED + "    key = (36313 * t[1:]) ^ (27191 * t[:-1])\n")
HELPER = {
    "train_gpt.py": "from cache import look_up\n" + SOURCE.replace(CALLED, USE_CACHE),
    "cache.py": HASHED_CACHE,
}
BIG_HELPER = "x = 1\n" + "# filler\n" * 30_000

# name -> (files that replace or join the clean ones, check, verdict it must get)
VIOLATIONS = {
    "leading space counted twice": (all_logs(per_token=176_330_000 / 62_021_632), "K3", "SUSPECT"),
    "a tenth of the documents": (all_logs(tokens=9_662_464), "K4", "SUSPECT"),
    "local preparation": (all_logs(shards=1499), "K4", "SUSPECT"),
    "two denominators in a log": (
        {"train_seed42.log": make_log(42, more=score_line("sliding", 1.16, 2.8))}, "K3", "FAIL"),
    "trained too long": (all_logs(stop=601_153), "K5", "FAIL"),
    "scored too long": (all_logs(eval_ms=688_000), "K5", "FAIL"),
    "calibrated after the clock": (
        all_logs(stop=599_900, more="GPTQ:collected 67 Hessians in 12.5s\n"), "K5", "SUSPECT"),
    "too large by the log": (all_logs(model=16_100_000), "K6", "FAIL"),
    "too large by its own claim": (claim(bytes_total=16_071_321), "K6", "FAIL"),
    "size of another run": (claim(bytes_total=15_000_000), "K6", "SUSPECT"),
    "code behind a stub": (
        {"train_gpt.py": 'exec(open(__file__.replace("train_gpt","real")).read())', "real.py": BIG_HELPER}
        | all_logs(code=74), "K6", "SUSPECT"),
    "code behind a stub, over by the log too": (
        {"train_gpt.py": 'exec(open("real.py").read())', "real.py": BIG_HELPER}
        | all_logs(model=15_900_000, code=150_000), "K6", "FAIL"),
    "headline of no log": (claim(val_bpb=1.13987654), "K7", "FAIL"),
    "headline is the best seed": (
        claim(val_bpb=SCORES[2025]) | {"README.md": "1.14912345"}, "K7", "SUSPECT"),
    "README says another number": ({"README.md": "val_bpb 1.1001"}, "K7", "SUSPECT"),
    "file name is not the seed": ({"train_seed42.log": make_log(42, printed_seed=7)}, "K7", "FAIL"),
    "seed result of another run": (
        claim(seed_results={"42": {"val_bpb": 1.13}, "1337": {"val_bpb": SCORES[1337]}}), "K7", "FAIL"),
    "third seed of another configuration": ({"train_seed42.log": make_log(42, layers=11)}, "K7", "SUSPECT"),
    "deviation of nothing": (claim(val_bpb_std=0.0001234), "K8", "SUSPECT"),
    "hash key with the target": ({"train_gpt.py": CACHE_ON}, "K2", "SUSPECT"),
    "the same in a wrapper": ({"train_gpt.py": wrap_source(CACHE_ON)}, "K2", "SUSPECT"),
    "the same in two wrappers": ({"train_gpt.py": wrap_source(wrap_source(CACHE_ON))}, "K2", "SUSPECT"),
    "the same in a helper": (HELPER, "K2", "SUSPECT"),
    "adapted to validation before the artifact": ({"train_gpt.py": ADAPT_BEFORE}, "K2", "SUSPECT"),
    "the same, wrapped": ({"train_gpt.py": wrap_source(ADAPT_BEFORE)}, "K2", "SUSPECT"),
    "downloads": ({"train_gpt.py": "import requests\n" + SOURCE}, "K2", "SUSPECT"),
    "starts a program": (
        {"train_gpt.py": SOURCE.replace(CALLED, CALLED + '    os.system("zpaq x")\n')}, "K2", "SUSPECT"),
    "within-word hints": (
        all_logs(more="ngram_tilt:hints total=9 token_gate=1 within_gate=7 word_gate=1\n"), "K2", "SUSPECT"),
    "code that only running shows": (
        {"train_gpt.py": "import sys\nexec(sys.argv[1])\n" + SOURCE}, "K1", "SUSPECT"),
    "unknown payload": (
        {"train_gpt.py": SOURCE + 'open("prefix.blob")\n', "prefix.blob": "x" * 99}, "K1", "SUSPECT"),
    "empty program": ({"train_gpt.py": ""}, "K24", "FAIL"),
    "program that does not compile": ({"train_gpt.py": "def main(:\n"}, "K24", "FAIL"),
    "broken JSON": ({"submission.json": '{"val_bpb": 1.15,'}, "K24", "FAIL"),
    "JSON without the keys": (claim() | {"submission.json": {"val_bpb": 1.15012345}}, "K24", "SUSPECT"),
    "undeclared package": ({"train_gpt.py": "import brotli\n" + SOURCE}, "K24", "SUSPECT"),
    "litter": ({".DS_Store": "x"}, "K24", "SUSPECT"),
}  # fmt: skip
LOOK_ALIKES = {
    "dead cache": ({"train_gpt.py": SOURCE.replace(CALLED, USE_CACHE_IF_ON) + HASHED_CACHE}, "K2"),
    "cache that nobody calls": ({"train_gpt.py": SOURCE + HASHED_CACHE}, "K2"),
    "bigram hash of the context": ({"train_gpt.py": BIGRAM}, "K2"),
    "adapted after the artifact is written": ({"train_gpt.py": ADAPT_AFTER}, "K2"),
    "validation loss printed while training": ({"train_gpt.py": MONITORED}, "K2"),
    "token-only hints": (
        all_logs(more="ngram_tilt:hints total=9 gated=9 token_gate=9 within_gate=0 word_gate=0\n"), "K2"),
    "wrapped program": ({"train_gpt.py": wrap_source(SOURCE)}, "K1"),
    "declared package": ({"train_gpt.py": "import brotli\n" + SOURCE, "requirements.txt": "brotli"}, "K24"),
    "cap noticed after the step": (all_logs(stop=600_137), "K5"),
    "ablation that no number rests on": (
        {"ablation.txt": make_log(42, 1.3, label="final_int8_zlib_roundtrip_exact", printed_seed=9)}, "K7"),
    "a log filed twice": ({"train.log": make_log(1337)}, "K7"),
}  # fmt: skip


def test_clean_record_has_no_complaint(tmp_path):
    """A tool that accuses the innocent is not used twice."""
    found = verdicts(write_folder(tmp_path, clean_files()))
    assert {k: v for k, v in found.items() if v != "NOT RUN"} == dict.fromkeys(
        ("K1", "K2", "K3", "K4", "K5", "K6", "K7", "K24"), "PASS"
    )
    assert list(found) == [f"K{i}" for i in range(1, 25)]


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violation_is_found_by_its_check(name, tmp_path):
    """Each of these cost a submission its place, or should have."""
    files, check, verdict = VIOLATIONS[name]
    folder = write_folder(tmp_path, clean_files() | files)
    assert verdicts(folder)[check] == verdict, evidence(folder, check)


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alike_passes(name, tmp_path):
    """Dead code and legal twins were accused by earlier checkers, which had to take it back."""
    files, check = LOOK_ALIKES[name]
    folder = write_folder(tmp_path, clean_files() | files)
    assert verdicts(folder)[check] == "PASS", evidence(folder, check)


def test_setting_in_the_log_revives_dead_code(tmp_path):
    """What ran decides: the default is off, the log says on."""
    source = SOURCE.replace(CALLED, USE_CACHE_IF_ON) + HASHED_CACHE
    logs = {
        name: text.replace("model_dim:512", "model_dim:512 ngram_order:5")
        for name, text in all_logs().items()
    }
    assert (
        verdicts(write_folder(tmp_path, clean_files() | logs | {"train_gpt.py": source}))["K2"] == "SUSPECT"
    )


def test_two_seeds_are_called_thin(tmp_path):
    """Variance from two values means little."""
    files = clean_files()
    del files["train_seed42.log"]
    assert verdicts(write_folder(tmp_path, files))["K8"] == "SUSPECT"


@pytest.mark.parametrize(("gain", "verdict"), [(0.05, "PASS"), (0.0005, "SUSPECT")])
def test_row_to_beat_is_tested_with_the_margin(gain, verdict, tmp_path):
    """0.005 nats at p < 0.01, from unrounded scores."""
    folder = write_folder(tmp_path / "new", clean_files())
    old = {f"train_seed{s}.log": make_log(s, v + gain) for s, v in SCORES.items()}
    against = write_folder(tmp_path / "old", old)
    found = {check.id: finding for check, finding in audit_folder(folder, [against])}
    assert found["K8"].verdict == verdict, found["K8"].evidence


@pytest.mark.parametrize(
    "wrapped",
    [
        f"import zlib\nexec(zlib.decompress({zlib.compress(CACHE_ON.encode())!r}))",
        f"import brotli as b\nexec(b.decompress({brotli.compress(CACHE_ON.encode())!r}).decode())",
        f"from lzma import decompress as d\nx={lzma.compress(CACHE_ON.encode())!r}\nexec(compile(d(x),'p'))",
        f"import base64\ns = base64.b64decode('{base64.b64encode(CACHE_ON.encode()).decode()}')\nexec(s)",
    ],
    ids=["zlib", "brotli", "lzma", "base64"],
)
def test_wrappers_are_opened_without_running_them(wrapped, tmp_path):
    """A wrapper hides nothing: the pattern inside is found."""
    assert verdicts(write_folder(tmp_path, clean_files() | {"train_gpt.py": wrapped}))["K2"] == "SUSPECT"


@pytest.mark.parametrize("method", ["brotli", "lzma", "mix"])
def test_own_packed_programs_are_readable(method, tmp_path):
    """The packer's stub is one of the wrappers that the audit opens."""
    packed = wrap(CACHE_ON, method)
    found = verdicts(
        write_folder(tmp_path, clean_files() | {"train_gpt.py": packed, "requirements.txt": "brotli"})
    )
    assert (found["K1"], found["K2"]) == ("PASS", "SUSPECT")


CPU_LOG = """config_hash:2376abb05cceda73
val_loader:shards pattern=x/fineweb_val_*.bin tokens:{tokens}
train_batch_tokens:1024 train_seq_len:256 iterations:20000 warmup_steps:2 max_wallclock_seconds:180.000
seed:{seed}
step:2677/20000 train_loss:3.3163 train_time:180017ms step_avg:112.07ms
stopping_early: wallclock_cap train_time:180017ms step:2677/20000
Code size: {code} bytes
Serialized model int8+zstd: 736362 bytes (payload_ratio:4.28x)
Total submission size int8+zstd: {total} bytes
final_int8_zstd_roundtrip_exact val_loss:3.74761101 val_bpb:{bpb:.8f}
"""


def test_records_of_the_cpu_track_are_judged_by_its_limits(tmp_path):
    """A megabyte, 300 s; the contest's validation text is not theirs."""
    facts = {"tokens": 90_027, "code": len(SOURCE), "total": 736_362 + len(SOURCE)}
    logs = {
        f"train_seed{s}.log": CPU_LOG.format(seed=s, bpb=2.2 + v / 100, **facts) for s, v in SCORES.items()
    }
    mean = math.fsum(2.2 + v / 100 for v in SCORES.values()) / 3
    files = clean_files() | logs | claim(val_bpb=mean, seed_results={}, bytes_total=facts["total"])
    files |= {"README.md": f"val_bpb {mean:.6f}", "artifact.bin": b"\0" * 700_000}
    found = verdicts(write_folder(tmp_path, files, "track_cpu"))
    assert [found[k] for k in ("K3", "K4", "K5", "K6", "K7", "K24")] == ["NOT RUN"] * 2 + ["PASS"] * 4
    files["artifact.bin"] = b"\0" * 999_999
    assert verdicts(write_folder(tmp_path, files, "track_cpu"))["K6"] == "FAIL"


def test_recipe_is_no_record(tmp_path):
    """A folder with a recipe and its README claims nothing yet."""
    folder = write_folder(tmp_path, {"recipe.toml": "[run]\n", "README.md": "x"}, name="2026-05-01_Recipe")
    assert set(verdicts(folder).values()) == {"NOT RUN", "PASS"}


# Logs


@pytest.mark.parametrize(
    ("line", "label", "seconds"),
    [
        ("1776142688.353 quantized_ttt_phased val_loss:2.3 val_bpb:1.06 eval_time:519546ms",
         "quantized_ttt_phased", 519.546),
        ("ttt_sliding:done val_loss=2.795171 val_bpb=1.082098 elapsed=293.2s", "ttt_sliding", 293.2),
        ("final_sliding_window_eval_exact stride:64 val_loss:1.96 val_bpb:1.16",
         "final_sliding_window_eval_exact stride:64", None),
    ],
)  # fmt: skip
def test_score_lines_of_all_formats(line, label, seconds):
    """Old, new and time-stamped logs."""
    (score,) = parse_log("x", line).scores
    assert (score.label, score.seconds) == (label, seconds)


def test_source_in_a_log_states_nothing():
    """Old logs begin with the whole script."""
    log = parse_log("x", 'log0(f"seed:{args.seed}")\nlog0(f"final val_loss:{a:.4f} val_bpb:{b:.4f}")\n')
    assert log.scores == []
    assert log.facts == {}


def test_headline_is_the_last_label_that_all_logs_share():
    """A failed extra evaluation of one seed is not the claim."""
    good = "sliding val_loss:2.5 val_bpb:1.0893897{}\n"
    logs = [
        parse_log("a", good.format(1)),
        parse_log("b", good.format(2) + "extra val_loss:3.1 val_bpb:1.336\n"),
    ]
    assert {name: score.val_bpb for name, score in headlines(logs).items()} == {
        "a": 1.08938971,
        "b": 1.08938972,
    }


# Command


def test_command_prints_table_json_and_markdown(tmp_path, capsys):
    """Three readers: a person, a program, a pull request; the status is the worst verdict."""
    folder = str(write_folder(tmp_path, clean_files()))
    assert main([folder]) == 0
    assert "K7  PASS" in capsys.readouterr().out
    bad = str(write_folder(tmp_path / "bad", clean_files() | VIOLATIONS["headline of no log"][0]))
    assert main([bad, "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert [set(row) for row in report["checks"]] == [
        {"id", "verdict", "evidence", "rule", "precedents", "fix"}
    ] * 24
    litter = str(write_folder(tmp_path / "litter", clean_files() | {".DS_Store": "x"}))
    assert main([litter, "--markdown"]) == 3
    assert "| K24 folder and files | SUSPECT |" in capsys.readouterr().out


def test_every_check_says_rule_and_fix():
    """A verdict without a way out is of no use."""
    assert [
        check.id for check in CHECKS if not (check.title and check.rule and check.precedents and check.fix)
    ] == []
    assert [check.id for check in CHECKS if (check.run is None) == (check.absent == "")] == []


def test_audit_loads_no_torch(tmp_path):
    """It runs where nothing is installed for training, within a second or two."""
    folder = write_folder(tmp_path, clean_files())
    code = "import sys; from audit.__main__ import main; main(sys.argv[1:]); "
    code += "sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, check=True, stdout=subprocess.DEVNULL)


ODD_VALUES = [
    None,
    True,
    -1,
    3,
    1e400,
    "1.15",
    "",
    [],
    {},
    [[]],
    {"1": 2},
    {"\u00b2": {"val_bpb": 1.0}},
    "9" * 5000,
]


@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_any_json_value_gets_a_verdict(value, tmp_path):
    """Keys of submission.json hold what their authors liked."""
    keys = ("val_bpb", "seeds", "seed_results", "bytes_total", "track", "val_bpb_std", "artifact_bytes_max")
    for key in keys:
        folder = write_folder(tmp_path / key, clean_files() | claim(**{key: value}))
        assert len(verdicts(folder)) == 24


# Harm


def test_nothing_of_the_folder_runs(tmp_path):
    """Import, exec, a .pth or a conftest: all stay text."""
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n"
    names = ("train_gpt.py", "helper.py", "sitecustomize.py", "conftest.py", "lzma.py", "torch.py")
    folder = write_folder(tmp_path, clean_files() | dict.fromkeys(names, f"import helper\n{trap}"))
    audit_folder(folder)
    assert not (tmp_path / "sprung").exists()


def bomb(compressed: bytes, call: str) -> str:
    literal = base64.b85encode(compressed).decode()
    return f"import base64,lzma,zlib,brotli\nexec({call}(base64.b85decode({literal!r})))"


DOUBLING = "\n".join(["a0='x'", *(f"a{i}=a{i - 1}+a{i - 1}" for i in range(1, 39)), "exec(a38)"])
HOSTILE = {
    "zlib bomb": bomb(zlib.compress(b"\0" * 50_000_000, 9), "zlib.decompress"),
    "lzma bomb": bomb(lzma.compress(b"\0" * 50_000_000), "lzma.decompress"),
    "brotli bomb": bomb(brotli.compress(b"\0" * 50_000_000), "brotli.decompress"),
    "cut stream": bomb(zlib.compress(b"x = 1\n" * 99)[:-9], "zlib.decompress"),
    "huge lzma dictionary": 'import lzma\nexec(lzma.decompress(b"x", lzma.FORMAT_RAW, None,'
    ' [{"id": 33, "dict_size": 1 << 32}]))',
    "string that doubles": DOUBLING,
    "string that replaces itself": "exec('" + "a" * 9999 + "'.replace('a', '" + "b" * 9999 + "'))",
    "unknown codec": "exec(b'x'.decode('zlib_codec'))",
    "wrapper of itself": 'exec(open("train_gpt.py").read())\nexec(open("/etc/passwd").read())',
    "endless program": "x = 1\n" * 31_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_wrapper_gets_a_verdict_within_bounds(name, tmp_path):
    """Bounded time and memory, and never a pass."""
    assert (
        verdicts(write_folder(tmp_path, clean_files() | {"train_gpt.py": HOSTILE[name]}))["K1"] == "SUSPECT"
    )


@pytest.mark.parametrize(
    "source",
    [
        "(" * 5000,
        "if " + "not " * 900 + "x:\n  pass",
        "f" + "()" * 900,
        "-" * 100_000 + "1",
        "x = " + "1+" * 50_000 + "1",
        "\0",
        "\ufeffx=1\udc80",
    ],
)
def test_hostile_source_does_not_stop_the_audit(source, tmp_path):
    """Python's parser raises several things about it, or parses what no recursion can walk."""
    data = source.encode("utf-8", "surrogatepass")
    assert len(verdicts(write_folder(tmp_path, clean_files() | {"train_gpt.py": data}))) == 24


def test_links_pipes_and_huge_files_are_named_not_followed(tmp_path):
    """A link may lead to the home folder, a pipe blocks for ever, a log may be sparse and endless."""
    folder = write_folder(tmp_path, clean_files())
    (tmp_path / "secret.log").write_text(make_log(42, 1.0))
    os.symlink(tmp_path / "secret.log", folder / "train_seed7.log")
    os.symlink(folder, folder / "circle")
    os.mkfifo(folder / "pipe.log")
    with open(folder / "huge.log", "wb") as file:
        file.truncate(20 << 30)
    (folder / "latin.log").write_bytes(b"\xff\xfe val_bpb \x80")
    found = evidence(folder, "K24")
    for fact in ("train_seed7.log is a link", "circle is a link", "pipe.log is a other", "huge.log has"):
        assert fact in found
    assert "1.0" not in evidence(folder, "K8").split("mean ")[0]


def test_report_passes_no_control_characters_on(tmp_path, capsys):
    """File names reach a terminal and a pull request."""
    folder = write_folder(tmp_path, clean_files() | {"\x1b[31m.DS_Store": "x", "a\nb/.DS_Store": "x"})
    main([str(folder)])
    assert "\x1b" not in capsys.readouterr().out
