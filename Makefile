# Two commands: `make run` trains the quickstart on this machine, `make test` proves the library.
# Wanted from the machine: Python 3.11 or newer with venv (Debian: apt install python3-venv), and make.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
EXTRAS := hf,plots,deepspeed,test
LAB    := ray,mpi
LAB_PACKAGES := slurm-wlm munge openssh-server openssh-client iproute2 util-linux openmpi-bin mpich
LAB_TOOLS    := slurmctld munged sshd ip unshare mpiexec.openmpi mpiexec.mpich
JOB    ?= examples/quickstart.yaml
REPEAT ?= 20

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install -qq --disable-pip-version-check
# one stamp per choice of torch, so that `make run TORCH=...` installs again
STAMP := $(VENV)/.ready-$(shell printf %s '$(TORCH)' | cksum | cut -d' ' -f1)

# some tests that start no ranks wait for clocks, so three go on for two cores; those that do wait for each other half of
# the time, so four go on, and workers take files that wait and files that compute in turn (tests/turns.py); the matrices
# of `make wide` are few large files, which are shared out, and so are long tests of a kind that has a shorter one
# (tests/later.py); the lab waits more, for Slurm, Ray and hosts that are lost, and tests/lab/conftest.py hands out its tests
QUICK := not slow and not faults and not lab and not wide
SLOW  := (slow or faults) and not lab and not wide
WIDE  := wide and not lab

# tests that start processes share their machine, and may meet a busy moment of it: what failed gets one more try, alone,
# and that decides; both are printed
again = || { test $$? = 1 && echo "ONCE MORE, WHAT FAILED:" && \
	  $(BIN)/python -m pytest -q -rs --last-failed --last-failed-no-failures none --maxfail 9 $(1); }

export DS_BUILD_OPS := 0
# what tests leave to be looked at, such as a picture of a run's page in a browser
export MESHWRIGHT_ARTIFACTS ?= $(CURDIR)/build/artifacts
export PIP_ROOT_USER_ACTION := ignore
# images of Python often forbid compiled files, and then each of the processes of a test run compiles every test anew
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup run test wide check lint faults lab matrix clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

setup: $(STAMP) ## virtual environment in .venv, everything installed

run: $(STAMP) ## train examples/quickstart.yaml on this machine (JOB=... for another)
	$(BIN)/meshwright launch $(JOB)

test: $(STAMP) lint ## ruff, mypy --strict, tests and documents: every pair of what can meet
	$(BIN)/python -m pytest -q -n 3 --dist loadfile -m "$(QUICK)"
	$(BIN)/python -m pytest -q -n 4 --dist loadfile -m "$(SLOW)" tests $(call again,-m "$(SLOW)" tests)

wide: $(STAMP) ## the rest: every cell of every matrix, ten thousand damaged inputs, every page, more ways to fall
	$(BIN)/python -m pytest -q -n 3 --dist worksteal -m "$(WIDE)" tests $(call again,-m "$(WIDE)" tests)

check: $(STAMP) lint ## the same without slow tests
	$(BIN)/python -m pytest -q -n 3 --dist loadfile -m "$(QUICK)"

lint: $(STAMP) ## ruff and mypy alone
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary

faults: $(STAMP) ## every fault of docs/reliability.md until there are 20 trials of each (REPEAT=20); as root
	MESHWRIGHT_FAULTS=$(REPEAT) $(BIN)/python -m pytest -q -m faults
	$(BIN)/python -m tests.lab.reliability --repeat $(REPEAT) --write

lab: $(STAMP) ## real ssh, Slurm, MPI and Ray between pretended hosts; as root, it installs what it needs
	@$(PIP) --editable '.[$(EXTRAS),$(LAB)]' || echo "THE LAB GOES WITHOUT RAY AND MPI"
	@which $(LAB_TOOLS) >/dev/null || test "$$(id -u)" != 0 || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq -y --no-install-recommends $(LAB_PACKAGES) >/dev/null; } || echo "THE LAB GOES WITHOUT SOME OF: $(LAB_PACKAGES)"
	$(BIN)/python -m pytest -q -rs -n 4 -m lab tests/lab $(call again,-m lab tests/lab)

matrix: $(STAMP) ## every cell of the four parity matrices; writes docs/parity*.md
	$(BIN)/python -m tests.parallel.matrix
	$(BIN)/python -m tests.parallel.schedules_matrix
	$(BIN)/python -m tests.parallel.sequence_matrix
	$(BIN)/python -m tests.parallel.decoders_matrix

clean: ## remove the virtual environment, caches and runs
	rm -rf $(VENV) runs build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"meshwright needs Python 3.11 or newer, not {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@test -d src/meshwright/parallel/ || { echo "src/meshwright/parallel is not a link: clone again with git -c core.symlinks=true"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: apt install python3-venv"; exit 1; }; }
	@echo "installing $(TORCH), then meshwright with $(EXTRAS)"
	@$(PIP) --upgrade pip setuptools wheel
	@$(PIP) '$(TORCH)'
	@$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@
