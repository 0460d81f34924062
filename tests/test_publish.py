"""Publishing: what is sent, that it is tried before main moves, what happens when something fails, and no token anywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from release import publish
from release.publish import PublishError, prepare, select
from tests import golden
from tests.conftest import ROOT, write_release
from tests.loopback_hub import HubError, LoopbackHub

TOKEN = "hf_" + "neverPrintedOrWritten" * 2
OWN = {
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "README.md", "config.json",
    "config_sentence_transformers.json", "configuration_multitask.py", "heads/model.safetensors", "model.safetensors",
    "modeling_multitask.py", "modules.json", "multitask.safetensors.index.json", "pipeline_multitask.py", "handler.py",
    "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def folder(release, tmp_path) -> Path:
    """A release, and beside it what must never be published."""
    copy = Path(shutil.copytree(release, tmp_path / "mine"))
    strays = (
        "runs/model.safetensors",
        "checkpoint-5/trainer_state.json",
        "data.parquet",
        ".env",
        "token.json",
        ".cache/x.md",
    )
    for name in strays:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("mine alone")
    return copy


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A loopback hub, which the client in this process and in those that it starts takes for the Hub."""
    with LoopbackHub() as hub:
        settings = {**hub.env(tmp_path / "home"), "HF_TOKEN": TOKEN}
        for name in set(os.environ) - set(settings):
            monkeypatch.delenv(name)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        client = {
            "ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": tmp_path / "none",
        }
        for name, value in client.items():
            monkeypatch.setattr(constants, name, value)
        huggingface_hub.close_session()  # it would go on with the proxies of the old environment
        yield hub
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def expected(release) -> dict[str, np.ndarray]:
    return publish.rehearse(release)


@pytest.fixture
def tried(monkeypatch):
    """Publishing takes for granted that the model loads, here and from the hub."""
    monkeypatch.setattr(publish, "rehearse", lambda folder: {})
    monkeypatch.setattr(publish, "load_back", lambda *arguments: [])


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["publish", *map(str, arguments)])
    publish.main()


def requests(hub: LoopbackHub, verb: str, part: str) -> list[str]:
    return [line for line in hub.requests if line.startswith(verb) and part in line]


# With the models


def test_a_release_goes_to_main_in_one_commit_after_it_was_loaded_back(hub, folder, expected, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(publish, "rehearse", lambda folder: expected)
    (folder / "tests").mkdir()
    (folder / "tests/golden.json").write_text(json.dumps(golden.answers(str(folder))))
    run(monkeypatch, "user/tiny", "--folder", folder, "--private", "--revision", "v1.0")
    repo = hub.repos["user/tiny"]
    assert repo.private and set(repo.branches) == {"main"} and repo.tags == {"v1.0": repo.branches["main"]}
    assert len(requests(hub, "POST", "/commit/main")) == 1
    tried = hub.requests.index(requests(hub, "HEAD", "/resolve/")[-1])
    assert tried < hub.requests.index(requests(hub, "POST", "/commit/main")[0]), "main moves last"
    files = repo.commits[repo.branches["main"]]
    assert set(files) == OWN | {".gitattributes", "tests/golden.json"}
    for name in OWN:
        assert files[name].content == (folder / name).read_bytes()
    card = files["README.md"].content.decode()
    assert "# tiny\n" in card and "- **topics**: sport, politics\n" in card and 'model="user/tiny"' in card
    printed = "".join(capfd.readouterr())
    assert 'pin it with revision="v1.0"' in printed and TOKEN not in printed
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert not any(TOKEN.encode() in blob.content for commit in repo.commits.values() for blob in commit.values())


def test_what_loads_back_otherwise_never_reaches_main(hub, folder, expected, monkeypatch):
    other = {**expected, "auto/logits.pos/0": expected["auto/logits.pos/0"] + 1}
    monkeypatch.setattr(publish, "rehearse", lambda folder: expected)
    monkeypatch.setattr(publish, "load_in_every_way", lambda *source: (other, []))
    with pytest.raises(
        SystemExit, match=r"auto/logits.pos/0 differs by 1\n(.*\n)*Nothing is published: main .* is as it was"
    ):
        run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1.0")
    repo = hub.repos["user/tiny"]
    assert list(repo.commits[repo.branches["main"]]) == [".gitattributes"]
    assert set(repo.branches) == {"main"} and not repo.tags and not (folder / "README.md").exists()


def test_a_fresh_process_has_empty_caches_and_its_last_words_are_repeated(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os, sys\nassert not os.path.exists(os.environ['HF_HUB_CACHE'])\nsys.exit(sys.argv[1])")
    assert publish.run_fresh(str(program), str(tmp_path), "a\nheads.pos is missing") == ["heads.pos is missing"]
    program.write_text("")
    assert publish.run_fresh(str(program), str(tmp_path)) == []


def test_outputs_that_are_missing_or_others_are_named():
    expected = {"st/embedding/0": np.zeros(3), "t/default/label": np.array(["a"]), "direct/x": np.zeros(1)}
    assert publish.differences({**expected, "st/embedding/0": np.full(3, 1e-6)}, expected) == []
    assert publish.differences({"t/default/label": np.array(["b"])}, expected) == [
        "st/embedding/0 is missing or has another shape",
        "t/default/label is ['b'], should be ['a']",
    ]


def test_an_export_of_other_weights_is_no_part_of_a_release(release, expected, tmp_path):
    pytest.importorskip("onnxruntime")
    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    (copy / "onnx").mkdir()
    (copy / "onnx/model.onnx").write_bytes(b"no graph")
    with pytest.raises(PublishError, match=r"onnx/model.onnx: .* python -m release.onnx .* or delete it"):
        publish.check_export(copy, "onnx", expected)


# The Hub says no


def refusing(hub: LoopbackHub, part: str, status: int, message: str = "not you") -> None:
    def refuse(line: str) -> None:
        if part in line:
            raise HubError(status, message)

    hub.before_request = refuse


REFUSALS = {
    "an unknown token": ("whoami", 401, "does not accept the token: log in again with `hf auth login`"),
    "no right to make it": ("repos/create", 403, r"may not write to user/tiny \(not you\)"),
    "no right to branch": ("/branch/publish-", 403, "may not write to user/tiny"),
    "no right to commit": ("/commit/publish-", 403, "may not write to user/tiny"),
    "no right to main": ("/commit/main", 403, "may not write to user/tiny"),
    "a card it refuses": ("validate-yaml", 400, "Invalid metadata in README.md"),
    "too many requests": ("/refs", 429, "wait a while"),
    "trouble of its own": ("/refs", 500, r"answers 500 \(not you\)"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_said_with_its_mend_and_changes_nothing(hub, folder, tried, refusal, monkeypatch):
    part, status, message = REFUSALS[refusal]
    refusing(hub, part, status)
    with pytest.raises(SystemExit, match=rf"{message}(.*\n)+Nothing is published: main of user/tiny is as it was"):
        run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1.0")
    if "user/tiny" in hub.repos:
        repo = hub.repos["user/tiny"]
        assert set(repo.branches) == {"main"} and list(repo.commits[repo.branches["main"]]) == [".gitattributes"]


def test_a_token_in_a_servers_answer_is_not_repeated(hub, folder, tried, monkeypatch):
    refusing(hub, "repos/create", 403, f"{TOKEN} is too weak")
    with pytest.raises(SystemExit, match="<token> is too weak"):
        run(monkeypatch, "user/tiny", "--folder", folder)


def test_without_token_or_network_there_is_one_line_that_says_so(hub, folder, tried, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="HF_HUB_OFFLINE is set"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="cannot be reached .* look at the network and at HF_ENDPOINT"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    assert hub.requests == []


def test_who_else_moves_main_meanwhile_is_not_overwritten(hub, folder, tried, monkeypatch):
    def move(line: str) -> None:
        if "/commit/main" in line:
            repo = hub.repos["user/tiny"]
            repo.commit(
                "main",
                {**repo.commits[repo.branches["main"]], "theirs.md": repo.commits[repo.branches["main"]][".gitattributes"]},
            )

    hub.before_request = move
    with pytest.raises(SystemExit, match="main of user/tiny has moved meanwhile"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    repo = hub.repos["user/tiny"]
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes", "theirs.md"} and set(repo.branches) == {"main"}


def test_publishing_again_removes_what_is_gone_and_does_nothing_where_nothing_changed(hub, folder, tried, monkeypatch):
    (folder / "old.md").write_text("gone tomorrow")
    run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1")
    (folder / "old.md").unlink()
    run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v2")
    repo = hub.repos["user/tiny"]
    first, second = (repo.commits[repo.tags[name]] for name in ("v1", "v2"))
    assert set(first) - set(second) == {"old.md"} and ".gitattributes" in second
    run(monkeypatch, "user/tiny", "--folder", folder)
    assert repo.branches == {"main": repo.tags["v2"]}


def test_a_taken_tag_a_public_repository_and_another_models_are_refused(hub, folder, tried, monkeypatch):
    run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1")
    before = hub.repos["user/tiny"].branches["main"]
    with pytest.raises(SystemExit, match="has the tag v1 already: choose another, or delete it with"):
        run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1")
    with pytest.raises(SystemExit, match="user/tiny is public: make it private in its settings, or leave out --private"):
        run(monkeypatch, "user/tiny", "--folder", folder, "--private")
    repo = hub.repos["user/tiny"]
    other = repo.commit("main", {"pytorch_model.gguf": repo.commits[before]["config.json"]})
    with pytest.raises(SystemExit, match=r"holds something else .*: choose another name"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    assert repo.branches == {"main": other}


def test_a_tag_that_fails_last_is_told_apart_from_a_release_that_failed(hub, folder, tried, monkeypatch):
    refusing(hub, "/tag/", 403)
    with pytest.raises(
        SystemExit, match="main holds the release, without its tag. Tag it with: hf repos tag create"
    ) as said:
        run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1")
    assert hub.repos["user/tiny"].branches["main"] in str(said.value)


# What is sent


def test_a_dry_run_lists_everything_and_sends_nothing(hub, folder, monkeypatch, capsys):
    before = sorted(folder.rglob("*"))
    run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1.0", "--dry-run")
    printed = capsys.readouterr().out
    listed = {line.split()[1] for line in printed.splitlines() if line[:12].strip().replace(",", "").isdigit()}
    assert listed == OWN | {"bytes"} and "one commit, tagged v1.0. Nothing was sent." in printed
    assert "token.json" in printed and f"{(folder / 'model.safetensors').stat().st_size:,}  model.safetensors" in printed
    assert hub.requests == [] and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["tiny", "user/a/b", "user/-x", "user/a b", "user/a--b", "../tiny", ""])
def test_an_ill_formed_name_is_refused(folder, name):
    with pytest.raises(PublishError, match=f"USER/NAME is '{name}'"):
        prepare(folder, name)


@pytest.mark.parametrize("tag", ["", "main", "a b", "-x", "a..b", "x.lock", "a/b", "é"])
def test_an_ill_formed_tag_is_refused(folder, tag):
    with pytest.raises(PublishError, match="--revision is .* such as v1.0"):
        prepare(folder, "user/tiny", tag)


def test_a_bad_folder_is_not_published(folder):
    (folder / "heads/model.safetensors").unlink()
    (folder / "training").mkdir()
    (folder / "training/model.pt").touch()
    with pytest.raises(PublishError, match=r"is no good release:\n(.*\n)*.*model.pt: may hold pickled code(.*\n)+Mend it"):
        prepare(folder, "user/tiny")
    with pytest.raises(PublishError, match="no such folder"):
        prepare(folder / "nowhere", "user/tiny")


def test_a_file_with_a_secret_stops_publishing_and_is_named_without_it(hub, folder, tried, monkeypatch):
    (folder / "notes.md").write_text(f"log in with {TOKEN}")
    with pytest.raises(PublishError, match="notes.md holds what looks like a token") as said:
        prepare(folder, "user/tiny")
    assert TOKEN not in str(said.value)
    (folder / "notes.md").write_text("my-own-token-of-another-form")
    monkeypatch.setenv("HF_TOKEN", "my-own-token-of-another-form")
    with pytest.raises(SystemExit, match="notes.md holds what looks like a token"):
        run(monkeypatch, "user/tiny", "--folder", folder)


def test_of_a_checkout_what_git_tracks_goes_and_exports_too(folder):
    (folder / ".gitignore").write_text("/runs/\n/onnx/\n*.env\n")
    for name in ("annotate.py", "training/a.py", "training/large.bin.txt", "onnx/model.onnx", "runs/optimizer.pt", "new.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "link.md").symlink_to(folder.parent)
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", ".", ":!new.py"], check=True)
    files, left_out = select(folder)
    sources = {"annotate.py", "training/a.py", "training/large.bin.txt", ".gitignore", "onnx/model.onnx"}
    assert set(files) == OWN | sources
    assert {"new.py", "token.json", "data.parquet", "checkpoint-5/trainer_state.json"} <= set(left_out)
    assert prepare(folder, "user/tiny").files == files, "pickles that git ignores are not in the way"


def test_every_tracked_file_of_this_repository_is_published():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    tracked = set(publish.git_files(ROOT)) - {".gitattributes"}
    assert {name for name in tracked if (ROOT / name).exists()} <= set(prepare(ROOT, "user/name", "v1.0").files)


def test_a_card_with_results_is_rendered_and_another_left_alone(folder):
    (folder / "README.md").write_text("# My own card\n")
    assert prepare(folder, "user/tiny").card == "# My own card\n"
    for name in ("tasks", "release"):
        (folder / "results").mkdir(exist_ok=True)
        (folder / f"results/{name}.json").write_text('{"tasks": {}}' if name == "release" else "{}")
    (folder / "README.md").write_text("<!-- results -->\nold\n<!-- /results -->\n")
    assert "old" not in prepare(folder, "user/tiny").card
    (folder / "README.md").write_text("<!-- results -->\n")
    with pytest.raises(PublishError, match=r"README.md or results/ beside it: the document must hold"):
        prepare(folder, "user/tiny")


def test_other_encoders_have_their_own_files(tmp_path):
    files, _ = select(write_release(tmp_path, "roberta", embedding_dim=None, tasks={}))
    assert set(files) == OWN - {"2_Dense/config.json", "2_Dense/model.safetensors", "heads/model.safetensors"}


def test_golden_answers_are_compared_with_a_little_room():
    answer = {"text": "x", "sentence_embedding": [0.5], "labels": {"mood": {"a": 0.25, "b": 0.75}}, "entities": {"ner": []}}
    near = {**answer, "sentence_embedding": [0.5001], "labels": {"mood": {"a": 0.251, "b": 0.749}, "new": {}}}
    assert golden.differences([near], [answer]) == []
    for field, value in {
        "sentence_embedding": [0.501],
        "labels": {},
        "entities": {"ner": [["PER", "x", 0, 1, 0.5]]},
    }.items():
        assert len(golden.differences([{**answer, field: value}], [answer])) == 1
    assert golden.differences([], [answer]) == ["the sentences are others"]
