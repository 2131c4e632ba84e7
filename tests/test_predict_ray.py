"""A folder of files predicted by workers of Ray, one of which is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from arguments import parse_args
from conftest import ROOT, ROWS, make_files, one_line, train, write_csv
from model.source import open_model
from runtime.file_format import FileFormat
from script import predict_ray

FILES, ROUNDS = 8, 20  # files, and how often each has all rows


@pytest.fixture(scope="module")
def model(backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert train(backbone, make_files(folder), folder / "model") == 0
    return folder / "model"


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the script with one worker, in this process; returns the status and what it said."""

    def from_items(rows, **_):
        def start(kind, fn_constructor_args, **_):
            worker = kind(*fn_constructor_args)
            return SimpleNamespace(take_all=lambda: [worker(row) for row in rows])

        return SimpleNamespace(map=start)

    context = SimpleNamespace(get_current=SimpleNamespace)
    data = SimpleNamespace(from_items=from_items, DataContext=context)
    data.ActorPoolStrategy = SimpleNamespace
    ray = SimpleNamespace(data=data, init=lambda **_: None, cluster_resources=lambda: {"CPU": 1})
    monkeypatch.setattr(predict_ray, "ray", ray)

    def main(*argv: object) -> tuple[int, str]:
        capsys.readouterr()
        status = predict_ray.main([*map(str, argv), "--precision", "fp32"])
        said = capsys.readouterr()
        return status, said.out + said.err

    return main


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_predictions_of_another_model_input_or_flag_are_not_taken_for_finished(
    model, call, tmp_path
):
    texts, output = tmp_path / "texts", tmp_path / "output"
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"classifier.bias": torch.ones(3)}, other / "model.safetensors")
    (texts / "more").mkdir(parents=True)
    for name in ("a.csv", "B.CSV", "c.txt"):
        write_csv(texts / name, ROWS)
    command = [model, texts, "--output_dir", output]
    status, said = call(*command)
    assert (status, {*contents(output)}) == (0, {"a.csv", "a.json", "B.csv", "B.json"})
    assert "skipped 2 of" in said and ": c.txt, more" in said
    assert "2 of them already finished" in call(*command)[1]

    for what, changed in (
        ("model", [other, *command[1:]]),
        ("--max_seq_length", [*command, "--max_seq_length", "4"]),
        ("--reject_below", [*command, "--reject_below", "0.9"]),
    ):
        before = contents(output)
        assert f"another {what}: choose another --output_dir" in one_line(call(*changed))
        assert contents(output) == before
        assert call(*changed, "--overwrite_output_dir")[0] == 0
        assert {name for name, old in before.items() if contents(output)[name] == old} == set()
        assert "2 of them already finished" in call(*changed)[1]
        assert call(*command, "--overwrite_output_dir")[0] == 0
        assert contents(output)["a.csv"] == before["a.csv"]

    write_csv(texts / "a.csv", ROWS[:2])
    assert "a.csv was predicted with another input file" in one_line(call(*command))
    assert "1 of them already finished" in call(*command, "--overwrite_output_dir")[1]
    (output / "a.csv").write_text("edited")
    assert "a.csv was changed since" in one_line(call(*command))


def test_a_call_that_is_killed_at_any_moment_is_resumed_by_the_same_command(
    model, call, tmp_path, monkeypatch
):
    """It is killed before a file gets its name, first and when predictions are replaced."""
    texts, output, usual = tmp_path / "texts", tmp_path / "output", os.replace
    texts.mkdir()
    write_csv(texts / "a.csv", ROWS)
    first = [model, texts, "--output_dir", output]
    again = [*first, "--max_seq_length", "4", "--overwrite_output_dir"]
    assert call(*first)[0] == 0
    earlier, predicted = shutil.copytree(output, tmp_path / "earlier"), contents(output)
    assert call(*again)[0] == 0
    for command, right in ((first, predicted), (again, contents(output))):
        for at in range(2):
            shutil.rmtree(output)
            if command is again:
                shutil.copytree(earlier, output)
            names = []

            def replace(*paths):
                if len(names) == at:  # noqa: B023
                    raise KeyboardInterrupt
                names.append(paths)  # noqa: B023
                usual(*paths)

            monkeypatch.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                call(*command)
            monkeypatch.setattr(os, "replace", usual)
            assert call(*command)[0] == 0
            assert contents(output)["a.csv"] == right["a.csv"]


def test_files_of_others_are_not_replaced(model, call, tmp_path):
    texts, output = tmp_path / "texts", tmp_path / "output"
    for folder in (texts, output):
        folder.mkdir()
        write_csv(folder / "a.csv", ROWS)
    (mine := tmp_path / "mine").mkdir()
    (mine / "a.json").write_text('{"files": []}')
    before = contents(output)
    for folder, what in (
        (output, "a.csv was not written by predict_ray.sh: move it away"),
        (mine, "a.json was not written by predict_ray.sh: move it away"),
        (texts, "is the folder of the texts"),
    ):
        flags = ["--output_dir", folder, "--overwrite_output_dir"]
        assert what in one_line(call(model, texts, *flags))
    assert contents(output) == contents(texts) == before and [*contents(mine)] == ["a.json"]


def test_flags_that_would_have_no_effect_are_refused(tmp_path, capsys):
    for flag in ("--do_eval", "--test_file=a.csv", "--model_name_or_path=x", "--seed"):
        with pytest.raises(SystemExit) as end:
            predict_ray.main(["m", "t", "--output_dir", str(tmp_path / "out"), flag])
        line = one_line((end.value.code, capsys.readouterr().err))
        assert f"{flag.partition('=')[0]} has no effect here" in line


def test_errors_name_the_file(model, tmp_path):
    args = parse_args(["--do_predict", "--model_name_or_path", str(model), "--output_dir", "no"])
    predictor = predict_ray.Predictor(args, open_model(str(model)), FileFormat(), {})
    pd.DataFrame({"title": ["a cat"]}).to_parquet(tmp_path / "columns.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "quote.csv").write_text('text,label\n"a cat,0\n')
    (tmp_path / "clash.csv").write_text("text,predicted\na cat,0\n")
    for name, fault in {
        "clash.csv": "has a column 'predicted', which the predictions would add",
        "columns.parquet": "no column 'text'",
        "torn.parquet": "is a Parquet file that cannot be read: ",
        "quote.csv": "opens a quote that never closes",
    }.items():
        row = {"path": str(tmp_path / name), "output": "unused", "staging": str(tmp_path)}
        error = predictor(row)["error"]
        assert error.startswith(str(tmp_path / name)) and fault in error, error


def workers(parent: int) -> list[int]:
    """List the processes of Ray's workers that belong to this run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            session = f"ray_run_{parent}".encode() in (folder / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        if b"MapWorker" in words and session:
            found.append(int(folder.name))
    return found


def test_workers_predict_what_main_does_even_if_one_is_killed(trained, predict, tmp_path, capsys):
    """Many files in CSV, one in Parquet; two that cannot be predicted are named or counted."""
    folder, texts, output = trained("--prefix"), tmp_path / "texts", tmp_path / "predicted_by_ray"
    texts.mkdir()
    for number in range(FILES):
        rows = [
            (f"{text} {number} of {line}", label) for line in range(ROUNDS) for text, label in ROWS
        ]
        write_csv(texts / f"{number}.csv", rows)
    table = pd.DataFrame(ROWS, columns=["text", "label"])
    table.to_parquet(texts / "table.parquet")
    (texts / "bad.csv").write_text('text,label\n"a cat,0\n')
    (texts / "clash.csv").write_text("text,predicted\na cat,0\n")
    command = [sys.executable, "-m", "script.predict_ray", str(folder), str(texts)]
    command += ["--output_dir", str(output), "--workers", "2", "--precision", "fp32"]
    env = os.environ | {"RUN": f"ray_run_{os.getpid()}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed = None
    while killed is None and process.poll() is None:
        time.sleep(0.02)
        if len(list(output.glob("*.csv"))) >= 2 and (alive := workers(os.getpid())):
            killed = alive[0]
            os.kill(killed, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert killed is not None, err
    last = err.splitlines()[-1]
    assert process.returncode == 2 and "bad.csv" in last and "(and 1 more files)" in last, err
    assert f"{FILES * ROUNDS * len(ROWS) + len(ROWS):,} rows in" in out
    assert {path.name for path in output.iterdir()} == {
        f"{name}.{kind}" for name in ("table", *range(FILES)) for kind in ("csv", "json")
    }
    write_csv(texts / "table.csv", ROWS)
    for name in ("table", *range(FILES)):
        assert predict(folder, "--test_file", str(texts / f"{name}.csv"))[0] == 0
        expected = (tmp_path / "predicted" / "predictions.csv").read_bytes()
        assert (output / f"{name}.csv").read_bytes() == expected

    # what is finished is not predicted again
    for name in ("table.csv", "bad.csv", "clash.csv"):
        (texts / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert predict_ray.main(command[3:]) == 0
    said = capsys.readouterr().out
    assert said == f"{FILES + 1} files, {FILES + 1} of them already finished\n"
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
