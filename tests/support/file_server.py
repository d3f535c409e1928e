"""A local HTTP server for the tests of downloads."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.server.ranges else 0
        self.server.requests.append((self.path, start))
        self.send_response(206 if self.server.ranges else 200)
        if self.server.content_type:
            self.send_header("Content-Type", self.server.content_type)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.breaks_off])

    def log_message(self, *_):
        pass


@contextmanager
def serve(files):
    """Serve {"/path": content}.

    The server's `requests` are the path and first byte of each request. It can break off after `breaks_off` bytes, or
    ignore `ranges`, or say a `content_type`.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.ranges, server.breaks_off = files, [], True, None
        server.content_type = None
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
