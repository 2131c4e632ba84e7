"""The notebook: both protocols end to end, on the sample and on the real titles."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime

import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

from conftest import REAL_DATA, ROOT, bash, write_csv
from dataset import read_split, text_key
from runtime.file_format import FileFormat
from script import youtube
from test_youtube import needs_real_data, raw_table


def preprocess(clone, *flags: str, out: str = "csv"):
    done = bash(clone, "preprocess.sh", "-p", "output_dir", out, *flags)
    return done, clone / out


def test_the_notebook_runs_headless_on_the_sample_and_is_reproducible(clone):
    done, folder = preprocess(clone)
    assert done.returncode == 0, done.stderr
    assert "original (csv)" in done.stdout and "unseen (csv/unseen)" in done.stdout
    assert "executed notebook, with plots: csv/executed/preprocessing.ipynb" in done.stdout
    assert (clone / "csv/executed/preprocessing.ipynb").read_text().count('"image/png"') == 4
    about = json.loads((folder / "split.json").read_text())
    assert about["synthetic"] is True
    assert about["parameters"]["text_columns"] == ["title"]
    assert about["label_names"]["5"] == "other"
    for place in (folder, folder / "unseen"):
        counted = json.loads((place / "split.json").read_text())["splits"]
        for name in ("train", "val", "test"):
            split = read_split(place / f"{name}_simple.csv", FileFormat())
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
    done, folder = preprocess(clone, "-p", "text_columns", "description", out="out")
    assert done.returncode == 2
    assert "dropped 80 of 2,429 rows without a text" in done.stdout  # also before an error
    assert "was not written by split.sh or preprocess.sh: move it" in done.stderr
    assert {path.name for path in folder.iterdir()} == {"unseen", "executed"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-p", "group_by", "day"], "parameter group_by: 'day' is not one of video, channel, time"),
        (["-p", "colour", "red"], "-p colour: no such parameter; use "),
        (["-p", "input_file", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["-p", "csv_encoding", "1525"], "csv_encoding: Python cannot read files in '1525'"),
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


def test_every_documented_parameter_works_through_the_command(clone):
    """Each has a value that is not its default, and an effect on the files."""
    columns = ("day", "genre", "number", "title", "tags", "video_id", "trending_date")
    days = [f"{1 + i % 28:02}/{12 - i // 28:02}/2017" for i in range(200)]
    rows = [
        (day, "café" if i % 3 else "bar", f"n{i // 2}", f'"The" {i}!', '"a"|"b"', i, "17.14.11")
        for i, day in enumerate(days)
    ]  # without quotes around fields, and with a row that is cut off
    lines = [",".join(map(str, row)) for row in [columns, *rows, ("1",)]]
    (clone / "raw.csv").write_text("\n".join(lines), encoding="cp1252")
    given = {
        "input_file": "raw.csv", "csv_encoding": "cp1252", "label_column": "genre",
        "date_column": "day", "date_format": "%d/%m/%Y", "id_column": "number", "seed": 7,
        "text_columns": "tags,title", "cleaning": "none", "top_quantile": None, "balance": False,
        "group_by": "time", "train_share": 0.5, "test_share": 0.6, "quoting": "none",
        "drop_malformed": True,
    }  # fmt: skip
    flags = [word for name, value in given.items() for word in ("-p", name, str(value))]
    done, folder = preprocess(clone, *flags, out="made")
    assert done.returncode == 0, done.stderr
    cell = json.loads((ROOT / "preprocessing.ipynb").read_text())["cells"][1]["source"]
    documented = {line.partition(" = ")[0] for line in cell}
    assert documented == given.keys() | {"output_dir"} and "Unable to parse" not in done.stderr

    texts = [f'a, b | "The" {i}!' for i in range(200)]  # text_columns and cleaning
    expected = train_test_split(texts, train_size=0.5, random_state=7)[0]  # not balanced
    train = pd.read_csv(folder / "train_simple.csv")
    assert train["text"].tolist() == expected
    assert len(pd.read_csv(folder / "test_simple.csv")) == 60
    assert set(train["label"]) == {"café", "bar"}
    numbers = {}
    for name in ("train", "val", "test"):
        part = pd.read_csv(folder / "unseen" / f"{name}_simple.csv")
        numbers[name] = part["text"].str.extract(r"(\d+)", expand=False).astype(int)
    ids = pd.concat(numbers.values()) // 2
    assert sorted(ids) == list(range(100))  # one row for each number in id_column
    order = [datetime.strptime(days[i], "%d/%m/%Y") for part in numbers.values() for i in part]
    assert max(order[:50]) <= min(order[50:]) and max(order[:-30]) <= min(order[-30:])


def test_a_file_of_another_country_and_version_needs_no_parameters(clone):
    """Its own category names, and the terminal says what cleaning drops from its texts."""
    columns = ("video_id", "title", "channelTitle", "categoryId", "trending_date")
    titles = ["뉴스 속보 {}", "새로운 노래 Live song{}"]
    rows = [
        (f"v{i:010}", titles[i % 2].format(i), f"c{i % 9}", i // 2 % 2, "2020-08-01T00:00:00Z")
        for i in range(200)
    ]
    raw = write_csv(clone / "csv" / "KRvideos.csv", rows, columns)
    names = enumerate(["음악", "뉴스"])
    items = [{"id": str(number), "snippet": {"title": name}} for number, name in names]
    (clone / "csv" / "KR_category_id.json").write_text(json.dumps({"items": items}))
    done, folder = preprocess(clone, "-p", "input_file", raw, "-p", "group_by", "channel")
    assert done.returncode == 0, done.stderr
    assert "dropped 100 of 200 rows whose text is empty after cleaning: -p cleaning" in done.stdout
    assert "in 100% of the remaining texts: -p cleaning none keeps them" in done.stdout
    about = json.loads((folder / "split.json").read_text())
    assert about["label_names"] == {"0": "음악", "1": "뉴스"}
    assert about["parameters"]["label_column"] == "categoryId"


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
    known = {text for path in files for text in read_split(path, FileFormat()).texts}
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
    texts = [set(map(text_key, read_split(path, FileFormat()).texts)) for path in files]
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
    strict = len(youtube.read_raw(raw, "utf-8", ["title"]))
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
    shutil.copy(clone / youtube.SAMPLE_FILE, clone / "csv" / "USvideo.csv")
    path = clone / "csv" / "train_simple.csv"
    made, own = path.read_text(), "text,label\nmine,1\nyours,0\n"
    path.write_text(own)
    assert "making the split files" not in prepare() and path.read_text() == own
    path.write_text(made)
    third = prepare()
    assert "making the split files in csv/" in third
    assert "SYNTHETIC" not in third
