# Everything a fresh machine needs is made here: `make quickstart` and `make test` create .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install quickstart quickstart-sliding test lint docs format clean

help:
	@echo "make quickstart          finetune the embedded model with PowerAttention on this machine, a few minutes"
	@echo "make quickstart-sliding  the same with a sliding window of the same key budget"
	@echo "make test                lint, types, tests"
	@echo "make docs                write the site to site/"
	@echo "make format              format the code"
	@echo "make clean               remove .venv, runs/ and site/"

install: $(STAMP)

# CUDA, compilers and op builds are not needed: DS_BUILD_OPS=0 leaves DeepSpeed's C++ and CUDA extensions out.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "sparsetrain needs Python 3.11 or later; name one: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch numpy
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .[dev]
	touch $(STAMP)

quickstart: $(STAMP)
	rm -rf runs/quickstart
	$(BIN)/sparsetrain run quickstart
# A run that Ctrl-C stopped has said how to continue.
	@test ! -d runs/quickstart/final || printf '%s\n' "" "Next:" \
		"  open runs/quickstart/report.html in a browser" \
		"  make quickstart-sliding                                       as many keys, none of them far" \
		"  source $(BIN)/activate                                     so that sparsetrain is found" \
		"  sparsetrain recipe list                                       recipes for real models" \
		"  sparsetrain recipe copy qwen3-0.6b-power-32k my.yaml          start your own from one" \
		"  sparsetrain doctor my.yaml                                    check this machine for it" \
		"  deepspeed --num_gpus 8 launch/train.py my.yaml                train it"

quickstart-sliding: $(STAMP)
	rm -rf runs/quickstart-sliding
	$(BIN)/sparsetrain run quickstart attention.method=sliding --output runs/quickstart-sliding
	@echo
	@echo "Both in one page: $(BIN)/sparsetrain compare runs/quickstart runs/quickstart-sliding"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each process begins with one half of the folders, so that what tests of a folder share is mostly made once.
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# tests/test_site.py builds it as strictly.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html, or for the search: $(BIN)/python -m http.server --directory site"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs site
