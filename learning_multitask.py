"""Learning: a new task for a finished model from texts and their labels, with everything else left as it is, to the bit.

`MultiTaskPipeline.add_task` imports this file when it is called. The model reads every text once. A head for texts is then fitted
by regularized logistic (or linear) regression, a head for words is trained for a few epochs. What is held out of the examples
says how strong the regularization is, how sure the scores are, and how good the head is. Axes: N rows, H hidden, C labels.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

try:
    if not TYPE_CHECKING:  # mypy checks these files outside a package
        from .configuration_multitask import SEQUENCE, TOKEN, TaskSpec, check_task_name, is_number
        from .pipeline_multitask import Window, length_batches, mean_over_windows, text_chunks, text_problem
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from configuration_multitask import SEQUENCE, TOKEN, TaskSpec, check_task_name, is_number
    from pipeline_multitask import Window, length_batches, mean_over_windows, text_chunks, text_problem

logger = logging.get_logger(__name__)

Report = dict[str, Any]
LABEL, LABELS, NUMBER, ENTITIES = "label", "labels", "number", "entities"
PROBLEMS = {LABEL: "single_label_classification", LABELS: "multi_label_classification", NUMBER: "regression"}
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # of the penalty on squared weights, the strongest first
USUAL_STRENGTH = 0.03
FOLDS = 5
CROSS_VALIDATED = 2000  # up to this many rows each fifth is held out in turn; with more rows, only the first
CHOSEN_ON = 20_000  # rows are enough to choose the strength
MOST_ITERATIONS = 60
TEMPERATURES = np.geomspace(0.05, 20, 61)
CALIBRATED_ON = 4000
THRESHOLDS = np.arange(0.05, 0.96, 0.05)
FEWEST_FOR_THRESHOLD = 5
WORD_RATE, WORD_BATCH, WORD_EPOCHS, WORD_STEPS = 1e-3, 4, (8, 60), 600  # epochs: as many as make the steps, from … to …
CASING_DROPOUT = 0.15  # share of texts whose casing is hidden in training, so that the value "unknown" is learned
MUCH_MEMORY = 1e9  # bytes of features from which on the user is told
HEAD_FIELDS = {SEQUENCE: {"pooling_mode", "fallback"}, TOKEN: {"hidden_dim", "casing_dim", "classifier_dropout"}}


# The examples


@dataclass
class Examples:
    """Checked examples.

    Attributes:
        kind: "label", "labels", "number" or "entities".
        labels: The label names; for numbers the name of the value, for entities their types.
        texts: The distinct texts.
        rows: int [N], each row's text.
        targets: int [N] (label), 0/1 float [N, C] (labels), float [N, 1] (number), or N lists of (start, end, type).
        facts: What the report says of them.
    """

    kind: str
    labels: list[str]
    texts: list[str]
    rows: np.ndarray
    targets: Any
    facts: Report

    def spec(self, head: dict[str, Any], hidden_size: int) -> dict[str, Any]:
        """Returns the fields of the head's `TaskSpec`."""
        kind = TOKEN if self.kind == ENTITIES else SEQUENCE
        if unknown := sorted(set(head) - HEAD_FIELDS[kind]):
            raise ValueError(f"head has the fields {unknown}; allowed here: {', '.join(sorted(HEAD_FIELDS[kind]))}.")
        if kind == SEQUENCE:
            return {"kind": kind, "labels": self.labels, "problem_type": PROBLEMS[self.kind], **head}
        tags = ["O", *(f"{prefix}-{label}" for label in self.labels for prefix in "BI")]
        return {"kind": kind, "labels": tags, "hidden_dim": hidden_size, "casing_dim": 32, **head}


def _plain(value: Any) -> Any:
    """Returns a label as Python's own type; None if it is missing."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return list(value)
    missing = value is None or type(value).__name__ in ("NAType", "NaTType") or value != value
    return None if missing or (isinstance(value, str) and not value.strip()) else value


def _kind(target: Any) -> str | None:
    """Returns the kind of task that a label is of; None if it is none, or an empty list, which two kinds have."""
    if isinstance(target, str):
        return LABEL
    if is_number(target):
        return NUMBER
    if isinstance(target, list) and target and all(isinstance(x, str) and x for x in target):
        return LABELS
    spans = isinstance(target, list) and all(isinstance(x, list | tuple) and len(x) == 3 for x in target)
    return ENTITIES if spans and target and all(isinstance(label, str) and label for _, _, label in target) else None


def _common_kind(targets: list[Any], kept: list[int]) -> str:
    first = next((i for i in kept if targets[i] != []), None)
    if first is None:
        raise ValueError("labels holds empty lists alone; give at least two texts with a label.")
    kind = _kind(targets[first])
    for i in kept:
        if kind is None or (_kind(targets[i]) != kind and not (targets[i] == [] and kind in (LABELS, ENTITIES))):
            allowed = "a str, a list of str, a number or a list of (start, end, label), the same for all texts"
            like = "" if i == first else f", and labels[{first}] {targets[first]!r:.40}"
            raise ValueError(f"labels[{i}] is {targets[i]!r:.60}{like}; allowed: {allowed}.")
    assert kind is not None
    return kind


def read_examples(name: str, texts: Iterable[str], targets: Iterable[Any], labels: Sequence[str] | None) -> Examples:
    """Returns the examples without the rows that lack a text or a label.

    Args:
        name: Name of the task; a number is called by it.
        texts: Texts.
        targets: Their labels, see `MultiTaskPipeline.add_task`.
        labels: The label names in their order; None: sorted.

    Raises:
        ValueError: The examples are not what a head can learn from; the message says why and what to do.
    """
    if isinstance(texts, str) or isinstance(targets, str):
        raise ValueError("texts or labels is a single str; give a list of texts and a list of their labels.")
    given, values = list(texts), [_plain(x) for x in targets]
    if len(given) != len(values):
        raise ValueError(f"There are {len(given)} texts and {len(values)} labels; give one label for each text.")
    kept = [i for i, text in enumerate(given) if values[i] is not None and _plain(text) is not None]
    for i in kept:
        if problem := text_problem(given[i]):
            raise ValueError(f"texts[{i}] {problem}.")
    if not kept:
        raise ValueError(f"None of the {len(given)} rows has both a text and a label.")
    kind = _common_kind(values, kept)
    chosen, found = [given[i] for i in kept], [values[i] for i in kept]
    places = {text: place for place, text in enumerate(dict.fromkeys(chosen))}
    rows = np.array([places[text] for text in chosen])
    distinct = {(row, repr(target)) for row, target in zip(rows.tolist(), found, strict=True)}
    contradicting = sum(count > 1 for count in Counter(row for row, _ in distinct).values())
    facts = {"rows": len(kept), "left_out": len(given) - len(kept), "duplicates": len(kept) - len(places)}
    facts = {**facts, "contradicting_texts": contradicting, "notes": []}
    names, converted = _convert(kind, name, chosen, found, labels, facts["notes"])
    return Examples(kind, names, list(places), rows, converted, facts)


def _convert(
    kind: str, name: str, texts: list[str], found: list[Any], labels: Sequence[str] | None, notes: list[str]
) -> tuple[list[str], Any]:
    """Returns the label names, and the targets as `Examples` holds them."""
    if kind == NUMBER:
        if len(set(found)) < 2:
            raise ValueError(f"labels holds the number {found[0]} alone; there is nothing to learn.")
        if all(float(x).is_integer() for x in found) and len(set(found)) <= 20:
            notes.append(
                f"labels are {len(set(found))} different whole numbers, and were learned as numbers. If they stand for classes, "
                "give them as str."
            )
        return list(labels or [name]), np.array(found, dtype=np.float32)[:, None]
    if kind == ENTITIES:
        found = [_spans(text, spans) for text, spans in zip(texts, found, strict=True)]
    given = [[x] if kind == LABEL else [s[2] for s in x] if kind == ENTITIES else x for x in found]
    counts = Counter(label for row in given for label in set(row))
    names = sorted(counts) if labels is None else list(labels)
    if labels is not None and set(names) != set(counts):
        raise ValueError(
            f"labels= lacks {sorted(set(counts) - set(names))} and has {sorted(set(names) - set(counts))}, which no text has; "
            "it must name each label of the texts."
        )
    _check_counts(kind, counts, len(found), notes)
    if kind == ENTITIES:
        return names, found
    ids = {label: i for i, label in enumerate(names)}
    if kind == LABEL:
        return names, np.array([ids[x] for x in found])
    matrix = np.zeros((len(found), len(names)), dtype=np.float32)
    for row, present in enumerate(found):
        matrix[row, [ids[x] for x in present]] = 1
    return names, matrix


def _check_counts(kind: str, counts: Counter, rows: int, notes: list[str]) -> None:
    """Refuses labels that nothing can be learned from, and notes those of which there is little to learn."""
    once = sorted(label for label, count in counts.items() if count == 1)
    if kind == LABEL and len(counts) < 2:
        raise ValueError(f"All {rows} texts have the label {next(iter(counts))!r}; a classifier needs at least two labels.")
    if kind != ENTITIES and len(once) > rows / 2:
        raise ValueError(
            f"{len(once)} of {rows} texts have a label that no other text has, such as {once[0]!r:.40}. Are these ids or free "
            "text? Choose another column, or give at least two texts for each label."
        )
    if once:
        shown = ", ".join(once[:5]) + (", …" if len(once) > 5 else "")
        notes.append(f"{len(once)} labels occur once ({shown}): they were learned, and their quality is not known.")


def _spans(text: str, spans: list[Any]) -> list[tuple[int, int, str]]:
    """Returns a text's entities in their order, without spaces at their ends."""
    found = []
    for start, end, label in sorted(spans):
        if (
            type(start) is not int
            or type(end) is not int
            or not 0 <= start < end <= len(text)
            or not text[start:end].strip()
        ):
            raise ValueError(f"The entity {(start, end, label)} lies outside the text {text!r:.60} or marks no word of it.")
        if found and start < found[-1][1]:
            raise ValueError(
                f"The entities {found[-1]} and {(start, end, label)} of {text!r:.60} overlap; keep one of them."
            )
        marked = text[start:end]
        found.append((start + len(marked) - len(marked.lstrip()), start + len(marked.rstrip()), label))
    return found


def held_out(examples: Examples, seed: int) -> list[np.ndarray]:
    """Returns, for each part to hold out in turn, bool [N]; none if nothing can be held out.

    Rows of the same text stay together, parts have like shares of each label, and a label's only text is never held out.
    """
    rng = np.random.default_rng(seed)
    groups = np.zeros(len(examples.texts), dtype=int)
    if examples.kind == LABEL:
        groups[examples.rows] = examples.targets
    folds, dealt = np.full(len(groups), -1), 0
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        if len(members) > 1:
            folds[members] = (dealt + np.arange(len(members))) % FOLDS
            dealt += len(members)
    count = FOLDS if len(examples.rows) <= CROSS_VALIDATED and examples.kind != ENTITIES else 1
    masks = [folds[examples.rows] == fold for fold in range(count)]
    return [mask for mask in masks if mask.any()]


# What the head reads


def read(annotator: Any, name: str, texts: list[str], progress: bool) -> Iterator[list[Window]]:
    """Yields each text's windows with what head `name` gives, as `logits[name]`."""
    with tqdm(total=len(texts), desc="reading", unit=" texts", disable=not progress) as bar:
        for chunk in text_chunks(texts):
            windows = annotator.windows(chunk, [name])
            for batch in length_batches(windows, annotator.batch_tokens):
                annotator.run(batch, [name])
            by_text: list[list[Window]] = [[] for _ in chunk]
            for window in windows:
                by_text[window.text].append(window)
            yield from by_text
            bar.update(len(chunk))


def read_pooled(annotator: Any, name: str, texts: list[str], progress: bool, width: int) -> np.ndarray:
    """Returns what text head `name` gives, float32 [texts, width], of long texts the mean over their windows."""
    found = np.empty((len(texts), width), dtype=np.float32)
    if found.nbytes > MUCH_MEMORY:
        logger.warning(
            f"The features of {len(texts):,} texts take {found.nbytes / 1e9:.1f} GB of memory, and fitting three times as much."
        )
    for row, windows in enumerate(read(annotator, name, texts, progress)):
        found[row] = mean_over_windows(windows, [window.logits[name] for window in windows])
    return found


def _probe(model: Any, spec: TaskSpec) -> nn.Module:
    """Returns a head that gives what a head of this spec reads in place of logits."""
    probe = model.new_head(spec)
    probe.casing, probe.dense, probe.classifier = None, None, nn.Identity()
    return probe.eval()


# Heads for texts


def _label_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    LABEL: F.cross_entropy, LABELS: _label_losses, NUMBER: F.mse_loss,
}  # fmt: skip


class Linear:
    """A linear head: logits are `features @ weight.T + bias`.

    It learns from features of unit length, as embeddings are compared, and reads them at the length that they have, divided by
    the mean length.

    Args:
        features: float [texts, H].
        kind: "label", "labels" or "number".
        width: Number of labels C.
    """

    def __init__(self, features: Tensor, kind: str, width: int) -> None:
        self.kind, self.length = kind, float(features.norm(dim=1).mean().clamp(min=1e-9))
        self.scaled = F.normalize(features, dim=1)
        self.center = self.scaled.mean(dim=0)
        self.scale = math.sqrt(features.shape[1])  # numbers of about 1
        self.scaled.sub_(self.center).mul_(self.scale)
        self.parameters = [features.new_zeros(width, features.shape[1]), features.new_zeros(width)]

    def fit(self, rows: Tensor, targets: Tensor, strength: float) -> None:
        """Fits the head by L-BFGS to some rows' texts, from where it is."""
        inputs, loss = self.scaled[rows], LOSSES[self.kind]
        parameters = [x.clone().requires_grad_() for x in self.parameters]
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=MOST_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(inputs @ parameters[0].T + parameters[1], targets) + strength / 2 * parameters[0].square().sum()
            value.backward()
            return value.detach()

        optimizer.step(closure)
        self.parameters = [x.detach() for x in parameters]

    @property
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight [C, H] and bias [C] for features as the model gives them."""
        weight, bias = self.parameters
        return weight * (self.scale / self.length), bias - self.scale * weight @ self.center


def choose(
    head: Linear, features: Tensor, rows: Tensor, targets: Tensor, masks: list[np.ndarray], progress: bool
) -> tuple[float, Tensor, Tensor]:
    """Returns the best strength, and the held-out rows' logits, float [M, C], and targets at that strength."""
    start = head.parameters
    logits: dict[float, list[Tensor]] = {strength: [] for strength in STRENGTHS}
    held: list[Tensor] = []
    for mask in tqdm(masks, desc="choosing the regularization", disable=not progress):
        out = torch.from_numpy(mask)
        kept, asked = (~out).nonzero()[:CHOSEN_ON, 0], out.nonzero()[:CHOSEN_ON, 0]
        head.parameters = start
        for strength in STRENGTHS:
            head.fit(rows[kept], targets[kept], strength)
            weight, bias = head.folded
            logits[strength].append(features[rows[asked]] @ weight.T + bias)
        held.append(asked)
    head.parameters = start
    if not masks:
        return USUAL_STRENGTH, features.new_zeros(0, len(start[1])), targets[:0]
    truth = targets[torch.cat(held)]
    joined = {strength: torch.cat(parts) for strength, parts in logits.items()}
    best = min(STRENGTHS, key=lambda x: temperature_of(head.kind, joined[x], truth)[1])
    return best, joined[best], truth


def temperature_of(kind: str, logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Returns the temperature by which logits are divided for the least loss (Guo et al. 2017), and that loss."""
    logits, targets = logits[:CALIBRATED_ON], targets[:CALIBRATED_ON]
    candidates = [1.0] if kind == NUMBER or not len(logits) else [1.0, *TEMPERATURES.tolist()]
    losses = [float(LOSSES[kind](logits / x, targets)) for x in candidates]
    best = int(np.argmin(losses))
    return round(candidates[best], 3), losses[best]


def thresholds_of(probabilities: np.ndarray, truth: np.ndarray) -> list[float]:
    """Returns the threshold of the greatest F1 for each label, 0.5 for labels of few texts; both arguments are [M, C]."""
    found = probabilities[None] >= THRESHOLDS[:, None, None]  # [thresholds, M, C]
    right = (found & (truth > 0)).sum(axis=1)
    f1 = 2 * right / np.maximum(1, found.sum(axis=1) + truth.sum(axis=0))
    best = THRESHOLDS[f1.argmax(axis=0)]
    return [
        round(float(x), 2) if count >= FEWEST_FOR_THRESHOLD else 0.5 for x, count in zip(best, truth.sum(0), strict=True)
    ]


def _learn_texts(model: Any, name: str, examples: Examples, found: np.ndarray, seed: int, progress: bool) -> Report:
    """Fits the head of a text task to its features, float [texts, H], and returns what the report says of it."""
    features, rows = torch.from_numpy(found), torch.from_numpy(examples.rows)
    targets, kind = torch.from_numpy(examples.targets), examples.kind
    center, spread = (targets.mean(), targets.std()) if kind == NUMBER else (0.0, 1.0)
    if kind == NUMBER:
        targets = (targets - center) / spread
    linear = Linear(features, kind, len(examples.labels))
    masks = held_out(examples, seed)
    strength, logits, truth = choose(linear, features, rows, targets, masks, progress)
    linear.fit(rows, targets, strength)
    fields: dict[str, Any] = {"temperature": temperature_of(kind, logits, truth)[0]}
    logits = logits / fields["temperature"]
    score = _score_texts(kind, examples.labels, logits.numpy(), truth.numpy())
    if kind == LABELS and len(logits):
        fields["thresholds"] = thresholds_of(logits.sigmoid().numpy(), truth.numpy())
    model.config.set_tasks({**model.config.tasks, name: {**model.config.tasks[name], **fields}})
    head = model.new_head(model.config.task_specs[name])
    weight, bias = linear.folded
    head.classifier.load_state_dict({"weight": weight * spread, "bias": bias * spread + center})
    model.heads[name] = head.to(device=model.device, dtype=model.dtype).train(model.training)
    return {**score, "held_out": len(logits), "regularization": strength}


def _score_texts(
    kind: str, labels: list[str], logits: np.ndarray, truth: np.ndarray, thresholds: list[float] | None = None
) -> Report:
    """Returns the metric of a text task, its score, and the pairs of labels that are confused most often.

    Without thresholds, those of a half of the rows are judged on the other.
    """
    metric = {LABEL: "accuracy", LABELS: "macro_f1", NUMBER: "r2"}[kind]
    if not len(logits):
        return {"metric": metric, "score": None}
    if kind == NUMBER:
        spread = ((truth - truth.mean(axis=0)) ** 2).sum()
        return {"metric": metric, "score": float(1 - ((logits - truth) ** 2).sum() / max(spread, 1e-12))}
    if kind == LABEL:
        answers = logits.argmax(axis=1)
        pairs = Counter((labels[a], labels[b]) for a, b in zip(truth, answers, strict=True) if a != b)
        return {"metric": metric, "score": float((answers == truth).mean()), "confusions": _worst(pairs)}
    probabilities = 1 / (1 + np.exp(-logits))
    halves = [np.arange(len(logits)) % 2 == half for half in (0, 1)]
    found = probabilities >= (thresholds or 0.5)
    if thresholds is None:
        for half, other in (halves, halves[::-1]):
            found[half] = probabilities[half] >= thresholds_of(probabilities[other], truth[other])
    occurs = truth.any(axis=0)
    f1 = 2 * (found & (truth > 0)).sum(axis=0) / np.maximum(1, found.sum(axis=0) + truth.sum(axis=0))
    return {"metric": metric, "score": float(f1[occurs].mean()) if occurs.any() else 0.0}


def _worst(pairs: Counter) -> list[tuple[str, str, int]]:
    return [(truth, answer, count) for (truth, answer), count in sorted(pairs.items(), key=lambda x: (-x[1], x[0]))[:3]]


# Heads for words


def word_labels(windows: list[Window], spans: list[tuple[int, int, str]], tags: list[str]) -> list[Tensor]:
    """Returns the tag of each word of each window, int [W]: `B-` where an entity starts, `I-` on its further words."""
    found = []
    for window in windows:
        ids = torch.zeros(len(window.words), dtype=torch.long)  # "O"
        for word, (_, (start, end)) in enumerate(window.words):
            for first, last, label in spans:
                if start < last and first < end:
                    ids[word] = tags.index(("B-" if start <= first else "I-") + label)
        found.append(ids)
    return found


def word_logits(head: Any, windows: list[Window], features: list[np.ndarray], hide: Tensor | None = None) -> Tensor:
    """Returns the logits of all words of some windows, float [words, C].

    Args:
        head: A token head.
        windows: The windows.
        features: For each, what the head reads of its words, float [W, H].
        hide: bool [windows], those whose casing the head does not see.
    """
    hidden = torch.from_numpy(np.concatenate(features))
    if head.casing is None:
        return head.classify(hidden)
    width = max(len(window.casings) for window in windows)
    casings = torch.tensor([[*window.casings, *[0] * (width - len(window.casings))] for window in windows])
    mask = torch.tensor([[1] * len(window.casings) + [0] * (width - len(window.casings)) for window in windows])
    if hide is not None:
        casings = casings * ~hide.unsqueeze(1)
    row = [i for i, window in enumerate(windows) for _ in window.words]
    token = [first for window in windows for first, _ in window.words]
    return head.classify(torch.cat([hidden, head.casing(casings, mask)[row, token]], dim=-1))


def train_words(
    head: Any, data: list[tuple[Window, np.ndarray, Tensor]], epochs: int, last: int, progress: bool
) -> Iterator[int]:
    """Trains a token head on windows, their features and tags; yields after each epoch, and ends after the `last`."""
    steps = math.ceil(len(data) / WORD_BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=WORD_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * steps)
    for epoch in tqdm(range(last), desc="training", unit=" epochs", disable=not progress):
        head.train()
        for rows in torch.randperm(len(data)).split(WORD_BATCH):
            windows, features, tags = zip(*(data[i] for i in rows.tolist()), strict=True)
            logits = word_logits(head, list(windows), list(features), torch.rand(len(windows)) < CASING_DROPOUT)
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.cat(tags)).backward()
            optimizer.step()
            schedule.step()
        head.eval()
        yield epoch + 1


def _learn_words(
    annotator: Any, name: str, examples: Examples, found: list[list[Window]], seed: int, progress: bool, epochs: int | None
) -> Report:
    """Trains the head of a token task and returns what the report says of it.

    The fifth that is held out says after which epoch to stop; the head is then trained so far on all rows.
    """
    model = annotator.model
    tags = model.config.tasks[name]["labels"]
    masks = held_out(examples, seed)
    out = masks[0] if masks else np.zeros(len(examples.rows), dtype=bool)
    parts: dict[bool, list[tuple[Window, np.ndarray, Tensor]]] = {False: [], True: []}
    for text, spans, is_out in zip(examples.rows, examples.targets, out, strict=True):
        labelled = zip(found[text], word_labels(found[text], spans, tags), strict=True)
        parts[bool(is_out)] += [(window, window.logits[name], ids) for window, ids in labelled if len(ids)]
    enough = math.ceil(WORD_STEPS * WORD_BATCH / max(1, len(parts[False])))
    total = epochs or min(max(WORD_EPOCHS[0], enough), WORD_EPOCHS[1])
    report: Report = {"metric": "entity_f1", "score": None, "held_out": int(out.sum()), "epochs": total}
    torch.manual_seed(seed)
    if parts[False] and parts[True]:
        head, best, logits = model.new_head(model.config.task_specs[name]), math.inf, None
        truth = torch.cat([ids for _, _, ids in parts[True]])
        for epoch in train_words(head, parts[False], total, total, progress):
            with torch.no_grad():
                answers = word_logits(head, [x for x, _, _ in parts[True]], [x for _, x, _ in parts[True]])
            loss = float(F.cross_entropy(answers, truth))
            if loss < best:
                best, logits, report["epochs"] = loss, answers, epoch
        temperature = temperature_of(LABEL, logits, truth)[0]
        rows = np.flatnonzero(out)
        report |= _score_held_out(annotator, name, examples, found, rows, parts[True], logits)
        model.config.set_tasks({**model.config.tasks, name: {**model.config.tasks[name], "temperature": temperature}})
    torch.manual_seed(seed)
    head = model.new_head(model.config.task_specs[name])
    for _ in train_words(head, parts[False] + parts[True], total, report["epochs"], progress):
        pass
    model.heads[name] = head.to(device=model.device, dtype=model.dtype).train(model.training)
    return report


def _score_held_out(
    annotator: Any,
    name: str,
    examples: Examples,
    found: list[list[Window]],
    rows: np.ndarray,
    part: list[tuple[Window, np.ndarray, Tensor]],
    logits: Tensor,
) -> Report:
    """Returns the score of held-out rows, decoded as the pipeline decodes them."""
    for (window, _, _), values in zip(part, logits.split([len(ids) for _, _, ids in part]), strict=True):
        window.logits[name] = values.numpy()
    answers = []
    for row in rows:
        text = examples.rows[row]
        windows = found[text]
        for window in windows:
            window.text = 0
            if not window.words:
                window.logits[name] = np.zeros((0, logits.shape[1]), dtype=np.float32)
        answers.append(annotator.records([examples.texts[text]], windows, [name], None)[0]["entities"][name])
    return _score_entities(answers, [examples.targets[row] for row in rows])


def _score_entities(answers: list[list[dict[str, Any]]], truth: list[list[tuple[int, int, str]]]) -> Report:
    """Returns strict F1 of the entities (both ends and the type are right), and the types that are confused most often."""
    pairs: Counter = Counter()
    right = guessed = gold = 0
    for entities, spans in zip(answers, truth, strict=True):
        found = [(x["start"], x["end"], x["entity_group"]) for x in entities]
        right, guessed, gold = right + len(set(found) & set(spans)), guessed + len(found), gold + len(spans)
        for start, end, label in spans:
            other = next((group for first, last, group in found if first < end and start < last), "O")
            pairs[label, other] += other != label
    f1 = 2 * right / max(1, guessed + gold)
    return {"metric": "entity_f1", "score": f1, "confusions": _worst(+pairs)}


# The whole


@contextmanager
def _unchanged_on_error(model: Any) -> Iterator[None]:
    """Gives a model its tasks and heads back if anything goes wrong."""
    tasks, heads = model.config.tasks, dict(model.heads.items())
    try:
        yield
    except BaseException:
        model.config.tasks, model.heads = tasks, nn.ModuleDict(heads)
        raise


def add_task(
    annotator: Any,
    name: str,
    texts: Iterable[str],
    targets: Iterable[Any],
    labels: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    refit: bool = False,
    epochs: int | None = None,
    **head: Any,
) -> Report:
    """Adds a task to the annotator's model and returns the report; see `MultiTaskPipeline.add_task`."""
    model, started = annotator.model, time.monotonic()
    if annotator.backend != "torch":
        raise ValueError(f"backend is {annotator.backend!r}; an export has the heads that it has. Add tasks with 'torch'.")
    if name in model.heads and not refit:
        raise ValueError(f"tasks has {name!r} already; pass refit=True to replace it, or choose another name.")
    check_task_name(name)
    progress = sys.stderr.isatty() if progress is None else progress
    examples = read_examples(name, texts, targets, labels)
    if epochs is not None and (examples.kind != ENTITIES or epochs < 1):
        raise ValueError(
            f"epochs is {epochs}; it is for entities, and at least 1. Heads of texts are fitted without epochs."
        )
    spec = examples.spec(head, model.config.hidden_size)
    with torch.random.fork_rng(devices=[]), _unchanged_on_error(model):  # random numbers outside stay as they are
        model.config.set_tasks({**model.config.tasks, name: spec})
        model.heads[name] = _probe(model, model.config.task_specs[name])
        if examples.kind == ENTITIES:
            windows = list(read(annotator, name, examples.texts, progress))
            read_at = time.monotonic()
            learned = _learn_words(annotator, name, examples, windows, seed, progress, epochs)
        else:
            features = read_pooled(annotator, name, examples.texts, progress, model.config.hidden_size)
            read_at = time.monotonic()
            learned = _learn_texts(model, name, examples, features, seed, progress)
    seconds = {"seconds_reading": round(read_at - started, 2), "seconds_fitting": round(time.monotonic() - read_at, 2)}
    return {"task": name, "kind": examples.kind, "labels": examples.labels, **examples.facts, **learned, **seconds}


def measure_task(annotator: Any, name: str, texts: Iterable[str], targets: Iterable[Any]) -> Report:
    """Returns how well a task answers other examples: `metric`, `score`, `confusions` and `rows`.

    Raises:
        ValueError: The examples are not of the task's kind, or have a label that it lacks.
    """
    spec: TaskSpec = annotator.model.config.task_specs[name]
    kind = ENTITIES if spec.kind == TOKEN else {problem: kind for kind, problem in PROBLEMS.items()}[str(spec.problem_type)]
    names = list(dict.fromkeys(x[2:] for x in spec.labels if x != "O")) if kind == ENTITIES else spec.labels
    rows = [(text, _plain(x)) for text, x in zip(texts, targets, strict=True)]
    rows = [(text, x) for text, x in rows if x is not None and _plain(text) is not None]
    given, truth = [text for text, _ in rows], [x for _, x in rows]
    for x in truth:
        said = {LABEL: [x], NUMBER: [], LABELS: x, ENTITIES: [s[2] for s in x] if isinstance(x, list) else []}[kind]
        if unknown := [label for label in said if label not in names]:
            raise ValueError(f"The test split has the label {unknown[0]!r}, which the examples lack: {', '.join(names)}.")
    if kind == ENTITIES:
        answers = [x["entities"][name] for x in annotator.stream(given, [name], False)]
        score = _score_entities(answers, [_spans(text, x) for text, x in rows])
    else:
        logits = read_pooled(annotator, name, given, False, len(names))
        numbers = {
            LABEL: lambda: np.array([names.index(x) for x in truth]),
            LABELS: lambda: np.array([[float(label in x) for label in names] for x in truth]),
            NUMBER: lambda: np.array(truth, dtype=float)[:, None],
        }[kind]()
        score = _score_texts(kind, names, logits, numbers, spec.thresholds)
    return {**score, "rows": len(rows)}
