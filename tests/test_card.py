"""The card of any folder: its tables and metadata are what results/ says, and what else it says stays."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from release import card
from release.tables import RENDERERS
from tests.conftest import ROOT

MARKERS = "<!-- domains -->\n<!-- /domains -->\n"
DESCRIBED = {
    "ner": {"title": "names", "task_type": "token-classification", "dataset": "u/n", "dataset_name": "N"},
    "mood": {"title": "mood", "task_type": "text-classification", "dataset": "mood", "dataset_name": "M", "config": "c"},
}
for _name, _metric in {"ner": "f1", "mood": "macro_f1"}.items():
    DESCRIBED[_name]["metrics"] = [{"key": _metric, "type": "f1", "name": f"{_metric}, best"}]


def measured(name: str, value: float, split: str = "test", **fields) -> dict:
    metric = DESCRIBED[name]["metrics"][0]["key"]
    return {"metrics": {metric: value}, "split": split, "rows": 1234, "sha256": "0", **fields}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a card to render."""
    write(tmp_path, "tasks", DESCRIBED)
    tasks = {"ner": measured("ner", 0.8125, intervals={"f1": [0.8, 0.8249]}), "mood": measured("mood", 0.5, "validation")}
    write(tmp_path, "release", {"tasks": tasks})
    text = f"---\nlicense: mit\nwidget:\n- text: hello\n---\n# Mine\n\n<!-- results -->\n<!-- /results -->\n\n{MARKERS}"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def write(folder: Path, name: str, content: dict) -> None:
    (folder / "results").mkdir(exist_ok=True)
    (folder / f"results/{name}.json").write_text(json.dumps(content))


def render(folder: Path) -> str:
    return card.render_card((folder / "README.md").read_text(), folder)


def test_rows_say_their_split_unless_it_is_the_test_split(folder):
    text = render(folder)
    assert "| names | N (1,234) | f1, best | **0.812** |  |  |\n" in text
    assert "| mood | M (1,234, validation split) | macro_f1, best | **0.500** |  |  |\n" in text


def test_metadata_keeps_what_results_do_not_say(folder):
    fields = yaml.safe_load(render(folder).split("---")[1])
    assert fields["license"] == "mit" and fields["widget"] == [{"text": "hello"}]
    assert fields["datasets"] == ["u/n"], "a data set without an owner is none of the Hub's"
    assert fields["model-index"][0]["name"] == folder.name
    assert [x["dataset"]["split"] for x in fields["model-index"][0]["results"]] == ["test", "validation"]


def test_rendering_again_changes_nothing_and_keeps_the_models_name(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["card", str(folder)])
    card.main()
    first = (folder / "README.md").read_text()
    moved = folder.rename(folder.parent / "elsewhere")
    assert render(moved) == first and f"name: {folder.name}" in first


def test_a_marker_for_data_gets_the_table_of_sources(folder):
    assert "GoEmotions" not in render(folder)
    with (folder / "README.md").open("a") as file:
        file.write("<!-- data -->\n<!-- /data -->\n")
    assert "| [GoEmotions](https://" in render(folder)


def test_a_table_of_what_was_not_measured_says_so(folder):
    assert "*Not measured yet.*" in render(folder)
    write(
        folder,
        "release",
        {"tasks": {"ner": measured("ner", 0.8, domains={"news": {"f1": 0.75}}), "mood": measured("mood", 0.5)}},
    )
    text = render(folder)
    assert "*Not measured yet.*" not in text and "| names | N | news | f1, best | 0.750 |\n" in text


def test_what_the_training_took_and_emitted(folder):
    assumed = {"watts": 20, "watts_source": "assumed", "grams_per_kwh": 500, "grams_source": "a guess"}
    write(folder, "training", {"seconds": 9000, "steps": 1200, "hardware_used": "two threads", **assumed})
    path = folder / "README.md"
    path.write_text(path.read_text() + "<!-- training -->\n<!-- /training -->\n")
    text = render(folder)
    assert "1,200 steps and 2.5 hours on two threads: about 50 Wh at 20 W (assumed), or 25 g of CO₂" in text
    found = yaml.safe_load(text.split("---")[1])["co2_eq_emissions"]
    assert found["emissions"] == 25 and found["hardware_used"] == "two threads" and "a guess" in found["source"]
    path.write_text(text)
    assert render(folder) == text


def test_a_folder_without_results_or_marker_has_no_card_to_render(folder, monkeypatch):
    assert card.can_render(folder)
    (folder / "README.md").write_text("# Another card\n")
    assert not card.can_render(folder)
    monkeypatch.setattr(sys, "argv", ["card", str(folder)])
    with pytest.raises(SystemExit, match=r"must hold <!-- results --> and <!-- /results --> once"):
        card.main()
    (folder / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    (folder / "results/tasks.json").unlink()
    assert not card.can_render(folder)
    with pytest.raises(SystemExit, match=r"tasks.json is missing"):
        card.main()


def test_a_folder_without_documents_gets_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["card", str(tmp_path)])
    card.main()
    assert "README.md does not exist" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_out_of_domain_and_lower_cased_results_come_from_files_of_their_own(folder):
    write(folder, "tasks", {**DESCRIBED, "ner": {**DESCRIBED["ner"], "results": "outside"}})
    write(folder, "outside", {"tasks": {"ner": measured("ner", 0.7)}})
    write(folder, "outside_lower", {"tasks": {"ner": measured("ner", 0.6)}})
    text = render(folder)
    assert "| names | N (1,234) | f1, best | **0.700** | 0.600 |  |\n" in text
    values = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    assert values[0]["metrics"][0]["value"] == 0.7


def test_what_the_embedding_keeps_at_each_dimension(folder):
    write(
        folder, "embedding", {"test": {"stsb": {dim: {"spearman": int(dim) / 1000} for dim in ("384", "256", "128", "64")}}}
    )
    with (folder / "README.md").open("a") as file:
        file.write("<!-- embedding -->\n<!-- /embedding -->\n")
    assert "| STS-B, Spearman | 0.384 | 0.256 | 0.128 | 0.064 |\n" in render(folder)


def test_the_data_table_says_what_may_be_used_commercially():
    lines = RENDERERS["data"](ROOT).splitlines()
    vader = "| [VADER's rated texts](https://github.com/cjhutto/vaderSentiment) | MIT | 10,817 / 814 / 2,303 |"
    assert any(line.startswith(vader) for line in lines)
    assert any("TweetEval" in line and "(research only)" in line for line in lines)
