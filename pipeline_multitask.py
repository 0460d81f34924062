"""stub"""
import unicodedata
from collections.abc import Sequence

Span = tuple[int, int]

def _joins_words(character: str) -> bool:
    return character.isalnum() or character == "_" or bool(unicodedata.combining(character))


def word_starts(text: str, offsets: Sequence[Span], word_ids: Sequence[int | None]) -> tuple[list[Span], list[bool]]:
    """Returns each token's character span without surrounding spaces, and whether a new word starts there.

    A word ends where the tokenizer's does, and also around punctuation and symbols, so that "Paris." is two words
    whichever tokenizer made the tokens. Special tokens start no word, nor do pieces of a single character.
    """
    spans: list[Span] = []
    starts: list[bool] = []
    previous_word, previous_end = None, -1
    for (start, end), word in zip(offsets, word_ids, strict=True):
        while start < end and text[start].isspace():
            start += 1
        spans.append((start, end))
        if word is None or start >= end:
            starts.append(False)
            continue
        new = word != previous_word or not (_joins_words(text[start]) and _joins_words(text[start - 1]))
        starts.append(new and start >= previous_end)
        previous_word, previous_end = word, max(end, previous_end)
    return spans, starts
