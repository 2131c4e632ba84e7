"""Exported models: in onnxruntime and OpenVINO they are the models that they were."""

import json

import numpy as np
import onnxruntime
import openvino
import pandas as pd
import pytest
from tokenizers import Tokenizer

from conftest import ROWS, one_line, write_csv
from script import export

KINDS = {
    "full": (),
    "input": ("--prefix", "--prefix_depth", "input", "--pooling", "mean"),
    "multi-label": ("--prefix", "--problem_type", "multi_label_classification"),
}


def one_text(tokenizer: Tokenizer, text: str, length: int) -> dict[str, np.ndarray]:
    ids = np.array([tokenizer.encode(text).ids])
    assert ids.shape[1] <= length
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_predicts_what_the_folder_does(run, files, kind, capsys):
    if kind == "multi-label":
        for path in files[1::2]:
            write_csv(path, [(text, f"{label}|9") for text, label in ROWS])
    folder = run(*KINDS[kind])
    assert export.main([str(folder)]) == 0
    assert "onnxruntime gives the same logits within" in capsys.readouterr().out
    assert {path.name for path in (folder / "onnx").iterdir()} == {"model.onnx", "tokenizer.json"}

    path = folder / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(path)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    about = session.get_modelmeta().custom_metadata_map
    labels, length = json.loads(about["labels"]), int(about["max_seq_length"])
    assert about["problem_type"].startswith("multi" if kind == "multi-label" else "single")
    tokenizer = Tokenizer.from_file(str(folder / "onnx" / "tokenizer.json"))
    table = pd.read_csv(folder / "predictions.csv")
    assert [f"probability_{label}" for label in labels] == list(table.filter(like="probability_"))
    for text, row in zip(table["text"], table.filter(like="probability_").to_numpy(), strict=True):
        inputs = one_text(tokenizer, text, length)
        for logits in (session.run(None, inputs)[0][0], compiled(inputs)[0][0]):
            power = np.exp(logits)
            found = power / (1 + power) if kind == "multi-label" else power / power.sum()
            np.testing.assert_allclose(found, row, atol=1e-5)


def test_what_cannot_be_exported_is_refused(run, backbone, tmp_path, capsys):
    folder = run("--prefix", "--num_prefixes", "2")
    for path, why in ((folder, "has several prefixes"), (backbone, "is not tuned yet")):
        capsys.readouterr()
        status = export.main([str(path), "--output_dir", str(tmp_path / "no")])
        assert why in one_line((status, capsys.readouterr().err))
    assert not (tmp_path / "no").exists()
