"""A stand-in for the Hub: the part of its HTTP interface that pushing and loading use, with repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

TOKEN = "hf_of_the_stand_in"
_LARGE = (".safetensors", ".parquet")  # what goes through LFS
Files = dict[str, bytes]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Hub:
    """Repositories by name: their commits, oldest first, each with an id and all its files."""

    address: str = ""
    commits: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def commit(self, repository: str, files: Files) -> str:
        history = self.commits.setdefault(repository, [])
        oid = hashlib.sha1(f"{repository} {len(history)}".encode()).hexdigest()
        history.append((oid, files))
        return oid

    def put_folder(self, repository: str, folder: Path) -> str:
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.commit(repository, files)

    def at(self, repository: str, revision: str) -> tuple[str, Files] | None:
        history = self.commits.get(repository, [])
        found = history[-1:] if revision == "main" else [one for one in history if one[0] == revision]
        return found[0] if found else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # -- what is read

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            return self.tree(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.info(match[1], match[2] or "main")
        return self.refuse(404, "RepoNotFound")

    def found(self, repository: str, revision: str) -> tuple[str, Files] | None:
        found = self.hub.at(repository, revision)
        if found is None:
            self.refuse(404, "RevisionNotFound" if repository in self.hub.commits else "RepoNotFound")
        return found

    def file(self, repository: str, revision: str, name: str) -> None:
        if (found := self.found(repository, revision)) is None:
            return
        oid, files = found
        if name not in files:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        content = files[name]
        etag = sha256(content) if name.endswith(_LARGE) else git_oid(content)
        self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=oid)

    def tree(self, repository: str, revision: str, below: str | None) -> None:
        if (found := self.found(repository, revision)) is None:
            return
        entries = []
        for name, content in found[1].items():
            large = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
            entries.append(entry | ({"lfs": large} if name.endswith(_LARGE) else {}))
        if below:
            self.refuse(404, "EntryNotFound")
        else:
            self.answer(200, entries)

    def info(self, repository: str, revision: str) -> None:
        if (found := self.found(repository, revision)) is None:
            return
        oid, files = found
        siblings = [{"rfilename": name} for name in files]
        self.answer(200, {"id": repository, "modelId": repository, "sha": oid, "siblings": siblings, "tags": []})

    # -- what is written

    def do_POST(self) -> None:
        body, path = self.body(), self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Unauthorized")
            return
        with self.hub.lock:
            self.write(path, body)

    def do_PUT(self) -> None:
        content = self.body()
        name = self.path.rpartition("/")[2]
        if sha256(content) != name:
            self.refuse(400, "another content")
            return
        with self.hub.lock:
            self.hub.objects[name] = content
        self.answer(200)

    def write(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            status = 409 if repository in hub.commits else 200
            if status == 200:
                hub.commit(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.answer(status, {"url": f"{hub.address}/{repository}"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            (_, there), files = hub.commits[match[1]][-1], json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": git_oid(there[file["path"]]) if file["path"] in there else None,
                }
                for file in files
            ]
            self.answer(200, {"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects: list[dict[str, Any]] = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in hub.objects:
                    one["actions"] = {"upload": {"href": f"{hub.address}/objects/{one['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = dict(hub.commits[match[1]][-1][1])
            for line in map(json.loads, body.splitlines()):
                key, value = line["key"], line["value"]
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
            oid = hub.commit(match[1], files)
            self.answer(200, {"commitUrl": f"{hub.address}/{match[1]}/commit/{oid}", "commitOid": oid})
        else:
            self.refuse(404, "RepoNotFound")


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
