"""Trains a multi-task sentence transformer: `python -m training.train training/recipes/release.toml --output runs/release`.

Every step is one batch of one task; tasks share the encoder. Next to the tasks' own losses, every text is held near
the embedding that the starting encoder gave it.
"""

import argparse
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from configuration_multitask import SEQUENCE, TOKEN, MultiTaskConfig
from modeling_multitask import IGNORE_INDEX, MultiTaskModel, pool
from training.data import (
    Example,
    class_names,
    load_task_split,
    pad,
    pad_batch,
    pair_examples,
    sequence_examples,
    token_examples,
)
from training.recipe import FROZEN_PARTS, PAIRS, Recipe, RecipeError, TaskRecipe, TrainingRecipe


def load_examples(task: TaskRecipe, split: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], list[str]]:
    """Returns one task's tokenized examples and its label names (none for scored pairs)."""
    data = load_task_split(task, split)
    if task.kind == PAIRS:
        return pair_examples(data, task.text_columns, task.label_column, tokenizer), []
    labels = class_names(data, task.label_column)
    make = sequence_examples if task.kind == SEQUENCE else token_examples
    return make(data, task.text_columns[0], task.label_column, labels, tokenizer), labels


def new_model(recipe: Recipe, labels: dict[str, list[str]]) -> tuple[MultiTaskModel, Any]:
    """Returns a model whose encoder has the pretrained weights and whose heads are random, and the pretrained encoder."""
    encoder = AutoModel.from_pretrained(recipe.model.encoder, dtype=torch.float32)
    specs = {
        name: {"kind": task.kind, "labels": labels[name], **task.head}
        for name, task in recipe.tasks.items()
        if task.kind != PAIRS
    }
    fields = {name: value for name, value in encoder.config.to_dict().items() if name not in ("tasks", "architectures")}
    options = {"pooling_mode": recipe.model.pooling_mode, "embedding_dim": recipe.model.embedding_dim, "tasks": specs}
    model = MultiTaskModel(MultiTaskConfig(**{**fields, **options}))
    model.encoder.load_state_dict(encoder.state_dict())
    return model, encoder.eval()


@torch.inference_mode()
def encode(encoder: Any, rows: list[list[int]], pooling_mode: str, pad_token_id: int, batch_size: int = 64) -> Tensor:
    """Returns the encoder's pooled vectors of tokenized texts, float [len(rows), H], in the order of `rows`."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    vectors = torch.empty(len(rows), encoder.config.hidden_size)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = {name: x.to(encoder.device) for name, x in pad_batch([rows[i] for i in chosen], pad_token_id).items()}
        hidden = encoder(**inputs).last_hidden_state
        vectors[chosen] = pool(hidden, inputs["attention_mask"], pooling_mode).float().cpu()
    return vectors


def principal_components(vectors: Tensor, count: int) -> Tensor:
    """Returns the first principal axes of unit-length `vectors`, float [count, H], rows orthonormal."""
    _, _, axes = torch.linalg.svd(F.normalize(vectors, dim=-1), full_matrices=False)
    return axes[:count].contiguous()


def freeze(model: MultiTaskModel, part: str) -> None:
    """Excludes a part of the encoder (one of `FROZEN_PARTS`) from training."""
    parts = dict(zip(FROZEN_PARTS, ([], [model.get_input_embeddings()], [model.encoder]), strict=True))
    for module in parts[part]:
        module.requires_grad_(False)


def new_optimizer(model: MultiTaskModel, options: TrainingRecipe) -> torch.optim.AdamW:
    """Returns AdamW whose heads learn faster than what is pretrained; vectors (biases, norms) do not decay."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("heads."), parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        {
            "params": parameters,
            "lr": options.head_learning_rate if in_head else options.learning_rate,
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (in_head, decays), parameters in groups.items()
    )


class TaskBatches(Dataset):
    """All batches of a run, each of one task and of texts of like length; the Trainer shuffles them.

    Args:
        tasks: The recipe's tasks.
        examples: Each task's tokenized examples, with their `target` vectors.
        pad_token_id: Fills up shorter rows.
        seed: Decides which examples share a batch.
    """

    def __init__(
        self, tasks: dict[str, TaskRecipe], examples: dict[str, list[Example]], pad_token_id: int, seed: int
    ) -> None:
        self.tasks, self.examples, self.pad_token_id = tasks, examples, pad_token_id
        shuffler = random.Random(seed)
        self.batches = [
            (name, rows)
            for name, task in tasks.items()
            for _ in range(task.epochs)
            for rows in _group(examples[name], task.batch_size, shuffler)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, rows = self.batches[index]
        kind, examples = self.tasks[name].kind, [self.examples[name][row] for row in rows]
        targets = torch.stack([example["target"] for example in examples])
        if kind == PAIRS:  # all first texts, then all second ones
            ids = [example["input_ids"][side] for side in (0, 1) for example in examples]
            targets = targets.transpose(0, 1).flatten(0, 1)
        else:
            ids = [example["input_ids"] for example in examples]
        labels = [example["labels"] for example in examples]
        return {
            "task": name,
            "labels": pad(labels, IGNORE_INDEX) if kind == TOKEN else torch.tensor(labels),
            "target": targets,
            **pad_batch(ids, self.pad_token_id),
        }


def _group(examples: list[Example], size: int, shuffler: random.Random) -> list[list[int]]:
    """Splits a shuffled epoch into pools of fifty batches, and each pool by length, so that little is padded."""

    def length(row: int) -> int:
        text = examples[row]["text"]
        return len(text) if isinstance(text, str) else sum(map(len, text))

    order = shuffler.sample(range(len(examples)), len(examples))
    pools = [sorted(order[i : i + 50 * size], key=length) for i in range(0, len(order), 50 * size)]
    return [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]


class MultiTaskTrainer(Trainer):
    """A Trainer whose every batch is of one task.

    Args:
        preserve_weight: Factor of the embedding-preserving loss, the mean cosine distance between a text's pooled
            vector and the starting encoder's.
        prefix_dims: Lengths of the embedding's prefixes that the pair loss trains too (Kusupati et al. 2022,
            Matryoshka representation learning).
    """

    def __init__(self, *args: Any, preserve_weight: float, prefix_dims: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preserve_weight, self.prefix_dims = preserve_weight, prefix_dims
        self.cosent = CoSENTLoss(model=None)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        task, labels, target = inputs.pop("task"), inputs.pop("labels"), inputs.pop("target")
        heads = [task] if task in model.config.tasks else []
        out = model(**inputs, tasks=heads, labels=dict.fromkeys(heads, labels))
        pooled = pool(out.last_hidden_state, inputs["attention_mask"], model.config.pooling_mode)
        loss = out.loss if heads else self._pair_loss(pooled, out.sentence_embedding, labels)
        drift = 1 - F.cosine_similarity(pooled, target).mean()
        self._sums = getattr(self, "_sums", {})
        for name, value in ((task, loss), ("drift", drift)):
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.item(), count + 1)
        loss = loss + self.preserve_weight * drift
        return (loss, out) if return_outputs else loss

    def _pair_loss(self, pooled: Tensor, embedding: Tensor, scores: Tensor) -> Tensor:
        """CoSENT on the encoder's own vector, on the embedding and on its prefixes."""
        views = [pooled, embedding, *(embedding[:, :dim] for dim in self.prefix_dims)]
        losses = [self.cosent.compute_loss_from_embeddings(list(view.chunk(2)), scores) for view in views]
        return torch.stack(losses).mean()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds each task's mean loss since the last report."""
        means = {f"loss_{name}": total / count for name, (total, count) in getattr(self, "_sums", {}).items()}
        self._sums = {}
        super().log({**logs, **means}, *args, **kwargs)


def add_targets(
    tasks: dict[str, TaskRecipe], examples: dict[str, list[Example]], encoder: Any, model: MultiTaskModel, pad_token_id: int
) -> Tensor:
    """Stores with every example the starting encoder's vector of its text; returns all vectors, float [N, H]."""
    everything = []
    for name, task in tasks.items():
        sides = 2 if task.kind == PAIRS else 1
        rows = [ids for x in examples[name] for ids in (x["input_ids"] if sides == 2 else [x["input_ids"]])]
        vectors = encode(encoder, rows, model.config.pooling_mode, pad_token_id)
        for example, target in zip(examples[name], vectors.view(-1, sides, vectors.shape[1]), strict=True):
            example["target"] = target if sides == 2 else target[0]
        everything.append(vectors)
    return torch.cat(everything)


def training_arguments(output: Path, options: TrainingRecipe) -> TrainingArguments:
    """Returns the Trainer's settings; rates are in the optimizer, batches and epochs in `TaskBatches`."""
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=1,  # one item of TaskBatches is a whole batch
        num_train_epochs=1,
        warmup_steps=options.warmup_ratio,
        seed=options.seed,
        logging_steps=50,
        save_steps=500,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the trained model")
    parser.add_argument(
        "--data", type=Path, help="folder with local copies of the data sets, under the recipe's `folder` names"
    )
    parser.add_argument("--encoder", help="folder or Hub id to start from instead of the recipe's")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in the output folder")
    args = parser.parse_args()
    try:
        recipe = Recipe.read(args.recipe, args.data, args.encoder)
    except RecipeError as error:
        sys.exit(str(error))
    options = recipe.training
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.encoder, model_max_length=recipe.model.max_length)
    loaded = {name: load_examples(task, "train", tokenizer) for name, task in recipe.tasks.items()}
    examples = {name: found for name, (found, _) in loaded.items()}
    model, encoder = new_model(recipe, {name: labels for name, (_, labels) in loaded.items()})
    encoder.to(training_arguments(args.output, options).device)
    vectors = add_targets(recipe.tasks, examples, encoder, model, tokenizer.pad_token_id)
    batches = TaskBatches(recipe.tasks, examples, tokenizer.pad_token_id, options.seed)
    if model.linear is not None:
        model.linear.weight.data.copy_(principal_components(vectors, model.config.embedding_dim))
    freeze(model, options.freeze)
    trainer = MultiTaskTrainer(
        model=model,
        args=training_arguments(args.output, options),
        train_dataset=batches,
        data_collator=lambda items: items[0],
        processing_class=tokenizer,
        optimizers=(new_optimizer(model, options), None),
        preserve_weight=options.preserve_weight,
        prefix_dims=recipe.model.prefix_dims,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model(str(args.output / "final"))
    Path(args.output, "final", "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=2))


if __name__ == "__main__":
    main()
