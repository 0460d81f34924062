"""Annotates a CSV file and explores it: what the rows feel, and about whom, as a Parquet file, tables and a plot.

    pip install pandas matplotlib
    python examples/explore_a_csv.py --input demo/reviews.csv --output explored

annotate.py does the reading: files of any size, and `--resume` goes on after an interruption. The Parquet file has a row for each
row of the input, and any tool reads it, such as DuckDB:

    SELECT labels.sentiment.label, count(*) FROM 'explored/annotated.parquet' GROUP BY ALL
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

ANNOTATE = Path(__file__).resolve().parent.parent / "annotate.py"


def annotated(source: Path, column: str, output: Path) -> pd.DataFrame:
    """Returns a row for each text: `text`, `sentiment`, `emotions` (a list) and `entities` (a list of dicts)."""
    command = [sys.executable, ANNOTATE, "--input", source, "--text-column", column, "--output", output, "--no-embedding"]
    subprocess.run([*command, "--overwrite"], check=True)
    rows = pd.read_parquet(output)
    rows = rows[rows["error"].isna()]
    rows["sentiment"] = [labels["sentiment"]["label"] for labels in rows["labels"]]
    rows["emotions"] = [list(labels["emotion"]["labels"]) for labels in rows["labels"]]
    rows["entities"] = [list(entities["ner"]) for entities in rows["entities"]]
    return rows[["text", "sentiment", "emotions", "entities"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--column", default="text")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = annotated(args.input, args.column, args.output / "annotated.parquet")

    mentions = rows.explode("entities").dropna(subset="entities")
    mentions["entity"] = [entity["word"] for entity in mentions["entities"]]
    print(pd.crosstab(mentions["entity"], mentions["sentiment"]))  # who is mentioned in which mood
    print(rows.explode("emotions")["emotions"].value_counts())

    figure = Figure(figsize=(5, 2.5), layout="constrained")
    counts = rows["sentiment"].value_counts()
    figure.subplots().barh(counts.index, counts.to_numpy(), color="#0072B2")
    figure.savefig(args.output / "sentiment.png")


if __name__ == "__main__":
    main()
