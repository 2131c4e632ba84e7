"""Fetching the data set from a local web server, including failures."""

import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import bash
from script import get_data
from script.get_data import COLUMNS

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
            start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")
            server.ranges.append(int(start))
            if int(start) >= len(server.data) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.data)}")
                self.end_headers()
                return
            body = server.data[int(start) :]
            self.send_response(server.status or (206 if int(start) else 200))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: server.cut])
            if server.reset:  # reset the connection instead of closing it
                self.wfile.flush()
                time.sleep(0.2)
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data, server.cut, server.status, server.ranges = b"", None, None, []
    server.reset = False
    server.url = f"http://127.0.0.1:{server.server_port}/youtube-new"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def fetch(clone, monkeypatch, capsys):
    """Call the script's program in this process; the first test starts the script itself."""

    def call(url: str) -> Namespace:
        monkeypatch.chdir(clone)
        monkeypatch.setattr(sys, "argv", ["get_data", "--url", url])
        capsys.readouterr()
        try:
            status = get_data.main() or 0
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return Namespace(returncode=status, stdout=said.out, stderr=said.err)

    return call


def left(clone) -> set[str]:
    return {path.name for path in (clone / "csv").iterdir()} - {"USvideos_sample.csv"}


def test_the_files_are_fetched_checked_and_unpacked_once(clone, fetch, server):
    server.data = archive()
    done = bash(clone, "get_data.sh", "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert "csv/USvideos.csv: 40,949 rows, all 16 columns" in done.stdout
    assert left(clone) == {"USvideos.csv", "US_category_id.json"}
    again = fetch(server.url)
    assert (again.returncode, len(server.ranges)) == (0, 1)
    assert "exists already" in again.stdout


@pytest.mark.parametrize("reset", [False, True])
def test_a_download_resumes_after_a_lost_connection(clone, fetch, server, reset):
    server.data, server.cut, server.reset = archive(), 200_000, reset
    done = fetch(server.url)
    assert done.returncode == 2
    assert "run this again to resume" in done.stderr
    reason = "Connection reset" if reset else f"received only 200,000 of {len(server.data):,} bytes"
    assert reason in done.stderr
    assert left(clone) == {"youtube-new.zip.part"}
    server.cut, server.reset = None, False
    assert fetch(server.url).returncode == 0
    assert server.ranges == [0, 200_000]
    assert left(clone) == {"USvideos.csv", "US_category_id.json"}


@pytest.mark.parametrize("name", ["youtube-new.zip.part", "youtube-new.zip"])
def test_a_call_killed_after_the_download_resumes(clone, fetch, server, name):
    server.data = archive()
    (clone / "csv" / name).write_bytes(server.data)
    assert fetch(server.url).returncode == 0
    assert server.ranges == ([len(server.data)] if name.endswith("part") else [])
    assert left(clone) == {"USvideos.csv", "US_category_id.json"}


def test_a_partial_download_of_another_file_is_discarded(clone, fetch, server):
    server.data = archive()
    (clone / "csv" / "youtube-new.zip.part").write_bytes(b"x" * (len(server.data) + 1))
    assert "run this again" in fetch(server.url).stderr
    assert fetch(server.url).returncode == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>sign in</html>", "the download is not the data set (File is not a zip file)"),
        (archive(leave_out="USvideos.csv"), "There is no item named 'USvideos.csv'"),
        (damaged(archive()), "the download is not the data set"),
        (archive(rows=100), "USvideos.csv has 100 rows, not about 40,949"),
        (archive(header=",".join([*COLUMNS[:15], "x"])), "has no column 'description'"),
    ],
    ids=["page", "member", "damaged", "rows", "columns"],
)
def test_a_wrong_file_is_refused_and_removed(clone, fetch, server, data, message):
    server.data = data
    done = fetch(server.url)
    assert done.returncode == 2
    assert message in done.stderr
    assert "by hand: download https://www.kaggle.com/datasets/" in done.stderr
    assert done.stderr.count("\n") == 1
    assert left(clone) == set()


def test_without_a_network_or_an_answer_the_manual_steps_are_shown(clone, fetch, server):
    server.status = 403
    for url in (server.url, "http://127.0.0.1:9/", "foo", "http://no-such-host.invalid/"):
        done = fetch(url)
        assert done.returncode == 2
        assert "put USvideos.csv and US_category_id.json into csv/" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("blocks", [100, 800])  # 1,024 bytes each: the archive is larger, or fits
def test_a_full_disk_is_a_user_error_and_leaves_nothing_half_written(clone, fetch, server, blocks):
    """A file-size limit simulates it: the archive or the unpacked file is larger."""
    server.data = archive()
    line = f"ulimit -f {blocks}; bash script/get_data.sh --url {server.url}"
    env = os.environ | {"VIRTUAL_ENV": sys.prefix}
    command = ["bash", "-c", line]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert not left(clone) & {"USvideos.csv", "unpacking"}
    again = fetch(server.url)  # with enough space: nothing is fetched twice
    assert again.returncode == 0
    assert server.ranges[1:] in ([], [100 * 1024])
