"""Memory that does not suffice: what a run says, and data.micro_batches=auto. Stand-ins run out of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fixtures_model import as_overrides

import train_gpt
from common import UserError, read_json
from formats.checkpoints import read_newest
from formats.memory import counts_to_try, estimate_bytes_of_step, legal_counts, memory_message
from formats.recipe import read_recipe, with_values
from kernels import memory
from kernels.memory import fits_memory, is_out_of_memory, total_memory
from pack.program import PackingError, pack
from train_gpt import Batch, Config, Environment, Stage, Training, build_model, get_stages, load_config

ALONE = Environment({})
GPU_MESSAGE = "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8.00 GiB."
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
)
ERRORS = [
    torch.OutOfMemoryError(GPU_MESSAGE),
    RuntimeError(CPU_MESSAGE),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB)."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("Unable to allocate 9. GiB for an array"),
]


@pytest.fixture
def small_memory(monkeypatch):
    """Let a micro-step of more than so many rows raise an error; returns the tokens of those that did not."""

    def limit(rows: int, error: BaseException = ERRORS[0]) -> list[int]:
        taken, whole = [], Training.micro_step

        def micro_step(self, phase, index):
            found = phase.stage.batch_tokens // phase.stage.micro_batches // phase.stage.seq_len
            if found > rows:
                raise error
            taken.append(found)
            return whole(self, phase, index)

        monkeypatch.setattr(Training, "micro_step", micro_step)
        return taken

    return limit


# What a run says


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_way_to_say_it_is_known(error):
    """Torch has an exception for GPUs alone; CPUs, Macs and cuBLAS raise a RuntimeError."""
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("expected a float32 tensor"))
    assert not is_out_of_memory(ValueError(GPU_MESSAGE))


@pytest.mark.parametrize("error", ERRORS[:2], ids=["gpu", "cpu"])
def test_a_run_that_runs_out_names_what_to_lower(
    tiny_config, tiny_overrides, small_memory, error, stand_in_program
):
    """One sentence instead of torch's traceback: what it was, how much it needs, what to set."""
    small_memory(1, error)
    with pytest.raises(UserError) as found:
        train_gpt.main(tiny_overrides)
    said = str(found.value)
    assert said.startswith(
        "out of memory: a micro-batch of 32 tokens and the model need about 0.0 GiB of the "
    )
    assert "of this cpu: set data.micro_batches=8 (same batch) or auto." in said
    assert "lower run.val_batch_tokens" in said


def test_other_errors_keep_their_traceback(tiny_overrides, small_memory, stand_in_program):
    """A bug is no lack of memory."""
    small_memory(1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train_gpt.main(tiny_overrides)


@pytest.fixture
def tiny_overrides(tiny_config) -> list[str]:
    """The tiny configuration as arguments."""
    return as_overrides(tiny_config)


def test_the_advice_fits_the_recipe():
    """Stages have their own numbers; a row cannot be halved; after auto it was something else."""
    sizes = (17_000_000, 2, 16 << 30, "cuda")

    def said(**values) -> str:
        cfg = with_values(
            Config(), {name.replace("__", "."): value for name, value in values.items()}, "test"
        )
        return memory_message(cfg, get_stages(cfg), 2, sizes)

    assert "a micro-batch of 65,536 tokens and the model need about 1" in said()
    assert "GiB of the 16.0 GiB of this cuda: set data.micro_batches=16 (same batch) or auto" in said()
    assert "rows of schedule.stages, here to 16" in said(schedule__stages="0:1024:524288:8:1:0")
    assert "set model.checkpoint_every=1, or lower data.seq_len" in said(data__micro_batches=512)
    assert said(data__micro_batches=0).startswith("out of memory although data.micro_batches=auto")


@pytest.mark.parametrize(
    "values",
    [{"model.compute_dtype": "float32"}, {"model.compute_dtype": "bfloat16"}, {"model.mlp_mult": 4.0},
     {"model.num_layers": 5}, {"model.checkpoint_every": 1}, {"model.checkpoint_every": 2},
     {"model.recur_layers": "0,1", "model.recur_passes": 2}],
)  # fmt: skip
def test_the_estimate_is_within_a_factor_of_two(values):
    """Measured: what the backward pass of a micro-batch keeps."""
    base = {"run.attention": "sdpa", "model.num_layers": 3, "model.compute_dtype": "float32"}
    cfg = with_values(Config(), base | values, "test")
    model = build_model(cfg, torch.device("cpu"))
    tokens = torch.randint(2, 1024, (2, 1025))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, :-1] == 1)
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, torch.Tensor] = {}
    cast_bytes = 2 * sum(param.numel() for param in model.parameters())  # of weights in bfloat16

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_gpt.mean_loss(model, batch, cfg.model.recur_passes)
    found = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)
    item_bytes = 2 if cfg.model.compute_dtype == "bfloat16" else 4
    found -= cast_bytes if item_bytes == 2 else 0
    assert 0.5 < estimate_bytes_of_step(cfg, 2048, 0, item_bytes) / found < 2
    assert estimate_bytes_of_step(cfg, 0, 10, item_bytes) == 160


def test_a_devices_memory_is_asked_for_where_it_is_known(monkeypatch):
    """A GPU's own, the part of a Mac's that its GPU may take, a machine's; 0 where nothing says it."""
    module = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(total_memory=5))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 6)
    assert [total_memory(torch.device(kind)) for kind in ("cuda", "xpu", "mps")] == [5, 5, 6]
    assert total_memory(torch.device("cpu")) > 1 << 28
    monkeypatch.delattr(memory.os, "sysconf")
    assert total_memory(torch.device("cpu")) == 0

    def fill(status):
        status[1] = 7 if status[0] == 64 else 0

    windll = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=fill))
    monkeypatch.setattr(memory.ctypes, "windll", windll, raising=False)
    assert total_memory(torch.device("cpu")) == 7


# data.micro_batches=auto


def test_auto_is_a_number_that_a_run_finds(tmp_path):
    """On the command line and in a recipe; the checks of a config take it."""
    assert load_config(None, {}, ["data.micro_batches=auto"]).data.micro_batches == 0
    path = tmp_path / "recipe.toml"
    path.write_text('[data]\nmicro_batches = "auto"\n')
    assert load_config(str(path), {}, []).data.micro_batches == 0
    with pytest.raises(UserError, match="expected a whole number, found 'auto'"):
        load_config(None, {}, ["data.seq_len=auto"])
    with pytest.raises(UserError, match=r"data\.micro_batches=0 is auto.*beside schedule\.stages"):
        load_config(None, {}, ["data.micro_batches=auto", "schedule.stages=0:1024:524288:8:1:0"])
    with pytest.raises(UserError, match=r"must be a multiple of data\.seq_len"):
        load_config(None, {}, ["data.micro_batches=auto", "data.batch_tokens=1000"])


def test_the_numbers_tried_are_legal_and_double():
    """Whole rows a micro-batch, every rank the same number of them; a CPU takes 8, or what is legal."""
    stage = Stage(0, 16, 16 * 48, 0)
    assert legal_counts(stage, 2) == [2, 4, 6, 8, 12, 16, 24, 48]
    assert counts_to_try(stage, 1, True) == [1, 2, 4, 8, 16, 48]
    assert counts_to_try(stage, 3, True) == [3, 6, 12, 24, 48]
    assert counts_to_try(stage, 1, False) == [8]
    assert counts_to_try(stage, 3, False) == [12]
    assert counts_to_try(stage._replace(batch_tokens=64), 2, False) == [4]
    with pytest.raises(UserError, match="the world size 5 to divide the 48 rows"):
        counts_to_try(stage, 5, True)


class GpuRanks:
    """The ranks of a GPU run, as far as they are asked; `others` says how many tries fail on another rank."""

    def __init__(self, world_size: int = 1, others: int = 0):
        self.device, self.world_size, self.is_main = torch.device("cuda"), world_size, True
        self.others = others

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up what this rank and the others found."""
        self.others -= 1
        return tensor + (self.others >= 0)


@pytest.fixture
def auto_config(tiny_config) -> Config:
    """The tiny configuration, 8 rows a step, on a CPU that is asked as if it could be tried."""
    return with_values(tiny_config, {"data.micro_batches": 0, "run.device": "cpu"}, "test")


def test_auto_halves_micro_batches_until_one_fits(auto_config, small_memory, capsys):
    """8 rows fail, 4 fail, 2 fit: the first step of each phase and the one whose gradients are kept."""
    taken = small_memory(2)
    found = train_gpt.resolve_micro_batches(auto_config, ALONE, GpuRanks(), 1)
    assert found == with_values(auto_config, {"data.micro_batches": 4}, "test")
    assert taken == [2, 2, 2]
    assert capsys.readouterr().out.splitlines() == [
        f"data.micro_batches=auto: {count} need more memory than there is" for count in (1, 2)
    ]


@pytest.mark.parametrize(("others", "expected"), [(0, 4), (1, 4), (2, 8)])
def test_the_rank_with_the_least_memory_decides(auto_config, small_memory, others, expected):
    """What fits here is tried on, in halves, until it fits everywhere."""
    small_memory(2)
    found = train_gpt.resolve_micro_batches(auto_config, ALONE, GpuRanks(2, others), 1)
    assert found.data.micro_batches == expected


def test_a_row_that_does_not_fit_ends_the_run(auto_config, small_memory):
    """With what else can be lowered."""
    small_memory(0)
    with pytest.raises(UserError, match=r"of 16 tokens .*model\.checkpoint_every=1, or lower data\.seq_len"):
        train_gpt.resolve_micro_batches(auto_config, ALONE, GpuRanks(), 1)


def test_a_cpu_is_not_tried(auto_config, alone, small_memory):
    """The system would kill the program."""
    taken = small_memory(0)
    assert train_gpt.resolve_micro_batches(auto_config, ALONE, alone, 1).data.micro_batches == 8
    assert taken == []


def test_a_try_leaves_no_memory_behind(monkeypatch):
    """Of a GPU the cache, too; other errors are errors."""
    emptied = []
    module = SimpleNamespace(empty_cache=lambda: emptied.append(1))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)

    def fail(error):
        raise error

    assert fits_memory(lambda: None, torch.device("cpu")) and not emptied
    assert not fits_memory(lambda: fail(ERRORS[0]), torch.device("mps"))
    assert emptied == [1]
    with pytest.raises(RuntimeError, match="a bug"):
        fits_memory(lambda: fail(RuntimeError("a bug")), torch.device("cpu"))


def test_the_run_is_that_of_the_number_that_was_found(
    auto_config, small_memory, monkeypatch, stand_in_program, tmp_path
):
    """Tried or given: the same losses bit for bit, the same recipe, artifact and hash; it resumes."""
    small_memory(2)
    whole = train_gpt.counts_to_try
    monkeypatch.setattr(train_gpt, "counts_to_try", lambda stage, size, can_try: whole(stage, size, True))
    resolve = train_gpt.resolve_micro_batches
    monkeypatch.setattr(
        train_gpt, "resolve_micro_batches", lambda cfg, env, ranks, bos: resolve(cfg, env, GpuRanks(), bos)
    )
    folders = []
    for name, count in (("auto", 0), ("given", 4)):
        run = replace(auto_config.run, run_id=name, save_every=3)
        cfg = replace(auto_config, run=run, data=replace(auto_config.data, micro_batches=count))
        train_gpt.run(cfg, ALONE)
        folders.append(tmp_path / "runs" / name)
    assert [read_recipe(folder)["data.micro_batches"] for folder in folders] == [4, 4]
    results = [read_json(folder / "result.json") for folder in folders]
    assert results[0]["artifact_sha256"] == results[1]["artifact_sha256"]
    assert results[0]["config_hash"] == results[1]["config_hash"]
    losses = [
        [json.loads(line).get("train_loss") for line in (folder / "metrics.jsonl").open()]
        for folder in folders
    ]
    assert losses[0] == losses[1]
    assert "data.micro_batches=auto: 4" in (folders[0] / "train.log").read_text()
    again = load_config(str(folders[0]), {}, [f"data.data_path={auto_config.data.data_path}"])
    training = Training(again, train_gpt.Ranks(ALONE, "cpu"), 1)
    train_gpt.restore(training, read_newest(folders[0]))
    assert training.step == 6


@pytest.mark.parametrize("value", ['"auto"', "0"])
def test_only_a_number_is_packed(tmp_path, value):
    """A packed program cannot look for it: the recipe of a run's folder has it."""
    path = tmp_path / "recipe.toml"
    path.write_text(f"[data]\nmicro_batches = {value}\n")
    with pytest.raises(PackingError, match=r"a number for data\.micro_batches, found auto.*recipe\.toml"):
        pack(path, tmp_path / "out.py")
