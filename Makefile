.PHONY: install lint test smoke data train single evaluate onnx bench experiments demo card check publish
# A folder with local copies of the data sets; empty: they come from the Hub.
DATA ?=
# The starting encoder, a Hub id or a folder.
ENCODER ?= sentence-transformers/all-MiniLM-L6-v2
RUN ?= runs/release
# The release is the mean of runs that differ in this seed, moved so far from the start.
SEEDS = 13 1 2
SCALE = 1.1
RECIPE = training/recipes/release.toml
FROM_DATA = $(if $(DATA),--data $(DATA))
# Texts that no task trains on, to measure how much of the starting embedding is kept.
NEIGHBOURS = --neighbours $(if $(DATA),wnut17,leondz/wnut_17@refs/convert/parquet) test tokens
TASKS = sentiment emotion ner similarity

install:
	pip install -r requirements-dev.txt -c constraints.txt

lint:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest

smoke:
	python -m training.train training/recipes/smoke.toml --output runs/smoke

# The data sets, from their original files.
data:
	python -m training.sources --output data

# The runs that the release is made of, one after the other.
train:
	for seed in $(SEEDS); do \
		python -m training.train $(RECIPE) --output $(RUN)$$seed --set sampling.seed=$$seed --encoder $(ENCODER) $(FROM_DATA) \
		|| exit 1; \
	done
	python -m training.merge $(RECIPE) $(SEEDS:%=$(RUN)%) --scale $(SCALE) --output $(RUN) --encoder $(ENCODER) $(FROM_DATA)

# For the negative-transfer table: one run on all tasks, and the single-task run of each, by the same recipe.
single:
	python -m evaluation.evaluate $(RUN)$(firstword $(SEEDS))/final --split test --output results/together.json $(FROM_DATA)
	for task in $(TASKS); do \
		python -m training.train $(RECIPE) --only $$task --output runs/$$task --encoder $(ENCODER) $(FROM_DATA) && \
		python -m evaluation.evaluate runs/$$task/final --only $$task --split test --output results/single_$$task.json $(FROM_DATA) \
		|| exit 1; \
	done

evaluate:
	for split in validation test; do \
		python -m evaluation.evaluate . --split $$split --reference $(ENCODER) $(NEIGHBOURS) $(FROM_DATA) \
			--output results/release$$([ $$split = test ] || echo _$$split).json || exit 1; \
	done

# The exports for ONNX Runtime; with DATA=…, also what they cost in quality.
onnx:
	python -m release.onnx . $(FROM_DATA)

# Speed side by side, where the time goes, and memory; DATA=… must name the data sets' folder.
bench:
	python -m benchmarks.run $(FROM_DATA)
	python -m benchmarks.profile $(FROM_DATA)
	python -m benchmarks.memory

# The small grid behind discussion.md, about three hours a seed on two cores; it continues where it was.
experiments:
	python -m experiments.run --encoder $(ENCODER) $(FROM_DATA)
	python -m experiments.reading . $(FROM_DATA)

# The page to try the model in a browser.
demo:
	python -m demo.app

# README.md and discussion.md from results/.
card:
	python -m release.card
	python -m experiments.report

check:
	python -m release.check .

# To the Hub: REPO=user/name, and TAG=v1.0 if wanted. Log in with `hf auth login` first.
publish:
	python -m release.publish $(REPO) $(if $(TAG),--revision $(TAG))
