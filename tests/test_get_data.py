"""Fetching the data set from a local web server, including failures."""

import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import bash, one_line

FILES = {"USvideos.csv", "US_category_id.json"}
COLUMNS = ["video_id", "trending_date", "title", "category_id", *map(str, range(12))]
pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed here")
ROW = b"id,17.14.11,t,c,22,2017,tag,1,1,1,1,link,False,False,False,text\n"


def archive(rows: int = 40_949, header: str = ",".join(COLUMNS), leave_out: str = "") -> bytes:
    content = {
        "USvideos.csv": header.encode() + b"\n" + rows * ROW,
        "US_category_id.json": b'{"items": []}',
        "CAvideos.csv": os.urandom(300_000),  # other countries' files are not unpacked
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in content.items():
            if name != leave_out:
                target.writestr(name, data)
    return buffer.getvalue()


def damaged(data: bytes) -> bytes:
    """Overwrite compressed bytes of the archive's first file."""
    return data[:200] + b"\xff" * 200 + data[400:]


@pytest.fixture
def server():
    """Serve `server.data`, hang up after `server.cut` bytes and record the requested ranges."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start, size = int(self.headers.get("Range", "bytes=0-")[6:-1]), len(server.data)
            server.ranges.append(start)
            start = start if server.resumes else 0
            self.send_response(416 if start >= size > 0 else 206 if start else server.status)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.send_header("Content-Length", str(max(0, size - start)))
            self.end_headers()
            with suppress(OSError):  # curl hangs up if it cannot resume
                self.wfile.write(server.data[start:][: server.cut])
            if server.cut and server.reset:  # reset the connection instead of closing it
                self.wfile.flush()
                time.sleep(0.2)
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data, server.cut, server.status, server.ranges = b"", None, 200, []
    server.resumes, server.reset = True, False
    server.url = f"http://127.0.0.1:{server.server_port}/youtube-new"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def fetch(clone):
    """Call the script; returns its status and what it said."""

    def call(url: str) -> tuple[int, str]:
        done = bash(clone, "get_data.sh", "--url", url)
        return done.returncode, done.stdout + done.stderr

    return call


def left(clone) -> set[str]:
    return {path.name for path in (clone / "csv").iterdir()} - {"USvideos_sample.csv"}


def test_the_files_are_fetched_checked_and_unpacked_once(clone, fetch, server):
    server.data = archive()
    done = bash(clone, "get_data.sh", "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert "csv/USvideos.csv: 40,949 rows" in done.stdout
    assert left(clone) == FILES
    status, said = fetch(server.url)
    assert (status, len(server.ranges)) == (0, 1) and "exists already" in said


@pytest.mark.parametrize(
    ("how", "reason", "ranges"),
    [
        ("closed", "bytes remaining to read", [0, 200_000]),
        ("reset", "Connection reset", [0, 200_000]),
        ("the server cannot resume", "bytes remaining to read", [0, 200_000, 0]),
    ],
)
def test_a_download_resumes_after_a_lost_connection(clone, fetch, server, how, reason, ranges):
    server.data, server.cut = archive(), 200_000
    server.reset, server.resumes = how == "reset", "server" not in how
    said = one_line(fetch(server.url))
    assert "run this again to resume" in said and reason in said
    assert left(clone) == {"youtube-new.zip"}
    server.cut = None
    assert fetch(server.url)[0] == 0
    assert server.ranges == ranges
    assert left(clone) == FILES


@pytest.mark.parametrize("same", [True, False])
def test_a_whole_download_is_not_repeated_unless_it_is_another_file(clone, fetch, server, same):
    """As a killed call may leave it, or if the file on the server has changed."""
    server.data = archive()
    size = len(server.data) + (not same)
    (clone / "csv" / "youtube-new.zip").write_bytes(server.data if same else size * b"x")
    if not same:
        assert "run this again" in one_line(fetch(server.url))
    assert fetch(server.url)[0] == 0
    assert server.ranges == ([size] if same else [size, 0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>sign in</html>", "the download is not the data set (File is not a zip file)"),
        (archive(leave_out="USvideos.csv"), "There is no item named 'USvideos.csv'"),
        (damaged(archive()), "the download is not the data set"),
        (archive(rows=100), "USvideos.csv has 100 rows, not about 40,949"),
        (archive(header=",".join(["x", *COLUMNS[1:]])), "not found: ['video_id']"),
    ],
    ids=["page", "member", "damaged", "rows", "columns"],
)
def test_a_wrong_file_is_refused_and_removed(clone, fetch, server, data, message):
    server.data = data
    said = one_line(fetch(server.url))
    assert message in said
    assert "by hand: download https://www.kaggle.com/datasets/" in said
    assert left(clone) == set()


def test_a_wrong_flag_is_one_line_and_help_needs_no_network(clone):
    said = bash(clone, "get_data.sh", "--adress", "x")
    assert "unrecognized arguments: --adress x" in one_line((said.returncode, said.stderr))
    assert "bash script/get_data.sh [--url" in bash(clone, "get_data.sh", "--help").stdout


def test_without_a_network_an_answer_or_curl_the_manual_steps_are_shown(
    clone, fetch, server, monkeypatch
):
    server.status = 403
    for url in (server.url, "http://127.0.0.1:9/", "foo", "http://no-such-host.invalid/"):
        said = one_line(fetch(url))
        assert "cannot be reached (" in said and "()" not in said
        assert "put USvideos.csv and US_category_id.json into csv/" in said
    (clone / "bin").mkdir()
    for program in ("bash", "dirname"):
        (clone / "bin" / program).symlink_to(shutil.which(program))
    monkeypatch.setenv("PATH", str(clone / "bin"))
    assert "curl is not installed: install it, or by hand" in one_line(fetch(server.url))


@pytest.mark.parametrize("blocks", [100, 800])  # 1,024 bytes each: the archive is larger, or fits
def test_a_full_disk_is_a_user_error_and_leaves_nothing_half_written(clone, fetch, server, blocks):
    """A file-size limit simulates it: the archive or the unpacked file is larger."""
    server.data = archive()
    limit = f"trap '' XFSZ; ulimit -f {blocks}"
    command = ["bash", "-c", f"{limit}; bash script/get_data.sh --url {server.url}"]
    env = os.environ | {"VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, env=env)
    assert "free some space" in one_line((done.returncode, done.stderr))
    assert left(clone) == {"youtube-new.zip"}
    assert fetch(server.url)[0] == 0  # with enough space: nothing is fetched twice
    assert server.ranges[1:] == [100 * 1024 if blocks == 100 else len(server.data)]
