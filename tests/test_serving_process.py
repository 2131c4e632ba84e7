"""The server as a process, its page in a real browser, and whatever its schema allows."""

import contextlib
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

from conftest import ROOT, registry_of, serving, within
from script import serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WITHOUT_CHROMIUM = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium is installed (apt install chromium)"
)
OPEN_FILES = 200
KEY = {"authorization": "Bearer correct-horse"}


@contextlib.contextmanager
def server(*argv: str):
    """Start script.serve with few open files; yields the process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "script.serve", *argv, "--port", "0", "--precision", "fp32"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
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


def ask(base: str, **options) -> httpx.Response:
    body = {"model": "short", "input": "a cat"}
    return httpx.post(f"{base}/v1/classify", json=body, timeout=30, **options)


def test_a_process_survives_too_many_clients_and_ends_after_what_is_in_flight(served, tmp_path):
    """Connections beyond the limit of open files wait; when others close, they are served."""
    key = tmp_path / "key"
    key.write_text("correct-horse\n")
    argv = [str(served["short"]), str(served["long"]), "--max_batch_tokens", "8"]
    with server(*argv, "--api_key_file", str(key)) as (process, base):
        host, port = base.removeprefix("http://").split(":")
        assert ask(base).status_code == 401
        idle = [socket.create_connection((host, int(port))) for _ in range(60)]
        for one in idle:
            one.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n")
        assert ask(base, headers=KEY).json()["data"][0]["label"] in "012"
        more = [socket.create_connection((host, int(port))) for _ in range(OPEN_FILES + 100)]
        for one in [*idle, *more]:
            one.close()
        with within(30):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    assert ask(base, headers=KEY).status_code == 200
                    break

        answers, body = [], {"model": "long", "input": [f"cat {'dog ' * n}" for n in range(1000)]}

        def wait_for_many():
            url = f"{base}/v1/classify"
            answers.append(httpx.post(url, json=body, headers=KEY, timeout=60))

        thread = threading.Thread(target=wait_for_many)
        thread.start()
        with within(30):
            while "te_queue_size 0.0" in httpx.get(f"{base}/metrics", headers=KEY).text:
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
        (["--allow_origins", "https://a.org/page"], "'https://a.org/page' is no origin"),
        (["tests", "--api_key_file", "README.md"], "must contain a word"),
        (["tests", "--allow_updates", "nowhere"], "folder nowhere does not exist"),
    ],
)
def test_user_errors_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(serve.main(argv))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_port_in_use_is_one_line(served, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert serve.main([str(served["short"]), "--port", port]) == 2
    assert "in use" in capsys.readouterr().err


def test_a_limit_of_open_files_that_cannot_be_had_is_no_obstacle(monkeypatch):
    """macOS says that there is none, and refuses more than 10,240."""
    limits = [(256, 2**63 - 1)]

    def refuse_many(kind, pair):
        if pair[0] > 10_240:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(pair)

    monkeypatch.setattr(serve.resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(serve.resource, "setrlimit", refuse_many)
    serve.raise_open_files()
    assert limits[-1] == (10_240, 2**63 - 1)


@WITHOUT_CHROMIUM
def test_the_page_classifies_compares_uploads_and_explains_errors(served, tmp_path):
    from playwright.sync_api import sync_playwright

    texts = tmp_path / "titles.csv"
    texts.write_text("title\na cat\nthe band\n")
    registry = registry_of({name: served[name] for name in ("short", "long")})
    with contextlib.ExitStack() as running, sync_playwright() as play:
        base, _ = running.enter_context(serving(registry))
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda one: problems.append(one.text) if one.type == "error" else None)
        page.goto(base)

        # type, with the keyboard alone, and compare two models
        page.get_by_label("short").wait_for()
        page.get_by_label("Texts, one per line").focus()
        page.keyboard.type("a cat\n<b>the</b> band")
        page.keyboard.press("Control+Enter")
        page.locator("article").nth(1).wait_for()
        assert page.locator("article h3").all_inner_texts() == ["short", "long"] * 2
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
        assert "no column 'text': try text_column_names=title" in error.inner_text()
        page.get_by_label("Text columns").fill("title")
        with page.expect_download() as download:
            page.get_by_role("button", name="Classify the file").click()
        assert download.value.suggested_filename == "titles-predictions.csv"
        lines = download.value.path().read_text().splitlines()
        assert len(lines) == 3 and lines[0].startswith('"title","predicted","confidence"')
        typed = "async () => { const form = new FormData(); form.append('model', 'short'); "
        typed += "form.append('file', new File(['text\\na cat\\n'], 'x.csv')); "
        typed += "const answer = await fetch('v1/predict_csv', {method: 'POST', body: form}); "
        sent = page.evaluate(f"{typed} return answer.text(); }}")  # a form, as browsers write it
        url = f"{base}/v1/predict_csv?model=short"
        assert sent == httpx.post(url, content="text\na cat\n").text
        assert [one for one in problems if "422" not in one] == []  # the browser logs the status

        # a slow answer shows that it waits; then the server is gone
        held = []
        page.route("**/v1/classify", lambda route: held.append(route))
        page.get_by_role("button", name="Classify", exact=True).click()
        page.get_by_text("waiting … 1 s").wait_for()
        for route in held:
            route.continue_()
        page.unroute("**/v1/classify")
        page.get_by_text("waiting").wait_for(state="hidden")
        running.close()
        page.get_by_role("button", name="Classify", exact=True).click()
        page.get_by_text("The server does not answer").wait_for()
        browser.close()


def test_the_interface_survives_a_fuzz_by_its_own_schema(served, tmp_path):
    """Schemathesis: no 5xx, only documented statuses, and answers that fit the schema."""
    with serving(registry_of({"one": served["short"]}), updates_from=tmp_path) as (base, _):
        command = [Path(sys.executable).with_name("schemathesis"), "run", f"{base}/openapi.json"]
        command += ["--max-examples", "25", "--seed", "1", "--phases", "coverage,fuzzing"]
        command += ["--checks", "not_a_server_error,status_code_conformance,"
                    "content_type_conformance,response_schema_conformance"]  # fmt: skip
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stdout[-3000:]
        assert httpx.get(f"{base}/health").status_code == 200
