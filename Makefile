# Two commands do everything: `make demo` and `make test`. Both make the same .venv first.
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
# A processor of long ago: the engine's fallbacks are what it computes with.
OLDER := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41

# Where this is set, every process would compile torch and transformers anew: 22 s instead of 9.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-swarm test-rest check bench clean compile-run

demo: .venv/installed
	$(BIN)/farflung run examples/demo.toml --fresh --run.seed $(SEED)

# Two lanes of like length, whole swarms in one of them, and beside them what reads the code. Each has a folder of its
# own for what tests write: pytest tidies a common one up while the other lane adds to it.
test: .venv/installed
	@$(MAKE) --no-print-directory -j3 check test-swarm test-rest

test-swarm: .venv/installed
	$(BIN)/pytest --basetemp $$(mktemp -d)/swarm --durations 6 tests/swarm tests/contract tests/property

test-rest: .venv/installed
	$(BIN)/pytest --basetemp $$(mktemp -d)/rest --durations 12 tests/unit tests/integration tests/web
	$(OLDER) $(BIN)/pytest --basetemp $$(mktemp -d)/older --quiet -k 'not far' tests/unit/test_matmul.py tests/integration/test_engine_local.py

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

bench: .venv/installed
	@for file in $$(grep -l -e --quick bench/*.py); do echo "== $$file"; $(BIN)/python $$file --quick; done

.venv/installed: pyproject.toml constraints.txt
	@echo "Making .venv: about 1.7 GB with the CPU build of torch; see README.md to choose another build."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --no-compile -c constraints.txt -e '.[learn,envs,dev]'
	@$(MAKE) --no-print-directory -j3 compile-run compile-torch compile-light # the few modules of 20,000 that a run imports
	@touch $@

compile-run:
	@$(BIN)/python -c 'import farflung.launch.swarm'

compile-%:
	@$(BIN)/python -m farflung.launch.forkserver $* examples/base < /dev/null > /dev/null

clean:
	rm -rf .venv runs dist
