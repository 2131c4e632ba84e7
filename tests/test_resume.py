"""Runs that are stopped, killed or damaged resume and end as if nothing had happened."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import main
import power
import trainer
from conftest import within
from killing import Points, check_end, command, comparable, fork_main, kill_until_done, visible
from runtime import checkpoint, machine, output_folder, swap
from runtime.output_folder import OutputFolder
from runtime.training_state import MOMENTS
from test_main import ADAPTER, FULL, RESULTS, hashes, load

BF16 = ("--precision", "bf16")
RESUMED = {
    "full": (*BF16, *"--per_device_train_batch_size 2 --gradient_accumulation_steps 2".split()),
    "prefix": ("--prefix", "--attention_probs_dropout_prob", "0.1"),
    "checkpointing": (
        "--prefix",
        *BF16,
        "--gradient_checkpointing",
        "--hidden_dropout_prob",
        "0.1",
    ),
    "ensemble": ("--prefix", "--num_prefixes", "2", "--hidden_dropout_prob", "0.1"),
    "projected": ("--prefix", "--prefix_projection"),
    "input": ("--prefix", "--prefix_depth", "input"),
    "probe": ("--tuning_method", "probe", "--hidden_dropout_prob", "0.1"),
    "bias": ("--tuning_method", "bias", "--hidden_dropout_prob", "0.1"),
    "early stopping": ("--early_stopping_patience", "1", "--learning_rate", "1e-9"),
    "new texts": (
        *"--rdrop_alpha 1 --hidden_dropout_prob 0.1 --load_best_model_at_end False".split(),
        *"--class_weights balanced".split(),
    ),
    "contrastive": ("--contrastive_steps", "3", "--hidden_dropout_prob", "0.1"),
    "neither evaluation nor average": ("--eval_strategy", "no", "--ema_decay", "0"),
}


def test_a_run_resumes_with_the_precision_and_the_threads_it_started_with(
    run, stop_at, monkeypatch
):
    """Measured on a busy machine, bfloat16 may look slow that was fast before."""
    auto = ("--precision", "auto", "--resume_from_checkpoint", "auto")
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 2.0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "MOST_WORKERS", 1)  # workers set numbers of their own
    threads = [4]
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr("main.fastest_threads", lambda: 3)
    stop_at(4)
    run(*auto, status=143)
    stop_at(None)
    monkeypatch.setattr(machine, "bfloat16_gain", lambda: 0.5)
    monkeypatch.setattr("main.fastest_threads", lambda: pytest.fail("measured again"))
    threads.append(4)
    folder = run(*auto)
    settings = load(folder, "run.json")["settings"]
    assert (settings["precision"], settings["threads"]) == ("bf16", 3)
    before = hashes(folder)
    assert hashes(run(*auto)) == before  # it has already finished


@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_run_resumes_to_the_same_bytes(run, stop_at, capsys, case):
    """Stopped within an epoch and at the end of one; 3 epochs of 3 steps."""
    flags = [*RESUMED[case], "--num_train_epochs", "3", "--logging_steps", "2"]
    expected = comparable(run(*flags, name="whole"))
    for step in (1, 4, 5):
        stop_at(step)
        run(*flags, *(["--resume_from_checkpoint", "auto"] if step > 1 else []), status=143)
        assert f"stopped after step {step + 1} (saved)" in capsys.readouterr().err
        if case == "early stopping" and step == 4:
            break
    stop_at(None)
    check_end(run(*flags, "--resume_from_checkpoint", "auto"), expected)


def test_tensorboard_shows_every_record_even_after_a_stop(run, stop_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--report_to", "tensorboard", "--num_train_epochs", "3", "--logging_steps", "1"]
    stop_at(4)
    run(*flags, status=143)
    stop_at(None)
    folder = run(*flags, "--resume_from_checkpoint", "auto")
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "eval_accuracy"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        found = [(event.step, event.value) for event in shown.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in expected]


def test_each_signal_has_its_own_exit_status(run, stop_at, monkeypatch):
    """SIGHUP is sent when a terminal is closed; under nohup it is ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        stop_at(2, number)
        folder = run("--overwrite_output_dir", status=128 + number)
        assert set(checkpoint.steps(folder / "unfinished")) == {3}
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run("--overwrite_output_dir")
    signal.signal(signal.SIGHUP, usual)


def test_a_second_signal_ends_the_run_at_once_and_safely(backbone, files, tmp_path, monkeypatch):
    """The first one waits for the end of the step, which here never comes."""
    argv = [*command(backbone, files, "prefix"), "--output_dir", str(tmp_path / "out")]
    argv += ["--save_steps", "1"]
    usual, here = trainer.training_step, tmp_path / "here"

    def step(*args):
        if args[4] == 4:
            here.touch()
            time.sleep(60)
        return usual(*args)

    with monkeypatch.context() as patch, within(60):
        patch.setattr(trainer, "training_step", step)
        child = fork_main(argv, tmp_path, None, tmp_path / "points")
        while not here.exists():
            time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.5)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    with within(10):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert max(checkpoint.steps(tmp_path / "out" / "unfinished")) == 4
    assert main.main([*argv, "--resume_from_checkpoint", "auto"]) == 0


@pytest.mark.parametrize("method", ["full", "prefix", "probe", "two prefixes"])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(backbone, files, tmp_path, method):
    """See tests/killing.py, which does this hundreds of times."""
    argv = command(backbone, files, method)
    assert main.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    expected = comparable(tmp_path / "whole")
    kills = 0
    for seed in range(10):
        chance, points = random.Random(seed), Points(tmp_path / "points")
        counts = kill_until_done(argv, tmp_path / f"{seed}", chance, 3, points)
        check_end(tmp_path / f"{seed}", expected, checkpoints=False)
        kills += counts["kills"]
        if kills >= 3:
            return
    pytest.fail(f"{kills} kills only")


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace, which is not installed")
def test_a_run_resumes_after_a_power_cut(backbone, files, tmp_path):
    """See tests/power.py; without syncs the first cut leaves a folder that cannot resume."""
    kinds = power.KINDS[1:2]  # results that replace others
    assert power.cut(tmp_path, backbone, files, 4, random.Random(0), kinds) == 4


# -------------------------------------------------------------------- what a checkpoint contains


def test_checkpoints_are_complete_models_and_small_for_a_prefix(run):
    folder = run("--prefix", "--save_strategy", "epoch")
    rest = {"metrics.jsonl", "manifest.json", "state.json", "training.safetensors"}
    assert {path.name for path in (folder / "checkpoint-3").iterdir()} == ADAPTER | rest
    tensors = load_file(folder / "checkpoint-3" / "training.safetensors")
    names = ("prefix_encoder.embedding.weight", "classifier.weight", "classifier.bias")
    # the averaged weights are in adapter_model.safetensors
    assert set(tensors) == {f"{kind}/{name}" for kind in ("raw", *MOMENTS) for name in names}


def test_checkpoints_are_removed_unless_requested(run, stop_at):
    stop_at(4)
    folder = run("--num_train_epochs", "3", status=143)
    assert set(checkpoint.steps(folder / "unfinished")) == {3, 5}
    stop_at(None)
    run("--num_train_epochs", "3", "--resume_from_checkpoint", "auto")
    assert {path.name for path in folder.iterdir()} == RESULTS | FULL


def test_a_save_limit_keeps_the_newest_and_the_best(run):
    """The best is the first epoch, since nothing is learned."""
    saving = ["--save_total_limit", "1", "--save_strategy", "steps", "--save_steps", "2"]
    folder = run("--learning_rate", "1e-9", "--num_train_epochs", "4", *saving)
    assert load(folder, "all_results.json")["best_epoch"] == 1
    assert set(checkpoint.steps(folder)) == {3, 12}


def test_resuming_a_finished_run_loses_none_of_its_checkpoints(run, stop_at, capsys):
    """The resumed run keeps no checkpoints itself; once it is stopped."""
    flags = ["--num_train_epochs", "3", "--overwrite_output_dir"]
    folder = run(*flags, "--save_strategy", "epoch")
    before = comparable(folder)
    stop_at(7)
    flags += ["--resume_from_checkpoint", str(folder / "checkpoint-6")]
    run(*flags, status=143)
    stop_at(None)
    assert comparable(folder).items() >= before.items()
    check_end(run(*flags), before)
    assert {"checkpoint-3", "checkpoint-6", "checkpoint-9"} <= {*load(folder, "run.json")["files"]}
    run(*flags[:3], "--save_strategy", "epoch", "--seed", "1")  # started over: all are replaced
    name = "checkpoint-3/model.safetensors"
    assert comparable(folder)[name] != before[name]


def test_resuming_removes_the_checkpoints_beyond_the_limit(run, monkeypatch):
    """Killed between writing the last checkpoint and removing the earlier ones."""
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1"]
    expected = comparable(run(*flags, name="whole"))
    prune, calls = checkpoint.prune, []

    def killed_in_the_last_call(*args) -> None:
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        prune(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prune", killed_in_the_last_call)
        run(*flags, status=130)
    check_end(run(*flags, "--resume_from_checkpoint", "auto"), expected)


def test_an_output_folder_keeps_an_unfinished_run(run, stop_at, capsys, caplog):
    stop_at(4)
    folder = run(status=143)
    before = hashes(folder)
    run(status=2)
    assert (
        "contains an unfinished run: resume it with --resume_from_checkpoint"
        in capsys.readouterr().err
    )
    assert hashes(folder) == before
    stop_at(None)
    run("--overwrite_output_dir")
    assert {path.name for path in folder.iterdir()} == RESULTS | FULL
    assert f"discarding an unfinished run in {folder} (saved up to step 5)" in caplog.text


def test_a_run_resumes_from_a_checkpoint_in_another_folder(run, stop_at):
    expected = comparable(run(name="whole"))
    stop_at(4)
    path = run(name="moved", status=143) / "unfinished" / "checkpoint-5"
    stop_at(None)
    check_end(run("--resume_from_checkpoint", str(path)), expected)


def test_a_finished_run_is_not_repeated(run, capsys):
    folder = run()
    before = hashes(folder)
    run("--resume_from_checkpoint", "auto", "--overwrite_output_dir")
    assert "accuracy" in capsys.readouterr().out
    assert hashes(folder) == before
    run("--resume_from_checkpoint", "auto", "--seed", "1", status=2)
    assert "contains the results of an earlier run" in capsys.readouterr().err
    run("--resume_from_checkpoint", "auto", "--seed", "1", "--overwrite_output_dir")
    assert hashes(folder) != before


@pytest.mark.parametrize("kept", [(), ("--save_strategy", "epoch")])
def test_a_run_killed_while_publishing_resumes(run, monkeypatch, kept):
    """Killed at each rename and removal; resuming needs no --overwrite_output_dir."""
    expected = comparable(run(*kept, name="whole"))
    usual = os.replace, shutil.rmtree
    for at in range(0, 300, 13):
        left = [at]

        def counted(function, left=left):
            def call(*args, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return function(*args, **options)

            return call

        def armed(self, *args, usual_publish=OutputFolder.publish, counted=counted, **options):
            monkeypatch.setattr(os, "replace", counted(usual[0]))
            monkeypatch.setattr(shutil, "rmtree", counted(usual[1]))
            usual_publish(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(OutputFolder, "publish", armed)
            argv = (*kept, "--resume_from_checkpoint", "auto")
            status = 130
            try:
                run(*argv, name=f"out{at}", status=130)
            except AssertionError:
                status = 0
        monkeypatch.setattr(os, "replace", usual[0])
        monkeypatch.setattr(shutil, "rmtree", usual[1])
        if status == 0:
            assert at > 10
            return
        check_end(run(*argv, name=f"out{at}"), expected)


def test_results_are_synced_to_disk_before_they_are_published(run, monkeypatch):
    """Otherwise a power cut could leave them empty after the checkpoints are removed."""
    synced, shown = set(), []
    sync, point = output_folder.sync, swap.point

    def note(path):
        synced.add(path.stat().st_ino)
        sync(path)

    def check(folder, target):
        if target == swap.NEW:
            shown.extend((folder / target).iterdir())
            assert all(path.stat().st_ino in synced for path in shown)
        point(folder, target)

    monkeypatch.setattr(output_folder, "sync", note)
    monkeypatch.setattr(swap, "point", check)
    run()
    assert {path.name for path in shown} == RESULTS | FULL


LINKS = ["symlink", "link", "replace", "unlink", "rmdir", "mkdir"]


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_folder_shows_the_old_or_the_new_results_at_any_time(
    tmp_path, monkeypatch, hard_links, first
):
    """Before each file operation, and whatever operation a kill prevents; then `settle` ends it."""
    old = {} if first else {"run.json": b"1", "gone": b"2", "checkpoint-3/a": b"3", "old/b": b"4"}
    old |= {} if first else {"checkpoint-9/e": b"not that of the new run"}
    new = {"run.json": b"5", "added": b"6", "checkpoint-3/a": b"7", "checkpoint-6/c/d": b"8"}

    def fill(folder, files):
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    class Killed(BaseException):
        pass

    ends, usual = [], {name: getattr(os, name) for name in LINKS}
    for at in range(200):
        folder, left = tmp_path / f"{at}", [at]
        fill(folder, old | {"mine/notes": b"9"})
        fill(folder / "unfinished", new | {"checkpoint-9/e": b"not published"})
        before, after = old | {"mine/notes": b"9"}, new | {"mine/notes": b"9"}

        def counted(name, folder=folder, before=before, after=after, left=left):
            def call(*args, **options):
                assert visible(folder) in (before, after)
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                if name == "link" and not hard_links:
                    raise OSError(errno.EPERM, "none here")
                return usual[name](*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in LINKS:
                patch.setattr(os, name, counted(name))
            try:
                swap.swap(
                    folder,
                    {name.split("/")[0] for name in old},
                    {name.split("/")[0] for name in new},
                )
                done = True
            except Killed:
                done = False
        assert visible(folder) in (before, after)
        swap.settle(folder)
        assert visible(folder) in (before, after)
        ends.append(visible(folder) == after)
        assert {n for n in os.listdir(folder) if n.startswith(".")} == set()
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        assert {path.name for path in folder.iterdir() if path.is_dir()} - {"unfinished"} == {
            name.split("/")[0] for name in visible(folder) if "/" in name
        }
        if done:
            break
    assert ends == sorted(ends)  # first the old ones, then the new ones
    assert 15 < len(ends) < 200
    assert {False, True} == set(ends)


def test_results_replace_each_other_one_by_one_where_there_are_no_links(run, monkeypatch, caplog):
    """As on some network shares; `run.json` comes last."""
    expected = comparable(run(name="whole"))

    def refuse(*args):
        raise OSError(errno.EROFS, "none here")

    monkeypatch.setattr(os, "symlink", refuse)
    run("--seed", "1")
    check_end(run("--overwrite_output_dir"), expected)
    assert "its files change one by one" in caplog.text


def test_a_finished_run_leaves_another_unfinished_one_alone(run, stop_at):
    run()
    stop_at(4)
    folder = run("--seed", "1", "--overwrite_output_dir", status=143)
    before = hashes(folder)
    stop_at(None)
    run("--resume_from_checkpoint", "auto")  # without --seed it is the finished run
    assert hashes(folder) == before
    expected = comparable(run("--seed", "1", name="whole"))
    run("--seed", "1", "--resume_from_checkpoint", "auto", "--overwrite_output_dir")
    check_end(folder, expected)


def test_an_early_stop_between_two_records_resumes(run, stop_at):
    flags = ["--early_stopping_patience", "1", "--learning_rate", "1e-9", "--num_train_epochs", "4"]
    expected = comparable(run(*flags, "--logging_steps", "4", name="whole"))
    stop_at(5)  # the last step before the early stop
    run(*flags, "--logging_steps", "4", status=143)
    stop_at(None)
    check_end(run(*flags, "--logging_steps", "4", "--resume_from_checkpoint", "auto"), expected)


def test_a_user_error_keeps_the_unfinished_run(run, stopped, capsys):
    """Even with --overwrite_output_dir, which the scripts always pass."""
    before = {k: v for k, v in hashes(stopped).items() if "/checkpoint-" in k}
    for flags in (["--train_file", "nowhere"], ["--resume_from_checkpoint", "nowhere"]):
        run("--overwrite_output_dir", *flags, status=2)
        assert before.items() <= hashes(stopped).items()


def test_a_file_of_safetensors_that_was_not_finished_is_no_obstacle(run, stopped):
    """Found by simulated power cuts: it counted as foreign."""
    (stopped / ".tmpxHW1KD").write_bytes(b"half")
    folder = run("--save_strategy", "epoch", "--resume_from_checkpoint", "auto")
    assert not list(folder.rglob(".tmp*"))


def test_an_unfinished_folder_with_foreign_files_is_refused(run, tmp_path, capsys):
    mine = tmp_path / "out" / "unfinished" / "novel.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    run("--overwrite_output_dir", status=2)
    assert "files this program did not write: unfinished/novel.txt;" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_hidden_files_of_the_user_are_kept(run, tmp_path):
    """Names that a swap could use for itself."""
    for name in (".old/mine", ".new/mine", ".link", ".current"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    run()
    folder = run("--seed", "1", "--overwrite_output_dir")
    for name in (".old/mine", ".new/mine", ".link", ".current"):
        assert (folder / name).read_text() == "mine"
