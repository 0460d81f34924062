"""Publishes a release folder on the Hub, by default this repository: `python -m release.publish USER/NAME --revision v1.0`

The folder is looked over (release.check) and its card rendered (release.card). All files go up in one commit, first on a
branch of its own: from there a fresh process with an empty cache loads them in every way there is, and what they give is
compared with what the folder gives. Only then does the same commit go to main, and the branch away. Whatever fails before
that leaves main as it was. --dry-run says what would be done, without a network.

The token is the client's own affair: `hf auth login`, or the variable HF_TOKEN. It is never printed or written.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import httpx2
import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from transformers import pipeline
from transformers.utils import logging

from configuration_multitask import WEIGHTS_INDEX, MultiTaskConfig
from modeling_multitask import check_weight_map
from pipeline_multitask import ONNX_FILES
from release.card import can_render, render_card
from release.check import check, folder_files, git_files
from release.export import CODE_FILES, ROOT, sentence_transformers_files
from tests import golden, ways

# What is published beside the release's own files: the documents and the code at the root, and these folders.
_ROOT_FILES = (
    "*.py", "*.md", "*.toml", "requirements*.txt", "constraints.txt", "Makefile", "LICENSE", "CITATION.cff", ".gitignore"
)  # fmt: skip
_FOLDERS = ("bulk", "training", "evaluation", "release", "benchmarks", "experiments", "demo", "tests", "results", ".ci")
_SUFFIXES = (".py", ".toml", ".md", ".txt", ".json", ".jsonl", ".csv", ".png")
# Tokens of the Hub, of GitHub and of AWS, and private keys.
_SECRET = re.compile(
    rb"\bhf_(oauth_)?[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_TOLERANCE = 1e-5  # between the folder and the Hub: the same numbers, computed by the same code
# Between an export's embeddings and PyTorch's: length of the difference of two unit vectors.
_EXPORT_TOLERANCES = {"onnx": 1e-3, "onnx-int8": 0.3}
_HUB_OWN = ".gitattributes"  # which files lie in LFS is the Hub's affair
CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- feature-extraction
- multi-task
- transformers
---
# {name}

One pass over a text gives its sentence embedding and the answers of these tasks:

{tasks}

```python
from transformers import pipeline
from transformers.utils import logging

annotate = pipeline("multitask", model="{repo_id}", trust_remote_code=True)
print(annotate("Tim Cook opened Apple's new store in Paris."))
```

`SentenceTransformer("{repo_id}")` gives the embedding alone and runs none of this repository's code; all other ways run its
three files of Python, so read them and pin what you read with `revision="<commit>"`.

Nothing was measured for this card. What the model was trained on, and what it is good for, its owner should add here.
"""


class PublishError(ValueError):
    """What keeps a model from being published; the message says what to do."""


@dataclass(frozen=True)
class Publication:
    """What is to be published.

    Attributes:
        folder: The release.
        repo_id: Where to, as USER/NAME.
        files: The paths in the folder that are published.
        left_out: Those that are not, but for what git ignores.
        card: The content of README.md.
        tag: The name that the commit gets besides, or None.
        private: Whether only its owner may see the repository, if it is a new one.
    """

    folder: Path
    repo_id: str
    files: list[str]
    left_out: list[str]
    card: str
    tag: str | None = None
    private: bool = False


# What is published


def prepare(folder: Path, repo_id: str, tag: str | None = None, private: bool = False) -> Publication:
    """Returns what would be published, without a look at the Hub.

    Raises:
        PublishError: A name is not well formed, the folder is no good release, or a file holds a secret.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"USER/NAME is {repo_id!r}: {error}") from error
    if "/" not in repo_id:
        raise PublishError(f"USER/NAME is {repo_id!r}; allowed: your name or an organization's, a slash, the model's name.")
    if tag is not None and (not _TAG.fullmatch(tag) or ".." in tag or tag.endswith((".", ".lock")) or tag == "main"):
        raise PublishError(f"--revision is {tag!r}; allowed: a tag of letters, digits, '.', '_', '+' and '-', such as v1.0.")
    if problems := check(folder):
        listed = "\n  ".join(problems)
        raise PublishError(f"{folder} is no good release:\n  {listed}\nMend it, and look it over with: "
                           f"python -m release.check {folder}")  # fmt: skip
    files, left_out = select(folder)
    refuse_secrets(folder, files)
    return Publication(folder, repo_id, files, left_out, render(folder, repo_id), tag, private)


def select(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the files of a release to publish and those to leave out, as sorted relative paths.

    Published are the release's own files, exports among them, and documents and code: in a git checkout only what git
    tracks. Caches, checkpoints, data and what else lies about are in neither allow-list.
    """
    own = {name for name in own_files(folder) if (folder / name).is_file()}
    present = set(folder_files(folder))
    if (folder / ".git").exists():
        tracked = {name for name in git_files(folder) if (folder / name).is_file()}
        documents, present = tracked, present | tracked
    else:
        documents = present
    files = own | {name for name in documents if is_document(name) and not (folder / name).is_symlink()}
    return sorted(files | {"README.md"}), sorted(present - files)


def own_files(folder: Path) -> set[str]:
    """Returns the paths that a good release of this configuration has or may have."""
    config = MultiTaskConfig(**json.loads((folder / "config.json").read_text("utf-8")))
    weights = check_weight_map(json.loads((folder / WEIGHTS_INDEX).read_text("utf-8")), WEIGHTS_INDEX)
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md", WEIGHTS_INDEX, *CODE_FILES}
    return names | set(weights.values()) | set(sentence_transformers_files(config, 0)) | set(ONNX_FILES.values())


def is_document(name: str) -> bool:
    """Returns whether a path is one of a document, a source or a result."""
    path = PurePosixPath(name)
    if len(path.parts) == 1:
        return any(fnmatch(name, pattern) for pattern in _ROOT_FILES)
    hidden = any(part.startswith(".") for part in path.parts[1:])
    return path.parts[0] in _FOLDERS and not hidden and (path.suffix in _SUFFIXES or name == ".ci/run")


def refuse_secrets(folder: Path, files: list[str], token: str | None = None) -> None:
    """Raises PublishError if a file holds what looks like a secret, or the token itself."""
    for name in files:
        path = folder / name
        content = path.read_bytes() if path.exists() else b""
        if _SECRET.search(content) or (token and token.encode() in content):
            raise PublishError(f"{name} holds what looks like a token or a private key: take it out, and revoke it.")


def render(folder: Path, repo_id: str) -> str:
    """Returns the card: made anew from results/, or as it is, or a bare one if there is none."""
    path = folder / "README.md"
    try:
        if path.exists():
            text = path.read_text("utf-8")
            return render_card(text, folder) if can_render(folder) else text
    except (KeyError, OSError, ValueError) as error:
        raise PublishError(f"{path} or results/ beside it: {error}") from error
    tasks = MultiTaskConfig(**json.loads((folder / "config.json").read_text("utf-8"))).task_specs
    lines = [f"- **{name}**: {', '.join(spec.labels)}" for name, spec in tasks.items()]
    return CARD.format(name=repo_id.split("/")[1], repo_id=repo_id, tasks="\n".join(lines) or "- none")


def describe(planned: Publication) -> str:
    """Returns what would be done, as text."""
    sizes = {name: (planned.folder / name).stat().st_size for name in planned.files if (planned.folder / name).exists()}
    sizes["README.md"] = len(planned.card.encode())
    lines = [f"{size:>12,}  {name}" for name, size in sorted(sizes.items())]
    lines.append(f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files")
    if planned.left_out:
        shown = ", ".join(planned.left_out[:5]) + (" …" if len(planned.left_out) > 5 else "")
        lines.append(f"Left out, as neither the release's own nor tracked sources: {shown} ({len(planned.left_out)})")
    kind = "private " if planned.private else ""
    tag = f", tagged {planned.tag}" if planned.tag else ""
    lines.append(f"Would go to the {kind}repository {planned.repo_id} in one commit{tag}. Nothing was sent.")
    return "\n".join(lines)


# What the files give, here and from the Hub


def rehearse(folder: Path) -> dict[str, np.ndarray]:
    """Returns what the folder gives in every way of loading it.

    Raises:
        PublishError: It does not load in all of them, or an export is of other weights.
    """
    outputs, problems = load_in_every_way(str(folder.resolve()))
    if problems:
        raise PublishError(f"{folder} does not load in every way: {problems[0]}")
    for backend, file in ONNX_FILES.items():
        if (folder / file).exists():
            check_export(folder, backend, outputs)
    return outputs


def check_export(folder: Path, backend: str, outputs: dict[str, np.ndarray]) -> None:
    """Raises PublishError if an export cannot be run, or gives other embeddings than PyTorch does."""
    try:
        pipe = pipeline("multitask", model=str(folder), trust_remote_code=True, device="cpu", backend=backend)
        vectors = [record["sentence_embedding"] for record in pipe(ways.TEXTS)]
    except Exception as error:  # ONNX Runtime has its own for each kind of broken file
        reason = str(error).splitlines()[0]
    else:
        far = max(np.linalg.norm(x - outputs[f"pipeline/embedding/{i}"]) for i, x in enumerate(vectors))
        if far <= _EXPORT_TOLERANCES[backend]:
            return
        reason = f"its embeddings are {far:.3f} from PyTorch's; allowed: {_EXPORT_TOLERANCES[backend]}"
    mend = f"Write it anew, with python -m release.onnx {folder}, or delete it."
    raise PublishError(f"{ONNX_FILES[backend]}: {reason}. {mend}")


def load_in_every_way(source: str, *revision: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns what a fresh process with an empty cache gets from a folder or a Hub id, and what went wrong."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = f"{folder}/outputs.npz"
        if problems := run_fresh(ways.__file__, folder, source, file, *revision):
            return {}, problems
        with np.load(file) as stored:
            return dict(stored), []


def run_fresh(program: str, folder: str, *arguments: str) -> list[str]:
    """Runs a program of this repository with its caches in an empty folder, and returns why it failed, if it did."""
    caches = {"HF_HUB_CACHE": f"{folder}/hub", "HF_MODULES_CACHE": f"{folder}/modules"}
    kept = {name: value for name, value in os.environ.items() if name != "SENTENCE_TRANSFORMERS_HOME"}
    environment = {**kept, **caches, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines() or [f"it ended with {done.returncode}"]
    return said[-1:] if done.returncode else []


def load_back(planned: Publication, commit: str, expected: dict[str, np.ndarray]) -> list[str]:
    """Returns in what a commit on the Hub, loaded back, differs from the folder and from its tests/golden.json."""
    found, problems = load_in_every_way(planned.repo_id, commit)
    if problems:
        return problems
    problems = differences(found, expected)
    file = (planned.folder / "tests/golden.json").resolve()
    if file.exists():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            said = run_fresh(golden.__file__, folder, planned.repo_id, str(file), commit)
        problems += [f"{line} (if {file.name} is of earlier weights: python -m tests.golden)" for line in said]
    return problems


def differences(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """Returns one line for each output that is missing or another."""
    lines = []
    for name, value in expected.items():
        if name.startswith("direct/"):
            continue  # the class itself, imported from a folder
        if name not in found or found[name].shape != value.shape:
            lines.append(f"{name} is missing or has another shape")
        elif value.dtype.kind == "f":
            if not np.allclose(found[name], value, rtol=_TOLERANCE, atol=_TOLERANCE):
                lines.append(f"{name} differs by {abs(found[name] - value).max():.2g}")
        elif not np.array_equal(found[name], value):
            lines.append(f"{name} is {found[name].tolist()}, should be {value.tolist()}")
    return lines


# The Hub


def publish(planned: Publication) -> str:
    """Returns the id of the commit on main that holds the release.

    Raises:
        PublishError: Something failed; the message says what, what the Hub holds now, and what to do.
    """
    api, repo_id = HfApi(), planned.repo_id
    untouched = f"Nothing is published: main of {repo_id} is as it was."
    with _step(repo_id, untouched):
        api.whoami()
        refuse_secrets(planned.folder, planned.files, get_token())
        head, remote = open_repository(api, planned)
        print(f"Loading {planned.folder} in every way, to know what to expect")
        expected = rehearse(planned.folder)
        branch = f"publish-{secrets.token_hex(4)}"
        api.create_branch(repo_id, branch=branch, revision=head)
    try:
        with _step(repo_id, untouched):
            staged = commit(api, planned, branch, head, remote)
            print(f"{len(planned.files)} files are on the branch {branch}; loading them from there")
            if problems := load_back(planned, staged, expected):
                raise PublishError("\n  ".join(["Loaded back from the Hub, the model is not the folder's:", *problems[:10]]))
        unsure = f"See {api.endpoint}/{repo_id}/commits/main whether it holds the new commit, and run it again."
        with _step(repo_id, untouched, unsure):
            published = commit(api, planned, "main", head, remote)
            if tree(api, repo_id, published) != tree(api, repo_id, staged):
                raise PublishError(f"main of {repo_id} holds other files than were tried: someone has changed it meanwhile.")
    finally:
        with suppress(httpx2.HTTPError, OSError):
            api.delete_branch(repo_id, branch=branch)
    if planned.tag:
        by_hand = f"hf repos tag create {repo_id} {planned.tag} --revision {published}"
        with _step(repo_id, f"main holds the release, without its tag. Tag it with: {by_hand}"):
            api.create_tag(repo_id, tag=planned.tag, revision=published)
    return published


def open_repository(api: HfApi, planned: Publication) -> tuple[str, set[str]]:
    """Returns the commit that main is at and the files it holds; a repository that does not exist is made.

    Raises:
        PublishError: It is another model's, it is public and should not be, or it has the tag already.
    """
    repo_id, tag = planned.repo_id, planned.tag
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=planned.private or None)
        info = api.model_info(repo_id)
    if planned.private and not info.private:
        raise PublishError(f"{repo_id} is public: make it private in its settings, or leave out --private.")
    names = {file.rfilename for file in info.siblings or []}
    if names - {_HUB_OWN, "README.md", "LICENSE"} and WEIGHTS_INDEX not in names:
        raise PublishError(f"{repo_id} holds something else ({len(names)} files, no {WEIGHTS_INDEX}): choose another name.")
    if tag and any(ref.name == tag for ref in api.list_repo_refs(repo_id).tags):
        raise PublishError(f"{repo_id} has the tag {tag} already: choose another, or delete it with "
                           f"hf repos tag delete {repo_id} {tag}.")  # fmt: skip
    return info.sha, names


def commit(api: HfApi, planned: Publication, branch: str, parent: str, remote: set[str]) -> str:
    """Returns the id of a new commit, after `parent`, that makes a branch hold the published files and no others."""
    gone = sorted(remote - set(planned.files) - {_HUB_OWN})
    files = {name: planned.folder / name for name in planned.files} | {"README.md": planned.card.encode()}
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in gone]
    message = f"Release {planned.tag or ''}".strip()
    done = api.create_commit(planned.repo_id, operations, commit_message=message, revision=branch, parent_commit=parent)
    return done.oid


def tree(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """Returns the id of each file's content at a revision."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}


# What goes wrong


@contextmanager
def _step(repo_id: str, outcome: str, unsure: str | None = None) -> Iterator[None]:
    """Turns what goes wrong inside into a PublishError, which also says what the Hub holds now.

    Args:
        repo_id: The repository.
        outcome: What it holds if the step fails.
        unsure: The same if the Hub has not clearly refused; None: as `outcome`.
    """
    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        text = f"{explain(error, repo_id)}\n{outcome if refused or unsure is None else unsure}"
        token = get_token()  # what a server or a library says is not ours to vouch for
        raise PublishError(text.replace(token, "<token>") if token else text) from error


def explain(error: BaseException, repo_id: str) -> str:
    """Returns in a line what has failed and how to mend it."""
    if isinstance(error, RuntimeError) and error.__cause__:
        return explain(error.__cause__, repo_id)  # an upload's
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and publishing needs the Hub: unset it."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = (error.server_message or "no reason given").splitlines()[0]
        return _REFUSALS.get(status, "The Hub answers {status} ({reason}). Try again later.").format(
            repo_id=repo_id, status=status, reason=reason
        )
    if isinstance(error, httpx2.HTTPError):
        return f"The Hub cannot be reached ({error or type(error).__name__}): look at the network and at HF_ENDPOINT."
    return str(error).strip()


_REFUSALS = {
    400: "The Hub does not accept what was sent: {reason}",
    401: "The Hub does not accept the token: log in again with `hf auth login`, or set HF_TOKEN to a valid one.",
    403: "The token may not write to {repo_id} ({reason}): use one that may, or publish under a name of your own.",
    404: "{repo_id} was not found on the Hub, or the token may not see it ({reason}).",
    409: "{repo_id} does not allow it as it is ({reason}): run it again.",
    412: "main of {repo_id} has moved meanwhile: see who has changed it and why, and run it again.",
    429: "The Hub has had too many requests: wait a while, and run it again.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; made, if it does not exist")
    parser.add_argument("--folder", type=Path, default=ROOT, help="the release; default: this repository")
    parser.add_argument("--private", action="store_true", help="a new repository that its owner alone can see")
    parser.add_argument("--revision", metavar="TAG", help="a tag for the commit, such as v1.0")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes; send nothing")
    args = parser.parse_args()
    try:
        planned = prepare(args.folder, args.repo_id, args.revision, args.private)
        if args.dry_run:
            print(describe(planned))
            return
        disable_progress_bars()
        logging.disable_progress_bar()
        published = publish(planned)
    except PublishError as error:
        sys.exit(str(error))
    (args.folder / "README.md").write_text(planned.card, "utf-8")
    print(f'{args.repo_id} holds the release: pin it with revision="{args.revision or published}" ({published})')


if __name__ == "__main__":
    main()
