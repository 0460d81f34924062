"""Publishing: what is sent, that it is tested before main moves, what happens when something fails, and no token anywhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from release import golden, publish
from release.publish import PublishError, release_files
from tests.conftest import ROOT, write_release
from tests.loopback_hub import HubError, LoopbackHub

TOKEN = "hf_" + "neverPrintedOrWritten" * 2
OWN = {
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "README.md", "config.json",
    "config_sentence_transformers.json", "configuration_multitask.py", "heads/model.safetensors", "learning_multitask.py", "model.safetensors",
    "modeling_multitask.py", "modules.json", "multitask.safetensors.index.json", "pipeline_multitask.py", "handler.py", "weights_multitask.py", "annotator_multitask.py", "tasks_multitask.py",
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


@pytest.fixture
def tested(monkeypatch):
    """Publishing takes for granted that the folder is a good release, and that what was uploaded loads."""
    monkeypatch.setattr(publish, "check", lambda snapshot: [])
    monkeypatch.setattr(publish, "load_back", lambda *arguments: None)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["publish", *map(str, arguments)])
    publish.main()


def dry_run(monkeypatch, folder: Path) -> None:
    run(monkeypatch, "user/tiny", "--folder", folder, "--dry-run")


def requests(hub: LoopbackHub, verb: str, part: str) -> list[str]:
    return [line for line in hub.requests if line.startswith(verb) and part in line]


def on_request(hub: LoopbackHub, part: str, do: Callable[[], None]) -> None:
    """Does something when the first request comes that contains `part`, before it is answered."""

    def before_request(line: str) -> None:
        if part in line:
            hub.before_request = lambda line: None
            do()

    hub.before_request = before_request


def refuse(hub: LoopbackHub, part: str, status: int, message: str = "not you") -> None:
    def before_request(line: str) -> None:
        if part in line:
            raise HubError(status, message)

    hub.before_request = before_request


def change_main(hub: LoopbackHub, name: str) -> None:
    """Someone else commits a file to main."""
    repo = hub.repos["user/tiny"]
    files = repo.commits[repo.branches["main"]]
    repo.commit("main", {**files, name: files[".gitattributes"]})


def main_files(hub: LoopbackHub) -> dict[str, bytes]:
    repo = hub.repos["user/tiny"]
    return {name: blob.content for name, blob in repo.commits[repo.branches["main"]].items()}


def statuses(hub: LoopbackHub) -> list[str]:
    return [pull.status for pull in hub.repos["user/tiny"].pulls.values()]


# With the models


@pytest.mark.slow
def test_a_release_is_merged_into_main_after_it_was_loaded_from_the_hub(hub, folder, monkeypatch, capfd, tmp_path):
    run(monkeypatch, "user/tiny", "--folder", folder, "--private", "--revision", "v1.0")
    repo = hub.repos["user/tiny"]
    assert repo.private and repo.tags == {"v1.0": repo.branches["main"]} and statuses(hub) == ["merged"]
    loaded, merged = requests(hub, "HEAD", "/resolve/")[-1], requests(hub, "POST", "/discussions/1/merge")[0]
    assert hub.requests.index(loaded) < hub.requests.index(merged), "main moves last"
    files = main_files(hub)
    assert set(files) == OWN | {".gitattributes"}
    for name in OWN - {"README.md"}:
        assert files[name] == (folder / name).read_bytes()
    card = files["README.md"].decode()
    assert "# user/tiny\n" in card and "topics" in card and 'model="user/tiny"' in card
    assert not (folder / "README.md").exists(), "publishing changes nothing in the folder"
    printed = "".join(capfd.readouterr())
    assert 'pin it with revision="v1.0"' in printed and TOKEN not in printed
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert not any(TOKEN.encode() in blob.content for commit in repo.commits.values() for blob in commit.values())


def test_what_answers_otherwise_never_reaches_main(hub, folder, monkeypatch):
    answers = golden.answers(golden.load(str(folder)))
    answers[0]["labels"]["sentiment"]["negative"] += 0.1
    (folder / "release").mkdir()
    (folder / "release/golden.json").write_text(json.dumps(answers))
    with pytest.raises(SystemExit, match=r"not ready to publish:\n  sentiment of \"Tim Cook"):
        run(monkeypatch, "user/tiny", "--folder", folder)  # what the lint sees here never leaves
    monkeypatch.setattr("release.publish.check", lambda folder: [])  # as if only the Hub's copy answered otherwise
    message = r"not the model that was expected: sentiment of \"Tim Cook .*(\n.*)+\nNothing is published unless http"
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1.0")
    assert set(main_files(hub)) == {".gitattributes"} and not hub.repos["user/tiny"].tags and statuses(hub) == ["closed"]


def test_a_fresh_process_has_empty_caches_and_its_last_words_are_repeated(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os, sys\nassert not os.path.exists(os.environ['HF_HUB_CACHE'])\nsys.exit(sys.argv[1])")
    assert publish.run_fresh(str(program), str(tmp_path), "a\nheads.pos is missing") == "heads.pos is missing"
    program.write_text("")
    assert publish.run_fresh(str(program), str(tmp_path)) == ""


def test_a_broken_export_is_no_part_of_a_release(folder, monkeypatch):
    pytest.importorskip("onnxruntime")
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").write_bytes(b"no graph")
    with pytest.raises(SystemExit, match=r"onnx/model.onnx: .* `python -m release.onnx`, or delete it"):
        dry_run(monkeypatch, folder)


# The Hub says no, or someone else is faster


REFUSALS = {
    "an unknown token": ("whoami", 401, "Invalid user token.*`hf auth login`"),
    "no right to create it": ("repos/create", 403, "not you"),
    "no right to propose": ("/commit/main", 403, "not you"),
    "no right to merge": ("/merge", 403, "not you"),
    "a card it refuses": ("validate-yaml", 400, "Invalid metadata in README.md"),
    "trouble of its own": ("/refs", 500, "not you"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_explained_and_changes_nothing(hub, folder, tested, refusal, monkeypatch):
    part, status, message = REFUSALS[refusal]
    refuse(hub, part, status)
    with pytest.raises(SystemExit, match=rf"{message}(.*\n)+Nothing is published unless"):
        run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1.0")
    if "user/tiny" in hub.repos:
        assert set(main_files(hub)) == {".gitattributes"} and set(statuses(hub)) <= {"closed"}


def test_without_token_or_network_the_message_says_so(hub, folder, tested, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="no token found(.*\n)*.*hf auth login"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="unset the `HF_HUB_OFFLINE`"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="Connection refused"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    assert hub.requests == []


def test_a_commit_of_someone_else_during_the_test_is_not_merged_with(hub, folder, monkeypatch):
    monkeypatch.setattr(publish, "load_back", lambda *arguments: change_main(hub, "theirs.md"))
    with pytest.raises(SystemExit, match="main of user/tiny has changed meanwhile(.*\n)+Nothing is published unless"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    assert set(main_files(hub)) == {".gitattributes", "theirs.md"} and statuses(hub) == ["closed"]


def test_a_file_of_someone_else_is_not_overwritten(hub, folder, tested, monkeypatch):
    on_request(hub, "/merge", lambda: change_main(hub, "config.json"))
    with pytest.raises(SystemExit, match="config.json conflicts with main"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    assert set(main_files(hub)) == {".gitattributes", "config.json"} and statuses(hub) == ["closed"]


def test_publishing_again_removes_what_is_gone_and_does_nothing_where_nothing_changed(hub, folder, tested, monkeypatch):
    (folder / "old.md").write_text("gone tomorrow")
    run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1")
    (folder / "old.md").unlink()
    run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v2")
    repo = hub.repos["user/tiny"]
    first, second = (repo.commits[repo.tags[name]] for name in ("v1", "v2"))
    assert set(first) - set(second) == {"old.md"} and ".gitattributes" in second
    run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v2-again")
    assert repo.branches["main"] == repo.tags["v2"] == repo.tags["v2-again"] and statuses(hub) == ["merged"] * 2


def test_a_taken_tag_a_public_repository_and_another_models_are_refused(hub, folder, tested, monkeypatch):
    run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1")
    before = hub.repos["user/tiny"].branches["main"]
    with pytest.raises(SystemExit, match="has the tag v1 already. Choose another, or delete it with"):
        run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1")
    with pytest.raises(SystemExit, match="user/tiny is public. Make it private in its settings, or leave out --private"):
        run(monkeypatch, "user/tiny", "--folder", folder, "--private")
    repo = hub.repos["user/tiny"]
    other = repo.commit("main", {"pytorch_model.gguf": repo.commits[before]["config.json"]})
    with pytest.raises(SystemExit, match=r"holds something else .* Choose another name"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    assert repo.branches["main"] == other and statuses(hub) == ["merged"]


def test_a_tag_that_fails_last_is_told_apart_from_a_release_that_failed(hub, folder, tested, monkeypatch):
    refuse(hub, "/tag/", 403)
    with pytest.raises(SystemExit, match="main holds the release, without its tag. .* hf repos tag create") as said:
        run(monkeypatch, "user/tiny", "--folder", folder, "--revision", "v1")
    assert hub.repos["user/tiny"].branches["main"] in str(said.value)


# What is sent


def test_a_dry_run_lists_everything_and_sends_nothing(hub, folder, monkeypatch, capsys):
    before = sorted(folder.rglob("*"))
    dry_run(monkeypatch, folder)
    printed = capsys.readouterr().out
    assert {line.split()[1] for line in printed.splitlines()} == OWN | {"files"} and "Nothing was sent." in printed
    assert f"{(folder / 'model.safetensors').stat().st_size:,}  model.safetensors" in printed
    assert hub.requests == [] and sorted(folder.rglob("*")) == before


def test_what_changes_after_the_check_is_not_sent(hub, folder, tested, monkeypatch):
    (folder / "notes.md").write_text("as it was checked")
    on_request(hub, "whoami", lambda: (folder / "notes.md").write_text(f"log in with {TOKEN}"))
    run(monkeypatch, "user/tiny", "--folder", folder)
    assert main_files(hub)["notes.md"] == b"as it was checked"


@pytest.mark.parametrize("name", ["tiny", "user/a/b", "user/-x", "user/a b", "user/a--b", "../tiny", ""])
def test_an_ill_formed_name_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        publish.check_names(name, None)


@pytest.mark.parametrize("tag", ["", "main", "a b", "-x", "a..b", "x.lock", "a/b", "é", "v1."])
def test_an_ill_formed_tag_is_refused(tag):
    with pytest.raises(PublishError, match="--revision is .* such as v1.0"):
        publish.check_names("user/tiny", tag)


def test_a_bad_folder_is_not_published(folder, monkeypatch):
    (folder / "heads/model.safetensors").unlink()
    with pytest.raises(SystemExit, match="is not ready to publish:\n(.*\n)*.*heads/model.safetensors"):
        dry_run(monkeypatch, folder)
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        dry_run(monkeypatch, folder / "nowhere")


SECRETS = {  # each with the letters that its kind has; parts, so that this file holds none
    "Hugging Face": "hf_" + "a1" * 17,
    "GitHub": "ghp_" + "a1" * 18,
    "GitHub, fine-grained": "github_" + "pat_" + "11ABCDEFG0aBcDeFgHiJkL_" + "a1" * 29,
    "GitLab": "glpat" + "-" + "a1_-" * 5,
    "OpenAI": "sk-" + "proj-" + "a1_-" * 10,
    "Anthropic": "sk-" + "ant-" + "api03-" + "a1_-" * 10,
    "Google": "AIza" + "a1_-B" * 7,
    "Slack": "xoxb" + "-123456789012-1234567890123-" + "a1" * 12,
    "AWS": "AKIA" + "A1" * 8,
    "private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("kind", SECRETS)
def test_a_file_with_a_secret_is_named_without_it(tmp_path, kind, encoding):
    (tmp_path / "notes.md").write_text(f'KEY="{SECRETS[kind]}"', encoding)
    with pytest.raises(PublishError, match="notes.md holds what looks like a token") as said:
        publish.refuse_secrets(tmp_path)
    assert SECRETS[kind] not in str(said.value)


def test_ordinary_names_are_no_secrets(tmp_path):
    (tmp_path / "notes.md").write_text("hf_hub_download, sk-learn, task-proj-a-rather-long-folder-name, glpat-, AIza, xoxb-")
    publish.refuse_secrets(tmp_path)


def test_a_file_with_the_token_for_the_hub_stops_publishing(hub, folder, monkeypatch):
    (folder / "notes.md").write_text("my-own-token-of-another-form")
    monkeypatch.setenv("HF_TOKEN", "my-own-token-of-another-form")
    with pytest.raises(SystemExit, match="notes.md holds what looks like a token"):
        run(monkeypatch, "user/tiny", "--folder", folder)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "results"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name, monkeypatch):
    (tmp_path / "results.json").write_text("mine alone")
    (folder / name).symlink_to(tmp_path / "results.json" if name == "README.md" else tmp_path)
    with pytest.raises(SystemExit, match=f"{name}.* is a link"):
        dry_run(monkeypatch, folder)


def test_of_a_checkout_what_git_tracks_goes_and_exports_too(hub, folder, tested, monkeypatch):
    monkeypatch.setattr(publish, "check_exports", lambda snapshot: None)
    (folder / ".gitignore").write_text("/runs/\n/onnx/\n*.env\n__pycache__/\n")
    for name in (
        "annotate.py",
        "training/a.py",
        "data/a.csv",
        "onnx/model.onnx",
        "runs/optimizer.pt",
        ".ci/run",
        "new.py",
        "old.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run(
        [*git, "add", ".", ":!new.py", ":!token.json", ":!data.parquet", ":!checkpoint-5", ":!.cache"], check=True
    )
    (folder / "old.py").unlink()
    run(monkeypatch, "user/tiny", "--folder", folder)
    sources = {"annotate.py", "training/a.py", "data/a.csv", ".gitignore", "onnx/model.onnx", ".ci/run"}
    assert set(main_files(hub)) == OWN | sources | {".gitattributes"}


def test_a_checkout_that_git_cannot_read_is_refused(folder, monkeypatch):
    (folder / ".git").mkdir()
    with pytest.raises(SystemExit, match="git cannot list its files"):
        dry_run(monkeypatch, folder)


def test_this_repository_can_be_published(monkeypatch, capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    dry_run(monkeypatch, ROOT)
    assert "  release/publish.py\n" in capsys.readouterr().out


def test_a_card_must_show_the_results(folder, monkeypatch):
    (folder / "README.md").write_text("# My own card\n")
    dry_run(monkeypatch, folder)
    for name in ("tasks", "release"):
        (folder / "results").mkdir(exist_ok=True)
        (folder / f"results/{name}.json").write_text('{"tasks": {}}' if name == "release" else "{}")
    (folder / "README.md").write_text("<!-- results -->\nold\n<!-- /results -->\n")
    with pytest.raises(SystemExit, match="README.md does not show the numbers in results/. Run: python -m release.card"):
        dry_run(monkeypatch, folder)
    (folder / "README.md").write_text("<!-- results -->\n")
    with pytest.raises(SystemExit, match="the document must hold"):
        dry_run(monkeypatch, folder)


def test_other_encoders_have_their_own_files(tmp_path):
    files = release_files(write_release(tmp_path, "roberta", embedding_dim=None, tasks={}))
    assert set(files) == OWN - {"README.md", "2_Dense/config.json", "2_Dense/model.safetensors"}


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
