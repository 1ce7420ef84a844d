"""A model hub of one repository, as far as downloading a snapshot needs it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_of(name: str, directory: Path) -> Iterator[str]:
    """Serves the files of `directory` as the repository `name` (`org/name`); yields the address for `HF_ENDPOINT`."""
    files = {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }
    siblings = [{"rfilename": file} for file in files]
    tree = [
        {"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in files.items()
    ]
    listed = json.dumps(tree).encode()
    info = json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            prefix = f"/{name}/resolve/{COMMIT}/"
            if path.startswith(f"/api/models/{name}/tree/"):
                status, content = 200, listed
            elif path.startswith(f"/api/models/{name}"):
                status, content = 200, info
            elif path.startswith(prefix) and path.removeprefix(prefix) in files:
                status, content = 200, files[path.removeprefix(prefix)]
            else:
                status, content = 404, b"{}"
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json" if path.startswith("/api/") else "text/plain")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
