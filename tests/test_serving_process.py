"""The server as a process, and its page in a real browser."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from conftest import ROOT, make_files, train, within
from script import serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WITHOUT_CHROMIUM = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium is installed (apt install chromium)"
)


@pytest.fixture(scope="module")
def folders(backbone, tmp_path_factory) -> list[str]:
    """Two prefixes on one backbone."""
    root = tmp_path_factory.mktemp("served")
    files, found = make_files(root), []
    for seed in ("1", "2"):
        found.append(str(root / f"seed{seed}"))
        assert train(backbone, files, Path(found[-1]), "--prefix", "--seed", seed) == 0
    return found


@contextlib.contextmanager
def server(*argv: str, files: int | None = None):
    """Start script.serve on a free port; yields the process and its address."""
    limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    process = subprocess.Popen(
        [sys.executable, "-m", "script.serve", *argv, "--port", "0", "--precision", "fp32"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )
    try:
        with within(60):
            line = ""
            while "ready after" not in line:
                line = process.stderr.readline()
                assert line, process.wait()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()


def ask(base: str, text: str = "a cat", **options) -> httpx.Response:
    body = {"model": "seed1", "input": text}
    return httpx.post(f"{base}/v1/classify", json=body, timeout=30, **options)


def test_it_starts_says_what_it_serves_and_ends_after_what_is_in_flight(folders, tmp_path):
    key = tmp_path / "key"
    key.write_text("correct-horse\n")
    with server(*folders, "--api_key_file", str(key), "--max_batch_tokens", "8") as found:
        process, base = found
        headers = {"authorization": "Bearer correct-horse"}
        assert ask(base).status_code == 401
        assert ask(base, headers=headers).json()["data"][0]["label"] in "012"
        answers = []
        body = {"model": "seed2", "input": [f"cat {'dog ' * n}" for n in range(1000)]}

        def slow():
            answers.append(
                httpx.post(f"{base}/v1/classify", json=body, headers=headers, timeout=60)
            )

        thread = threading.Thread(target=slow)
        thread.start()
        with within(30):
            while "te_queue_size 0.0" in httpx.get(f"{base}/metrics", headers=headers).text:
                time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
        thread.join()
        assert len(answers[0].json()["data"]) == 1000


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "folder nowhere does not exist"),
        (["tests"], "tests contains no tuned model"),
        (["--port", "80000"], "--port"),
        (["tests", "--api_key_file", "README.md"], "must contain a word"),
        (["tests", "--allow_updates", "nowhere"], "folder nowhere does not exist"),
    ],
)
def test_user_errors_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(serve.main([*argv]))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_port_in_use_is_one_line(folders, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert serve.main([*folders, "--port", port]) == 2
    assert "in use" in capsys.readouterr().err


def test_slow_clients_and_too_many_of_them_do_not_stop_the_others(folders):
    """Connections beyond the limit of open files wait; when others close, they are served."""
    with server(*folders, files=200) as (_, base):
        host, port = base.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(60)]
        for one in idle:
            one.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n")
        assert ask(base).status_code == 200
        more = [socket.create_connection((host, int(port))) for _ in range(300)]
        for one in [*idle, *more]:
            one.close()
        with within(30):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    assert ask(base).status_code == 200
                    break


def test_kill_9_leaves_nothing_that_disturbs_the_next_start(folders):
    before = {path: Path(path).stat().st_mtime_ns for path in folders}
    with server(*folders) as (process, base):
        process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            ask(base)
    with server(*folders) as (_, base):
        assert ask(base).status_code == 200
    assert before == {path: Path(path).stat().st_mtime_ns for path in folders}


@WITHOUT_CHROMIUM
def test_the_page_classifies_compares_uploads_and_explains_errors(folders, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    texts = tmp_path / "titles.csv"
    texts.write_text("title\na cat\nthe band\n")
    with server(*folders) as (process, base), sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda one: problems.append(one.text) if one.type == "error" else None)
        page.goto(base)

        # type, with the keyboard alone, and compare two models
        page.get_by_label("seed1").wait_for()
        page.get_by_label("Texts, one per line").focus()
        page.keyboard.type("a cat\n<b>the</b> band")
        page.keyboard.press("Control+Enter")
        page.locator("article").nth(1).wait_for()
        assert page.locator("article h3").all_inner_texts() == ["seed1", "seed2"] * 2
        assert page.locator("article h2").nth(1).inner_text() == "<b>the</b> band"  # not as HTML
        right = ask(base).json()["data"][0]
        shown = page.locator(".prediction").first.inner_text()
        assert shown == f"{right['label']}, {100 * right['confidence']:.0f} %"
        assert page.locator(".words").first.inner_text().split() == ["a", "cat"]
        assert page.evaluate("document.body.scrollWidth <= innerWidth")  # on a phone

        # an error, for the column has another name; then upload and download
        page.get_by_text("Classify a CSV file").click()
        page.get_by_label("File").set_input_files(texts)
        page.get_by_role("button", name="Classify the file").click()
        error = page.locator("#csv-error")
        error.wait_for()
        assert "no column 'text'; it has 'title'" in error.inner_text()
        page.get_by_label("Text columns").fill("title")
        with page.expect_download() as download:
            page.get_by_role("button", name="Classify the file").click()
        assert download.value.suggested_filename == "titles-predictions.csv"
        lines = download.value.path().read_text().splitlines()
        assert len(lines) == 3 and lines[0].startswith('"title","predicted","confidence"')
        problems = [one for one in problems if "422" not in one]  # the browser logs the status
        assert problems == []

        # a slow answer shows that it waits; then the server is gone
        held = []
        page.route("**/v1/classify", lambda route: held.append(route))
        page.get_by_role("button", name="Classify", exact=True).click()
        page.get_by_text("waiting … 1 s").wait_for()
        for route in held:
            route.continue_()
        page.unroute("**/v1/classify")
        page.get_by_text("waiting").wait_for(state="hidden")
        process.kill()
        page.get_by_role("button", name="Classify", exact=True).click()
        page.get_by_text("The server does not answer").wait_for()
        browser.close()


def test_the_interface_survives_a_fuzz_by_its_own_schema(folders, tmp_path):
    """Schemathesis: no 5xx, only documented statuses and answers that fit the schema."""
    command = Path(sys.executable).with_name("schemathesis")
    with server(*folders, "--allow_updates", str(tmp_path)) as (_, base):
        found = subprocess.run(
            [command, "run", f"{base}/openapi.json", "--max-examples", "25", "--seed", "1",
             "--phases", "examples,coverage,fuzzing",
             "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,"
             "response_schema_conformance"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env=os.environ | {"COLUMNS": "100"},
        )  # fmt: skip
        assert found.returncode == 0, found.stdout[-3000:]
        assert json.loads(httpx.get(f"{base}/v1/models").text)["data"]
