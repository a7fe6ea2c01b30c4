# make repro: the whole pipeline on the embedded default. make prune MODEL=ORG/NAME OUT=DIRECTORY: one model, once, without DVC.
# make show: all experiments so far (SEEDS=1: one row for repeats). make compare: on one page. make sweep FILE=sweeps/example.yaml: many points.
# make share, make receive: with the team. make verify-cache: rehash what DVC keeps.
# make test: the tests; make test-all: with those of Ray and of the page in a browser, too. Twice does no work twice.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# The committed dvc.lock is empty (docs/dvc.md says why): git is told to leave what a run writes into it out of `git status`,
# unless a team has committed a lock of its own.
repro: .venv/ready
	@if git rev-parse --quiet --verify HEAD >/dev/null 2>&1 && ! git grep -q '^stages:' HEAD -- dvc.lock; then \
	    git update-index --skip-worktree dvc.lock; fi
	dvc repro

# make prune MODEL=ORG/NAME OUT=DIRECTORY QUALITY=best SPARSITY=0.6: from a model to its release, without DVC.
# MODEL: of a hub, a directory, a GGUF file, or a base of conf/base. LICENSE, NAME: of a directory or file. They are read from make's
# command line alone: shells set NAME, and other programs LICENSE or REVISION, for ends of their own.
given = $(if $(filter command,$(firstword $(origin $(1)))),$($(1)))
prune: .venv/ready
	@python -m stages.make_release '$(or $(MODEL),$(error MODEL=ORG/NAME, or a directory, is wanted))' \
	    '$(or $(OUT),$(error OUT=DIRECTORY, for the release, is wanted))' \
	    $(if $(QUALITY),--quality '$(QUALITY)') $(if $(SPARSITY),--sparsity '$(SPARSITY)') \
	    $(if $(call given,REVISION),--revision '$(REVISION)') $(if $(call given,LICENSE),--license '$(LICENSE)') \
	    $(if $(call given,NAME),--name '$(NAME)')

show: .venv/ready
	@python -m stages.show $(if $(SEEDS),--seeds,--commands)

compare: .venv/ready
	python -m stages.compare

sweep: .venv/ready
	python -m stages.sweep '$(or $(FILE),$(error FILE=sweeps/example.yaml, or another sweep file, is wanted))'

share: .venv/ready
	python -m stages.share

receive: .venv/ready
	python -m stages.receive

verify-cache: .venv/ready
	python -m stages.verify_cache

test: .venv/tested
	python -m pytest

# Ray, and the page in a Chromium that is installed, too. OpenSSH's server and llama-cpp-python are taken where they are there.
test-all: .venv/tested
	python -m pip install --quiet --constraint constraints.txt --editable '.[test,ray,browser]'
	python -m pytest

census: .venv/tested
	python -m benchmarks.census
	EVERY_MODEL_TYPE=1 python -m pytest tests/streaming/test_every_model_type.py tests/streaming/test_every_multimodal_type.py tests/pruning/test_every_model_type.py

check: .venv/tested
	ruff check .
	ruff format --check .
	mypy

# torch first, alone: any later step then keeps the build that is installed.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --constraint constraints.txt torch
	python -m pip install --quiet --constraint constraints.txt --editable '.[float8,ruler]'
	touch .venv/ready

.venv/tested: .venv/ready
	python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch .venv/tested

.PHONY: repro prune show compare sweep share receive verify-cache test test-all census check
