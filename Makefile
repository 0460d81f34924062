.PHONY: install lint test train evaluate card check
DATA ?=  # a folder with local copies of the data sets; empty: from the Hub
RUN ?= runs/release

install:
	pip install -r requirements-dev.txt -c constraints.txt

lint:
	ruff check .
	ruff format --check .

test:
	pytest

train:
	python -m training.train training/recipes/release.toml --output $(RUN) $(if $(DATA),--data $(DATA))

evaluate:
	python -m evaluation.evaluate . --split test --output results/release.json $(if $(DATA),--data $(DATA))

card:
	python -m release.card

check:
	python -m release.check .
