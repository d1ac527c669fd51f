"""The demo's HTTP server: files of the work tree, and notes that it keeps in memory only."""

import http.server
import json
import os
import sys

notes = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/notes":
            return self.reply(json.dumps(notes).encode())
        root = os.path.realpath(sys.argv[2])
        path = os.path.realpath(os.path.join(root, self.path.lstrip("/")))
        if not path.startswith(root + "/") or not os.path.isfile(path):
            return self.send_error(404)
        with open(path, "rb") as file:
            self.reply(file.read())

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        notes.append(self.rfile.read(size).decode())
        self.reply(str(len(notes)).encode())

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("serving", flush=True)
server.serve_forever()
