"""The reference systems from recipe to number: every original key has a place, every twin learns."""

import json
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest

import data.builtin
import dev.twins
import train_gpt
from data.documents import Document
from data.shards import read_manifest
from data.train_tokenizer import BYTES_FILE
from dev.twins import SYSTEMS, TWINS, Twin, prepare, train_twin, twin_config, unigram_entropy
from formats.checkpoints import NUMBERED, read_newest
from formats.recipe import config_fields, config_value, read_recipe, with_values
from formats.state import read_state
from train_gpt import Config, Environment

REASON = "not applicable: "
HANGS = 1800  # seconds until a training counts as hung: two twins, on a loaded machine
# Those that the systems B and C share: they are of one stack.
GOLF_KEYS = """
    vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult tie_embeddings
    tied_embed_init_std rope_base rope_train_seq_len qk_gain_init logit_softcap
    bigram_vocab_size bigram_dim smear_gate unet_skips train_seq_len train_batch_tokens
    matrix_lr tied_embed_lr scalar_lr muon_wd adam_wd muon_momentum muon_momentum_warmup_start
    muon_momentum_warmup_steps muon_backend_steps beta1 beta2 adam_eps grad_clip_norm
    warmdown_iters iterations max_wallclock_seconds warmup_steps seed data_path tokenizer_path
    int6_clip int8_clip_quantile float16_passthrough_numel scale_floor compressor eval_stride
"""
# The keys of the published configurations, kept apart from the tables that answer them.
ORIGINAL_KEYS = {
    "A": """
        num_heads d_model head_dim vocab_size num_layers ff_dim dropout max_len emb_splt attn_chunks
        emb_init_range use_rope emb_scaling_factor res_scale use_flash_attention use_fash_attention
        dtype rms_eps chunks batch_size peak_lr min_lr warmup_fraction schedule b1 b2 eps
        weight_decay total_tokens tokenizer eos_token prompt repo generation_max_len opt_state
    """,
    "B": GOLF_KEYS
    + """
        eval_seq_len val_loss_every train_log_every val_batch_size tokenizer_type num_merges
        filter_min_words filter_min_type_token_ratio filter_max_boilerplate difficulty_sort max_docs
        rope_dims xsa_last_n leaky_slope ln_scale ve_layers ve_dim value_residual
        parallel_start_layer recur_layers num_loops recur_start_frac parallel_muon ema_decay
        swa_enabled swa_every late_qat_threshold ngram_order ngram_beta ngram_alignment
        over_count_tail ngram_prior_entries ngram_prior_tokens val_filter doc_separator lzma_preset
    """,
    "C": GOLF_KEYS
    + """
        eval_seq_len val_loss_every train_log_every val_batch_size bigram_init_scale swa_enabled
        swa_every swa_start_frac attention_backend sdp_flags ttt_mode ttt_lr ttt_momentum ttt_epochs
        ttt_freeze_blocks ttt_batch_seqs ttt_grad_clip ttt_chunk_tokens qat_enabled tokenizer_type
        init
    """,
    "D": """
        exp_num n_layer n_head n_embd n_hidden vocab_size block_size bias layer_norm_eps activation
        tie_weights position_embedding max_context_length proj_ratio proj_ratio_min
        num_keep_boundary_chunk tokenizer batch_size lr lr_step warmup_iters value_clip_grad_norm
        optimizer dtype gradient_checkpointing num_epochs max_total_iters eval_interval
        save_interval save_epoch_interval print_interval sample_tokens sample_interval buffer_size
        truncate_limit data_files
    """,
    "E": """
        hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
        vocab_size embedding_rank tie_word_embeddings rms_norm_eps norm rope_theta hidden_act
        initializer_range embedding_init scaled_output_init gradient_checkpointing_every
        max_position_embeddings attention_bias attention_backend fp8_enabled fp8_format fp8_margin
        fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_calibration_steps
        fp8_lr_multiplier bf16 learning_rate min_lr lr_scheduler warmup_steps weight_decay beta1
        beta2 eps max_grad_norm gradient_accumulation_steps max_steps curriculum.start_step
        curriculum.seq_len curriculum.batch_size curriculum.gradient_accumulation
        curriculum.lr_scale curriculum.grad_clip tokenizer_name pad_token_id dataset_path val_split
        seed eval_steps save_steps keep_last_n save_best logging_steps logging_dir val_domains
        local_rank --config --model-config --optimization-config --disable-fp8 --eval-only
        --checkpoint --logdir wandb_project
    """,
}


def small_switches(name: str) -> tuple[Config, Config]:
    """The full recipe and its twin."""
    folder = SYSTEMS / TWINS[name].folder
    return tuple(
        with_values(Config(), read_recipe(folder / name), name)
        for name in ("recipe.toml", "recipe.small.toml")
    )


@pytest.mark.parametrize("letter", ORIGINAL_KEYS)
def test_every_original_key_has_a_field_or_a_reason(letter):
    """And every named field exists; nothing is listed that the original does not have."""
    table = tomllib.loads((SYSTEMS / TWINS[letter].folder / "keys.toml").read_text(encoding="utf-8"))["keys"]
    assert set(table) == set(ORIGINAL_KEYS[letter].split())
    for key, answer in table.items():
        if isinstance(answer, str):
            assert answer.startswith(REASON) and len(answer) > len(REASON), key
        else:
            assert answer and set(answer) <= set(config_fields(Config)), key


@pytest.mark.parametrize("folder", sorted(SYSTEMS.iterdir()), ids=lambda folder: folder.name)
def test_every_folder_has_a_recipe_a_twin_and_keys(folder):
    """Or names the folder whose keys it shares."""
    assert folder.name in {twin.folder for twin in TWINS.values()}
    assert (folder / "recipe.toml").is_file() and (folder / "recipe.small.toml").is_file()
    shared = TWINS[folder.name[0]].folder
    assert (folder / "keys.toml").is_file() or f"../{shared}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_the_switches_of_its_system(name):
    """Every word and every yes or no of model, optimizer and quantizer; numbers may be smaller."""
    full, twin = small_switches(name)
    allowed = {"model.fp8"}  # gemm needs a device, emulate rounds alike
    for field, item in config_fields(Config).items():
        if item.type in (str, bool) and not item.metadata["live"] and field not in allowed:
            assert config_value(full, field) == config_value(twin, field), field
    assert (full.model.fp8 == "off") == (twin.model.fp8 == "off")
    assert (full.model.fp8_lr_mul, full.model.context_ratio) == (
        twin.model.fp8_lr_mul,
        twin.model.context_ratio,
    )
    assert len(full.schedule.stages) == len(twin.schedule.stages)


@pytest.fixture(scope="session")
def twin_data(tmp_path_factory) -> Path:
    """The twins' datasets, made once; GOLF_TWINS names a folder that keeps them between runs."""
    folder = Path(os.environ.get("GOLF_TWINS") or tmp_path_factory.mktemp("twins"))
    prepare(list(TWINS), folder)
    return folder


def test_an_outdated_dataset_is_made_again(tmp_path, monkeypatch):
    """Also when its tokenizer changes with it."""

    def write_tokenizer(texts, vocab_size, out, kind):
        out.write_text(json.dumps(BYTES_FILE | version))

    documents = [Document(text, "") for text in ("to train", "to validate")]
    monkeypatch.setitem(TWINS, "T", Twin("A_bwetaf53", "bytes", 260))
    monkeypatch.setattr(dev.twins, "find_modules", list)
    monkeypatch.setattr(dev.twins, "collect_documents", lambda _: (documents[:1], documents[1:]))
    monkeypatch.setattr(data.builtin, "train_tokenizer", write_tokenizer)
    monkeypatch.setattr(dev.twins, "describe_sources", lambda size: version | {"vocab_size": size})
    version, found = {}, []
    for version["made for"] in (1, 1, 2):
        prepare(["T"], tmp_path)
        found.append(read_manifest(tmp_path / "builtin_bytes260")["tokenizer"]["sha256"])
    assert found[0] == found[1] != found[2]


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.timeout(HANGS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.reference(f"{name}-twin")) for name in TWINS]
)
def test_a_twin_learns_more_than_the_frequencies_of_tokens(name, twin_data, tmp_path, record_property):
    """The artifact's loss is below the unigram entropy of the validation text, and its bytes add up."""
    facts = train_twin(name, twin_data, tmp_path)
    record_property("twin", json.dumps(facts))
    assert facts["artifact_loss"] < facts["unigram_entropy"]
    assert abs(facts["quantization_gap"]) < 0.1
    assert facts["artifact_bytes"] < min(facts["payload_bytes"] + 4096, 2_000_000)
    assert facts["total_bytes"] == facts["code_bytes"] + facts["artifact_bytes"]


def train_to(cfg: Config, stop: int, checkpoint: Path, resumes: bool) -> list:
    """Train to a step, from the start or from a checkpoint; write one and return every value in it."""
    training = train_gpt.Training(cfg, train_gpt.Ranks(Environment({}), "cpu"), 0)
    if resumes:
        train_gpt.restore(training, read_newest(checkpoint))
    while training.step < stop:
        progress = train_gpt.run_progress(cfg, training.step, 0.0)
        training.accumulate(train_gpt.phase_at(cfg, training.step, progress), lambda: False)
        training.update(0.0)
    train_gpt.save_checkpoint(training, checkpoint)
    return leaves(read_state(checkpoint)[0])


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.timeout(HANGS)
@pytest.mark.reference("E15")
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_resumes_bitwise(name, twin_data, tmp_path):
    """Stop in the middle, across a stage where there are stages: weights, optimizer, loader, 8-bit scales."""
    cfg = with_values(twin_config(name, twin_data, tmp_path), {"run.iterations": 24}, "test")
    checkpoint = tmp_path / NUMBERED.format(0)
    whole = train_to(cfg, 24, checkpoint, resumes=False)
    half = train_to(cfg, 16, checkpoint, resumes=False)
    resumed = train_to(cfg, 24, checkpoint, resumes=True)
    assert len(whole) == len(resumed) and all(np.array_equal(a, b) for a, b in zip(whole, resumed))
    assert not all(np.array_equal(a, b) for a, b in zip(whole, half))


def leaves(tree) -> list:
    """Every value of a state."""
    if isinstance(tree, dict | list):
        return [
            leaf for value in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(value)
        ]
    return [tree]


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.timeout(HANGS)
@pytest.mark.reference("E-fp8-twin")
def test_8_bit_training_ends_within_two_percent_of_the_exact(twin_data, tmp_path, monkeypatch):
    """System E's twin with and without FP8, the same data, steps and learning rates."""
    losses = []
    for fp8 in ("off", "emulate"):
        monkeypatch.setattr(
            "dev.twins.twin_config",
            lambda *args, fp8=fp8: with_values(
                twin_config(*args), {"model.fp8": fp8, "model.fp8_lr_mul": 1.0}, "test"
            ),
        )
        losses.append(train_twin("E", twin_data, tmp_path / fp8)["val_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


@pytest.mark.numeric
def test_unigram_entropy_is_that_of_the_counts(tiny_data):
    """Against a loop; the first token is no target."""
    from data.shards import find_shards, read_shard

    tokens = read_shard(find_shards(tiny_data / "fineweb_val_*.bin")[0]).tolist()[1:]
    slow = -sum(tokens.count(t) / len(tokens) * np.log(tokens.count(t) / len(tokens)) for t in set(tokens))
    assert unigram_entropy(tiny_data) == pytest.approx(slow)
