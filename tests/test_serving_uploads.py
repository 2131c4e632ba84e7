"""CSV files that are sent to the server, as the body and in forms."""

import functools
import io
import re
import shlex
import shutil
import subprocess
import time
import tracemalloc
from pathlib import Path

import httpx
import pandas as pd
import pytest

from conftest import registry_of, serving, within, write_csv
from serving import endpoints

GOOD = b"text\na cat\n"
FILE = ("any name", ("x.csv", GOOD, "text/csv"))
FORM = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n'
CURL = "; send one CSV file: curl -F file=@FILE URL"


def test_a_csv_file_gets_the_file_that_main_writes(served, predict, tmp_path):
    """As the body and in a form, whose fields do what the query does."""
    texts, odd = tmp_path / "texts.csv", tmp_path / "odd.csv"
    write_csv(texts, [("=1+1", "a cat", "é"), ('"', "the, band", "x")], ("id", "text", "other"))
    odd.write_bytes("title\r\ncafé\r\n \r\nthe song\r\n".encode("cp1252"))
    options = {"text_column_names": "title", "csv_encoding": "cp1252", "drop_empty": "true"}
    with serving(registry_of(served)) as (base, _):
        post = functools.partial(httpx.post, f"{base}/v1/predict_csv")
        for name, folder in served.items():
            for path, extra in ((texts, {}), (odd, options)):
                flags = ["--engine", "openvino"] + ["--drop_empty"] * bool(extra)
                for flag in [*extra][:2]:
                    flags += [f"--{flag}", extra[flag]]
                assert predict(folder, "--test_file", str(path), *flags)[0] == 0
                wanted = (tmp_path / "predicted" / "predictions.csv").read_bytes()
                model, form = {"model": name}, {"any name": ("x.csv", path.read_bytes())}
                answers = [
                    post(params=model | extra, content=path.read_bytes()),
                    post(params=model | extra, files=form),
                    post(data=model | extra, files=form),
                    post(params=model, data=extra, files=form),
                ]
                first, *others = [answer.content for answer in answers]
                assert others == [first] * 3
                # batches of other rows are rounded in another order
                tables = [pd.read_csv(io.BytesIO(content)) for content in (first, wanted)]
                pd.testing.assert_frame_equal(*tables, atol=2e-6, rtol=0)
                assert re.sub(rb"\d\.\d+", b"", first) == re.sub(rb"\d\.\d+", b"", wanted), name


BAD = {
    "a text": ([("file", (None, GOOD))], "the form has 0 files" + CURL),
    "an empty file": ([("file", ("x.csv", b""))], "the file is empty: it needs a header and rows"),
    "two": ([FILE, FILE], "the form has 2 files" + CURL),
    "many": ([FILE] * 11, "(Too many files. Maximum number of files is 10)" + CURL),
    "an unknown field": (
        [FILE, ("text_column", (None, "a"))],
        "unknown field 'text_column'; this endpoint takes model, text_column_names, column_names",
    ),
    "a wrong value": ([FILE, ("drop_empty", (None, "maybe"))], "drop_empty: Input should be a"),
    "twice": ([FILE, *[("model", (None, "one"))] * 2], "an option is given twice: leave one out"),
    "other columns": (
        [("file", ("x.csv", b"title\na\n"))],
        "the file has no column 'text': try text_column_names=title",
    ),
}
RAW = {
    "nothing": (FORM, b"--x--\r\n", "the form has 0 files" + CURL),
    "no choice": (
        FORM,
        PART % (b"file", b'; filename=""') + b"\r\n--x--\r\n",
        "the file is empty: it needs a header and rows",
    ),
    "cut off": (FORM, PART % (b"file", b'; filename="a"') + GOOD, "the form is cut off"),
    "cut off in a field": (
        FORM,
        PART % (b"file", b'; filename="a"') + GOOD + b"\r\n" + PART % (b"drop_empty", b"") + b"tr",
        "the form is cut off",
    ),
    "another boundary": (FORM, b"--y\r\n\r\n--y--", "cannot be read (Invalid multipart data)"),
    "no boundary": ({"content-type": "multipart/form-data"}, b"", "(Missing boundary in"),
    "another type": (
        {"content-type": "text/csv"},
        PART % (b"file", b'; filename="a"') + GOOD + b"\r\n--x--\r\n",
        "the body is a form, but the header content-type does not say so",
    ),
}


def test_bad_forms_get_a_clear_error(served):
    with serving(registry_of({"one": served["short"]}), max_body=3000) as (base, _):
        post = functools.partial(httpx.post, f"{base}/v1/predict_csv")
        answers = {what: (post(files=parts), said) for what, (parts, said) in BAD.items()}
        for what, (headers, body, said) in RAW.items():
            answers[what] = (post(headers=headers, content=body), said)
        for what, (answer, said) in answers.items():
            message = answer.json()["error"]["message"]
            assert (answer.status_code, said in message) == (422, True), (what, message)
            assert len(message) <= 300 and "/tmp" not in message
        large = [("file", ("x.csv", b"text\n" + b"a\n" * 1500))]
        answer = post(files=large)
        assert answer.status_code == 413 and "more than 3,000 bytes" in answer.text
        assert post(files=[FILE]).status_code == 200


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_curl_line_of_an_error_works(served, tmp_path):
    (tmp_path / "a.csv").write_bytes(GOOD)
    with serving(registry_of({"one": served["short"]})) as (base, _):
        url = f"{base}/v1/predict_csv"
        message = httpx.post(url, json={"input": "a"}).json()["error"]["message"]
        (line,) = re.findall("curl .*", message)
        line = line.replace("FILE", "a.csv").replace("URL", url)
        done = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, timeout=20)
        assert done.stdout == httpx.post(url, content=GOOD).content


@pytest.mark.parametrize("headers", [{"content-type": "text/csv"}, FORM], ids=["body", "form"])
def test_an_upload_is_written_to_the_disk_as_it_arrives(served, headers):
    """Memory stays far below its size; the file lacks the text column, so few rows are read."""
    size = 2**25

    def body():
        yield PART % (b"file", b'; filename="a"') if headers == FORM else b""
        yield b"title\n"
        yield from [b"a\n" * 2**14] * (size // 2**15)
        yield b"\r\n--x--\r\n" if headers == FORM else b""

    with serving(registry_of({"one": served["short"]}), max_body=2 * size) as (base, _):
        tracemalloc.start()
        try:
            url = f"{base}/v1/predict_csv"
            answer = httpx.post(url, content=body(), headers=headers, timeout=60)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert "no column 'text': try text_column_names=title" in answer.text
    assert peak < size / 4


@pytest.mark.parametrize("headers", [{"content-type": "text/csv"}, FORM], ids=["body", "form"])
def test_a_client_that_leaves_during_an_upload_is_no_fault_of_the_server(served, headers):
    def body():
        yield PART % (b"file", b'; filename="a"')
        raise ConnectionAbortedError

    with serving(registry_of({"one": served["short"]})) as (base, _):
        with pytest.raises(ConnectionAbortedError):
            httpx.post(f"{base}/v1/predict_csv", content=body(), headers=headers)
        with within(10):
            while 'failure_total{err="gone"} 1.0' not in httpx.get(f"{base}/metrics").text:
                time.sleep(0.01)


@pytest.mark.parametrize("files", [None, {"file": GOOD}], ids=["body", "form"])
def test_a_full_disk_fails_an_upload_and_nothing_else(served, monkeypatch, files):
    usual = endpoints.store_upload

    def on_full_disk(request, path):
        return usual(request, Path("/dev/full"))

    monkeypatch.setattr(endpoints, "store_upload", on_full_disk)
    with serving(registry_of({"one": served["short"]})) as (base, _):
        content = None if files else GOOD
        answer = httpx.post(f"{base}/v1/predict_csv", content=content, files=files)
        assert answer.status_code == 503 and "/dev" not in answer.text
        answer = httpx.post(f"{base}/v1/classify", json={"input": "a cat"})
        assert answer.status_code == 200
