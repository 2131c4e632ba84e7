"""The notebook: both protocols end to end, on the sample and on the real titles."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from conftest import REAL_DATA, ROOT, bash
from dataset import read_split, text_key
from script import splits
from test_splits import needs_real_data, raw_table


def preprocess(clone, *flags: str, out: str = "csv"):
    done = bash(clone, "preprocess.sh", "-p", "output_dir", out, *flags)
    return done, clone / out


def test_the_notebook_runs_headless_on_the_sample_and_is_reproducible(clone):
    done, folder = preprocess(clone)
    assert done.returncode == 0, done.stderr
    assert "original (csv)" in done.stdout and "unseen (csv/unseen)" in done.stdout
    assert "executed notebook and 4 pictures: csv/executed" in done.stdout
    assert len(list((clone / "csv/executed").glob("*.png"))) == 4
    about = json.loads((folder / "split.json").read_text())
    assert about["synthetic"] is True
    assert about["parameters"]["text_columns"] == ["title"]
    assert about["label_names"]["5"] == "other"
    for place in (folder, folder / "unseen"):
        counted = json.loads((place / "split.json").read_text())["splits"]
        for name in ("train", "val", "test"):
            split = read_split(place / f"{name}_simple.csv", text_columns=["text"])
            assert len(split) == counted[name]["rows"]
    before = {path for path in clone.rglob("*") if ".git" not in path.parts}
    again, second = preprocess(clone, out="again")
    assert again.returncode == 0
    written = {path for path in clone.rglob("*") if ".git" not in path.parts} - before
    assert all(path.is_relative_to(second) for path in written if "__pycache__" not in path.parts)
    names = [f"{name}_simple.csv" for name in ("train", "val", "test")] + ["split.json"]
    for name in [*names, *(f"unseen/{name}" for name in names)]:
        assert (folder / name).read_bytes() == (second / name).read_bytes(), name


def test_neither_protocol_is_written_if_one_would_overwrite_foreign_files(clone):
    mine = clone / "out" / "unseen" / "train_simple.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("text,label\nmine,1\n")
    done, folder = preprocess(clone, out="out")
    assert done.returncode == 2
    assert "was not written by split.sh or preprocess.sh: move it" in done.stderr
    assert {path.name for path in folder.iterdir()} == {"unseen", "executed"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-p", "group_by", "day"], "parameter group_by is 'day'"),
        (["-p", "colour", "red"], "-p colour: no such parameter; use input_file, "),
        (["-p", "input_file", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["-p", "csv_encoding", "1525"], "cannot be read: unknown encoding: 1525"),
        (["-p", "text_columns", "5"], "parameter text_columns is '5'"),
        (["-p", "output_dir", "main.py"], "main.py/executed cannot be written"),
    ],
)
def test_user_errors_of_the_runner_are_one_line(clone, flags, message):
    done, folder = preprocess(clone, *flags)
    assert done.returncode == 2
    # a kernel that ends on a busy machine may write other lines
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (folder / "train_simple.csv").exists()


def test_outputs_are_stripped():
    notebook = json.loads((ROOT / "preprocessing.ipynb").read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@needs_real_data
def test_real_titles_are_cleaned_as_the_original_did():
    raw = str(REAL_DATA / "raw" / "USvideos_14999_titles_cp1252.csv")
    found = set(raw_table(raw, "cp1252")["text"])
    names = ("train", "val", "test")
    files = [REAL_DATA / "seed_splits" / f"{name}_simple.csv" for name in names]
    known = {text for path in files for text in read_split(path, text_columns=["text"]).texts}
    assert len(found & known) / len(found) > 0.875


@needs_real_data
def test_both_protocols_work_on_the_real_titles(clone):
    raw = str(REAL_DATA / "raw" / "USvideos_14999_titles_cp1252.csv")
    done, folder = preprocess(clone, "-p", "input_file", raw, "-p", "csv_encoding", "cp1252")
    assert done.returncode == 0, done.stderr
    records = [
        json.loads((place / "split.json").read_text()) for place in (folder, folder / "unseen")
    ]
    assert [record["synthetic"] for record in records] == [False, False]
    original, unseen = (record["splits"]["test"] for record in records)
    assert original["share_in_train"] > 0.7
    assert original["lookup_accuracy"] > 0.85
    assert unseen["share_in_train"] == 0
    assert unseen["lookup_accuracy"] < 0.5
    names = ("train", "val", "test")
    files = [folder / "unseen" / f"{name}_simple.csv" for name in names]
    texts = [set(map(text_key, read_split(path, text_columns=["text"]).texts)) for path in files]
    assert sum(map(len, texts)) == len(set.union(*texts))


@needs_real_data
def test_the_sixteen_columns_of_the_real_file_are_read(clone):
    columns = "title,channel_title,tags,description"
    raw = str(REAL_DATA / "raw" / "USvideos_3000_all_columns.csv")
    done, folder = preprocess(clone, "-p", "input_file", raw, "-p", "text_columns", columns)
    assert done.returncode == 0, done.stderr
    about = json.loads((folder / "unseen" / "split.json").read_text())
    assert [about["splits"][name]["share_in_train"] for name in ("val", "test")] == [0, 0]
    assert about["label_names"]["0"] == "Entertainment"
    strict = len(splits.read_raw(raw, "utf-8", ["title"]))
    assert strict == len(pd.read_csv(raw)) == 3000


def test_the_run_scripts_remake_the_split_files_once_the_real_file_exists(clone):
    """Only the part that is sourced, without training. Files of the user's own are kept."""
    show = "source script/environment.sh requirements.txt; source script/data.sh; echo done"

    def prepare():
        env = os.environ | {"VIRTUAL_ENV": sys.prefix}
        done = subprocess.run(
            ["bash", "-c", show], cwd=clone, capture_output=True, text=True, env=env
        )
        assert done.stdout == "done\n", done.stderr
        return done.stderr

    first, second = prepare(), prepare()
    assert "making the split files in csv/" in first
    assert "making the split files" not in second
    assert "SYNTHETIC SAMPLE" in first
    assert "SYNTHETIC SAMPLE" in second
    shutil.copy(clone / splits.SAMPLE_FILE, clone / "csv" / "USvideo.csv")
    path = clone / "csv" / "train_simple.csv"
    made, own = path.read_text(), "text,label\nmine,1\nyours,0\n"
    path.write_text(own)
    assert "making the split files" not in prepare() and path.read_text() == own
    path.write_text(made)
    third = prepare()
    assert "making the split files in csv/" in third
    assert "SYNTHETIC" not in third
