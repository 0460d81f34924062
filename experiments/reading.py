"""What the way of reading gives a trained model's entities: `python -m experiments.reading . --data DIR`, into results/reading.json.

Measured on the validation split: sentences as they are; the best label of each word on its own, in place of the best sequence that the
BIO scheme allows; and sentences joined to passages, which show the model the sentences around each.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

from datasets import Dataset
from transformers import AutoTokenizer

from annotator_multitask import BioScheme
from common.data import hash_columns, load_task_split
from common.files import ROOT, environment_info, write_json
from common.recipe import Recipe, TaskRecipe
from evaluation.evaluate import head_statistics, measured, predict
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline

TASK = "ner"
PASSAGES = (3, 5, 10)
OUTPUT = Path("results/reading.json")
RECIPE = ROOT / "training/recipes/research.toml"  # whose model this is about


def joined(data: Dataset, rows: int) -> Dataset:
    """Returns the data set with this many consecutive rows joined into one."""
    passages = data.batch(rows)
    return passages.map(lambda row: {name: list(chain(*parts)) for name, parts in row.items()}, features=data.features)


@contextmanager
def each_word_by_itself() -> Iterator[None]:
    """Takes each word's best label, whatever stands before it."""
    with mock.patch.object(BioScheme, "decode", lambda scheme, scores, first_words: scores.argmax(axis=1)):
        yield


def measure_reading(pipe: MultiTaskPipeline, task: TaskRecipe) -> dict[str, dict[str, Any]]:
    """Returns the metrics of the entities on the validation split for each way of reading."""
    data = load_task_split(task, "validation").select_columns([*task.text_columns, task.label_column])

    def metrics(data: Dataset) -> dict[str, float]:
        return measured(head_statistics(predict(pipe, TASK, task, data)), intervals=False)[0]

    found = {"sentences": metrics(data)}
    with each_word_by_itself():
        found["each word by itself"] = metrics(data)
    return found | {f"passages of {rows}": metrics(joined(data, rows)) for rows in PASSAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--data", type=Path, help="folder with local copies of the data sets")
    args = parser.parse_args()
    task = Recipe.read(RECIPE, args.data).tasks[TASK]
    model, tokenizer = MultiTaskModel.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    pipe = MultiTaskPipeline(model=model, tokenizer=tokenizer)
    content = {
        "command": "python -m experiments.reading MODEL",
        "split": "validation",
        "sha256": hash_columns(load_task_split(task, "validation"), task.columns),
        "ways": measure_reading(pipe, task),
        **environment_info(),
    }
    write_json(OUTPUT, content)
    for way, metrics in content["ways"].items():
        print(f"{way}: {metrics['f1']:.4f}")


if __name__ == "__main__":
    main()
