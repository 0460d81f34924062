"""Training as a user runs it, on tiny real models: every kind of task is learned, and runs can be watched, stopped and resumed."""

import json
import signal
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from filelock import FileLock
from transformers import AutoTokenizer, BertModel

from common.recipe import Recipe, RecipeError
from evaluation.plots import learning_curves
from modeling_multitask import MultiTaskModel
from pipeline_multitask import MultiTaskPipeline
from tests import fresh
from tests.conftest import tiny_config, tiny_model, tiny_tokenizer
from training import train
from training.average import average
from training.trainer import COMPLETE, GradientSurgery, TrainingError, newest_checkpoint

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def split(name: str) -> Dataset:
    """Returns eight examples of one kind of task."""
    text = {"text": ["love it", "so sad", "love", "sad", "love me", "sad day", "i love", "how sad"]}
    good = [1, 0, 1, 0, 1, 0, 1, 0]
    if name == "mood":
        names = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
        return Dataset.from_dict({**text, "label": good}, features=names)
    if name == "topics":
        names = Features({"text": Value("string"), "label": List(ClassLabel(names=["love", "sad"]))})
        return Dataset.from_dict({**text, "label": [[x] for x in [0, 1] * 4]}, features=names)
    if name == "rating":
        return Dataset.from_dict({**text, "stars": [5.0 * x for x in good]})
    if name == "ner":
        tokens = [["Tim", "is", "in", "Rome"], ["Cook", "!"], ["to", "Paris"], ["A", "U.S.", "store"]] * 2
        tags = [[1, 0, 0, 3], [1, 0], [0, 3], [0, 3, 0]] * 2
        names = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=TAGS))})
        return Dataset.from_dict({"tokens": tokens, "tags": tags}, features=names)
    first, second = (
        ["love", "so sad", "Rome", "tim", "a", "b", "x", "y"],
        ["love it", "Paris", "Rome", "cook", "c", "b", "x", "z"],
    )
    return Dataset.from_dict({"a": first, "b": second, "score": [0.8, 0.1, 1.0, 0.2, 0.0, 1.0, 1.0, 0.1]})  # pairs


KINDS = {
    "mood": 'kind = "sequence_classification"\ntext_columns = ["text"]\nlabel_column = "label"\nclass_weights = "inverse_frequency"',
    "topics": 'kind = "sequence_classification"\ntext_columns = ["text"]\nlabel_column = "label"\n'
    'head = {problem_type = "multi_label_classification"}',
    "rating": 'kind = "sequence_classification"\ntext_columns = ["text"]\nlabel_column = "stars"\nhead = {problem_type = "regression"}',
    "ner": 'kind = "token_classification"\ntext_columns = ["tokens"]\nlabel_column = "tags"\npassage_rows = 2\n'
    "head = {casing_dim = 4, hidden_dim = 16}",
    "pairs": 'kind = "scored_pairs"\ntext_columns = ["a", "b"]\nlabel_column = "score"',
}


class Workshop:
    """A folder with a tiny pretrained encoder, data sets of every kind, and recipes over them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        torch.manual_seed(0)
        BertModel(tiny_config(tasks={}, embedding_dim=None).encoder_config).save_pretrained(folder / "encoder")
        tiny_tokenizer().save_pretrained(folder / "encoder")
        for name in KINDS:
            (folder / name).mkdir()
            for part in ("train", "validation"):
                split(name).to_parquet(folder / name / f"{part}.parquet")

    def write(self, *names: str) -> Path:
        tasks = [
            f'[tasks.{x}]\n{KINDS[x]}\ndataset = "{self.folder / x}"\nfolder = "{x}"\nbatch_size = 4\nepochs = 4'
            for x in names
        ]
        model = f'[model]\nencoder = "{self.folder / "encoder"}"\nmax_length = 32\nembedding_dim = 8\nmatryoshka_dims = [4]'
        rest = "[optimizer]\nlearning_rate = 5e-3\nhead_learning_rate = 2e-2\nweight_decay = 0.1\n[run]\nseed = 3\ncalibrate = false"
        path = self.folder / f"{'-'.join(names)}.toml"
        path.write_text("\n".join([model, *tasks, rest]))
        return path

    def train(self, *names: str, settings: tuple[str, ...] = (), **options) -> tuple[MultiTaskModel, Path]:
        self.runs += 1
        output = options.pop("output", self.folder / f"run{self.runs}")
        return train.train(Recipe.read(self.write(*names), overrides=settings), output, **options), output

    def pipe(self, output: Path) -> MultiTaskPipeline:
        model = MultiTaskModel.from_pretrained(output / "final")
        return MultiTaskPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(output / "final"), device="cpu")

    @property
    def start(self) -> BertModel:
        return BertModel.from_pretrained(self.folder / "encoder")


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A workshop whose runs draw no curves: a picture takes longer than a run."""
    monkeypatch.setattr(train, "learning_curves", lambda history, path: None)
    return Workshop(tmp_path)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(x, second.state_dict()[key]) for key, x in first.state_dict().items())


# What is learned


def test_eight_examples_of_every_kind_are_learned_by_one_model(workshop):
    epochs = tuple(f"tasks.{name}.epochs=25" for name in KINDS)
    model, output = workshop.train(
        *KINDS, settings=("freezing.freeze=word_embeddings", "losses.preserve_weight=0.1", *epochs)
    )
    assert torch.equal(model.get_input_embeddings().weight, workshop.start.get_input_embeddings().weight)
    pipe = workshop.pipe(output)
    records = pipe(list(split("mood")["text"]))
    assert [x["labels"]["mood"]["label"] for x in records] == ["good", "bad"] * 4
    assert [x["labels"]["topics"]["labels"] for x in records] == [["love"], ["sad"]] * 4
    assert all(abs(x["labels"]["rating"]["values"]["stars"] - y) < 1.5 for x, y in zip(records, [5, 0] * 4, strict=True))
    entities = pipe("Tim is in Rome")["entities"]["ner"]
    assert [(x["word"], x["entity_group"]) for x in entities] == [("Tim", "PER"), ("Rome", "LOC")]
    love, love_it, sad, paris = (pipe(x)["sentence_embedding"] for x in ("love", "love it", "so sad", "Paris"))
    assert love @ love_it > sad @ paris
    assert list(model.config.tasks) == ["mood", "topics", "rating", "ner"]


def test_casing_tells_what_the_uncased_words_cannot(workshop):
    tokens = [["tim"], ["Tim"], ["cook"], ["Cook"], ["rome"], ["Rome"], ["paris"], ["Paris"]]
    names = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=TAGS))})
    data = Dataset.from_dict({"tokens": tokens, "tags": [[0], [1]] * 4}, features=names)
    for part in ("train", "validation"):
        data.to_parquet(workshop.folder / "ner" / f"{part}.parquet")
    _, output = workshop.train("ner", settings=("tasks.ner.passage_rows=1", "tasks.ner.epochs=60"))
    pipe = workshop.pipe(output)
    assert [len(x["entities"]["ner"]) for x in pipe(["tim", "Tim", "cook", "Cook"])] == [0, 1, 0, 1]
    first, second = pipe(["tim", "Tim"])
    assert (first["sentence_embedding"] == second["sentence_embedding"]).all(), "casing never reaches the embedding"


@pytest.mark.parametrize(
    "settings",
    [
        ("losses.weighting=uncertainty", "sampling.mode=uniform", "run.precision=bfloat16"),
        ("losses.weighting=pcgrad", "sampling.gradient_accumulation_steps=3", "sampling.mode=annealed"),
        ("freezing.lora_rank=4", "optimizer.learning_rate=1e-2", "losses.preserve_weight=0.5", "losses.preserve_mode=both"),
        ("freezing.gradual=true", "freezing.linear_probe_ratio=0.2", "optimizer.layer_decay=0.8", "model.encoder_dropout=0"),
    ],
    ids=lambda settings: settings[0].partition("=")[2] + " " + settings[0].partition("=")[0],
)
def test_every_option_trains_all_tasks(workshop, settings):
    epochs = tuple(f"tasks.{name}.epochs=20" for name in ("mood", "ner", "pairs"))
    model, output = workshop.train("mood", "ner", "pairs", settings=(*settings, *epochs))
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["mood_accuracy"] == 1.0 and metrics["ner_f1"] >= 0.75 and metrics["pairs_spearman"] > 0.6, metrics
    assert not any("lora" in name for name in model.state_dict())
    assert MultiTaskModel.from_pretrained(output / "final").config.tasks == model.config.tasks


def test_a_teacher_of_another_width_is_followed(workshop, release):
    settings = (f"losses.teacher='{release}'", "losses.preserve_weight=5", "losses.preserve_mode=similarity")
    workshop.train("mood", settings=settings)
    with pytest.raises(
        RecipeError, match="losses.teacher has vectors of 8 dimensions; preserve_mode 'cosine' needs the encoder's 32 or"
    ):
        workshop.train("mood", settings=(*settings[:2], "model.embedding_dim=4"))


@pytest.mark.parametrize("part", ["encoder", "embeddings"])
def test_what_is_frozen_is_bit_identical_after_training(workshop, part):
    model, _ = workshop.train("mood", "pairs", settings=(f"freezing.freeze={part}", "losses.preserve_weight=1"))
    start = dict(workshop.start.named_parameters())
    for name, x in model.encoder.named_parameters():
        if name.startswith("pooler."):
            continue  # nothing here reads it
        assert torch.equal(x, start[name]) == (part == "encoder" or name.startswith("embeddings.")), name


def test_a_probe_leaves_the_encoder_alone_until_it_is_over(workshop):
    model, _ = workshop.train("mood", settings=("freezing.linear_probe_ratio=0.99", "tasks.mood.epochs=1"))
    assert same(workshop.start, model.encoder), "two steps, of which the probe takes both"
    model, _ = workshop.train("mood", settings=("freezing.linear_probe_ratio=0.5", "tasks.mood.epochs=1"))
    assert not same(workshop.start, model.encoder)


def test_lower_layers_train_later_and_less_of_them_the_shorter_the_run(workshop):
    model, _ = workshop.train(
        "mood", settings=("freezing.gradual=true", "tasks.mood.epochs=0.5", "optimizer.warmup_ratio=0")
    )
    layers = zip(workshop.start.encoder.layer, model.encoder.encoder.layer, strict=True)
    assert [same(before, after) for before, after in layers] == [True, False], "a single step: the top layer's"


def test_what_no_task_reads_stays_even_with_decay_and_surgery(workshop):
    settings = ("losses.weighting=pcgrad", "sampling.gradient_accumulation_steps=2", "optimizer.weight_decay=0.5")
    model, _ = workshop.train("mood", "topics", settings=settings)
    assert torch.equal(model.encoder.pooler.dense.weight, workshop.start.pooler.dense.weight)


def test_surgery_joins_gradients_as_its_paper_says():
    parameter = torch.nn.Parameter(torch.zeros(2))
    for first, second, expected in (
        ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]),  # at right angles: the sum
        ([1.0, 0.0], [-1.0, 1.0], [0.5, 1.5]),  # in conflict: each without what hurts the other
    ):
        surgery = GradientSurgery([parameter])
        for task, gradient in (("a", first), ("b", second)):
            parameter.grad = torch.tensor(gradient)
            surgery.collect(task)
        surgery.combine()
        torch.testing.assert_close(parameter.grad, torch.tensor(expected), atol=1e-4, rtol=0)


def test_missing_labels_are_skipped(workshop):
    data = split("mood").to_dict()
    data["label"][3:] = [None] * 5
    names = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict(data, features=names).to_parquet(workshop.folder / "mood/train.parquet")
    _, output = workshop.train("mood", settings=("tasks.mood.epochs=30",))
    assert [x["labels"]["mood"]["label"] for x in workshop.pipe(output)(["love it", "so sad"])] == ["good", "bad"]


@pytest.mark.parametrize(("label", "message"), [(None, "have no label"), (1, "have the same label, number 1")])
def test_labels_that_teach_nothing_are_refused(workshop, label, message):
    names = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_dict({**split("mood").to_dict(), "label": [label] * 8}, features=names)
    data.to_parquet(workshop.folder / "mood/train.parquet")
    with pytest.raises(ValueError, match=f"tasks.mood: all rows of the train split {message}"):
        workshop.train("mood")


# The run folder


def test_two_runs_in_one_folder_are_refused(workshop):
    with FileLock(workshop.folder / ".run1.lock"), pytest.raises(RecipeError, match="another process is training there"):
        workshop.train("mood")


def test_training_continues_from_an_earlier_model(workshop):
    settings = ("model.num_task_layers=1", "model.embedding_dim=4", "model.matryoshka_dims=[]")
    model, output = workshop.train("mood", settings=settings)
    again, _ = workshop.train(
        "mood",
        settings=(
            *settings,
            f'model.start="{output / "final"}"',
            "optimizer.learning_rate=1e-9",
            "optimizer.head_learning_rate=1e-9",
        ),
    )
    assert same(model.encoder, again.encoder)
    for part in ("task_branch", "heads"):
        first, second = getattr(model, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.allclose(x, second[name], atol=1e-5) for name, x in first.items()), part
    with pytest.raises(RecipeError, match="model.start .* tasks and labels"):
        workshop.train("topics", settings=(*settings, f'model.start="{output / "final"}"'))


def test_two_runs_are_averaged_where_tasks_train_and_nowhere_else():
    first, second = tiny_model(), tiny_model()
    with torch.no_grad():
        for name, weight in second.named_parameters():
            if name.startswith("heads."):
                weight.add_(1.0)
    start = {name: x.clone() for name, x in second.state_dict().items()}
    average(first, second, 0.75)
    for name, weight in second.state_dict().items():
        assert torch.allclose(weight, start[name] - (0.25 if name.startswith("heads.") else 0)), name
    with pytest.raises(ValueError, match="--share is 2"):
        average(first, second, 2)
    with torch.no_grad():
        second.encoder.embeddings.word_embeddings.weight.add_(1.0)
    with pytest.raises(ValueError, match="what no task trains"):
        average(first, second, 0.5)


def test_the_run_folder_says_what_was_run(workshop, monkeypatch):
    monkeypatch.setattr(train, "learning_curves", learning_curves)
    model, output = workshop.train("mood", "ner", settings=("run.evaluations=2", "freezing.freeze=word_embeddings"))
    run, recipe = (json.loads((output / name).read_text()) for name in ("run.json", "recipe.json"))
    assert {"command", "revision", "libraries", "hardware", "parameters", "trained"} <= set(run)
    assert run["parameters"] - run["trained"] == model.get_input_embeddings().weight.numel()
    assert run["data"]["mood"]["rows"] == 8 and len(run["data"]["ner"]["sha256"]) == 64
    assert recipe["run"]["seed"] == 3 and recipe["freezing"]["freeze"] == "word_embeddings"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["average"] == pytest.approx((metrics["mood_macro_f1"] + metrics["ner_f1"]) / 2)
    logged = json.loads((output / "history.json").read_text())
    assert sum("eval_average" in x for x in logged) == 2 and any("loss_ner" in x for x in logged)
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("adapters", [0, 2])
def test_the_best_checkpoint_becomes_the_final_model(workshop, monkeypatch, adapters):
    averages, seen = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5]), []

    def scripted(model, *_):
        seen.append(next(averages))
        if seen[-1] == 0.9:
            workshop.best = model.heads["mood"].classifier.weight.clone()
        return {"average": seen[-1]}

    monkeypatch.setattr(train, "validate", scripted)
    settings = ("run.evaluations=4", f"freezing.lora_rank={adapters}")
    model, output = workshop.train("mood", settings=settings)
    assert len(seen) == 6, "the rehearsal, four evaluations and the final one"
    assert torch.equal(model.heads["mood"].classifier.weight, workshop.best)
    assert torch.equal(MultiTaskModel.from_pretrained(output / "final").heads["mood"].classifier.weight, workshop.best)


def test_a_data_set_without_a_validation_split_trains_unmeasured(workshop):
    (workshop.folder / "mood/validation.parquet").unlink()
    _, output = workshop.train("mood", settings=("run.calibrate=true",))
    assert set(json.loads((output / "metrics.json").read_text())) == {"seconds", "steps"}
    with pytest.raises(RecipeError, match="run.evaluations is 2, and no task's data set has a validation split"):
        workshop.train("mood", settings=("run.evaluations=2",))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tasks.mood.metric=f2", "tasks.mood.metric is 'f2'; allowed: macro_recall"),
        ("model.max_length=99", "model.max_length is 99; this encoder takes 32 tokens"),
    ],
)
def test_what_would_fail_late_fails_before_training(workshop, setting, message):
    with pytest.raises(ValueError, match=message):
        workshop.train("mood", settings=(setting,))
    assert not (workshop.folder / "run1/recipe.json").exists(), "the folder can be used again"


def test_another_run_in_the_same_folder_is_refused(workshop):
    _, output = workshop.train("mood")
    with pytest.raises(RecipeError, match="holds a run already; continue it with --resume"):
        workshop.train("mood", output=output)
    with pytest.raises(RecipeError, match=r"another recipe; these settings differ: optimizer.learning_rate, run.seed$"):
        workshop.train("mood", output=output, resume=True, settings=("run.seed=4", "optimizer.learning_rate=1"))
    with pytest.raises(RecipeError, match="holds this run, and it is finished"):
        workshop.train("mood", output=output, resume=True)
    with pytest.raises(RecipeError, match="holds no run to resume"):
        workshop.train("mood", output=workshop.folder / "nowhere", resume=True)
    (output / "metrics.json").unlink()
    split("mood").select(range(7)).to_parquet(workshop.folder / "mood/train.parquet")
    with pytest.raises(RecipeError, match="was started on other data: the train split of mood has changed"):
        workshop.train("mood", output=output, resume=True)


def test_the_command_reports_problems_in_one_line_each(workshop, monkeypatch, capsys):
    arguments = ["train", str(workshop.write("mood")), "--output", str(workshop.folder / "run"), "--only", "nothing"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match=r"no task \['nothing'\]"):
        train.main()
    monkeypatch.setattr("sys.argv", [*arguments[:4], "--set", "tasks.mood.label_column=stars"])
    with pytest.raises(SystemExit, match=r"mood, split train: no column \['stars'\]; it has \['text', 'label'\]"):
        train.main()
    assert not (workshop.folder / "run").exists(), "nothing is left of a run that could not start"


# Stopping and going on


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(workshop):
    settings = ("run.save_steps=5", "losses.weighting=uncertainty", "losses.preserve_weight=1")
    whole, output = workshop.train("mood", "ner", "pairs", settings=settings)
    last = newest_checkpoint(output)
    (output / "metrics.json").unlink()
    (last / COMPLETE).unlink()  # as if the run had been killed while it wrote its last checkpoint
    (last / "model.safetensors").write_bytes(b"cut short")
    resumed, _ = workshop.train("mood", "ner", "pairs", settings=settings, output=output, resume=True)
    assert same(whole, resumed)


def test_the_time_before_a_resume_counts(workshop):
    _, output = workshop.train("mood", settings=("run.save_steps=5",))
    (output / "metrics.json").unlink()
    path = newest_checkpoint(output) / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][-1]["seconds"] += 1000
    path.write_text(json.dumps(state))
    workshop.train("mood", settings=("run.save_steps=5",), output=output, resume=True)
    assert 1000 <= json.loads((output / "metrics.json").read_text())["seconds"] < 1600
    noted = [entry["seconds"] for entry in json.loads((output / "history.json").read_text())]
    assert noted == sorted(noted), noted


KILLED = """
import os, signal
from training.train import main
from training.trainer import MultiTaskTrainer

step = MultiTaskTrainer.training_step

def counted(trainer, *arguments):
    if trainer.state.global_step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *arguments)

MultiTaskTrainer.training_step = counted
main()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(workshop):
    arguments = [workshop.write("mood", "pairs"), "--set", "run.save_steps=5", "--output"]
    fresh.run(["-m", "training.train", *arguments, workshop.folder / "whole"])
    killed = workshop.folder / "killed"
    assert fresh.run(["-c", KILLED, *arguments, killed], check=False).returncode == -signal.SIGKILL
    assert newest_checkpoint(killed).name == "checkpoint-10" and not (killed / "final").exists()
    fresh.run(["-m", "training.train", *arguments, killed, "--resume"])
    whole, resumed = (MultiTaskModel.from_pretrained(x / "final") for x in (workshop.folder / "whole", killed))
    assert same(whole, resumed)


def test_an_undefined_loss_stops_the_run_and_keeps_the_last_good_checkpoint(workshop):
    data = Dataset.from_dict({"text": split("mood")["text"], "stars": [5.0] * 7 + [float("inf")]})
    data.to_parquet(workshop.folder / "rating/train.parquet")
    settings = ("run.save_steps=1", "tasks.rating.batch_size=1")
    with pytest.raises(
        TrainingError, match=r"Step \d: the loss of 'rating' is inf.*last good checkpoint is .*Lower optimizer"
    ) as caught:
        workshop.train("rating", settings=settings)
    checkpoint = newest_checkpoint(workshop.folder / "run1")
    assert str(checkpoint) in str(caught.value)
    assert all(torch.isfinite(x).all() for x in MultiTaskModel.from_pretrained(checkpoint).parameters())


def test_a_full_disk_leaves_no_checkpoint_that_counts(workshop, monkeypatch):
    import training.trainer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.trainer.MultiTaskTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(TrainingError, match="Step 2: the checkpoint cannot be written .*No space left.* no checkpoint was"):
        workshop.train("mood", settings=("run.save_steps=2",))
    assert list((workshop.folder / "run1").glob("checkpoint-*")) and newest_checkpoint(workshop.folder / "run1") is None


# The same run again


def losses(output: Path) -> list[float]:
    return [x["loss"] for x in json.loads((output / "history.json").read_text()) if "loss" in x]


def test_the_losses_of_a_recorded_run_are_reproduced(workshop):
    _, output = workshop.train("mood", "ner", "pairs", settings=("losses.preserve_weight=1", "tasks.ner.epochs=2"))
    recorded = json.loads(Path(__file__).with_name("recorded_losses.json").read_text())
    assert losses(output) == pytest.approx(recorded, abs=2e-5)


def test_several_processes_are_refused(workshop, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="training runs in one process"):
        workshop.train("mood")
