"""A test double of the Hugging Face Hub: an HTTP server on loopback that keeps model repositories in memory.

The real client talks to it, with all that is built on the client, in a process whose environment says so:

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.env(tmp_path / "home"), check=True)

Commits, pull requests, tags, LFS uploads and error codes behave as on the Hub. There are no permissions, discussions,
datasets, Spaces, model card metadata or partial downloads. A test that needs a refusal, or something that happens
meanwhile, sets `before_request`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

USER = {"type": "user", "id": "user", "name": "user", "fullname": "user", "orgs": [], "auth": {}}
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".pt")
LFS_SIZE = 10_000_000  # bytes; larger files go through LFS whatever their name
CLIENT_SETTINGS = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_")


class HubError(Exception):
    """A refused request. The client picks its exception by `code`; `fields` go into the JSON next to the message."""

    def __init__(self, status: int, message: str, code: str = "", **fields: str) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **fields}


class Blob(NamedTuple):
    """One version of one file; its id is the SHA-256 of the content if it lies in LFS, else the SHA-1 git gives it."""

    content: bytes
    oid: str
    lfs: bool = False


@dataclass
class PullRequest:
    """A pull request against main: the commit that it starts from, and whether it is open, merged or closed."""

    base: str
    status: str = "open"


@dataclass
class Repo:
    """A repository: the files of every commit by path, the commits that branches and tags point to, and pull requests.

    The branch of pull request 1 is "refs/pr/1".
    """

    repo_id: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        """Adds a commit of these files to a branch and returns its id."""
        content = [self.repo_id, self.branches.get(branch), sorted((path, blob.oid) for path, blob in files.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, rev: str) -> str:
        """Returns the commit id that a branch, tag or commit id stands for."""
        sha = self.branches.get(rev) or self.tags.get(rev) or rev
        if sha not in self.commits:
            raise HubError(404, f"{self.repo_id} has no revision {rev!r}.", "RevisionNotFound")
        return sha

    def entries(self, rev: str) -> list[dict[str, Any]]:
        """Returns all folders and files of a revision as the Hub lists them."""
        files = self.commits[self.resolve(rev)]
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        listed: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": "", "size": 0} for path in folders]
        for path, (content, oid, lfs) in files.items():
            listed.append({"type": "file", "path": path, "oid": oid, "size": len(content)})
            if lfs:
                listed[-1]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        return sorted(listed, key=lambda entry: entry["path"])


class LoopbackHub:
    """The hub, which runs while its context is entered.

    Attributes:
        url: Address of the server, for HF_ENDPOINT.
        requests: All requests so far in order, as "METHOD path".
        repos: The repositories by id.
        objects: The content of LFS files by SHA-256.
        before_request: Called with each request, as "METHOD path", before it is answered; may raise `HubError`.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.before_request: Callable[[str], None] = lambda line: None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Connection, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Path) -> dict[str, str]:
        """Returns the environment of a client process that has its caches in `home`.

        It is this process's own, without the client settings in it: HF_HUB_OFFLINE or a cache folder would lead away.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_SETTINGS)}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class _Connection(BaseHTTPRequestHandler):
    """Answers the requests of one connection: each route's method returns the body, bytes or else sent as JSON."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the client to acknowledge the headers

    def __init__(self, hub: LoopbackHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)  # serves the connection until it closes

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.reply_headers: dict[str, str] = {}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = 200
        try:
            with self.hub.lock:  # one request at a time: none sees another half done
                reply = self._route(f"{self.command} {url.path}")
        except HubError as error:
            status, reply = error.status, error.body
            self.reply_headers["X-Error-Code"] = error.code
        self._send(status, reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, line: str) -> Any:
        self.hub.requests.append(line)
        self.hub.before_request(line)
        for pattern, method in self.routes:
            if match := re.fullmatch(pattern, line):
                values: dict[str, Any] = {name: unquote(value) for name, value in match.groupdict("").items()}
                if "repo" in values:
                    values["repo"] = self._repo(values["repo"])
                return method(self, **values)
        raise HubError(404, f"The loopback hub has no route for {line}.")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**self.reply_headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps test output quiet."""

    def _repo(self, repo_id: str) -> Repo:
        if repo_id not in self.hub.repos:
            raise HubError(404, f"There is no repository {repo_id!r}.", "RepoNotFound")
        return self.hub.repos[repo_id]

    def _create_repo(self) -> Any:
        asked = json.loads(self.body)
        if asked.get("type", "model") != "model":
            raise HubError(400, "The loopback hub keeps model repositories only.")
        repo_id = f"{asked.get('organization') or USER['name']}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise HubError(409, f"{repo_id} exists already.", url=url)  # with exist_ok the client goes on to the URL
        self.hub.repos[repo_id] = repo = Repo(repo_id, asked.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.commit("main", {".gitattributes": _git_blob(attributes.encode())})
        return {"url": url}

    def _info(self, repo: Repo, rev: str) -> Any:
        sha = repo.resolve(rev or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        return {"id": repo.repo_id, "sha": sha, "private": repo.private, "gated": False, "tags": [], "siblings": siblings}

    def _refs(self, repo: Repo) -> Any:
        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        branches = {name: sha for name, sha in repo.branches.items() if not name.startswith("refs/pr/")}
        return {"branches": listed("heads", branches), "tags": listed("tags", repo.tags), "converts": []}

    def _tag(self, repo: Repo, rev: str) -> Any:
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise HubError(409, f"{repo.repo_id} has a tag {tag!r} already.")
        repo.tags[tag] = repo.resolve(rev)
        return {}

    def _tree(self, repo: Repo, rev: str, path: str) -> Any:
        depth = None if self.query.get("recursive") == ["true"] else 1
        entries = repo.entries(rev)
        found = [entry for entry in entries if PurePosixPath(path) in PurePosixPath(entry["path"]).parents[:depth]]
        if path and not found:
            raise HubError(404, f"{repo.repo_id} has no folder {path!r} at {rev}.", "EntryNotFound")
        return found

    def _paths_info(self, repo: Repo, rev: str) -> Any:
        paths = parse_qs(self.body.decode()).get("paths", [])
        return [entry for entry in repo.entries(rev) if entry["path"] in paths]

    def _file(self, repo: Repo, rev: str, path: str) -> bytes:
        sha = repo.resolve(rev)
        self.reply_headers["X-Repo-Commit"] = sha  # even if it has no such file: the client caches that fact
        if path not in repo.commits[sha]:
            raise HubError(404, f"{repo.repo_id} has no file {path!r} at {rev}.", "EntryNotFound")
        content, oid, lfs = repo.commits[sha][path]
        self.reply_headers["ETag"] = f'"{oid}"'
        if lfs:
            self.reply_headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return content

    def _preupload(self, repo: Repo, rev: str) -> Any:
        present = repo.commits[repo.resolve(rev)]
        asked = json.loads(self.body)
        stored = present[".gitignore"].content.decode() if ".gitignore" in present else ""
        ignored = [line.strip("/") for line in asked.get("gitIgnore", stored).splitlines() if line.startswith("/")]
        for file in asked["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            blob = present.get(file["path"])  # the client leaves a file out of the commit if it has the same id
            file |= {"uploadMode": "lfs" if lfs else "regular", "oid": blob and blob.oid}
            file["shouldIgnore"] = file["path"].split("/")[0] in ignored  # of .gitignore's patterns, top-level names alone
        return {"files": asked["files"]}

    def _lfs_batch(self, repo: Repo) -> Any:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/objects/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"The content sent does not have the SHA-256 {oid}.")
        self.hub.objects[oid] = self.body
        return {}

    def _commit(self, repo: Repo, branch: str) -> Any:
        if branch not in repo.branches:
            raise HubError(404, f"{repo.repo_id} has no branch {branch!r}.", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        head = repo.branches[branch]
        parent = header["value"].get("parentCommit", head)
        reply = {}
        if "create_pr" in self.query:
            number = len(repo.pulls) + 1
            repo.pulls[number] = PullRequest(parent)
            branch = f"refs/pr/{number}"
            repo.branches[branch] = parent
            reply["pullRequestUrl"] = f"{self.hub.url}/{repo.repo_id}/discussions/{number}"
        elif parent != head:
            raise HubError(412, f"The parent commit is not {head}, the head of {branch!r}.")
        files = dict(repo.commits[parent])
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        sha = repo.commit(branch, files)
        return {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo.repo_id}/commit/{sha}", **reply}

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, str]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = _git_blob(base64.b64decode(value["content"]))
        elif key == "lfsFile" and value["oid"] in self.hub.objects:
            files[path] = Blob(self.hub.objects[value["oid"]], value["oid"], lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise HubError(400, f"Cannot apply {key!r} to {path!r}: an unknown operation, file or LFS object.")

    def _merge(self, repo: Repo, number: str) -> Any:
        pull = self._open_pull(repo, number)
        base, theirs = repo.commits[pull.base], repo.commits[repo.branches["main"]]
        ours = repo.commits[repo.branches[f"refs/pr/{number}"]]
        merged = dict(theirs)
        for path in {path for path in base | ours if base.get(path) != ours.get(path)}:
            if theirs.get(path) not in (base.get(path), ours.get(path)):
                raise HubError(409, f"{path} conflicts with main.")
            merged.pop(path, None)
            merged |= {path: ours[path]} if path in ours else {}
        repo.commit("main", merged)
        pull.status = "merged"
        return {}

    def _set_status(self, repo: Repo, number: str) -> Any:
        pull = self._open_pull(repo, number)
        pull.status = json.loads(self.body)["status"]
        event = {
            "id": "1",
            "type": "status-change",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "data": {"status": pull.status},
        }
        return {"newStatus": event}

    def _open_pull(self, repo: Repo, number: str) -> PullRequest:
        pull = repo.pulls.get(int(number))
        if pull is None or pull.status != "open":
            raise HubError(403, f"{repo.repo_id} has no open pull request {number}.")
        return pull

    _model, _rev = r"/api/models/(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"  # the client quotes slashes in revisions
    routes: tuple[tuple[str, Callable[..., Any]], ...] = (
        (r"GET /api/whoami-v2", lambda self: USER),
        (r"POST /api/validate-yaml", lambda self: {"errors": [], "warnings": []}),
        (r"POST /api/repos/create", _create_repo),
        (rf"GET {_model}(/revision/{_rev})?", _info),
        (rf"GET {_model}/refs", _refs),
        (rf"POST {_model}/tag/{_rev}", _tag),
        (rf"GET {_model}/tree/{_rev}(/(?P<path>.+))?", _tree),
        (rf"POST {_model}/paths-info/{_rev}", _paths_info),
        (rf"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/{_rev}/(?P<path>.+)", _file),
        (rf"POST {_model}/preupload/{_rev}", _preupload),
        (r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _lfs_batch),
        (r"PUT /lfs/objects/(?P<oid>\w+)", _lfs_put),
        (rf"POST {_model}/commit/(?P<branch>[^/]+)", _commit),
        (rf"POST {_model}/discussions/(?P<number>\d+)/merge", _merge),
        (rf"POST {_model}/discussions/(?P<number>\d+)/status", _set_status),
    )


def _git_blob(content: bytes) -> Blob:
    return Blob(content, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
