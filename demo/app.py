"""A page for trying the model in a browser: one text, several texts side by side, or a csv file.

    python -m demo.app                       the model of this repository, at http://127.0.0.1:7860
    python -m demo.app USER/NAME --port 80   a model of the Hub

In a Space, the model is the one that README.md names under `models`. All answers come from the multitask pipeline.
"""

import argparse
import base64
import csv
import html
import io
import json
import os
import re
from itertools import cycle
from pathlib import Path
from textwrap import shorten
from typing import Any

import gradio as gr
import numpy as np
from huggingface_hub import SpaceCard
from transformers import pipeline
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
MAX_CHARACTERS = 20_000  # of one text
MAX_LINES = 12  # texts to compare: more do not fit on a screen
SHOWN_PAIRS = 5
MAX_ROWS = 1_000
MAX_COLUMNS = 100
MAX_FILE_BYTES = 2**20
PREVIEW_ROWS = 5
PREVIEW_CHARACTERS = 60  # of a cell; a column's name may be as long
EXAMPLES = [
    "Tim Cook opened Apple's new store in Paris. I love it!",
    "My flight from Boston was cancelled again, and nobody at Lufthansa would help.",
    "Serena Williams won at Wimbledon again. Keep training!",
]
LINES = (
    "A man is playing a guitar.\nSomeone plays an instrument.\nThe bank raised its interest rates.\nMortgages get dearer."
)
# Okabe and Ito's colours, which people with any kind of colour vision can tell apart; black text is readable on each.
COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#F0E442", "#009E73", "#D55E00", "#0072B2", "#999999")
CSS = """
.vector, .heat { margin-top: 2em; }  /* below the label */
.vector { display: grid; grid-template-columns: repeat(32, 1fr); gap: 1px; }
.vector i { aspect-ratio: 1; border-radius: 2px; }
[data-testid="highlighted-text"] .label { color: #111827 !important; }  /* white on these colours is hard to read */
.chips { display: flex; flex-wrap: wrap; gap: .4em; margin: 2em 0 .4em; padding: 0; list-style: none; }
.chips li { background: #56B4E9; color: #111827; border-radius: 1em; padding: .2em .8em; }
.pairs { margin: 1em 0 0 1.5em; list-style: decimal; }
@media (max-width: 640px) { .vector { grid-template-columns: repeat(16, 1fr); } }
.heat { overflow-x: auto; }
.heat table { border-collapse: separate; border-spacing: 2px; }
.heat td { background: var(--cell); color: #1f2937; min-width: 3em; padding: .4em; border-radius: 3px; text-align: center; }
.heat tbody th { text-align: left; font-weight: normal; max-width: min(22em, 40vw); padding-right: .6em; }
.heat tbody th span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
"""
# What a spreadsheet takes for the start of a formula; a number with a sign is none.
FORMULA = re.compile(r"[=@＝＠＋－\t\r\n]|[+-](?![\d.,]+$)")
Record = dict[str, Any]


def problem(message: str) -> gr.Error:
    """Returns an error that the page shows. The user caused it, so it leaves no stack trace in the log."""
    return gr.Error(html.escape(message), print_exception=False)


# What a record looks like on the page


def colour(share: float) -> str:
    """Returns the CSS colour of a number in [-1, 1]: from blue over near white to orange."""
    end = np.array([230, 120, 20] if share > 0 else [40, 110, 200])
    red, green, blue = np.rint(245 + (end - 245) * min(abs(share), 1)).astype(int)
    return f"rgb({red},{green},{blue})"


def vector_picture(vector: np.ndarray) -> str:
    """Returns an embedding, float [E], as HTML: a coloured square for each dimension."""
    most = max(float(np.abs(vector).max()), 1e-12)
    squares = [
        f'<i style="background:{colour(value / most)}" title="{index}: {value:.3f}"></i>'
        for index, value in enumerate(vector)
    ]
    caption = f"{len(vector)} dimensions from {vector.min():.2f} (blue) to {vector.max():.2f} (orange)"
    return f'<div class="vector" role="img" aria-label="{caption}">{"".join(squares)}</div><small>{caption}</small>'


def heat_map(texts: list[str], similarity: np.ndarray) -> str:
    """Returns the cosine similarities of texts, float [B, B], as an HTML table whose cells name their two texts."""
    names = [f"{number}. {html.escape(text)}" for number, text in enumerate(texts, start=1)]
    numbers = "".join(f'<th scope="col" title="{name}">{i}</th>' for i, name in enumerate(names, start=1))
    rows = []
    for name, values in zip(names, similarity.tolist(), strict=True):
        cells = [
            f'<td style="--cell:{colour(value)}" title="{name} | {other}">{value:.2f}</td>'
            for other, value in zip(names, values, strict=True)
        ]
        rows.append(f'<tr><th scope="row" title="{name}"><span>{name}</span></th>{"".join(cells)}</tr>')
    table = f"<table><thead><tr><th></th>{numbers}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="heat" tabindex="0" role="region" aria-label="Cosine similarities">{table}</div>'


def pair_list(texts: list[str], similarity: np.ndarray) -> str:
    """Returns the most similar pairs of texts, from their similarities, float [B, B], as an HTML list."""
    pairs = sorted(zip(*np.triu_indices(len(texts), 1), strict=True), key=lambda pair: -similarity[pair])[:SHOWN_PAIRS]
    items = [f"<li><b>{similarity[i, j]:.2f}</b> {html.escape(texts[i])} – {html.escape(texts[j])}</li>" for i, j in pairs]
    return f'<ol class="pairs" aria-label="Most similar pairs">{"".join(items)}</ol>'


def chips(spec: Any, answer: Record) -> str:
    """Returns a multi-label answer as HTML: a chip with its score for each label that passes its threshold, or which came close."""
    limits = dict(zip(spec.labels, spec.thresholds or [0.5] * len(spec.labels), strict=True))
    ranked = sorted(answer["scores"].items(), key=lambda item: -item[1])
    present = [(label, score) for label, score in ranked if score >= limits[label]]
    if present:
        items = "".join(f"<li>{html.escape(label)} <b>{score:.2f}</b></li>" for label, score in present)
        return f'<ul class="chips">{items}</ul>'
    closest = ", ".join(f"{html.escape(label)} {score:.2f} of {limits[label]:.2f}" for label, score in ranked[:3])
    fallback = f" The answer is {html.escape(spec.fallback)}." if spec.fallback else ""
    return f'<p class="chips">Nothing passes its threshold.{fallback}</p><small>Highest scores: {closest}</small>'


def read_vectors(lines: str, width: int) -> np.ndarray:
    """Returns the vectors of a text with a JSON list of `width` numbers on each line, at length 1, float32 [N, width].

    Raises:
        gr.Error: A line is something else, or there are none or too many.
    """
    vectors = []
    for number, line in enumerate((lines or "").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            vector = np.array(json.loads(line), dtype=np.float32)
        except (ValueError, TypeError, OverflowError, RecursionError):
            vector = np.zeros(0)
        if vector.shape != (width,) or not np.isfinite(vector).all() or not vector.any():
            raise problem(f"line {number} is {line.strip():.30}…; allowed: a JSON list of {width} numbers, not all zero.")
        vectors.append(vector / np.linalg.norm(vector))
    if not 1 <= len(vectors) <= MAX_LINES:
        raise problem(f"vectors has {len(vectors)} lines; allowed: 1 to {MAX_LINES}. Write one vector on each line.")
    return np.stack(vectors)


def show_labels(spec: Any, answer: Record) -> dict[str, float] | str:
    """Returns what the page shows of a sequence task's answer: chips as HTML, a bar per label, or the values of a regression."""
    if "labels" in answer:
        return chips(spec, answer)
    if "values" in answer:
        return ", ".join(f"{name} {value:.2f}" for name, value in answer["values"].items())
    return answer["scores"]


# A csv file


def read_table(file: str | None) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a csv file, each row as long as the header.

    Raises:
        gr.Error: There is no file, it is too large, or it is not csv in UTF-8.
    """
    if file is None:
        raise problem("file is empty; upload a csv file first.")
    data = Path(file).read_bytes()
    if len(data) > MAX_FILE_BYTES:
        raise problem(f"file has {len(data):,} bytes; allowed: {MAX_FILE_BYTES:,}. Divide it, or use annotate.py.")
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        lines = [(reader.line_num, row) for row in reader if row]  # an empty line is no row
    except UnicodeDecodeError as error:
        raise problem(f"file is not UTF-8 at byte {error.start}; save it as a csv in UTF-8.") from None
    except csv.Error as error:
        raise problem(f"file is not a csv at line {reader.line_num}: {error}. Check the quotes there.") from None
    header, rows = lines[0][1] if lines else [], [row for _, row in lines[1:]]
    longest = max(map(len, header), default=0)
    if len(header) > MAX_COLUMNS or longest > PREVIEW_CHARACTERS:
        raise problem(
            f"file has {len(header):,} columns, the longest name {longest:,} characters; allowed: {MAX_COLUMNS} columns, "
            f"{PREVIEW_CHARACTERS} characters. The first line must name the columns."
        )
    for line, row in lines:
        if len(row) != len(header):
            raise problem(
                f"file has {len(row)} fields in the row that ends at line {line}; the header has {len(header)}. "
                "Put texts with commas in quotes."
            )
    if not 1 <= len(rows) <= MAX_ROWS:
        raise problem(f"file has {len(rows):,} rows below the header; allowed: 1 to {MAX_ROWS:,}. Use annotate.py for more.")
    return header, rows


def table_cells(record: Record) -> dict[str, str]:
    """Returns what a record adds to a row of a csv file, by the name of the column."""
    cells: dict[str, Any] = {}
    for task, answer in record.get("labels", {}).items():
        if "values" in answer:
            cells |= {f"{task}_{name}": f"{value:.4f}" for name, value in answer["values"].items()}
        elif "labels" in answer:
            cells[task] = json.dumps(answer["labels"], ensure_ascii=False)
        else:
            cells |= {task: answer["label"], f"{task}_score": f"{answer['score']:.4f}"}
    for task, found in record.get("entities", {}).items():
        cells[task] = json.dumps([{**entity, "score": round(entity["score"], 4)} for entity in found], ensure_ascii=False)
    if "sentence_embedding" in record:
        cells["embedding"] = json.dumps([round(x, 6) for x in record["sentence_embedding"].tolist()])
    return {f"predicted_{name}": value for name, value in cells.items()}


def download_link(name: str, table: list[list[str]]) -> str:
    """Returns an HTML link that holds a table as a csv file, so that no file stays on the server."""
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([f"'{cell}" if FORMULA.match(cell) else cell for cell in row] for row in table)
    content, name = base64.b64encode(stream.getvalue().encode()).decode(), html.escape(name)
    return f'<a download="{name}" href="data:text/csv;charset=utf-8;base64,{content}">Download {name}</a>'


def _preview(column: str, texts: list[str], added: list[dict[str, str]]) -> Record:
    """Returns what a gr.Dataframe shows of the first rows: the texts and what was added to them."""
    rows = [[text, *cells.values()] for text, cells in zip(texts, added, strict=True)][:PREVIEW_ROWS]
    cut = [[cell if len(cell) <= PREVIEW_CHARACTERS else cell[:PREVIEW_CHARACTERS] + "…" for cell in row] for row in rows]
    return {"headers": [column, *added[0]], "data": cut}


# The page


def _picture(label: str, value: str) -> gr.HTML:
    return gr.HTML(value, label=label, show_label=True, container=True, padding=True, apply_default_css=False)


class Demo:
    """The page and the functions behind it.

    Args:
        pipe: A multitask pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.specs = pipe.model.config.task_specs
        self.token_tasks = [name for name, spec in self.specs.items() if spec.kind == "token_classification"]
        self.sequence_tasks = [name for name in self.specs if name not in self.token_tasks]

    def run(self, texts: list[str], **options: Any) -> list[Record]:
        """Returns a record per text.

        Raises:
            gr.Error: A text is too long or no valid Unicode.
        """
        for number, text in enumerate(texts, start=1):
            if len(text) > MAX_CHARACTERS:
                raise problem(f"text {number} has {len(text):,} characters; allowed: {MAX_CHARACTERS:,}. Shorten it.")
        try:
            return self.pipe(texts, **options)
        except ValueError as error:
            raise problem(f"{error} Remove it.") from error

    def annotate(self, text: str) -> list[Any]:
        """Returns what the page shows of one text: entities and labels by task, the vector, and the record."""
        if not text or not text.strip():
            raise problem("text is empty; type or paste one.")
        record = self.run([text])[0]
        entities = [{"text": text, "entities": record["entities"][name]} for name in self.token_tasks]
        labels = [show_labels(self.specs[name], record["labels"][name]) for name in self.sequence_tasks]
        vector = record["sentence_embedding"]
        plain = dict(sorted({**record, "sentence_embedding": vector.tolist()}.items()))  # the long vector last
        return [*entities, *labels, vector_picture(vector), plain]

    def compare(self, lines: str) -> str:
        """Returns a heat map of the texts, one per line; empty lines do not count."""
        texts = [line.strip() for line in (lines or "").split("\n") if line.strip()]
        if not 2 <= len(texts) <= MAX_LINES:
            raise problem(f"texts has {len(texts)} lines; allowed: 2 to {MAX_LINES}. Write one text on each line.")
        vectors = np.stack([record["sentence_embedding"] for record in self.run(texts, tasks=[])])
        return heat_map(texts, vectors @ vectors.T) + pair_list(texts, vectors @ vectors.T)

    def encoder_vectors(self, lines: str) -> str:
        """Returns the encoder's own vector of each text, one JSON list per line."""
        records = self.run([line for line in lines.split("\n") if line.strip()][:MAX_LINES], tasks=[], embedding="encoder")
        return "\n".join(json.dumps([round(x, 5) for x in record["encoder_embedding"].tolist()]) for record in records)

    def move(self, lines: str) -> tuple[str, str]:
        """Returns what moving the encoder's vectors to this model's dimensions changes, and the moved vectors, one per line."""
        weight = self.pipe.model.linear.weight.detach().float().cpu().numpy()  # [E, H]
        old = read_vectors(lines, weight.shape[1])
        new = old @ weight.T
        new /= np.linalg.norm(new, axis=1, keepdims=True)
        change = np.abs(old @ old.T - new @ new.T).max()
        said = f"{len(old)} vectors: {weight.shape[1]} → {weight.shape[0]} dimensions, no text encoded."
        compared = f" Their similarities to each other change by at most {change:.3f}." if len(old) > 1 else ""
        return said + compared, "\n".join(json.dumps([round(x, 5) for x in vector]) for vector in new.tolist())

    def columns(self, file: str | None) -> Any:
        """Returns the choice of columns of a file; "text" or the only column is chosen already."""
        header = read_table(file)[0] if file else []
        chosen = "text" if "text" in header else header[0] if len(header) == 1 else None
        return gr.Dropdown(choices=header, value=chosen)

    def annotate_file(self, file: str | None, column: str | None, with_vectors: bool) -> tuple[str, Record]:
        """Returns a link to the annotated csv file, and its first rows."""
        header, rows = read_table(file)
        if column not in header:
            given, names = str(column or "empty"), shorten(", ".join(header), 200, placeholder=" …")
            raise problem(f"column is {given:.{PREVIEW_CHARACTERS}}; allowed: {names}. Choose the one with the texts.")
        texts = [row[header.index(column)] for row in rows]
        added = [table_cells(record) for record in self.run(texts, embedding=with_vectors)]
        if taken := [name for name in added[0] if name in header]:
            raise problem(f"file has the columns {', '.join(taken)} already; rename or remove them.")
        table = [[*header, *added[0]], *([*row, *cells.values()] for row, cells in zip(rows, added, strict=True))]
        return download_link(f"{Path(file).stem[:60]}_annotated.csv", table), _preview(column, texts, added)

    def page(self) -> gr.Blocks:
        """Returns the page."""
        config, million = self.pipe.model.config, sum(x.numel() for x in self.pipe.model.parameters()) / 1e6
        width = config.embedding_dim or config.hidden_size
        with gr.Blocks(title="Multi-task sentence transformer", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown(
                "# One pass over a text: names, labels and a vector\n"
                f"One model of {million:.1f} million parameters gives a vector of {width} dimensions and the tasks "
                f"{', '.join(self.specs)}."
            )
            with gr.Tabs(overflow_behavior="wrap"):
                with gr.Tab("Text"):
                    self._text_tab()
                with gr.Tab("Compare"):
                    self._compare_tab()
                if config.embedding_dim is not None:
                    with gr.Tab("Moving your index"):
                        self._move_tab()
                with gr.Tab("File"):
                    self._file_tab()
        return page

    def _text_tab(self) -> None:
        first = iter(self.annotate(EXAMPLES[0]))
        with gr.Row():
            with gr.Column():
                info = f"Up to {MAX_CHARACTERS:,} characters"
                text = gr.Textbox(label="Text", value=EXAMPLES[0], lines=4, max_lines=12, info=info)
                button = gr.Button("Annotate", variant="primary")
                examples = gr.Column()
            with gr.Column():
                shown = [self._answer(name, next(first)) for name in [*self.token_tasks, *self.sequence_tasks]]
                shown.append(_picture("The vector", next(first)))
                with gr.Accordion("The record, as the pipeline returns it", open=False):
                    shown.append(gr.JSON(show_label=False, value=next(first)))
        gr.on([button.click, text.submit], self.annotate, text, shown, api_name="annotate", concurrency_id="model")
        with examples:
            gr.Examples(
                EXAMPLES, text, shown, self.annotate, cache_examples=False, run_on_click=True, api_visibility="private"
            )

    def _answer(self, name: str, value: Any) -> gr.HighlightedText | gr.Label | gr.HTML:
        if self.specs[name].problem_type == "multi_label_classification":
            return _picture(name, value)
        if name in self.sequence_tasks:
            return gr.Label(label=name, value=value, num_top_classes=8)
        groups = dict.fromkeys(x.removeprefix("B-").removeprefix("I-") for x in self.specs[name].labels if x != "O")
        return gr.HighlightedText(label=name, value=value, color_map=dict(zip(groups, cycle(COLOURS), strict=False)))

    def _compare_tab(self) -> None:
        info = f"One text on each line, 2 to {MAX_LINES} of them"
        texts = gr.Textbox(label="Texts", value=LINES, lines=6, max_lines=MAX_LINES, info=info)
        button = gr.Button("Compare", variant="primary")
        shown = _picture("Cosine similarity of the vectors", self.compare(LINES))
        button.click(self.compare, texts, shown, api_name="compare", concurrency_id="model")

    def _move_tab(self) -> None:
        gr.Markdown(
            "Vectors that you have stored of this model's encoder (all-MiniLM-L6-v2 in the release) become this model's by one "
            "matrix product: `new = normalize(old @ W.T)`. No text is encoded again."
        )
        example = self.encoder_vectors(LINES)
        info = f"One JSON list on each line, 1 to {MAX_LINES} of them. The example is the texts of the tab Compare."
        vectors = gr.Textbox(label="Stored vectors", value=example, lines=4, max_lines=4, info=info)
        button = gr.Button("Move", variant="primary")
        said, moved = self.move(example)
        shown = [gr.Markdown(said), gr.Textbox(label="Moved vectors", value=moved, lines=4, max_lines=4, buttons=["copy"])]
        button.click(self.move, vectors, shown, api_name="move")

    def _file_tab(self) -> None:
        gr.Markdown(
            f"A csv in UTF-8, columns named in the first line: up to {MAX_ROWS:,} rows and {MAX_FILE_BYTES >> 20} MB. "
            "It comes back with the columns `predicted_…` added. Cells that a spreadsheet would run as a formula, such as "
            "`=HYPERLINK(…)`, get a leading apostrophe."
        )
        with gr.Row():
            file = gr.File(label="File", file_types=[".csv"], height=160)
            with gr.Column():
                column = gr.Dropdown([], label="Column with the texts", allow_custom_value=True)
                with_vectors = gr.Checkbox(label="Add the vectors, too")
                button = gr.Button("Annotate the file", variant="primary")
        gr.Examples([[str(HERE / "reviews.csv")]], [file], cache_examples=False, api_visibility="private")
        rows = f"Its first {PREVIEW_ROWS} rows"
        shown = [_picture("Annotated file", ""), gr.Dataframe(label=rows, interactive=False)]
        file.change(self.columns, file, column, api_visibility="private")
        inputs = [file, column, with_vectors]
        button.click(self.annotate_file, inputs, shown, api_visibility="private", concurrency_id="model")

    def launch(self, **options: Any) -> Any:
        """Starts the page and returns what `gr.Blocks.launch` does. Nothing is loaded from other hosts."""
        os.umask(0o077)  # only this user may read what Gradio keeps of an uploaded file
        theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        fixed = {"theme": theme, "css": CSS, "ssr_mode": False, "run_history": False, "max_file_size": MAX_FILE_BYTES}
        return self.page().queue(max_size=32).launch(**fixed, **options)


def default_model() -> str:
    """Returns the folder above if it is a model; in a Space, the model that README.md names.

    Raises:
        ValueError: README.md names none.
    """
    if (HERE.parent / "config.json").exists():
        return str(HERE.parent)
    models = SpaceCard.load(HERE / "README.md").data.get("models")
    if not models:
        raise ValueError(f"{HERE / 'README.md'} names no model; write its id as USER/NAME under 'models'.")
    return models[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub id; its code is run. Default: this repository")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        pipe = pipeline("multitask", model=args.model or default_model(), trust_remote_code=True)
    except (OSError, ValueError) as error:
        parser.error(f"model {args.model or ''} cannot be loaded: {error}")
    Demo(pipe).launch(server_port=args.port)


if __name__ == "__main__":
    main()
