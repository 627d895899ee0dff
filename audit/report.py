"""Write findings as a table for terminals, as JSON, and as Markdown for a pull request."""

import textwrap

from audit.checks import VERDICTS, Finding, worst
from audit.table import Check

Findings = list[tuple[Check, Finding]]
STATUS = {"PASS": 0, "NOT RUN": 0, "SUSPECT": 3, "FAIL": 4}  # 1 and 2 are errors of the command itself
WIDTH = 100
MAX_NOTES = 4  # lines of evidence below a verdict; --json has all that was kept


def exit_status(findings: Findings) -> int:
    """Return the exit status of the worst verdict."""
    return STATUS[worst(*(finding.verdict for _, finding in findings))]


def counts(findings: Findings) -> dict[str, int]:
    """Return verdict -> number of checks, worst first."""
    return {verdict: sum(f.verdict == verdict for _, f in findings) for verdict in reversed(VERDICTS)}


def as_json(name: str, findings: Findings) -> dict:
    """Return the report as a JSON object."""
    checks = [
        {"id": check.id, "verdict": finding.verdict, "evidence": finding.evidence}
        | {"rule": check.rule, "precedents": check.precedents.split(), "fix": check.fix}
        for check, finding in findings
    ]
    return {"folder": name, "worst": worst(*(f.verdict for _, f in findings)), "checks": checks}


def as_text(name: str, findings: Findings) -> str:
    """Lay out a table: one line a check; evidence, rule and fix below what did not pass."""
    wrapper = textwrap.TextWrapper(WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 15)
    lines = [f"audit of {clean(name)}: " + ", ".join(f"{n} {v}" for v, n in counts(findings).items() if n)]
    for check, finding in findings:
        first = clean(finding.evidence[0]) if finding.evidence else ""
        lines.append(f"{check.id:<4}{finding.verdict:<8} {check.title:<40} {textwrap.shorten(first, 60)}")
        if finding.verdict in ("FAIL", "SUSPECT"):
            rule = f"rule: {check.rule} ({check.precedents})"
            for note in (*finding.evidence[:MAX_NOTES], rule, f"fix: {check.fix}"):
                lines += wrapper.wrap(clean(note))
    return "\n".join(lines)


def as_markdown(name: str, findings: Findings) -> str:
    """Lay out a table that can be pasted into a pull request; checks not run are listed below it."""
    lines = [f"**Audit of `{clean(name)}`**", ""]
    lines += ["| check | verdict | evidence | rule |", "|---|---|---|---|"]
    absent: dict[str, list[str]] = {}
    for check, finding in findings:
        if finding.verdict == "NOT RUN":
            absent.setdefault(clean(finding.evidence[0]), []).append(check.id)
        else:
            evidence = "<br>".join(clean(text).replace("|", "\\|") for text in finding.evidence[:3])
            lines.append(f"| {check.id} {check.title} | {finding.verdict} | {evidence} | {check.rule} |")
    lines += ["", "Not run: " + "; ".join(f"{', '.join(ids)} ({why})" for why, ids in absent.items()) + "."]
    return "\n".join(lines)


def clean(text: str) -> str:
    """Return text without control characters: file names and logs are untrusted and reach a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
