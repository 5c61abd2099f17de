PYTHON ?= python3
BIN := .venv/bin
BENCHMARKS := prepare train serve

.PHONY: setup run test test-long lint bench clean

# Done again only when the locked versions or the project's own needs change.
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Raylway needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make setup PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,export]"
	@touch $@

run: setup
	$(BIN)/raylway run jobs/flights.yaml
	$(BIN)/python docs/first_request.py flights
	@echo "Next: open the report named above, serve with '$(BIN)/raylway serve flights', run the tests with 'make test'."

test: setup
	$(BIN)/python -m pytest -n 2 -m "not long"
	@echo "Next: 'make run' for the whole way from raw flights to a served answer, 'make test-long' for the long campaigns."

test-long: setup
	$(BIN)/python -m pytest -m long
	@echo "Next: 'make bench' for the speed beside the plain way."

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

# Leaves `runs/` alone: those are results.
clean:
	rm -rf .venv build dist *.egg-info platform/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
