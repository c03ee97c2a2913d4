# Commands for a fresh machine with Python >= 3.11 and make: `make demo`, `make serve`, `make test`.
PYTHON ?= python3
BIN := .venv/bin

# What one process has compiled the others load, where the environment says otherwise as well.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo serve test lint clean

# First what the model that ships draws from words, then a model from random init.
demo: .venv/installed
	$(BIN)/ldm sample --model assets/ldm-small --out runs/demo --sheet runs/demo.png \
	  "a red apple, twemoji style" "a red apple, openmoji style" \
	  "a rocket, twemoji style" "a dog face, openmoji style" \
	  "three small green hearts on a white background" "a large blue star on a cream background" \
	  "a pizza, twemoji style, on a sky blue background" \
	  "a small red circle to the left of a medium yellow square on a white background"
	$(BIN)/python training/train.py --config configs/quickstart.yaml

# A page that draws with the model that ships; its address is printed when it is ready.
serve: .venv/serving
	$(BIN)/ldm serve --model assets/ldm-small --loras assets --out runs/served

test: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile \
	  --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/installed: pyproject.toml
	@echo "installing into .venv (some minutes, several GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e '.[demo,dev]'
	touch $@

.venv/serving: .venv/installed
	$(BIN)/pip install --disable-pip-version-check -q -e '.[serve]'
	touch $@

clean:
	rm -rf .venv runs
