"""A stand-in for the Hub's HTTP interface: what huggingface_hub's client asks to create a repository and to commit files.

Written after the client's own requests (huggingface_hub 1.x): create, preupload, Git LFS's batch and upload, commit, info.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Repositories in memory: `repos[type/name] = {"private": bool, "files": {path: bytes}}`.

    `objects` are the large files, by SHA-256, and `uploads` counts their uploads. Whoever has another token than `token`
    is refused. `fail_after` large files the connection breaks, once.
    """

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.repos, self.objects = token, {}, {}
        self.uploads, self.fail_after = 0, None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def reply(self, values, status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", values["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        if found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.path.partition("?")[0]
        ):
            repo = self.server.repos.get("/".join(found.groups()))
            if repo is not None:
                files = [{"rfilename": name} for name in repo["files"]]
                return self.reply({"id": found[2], "private": repo["private"], "sha": "0" * 40, "siblings": files})
        if found := re.match(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/", self.path):
            return self.reply([])
        return self.reply({"error": "Entry not found"}, 404)

    do_HEAD = do_GET

    def do_PUT(self):
        data = self.body()
        if self.server.fail_after is not None and self.server.uploads >= self.server.fail_after:
            self.server.fail_after = None
            return self.reply({"error": "the disk of the stand-in is full"}, 507)
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        self.server.objects[self.path.rpartition("/")[2]] = data
        self.server.uploads += 1
        return self.reply({})

    def do_POST(self):
        data = self.body()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}" and "/info/lfs" not in self.path:
            return self.reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/validate-yaml":  # of a card's head
            return self.reply({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            key = f"{asked.get('type', 'model')}s/{asked.get('organization') or 'me'}/{asked['name']}"
            kind, _, name = key.partition("/")
            url = f"{self.server.endpoint}/{'datasets/' if kind == 'datasets' else ''}{name}"
            if key in self.server.repos:
                return self.reply({"error": "You already created this repo", "url": url}, 409)
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repos[key] = {"private": bool(is_private), "files": {}}
            return self.reply({"url": url})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": one["oid"], "size": one["size"]}
                | (
                    {}
                    if one["oid"] in self.server.objects
                    else {"actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{one['oid']}"}}}
                )
                for one in json.loads(data)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        found = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)/(preupload|commit)/", self.path)
        if found is None:
            return self.reply({"error": f"the stand-in does not know {self.path}"}, 404)
        repo = self.server.repos["/".join(found.groups()[:2])]
        if found[3] == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if is_large(one["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(data)["files"]
            ]
            return self.reply({"files": files})
        for line in data.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                repo["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                repo["files"][entry["value"]["path"]] = self.server.objects[entry["value"]["oid"]]
        commit = f"{self.server.endpoint}/{'datasets/' if found[1] == 'datasets' else ''}{found[2]}/commit/{'0' * 40}"
        return self.reply({"commitUrl": commit, "commitOid": "0" * 40})


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".parquet", ".arrow"))
