# Each target does all the set-up it needs; a second call finds it done.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test quick soak mutants check audit docs pages bench teacher clean

demo: $(STAMP)
	$(BIN)/refilled demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The tests without those that take more than half a second: under a minute.
quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

# The faults of docs/reliability.md, many times; up to an hour on two cores.
soak: $(STAMP)
	REFILLED_SOAK=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m fault

# Small faults in the source of the losses, each of which a test must notice; resumes from mutants.jsonl.
mutants: $(STAMP)
	nice -n 3 $(BIN)/python benchmarks/mutants.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/check_style.py

# Known vulnerabilities of what pip installs with all extras, and a bill of materials (CycloneDX) with its hashes.
audit: .venv/.audit
	mkdir -p build
	$(BIN)/uv pip compile --quiet --all-extras --generate-hashes pyproject.toml --output-file build/requirements.txt
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml build/requirements.txt --output-file build/sbom.json
	$(BIN)/pip-audit --disable-pip --require-hashes --requirement build/requirements.txt

# The site, without a warning, and the examples in the docstrings.
docs: $(STAMP) .venv/.docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/sphinx-build -W -q -b doctest docs docs/_build/doctest

# What the documents take from the raw results.
pages: $(STAMP)
	$(BIN)/python docs/build_results.py
	$(BIN)/python docs/build_figures.py
	$(BIN)/python docs/build_idea.py
	$(BIN)/python docs/build_reliability.py
	$(BIN)/python docs/build_messages.py

bench: $(STAMP)
	$(BIN)/python benchmarks/mining.py --sizes 128 256 512 --runs 5
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/start.py

# The teacher that comes with the package.
teacher: $(STAMP)
	$(BIN)/python docs/build_teacher.py

# The stamp is older than pyproject.toml only when the dependencies may have changed.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

.venv/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

.venv/.audit: $(STAMP)
	$(BIN)/python -m pip install --quiet cyclonedx-bom pip-audit uv
	touch $@

clean:
	rm -rf .venv build docs/_build .pytest_cache .mypy_cache .ruff_cache
