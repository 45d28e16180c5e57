# Everything runs inside .venv, which is made on first use and again when a dependency file changes.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-slow test-crash test-mlflow chaos check bench-quality bench-ablation bench-download audit format openapi client docs table clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     run the main job end to end on the small model in demo/ (embedded: SQLite, no broker)"
	@echo "make test     run the tests, on SQLite and on Postgres"
	@echo "make test-slow    run the tests that take minutes: generated requests over the whole API, orders of events, real processes, fits of real jobs"
	@echo "make test-crash   run the tests that kill workers, servers and brokers"
	@echo "make chaos    ten minutes of random faults, then the reckoning; ARGS=\"--minutes 30 --seed 7 ...\""
	@echo "make test-mlflow  run the tests against a real MLflow server (installs one)"
	@echo "make check    lint, types, import rules, OpenAPI, generated pages, migrations, images and manifests"
	@echo "make bench-quality   every method on the bench models: JSON, tables, plots (needs ../shared; hours on a CPU)"
	@echo "make bench-ablation  what each ingredient of the fit is worth, on the same model"
	@echo "make bench-download  artifact downloads beside nginx on the same file (needs nginx)"
	@echo "make audit    known vulnerabilities of the pinned dependencies (asks PyPI); ARGS=\"--format cyclonedx-json --output sbom.json\" for a list of parts"
	@echo "make format   rewrite sources as the linter wants them"
	@echo "make openapi  write openapi.json from the code, and the client's models from that"
	@echo "make client   write the generated parts of clients/python"
	@echo "make docs     write docs/library.md and docs/cli.md from docstrings, signatures and commands"
	@echo "make table    write the support table in docs/architectures.md from the registry and the tests"

$(STAMP): pyproject.toml clients/python/pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH: set PYTHON=... to a Python 3.11 or newer" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" -e ./clients/python
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m demo.run

# Processes that share the tests; each has its own databases, ports and folders. One more than two cores: some tests wait.
WORKERS ?= 3
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not crash and not mlflow and not slow" $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow and not crash and not mlflow" $(ARGS)

test-crash: $(STAMP)
	$(BIN)/python -m pytest -m crash

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos $(ARGS)

# The whole of MLflow, in an environment of its own: it allows only older pyarrow and pandas than ours.
MLFLOW_SERVER := $(VENV)/mlflow-server/bin/mlflow
$(MLFLOW_SERVER): $(STAMP)
	$(PYTHON) -m venv $(VENV)/mlflow-server
	$(VENV)/mlflow-server/bin/pip install --quiet --disable-pip-version-check "mlflow==3.17.2"
	@touch $@

test-mlflow: $(MLFLOW_SERVER)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,mlflow]"
	$(BIN)/python -m pytest -m mlflow

# An environment of its own: the audit is no dependency of what it audits. Strict: what PyPI does not know is no pass.
AUDIT := $(VENV)/audit/bin/pip-audit
$(AUDIT): $(STAMP)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check "pip-audit==2.10.1"
	@touch $@

audit: $(AUDIT)
	$(AUDIT) --strict --no-deps --disable-pip -r constraints.txt $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.openapi --check
	$(BIN)/python -m tools.client_sources --check
	$(BIN)/python -m tools.support_table --check
	$(BIN)/python -m tools.library_docs --check
	$(BIN)/python -m tools.cli_docs --check
	$(BIN)/python -m tools.import_circles
	$(BIN)/python -m app.migrate --check
	$(BIN)/yamllint --strict -c .yamllint.yml .yamllint.yml docker-compose.yml deploy
	$(BIN)/hadolint Dockerfile gpu_worker.Dockerfile
	$(BIN)/kubernetes-validate --strict --no-warn --quiet deploy/kubernetes/*.yaml deploy/monitoring/podmonitor.yaml

# More options: make bench-quality ARGS="--device cuda --methods eigen:tied,stiefel:joint"
RESULTS := benchmarks/results
MIXED := eigen:tied,eigen:joint,weighted:joint,stiefel:joint,stiefel:tied:predictor,oblique:joint,oblique:joint:polish_steps=0
bench-quality: $(STAMP)
	$(BIN)/python -m benchmarks.quality $(ARGS)
	$(BIN)/python -m benchmarks.quality --mixture --num-samples 192 --methods $(MIXED) --key-modes pre \
		--out $(RESULTS)/quality-books-llama-31m-mixture.json $(ARGS)
	$(BIN)/python -m benchmarks.quality ../shared/models/books-llama-29m --key-modes pre --kept 0.5,0.25 \
		--methods eigen:tied,eigen:joint,weighted:joint,oblique:joint,oblique:joint:polish_steps=0,stiefel:tied,stiefel:tied:predictor $(ARGS)
	$(BIN)/python -m benchmarks.report

bench-ablation: $(STAMP)
	$(BIN)/python -m benchmarks.ablation $(ARGS)
	$(BIN)/python -m benchmarks.report

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

openapi: $(STAMP)
	$(BIN)/python -m tools.openapi
	$(BIN)/python -m tools.client_sources

client: $(STAMP)
	$(BIN)/python -m tools.client_sources

bench-download: $(STAMP)
	$(BIN)/python -m benchmarks.service_download $(ARGS)

docs: $(STAMP)
	$(BIN)/python -m tools.library_docs
	$(BIN)/python -m tools.cli_docs

table: $(STAMP)
	$(BIN)/python -m tools.support_table

clean:
	rm -rf $(VENV) build dist *.egg-info clients/python/build clients/python/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
