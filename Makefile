# Targets with a one-line description each: `make help`.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
GPU ?= cu130
BENCH := $(if $(filter 1,$(GPU)),--gpu)
override GPU := $(or $(filter-out 0 1,$(GPU)),cu130)
GPUS := $(filter-out cpu,$(basename $(notdir $(wildcard constraints/*.txt))))
$(if $(filter $(GPU),$(GPUS)),,$(error GPU=$(GPU): expected 0, 1 or one of $(GPUS)))
ROCM_INDEX ?= https://download.pytorch.org/whl/rocm6.4
KFD ?= /dev/kfd
RECIPE ?= records/track_cpu/2026-11-21_Sp2048_LoraScoring/recipe.toml
VOCAB ?= 2048
BUILTIN := data/datasets/builtin_sp$(VOCAB)
SEEDS ?= 1337,42,2025
TRACK ?= track_cpu
AGAINST ?= $(wildcard $(RECORD)/baseline.json)
OUT ?= runs/gpu_battery
SINGLE = $(if $(filter file,$(origin OUT)),runs/packed/train_gpt_readable.py,$(OUT))
RUN_ID ?= cpu_$(shell date +%Y%m%d_%H%M%S)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
# Triton and the numpy that its interpreter takes, for the tests of kernels without a GPU alone.
KERNELS := $(VENV)/kernels
KERNEL_TESTS = PYTHONPATH=$(KERNELS) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_fused_kernels.py
TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal
REPORT ?= runs/report.html

.PHONY: help run test test-slow test-hosts test-pythons test-desk setup desk data tokenizers doctor train eval record audit lint size single plot bench profile trial sweep report leaderboard watch gpu-check gpu-battery null-gpu soak

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { n = split($$2, words, " "); line = sprintf("  make %-12s", $$1); \
		for (i = 1; i <= n; i++) { if (length(line) + length(words[i]) > 78) { print line; line = sprintf("%19s", "") } \
		line = line " " words[i] } print line }' $(MAKEFILE_LIST)

run: data ## the main job: train on the built-in corpus, pack, reload in a fresh process, score
	RUN_ID=$(RUN_ID) $(PY) train_gpt.py --recipe $(RECIPE)
	$(PY) -m eval --budget

test: setup ## all fast tests (under 5 minutes on 2 cores)
	$(TESTS) -m "not slow and not gpu and not desk"
	EMULATED_GPU=1 $(TESTS) tests/test_emulator.py -m "not slow"

test-slow: setup $(KERNELS)/.ready ## the tests that take over 5 s each
	$(TESTS) -m "slow and not gpu and not desk"
	EMULATED_GPU=1 $(TESTS) tests/test_emulator.py -m slow
	$(KERNEL_TESTS)

test-hosts: setup ## the tests of numbers as other processors compute them, with one and two threads (up to 15 minutes)
	$(PY) -m tests.run_hosts

test-desk: desk ## the tests of sweeps, reports, views, sinks, launch files, downstream tasks and the wheel
	$(TESTS) -m "desk and not gpu"

test-pythons: setup ## pack under Python 3.11 to 3.14, fetching what is missing: same bytes, and it starts
	$(PY) -m pip install --quiet "uv>=0.8,<1" && $(PY) -m tests.run_pythons --fetch
	$(PY) -m pytest tests/test_pythons.py tests/test_printing.py

setup: $(STAMP) ## make .venv with everything installed; instant when it is up to date

$(STAMP): requirements.txt requirements/dev.txt constraints/cpu.txt constraints/$(GPU).txt dev/setup.sh
	VENV=$(VENV) PYTHON=$(PYTHON) TORCH=$(TORCH) TORCH_INDEX=$(TORCH_INDEX) GPU=$(GPU) \
		ROCM_INDEX=$(ROCM_INDEX) KFD=$(KFD) sh dev/setup.sh
	@touch $@

desk: $(VENV)/.desk ## install what sweeps, reports, live views, sinks and downstream tasks need

$(VENV)/.desk: requirements/desk.txt requirements/lm-eval.txt | setup
	$(PY) -m pip install --quiet -r requirements/desk.txt -r requirements/lm-eval.txt && touch $@

$(KERNELS)/.ready: requirements/kernels.txt | setup
	$(PY) -m pip install --quiet --upgrade --target $(KERNELS) -r $< && touch $@ || \
		echo "no Triton for this machine: the tests of kernels will be skipped"

data: setup ## collect the built-in corpus, train a tokenizer of VOCAB entries, write token shards
	$(PY) -m data.builtin --vocab-size $(VOCAB) --out $(BUILTIN)

tokenizers: setup ## make the tokenizers of tokenizers/ again from the built-in corpus
	$(PY) -m data.tokenizer build

doctor: setup ## what this machine has and what a run would use of it; look for damage in the built-in data
	$(PY) -m dev.machine
	@test ! -d $(BUILTIN) || $(PY) -m data.doctor $(BUILTIN)

train: setup ## train RECIPE=... without the reload in a fresh process
	$(PY) train_gpt.py --recipe $(RECIPE)

# The vocabulary of a record that was scored on the built-in corpus: its data is made first.
RECORD_VOCAB = $(if $(RECORD),$(shell sed -n 's/^data_path = ".*builtin_sp\([0-9]*\)".*/\1/p' $(RECORD)/recipe.toml 2>/dev/null))

eval: setup ## reproduce the val_bpb of the newest run, or of RECORD=... (ARTIFACT=...); fails when it differs
	$(if $(RECORD_VOCAB),@$(MAKE) --no-print-directory data VOCAB=$(RECORD_VOCAB))
	$(PY) -m eval $(RECORD) $(if $(ARTIFACT),--artifact $(ARTIFACT))

record: $(if $(DATA),setup,data) ## train RECIPE=... with SEEDS=..., score, audit, write a record; AGAINST=, DATA=, NAME=, TRACK=
	$(PY) -m dev.record --recipe $(RECIPE) --seeds $(SEEDS) --out records/$(TRACK) \
		$(addprefix --against ,$(AGAINST)) $(addprefix --data ,$(DATA)) $(addprefix --name ,$(NAME))

trial: $(if $(DATA),setup,data) ## is a change better? SET="optim.matrix_lr=0.03" with SECONDS= or STEPS=, SEEDS=, AGAINST=, RECIPE=
	$(PY) -m dev.trial --recipe $(RECIPE) --seeds $(SEEDS) $(addprefix --against ,$(AGAINST)) \
		$(addprefix --seconds ,$(SECONDS)) $(addprefix --steps ,$(STEPS)) $(if $(SET),--set $(SET)) $(TRIAL)

sweep: desk $(if $(DATA),,data) ## search settings: SPEC=sweep.toml, WORKERS=2; again to go on or to join
	$(PY) -m dev.sweep $(SPEC) $(addprefix --workers ,$(WORKERS))

report: desk ## RUNS="runs/A records/track_cpu/B" as one HTML file, into REPORT=...; default: the newest run
	$(PY) -m dev.report $(RUNS) --out $(REPORT)

leaderboard: desk ## the records as one page: table, progress, bytes against bpb
	$(PY) -m dev.leaderboard

watch: desk ## runs as they go, in the terminal: RUNS="runs/*"; default: the newest
	$(PY) -m dev.watch $(RUNS)

audit: setup ## check the record folder RECORD=... before it is submitted
	$(PY) -m audit $(RECORD) $(addprefix --against ,$(AGAINST)) $(addprefix --run ,$(wildcard $(RECORD)/train_gpt.py))

lint: setup ## ruff: style, imports, formatting; mypy: types of the public modules
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

size: setup ## lines, source bytes and packed bytes of every section
	$(PY) -m pack.size --recipe $(RECIPE)

single: setup ## write the one readable file that RECIPE=... runs, into OUT=...
	$(PY) -m pack --recipe $(RECIPE) --readable --out $(SINGLE)

plot: setup ## draw docs/progress.svg from the records of the CPU track
	$(PY) -m dev.plot

bench: $(if $(BENCH),setup,data) ## speed of step, scoring, packing and loading, against yardsticks; GPU=1: of a GPU
	$(PY) -m dev.bench $(BENCH)

profile: data ## where a step's time goes on this machine, by operator; AT=0.7: at that share of training
	$(PY) -m dev.profile --recipe $(RECIPE) $(addprefix --at ,$(AT))

gpu-check: setup $(KERNELS)/.ready ## trainer, recipes, scorers, attention on an emulated GPU; Triton kernels; some ten minutes
	EMULATED_GPU=1 $(TESTS) tests/test_emulator.py
	$(KERNEL_TESTS)

soak: setup ## try to lose state: kills, damaged files, signals, full disks, two writers; SOAK="--minutes 5 --only kills"
	$(PY) -m dev.soak $(SOAK)

null-gpu: setup ## what the trainer gives a GPU, counted without one, against the stored figures; CUDA_VENV=...
	$(PY) -m dev.null_gpu --check $(addprefix --environment ,$(CUDA_VENV))

gpu-battery: setup ## measure this project on a GPU in at most 480 s, into OUT=...; REHEARSE=1: on a CPU; PARTS=, DATA=, CARRIED=
	$(PY) -m dev.gpu_battery --out $(OUT) $(if $(filter-out 0,$(REHEARSE)),--rehearse) \
		$(addprefix --parts ,$(PARTS)) $(addprefix --data ,$(DATA)) \
		$(addprefix --carried ,$(CARRIED))
