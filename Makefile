.PHONY: install lint test smoke data projection train research evaluate onnx bench experiments demo card check publish
# A folder with local copies of the data sets; empty: they come from the Hub.
DATA ?=
# The starting encoder, a Hub id or a folder.
ENCODER ?= sentence-transformers/all-MiniLM-L6-v2
RUN ?= runs/release
RECIPE = training/recipes/release.toml
FROM_DATA = $(if $(DATA),--data $(DATA))

install:
	pip install -r requirements-dev.txt -c constraints.txt

lint:
	ruff check .
	ruff format --check .
	mypy

# Two processes at a time, each file in one of them; a single file is quicker with `pytest tests/test_….py`.
test:
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder

smoke:
	python -m training.train training/recipes/smoke.toml --output runs/smoke

# The data sets, from their original files.
data:
	python -m training.sources --output data

projection:
	python -m training.projection --encoder $(ENCODER) --data $(DATA) --output runs/projection.safetensors

# Three legs: the second and the third start from the weights before them, at lower rates and with fewer epochs, and are averaged
# with them. About three hours of one core.
LATER = optimizer.learning_rate=1.5e-4 optimizer.head_learning_rate=7e-4 tasks.ner.datasets.gum_open.epochs=0.25 \
	tasks.sentiment.datasets.newsmtsc.epochs=0.5 tasks.sentiment.datasets.goemotions.epochs=1 tasks.emotion.datasets.goemotions.epochs=1
SECOND = model.start=$(RUN)/first/final run.seed=14 tasks.ner.datasets.uner_ewt.epochs=2 tasks.ner.datasets.wnut17.epochs=1.5
THIRD = model.start=$(RUN)/average run.seed=15 tasks.ner.datasets.uner_ewt.epochs=1 tasks.ner.datasets.redocred.epochs=2 \
	tasks.ner.datasets.crossner.epochs=1.5 tasks.ner.datasets.wnut17.epochs=1 \
	tasks.sentiment.datasets.vader_sentiment.epochs=3 tasks.sentiment.datasets.emobank_sentiment.epochs=3
LEG = python -m training.train $(RECIPE) --encoder $(ENCODER) $(FROM_DATA)
train:
	$(LEG) --output $(RUN)/first
	$(LEG) --output $(RUN)/second $(addprefix --set ,$(LATER) $(SECOND))
	python -m training.average $(RUN)/first/final $(RUN)/second/final --share 0.6 --output $(RUN)/average
	$(LEG) --output $(RUN)/third $(addprefix --set ,$(LATER) $(THIRD))
	python -m training.average $(RUN)/average $(RUN)/third/final --share 0.5 --output $(RUN)/final
	python -m evaluation.calibrate $(RUN)/final --recipe $(RECIPE) $(FROM_DATA)

# The architecture on the literature's benchmarks: one model for all tasks, the single-task run of each, and other depths.
RESEARCH = training/recipes/research.toml
research:
	python -m training.train $(RESEARCH) --output runs/research --encoder $(ENCODER) $(FROM_DATA)
	python -m evaluation.evaluate runs/research/final --recipe $(RESEARCH) --split test $(FROM_DATA) --output results/research.json
	for task in sentiment emotion ner; do \
		python -m training.train $(RESEARCH) --only $$task --output runs/$$task --encoder $(ENCODER) $(FROM_DATA) && \
		python -m evaluation.evaluate runs/$$task/final --recipe $(RESEARCH) --only $$task --split test $(FROM_DATA) \
			--output results/research_$$task.json || exit 1; \
	done
	for layers in 2 3 4; do \
		python -m training.train $(RESEARCH) --set model.num_task_layers=$$layers --output runs/depth_$$layers \
			--encoder $(ENCODER) $(FROM_DATA) && \
		python -m evaluation.evaluate runs/depth_$$layers/final --recipe $(RESEARCH) --split validation $(FROM_DATA) \
			--output results/research_$${layers}_layers_validation.json || exit 1; \
	done

evaluate:
	for split in validation test; do \
		python -m evaluation.evaluate . --split $$split $(FROM_DATA) \
			--output results/release$$([ $$split = test ] || echo _$$split).json || exit 1; \
	done
	python -m evaluation.evaluate . --only ner --split test --rewrite lower $(FROM_DATA) --output results/release_lower.json
	python -m evaluation.evaluate . --recipe training/recipes/outside.toml --split test $(FROM_DATA) --output results/outside.json
	python -m evaluation.evaluate . --recipe training/recipes/outside.toml --only ner --rewrite lower --split test $(FROM_DATA) \
		--output results/outside_lower.json
	python -m evaluation.rivals . $(FROM_DATA) --output results/rivals.json

# The exports for ONNX Runtime; with DATA=…, also what they cost in quality.
onnx:
	python -m release.onnx . $(FROM_DATA)

# Speed side by side, and memory; DATA=… must name the data sets' folder.
bench:
	python -m benchmarks.run $(FROM_DATA)
	python -m benchmarks.starts
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
