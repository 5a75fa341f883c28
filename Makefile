# Everything a developer or CI runs. `make serve` and `make test` do all set-up themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve test check install protos bench bench-vllm bench-scale numerics chaos chaos-hour breadth helm models-doc clean

INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

KERNELS := $(wildcard stage_worker/native/*.cpp stage_worker/native/*.h)

$(INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -e ".[ucx-cu12]"
	touch $@

$(DEV): $(INSTALLED)
	$(BIN)/pip install --quiet -e ".[ucx-cu12,dev]"
	touch $@

install: $(DEV)

serve: $(INSTALLED)  ## set up, then serve the shipped model over two stages; ARGS="MODEL -pp 3" for others
	$(BIN)/stagemesh serve $(if $(ARGS),$(ARGS),-pp 2)

test: $(DEV) helm  ## everything that CI tests
	$(BIN)/python -m pytest -m "not slow" --durations 20 $(ARGS)

check: $(DEV)  ## format, lint, types, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python protos/generate.py --check
	$(BIN)/python tools/check_types.py
	$(BIN)/python tools/check_protos.py
	$(BIN)/python tools/helm/make_schema.py --check

protos: $(DEV)  ## regenerate the committed stubs
	$(BIN)/python protos/generate.py

helm: $(DEV)
	$(BIN)/python tools/helm/get_helm.py

# Runs all of tests/NAME; a run of all that came to its end, well or not, is written to benchmarks/results/NAME.md.
define suite
mkdir -p build
$(BIN)/python -m pytest tests/$(1) -m "slow or not slow" --timeout 3600 --junitxml build/$(1).xml $(ARGS); status=$$?; \
if [ $$status -le 1 ] && [ -z '$(ARGS)' ]; then \
	$(BIN)/python -m benchmarks.suite_result $(1) build/$(1).xml "make $(1)"; fi; exit $$status
endef

numerics: $(DEV)  ## every combination of the token-for-token tests (the pairwise part is in `make test`)
	$(call suite,numerics)

chaos: $(DEV)  ## kills, hangs, cuts and operations under live streams, at every named point
	$(call suite,chaos)

chaos-hour: $(DEV)  ## everything at random for an hour, 256 streams; writes benchmarks/results/chaos-hour.json
	STAGEMESH_CHAOS_S=3600 STAGEMESH_CHAOS_STREAMS=256 \
	STAGEMESH_CHAOS_RESULT=$(CURDIR)/benchmarks/results/chaos-hour.json \
	$(BIN)/python -m pytest tests/chaos/test_everything.py -m "not slow" -s $(ARGS)

bench: $(DEV)
	$(BIN)/python -m benchmarks.links

bench-vllm: $(DEV)  ## the table beside vLLM; VLLM_VENV names its environment (benchmarks/README.md)
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-scale: $(DEV)  ## how a mesh grows, with stages that sleep: about 40 minutes; ARGS="grid --stages 1,2" for less
	$(BIN)/python -m benchmarks.scale $(if $(ARGS),$(ARGS),grid)

models-doc: $(DEV)
	$(BIN)/python tools/make_models_doc.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .tools
