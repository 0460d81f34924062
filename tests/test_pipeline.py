"""Texts to records: words and offsets, BIO decoding, windows, batching, and input that is no good."""

import itertools
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, pipeline

from annotator_multitask import EKMAN, BioScheme, group_scores, text_answer, text_problem, word_casing, word_starts
from modeling_multitask import MultiTaskForTokenClassification
from pipeline_multitask import MultiTaskPipeline
from tasks_multitask import CASINGS, TaskSpec
from tests.conftest import TASKS, TEXTS, WINDOW, tiny_model, tiny_tokenizer

LABELS = TASKS["ner"]["labels"]  # O B-PER I-PER B-LOC I-LOC
FAMILIES = ("wordpiece", "bytes", "unigram")


def words(family: str, text: str) -> list[str]:
    """Returns the words that the pipeline sees in a text."""
    encoding = tiny_tokenizer(family)(text, truncation=False).encodings[0]
    spans, starts = word_starts(text, encoding.offsets, encoding.word_ids)
    found: list[list[int]] = []
    for (start, end), is_start, word in zip(spans, starts, encoding.word_ids, strict=True):
        if is_start:
            found.append([start, end])
        elif found and word is not None and start < end:
            found[-1][1] = max(found[-1][1], end)
    return [text[start:end] for start, end in found]


# Words


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I love Paris.", ["I", "love", "Paris", "."]),
        ("Apple's U.S. store", ["Apple", "'", "s", "U", ".", "S", ".", "store"]),
        ("a\r\nb\tc  d", ["a", "b", "c", "d"]),
        ("snake_case x2", {"wordpiece": ["snake", "_", "case", "x2"], "unigram": ["snake_case", "x2"],
                           "bytes": ["snake", "_", "case", "x", "2"]}),
        ("(Rome)", ["(", "Rome", ")"]),
        ("", []),
        (" \t\n", []),
    ],
)  # fmt: skip
def test_words_do_not_depend_on_the_tokenizer_at_punctuation(family, text, expected):
    assert words(family, text) == (expected[family] if isinstance(expected, dict) else expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_accents_emoji_and_scripts_keep_exact_offsets(family):
    combining = "Zoe\u0308 in Orle\u0301ans"  # e + combining marks
    assert [x for x in words(family, combining) if x[0] in "ZO"] == ["Zoe\u0308", "Orle\u0301ans"]
    assert words(family, "Paris 😀 ok")[0::2] == ["Paris", "ok"]
    assert words(family, "हिन्दी ok") == ["हिन्दी", "ok"], "vowel signs belong to their letters"
    assert words(family, "شكرا Paris")[-1] == "Paris"


@given(text=st.text(max_size=40), family=st.sampled_from(FAMILIES))
def test_words_are_ordered_and_disjoint_and_never_hold_a_space_at_their_ends(text, family):
    if text_problem(text):
        return
    encoding = tiny_tokenizer(family)(text).encodings[0]
    spans, starts = word_starts(text, encoding.offsets, encoding.word_ids)
    begun = [span for span, is_start in zip(spans, starts, strict=True) if is_start]
    assert [start for start, _ in begun] == sorted({start for start, _ in begun})
    for start, end in begun:
        assert 0 <= start < end <= len(text)
        assert not text[start].isspace() and not unicodedata.category(text[start]).startswith("M")
    for (_, end), (start, _) in itertools.pairwise(begun):
        assert end <= start


# BIO decoding


def allowed(previous: str, label: str) -> bool:
    return not label.startswith("I-") or previous in ("B-" + label[2:], "I-" + label[2:])


def best_by_trying_all(scores: np.ndarray) -> float:
    paths = itertools.product(range(len(LABELS)), repeat=len(scores))
    valid = (p for p in paths if all(allowed(a, b) for a, b in itertools.pairwise(["O", *(LABELS[i] for i in p)])))
    return max(sum(scores[i, label] for i, label in enumerate(path)) for path in valid)


@given(seed=st.integers(0, 2**16), lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_decoding_finds_the_best_allowed_sequence_of_every_text(seed, lengths):
    scores = np.random.default_rng(seed).normal(size=(sum(lengths), len(LABELS)))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    path = BioScheme(LABELS).decode(scores, bounds[:-1])
    for start, end in itertools.pairwise(bounds):
        labels = ["O", *(LABELS[i] for i in path[start:end])]
        assert all(allowed(a, b) for a, b in itertools.pairwise(labels))
        if end > start:
            total = scores[np.arange(start, end), path[start:end]].sum()
            assert total == pytest.approx(best_by_trying_all(scores[start:end]))


@pytest.mark.parametrize(
    ("word", "casing"),
    [("paris", "lower"), ("Paris", "title"), ("USA", "upper"), ("A", "capital"), ("McCoy", "mixed"), ("iPhone", "mixed"),
     ("42", "digits"), ("4th", "lower"), ("F16", "upper"), (",", "punctuation"), ("😀", "punctuation"), ("東京", "lower"),
     ("É", "capital"), ("Élan", "title"), ("ß", "lower"), ("", "punctuation")],
)  # fmt: skip
def test_how_a_word_is_written(word, casing):
    assert CASINGS[word_casing(word)] == casing


def test_a_word_is_judged_by_how_it_is_written(release):
    fields = {"kind": "token_classification", "labels": ["O", "B-X", "I-X"], "casing_dim": 4}
    pipe = MultiTaskPipeline(
        model=tiny_model(tasks={"ner": fields}), tokenizer=AutoTokenizer.from_pretrained(release), device="cpu"
    )
    seen = {}
    for text in ("tim cook", "Tim Cook"):
        (window,) = pipe.annotator.windows([text], ["ner"])
        pipe.annotator.run([window], ["ner"], "sentence_embedding")
        seen[text] = window
    first, second = seen.values()
    assert first.input_ids == second.input_ids and (first.embedding == second.embedding).all()
    assert not np.allclose(first.logits["ner"], second.logits["ner"])


def test_decoding_by_example():
    scheme = BioScheme(LABELS)
    wanted = ["O", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "B-LOC"]
    scores = np.full((7, 5), -5.0)
    for word, label in enumerate(wanted):
        scores[word, LABELS.index(label)] = 0.0
    scores[1, LABELS.index("B-PER")] = -1.0  # the best repair of an I-PER without beginning
    path = scheme.decode(scores, np.array([0]))
    assert [LABELS[i] for i in path] == ["O", "B-PER", *wanted[2:]]
    assert scheme.entities(path) == [(1, 3, "PER"), (4, 6, "LOC"), (6, 7, "LOC")]


# Records


def test_a_record_holds_what_the_model_says(pipe):
    text = TEXTS[0]
    record = pipe(text)
    (window,) = pipe.annotator.windows([text], ["ner"])
    with torch.no_grad():
        out = pipe.model(torch.tensor([window.input_ids]), casing_ids=torch.tensor([window.casings]))
    np.testing.assert_allclose(record["sentence_embedding"], out.sentence_embedding[0].numpy(), atol=1e-6)
    assert record["sentence_embedding"].dtype == np.float32 and record["sentence_embedding"].shape == (8,)
    scores = out.logits["sentiment"][0].softmax(-1)
    sentiment = record["labels"]["sentiment"]
    assert sentiment["label"] == TASKS["sentiment"]["labels"][scores.argmax()]
    assert sentiment["score"] == pytest.approx(scores.max().item(), abs=1e-6) == max(sentiment["scores"].values())
    chances = out.logits["topics"][0].sigmoid().tolist()
    assert list(record["labels"]["topics"]["scores"].values()) == pytest.approx(chances, abs=1e-6)
    present = [
        label for label, chance, limit in zip(["sport", "politics"], chances, [0.5, 0.4], strict=True) if chance >= limit
    ]
    assert record["labels"]["topics"]["labels"] == present
    assert record["labels"]["rating"] == {"values": {"stars": pytest.approx(out.logits["rating"].item(), abs=1e-5)}}


def test_entities_are_whole_words_in_order_with_exact_offsets(pipe):
    for text in [*TEXTS, "Zoe\u0308 😀 met U.S.\r\nsenators\tin São Paulo,\u00a0ok"]:
        tokens = words("wordpiece", text)
        record = pipe(text, tasks=["ner", "pos"])
        assert [item["word"] for item in record["entities"]["pos"]] == tokens, "a task without BIO lists every word"
        end = 0
        for entity in record["entities"]["ner"]:
            assert set(entity) == {"entity_group", "score", "word", "start", "end"}
            assert entity["word"] == text[entity["start"] : entity["end"]]
            assert entity["start"] >= end and entity["entity_group"] in ("PER", "LOC") and 0 < entity["score"] <= 1
            assert all(part in tokens for part in words("wordpiece", entity["word"]))
            end = entity["end"]


def test_order_batching_and_company_change_nothing(pipe):
    texts = [*TEXTS, *TEXTS[::-1], "x" * 10, "Paris " * 60]
    together = pipe(texts)
    for options in ({"batch_tokens": 1}, {"batch_tokens": 100_000}):
        for text, record, other in zip(texts, together, pipe(texts, **options), strict=True):
            assert_records_equal(record, other, text)
    for text, record in zip(texts, together, strict=True):
        assert_records_equal(record, pipe(text), text)


def assert_records_equal(first, second, text):
    np.testing.assert_allclose(first["sentence_embedding"], second["sentence_embedding"], atol=1e-5, err_msg=text)
    for name, answer in first["labels"].items():
        for part in ("scores", "values"):
            assert answer.get(part) == pytest.approx(second["labels"][name].get(part), abs=1e-4), text
    for name, found in first["entities"].items():
        spans = [[(x["entity_group"], x["start"], x["end"]) for x in items] for items in (found, second["entities"][name])]
        assert spans[0] == spans[1], text


def test_the_same_text_is_computed_once_and_answered_each_time(pipe):
    def tokens(texts: list[str]) -> int:
        before = pipe.annotator.tokens_seen
        pipe(texts)
        return pipe.annotator.tokens_seen - before

    assert tokens([*TEXTS, *TEXTS[:2]]) == tokens(TEXTS)
    one, other = pipe([TEXTS[0], TEXTS[0]])
    assert one["labels"] == other["labels"] and one["entities"] == other["entities"]
    one["labels"].clear()
    assert other["labels"], "each record is its own"


def test_tasks_and_embedding_can_be_chosen(pipe):
    assert set(pipe(TEXTS[0])) == {"sentence_embedding", "labels", "entities"}
    assert set(pipe(TEXTS[0], tasks="ner")["entities"]) == {"ner"} and "labels" not in pipe(TEXTS[0], tasks="ner")
    assert set(pipe(TEXTS[0], tasks=[])) == {"sentence_embedding"}
    assert set(pipe(TEXTS[0], tasks=["rating"], embedding=False)) == {"labels"}


def test_lists_give_lists_and_streams_give_streams(pipe):
    assert pipe([]) == [] and isinstance(pipe(TEXTS[0]), dict)
    drawn = []

    def stream():
        for i in itertools.count():
            drawn.append(i)
            yield f"text {i}"

    class Rows:  # a data set without __iter__, like transformers' KeyDataset
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return TEXTS[index]

    assert len(list(pipe(Rows(), tasks=[]))) == 2
    records = pipe(stream(), tasks=[])
    first = list(itertools.islice(records, 3))
    assert len(first) == 3 and len(drawn) <= 1024, "an endless stream is read one chunk at a time"
    np.testing.assert_allclose(first[2]["sentence_embedding"], pipe("text 2")["sentence_embedding"], atol=1e-5)


def test_half_precision_gives_unit_vectors(pipe):
    from pipeline_multitask import MultiTaskPipeline

    half = MultiTaskPipeline(model=tiny_model(num_task_layers=1).half(), tokenizer=tiny_tokenizer(), device="cpu")
    for text in TEXTS:
        vector = half(text)["sentence_embedding"]
        assert vector.dtype == np.float32 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert vector @ pipe(text)["sentence_embedding"] > 0.99


# Long texts


def test_a_text_that_fits_is_read_in_one_window_and_a_longer_one_in_several(pipe):
    fits = "a " * (WINDOW - 2)
    assert len(pipe.annotator.windows([fits], ["ner"])) == 1
    windows = pipe.annotator.windows([fits + "a"], ["ner"])
    assert len(windows) == 2 and all(len(window.input_ids) <= WINDOW for window in windows)


def test_a_long_text_is_the_average_of_its_windows_weighted_by_tokens(pipe):
    text = "Tim loves Paris and the store " * 12
    windows = pipe.annotator.windows([text], ["sentiment"])
    assert len(windows) > 2
    weights = np.array([len(window.input_ids) for window in windows], dtype=float)
    parts = []
    for window in windows:
        with torch.no_grad():
            parts.append(pipe.model(torch.tensor([window.input_ids]), casing_ids=torch.tensor([window.casings])))
    embedding = sum(w * p.sentence_embedding[0].numpy() for w, p in zip(weights, parts, strict=True))
    record = pipe(text)
    np.testing.assert_allclose(record["sentence_embedding"], embedding / np.linalg.norm(embedding), atol=1e-5)
    logits = sum(w * p.logits["sentiment"][0].numpy() for w, p in zip(weights, parts, strict=True)) / weights.sum()
    scores = np.exp(logits) / np.exp(logits).sum()
    assert list(record["labels"]["sentiment"]["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


def test_each_word_of_a_long_text_is_judged_once_in_its_best_window(pipe):
    text = " ".join(f"w{i}" for i in range(100))
    found = pipe(text, tasks=["pos"])["entities"]["pos"]
    assert [item["word"] for item in found] == text.split()
    windows = pipe.annotator.windows([text], ["pos"])
    for batch in [windows]:
        pipe.annotator.run(batch, ["pos"])
    for item in found:
        seen = [
            (context, logits)
            for window in windows
            for (_, span), context, logits in zip(window.words, window.context, window.logits["pos"], strict=True)
            if span[0] == item["start"]
        ]
        best = max(seen, key=lambda pair: pair[0])[1]
        assert item["entity_group"] == TASKS["pos"]["labels"][best.argmax()]
    assert any(context not in (float("inf"),) for window in windows for context in window.context)


def test_a_long_text_without_words_has_no_entities_and_leaves_its_neighbours_alone(pipe):
    texts = ["Tim saw Paris.", "\u0903 " * 600, "so sad", "\u0903 " * 600, "a " * 100]
    records = pipe(texts)
    assert records[1]["entities"] == records[3]["entities"] == {"ner": [], "pos": []}
    for text, record in zip(texts, records, strict=True):
        assert_records_equal(record, pipe(text), text)


# What is asked for


SHORT = ["so sad", "", "Paris", "I love it"]  # each in a single window


def test_the_encoders_own_vector_on_request(pipe, release):
    encoder = SentenceTransformer(str(release), device="cpu")
    del encoder[2]  # the projection
    vectors = encoder.encode(SHORT)
    records = pipe(SHORT, embedding="encoder")
    assert all("sentence_embedding" not in record for record in records)
    for record, vector in zip(records, vectors, strict=True):
        np.testing.assert_allclose(record["encoder_embedding"], vector, atol=1e-6)


def test_an_index_moves_over_by_one_matrix_product(pipe):
    old = np.stack([record["encoder_embedding"] for record in pipe(SHORT, embedding="encoder")])
    new = np.stack([record["sentence_embedding"] for record in pipe(SHORT)])
    moved = old @ pipe.model.linear.weight.detach().numpy().T
    np.testing.assert_allclose(moved / np.linalg.norm(moved, axis=1, keepdims=True), new, atol=1e-6)


def test_answers_below_the_least_score_are_none_and_entities_are_left_out(pipe):
    for record in pipe(TEXTS):
        score = record["labels"]["sentiment"]["score"]
        strict = pipe(TEXTS[0], min_score=1.0)
    assert strict["labels"]["sentiment"]["label"] is None and strict["labels"]["topics"]["labels"] is None
    assert strict["entities"] == {"ner": [], "pos": []} and strict["labels"]["rating"] == pipe(TEXTS[0])["labels"]["rating"]
    assert len(strict["labels"]["sentiment"]["scores"]) == 3 and 0 < score < 1
    words = pipe(TEXTS[0])["entities"]["pos"]
    middle = sorted(word["score"] for word in words)[len(words) // 2]
    assert pipe(TEXTS[0], min_score=middle)["entities"]["pos"] == [word for word in words if word["score"] >= middle]


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", True, float("nan")])
def test_a_least_score_outside_of_zero_to_one_is_refused(pipe, value):
    with pytest.raises(ValueError, match=r"min_score is .*; allowed: a number in \[0, 1\]"):
        pipe("so sad", min_score=value)


def test_a_fallback_answers_when_nothing_passes():
    fields = {"kind": "sequence_classification", "labels": ["joy", "neutral"], "problem_type": "multi_label_classification"}
    spec = TaskSpec(**fields, fallback="neutral", thresholds=[0.9, 0.9])
    assert text_answer(spec, np.array([0.0, -1.0]))["labels"] == ["neutral"]
    assert text_answer(spec, np.array([5.0, -1.0]))["labels"] == ["joy"]
    assert text_answer(spec, np.array([0.0, -1.0]), min_score=0.5)["labels"] is None
    assert text_answer(TaskSpec(**fields), np.array([-1.0, -1.0]))["labels"] == []


def test_emotions_are_grouped_by_their_greatest_score():
    labels = [label for group in EKMAN.values() for label in group]
    assert len(labels) == len(set(labels)) == 28
    found = group_scores({label: i / 100 for i, label in enumerate(labels)})
    assert list(found) == ["anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral"]
    assert found["anger"] == 0.02 and found["neutral"] == 0.27
    with pytest.raises(ValueError, match=r"groups name \['joy'\]; the scores are of anger"):
        group_scores({"anger": 0.5}, {"happy": ["joy"]})


def test_a_tokenizer_that_does_not_fit_is_refused(release):
    model, tokenizer = tiny_model(num_task_layers=1), tiny_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(200)])
    with pytest.raises(ValueError, match=r"The tokenizer has \d+ tokens and the encoder's vocab_size is 320"):
        MultiTaskPipeline(model=model, tokenizer=tokenizer)


def test_a_release_without_its_tokenizer_is_refused(release, tmp_path):
    broken = Path(shutil.copytree(release, tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    with pytest.raises((ValueError, OSError)):
        pipeline("multitask", model=str(broken), trust_remote_code=True, device="cpu")


# Input that is no good


def nested() -> list:
    """Returns a list that `repr` cannot show."""
    value: list = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, r"inputs\[1\] is None \(NoneType\), not a text"),
        (3.5, r"inputs\[1\] is 3.5 \(float\), not a text"),
        (b"bytes", r"inputs\[1\] is b'bytes' \(bytes\), not a text"),
        (["nested"], r"inputs\[1\] is \['nested'\] \(list\)"),
        (nested(), r"inputs\[1\] is \[+\.\.\.\]+ \(list\), not a text"),
        ("half \ud83d pair", r"inputs\[1\] is no valid Unicode: a lone surrogate at character 5"),
    ],
)
def test_what_is_no_text_is_named_by_its_index(pipe, value, reason):
    with pytest.raises(ValueError, match=reason):
        pipe(["fine", value])
    with pytest.raises(ValueError, match=reason):
        list(pipe(iter(["fine", value])))


@pytest.mark.parametrize("value", [None, 3, b"bytes", {"text": "x"}])
def test_what_is_no_list_of_texts_is_refused(pipe, value):
    with pytest.raises(ValueError, match="inputs is .* not a text"):
        pipe(value)


@pytest.mark.parametrize(
    "text", ["", "   ", "\x00", "\x01\x02 a\x7f", "مرحبا بالعالم", "\u202eevil", "\ufffd", "a" * 1_000, "\u0301", "\u200d"]
)
def test_odd_texts_get_whole_records(pipe, text):
    record = pipe(text)
    assert np.linalg.norm(record["sentence_embedding"]) == pytest.approx(1, abs=1e-5)
    assert set(record["labels"]) == {"sentiment", "topics", "rating"} and set(record["entities"]) == {"ner", "pos"}


def test_a_text_of_a_million_characters(pipe):
    text = "Tim Cook love Apple store Paris. " * 30_304  # words that are one token each
    record = pipe(text, tasks=["pos"], embedding=False, batch_tokens=16_384)
    assert len(record["entities"]["pos"]) == 7 * 30_304
    last = record["entities"]["pos"][-2]
    assert (last["word"], last["end"]) == ("Paris", text.rindex("Paris") + 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["irony"]}, r"tasks holds \['irony'\]; this model's tasks are: sentiment, topics, rating, ner, pos"),
        ({"batch_tokens": 0}, "batch_tokens is 0; allowed: a positive integer"),
        (
            {"batch_size": 8},
            r"unknown options \['batch_size'\]; the multitask pipeline takes tasks, embedding, min_score and batch_tokens",
        ),
    ],
)
def test_options_are_checked(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe("x", **options)


def test_the_pipeline_refuses_a_plain_encoder(release):
    from transformers import AutoModel

    from pipeline_multitask import MultiTaskPipeline

    with pytest.raises(ValueError, match="needs a MultiTaskModel, and got a BertModel"):
        MultiTaskPipeline(model=AutoModel.from_pretrained(release), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="got a MultiTaskForTokenClassification"):
        MultiTaskPipeline(model=MultiTaskForTokenClassification.from_pretrained(release), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="batch_size is 8"):
        MultiTaskPipeline(model=tiny_model(), tokenizer=tiny_tokenizer(), batch_size=8)


@pytest.mark.parametrize(
    ("model_type", "family"), [("roberta", "bytes"), ("xlm-roberta", "unigram"), ("modernbert", "bytes")]
)
def test_other_encoders_and_tokenizers_work_too(model_type, family):
    from pipeline_multitask import MultiTaskPipeline

    other = MultiTaskPipeline(model=tiny_model(model_type), tokenizer=tiny_tokenizer(family), device="cpu")
    record = other("Tim loves Paris. 😀 " * 20)
    assert [x["word"] for x in record["entities"]["pos"]][:4] == ["Tim", "loves", "Paris", "."]
