"""A stand-in for the Hugging Face Hub: in memory, on 127.0.0.1, standard library and PyYAML only.

    with StandInHub() as hub:
        hub.endpoint, hub.token                    # for HF_ENDPOINT, HF_TOKEN; also HF_HUB_DISABLE_XET=1
        hub.fault = lambda number, method, path: 500 if number == 3 else None

It speaks what huggingface_hub 2.4 asks: repositories, whoami, validate-yaml, preupload, LFS batch, PUT and verify, commits
(NDJSON), info, trees, refs, branches, tags, downloads with ranges and with redirects for LFS.

A fault is decided for each request by its number since the last `hub.reset()`, counted from 1: a status to answer with; "cut",
the connection ends in the middle of the request's body; "lost", the request takes effect but its answer never arrives.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_GLOBS = ["*.safetensors", "*.bin", "*.pt", "*.parquet", "*.arrow", "*.npz", "*.msgpack", "*.zip"]
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "unknown", "other"}
TASKS = ("unconditional-image-generation", "text-to-image", "image-to-image")
LFS_SIZE = 10 * 1024 * 1024  # anything bigger is LFS too


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_errors(content: str) -> list[str]:
    """What the Hub's documentation of model card metadata rules out, as far as these tests meet it."""
    match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = []
    for key in ("license", "library_name", "pipeline_tag"):
        if key in card and not isinstance(card[key], str):
            errors.append(f'"{key}" must be a string')
    if card.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if card.get("license") == "other" and not (card.get("license_name") and card.get("license_link")):
        errors.append('"license: other" needs "license_name" and "license_link"')
    if card.get("pipeline_tag", TASKS[0]) not in TASKS:
        errors.append(f'"pipeline_tag" must be one of {TASKS}')
    for key in ("tags", "datasets", "metrics"):
        if key in card and not (isinstance(card[key], list) and all(isinstance(item, str) for item in card[key])):
            errors.append(f'"{key}" must be a list of strings')
    for model in card.get("model-index", []):
        for result in model["results"] if model.get("name") else [{}]:
            metrics = result.get("metrics") or [{}]
            if not (
                result.get("task", {}).get("type") and all(result.get("dataset", {}).get(k) for k in ("type", "name"))
            ):
                errors.append('"model-index" needs a name, task.type, dataset.type and dataset.name')
            if not all(m.get("type") and isinstance(m.get("value"), int | float) for m in metrics):
                errors.append('"model-index" needs a type and a value for every metric')
    return errors


@dataclass
class Blob:
    oid: str  # git sha1 (regular) or git sha1 of the LFS pointer file
    size: int
    data: bytes | None  # regular only
    sha256: str | None = None  # LFS only
    pointer_size: int = 0


@dataclass
class Commit:
    oid: str
    title: str
    parent: str | None
    files: dict[str, Blob]
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))


class Repo:
    def __init__(self, rtype, rid, private):
        self.type, self.id, self.private = rtype, rid, private
        root = Commit(hashlib.sha1(f"{rtype}/{rid}/{time.time_ns()}".encode()).hexdigest(), "initial commit", None, {})
        self.commits, self.refs, self.tags = {root.oid: root}, {"main": root.oid}, {}

    def resolve(self, rev):
        rev = unquote(rev)
        oid = self.refs.get(rev) or self.tags.get(rev) or (rev if rev in self.commits else None)
        return self.commits.get(oid) if oid else None


class HubState:
    def __init__(self, token="hf_writeTokenOfTheStandIn", read_token="hf_readTokenOfTheStandIn", user="me"):
        self.token, self.read_token, self.user = token, read_token, user
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[dict] = []
        self.requests = 0
        self.fault = lambda number, method, path: None
        self.lock = threading.RLock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    _mute = False

    # ---- plumbing
    @property
    def st(self) -> HubState:
        return self.server.state

    @property
    def base(self):
        return f"http://{self.headers.get('Host')}"

    def log_message(self, *a):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":  # httpx2 streams PUT bodies chunked
            out = b""
            while True:
                n = int(self.rfile.readline().split(b";")[0], 16)
                out += self.rfile.read(n)
                self.rfile.readline()
                if n == 0:
                    return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status, obj=None, headers=None, raw: bytes | None = None, ctype="application/json"):
        data = raw if raw is not None else (json.dumps(obj).encode() if obj is not None else b"")
        h = {"Content-Type": ctype, "Content-Length": str(len(data)), **(headers or {})}
        if not self._mute:
            self.send_response(status)
            for k, v in h.items():
                self.send_header(k, v)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
        with self.st.lock:
            self.st.log.append(
                {
                    "method": self.command,
                    "path": self.path,
                    "status": status,
                    "req_headers": dict(self.headers),
                    "body": getattr(self, "_b", b"")[:4000].decode("utf8", "replace"),
                    "resp_headers": h,
                    "resp": (
                        data[:2000].decode("utf8", "replace")
                        if ctype == "application/json"
                        else f"<{len(data)} bytes>"
                    ),
                }
            )

    def _err(self, status, code, msg):
        self._send(status, {"error": msg}, {"X-Error-Code": code, "X-Error-Message": msg})

    def _authed(self, write=False):
        tokens = (self.st.token,) if write else (self.st.token, self.st.read_token)
        return self.headers.get("Authorization") in {f"Bearer {token}" for token in tokens}

    def _refuse_writer(self):
        if self._authed():
            self._err(403, "", "Forbidden: this token has no write permission")
        else:
            message = "Invalid credentials in Authorization header"
            self._send(401, {"error": message}, {"X-Error-Message": message})

    def _repo(self, rtype, rid, need_write=False):
        r = self.st.repos.get((rtype, rid))
        if r is None or (r.private and not self._authed()):
            # the real Hub answers 401 for unknown repos to anonymous callers, 404 to logged-in ones
            self._err(404 if self._authed() else 401, "RepoNotFound", "Repository not found")
            return None
        if need_write and not self._authed(write=True):
            self._refuse_writer()
            return None
        return r

    def _handle(self):
        with self.st.lock:
            self.st.requests += 1
            number = self.st.requests
        fault = self.st.fault(number, self.command, self.path)
        if fault == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._hang_up()
        self._b = self._body()
        self._mute = fault == "lost"
        if isinstance(fault, int):
            return self._send(fault, {"error": "the stand-in was told to fail"})
        u = urlsplit(self.path)
        q = {k: v[0] for k, v in parse_qs(u.query).items()}
        with self.st.lock:
            for method, pat, fn in ROUTES:
                if self.command in method:
                    m = re.fullmatch(pat, u.path)
                    if m:
                        fn(self, q, **m.groupdict())
                        break
            else:
                self._err(404, "NotFound", f"no route for {self.command} {u.path}")
        if self._mute:
            self._hang_up()

    def _hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _handle

    # ---- API
    def whoami(self, q):
        if not self._authed():
            return self._send(
                401,
                {"error": "Invalid credentials in Authorization header"},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        self._send(
            200,
            {
                "type": "user",
                "id": "0",
                "name": self.st.user,
                "fullname": self.st.user,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
            },
        )

    def create(self, q):
        if not self._authed(write=True):
            return self._refuse_writer()
        p = json.loads(self._b)
        t = p.get("type") or "model"
        rid = f"{p.get('organization') or self.st.user}/{p['name']}"
        prefix = "" if t == "model" else t + "s/"
        out = {"url": f"{self.base}/{prefix}{rid}", "name": rid, "id": rid}
        if (t, rid) in self.st.repos:
            return self._send(409, {"error": "You already created this model repo", **out})
        self.st.repos[(t, rid)] = Repo(t, rid, p.get("visibility") == "private")
        self._send(200, out)

    def delete(self, q):
        p = json.loads(self._b)
        self.st.repos.pop((p.get("type") or "model", f"{p.get('organization') or self.st.user}/{p['name']}"), None)
        self._send(200, {})

    def validate_yaml(self, q):
        errors = [{"message": message} for message in card_errors(json.loads(self._b)["content"])]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, q, t, rid, rev):
        r = self._repo(t, rid, True)
        if not r:
            return
        head = r.resolve(rev) or r.resolve("main")
        out = []
        for f in json.loads(self._b)["files"]:
            lfs = f["size"] > LFS_SIZE or any(fnmatch.fnmatch(f["path"], g) for g in LFS_GLOBS)
            cur = head.files.get(f["path"])
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": (cur.sha256 or cur.oid) if cur else None,
                }
            )
        self._send(200, {"files": out, "commitOid": head.oid})

    def lfs_batch(self, q, t, rid):
        if not self._repo(t, rid, True):
            return
        objs = []
        for o in json.loads(self._b)["objects"]:
            e = {"oid": o["oid"], "size": o["size"], "authenticated": True}
            if o["oid"] not in self.st.lfs:
                e["actions"] = {
                    "upload": {"href": f"{self.base}/_lfs/put/{o['oid']}"},
                    "verify": {"href": f"{self.base}/_lfs/verify"},
                }
            objs.append(e)
        self._send(
            200,
            {"transfer": "basic", "objects": objs, "hash_algo": "sha256"},
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def lfs_put(self, q, oid):
        if hashlib.sha256(self._b).hexdigest() != oid:
            return self._send(400, {"error": "sha256 mismatch"})
        self.st.lfs[oid] = self._b
        self._send(200, {}, {"ETag": f'"{oid}"'})

    def lfs_verify(self, q):
        p = json.loads(self._b)
        ok = len(self.st.lfs.get(p["oid"], b"")) == p["size"]
        self._send(200 if ok else 404, {})

    def commit(self, q, t, rid, rev):
        r = self._repo(t, rid, True)
        if not r:
            return
        rev = unquote(rev)
        head = r.resolve(rev)
        if head is None:
            return self._err(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        files, title = dict(head.files), ""
        for line in self._b.splitlines():
            if not line.strip():
                continue
            it = json.loads(line)
            k, v = it["key"], it["value"]
            if k == "header":
                title = v["summary"]
                if "parentCommit" in v and v["parentCommit"] != head.oid:
                    return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif k == "file":
                d = base64.b64decode(v["content"])
                files[v["path"]] = Blob(git_oid(d), len(d), d)
            elif k == "lfsFile":
                d = self.st.lfs.get(v["oid"])
                if d is None:
                    return self._send(400, {"error": f"LFS object {v['oid']} not uploaded"})
                ptr = f"version https://git-lfs.github.com/spec/v1\noid sha256:{v['oid']}\nsize {len(d)}\n".encode()
                files[v["path"]] = Blob(git_oid(ptr), len(d), None, v["oid"], len(ptr))
            elif k == "deletedFile":
                if v["path"] not in files:
                    return self._err(404, "EntryNotFound", "A file with this name doesn't exist")
                files.pop(v["path"])
            elif k == "deletedFolder":
                files = {p: b for p, b in files.items() if not p.startswith(v["path"].rstrip("/") + "/")}
        oid = hashlib.sha1(f"{head.oid}{title}{time.time_ns()}".encode()).hexdigest()
        r.commits[oid] = Commit(oid, title, head.oid, files)
        pr = None
        if q.get("create_pr"):
            n = 1 + sum(x.startswith("refs/pr/") for x in r.refs)
            r.refs[f"refs/pr/{n}"] = oid
            pr = f"{self.base}/{rid}/discussions/{n}"
        else:
            r.refs[rev] = oid
        out = {"success": True, "commitOid": oid, "commitUrl": f"{self.base}/{rid}/commit/{oid}", "hookOutput": ""}
        if pr:
            out["pullRequestUrl"] = pr
        self._send(200, out)

    def info(self, q, t, rid, rev=None):
        r = self._repo(t, rid)
        if not r:
            return
        c = r.resolve(rev or "main")
        if c is None:
            return self._err(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        sib = []
        for p, b in sorted(c.files.items()):
            s = {"rfilename": p}
            if q.get("blobs"):
                s.update(size=b.size, blobId=b.oid)
                if b.sha256:
                    s["lfs"] = {"sha256": b.sha256, "size": b.size, "pointerSize": b.pointer_size}
            sib.append(s)
        card = {}
        if "README.md" in c.files and (m := re.match(r"---\n(.*?)\n---", c.files["README.md"].data.decode(), re.S)):
            card = yaml.safe_load(m[1]) or {}
        self._send(
            200,
            {
                "_id": "0",
                "id": rid,
                "modelId": rid,
                "author": rid.split("/")[0],
                "sha": c.oid,
                "lastModified": c.date,
                "createdAt": c.date,
                "private": r.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags", []),
                "library_name": card.get("library_name"),
                "pipeline_tag": card.get("pipeline_tag"),
                "cardData": card,
                "siblings": sib,
                "spaces": [],
            },
        )

    def _entry(self, p, b):
        e = {"type": "file", "oid": b.oid, "size": b.size, "path": p}
        if b.sha256:
            e["lfs"] = {"oid": b.sha256, "size": b.size, "pointerSize": b.pointer_size}
        return e

    def tree(self, q, t, rid, rev, path=""):
        r = self._repo(t, rid)
        if not r:
            return
        c = r.resolve(rev)
        if c is None:
            return self._err(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        base = unquote(path or "").strip("/")
        base = base + "/" if base else ""
        out, dirs = [], {}
        for p, b in sorted(c.files.items()):
            if not p.startswith(base):
                continue
            rest = p[len(base) :].split("/")
            for i in range(1, len(rest)):
                dirs[base + "/".join(rest[:i])] = i
            if len(rest) == 1 or q.get("recursive", "").lower() in ("1", "true"):
                out.append(self._entry(p, b))
        rec = q.get("recursive", "").lower() in ("1", "true")
        out += [
            {"type": "directory", "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0, "path": d}
            for d, n in sorted(dirs.items())
            if rec or n == 1
        ]
        if base and not out:
            return self._err(404, "EntryNotFound", f'{base} does not exist on "{rev}"')
        self._send(200, out)

    def paths_info(self, q, t, rid, rev):
        r = self._repo(t, rid)
        if not r:
            return
        c = r.resolve(rev)
        if c is None:
            return self._err(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self._b)["paths"]
        else:
            paths = parse_qs(self._b.decode())["paths"]
        out = [self._entry(p, c.files[p]) for p in paths if p in c.files]
        out += [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": p}
            for p in paths
            if p not in c.files and any(f.startswith(p.rstrip("/") + "/") for f in c.files)
        ]
        self._send(200, out)

    def refs(self, q, t, rid):
        r = self._repo(t, rid)
        if r:
            b = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": o}
                for n, o in r.refs.items()
                if not n.startswith("refs/")
            ]
            self._send(
                200,
                {
                    "branches": b,
                    "converts": [],
                    "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": o} for n, o in r.tags.items()],
                    "pullRequests": [
                        {"name": n, "ref": n, "targetCommit": o} for n, o in r.refs.items() if n.startswith("refs/pr/")
                    ],
                },
            )

    def commits(self, q, t, rid, rev):
        r = self._repo(t, rid)
        if not r:
            return
        c, out = r.resolve(rev), []
        while c:
            out.append(
                {"id": c.oid, "title": c.title, "message": "", "authors": [{"user": self.st.user}], "date": c.date}
            )
            c = r.commits.get(c.parent) if c.parent else None
        self._send(200, out)

    def branch(self, q, t, rid, name):
        r = self._repo(t, rid, True)
        if not r:
            return
        name = unquote(name)
        if self.command == "DELETE":
            r.refs.pop(name, None)
            return self._send(200, {})
        if name in r.refs:
            return self._send(409, {"error": "Reference already exists"})
        src = (json.loads(self._b or b"{}")).get("startingPoint", "main")
        r.refs[name] = r.resolve(src).oid
        self._send(200, {})

    def tag(self, q, t, rid, name):
        r = self._repo(t, rid, True)
        if not r:
            return
        if self.command == "DELETE":
            r.tags.pop(unquote(name), None)
            return self._send(200, {})
        r.tags[json.loads(self._b)["tag"]] = r.resolve(name).oid
        self._send(200, {})

    def resolve(self, q, rid, rev, path, prefix=None):
        t = {"datasets/": "dataset", "spaces/": "space", None: "model", "": "model"}[prefix]
        r = self._repo(t, rid)
        if not r:
            return
        c = r.resolve(rev)
        if c is None:
            return self._err(404, "RevisionNotFound", f"Invalid rev id: {unquote(rev)}")
        p = unquote(path)
        b = c.files.get(p)
        if b is None:  # X-Repo-Commit on the 404 lets the client cache the non-existence (.no_exist/)
            return self._send(
                404,
                {"error": "Entry not found"},
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": c.oid},
            )
        h = {
            "X-Repo-Commit": c.oid,
            "ETag": f'"{b.sha256 or b.oid}"',
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{p.rsplit("/", 1)[-1]}"',
        }
        if b.sha256:
            h.update(
                {
                    "X-Linked-ETag": f'"{b.sha256}"',
                    "X-Linked-Size": str(b.size),
                    "Location": f"http://localhost:{self.server.server_port}/_cdn/{b.sha256}",
                }
            )
            return self._send(302, None, h, raw=b"", ctype="text/plain")
        self._bytes(b.data if b.data is not None else self.st.lfs[b.sha256], h)

    def cdn(self, q, oid):
        self._bytes(self.st.lfs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _bytes(self, data, h):
        rg = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if rg:
            a, e = int(rg[1]), int(rg[2] or len(data) - 1)
            h["Content-Range"] = f"bytes {a}-{min(e, len(data) - 1)}/{len(data)}"
            data, status = data[a : e + 1], 206
        self._send(status, None, h, raw=data, ctype="application/octet-stream")

    def telemetry(self, q):
        self._send(200, {})


ID = r"(?P<rid>[\w.\-]+/[\w.\-]+)"
T = r"/api/(?P<t>model|dataset|space)s/" + ID
ROUTES = [
    ({"GET"}, r"/api/whoami-v2", Handler.whoami),
    ({"POST"}, r"/api/repos/create", Handler.create),
    ({"DELETE"}, r"/api/repos/delete", Handler.delete),
    ({"POST"}, r"/api/validate-yaml", Handler.validate_yaml),
    ({"HEAD", "GET"}, r"/api/telemetry/.*", Handler.telemetry),
    ({"POST"}, T + r"/preupload/(?P<rev>[^/]+)", Handler.preupload),
    ({"POST"}, T + r"/commit/(?P<rev>[^/]+)", Handler.commit),
    ({"POST"}, T + r"/paths-info/(?P<rev>[^/]+)", Handler.paths_info),
    ({"GET"}, T + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", Handler.tree),
    ({"GET"}, T + r"/refs", Handler.refs),
    ({"GET"}, T + r"/commits/(?P<rev>[^/]+)", Handler.commits),
    ({"POST", "DELETE"}, T + r"/branch/(?P<name>.+)", Handler.branch),
    ({"POST", "DELETE"}, T + r"/tag/(?P<name>.+)", Handler.tag),
    ({"GET"}, T + r"(?:/revision/(?P<rev>[^/]+))?", Handler.info),
    (
        {"POST"},
        r"/(?:(?P<t>dataset|space)s/)?" + ID + r"\.git/info/lfs/objects/batch",
        lambda s, q, rid, t=None: s.lfs_batch(q, t or "model", rid),
    ),
    ({"PUT"}, r"/_lfs/put/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ({"POST"}, r"/_lfs/verify", Handler.lfs_verify),
    ({"GET", "HEAD"}, r"/_cdn/(?P<oid>[0-9a-f]{64})", Handler.cdn),
    (
        {"GET", "HEAD"},
        r"/(?P<prefix>datasets/|spaces/)?" + ID + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)",
        Handler.resolve,
    ),
]


class StandInHub:
    def __init__(self, **state):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.state = self.state = HubState(**state)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.token, self.read_token = self.state.token, self.state.read_token

    @property
    def fault(self):
        return self.state.fault

    @fault.setter
    def fault(self, fault):
        self.state.fault = fault

    @property
    def requests(self) -> int:
        """How many requests have arrived since the last `reset`."""
        return self.state.requests

    def reset(self) -> None:
        """Ends all faults and counts and logs from here."""
        with self.state.lock:
            self.state.fault = lambda number, method, path: None
            self.state.requests = 0
            self.state.log.clear()

    def environment(self, home, token: str | None = "") -> dict[str, str]:
        """The variables of a client with a fresh cache in `home`; of one that is not logged in with `token=None`."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token or self.token}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes] | None:
        """Everything at a branch of a model repository, or None when there is no such repository."""
        with self.state.lock:
            repo = self.state.repos.get(("model", repo_id))
            if repo is None:
                return None
            blobs = repo.resolve(revision).files
            return {
                path: blob.data if blob.data is not None else self.state.lfs[blob.sha256]
                for path, blob in blobs.items()
            }

    def commits(self, repo_id: str) -> int:
        """The number of commits of a model repository, the first empty one not counted."""
        return len(self.state.repos[("model", repo_id)].commits) - 1

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
