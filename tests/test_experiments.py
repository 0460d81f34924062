"""Experiments: every cell can run and is run once, and the tables say what the results hold."""

import argparse
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from annotator_multitask import BioScheme
from common.recipe import Recipe, RecipeError
from experiments import report, run
from experiments.conflicts import GradientProbe
from experiments.reading import each_word_by_itself, joined
from tests.conftest import ROOT
from tests.test_training import Workshop, same
from training.train import new_trainer
from training.trainer import MultiTaskTrainer

GRID = """
recipe = "{recipe}"
unseen = ["u/unseen", "mood", "train", "text"]
[lists]
quick = ["tasks.mood.epochs=2", "tasks.ner.epochs=2"]
[budgets.small]
about = "eight rows a task"
rows = 6
settings = ["{{quick}}"]
[tables.base]
cells = [{{name = "As it is"}}]
[tables.taught]
base = true
columns = ["ner"]
settings = ["losses.preserve_weight=0.5"]
cells = [{{name = "mood alone", only = ["mood"]}}, {{name = "led", settings = ["losses.teacher={{encoder}}"]}}]
[tables.conflicts]
gradients = true
cells = [{{name = "as it is"}}]
"""


@pytest.mark.parametrize("budget", ["small", "full"])
def test_every_cell_is_a_recipe_that_can_run(budget):
    cells = run.read_grid(budget, [0, 1, 2], [])
    recipes = [run.cell_recipe(cell, None, "some/encoder") for cell in cells]
    assert len({cell.path for cell in cells}) == len(cells), "two cells would share a result file"
    assert [recipe.run.seed for recipe in recipes] == sorted(cell.seed for cell in cells), "first seeds come first"
    assert all(recipe.model.encoder == "some/encoder" for recipe in recipes)
    assert {recipe.losses.teacher for recipe in recipes} == {None, "some/encoder"}


@pytest.mark.parametrize(("budget", "table", "message"), [("tiny", "base", "budgets"), ("small", "seeds", "tables")])
def test_unknown_names_are_refused_with_the_known_ones(budget, table, message):
    with pytest.raises(RecipeError, match=rf"has no {message} \['(tiny|seeds)'\]; it has: (small, full|base, freezing)"):
        run.read_grid(budget, [0], [table])


@pytest.fixture
def place(tmp_path, monkeypatch) -> argparse.Namespace:
    """A grid of tiny runs, and where they are to run."""
    monkeypatch.setattr("evaluation.evaluate.NEIGHBOURS", 2)
    monkeypatch.setattr("training.train.learning_curves", lambda history, path: None)  # a picture takes longer than a run
    workshop = Workshop(tmp_path)
    (tmp_path / "grid.toml").write_text(GRID.format(recipe=workshop.write("mood", "ner")))
    (tmp_path / "encoder/modules.json").unlink(missing_ok=True)
    encoder = str(tmp_path / "encoder")
    return argparse.Namespace(
        grid=tmp_path / "grid.toml", data=tmp_path, encoder=encoder, runs=tmp_path / "runs", output=tmp_path / "out"
    )


def cells(place: argparse.Namespace, *tables: str) -> list[run.Cell]:
    return run.read_grid("small", [0], list(tables), place.grid)


def test_a_cell_says_what_it_cost_and_gave_and_how_to_run_it_again(place):
    alone, _ = cells(place, "taught")
    run.run_cell(alone, place)
    result = json.loads((place.output / "small/taught/mood-alone-0.json").read_text())
    assert set(result["tasks"]) == {"mood"} and result["tasks"]["mood"]["rows"] == 6
    assert result["average"] == result["tasks"]["mood"]["metrics"]["macro_f1"]
    assert result["steps"] == 4 and result["peak_memory_mb"] > 0 and result["processor_seconds"] is not None
    assert "neighbours_at_2" in result["drift"]["metrics"] and result["drift"]["dataset"] == "mood"
    assert "--only mood --set 'tasks.mood.epochs=2'" in result["command"]
    assert not list(place.runs.glob("**/*.safetensors")), "weights of finished cells are not kept"


def test_an_interrupted_cell_continues_where_it_was(place, monkeypatch):
    (cell,) = cells(place, "base")
    monkeypatch.setattr(run, "CHECKPOINT_STEPS", 2)
    steps, step = [], MultiTaskTrainer.training_step

    def counted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(MultiTaskTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        run.run_cell(cell, place)
    assert not (place.output / cell.path).exists()
    run.run_cell(cell, place)
    result = json.loads((place.output / cell.path).read_text())
    assert len(steps) == 6 + result["steps"] - 4, "it went on from the checkpoint of step 4"
    assert result["processor_seconds"] is None, "the time of a part is none of the whole"


def test_finished_cells_are_skipped_and_a_failing_one_is_named(place, monkeypatch, capsys):
    arguments = [f"--{name}={getattr(place, name)}" for name in ("grid", "data", "encoder", "runs", "output")]
    finished = place.output / cells(place, "base")[0].path
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    monkeypatch.setattr("sys.argv", ["run", "base", "--seeds", "0", *arguments])
    run.main()
    assert capsys.readouterr().out == "1 of 1: small/base/as-it-is-0.json, finished\n" and finished.read_text() == "{}"
    (place.data / "mood/train.parquet").unlink()
    finished.unlink()
    with pytest.raises(SystemExit, match="base/as-it-is-0.json: .*no split 'train'"):
        run.main()


def test_comparing_gradients_leaves_a_run_as_it_is(tmp_path):
    workshop = Workshop(tmp_path)
    recipe = Recipe.read(workshop.write("mood", "ner"), overrides=["losses.preserve_weight=0.5"])
    trainers = [new_trainer(recipe, tmp_path / f"run{i}")[0] for i in range(2)]
    probe = GradientProbe(trainers[0])
    trainers[0].add_callback(probe)
    for trainer in trainers:
        torch.manual_seed(1)
        trainer.train()
    assert same(trainers[0].model, trainers[1].model)
    assert [x["step"] for x in probe.found][:3] == [0, 3, 6]
    assert set(probe.found[0]["cosines"]) == {"drift drift", "drift mood", "drift ner", "mood mood", "mood ner", "ner ner"}
    assert all(abs(x) <= 1 + 1e-6 for found in probe.found for x in found["cosines"].values())


def test_a_gradient_has_the_direction_of_autograds(tmp_path):
    workshop = Workshop(tmp_path)
    trainer, _ = new_trainer(Recipe.read(workshop.write("mood")), tmp_path / "run")
    probe = GradientProbe(trainer)
    trainer.model.eval()
    halves = [probe.gradients(start)["mood"] for start in range(2)]
    batches, model = probe.batches["mood"], trainer.model
    loss = sum(trainer.objective(model, batch)["mood"] for batch in batches) / len(batches)
    parts = torch.autograd.grad(loss, list(model.encoder.parameters()), allow_unused=True)
    whole = torch.cat(
        [
            torch.zeros_like(x).flatten() if g is None else g.flatten()
            for g, x in zip(parts, model.encoder.parameters(), strict=True)
        ]
    )
    assert torch.allclose(halves[0] + halves[1], whole, atol=1e-6)


# The report


def result(seed: int, value: float, half: float = 0.01) -> dict:
    tasks = {"ner": {"metrics": {"f1": value}, "intervals": {"f1": [value - half, value + half]}}}
    return {"seed": seed, "tasks": tasks, "average": value}


@pytest.mark.parametrize(
    ("pairs", "p"),
    [
        ([(0.80, 0.82), (0.80, 0.80)], None),  # two seeds: no test
        ([(0.80, 0.85), (0.70, 0.71), (0.60, 0.58)], 0.58),
        ([(0.80, 0.81), (0.70, 0.71), (0.60, 0.6101)], 0.0),
        ([(0.8, 0.8), (0.7, 0.7), (0.6, 0.6)], 1.0),  # no variance
    ],
)
def test_settings_are_compared_by_a_paired_test_over_seeds(pairs, p):
    column = report.COLUMNS["ner"]
    old = report.values([result(seed, x) for seed, (x, _) in enumerate(pairs)], column)
    new = report.values([result(seed, y) for seed, (_, y) in enumerate(pairs)], column)
    found = report.p_value(new, old)
    assert found is None if p is None else found == pytest.approx(p, abs=0.01)


def taught(**rows: list[float]) -> tuple[dict, dict]:
    """A grid of one table, and its results by row and seed."""
    cells = [{"name": name} for name in rows if name != "base"]
    table = {"base": True, "columns": ["ner", "sentiment"], "cells": cells}
    results = {name: [result(seed, x) for seed, x in enumerate(values)] for name, values in rows.items()}
    found = {"base": {"base": results.pop("base")}, "taught": results}
    return {"budgets": {"small": {"about": "little"}}, "tables": {"taught": table}}, found


def test_a_table_compares_with_its_first_row():
    grid, found = taught(base=[0.80, 0.81, 0.79], led=[0.90, 0.912, 0.89], same=[0.80, 0.80, 0.80])
    bold = report.significant(grid, found)
    assert report.table("taught", grid, found, "small", bold) == (
        "`python -m experiments.run taught --budget small`: little; mean of 3 seeds.\n\n"
        "| setting | entity F1 | sentiment, macro recall |\n|---|---|---|\n"
        "| base | 0.800 |  |\n| led | **0.901** |  |\n| same | 0.800 |  |\n"
        "| *half of a single value's 95 % interval* | *±0.010* |  |\n"
    )
    grid["tables"]["taught"]["cells"][1] |= {"against": "led"}
    assert ("taught", "same", "ner") in report.significant(grid, found), "it is compared with the row it is named after"
    del found["taught"]["led"]
    assert not report.significant(grid, found), "and with no other in its place"


def test_many_comparisons_are_corrected_for():
    """A difference that is significant alone is not so among many that are none."""
    rows = {f"noise {i}": [0.80 + i / 1000, 0.81, 0.79] for i in range(30)}
    grid, found = taught(base=[0.80, 0.81, 0.79], led=[0.82, 0.8255, 0.811], **rows)
    alone = report.comparisons(grid, found)["taught", "led", "ner"]
    assert 0.002 < alone < 0.05 and ("taught", "led", "ner") not in report.significant(grid, found)


def test_a_row_is_compared_with_one_of_its_table():
    for fields in tomllib.loads(run.GRID.read_text("utf-8"))["tables"].values():
        assert {cell["against"] for cell in fields["cells"] if "against" in cell} <= {
            cell["name"] for cell in fields["cells"]
        }


def test_results_are_read_by_table_setting_and_seed(tmp_path):
    for seed in (1, 0):
        path = tmp_path / f"small/taught/led-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result(seed, 0.5), "table": "taught", "name": "led"}))
    assert [x["seed"] for x in report.load("small", tmp_path)["taught"]["led"]] == [0, 1]


def test_the_discussion_shows_the_results_of_this_repository():
    text = Path(ROOT, "discussion.md").read_text("utf-8")
    assert report.render(text) == text


def test_rows_are_joined_in_order_and_none_is_dropped():
    data = Dataset.from_dict({"tokens": [["a", "b"], ["c"], ["d"]], "tags": [[0, 1], [2], [3]]})
    assert joined(data, 2).to_dict() == {"tokens": [["a", "b", "c"], ["d"]], "tags": [[0, 1, 2], [3]]}


def test_a_word_by_itself_may_break_the_scheme_and_a_sequence_may_not():
    scheme = BioScheme(["O", "B-X", "I-X"])
    scores, first_words = np.log([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]]), np.array([0])
    with each_word_by_itself():
        assert scheme.decode(scores, first_words).tolist() == [0, 2]
    assert scheme.decode(scores, first_words).tolist() == [1, 2]
