"""The table of all checks, K1-K24: rule, precedents, way out, and the function that looks.

Adding a check: a row here, a function in checks.py, a violating folder and its repaired twin in the tests.
"""

from collections.abc import Callable
from typing import NamedTuple

from audit.checks import (
    NEEDS_DATA,
    Finding,
    check_claims,
    check_clock,
    check_fingerprint,
    check_implied_bytes,
    check_package,
    check_reachable,
    check_sizes,
    check_statistics,
    check_tokenizer,
    check_unwrapped,
    join,
)
from audit.folder import Case


class Check(NamedTuple):
    """A row of the table; `run` is None for checks that need the program to run, and `absent` says so."""

    id: str
    kind: str
    title: str
    rule: str
    precedents: str
    fix: str
    run: Callable[[Case], Finding] | None = None
    absent: str = ""


NEEDS_RUN = "needs the program to run: --run PROGRAM"
NEEDS_NAMES = "programs do not say how their tables of tokens are to be renamed"
CHECKS = (
    Check("K1", "static", "whole program readable", "README: code is counted, reviewable, self-contained",
          "#1785 #1804 #1835", "ship source, or a wrapper that decompresses a literal", check_unwrapped),
    Check("K2", "static", "no suspicious live code", "C1-C4", "#659 #727 #1376 #1147 #1420",
          "remove it, or show by K11-K13 that it is legal", check_reachable),
    Check("K3", "log", "bytes behind the score", "README: prove that val_bpb is correctly calculated",
          "#1184 #1698 #1719 #2138", "count the raw text's bytes, from the sidecar or token byte table",
          check_implied_bytes),
    Check("K4", "log", "validation tokens and shards", "README: the fixed first-50k-document split",
          "#1854 #2018 #2109 #2127", "use the published shards, or show their hashes", check_fingerprint),
    Check("K5", "log", "minutes", "README: 10 minutes to train, 10 minutes to evaluate",
          "#889 #1028 #1908 #1967 #1972", "stop earlier; calibrate inside the training budget",
          check_clock),
    Check("K6", "log", "bytes", "README: code bytes plus compressed model, 16,000,000 in all",
          "#960 #1412 #1835", "lower bits or clip; count every code file; ship the counted program",
          check_sizes),
    Check("K7", "log", "README = submission.json = logs", "README: logs that support the claim",
          "#86 #2071 #2118 #2124", "file the logs of the claimed runs; headline = mean of all seeds",
          check_claims),
    Check("K8", "statistics", "better by more than noise",
          "README: 0.005 nats at p < 0.01; practice: p < 0.25", "#1902 #2146",
          "run at least three seeds and give all", check_statistics),
    Check("K9", "data", "raw bytes", "README: bytes per byte of the text", "#897 #1604 #1719 #1729",
          "see `data.doctor`; a tokenizer must give back the text that it is scored on", check_tokenizer),
    Check("K10", "data", "no document in training and validation", "C1", "#2127", "see `data.doctor`",
          absent=NEEDS_DATA),
    Check("K11", "dynamic", "weights ignore validation text",
          "README: CANNOT access validation data during training", "#44 #1376 #1972",
          "calibrate and adapt on training data", absent=NEEDS_RUN),
    Check("K12", "dynamic", "probabilities sum to one", "C2", "#779 #886 #1147 #1872",
          "normalize over the whole vocabulary before looking at the target", absent=NEEDS_RUN),
    Check("K13", "dynamic", "the future changes no score", "C1, C3", "#1240 #402", "score before you adapt",
          absent=NEEDS_RUN),
    Check("K14", "dynamic", "a prefix scores the same alone", "C1, C4", "#846 #1967",
          "build nothing from the whole stream", absent=NEEDS_RUN),
    Check("K15", "dynamic", "score before update", "C3", "#568 #991", "update only with scored tokens",
          absent=NEEDS_RUN),
    Check("K16", "dynamic", "every target exactly once", "C4", "#846 #881",
          "plan windows that do not overlap in targets", absent=NEEDS_RUN),
    Check("K17", "dynamic", "the artifact alone reproduces the score", "README: fully self-contained",
          "#2018 #168", "put what scoring needs into the artifact", absent=NEEDS_RUN),
    Check("K18", "dynamic", "files it opens", "README: no training data during evaluation", "#593 #609",
          "read training data before the clock stops", absent=NEEDS_RUN),
    Check("K19", "dynamic", "documents in another order", "C1, where independence is claimed",
          "#1797 #1851", "mask at document starts", absent=NEEDS_RUN),
    Check("K20", "dynamic", "memory of a copy (informative)", "C4", "#881", "none needed",
          absent=NEEDS_RUN),
    Check("K21", "dynamic", "renamed token ids", "C1", "#1420", "do not depend on token numbers",
          absent=NEEDS_NAMES),
    Check("K22", "dynamic", "no better than entropy on noise", "C1, C2", "#779 #886", "as K12 and K13",
          absent=NEEDS_RUN),
    Check("K23", "dynamic", "clock ledger", "README: 10 + 10 minutes", "#1868 #1967",
          "move work inside the timer", absent=NEEDS_RUN),
    Check("K24", "package", "folder and files",
          "README: the pull request only adds a folder; broken scripts are not accepted",
          "#400 #1143 #1851", "see the evidence", check_package),
)  # fmt: skip


def judge(case: Case, measured: dict[str, Finding] | None = None) -> list[tuple[Check, Finding]]:
    """Return every row of the table with its finding; `measured` holds those of probes that were run."""
    found, measured = [], measured or {}
    for check in CHECKS:
        if check.run is None:
            finding = Finding("NOT RUN", [check.absent])
        elif case.is_recipe_only and check.run is not check_package:
            finding = Finding("NOT RUN", ["recipe only: no record to check"])
        else:
            try:
                finding = check.run(case)
            except (RecursionError, MemoryError) as error:
                finding = Finding("SUSPECT", [f"gave up on hostile input: {type(error).__name__}"])
        parts = [finding, measured[check.id]] if check.id in measured else [finding]
        told = [part for part in parts if part.verdict != "NOT RUN"]
        found.append((check, join(*(told or parts[-1:]))))
    return found
