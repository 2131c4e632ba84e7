"""Two processes tune one model: the same result as with one, printed and written once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import ROOT
from killing import comparable
from runtime import processes
from runtime.files import UserError
from runtime.processes import Group
from test_main import load

RUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def command(backbone, files, tmp_path):
    """Make a command for 3 epochs of 3 steps; the last step has 3 rows for two processes."""

    def make(name: str, *flags: str, processes: int = 2) -> list[str]:
        argv = [*(RUN if processes == 2 else []), "main.py", "--do_train", "--do_eval"]
        argv += ["--do_predict", *files, "--model_name_or_path", backbone, "--precision", "fp32"]
        argv += ["--output_dir", str(tmp_path / name), "--num_train_epochs", "3"]
        argv += ["--per_device_train_batch_size", "4", "--logging_steps", "1"]
        argv += ["--attention_probs_dropout_prob", "0"]
        return [sys.executable, *argv, "--max_seq_length", "16", *flags]

    return make


def call(command: list[str], status: int = 0):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == (status == 0), done.stderr
    return done


def losses(folder) -> np.ndarray:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return np.array([one.get("loss", one.get("eval_loss")) for one in map(json.loads, lines)])


@pytest.mark.parametrize("flags", [(), ("--prefix", "--num_prefixes", "3")])
def test_two_processes_learn_the_same_as_one(command, tmp_path, flags):
    flags += ("--pre_seq_len", "3") if "--prefix" in flags else ()
    flags += ("--hidden_dropout_prob", "0")  # its masks differ
    printed = call(command("two", *flags))
    call(command("one", *flags, processes=1))
    one, two = tmp_path / "one", tmp_path / "two"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-4)
    probabilities = [
        pd.read_csv(each / "predictions.csv").iloc[:, 3:].to_numpy(float) for each in (one, two)
    ]
    np.testing.assert_allclose(*probabilities, atol=3e-4)
    alone, together = (load(each, "all_results.json") for each in (one, two))
    for name in alone:
        if name.startswith(("eval_", "test_")):
            assert alone[name] == pytest.approx(together[name], rel=1e-3), name
    assert printed.stdout.count("accuracy on unseen texts") == 1
    assert "2 processes that share each batch" in printed.stderr


def test_a_stopped_group_resumes_to_the_same_bytes(command, tmp_path):
    """A signal to torchrun stops the group, and every process saves the same step."""
    flags = ["--num_train_epochs", "40", "--hidden_dropout_prob", "0.1"]
    call(command("whole", *flags))
    child = subprocess.Popen(command("out", *flags), cwd=ROOT, stderr=subprocess.DEVNULL)
    staging = tmp_path / "out" / "unfinished"
    deadline = time.monotonic() + 60
    while not list(staging.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) != 0
    assert list(staging.glob("checkpoint-*")) and not (tmp_path / "out" / "run.json").exists()
    call(command("out", *flags, "--resume_from_checkpoint", "auto"))
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")
    again = call(command("out", *flags, "--resume_from_checkpoint", "auto"))
    assert "this run has already finished" in again.stderr
    other = call(command("out", *flags, "--resume_from_checkpoint", "auto", processes=1), status=2)
    assert "error:" in other.stderr


def start_group(command: list[str], folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """Start a group; return torchrun and its workers' process ids once a checkpoint exists."""
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((folder / "unfinished").glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(child.pid)], capture_output=True, text=True
    )
    return child, sorted(int(number) for number in found.stdout.split())


def test_all_processes_end_soon_if_one_dies(command, tmp_path):
    child, workers = start_group(command("out", "--num_train_epochs", "2000"), tmp_path / "out")
    os.kill(workers[-1], signal.SIGKILL)
    start = time.monotonic()
    assert child.wait(60) != 0
    assert time.monotonic() - start < 60


def test_workers_end_with_torchrun(command, tmp_path):
    """Killed with SIGKILL, it cannot stop them; they ran on for minutes."""
    child, numbers = start_group(command("out", "--num_train_epochs", "2000"), tmp_path / "out")
    workers = [Path("/proc", str(number)) for number in numbers]
    assert len(workers) == 2
    child.kill()
    child.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [os.kill(int(one.name), signal.SIGKILL) for one in workers if is_running(one)]
    assert not left


def is_running(process: Path) -> bool:
    """Return whether the process of this folder in /proc runs; a zombie does not."""
    try:
        return process.joinpath("stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_each_row_belongs_to_exactly_one_process():
    rows = np.arange(11)
    shares = [Group(rank, 3).share(rows) for rank in range(3)]
    assert sorted(np.concatenate(shares)) == rows.tolist()
    assert {len(share) for share in shares} == {3, 4}
    assert Group().share(rows) is not None and len(Group().share(rows)) == 11


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name in (*processes.SET_BY_TORCHRUN, "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="start 1 or fewer"), processes.joined():
        pass
