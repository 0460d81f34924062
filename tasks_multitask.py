"""What a task of the model is: the kinds of heads, their labels and options, checked. Neither PyTorch nor transformers is needed."""

import copy
import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEQUENCE = "sequence_classification"
TOKEN = "token_classification"
KINDS = (SEQUENCE, TOKEN)
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# How a word is written, which an uncased tokenizer does not see. The first stands where it is not known.
CASINGS = ("unknown", "lower", "title", "upper", "capital", "mixed", "digits", "punctuation")
READS = {"branch": ("branch",), "encoder": ("encoder",), "both": ("branch", "encoder")}
POOLING_MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Far above any real encoder: a broken file must not make Python build layers for hours, or fill the memory.
GREATEST_DIM = 65_536


def is_number(value: object) -> bool:
    """Returns whether `value` is a finite int or float, no bool and not too great for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_width(value: object) -> bool:
    """Returns whether `value` is None or a sensible dimension."""
    return value is None or (type(value) is int and 0 < value <= GREATEST_DIM)


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """Raises a ValueError that names the field, its value and what is allowed, unless the condition holds."""
    if not holds:
        raise ValueError(f"{field} is {value!r}; allowed: {allowed}.")


def sha256(path: str | Path) -> str:
    """Returns the hexadecimal SHA-256 digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One head: what it predicts and how it is built. Checked on construction.

    A model builds its heads when it is made: a field changed later in `config.tasks` acts after saving and loading.

    Attributes:
        kind: `"sequence_classification"` (one answer per text) or `"token_classification"` (one label per word).
        labels: Label names in the order of the logits. Token labels with `B-`/`I-` prefixes form a BIO scheme and
            need an `"O"` and a `B-` label for each type. For regression: the names of the values predicted.
        problem_type: Sequence tasks only: `"single_label_classification"` (default), `"multi_label_classification"`
            or `"regression"`.
        classifier_dropout: Dropout before the classifier in training, in [0, 1).
        hidden_dim: Width of a hidden layer (GELU) before the classifier; None for a linear head.
        pooling_mode: Sequence tasks only: how this head pools token vectors; None: as the sentence embedding does.
        reads: Sequence tasks only: what this head pools: `"branch"` (default; the encoder, where there is no task branch), or
            the vectors of unit length of `"encoder"` (`encoder_embedding`) or of `"both"`, one after the other.
        casing_dim: Token tasks only: dimension of a learned vector for how each word and its neighbours are written
            (`CASINGS`), which the head reads beside the token vectors; None: no casing features in this head.
        temperature: Positive number by which the logits are divided (Guo et al. 2017); 1 changes nothing.
        thresholds: Multi-label only: probability in [0, 1] from which each label counts as present; None: 0.5.
        fallback: Multi-label only: the label to answer when none reaches its threshold; None: an empty list.

    Raises:
        ValueError: A field has the wrong type or value; the message names it and what is allowed.
    """

    kind: str
    labels: list[str]
    problem_type: str | None = None
    classifier_dropout: float = 0.1
    hidden_dim: int | None = None
    pooling_mode: str | None = None
    reads: str = "branch"
    casing_dim: int | None = None
    temperature: float = 1.0
    thresholds: list[float] | None = None
    fallback: str | None = None

    def __post_init__(self) -> None:
        self._require(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}")
        if self.kind == SEQUENCE and self.problem_type is None:
            object.__setattr__(self, "problem_type", PROBLEM_TYPES[0])
        self._check_labels()
        self._check_problem_type()
        dropout = self.classifier_dropout
        self._require(is_number(dropout) and 0 <= dropout < 1, "classifier_dropout", "a number in [0, 1)")
        for field in ("hidden_dim", "casing_dim"):
            self._require(is_width(getattr(self, field)), field, f"null or an integer from 1 to {GREATEST_DIM}")
        self._require(self.casing_dim is None or self.kind == TOKEN, "casing_dim", f"null for a {SEQUENCE} task")
        modes = (None, *POOLING_MODES) if self.kind == SEQUENCE else (None,)
        self._require(self.pooling_mode in modes, "pooling_mode", f"null, or for a text {', '.join(POOLING_MODES)}")
        allowed = READS if self.kind == SEQUENCE else ["branch"]
        self._require(self.reads in list(allowed), "reads", " or ".join(allowed))
        self._require(is_number(self.temperature) and self.temperature > 0, "temperature", "a positive number")

    @property
    def is_bio(self) -> bool:
        """Whether the labels tag entities in the BIO scheme, that is, whether any starts with `B-` or `I-`."""
        return self.kind == TOKEN and any(label.startswith(("B-", "I-")) for label in self.labels)

    @classmethod
    def from_dict(cls, name: str, fields: Any) -> "TaskSpec":
        """Returns the checked spec of task `name` from its JSON object; errors start with `tasks.<name>`."""
        if not isinstance(fields, dict):
            raise ValueError(f"tasks.{name} is {fields!r}; it must be an object with at least 'kind' and 'labels'.")
        fields = {key: value for key, value in fields.items() if key != "loss_weight"}  # which earlier releases stored
        known = list(cls.__dataclass_fields__)
        if unknown := sorted(set(fields) - set(known), key=str):
            raise ValueError(f"tasks.{name} has unknown fields {unknown}; known fields: {', '.join(known)}.")
        if missing := [field for field in ("kind", "labels") if field not in fields]:
            raise ValueError(f"tasks.{name} lacks the fields {missing}.")
        try:
            return cls(**copy.deepcopy(fields))
        except ValueError as error:
            raise ValueError(f"tasks.{name}.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form: the fields that differ from their defaults, and always `kind` and `labels`."""
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    def _require(self, holds: bool, field: str, allowed: str) -> None:
        require(holds, field, getattr(self, field), allowed)

    def _check_labels(self) -> None:
        labels = self.labels
        well_formed = isinstance(labels, list) and labels and all(isinstance(x, str) and x for x in labels)
        self._require(bool(well_formed), "labels", "a non-empty list of non-empty strings")
        self._require(len(set(labels)) == len(labels), "labels", "a list without duplicates")
        if self.is_bio:
            is_scheme = "O" in labels and all(x == "O" or x.startswith(("B-", "I-")) for x in labels)
            self._require(is_scheme, "labels", "in a BIO scheme only 'O', 'B-<type>' and 'I-<type>', 'O' among them")
            have_begin = all("B-" + x[2:] in labels for x in labels if x.startswith("I-"))
            allowed = "in a BIO scheme a 'B-<type>' for every 'I-<type>' (convert IO or IOB1 tags to BIO first)"
            self._require(have_begin, "labels", allowed)

    def _check_problem_type(self) -> None:
        if self.kind == TOKEN:
            self._require(self.problem_type is None, "problem_type", "null for a token_classification task")
        else:
            self._require(self.problem_type in PROBLEM_TYPES, "problem_type", f"one of {', '.join(PROBLEM_TYPES)}")
        if self.problem_type == PROBLEM_TYPES[0] or self.kind == TOKEN:
            self._require(len(self.labels) > 1, "labels", "at least two labels, since one of them is chosen")
        several = self.problem_type == PROBLEM_TYPES[1]
        allowed = f"null, or for {PROBLEM_TYPES[1]} one of the labels"
        self._require(self.fallback is None or (several and self.fallback in self.labels), "fallback", allowed)
        if (values := self.thresholds) is not None:
            well_formed = isinstance(values, list) and all(is_number(x) and 0 <= x <= 1 for x in values)
            allowed = f"null, or for {PROBLEM_TYPES[1]} a list of {len(self.labels)} numbers in [0, 1]"
            self._require(several and well_formed and len(values) == len(self.labels), "thresholds", allowed)
