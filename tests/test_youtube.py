"""From the raw file to split files: the functions that the notebook calls, and the sample."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from conftest import REAL_DATA, ROOT, write_csv
from dataset import text_key
from make_sample import make_sample
from runtime.files import UserError
from script import groups, youtube

SAMPLE = str(ROOT / youtube.SAMPLE_FILE)
COLUMNS = ("video_id", "trending_date", "title", "category_id")
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.exists(), reason="the real data is not on this machine"
)


def raw_table(path: str = SAMPLE, encoding: str = "utf-8") -> pd.DataFrame:
    raw = youtube.read_raw(path, encoding, ["title"])
    table = raw.assign(text=youtube.make_texts(raw, ["title"], "original"))
    table, _ = youtube.drop_empty(table, ["title"])
    names = youtube.category_names(path, table["category_id"])
    return table.assign(label=youtube.make_labels(table["category_id"], 0.7, names)[0])


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("The Trump Presidency: Last Week Tonight (HBO)", "trump presidency last week tonight hbo"),
        ("WE WANT TO TALK ABOUT OUR MARRIAGE", "want talk marriage"),
        ("Top 10 Raw_moments, 2ND time in 2017!", "top raw moments 2nd time"),
        ("Don't don’t  BEYONCÉ 🎉", "don t beyoncé"),
        ("42 - 2018 ...", ""),
    ],
)
def test_texts_are_cleaned_as_in_the_original(title, text):
    assert youtube.clean(title) == text


def test_columns_are_joined_and_white_space_is_collapsed():
    columns = {"title": ["A  title", "B"], "tags": ['x y"|"z', "[none]"]}
    raw = pd.DataFrame(columns | {"description": [r"one\ntwo", ""]})
    texts = youtube.make_texts(raw, ["title", "tags", "description"], "none")
    assert texts.tolist() == ["A title | x y, z | one two", "B"]


def test_labels_are_numbered_by_descending_count_or_named():
    ids = pd.Series([5] * 9 + [3] * 6 + [8] * 2 + [9])
    titles = {5: "five", 3: "three", 8: "eight", 9: "nine"}
    labels, names = youtube.make_labels(ids, 0.4, titles)
    assert names == {"0": "five", "1": "three", "2": "other"}
    assert labels.tolist() == ["0"] * 9 + ["1"] * 6 + ["2"] * 3
    labels, names = youtube.make_labels(pd.Series([8, 5, 3] * 2 + [9]), 0.7, titles)
    assert names == {"0": "three", "1": "five", "2": "eight", "3": "other"}  # none is above
    assert labels.tolist() == ["2", "1", "0"] * 2 + ["3"]
    assert "other" not in youtube.make_labels(pd.Series([3, 5]), 0.7, titles)[1].values()
    with pytest.raises(UserError, match="all rows have one category, five"):
        youtube.make_labels(pd.Series([5, 5]), 0.7, titles)
    labels, names = youtube.make_labels(ids, None, titles)
    assert set(labels) == set(names) == set(titles.values())


def test_the_original_protocol_balances_stratifies_and_leaks():
    table = raw_table()
    parts = youtube.original_splits(table, 42, 0.8, 0.8, balance=True)
    counts = parts["train"]["label"].value_counts()
    assert counts.nunique() == 1
    for label, share in parts["val"]["label"].value_counts(normalize=True).items():
        assert share == pytest.approx((parts["test"]["label"] == label).mean(), abs=0.02)
    whole = youtube.original_splits(table, 42, 0.8, 0.8, balance=False)
    assert sum(map(len, whole.values())) == len(table)
    known = set(parts["train"]["text"])
    assert parts["test"]["text"].isin(known).mean() > 0.5  # it leaks


def test_the_original_protocol_reproduces_the_published_file_sizes():
    counts = (9964, 6472, 4143, 3444, 3210, 13662)  # rows of each label in the full file
    table = pd.DataFrame({"label": np.repeat(list("012345"), counts)})
    parts = youtube.original_splits(table, 42, 0.8, 0.8, balance=True)
    assert (len(parts["val"]), len(parts["test"])) == (1636, 6543)


@needs_real_data
def test_the_second_split_reproduces_the_published_labels_in_order(monkeypatch):
    """The stratified draw orders labels by their counts alone, so it can be repeated exactly."""
    files = [REAL_DATA / "seed_splits" / f"{name}_simple.csv" for name in ("test", "val")]
    test, val = (pd.read_csv(path, dtype=str)["label"] for path in files)
    rest = pd.DataFrame({"label": sorted([*test, *val])})
    draw = youtube.train_test_split
    first = iter([(rest, rest)])  # replaces the draw of the training rows
    monkeypatch.setattr(
        youtube, "train_test_split", lambda *data, **how: next(first, None) or draw(*data, **how)
    )
    parts = youtube.original_splits(rest, 42, 0.8, 0.8, balance=False)
    assert parts["test"]["label"].tolist() == test.tolist()
    assert parts["val"]["label"].tolist() == val.tolist()


@pytest.mark.parametrize("group_by", youtube.GROUPINGS)
def test_the_splits_of_the_unseen_protocol_share_nothing(group_by):
    table = raw_table()
    again = table.drop_duplicates("video_id").head(60)  # the same titles, uploaded once more
    again = again.assign(video_id="again " + again["video_id"], channel_title="another")
    table = pd.concat([table, again.assign(day=table["day"].max())], ignore_index=True)
    parts = youtube.unseen_splits(table, 42, 0.8, 0.8, group_by)
    columns = ["video_id", "text", *(["channel_title"] if group_by == "channel" else [])]
    for column in columns:
        values = [set(part[column].map(text_key)) for part in parts.values()]
        assert sum(map(len, values)) == len(set.union(*values)), column
    everything = pd.concat(parts.values())
    assert everything["video_id"].is_unique
    assert len(everything) == table["video_id"].nunique()
    if group_by == "time":
        day = everything.groupby("text")["day"].transform("min")  # a text belongs to its first day
        part = {name: day[rows.index] for name, rows in parts.items()}
        assert part["train"].max() <= part["val"].min() <= part["val"].max() <= part["test"].min()
    if group_by == "video":
        assert len(parts["train"]) / len(everything) == pytest.approx(0.8, abs=0.02)


def test_rows_are_grouped_through_shared_texts_and_channels():
    a, b = pd.Series(["x", "x", "y", "z", "w"]), pd.Series([1, 2, 2, 3, 4])
    group = groups.connected(a, b)
    assert len(np.unique(group)) == 3
    assert group[0] == group[1] == group[2]


def test_ids_damaged_by_a_spreadsheet_do_not_merge_videos(tmp_path):
    rows = [("#NAME?", "17.14.11", f"title {i}", 1) for i in (1, 2, 1)]
    raw = youtube.read_raw(write_csv(tmp_path / "r.csv", rows, COLUMNS), "utf-8", ["title"])
    assert raw["video_id"].nunique() == 2


def test_other_versions_of_the_raw_file_are_read(tmp_path):
    """Names as labels, another date, no ids, a byte order mark."""
    rows = [("2017-11-15", "one", "Music"), ("2017-11-14", "two", "Comedy"), ("", "one", "Music")]
    path = write_csv(tmp_path / "r.csv", rows, ("date", "title", "category"))
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "r.csv").read_bytes())
    raw = youtube.read_raw(path, "utf-8", ["title"], label_column="category")
    assert raw["category_id"].tolist() == ["Music", "Comedy", "Music"]
    assert raw["video_id"].nunique() == 2 and raw["day"].tolist() == [1, 2, 3]
    names = youtube.category_names(path, raw["category_id"])
    assert youtube.make_labels(raw["category_id"], None, names)[0].tolist() == [
        "Music",
        "Comedy",
        "Music",
    ]
    columns = {"label_column": "category", "date_column": "date", "date_format": "%Y-%m-%d"}
    with pytest.raises(UserError, match=r"date is not a date in the format %Y-%m-%d in row 3: "):
        youtube.read_raw(path, "utf-8", ["title"], **columns)
    with pytest.raises(UserError, match=r"no column 'trending_date'; .*: set -p date_column"):
        youtube.read_raw(path, "utf-8", ["title"], label_column="category", group_by="time")


def test_columns_of_ones_own_are_checked_and_give_one_row_per_id(tmp_path):
    rows = [(i // 2, f"title {i}", "music" if i else "") for i in range(6)]
    path = write_csv(tmp_path / "r.csv", rows, ("number", "title", "genre"))
    columns = {"label_column": "title", "id_column": "number"}
    assert youtube.read_raw(path, "utf-8", ["title"], **columns)["video_id"].nunique() == 3
    for wrong, message in (
        ({"id_column": "nubmer"}, r"no column 'nubmer'; .*set -p id_column"),
        ({"date_column": "day"}, r"no column 'day'; .*set -p date_column"),
        ({"label_column": "genre"}, "genre is not given in row 1"),
        ({"group_by": "channel"}, r"no column 'channel_title'; .*set -p group_by"),
    ):
        with pytest.raises(UserError, match=message):
            youtube.read_raw(path, "utf-8", ["title"], **columns | wrong)
    rows = [("a", "17.14.11", "t", "Music"), ("b", "17.14.11", "u", "Comedy")]
    path = write_csv(tmp_path / "names.csv", rows, COLUMNS)
    raw = youtube.read_raw(path, "utf-8", ["title"])
    assert raw["category_id"].tolist() == ["Music", "Comedy"]
    with pytest.raises(UserError, match="parameter date_format is '%Q'"):
        youtube.read_raw(path, "utf-8", ["title"], date_format="%Q")


def test_dates_of_another_form_matter_only_if_they_are_needed(tmp_path, capsys):
    rows = [("a", "15/11/2017", "t", 1), ("b", "14/11/2017", "u", 2)]
    path = write_csv(tmp_path / "r.csv", rows, COLUMNS)
    assert youtube.read_raw(path, "utf-8", ["title"])["day"].tolist() == [1, 2]
    assert "taken to be in order of time (-p date_format)" in capsys.readouterr().out
    advice = r"in 2 rows \(1, 2\): set -p date_format, such as %d/%m/%Y"
    with pytest.raises(UserError, match=advice):
        youtube.read_raw(path, "utf-8", ["title"], group_by="time")
    raw = youtube.read_raw(path, "utf-8", ["title"], group_by="time", date_format="%d/%m/%Y")
    assert raw["day"].is_monotonic_decreasing


def test_the_newer_version_of_the_data_set_is_recognised_by_its_columns(tmp_path):
    columns = ("video_id", "title", "channelTitle", "categoryId", "trending_date", "tags")
    days = ["2020-08-02T00:00:00Z", "2020-08-01T00:00:00Z"]
    rows = [(f"vid-{i:07}", f"t{i}", f"c{i}", i, day, "[None]") for i, day in enumerate(days)]
    path = write_csv(tmp_path / "r.csv", rows, columns)
    for group_by in youtube.GROUPINGS:
        raw = youtube.read_raw(path, "utf-8", ["title", "channel_title", "tags"], group_by=group_by)
        assert raw["category_id"].tolist() == [0, 1]
        assert raw["video_id"].tolist() == ["vid-0000000", "vid-0000001"]
        assert raw["day"].is_monotonic_decreasing
        texts = youtube.make_texts(raw, ["channel_title", "title", "tags"], "none")
        assert texts.tolist() == ["c0 | t0", "c1 | t1"]
    assert raw.attrs["found"] == {
        "label_column": "categoryId",
        "date_column": "trending_date",
        "date_format": "ISO8601",
        "id_column": "video_id",
    }
    raw = youtube.read_raw(path, "utf-8", ["title"], label_column="channelTitle")
    assert raw["category_id"].tolist() == ["c0", "c1"]  # a given parameter wins
    with pytest.raises(UserError, match=r"no column 'category_id'; .*: set -p label_column"):
        youtube.read_raw(path, "utf-8", ["title"], label_column="category_id")
    rows = [("1", "x"), ("Music", "y")]
    path = write_csv(tmp_path / "s.csv", rows, ("categoryId", "title"))
    with pytest.raises(UserError, match="categoryId is not a whole number in row 2"):
        youtube.read_raw(path, "utf-8", ["title"])


def test_a_useless_balanced_training_file_is_named(capsys):
    table = pd.DataFrame(
        {"text": [f"text {i}" for i in range(100)], "label": ["a"] * 92 + ["b"] * 8}
    )
    youtube.original_splits(table, 1, 0.8, 0.5, True)
    assert "training rows per label" in capsys.readouterr().out


def cleaned(titles: list[str], cleaning: str = "original"):
    table = pd.DataFrame({"title": titles}, range(1, len(titles) + 1), dtype=object)
    table["text"] = youtube.make_texts(table, ["title"], cleaning)
    return youtube.drop_empty(table, ["title"])


def test_the_terminal_says_which_texts_cleaning_drops_or_damages(capsys):
    table, counts = cleaned(["cats", " ", "the 42", ""])
    assert table["text"].tolist() == ["cats"]
    assert counts == {"rows_without_text": 2, "rows_cleaned_away": 1}
    out = capsys.readouterr().out
    assert "dropped 2 of 4 rows without a text: 2 rows (2, 4)\n" in out
    keep = ": -p cleaning none keeps them\n"
    assert "dropped 1 of 4 rows whose text is empty after cleaning" + keep in out
    cleaned(["cats"] * 200 + ["42", "École des cats"])
    said = "warning: dropped 1 of 202 rows whose text is empty after cleaning"
    assert capsys.readouterr().out == said + keep
    cleaned(["École à la maison: été 2018", "_über cats", "5я cats", "9x cats", "2018 café"])
    assert f"do not start with a letter from a to z in 60% of the remaining texts{keep}" in (
        capsys.readouterr().out
    )
    cleaned(["École à la maison", "뉴스 속보"], "none")
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="after cleaning: -p cleaning none keeps them"):
        cleaned(["뉴스 속보"])
    with pytest.raises(UserError, match="has a text: set -p text_columns"):
        cleaned([" "])


def test_too_few_rows_are_user_errors():
    few = raw_table().drop_duplicates("text").head(3)
    with pytest.raises(UserError, match="too few"):
        youtube.unseen_splits(few, 1, 0.8, 0.8, "video")
    with pytest.raises(UserError, match=r"too few rows \(3\) .* set -p train_share"):
        youtube.original_splits(few, 1, 0.8, 0.8, balance=True)


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        groups.write_splits({tmp_path / "file" / "unseen": ({"train": pd.DataFrame()}, {})})


def test_labels_missing_from_training_are_dropped_with_a_warning(capsys):
    labels = {"train": "ab", "val": "acc", "test": "b"}
    part = {name: pd.DataFrame({"label": list(some)}) for name, some in labels.items()}
    assert youtube.keep_training_labels(part)["val"]["label"].tolist() == ["a"]
    assert "val: dropped 2 rows with labels not in training: c" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"too few rows .* none is left for test"):
        youtube.keep_training_labels(part | {"test": pd.DataFrame({"label": ["c"]})})


GOOD = ("2kyS6SvSYSE", "17.14.11", "a title", "22")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"video_id,title\nx,y\n",
            "no column 'category_id'; it has 'video_id', 'title': set -p label_column",
        ),
        (b"video_id,trending_date,title,category_id\n", "a header but no rows"),
        (
            b"video_id,trending_date,title,category_id\na,17.14.11,t,22\nb,17.14.11,t,Music\n",
            "category_id is not a whole number in row 2",
        ),
        (
            b"video_id,trending_date,title,category_id\na,17.14.11,t,22\nb,,t,22\n",
            "trending_date is not a date in the format %y.%d.%m in row 2: correct or remove",
        ),
        (
            b'video_id,trending_date,category_id,title\na,17.14.11,2,"t, u"\nb,17.14.11,2,"cut of',
            "row 2 (line 3) opens a quote that never closes: correct it",
        ),
        (
            "video_id,trending_date,title,category_id\na,17.14.11,Beyoncé,1\n".encode("cp1252"),
            "is not utf-8: pass -p csv_encoding cp1252, which reads",
        ),
    ],
)
def test_malformed_raw_files_are_user_errors(tmp_path, content, message):
    path = tmp_path / "raw.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        youtube.read_raw(str(path), "utf-8", ["title"])
    assert message in str(error.value)


def test_tags_of_the_real_file_are_read_despite_invalid_csv(tmp_path):
    path = tmp_path / "raw.csv"
    header = "video_id,trending_date,category_id,title,tags\n"
    path.write_text(header + 'a,17.14.11,1,"t ""|"" u","x y"|"z"|"v, w"\n')
    raw = youtube.read_raw(str(path), "utf-8", ["title", "tags"])
    assert raw.loc[1, "title"] == 't "|" u'
    assert youtube.make_texts(raw, ["tags"], "none").tolist() == ["x y, z, v, w"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_columns", "title,views"),
        ("text_columns", "tags,tags"),
        ("cleaning", "some"),
        ("group_by", "day"),
        ("seed", -1),
        ("top_quantile", 2),
        ("balance", "perhaps"),
        ("train_share", 1.0),
        ("test_share", "half"),
        ("quoting", "all"),
        ("drop_malformed", "some"),
        ("csv_encoding", "1525"),
    ],
)
def test_invalid_parameters_are_user_errors(name, value):
    good = {"text_columns": "title,tags", "cleaning": "none", "group_by": "time", "seed": 1}
    good |= {"top_quantile": None, "balance": False, "train_share": 0.5, "test_share": 0.5}
    good |= {"quoting": "minimal", "drop_malformed": False}
    assert youtube.check_parameters(**good)["text_columns"] == ["title", "tags"]
    newer = youtube.check_parameters(**good | {"text_columns": "channelTitle, tags"})
    assert newer["text_columns"] == ["channel_title", "tags"]
    with pytest.raises(UserError, match=f"parameter {name}: "):
        youtube.check_parameters(**good | {name: value})


def test_category_names_come_from_the_file_of_the_country_if_it_exists(tmp_path):
    ids = pd.Series([10, 10, 99, 23, 34])
    raw, newer = str(tmp_path / "KRvideos.csv"), str(tmp_path / "KR_youtube_trending_data.csv")
    names = {10: "Music", 23: "Comedy (23)", 34: "Comedy (34)", 99: "category 99"}
    assert youtube.category_names(raw, ids) == names
    for country, title in (("US", "Songs"), ("KR", "음악")):
        content = json.dumps({"items": [{"id": "10", "snippet": {"title": title}}]})
        (tmp_path / f"{country}_category_id.json").write_text(content)
        for file in (raw, newer):
            assert youtube.category_names(file, ids)[10] == title
        assert youtube.category_names(str(tmp_path / "mine.csv"), ids)[10] == "Songs"
    (tmp_path / "KR_category_id.json").write_text("{}")
    with pytest.raises(UserError, match="is no valid category file"):
        youtube.category_names(raw, ids)


def test_the_sample_matches_its_generator_and_resembles_the_real_file():
    content = (ROOT / youtube.SAMPLE_FILE).read_bytes()
    assert make_sample().encode() == content
    assert len(content) < 1_000_000
    table = raw_table()
    assert table["category_id"].nunique() == 16
    assert len(table.columns) == 16 + 3  # day, text, label
    assert (table["description"] == "").any()
    assert table["description"].str.contains(r"\n", regex=False).any()
    assert (table["comments_disabled"] == "True").any()
    videos = table.drop_duplicates("video_id")
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10)
    )
    assert 0.6 < cross_val_score(model, videos["text"], videos["label"], cv=5).mean() < 0.8
