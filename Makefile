# make repro: the whole pipeline on the embedded default. make show: all experiments so far. make compare: on one page. make test: the tests.
# make sweep FILE=sweeps/example.yaml: many points. Twice does no work twice.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# The committed dvc.lock is empty (docs/dvc.md says why): git is told to leave what a run writes into it out of `git status`,
# unless a team has committed a lock of its own.
repro: .venv/ready
	@if git rev-parse --quiet --verify HEAD >/dev/null 2>&1 && ! git grep -q '^stages:' HEAD -- dvc.lock; then \
	    git update-index --skip-worktree dvc.lock; fi
	dvc repro

show: .venv/ready
	@python -m stages.show

compare: .venv/ready
	python -m stages.compare

sweep: .venv/ready
	python -m stages.sweep $(or $(FILE),$(error FILE=sweeps/example.yaml, or another sweep file, is wanted))

test: .venv/ready
	python -m pytest

check: .venv/ready
	ruff check .
	ruff format --check .
	mypy

# torch first, alone: any later step then keeps the build that is installed.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --constraint constraints.txt torch
	python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch .venv/ready

.PHONY: repro show compare sweep test check
