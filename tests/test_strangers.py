"""Files of strangers: what is refused says how to read it, and that works."""

import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest

import dataset
import trainer
from conftest import write_csv
from dataset import read_split
from runtime.file_format import FileFormat
from runtime.files import UserError
from runtime.labels import label_key
from script import split
from script.study import review

WORDS = ("free prize £9 now", "win cash, today", "see you at home", "ok lar… joking")
ROWS = [(f"{WORDS[i % 4]} {i}", "ham" if i % 4 > 1 else "spam") for i in range(40)]


def lines(form: str, *, head: str = "", end: str = "\n") -> str:
    """Write each of `ROWS` as `form` says, after a header."""
    rows = [
        form.format(text=text, plain=text.replace(",", ""), label=label) for text, label in ROWS
    ]
    return end.join([head, *rows] if head else rows) + end


PLAIN = lines('"{text}",{label}', head="text,label")
TABLE = pd.DataFrame(ROWS, columns=["text", "label"])
READ = {  # name: content, and the flags that the messages must lead to
    "spam.csv": (
        lines('{label},"{text}",,,', head="v1,v2,,,", end="\r\n").encode("cp1252"),
        "--text_column_names v2 --label_column_name v1 --csv_encoding cp1252",
    ),
    "no header": (lines('{label},"{text}"'), "--column_names label,text"),
    "tabs, no header, quotes": (
        lines("{label}\t{text}") + 'ham\t"so what\n',
        "--column_names label,text --quoting none",
    ),
    "index and capitals": (
        TABLE.rename(columns=str.title).to_csv(),
        "--text_column_names Text --label_column_name Label",
    ),
    "columns of 0 and 1": (
        "comment_text,toxic,rude\n" + "".join(f"a b {i},{i % 2},{i % 3 % 2}\n" for i in range(40)),
        "--text_column_names comment_text --label_column_name toxic,rude",
    ),
    "inner quote": (PLAIN + '"a "quoted" word, here",ham\n', "--drop_malformed"),
    "two ragged rows": (PLAIN + "one\na,b,c\n", "--drop_malformed"),
    "broken byte": (PLAIN.encode() + b"br\xffoken,ham\n", "--drop_malformed"),
    "code page": (PLAIN.encode("cp1252"), "--csv_encoding cp1252"),
    "cyrillic": (PLAIN.replace("see you at home", "увидимся дома вечером").replace("£", "")
                 .replace("…", "").encode("cp1251"), "--csv_encoding cp1251"),
    "utf-16 without mark": (PLAIN.encode("utf-16-le"), "--csv_encoding utf-16-le"),
    "semicolons": (lines("{text};{label}", head="text;label"), ""),
    "pipes": (lines("{text}|{label}", head="text|label"), ""),
    "sep=": ("sep=;\r\n" + lines('"{text}";{label}', head="text;label", end="\r\n"), ""),
    "unicode text": (lines("{text}\t{label}", head="text\tlabel", end="\r\n").encode("utf-16"), ""),
    "blanks before quotes": (lines('"{text}", "{label}"', head='"text", "label"'), ""),
    "blanks around names": (lines('"{text}",{label}', head=" text , label "), ""),
    "returns of a Mac": (lines('"{text}",{label}', head="text,label", end="\r"), ""),
    "header by hand": ("text,label\n" + lines('"{text}",{label}', end="\r\n"), ""),
    "nameless columns": (lines('"{text}",{label},,', head="text,label,,"), ""),
    "double columns": (lines('"{text}",{label},1,2', head="text,label,n,n"), ""),
    "json lines": (TABLE.to_json(orient="records", lines=True), ""),
    "json array": (TABLE.to_json(orient="records", indent=1), ""),
    "tags": (lines('"{text}",{label},"a"|"b"', head="text,label,tags"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_the_flags_of_each_message_read_the_file(tmp_path, capsys, name):
    """Each error names flags; with those of all errors the file is read, row for row."""
    content, expected = READ[name]
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags: list[str] = []
    while status := split.main([str(path), *flags, "--output_dir", str(tmp_path / "out")]):
        message = capsys.readouterr().err.strip()
        assert status == 2 and "\n" not in message and len(message) <= 300 + 2 * len(str(path))
        advised = re.findall(r"--[a-z_]+(?: [^ ;-][^ ;]*(?<!,))?", message.partition(": ")[2])
        words = [word for flag in advised for word in shlex.split(flag) if word != "with"]
        assert words and not {*words} <= {*flags}, message
        flags += words
    assert {*flags} == {*expected.split()}
    output = capsys.readouterr().out.splitlines()
    *warnings, read, labels = output[: [line[:8] for line in output].index("labels: ") + 1]
    assert all(line.startswith("warning: ") for line in warnings)
    assert re.match(rf"{path}: \d+ rows; text from .*; the first text: ", read)
    assert labels.startswith("labels: ") and all(len(line) < 301 for line in output[:-1])
    parts = [pd.read_csv(tmp_path / f"out/{part}_simple.csv") for part in ("train", "val", "test")]
    table = pd.concat(parts)
    table.columns = [{"v2": "text", "v1": "label", "Text": "text", "Label": "label"}.get(n, n)
                     for n in table.columns]  # fmt: skip
    if "text" in table and name != "cyrillic":
        extra = [('"so what', "ham")] * ("none" in expected)
        assert sorted(zip(table["text"], table["label"], strict=True)) == sorted(ROWS + extra)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label,label\na,1,2\n", "has the column 'label' more than once: rename one"),
        ("x" * 90 + ",y\na,1\n", "has no column 'text', 'label'"),
        (",".join(f"name{i}" for i in range(99)) + "\n", "'name9' and 89 more"),
        ('{"text": {"0": "a"}, "label": {"0": "x"}}', "orient='records' writes them"),
        (b"PAR1\x15\x04\x15\x10", "is a Parquet file that cannot be read"),
        ("text,label\na,1\n" + 'b"c,"d\ne\n', "row 2 (lines 3 to 4) opens a quote"),
        ("text,label\na,1\r\nb,2\n", r"remove carriage returns (tr -d '\r' < OLD.csv"),
        ('text,label\n1,"a",x\n2,"b",y\n', "all 2 rows are malformed"),
        ('text,label\n"a,1\nb,2\n"c,1\n', "has a quote in a quoted field"),
        (
            "# of 2024\ntext,label\na,1\n",
            "its first line '# of 2024' has other fields than the next",
        ),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_a_refusal_is_one_short_line(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_split(path, FileFormat())
    assert message in str(error.value) and len(str(error.value)) <= 300 + len(str(path))
    assert "\n" not in str(error.value)


def test_rows_that_a_quote_has_merged_are_named(tmp_path, caplog):
    """They are refused if each looks like a row, and named if they may be a long text."""
    rows = "".join(f"text {i},{i % 2}\n" for i in range(20))
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n{rows}"opens here,0\n{rows}closes here",1\n')
    with pytest.raises(UserError, match=r"row 21 \(lines 22 to 43\) has lines .* --quoting none"):
        read_split(path, FileFormat())
    inner = "and so on\n" * 20
    path.write_text(f'text,label\n{rows}"opens here\n{inner}closes here",1\n')
    assert len(read_split(path, FileFormat())) == 21
    assert "row 21 goes from line 22 to line 43: is a quote missing there?" in caplog.text


def test_dropped_rows_are_counted_and_recorded(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,label\na,1\nb\nc,0\nd,e,f\n")
    split_ = read_split(tmp_path / "a.csv", FileFormat(drop_malformed=True))
    assert (split_.texts, split_.rows) == (["a", "c"], [1, 3])
    assert dataset.described(split_)["malformed"] == 2
    assert "dropped 2 malformed rows; the first: row 2 (line 3) has 1 field" in caplog.text


def test_another_encoding_than_the_files_is_pointed_out(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,label\ncafé,1\nthé,0\n")
    read_split(tmp_path / "a.csv", FileFormat(encodings=("cp1252",)))
    assert "looks like UTF-8, but is read as cp1252" in caplog.text
    both = FileFormat.from_settings({"csv_encoding": "cp1252"})  # as a model remembers it
    assert read_split(tmp_path / "a.csv", both).texts == ["café", "thé"]
    (tmp_path / "a.csv").write_text("text,label\ncafé,1\nthé,0\n", encoding="cp1252")
    assert read_split(tmp_path / "a.csv", both).texts == ["café", "thé"]


@pytest.mark.parametrize("kind", ["lines", "array", "parquet"])
def test_values_of_json_and_parquet_become_text(tmp_path, kind):
    rows = [{"text": "a", "n": 1, "on": True, "label": ["x", "y"]}, {"text": "b", "label": ["x"]}]
    path = tmp_path / "a.csv"
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        pd.DataFrame(rows).astype({"n": "Int64"}).to_parquet(path)
    else:
        texts = map(json.dumps, rows)
        path.write_text("\n".join(texts) if kind == "lines" else f"[{', '.join(texts)}]")
    found = read_split(path, FileFormat(multi_label=True))
    assert found.texts == ["a", "b"] and found.labels == [["x", "y"], ["x"]]
    assert found.table["n"].tolist() == ["1", ""] and found.table["on"].tolist() == ["True", ""]
    assert len(found.sha256) == 64


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("a|b", ["a", "b"]), ("['a', 'b']", ["a", "b"]), ('["a", "b"]', ["a", "b"]),
        ("['a' 'b']", ["a", "b"]), ("[a, b]", ["a", "b"]), ("[1, 2.0]", ["1", "2.0"]),
        ("[]", []), ("", []), ("a||a", ["a"]), ('["it\'s", "b"]', ["it's", "b"]),
    ],
)  # fmt: skip
def test_several_labels_in_a_cell(tmp_path, cell, labels):
    path = write_csv(tmp_path / "a.csv", [("x", cell)])
    assert read_split(path, FileFormat(multi_label=True)).labels == [labels]


@pytest.mark.parametrize(
    ("labels", "remark"),
    [
        (["Spam", "spam"] * 2, "labels 'Spam' and 'spam' look alike but count as different"),
        (["a\u200b", "a"] * 2, r"labels 'a\u200b' and 'a' look alike"),
        (["['a', 'b']", "c"] * 2, "if it is several, pass --problem_type multi_label_class"),
        (["a, b", "b"] * 2, "multi_label_classification --label_separator ,"),
        (["News, Politics", "Sport"] * 2, None),
        (["1.0", "1", "2"] * 2, None),
    ],
)
def test_labels_that_are_probably_meant_otherwise_are_named(tmp_path, capsys, labels, remark):
    rows = [(f"t {i}", label) for i, label in enumerate(labels * 5)]
    path = write_csv(tmp_path / "a.csv", rows)
    assert split.main([str(path), "--output_dir", str(tmp_path / "out")]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if "warning: " + path in line]
    assert len(found) == (remark is not None) and all(remark in line for line in found)


def test_labels_come_back_as_they_are_written_and_equal_ones_are_one():
    assert label_key("1.0") == label_key(" 1") != label_key("1.10")
    assert label_key("cafe\u0301") == label_key("café") != label_key("cafe")


def test_a_model_of_a_file_without_a_header_reads_texts_alone(tmp_path):
    """With the delimiter of the training file, which no header tells."""
    form = FileFormat(column_names=("label", "text"), delimiter="tab", quoting="none")
    for content in ('Free, "prize"\nSee you\n"Hi\n', "a, b\n", "ham\ta, b\n"):
        (tmp_path / "a.csv").write_text(content)
        found = read_split(tmp_path / "a.csv", form, needs_labels=False)
        assert found.texts == [line.split("\t")[-1] for line in content.splitlines()]


def test_names_of_columns_are_for_files_without_a_header(tmp_path):
    form = FileFormat(column_names=("label", "text"))
    for content in ("a,some words\n", "text,label\nsome words,a\n", "id;text\n1;some words\n"):
        (tmp_path / "a.csv").write_text(content)
        assert read_split(tmp_path / "a.csv", form, needs_labels=False).texts == ["some words"]


def test_no_remark_is_longer_than_a_few_lines(tmp_path, capsys, caplog):
    """Not even of 300 labels with long names, in split.sh and in a run."""
    rows = [(f"text {i}", f"{'long ' * 20}{i // 2}") for i in range(600)] + [("x", "Y"), ("z", "y")]
    rows += [(f"more {i}", "ab"[i % 2]) for i in range(40)]
    path = write_csv(tmp_path / "a.csv", rows)
    assert split.main([path, "--output_dir", str(tmp_path / "out")]) == 0
    train = read_split(path, FileFormat())
    names = dataset.label_names(train)
    dataset.audit(train.number_labels(names), names, FileFormat())
    with pytest.raises(UserError) as error:
        read_split(path, FileFormat()).number_labels(["a"])
    said = [*capsys.readouterr().out.splitlines()[:-1], *caplog.messages, str(error.value)]
    assert len(said) > 6 and max(len(line.replace(str(tmp_path), "")) for line in said) <= 300


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        ("text,label,label\na,x,y\n", {}, "has the column 'label' more than once"),
        ("text\ngood movie,pos\nbad one,neg\n", {}, "pass --delimiter tab, with which every row"),
        ("text,la\0bel\na,1\n", {}, "the header contains a NUL byte: correct it"),
        (
            'text,label\n"a,1\nb,2\nsay "x" now,1\n',
            {"drop_malformed": True},
            "in a quoted field",
        ),
        ("text,label\nq,r,1\ncaf\xe9,1\nth\xe9,0\n", {}, "pass --csv_encoding cp1252, which reads"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, content, form, message):
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        read_split(tmp_path / "a.csv", FileFormat(**form), needs_labels=False)
    assert message in str(error.value)


def test_dropped_rows_of_another_encoding_are_pointed_out(tmp_path, caplog):
    rows = "".join(f"plain {i},a\n" for i in range(9))
    (tmp_path / "a.csv").write_bytes(f"text,label\n{rows}café,a\nthé,b\n".encode("cp1252"))
    assert len(read_split(tmp_path / "a.csv", FileFormat(drop_malformed=True))) == 9
    assert "rows were dropped that --csv_encoding cp1252 may read" in caplog.text


@pytest.mark.parametrize("name", ["utf8", "UTF-8", "utf_8"])
def test_every_name_of_utf8_reads_a_byte_order_mark(tmp_path, name):
    (tmp_path / "a.csv").write_bytes("text,label\na,1\n".encode("utf-8-sig"))
    assert read_split(tmp_path / "a.csv", FileFormat().in_encoding(name)).texts == ["a"]


def test_without_a_header_a_comma_is_the_last_delimiter_to_be_tried(tmp_path):
    (tmp_path / "a.csv").write_text("ham\tgood, movie\nspam\tbad, one\n")
    found = read_split(tmp_path / "a.csv", FileFormat(column_names=("label", "text")))
    assert found.texts == ["good, movie", "bad, one"]


def test_json_lines_may_have_any_encoding(tmp_path):
    rows = "\n".join(f'{{"text": "café {i}", "label": "x"}}' for i in "ab")
    for encoding, flag in (("utf-16", None), ("cp1252", "cp1252")):
        (tmp_path / "a.json").write_bytes(rows.encode(encoding))
        found = read_split(tmp_path / "a.json", FileFormat().in_encoding(flag))
        assert found.texts == ["café a", "café b"]
    with pytest.raises(UserError, match="pass --csv_encoding cp1252"):
        read_split(tmp_path / "a.json", FileFormat())


def test_labels_in_two_spellings_have_one_weight_and_one_margin(tmp_path):
    train = read_split(
        write_csv(tmp_path / "a.csv", [("a", "1"), ("b", "1.0"), ("c", "0")]), FileFormat()
    )
    names = dataset.label_names(train)
    assert names == ["0", "1"]
    weights = trainer.class_weights(train.number_labels(names), "balanced", names)
    assert weights == {"0": 1.5, "1": 0.75}
    (tmp_path / "w.json").write_text('{"1.0": 3}')
    found = trainer.class_weights(train.number_labels(names), str(tmp_path / "w.json"), names)
    assert found["1"] == 3 * found["0"]
    margins, _ = review.label_margins(["1.0", "0.0"], np.array([[0.2, 0.8], [0.2, 0.8]]), names)
    assert margins.round(6).tolist() == [0.6, -0.6]


def test_labels_with_the_separator_of_predictions_are_refused(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("a", "x|y, z"), ("b", "z")])
    split_ = read_split(path, FileFormat(multi_label=True, label_separator=","))
    with pytest.raises(UserError, match=r"label 'x\|y' has a \|, which separates several labels"):
        dataset.label_names(split_)


def test_a_quote_that_never_closes_drops_no_row(tmp_path):
    rows = "".join(f"text {i},{i % 2}\n" for i in range(20))
    (tmp_path / "a.csv").write_text(f'text,label\n{rows}"open,0\n{rows}')
    with pytest.raises(UserError, match="opens a quote that never closes: pass --quoting none"):
        read_split(tmp_path / "a.csv", FileFormat(drop_malformed=True))
