"""A Hub on loopback: the API that huggingface_hub uses to share models, in memory, with failures on demand.

It speaks what the client of huggingface_hub 2.4 asks without Xet: repositories, branches, preupload, git-LFS, commits, model
info, trees, and files with ETags and ranges. Weights (`*.safetensors`) live in a storage at another origin (`localhost` instead
of `127.0.0.1`), as the Hub's do, which must never see a token.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

JSON = "application/json"


@dataclass
class Request:
    """One line of the request log."""

    method: str
    path: str
    status: int
    authorized: bool  # it had an Authorization header
    range: str | None


@dataclass
class Failure:
    """What goes wrong with the next `times` requests of a method whose path matches a pattern."""

    method: str
    pattern: str
    status: int | None = None
    cut: int | None = None  # close the connection after this many bytes of the answer (PUT, POST: of the upload)
    reset: bool = False  # cut with a TCP reset instead of an orderly close
    times: int = 1
    body: str = '{"error": "injected"}'


@dataclass
class Repo:
    """Commits by their hash, each a whole tree (path -> content), and branches."""

    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, branch, files):
        parent = self.branches.get(branch, "")
        listing = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([parent, listing, len(self.commits)]).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.resolve(revision)]


class Refused(Exception):
    """An answer other than success, with the Hub's headers."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


class Hub:
    """The server. Use as a context manager; `endpoint` is for HF_ENDPOINT.

    Args:
        tokens: Token -> user name.
    """

    def __init__(self, tokens):
        self.tokens, self.repos, self.storage = tokens, {}, {}
        self.requests, self.failures, self.lock = [], [], threading.RLock()
        self.after = {}  # path pattern -> called once after a matching request was answered
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.endpoint, self.storage_endpoint = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method, pattern, **what):
        """Queues a failure; see `Failure`."""
        with self.lock:
            self.failures.append(Failure(method, pattern, **what))

    def next_failure(self, method, path):
        with self.lock:
            for failure in self.failures:
                if failure.method == method and re.search(failure.pattern, path):
                    failure.times -= 1
                    if not failure.times:
                        self.failures.remove(failure)
                    return failure
        return None

    def log(self, method, pattern=""):
        """Returns the requests so far of a method whose path matches."""
        with self.lock:
            return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def repo(self, name, user, revision="main"):
        """Returns a repository and the commit of a revision, or refuses as the Hub does."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, sha


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    routes = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models", "list_models"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/[^/]+)?", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/storage/([0-9a-f]+)", "store"),
        ("GET|HEAD", r"/storage/([0-9a-f]+)", "stored"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = urlsplit(self.path).path
        self.failure = self.hub.next_failure(self.command, path)
        self.body = self.read_body()
        if self.body is None:
            return
        try:
            if self.failure and self.failure.status:
                self.answer(self.failure.status, self.failure.body.encode())
                return
            for methods, pattern, name in self.routes:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split("|"):
                    self.user = self.authenticate()
                    getattr(self, name)(*[unquote(group) if group else group for group in match.groups()])
                    return
            raise Refused(404, f"No such route: {self.command} {path}")
        except Refused as refused:
            body = json.dumps({"error": str(refused)}).encode()
            self.answer(refused.status, body, **refused.headers)
        finally:
            for pattern in [p for p in self.hub.after if re.search(p, path)]:
                self.hub.after.pop(pattern)()

    do_HEAD = do_POST = do_PUT = do_GET

    def read_body(self):
        """Reads the request's body; None if the connection was cut on the way."""
        length = int(self.headers.get("Content-Length", 0))
        if self.failure and self.failure.cut is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(self.failure.cut, length))
            self.record(0)
            self.hang_up(self.failure.reset)
            return None
        return self.rfile.read(length)

    def authenticate(self):
        """Returns the user of the request's token, None without one."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    # ----------------------------------------------------------------------------------------------------- answers

    def answer(self, status, body=b"", **headers):
        self.record(status)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in {"Content-Type": JSON, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.failure.cut if self.failure and not self.failure.status else None
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.hang_up(self.failure.reset)

    def answer_json(self, content, status=200):
        self.answer(status, json.dumps(content).encode())

    def record(self, status):
        line = Request(self.command, self.path, status, "Authorization" in self.headers, self.headers.get("Range"))
        with self.hub.lock:
            self.hub.requests.append(line)

    def hang_up(self, reset):
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # an orderly shutdown comes first otherwise

    def answer_bytes(self, content, **headers):
        """Answers with content, or with the range of it that was asked for."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if match:
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], **headers)
        else:
            self.answer(200, content, **headers)

    # ---------------------------------------------------------------------------------------------------- writing

    def writable(self, name, branch="main"):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        repo, _ = self.hub.repo(name, self.user, branch)
        if self.user != name.split("/")[0]:
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    def create_repo(self):
        wish = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        name = f"{wish.get('organization') or self.user}/{wish['name']}"
        if name.split("/")[0] != self.user:
            raise Refused(403, f"You don't have the rights to create a model under {name.split('/')[0]!r}")
        exists = name in self.hub.repos
        if not exists:
            repo = self.hub.repos[name] = Repo(
                wish.get("visibility") == "private" or wish.get("private") is True
            )  # the second: an older client
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.answer_json({"url": f"{self.hub.endpoint}/{name}", "name": name}, 409 if exists else 200)

    def create_branch(self, name, branch):
        repo = self.writable(name)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self.answer_json({})

    def validate_yaml(self):
        self.answer_json({"errors": [], "warnings": []})

    def preupload(self, name, branch):
        files = self.writable(name, branch).files(branch)
        answer = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            oid = etag(file["path"], files[file["path"]]) if file["path"] in files else None
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer_json({"files": answer})

    def lfs_batch(self, name):
        self.writable(name)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            href = f"{self.hub.storage_endpoint}/storage/{entry['oid']}"
            upload = {} if entry["oid"] in self.hub.storage else {"actions": {"upload": {"href": href}}}
            objects.append({**entry, **upload})
        self.answer_json({"transfer": "basic", "objects": objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content does not have this hash")
        self.hub.storage[oid] = self.body
        self.answer(200)

    def commit(self, name, branch):
        repo = self.writable(name, branch)
        files = dict(repo.files(branch))
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.storage[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files)
        self.answer_json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    # ---------------------------------------------------------------------------------------------------- reading

    def whoami(self):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        self.answer_json({"type": "user", "name": self.user})

    def list_models(self):
        """Lists the public repositories whose card has a tag in its metadata."""
        (tag,) = parse_qs(urlsplit(self.path).query)["filter"]
        tagged = re.compile(rf"^- {re.escape(tag)}$".encode(), re.MULTILINE)
        names = [
            n for n, r in self.hub.repos.items() if not r.private and tagged.search(r.files().get("README.md", b""))
        ]
        self.answer_json([{"id": name, "modelId": name} for name in names])

    def info(self, name, revision):
        repo, sha = self.hub.repo(name, self.user, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self.answer_json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, name, revision):
        repo, sha = self.hub.repo(name, self.user, revision)
        entries = []
        for path, content in repo.commits[sha].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer_json(entries)

    def resolve(self, name, revision, path):
        repo, sha = self.hub.repo(name, self.user, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in repo.commits[sha]:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        content = repo.commits[sha][path]
        tag = etag(path, content)
        if path.endswith(".safetensors"):
            oid = hashlib.sha256(content).hexdigest()
            self.hub.storage[oid] = content
            headers |= {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": len(content)}
            self.answer(302, Location=f"{self.hub.storage_endpoint}/storage/{oid}", **headers)
        else:
            self.answer_bytes(content, ETag=f'"{tag}"', **headers)

    def stored(self, oid):
        if oid not in self.hub.storage:
            raise Refused(404, "No such object")
        self.answer_bytes(self.hub.storage[oid], ETag=f'"{oid}"')


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path, content):
    return hashlib.sha256(content).hexdigest() if path.endswith(".safetensors") else git_oid(content)
