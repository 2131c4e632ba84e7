"""The notebook: both protocols end to end, on the sample and on the real titles."""

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from datetime import datetime

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import pytest
from sklearn.model_selection import train_test_split

import script.preprocess
from conftest import REAL_DATA, ROOT, bash, one_line, write_csv
from dataset import read_split, text_key
from runtime.file_format import FileFormat
from script import youtube
from test_youtube import needs_real_data, raw_table


def in_kernel(clone, *flags: str, out: str = "csv"):
    done = bash(clone, "preprocess.sh", "-p", "output_dir", out, *flags)
    return done, clone / out


@pytest.fixture
def preprocess(tmp_path, monkeypatch, capsys):
    """Call the command in a folder with the sample; the cells run in this process, not a kernel."""

    def execute(notebook, _, parameters, **options):
        cells, scope = nbformat.read(notebook, as_version=4), {}
        codes = [cell.source for cell in cells.cells if cell.cell_type == "code"]
        with plt.rc_context(), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(codes[0], scope)
            scope |= parameters
            for code in codes[1:]:
                exec(code, scope)
        plt.close("all")
        cells.cells[-1].outputs = [nbformat.v4.new_output("stream", text=printed.getvalue())]
        return cells

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(logging, "disable", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "csv").mkdir()
    for name in ("preprocessing.ipynb", youtube.SAMPLE_FILE):
        shutil.copy(ROOT / name, tmp_path / name)

    def call(*flags: str, out: str = "csv") -> tuple[int, str, str]:
        capsys.readouterr()
        status = script.preprocess.main(["-p", "output_dir", out, *flags])
        return status, *capsys.readouterr()

    return call


def test_the_notebook_runs_headless_on_the_sample_and_is_reproducible(clone, preprocess, tmp_path):
    done, folder = in_kernel(clone)
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
    before = {*tmp_path.iterdir()}
    assert preprocess(out="again")[0] == 0
    second = tmp_path / "again"
    assert {*tmp_path.iterdir()} - before == {second}
    names = [f"{name}_simple.csv" for name in ("train", "val", "test")] + ["split.json"]
    for name in [*names, *(f"unseen/{name}" for name in names)]:
        assert (folder / name).read_bytes() == (second / name).read_bytes(), name


def test_neither_protocol_is_written_if_one_would_overwrite_foreign_files(clone):
    mine = clone / "out" / "unseen" / "train_simple.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("text,label\nmine,1\n")
    done, folder = in_kernel(clone, "-p", "text_columns", "description", out="out")
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
def test_user_errors_of_the_runner_are_one_line(preprocess, tmp_path, flags, message):
    (tmp_path / "main.py").write_text("")
    status, _, error = preprocess(*flags)
    assert message in one_line((status, error))
    assert not (tmp_path / "csv" / "train_simple.csv").exists()


def test_every_documented_parameter_works_through_the_command(preprocess, tmp_path):
    """Each has a value that is not its default, and an effect on the files."""
    columns = ("day", "genre", "number", "title", "tags", "video_id", "trending_date")
    days = [f"{1 + i % 28:02}/{12 - i // 28:02}/2017" for i in range(200)]
    rows = [
        (day, "café" if i % 3 else "bar", f"n{i // 2}", f'"The" {i}!', '"a"|"b"', i, "17.14.11")
        for i, day in enumerate(days)
    ]  # without quotes around fields, and with a row that is cut off
    lines = [",".join(map(str, row)) for row in [columns, *rows, ("1",)]]
    (tmp_path / "raw.csv").write_text("\n".join(lines), encoding="cp1252")
    given = {
        "input_file": "raw.csv", "csv_encoding": "cp1252", "label_column": "genre",
        "date_column": "day", "date_format": "%d/%m/%Y", "id_column": "number", "seed": 7,
        "text_columns": "tags,title", "cleaning": "none", "top_quantile": None, "balance": False,
        "group_by": "time", "train_share": 0.5, "test_share": 0.6, "quoting": "none",
        "drop_malformed": True,
    }  # fmt: skip
    flags = [word for name, value in given.items() for word in ("-p", name, str(value))]
    status, _, error = preprocess(*flags, out="made")
    assert status == 0, error
    folder = tmp_path / "made"
    cell = json.loads((ROOT / "preprocessing.ipynb").read_text())["cells"][1]["source"]
    documented = {line.partition(" = ")[0] for line in cell}
    assert documented == given.keys() | {"output_dir"} and "Unable to parse" not in error

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


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_file_of_another_country_and_version_needs_no_parameters(preprocess, tmp_path):
    """Its own category names, and the terminal says what cleaning drops from its texts."""
    columns = ("video_id", "title", "channelTitle", "categoryId", "trending_date")
    titles = ["뉴스 속보 {}", "새로운 노래 Live song{}"]
    rows = [
        (f"v{i:010}", titles[i % 2].format(i), f"c{i % 9}", i // 2 % 2, "2020-08-01T00:00:00Z")
        for i in range(200)
    ]
    raw = write_csv(tmp_path / "csv" / "KRvideos.csv", rows, columns)
    names = enumerate(["음악", "뉴스"])
    items = [{"id": str(number), "snippet": {"title": name}} for number, name in names]
    (tmp_path / "csv" / "KR_category_id.json").write_text(json.dumps({"items": items}))
    status, printed, error = preprocess("-p", "input_file", raw, "-p", "group_by", "channel")
    assert status == 0, error
    assert "dropped 100 of 200 rows whose text is empty after cleaning: -p cleaning" in printed
    assert "in 100% of the remaining texts: -p cleaning none keeps them" in printed
    about = json.loads((tmp_path / "csv" / "split.json").read_text())
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
def test_both_protocols_work_on_the_real_titles(preprocess, tmp_path):
    raw = str(REAL_DATA / "raw" / "USvideos_14999_titles_cp1252.csv")
    assert preprocess("-p", "input_file", raw, "-p", "csv_encoding", "cp1252")[0] == 0
    folder = tmp_path / "csv"
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
def test_the_sixteen_columns_of_the_real_file_are_read(preprocess, tmp_path):
    columns = "title,channel_title,tags,description"
    raw = str(REAL_DATA / "raw" / "USvideos_3000_all_columns.csv")
    assert preprocess("-p", "input_file", raw, "-p", "text_columns", columns)[0] == 0
    about = json.loads((tmp_path / "csv" / "unseen" / "split.json").read_text())
    assert [about["splits"][name]["share_in_train"] for name in ("val", "test")] == [0, 0]
    assert about["label_names"]["0"] == "Entertainment"
    strict = len(youtube.read_raw(raw, "utf-8", ["title"]))
    assert strict == len(pd.read_csv(raw)) == 3000


STUB = """
import hashlib, json, pathlib
path, raw = pathlib.Path("csv/train_simple.csv"), pathlib.Path("csv/USvideo.csv")
path.write_text("text,label\\na,1\\n")
sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
record = {"synthetic": not raw.exists(), "files": sums}
path.with_name("split.json").write_text(json.dumps(record))
"""


def test_the_run_scripts_remake_the_split_files_once_the_real_file_exists(clone):
    """Only what is sourced, without training or the notebook. Files of the user's own are kept."""
    show = "source script/environment.sh requirements.txt; source script/data.sh; echo done"
    (clone / "script" / "preprocess.sh").write_text(f"{sys.executable} -c '{STUB}'")

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
    assert "SYNTHETIC SAMPLE" in first and "SYNTHETIC SAMPLE" in second
    (clone / "csv" / "USvideo.csv").write_text("")
    path = clone / "csv" / "train_simple.csv"
    made, own = path.read_text(), "text,label\nmine,1\nyours,0\n"
    path.write_text(own)
    assert "making the split files" not in prepare() and path.read_text() == own
    path.write_text(made)
    third = prepare()
    assert "making the split files in csv/" in third and "SYNTHETIC" not in third
