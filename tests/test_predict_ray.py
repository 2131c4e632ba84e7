"""A folder of files predicted by workers of Ray, one of which is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from conftest import ROOT, ROWS, write_csv

FILES = 30


def test_errors_name_the_file(run, tmp_path):
    """One of Parquet is converted before it is read, and the error names the original."""
    from script.predict_ray import Predictor

    argv = ["--do_predict", "--model_name_or_path", str(run()), "--output_dir", "unused"]
    predictor = Predictor(argv)
    pd.DataFrame({"title": ["a cat"]}).to_parquet(tmp_path / "columns.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "quote.csv").write_text('text,label\n"a cat,0\n')
    for name, fault in {
        "columns.parquet": "no column 'text'",
        "torn.parquet": "cannot be read as Parquet",
        "quote.csv": "quote",
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


def test_workers_predict_what_main_does_even_if_one_is_killed(run, predict, tmp_path):
    """Many files in CSV, one in Parquet; two that cannot be predicted are named or counted."""
    folder, texts, output = run("--prefix"), tmp_path / "texts", tmp_path / "predicted_by_ray"
    texts.mkdir()
    for number in range(FILES):
        rows = [(f"{text} {number} of {line}", label) for line in range(20) for text, label in ROWS]
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
    assert f"{FILES * 20 * len(ROWS) + len(ROWS):,} rows in" in out
    assert {path.name for path in output.iterdir()} == {
        "table.csv", *(f"{number}.csv" for number in range(FILES))
    }  # fmt: skip
    write_csv(texts / "table.csv", ROWS)
    for name in ("table", "0", "1", "17", "29"):
        assert predict(folder, "--test_file", str(texts / f"{name}.csv"))[0] == 0
        expected = (tmp_path / "predicted" / "predictions.csv").read_bytes()
        assert (output / f"{name}.csv").read_bytes() == expected

    # what is finished is not predicted again
    (texts / "table.csv").unlink()
    (texts / "bad.csv").unlink()
    clash = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "clash.csv has a column 'predicted', which the predictions would add" in clash.stderr
    (texts / "clash.csv").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{FILES + 1} files, {FILES + 1} of them already finished\n"
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
