"""Damage and misuse: each is a one-line error and leaves intact files alone."""

import json
import resource
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import main
import trainer
from conftest import ROWS, write_csv
from model.source import read_tensors
from runtime import checkpoint
from runtime.files import UserError
from test_main import hashes


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


FILES = ["training.safetensors", "model.safetensors", "state.json", "config.json", "manifest.json"]


def test_a_damaged_checkpoint_is_detected(run, stopped, tmp_path, caplog, capsys):
    """Each file, harmed in each way; then a whole run."""
    for harm, name in product([flip, cut, Path.unlink], FILES):
        folder = shutil.copytree(stopped, tmp_path / f"{harm.__name__} {name}")
        harm(folder / "checkpoint-5" / name)
        with pytest.raises(checkpoint.CheckpointError, match="checkpoint-5 is "):
            checkpoint.read(folder / "checkpoint-5", read_tensors)
        assert checkpoint.find("auto", folder, read_tensors).state["step"] == 3
    caplog.clear()
    flip(stopped / "checkpoint-5" / "training.safetensors")
    flags = ("--save_strategy", "epoch", "--resume_from_checkpoint")
    run(*flags, str(stopped / "checkpoint-5"), status=2)
    assert "checkpoint-5 is " in capsys.readouterr().err
    caplog.set_level("INFO")
    run(*flags, "auto")
    assert "trying the previous one" in caplog.text
    assert f"resuming from {stopped / 'checkpoint-3'}" in caplog.text


def test_a_run_does_not_start_over_if_every_checkpoint_is_damaged(run, stopped, capsys):
    for path in checkpoint.steps(stopped).values():
        flip(path / "training.safetensors")
    before = hashes(stopped)
    run("--save_strategy", "epoch", "--resume_from_checkpoint", "auto", status=2)
    assert "every checkpoint in" in capsys.readouterr().err
    assert (
        hashes(stopped).items() >= {k: v for k, v in before.items() if "/checkpoint-" in k}.items()
    )


def test_without_a_checkpoint_auto_starts_from_the_beginning(run, caplog):
    caplog.set_level("INFO")
    run("--resume_from_checkpoint", "auto")
    assert "no checkpoint yet: starting from the beginning" in caplog.text
    run("--resume_from_checkpoint", "nowhere", name="other", status=2)


@pytest.mark.parametrize(
    ("field", "flags"),
    [
        ("settings.seed", ["--seed", "1"]),
        ("settings.per_device_train_batch_size", ["--per_device_train_batch_size", "2"]),
        ("settings.learning_rate", ["--learning_rate", "1e-3"]),
        ("settings.prefix", ["--prefix"]),
        ("settings.tuning_method", ["--tuning_method", "bias"]),
        ("settings.num_train_epochs", ["--num_train_epochs", "5"]),
        ("data.train", ["--train_file", "OTHER"]),
        ("labels", ["--train_file", "NAMED", "--validation_file", "NAMED", "--test_file", "NAMED"]),
        ("weights_sha256", ["--model_name_or_path", "BACKBONE"]),
    ],
)
def test_a_different_run_is_not_resumed(run, stopped, tmp_path, backbone, capsys, field, flags):
    write_csv(tmp_path / "OTHER", ROWS[::-1])
    write_csv(tmp_path / "NAMED", [(text, f"class {label}") for text, label in ROWS])
    shutil.copytree(backbone, tmp_path / "BACKBONE")
    weights = load_file(tmp_path / "BACKBONE" / "model.safetensors")
    weights["pooler.dense.bias"] += 1
    save_file(weights, tmp_path / "BACKBONE" / "model.safetensors", metadata={"format": "pt"})
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags]
    run("--save_strategy", "epoch", "--resume_from_checkpoint", "auto", *flags, status=2)
    error = capsys.readouterr().err
    assert "belongs to a run with different" in error
    assert field in error
    assert set(checkpoint.steps(stopped)) == {3, 5}


def test_a_pickle_is_not_opened(run, stopped, backbone, files, tmp_path, capsys):
    """Neither as a checkpoint nor as a model; unpickling it would write a file."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    trap = tmp_path / "checkpoint-9"
    trap.mkdir()
    torch.save(Trap(), trap / "training.pt")
    run("--resume_from_checkpoint", str(trap), name="other", status=2)
    model = tmp_path / "model"
    shutil.copytree(backbone, model)
    (model / "model.safetensors").unlink()
    torch.save(Trap(), model / "pytorch_model.bin")
    run("--model_name_or_path", str(model), name="other", status=2)
    assert "has its weights as pytorch_model*.bin, which is not" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_two_runs_do_not_share_a_folder(run, tmp_path, capsys):
    """The kernel holds the lock, so it ends with its process."""
    (tmp_path / "out").mkdir()
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from runtime.output_folder import OutputFolder\n"
        "folder = OutputFolder(sys.argv[2], False); print(flush=True); time.sleep(60)"
    )
    root = str(Path(main.__file__).parent)
    child = subprocess.Popen(
        [sys.executable, "-c", code, root, str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    child.stdout.readline()
    run("--overwrite_output_dir", status=2)
    assert "is in use by another process" in capsys.readouterr().err
    child.kill()
    child.wait()
    run()


@pytest.mark.parametrize("at", ["checkpoint", "records", "model"])
def test_a_full_disk_is_a_user_error_and_keeps_checkpoints(run, stopped, monkeypatch, capsys, at):
    """A file-size limit simulates the full disk; the SIGXFSZ that it causes is ignored."""
    small = {"checkpoint": 20_000, "records": 10, "model": 20_000}[at]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = ["--save_strategy", "no" if at == "model" else "epoch"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, hard))
    try:
        run(*flags, "--resume_from_checkpoint", "auto", status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert str(stopped) in error or str(stopped.parent) in error
    assert set(checkpoint.steps(stopped)) == {3, 5}
    assert not list(stopped.glob("saving-*"))
    run("--save_strategy", "epoch", "--resume_from_checkpoint", "auto")


def test_what_is_advised_when_memory_runs_out_works(run, stopped, monkeypatch, capsys, caplog):
    def step(*args):
        torch.empty(1 << 60)

    monkeypatch.setattr(trainer, "training_step", step)
    flags = ["--save_strategy", "epoch", "--resume_from_checkpoint", "auto"]
    run(*flags, status=2)
    advice = (
        "--gradient_checkpointing",
        "--per_device_eval_batch_size",
        "--per_device_train_batch_size",
        "--gradient_accumulation_steps",
        "--resume_from_checkpoint auto",
    )
    said = capsys.readouterr().err
    assert all(flag in said for flag in advice), said
    assert set(checkpoint.steps(stopped)) == {3, 5}
    monkeypatch.undo()
    flags += [*advice[:2], "2", advice[2], "2", advice[3], "2"]
    folder = run(*flags)
    for flag in advice[:4]:
        assert f"started with another {flag[2:]}; the last digits" in caplog.text
    tables = [pd.read_csv(one / "predictions.csv") for one in (folder, run(name="whole"))]
    pd.testing.assert_frame_equal(*tables, atol=1e-3)


def test_a_diverged_run_keeps_its_checkpoints(run, stopped, capsys, monkeypatch):
    def step(*args):
        raise UserError("the loss is nan")

    monkeypatch.setattr(trainer, "training_step", step)
    run("--save_strategy", "epoch", "--resume_from_checkpoint", "auto", status=2)
    assert "the loss is nan" in capsys.readouterr().err
    assert set(checkpoint.steps(stopped)) == {3, 5}


def test_weights_that_are_not_finite_are_refused(backbone, trained, tmp_path, capsys):
    folder = trained()
    weights = load_file(folder / "model.safetensors")
    weights["bert.pooler.dense.bias"][0] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    argv = [
        "--do_predict",
        "--model_name_or_path",
        str(folder),
        "--output_dir",
        str(tmp_path / "p"),
    ]
    assert main.main([*argv, "--test_file", str(tmp_path / "test.csv")]) == 2
    assert "bert.pooler.dense.bias has values that are not finite" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["files"]
