"""Adds your own classifier to all-MiniLM-L6-v2 vectors that you already have: a few labelled texts label the whole index.

    python examples/label_your_vectors.py

The head reads the encoder's vector alone, so that on stored vectors it is one matrix product. No stored text is read again.
"""

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import pipeline

MODEL = "."  # a clone, or a Hub id
LABELLED = {
    "alarm": ["Wake me at seven", "Set an alarm for noon", "Remind me in ten minutes", "Start a timer"],
    "weather": ["Is it raining?", "How cold is it outside?", "Will it snow in Oslo?", "Do I need an umbrella?"],
    "music": ["Play some jazz", "Skip this song", "Turn the volume up", "Who sings this?"],
}
STORED = ["Ring me up at dawn", "Any storms on Sunday?", "Put on the new album"]


def stored_vectors() -> np.ndarray:
    """Returns your index, float32 [N, 384] of unit length; computed here as all-MiniLM-L6-v2 computes it."""
    encoder = SentenceTransformer(MODEL)
    del encoder[2]  # the projection: what remains is all-MiniLM-L6-v2
    return encoder.encode(STORED)


def main() -> None:
    annotate = pipeline("multitask", model=MODEL, trust_remote_code=True)
    texts = [text for group in LABELLED.values() for text in group]
    labels = [label for label, group in LABELLED.items() for _ in group]
    report = annotate.add_task("intent", texts, labels, reads="encoder")
    print(f"accuracy {report['score']:.2f} on {report['held_out']} texts, each held out in turn")

    head = annotate.model.heads["intent"].classifier
    logits = stored_vectors() @ head.weight.detach().numpy().T + head.bias.detach().numpy()  # [N, labels]
    for text, row in zip(STORED, logits, strict=True):
        print(f"{report['labels'][row.argmax()]:8} {text}")
    same = [record["labels"]["intent"]["label"] for record in annotate(STORED, tasks=["intent"], embedding=False)]
    assert same == [report["labels"][row.argmax()] for row in logits], "the pipeline answers the same"


if __name__ == "__main__":
    main()
