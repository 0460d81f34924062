"""Objectives: the loss of each kind of task, the loss that keeps the embedding, and how losses are weighed."""

from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from torch import Tensor, nn

from common.data import fold_unsaid
from common.recipe import Recipe, TaskRecipe
from learning_multitask import CASING_DROPOUT
from modeling_multitask import IGNORE_INDEX, MultiTaskModel, MultiTaskOutput, pool, task_loss
from tasks_multitask import TaskSpec
from training.sampler import Stream

EFFECTIVE_NUMBER_BETA = 0.999


def class_weights(counts: Tensor, method: str) -> Tensor:
    """Returns a weight per class whose mean over the examples is 1.

    Args:
        counts: int [C], how often each class occurs in training.
        method: "inverse_frequency", or "effective_number", a milder form of it (Cui et al. 2019, Class-balanced
            loss based on effective number of samples).
    """
    counts = counts.float()
    seen = counts.clamp(min=1)
    amount = seen if method == "inverse_frequency" else (1 - EFFECTIVE_NUMBER_BETA**seen) / (1 - EFFECTIVE_NUMBER_BETA)
    weights = counts.sum() / (counts / amount).sum().clamp(min=1e-9) / amount
    return torch.where(counts > 0, weights, 1.0)  # what was never seen has no frequency to weigh by


def label_counts(spec: TaskSpec, labels: list[Any]) -> Tensor:
    """Returns how often each class occurs, float [C], in the labels of a task's examples."""
    flat = torch.cat([torch.as_tensor(x, dtype=torch.float32).reshape(-1) for x in labels])
    if spec.problem_type == "multi_label_classification":
        return flat.view(-1, len(spec.labels)).clamp(min=0).sum(dim=0)
    return torch.bincount(flat[flat != IGNORE_INDEX].long(), minlength=len(spec.labels)).float()


def classification_loss(spec: TaskSpec, logits: Tensor, labels: Tensor, task: TaskRecipe, weights: Tensor | None) -> Tensor:
    """Returns the mean loss over the labels that are not -100; zero (with a graph) if there are none.

    Without class weights and focal exponent this is the model's own `task_loss`.

    Args:
        spec: The head.
        logits: float [B, C] or [B, T, C].
        labels: As for `task_loss`.
        task: Gives `focal_gamma` (Lin et al. 2017, Focal loss for dense object detection) and the unsaid entities.
        weights: float [C], a factor per class; for multi-label tasks of each class's presence.
    """
    logits = fold_unsaid(logits.float(), task, spec.labels)
    if weights is None and not task.focal_gamma:
        return task_loss(spec, logits, labels)
    kept = labels != IGNORE_INDEX
    if spec.problem_type == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none", pos_weight=weights)
        certainty = torch.where(labels > 0.5, logits, -logits).sigmoid()
    else:
        classes = labels.clamp(min=0).long()
        losses = F.cross_entropy(logits.flatten(0, -2), classes.flatten(), weights, reduction="none").view_as(classes)
        certainty = logits.softmax(dim=-1).gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    if task.focal_gamma:  # at a certainty of 1 the slope of a root would be infinite
        losses = losses * (1 - certainty).clamp(min=1e-6) ** task.focal_gamma
    return losses.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)


def embedding_loss(views: list[Tensor], scores: Tensor) -> Tensor:
    """Returns the mean over several views of the same texts of the pairs' CoSENT loss.

    Args:
        views: Vectors float [2 B, D], all first texts, then all second ones.
        scores: float [B].
    """
    loss = CoSENTLoss(model=None)
    return torch.stack([loss.compute_loss_from_embeddings(list(view.chunk(2)), scores) for view in views]).mean()


def preserve_loss(pooled: Tensor, embedding: Tensor, target: Tensor, mode: str) -> Tensor:
    """Returns how far a batch's vectors are from the teacher's, float [] of at least 0.

    Args:
        pooled: float [N, H], the encoder's own vectors.
        embedding: float [N, E], the sentence embeddings, unit length.
        target: float [N, D], the teacher's vectors; any D for "similarity".
        mode: "cosine": one minus the cosine to the teacher's vector, of the pooled vector or, where that has not its width,
            of the embedding; "similarity": squared differences between the embeddings' similarities to each other and the
            teacher's (Park et al. 2019, Relational knowledge distillation), times ten to be of like size; "both": the sum.
    """
    loss = pooled.new_zeros(())
    if mode in ("cosine", "both"):
        loss = loss + 1 - F.cosine_similarity(pooled if target.shape[1] == pooled.shape[1] else embedding, target).mean()
    if mode in ("similarity", "both"):
        theirs = F.normalize(target.float(), dim=-1)
        loss = loss + 10 * ((embedding.float() @ embedding.float().T - theirs @ theirs.T) ** 2).mean()
    return loss


class LossWeights(nn.Module):
    """The factor of each task's loss, by the recipe's tasks and its `losses.weighting`."""

    def __init__(self, tasks: dict[str, TaskRecipe], weighting: str) -> None:
        super().__init__()
        self.fixed = {name: task.loss_weight for name, task in tasks.items()}
        self.log_variances = None
        if weighting == "uncertainty":
            self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in tasks})

    def forward(self, task: str, loss: Tensor) -> Tensor:
        """Returns the weighted loss; with learned uncertainties, their own cost is part of it."""
        loss = self.fixed[task] * loss
        if self.log_variances is None:
            return loss
        # Kendall et al. 2018, Multi-task learning using uncertainty to weigh losses: loss / variance + log(deviation)
        log_variance = self.log_variances[task]
        return loss * torch.exp(-log_variance) + log_variance / 2


class Objective:
    """The loss of a batch, whichever of a run's data sets it is of; `specs` are the model's heads."""

    def __init__(self, streams: dict[str, Stream], recipe: Recipe, specs: dict[str, TaskSpec]) -> None:
        self.tasks = {name: x.tasks for name, x in streams.items()}
        self.losses, self.matryoshka_dims = recipe.losses, recipe.model.matryoshka_dims
        self.loss_weights = LossWeights(recipe.tasks, recipe.losses.weighting)
        self.weights: dict[str, Tensor] = {}  # float [C] per class
        for name, spec in specs.items():
            if recipe.tasks[name].class_weights != "none":  # which recipes refuse for regression
                given = [example["labels"][name] for x in streams.values() if name in x.tasks for example in x.examples]
                self.weights[name] = class_weights(label_counts(spec, given), recipe.tasks[name].class_weights)

    def __call__(self, model: MultiTaskModel, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns each task's own loss under its name, the embedding's "drift" if it is kept, and the sum as "loss".

        Args:
            model: The model.
            batch: An item of a `BatchPlan`.
        """
        specs, batch = model.config.task_specs, dict(batch)
        tasks, labels, target = self.tasks[batch.pop("stream")], batch.pop("labels"), batch.pop("target", None)
        if "casing_ids" in batch and model.training:
            shown = torch.rand(len(batch["casing_ids"]), 1, device=batch["casing_ids"].device) >= CASING_DROPOUT
            batch["casing_ids"] = batch["casing_ids"] * shown
        trains_embedding = target is not None or not all(x.has_head for x in tasks.values())
        out = model(**batch, tasks=[name for name in labels if name in specs], output_embedding=trains_embedding)
        hidden, mode = out.last_hidden_state, model.config.pooling_mode
        pooled = pool(hidden, batch["attention_mask"], mode) if trains_embedding else None
        found = {name: self._task_loss(name, tasks[name], specs.get(name), out, pooled, y) for name, y in labels.items()}
        weighted = [self.loss_weights(name, loss) for name, loss in found.items()]
        found["loss"] = sum(weighted[1:], start=weighted[0])
        if target is not None:
            found["drift"] = preserve_loss(pooled, out.sentence_embedding, target, self.losses.preserve_mode)
            found["loss"] = found["loss"] + self.losses.preserve_weight * found["drift"]
        return found

    def _task_loss(
        self, name: str, task: TaskRecipe, spec: TaskSpec | None, out: MultiTaskOutput, pooled: Tensor | None, labels: Tensor
    ) -> Tensor:
        if spec is None:
            # The encoder's own vector too: with a free projection alone it would have no reason to be good.
            views = [pooled, out.sentence_embedding, *(out.sentence_embedding[:, :dim] for dim in self.matryoshka_dims)]
            return embedding_loss(views, labels)
        weights = self.weights[name].to(labels.device) if name in self.weights else None
        return classification_loss(spec, out.logits[name], labels, task, weights)
