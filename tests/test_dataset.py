"""Data: reading and refusing files, numbering labels, auditing leaks, batching."""

import csv
import re
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import dataset
from conftest import REAL_DATA, write_csv
from dataset import read_split
from runtime import batches, csv_reader
from runtime.file_format import FileFormat
from runtime.files import UserError


def read(path, needs_labels=True, **options):
    return read_split(path, FileFormat(**options), needs_labels)


# Texts that pandas would turn into missing values, or that trip up other readers.
ODD_TEXTS = ["NA", "null", "None", "nan", 'a "quoted" word', "two\nlines", "tab\there", "a,b"]
ODD_TEXTS += ["עברית 🎉 é", "x" * 10_000_000, " blanks "]


def test_odd_texts_are_read_unchanged(tmp_path):
    path = write_csv(tmp_path / "odd ü.csv", [(text, i % 2) for i, text in enumerate(ODD_TEXTS)])
    assert read(path).texts == ODD_TEXTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"text,label\n", "a header but no rows"),
        (b"title,label\nx,1\n", "has no column 'text': try --text_column_names title"),
        (f"{'x' * 99},label\n".encode() + b"x y,1\nz w,2\nu v,3\n", "it has 'xxxxx"),
        (b'"a,b",label\nx y,1\n', "it has 'a,b', 'label': name another with"),
        (b'"a\nb",label\nx y,1\n', "has no column 'text'; it has 'a\\nb', 'label'"),
        (b"text,text,label\nx,y,1\n", "the column 'text' more than once"),
        (b"text,label\nx,1\ny\n", "row 2 (line 3) has 1 field, not 2"),
        (b'text,label\n"x\ny",1\nz,1,2\n', "row 2 (line 4) has 3 fields, not 2"),
        (b"text,label\nx,1\n \t,1\n,0\n", "the text is blank in 2 rows (2, 3)"),
        (b"text,label\nx,1\n\n\ny\n", "row 2 (line 5) has 1 field"),
        (b"text\na\n\nb\n", "the text is blank in row 2"),
        (b"text,label\nx\0y,1\n", "row 1 (line 2) contains a NUL byte"),
        (b'text,label\nx,1\n"y,1\nz,1\n', "row 2 (lines 3 to 4) opens a quote that never closes"),
        (b'text,label\n"x"y,1\n', "row 1 (line 2) has a quote in a quoted field"),
        (b"text,label\nx,1\ny,\n", "no 'label' in row 2; fill it in"),
        ("text,label\nabcdé,1\n".encode("cp1252"), "not utf-8: pass --csv_encoding cp1252"),
        ("text,label\nx,1\n".encode("utf-16-le"), "pass --csv_encoding utf-16-le"),
    ],
)
def test_bad_files_are_refused_with_their_location(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path, needs_labels=content != b"text\na\n\nb\n")
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_broken_byte_is_found_without_the_file_in_memory(tmp_path, mark):
    path = tmp_path / "late.csv"
    start = mark + b"text,label\n" + f"{'wörd' * 400},1\n".encode() * 6_000
    path.write_bytes(start + b"caf\xe9,1\n")
    tracemalloc.start()
    with pytest.raises(UserError, match=r"row 6001 \(line 6002\) has a byte that is not UTF-8: "):
        for _ in csv_reader.Table(path, FileFormat()):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(start) / 2


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"\xef\xbb\xbftext,label,extra\r\nx,1,e\r\ny,0,f\r\n", "utf-8"),
        ("text,label,extra\nx,1,e\ny,0,f\n".encode("utf-16"), "utf-16"),
        (b"extra,label,text\n\ne,1.0,x\n\nf, 0,y", "utf-8"),
    ],
)
def test_bom_line_endings_encodings_and_extra_columns_are_read(tmp_path, content, encoding):
    path = tmp_path / "good.csv"
    path.write_bytes(content)
    split = read(path, encodings=(encoding,))
    assert split.texts == ["x", "y"]
    assert split.number_labels(["0", "1"]).label_ids.tolist() == [1, 0]
    assert split.table["extra"].tolist() == ["e", "f"]


def test_text_columns_are_joined(tmp_path):
    path = write_csv(tmp_path / "two.csv", [("a", "b", 1), ("", "c", 0)], ("t", "u", "label"))
    split = read(path, text_column_names=("t", "u"), text_column_delimiter=" / ")
    assert split.texts == ["a / b", " / c"]


def test_blank_texts_are_dropped_if_allowed_and_rows_keep_their_numbers(tmp_path, caplog):
    path = write_csv(tmp_path / "blank.csv", [("a", 1), ("", 0), ("b", 0)])
    split = read(path, drop_empty=True)
    assert (split.texts, split.rows) == (["a", "b"], [1, 3])
    assert "dropped 1 rows without a text" in caplog.text


def test_malformed_rows_are_counted_and_dropped_if_allowed(tmp_path, caplog):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\nb\nc,y\nd,1,2\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert ": 2 rows (2, 4) are malformed; row 2 (line 3) has 1 field" in str(error.value)
    assert str(error.value).endswith("or leave such rows out with --drop_malformed")
    split = read(path, drop_malformed=True)
    assert (split.texts, split.rows, split.malformed) == (["a", "c"], [1, 3], 2)
    assert "dropped 2 malformed rows; the first: row 2 (line 3) has 1 field" in caplog.text


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "quote fields that contain a comma, a quote or a line break"),
        ({"column_names": ("text", "label"), "delimiter": "tab"}, "pass --delimiter comma, with"),
    ],
)
def test_a_file_of_malformed_rows_alone_is_refused(tmp_path, options, advice):
    path = tmp_path / "a.csv"
    path.write_text("b,x\nd,y\n" if options else "text,label\nb\nd\n")
    for read_whole in (True,) if options else (True, False):  # to predict, a text is enough
        with pytest.raises(UserError, match="all 2 rows are malformed; .*" + advice) as error:
            if read_whole:
                read(path, drop_malformed=True, **options)
            else:
                open_test_file(path, [], drop_malformed=True, **options)
        assert "--drop_malformed" not in str(error.value)


def test_labels_are_equal_regardless_of_spelling_and_sort_as_numbers(tmp_path):
    rows = [("a", "10"), ("b", "9"), ("c", "9.0"), ("d", " 10 "), ("e", "other"), ("f", "-1")]
    split = read(write_csv(tmp_path / "a.csv", rows))
    names = dataset.label_names(split)
    assert names == ["-1", "9", "10", "other"]
    assert split.number_labels(names).label_ids.tolist() == [2, 1, 1, 2, 3, 0]


def test_labels_missing_from_training_are_named_with_their_rows(tmp_path):
    train = read(write_csv(tmp_path / "a.csv", [("a", "x"), ("b", "y")]))
    test = read(write_csv(tmp_path / "b.csv", [("a", "x"), ("b", "z"), ("c", "w"), ("d", "z")]))
    with pytest.raises(UserError, match=r"label 'w', 'z' in 3 rows \(2, 3, 4\)"):
        test.number_labels(dataset.label_names(train))


def test_a_single_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="has only one label"):
        dataset.label_names(read(write_csv(tmp_path / "a.csv", [("a", 1), ("b", 1)])))


def test_several_labels_per_row_are_split_and_numbered(tmp_path):
    path = write_csv(tmp_path / "m.csv", [("a", "x|y"), ("b", ""), ("c", " y |y"), ("d", "2.0|x")])
    split = read(path, multi_label=True)
    assert split.labels == [["x", "y"], [], ["y"], ["2.0", "x"]]
    names = dataset.label_names(split)
    one_hot = split.number_labels(names).label_ids
    assert names == ["2.0", "x", "y"]
    assert one_hot.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0]]
    assert one_hot.dtype == np.float32


@pytest.mark.parametrize("content", ["text\na\n", "text,label\na,\nb,\n"])
def test_a_file_to_predict_needs_no_labels(tmp_path, content):
    path = tmp_path / "new.csv"
    path.write_text(content)
    assert read(path, needs_labels=False).labels is None


def test_the_leak_is_found_regardless_of_case_and_white_space(tmp_path, caplog):
    train = read(write_csv(tmp_path / "a.csv", [("A  cat", 0), ("dog", 1), ("DOG", 0), ("x", 2)]))
    test = read(write_csv(tmp_path / "b.csv", [("a cat", 0), ("bird", 1), ("Dog ", 1)]))
    caplog.set_level("INFO")
    training_keys = audit(train)
    assert dataset.seen_texts(training_keys, test.keys).tolist() == [True, False, True]
    assert "4 rows, 3 distinct texts" in caplog.text
    known = {"training file": training_keys, "validation file alone": frozenset(["bird"])}
    open_test_file(tmp_path / "b.csv", ["0", "1", "2"], known)
    assert "3 rows, 66.7 % of them with a text from the training file, 33.3 %" in caplog.text
    assert "33.3 % of them with a text from the validation file alone" in caplog.text
    assert "1 texts occur with more than one label" in caplog.text
    assert "only one row of label 1, 2" in caplog.text
    assert "multi_label" not in caplog.text
    audit(read(write_csv(tmp_path / "c.csv", [("a", "x|y"), ("b", "x")])))
    assert "'x|y' is one label; if it is several, pass --problem_type" in caplog.text


def audit(train):
    names = dataset.label_names(train)
    return dataset.audit(train.number_labels(names), names, FileFormat())


def open_test_file(path, names, known=None, **changed):
    return dataset.open_test_file(path, FileFormat(**changed), names, known)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_test_file_yields_the_rows_of_the_whole_file(tmp_path, monkeypatch, size):
    rows = [(f"text {i % 5}" if i % 4 else "", str(i % 3), str(i)) for i in range(20)]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "label", "id"))
    monkeypatch.setattr(dataset, "CHUNK_ROWS", size)
    test = open_test_file(path, ["0", "1", "2"], drop_empty=True)
    whole = read(path, drop_empty=True)
    chunks = list(test)
    assert len(test) == len(whole) == 15
    assert max(len(chunk) for chunk in chunks) <= size
    for name in ("texts", "labels", "rows"):
        assert [x for chunk in chunks for x in getattr(chunk, name)] == getattr(whole, name)
    assert [i for chunk in chunks for i in chunk.table["id"]] == whole.table["id"].tolist()
    assert dataset.described(test) == dataset.described(whole)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "0"), ("b", "0"), ("c", ""), ("d", "")], "no 'label' from row 3 on"),
        ([("a", "0"), ("b", "0"), ("c", "0"), ("d", "9")], "label '9' in row 4"),
        ([("a", ""), ("b", ""), ("c", ""), (" ", "")], "the text is blank in row 4"),
    ],
)
def test_a_test_file_is_checked_to_its_end_before_use(tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(dataset, "CHUNK_ROWS", 2)
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(UserError, match=message):
        open_test_file(path, ["0", "1"])


# ---------------------------------------------------------------------------------- fuzzing

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
FIELDS = st.one_of(
    TEXT, st.sampled_from(["NA", "null", "", " ", '"', ",", "\r", "\n", "\r\n", "\ufeff"])
)
# A bare carriage return in the header looks like a line ending of an old Macintosh.
NAMES = TEXT.filter(lambda name: name.removeprefix("\ufeff").strip() and "\r" not in name)
COLUMNS = st.lists(NAMES, min_size=1, max_size=3, unique=True)


@st.composite
def tables(draw):
    """Draw a header and rows of arbitrary text."""
    header = draw(COLUMNS)
    row = st.lists(FIELDS, min_size=len(header), max_size=len(header))
    rows = draw(st.lists(row, min_size=1, max_size=5))
    return header, rows


@settings(deadline=None, max_examples=300)
@given(tables(), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_files_of_the_csv_module_are_read_back_row_for_row(table, ending, quote_all):
    header, rows = table
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator=ending, quoting=quoting).writerows([header, *rows])
        comes_back_or_is_refused(path, header, rows)


@settings(deadline=None, max_examples=300)
@given(tables(), st.sampled_from(["\n", "\r\n"]))
def test_files_of_pandas_are_read_back_row_for_row(table, ending):
    header, rows = table
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        pd.DataFrame(rows, columns=header).to_csv(path, index=False, lineterminator=ending)
        comes_back_or_is_refused(path, header, rows)


def comes_back_or_is_refused(path, header, rows):
    """Check that no row is lost or changed, or that the error names a row, line or column."""
    try:
        table = csv_reader.Table(path, FileFormat(delimiter="comma"))
        found, back = table.header, [row for _, row in table]
    except UserError as error:
        assert re.search(r"row \d+|line \d+|more than once", str(error))
        return
    plain = [name.strip() for name in header]
    assert found == plain or found == [header[0].removeprefix("\ufeff").strip(), *plain[1:]]
    if back != rows:  # unless carriage returns without quotes look like ends of lines
        assert all(row[-1].endswith("\r") for row in rows)
        assert back == [[*row[:-1], row[-1].removesuffix("\r")] for row in rows]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_with_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        path.write_bytes(content)
        try:
            table = csv_reader.Table(path, FileFormat())
            header, rows = table.header, [row for _, row in table]
        except UserError as error:
            assert "\n" not in str(error).replace(repr(content), "")
        else:
            assert all(len(row) == len(header) for row in rows)


def test_a_sample_depends_on_the_seed_and_keeps_the_order(tmp_path):
    split = read(write_csv(tmp_path / "a.csv", [(f"t{i}", i % 2) for i in range(50)]))
    some = split.sample(10, seed=1)
    assert len(some) == 10
    assert some.rows == sorted(some.rows) == split.sample(10, seed=1).rows
    assert some.rows != split.sample(10, seed=2).rows
    assert some.texts == [f"t{row - 1}" for row in some.rows] == some.table["text"].tolist()
    assert split.sample(99, seed=1) is split


@pytest.mark.upgrade
def test_each_distinct_text_is_encoded_once_and_truncation_is_counted(tmp_path, backbone, caplog):
    path = write_csv(tmp_path / "a.csv", [("cat", 0), ("dog the cat", 1), ("cat", 0)])
    data = batches.encode(AutoTokenizer.from_pretrained(backbone), read(path), 4)
    assert data.text_index.tolist() == [0, 1, 0]
    assert (data.lengths.tolist(), data.row_lengths.tolist()) == ([3, 4], [3, 4, 3])
    assert "1 of 3 texts (rows 1 to 3) are longer than 4 tokens" in caplog.text
    batch = data.collate(np.array([0, 1]))
    assert batch["input_ids"][0, 3] == data.pad_token_id
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_training_batches_contain_each_row_once_and_depend_on_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(3, 40, 1003)

    def flat(seed, epoch):
        return np.concatenate(batches.training_batches(lengths, 8, seed, epoch)).tolist()

    assert sorted(flat(1, 0)) == list(range(1003))
    assert flat(1, 0) == flat(1, 0)
    assert flat(1, 0) != flat(1, 1) != flat(2, 1)
    sizes = [len(batch) for batch in batches.training_batches(lengths, 8, 1, 0)]
    assert sorted(sizes) == [3] + [8] * 125


def test_batches_of_similar_length_have_little_padding():
    lengths = np.random.default_rng(0).integers(3, 40, 5000)
    assert batches.padding_share(lengths, batches.training_batches(lengths, 32, 1, 0)) < 0.05
    random = np.random.default_rng(2).integers(0, 4, 5000)
    ids = [[0] * length for length in lengths]
    data = batches.Encoded(ids, np.arange(5000), None, [], pad_token_id=0, prefix_index=random)
    found = batches.length_batches(data, 64)
    assert sorted(np.concatenate(found)) == list(range(5000))
    assert batches.padding_share(lengths, found) < 0.05
    assert np.mean([len(set(random[batch])) for batch in found]) < 3  # of four prefixes
    shuffled = np.array_split(np.random.default_rng(1).permutation(5000), 157)
    assert batches.padding_share(lengths, shuffled) > 0.3


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real data is not on this machine")
def test_the_published_split_leaks_as_measured():
    train, validation, test = (
        read(REAL_DATA / "seed_splits" / f"{name}_simple.csv") for name in ("train", "val", "test")
    )
    assert (len(train), len(test)) == (15204, 6543)
    data = dataset.Data([], train, validation, None, frozenset(train.keys))
    in_training = dataset.seen_texts(data.training_keys, test.keys)
    assert round(100 * in_training.mean(), 1) == 83.5
    assert round(100 * data.seen("test", test.keys).mean(), 1) == 86.9
    assert round(100 * data.seen("eval", validation.keys).mean(), 1) == 84.5
