"""A Hub on loopback: as much of its HTTP interface as pushing, listing and pulling models needs, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub.repocard import RepoCard


BINARY = (".safetensors", ".bin", ".npz")
REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository: what its commits hold, by path, and where its branches stand."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch, changes, message):
        files = {path: data for path, data in (self.files(branch) | changes).items() if data is not None}
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]


class Hub(ThreadingHTTPServer):
    """The server, and what it holds.

    Attributes:
        repos: by `user/name`.
        objects: large files, by their SHA-256.
        users: by token.
        broken: by repository, how many of its next uploads of large files break off.
        requests: what was asked, as `METHOD path`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.objects, self.users = {}, {}, {}
        self.broken, self.requests = {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}"  # another host, as the Hub's is

    def text(self, repo, path, revision="main"):
        return self.repos[repo].files(revision)[path].decode()


@contextmanager
def running_hub(*users):
    """A Hub that runs for the time of a `with`, and knows these users by `token of NAME`."""
    hub = Hub()
    hub.users = {f"token of {user}": user for user in users}
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # without it each answer waits 40 ms, as its head and its body are sent apart
    server: Hub

    def log_message(self, *args):
        pass

    def do(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                given = match.groupdict()
                if "repo" in given:
                    given["repo"] = self.repo(given["repo"], write=method == "POST")
                    if given["repo"] is None:
                        return
                answer(self, **given)
                return
        self.reply(404, {"error": f"this Hub doesn't know {self.command} {path}"})

    @property
    def user(self):
        return self.server.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def reply(self, status, content=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repo(self, name, write):
        """The repository, or None, and an answer, if it isn't there for this user."""
        repo = self.server.repos.get(name)
        owned = self.user == name.split("/")[0]
        if repo is None or (repo.private and not owned):
            self.reply(404 if self.user else 401, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
            return None
        if write and not owned:
            self.reply(403, {"error": "you may not write here"})
            return None
        repo.name = name
        return repo

    def files(self, repo, revision):
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            return None, None
        return oid, repo.commits[oid]

    def who(self):
        status = 200 if self.user else 401
        self.reply(status, {"type": "user", "name": self.user, "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        if self.user is None or owner != self.user:
            self.reply(401 if self.user is None else 403, {"error": "whose token is this?"})
        elif name in self.server.repos:
            self.reply(409, {"error": "there already", "url": f"{self.server.url}/{name}"})
        else:
            repo = self.server.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
            repo.commits["0" * 40], repo.branches["main"] = {}, "0" * 40
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.reply(200, {"url": f"{self.server.url}/{name}", "name": name})

    def validate_yaml(self):
        """What the Hub refuses: metadata that are no YAML, and a base model that is no id."""
        errors = []
        try:
            metadata = RepoCard(json.loads(self.body)["content"]).data.to_dict()
            bases = metadata.get("base_model", [])
            for base in [bases] if isinstance(bases, str) else bases:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                    errors.append({"message": f'"base_model" with value "{base}" is not valid'})
            for model in metadata.get("model-index", []):
                for result in model["results"]:
                    if not (result["task"]["type"] and result["dataset"]["type"] and result["metrics"]):
                        errors.append({"message": '"model-index" is not valid'})
        except Exception as error:
            errors.append({"message": repr(error)})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, repo, revision="main"):
        oid, files = self.files(repo, revision)
        if oid:
            siblings = [{"rfilename": path} for path in files]
            self.reply(200, {"id": repo.name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, repo, revision, folder=None):
        oid, files = self.files(repo, revision)
        if oid:
            found = [p for p in files if folder is None or p.startswith(f"{folder}/")]
            self.reply(200, [entry(path, files[path]) for path in found])

    def preupload(self, repo, revision):
        oid, _ = self.files(repo, revision)
        if oid:
            paths = [each["path"] for each in json.loads(self.body)["files"]]
            modes = {path: "lfs" if path.endswith(BINARY) else "regular" for path in paths}
            self.reply(
                200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
            )

    def lfs_batch(self, repo):
        objects = []
        for each in json.loads(self.body)["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.objects:
                href = f"{self.server.url}/lfs/{each['oid']}"
                broken = self.server.broken.get(repo.name, 0)
                self.server.broken[repo.name] = max(broken - 1, 0)
                upload = f"{href}/broken" if broken else href
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply(400, {"error": "other content than announced"})
        else:
            self.server.objects[oid] = self.body
            self.reply(200, {})

    def lfs_broken(self, oid):
        self.reply(403, {"error": "the upload broke off"})

    def lfs_verify(self, oid):
        right = len(self.server.objects.get(oid, b"")) == json.loads(self.body)["size"]
        self.reply(200 if right else 404, {})

    def lfs_get(self, oid):
        self.reply(200, self.server.objects[oid], ETag=f'"{oid}"')

    def commit(self, repo, revision):
        oid, _ = self.files(repo, revision)
        if oid is None:
            return
        changes, message = {}, ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    self.reply(400, {"error": f"{value['path']} was never uploaded"})
                    return
                changes[value["path"]] = self.server.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
        oid = repo.commit(revision, changes, message)
        self.reply(200, {"commitUrl": f"{self.server.url}/{repo.name}/commit/{oid}", "commitOid": oid})

    def branch(self, repo, name):
        if name in repo.branches:
            self.reply(409, {"error": "there already"})
        else:
            repo.branches[name] = repo.branches["main"]
            self.reply(200, {})

    def resolve(self, repo, revision, path):
        oid, files = self.files(repo, revision)
        if oid is None:
            return
        if path not in files:
            self.reply(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        about = entry(path, files[path])
        if "lfs" in about:  # as the Hub sends to its storage
            linked = {"X_Linked_ETag": f'"{about["lfs"]["oid"]}"', "X_Linked_Size": about["size"]}
            self.reply(
                302, {}, X_Repo_Commit=oid, Location=f"{self.server.storage}/lfs/{about['lfs']['oid']}", **linked
            )
        else:
            self.reply(200, files[path], X_Repo_Commit=oid, ETag=f'"{about["oid"]}"')


def entry(path, data):
    """A file as a listing shows it."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    about = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if path.endswith(BINARY):
        about["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return about


for command in ("GET", "HEAD", "POST", "PUT"):
    setattr(Handler, f"do_{command}", Handler.do)

ROUTES = (
    ("GET", "/api/whoami-v2", Handler.who),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", f"/api/models/{REPO}/branch/(?P<name>.+)", Handler.branch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_put),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)/broken", Handler.lfs_broken),
    ("POST", "/lfs/(?P<oid>[0-9a-f]+)/verify", Handler.lfs_verify),
    ("GET", "/lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_get),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
)
