PYTHON ?= python3
PY := .venv/bin/python
RUN := $(PY) -m src.run
UV_VERSION := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help setup demo test smoke recipes-smoke lint test-slow faults bench publish results wandb-dashboard lock clean

help:  ## Print this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1 \t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: .venv/installed  ## Install the pinned packages and bitfront into .venv

demo: .venv/installed  ## Train and compress a vision transformer on bundled data, print its table (3 minutes)
	$(RUN) task=vit quant=float
	$(RUN) task=vit quant=diffq penalty=5
	$(RUN) task=vit quant=decoupleq bits=2
	$(PY) -m src.report runs task=vit

test: .venv/installed  ## Lint and run the test suite (under 7 minutes on 2 cores)
	@$(MAKE) --no-print-directory lint
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

smoke: .venv/installed  ## Run every method on tiny data in seconds
	rm -rf runs-smoke
	$(RUN) -m task=vit quant='glob(*)' smoke=true root=runs-smoke wandb=disabled
	$(PY) -m src.report runs-smoke

recipes-smoke: .venv/installed  ## Run every recipe on tiny data (10 minutes)
	rm -rf runs-smoke
	@failed=0; for recipe in recipes/*/*.yaml; do recipe=$${recipe#recipes/}; recipe=$${recipe%.yaml}; echo "== $$recipe"; \
		$(RUN) recipe=$$recipe smoke=true root=runs-smoke wandb=disabled || failed=1; done; exit $$failed

lint: .venv/installed  ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-slow: .venv/installed  ## Run the tests that need minutes or gigabytes (installs lm-eval, Ray and MLX)
	$(PY) -m uv pip install -q --no-build-isolation -c requirements.lock -e '.[lm-eval,ray]' 'mlx[cpu]==0.32.4'
	$(PY) -m pytest -m slow
	$(PY) -m pytest tests/test_harness.py tests/test_interchange.py

faults: .venv/installed  ## Read 100,000 damaged and hostile files, kill a hundred processes
	$(PY) -m benchmarks.faults
	$(PY) -m benchmarks.kills

bench: .venv/installed  ## Compare with the official packages (installs them, which needs a C compiler; hours)
	$(PY) -m benchmarks.solver
	$(PY) -m benchmarks.report
	$(PY) -m benchmarks.onnx
	$(PY) -m uv pip install -q --no-deps diffq==0.2.4
	$(PY) -m benchmarks.diffq
	$(PY) -m src.fetch smollm2
	$(PY) -m benchmarks.peers

publish:  ## Copy the finished records below runs/ to results/records
	@cd runs && grep -l '"status": "finished"' */*/*/record.json | while read -r record; do \
		run=$$(dirname "$$record"); mkdir -p "../results/records/$$(dirname "$$run")"; \
		cp "$$record" "../results/records/$$run.json"; done

results: .venv/installed  ## Regenerate tables, figures and the READMEs' blocks from results/records
	$(PY) -m src.report results/records out=results readme=README.md,results/README.md
	$(PY) -m src.report results/scales out=results/scales

wandb-dashboard: .venv/installed  ## Make views of runs/ in Weights & Biases; ARGS=dry_run=true prints them
	$(PY) -m src.dashboard $(ARGS)

lock: .venv/installed  ## Resolve pyproject.toml into requirements.lock
	$(PY) -m uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --no-header --group pyproject.toml:dev --extra espeak --extra dashboard --extra hf --extra onnx pyproject.toml -o requirements.lock

clean:  ## Remove .venv, .peers and caches; runs stay
	rm -rf .venv .peers .pytest_cache .ruff_cache .mypy_cache .hypothesis

# uv installs in seconds what pip installs in minutes; pip alone works too.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bitfront needs Python 3.11 or newer; run 'make $(MAKECMDGOALS) PYTHON=python3.12' or the like"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "Python's venv module is missing; install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q uv==$(UV_VERSION) && \
		$(PY) -m uv pip install --require-hashes --no-deps --compile-bytecode -r requirements.lock || \
		$(PY) -m pip install --require-hashes --no-deps -r requirements.lock
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
