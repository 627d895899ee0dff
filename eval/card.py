"""The model card of a saved model: what it is, what it scored and how, where it is from, how to make another.

Everything in it is the run's own: what a run does not say is said to be unknown, not guessed.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from common import UserError, damage_named, read_json, sha256_file
from formats.checkpoints import RESULT_NAME, read_result
from formats.recipe import config_hash, format_toml, get_recipe
from scoring.modes import SCORERS
from train_gpt import ARTIFACT_NAME, Config

AUDIT_NAME, CARD_NAME = "audit.json", "README.md"
KEPT = (
    "score",
    "ledger",
    "steps",
    "train_ms",
    "config_hash",
    "seed",
    "artifact_sha256",
    "over_limits",
    "origin",
)
UNKNOWN = "unknown"


def read_facts(file: Path) -> dict[str, Any]:
    """Return what a run says of the artifact `file` and what an audit found; nothing of other files.

    A checkpoint's weights are not those that were scored.
    """
    if file.name != ARTIFACT_NAME or not file.with_name(RESULT_NAME).is_file():
        return {}
    result = read_result(file.parent)
    if result.get("artifact_sha256") != sha256_file(file):
        return {}
    return {name: result[name] for name in KEPT if name in result} | read_audit(file.with_name(AUDIT_NAME))


def read_audit(path: Path) -> dict[str, Any]:
    """Sum up the audit beside an artifact: {"audit": {sha256, verdicts}}, or nothing where there is none."""
    if not path.is_file():
        return {}
    audit = read_json(path)
    with damage_named(path, "an audit with checks", "Audit the folder again."):
        verdicts = Counter(check["verdict"] for check in audit["checks"])
    return {"audit": {"sha256": sha256_file(path), "verdicts": dict(verdicts)}}


def write_front_matter(stats: dict, facts: dict) -> str:
    """Return the YAML that the hub reads, between its lines of dashes."""
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError as error:
        raise UserError("a model card needs a package: pip install huggingface_hub") from error
    scored = []
    if "score" in facts:
        result = EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name="validation text of the run",
            metric_type="bits_per_byte",
            metric_name="val_bpb",
            metric_value=round(facts["score"]["val_bpb"], 8),
        )
        scored = [result]
    about = {"model_name": stats["name"], "eval_results": scored} if scored else {}
    data = ModelCardData(
        library_name="parameter-golf", pipeline_tag="text-generation", tags=["parameter-golf"], **about
    )
    return f"---\n{data.to_yaml()}\n---\n"


def spell(facts: dict, name: str, unit: int = 1, form: str = ",") -> str:
    """Spell a number of a result in units, or that it is unknown: older and other programs state less."""
    value = facts.get(name)
    return format(value / unit if unit != 1 else value, form) if isinstance(value, int | float) else UNKNOWN


def result_lines(stats: dict, facts: dict) -> list[tuple[str, str]]:
    """Return the rows of the table of results."""
    seen = f"{stats['total_tokens']:,} tokens" if stats["total_tokens"] else UNKNOWN
    rows = [("weights", f"{stats['num_params']:,}"), ("trained on", seen)]
    if "score" not in facts:
        return [*rows, ("val_bpb", "unknown: these weights are no artifact that a finished run scored")]
    score, sizes = facts["score"], dict(facts.get("ledger", []))
    code = sum(size for name, size in sizes.items() if name.startswith("code"))
    how = ", ".join(f"{name} {score[name]}" for name in ("context_len", "stride") if name in score)
    rows += [
        ("val_bpb", f"{score['val_bpb']:.8f} bits a byte"),
        (
            "scored",
            f"{spell(score, 'num_tokens')} tokens, {spell(score, 'num_bytes')} bytes; "
            f"{score.get('mode', UNKNOWN)}{', ' * bool(how)}{how}",
        ),
        (
            "bytes",
            f"{sum(sizes.values()):,}: code {code:,}, weights and recipe {sum(sizes.values()) - code:,}",
        ),
        ("training", f"{spell(facts, 'steps')} steps in {spell(facts, 'train_ms', 1000, ',.1f')} s"),
    ]
    over = facts.get("over_limits") or []
    return [*rows, ("over its limits", "; ".join(map(str, over)))] if over else rows


def source_lines(cfg: Config, tokenizer: str, facts: dict) -> list[tuple[str, str]]:
    """Return the rows of the table of origins."""
    origin, audit = facts.get("origin", {}), facts.get("audit")
    verdicts = (
        ", ".join(f"{count} {verdict}" for verdict, count in audit["verdicts"].items()) if audit else ""
    )
    machine = origin.get("machine")
    return [
        ("recipe", facts.get("config_hash", config_hash(cfg))),
        ("seed", str(facts.get("seed", cfg.run.seed))),
        ("data", f"`{Path(cfg.data.data_path).name}`, digest {origin.get('data', UNKNOWN)}"),
        ("tokenizer", f"{cfg.data.tokenizer_kind}, {cfg.data.vocab_size:,} entries, sha256 {tokenizer}"),
        ("code", "digest " + origin.get("code", UNKNOWN)),
        ("artifact", f"sha256 {facts.get('artifact_sha256', UNKNOWN)}"),
        ("machine", f"`{json.dumps(machine)}`" if machine else UNKNOWN),
        ("audit", f"{verdicts}; audit.json has sha256 {audit['sha256']}" if audit else "not audited"),
    ]


def table(rows: list[tuple[str, str]]) -> str:
    """Lay rows out as a Markdown table without titles."""
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value.replace('|', '/')} |" for name, value in rows)]
    )


def write_card(cfg: Config, stats: dict, tokenizer: str, place: str) -> str:
    """Return the card of a model with statistics as eval.hub has them; place is what `load` is given."""
    facts = stats.get("facts", {})
    seed = facts.get("seed", cfg.run.seed)
    mode = facts.get("score", {}).get("mode")
    note = "The weights here are those that the scored artifact stands for." if mode else ""
    if mode and SCORERS[mode].adapt:
        note += f" Its scorer ({mode}) adapts them as it reads; the forward pass alone pays more a byte."
    return f"""{write_front_matter(stats, facts)}
# {stats["name"]}

A small language model of [parameter golf](https://github.com/openai/parameter-golf), where code and
compressed weights fit in a byte limit.
{note}

{table(result_lines(stats, facts))}

![Loss of training and validation by step](loss.svg)

## Use

```
python -m eval.sample {place} --prompt "Once upon a time"
```

or `parameter_golf.load("{place}")`. `config.json` states the sha256 of each file; nothing here runs code.

## Where it comes from

{table(source_lines(cfg, tokenizer, facts))}

## Make it again

Save this as `recipe.toml`, then `python train_gpt.py --recipe recipe.toml run.seed={seed}` and
`python -m eval`.

```toml
{format_toml(get_recipe(cfg)).strip()}
```
"""
