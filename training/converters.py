"""Original files of data sets, turned into rows: one function per format, listed in `CONVERTERS`.

A converter takes the files of a source by their names in sources.toml, and the source's options. It yields each row, with names
for labels, after its split ("train", "validation", "test"). What a file should not hold raises `SourceError`, which names the
file, the row (counted from 1, as editors count lines) and the field.
"""

import csv
import html
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

Row = dict[str, Any]
Files = dict[str, Path]
Rows = Iterator[tuple[str, Row]]  # each after the name of its split

# Words that may occur inside a name, between two proper nouns.
CONNECTORS = {"and", "of", "the", "in", "at", "on", "de", "for", "&", "-", "@", "'s", "’s"}
GUM_TYPES = {"person": "PER", "organization": "ORG", "place": "LOC"}
GUM_NEVER_NAMES = {"time", "quantity"}


class SourceError(ValueError):
    """A source cannot be fetched or converted; the message names file, row and field, and what to do."""


def text_of(path: Path) -> str:
    """Returns what a text file in UTF-8 holds."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path.name}, byte {error.start}: not UTF-8; download it again.") from error


def lines_of(text: str) -> list[str]:
    """Returns the lines of a text without their ends; only line feeds end a line."""
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def read_json(path: Path, kind: type) -> Any:
    """Returns what a JSON file holds, which must be a `list` or a `dict`."""
    try:
        found = json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise SourceError(f"{path.name}, row {error.lineno}: no JSON ({error.msg}).") from error
    if not isinstance(found, kind):
        raise SourceError(f"{path.name}: holds a {type(found).__name__}; it must hold a {kind.__name__}.")
    return found


def squeeze(text: str) -> str:
    """Returns a text with every run of white space as one blank."""
    return " ".join(text.split())


def row_key(text: str) -> str:
    """Returns the eight hexadecimal digits by which source_splits.json names a text."""
    return sha256(text.encode()).hexdigest()[:8]


def number(value: str, where: str) -> float:
    """Returns a field, which must be a number; `where` names it in the error."""
    try:
        return float(value)
    except ValueError:
        raise SourceError(f"{where}: {value!r} is not a number.") from None


def lookup(mapping: dict[str, Any], value: Any, where: str) -> Any:
    """Returns what a value of the original stands for; the mapping must have it."""
    if value not in mapping:
        raise SourceError(f"{where}: {value!r} is none of {', '.join(map(str, mapping))}.")
    return mapping[value]


def cut(score: float, low: float, high: float) -> str:
    """Returns "negative" for scores up to `low`, "positive" from `high`, and "neutral" between them."""
    return "negative" if score <= low else "positive" if score >= high else "neutral"


def to_bio(kinds: list[str | None], starts: set[int]) -> list[str]:
    """Returns BIO tags for the kind of each token; a new entity begins where the kind changes, and at `starts`."""
    tags, previous = [], None
    for index, kind in enumerate(kinds):
        begins = kind != previous or index in starts
        tags.append("O" if kind is None else ("B-" if begins else "I-") + kind)
        previous = kind
    return tags


# Named entities


def columns(files: Files, token: int, tag: int, mapping: dict[str, str]) -> Rows:
    """Yields the sentences of files with one token a line and blank lines between sentences: CoNLL, IOB2.

    Args:
        files: Named "train", or "train/politics" for the domain "politics".
        token: Column of the token, from 0; columns are separated by tabs.
        tag: Column of the tag, in BIO.
        mapping: The kinds of entities, and what each becomes; "O" is not an entity.
        domains: Whether rows have a `domain`.
    """
    for name, path in files.items():
        split, _, domain = name.partition("/")
        for _, lines in blocks(path):
            words, kinds, starts = [], [], set()
            for row, line in lines:
                cells, where = line.split("\t"), f"{path.name}, row {row}"
                if len(cells) <= max(token, tag):
                    raise SourceError(f"{where}: {len(cells)} columns; there must be at least {max(token, tag) + 1}.")
                if cells[tag].startswith("B-"):
                    starts.add(len(words))
                words.append(cells[token])
                prefix, _, kind = cells[tag].partition("-")
                if cells[tag] != "O" and prefix not in ("B", "I"):
                    raise SourceError(f"{where}, column {tag + 1}: the tag {cells[tag]!r} is neither O nor B-… nor I-….")
                kind = "O" if prefix == "O" else lookup(mapping, kind, f"{where}, column {tag + 1}")
                kinds.append(None if kind == "O" else kind)
            yield split, {"tokens": words, "ner_tags": to_bio(kinds, starts), **({"domain": domain} if domain else {})}


def blocks(path: Path) -> Iterator[tuple[list[str], list[tuple[int, str]]]]:
    """Yields the comments, which begin with "# ", and the numbered lines of each block that blank lines delimit."""
    comments: list[str] = []
    lines: list[tuple[int, str]] = []
    for row, line in enumerate([*lines_of(text_of(path)), ""], 1):
        if line.startswith("# "):
            comments.append(line)
        elif line.strip():
            lines.append((row, line))
        elif lines:
            yield comments, lines
            comments, lines = [], []


def docred(files: Files, mapping: dict[str, str], splits: dict[str, list[str]]) -> Rows:
    """Yields the sentences of Re-DocRED's documents; `splits` names those of the file "train" that are for validation."""
    for split, path in files.items():
        for document in read_json(path, list):
            for row in document_rows(document, path.name, mapping):
                is_held_out = split == "train" and row_key(" ".join(row["tokens"])) in splits["validation"]
                yield "validation" if is_held_out else split, row


def document_rows(document: Any, file: str, mapping: dict[str, str]) -> list[Row]:
    """Returns the sentences of one document; of mentions that overlap, the longer one counts."""
    where = f"{file}, document {document.get('title')!r}" if isinstance(document, dict) else file
    try:
        words = [list(sentence) for sentence in document["sents"]]
        mentions = [(x["sent_id"], *x["pos"], x["type"]) for entity in document["vertexSet"] for x in entity]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{where}: no sentences and entities in the fields sents and vertexSet ({error!r}).") from error
    kinds: list[list[str | None]] = [[None] * len(sentence) for sentence in words]
    starts: list[set[int]] = [set() for _ in words]
    for sentence, start, end, kind in sorted(mentions, key=lambda x: (x[1] - x[2], x[:2])):
        if not (0 <= sentence < len(words) and 0 <= start < end <= len(words[sentence])):
            raise SourceError(f"{where}, field pos: tokens {start} to {end} of sentence {sentence} do not exist.")
        new = lookup(mapping, kind, f"{where}, field type")
        if new != "O" and not any(kinds[sentence][start:end]):
            kinds[sentence][start:end] = [new] * (end - start)
            starts[sentence].add(start)
    return [
        {"tokens": tokens, "ner_tags": to_bio(*tags)} for tokens, *tags in zip(words, kinds, starts, strict=True) if tokens
    ]


def gum(files: Files, genres: list[str]) -> Rows:
    """Yields the sentences of GUM's documents of some genres, with the names in them.

    GUM marks mentions ("the new president of France"), not names. A mention whose first head word is a proper noun has a
    name: the run of proper nouns around that word. Names of persons, organizations and places get their kind; others are MISC
    if GUM links them to a page of Wikipedia. Of nested names the longer mention's counts.
    """
    for split, path in files.items():
        domain, fields = "", []
        for comments, lines in blocks(path):
            for comment in comments:
                name, _, value = comment.removeprefix("# ").partition(" = ")
                domain = value.split("_")[1] if name == "newdoc id" else domain
                fields = value.split("-") if name == "global.Entity" else fields
            if domain in genres:
                yield split, {**gum_row([line for _, line in lines], fields, path.name), "domain": domain}


def gum_row(block: list[str], fields: list[str], file: str) -> Row:
    """Returns one sentence of a CoNLL-U file, given the field names of its mentions."""
    cells = [line.split("\t") for line in block]
    if short := [line for line, row in zip(block, cells, strict=True) if len(row) != 10]:
        raise SourceError(f"{file}: {short[0]!r:.60} has {short[0].count(chr(9)) + 1} columns; CoNLL-U has 10.")
    cells = [row for row in cells if row[0].isdigit()]
    words, is_name = [row[1] for row in cells], [row[4] in ("NNP", "NNPS") for row in cells]
    kinds: list[str | None] = [None] * len(words)
    starts = set()
    for start, end, mention in sorted(mentions_of([row[9] for row in cells], fields), key=lambda x: (x[0] - x[1], x[0])):
        etype, place = mention.get("etype", ""), mention.get("minspan", "").split(",")[0]
        is_linked = bool(mention.get("identity")) and etype not in GUM_NEVER_NAMES
        kind = GUM_TYPES.get(etype, "MISC" if is_linked else None)
        head = start + int(place) - 1 if place.isdecimal() else -1
        if not kind or not start <= head < end or not is_name[head]:
            continue
        first, last = name_around(head, words, is_name, start, end)
        if not any(kinds[first:last]):
            kinds[first:last] = [kind] * (last - first)
            starts.add(first)
    return {"tokens": words, "ner_tags": to_bio(kinds, starts)}


def mentions_of(column: list[str], fields: list[str]) -> list[tuple[int, int, dict[str, str]]]:
    """Returns first token, end and fields of each mention in a sentence's last column, such as `Entity=(4-place-new-…)`."""
    found, open_at = [], {}
    for index, cell in enumerate(column):
        entity = next((x.removeprefix("Entity=") for x in cell.split("|") if x.startswith("Entity=")), "")
        for opens, closes, closed in re.findall(r"\(([^()]+)(\)?)|([^()]+)\)", entity):
            if opens:
                mention = dict(zip(fields, opens.split("-"), strict=False))
                open_at.setdefault(opens.split("-")[0], []).append((index, mention))
            if (name := closed or (opens.split("-")[0] if closes else "")) and open_at.get(name):
                start, mention = open_at[name].pop()
                found.append((start, index + 1, mention))
    return found


def name_around(head: int, words: list[str], is_name: list[bool], start: int, end: int) -> tuple[int, int]:
    """Returns first token and end of the run of proper nouns around one of them, with connectors inside, in a mention."""

    def reached(places: range) -> list[int]:
        run = takewhile(lambda i: is_name[i] or words[i].lower() in CONNECTORS, places)
        return [i for i in run if is_name[i]]

    return reached(range(head, start - 1, -1))[-1], reached(range(head, end))[-1] + 1


# Texts with labels

VADER_FILES = {
    "product": "amazonReviewSnippets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "news_editorial": "nytEditorialSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
}


def vader(files: Files, splits: dict[str, list[str]]) -> Rows:
    """Yields the snippets of VADER's archive, with the raters' mean, from -4 to 4, cut at ±0.5.

    Of texts that have the same letters and digits, the first counts. `splits` names documents as "domain/number"; what it does
    not name is for training, but for movie snippets, most of which are left out.
    """
    place = {key: split for split, keys in splits.items() for key in keys}
    seen = set()
    for domain, file in VADER_FILES.items():
        for row, line in enumerate(read_archive(files["archive"], file), 1):
            cells = line.split("\t", 2)
            if len(cells) != 3:
                raise SourceError(f"{file}, row {row}: {len(cells)} columns; there must be 3: number, rating, text.")
            text, rating = squeeze(html.unescape(cells[2])), number(cells[1], f"{file}, row {row}, column rating")
            key = f"{domain}/{cells[0].split('_')[0]}"
            split = place.get(key, None if domain == "movie" else "train")
            letters = re.sub(r"[^a-z0-9]+", "", text.lower())
            if split and letters not in seen:
                yield split, {"text": text, "label": cut(rating, -0.5, 0.5), "domain": domain}
                seen.add(letters)


def read_archive(path: Path, file: str) -> list[str]:
    """Returns the lines of one file of a tar or zip archive, whatever its folder there."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = {PurePosixPath(name).name: name for name in archive.namelist()}
                text = archive.read(content[file]).decode()
        else:
            with tarfile.open(path) as archive:
                content = {PurePosixPath(name).name: name for name in archive.getnames()}
                text = archive.extractfile(content[file]).read().decode()
    except KeyError:
        raise SourceError(f"{path.name}: no file {file}; it holds {', '.join(content)}.") from None
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path.name}: cannot be read as an archive ({error}); download it again.") from error
    return lines_of(text)


def emobank(files: Files) -> Rows:
    """Yields the texts of EmoBank with at least two words, their valence cut at 2.7 and 3.3 of 5."""
    documents = [line.split("\t") for line in lines_of(text_of(files["genres"]))]
    genres = {cells[0]: cells[2] for cells in documents if len(cells) > 2}
    names = {"train": "train", "dev": "validation", "test": "test"}
    reader = csv.DictReader(io.StringIO(text_of(files["ratings"]), newline=""))
    for cells in reader:
        where = f"{files['ratings'].name}, row {reader.line_num}"
        if missing := [x for x in ("id", "split", "V", "text") if cells.get(x) is None]:
            raise SourceError(f"{where}: no field {', '.join(missing)}.")
        valence, split = number(cells["V"], f"{where}, field V"), lookup(names, cells["split"], f"{where}, field split")
        if len(re.findall(r"[A-Za-z]{2,}", cells["text"])) >= 2:
            if cells["id"] not in genres:
                raise SourceError(f"{where}, field id: {cells['id']!r} is not in {files['genres'].name}.")
            label = cut(valence, 2.7, 3.3)
            yield split, {"text": squeeze(cells["text"]), "label": label, "domain": genres[cells["id"]]}


def newsmtsc(files: Files, splits: dict[str, list[str]]) -> Rows:
    """Yields the sentences of NewsMTSC; those whose targets differ in sentiment are left out.

    `splits` names the sentences of its training file that are for validation.
    """
    labels = {2.0: "negative", 4.0: "neutral", 6.0: "positive"}
    for file, split in (("train.jsonl", "train"), ("devtest_rw.jsonl", "test")):
        by_text: dict[str, set[str]] = {}
        for row, line in enumerate(read_archive(files["archive"], file), 1):
            where = f"{file}, row {row}"
            try:
                record = json.loads(line)
                text = squeeze(record["sentence_normalized"])
                polarities = [x["polarity"] for x in record["targets"]]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise SourceError(f"{where}: no sentence_normalized with targets ({error!r}).") from error
            for polarity in polarities:
                by_text.setdefault(text, set()).add(lookup(labels, polarity, f"{where}, field polarity"))
        for text, found in by_text.items():
            if len(found) == 1:
                is_held_out = split == "train" and row_key(text) in splits["validation"]
                yield "validation" if is_held_out else split, {"text": text, "label": found.pop()}


def goemotions(files: Files) -> Rows:
    """Yields the comments of GoEmotions with the ids of all their labels; the files hold text, label ids and a comment id."""
    for split, path in files.items():
        for row, line in enumerate(lines_of(text_of(path)), 1):
            cells, where = line.split("\t"), f"{path.name}, row {row}"
            if len(cells) != 3:
                raise SourceError(f"{where}: {len(cells)} columns; there must be 3: text, labels, id.")
            if not all(x.isdecimal() for x in cells[1].split(",")):
                raise SourceError(f"{where}, column labels: {cells[1]!r}; expected ids separated by commas.")
            yield split, {"text": cells[0], "labels": [int(x) for x in cells[1].split(",")]}


def clinc(files: Files) -> Rows:
    """Yields the questions of CLINC150 with their intents; those out of scope come last in each split."""
    (path,) = files.values()
    found, names = read_json(path, dict), {"train": "train", "validation": "val", "test": "test"}
    for split, part in names.items():
        for field in (part, f"oos_{part}"):
            pairs = found.get(field)
            if not isinstance(pairs, list) or not all(isinstance(x, list) and len(x) == 2 for x in pairs):
                raise SourceError(f"{path.name}, field {field}: must be a list of pairs, text and intent.")
            for text, label in pairs:
                yield split, {"text": text, "label": label}


CONVERTERS: dict[str, Callable[..., Rows]] = {
    converter.__name__: converter for converter in (clinc, columns, docred, emobank, goemotions, gum, newsmtsc, vader)
}
