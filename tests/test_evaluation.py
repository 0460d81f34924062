"""Metrics, their intervals, calibration and pictures: by hand, against naive loops, and in a whole run on a tiny model."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from sklearn import metrics as reference

import learning_multitask
from annotator_multitask import EKMAN, BioScheme
from common.data import has_split, token_spans
from common.recipe import Recipe, TaskRecipe
from evaluation import calibrate, evaluate, metrics, plots
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from tasks_multitask import TaskSpec
from tests.conftest import TASKS, tiny_model, tiny_tokenizer

STRICT = {"mode": "strict", "scheme": IOB2, "zero_division": 0}

# By hand


def test_multi_label_by_hand():
    truth, predicted = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]]), np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]])
    found = metrics.multi_label(truth, predicted).metrics()
    assert found == {"macro_f1": pytest.approx(1 / 2), "micro_f1": pytest.approx(2 / 3), "exact_match": pytest.approx(1 / 3)}
    nothing = np.zeros((2, 2), dtype=int)
    assert metrics.multi_label(nothing, nothing).metrics() == {"macro_f1": 0.0, "micro_f1": 0.0, "exact_match": 1.0}


def test_regression_by_hand():
    truth = np.array([[1.0], [2], [3], [4]])
    found = metrics.regression(truth, 2 * truth + 1).metrics()
    assert found == {"spearman": pytest.approx(1), "pearson": pytest.approx(1), "mean_absolute_error": 3.5}
    both = metrics.regression(np.hstack([truth, truth]), np.hstack([truth, -truth])).metrics()
    assert both["spearman"] == pytest.approx(0) and both["mean_absolute_error"] == pytest.approx(5 / 2)
    constant = metrics.regression(truth, np.full((4, 1), 0.1)).metrics()
    assert constant["spearman"] == constant["pearson"] == 0.0


def test_accuracy_at_lower_coverage_is_that_of_the_surest_answers():
    found = metrics.coverage(np.array([0.9, 0.2, 0.8, 0.6]), np.array([True, False, True, False]))
    assert found["1.0"] == {"min_score": 0.2, "accuracy": 0.5} and found["0.5"] == {"min_score": 0.8, "accuracy": 1.0}
    assert metrics.coverage(np.zeros(0), np.zeros(0, bool)) == {}


def test_an_entity_is_right_if_its_group_and_both_ends_are():
    tags, spans = ["B-PER", "I-PER", "O", "B-LOC"], token_spans(["Tim", "Cook", "in", "Paris"])
    found = [("PER", 0, 8), ("PER", 0, 3), ("LOC", 12, 17), ("ORG", 12, 17)]
    entities = [{"entity_group": group, "start": start, "end": end} for group, start, end in found]
    assert metrics.entities_right(spans, tags, entities) == [True, False, True, False]


def test_emotions_are_grouped_before_they_are_compared():
    labels = [label for group in EKMAN.values() for label in group]
    truth = np.zeros((3, len(labels)), int)
    for row, names in enumerate((["joy", "love"], ["grief"], ["anger", "joy"])):  # the last is of two groups
        truth[row, [labels.index(x) for x in names]] = 1
    probabilities = np.full(truth.shape, 0.1)
    probabilities[0, labels.index("excitement")] = probabilities[1, labels.index("sadness")] = 0.9
    spec = TaskSpec(kind="sequence_classification", labels=labels, problem_type="multi_label_classification")
    found = evaluate.Predictions(spec, logit(probabilities), truth, truth, np.arange(3))
    right, ranges = evaluate.measured(evaluate.group_statistics(found), True)
    assert right == {"ekman_macro_f1": 1.0, "ekman_calibration_error": pytest.approx(0.1)} and set(ranges) == set(right)
    probabilities[1, labels.index("fear")] = 0.95
    wrong, _ = evaluate.measured(evaluate.group_statistics(dataclasses.replace(found, logits=logit(probabilities))), False)
    assert wrong == {"ekman_macro_f1": 0.5, "ekman_calibration_error": pytest.approx((0.1 + 0.95) / 2)}


def calibration_error(confidence, correct):
    return metrics.calibration(confidence, correct, np.arange(len(correct))).metrics()["calibration_error"]


def test_calibration_error_by_hand():
    confidence, correct = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, False, True, True])
    assert calibration_error(confidence, correct) == pytest.approx((abs(1 - 1.9) + abs(2 - 1.1)) / 4)
    assert metrics.confidence_bins(np.array([0.0, 0.01, 1 / 15, 0.07, 0.99, 1.0])).tolist() == [0, 0, 0, 1, 14, 14]
    assert calibration_error(np.ones(3), np.ones(3, dtype=bool)) == 0.0


def test_entities_by_type_by_hand():
    truth = [["B-PER", "I-PER", "O"], ["B-LOC", "B-PER"], []]
    predicted = [["B-PER", "I-PER", "B-ORG"], ["B-LOC-partial", "B-PER"], []]
    found = metrics.entities(truth, predicted).metrics()
    assert found == {
        "f1": pytest.approx(4 / 7), "precision": pytest.approx(2 / 4), "recall": pytest.approx(2 / 3),
        "f1_PER": 1.0, "f1_LOC": 0.0,
    }  # fmt: skip
    counts, types = metrics.entity_counts(truth, predicted)
    assert types == ["LOC", "LOC-partial", "ORG", "PER"]
    assert counts[0].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]] and not counts[2].any()
    assert metrics.entities([["O"], []], [["O"], []]).metrics() == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_too_few_texts_have_no_neighbours():
    with pytest.raises(ValueError, match="3 distinct texts are too few to compare 3 neighbours; give more rows"):
        metrics.neighbours_shared(np.eye(3), np.eye(3), 3)


def test_words_get_the_tag_of_their_token():
    spans = token_spans(["U.S.", "in", "Rome", "?"])
    words = [(0, 1), (1, 2), (2, 3), (3, 4), (5, 7), (8, 12), (13, 14)]
    tags = evaluate.word_tags(words, spans, ["B-LOC", "O", "B-LOC", None])
    assert tags == ["B-LOC", "I-LOC", "I-LOC", "I-LOC", "O", "B-LOC", None]
    assert evaluate.word_tags([(0, 1), (1, 2)], [(0, 2)], ["NOUN"]) == ["NOUN", "NOUN"]


def test_temperature_by_hand():
    logits, labels = np.array([[2.0, 0.0]] * 4), np.array([0, 0, 0, 1])
    expected = 2 / np.log(3)  # sigmoid(2 / T) = 3/4
    assert learning_multitask.fit_temperature(logits, labels) == pytest.approx(expected, abs=1e-3)
    assert learning_multitask.fit_temperature(logits[:, :1], 1 - labels[:, None]) == pytest.approx(expected, abs=1e-3)
    assert learning_multitask.fit_temperature(np.zeros((4, 2)), labels) == 1.0, "nothing to gain"
    assert learning_multitask.fit_temperature(logits, np.zeros(4, dtype=int)) < 0.1, "always right, so as sure as allowed"


def task(kind="sequence_classification", **fields):
    return TaskRecipe(kind=kind, dataset="d", text_columns=["x"], label_column="y", **fields)


def test_main_metrics_and_their_average():
    assert evaluate.main_metric(task()) == "macro_f1"
    assert evaluate.main_metric(task(metric="accuracy")) == "accuracy"
    assert evaluate.main_metric(task(head={"problem_type": "multi_label_classification"})) == "macro_f1"
    assert evaluate.main_metric(task(head={"problem_type": "regression"})) == "spearman"
    kinds = {"token_classification": "f1", "scored_pairs": "spearman"}
    assert {kind: evaluate.main_metric(task(kind)) for kind in kinds} == kinds
    with pytest.raises(ValueError, match="metric is 'mean_absolute_error', for which lower is better"):
        evaluate.main_metric(task(metric="mean_absolute_error"))

    recipe = Recipe.build(
        {
            "model": {"encoder": "e", "max_length": 32},
            "optimizer": {"learning_rate": 1e-4},
            "tasks": {
                name: {"kind": "scored_pairs", "dataset": "d", "text_columns": ["a", "b"], "label_column": "y", **more}
                for name, more in {"one": {}, "two": {"metric": "pearson"}, "unmeasured": {}}.items()
            },
        },
        "recipe",
    )
    results = {"one": {"metrics": {"spearman": 0.5}}, "two": {"metrics": {"spearman": 0.0, "pearson": 1.0}}}
    assert evaluate.average(results, recipe) == 0.75
    assert np.isnan(evaluate.average({}, recipe))
    with pytest.raises(ValueError, match="tasks.two.metric is 'pearson'; allowed: spearman"):
        evaluate.average({"two": {"metrics": {"spearman": 0.0}}}, recipe)


def test_splits_that_are_measured(tmp_path):
    (tmp_path / "one.csv").write_text("x,y\na,b\n")
    file = {
        "kind": "sequence_classification",
        "dataset": str(tmp_path / "one.csv"),
        "text_columns": ["x"],
        "label_column": "y",
    }
    assert has_split(TaskRecipe(**file), "train") and not has_split(TaskRecipe(**file), "validation")
    assert has_split(TaskRecipe(**file, splits={"validation": "train"}), "validation")
    assert evaluate.public_name(str(tmp_path)) == tmp_path.name and evaluate.public_name("org/set:part") == "org/set:part"


# The bootstrap


def test_resamples_are_many_and_always_the_same():
    chunks = list(metrics.resample(7))
    assert sum(map(len, chunks)) == metrics.RESAMPLES == 1000 and {chunk.shape[1] for chunk in chunks} == {7}
    assert all(np.array_equal(a, b) for a, b in zip(chunks, metrics.resample(7), strict=True))
    assert not np.array_equal(chunks[0], chunks[1])
    assert set(np.concatenate(chunks).ravel()) == set(range(7))


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SENTENCES = st.lists(st.lists(st.sampled_from(TAGS), max_size=5), min_size=1, max_size=5)


def drawn_cases():
    """Returns, for each kind of metric, its statistic and a function that gives its metrics on some rows."""
    draw = np.random.default_rng(5)
    tags, found = ([draw.choice(TAGS, size=4).tolist() for _ in range(9)] for _ in range(2))
    found[:5] = tags[:5]
    truth, predicted = draw.integers(0, 3, 30), draw.integers(0, 4, 30)
    many, marked = draw.integers(0, 2, (2, 12, 3))
    numbers, guesses = draw.normal(size=(2, 12, 2)).round(1)
    scores, values = draw.integers(0, 4, 12), draw.normal(size=12).round(1)
    confidence, correct, rows = draw.random(30), draw.random(30) < 0.5, np.repeat(np.arange(10), 3)

    def items(index):  # of the rows drawn, one after the other
        return np.concatenate([np.flatnonzero(rows == row) for row in index])

    def of_labels(index):
        gold, answers = truth[index], predicted[index]
        options = {"labels": np.unique(gold), "average": "macro", "zero_division": 0}
        return {
            "macro_recall": reference.recall_score(gold, answers, **options),
            "macro_f1": reference.f1_score(gold, answers, **options),
            "accuracy": reference.accuracy_score(gold, answers),
        }

    def of_many(index):
        gold, answers = many[index], marked[index]
        occur = np.flatnonzero(gold.any(axis=0))
        return {
            "macro_f1": reference.f1_score(gold, answers, labels=occur, average="macro", zero_division=0),
            "micro_f1": reference.f1_score(gold, answers, average="micro", zero_division=0),
            "exact_match": reference.accuracy_score(gold, answers),
        }

    def of_numbers(index):
        pairs = list(zip(numbers[index].T, guesses[index].T, strict=True))
        return {
            "spearman": np.mean([spearmanr(x, y).statistic for x, y in pairs]),
            "pearson": np.mean([pearsonr(x, y).statistic for x, y in pairs]),
            "mean_absolute_error": reference.mean_absolute_error(numbers[index], guesses[index]),
        }

    return {
        "entities": (
            9, metrics.entities(tags, found),
            lambda i: dict(zip(("f1", "precision", "recall"), [
                score([tags[x] for x in i], [found[x] for x in i], **STRICT) for score in (f1_score, precision_score, recall_score)
            ], strict=True)),
        ),
        "types": (
            9, metrics.entities(tags, found),
            lambda i: metrics.entities([tags[x] for x in i], [found[x] for x in i]).metrics(),
        ),
        "labels": (30, metrics.classification(truth, predicted), of_labels),
        "labels of words": (10, metrics.classification(truth, predicted, rows), lambda i: of_labels(items(i))),
        "many labels": (12, metrics.multi_label(many, marked), of_many),
        "numbers": (12, metrics.regression(numbers, guesses), of_numbers),
        "ranks": (
            12, metrics.rank_correlations({"spearman": values}, scores),
            lambda i: {"spearman": spearmanr(values[i], scores[i]).statistic},
        ),
        "calibration": (
            10, metrics.calibration(confidence, correct, rows),
            lambda i: {"calibration_error": calibration_error(confidence[items(i)], correct[items(i)])},
        ),
        "means": (12, metrics.of_means({"m": values}), lambda i: {"m": values[i].mean()}),
    }  # fmt: skip


CASES = drawn_cases()


@pytest.mark.parametrize("case", CASES)
def test_intervals_are_those_of_a_naive_loop(case, monkeypatch):
    rows, statistic, of_rows = CASES[case]
    index = np.random.default_rng(1).integers(0, rows, size=(40, rows))
    monkeypatch.setattr(metrics, "resample", lambda rows: [index[:25], index[25:]])
    loop = [of_rows(chosen) for chosen in index]
    names = set().union(*loop)
    expected = {name: np.percentile([found[name] for found in loop if name in found], [2.5, 97.5]) for name in names}
    found = statistic.intervals()
    assert set(found) >= names
    for name, interval in expected.items():
        assert found[name] == pytest.approx(interval.tolist(), abs=1e-9), name


@pytest.mark.parametrize("case", CASES)
def test_intervals_lie_around_the_whole_for_ordinary_data(case):
    rows, statistic, of_rows = CASES[case]
    whole, intervals = statistic.metrics(), statistic.intervals()
    for name, value in of_rows(np.arange(rows)).items():
        low, high = intervals[name]
        assert whole[name] == pytest.approx(value, abs=1e-12)
        assert low <= high and (name == "calibration_error" or low <= value <= high)  # which is biased upwards


@settings(max_examples=60, deadline=None)
@given(SENTENCES, st.data())
def test_entity_counts_give_what_seqeval_gives(truth, data):
    predicted = [data.draw(st.lists(st.sampled_from(TAGS), min_size=len(row), max_size=len(row))) for row in truth]
    found = metrics.entities(truth, predicted).metrics()
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert found[name] == pytest.approx(score(truth, predicted, **STRICT), abs=1e-12), name
    counts, types = metrics.entity_counts(truth, predicted)
    in_truth = [name for name, count in zip(types, counts[:, 2].sum(axis=0), strict=True) if count]
    assert set(found) == {"f1", "precision", "recall", *(f"f1_{name}" for name in in_truth)}
    report = classification_report(truth, predicted, output_dict=True, **STRICT) if types else {}
    for name in in_truth:
        assert found[f"f1_{name}"] == pytest.approx(report[name]["f1-score"], abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_calibration_errors_are_shares(items):
    confidence, correct = (np.array(x) for x in zip(*items, strict=True))
    error = calibration_error(confidence, correct)
    assert 0 <= error <= 1
    assert error >= abs(confidence.mean() - correct.mean()) - 1e-9, "bins cannot hide an overall gap"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10), st.booleans())
def test_a_fitted_temperature_never_makes_labels_less_likely(seed, scale, multi_label):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(20, 3)) * scale
    labels = draw.integers(0, 2, (20, 3)) if multi_label else draw.integers(0, 3, 20)
    temperature = learning_multitask.fit_temperature(logits, labels)
    assert learning_multitask.TEMPERATURES[0] <= temperature <= learning_multitask.TEMPERATURES[1]
    before, after = (learning_multitask.negative_log_likelihood(x, labels) for x in (logits, logits / temperature))
    assert after <= before


# A whole run


def sequence_set(feature, labels):
    texts = ["love it", "so sad", "Tim is in Rome", "love", "Paris !", "sad store"]
    features = Features({"text": Value("string"), "label": feature})
    return Dataset.from_dict({"text": texts * 2, "label": labels * 2}, features=features)


def tagged_set(names, tags):
    tokens = [["Tim", "Cook", "is", "in", "U.S."], ["Rome", "!"], ["love"], ["so", "sad"]]
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))})
    return Dataset.from_dict({"tokens": tokens * 3, "tags": tags * 3}, features=features)


def data_sets():
    """Returns a small data set of each kind of task; that of `sentiment` numbers its labels otherwise than the head."""
    names = ["positive", "negative", "neutral"]
    first = ["love it", "so sad", "Tim is in Rome", "a store", "Paris", "it rains"]
    second = ["love", "sad", "Tim Cook in Rome", "the store", "Paris !", "rain"]
    return {
        "sentiment": sequence_set(ClassLabel(names=names), [0, 1, 2, 0, None, 1]),
        "topics": sequence_set(List(ClassLabel(names=["politics", "sport"])), [[0], [0, 1], [], [1], [0], []]),
        "rating": sequence_set(Value("float32"), [1.0, 2.0, 3.0, 4.0, 5.0, 4.5]),
        "ner": tagged_set(TASKS["ner"]["labels"], [[1, 2, 0, 0, 3], [3, 0], [0], [0, None]]),
        "pos": tagged_set(TASKS["pos"]["labels"], [[0, 0, 1, 2, 0], [0, 2], [1], [2, 2]]),
        "similarity": Dataset.from_dict({"a": first, "b": second, "score": [0.9, 0.8, 0.7, 0.6, 0.5, 0.1]}),
    }


def recipe_text(data):
    """Returns a recipe of all those data sets, which lie in the folder `data`."""
    columns = {"sequence_classification": ["text"], "token_classification": ["tokens"], "scored_pairs": ["a", "b"]}
    lines = ['[model]\nencoder = "e"\nmax_length = 32\nmatryoshka_dims = [4]\n[optimizer]\nlearning_rate = 1e-4']
    for name in data_sets():
        spec = TASKS.get(name, {})
        kind = spec.get("kind", "scored_pairs")
        lines += [f"[tasks.{name}]", f'kind = "{kind}"', f'dataset = "{data / name}"', f'folder = "{name}"']
        lines.append(f"text_columns = {columns[kind]}")
        label = {"token_classification": "tags", "sequence_classification": "label", "scored_pairs": "score"}[kind]
        lines.append(f'label_column = "{label}"')
        lines += [f'head = {{problem_type = "{spec["problem_type"]}"}}'] if "problem_type" in spec else []
        lines += ['labels = ["stars"]'] if name == "rating" else []
    return "\n".join(lines)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the data sets, each with a validation split, and a recipe."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in data_sets().items():
        (folder / name).mkdir()
        rows.to_parquet(folder / name / "validation.parquet")
    (folder / "recipe.toml").write_text(recipe_text(folder))
    return folder


@pytest.fixture
def few_neighbours(monkeypatch):
    monkeypatch.setattr(evaluate, "NEIGHBOURS", 2)


def live_pipe():
    return MultiTaskPipeline(model=tiny_model(), tokenizer=tiny_tokenizer(), device="cpu")


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_the_command_measures_everything(release, data, tmp_path, monkeypatch):
    output = tmp_path / "results/tiny.json"
    arguments = [str(release), "--recipe", str(data / "recipe.toml"), "--data", str(data)]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments, "--output", str(output)])
    evaluate.main()
    found = json.loads(output.read_text())
    assert list(found["tasks"]) == list(data_sets())
    for name, result in found["tasks"].items():
        assert set(result["metrics"]) == set(result["intervals"]), name
        assert all(low <= high for low, high in result["intervals"].values()), name
    tasks = {name: result["metrics"] for name, result in found["tasks"].items()}
    assert {"macro_f1", "accuracy", "calibration_error"} <= set(tasks["sentiment"])
    assert {"f1", "f1_PER", "f1_LOC", "precision", "recall", "calibration_error"} == set(tasks["ner"])
    assert tasks["pos"]["f1"] == tasks["pos"]["macro_f1"] and 0 <= tasks["pos"]["accuracy"] <= 1
    assert set(tasks["topics"]) == {"macro_f1", "micro_f1", "exact_match", "calibration_error"}
    assert found["tasks"]["sentiment"]["coverage"]["1.0"]["accuracy"] == pytest.approx(tasks["sentiment"]["accuracy"])
    assert set(tasks["rating"]) == {"spearman", "pearson", "mean_absolute_error"}
    assert set(tasks["similarity"]) == {"spearman", "spearman_raw", "spearman_4"}
    assert found["command"] == "python -m evaluation.evaluate MODEL --recipe recipe.toml --split validation"
    assert str(tmp_path) not in json.dumps({name: x for name, x in found.items() if name != "recipe"})


def test_drift_is_measured_on_texts_that_no_task_trains_on(data, release, few_neighbours):
    drift = evaluate.measure_drift(live_pipe(), str(data / "ner"), "validation", "tokens", str(release), intervals=True)
    assert set(drift["metrics"]) == set(drift["intervals"]) == {"cosine_raw", "neighbours_at_2", "neighbours_at_2_raw"}
    assert drift["metrics"]["cosine_raw"] == pytest.approx(1), "the reference is the model's own encoder"
    assert drift["metrics"]["neighbours_at_2_raw"] == 1.0 >= drift["metrics"]["neighbours_at_2"]
    assert (drift["dataset"], drift["split"], drift["rows"]) == ("ner", "validation", 12) and len(drift["sha256"]) == 64


def test_a_live_model_is_measured_on_the_first_rows_alone(data):
    pipe, recipe = live_pipe(), Recipe.read(data / "recipe.toml")
    pipe.model.train()
    found = evaluate.measure(pipe, recipe, "validation", limit=3)
    assert all(result["rows"] == 3 and result["intervals"] == {} for result in found.values())
    assert not pipe.model.training, "dropout is off while it is measured"
    main = [found[name]["metrics"][evaluate.main_metric(x)] for name, x in recipe.tasks.items()]
    assert evaluate.average(found, recipe) == pytest.approx(np.mean(main))
    assert evaluate.measure(pipe, recipe, "test") == {}, "data sets without the split are left out"


def test_labels_are_matched_by_name_and_missing_ones_left_out(data, monkeypatch):
    pipe, recipe = live_pipe(), Recipe.read(data / "recipe.toml", only=["sentiment", "topics", "ner"])
    sets = data_sets()
    found = {name: evaluate.predict(pipe, name, recipe.tasks[name], sets[name]) for name in recipe.tasks}
    labels = TASKS["sentiment"]["labels"]
    assert [labels[i] for i in found["sentiment"].truth[:5]] == ["positive", "negative", "neutral", "positive", "negative"]
    assert found["sentiment"].rows[:5].tolist() == [0, 1, 2, 3, 5]
    texts = [sets["sentiment"]["text"][row] for row in found["sentiment"].rows]
    answered = [record["labels"]["sentiment"]["label"] for record in pipe(texts)]
    assert [labels[i] for i in found["sentiment"].predicted] == answered
    assert found["topics"].truth[:4].tolist() == [[0, 1], [1, 1], [0, 0], [1, 0]]
    words = found["ner"]  # Tim Cook is in U . S . | Rome ! | love | so
    assert words.truth[:11].tolist() == [1, 2, 0, 0, 3, 4, 4, 4, 3, 0, 0]
    assert words.logits.shape == (36, 5) and words.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert words.tags[0][3] == ["O", "O"] and len(words.tags[1]) == 12
    monkeypatch.setattr(evaluate, "entities_to_tags", lambda spans, entities: ["B-LOC"] * len(spans))
    found = evaluate.predict(pipe, "ner", recipe.tasks["ner"], sets["ner"])
    assert found.tags[1][3] == ["B-LOC", "O"], "nothing is judged where the data set has no tag"


def test_long_texts_are_judged_in_windows(data):
    pipe, recipe = live_pipe(), Recipe.read(data / "recipe.toml", only=["ner"])
    row = data_sets()["ner"][0]
    long = Dataset.from_dict(
        {"tokens": [row["tokens"] * 20], "tags": [row["tags"] * 20]}, features=data_sets()["ner"].features
    )
    assert evaluate.predict(pipe, "ner", recipe.tasks["ner"], long).logits.shape == (160, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentiment": {"kind": "sequence_classification", "labels": ["negative", "positive"]}},
         r"tasks.sentiment: the data set has the labels \['neutral'\]; the head knows negative, positive"),
        ({"sentiment": TASKS["pos"]},
         "tasks.sentiment.kind is 'sequence_classification'; the model's head is a token_classification"),
        ({}, "tasks.sentiment is in the recipe; the model's tasks are: none"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_the_recipe_is_refused(data, change, message):
    pipe = MultiTaskPipeline(model=tiny_model(tasks=change), tokenizer=tiny_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match=message):
        evaluate.measure(pipe, Recipe.read(data / "recipe.toml", only=["sentiment"]), "validation")


def test_the_command_says_which_data_are_missing(release, data, monkeypatch):
    arguments = ["evaluate", str(release), "--recipe", str(data / "recipe.toml"), "--split", "test"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert str(stopped.value).count("no split 'test'; it has validation") == len(data_sets())


# Calibration


def test_a_live_model_is_calibrated_whatever_its_temperatures_were(data):
    recipe = Recipe.read(data / "recipe.toml")
    cooler = {name: fields if name == "rating" else {**fields, "temperature": 3.0} for name, fields in TASKS.items()}
    found = [calibrate.calibrate(tiny_model(tasks=x), tiny_tokenizer(), recipe) for x in (TASKS, cooler)]
    assert set(found[0]) == {"sentiment", "topics", "ner", "pos"}
    for name, fields in found[0].items():
        assert fields["temperature"] == pytest.approx(found[1][name]["temperature"], abs=2e-3)
    assert [set(found[0][x]) for x in ("topics", "ner", "pos")] == [
        {"temperature", "thresholds"},
        {"temperature", "begin_shift"},
        {"temperature"},
    ]
    model = tiny_model()
    pipe = MultiTaskPipeline(model=model, tokenizer=tiny_tokenizer(), device="cpu")
    before = {name: evaluate.predict(pipe, name, recipe.tasks[name], data_sets()[name]) for name in found[0]}
    assert calibrate.calibrate(model, tiny_tokenizer(), recipe) == found[0]
    for name, then in before.items():
        now = evaluate.predict(pipe, name, recipe.tasks[name], data_sets()[name])
        assert now.spec.temperature == model.heads[name].spec.temperature == found[0][name]["temperature"]
        if name == "ner":  # its labels that begin an entity were shifted
            assert metrics.entities(*now.tags).metrics()["f1"] >= metrics.entities(*then.tags).metrics()["f1"]
            continue
        assert np.array_equal(now.logits.argmax(axis=1), then.logits.argmax(axis=1)) and now.tags == then.tags
        loss = learning_multitask.negative_log_likelihood
        assert loss(now.logits, now.truth) <= loss(then.logits, then.truth) + 1e-6
    assert calibrate.calibrate(model, tiny_tokenizer(), recipe, split="test") == {}, "no such split: nothing to fit"


def test_the_command_changes_temperatures_thresholds_and_one_bias(release, data, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(release.parent / "checkpoint", tmp_path / "checkpoint"))
    before = MultiTaskModel.from_pretrained(folder)
    monkeypatch.setattr("sys.argv", ["calibrate", str(folder), "--recipe", str(data / "recipe.toml")])
    calibrate.main()
    after = MultiTaskModel.from_pretrained(folder)
    changed = {name for name, x in after.state_dict().items() if not torch.equal(x, before.state_dict()[name])}
    assert changed <= {"heads.ner.classifier.bias"}
    shift = after.heads["ner"].classifier.bias - before.heads["ner"].classifier.bias
    begins = torch.tensor([label.startswith("B-") for label in TASKS["ner"]["labels"]])
    assert len(shift[begins].unique()) == 1 and not shift[~begins].any()
    assert after.config.tasks["rating"] == before.config.tasks["rating"]
    assert all(0.05 <= spec["temperature"] <= 20 for name, spec in after.config.tasks.items() if name != "rating")
    written = (folder / "config.json").read_bytes()
    calibrate.main()
    assert (folder / "config.json").read_bytes() == written and "'begin_shift': 0.0" in capsys.readouterr().out


def test_a_release_is_not_calibrated_since_its_files_have_digests(release, monkeypatch):
    monkeypatch.setattr("sys.argv", ["calibrate", str(release)])
    with pytest.raises(SystemExit, match="holds a release .*; fit the checkpoint that it was exported from"):
        calibrate.main()


def test_a_head_that_begins_too_many_entities_is_corrected():
    labels = ["O", "B-PER", "I-PER"]
    spec = TaskSpec(kind="token_classification", labels=labels)
    truth = np.array([1, 2, 0, 0, 1, 2])  # two texts of three words
    logits = 4.0 * np.eye(3)[truth]
    logits[[1, 5], 1] = 4.3  # in the middle of a name it would begin another one
    logits[3, 1] = 4.2  # and where there is none
    found = evaluate.Predictions(spec, logits, logits.argmax(axis=1), truth, np.array([0, 0, 0, 1, 1, 1]))
    shift = calibrate.fit_begin_shift(BioScheme(labels), [logits], [found])
    assert shift == -0.4, "the least that is enough"
    assert calibrate.fit_begin_shift(BioScheme(labels), [logits + shift * np.array([0, 1, 0])], [found]) == 0.0


def test_thresholds_have_the_best_f1_and_rare_labels_the_common_one():
    rng = np.random.default_rng(0)
    truth = (rng.random((400, 2)) < [0.3, 0.5]).astype(int)
    probabilities = np.clip(0.2 + 0.3 * truth + rng.normal(0, 0.02, truth.shape), 0, 1)  # 0.2 if absent, 0.5 if present
    rare = np.zeros((400, 1), dtype=int)
    rare[0] = 1
    found = learning_multitask.fit_thresholds(np.hstack([probabilities, 0.07 * rare]), np.hstack([truth, rare]))
    assert 0.2 < found[0] < 0.5 and 0.2 < found[1] < 0.5
    assert found[2] > 0.1, "one item says nothing about where to cut"


# Pictures


def test_learning_curves_are_drawn_also_of_a_run_that_was_never_validated(tmp_path):
    history = [{"step": 10 * i, "loss": 1.0, "loss_ner": 1.0 / i, "loss_mood": 2.0 / i} for i in range(1, 5)]
    plots.learning_curves(history, tmp_path / "a.png")
    plots.learning_curves([*history, {"step": 40, "eval_average": 0.7}, {"train_loss": 1.0}], tmp_path / "new/b.png")
    assert is_png(tmp_path / "a.png") and is_png(tmp_path / "new/b.png")
    plots.learning_curves([], tmp_path / "c.png")
