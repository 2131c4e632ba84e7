"""Two processes tune one model: the same result as with one, printed and written once."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import main
from conftest import ROOT, within
from killing import attempt_together, comparable, fork_main, ranks
from runtime import processes
from runtime.files import UserError
from runtime.processes import Group
from test_main import hashes, load

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


def fork(command: list[str], folder: Path) -> str:
    """Run a group's command in two forks of this process, which need not load torch again.

    Returns what they printed.
    """
    argv, said = command[command.index("main.py") + 1 :], folder.with_suffix(".said")
    status = attempt_together(argv, folder, None, folder.with_suffix(".points"), said)
    assert status == 0, said.read_text()
    return said.read_text()


def losses(folder) -> np.ndarray:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return np.array([one.get("loss", one.get("eval_loss")) for one in map(json.loads, lines)])


@pytest.mark.parametrize(
    "flags", [(), ("--prefix", "--num_prefixes", "3"), ("--contrastive_steps", "3")]
)
def test_two_processes_learn_the_same_as_one(command, tmp_path, flags):
    flags += ("--pre_seq_len", "3") if "--prefix" in flags else ()
    flags += ("--hidden_dropout_prob", "0")  # its masks differ
    printed = fork(command("two", *flags), tmp_path / "two")
    assert printed.count("accuracy on unseen texts") == 1
    assert main.main(command("one", *flags, processes=1)[2:]) == 0
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


def test_a_stopped_group_resumes_to_the_same_bytes(command, tmp_path, capsys):
    """A signal to torchrun stops the group, and every process saves the same step."""
    flags = ["--num_train_epochs", "40", "--hidden_dropout_prob", "0.1"]
    fork(command("whole", *flags), tmp_path / "whole")
    with open(tmp_path / "said", "w") as said:
        child = subprocess.Popen(command("out", *flags), cwd=ROOT, stderr=said)
    staging = tmp_path / "out" / "unfinished"
    wait_for_checkpoint(tmp_path / "out")
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) != 0
    assert "2 processes that share each batch" in (tmp_path / "said").read_text()
    assert list(staging.glob("checkpoint-*")) and not (tmp_path / "out" / "run.json").exists()
    resumed = command("out", *flags, "--resume_from_checkpoint", "auto")
    fork(resumed, tmp_path / "out")
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")
    before = hashes(tmp_path / "out")
    fork(resumed, tmp_path / "out")
    assert hashes(tmp_path / "out") == before  # it had already finished
    other = command("out", *flags, "--resume_from_checkpoint", "auto", processes=1)
    assert main.main(other[2:]) == 2
    assert "error:" in capsys.readouterr().err


def wait_for_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not list((folder / "unfinished").glob("checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_ends_soon_if_the_other_one_dies(command, tmp_path):
    argv, folder = command("out", "--num_train_epochs", "2000"), tmp_path / "out"
    first, second = (
        fork_main(argv[argv.index("main.py") + 1 :], folder, None, tmp_path / "points", **env)
        for env in ranks()
    )
    wait_for_checkpoint(folder)
    os.kill(second, signal.SIGKILL)
    with within(60):
        assert os.waitpid(first, 0)[1] != 0
    os.waitpid(second, 0)


def test_workers_end_with_torchrun(command, tmp_path):
    """Killed with SIGKILL, it cannot stop them; they ran on for minutes."""
    argv = command("out", "--num_train_epochs", "2000")
    child = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(tmp_path / "out")
    workers = [process.pid for process in psutil.Process(child.pid).children()]
    assert len(workers) == 2
    end_with(child, workers)


def test_the_neighbours_of_a_benchmark_end_with_it():
    """Even if it is killed before they have started; they kept a core busy for good."""
    code = "import time\nfrom script.benchmark.benchmark import multiply, started\n"
    code += "with started(multiply) as one:\n    print(one.pid, flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    end_with(child, [int(child.stdout.readline())])


def end_with(parent: subprocess.Popen, processes: list[int]) -> None:
    """Kill a process, and check that the others end soon."""
    found = [psutil.Process(number) for number in processes]
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(found, 30)[1] == []


def test_a_process_that_a_test_leaves_is_an_error_and_is_killed(tmp_path):
    """An orphan that has outlived its parent, too."""
    (tmp_path / "conftest.py").write_text(
        "import leftovers\nleftovers.PATIENCE = 0.1\nfrom leftovers import no_process_left"
    )
    (tmp_path / "test_it.py").write_text(
        "import subprocess\ndef test_one(): subprocess.Popen(['sleep', '61'])\n"
        "def test_two(): subprocess.run(['sh', '-c', 'sleep 62 > /dev/null & echo $! > orphan'])"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "2 passed, 1 error" in done.stdout, done.stdout
    assert "['sleep 61', 'sleep 62']" in done.stdout
    assert not psutil.pid_exists(int((tmp_path / "orphan").read_text()))


def test_the_tensors_of_a_checkpoint_are_sent_one_by_one(stopped, monkeypatch):
    """Pickled together, they were in memory twice more here, and four times elsewhere."""
    sent = []
    monkeypatch.setattr(
        processes.dist, "broadcast_object_list", lambda values: sent.append(pickle.dumps(values))
    )
    monkeypatch.setattr(main, "check_same_run", lambda *_: None)
    output = Namespace(staging=stopped)
    args = Namespace(resume_from_checkpoint="auto")
    found = main.find_checkpoint(output, args, {}, Group(0, 2))
    assert found.state["step"] == 5 and found.tensors.keys() >= {"raw/classifier.bias"}
    sizes = [tensor.nbytes for tensor in found.tensors.values()]
    assert len(sent) == len(sizes) + 2
    assert max(map(len, sent)) < max(sizes) + 10_000 < sum(sizes)


def test_each_row_belongs_to_exactly_one_process():
    rows = np.arange(11)
    shares = [Group(rank, 3).share(rows) for rank in range(3)]
    assert sorted(np.concatenate(shares)) == rows.tolist()
    assert {len(share) for share in shares} == {3, 4}
    assert Group().share(rows) is not None and len(Group().share(rows)) == 11


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="start 1 or fewer"), processes.joined():
        pass
