"""A folder on 127.0.0.1 as Google Cloud Storage serves a bucket: objects are read, nothing else.

The libraries are sent there by environment variables of their own, so no test leaves this machine.
"""

import contextlib
import functools
import http.server
import pathlib
import re
import threading
import urllib.parse


class Bucket(http.server.BaseHTTPRequestHandler):
  """GET of an object, whole or a range; the folders below the root are the buckets."""

  protocol_version = 'HTTP/1.1'

  def __init__(self, *args, root, asked):
    self.root, self.asked = root, asked
    super().__init__(*args)

  def handle(self):
    """Answers until the client goes, which it may do without reading to the end."""
    with contextlib.suppress(ConnectionError):
      super().handle()

  def do_GET(self):
    """Answers with an object's bytes, 404 where there is none, 403 in the bucket `closed`."""
    path = urllib.parse.urlsplit(self.path).path
    match = re.fullmatch('/storage/v1/b/([^/]+)/o/([^/]+)', path)
    bucket, name = match[1], urllib.parse.unquote(match[2])
    self.asked.append(f'{bucket}/{name}')
    file = self.root / bucket / name
    if bucket == 'closed' or not file.is_file():
      self._answer(403 if bucket == 'closed' else 404, b'{"error": {"message": "refused"}}')
      return
    content, wanted = file.read_bytes(), self.headers.get('Range')
    first, last = self._range(wanted, len(content)) if wanted else (0, len(content) - 1)
    where = {'Content-Range': f'bytes {first}-{last}/{len(content)}'} if wanted else {}
    self._answer(206 if wanted else 200, content[first : last + 1], where)

  def _range(self, wanted, size):
    """Returns the first and last byte of 'bytes=64-', 'bytes=64-127' or, the last 64, 'bytes=-64'.
    """
    first, last = wanted.removeprefix('bytes=').split('-')
    if not first:
      return max(0, size - int(last)), size - 1
    return int(first), min(int(last or size), size - 1)

  def _answer(self, status, content, headers=None):
    self.send_response(status)
    for key, value in {**(headers or {}), 'x-goog-generation': '1'}.items():
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *args):
    """Says nothing."""


@contextlib.contextmanager
def serving(root):
  """Serves a folder of buckets.

  Yields:
    environment: {name: value} that sends array_record and tensorstore there, without credentials.
    asked: list of bucket/name, one of each request.
  """
  asked = []
  handler = functools.partial(Bucket, root=pathlib.Path(root), asked=asked)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
      yield {
        'CLOUD_STORAGE_EMULATOR_ENDPOINT': address, 'TENSORSTORE_GCS_HTTP_URL': address,
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      }, asked
    finally:
      server.shutdown()
      thread.join()
