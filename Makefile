# make sample        the main job in small, offline: data, a tiny model, training, evaluation (minutes, two CPU cores)
# make sample-anime  the same for the text use case
# make test          all tests that need no cluster
# make test-fast     what needs no launch and no training, in less than a minute
# make test-notebooks  all four notebooks to their end, on a small model
# make test-upstream the fast tests and a training with the newest releases of all pinned packages
# make test-cluster  the job files on a real Slurm; installs it where it is missing (Debian, root), skips where it cannot
# make test-faults   kill -9 at more than 200 moments, failing disks, damage to every file, rivals: about 40 minutes of one core
# make lint          style and types of the Python files, the order of folders, and the shell files
PYTHON ?= python3.11
BIN := .venv/bin

# pip would compile every file of the packages, which takes longer than all the rest of the installation. Python compiles
# what it reads, and keeps it.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --no-compile --upgrade

.PHONY: sample sample-anime test test-fast test-upstream test-faults test-gpu test-notebooks test-cluster lint

# The pip that comes with Python 3.11 takes a third longer for all that follows.
.venv/pyvenv.cfg:
	$(PYTHON) -m venv .venv
	$(INSTALL) pip==26.3

# Installed anew when the pins change. Tools for tests and style are added only where they are needed.
.venv/installed: requirements.txt | .venv/pyvenv.cfg
	$(INSTALL) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt requirements.txt requirements-serve.txt | .venv/pyvenv.cfg
	$(INSTALL) -r requirements-dev.txt
	touch .venv/installed $@

# Threads are said, because accelerate warns of those that it chooses itself.
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml \
	--num_cpu_threads_per_process $(or $(OMP_NUM_THREADS),$(shell nproc))

data/sample-raw/labels.csv: | .venv/installed
	$(BIN)/python data_prep/make_sample_cctv.py --output data/sample-raw --frames 800 --size 128x128

data/sample-cctv/manifest.json: data/sample-raw/labels.csv
	$(BIN)/python data_prep/prepare_cctv.py --frames data/sample-raw/frames --labels data/sample-raw/labels.csv \
		--messages data/sample-raw/messages.txt --output data/sample-cctv

models/tiny-llava/config.json: | .venv/installed
	$(BIN)/python scripts/make_tiny_model.py --architecture llava --output models/tiny-llava --pretrain

outputs/llava-sample/metrics.json: data/sample-cctv/manifest.json models/tiny-llava/config.json
	$(LAUNCH) scripts/train_llava.py \
		--config scripts/configs/llava_sample.yaml

sample: outputs/llava-sample/metrics.json
	$(BIN)/python scripts/evaluate_llava.py --run outputs/llava-sample --dataset data/sample-cctv --split test

data/sample-anime.csv: | .venv/installed
	$(BIN)/python data_prep/make_sample_anime.py --output data/sample-anime.csv --titles 24

data/sample-anime/manifest.json: data/sample-anime.csv
	$(BIN)/python data_prep/prepare_anime.py --csv data/sample-anime.csv --output data/sample-anime \
		--questions_per_fact all --validation_share 0.2 --test_share 0.5

models/tiny-gemma/config.json: data/sample-anime.csv
	$(BIN)/python scripts/make_tiny_model.py --architecture gemma --output models/tiny-gemma \
		--text data/sample-anime.csv --hidden_size 128

outputs/gemma-sample/metrics.json: data/sample-anime/manifest.json models/tiny-gemma/config.json
	$(LAUNCH) scripts/train_gemma.py \
		--config scripts/configs/gemma_sample.yaml

sample-anime: outputs/gemma-sample/metrics.json
	$(BIN)/python scripts/evaluate_gemma.py --run outputs/gemma-sample

# Two processes, to each of which whole files are dealt out in the order of tests/conftest.py. On CPUs, GPUs or not: what
# is compared to the last digits is computed in fp32.
test: .venv/installed-dev
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests --ignore tests/cluster --numprocesses 2 --dist loadfile \
		--no-loadscope-reorder

# Under a minute: nothing that launches a command or trains. Models are tiny, and made in memory.
test-fast: .venv/installed-dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/cluster --numprocesses 2 \
		--dist loadfile --no-loadscope-reorder -m "not slow" -q

# The newest releases of all that is pinned, but for PyTorch, whose build is chosen by hand: the fast tests, and a
# training that is evaluated and continued. The status is theirs.
NEWEST := .venv-upstream/bin
test-upstream: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv-upstream
	$(NEWEST)/pip install --quiet --no-compile --upgrade pip==26.3
	$(NEWEST)/pip install --quiet --no-compile --upgrade --upgrade-strategy eager \
		$$(sed -n '/^torch==/p; s/^\([A-Za-z][A-Za-z0-9_-]*\)==.*/\1/p' requirements.txt requirements-dev.txt | sort -u | grep -vx torch)
	$(NEWEST)/pip list --format freeze | grep -iE "^($$(sed -n 's/^\([A-Za-z][A-Za-z0-9_-]*\)==.*/\1/p' requirements.txt | paste -sd '|'))=="
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest tests --ignore tests/cluster --numprocesses 2 \
		--dist loadfile --no-loadscope-reorder -m "not slow" -q; fast=$$?; \
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest tests/commands/test_train_llava.py -q && exit $$fast

# Of what it tries `make test` tries a sample.
test-faults: .venv/installed-dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 FAULTS=whole $(BIN)/python -m pytest tests/faults -q -s

# What only a GPU can show: kernels, CUDA graphs, small updates in 16 bits.
test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest tests/kernels/test_lora_layers.py tests/kernels/test_lora_projections.py tests/kernels/test_cuda_graphs.py

test-notebooks: .venv/installed-dev
	NOTEBOOKS=all CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/commands/test_notebooks.py

test-cluster: .venv/installed-dev
	tests/cluster/cluster.sh install
	$(BIN)/python -m pytest tests/cluster

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=scripts:data_prep $(BIN)/lint-imports pyproject.toml
	$(BIN)/pyrefly check --summarize-errors
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck $$(git ls-files '*.sh' '*.slurm' .ci/run)
