"""The scripts, end to end, with the bundled backbone on the sample, as a new user runs them."""

import importlib
import json
import multiprocessing
import pickle
import re
import shutil
import subprocess
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from transformers import pipeline

import main
from arguments import parse_args
from conftest import REAL_DATA, ROOT, ROWS, bash, make_backbone, one_line, write_csv
from runtime import batches
from runtime.machine import pick_machine
from script.benchmark import benchmark, contenders, processes, scoring
from script.benchmark.contenders import Contender


def test_the_run_scripts_do_the_whole_job(clone):
    """The second one uses the split files that the first one has made."""
    for script, name, parameters, epochs in (
        ("run_og.sh", "og", 22_715_526, 2), ("run_prefix.sh", "prefix", 592_134, 5)
    ):  # fmt: skip
        done = bash(clone, script, "--max_train_samples", "240", "--num_train_epochs", str(epochs))
        assert done.returncode == 0, done.stderr
        assert "SYNTHETIC SAMPLE" in done.stderr
        assert not (clone / ".venv").exists()  # the active environment was used
        folder = clone / "checkpoints" / name
        results = json.loads((folder / "all_results.json").read_text())
        assert results["trainable_parameters"] == parameters
        assert results["eval_accuracy"] > 0.4  # the most frequent label has 0.37
        assert f"in checkpoints/{name}: README.md, " in done.stdout
        table = pd.read_csv(folder / "predictions.csv")
        sample = pd.read_csv(clone / "csv/test_simple.csv")
        assert table[["text", "label"]].equals(sample)
        names = json.loads((clone / "csv" / "split.json").read_text())["label_names"]
        accuracy = (table["predicted"] == table["label"].astype(str).map(names)).mean()
        assert accuracy == pytest.approx(results["test_accuracy"])
    classify = pipeline("text-classification", model=str(clone / "checkpoints" / "og"))
    table = pd.read_csv(clone / "checkpoints" / "og" / "predictions.csv")
    found = classify(table["text"].tolist()[:20])
    # bfloat16 in the run, float32 in the pipeline: the same except for near ties
    same = [item["label"] for item in found] == table["predicted"][:20]
    assert same.mean() >= 0.9


def write_splits(clone) -> None:
    """Write files in place of those that the notebook would make, which takes seconds."""
    for name in ("train", "val", "test"):
        write_csv(clone / "csv" / f"{name}_simple.csv", ROWS)


def test_the_original_command_line_runs_unchanged(clone, monkeypatch, caplog):
    write_splits(clone)
    line = (
        "--model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --do_train --do_eval "
        "--do_predict --max_seq_length 256 --per_device_train_batch_size 16 --learning_rate 5e-5 "
        "--num_train_epochs 1 --pre_seq_len 4 --output_dir checkpoints/prefix/ "
        "--overwrite_output_dir --hidden_dropout_prob 0.1 --seed 11 --load_best_model_at_end True "
        "--save_strategy epoch --evaluation_strategy epoch --prefix"
    )
    monkeypatch.chdir(clone)
    assert main.main(line.split()) == 0
    assert "--learning_rate 5e-05 is low for prefix tuning" in caplog.text
    assert (clone / "checkpoints/prefix/checkpoint-1/adapter_model.safetensors").exists()


@pytest.fixture
def forks(monkeypatch) -> None:
    """Let a benchmark fork this process, which has loaded torch, instead of starting new ones."""
    monkeypatch.setattr(processes, "SPAWN", multiprocessing.get_context("fork"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.mark.parametrize(
    ("module", "argv", "message"),
    [
        ("benchmark.benchmark", ["--data", "absent.csv"], "absent.csv cannot be read"),
        ("study.compare", ["--", "--prefix"], "--prefix: the study sets it"),
        ("study.compare", ["--original", "absent", "--unseen"], "absent/train_simple.csv cannot"),
    ],
)
def test_user_errors_of_scripts_are_one_line(module, argv, message, forks, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    assert message in one_line(call(module, argv, capfd))


def call(module: str, argv: list[str], capfd) -> tuple[int, str]:
    """Call a script's main as the shell does; returns the status and what it said."""
    main = importlib.import_module(f"script.{module}").main
    capfd.readouterr()
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    return status, capfd.readouterr().err


FRONT_ENDS = (  # with what each needs
    "baseline majority", "benchmark.benchmark", "ensemble a", "export a",
    "predict_ray a b --output_dir c", "preprocess", "serve", "benchmark.serving_benchmark a b",
    "split a.csv", "study.compare",
)  # fmt: skip


def test_an_unknown_flag_of_a_script_is_one_line(capfd):
    """A shortened one is unknown, too: it may be meant for another program."""
    for module, *argv in map(str.split, FRONT_ENDS):
        for flag in ("--no_such_flag", "--output_di=x"):
            line = one_line(call(module, [*argv, flag], capfd))
            assert flag.partition("=")[0] in line, module


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> None:
    """Let the contenders start from a tiny backbone."""
    folder = make_backbone(tmp_path / "tiny", max_position_embeddings=512)
    flags = [*contenders.FIXED, "--model_name_or_path", folder]
    monkeypatch.setattr(contenders, "FIXED", flags)


@pytest.fixture
def numbered(tmp_path) -> str:
    """Write 160 texts in two classes, enough for two batches and one that warms up."""
    return write_csv(tmp_path / "a.csv", [(f"some text of number {i}", i % 2) for i in range(160)])


def test_each_contender_measures(numbered, tiny, tmp_path):
    """All but those of other engines, in this process; compiling would take a minute."""
    contenders.make_models(numbered, tmp_path, {"full", *contenders.MIXED})
    for table, arguments in (
        (contenders.TUNING, (numbered, 2)),
        (scoring.SCORING | scoring.SINGLE, (contenders.distinct(numbered, 16),)),
    ):
        for name, contender in table.items():
            if not {*contenders.ENGINES} & {*contender.models} and "compiled" not in name:
                folders = [str(tmp_path / model) for model in contender.models]
                assert contender.set_up(*arguments, folders)() > 0, name


def test_whole_runs_are_timed_and_scored(numbered, tiny, forks, tmp_path, monkeypatch):
    for name in contenders.FILES.values():
        shutil.copy(numbered, tmp_path / name)
    flags = ["--num_train_epochs", "1", *contenders.FIXED[-2:]]  # the tiny backbone
    rival, ours = (
        partial(contenders.hf_run, num_train_epochs=1),
        partial(contenders.our_run, flags=flags),
    )
    monkeypatch.setattr(contenders, "WHOLE", {"ours": Contender(ours)})
    flags = ["--whole_runs", str(tmp_path), "--rounds", "1", "--output_dir", str(tmp_path)]
    assert benchmark.main(flags) == 0
    found = json.loads((tmp_path / "whole_runs.json").read_text())["ours"]
    contenders.make_models(numbered, tmp_path, set())
    assert found["runs"][0]["peak_memory_bytes"] > 0
    for row in (found, rival(str(tmp_path), [str(tmp_path / "full")])()):  # not to be forked
        assert 0 <= row["test_accuracy"] == row["eval_accuracy"] <= 1  # the same file
        assert row["seconds"] > 0


def test_the_benchmark_runs_contenders_and_neighbours_as_processes(
    numbered, tiny, forks, tmp_path, capsys
):
    tables = (contenders.TUNING, scoring.SCORING, scoring.SINGLE, contenders.WHOLE)
    pickle.dumps(tables)  # as processes need
    flags = ["--data", numbered, "--steps", "2", "--texts", "16", "--rounds", "1", "--output_dir"]
    flags += [str(tmp_path / "out"), "--only", "ours, full", "ours, prefix 20", "--neighbours", "1"]
    assert benchmark.main(flags) == 0
    assert multiprocessing.active_children() == []  # a neighbour ran on for ever
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert found["tuning"].keys() == {"ours, full", "ours, prefix 20"}
    kinds = {"ours, full", "ours, full, torch", "ours, full, int8"}
    assert found["scoring distinct texts"].keys() == kinds
    for one in (*found["tuning"].values(), *found["scoring distinct texts"].values()):
        assert min(one["rate"], one["peak_memory_bytes"]) > 0
    assert "x ours, full" in capsys.readouterr().out


def test_flags_are_appended_and_an_active_environment_without_the_pins_is_not_used(clone, tmp_path):
    """Then .venv is used; here it has the pinned versions, so nothing is installed."""
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(other)], check=True)
    (clone / ".venv").symlink_to(sys.prefix)
    write_splits(clone)
    for script in ("run_og.sh", "run_prefix.sh"):
        done = bash(clone, script, "--num_train_epochs", "0", virtual_env=str(other))
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2
        assert last.startswith("error: --num_train_epochs: 0 is out of range")
        assert "installing" not in done.stderr


def test_scripts_use_empty_arrays_as_bash_3_allows():
    """That of macOS: under `set -u`, an empty array counts as unset."""
    for path in (ROOT / "script").glob("*.sh"):
        bare = re.sub(r'\$\{(\w+)\[@\]\+"\$\{\1\[@\]\}"\}', "", path.read_text())
        assert "[@]}" not in bare, path


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real data is not on this machine")
def test_padding_on_the_real_titles_is_under_five_percent():
    train = str(REAL_DATA / "seed_splits" / "train_simple.csv")
    args = parse_args(["--do_train", "--train_file", train, "--output_dir", "unused"])
    source, data, _ = main.prepare(args, pick_machine("fp32"))
    lengths = batches.encode(source.tokenizer, data.train, 384).row_lengths
    assert batches.padding_share(lengths, batches.training_batches(lengths, 32, 42, 0)) < 0.05
