"""Figures in documents: `<!-- = FILE KEY::KEY FORMAT -->0.780<!-- / -->` shows a value of results/FILE.json.

FILE may hold a "*": the value is then the mean over the matching files, such as the seeds of an experiment. KEY::KEY leads
through the file's objects and lists. FORMAT is a format specification of Python, ".3f" if left out; "/1e6" after it divides first.
A file that does not exist yet shows as `MISSING`.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

MISSING = "not measured yet"
_FORMAT = re.compile(r"(?P<keys>.*?)(?: (?P<spec>[+,]*(?:\.\d+)?[df%])(?:/(?P<unit>[\d.e]+))?)?")
FIGURE = re.compile(r"((?<!`)<!-- = (?P<file>\S+) (?P<value>.*?) -->).*?(<!-- / -->)", re.DOTALL)


def render_figures(text: str, folder: Path) -> str:
    """Returns a document with the values of its placeholders read again from a folder's results/.

    Raises:
        ValueError: A placeholder names a key that its file does not hold, or a value that is no number.
    """
    return FIGURE.sub(lambda found: found[1] + _figure(found["file"], found["value"], folder) + found[4], text)


def _figure(file: str, described: str, folder: Path) -> str:
    form = _FORMAT.fullmatch(described)
    assert form  # matches any text
    paths = sorted((folder / "results").glob(f"{file}.json"))
    if not paths:
        return MISSING
    values = [_lookup(json.loads(path.read_text("utf-8")), form["keys"], path.relative_to(folder)) for path in paths]
    return f"{statistics.mean(values) / float(form['unit'] or 1):{form['spec'] or '.3f'}}".replace("-", "−")


def _lookup(value: Any, keys: str, path: Path) -> float:
    for key in keys.split("::"):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            known = ", ".join(value) if isinstance(value, dict) else f"{type(value).__name__}"
            raise ValueError(f"{path} holds no {key!r} of {keys!r}; there it holds: {known}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{keys!r} of {path} is {value!r}; a figure must be a number")
    return value
