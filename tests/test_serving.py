"""The server: main's answers, whatever else is in the queue; limits; models that change."""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import socket
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from starlette.exceptions import HTTPException

from conftest import ROWS, registry_of, serving, within
from model import load
from runtime.batches import rows_of
from script import serve
from serving import guards
from serving.batching import Full
from serving.models import find_models

TEXTS = [f"{text} {word}" for text, _ in ROWS for word in ("cat", "song", "goal of the band", "")]
TEXTS = [text.strip() for text in TEXTS] + ["the " * 40]


@pytest.fixture(scope="module")
def right(served) -> dict[str, dict[str, np.ndarray]]:
    """The logits of `model.load`, which are main's, by model and text."""
    found = {}
    for name, folder in served.items():
        logits = load(folder, "fp32").logits(rows_of(TEXTS, path="")).numpy()
        found[name] = dict(zip(TEXTS, logits, strict=True))
    return found


def logits_in(answer: list[dict]) -> np.ndarray:
    """The raw scores of /predict, in the order of the labels."""
    return np.array([one["score"] for one in sorted(answer, key=lambda one: one["label"])])


def classify(base: str, texts: list[str]) -> httpx.Response:
    return httpx.post(f"{base}/v1/classify", json={"input": texts}, timeout=30)


def flood(base: str, names: list[str], requests: int) -> list[tuple[str, list[str], list]]:
    """Send many requests of mixed models at once; returns (model, texts, answers)."""
    draw = random.Random(0)
    plan = [
        (draw.choice(names), draw.choices(TEXTS, k=draw.randint(1, 9))) for _ in range(requests)
    ]

    async def all_of_them():
        async with httpx.AsyncClient(base_url=base, timeout=60) as client:

            async def one(name, texts):
                body = {"model": name, "inputs": [[text] for text in texts], "raw_scores": True}
                answer = await client.post("/predict", json=body)
                assert answer.status_code == 200, answer.text
                return name, texts, answer.json()

            return await asyncio.gather(*(one(*request) for request in plan))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("cache_bytes", [2**30, 1])
def test_every_answer_is_mains_however_requests_are_mixed(served, right, cache_bytes):
    """With a cache of one byte, every prefix is read again and again."""
    registry = registry_of(served, cache_bytes)
    with serving(registry, max_batch_tokens=64) as (base, app):
        answers = flood(base, [*served], 150)
    assert len(answers) == 150
    for name, texts, found in answers:
        for text, one in zip(texts, found, strict=True):
            np.testing.assert_allclose(logits_in(one), right[name][text], atol=1e-5)
    assert len(registry.backbones) == 1  # of four prefixes
    assert registry.prefixes.bytes <= max(cache_bytes, 2000)
    sizes = app.state.engine.metrics.batch_size
    assert sizes._sum.get() == sum(len(texts) for _, texts, _ in answers)
    assert max(place for place, one in enumerate(sizes._buckets) if one.get()) > 2  # batches grew


def test_the_interface_follows_vllm_and_text_embeddings_inference(served):
    names = {name: served[name] for name in ("full", "short")}
    wanted_data = load(served["short"], "fp32")(["a small cat", "the band"])
    with serving(registry_of(names)) as (base, _), httpx.Client(base_url=base) as client:
        body = {"model": "short", "input": ["a small cat", "the band"], "top_k": 2, "explain": True}
        answer = client.post("/v1/classify", json=body)
        found = answer.json()
        assert {*found} == {"id", "object", "created", "model", "data", "usage"}
        assert found["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
        for number, (one, wanted) in enumerate(zip(found["data"], wanted_data, strict=True)):
            assert (one["index"], one["label"], one["num_classes"]) == (number, wanted["label"], 3)
            assert one["probs"] == pytest.approx([*wanted["probabilities"].values()], abs=1e-5)
            best = sorted(wanted["probabilities"].items(), key=lambda pair: -pair[1])[:2]
            assert [score["label"] for score in one["scores"]] == [label for label, _ in best]
        assert [word for word, _ in found["data"][0]["words"]] == ["a", "small", "cat"]
        for header in ("x-total-time", "x-queue-time", "x-inference-time"):
            assert float(answer.headers[header]) >= 0
        one = client.post("/predict", json={"model": "full", "inputs": "a cat"}).json()
        assert [*one[0]] == ["label", "score"] and sum(s["score"] for s in one) == pytest.approx(1)
        pair = client.post("/predict", json={"model": "full", "inputs": [["a", "cat"]]}).json()
        joined = client.post("/predict", json={"model": "full", "inputs": "a [SEP] cat"}).json()
        assert pair == [joined]
        models = client.get("/v1/models").json()["data"]
        assert [(one["id"], one["labels"]) for one in models] == [
            ("full", ["0", "1", "2"]), ("short", ["0", "1", "2"])
        ]  # fmt: skip
        assert models[0]["scores"]["test_accuracy"] <= 1 and models[1]["stored_bytes"] < 10_000
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/info").json()["max_client_batch_size"] == 1000
        metrics = client.get("/metrics").text
        assert 'te_request_count_total{method="classify"} 1.0' in metrics
        assert 'te_model_texts_total{model="full"} 3.0' in metrics
        page = client.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "<script src" in page.text and "http" not in page.text


BAD = {
    "no JSON": ("/v1/classify", b"{", 400, "the body is not JSON"),
    "not UTF-8": ("/v1/classify", b'{"input": "\xff"}', 400, "the body is not UTF-8"),
    "half a character": (
        "/v1/classify",
        rb'{"input": "\ud800"}',
        422,
        "text 0 is not valid Unicode",
    ),
    "no input": ("/v1/classify", b"{}", 422, "input: Field required"),
    "a number": ("/v1/classify", b'{"input": 3}', 422, "input: send a text or a list of texts"),
    "numbers": ("/predict", b'{"inputs": ["a", 3]}', 422, "inputs: send a text, a pair of"),
    "nothing": ("/v1/classify", b'{"input": []}', 422, "there is no text"),
    "blank": ("/v1/classify", b'{"input": ["a", " "]}', 422, "text 1 is blank"),
    "unknown model": ("/v1/classify", b'{"model": "x", "input": "a"}', 404, "see /v1/models"),
    "many texts": ("/v1/classify", b'{"input": ["a", "a", "a", "a"]}', 413, "more than 3 texts"),
    "long text": ("/v1/classify", b'{"input": "%s"}' % (b"a" * 60), 413, "more than 50 characters"),
    "large body": (
        "/v1/classify",
        b'{"input": "%s"}' % (b"a" * 2000),
        413,
        "more than 1,000 bytes",
    ),
    "top_k": ("/v1/classify", b'{"input": "a", "top_k": 0}', 422, "top_k"),
    "three": ("/predict", b'{"inputs": [["a", "b", "c"]]}', 422, "a text or a pair"),
    "no update": ("/v1/load_adapter", b'{"name": "x", "path": "y"}', 403, "updates are off"),
    "bad name": ("/v1/load_adapter", b'{"name": "a/b", "path": "y"}', 422, "without blanks and"),
    "no column": ("/v1/predict_csv", b"title\na cat\n", 422, "the file has no column 'text'"),
    "open quote": ("/v1/predict_csv", b'text\n"a cat\n', 422, "the file"),
    "two columns": ("/v1/predict_csv", b"text,predicted\na,b\n", 422, "'predicted'"),
    "nowhere": ("/v1/nothing", b"{}", 404, "see /openapi.json"),
    "a method": ("/health", b"{}", 405, "see /openapi.json"),
    "cut": ("/predict", b'{"inputs": "%s", "truncate": false}' % (b"a " * 20), 422, "16 tokens"),
    "misspelt": (
        "/v1/classify",
        b'{"inputs": "a", "topk": 1}',
        422,
        "unknown field 'inputs'; this endpoint takes model, input, top_k, explain",
    ),
    "misspelt, for TEI": ("/predict", b'{"inputs": "a", "modle": "one"}', 422, "field 'modle'"),
    "misspelt, half a character": ("/predict", rb'{"\ud800": 1}', 422, "a unicode string"),
    "misspelt update": ("/v1/unload_adapter", b'{"nam": "x"}', 422, "takes name"),
    "misspelt query": (
        "/v1/predict_csv?modle=one",
        b"text\na cat\n",
        422,
        "unknown query parameter 'modle'; this endpoint takes model, text_column_names, ",
    ),
    "a query": ("/v1/classify?top_k=3", b'{"input": "a"}', 422, "parameter 'top_k'; "),
    "a list": ("/v1/classify", b'["a"]', 422, "send a JSON object, and the header content-type"),
    "empty": ("/v1/classify", b"", 422, "send a JSON object, and the header content-type"),
    "a blank pair": ("/predict", b'{"inputs": [["a", ""], [" ", ""]]}', 422, "text 1 is blank"),
    "without line breaks": ("/v1/predict_csv", b"texta cat", 422, "curl -F file=@FILE URL"),
    "an empty file": ("/v1/predict_csv", b"", 422, "the file is empty"),
    "a header": ("/v1/predict_csv", b"text\n", 422, "a header but no rows"),
    "a column like a flag": ("/v1/predict_csv", b"--x\na\n", 422, "it has '--x': name another"),
    "a ragged row": ("/v1/predict_csv", b"text,n\na\n", 422, "the file, row 1 (line 2) has 1"),
    "a blank row": (
        "/v1/predict_csv",
        b"text,n\na cat,1\n ,2\n",
        422,
        "or drop such rows with drop_empty=True",
    ),
    "blank rows": ("/v1/predict_csv?drop_empty=true", b"text,n\n ,1\n", 422, "text is blank"),
    "other columns": (
        "/v1/predict_csv",
        b"title\na cat\n",
        422,
        "the file has no column 'text': try text_column_names=title",
    ),
    "another encoding": (
        "/v1/predict_csv",
        b"text\ncaf\xe9\n",
        422,
        "the file is not utf-8: pass csv_encoding=cp1252, which reads 'café'",
    ),
    "a quote": ("/v1/predict_csv", b'text,n\n"a,1\n', 422, "pass quoting=none, with which every"),
    "an encoding": ("/v1/predict_csv?csv_encoding=a%00b", b"text\na cat\n", 422, "csv_encoding"),
}


def status_of(base: str, request: bytes) -> bytes:
    """Send a request as it is, and return the status of the answer."""
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(request + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return client.recv(1000).split()[1]


def test_bad_requests_get_a_clear_error(served):
    """No status but the expected one, no path of the machine; afterwards all is well."""
    folder = served["short"]
    limits = {"max_texts": 3, "max_characters": 50, "max_body": 1000, "api_key": "a secret word"}
    with serving(registry_of({"one": folder}), **limits) as (base, _):
        key = {"authorization": "Bearer a secret word", "content-type": "application/json"}
        with httpx.Client(base_url=base, headers=key) as client:
            form = {"content-type": "application/x-www-form-urlencoded"}  # by default of curl -d
            answer = client.post("/v1/classify", content=b'{"input": "a"}', headers=form)
            assert "send a JSON object, and the header content-type" in answer.text
            answer = client.post("/v1/predict_csv", content=b'{\n"input": "a"}')
            assert answer.status_code == 422 and "this endpoint takes no JSON" in answer.text
            assert "--" not in client.get("/openapi.json").text
            for what, (path, body, status, message) in BAD.items():
                kind = "text/csv" if "csv" in path else "application/json"
                answer = client.post(path, content=body, headers={"content-type": kind})
                said = answer.json()["error"]
                said = said if path == "/predict" else said["message"]
                assert (answer.status_code, message in said) == (status, True), (what, said)
                assert not re.search(r"--|\.py|\.sh", said.replace("'--x'", "")), said  # for users
                assert str(folder.parent) not in answer.text and "/tmp" not in answer.text
            chunks = iter([b'{"input": "', b"a" * 2000, b'"}'])  # of unknown length
            answer = client.post("/v1/classify", content=chunks)
            assert answer.status_code == 413 and "1,000 bytes" in answer.text
            answer = client.get("/v1/models", headers={"host": "evil.example"})
            assert answer.status_code == 400
            assert client.post("/v1/classify", json={"input": "a cat"}).status_code == 200
            request = b"GET /page.js/../../app.py HTTP/1.1\r\nAuthorization: Bearer a secret word"
            assert status_of(base, request) == b"404"
        for wrong in ({}, {"authorization": "Bearer a secret wore"}):
            assert httpx.get(f"{base}/v1/models", headers=wrong).status_code == 401
            assert httpx.get(f"{base}/", headers=wrong).status_code == 200


def test_head_and_a_slash_at_the_end_are_answered_as_get_and_none(served):
    with serving(registry_of({"one": served["short"]})) as (base, _):
        for path in ("/health", "/info", "/"):
            head, get = httpx.head(f"{base}{path}"), httpx.get(f"{base}{path}")
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-length"] == get.headers["content-length"]
        body = {"input": "a cat"}
        plain, slash = (httpx.post(f"{base}/v1/classify{end}", json=body) for end in ("", "/"))
        assert (slash.status_code, slash.json()["data"]) == (200, plain.json()["data"])


def slow_body():
    yield b"{"
    time.sleep(1)
    yield b"}"


def test_pages_of_allowed_origins_may_call_and_read_every_answer(served, monkeypatch):
    """Errors, too: of the key, of the request, of the limits and of the server itself."""
    page = {"origin": "https://example.org"}
    key = page | {"authorization": "Bearer a secret word"}
    limits = {"allow_origins": ("https://example.org",), "api_key": "a secret word"}
    with serving(registry_of({"one": served["short"]}), max_body=1000, **limits) as (base, app):
        url, engine = f"{base}/v1/classify", app.state.engine
        for method in ("GET", "HEAD", "POST"):
            asks = {"access-control-request-method": method}
            asks["access-control-request-headers"] = "authorization,content-type"
            assert httpx.options(url, headers=page | asks).status_code == 200  # without the key
        good = httpx.post(url, json={"input": "a cat"}, headers=key)
        answers = [good, httpx.post(url, json={"input": "a cat"}, headers=page)]
        answers += [
            httpx.get(f"{base}{path}", headers=key) for path in ("/v1/none", "/v1/classify")
        ]
        bodies = {"inputs": "a"}, {"input": "a" * 2000}
        answers += [httpx.post(url, json=body, headers=key) for body in bodies]
        monkeypatch.setattr(guards, "BODY_SECONDS", 0.1)
        is_json = {"content-type": "application/json"}
        answers.append(httpx.post(url, content=slow_body(), headers=key | is_json))
        monkeypatch.undo()
        for error in (Full(7), HTTPException(503, "the server is stopping"), ZeroDivisionError()):
            monkeypatch.setattr(engine.batcher, "check_room", Mock(side_effect=error))
            answers.append(httpx.post(url, json={"input": "a cat"}, headers=key))
        found = [answer.status_code for answer in answers]
        assert found == [200, 401, 404, 405, 422, 413, 408, 429, 503, 500]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == "https://example.org"
            assert "retry-after" in answer.headers["access-control-expose-headers"].lower()
            assert answer is good or answer.json()["error"]["message"]
        other = httpx.get(f"{base}/health", headers={"origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
    with serving(registry_of({"one": served["short"]})) as (base, _):
        answer = httpx.get(f"{base}/health", headers=page)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_client_that_leaves_frees_its_place(served):
    """It is noticed while its texts wait."""
    with serving(registry_of({"one": served["short"]})) as (base, app):
        engine = app.state.engine
        held, go = engine.batcher.score, threading.Event()
        engine.batcher.score = lambda batch, now: (go.wait(20), held(batch, now))
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{base}/v1/classify", json={"input": "a cat"}, timeout=0.5)
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{base}/v1/classify", json={"input": "a dog"}, timeout=0.5)
        with within(10):
            while not all(
                item.job.future.cancelled()
                for turn in engine.batcher.turns.values()
                for item in turn
            ):
                time.sleep(0.01)  # fmt: skip
        go.set()
        assert classify(base, ["a cat"]).status_code == 200


def test_models_come_and_go_and_a_bad_folder_changes_nothing(served, right, tmp_path):
    updates = tmp_path / "updates"
    for name in ("short", "several", "full"):
        shutil.copytree(served[name], updates / name)
    damaged, foreign = updates / "damaged", updates / "foreign"
    shutil.copytree(served["long"], damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    shutil.copytree(served["long"], foreign)
    point_elsewhere(foreign, str(served["full"]))
    registry = registry_of({"one": served["short"]})
    with (
        serving(registry, updates_from=updates) as (base, _),
        httpx.Client(base_url=base) as client,
    ):

        def load_adapter(name, path):
            return client.post("/v1/load_adapter", json={"name": name, "path": path})

        def ask(name):
            body = {"model": name, "inputs": TEXTS[0], "raw_scores": True}
            return logits_in(client.post("/predict", json=body).json())

        for path in (
            "damaged",
            "foreign",
            "full",
            "nothing",
            "..",
            ".",
            "../short",
            "/etc",
            "a\0b",
        ):
            answer = load_adapter("one", path)
            assert answer.status_code == 422, path
            assert str(tmp_path) not in answer.text
        np.testing.assert_allclose(ask("one"), right["short"][TEXTS[0]], atol=1e-5)
        assert load_adapter("two", "several").json()["method"].endswith("2 averaged")
        np.testing.assert_allclose(ask("two"), right["several"][TEXTS[0]], atol=1e-5)
        assert load_adapter("one", "several").status_code == 200  # replaced
        np.testing.assert_allclose(ask("one"), right["several"][TEXTS[0]], atol=1e-5)
        assert client.post("/v1/unload_adapter", json={"name": "two"}).json()["deleted"]
        answer = client.post("/v1/classify", json={"model": "two", "input": "a"})
        assert answer.status_code == 404


def test_a_model_replaced_under_load_is_the_old_or_the_new_one(served, right, tmp_path):
    """Its folder is replaced on the disk, as a new run does, and loaded again."""
    folder = shutil.copytree(served["short"], tmp_path / "one")
    registry = registry_of({"one": folder})
    stop = threading.Event()

    def replace(base):
        for number, name in enumerate(["long", "short"] * 1000):
            if stop.is_set():
                return
            shutil.copytree(served[name], tmp_path / f"new{number}")
            folder.rename(tmp_path / f"old{number}")
            (tmp_path / f"new{number}").rename(folder)
            body = {"name": "one", "path": "one"}
            assert httpx.post(f"{base}/v1/load_adapter", json=body).status_code == 200

    limits = {"max_batch_tokens": 64, "updates_from": tmp_path}
    with serving(registry, **limits) as (base, _):
        thread = threading.Thread(target=replace, args=(base,))
        thread.start()
        answers = flood(base, ["one"], 150)
        stop.set()
        thread.join()
    seen = set()
    for _, texts, found in answers:  # all texts of a request by the same model
        logits = np.array([logits_in(one) for one in found])
        fits = [
            name
            for name in ("short", "long")
            if np.allclose(logits, [right[name][text] for text in texts], atol=1e-5)
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert seen == {"short", "long"}


def test_a_folder_that_changed_is_refused_rather_than_served(served, tmp_path):
    """It is noticed when the prefix is read again; the old one is no longer on the disk."""
    one = shutil.copytree(served["short"], tmp_path / "one")
    registry = registry_of({"one": one, "two": served["long"]}, cache_bytes=1)
    with serving(registry) as (base, _), httpx.Client(base_url=base) as client:
        shutil.copy(served["long"] / "adapter_model.safetensors", one)
        for name, status in (("two", 200), ("one", 503), ("two", 200)):
            answer = client.post("/v1/classify", json={"model": name, "input": "a cat"})
            assert answer.status_code == status
        assert (
            "has changed"
            in client.post("/v1/classify", json={"model": "one", "input": "a cat"}).text
        )


def test_models_are_found_in_folders_of_folders(served):
    found = find_models([str(served["full"].parent)])
    assert found == {name: folder.resolve() for name, folder in served.items()}


def test_unusable_models_in_a_folder_of_models_are_skipped_with_a_warning(
    served, tmp_path, monkeypatch, capsys, caplog
):
    """One that is named itself is an error, and so are none at all."""
    monkeypatch.setattr(serve, "create_app", served_models)
    good = shutil.copytree(served["short"], tmp_path / "models" / "good")
    damage = {
        "cut": ("full", lambda folder: os.truncate(folder / "model.safetensors", 99)),
        "no JSON": ("full", lambda folder: (folder / "config.json").write_text("{")),
        "not tuned": ("full", lambda folder: change(folder / "config.json", architectures=None)),
        "incomplete": ("several", lambda folder: shutil.rmtree(folder / "prefix-1")),
        "moved": ("long", lambda folder: point_elsewhere(folder, "/no/such/folder")),
    }
    for name, (kind, harm) in damage.items():
        harm(shutil.copytree(served[kind], good.with_name(name)))
    with pytest.raises(Served) as found:
        serve.main([str(good.parent), "--port", "0"])
    assert found.value.args == ("good",)
    skipped = [line for line in caplog.messages if "skipping" in line]
    for name in damage:
        assert any(f"skipping {good.with_name(name)}: " in line for line in skipped), name
        assert serve.main([str(good), str(good.with_name(name)), "--port", "0"]) == 2
        assert capsys.readouterr().err.count("error: ") == 1
    shutil.rmtree(good)
    assert serve.main([str(good.parent), "--port", "0"]) == 2
    assert "is usable: see the warnings above" in capsys.readouterr().err


class Served(Exception):
    """The models that would be served. Arguments: their names."""


def served_models(registry, _):
    raise Served(*registry.models)


def change(path: Path, **settings) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def point_elsewhere(adapter: Path, backbone: str) -> None:
    """Change the name of an adapter's backbone, and let it forget where it was."""
    change(adapter / "adapter_config.json", base_model_name_or_path=backbone)
    change(adapter / "config.json", backbone_path=None)


@pytest.mark.parametrize(
    ("path", "kind", "start"),
    [
        ("classify", "application/json", "{"),
        ("predict_csv", "text/csv", "text\n"),
        ("predict_csv", "multipart/form-data; boundary=x", "--x\r\nContent-Disposition: form-da"),
    ],
)
def test_a_slow_body_is_cut_off(served, monkeypatch, path, kind, start):
    monkeypatch.setattr(guards, "BODY_SECONDS", 0.5)
    with serving(registry_of({"one": served["short"]})) as (base, _):
        host, port = base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
            slow.sendall(f"{head}Content-Type: {kind}\r\n\r\n{start}".encode())
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_full_queue_answers_429_and_a_file_waits(served):
    with serving(registry_of({"one": served["short"]}), max_queue=8) as (base, app):
        engine = app.state.engine
        content = "\n".join(["text", *(f"cat {row}" for row in range(30))])

        def upload():
            return httpx.post(f"{base}/v1/predict_csv", content=content, timeout=30)

        held, go, taken = engine.batcher.score, threading.Event(), []
        engine.batcher.score = lambda batch, now: (taken.append(1), go.wait(20), held(batch, now))
        first = threading.Thread(target=classify, args=(base, ["a cat"]))
        first.start()  # the only worker takes it, and waits
        with within(10):
            while not taken:
                time.sleep(0.005)
        answers = []
        more = [threading.Thread(target=lambda: answers.append(classify(base, ["a dog"] * 4)))]
        more += [threading.Thread(target=lambda: answers.append(upload()))]
        for thread in more:
            thread.start()
            time.sleep(0.2)
        refused = classify(base, ["a bird"] * 5)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded"
        assert classify(base, ["a cat"] * 9).status_code == 413  # would never fit
        go.set()
        for thread in (first, *more):
            thread.join()
        assert sorted(len(answer.text.splitlines()) for answer in answers) == [1, 31]
        assert [answer.status_code for answer in answers] == [200, 200]


def test_predictions_in_bfloat16_are_mains(served):
    with serving(registry_of(served, precision="bf16")) as (base, _):
        for name, folder in served.items():
            right = load(folder, "bf16")(TEXTS)
            body = {"model": name, "input": TEXTS}
            found = httpx.post(f"{base}/v1/classify", json=body).json()["data"]
            assert [one["label"] for one in found] == [one["label"] for one in right]
            for one, wanted in zip(found, right, strict=True):
                assert one["confidence"] == pytest.approx(wanted["confidence"], abs=5e-3)


def test_a_file_that_is_written_over_changes_no_answer(served, right, tmp_path):
    """The weights are copies: a mapped file that shrinks would even end the process."""
    folders = {name: shutil.copytree(served[name], tmp_path / name) for name in ("full", "short")}
    with serving(registry_of(folders)) as (base, _):
        for folder in folders.values():
            for weights in folder.glob("*.safetensors"):
                with open(weights, "r+b") as file:
                    file.truncate(10)
        for name in folders:
            body = {"model": name, "inputs": TEXTS[0], "raw_scores": True}
            found = httpx.post(f"{base}/predict", json=body).json()
            np.testing.assert_allclose(logits_in(found), right[name][TEXTS[0]], atol=1e-5)
