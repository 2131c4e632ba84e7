"""Adapters in whole runs: what they store, tuning them further, several in one file."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import main
from conftest import ROWS, one_line, write_csv
from test_main import ADAPTER, BIAS, PROBE, RESULTS, load


@pytest.mark.parametrize(
    "flags",
    [
        ("--prefix_init", "random"),
        ("--prefix_depth", "input"),
        ("--gradient_checkpointing",),
        ("--prefix_projection",),
    ],
)
def test_every_kind_of_prefix_trains_and_predicts_again(run, tmp_path, flags):
    folder = run("--prefix", *flags)
    assert {path.name for path in folder.iterdir()} == RESULTS | ADAPTER
    argv = ["--do_predict", "--model_name_or_path", str(folder), "--precision", "fp32"]
    argv += ["--test_file", str(tmp_path / "test.csv"), "--output_dir", str(tmp_path / "again")]
    assert main.main(argv) == 0
    first, second = (pd.read_csv(path / "predictions.csv") for path in (folder, tmp_path / "again"))
    pd.testing.assert_frame_equal(first, second, atol=2e-6)


@pytest.mark.parametrize("flags", [PROBE, BIAS])
def test_an_adapter_stores_only_what_was_trained(run, backbone, flags):
    folder = run(*flags)
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {name.removeprefix("base_model."): tuple(one.shape) for name, one in tensors.items()}
    expected = {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    if flags == BIAS:
        frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3)
        small = {name: one for name, one in frozen.named_parameters() if one.ndim == 1}
        assert all(name.endswith("bias") or "LayerNorm" in name for name in small)
        expected |= {name: tuple(one.shape) for name, one in small.items()}
        assert len(expected) == 25
    assert shapes == expected
    assert all(name.startswith("base_model.") for name in tensors)
    stored = load(folder, "all_results.json")["stored_parameters"]
    assert stored == sum(one.numel() for one in tensors.values())


def test_a_prefix_of_depth_input_warns_that_peft_cannot_load_it(run, caplog):
    run("--prefix", "--prefix_depth", "input")
    assert "PEFT cannot load a prefix of depth input" in caplog.text


def test_a_prefix_starts_from_training_texts_a_given_text_or_at_random(run):
    """With a learning rate so small that nothing changes."""
    cases = {
        "training texts": [],
        "a given text": ["--prefix_init_text", "band cat goal"],
        "other seed": ["--seed", "1"],
        "random": ["--prefix_init", "random"],
    }
    prefix = {}
    for name, flags in cases.items():
        folder = run("--prefix", "--learning_rate", "1e-12", *flags, name=name)
        prefix[name] = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    for name in ("a given text", "other seed"):
        assert (prefix["training texts"] - prefix[name]).abs().max() > 0.1
    assert prefix["random"].std() == pytest.approx(0.2, rel=0.2)  # the backbone's initializer_range


def further(folder, files, tmp_path, *flags: str, name: str = "further") -> Path:
    """Tune a model or adapter folder further, on other files."""
    argv = ["--do_train", "--do_eval", "--do_predict", "--model_name_or_path", str(folder), *files]
    argv += ["--num_train_epochs", "1", "--precision", "fp32", "--max_seq_length", "16", *flags]
    assert main.main([*argv, "--output_dir", str(tmp_path / name)]) == 0
    return tmp_path / name


@pytest.mark.parametrize(
    "flags", [(), ("--prefix",), ("--prefix", "--prefix_depth", "input"), PROBE, BIAS]
)
def test_a_model_or_adapter_folder_is_tuned_further_from_its_weights(
    trained, files, tmp_path, flags
):
    """With a learning rate so small that nothing changes: same model, head and labels."""
    folder = trained(*flags)
    assert "Training started from" not in (folder / "README.md").read_text()
    fewer = write_csv(tmp_path / "fewer.csv", ROWS[:8])  # two of the three labels
    again = further(folder, [*files, "--train_file", fewer], tmp_path, "--learning_rate", "1e-12")
    for name in ("model", "adapter_model"):
        if (folder / f"{name}.safetensors").exists():
            tensors, expected = (
                load_file(path / f"{name}.safetensors") for path in (again, folder)
            )
            for key, tensor in expected.items():
                torch.testing.assert_close(tensors[key], tensor, rtol=1e-6, atol=1e-9)
    assert load(again, "run.json")["labels"] == ["0", "1", "2"]
    for name in ("prefix", "tuning_method"):
        settings = (load(path, "run.json")["settings"][name] for path in (folder, again))
        assert len(set(settings)) == 1
    assert (
        f"Training started from `{folder}`, which was trained before"
        in (again / "README.md").read_text()
    )
    moved = further(folder, files, tmp_path, name="moved")
    if flags:
        first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, moved))
        name = "prompt_embeddings" if "--prefix" in flags else "base_model.classifier.weight"
        assert (first[name] - second[name]).abs().max() > 1e-3


@pytest.mark.parametrize("flags", [PROBE, BIAS])
def test_an_adapter_folder_keeps_its_method(trained, files, tmp_path, capsys, flags):
    folder = trained(*flags)
    for other in (("--prefix",), ("--tuning_method", "full")):
        argv = ["--do_train", *files[:2], "--model_name_or_path", str(folder), *other]
        with pytest.raises(SystemExit) as exit_info:
            main.main([*argv, "--output_dir", str(tmp_path / "no")])
        assert exit_info.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and f"was tuned with {flags[1]}" in error
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("flags", [(), ("--prefix",), PROBE, BIAS])
def test_other_labels_initialise_a_new_head_with_a_warning(trained, files, tmp_path, caplog, flags):
    folder = trained(*flags)
    other = write_csv(tmp_path / "other.csv", [(text, f"class {n}") for text, n in ROWS])
    files = [name for flag in files[::2] for name in (flag, other)]
    caplog.clear()
    again = further(folder, files, tmp_path, "--learning_rate", "1e-12")
    assert "new head" in caplog.text
    name = "adapter_model.safetensors" if flags else "model.safetensors"
    first, second = (load_file(path / name) for path in (folder, again))
    changed = {key for key, tensor in first.items() if not tensor.allclose(second[key], atol=1e-6)}
    head = {"classifier.weight", "classifier.bias"}
    assert {key.removeprefix("base_model.") for key in changed} == head
    assert load(again, "run.json")["labels"] == ["class 0", "class 1", "class 2"]


def test_a_prefix_of_peft_is_tuned_further_and_loads_in_peft(backbone, files, tmp_path, caplog):
    frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3)
    settings = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    get_peft_model(frozen, settings).save_pretrained(tmp_path / "peft")
    caplog.set_level("INFO")
    folder = further(tmp_path / "peft", files, tmp_path)
    assert "names no labels: using ['0', '1', '2'], in this order" in caplog.text
    paths = (path / "adapter_model.safetensors" for path in (tmp_path / "peft", folder))
    before, after = (load_file(path)["prompt_embeddings"] for path in paths)
    assert 1e-3 < (before - after).abs().max() < 1
    frozen = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3)
    peer = PeftModel.from_pretrained(frozen, str(folder)).eval()
    tokens = AutoTokenizer.from_pretrained(backbone)(ROWS[5][0], return_tensors="pt")
    tokens.pop("token_type_ids")
    with torch.no_grad():
        probability = peer(**tokens).logits.softmax(-1)[0]
    row = pd.read_csv(folder / "predictions.csv").loc[0]
    expected = [row[f"probability_{number}"] for number in range(3)]
    assert probability.tolist() == pytest.approx(expected, abs=2e-6)


def test_a_column_names_the_prefix_of_each_row(run, files, tmp_path, capsys):
    """Each folder alone predicts the same; labels that a folder lacks have probability 0."""
    other = write_csv(tmp_path / "other.csv", [(text, "23x"[int(label)]) for text, label in ROWS])
    files = [word for name in ("train", "validation", "test") for word in (f"--{name}_file", other)]
    second = run("--prefix", "--pre_seq_len", "5", *files, name="second")
    folders = [run("--prefix", name="first"), second]
    rows = [
        (text, str(folders[n]) if n else "first", "0" if n == 0 else "3")
        for n, (text, _) in zip([0, 1, 1, 0, 1, 0, 0], ROWS, strict=False)
    ]
    mixed = write_csv(tmp_path / "mixed.csv", rows, ("text", "model", "label"))
    argv = ["--do_predict", "--prefix_paths", *map(str, folders), "--precision", "fp32"]
    argv += ["--prefix_column", "model", "--test_file", mixed]
    assert main.main([*argv, "--output_dir", str(tmp_path / "mixed")]) == 0
    table = pd.read_csv(tmp_path / "mixed" / "predictions.csv", dtype={"predicted": str})
    names = [f"probability_{name}" for name in "0123x"]
    assert [name for name in table if name.startswith("prob")] == names
    assert table["text"].tolist() == [text for text, _, _ in rows]
    for number, folder in enumerate(folders):
        alone = tmp_path / f"alone{number}"
        unlabelled = write_csv(tmp_path / "u.csv", [row[:1] for row in rows], ("text",))
        task = ["--do_predict", "--test_file", unlabelled, "--output_dir", str(alone)]
        assert main.main([*task, "--model_name_or_path", str(folder), "--precision", "fp32"]) == 0
        expected = pd.read_csv(alone / "predictions.csv", dtype={"predicted": str})
        mine = (
            [row[1] != "first" for row in rows] if number else [row[1] == "first" for row in rows]
        )
        for column in expected:
            if column in ("text", "predicted"):
                assert table[mine][column].tolist() == expected[mine][column].tolist()
            else:
                assert (table[mine][column] - expected[mine][column]).abs().max() < 2e-6
        lacking = set(names) - set(expected)
        assert (table[mine][sorted(lacking)] == 0).all(axis=None)
    hits = (table["predicted"] == [row[2] for row in rows]).mean()
    assert load(tmp_path / "mixed", "all_results.json")["test_accuracy"] == pytest.approx(hits)

    capsys.readouterr()
    wrong = [
        (text, model, "x" if number == 3 else label)  # "first" knows 0, 1 and 2
        for number, (text, model, label) in enumerate(rows)
    ]
    write_csv(Path(mixed), wrong, ("text", "model", "label"))
    assert main.main([*argv, "--output_dir", str(tmp_path / "no")]) == 2
    assert "label 'x' in row 4 does not occur in" in capsys.readouterr().err
    argv[argv.index("model")] = "label"
    assert main.main([*argv, "--output_dir", str(tmp_path / "no")]) == 2
    assert "'label' in 7 rows (1, 2, 3, 4, 5, ...) names none" in capsys.readouterr().err
    argv[argv.index("label")] = "nowhere"
    assert main.main([*argv, "--output_dir", str(tmp_path / "no")]) == 2
    assert "has no column 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize("several", [False, True])
def test_the_probabilities_of_several_prefixes_are_averaged(run, files, tmp_path, capsys, several):
    """Without --prefix_column; of other lengths and label orders, but for the same labels."""
    flags = ["--prefix"]
    if several:
        rows = [(text, f"{label}|{(int(label) + 1) % 3}") for text, label in ROWS]
        for path in files[1::2]:
            write_csv(Path(path), rows)
        flags += ["--problem_type", "multi_label_classification"]
    folders = [
        run(*flags, "--seed", str(seed), "--pre_seq_len", str(length), name=f"{seed}")
        for seed, length in ((1, 3), (2, 5), (3, 2))
    ]
    paths = ["--do_predict", "--precision", "fp32", *files[4:], "--prefix_paths"]
    argv = [*paths, *map(str, folders), "--output_dir", str(tmp_path / "mean")]
    assert main.main(argv) == 0
    tables = [pd.read_csv(folder / "predictions.csv") for folder in (*folders, tmp_path / "mean")]
    *each, mean = (table.filter(like="probability_").to_numpy() for table in tables)
    np.testing.assert_allclose(mean, np.mean(each, axis=0), atol=2e-6)
    for path in files[1::2]:
        write_csv(Path(path), [(text, f"x{label}") for text, label in ROWS])
    other = run(*flags, name="other")
    argv = [*paths, str(folders[0]), str(other), "--output_dir", str(tmp_path / "no")]
    assert main.main(argv) == 2
    assert "has other labels than" in capsys.readouterr().err


def test_a_probe_does_not_keep_the_head_of_another_pooling(trained, files, tmp_path, caplog):
    further(trained(), files, tmp_path, *PROBE)
    assert "initialising a new head" in caplog.text


def test_a_probe_without_its_labels_is_refused(trained, files, tmp_path, capsys):
    folder = trained(*PROBE)
    (folder / "config.json").unlink()
    argv = ["--do_predict", "--model_name_or_path", str(folder), *files[4:]]
    assert main.main([*argv, "--output_dir", str(tmp_path / "predicted")]) == 2
    assert "lacks config.json, which stores its labels" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--prefix",), BIAS, ("--prefix", "--num_prefixes", "2")])
def test_mean_pooling_is_stored_and_resumed(run, files, predict, tmp_path, stop_at, flags):
    """It predicts the same again, differs from the usual pooling, and other libraries refuse it."""
    usual = pd.read_csv(run(*flags, name="usual") / "predictions.csv")
    flags = (*flags, "--pooling", "mean")
    stop_at(4)
    run(*flags, status=143)
    stop_at(None)
    folder = run(*flags, "--resume_from_checkpoint", "auto")
    found = pd.read_csv(folder / "predictions.csv")
    whole = pd.read_csv(run(*flags, name="whole") / "predictions.csv")
    pd.testing.assert_frame_equal(found, whole)
    assert (found["confidence"] - usual["confidence"]).abs().max() > 1e-3
    assert predict(folder)[0] == 0
    again = pd.read_csv(tmp_path / "predicted" / "predictions.csv")
    pd.testing.assert_frame_equal(found, again, atol=2e-6)
    assert (folder / "README.md").read_text().count("```python") == 1  # ours alone
    if "--num_prefixes" not in flags:
        moved = further(folder, files, tmp_path)
        assert load(moved, "run.json")["settings"]["pooling"] == "mean"
    if not flags[:-2]:
        assert (
            load(further(folder, files, tmp_path, *BIAS, name="biases"), "run.json")["settings"][
                "pooling"
            ]
            == "mean"
        )
        argv = ["--do_train", *files[:2], "--model_name_or_path", str(folder), "--pooling", "cls"]
        assert main.main([*argv, "--output_dir", str(tmp_path / "no")]) == 2
        _, report = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert report["missing_keys"] == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_a_probe_over_cls_reads_the_pooler_of_its_backbone(
    run, backbone, predict, tmp_path, capsys
):
    """Not a random one, so that the reloaded probe predicts the same."""
    folder = run(*PROBE, "--pooling", "cls")
    assert predict(folder)[0] == 0
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "predicted" / "predictions.csv"),
        pd.read_csv(folder / "predictions.csv"),
        atol=2e-6,
    )
    bare = tmp_path / "bare"
    shutil.copytree(backbone, bare)
    weights = load_file(bare / "model.safetensors")
    kept = {name: one for name, one in weights.items() if "pooler" not in name}
    save_file(kept, bare / "model.safetensors", {"format": "pt"})
    run(*PROBE, "--pooling", "cls", "--model_name_or_path", str(bare), name="no", status=2)
    assert "pooler" in one_line((2, capsys.readouterr().err))
