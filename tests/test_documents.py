"""README, docs/ and discussion: snippets and commands run, figures come from results/, links resolve, the prose is plain."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml

from experiments import report
from release import card
from release.figures import FIGURE
from tests import fresh
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
# Pages whose snippets run here; those on other libraries have tests of their own.
RUN_HERE = ("README.md", "docs/files-and-bulk.md", "docs/moving-an-index.md", "docs/security.md")
PROSE = ("README.md", "discussion.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md")
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (*(ROOT / name for name in PROSE), *sorted((ROOT / "docs").glob("*.md")))
}
# What the first release said, and the field does not.
LITERAL = re.compile(
    r"\b(\d+ numbers|neighbours kept|made anew|mend(ed|s)?|anew|by company|look(ed|s)? over|takes? offence|middle half"
    r"|of which (less|more) is better|well-formed request|four ways in|what became of)\b",
    re.IGNORECASE,
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def prose(text: str) -> str:
    """Returns a document without metadata, code, tables, rendered blocks and comments."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = FIGURE.sub("", text)
    text = re.sub(r"`[^`\n]*`", "code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "<!--")))


def test_the_card_is_short_and_its_metadata_complete():
    _, metadata, body = README.split("---\n", 2)
    assert len(body.splitlines()) <= 180
    fields = yaml.safe_load(metadata)
    assert fields["license"] == "apache-2.0" and fields["language"] == "en"
    assert fields["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert fields["library_name"] == "sentence-transformers" and fields["pipeline_tag"] == "sentence-similarity"
    assert "google-research-datasets/go_emotions" in fields["datasets"] and "token-classification" in fields["tags"]
    names = {x["dataset"]["name"] for x in fields["model-index"][0]["results"]}
    assert {"CoNLL-2003", "TweetEval sentiment", "GoEmotions, 28 labels", "Re-DocRED"} <= names


def test_python_snippets_run():
    """Those of a page run one after the other, as a reader would, and each prints something."""
    pages = [blocks(DOCUMENTS[name], "python") for name in RUN_HERE]
    program = f"""
import contextlib, io
for page in {pages!r}:
    names = {{}}
    for snippet in page:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(snippet, snippet, "exec"), names)
        assert out.getvalue().strip() and "nan" not in out.getvalue(), snippet
"""
    assert all(len(snippet.splitlines()) <= 8 for snippet in pages[0])
    fresh.run(["-c", program])


def test_shell_commands_run_or_are_those_of_ci(tmp_path):
    ci = (ROOT / ".ci/run").read_text("utf-8")
    commands = {line for name in RUN_HERE for block in blocks(DOCUMENTS[name], "bash") for line in block.splitlines()}
    for line in commands:
        if line.startswith("pip install"):
            assert line.replace("pip install", "pip install -q") in ci
        else:
            command = shlex.split(line.replace("annotated.parquet", str(tmp_path / "annotated.parquet")))
            fresh.run(command[1:])
    assert (tmp_path / "annotated.parquet").exists()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist_with_their_options(name):
    """Commands that take long are not run: their modules, options, recipes and make targets must be there."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for module, rest in re.findall(r"python -m ((?!pip\b)[\w.]+)((?: [^\s`]+)*)", DOCUMENTS[name]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or find_spec(module.partition(".")[0]), f"{name}: python -m {module}"
        # A parser may be its package's.
        sources = [x.read_text("utf-8") for x in path.parent.glob("*.py")] if path.with_suffix(".py").exists() else []
        for option in re.findall(r" (--[\w-]+)", rest):
            assert not sources or any(f'"{option}"' in x for x in sources), f"{name}: {module} has no {option}"
    for target in re.findall(r"`make (\w+)", DOCUMENTS[name]):
        assert target in targets, f"{name}: make {target}"


def test_the_example_at_the_top_is_what_the_command_prints():
    assert "<!-- example -->" in README and card.run_examples(README) == README


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_show_what_results_hold(name):
    text = DOCUMENTS[name]
    rendered = card.render_card(text) if name == "README.md" else card.render(text)
    assert (report.render(rendered) if name == "discussion.md" else rendered) == text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_measured_numbers_stand_in_placeholders(name):
    """Whatever looks measured in the prose: a decimal of two digits or more, and anything with a unit of measurement."""
    unit = r"(?:points?\b|ms\b|times\b|texts per second|texts/s)"
    found = re.findall(rf"(?<![\w.@-])(?:0|[1-9]\d)\.\d{{2,}}(?![\w.]*\d)|\b\d+(?:\.\d+)? {unit}", prose(DOCUMENTS[name]))
    assert not found, f"{name} has {found} by hand; see release/figures.py"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_lead_somewhere(name):
    text = re.sub(r"```.*?```", "", DOCUMENTS[name], flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", x.lower()).strip().replace(" ", "-") for x in headings}
            assert anchor in slugs, f"{name} links to {target}#{anchor}"


def test_the_prose_is_plain(tmp_path):
    pytest.importorskip("proselint")
    for name, text in DOCUMENTS.items():
        assert not (found := LITERAL.search(prose(text))), f"{name}: {found[0]!r}"
        (tmp_path / name.replace("/", "-")).write_text(prose(text), "utf-8")
    command = [sys.executable, "-m", "proselint", "--config", ROOT / ".proselintrc.json", "check", *tmp_path.glob("*.md")]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("text", ["0.123", "<!-- = release tasks::ner/uner_ewt::metrics::f1 -->0.123<!-- / -->"])
def test_a_wrong_figure_is_noticed(text):
    """A number by hand, and one that its file does not hold."""
    by_hand = re.findall(r"\d+\.\d{2,}", prose(text))
    assert by_hand or card.render(text) != text


def test_placeholders_name_what_their_file_holds(tmp_path):
    (tmp_path / "results/seeds").mkdir(parents=True)
    for seed, value in enumerate((0.5, 0.75)):
        (tmp_path / f"results/seeds/run-{seed}.json").write_text(f'{{"f1": {value}, "list": [1500000]}}')
    shown = "<!-- = seeds/run-* f1 .2f -->0.1<!-- / --> <!-- = seeds/run-0 list::0 .1f/1e6 --><!-- / --> M, <!-- = none x -->1<!-- / -->"
    found = re.sub(r"<!--.*?-->", "", card.render(shown, tmp_path))
    assert found == "0.62 1.5 M, not measured yet"
    with pytest.raises(ValueError, match="run-0.json holds no 'recall' of 'recall'; there it holds: f1, list"):
        card.render("<!-- = seeds/run-* recall -->0.1<!-- / -->", tmp_path)
