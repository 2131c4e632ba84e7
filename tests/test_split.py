"""Splitting one's own CSV file: no leaks, nothing lost, stated rules, user errors."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import bash
from runtime.csv_reader import text_key
from runtime.files import sha256
from script import split
from script.groups import connected, cut_groups

NAMES = ("train", "val", "test")


def write(path: Path, rows: list, header=("text", "label"), delimiter=",", encoding="utf-8") -> str:
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return str(path)


def random_rows(seed: int) -> list[tuple]:
    """Draw rows with repeated texts in other spellings, shared authors, rare and missing labels."""
    random = np.random.default_rng(seed)
    count = int(random.integers(60, 200))
    texts = [f"{'A' if i % 2 else 'a'} text {i}" for i in random.integers(0, count, count)]
    labels = random.choice(["x", "y", "z", "rare", ""], count, p=[0.5, 0.3, 0.14, 0.02, 0.04])
    authors = [f"author {i}" if i < count else "" for i in random.integers(0, 2 * count, count)]
    return list(zip(texts, labels, authors, strict=True))


def read(folder: Path) -> dict[str, pd.DataFrame]:
    files = {name: folder / f"{name}_simple.csv" for name in NAMES}
    return {n: pd.read_csv(path, dtype=str, keep_default_na=False) for n, path in files.items()}


def dropped(folder: Path) -> int:
    counts = json.loads((folder / "split.json").read_text())["counts"]
    return sum(count for name, count in counts.items() if name.startswith("rows_with"))


@pytest.mark.parametrize("seed", range(20))
def test_no_text_and_no_group_is_in_two_files_and_no_row_is_lost(tmp_path, capsys, seed):
    rows = random_rows(seed)
    path = write(tmp_path / "a.csv", rows, ("text", "label", "author"))
    flags = [path, "--group_by", "author", "--output_dir", str(tmp_path / "out")]
    assert split.main([*flags, "--seed", str(seed)]) == 0
    files = read(tmp_path / "out")
    for column, key in (("text", text_key), ("author", str)):
        values = [set(map(key, table[column])) - {""} for table in files.values()]
        assert sum(map(len, values)) == len(set.union(*values)), column
    assert sum(map(len, files.values())) + dropped(tmp_path / "out") == len(rows)
    assert set(files["val"]["label"]) | set(files["test"]["label"]) <= set(files["train"]["label"])
    assert "next: bash script/run_og.sh --train_file" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
def test_in_folds_each_row_is_tested_once(tmp_path, seed):
    rows = random_rows(seed)
    path = write(tmp_path / "a.csv", rows, ("text", "label", "author"))
    assert split.main([path, "--folds", "3", "--output_dir", str(tmp_path / "out")]) == 0
    folds = [read(tmp_path / "out" / str(fold)) for fold in range(3)]
    for files in folds:
        texts = [set(map(text_key, table["text"])) for table in files.values()]
        assert sum(map(len, texts)) == len(set.union(*texts))
    tested = sum(len(files["test"]) for files in folds)
    lost = len(rows) - tested
    assert all(dropped(tmp_path / "out" / str(fold)) >= 0 for fold in range(3))
    assert lost == sum(1 for _, label, _ in rows if label in ("", "rare")) or lost < 0.1 * len(rows)


def test_the_seed_decides_the_files(tmp_path):
    path = write(tmp_path / "a.csv", random_rows(0), ("text", "label", "author"))
    for out, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        assert split.main([path, "--seed", seed, "--output_dir", str(tmp_path / out)]) == 0
    one, same, other = (
        [(tmp_path / out / f"{name}_simple.csv").read_bytes() for name in NAMES]
        for out in ("one", "same", "other")
    )
    assert one == same != other
    assert (tmp_path / "one" / "split.json").read_bytes() == (
        tmp_path / "same" / "split.json"
    ).read_bytes()


def test_every_stratum_with_enough_groups_is_in_every_part():
    random = np.random.default_rng(0)
    for _ in range(100):
        groups = random.integers(0, random.integers(3, 60), 200)
        strata = groups % random.integers(1, 8)
        part = cut_groups(groups, strata, [0.8, 0.1, 0.1], 0)
        for stratum in set(strata):
            members = strata == stratum
            if len(set(groups[members])) >= 3:
                assert set(part[members]) == {0, 1, 2}
        table = pd.DataFrame({"group": groups, "part": part})
        assert (table.groupby("group")["part"].nunique() == 1).all()


def test_shares_are_kept_as_far_as_groups_allow():
    groups = np.arange(1000)
    part = cut_groups(groups, groups % 4, [0.8, 0.1, 0.1], 0)
    assert np.bincount(part).tolist() == [800, 100, 100]


def test_rows_are_connected_through_any_key_but_not_through_blanks():
    one, other = pd.Series(["a", "a", "b", "c", "d"]), pd.Series(["1", "2", "2", "", ""])
    groups = connected(one, other)
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[0], groups[3], groups[4]}) == 3


def test_a_cut_by_time_trains_on_the_earliest_rows(tmp_path):
    rows = [(f"text {i}", "ab"[i % 2], f"2020-01-{i % 28 + 1:02d}") for i in range(100)]
    path = write(tmp_path / "a.csv", rows, ("text", "label", "day"))
    assert split.main([path, "--time_column", "day", "--output_dir", str(tmp_path / "out")]) == 0
    train, val, test = read(tmp_path / "out").values()
    assert train["day"].max() <= val["day"].min() and val["day"].max() <= test["day"].min()


def test_quirks_are_read_and_rare_labels_follow_the_stated_rule(tmp_path, capsys):
    rows = [(f"title {i}", f"body é {i}", f"label {i % 5}") for i in range(200)]
    rows += [(f"more {i}", "", f"rare {i}") for i in range(10)]
    header = ("title", "body", "kind")
    path = write(tmp_path / "a.csv", rows, header, delimiter=";", encoding="cp1252")
    flags = [path, "--csv_encoding", "cp1252", "--text_column_names", "title,body"]
    flags += ["--label_column_name", "kind", "--output_dir"]
    assert split.main([*flags, str(tmp_path / "dropped")]) == 0
    printed = capsys.readouterr().out
    assert "dropped 10 rows of labels with fewer than 3 distinct texts: rare 0, rare 1" in printed
    record = json.loads((tmp_path / "dropped" / "split.json").read_text())
    assert record["columns"]["text_column_names"] == ["title", "body"]
    assert set(read(tmp_path / "dropped")["train"].columns) == set(header)
    assert split.main([*flags, str(tmp_path / "merged"), "--merge_rare", "other"]) == 0
    merged = pd.concat(read(tmp_path / "merged").values())
    assert (merged["kind"] == "other").sum() == 10 and len(merged) == 210


def test_a_label_that_dominates_and_texts_with_two_labels_are_reported(tmp_path, capsys):
    rows = [(f"text {i}", "no" if i % 20 else "yes") for i in range(200)] + [("text 1", "yes")]
    path = write(tmp_path / "a.csv", rows)
    assert split.main([path, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "label no has 9" in printed and "training rows of label yes" in printed
    assert "kept 1 texts with more than one label" in printed


def test_several_labels_per_row_are_split_by_the_most_frequent(tmp_path):
    rows = [(f"text {i}", "a|b" if i % 3 else "c") for i in range(90)]
    path = write(tmp_path / "a.csv", rows)
    flags = ["--problem_type", "multi_label_classification", "--output_dir", str(tmp_path / "out")]
    assert split.main([path, *flags]) == 0
    for table in read(tmp_path / "out").values():
        assert set(table["label"]) == {"a|b", "c"}


def test_cells_with_several_labels_stay_as_they_are_and_may_be_blank(tmp_path, capsys):
    """Equal labels in other spellings are the same to the split, in which each occurs."""
    cells = ["1.0|2", "2.0||1", "", "['3', '1']"]
    path = write(tmp_path / "a.csv", [(f"text {i}", cells[i % 4]) for i in range(80)])
    flags = ["--problem_type", "multi_label_classification", "--output_dir", str(tmp_path / "out")]
    assert split.main([path, *flags]) == 0
    assert "--problem_type multi_label_classification --output_dir" in capsys.readouterr().out
    table = pd.concat(read(tmp_path / "out").values())
    assert table["label"].value_counts().to_dict() == dict.fromkeys(cells, 20)
    record = json.loads((tmp_path / "out" / "split.json").read_text())
    counts = [part["labels"] for part in record["splits"].values()]
    assert {name: sum(part[name] for part in counts) for name in counts[0]} == {
        "1.0": 60,
        "2": 40,
        "3": 20,
    }


@pytest.mark.parametrize("size", [3, 4, 6, 7])
def test_many_small_labels_fill_all_folds_alike(tmp_path, size):
    groups = np.arange(40 * size)
    fold = cut_groups(groups, groups // size, [0.2] * 5, 0)
    assert np.ptp(np.bincount(fold, minlength=5)) <= size
    assert pd.Series(fold).groupby(groups // size).nunique().min() == min(size, 5)


def test_folds_of_an_earlier_call_do_not_join_a_study(tmp_path, capsys):
    path = write(tmp_path / "a.csv", [row[:2] for row in MANY])
    flags = [path, "--output_dir", str(tmp_path / "out"), "--folds"]
    assert split.main([*flags, "4"]) == 0 == split.main([*flags, "4"])
    assert split.main([*flags, "3"]) == 2
    assert "has other folds (3): remove them, or" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--folds", "3"]])
def test_the_split_of_another_file_or_content_is_kept(tmp_path, monkeypatch, capsys, flags):
    """split.sh and runs take a folder of its own for the new one, unless a folder is named."""
    monkeypatch.chdir(tmp_path)
    for team in ("acme", "globex"):
        Path(team).mkdir()
        write(Path(team) / "data.csv", [(f"{team} {i}", "ab"[i % 2]) for i in range(40)])
    assert split.main(["acme/data.csv", *flags]) == 0 == split.main(["acme/data.csv", *flags])
    assert "kept" not in capsys.readouterr().out
    before = {path: path.read_bytes() for path in Path("csv/split/data").rglob("*.*")}
    assert split.main(["globex/data.csv", *flags, "--output_dir", "csv/split/data"]) == 2
    said = capsys.readouterr().err
    assert "has the split of another file or content: remove it, or choose another" in said
    folder = f"csv/split/data-{sha256('globex/data.csv')[:8]}"
    assert split.main(["globex/data.csv", *flags]) == 0
    said = capsys.readouterr().out
    assert "csv/split/data has the split of another file or content: it is kept" in said
    assert f"--output_dir checkpoints/{Path(folder).name}" in said and Path(folder).is_dir()
    assert before == {path: path.read_bytes() for path in Path("csv/split/data").rglob("*.*")}


def test_a_run_gets_the_flags_of_the_files_that_its_tasks_need(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a file.csv", [row[:2] for row in MANY])
    command = ["--within_run", "--prefix", "--train_file", path, "--val_share=x"]
    files = {
        name: f"--{name}_file 'csv/split/a file/{file}_simple.csv'"
        for name, file in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    for flags, names in (
        ([], files),
        (["--do_eval", "False"], ("train", "test")),
        (["--do_eval=no", "--do_predict=0"], ("train",)),
    ):
        assert split.main([*command, *flags]) == 0
        assert capsys.readouterr().out == " ".join(files[name] for name in names) + "\n"


MANY = [(f"text {i}", "ab"[i % 2], "one group", "not a time") for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (MANY, ["--label_column_name", "kind"], "no column 'kind'; it has 'text', 'label', "),
        (MANY, ["--group_by", "nobody"], "no column 'nobody'"),
        (
            [("a b", "x", "", ""), ("c", "x", "", ""), ("d", "x", "", "")],
            [],
            "fewer than two labels",
        ),
        (
            [(f"t {i}", f"label {i}", "", "") for i in range(5)],
            [],
            "fewer than two labels are left",
        ),
        (MANY, ["--group_by", "group"], "texts that must stay together form 1 group"),
        ([("a", "x", "", ""), ("b", "y", "", "")], ["--min_label_count", "1"], "form 2 groups"),
        (MANY, ["--time_column", "time"], "'time' is not a time in 40 rows (1, 2, 3, 4, 5, ...)"),
        (MANY, ["--time_column", "time", "--time_format", "%Q"], "'Q' is a bad directive"),
        (
            [(f"t {i}", "ab"[i % 2], "", "soon" if i == 5 else f"{i}.5") for i in range(40)],
            ["--time_column", "time"],
            "'time' is not a time in row 6, such as 'soon'",
        ),
        (
            [(f"t {i}", "ab"[i % 2], "", "inf" if i == 5 else str(i)) for i in range(40)],
            ["--time_column", "time"],
            "is not a time in row 6, such as 'inf'",
        ),
        (MANY, ["--val_share", "0.6", "--test_share", "0.5"], "leave no training rows"),
        (MANY, ["--folds", "1"], "--folds: 1 is out of range"),
        (MANY, ["--csv_encoding", "1525"], "--csv_encoding: Python cannot read files in '1525'"),
        (MANY, ["--label_column_name", "text"], "'text' is the label column"),
        ([("", "x", "", "")], [], "no row has both a text and a label"),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(tmp_path, capsys, rows, flags, message):
    path = write(tmp_path / "a.csv", rows, ("text", "label", "group", "time"))
    try:
        status = split.main([path, "--output_dir", str(tmp_path / "out"), *flags])
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert status == 2 and message in said.err
    assert said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "out").exists()


def test_a_users_own_files_are_kept(tmp_path, capsys):
    path = write(tmp_path / "a.csv", MANY, ("text", "label", "group", "time"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_simple.csv").write_text("mine")
    assert split.main([path, "--output_dir", str(tmp_path / "out")]) == 2
    assert "was not written by split.sh" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train_simple.csv"]


def test_a_run_script_splits_a_training_file_of_its_own(clone):
    """The run itself is refused, for want of its model; the files are there."""
    write(clone / "mine.csv", [(f"text {i}", "ab"[i % 2]) for i in range(60)], ("title", "label"))
    flags = ["--train_file", "mine.csv", "--text_column_names=title", "--seed", "7"]
    done = bash(clone, "run_og.sh", *flags, "--model_name_or_path", "./nothing")
    assert done.returncode == 2 and "folder ./nothing does not exist" in done.stderr
    assert "split mine.csv into csv/split/mine, equal texts together (seed 7)" in done.stderr
    record = json.loads((clone / "csv" / "split" / "mine" / "split.json").read_text())
    assert record["parameters"]["seed"] == 7
    assert record["columns"]["text_column_names"] == ["title"]
