"""The Trainer of this repository: transformers' own, with batches of one task each and a loss for each kind of task."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from common.recipe import GRADIENT_SURGERY, Recipe, RecipeError
from training.objectives import Objective

KEPT = 2  # checkpoints, besides the best one
COMPLETE = "complete"  # the last file of a checkpoint: without it, the writing was cut short
LOSS_WEIGHTS = "loss_weights.safetensors"
DIVERGED = "Lower optimizer.learning_rate or optimizer.head_learning_rate, or look for broken values in the data."


class TrainingError(Exception):
    """Training cannot continue; the message says at which step, why, and what remains."""


class GradientSurgery:
    """Collects the gradient of each task of a step on the parameters they share, and joins them by PCGrad (Yu et al. 2020)."""

    def __init__(self, shared: list[nn.Parameter]) -> None:
        try:
            from torchjd.aggregation import PCGrad
        except ImportError as error:
            raise RecipeError(f"losses.weighting is {GRADIENT_SURGERY!r}; it needs torchjd: pip install torchjd") from error
        self.join = PCGrad()
        self.shared = shared
        self.gradients: dict[str, Tensor] = {}
        self.touched: set[int] = set()

    def collect(self, task: str) -> None:
        """Takes the shared parameters' gradients away and adds them to the task's."""
        self.touched |= {i for i, x in enumerate(self.shared) if x.grad is not None}
        parts = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.shared]
        gradient = torch.cat([x.flatten() for x in parts])
        self.gradients[task] = self.gradients[task] + gradient if task in self.gradients else gradient
        for parameter in self.shared:
            parameter.grad = None

    def combine(self) -> None:
        """Gives the shared parameters the joined gradient."""
        matrix = torch.stack(list(self.gradients.values()))  # [tasks, parameters]
        joined = self.join(matrix)
        sizes = [x.numel() for x in self.shared]
        for i, (parameter, part) in enumerate(zip(self.shared, joined.split(sizes), strict=True)):
            if i in self.touched:  # the optimizer would decay what has a gradient of zero
                parameter.grad = part.view_as(parameter)
        self.gradients, self.touched = {}, set()


class MultiTaskTrainer(Trainer):
    """A Trainer whose every batch is of one task; several batches make a step, as gradient accumulation.

    Args:
        objective: Gives a batch's losses.
        evaluator: Returns the metrics of the validation splits, "average" among them.
        adapters: What `training.freezing.freeze` returned; merged when the run is over.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        evaluator: Callable[[], dict[str, float]],
        adapters: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.evaluator, self.adapters = objective, evaluator, adapters
        self.objective.loss_weights.to(self.args.device)
        # The Trainer clears the model's gradients alone.
        self.optimizer.register_step_post_hook(lambda *_: self.objective.loss_weights.zero_grad())
        self.reported: dict[str, list[float]] = defaultdict(list)  # each task's losses since the last report
        self.surgery = None
        if objective.losses.weighting == GRADIENT_SURGERY:
            named = [(name, x) for name, x in self.model.named_parameters() if x.requires_grad]
            self.surgery = GradientSurgery([x for name, x in named if not name.startswith("heads.")])

    def compute_loss(self, model: Any, inputs: dict[str, Any], **_: Any) -> Tensor:
        """Returns the batch's loss; a TrainingError says if it is not finite."""
        losses = self.objective(model, inputs)
        for name, value in losses.items():
            if name != "loss":
                self.reported[name].append(value.item())
        if not torch.isfinite(losses["loss"]):
            reason = f"the loss of {inputs['stream']!r} is {losses['loss'].item()}"
            raise self._stopped(self.state.global_step + 1, reason)
        return losses["loss"]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        stream = inputs["stream"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.surgery is not None:
            self.surgery.collect(stream)
            if self.accelerator.sync_gradients:
                self.surgery.combine()
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Returns the evaluator's metrics, as "eval_…"."""
        self._check_weights()
        metrics = {f"eval_{name}": value for name, value in self.evaluator().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the seconds of training so far, resumed or not, and each task's mean loss since the last report of losses."""
        logs = {**logs, "seconds": round(time.monotonic() - self.started, 1)}
        if "loss" in logs:
            logs = {**logs, **{f"loss_{name}": sum(x) / len(x) for name, x in self.reported.items()}}
            self.reported.clear()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint, if all weights are finite, and last of all the mark that it is whole."""
        self._check_weights()
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
            if weights := self.objective.loss_weights.state_dict():
                save_file(weights, folder / LOSS_WEIGHTS)
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            (folder / COMPLETE).touch()
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
            reason = f"the checkpoint cannot be written ({error})"
            raise self._stopped(self.state.global_step, reason, "Continue with --resume.") from error
        best = self.state.best_model_checkpoint
        rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=KEPT, best_model_checkpoint=best)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Finds the best checkpoint again where the run folder lies now, and how long the run had trained."""
        found = super()._init_training_state(*args, **kwargs)
        self.started = time.monotonic() - (self.state.log_history[-1].get("seconds", 0) if self.state.log_history else 0)
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, LOSS_WEIGHTS)
        if path.exists():
            self.objective.loss_weights.load_state_dict(load_file(path))

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise self._stopped(self.state.global_step, f"the weights of {name} are no longer finite")

    def _stopped(self, step: int, reason: str, advice: str = DIVERGED) -> TrainingError:
        found = newest_checkpoint(Path(self.args.output_dir))
        remains = f"the last good checkpoint is {found}" if found else "no checkpoint was written before"
        return TrainingError(f"Step {step}: {reason}. Training stops; {remains}. {advice}")


def newest_checkpoint(output: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run folder; what was cut short while it was written does not count."""
    found = [path.parent for path in output.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def training_arguments(output: Path, recipe: Recipe, steps: int) -> TrainingArguments:
    """Returns the Trainer's settings for a run of this many steps."""
    run = recipe.run
    every = ceil(steps / run.evaluations) if run.evaluations else None
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=1,  # one item of the plan is a whole batch
        gradient_accumulation_steps=recipe.sampling.gradient_accumulation_steps,
        train_sampling_strategy="sequential",  # the plan is shuffled
        num_train_epochs=1,
        warmup_steps=recipe.optimizer.warmup_ratio,
        seed=run.seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=run.precision == "bfloat16",
        logging_steps=max(1, min(50, steps // 20)),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_steps=every or run.save_steps,
        load_best_model_at_end=every is not None,
        metric_for_best_model="average" if every else None,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=False,
    )
    args._n_gpu = min(1, args.n_gpu)  # of several GPUs, one: DataParallel would take several batches for one
    return args
