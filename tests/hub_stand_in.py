"""A Hugging Face Hub in a thread: the part of its HTTP interface that models need, in memory.

Written from the requests that huggingface_hub sends and the answers that it documents; it shares no
code with it. A test can break what it answers: `cut`, `corrupt`, `refuse`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

OWNER_TOKEN = "hf_owner_secret"
OTHER_TOKEN = "hf_other_secret"
COMMIT = str  # 40 hexadecimal digits


class Hub:
    """The state of the Hub.

    Attributes:
      commits: contents of all files by commit, for each repository.
      branches: latest commit by branch, for each repository.
      private: names of the private repositories.
      stored: contents of large files by SHA-256.
      requests: method and path of each request.
      cut: of the files with these names, only so many bytes arrive, whatever the headers say.
      corrupt: of the files with these names, one bit is wrong when they are committed.
      refuse: statuses by the beginning of a path; such requests get only this.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[COMMIT, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, COMMIT]] = {}
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut: dict[str, int] = {}
        self.corrupt: set[str] = set()
        self.refuse: dict[str, int] = {}
        self.url = ""

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> COMMIT:
        history = self.commits.setdefault(name, {})
        made = hashlib.sha1(f"{name} {branch} {len(history)}".encode()).hexdigest()
        history[made] = files
        self.branches.setdefault(name, {})[branch] = made
        return made

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[name][self.branches[name][branch]]

    def resolve(self, name: str, revision: str) -> COMMIT | None:
        if revision in self.commits[name]:
            return revision
        return self.branches[name].get(revision)


def is_large(name: str) -> bool:
    """What .gitattributes of a new repository says."""
    return name.endswith((".safetensors", ".stablehlo"))


class Answer(Exception):  # noqa: N818
    """Ends a request."""

    def __init__(self, status: int, content: Any = b"", **headers: str):
        super().__init__(status)
        self.status = status
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        limit = None
        try:
            for start, status in self.hub.refuse.items():
                if path.startswith(start):
                    raise Answer(status, {"error": f"no: {self.headers.get('Authorization')}"})
            self.route(path)
            raise Answer(404)
        except Answer as error:
            found = error
        name = path.rpartition("/")[2]
        start, whole = 0, len(found.content)
        if name in self.hub.cut and self.command == "GET" and found.status == 200:
            limit = self.hub.cut[name]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.close_connection = True
        if asked and found.status == 200:
            start = int(asked[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        else:
            self.send_response(found.status)
        for key, value in found.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(whole - start))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found.content[start:limit])

    @property
    def user(self) -> str:
        tokens = {f"Bearer {OWNER_TOKEN}": "org", f"Bearer {OTHER_TOKEN}": "other"}
        given = self.headers.get("Authorization")
        if given and given not in tokens:
            raise Answer(401, {"error": "Invalid credentials in Authorization header"},
                         X_Error_Message="Invalid credentials in Authorization header")  # fmt: skip
        return tokens.get(given or "", "")

    def readable(self, name: str) -> None:
        is_hidden = name in self.hub.private and self.user != name.split("/")[0]
        if name not in self.hub.commits or is_hidden:
            status = 404 if self.user else 401
            raise Answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def writable(self, name: str) -> None:
        if not self.user:
            raise Answer(401, {"error": "Invalid username or password."})
        if self.user != name.split("/")[0]:
            raise Answer(403, {"error": "You don't have the rights to write here"})

    def found(self, name: str, revision: str) -> COMMIT:
        commit = self.hub.resolve(name, revision)
        if commit is None:
            raise Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return commit

    def route(self, path: str) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            self.writable(name)
            if name in hub.commits:
                raise Answer(409, {"error": "exists", "url": f"{hub.url}/{name}"})
            if asked.get("visibility") == "private" or asked.get("private"):
                hub.private.add(name)
            hub.commit(name, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            raise Answer(200, {"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            parts = json.loads(self.body)["content"].split("---\n")
            is_read = len(parts) < 3 or isinstance(yaml.safe_load(parts[1]), dict)
            errors = [] if is_read else [{"message": "no mapping"}]
            raise Answer(200, {"errors": errors, "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            name = match[1]
            self.readable(name)
            commit = self.found(name, match[2] or "main")
            siblings = [{"rfilename": file} for file in hub.commits[name][commit]]
            raise Answer(200, {"id": name, "sha": commit, "private": name in hub.private,
                               "siblings": siblings})  # fmt: skip
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self.writable(match[1])
            if match[2] in hub.branches[match[1]]:
                raise Answer(409, {"error": "Reference already exists"})
            hub.branches[match[1]][match[2]] = hub.branches[match[1]]["main"]
            raise Answer(200, {})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self.writable(match[1])
            raise Answer(200, {"files": [
                {"path": one["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if is_large(one["path"]) else "regular"}
                for one in json.loads(self.body)["files"]
            ]})  # fmt: skip
        if match := re.fullmatch(r"/([^/]+/[^/]+).git/info/lfs/objects/batch", path):
            self.writable(match[1])
            raise Answer(200, {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{hub.url}/store/{one['oid']}?signature=abc"}}}
                for one in json.loads(self.body)["objects"]
            ]})  # fmt: skip
        if path.startswith("/store/") and self.command == "PUT":
            oid = path.removeprefix("/store/")
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Answer(400)
            hub.stored[oid] = self.body
            raise Answer(200)
        if match := re.fullmatch(r"/cdn/([0-9a-f]+)/.+", path):
            raise Answer(200, hub.stored[match[1]])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.take_commit(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.give_file(*match.groups())

    def take_commit(self, name: str, branch: str) -> None:
        hub = self.hub
        self.writable(name)
        if branch not in hub.branches[name]:
            raise Answer(404, {"error": "no branch"}, X_Error_Code="RevisionNotFound")
        files = dict(hub.files(name, branch))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value["parentCommit"] != hub.branches[name][branch]:
                raise Answer(412, {"error": "A commit has happened since"})
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        for file in hub.corrupt & files.keys():
            middle = len(files[file]) // 2
            content = bytearray(files[file])
            content[middle] ^= 1
            files[file] = bytes(content)
        commit = hub.commit(name, branch, files)
        raise Answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit,
                           "hookOutput": "", "success": True})  # fmt: skip

    def give_file(self, name: str, revision: str, file: str) -> None:
        self.readable(name)
        commit = self.found(name, revision)
        if file not in self.hub.commits[name][commit]:
            raise Answer(404, {"error": "no entry"}, X_Error_Code="EntryNotFound",
                         X_Repo_Commit=commit)  # fmt: skip
        content = self.hub.commits[name][commit][file]
        headers = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not is_large(file):
            raise Answer(200, content, **headers)
        oid = hashlib.sha256(content).hexdigest()
        self.hub.stored[oid] = content
        # Another host, as far as the client can tell, with an address that is signed.
        storage = self.hub.url.replace("127.0.0.1", "localhost")
        headers |= {
            "X_Linked_Etag": f'"{oid}"',
            "X_Linked_Size": str(len(content)),
            "Location": f"{storage}/cdn/{oid}/{file}?signature=abc",
        }
        raise Answer(302, **headers)


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub at `url`, until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
