.PHONY: install lint test train evaluate card check
# A folder with local copies of the data sets; empty: they come from the Hub.
DATA ?=
# The starting encoder, a Hub id or a folder.
ENCODER ?= sentence-transformers/all-MiniLM-L6-v2
RUN ?= runs/release
FROM_DATA = $(if $(DATA),--data $(DATA))

install:
	pip install -r requirements-dev.txt -c constraints.txt

lint:
	ruff check .
	ruff format --check .

test:
	pytest

train:
	python -m training.train training/recipes/release.toml --output $(RUN) --encoder $(ENCODER) $(FROM_DATA)

evaluate:
	python -m evaluation.evaluate . --split validation --reference $(ENCODER) --output results/release_validation.json $(FROM_DATA)
	python -m evaluation.evaluate . --split test --reference $(ENCODER) --output results/release.json $(FROM_DATA)

card:
	python -m release.card

check:
	python -m release.check .
