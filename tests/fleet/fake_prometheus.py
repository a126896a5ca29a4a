"""An HTTP server that answers queries as it is told, on a real socket, in a thread."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


def vector(*series):
    """The answer to an instant query: (labels, value) each."""
    result = [{"metric": labels, "value": [1.5, value]} for labels, value in series]
    return {"status": "success", "data": {"resultType": "vector", "result": result}}


def one(value):
    return vector(({}, value))


class FakePrometheus:
    """`answers` by query, empty vectors for all others; `status` and `body` replace them all."""

    def __init__(self):
        self.answers = {}
        self.status = 200
        self.body = None
        self.asked = []
        self.hang = threading.Event()
        self.hang.set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                fake.hang.wait(30)
                url = urlsplit(self.path)
                assert url.path == "/api/v1/query"
                (query,) = parse_qs(url.query)["query"]
                fake.asked.append(query)
                body = fake.body
                if body is None:
                    body = json.dumps(fake.answers.get(query, vector())).encode()
                with contextlib.suppress(ConnectionError):  # the client may have left
                    self.send_response(fake.status)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.hang.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
