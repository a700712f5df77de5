# `make` or `make help` lists the targets. The first one that needs it creates .venv and installs into it.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed

# Bytecode is kept, in .venv, whatever the environment says: else each process, and there are many, compiles torch and
# transformers again, which takes longer than most tests.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/pycache

.DEFAULT_GOAL := help
.PHONY: help install stages explore smol smol-eval smol-stages smol-report test lint format types pytest zoo notebooks figures comparison testbed-eval site test-transformers test-lmms-eval clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv and install the package with the versions in constraints.txt
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,notebooks,docs]'
	touch $@

stages: $(STAMP) ## Layer-by-layer attention of the shipped model: tables and figures in outputs/stages/
	$(BIN)/python -m analysis.stages

# Apart from .venv: gradio wants an older pillow and tomlkit than constraints.txt.
EXPLORE := .venv-explore
explore: $(EXPLORE)/.installed ## The explorer: a page in the browser on which one asks the shipped model and looks inside
	$(EXPLORE)/bin/python -m analysis.explore $(ARGS)
$(EXPLORE)/.installed: pyproject.toml constraints.txt
	test -x $(EXPLORE)/bin/python || $(PYTHON) -m venv $(EXPLORE)
	grep -v -E '^(pillow|tomlkit)==' constraints.txt > $(EXPLORE)/constraints.txt
	$(EXPLORE)/bin/python -m pip install --no-compile --quiet --disable-pip-version-check -c $(EXPLORE)/constraints.txt -e '.[explore]'
	touch $@

smol: $(STAMP) ## Fetch the language model of llava_smol and put the model together (98 MB; once)
	$(BIN)/python -m dyvte.testbed.smol.assemble

smol-eval: smol ## Accuracy and controls of llava_smol, and its page
	$(BIN)/python -m docs.tooling.smol_evidence

smol-stages: smol ## Layer-by-layer attention of llava_smol
	$(BIN)/python -m analysis.stages model=llava_smol data=english

smol-report: smol-stages stages ## What llava_smol shows, and the small model beside it, on one page
	$(BIN)/python -m analysis.report 'compare=[llava_smol@english,llava_shapes]'

# The main job and the type checker take one core each, so they run beside each other.
test: $(STAMP) ## The main job, then every check; what CI runs
	$(MAKE) --no-print-directory --jobs $(WORKERS) stages lint types
	$(MAKE) --no-print-directory pytest

lint: $(STAMP) ## Check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP) ## Format the code and repair what can be repaired
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP) ## Check type hints
	$(BIN)/mypy

# One thread a worker: the tests' models are too small for more.
pytest: $(STAMP) ## Run the tests (WORKERS=2 processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

zoo: $(STAMP) ## Every check on a small model of every architecture of transformers (CI runs the quick ones)
	OMP_NUM_THREADS=1 DYVTE_ZOO=all $(BIN)/python -m pytest -q -n $(WORKERS) tests/zoo tests/test_models.py

# In an environment of its own: TRANSFORMERS=5.24.0 make test-transformers
OTHER   := .venv-transformers
test-transformers: ## Run the engine's tests with another version of transformers (TRANSFORMERS=)
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	grep -v -E '^(transformers|tokenizers|huggingface.hub|safetensors)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --no-compile --quiet --disable-pip-version-check -c $(OTHER)/constraints.txt -e '.[dev]' 'transformers==$(TRANSFORMERS)'
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal tests \
		--ignore-glob '*test_docs*' --ignore-glob '*test_notebooks*' --ignore-glob '*test_packaging*' --ignore-glob '*test_gallery*'

# In an environment of its own: lmms-eval brings many packages along, among them a wandb that wants an older protobuf.
# torchvision's wheel needs the CUDA build of torch, and lmms-eval starts without it.
LMMS    := .venv-lmms-eval
test-lmms-eval: ## Run lmms-eval itself on the shipped model under every policy
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	grep -v '^protobuf==' constraints.txt > $(LMMS)/constraints.txt
	$(LMMS)/bin/python -m pip install --no-compile --quiet --disable-pip-version-check -c $(LMMS)/constraints.txt -e '.[lmms-eval]'
	$(LMMS)/bin/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' \
		|| $(LMMS)/bin/python -m pip uninstall --yes --quiet torchvision
	$(LMMS)/bin/python tests/lmms_eval/run.py

notebooks: $(STAMP) ## Run the notebooks again and keep their outputs
	$(BIN)/python -m docs.tooling.notebooks

figures: $(STAMP) ## Draw every picture of README.md and docs/ again
	$(BIN)/python -m docs.tooling.gallery

site: $(STAMP) ## The documentation as a web site, in site/ (a broken link or directive is an error)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One thread a process: the testbed is too small for more.
comparison: $(STAMP) ## All methods at the same FLOPs, and tokens, on the shipped model, into docs/comparison.md (WORKERS=2 processes)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node $(WORKERS) -m docs.tooling.comparison

testbed-eval: $(STAMP) ## Accuracy and controls of the shipped model, and its model card
	$(BIN)/python -m docs.tooling.testbed

clean: ## Remove .venv and caches; results under outputs/ stay
	rm -rf $(VENV) $(OTHER) $(LMMS) $(EXPLORE) site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
