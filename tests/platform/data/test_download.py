"""Downloads from a local server: whole, resumed, broken, wrong."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fulgurite.data.download import fetch
from fulgurite.errors import ConfigError, DataError

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A server with `.ranges` (does it resume), `.stop_at` (breaks there once), `.log`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            http = self.server
            asked = self.headers.get("Range")
            http.log.append(asked)
            start = int(asked[6:-1]) if asked and http.ranges else 0
            if self.path != "/file":
                self.send_error(404)
                return
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            stop, http.stop_at = http.stop_at, None
            self.wfile.write(CONTENT[start:stop])

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.ranges, http.stop_at, http.log = True, None, []
    http.url = f"http://127.0.0.1:{http.server_port}/file"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


def test_fetch_once(server, tmp_path):
    target = tmp_path / "deep" / "file"
    assert fetch(server.url, target, DIGEST.upper()) == target
    assert target.read_bytes() == CONTENT
    fetch(server.url, target, DIGEST)
    assert len(server.log) == 1
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    server.ranges, server.stop_at = ranges, 3000
    target = tmp_path / "file"
    with pytest.raises(DataError, match="ended after 3000 bytes"):
        fetch(server.url, target, DIGEST)
    assert not target.exists()
    fetch(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT
    assert server.log == [None, "bytes=3000-"]


def test_a_complete_part_is_not_fetched_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch(server.url, tmp_path / "file", DIGEST)
    assert server.log == []


def test_a_part_that_is_too_long_starts_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    fetch(server.url, tmp_path / "file", DIGEST)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_content_is_never_kept(server, tmp_path):
    with pytest.raises(DataError, match="sha256"):
        fetch(server.url, tmp_path / "file", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_failures_are_data_errors(server, tmp_path):
    with pytest.raises(DataError, match="404"):
        fetch(server.url + "s", tmp_path / "file", DIGEST)
    with pytest.raises(DataError, match="failed"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file", DIGEST, timeout=2)
    with pytest.raises(ConfigError, match="cannot be fetched"):
        fetch("ftp://host/file", tmp_path / "file", DIGEST)


def test_another_digest_is_refused_before_anything_is_fetched(server, tmp_path):
    with pytest.raises(DataError, match="no SHA-256"):
        fetch(server.url, tmp_path / "file", "900150983cd24fb0d6963f7d28e17f72")
    assert server.log == []
