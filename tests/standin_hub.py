"""A stand-in for the Hugging Face Hub: repositories in memory, served on 127.0.0.1.

    with StandInHub() as hub:
        hub.fault = lambda number, method, path: 500 if number == 3 else None

It answers what `huggingface_hub` asks for when it creates, commits to and downloads from a repository.

`fault` is asked about each request, with its number since the last `reset()`. It returns None, a status to answer with, "cut"
(the connection ends in the middle of the request's body) or "lost" (the request takes effect, its answer never arrives).
"""

import base64
import hashlib
import json
import re
import socket
import tempfile
import threading
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import yaml


LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "unknown", "other"}
TASKS = ("unconditional-image-generation", "text-to-image", "image-to-image")
REPOSITORY = r"(?P<repo_id>[\w.-]+/[\w.-]+)"


def card_errors(content: str) -> list[str]:
    """What the Hub's documentation rules out in the metadata of a model card."""
    match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    card = yaml.safe_load(match[1]) if match else {}
    errors = []
    if card.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if card.get("license") == "other" and not {"license_name", "license_link"} <= card.keys():
        errors.append('"license: other" needs "license_name" and "license_link"')
    if card.get("pipeline_tag", TASKS[0]) not in TASKS:
        errors.append(f'"pipeline_tag" must be one of {TASKS}')
    for key in ("tags", "datasets", "metrics"):
        if not all(isinstance(item, str) for item in card.get(key, [])):
            errors.append(f'"{key}" must be a list of strings')
    for model in card.get("model-index", []):
        for result in model["results"]:
            values = [metric["value"] for metric in result["metrics"]]
            if not result["dataset"]["name"] or not all(isinstance(value, int | float) for value in values):
                errors.append('"model-index" needs the names of data sets, and numbers')
    return errors


@dataclass(frozen=True)
class File:
    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    id: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # oid to path to file, in order
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        oid = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> "StandInHub":
        return self.server.hub

    def log_message(self, *_):
        pass

    def handle_request(self):
        with self.hub.lock:
            self.hub.log.append((self.command, self.path))
            number = self.hub.requests
        fault = self.hub.fault(number, self.command, self.path)
        if fault == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self.hang_up()
        self.body = self.read_body()
        if isinstance(fault, int):
            return self.answer(fault, {"error": "the stand-in was told to fail"})
        path = urlsplit(self.path).path
        with self.hub.lock:
            status, content, headers = 404, {"error": f"no route for {self.command} {path}"}, {}
            for methods, pattern, writes, function in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    words = {name: unquote(word) for name, word in match.groupdict("main").items()}
                    refusal = self.refusal(words.get("repo_id"), writes)
                    if "repo_id" in words:
                        words["repo"] = self.hub.repos.get(words.pop("repo_id"))
                    status, content, headers = refusal or function(self, **words)
                    break
        self.hang_up() if fault == "lost" else self.answer(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, content: dict | bytes, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Each of the following returns status, content and headers.

    def error(self, status: int, code: str, message: str):
        return status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message}

    def refusal(self, repo_id: str | None, writes: bool):
        """Why this request may not read or write; None if it may."""
        repo = self.hub.repos.get(repo_id)
        authorization = self.headers.get("Authorization")
        is_logged_in = authorization in (f"Bearer {self.hub.token}", f"Bearer {self.hub.read_token}")
        if repo_id and (repo is None or (repo.private and not is_logged_in)):
            return self.error(404 if is_logged_in else 401, "RepoNotFound", "Repository not found")
        if writes and not is_logged_in:
            return self.error(401, "", "Invalid credentials in Authorization header")
        if writes and authorization != f"Bearer {self.hub.token}":
            return self.error(403, "", "Forbidden: this token has no write permission")

    def create(self):
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        content = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return 409, {"error": "You already created this model repo", **content}, {}
        self.hub.repos[repo_id] = Repository(repo_id, request.get("visibility") == "private")
        self.hub.repos[repo_id].commit("main", {})
        return 200, content, {}

    def branch(self, repo: Repository, name: str):
        if name in repo.branches:
            return 409, {"error": "Reference already exists"}, {}
        repo.branches[name] = repo.branches["main"]
        return 200, {}, {}

    def validate_yaml(self):
        errors = [{"message": message} for message in card_errors(json.loads(self.body)["content"])]
        return 400 if errors else 200, {"errors": errors, "warnings": []}, {}

    def preupload(self, repo: Repository, revision: str):
        files = repo.commits[repo.resolve(revision)]
        answers = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": files[path].oid if path in files else None,
            }
            for path in (file["path"] for file in json.loads(self.body)["files"])
        ]
        return 200, {"files": answers}, {}

    def lfs_batch(self, repo: Repository):
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(self.body)["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.lfs:
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def lfs_put(self, oid: str):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.lfs[oid] = self.body
        return 200, {}, {"ETag": f'"{oid}"'}

    def commit(self, repo: Repository, revision: str):
        head = repo.resolve(revision)
        files = dict(repo.commits[head])
        for line in filter(None, self.body.splitlines()):
            kind, value = (item := json.loads(line))["key"], item["value"]
            if kind == "header" and value.get("parentCommit", head) != head:
                return self.error(412, "", "A commit has happened since. Please refresh and try again.")
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif kind == "lfsFile":
                files[value["path"]] = File(self.hub.lfs[value["oid"]], is_lfs=True)
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo.id}/commit/{oid}"}, {}

    def info(self, repo: Repository, revision: str):
        oid = repo.resolve(revision)
        if oid is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path, "size": len(file.data)} for path, file in repo.commits[oid].items()]
        return 200, {"id": repo.id, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings}, {}

    def tree(self, repo: Repository, revision: str):
        entries = []
        for path, file in repo.commits[revision].items():
            entries.append({"type": "file", "path": path, "oid": file.oid, "size": len(file.data)})
            if file.is_lfs:
                entries[-1]["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 0}
        return 200, entries, {}

    def auth_check(self, repo: Repository):
        return 200, {}, {}

    def resolve(self, repo: Repository, revision: str, path: str):
        oid = repo.resolve(revision)
        if oid is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in repo.commits[oid]:
            status, content, headers = self.error(404, "EntryNotFound", "Entry not found")
            return status, content, {**headers, "X-Repo-Commit": oid}
        file = repo.commits[oid][path]
        return 200, file.data, {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}


ROUTES = [  # methods, path, whether the token must have write permission, answer
    ({"POST"}, r"/api/repos/create", True, Handler.create),
    ({"POST"}, r"/api/validate-yaml", False, Handler.validate_yaml),
    ({"POST"}, rf"/api/(?:models|spaces)/{REPOSITORY}/preupload/(?P<revision>[^/]+)", True, Handler.preupload),
    ({"POST"}, rf"/api/(?:models|spaces)/{REPOSITORY}/commit/(?P<revision>[^/]+)", True, Handler.commit),
    ({"POST"}, rf"/api/(?:models|spaces)/{REPOSITORY}/branch/(?P<name>.+)", True, Handler.branch),
    ({"GET"}, rf"/api/(?:models|spaces)/{REPOSITORY}/auth-check/write", True, Handler.auth_check),
    ({"GET"}, rf"/api/(?:models|spaces)/{REPOSITORY}/tree/(?P<revision>[^/]+)", False, Handler.tree),
    ({"GET"}, rf"/api/(?:models|spaces)/{REPOSITORY}(?:/revision/(?P<revision>[^/]+))?", False, Handler.info),
    ({"POST"}, rf"/{REPOSITORY}\.git/info/lfs/objects/batch", True, Handler.lfs_batch),
    ({"PUT"}, r"/lfs/(?P<oid>[0-9a-f]{64})", False, Handler.lfs_put),
    ({"GET", "HEAD"}, rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", False, Handler.resolve),
]


class StandInHub:
    """The server. `repos` maps ids to repositories, `log` lists the method and path of each request."""

    token, read_token = "hf_writeTokenOfTheStandIn", "hf_readTokenOfTheStandIn"

    def __init__(self):
        self.repos: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.reset()
        self.cache = tempfile.TemporaryDirectory(prefix="hub-cache")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.cache.cleanup()

    def reset(self) -> None:
        """End all faults and forget the log; repositories stay."""
        with self.lock:
            self.fault = lambda number, method, path: None
            self.log: list[tuple[str, str]] = []

    @property
    def requests(self) -> int:
        """Number of requests since the last `reset`."""
        return len(self.log)

    def environment(self, home) -> dict[str, str]:
        """Variables of a logged-in client process with a fresh cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes] | None:
        """Content of a branch or commit; None if there is no such repository."""
        with self.lock:
            repo = self.repos.get(repo_id)
            return repo and {path: file.data for path, file in repo.commits[repo.resolve(revision)].items()}

    def commits(self, repo_id: str) -> int:
        """Number of commits after the first, empty one."""
        return len(self.repos[repo_id].commits) - 1


def log_in(hub: StandInHub, monkeypatch) -> None:
    """Make `hub` the Hub of the client in this process, which has read its environment already; its cache is empty."""
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", hub.cache.name)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token)
