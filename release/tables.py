"""Tables and sentences that documents show between markers, each rendered from a folder's result files.

A renderer takes the folder and returns Markdown, or "" or a FileNotFoundError if what it needs has not been measured yet.
"""

import json
import statistics
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.files import ROOT

THREE_MODELS = ("SentenceTransformer.encode", "VADER", "spaCy's small pipeline")  # as benchmarks.rivals names them
DIMENSIONS = ("384", "256", "128", "64")
SET_NAMES = {
    "wnut17": "WNUT-17",
    "stsb": "STS-B",
    "sts_unseen": "STS12–16, pairs unseen in STS-B",
    "sick_r": "SICK-R",
    "scifact": "SciFact",
    "squad_sentences": "SQuAD sentences",
    "clinc150": "CLINC150, 10 examples per label",
    "hwu64": "HWU64, 10 examples per label",
    "uner_ewt": "UNER-EWT",
    "redocred": "Re-DocRED",
    "crossner": "CrossNER",
    "conll2003": "CoNLL-2003",
    "vader_sentiment": "VADER's texts",
    "emobank_sentiment": "EmoBank",
    "newsmtsc": "NewsMTSC",
    "tweet_sentiment": "TweetEval sentiment",
}
OVERLAP = "nearest-neighbour overlap@10"
SOURCES = ROOT / "training/sources.toml"  # the data sets by name
METRIC_NAMES = {"overlap@10": OVERLAP, "spearman": "Spearman", "ndcg@10": "nDCG@10", "accuracy": "linear-probe accuracy"}
FILES = {
    "model.safetensors": "encoder, float32: all-MiniLM-L6-v2's own file",
    "heads/model.safetensors": "task branch and heads, float16",
    "2_Dense/model.safetensors": "projection to 256 dimensions, float32",
    "tokenizer.json": "tokenizer: all-MiniLM-L6-v2's own file",
}


def read(name: str, folder: Path) -> dict[str, Any]:
    """Returns a result file by its name without ending.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = folder / "results" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; the documents of {folder} are rendered from it.")
    return json.loads(path.read_text("utf-8"))


def read_some(name: str, folder: Path) -> dict[str, Any]:
    """Returns a result file, or an empty dict if there is none."""
    return read(name, folder) if (folder / f"results/{name}.json").exists() else {}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, empty if it has no rows."""
    lines = [header, ["---"] * len(header), *rows] if rows else []
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def decimals(value: float | None) -> str:
    """Returns a figure with three decimals; "" for one that was not measured."""
    return "" if value is None else f"{value:.3f}"


def with_interval(found: dict[str, Any], key: str) -> str:
    """Returns a metric of a task's result and its 95 % interval, if it has one."""
    value, interval = decimals(found["metrics"][key]), found.get("intervals", {}).get(key)
    return "{} ({:.3f} to {:.3f})".format(value, *interval) if interval else value


# The tasks


def measured_tasks(folder: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Returns of each task its name, what results/tasks.json says of it and of the metrics measured, and its result."""
    tasks = []
    for name, task in read("tasks", folder).items():
        found = read(task.get("results", "release"), folder)["tasks"][name]
        tasks.append((name, task | {"metrics": [x for x in task["metrics"] if x["key"] in found["metrics"]]}, found))
    return tasks


def results_table(folder: Path) -> str:
    """Returns the test results, those of lower-cased texts where measured, and published figures."""
    rows = []
    for key, task, found in measured_tasks(folder):
        lower = read_some(f"{task.get('results', 'release')}_lower", folder).get("tasks", {}).get(key, {}).get("metrics", {})
        split = "" if found["split"] == "test" else f", {found['split']} split"
        place = f"{task['dataset_name']} ({found['rows']:,}{split})"
        for metric in task["metrics"]:
            value = f"**{decimals(found['metrics'][metric['key']])}**"
            others = "; ".join(f"{x['model']} {x['value']:.3f}" for x in metric.get("published", []))
            rows.append([task["title"], place, metric["name"], value, decimals(lower.get(metric["key"])), others])
    header = ["task", "test set (texts)", "metric", "this model", "lower-cased", "published, for comparison"]
    return markdown(header, rows)


def interval_table(folder: Path) -> str:
    """Returns each metric with its 95 % interval, and the calibration error of the answers that it judges."""
    rows = []
    for _, task, found in measured_tasks(folder):
        for metric in task["metrics"]:
            error = found["metrics"].get(metric.get("calibration", "calibration_error"))
            value = with_interval(found, metric["key"])
            rows.append([task["title"], task["dataset_name"], metric["name"], value, decimals(error)])
    return markdown(["task", "test set", "metric", "value (95 % interval)", "expected calibration error"], rows)


def coverage_table(folder: Path) -> str:
    """Returns how accuracy rises as answers of low confidence are left out."""
    rows, shares = [], ("1.0", "0.9", "0.8", "0.7", "0.6", "0.5")
    for _, task, found in measured_tasks(folder):
        if (curve := found.get("coverage")) and "calibration" not in task["metrics"][0]:  # else of other answers
            cells = [f"{curve[x]['accuracy']:.3f} ({curve[x]['min_score']:.2f})" if x in curve else "" for x in shares]
            rows.append([task["title"], task["dataset_name"], *cells])
    return markdown(["task", "test set", *(f"{float(x):.0%}" for x in shares)], rows)


def domain_table(folder: Path) -> str:
    """Returns the main metric of each domain of the test sets that name domains."""
    rows = []
    for _, task, found in measured_tasks(folder):
        metric = task["metrics"][0]
        for domain, scores in found.get("domains", {}).items():
            if metric["key"] in scores:
                value = decimals(scores[metric["key"]])
                rows.append([task["title"], task["dataset_name"], domain, metric["name"], value])
    return markdown(["task", "test set", "domain", "metric", "value"], rows)


def rivals_table(found: dict[str, Any]) -> str:
    """Returns this model beside spaCy's small pipeline and VADER on the same texts."""
    rows = []
    for kind, metric in (("entities", "entity F1"), ("entities, lower case", "entity F1"), ("sentiment", "macro recall")):
        for name, scores in found.get(kind, {}).items():
            other = next(x for x in scores if x != "this model")
            values = [f"**{decimals(scores['this model'])}**", other, decimals(scores[other])]
            rows.append([kind, SET_NAMES.get(name, name), metric, *values])
    return markdown(["task", "test set", "metric", "this model", "beside it", ""], rows)


def research_table(folder: Path) -> str:
    """Returns the architecture on the literature's benchmarks: joint training, each task alone, and published figures."""
    joint, rows = read("research", folder), []
    for name, about in read("published", folder)["research"].items():
        runs = (run.get("tasks", {}).get(name) for run in (joint, read_some(f"research_{name}", folder)))
        values = [with_interval(found, about["metric"]) if found else "" for found in runs]
        others = "; ".join(f"{x['model']} {x['value']:.4g}" for x in about["models"])
        rows.append([about["title"], about["metric_name"], *values, others])
    return markdown(["test set", "metric", "joint training", "trained alone", "published"], rows)


def depths_table(folder: Path) -> str:
    """Returns what branches of two, three and four layers reach on all data of the research recipe, and what they cost."""
    described, rows = read("published", folder)["research"], []
    for layers in (2, 3, 4):
        if found := read_some(f"research_{layers}_layers_validation", folder):
            scores = [decimals(found["tasks"][name]["metrics"][about["metric"]]) for name, about in described.items()]
            rows.append([str(layers), *scores, f"{found['parameters'] / 1e6:.1f}", f"{1 + layers / 6:.2f}"])
    titles = [f"{about['title']}, {about['metric_name']}" for about in described.values()]
    return markdown(["layers of the branch", *titles, "parameters, millions", "encoder passes for everything"], rows)


# The embedding


def embedding_table(folder: Path, metrics: int | None = None) -> str:
    """Returns what the embedding reaches at each of its dimensions, with at most `metrics` metrics per test set."""
    sets, order, rows = read("embedding", folder)["test"], list(SET_NAMES), []
    for name in sorted(sets, key=lambda x: order.index(x) if x in order else len(order)):
        for metric in list(sets[name][DIMENSIONS[0]])[:metrics]:
            title = f"{SET_NAMES.get(name, name)}, {METRIC_NAMES.get(metric, metric)}"
            rows.append([title, *(decimals(sets[name][dim].get(metric)) for dim in DIMENSIONS)])
    return markdown(["test set", *DIMENSIONS], rows)


# Speed and size


def speed_table(found: dict[str, Any]) -> str:
    """Returns how long one way of working takes beside another."""
    rows = [
        [row["ratio"], f"**{row['median']:.2f}**", "{:.2f} to {:.2f}".format(*row["quartiles"])] for row in found["ratios"]
    ]
    return markdown([f"{found['texts']:,} texts, {found['tokens']:,} tokens", "ratio", "interquartile range"], rows)


def backend_table(found: dict[str, Any]) -> str:
    """Returns what each task reaches on each backend."""
    rows = []
    for name, task in found["tasks"].items():
        values = [decimals(task[backend]) for backend in ("torch", "onnx", "onnx-int8")]
        change = round(task["points"]["onnx-int8"], 1) + 0.0  # never minus zero
        points = f"{change:+.1f} points".replace("-", "−")
        rows.append([f"{name}, {task['metric']} ({task['rows']:,})", *values, points])
    return markdown(["task, validation split", "torch", "ONNX", "ONNX, int8", "int8 gives"], rows)


def int8_table(found: dict[str, Any]) -> str:
    """Returns ways of running the model in 8 bits, beside float32 and with each text alone."""
    rows = []
    for name, way in found["ways"].items():
        near, alone = way["beside_float"], way["alone_beside_batch"]
        labels = [f"{sum(x['labels'].values())}" for x in (near, alone)]
        entities = f"{near['entities']:,} of {near['entities_expected']:,}"
        cosines = [f"{near['cosine_mean']:.4f}", f"{near['cosine_min']:.3f}"]
        rows.append([name, f"{way['time_to_float']:.2f}", *cosines, labels[0], entities, labels[1]])
    head = ["activations quantized", "time / float32", "cosine, mean", "least", "labels that differ", "entities that differ"]
    return markdown([*head, "labels that differ, alone"], rows)


def modes_table(found: dict[str, Any]) -> str:
    """Returns the speed and size of each backend and each kind of output, and of what people would run instead."""
    short = found["one_short_text_milliseconds"]
    rows = []
    for name, speed in found["texts_per_second"].items():
        times = [f"{short[name]['median']:.1f}", f"{short[name]['p95']:.1f}"] if name in short else ["", ""]
        backend = name.split(", ")[-1]
        size = f"{found['file_bytes'][backend] / 1e6:.0f}" if backend in found["file_bytes"] else ""
        rows.append([name, f"{speed:,.0f}", *times, size])
    return markdown(["", "texts per second", "ms, one short text", "95th percentile", "MB of files"], rows)


def starts_table(found: dict[str, Any]) -> str:
    """Returns what one text from the shell takes with each backend, and with three models."""
    rows = [
        [name, f"{way['seconds']:.1f}", f"{way['to_torch']:.2f}", f"{way['peak_bytes'] / 1e6:,.0f}"]
        for name, way in found["ways"].items()
    ]
    return markdown(["one text from the shell", "seconds", "ratio to torch", "MB of memory"], rows)


def megabytes(path: Path) -> float:
    """Returns the size of a file."""
    return path.stat().st_size / 1e6


def files_table(folder: Path) -> str:
    """Returns the model's files with their sizes."""
    rows = [[f"`{name}`", holds, f"{megabytes(folder / name):.1f} MB"] for name, holds in FILES.items()]
    return markdown(["file", "holds", "size"], rows)


def specification_table(folder: Path) -> str:
    """Returns what the model is, from its configuration and its files."""
    config, lengths = (
        json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "sentence_bert_config.json")
    )
    training, layers = read("training", folder), config["num_hidden_layers"]
    encoder, heads = (megabytes(folder / name) for name in ("model.safetensors", "heads/model.safetensors"))
    rows = {
        "parameters": f"{training['parameters'] / 1e6:.1f} M in all, "
        f"{training['trained'] / 1e6:.1f} M of them trained (branch and heads)",
        "embedding": f"{config['hidden_size']} dimensions (upstream's), or {config['embedding_dim']} with Matryoshka prefixes "
        "of 128 and 64; unit length",
        "heads": ", ".join(f"`{name}` ({_labels(task)})" for name, task in config["tasks"].items()),
        "maximum length": f"{lengths['max_seq_length']} tokens per window; the multitask pipeline reads longer texts in "
        "overlapping windows",
        "forward pass": f"embedding alone, or labels and entities alone: {layers} layers; everything: "
        f"{layers + config.get('num_task_layers', 0)}",
        "files": f"encoder {encoder:.0f} MB (float32, upstream's own file), branch and heads {heads:.0f} MB (float16)",
        "language": "English; the encoder is uncased, the branch sees casing",
        "license": "Apache-2.0 for code and weights; commercial use allowed, see [training and data](#training-and-data)",
        "`trust_remote_code`": "not needed for `SentenceTransformer` and plain `AutoModel`; needed for labels and entities",
    }
    return markdown(["", ""], [list(row) for row in rows.items()])


def _labels(task: dict[str, Any]) -> str:
    types = dict.fromkeys(x[2:] for x in task["labels"] if x[:2] in ("B-", "I-"))
    return ", ".join(types) or f"{len(task['labels'])} labels"


def licenses_table(folder: Path) -> str:
    """Returns the data sets that each head trains on, with their licenses."""
    by_head: dict[str, list[str]] = {}
    for x in tomllib.loads(SOURCES.read_text("utf-8")).values():
        if "trains" in x["use"]:
            by_head.setdefault(x["use"].rpartition(" ")[2], []).append(f"[{x['title']}]({x['link']}): {x['license']}")
    return markdown(["head", "trained on, with licenses"], [[head, "<br>".join(sets)] for head, sets in by_head.items()])


def data_table(folder: Path) -> str:
    """Returns all data sets: name and link, license, rows, and what each is used for."""
    rows = []
    for source in tomllib.loads(SOURCES.read_text("utf-8")).values():
        counts = [f"{source['rows'][x]:,}" if x in source["rows"] else "–" for x in ("train", "validation", "test")]
        allowed = "" if source["commercial"] else " (research only)"
        rows.append(
            [f"[{source['title']}]({source['link']})", source["license"] + allowed, " / ".join(counts), source["use"]]
        )
    return markdown(["data", "license", "rows: train / validation / test", "used here"], rows)


def replaces_table(folder: Path) -> str:
    """Returns this model beside the three models that it replaces."""
    ways, speed, three = read("starts", folder)["ways"], read("benchmarks", folder), "three models"
    encoder, *rest = (megabytes(folder / name) for name in FILES if name.endswith(".safetensors"))
    upstream = encoder + read("published", folder)["spacy_small"]["megabytes"]
    memory = {name: way["peak_bytes"] / 1e6 for name, way in ways.items()}
    start = {name: way["seconds"] for name, way in ways.items()}
    rounds = zip(*(speed["seconds"][name] for name in THREE_MODELS), strict=True)
    seconds = {**speed["seconds"], three: [sum(times) for times in rounds]}
    rate = {name: speed["texts"] / statistics.median(times) for name, times in seconds.items()}
    short = {name: times["median"] for name, times in speed["one_short_text_milliseconds"].items()}
    short[three] = sum(short[name] for name in THREE_MODELS)
    compared = [
        ("memory, PyTorch", "{:,.0f} MB", memory, "torch"),
        ("memory, 8 bits", "{:,.0f} MB", memory, "onnx-int8"),
        ("one text from the shell, 8 bits", "{:.1f} s", start, "onnx-int8"),
        ("texts per second, PyTorch", "{:,.0f}", rate, "everything, torch"),
        ("texts per second, 8 bits", "{:,.0f}", rate, "everything, onnx-int8"),
        ("one short text, 8 bits", "{:.1f} ms", short, "everything, onnx-int8"),
    ]
    rows = [
        ["vectors of your all-MiniLM-L6-v2 index stay valid", "yes", "yes: same file, same vectors"],
        *_quality_rows(read("rivals", folder)),
        ["weights to download", f"{upstream:.0f} MB in three models", f"**{encoder + sum(rest):.0f} MB in one**"],
        *([title, form.format(found[three]), f"**{form.format(found[ours])}**"] for title, form, found, ours in compared),
        ["output", "three formats, no emotions", "one record, with 28 emotions, offsets and scores"],
        ["your own label set", "another model to train and serve", "`add_task`, vectors unchanged"],
    ]
    return markdown(["", "MiniLM + VADER + spaCy small", "this model"], rows)


def _quality_rows(rivals: dict[str, Any]) -> Iterator[list[str]]:
    for kind, other, title in (("entities", "spaCy", "entity F1"), ("sentiment", "VADER", "sentiment macro recall")):
        scores = list(rivals[kind].values())
        theirs, ours = (decimals(statistics.mean(x[name] for x in scores)) for name in (other, "this model"))
        yield [f"{title}, mean of {len(scores)} test sets", theirs, f"**{ours}**"]


# Training


def emissions(training: dict[str, Any]) -> dict[str, Any]:
    """Returns the Hub's metadata on what the training emitted, in grams: time × power × the grid's intensity."""
    hours, kilowatts = training["seconds"] / 3600, training["watts"] / 1000
    return {
        "emissions": round(hours * kilowatts * training["grams_per_kwh"]),
        "source": f"estimated from the run's time, {training['watts_source']} and {training['grams_source']}",
        "training_type": "fine-tuning",
        "hardware_used": training["hardware_used"],
    }


def training_text(training: dict[str, Any]) -> str:
    """Returns the sentences on what the training took, by results/training.json, whose `watts` and `grams_per_kwh` are assumed."""
    hours = training["seconds"] / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    return (
        f"Training took {training['steps']:,} steps and {time} on {training['hardware_used']}: about "
        f"{hours * training['watts']:,.0f} Wh at {training['watts']} W ({training['watts_source']}), or "
        f"{emissions(training)['emissions']:,} g of CO₂ at {training['grams_per_kwh']} g/kWh ({training['grams_source']}).\n"
    )


def levers_tables(found: dict[str, Any]) -> str:
    """Returns the first release's single runs, one table for each group of results/levers.json."""
    parts = []
    for group in found.values():
        columns = {key: OVERLAP if "neighbours" in key else title for key, title in group["columns"].items()}
        rows = [[name, *(decimals(run.get(key)) for key in columns)] for name, run in group["runs"].items()]
        parts.append(markdown(["run", *columns.values()], rows))
    return "\n".join(parts)


def _of(name: str, renderer: Callable[[dict[str, Any]], str]) -> Callable[[Path], str]:
    """Returns a renderer of one result file."""
    return lambda folder: renderer(read(name, folder))


RENDERERS: dict[str, Callable[[Path], str]] = {
    "backends": _of("onnx", backend_table),
    "coverage": coverage_table,
    "data": data_table,
    "domains": domain_table,
    "embedding": lambda folder: embedding_table(folder, 1),
    "embedding-all": embedding_table,
    "files": files_table,
    "int8": _of("int8", int8_table),
    "intervals": interval_table,
    "levers": _of("levers", levers_tables),
    "licenses": licenses_table,
    "replaces": replaces_table,
    "depths": depths_table,
    "research": research_table,
    "results": results_table,
    "modes": _of("benchmarks", modes_table),
    "rivals": _of("rivals", rivals_table),
    "specification": specification_table,
    "speed": _of("benchmarks", speed_table),
    "speed-avx2": _of("benchmarks_avx2", speed_table),
    "starts": _of("starts", starts_table),
    "training": _of("training", training_text),
}
