"""Data sets rebuilt from a loopback server that serves small files in the original formats: what arrives, and what never does."""

import dataclasses
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from common.data import DataError
from training import sources
from training.converters import CONVERTERS, SourceError, row_key
from training.sources import Source, build, fetch, fingerprint, read_sources

LISTED = read_sources()

IOB2 = """# newdoc id = a
# sent_id = a-1
# text = Ada Byron met Babbage in London.
1\tAda\tB-PER\t-\tx
2\tByron\tI-PER\t-\tx
3\tmet\tB-O\t-\tx
4\tBabbage\tI-PER\t-\tx
5\tin\tO
6\tLondon\tB-LOC\t-\tx
7\t.\tO

# sent_id = a-2
# text = # English
1\t#\tO
2\tEnglish\tB-OTH\t-\tx
"""
CONLLU = """# newdoc id = GUM_news_a
# global.Entity = GRP-etype-infstat-centering-minspan-link-identity
# sent_id = GUM_news_a-1
1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\tEntity=(1-person-new-cf1-2-sgl
2\tmayor\tmayor\tNOUN\tNN\t_\t6\tnsubj\t_\t_
3\tof\tof\tADP\tIN\t_\t4\tcase\t_\t_
4\tRome\tRome\tPROPN\tNNP\t_\t2\tnmod\t_\tEntity=(2-place-new-cf2-1-sgl-Rome)1)
5-6\tdidn't\t_\t_\t_\t_\t_\t_\t_\t_
5\tdid\tdo\tAUX\tVBD\t_\t7\taux\t_\t_
6\tn't\tnot\tPART\tRB\t_\t7\tadvmod\t_\t_
7\tmeet\tmeet\tVERB\tVB\t_\t0\troot\t_\t_
8\tAda\tAda\tPROPN\tNNP\t_\t7\tobj\t_\tEntity=(3-person-new-cf3-1-sgl)
9\tand\tand\tCCONJ\tCC\t_\t10\tcc\t_\t_
10\tstudents\tstudent\tNOUN\tNNS\t_\t8\tconj\t_\tEntity=(4-person-new-cf4-1-sgl
11\tof\tof\tADP\tIN\t_\t12\tcase\t_\t_
12\tLatin\tLatin\tPROPN\tNNP\t_\t10\tnmod\t_\tEntity=(5-abstract-new-cf5-1-sgl-Latin)4)
13\t,\t,\tPUNCT\t,\t_\t14\tpunct\t_\t_
14\tSudoku\tSudoku\tPROPN\tNNP\t_\t12\tconj\t_\tEntity=(6-abstract-new-cf6-1-sgl)
15\tand\tand\tCCONJ\tCC\t_\t18\tcc\t_\t_
16\tthe\tthe\tDET\tDT\t_\t18\tdet\t_\tEntity=(7-organization-new-cf7-2,3-sgl
17\tBank\tBank\tPROPN\tNNP\t_\t12\tconj\t_\t_
18\tof\tof\tADP\tIN\t_\t19\tcase\t_\t_
19\tItaly\tItaly\tPROPN\tNNP\t_\t17\tnmod\t_\tEntity=(8-place-new-cf8-1-sgl-Italy)7)
20\tsince\tsince\tADP\tIN\t_\t21\tcase\t_\t_
21\tMay\tMay\tPROPN\tNNP\t_\t17\tnmod\t_\tEntity=(9-time-new-cf9-1-sgl-May)

# newdoc id = GUM_fiction_b
# sent_id = GUM_fiction_b-1
1\tAlice\tAlice\tPROPN\tNNP\t_\t0\troot\t_\tEntity=(1-person-new-cf1-1-sgl)
"""
DOCUMENTS = [
    {
        "title": "Ada",
        "sents": [["Ada", "of", "London", "wrote", "in", "1843", "."], ["Italian", "Ada", "Ada", "!"]],
        "vertexSet": [
            [{"sent_id": 0, "pos": [0, 1], "type": "PER"}, {"sent_id": 1, "pos": [1, 2], "type": "PER"}],
            [{"sent_id": 0, "pos": [0, 3], "type": "PER"}],
            [{"sent_id": 0, "pos": [2, 3], "type": "LOC"}],
            [{"sent_id": 0, "pos": [5, 6], "type": "TIME"}],
            [{"sent_id": 1, "pos": [0, 1], "type": "MISC"}, {"sent_id": 1, "pos": [2, 3], "type": "PER"}],
        ],
    }
]
EMOBANK = """id,split,V,A,D,text
a_1,train,2.7,3.0,3.1,"It went wrong, ""again""."
a_2,dev,2.71,3.0,3.0,A neutral  text
a_3,test,3.3,3.5,3.0,We won.
a_4,train,3.0,3.0,3.0,"Sincerely,"
"""


def news(text: str, *targets: tuple[str, float]) -> str:
    return json.dumps({"sentence_normalized": text, "targets": [{"mention": x, "polarity": y} for x, y in targets]})


def tar(**files: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"some_folder/{name}.txt")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return content.getvalue()


def zipped(**files: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{name}.jsonl", text)
    return content.getvalue()


VADER = {
    "amazonReviewSnippets_GroundTruth": "1_1\t2.9\tGood  value &amp; fast.\n1_2\t-0.5\tIt broke.\n2_1\t0.1\tIt has a door.\n",
    "movieReviewSnippets_GroundTruth": "7\t1.0\tFun.\n8\t1.0\tLeft out.\n",
    "nytEditorialSnippets_GroundTruth": "1_1\t-0.49\tThe vote is on Monday.\n",
    "tweets_GroundTruth": "5\t-2.0\tit BROKE!!\n6\t0.5\tnice :)\n",
}
VADER_SPLITS = {"train": ["movie/7"], "validation": ["product/2"], "test": ["tweet/6"]}


class Server(ThreadingHTTPServer):
    """Serves `files` by path; those in `cut` end too early."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path in self.server.cut else content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def uner(server) -> Source:
    """A source as listed, of small files on the server."""
    files = {"train": "t.iob2", "validation": "v.iob2", "test": "x.iob2"}
    server.files = {f"/{x}": IOB2.encode() for x in files.values()}
    source = dataclasses.replace(LISTED["uner_ewt"], base=server.url, files=files, fingerprints={})
    return dataclasses.replace(source, rows=dict.fromkeys(files, 2))


def convert(tmp_path: Path, name: str, files: dict[str, str | bytes], **options) -> dict[str, list[dict]]:
    """Returns what a listed source's converter makes of files, with the listed options."""
    paths = {}
    for key, content in files.items():
        paths[key] = tmp_path / f"{key.replace('/', '-')}.raw"
        paths[key].write_bytes(content.encode() if isinstance(content, str) else content)
    found = {}
    for split, row in CONVERTERS[LISTED[name].converter](paths, **{**LISTED[name].options, **options}):
        found.setdefault(split, []).append(row)
    return found


def read_folder(folder: Path) -> dict[str, Dataset]:
    """Returns the splits of a folder that `build` wrote."""
    return {path.stem: Dataset(pq.read_table(path)) for path in folder.glob("*.parquet")}


def tagged(row: dict) -> str:
    return " ".join(w if tag == "O" else f"{w}/{tag}" for w, tag in zip(row["tokens"], row["ner_tags"], strict=True))


# What a user gets


def test_a_built_folder_is_what_recipes_read(uner, tmp_path):
    build(uner, tmp_path / "data")
    data = load_dataset(str(tmp_path / "data/uner_ewt"), split="test")
    assert data.features["ner_tags"].feature.names == ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    assert data[0]["tokens"] == ["Ada", "Byron", "met", "Babbage", "in", "London", "."]
    assert data[0]["ner_tags"] == [1, 2, 0, 1, 0, 5, 0]
    assert [x.name for x in (tmp_path / "data").iterdir()] == ["uner_ewt"], "nothing else is left there"


def test_the_command_builds_what_it_can_and_names_what_it_cannot(server, uner, tmp_path, monkeypatch, capsys):
    other = {**dataclasses.asdict(uner), "files": {"train": "gone.iob2"}}
    text = "\n".join(f"[{name}]\n{toml(entry)}" for name, entry in {"bad": other, "good": dataclasses.asdict(uner)}.items())
    (tmp_path / "list.toml").write_text(text)
    monkeypatch.setattr(sources, "read_sources", lambda: read_sources(tmp_path / "list.toml"))
    monkeypatch.setattr(sys, "argv", ["sources", "--output", f"{tmp_path}/data"])
    with pytest.raises(SystemExit, match="not built: bad"):
        sources.main()
    assert "gone.iob2: the server answers HTTP Error 404" in capsys.readouterr().err
    assert [x.name for x in (tmp_path / "data").iterdir()] == ["good"]


def toml(entry: dict) -> str:
    """Returns an entry of a list of sources; JSON and TOML write strings, numbers and lists alike."""

    def value(x: object) -> str:
        if isinstance(x, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in x.items()) + "}"
        return json.dumps(x)

    return "".join(f"{key} = {value(x)}\n" for key, x in entry.items() if key != "name")


def test_a_data_set_on_the_hub_is_read_with_its_columns(uner, tmp_path):
    build(uner, tmp_path / "hub")
    source = dataclasses.replace(uner, hub=str(tmp_path / "hub/uner_ewt"), files={}, columns={"tokens": "tokens"})
    build(source, tmp_path / "data")
    assert read_folder(tmp_path / "data/uner_ewt")["train"].column_names == ["tokens"]
    with pytest.raises(DataError, match="no column"):
        build(dataclasses.replace(source, columns={"words": "tokens"}), tmp_path / "other")


# Downloads that fail leave nothing


def test_a_missing_page(server, uner, tmp_path):
    del server.files["/x.iob2"]
    refuse(uner, tmp_path, "x.iob2: the server answers HTTP Error 404")


def test_a_download_that_is_cut_off(server, uner, tmp_path):
    server.cut = {"/v.iob2"}
    half = len(IOB2.encode()) // 2
    refuse(uner, tmp_path, rf"v.iob2: cannot be downloaded \(IncompleteRead\({half} bytes read")


def test_a_server_that_is_not_there(uner, tmp_path):
    refuse(dataclasses.replace(uner, base="http://127.0.0.1:9/"), tmp_path, "cannot be downloaded")


def test_a_wrong_sum(uner, tmp_path):
    right = sha256(IOB2.encode()).hexdigest()
    build(dataclasses.replace(uner, sha256={"train": right}), tmp_path / "right")
    refuse(dataclasses.replace(uner, sha256={"train": "0" * 64}), tmp_path, f"sha256 is {right}")


def test_a_file_is_downloaded_whole(server, tmp_path):
    server.files["/large"] = bytes(range(256)) * 1000
    fetch(f"{server.url}large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == server.files["/large"]


def test_an_existing_folder_is_not_touched(uner, tmp_path):
    (tmp_path / "data/uner_ewt").mkdir(parents=True)
    with pytest.raises(SourceError, match="remove it to build it again"):
        build(uner, tmp_path / "data")
    assert not list((tmp_path / "data/uner_ewt").iterdir())


def refuse(source: Source, tmp_path: Path, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        build(source, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir()), "nothing half-written"


# Rows that are not the expected ones


def test_other_rows_than_expected(uner, tmp_path):
    refuse(dataclasses.replace(uner, rows={"train": 3}), tmp_path, "uner_ewt, split train: 2 rows; there must be 3")
    refuse(dataclasses.replace(uner, rows={**uner.rows, "more": 1}), tmp_path, "split more: 0 rows; there must be 1")
    wrong = dataclasses.replace(uner, fingerprints={"test": "0" * 64})
    refuse(wrong, tmp_path, "split test: 2 rows, but some are not those")


def test_fingerprints_see_values_and_label_names_and_not_the_order_of_rows(uner, tmp_path):
    build(uner, tmp_path)
    data = read_folder(tmp_path / "uner_ewt")["train"]
    same = fingerprint(data, uner.columns)
    assert fingerprint(data.select([1, 0]), uner.columns) == same
    assert fingerprint(data.select([0, 0]), uner.columns) != same
    assert fingerprint(data, ["tokens"]) != same
    renamed = dataclasses.replace(uner, labels=["PER", "LOC", "ORG"])
    features = sources.features_of(renamed)
    assert fingerprint(Dataset.from_list(list(data), features=features), uner.columns) != same


def test_a_label_that_is_not_listed(server, uner, tmp_path):
    refuse(dataclasses.replace(uner, labels=["PER"]), tmp_path, "uner_ewt, split train, row 0: .*B-LOC")


# Formats


def test_columns_map_kinds_and_mend_entities_without_a_beginning(tmp_path):
    rows = convert(tmp_path, "uner_ewt", {"train": IOB2})["train"]
    assert tagged(rows[0]) == "Ada/B-PER Byron/I-PER met Babbage/B-PER in London/B-LOC ."
    assert tagged(rows[1]) == "# English"


def test_columns_with_domains(tmp_path):
    text = "Queen\tB-band\nplayed\tO\nrock\tB-musicgenre\r\n\n\nMars\tB-astronomicalobject\nMars\tB-astronomicalobject"
    found = convert(tmp_path, "crossner", {"train/music": text, "train/ai": "R\tB-programlang\n", "test/ai": "R\tO\n"})
    expected = [("music", "Queen/B-ORG played rock"), ("music", "Mars/B-MISC Mars/B-MISC"), ("ai", "R/B-MISC")]
    assert [(row["domain"], tagged(row)) for row in found["train"]] == expected
    assert list(found) == ["train", "test"]


def test_documents_keep_the_longer_of_two_mentions(tmp_path):
    splits = {"validation": [row_key("Italian Ada Ada !")]}
    text = json.dumps(DOCUMENTS)
    found = convert(tmp_path, "redocred", {"train": text, "test": text}, splits=splits)
    assert [tagged(row) for row in found["train"]] == ["Ada/B-PER of/I-PER London/I-PER wrote in 1843 ."]
    assert [tagged(row) for row in found["validation"]] == ["Italian/B-MISC Ada/B-PER Ada/B-PER !"]
    assert len(found["test"]) == 2


def test_mentions_become_names(tmp_path):
    (row,) = convert(tmp_path, "gum_open", {"train": CONLLU})["train"]
    assert tagged(row) == (
        "The mayor of Rome/B-LOC did n't meet Ada/B-PER and students of Latin/B-MISC , Sudoku and "
        "the Bank/B-ORG of/I-ORG Italy/I-ORG since May"
    )
    assert row["domain"] == "news", "and fiction is left out"


def test_rated_snippets(tmp_path):
    found = convert(tmp_path, "vader_sentiment", {"archive": tar(**VADER)}, splits=VADER_SPLITS)
    texts = {split: [(row["domain"], row["text"], row["label"]) for row in rows] for split, rows in found.items()}
    assert texts == {
        "train": [
            ("product", "Good value & fast.", "positive"),
            ("product", "It broke.", "negative"),  # the tweet with the same letters is left out
            ("movie", "Fun.", "positive"),
            ("news_editorial", "The vote is on Monday.", "neutral"),
        ],
        "validation": [("product", "It has a door.", "neutral")],
        "test": [("tweet", "nice :)", "positive")],
    }


def test_valence(tmp_path):
    genres = "id\tdocument\tcategory\tsubcategory\na_1\ta\tblog\t\na_2\ta\tblog\t\na_3\ta\tfiction\t\n"
    found = convert(tmp_path, "emobank_sentiment", {"ratings": EMOBANK, "genres": genres})
    rows = {split: [(x["text"], x["label"], x["domain"]) for x in rows] for split, rows in found.items()}
    assert rows == {
        "train": [('It went wrong, "again".', "negative", "blog")],
        "validation": [("A neutral text", "neutral", "blog")],
        "test": [("We won.", "positive", "fiction")],
    }


def test_sentences_whose_targets_disagree_are_left_out(tmp_path):
    train = "\n".join(
        [
            news("He won,\nshe lost.", ("He", 6.0), ("she", 2.0)),
            news("They  met.", ("They", 4.0)),
            news("Held out.", ("x", 6.0)),
        ]
    )
    test = news("A lie.", ("A", 2.0), ("lie", 2.0))
    splits = {"validation": [row_key("Held out.")]}
    content = zipped(train=train, devtest_rw=test)
    found = convert(tmp_path, "newsmtsc", {"archive": content}, splits=splits)
    assert found == {
        "train": [{"text": "They met.", "label": "neutral"}],
        "validation": [{"text": "Held out.", "label": "positive"}],
        "test": [{"text": "A lie.", "label": "negative"}],
    }


def test_emotions(tmp_path):
    files = {"train": 'So "good"\t0,17\tid1\nHm\t27\tid2\nNo\t2,17\tid3\n', "test": "Hm\t27\tid4\n"}
    found = convert(tmp_path, "goemotions", files)
    assert found["train"][0] == {"text": 'So "good"', "labels": [0, 17]} and len(found["test"]) == 1


def test_intents(tmp_path):
    found = {
        f"{oos}{part}": [[f"{oos}{part}", "oos" if oos else "alarm"]]
        for part in ("train", "val", "test")
        for oos in ("", "oos_")
    }
    rows = convert(tmp_path, "clinc150", {"questions": json.dumps(found)})
    assert rows["validation"] == [{"text": "val", "label": "alarm"}, {"text": "oos_val", "label": "oos"}]


BROKEN = {
    "a tag that no annotator gave": (
        "uner_ewt",
        {"train": "1\tAda\tX-PER\n"},
        "train.raw, row 1, column 3: the tag 'X-PER'",
    ),
    "a kind without a mapping": (
        "wnut17",
        {"test": "a\tO\nAda\tB-hero\n"},
        "test.raw, row 2, column 2: 'hero' is none of person",
    ),
    "a row without tag": ("wnut17", {"test": "a\tO\n\nAda\n"}, "test.raw, row 3: 1 columns; there must be at least 2"),
    "not UTF-8": ("wnut17", {"test": b"caf\xe9\tO\n"}, "test.raw, byte 3: not UTF-8"),
    "no JSON": ("redocred", {"train": "[{]", "test": "[]"}, "train.raw, row 1: no JSON"),
    "no list": ("redocred", {"train": "{}", "test": "[]"}, "train.raw: holds a dict; it must hold a list"),
    "no sentences": ("redocred", {"train": '[{"title": "Ada"}]', "test": "[]"}, "document 'Ada': no sentences"),
    "a place outside": (
        "redocred",
        {"train": json.dumps([{**DOCUMENTS[0], "sents": [["Ada"]]}]), "test": "[]"},
        "document 'Ada', field pos: tokens",
    ),
    "a short row of CoNLL-U": ("gum_open", {"train": CONLLU.replace("\t_\t_\n", "\n", 1)}, "has . columns; CoNLL-U has 10"),
    "no archive": ("vader_sentiment", {"archive": b"<html>"}, "archive.raw: cannot be read as an archive"),
    "another archive": (
        "vader_sentiment",
        {"archive": tar(other="")},
        "no file amazonReviewSnippets_GroundTruth.txt; it holds",
    ),
    "a rating in words": (
        "vader_sentiment",
        {"archive": tar(**{**VADER, "tweets_GroundTruth": "1\tgood\ta\n"})},
        "tweets_GroundTruth.txt, row 1, column rating: 'good' is not a number",
    ),
    "a rating is missing": (
        "emobank_sentiment",
        {"ratings": EMOBANK.replace("2.71", ""), "genres": "a_1\ta\tblog\n"},
        "ratings.raw, row 3, field V: '' is not a number",
    ),
    "another split": (
        "emobank_sentiment",
        {"ratings": EMOBANK.replace("dev", "trial"), "genres": "a_1\ta\tblog\n"},
        "row 3, field split: 'trial' is none of train, dev, test",
    ),
    "no genre": ("emobank_sentiment", {"ratings": EMOBANK, "genres": ""}, "row 2, field id: 'a_1' is not in genres.raw"),
    "another polarity": (
        "newsmtsc",
        {"archive": zipped(train=news("a", ("a", 3.0)), devtest_rw=news("a", ("a", 2.0)))},
        "row 1, field polarity: 3.0 is none of 2.0, 4.0, 6.0",
    ),
    "a comment without id": ("goemotions", {"test": "Hm\t27\n"}, "test.raw, row 1: 2 columns; there must be 3"),
    "an emotion by name": ("goemotions", {"test": "Hm\tjoy\tid\n"}, "test.raw, row 1, column labels: 'joy'"),
    "no questions": ("clinc150", {"questions": '{"train": []}'}, "field oos_train: must be a list of pairs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_row_and_field(name, tmp_path):
    source, files, message = BROKEN[name]
    drawn = {"splits": {"validation": []}} if source in ("redocred", "newsmtsc", "vader_sentiment") else {}
    with pytest.raises(SourceError, match=message):
        convert(tmp_path, source, files, **drawn)


# The list


def test_every_listed_data_set_can_be_traced():
    for source in LISTED.values():
        assert source.hub or source.files, source.name
        assert set(source.fingerprints) <= set(source.rows) and source.citation and source.link, source.name
        assert all("/master/" not in source.base + x and "/main/" not in source.base + x for x in source.files.values())
    drawn = json.loads(sources.SPLITS.read_text())
    assert set(drawn) <= set(LISTED)


def test_a_wrong_list_is_refused_with_everything_that_is_wrong(tmp_path):
    entry = dataclasses.asdict(LISTED["vader_sentiment"])
    wrong = {
        **entry,
        "converter": "magic",
        "sha256": {"archive": "0"},
        "columns": {"text": "poem"},
        "licence": "x",
    }
    del wrong["title"]
    (tmp_path / "list.toml").write_text(f"[a]\n{toml(wrong)}")
    with pytest.raises(SourceError) as refused:
        read_sources(tmp_path / "list.toml")
    for part in (
        "title is missing",
        "licence is unknown; known keys: name, title",
        "columns.text is 'poem'; it must be 'text'",
        "converter is 'magic'; it must be",
        "sha256.archive is '0'; it must match",
    ):
        assert part in str(refused.value)
    for wrong in ({"base": "ftp://x/"}, {"sha256": {"other": "0" * 64}}, {"converter": ""}):
        (tmp_path / "list.toml").write_text(f"[a]\n{toml({**entry, **wrong})}")
        with pytest.raises(SourceError, match="list.toml, a: .*give `hub`, or `converter`, `files` that begin"):
            read_sources(tmp_path / "list.toml")
    (tmp_path / "list.toml").write_text("[a")
    with pytest.raises(SourceError, match="list.toml"):
        read_sources(tmp_path / "list.toml")
