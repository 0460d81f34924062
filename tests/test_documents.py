"""README and discussion: every snippet runs, every number is in results/, and the card is what release.card renders."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from release import card
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "discussion.md")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("snippet", blocks("python"), ids=range(len(blocks("python"))))
def test_python_snippets_run(snippet):
    out = run([sys.executable, "-c", snippet])
    assert out.strip() and "nan" not in out


def test_the_shell_commands_are_those_that_ci_runs_or_run_here(tmp_path):
    ci = (ROOT / ".ci/run").read_text("utf-8")
    installs = 0
    for line in "".join(blocks("bash")).splitlines():
        if line.startswith("pip install"):
            install, then = line.split(" && ")
            assert install.replace("pip install", "pip install -q") in ci and then.split()[0] in ci
            installs += 1
        else:
            command = shlex.split(line.replace("annotated.parquet", str(tmp_path / "annotated.parquet")))
            run([sys.executable, *command[1:]])
    assert installs == 2 and (tmp_path / "annotated.parquet").exists()


def test_the_example_at_the_top_is_what_the_command_prints():
    shown = re.search(r"<!-- example -->\n```console\n(.*?)```", README, re.DOTALL)[1]
    command, _, output = shown.partition("\n")
    assert run([sys.executable, *shlex.split(command.removeprefix("$ "))[1:]]) == output


def test_the_documents_are_what_the_results_render_to():
    assert card.render_card(README) == README


def test_the_metadata_is_complete():
    fields = yaml.safe_load(README.split("---")[1])
    assert fields["license"] == "apache-2.0" and fields["language"] == "en"
    assert fields["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert fields["library_name"] == "sentence-transformers" and fields["pipeline_tag"] == "sentence-similarity"
    assert "google-research-datasets/go_emotions" in fields["datasets"] and "token-classification" in fields["tags"]
    results = fields["model-index"][0]["results"]
    assert {"CoNLL-2003", "TweetEval sentiment", "GoEmotions, 28 labels", "Re-DocRED"} <= {
        x["dataset"]["name"] for x in results
    }


def result_files() -> list[Path]:
    """Returns all result files but those of single experiments."""
    return [path for path in Path(ROOT, "results").rglob("*.json") if "experiments" not in path.parts]


def numbers(value: object) -> list[float]:
    if isinstance(value, dict | list):
        return [x for item in (value.values() if isinstance(value, dict) else value) for x in numbers(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_measured_number_is_in_a_result_file(name):
    """A number of an experiment counts if a table shows it: among thousands of cells every number could be found."""
    measured = [x for path in result_files() for x in numbers(json.loads(path.read_text("utf-8")))]
    tables = re.findall(r"<!-- (experiment-\S+) -->\n(.*?)<!-- /\1 -->", DOCUMENTS[name], re.DOTALL)
    shown = {x for _, table in tables for x in re.findall(r"\d+\.\d+", table)}
    prose = DOCUMENTS[name]
    for _, table in tables:
        prose = prose.replace(table, "")
    prose = re.sub(r"```.*?```|(Python|transformers) \d\.\d+", "", prose, flags=re.DOTALL)
    for text in re.findall(r"(?<![\w.])\d\.\d{2,}(?![\w.]*\d)", prose):
        digits = len(text.split(".")[1])
        assert text in shown or any(f"{x:.{digits}f}" == text for x in measured), (
            f"{text} in {name} is in no file of results/"
        )
    for text in re.findall(r"(\d+\.\d)-million-parameter", prose):
        assert any(f"{x / 1e6:.1f}" == text for x in measured)


def test_links_lead_somewhere():
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / target).exists(), f"{name} links to {target}"
        headings = {
            re.sub(r"[^\w\- ]", "", x.lower()).strip().replace(" ", "-") for x in re.findall(r"^#+ (.*)$", text, re.M)
        }
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            assert anchor in headings, f"{name} links to #{anchor}"
