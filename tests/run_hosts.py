"""Run the tests of numbers as other processors compute them: other instruction sets, one thread and two.

    python -m tests.run_hosts                                    every setting that this processor can do
    python -m tests.run_hosts --only avx2-2 tests/test_loss.py   one setting, some tests

Another processor adds in another order, so that a right result has other last digits; a test that takes the
luck of its digits for a promise fails there alone. Environment variables make the libraries compute as an
older processor does:

    ATEN_CPU_CAPABILITY       torch's own loops: softmax, sums, normal random numbers
    ONEDNN_MAX_CPU_ISA        oneDNN: products in bfloat16
    MKL_ENABLE_INSTRUCTIONS   MKL: torch's products in float32 and float64; only on Intel's processors
    MKL_CBWR                  the same on other processors, where COMPATIBLE alone has an effect
    OPENBLAS_CORETYPE         OpenBLAS: numpy's products
    NPY_DISABLE_CPU_FEATURES  numpy's own loops: logarithms, exponentials
    OMP_NUM_THREADS           threads, among which long sums and large products are divided

Before its tests, a setting must show in what the libraries report. The table at the end has a row a
setting; the status is 1 where a test failed or a setting had no effect. Settings that the processor cannot
do are left out, with the reason.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import CommandParser, run_command

REPOSITORY = Path(__file__).resolve().parent.parent
CPU_INFO = Path("/proc/cpuinfo")
SELECTION = "numeric and not (slow or gpu or packs)"
INTEL = "GenuineIntel"
VERBOSE = {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1", "OPENBLAS_VERBOSE": "2"}
PROBE = """
import torch, numpy
x = torch.ones(8, 8)
x @ x  # makes MKL report
torch.nn.functional.conv2d(x[None, None], x[None, None])  # makes oneDNN report
print("ATen", torch.backends.cpu.get_cpu_capability())
print("numpy", *numpy.show_config(mode="dicts")["SIMD Extensions"].get("found", []))
print("threads", torch.get_num_threads())
"""


class Variable(NamedTuple):
    """The value of a variable, and what the libraries then report."""

    value: str
    report: str


class Processor(NamedTuple):
    """What decides on the settings: /proc/cpuinfo's words, and the features that numpy can do without."""

    vendor: str
    flags: frozenset[str]
    numpy_features: tuple[str, ...]


class Setting(NamedTuple):
    """How the libraries are to compute."""

    name: str
    needs: frozenset[str]  # flags of the processor
    choices: dict[str, Variable]  # by variable


class Outcome(NamedTuple):
    """What came of a setting; `trouble` says why there are no counts."""

    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    trouble: str = ""
    left_out: bool = False


INSTRUCTION_SETS = (
    Setting("own", frozenset(), {}),
    Setting(
        "oldest",
        frozenset({"sse4_2"}),
        {
            "ATEN_CPU_CAPABILITY": Variable("default", "ATen DEFAULT"),
            "ONEDNN_MAX_CPU_ISA": Variable("SSE41", "isa:Intel SSE4.1"),
            "MKL_ENABLE_INSTRUCTIONS": Variable("SSE4_2", "(Intel(R) SSE4.2)"),
            "OPENBLAS_CORETYPE": Variable("Nehalem", "Core: Nehalem"),
        },
    ),
    Setting(
        "avx2",
        frozenset({"avx2", "fma"}),
        {
            "ATEN_CPU_CAPABILITY": Variable("avx2", "ATen AVX2"),
            "ONEDNN_MAX_CPU_ISA": Variable("AVX2", "isa:Intel AVX2"),
            "MKL_ENABLE_INSTRUCTIONS": Variable("AVX2", "(Intel(R) AVX2)"),
            "OPENBLAS_CORETYPE": Variable("Haswell", "Core: Haswell"),
        },
    ),
    Setting(
        "avx512",
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}),
        {
            "ATEN_CPU_CAPABILITY": Variable("avx512", "ATen AVX512"),
            "ONEDNN_MAX_CPU_ISA": Variable("AVX512_CORE", "isa:Intel AVX-512 with AVX512BW"),  # no bfloat16
            "MKL_ENABLE_INSTRUCTIONS": Variable("AVX512", "(Intel(R) AVX-512)"),
            "OPENBLAS_CORETYPE": Variable("SkylakeX", "Core: SkylakeX"),
        },
    ),
)


def read_processor() -> Processor:
    """Read vendor, flags and features; empty where the system does not tell."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    return Processor(facts.get("vendor_id", ""), frozenset(facts.get("flags", "").split()), tuple(features))


def all_settings(processor: Processor) -> list[Setting]:
    """Return every instruction set with one thread and with two; its own with two: `make test` has one."""
    settings = []
    for name, needs, choices in INSTRUCTION_SETS:
        chosen = dict(choices)
        if processor.vendor != INTEL and chosen:
            del chosen["MKL_ENABLE_INSTRUCTIONS"]
            if name == "oldest":
                chosen["MKL_CBWR"] = Variable("COMPATIBLE", "CNR:COMPATIBLE")
        wide = [item for item in processor.numpy_features if "512" in item or item.endswith("V4")]
        dropped = {"oldest": processor.numpy_features, "avx2": wide}.get(name)
        if dropped:
            kept = [item for item in processor.numpy_features if item not in dropped]
            report = " ".join(["numpy", *kept]) + "\n"
            chosen["NPY_DISABLE_CPU_FEATURES"] = Variable(",".join(dropped), report)
        for count in ("1", "2") if choices else ("2",):
            threads = {"OMP_NUM_THREADS": Variable(count, f"threads {count}\n")}
            settings.append(Setting(f"{name}-{count}", needs, chosen | threads))
    return settings


def environment(setting: Setting) -> dict[str, str]:
    """Return the environment of a setting, without what a user or another setting chose."""
    names = {"MKL_CBWR", "NPY_DISABLE_CPU_FEATURES"}.union(*(row.choices for row in INSTRUCTION_SETS))
    kept = {name: value for name, value in os.environ.items() if name not in names}
    # Threads that wait sleep: spinning, they would take the cores from the other worker's tests.
    kept["OMP_WAIT_POLICY"] = "PASSIVE"
    return kept | {name: choice.value for name, choice in setting.choices.items()}


def variables_without_effect(setting: Setting) -> list[str]:
    """Start the libraries under a setting and return the choices that they do not report."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=environment(setting) | VERBOSE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return [
        f"{name}={choice.value}, as nothing says {choice.report.strip()!r}"
        for name, choice in setting.choices.items()
        if choice.report not in done.stdout
    ]


def run_tests(setting: Setting, tests: list[str]) -> Outcome:
    """Run the numeric tests under a setting, showing them as pytest does."""
    without_effect = variables_without_effect(setting)
    if without_effect:
        return Outcome(trouble=f"no effect: {'; '.join(without_effect)}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "2", "-m", SELECTION, f"--junitxml={report}", *tests]
        status = subprocess.run(command, cwd=REPOSITORY, env=environment(setting), check=False).returncode
        seconds = time.perf_counter() - start
        if status not in (0, 1) or not report.is_file():
            return Outcome(seconds=seconds, trouble=f"pytest ended with status {status}")
        counts = xml.etree.ElementTree.parse(report).getroot()[0].attrib
    failed = int(counts["failures"]) + int(counts["errors"])
    return Outcome(int(counts["tests"]) - int(counts["skipped"]) - failed, failed, seconds)


def format_table(outcomes: dict[str, Outcome]) -> str:
    """Write a row a setting and the sum of the seconds."""
    lines = [f"{'setting':<10} {'passed':>7} {'failed':>7} {'seconds':>8}"]
    for name, outcome in outcomes.items():
        counts = f"{outcome.passed:7,} {outcome.failed:7,} {outcome.seconds:8.0f}"
        lines.append(f"{name:<10} {outcome.trouble or counts}")
    return "\n".join([*lines, f"{'total':<26} {sum(outcome.seconds for outcome in outcomes.values()):8.0f}"])


def main(argv: list[str] | None = None) -> int:
    """Run every setting, also after one that failed; returns the exit status."""
    processor = read_processor()
    settings = all_settings(processor)
    names = [setting.name for setting in settings]
    summary, _, rest = __doc__.partition("\n")
    parser = CommandParser(prog="python -m tests.run_hosts", description=summary, epilog=rest)
    parser.add_argument("tests", nargs="*", help="files or tests; all numeric ones without")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args(argv)
    for name in options.tests:
        if not (REPOSITORY / name.partition("::")[0]).exists():
            parser.error(f"{name}: no such file; tests lie in tests/")
    chosen = [setting for setting in settings if setting.name in (options.only or names)]
    outcomes = {}
    for number, setting in enumerate(chosen, start=1):
        variables = " ".join(f"{name}={choice.value}" for name, choice in setting.choices.items())
        print(f"\n{number} of {len(chosen)}: {setting.name}: {variables}", flush=True)
        lacking = sorted(setting.needs - processor.flags)
        if lacking:
            outcome = Outcome(trouble=f"left out: no {', '.join(lacking)} here", left_out=True)
        else:
            outcome = run_tests(setting, options.tests)
        if outcome.trouble:
            print(outcome.trouble, flush=True)
        outcomes[setting.name] = outcome
    print(f"\n{format_table(outcomes)}")
    return int(any(item.failed or item.trouble for item in outcomes.values() if not item.left_out))


if __name__ == "__main__":
    run_command(main)
