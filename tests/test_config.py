"""Config: precedence, suggestions, checks, round trips."""

import dataclasses

import pytest
from fixtures_model import RECIPES, ROOT, TINY_VOCAB

from common import UserError
from formats.help import describe_section, describe_sections, explain
from formats.recipe import (
    config_fields,
    config_value,
    format_toml,
    get_recipe,
    read_recipe,
    recipe_hash,
    with_values,
)
from quantizers.config import METHODS
from scoring.config import EvalConfig
from train_gpt import Config, check_config, load_config, main


def test_later_sources_win(tmp_path):
    """defaults < recipe < environment < command line."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nnum_layers = 3\nmodel_dim = 64\n[optim]\nmatrix_lr = 0.5\n")
    environment = {"model.num_layers": "4", "optim.matrix_lr": "0.25"}
    cfg = load_config(str(recipe), environment, ["optim.matrix_lr=0.125"])
    assert (cfg.model.model_dim, cfg.model.num_layers, cfg.optim.matrix_lr) == (64, 4, 0.125)
    assert cfg.model.num_heads == Config().model.num_heads


@pytest.mark.parametrize(
    "name, near", [("model.num_layer", "model.num_layers"), ("optim.matrixlr", "optim.matrix_lr")]
)
def test_an_unknown_field_names_the_nearest_known_one(name, near):
    """A typo must not train the wrong model in silence."""
    with pytest.raises(UserError, match=near):
        with_values(Config(), {name: "1"}, "command line")


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.num_kv_heads=3", "num_kv_heads=3 must divide num_heads"),
        ("model.model_dim=60", "must be a multiple of num_heads"),
        ("model.model_dim=56", "must be even"),
        ("model.num_layers=two", "expected a whole number, found 'two'"),
        ("data.batch_tokens=1000", "must be a multiple of data.seq_len"),
        ("data.micro_batches=3", "must be a multiple of data.micro_batches=3"),
        ("schedule.stages=0:16:0:0:1:0", "schedule.stages: expected rows of start"),
        ("quant.matrix_bits=9", "must be at most 8"),
        ("quant.codec=rar", "must be one of none, zlib, lzma, zstd"),
        ("eval.stride=0", "must be at least 1"),
        ("model.mlp_mult=inf", "expected a finite number"),
        ("run.iterations=-1", "must be at least 0"),
        ("data.vocab_size=1", "at least 2"),
        ("model.tie_embeddings=maybe", "expected 0 or 1"),
        ("model.num_layers", "expected section.key=value"),
    ],
)
def test_settings_that_cannot_work_name_field_value_and_constraint(override, message):
    """One clear error at start, before data or model are touched."""
    with pytest.raises(UserError, match=message):
        load_config(None, {}, [override])


def test_every_field_reaches_the_config_from_text():
    """No field may be unreachable or change its type on the way."""
    for name, item in config_fields(Config).items():
        text = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else str(item.default)
        changed = with_values(Config(), {name: text}, "test")
        assert config_value(changed, name) == item.default, name


def test_environment_names_are_unique():
    """Two fields under one name would overwrite each other."""
    names = [item.metadata["env"] for item in config_fields(Config).values() if item.metadata["env"]]
    assert len(names) == len(set(names))


def test_a_written_recipe_reads_back_equal(tmp_path):
    """The run folder's recipe.toml must retrain the same run."""
    cfg = with_values(Config(), {"model.mlp_mult": 2.5, "data.data_path": 'a "b" \\c', "run.seed": 7}, "test")
    path = tmp_path / "recipe.toml"
    path.write_text(format_toml(get_recipe(cfg, live=True)))
    assert with_values(Config(), read_recipe(path), "test") == cfg


def test_the_hash_ignores_seed_and_paths_and_sees_everything_else():
    """Seeds of one record must share a hash; a changed learning rate must not."""
    base = recipe_hash(get_recipe(Config()))
    for name, item in config_fields(Config).items():
        if isinstance(item.default, bool):
            other = not item.default
        elif isinstance(item.default, tuple):
            other = (1,)
        else:
            other = item.default + 1 if isinstance(item.default, (int, float)) else item.default + "x"
        changed = recipe_hash(get_recipe(with_values(Config(), {name: other}, "test")))
        assert (changed == base) == bool(item.metadata["live"]), name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_recipes_in_records_are_valid(path):
    """A recipe that does not load is dead."""
    cfg = load_config(str(path), {}, [])
    check_config(cfg)
    assert cfg == with_values(Config(), read_recipe(path), "test")


def test_the_naive_baseline_recipe_is_the_default_config():
    """The contest's command without a recipe and the recipe folder must be one thing."""
    path = ROOT / "records/track_10min_16mb/2026-03-17_NaiveBaseline/recipe.toml"
    assert load_config(str(path), {}, []) == Config()


def test_what_nothing_says_of_the_tokenizer_the_manifest_of_the_data_does(tiny_data, tmp_path):
    """Own text trains without a word on its vocabulary; what a recipe or a person says of it holds."""
    named = [f"data.data_path={tiny_data}"]
    found = load_config(None, {}, named).data
    assert (found.vocab_size, found.tokenizer_path) == (TINY_VOCAB, str(tiny_data / "tokenizer.model"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[data]\nvocab_size = 512\ntokenizer_path = 'of other data'\n")
    found = load_config(str(recipe), {}, named).data
    assert (found.vocab_size, found.tokenizer_path) == (512, str(tiny_data / "tokenizer.model"))
    assert load_config(str(recipe), {"data.vocab_size": "300"}, named).data.vocab_size == 300
    assert load_config(None, {}, [*named, "data.tokenizer_path=else"]).data.tokenizer_path == "else"


def test_configs_are_frozen():
    """A setting changed half way would make the logged recipe a lie."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().eval.stride = 3
    assert EvalConfig() == Config().eval


def test_help_explains_every_section_and_every_field(capsys):
    """What a newcomer types: --help, --help SECTION, --help FIELD, with or without the section."""
    for name in ("", *(section.name for section in dataclasses.fields(Config)), *config_fields(Config)):
        with pytest.raises(SystemExit) as ended:
            main(["--help", name] if name else ["--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0 and (not name or said.startswith(f"{name}:"))
        assert max(map(len, said.splitlines())) <= 110 or "recipes that change it" in said
    for name in config_fields(Config):  # each in its section, and in the overview
        assert name.partition(".")[2] in describe_sections(Config)
        assert f"  {name.partition('.')[2]} = " in describe_section(Config, name.partition(".")[0])


def test_help_on_a_field_says_range_unit_default_contest_name_and_recipes():
    """Everything that is known of it; recipes that leave it at its default are not listed."""
    said = explain(Config, "max_wallclock_seconds")
    for part in ("default      600.0", "at least 0", "unit         seconds", "MAX_WALLCLOCK_SECONDS", "free"):
        assert part in said
    said = explain(Config, "quant.method")
    assert "2026-04-30_ContextGrowth_3072: gptq" in said and "C_pr281" not in said
    assert all(f"  {name} " in said and text in said for name, text in METHODS.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_layer", "Did you mean num_layers"),
        ("zzz", "Sections are run, data"),
        ("mode.", "expected a section or a field"),
    ],
)
def test_help_on_what_is_no_field_says_what_is(name, message):
    """A typo gets the nearest name."""
    with pytest.raises(UserError, match=message):
        explain(Config, name)
