"""Publishes a release on the Hub, by default this repository: `python -m release.publish USER/NAME --revision v1.0`

A copy of the files is checked (`release.check`), searched for secrets and uploaded as a pull request. A fresh process with
an empty cache then loads the pull request in every way and compares its answers with `release/golden.json`. Only if they
match is the pull request merged and the merge tagged. If anything fails before that, `main` stays as it is and the pull
request is closed; in a public repository its files remain visible until its ref is deleted on the website.

A git checkout publishes what git tracks, any other folder the files of a release; both add their ONNX exports.
`--dry-run` lists the files and sends nothing. To log in, run `hf auth login` or set HF_TOKEN; the token is never printed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import httpx2
import numpy as np
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from transformers.utils import logging

from annotator_multitask import ONNX_FILES
from common.files import ROOT
from configuration_multitask import WEIGHTS_INDEX
from release import golden, ways
from release.card import can_render, render_card
from release.check import check, git_files
from release.export import EXPORTS

# Of a folder that is not a git checkout, these are published; other files may be data, checkpoints or credentials.
_RELEASE_FILES = (
    "*.md", "*.py", "LICENSE", "config*.json", "modules.json", "sentence_bert_config.json", "tokenizer*.json", "vocab.txt",
    WEIGHTS_INDEX, "model.safetensors", "[0-9]_*/config.json", "[0-9]_*/model.safetensors", "heads/model.safetensors",
    "results/*.json", "release/golden.json",
)  # fmt: skip
_HUB_FILE = ".gitattributes"  # the Hub's record of which files are in LFS
# Tokens of Hugging Face, GitHub, GitLab, OpenAI and Anthropic, Google, Slack and AWS, and private keys.
_SECRET = re.compile(
    rb"hf_(oauth_)?[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    rb"|sk-(?<![A-Za-z0-9]sk-)(proj|svcacct|admin|ant)-[\w-]{20,}|AIza[\w-]{35}|xox[abeoprs]-[\w-]{10,}"
    rb"|A[KS]IA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_TAG = re.compile(r"(?!main$|.*\.lock$)\w[\w+-]*(\.[\w+-]+)*", re.ASCII)
# Largest distance between the embeddings (unit vectors) of an export and of PyTorch.
_EXPORT_TOLERANCES = {"onnx": 1e-3, "onnx-int8": 0.3}
_CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---
# {repo_id}

One pass over a text gives its sentence embedding and the labels of the tasks {tasks}.

`pipeline("multitask", model="{repo_id}", trust_remote_code=True)` gives all of them, `SentenceTransformer("{repo_id}")` the
embedding alone, without `trust_remote_code`.
"""


class PublishError(ValueError):
    """Why a release was not published; the message says what to do."""


# The copy that is checked and sent


def take_snapshot(folder: Path, repo_id: str, snapshot: Path) -> None:
    """Copies what is published to a new folder and checks the copy. A release without README.md gets a short one.

    Raises:
        PublishError: The folder fails `release.check`, a file is a link or holds a secret, or README.md is out of date.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder}: no such folder.")
    snapshot.mkdir()
    for name in release_files(folder):
        if (folder / name).resolve() != folder.resolve() / name:
            raise PublishError(f"{name} is a link, which could lead out of {folder}. Replace it with a copy of the file.")
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, snapshot / name)
    if problems := check(snapshot):
        raise PublishError("\n  ".join([f"{folder} is not ready to publish:", *problems]))
    card = snapshot / "README.md"
    if not card.exists():
        tasks = json.loads((snapshot / "config.json").read_text("utf-8"))["tasks"]
        card.write_text(_CARD.format(repo_id=repo_id, tasks=", ".join(tasks) or "none"), "utf-8")
    elif can_render(snapshot) and render_card(text := card.read_text("utf-8"), snapshot) != text:
        raise PublishError(f"README.md does not show the numbers in results/. Run: python -m release.card {folder}")
    refuse_secrets(snapshot)
    check_exports(snapshot)


def release_files(folder: Path) -> list[str]:
    """Returns the paths to publish, relative to the folder."""
    if (folder / ".git").exists():
        names = set(git_files(folder))
    else:
        names = {path.relative_to(folder).as_posix() for pattern in _RELEASE_FILES for path in folder.glob(pattern)}
    names |= set(EXPORTS)  # which git ignores
    # Not what is deleted, nor folders: submodules of the checkout.
    return sorted(x for x in names - {_HUB_FILE} if (folder / x).is_file() or (folder / x).is_symlink())


def refuse_secrets(snapshot: Path) -> None:
    """Raises PublishError if a file holds what looks like a secret, or the token for the Hub."""
    token = (get_token() or "").encode()
    for name in files_in(snapshot):
        content = (snapshot / name).read_bytes().replace(b"\0", b"")  # so that text in UTF-16 is found, too
        if _SECRET.search(content) or (token and token in content):
            raise PublishError(f"{name} holds what looks like a token or a private key. Remove it there, and revoke it.")


def check_exports(snapshot: Path) -> None:
    """Raises PublishError if an ONNX file does not run, or gives other embeddings than PyTorch."""
    for backend, file in ONNX_FILES.items():
        if not (snapshot / file).exists():
            continue
        try:
            torch, onnx = (golden.load(str(snapshot), backend=name)(golden.SENTENCES) for name in ("torch", backend))
            pairs, allowed = zip(torch, onnx, strict=True), _EXPORT_TOLERANCES[backend]
            distance = max(np.linalg.norm(x["sentence_embedding"] - y["sentence_embedding"]) for x, y in pairs)
            if distance > allowed:
                raise ValueError(f"its embeddings differ from PyTorch's by {distance:.3f}, allowed: {allowed}")
        except Exception as error:  # ONNX Runtime has an exception of its own for each kind of broken file
            raise PublishError(f"{file}: {error}. Rebuild it with `python -m release.onnx`, or delete it.") from error


def files_in(snapshot: Path) -> list[str]:
    """Returns the paths of all files, relative to the snapshot."""
    return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())


# The Hub


def publish(snapshot: Path, repo_id: str, tag: str | None = None, private: bool = False) -> str:
    """Returns the id of the commit on main that holds the release.

    Args:
        snapshot: A folder that `take_snapshot` has filled.
        repo_id: The repository as USER/NAME; created if it does not exist.
        tag: A tag for the commit.
        private: Whether the repository must be private.

    Raises:
        PublishError, httpx2.HTTPError, OSError, RuntimeError, ValueError: Something failed; a note on the exception says what
            the Hub holds now.
    """
    api, pull = HfApi(), None
    outcome = f"Nothing is published unless {api.endpoint}/{repo_id}/commits/main shows it."
    try:
        api.whoami()  # without a valid token, fail before anything is sent
        head, present = open_repository(api, repo_id, tag, private)
        proposal = propose(api, snapshot, repo_id, head, present, tag)
        pull = proposal.pr_num
        print(f"Loading {proposal.pr_url or repo_id} in every way")
        load_back(snapshot, repo_id, proposal.oid)
        if api.model_info(repo_id).sha != head:
            raise PublishError(f"main of {repo_id} has changed meanwhile. See who changed it, and run this again.")
        if pull:
            api.merge_pull_request(repo_id, pull)
            pull = None
        published = api.model_info(repo_id).sha
        if tag:
            command = f"hf repos tag create {repo_id} {tag} --revision {published}"
            outcome = f"main holds the release, without its tag. Create the tag with: {command}"
            api.create_tag(repo_id, tag=tag, revision=published)
    except BaseException as error:
        error.add_note(outcome)
        if pull:
            with suppress(httpx2.HTTPError, OSError):
                api.change_discussion_status(repo_id, pull, "closed")
        raise
    return published


def open_repository(api: HfApi, repo_id: str, tag: str | None, private: bool) -> tuple[str, set[str]]:
    """Returns the commit that main is at and the files it holds; a repository that does not exist is created.

    Raises:
        PublishError: It holds something else, it is public and must not be, or it has the tag already.
    """
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    info = api.model_info(repo_id)
    if private and not info.private:
        raise PublishError(f"{repo_id} is public. Make it private in its settings, or leave out --private.")
    names = {file.rfilename for file in info.siblings or []}
    if names - {_HUB_FILE, "README.md", "LICENSE"} and WEIGHTS_INDEX not in names:
        raise PublishError(f"{repo_id} holds something else ({len(names)} files, no {WEIGHTS_INDEX}). Choose another name.")
    if tag and any(ref.name == tag for ref in api.list_repo_refs(repo_id).tags):
        command = f"hf repos tag delete {repo_id} {tag}"
        raise PublishError(f"{repo_id} has the tag {tag} already. Choose another, or delete it with: {command}")
    return info.sha, names


def propose(api: HfApi, snapshot: Path, repo_id: str, parent: str, present: set[str], tag: str | None) -> CommitInfo:
    """Returns a pull request that makes the repository hold the snapshot's files and no others.

    If main holds exactly them already, the result is main's commit, without a pull request.
    """
    files = files_in(snapshot)
    additions = [CommitOperationAdd(name, snapshot / name) for name in files]
    # By default, the Hub silently drops files that .gitignore names, such as the exports.
    api.preupload_lfs_files(repo_id, additions, create_pr=True, gitignore_content="", free_memory=False)
    deletions = [CommitOperationDelete(name) for name in sorted(present - {*files, _HUB_FILE})]
    message = f"Release {tag or ''}".strip()
    return api.create_commit(repo_id, [*additions, *deletions], commit_message=message, create_pr=True, parent_commit=parent)


def load_back(snapshot: Path, repo_id: str, commit: str) -> None:
    """Loads a commit from the Hub in every way and compares its answers with release/golden.json, or else the snapshot's own.

    Raises:
        PublishError: It does not load in a fresh process with an empty cache, or the answers differ.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        expected = snapshot / "release/golden.json"
        if not expected.exists():
            expected = Path(folder, "golden.json")
            expected.write_text(json.dumps(golden.answers(golden.load(str(snapshot)))), "utf-8")
        problem = run_fresh(golden.__file__, folder, repo_id, str(expected), commit)
        problem = problem or run_fresh(ways.__file__, folder, repo_id, f"{folder}/outputs.npz", commit)
    if problem:
        raise PublishError(f"What was uploaded is not the model that was expected: {problem}\n"
                           "If release/golden.json is older than the weights, run `python -m release.golden`.")  # fmt: skip


def run_fresh(program: str, folder: str, *arguments: str) -> str:
    """Runs a Python file with its caches in a folder, and returns the last line it printed if it failed, else ""."""
    caches = {"HF_HUB_CACHE": f"{folder}/hub", "HF_MODULES_CACHE": f"{folder}/modules"}
    kept = {name: value for name, value in os.environ.items() if name != "SENTENCE_TRANSFORMERS_HOME"}
    environment = {**kept, **caches, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    printed = (done.stdout.strip() or done.stderr.strip()).splitlines() or [f"exit status {done.returncode}"]
    return printed[-1] if done.returncode else ""


def check_names(repo_id: str, tag: str | None) -> None:
    """Raises ValueError if the repository or the tag cannot have that name."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise PublishError(f"USER/NAME is {repo_id!r}; allowed: your name or an organization's, a slash, the model's name.")
    if tag is not None and not _TAG.fullmatch(tag):
        raise PublishError(f"--revision is {tag!r}; allowed: a tag of letters, digits, '.', '_', '+' and '-', such as v1.0.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; created if it does not exist")
    parser.add_argument("--folder", type=Path, default=ROOT, help="the release; default: this repository")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="TAG", help="a tag for the commit, such as v1.0")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes; send nothing")
    args = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        check_names(args.repo_id, args.revision)
        with tempfile.TemporaryDirectory() as temporary:
            snapshot = Path(temporary, args.folder.resolve().name)  # a card may be named after its folder
            take_snapshot(args.folder, args.repo_id, snapshot)
            if args.dry_run:
                for name in (names := files_in(snapshot)):
                    print(f"{(snapshot / name).stat().st_size:>12,}  {name}")
                print(f"{len(names)} files for {args.repo_id}. Nothing was sent.")
                return
            published = publish(snapshot, args.repo_id, args.revision, args.private)
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = error.__cause__ if isinstance(error, RuntimeError) else error  # the client's, around a failed upload
        sys.exit("\n".join([str(reason or error).strip(), *getattr(error, "__notes__", [])]))
    print(f'{args.repo_id} holds the release: pin it with revision="{args.revision or published}" ({published})')


if __name__ == "__main__":
    main()
