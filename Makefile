# One place for every command. PYTHON is any Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Faults, and much waiting: with the fault matrix, not with the tests.
STARTS := tests/spool/test_failed_start.py
VALIDATION := tests/scenarios/test_consistency.py::test_under_load_retries_restarts_and_a_second_sidecar_nothing_is_called_divergent_that_is_not
OVERTAKEN := tests/scenarios/test_consistency_overtaken.py
WORKERS ?= 4  # tests mostly wait for processes and disks: more workers than a small machine has cores
FAULT_WORKERS ?= 4

# A process that may not keep what it has compiled compiles all of this again, and a test run starts hundreds of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test check format clean bench ci-faults faults ci-integration install

install: $(STAMP)

$(STAMP): pyproject.toml .ci/venv .ci/pip_wheel.py
	@PYTHON='$(PYTHON)' .ci/venv '$(VENV)' '.[embedded,otlp,test,dev]'
	@touch $@

run: $(STAMP)  ## a private PostgreSQL, a local DynamoDB and the sidecar in dual_write
	@$(BIN)/sidecar dev

check: $(STAMP)  ## format, lint, types, layers
	$(BIN)/ruff format --check sidecar tests benchmarks
	$(BIN)/ruff check sidecar tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format sidecar tests benchmarks
	$(BIN)/ruff check --fix sidecar tests benchmarks

test: check  ## everything that needs no root: at most 8 minutes
	$(BIN)/pytest -m 'not root' --ignore=tests/faults --ignore=$(STARTS) --ignore=$(OVERTAKEN) --deselect $(VALIDATION) -n $(WORKERS) --dist worksteal

ci-faults: $(STAMP)  ## the fault matrix with CI's counts: at most 9 minutes; without root some rows are named as not run
	SPOOL_MODEL=100 VALIDATION_SECONDS=90 $(BIN)/pytest $(VALIDATION) $(OVERTAKEN) $(STARTS) tests/spool/test_model.py tests/faults -n $(FAULT_WORKERS) --dist worksteal

faults: $(STAMP)  ## the fault matrix with the long counts (ROWS=f3_ for one row, FAULTS_SEED=7 for a seed that failed)
	FAULTS_LONG=1 $(BIN)/pytest tests/faults -n $(WORKERS) --dist worksteal $(if $(ROWS),-k '$(ROWS)')
	$(if $(ROWS),,SPOOL_MODEL=2000 $(BIN)/pytest tests/spool/test_model.py)
	$(if $(ROWS),,FAULTS_LONG=1 $(BIN)/pytest tests/fleet/test_simulation.py tests/test_screening.py -n $(WORKERS))
	$(if $(ROWS),,VALIDATION_SECONDS=90 $(BIN)/pytest $(VALIDATION) $(OVERTAKEN))

ci-integration: $(STAMP)  ## real clients, a real browser, the rollout's real tools; root; at most 6 minutes
	PYTHON='$(PYTHON)' VENV='$(VENV)' tests/integration/install
	$(BIN)/pytest tests/integration -p no:schemathesis -n 4 --dist loadfile --no-loadscope-reorder $(INTEGRATION)

bench: $(STAMP)  ## the sidecar beside the naive baselines (BENCH="--quick")
	$(BIN)/python -m benchmarks.run $(BENCH)

clean:
	rm -rf $(VENV) .run .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
