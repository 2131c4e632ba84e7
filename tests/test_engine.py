"""OpenVINO predicts what torch does; 8 bits are refused if they harm a model."""

import gc
import json
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
import pandas as pd
import pytest
import torch

import main
from conftest import ROWS, registry_of, train, write_csv
from evaluation import quantization
from evaluation.quantization import check_int8
from model import engine, load
from model.source import open_model
from runtime.batches import rows_of
from runtime.files import UserError
from runtime.machine import pick_machine

TEXTS = [text for text, _ in ROWS] + ["a", "the band " * 25]
KINDS = ("full", "short", "long", "several", "input", "lora")


@pytest.mark.upgrade
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_has_torchs_logits(served, kind):
    expected, found = (
        load(served[kind], "fp32", batch_size=3, engine=name).logits(rows_of(TEXTS))
        for name in ("torch", "openvino")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_mean_pooling_and_bfloat16(backbone, files, tmp_path):
    assert train(backbone, files, tmp_path / "probe", "--tuning_method", "probe") == 0
    for precision, apart in (("fp32", 1e-5), ("bf16", 0.05)):
        expected, found = (
            load(tmp_path / "probe", precision, engine=name).logits(rows_of(TEXTS))
            for name in ("torch", "openvino")
        )
        torch.testing.assert_close(found, expected, atol=apart, rtol=0)


def test_a_batch_may_need_any_number_of_prefixes_and_rows_of_each(served):
    """Some prefixes have more rows than others, so their table has places without a row."""
    paths, index = [str(served["short"]), str(served["long"])], np.array([0, 1, 0, 0, 1, 0, 0])
    texts = TEXTS[: len(index)]
    logits = {}
    for name in ("torch", "openvino"):
        machine = pick_machine("fp32", engine=name)
        source = open_model(paths, by_row=True)
        model = main.Classifier(source, machine, batch_size=len(index))
        logits[name] = model.logits(rows_of(texts), index)
    torch.testing.assert_close(logits["openvino"], logits["torch"], atol=1e-5, rtol=0)


def test_do_predict_offers_the_engine_and_records_it(served, files, tmp_path, monkeypatch):
    argv = ["--do_predict", *files[4:], "--model_name_or_path", str(served["full"])]
    argv += ["--precision", "fp32", "--output_dir"]
    tables, engines = [], []
    for flags, small in (([], 2**19), (["--engine", "openvino"], 2**19), ([], 0)):
        monkeypatch.setattr("runtime.machine.SMALL", small)
        folder = tmp_path / str(len(tables))
        assert main.main([*argv, str(folder), *flags]) == 0
        tables.append(pd.read_csv(folder / "predictions.csv"))
        engines.append(json.loads((folder / "run.json").read_text())["settings"]["engine"])
    assert engines == [None, "openvino", "openvino"]
    assert tables[1].equals(tables[2])
    assert tables[0]["predicted"].equals(tables[1]["predicted"])
    assert np.abs(tables[0]["confidence"] - tables[1]["confidence"]).max() < 1e-5


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--do_train --engine openvino",
            "--engine and --int8 work only in a run without --do_train",
        ),
        ("--do_predict --int8 --engine torch", "--int8 excludes"),
        ("--do_predict --int8 --prefix_paths a b", "--int8 excludes"),
        ("--do_predict --text hello --engine torch", "has no effect with --text"),
    ],
)
def test_flags_that_cannot_have_an_effect_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        main.main([*flags.split(), "--output_dir", "out"])
    assert message in capsys.readouterr().err


def test_nothing_reports_home(monkeypatch):
    """`openvino.convert_model` would send usage data to a server."""
    sent = []
    for name in ("send_event", "send_error", "start_session"):
        monkeypatch.setattr(f"openvino_telemetry.Telemetry.{name}", lambda *_, **__: sent.append(1))
    engine.to_openvino(torch.nn.Linear(2, 2), [torch.zeros(1, 2)])
    assert not sent
    openvino.convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
    assert sent  # else this test could not fail


def test_signals_arrive_after_another_thread_freed_the_model(served):
    """Else the process, here a worker of pytest, crashes: see `CompiledBert`."""
    models, seen = [load(served["full"], "fp32", engine="openvino")], []

    def free():
        models.clear()
        gc.collect()

    thread = threading.Thread(target=free)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert seen


# ---------------------------------------------------------------------------------------- int8


def test_weights_are_rounded_to_the_nearest_of_255_steps():
    layer = torch.nn.Linear(40, 3)
    graph = engine.to_openvino(layer, [torch.zeros(1, 40)])
    engine.store_in_int8(graph)
    assert any(op.get_element_type() == openvino.Type.i8 for op in graph.get_ordered_ops())
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = np.concatenate([np.zeros((1, 40)), np.eye(40)]).astype(np.float32)
    bias, *rows = compiled(inputs)[0]
    step = layer.weight.abs().amax(dim=1) / 127
    error = np.abs(np.array(rows) - bias - layer.weight.detach().numpy().T)
    assert error.max() > 0 and (error <= 0.51 * step.detach().numpy()).all()


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A folder with predictions of 200 rows, 180 of them right, and their probabilities."""
    monkeypatch.setattr(quantization, "remembered_settings", lambda folder: {})
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 2, 200)
    label = np.where(np.arange(200) < 20, 1 - truth, truth)
    rows = [
        (f"text {number}", "ab"[truth[number]], *(np.eye(2)[label[number]] * 0.8 + 0.1))
        for number in range(200)
    ]
    header = ("text", "label", "probability_a", "probability_b")
    write_csv(tmp_path / "validation_predictions.csv", rows, header)
    return tmp_path, truth, torch.tensor([row[2:] for row in rows]).float().log()


def test_predictions_that_stay_as_good_pass(judged, caplog):
    folder, _, logits = judged
    caplog.set_level("INFO")
    check_int8(lambda rows: logits + 0.001 * torch.randn(logits.shape), folder, ["a", "b"], False)
    assert "int8: 100.00 % of 200 labels" in caplog.text


@pytest.mark.parametrize(
    "harm", [lambda x: x.roll(1, 0), lambda x: x * 3, lambda x: torch.cat([-x[:60], x[60:]])]
)
def test_predictions_that_get_worse_are_refused(judged, harm):
    """Accuracy falls, or confidence alone."""
    folder, _, logits = judged
    with pytest.raises(UserError, match="omit --int8"):
        check_int8(lambda rows: harm(logits), folder, ["a", "b"], False)


def test_a_folder_with_too_little_to_compare_is_refused(served, tmp_path):
    classify = load(served["full"], "fp32").logits
    for folder, why in ((tmp_path, "no validation_predictions.csv"), (served["full"], "fewer")):
        with pytest.raises(UserError, match=why):
            check_int8(classify, Path(folder), ["0", "1", "2"], False)


def test_labels_are_read_as_the_model_reads_them(judged, monkeypatch):
    """Several labels in a cell; numbers that stand for names; texts that --safe_csv changed."""
    folder, truth, logits = judged
    path = folder / "validation_predictions.csv"
    table = pd.read_csv(path)
    check_int8(lambda rows: logits.exp().logit(), folder, ["a", "b"], True)
    settings = {"label_names": {"0": "a", "1": "b"}}
    monkeypatch.setattr(quantization, "remembered_settings", lambda folder: settings)
    write_csv(path, table.assign(label=truth).to_numpy().tolist(), [*table])
    check_int8(lambda rows: logits, folder, ["a", "b"], False)
    (folder / "run.json").write_text('{"files": [], "settings": {"safe_csv": true}}')
    with pytest.raises(UserError, match="--safe_csv has changed"):
        check_int8(lambda rows: logits, folder, ["a", "b"], False)


def test_without_openvino_torch_predicts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pick_machine("fp32", engine="auto").engine == "torch"
    with pytest.raises(UserError, match="not installed: run pip install"):
        pick_machine("fp32", engine="openvino")


def test_the_server_checks_each_model(served, monkeypatch):
    monkeypatch.setattr(quantization, "FEWEST", 1)
    registry = registry_of({})
    registry.machine = replace(registry.machine, engine="openvino", int8=True)
    registry.prefixes.machine = registry.machine
    monkeypatch.setattr(quantization, "NEGLIGIBLE", 10.0)
    for name in ("full", "short", "several"):
        registry.add(name, served[name])
        expected = load(served[name], "fp32").logits(rows_of(TEXTS))
        found = registry.models[name].classify(rows_of(TEXTS))
        assert 0 < (found - expected).abs().max() < 0.5
    monkeypatch.setattr(quantization, "NEGLIGIBLE", -10.0)
    with pytest.raises(UserError, match="omit --int8"):
        registry.add("long", served["long"])
    assert [*registry.models] == ["full", "short", "several"]


def test_rows_of_one_text_are_one_case():
    assert quantization.interval(np.zeros(5), list("aabbc")) == (0, 0)
    mean, low = quantization.interval(np.array([1.0, 1, 0, 0]), list("aabb"))
    assert mean == 0.5 and low == pytest.approx(0.5 - 1.96 * np.sqrt(2) / 4)
