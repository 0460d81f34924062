"""Learning: a new task for a finished model from texts and their labels, with everything else left as it is, to the bit.

`MultiTaskPipeline.add_task` imports this file when it is called. The model reads every text once. A head for texts is then fitted
by regularized logistic (or linear) regression, a head for words is trained for a few epochs. What is held out of the examples
says how strong the regularization is, how sure the scores are, and how good the head is. Axes: N rows, H features, C labels.
"""

import copy
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

try:
    from .annotator_multitask import Window, mean_over_windows, pad_windows, text_chunks, text_problem
    from .tasks_multitask import READS, SEQUENCE, TOKEN, is_number
except ImportError:  # no package around this file: imported from the repository's root, by its own scripts
    from annotator_multitask import Window, mean_over_windows, pad_windows, text_chunks, text_problem
    from tasks_multitask import READS, SEQUENCE, TOKEN, is_number

logger = logging.get_logger(__name__)

Report = dict[str, Any]
LABEL, LABELS, NUMBER, ENTITIES = "label", "labels", "number", "entities"
PROBLEMS = {LABEL: "single_label_classification", LABELS: "multi_label_classification", NUMBER: "regression"}
HEAD_FIELDS = {SEQUENCE: {"pooling_mode", "fallback", "reads"}, TOKEN: {"hidden_dim", "casing_dim", "classifier_dropout"}}
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # of the penalty on squared weights, the strongest first
USUAL_STRENGTH = 0.03  # where nothing can be held out
FOLDS, CROSS_VALIDATED = 5, 500  # up to this many rows each fifth is held out in turn; with more rows, only the first
MOST_CHOSEN_ON, MOST_ITERATIONS = 10_000, 60
TEMPERATURES, THRESHOLDS = (0.05, 20.0), np.round(np.arange(0.05, 0.91, 0.01), 2)
RARE = 20  # labels with fewer items share one threshold
WORD_RATE, WORD_BATCH, WORD_EPOCHS, WORD_STEPS = 1e-3, 4, (8, 60), 600  # epochs: as many as make the steps, from … to …
CASING_DROPOUT = 0.15  # share of texts whose casing is hidden in training, so that the value "unknown" is learned
MUCH_MEMORY = 1e9  # bytes of features from which on the user is told


# Calibration


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of -log p(label) from logits, float [N, C], and labels, int [N], or 0/1 [N, C], judged one by one."""
    scores, truth = torch.as_tensor(logits), torch.as_tensor(labels)
    if truth.ndim == 1:
        return float(F.cross_entropy(scores, truth.long()))
    return float(F.binary_cross_entropy_with_logits(scores, truth.to(scores.dtype)))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature by which to divide logits, float [N, C], for the least negative log-likelihood of the labels.

    Labels are int [N], or 0/1 [N, C]. The temperature lies in `TEMPERATURES`, and is 1 where nothing is gained.
    """
    logits = logits.astype(float)

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits / math.exp(log_temperature), labels)

    low, high = (math.log(x) for x in TEMPERATURES)
    while high - low > 1e-4:  # ternary search: there is one minimum
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) < loss(high - third) else (low + third, high)
    temperature = round(math.exp((low + high) / 2), 3)
    return temperature if loss(math.log(temperature)) < loss(0.0) else 1.0


def fit_thresholds(probabilities: np.ndarray, truth: np.ndarray) -> list[float]:
    """Returns each label's threshold in `THRESHOLDS` with the best F1; probabilities are float [N, C], truth is 0/1 [N, C].

    A label with fewer than `RARE` items gets the threshold that is best for all labels together: its own would be chance.
    Without any item, it is 0.5 for all.
    """
    if not truth.any():
        return [0.5] * truth.shape[1]
    found = [probabilities >= threshold for threshold in THRESHOLDS]
    hits = np.array([(x & (truth > 0)).sum(axis=0) for x in found])  # [thresholds, C]
    answers, items = np.array([x.sum(axis=0) for x in found]), truth.sum(axis=0)
    f1 = 2 * hits / np.maximum(answers + items, 1)
    common = (2 * hits.sum(axis=1) / np.maximum(answers.sum(axis=1) + items.sum(), 1)).argmax()
    return [float(THRESHOLDS[f1[:, i].argmax() if items[i] >= RARE else common]) for i in range(truth.shape[1])]


# The examples


@dataclass
class Examples:
    """Checked examples."""

    kind: str  # LABEL, LABELS, NUMBER or ENTITIES
    labels: list[str]  # the label names; for numbers the name of the value, for entities their types
    texts: list[str]  # the distinct texts
    rows: np.ndarray  # int [N], each row's text
    targets: list[Any]  # the N labels: str, list of str, float, or list of (start, end, type)
    facts: Report  # what the report says of them

    def spec(self, head: dict[str, Any], hidden_size: int, has_branch: bool) -> dict[str, Any]:
        """Returns the fields of the head's `TaskSpec`."""
        kind = TOKEN if self.kind == ENTITIES else SEQUENCE
        if unknown := sorted(set(head) - HEAD_FIELDS[kind]):
            raise ValueError(f"head has the fields {unknown}; allowed here: {', '.join(sorted(HEAD_FIELDS[kind]))}.")
        if kind == SEQUENCE:
            reads = "both" if has_branch else "encoder"
            return {"kind": kind, "labels": self.labels, "problem_type": PROBLEMS[self.kind], "reads": reads, **head}
        tags = ["O", *(f"{prefix}-{label}" for label in self.labels for prefix in "BI")]
        return {"kind": kind, "labels": tags, "hidden_dim": hidden_size, "casing_dim": 32, **head}

    def tensor(self) -> Tensor:
        """Returns the labels of texts: int [N] (label), 0/1 float [N, C] (labels) or float [N, 1] (number)."""
        if self.kind == NUMBER:
            return torch.tensor(self.targets, dtype=torch.float32).unsqueeze(1)
        if self.kind == LABELS:
            return torch.tensor([[float(label in x) for label in self.labels] for x in self.targets])
        ids = {label: i for i, label in enumerate(self.labels)}
        return torch.tensor([ids[x] for x in self.targets])


def plain(value: Any) -> Any:
    """Returns a label as Python's own type; None if it is missing."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, bool):
        return str(value).lower()
    missing = value is None or type(value).__name__ == "NAType" or value != value or not str(value).strip()
    return None if missing else value


def _kind(target: Any) -> str | None:
    """Returns the kind of task that a label is of; None if it is none, or an empty list, which two kinds have."""
    if isinstance(target, str) or is_number(target):
        return LABEL if isinstance(target, str) else NUMBER
    if isinstance(target, list) and target:
        if all(isinstance(x, str) and x for x in target):
            return LABELS
        if all(isinstance(x, list | tuple) and len(x) == 3 and isinstance(x[2], str) and x[2] for x in target):
            return ENTITIES
    return None


def _common_kind(targets: dict[int, Any]) -> str:
    """Returns the kind of task that the labels of all rows are of."""
    first = next((i for i, target in targets.items() if target != []), None)
    if first is None:
        raise ValueError("labels holds empty lists alone; give at least two texts with a label.")
    kind = _kind(targets[first])
    for i, target in targets.items():
        fits = _kind(target) == kind or (target == [] and kind in (LABELS, ENTITIES))
        if kind is None or not fits:
            raise ValueError(
                f"labels[{i}] is {target!r:.60}, and labels[{first}] {targets[first]!r:.40}; allowed: a str, a list of str, "
                "a number or a list of (start, end, label), the same for all texts."
            )
    return str(kind)


def read_examples(name: str, texts: Iterable[str], targets: Iterable[Any], labels: Sequence[str] | None) -> Examples:
    """Returns the examples without the rows that lack a text or a label; for the arguments see `MultiTaskPipeline.add_task`.

    Raises:
        ValueError: The examples are not what a head can learn from; the message says why and what to do.
    """
    if isinstance(texts, str) or isinstance(targets, str):
        raise ValueError("texts or labels is a single str; give a list of texts and a list of their labels.")
    given, values = list(texts), [plain(x) for x in targets]
    if len(given) != len(values):
        raise ValueError(f"There are {len(given)} texts and {len(values)} labels; give one label for each text.")
    kept = [i for i, text in enumerate(given) if values[i] is not None and plain(text) is not None]
    if not kept:
        raise ValueError(f"None of the {len(given)} rows has both a text and a label.")
    for i in kept:
        if problem := text_problem(given[i]):
            raise ValueError(f"texts[{i}] {problem}.")
    kind = _common_kind({i: values[i] for i in kept})
    chosen, found = [given[i] for i in kept], [values[i] for i in kept]
    if kind == ENTITIES:
        found = [check_spans(text, spans) for text, spans in zip(chosen, found, strict=True)]
    elif kind == LABELS:
        found = [sorted(set(x)) for x in found]
    places = {text: place for place, text in enumerate(dict.fromkeys(chosen))}
    distinct = {(text, repr(target)) for text, target in zip(chosen, found, strict=True)}
    names, notes = _check_numbers(found, labels or [name]) if kind == NUMBER else _check_labels(kind, found, labels)
    facts = {
        "rows": len(kept),
        "left_out": len(given) - len(kept),
        "duplicates": len(kept) - len(places),
        "contradicting_texts": sum(count > 1 for count in Counter(text for text, _ in distinct).values()),
        "notes": notes,
    }
    return Examples(kind, names, list(places), np.array([places[text] for text in chosen]), found, facts)


def _check_numbers(found: list[float], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the name of the value, and notes on the numbers."""
    distinct = set(found)
    if len(distinct) < 2:
        raise ValueError(f"labels holds the number {found[0]} alone; there is nothing to learn.")
    if isinstance(names, str) or len(names) != 1:
        raise ValueError(f"labels= is {names!r}; allowed for numbers: a list with the one name of the value.")
    is_class = len(distinct) <= 20 and all(float(x).is_integer() for x in distinct)
    note = f"labels are {len(distinct)} different whole numbers, and were learned as numbers. If they stand for classes, "
    return list(names), [note + "give them as str."] if is_class else []


def _check_labels(kind: str, found: list[Any], labels: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Returns the label names and notes on them; refuses labels that nothing can be learned from."""
    counts = Counter(label for x in found for label in set(labels_of(kind, x)))
    if labels is not None and set(labels) != set(counts):
        raise ValueError(
            f"labels= lacks {sorted(set(counts) - set(labels))} and has {sorted(set(labels) - set(counts))}, which no text "
            "has; it must name each label of the texts."
        )
    once = sorted(label for label, count in counts.items() if count == 1)
    if kind == LABEL and len(counts) < 2:
        raise ValueError(f"All {len(found)} texts have the label {found[0]!r}; a classifier needs at least two labels.")
    if kind != ENTITIES and len(once) > len(found) / 2:
        raise ValueError(
            f"{len(once)} of {len(found)} texts have a label that no other text has, such as {once[0]!r:.40}. Are these ids or "
            "free text? Choose another column, or give at least two texts for each label."
        )
    shown = ", ".join(once[:5]) + (", …" if len(once) > 5 else "")
    note = f"{len(once)} labels occur once ({shown}): they were learned, and their quality is not known."
    return sorted(counts) if labels is None else list(labels), [note] if once else []


def labels_of(kind: str, target: Any) -> list[str]:
    """Returns the names in the label of one text."""
    if kind == ENTITIES:
        return [label for _, _, label in target]
    return {LABEL: [target], LABELS: target, NUMBER: []}[kind]


def check_spans(text: str, spans: list[Any]) -> list[tuple[int, int, str]]:
    """Returns a text's entities in their order, without spaces at their ends."""
    found = []
    for start, end, label in spans:
        inside = type(start) is type(end) is int and 0 <= start < end <= len(text)
        if not inside or not (marked := text[start:end]).strip():
            raise ValueError(f"The entity {(start, end, label)} lies outside the text {text!r:.60} or marks no word of it.")
        found.append((end - len(marked.lstrip()), start + len(marked.rstrip()), label))
    for first, second in pairwise(sorted(found)):
        if second[0] < first[1]:
            raise ValueError(f"The entities {first} and {second} of {text!r:.60} overlap; keep one of them.")
    return sorted(found)


def held_out(examples: Examples, seed: int) -> list[np.ndarray]:
    """Returns, for each part to hold out in turn, bool [N]; none if nothing can be held out.

    Rows of the same text stay together, parts have like shares of each label, and a label's only text is never held out.
    """
    rng, groups = np.random.default_rng(seed), np.zeros(len(examples.texts), dtype=int)
    if examples.kind == LABEL:
        groups[examples.rows] = examples.tensor().numpy()
    folds, dealt = np.full(len(groups), -1), 0
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        if len(members) > 1:
            folds[members] = (dealt + np.arange(len(members))) % FOLDS
            dealt += len(members)
    count = FOLDS if len(examples.rows) <= CROSS_VALIDATED and examples.kind != ENTITIES else 1
    return [mask for fold in range(count) if (mask := folds[examples.rows] == fold).any()]


# Scores


def score(kind: str, truth: list[Any], answers: list[Any]) -> Report:
    """Returns the metric of a kind of task, its score, and the pairs (label, answer, count) that are confused most often.

    That is accuracy, macro F1 over the labels that occur, R², or strict F1 of entities: both ends and the type are right.
    """
    if kind == NUMBER:
        expected = np.array(truth, dtype=float)
        errors, spread = ((answers - expected) ** 2).sum(), ((expected - expected.mean()) ** 2).sum()
        return {"metric": "r2", "score": float(1 - errors / max(spread, 1e-12))}
    pairs = list(zip(truth, answers, strict=True))
    if kind == LABEL:
        metric, value = "accuracy", float(np.mean([x == y for x, y in pairs]))
        confused = [(x, y) for x, y in pairs if x != y]
    else:
        metric, group = ("macro_f1", str) if kind == LABELS else ("entity_f1", lambda entity: "")  # one F1 for all entities
        said, hits = Counter(), Counter()
        for gold, found in pairs:
            said.update(map(group, [*gold, *found]))
            hits.update(group(x) for x in found if x in gold)
        occurs = {group(x) for gold in truth for x in gold} or {""}
        value = sum(2 * hits[x] / max(1, said[x]) for x in occurs) / len(occurs)
        if kind == LABELS:
            return {"metric": metric, "score": value}
        confused = []
        for gold, found in pairs:
            for start, end, label in gold:
                answer = next((y[2] for y in found if y[0] < end and start < y[1]), "O")
                confused += [(label, answer)] if answer != label else []
    most = Counter(sorted(confused)).most_common(3)
    return {"metric": metric, "score": value, "confusions": [(*pair, count) for pair, count in most]}


# What the head reads


def read(annotator: Any, name: str, texts: list[str], progress: bool) -> Iterable[list[Window]]:
    """Yields each text's windows with what head `name` gives, as `logits[name]`."""
    found = (windows for chunk in text_chunks(texts) for windows in annotator.read(chunk, [name]))
    return tqdm(found, desc="reading", unit=" texts", total=len(texts), disable=not progress)


def read_pooled(annotator: Any, name: str, texts: list[str], progress: bool, width: int) -> np.ndarray:
    """Returns what text head `name` gives, float32 [texts, width], of long texts the mean over their windows."""
    found = np.empty((len(texts), width), dtype=np.float32)
    if found.nbytes > MUCH_MEMORY:
        size = f"{found.nbytes / 1e9:.1f} GB"
        logger.warning(f"The features of {len(texts):,} texts take {size} of memory, and fitting three times as much.")
    for row, windows in enumerate(read(annotator, name, texts, progress)):
        found[row] = mean_over_windows(windows, [window.logits[name] for window in windows])
    return found


# Heads for texts


def fit_linear(kind: str, inputs: Tensor, targets: Tensor, strength: float, start: list[Tensor]) -> list[Tensor]:
    """Returns weight [C, H] and bias [C] by L-BFGS from where they start, for inputs, float [N, H]."""
    parameters = [x.clone().requires_grad_() for x in start]
    weight, bias = parameters
    losses = {
        LABEL: F.cross_entropy,
        LABELS: lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(logits),
        NUMBER: F.mse_loss,
    }
    optimizer = torch.optim.LBFGS(parameters, max_iter=MOST_ITERATIONS, tolerance_change=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses[kind](inputs @ weight.T + bias, targets) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return [x.detach() for x in parameters]


def choose(
    kind: str, inputs: Tensor, rows: Tensor, targets: Tensor, start: list[Tensor], masks: list[np.ndarray], progress: bool
) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns the best strength; and at that strength the logits of the rows held out, float [M, C], and which they are.

    It starts from the strongest penalty and ends where a weaker one no longer helps.
    """
    if not masks:
        return USUAL_STRENGTH, np.zeros((0, len(start[1]))), np.zeros(0, dtype=int)
    rng = np.random.default_rng(0)
    kept = [rng.permutation(np.flatnonzero(~mask))[:MOST_CHOSEN_ON] for mask in masks]
    out = [np.flatnonzero(mask) for mask in masks]
    held, fitted = np.concatenate(out), [start] * len(masks)
    truth, best, least = targets[held].numpy(), (USUAL_STRENGTH, np.zeros(0)), math.inf
    for strength in tqdm(STRENGTHS, desc="choosing the regularization", disable=not progress):
        fitted = [fit_linear(kind, inputs[rows[x]], targets[x], strength, y) for x, y in zip(kept, fitted, strict=True)]
        logits = np.concatenate([inputs[rows[x]] @ w.T + b for x, (w, b) in zip(out, fitted, strict=True)])
        temperature = 1.0 if kind == NUMBER else fit_temperature(logits, truth)
        loss = ((logits - truth) ** 2).mean() if kind == NUMBER else negative_log_likelihood(logits / temperature, truth)
        if loss >= least:
            break
        best, least = (strength, logits), loss
    return *best, held


def learn_texts(
    examples: Examples, features: np.ndarray, seed: int, progress: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any], Report]:
    """Returns weight [C, H] and bias [C] for the texts' features, float32 [texts, H], the fitted fields, and what to report."""
    kind, rows, targets = examples.kind, torch.from_numpy(examples.rows), examples.tensor()
    inputs = torch.from_numpy(features)
    center, scale = inputs.mean(dim=0), inputs.std(dim=0, correction=0).square().mean().sqrt().clamp(min=1e-9)
    inputs = (inputs - center) / scale  # one scale for all, so that directions keep their weight
    middle, spread = (targets.mean(), targets.std()) if kind == NUMBER else (0.0, 1.0)
    targets = (targets - middle) / spread if kind == NUMBER else targets
    start = [inputs.new_zeros(len(examples.labels), inputs.shape[1]), inputs.new_zeros(len(examples.labels))]
    strength, logits, out = choose(kind, inputs, rows, targets, start, held_out(examples, seed), progress)
    fields: dict[str, Any] = {}
    report: Report = {"score": None, "held_out": len(out), "regularization": strength}
    if len(out):
        fields, answers = calibrate(examples, logits * float(spread) + float(middle), targets[out].numpy())
        report |= score(kind, [examples.targets[i] for i in out], answers)
    weight, bias = fit_linear(kind, inputs[rows], targets, strength, start)
    weight = weight / scale * spread
    return {"weight": weight, "bias": bias * spread + middle - weight @ center}, fields, report


def calibrate(examples: Examples, logits: np.ndarray, truth: np.ndarray) -> tuple[dict[str, Any], list[Any]]:
    """Returns the spec's fields that rows held out decide, and what is answered for these rows.

    For the answers, the thresholds of each half of the rows are fitted on the other half.
    """
    names = np.array(examples.labels)
    if examples.kind == NUMBER:
        return {}, logits[:, 0].tolist()
    temperature = fit_temperature(logits, truth)
    if examples.kind == LABEL:
        return {"temperature": temperature}, names[logits.argmax(axis=1)].tolist()
    probabilities, half = 1 / (1 + np.exp(-logits / temperature)), np.arange(len(logits)) % 2 == 0
    limits = np.empty(logits.shape)
    for part in (half, ~half):
        limits[part] = fit_thresholds(probabilities[~part], truth[~part])
    fields = {"temperature": temperature, "thresholds": fit_thresholds(probabilities, truth)}
    return fields, [names[row].tolist() for row in probabilities >= limits]


# Heads for words

# A window, what the head reads of its words, float [W, H], and their tags, int [W].
Words = tuple[Window, np.ndarray, Tensor]


def word_tags(window: Window, spans: list[tuple[int, int, str]], tags: list[str]) -> Tensor:
    """Returns the tag of each word of a window, int [W]: `B-` where an entity starts, `I-` on its further words."""
    ids = torch.zeros(len(window.words), dtype=torch.long)  # "O"
    for word, (_, (start, end)) in enumerate(window.words):
        for first, last, label in spans:
            if start < last and first < end:
                ids[word] = tags.index(("B-" if start <= first else "I-") + label)
    return ids


def word_logits(head: Any, data: list[Words], casing_dropout: float = 0.0) -> Tensor:
    """Returns the logits of all words of some windows, float [words, C], by the head's own forward pass."""
    inputs = {name: torch.from_numpy(x) for name, x in pad_windows([window for window, _, _ in data], 0).items()}
    casings = inputs["casing_ids"] * (torch.rand(len(data), 1) >= casing_dropout)
    hidden = torch.zeros(*casings.shape, data[0][1].shape[1])
    row = [i for i, (window, _, _) in enumerate(data) for _ in window.words]
    token = [first for window, _, _ in data for first, _ in window.words]
    hidden[row, token] = torch.from_numpy(np.concatenate([features for _, features, _ in data]))
    return head({"branch": hidden}, inputs["attention_mask"], casings, "mean")[row, token]


def train_words(
    model: Any, name: str, data: list[Words], out: list[Words], epochs: int, last: int, seed: int, progress: bool
) -> tuple[int, float]:
    """Gives the model a head trained for `last` epochs of a schedule of `epochs`; returns its epoch and temperature.

    Of windows held out, `out`, the epoch with the least loss decides; without any, it is the last, at a temperature of 1.
    """
    torch.default_generator.manual_seed(seed)  # the CPU's alone, where heads are trained
    head = model.new_head(model.config.task_specs[name])
    optimizer = torch.optim.AdamW(head.parameters(), lr=WORD_RATE)
    steps = epochs * math.ceil(len(data) / WORD_BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    least, best = math.inf, (last, 1.0, head.state_dict())
    for epoch in tqdm(range(1, last + 1), desc="training", unit=" epochs", disable=not progress):
        head.train()
        for rows in torch.randperm(len(data)).split(WORD_BATCH):
            batch = [data[i] for i in rows.tolist()]
            optimizer.zero_grad()
            F.cross_entropy(word_logits(head, batch, CASING_DROPOUT), torch.cat([tags for _, _, tags in batch])).backward()
            optimizer.step()
            schedule.step()
        if out:
            truth = torch.cat([tags for _, _, tags in out])
            with torch.no_grad():
                logits = torch.cat([word_logits(head.eval(), out[i : i + 64]) for i in range(0, len(out), 64)])
            if (loss := float(F.cross_entropy(logits, truth))) < least:
                temperature = fit_temperature(logits.numpy(), truth.numpy())
                least, best = loss, (epoch, temperature, copy.deepcopy(head.state_dict()))
    head.load_state_dict(best[2])
    install(model, name, head)
    return best[:2]


def learn_words(annotator: Any, name: str, examples: Examples, seed: int, progress: bool, epochs: int | None) -> Report:
    """Trains the head of a token task and returns what the report says of it.

    The fifth that is held out says after which epoch to stop; the head is then trained so far on all rows.
    """
    model, config, masks = annotator.model, annotator.model.config, held_out(examples, seed)
    tags, out = config.tasks[name]["labels"], masks[0] if masks else np.zeros(len(examples.rows), dtype=bool)
    windows = list(read(annotator, name, examples.texts, progress))
    parts: dict[bool, list[Words]] = {False: [], True: []}
    for text, spans, is_out in zip(examples.rows, examples.targets, out.tolist(), strict=True):
        parts[is_out] += [(x, x.logits[name], word_tags(x, spans, tags)) for x in windows[text] if x.words]
    enough = math.ceil(WORD_STEPS * WORD_BATCH / max(1, len(parts[False])))
    total = last = epochs or min(max(WORD_EPOCHS[0], enough), WORD_EPOCHS[1])
    report: Report = {"metric": "entity_f1", "score": None, "held_out": int(out.sum())}
    if parts[False] and parts[True]:
        last, temperature = train_words(model, name, parts[False], parts[True], total, total, seed, progress)
        asked = np.flatnonzero(out)
        records = annotator.stream([examples.texts[examples.rows[i]] for i in asked], [name], False)
        report |= score(ENTITIES, [examples.targets[i] for i in asked], [found_spans(x["entities"][name]) for x in records])
        config.set_tasks({**config.tasks, name: {**config.tasks[name], "temperature": temperature}})
    train_words(model, name, parts[False] + parts[True], [], total, last, seed, progress)
    return {**report, "epochs": last}


def found_spans(entities: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    """Returns the entities of a record as (start, end, type)."""
    return [(x["start"], x["end"], x["entity_group"]) for x in entities]


# The whole


def install(model: Any, name: str, head: Any) -> None:
    """Puts a head in its place, where and as the model's weights are."""
    model.heads[name] = head.to(device=model.device, dtype=model.dtype).train(model.training)


def add_task(
    annotator: Any,
    name: str,
    texts: Iterable[str],
    targets: Iterable[Any],
    labels: Sequence[str] | None,
    seed: int,
    progress: bool | None,
    refit: bool,
    epochs: int | None = None,
    **head: Any,
) -> Report:
    """Adds a task to the annotator's model and returns the report; see `MultiTaskPipeline.add_task`."""
    model, config = annotator.model, annotator.model.config
    if annotator.backend != "torch":
        raise ValueError(f"backend is {annotator.backend!r}; an export has the heads that it has. Add tasks with 'torch'.")
    if name in model.heads and not refit:
        raise ValueError(f"tasks has {name!r} already; pass refit=True to replace it, or choose another name.")
    progress = sys.stderr.isatty() if progress is None else progress
    examples = read_examples(name, texts, targets, labels)
    if epochs is not None and (examples.kind != ENTITIES or type(epochs) is not int or epochs < 1):
        raise ValueError(
            f"epochs is {epochs!r}; it is an integer of at least 1, for entities. Heads of texts are fitted without epochs."
        )
    spec = examples.spec(head, config.hidden_size, config.num_task_layers > 0)
    tasks, heads = config.tasks, dict(model.heads.items())
    try:
        with torch.random.fork_rng(devices=[]):  # random numbers outside stay as they are
            learned = _learn(annotator, name, examples, spec, seed, progress, epochs)
    except BaseException:
        config.tasks, model.heads = tasks, nn.ModuleDict(heads)
        raise
    return {"task": name, "kind": examples.kind, "labels": examples.labels, **examples.facts, **learned}


def _learn(
    annotator: Any, name: str, examples: Examples, spec: dict[str, Any], seed: int, progress: bool, epochs: int | None
) -> Report:
    """Reads the texts and gives the model a fitted head; returns what the report says of it."""
    model, config = annotator.model, annotator.model.config
    config.set_tasks({**config.tasks, name: spec})
    probe = model.new_head(config.task_specs[name])  # it gives what a head reads in place of logits
    probe.casing, probe.dense, probe.classifier = None, None, nn.Identity()
    model.heads[name] = probe.eval()
    if examples.kind == ENTITIES:
        return learn_words(annotator, name, examples, seed, progress, epochs)
    features = read_pooled(annotator, name, examples.texts, progress, len(READS[spec["reads"]]) * config.hidden_size)
    weights, fields, learned = learn_texts(examples, features, seed, progress)
    config.set_tasks({**config.tasks, name: {**spec, **fields}})
    fitted = model.new_head(config.task_specs[name])
    fitted.classifier.load_state_dict(weights)
    install(model, name, fitted)
    return learned
