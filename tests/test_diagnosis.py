"""What a file is that cannot be read as CSV: its kind, encoding, broken bytes and columns."""

import bz2
import gzip
import io
import itertools
import lzma
import pickle
import random
import tarfile
import zipfile

import numpy as np
import pytest

from runtime import diagnosis
from runtime.diagnosis import likely_encoding, not_csv, utf8_health
from runtime.guess import guess_columns

TABLE = b"text,label\nhi,a\n"


def zipped(names: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.csv"))
    return file.getvalue()


def saved_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(["a"]))
    return file.getvalue()


FILES = [
    (gzip.compress(TABLE, mtime=0), "gunzip"),
    (bz2.compress(TABLE), "bunzip2"),
    (lzma.compress(TABLE), "unxz"),
    (b"\x28\xb5\x2f\xfd\x04\x48", "unzstd"),
    (zipped({"a.csv": TABLE}), "an archive: unpack it with unzip"),
    (zipped({"[Content_Types].xml": b"", "xl/workbook.xml": b""}), "a spreadsheet or Office file"),
    (zipped({"mimetype": b"application/vnd.oasis"}), "a spreadsheet or Office file"),
    (zipped({"docProps/app.xml": b"", "xl/workbook.xml": b""}), "a spreadsheet or Office file"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 99, "a spreadsheet or Office file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "run git lfs pull"),
    (b"\xef\xbb\xbf\r\n <!DOCTYPE html>\n<title>404</title>", "a web page"),
    (b'<?xml version="1.0"?>\n<HTML lang="en">', "a web page"),
    (b"%PDF-1.7\n", "a PDF"),
    (b"ARROW1\0\0\xff\xff\xff\xff", "Arrow"),
    (pickle.dumps(["a"], protocol=2), "pickle"),
    (pickle.dumps(["a"], protocol=5), "pickle"),
    (saved_array(), "NumPy"),
    (b"\x89HDF\r\n\x1a\n\0", "HDF5"),
    (tarred(), "tar -xf"),
    (b"SQLite format 3\0", "SQLite"),
]
TEXTS = [  # may be tables
    b"",
    TABLE,
    b"PAR1\x15\x04",
    b'{"text": "hi"}\n',
    b"BZh9,label\n",
    "“NUMPY”,label\n".encode("cp1252"),
    b"html,label\n<html>,a\n",
    b"\x80,price\n",  # cp1252
    "text,label\n".encode("utf-16"),
]


@pytest.mark.parametrize(("content", "what"), [*FILES, *[(text, None) for text in TEXTS]])
def test_a_file_that_is_no_table_is_named_by_its_first_bytes(content, what, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    found = not_csv(path)
    assert found is None if what is None else what in found


def test_utf8_is_counted_by_blocks_as_at_once(tmp_path, monkeypatch):
    """The borders of blocks fall within characters and within broken ones."""
    rng, path = random.Random(0), tmp_path / "data.csv"
    for _ in range(300):
        pieces = [
            rng.choice("aé日😀").encode() if rng.random() < 0.8 else rng.randbytes(1)
            for _ in range(rng.randrange(30))
        ]
        data = b"".join(pieces)
        text = data.decode("utf-8", "surrogateescape")
        broken = sum("\udc80" <= char <= "\udcff" for char in text)
        path.write_bytes(data)
        monkeypatch.setattr(diagnosis, "BLOCK", rng.choice([1, 2, 3, 7, 100]))
        assert utf8_health(path) == (sum(c > "\x7f" for c in text) - broken, broken)


LANGUAGES = {
    "cp1252": [
        ["He said “I don’t know” – and left…", "It’s fine", "the café was closed"],
        ["Motörhead and Beyoncé", "a jalapeño crème brûlée", "El Niño"],
        ["Björk’s Ärzte – “Mötley Crüe” é", "crème brûlée", "Ümlaut’s", "Ön"],
        ["Où est passé le garçon ? Ça m'a beaucoup plu", "une très belle soirée d'été"],
        ["Die Bedienung war sehr unfreundlich, schöne Grüße", "Das Zimmer war für uns zu groß"],
        ["¿Dónde está la habitación que reservé ayer?", "El desayuno fue pequeño"],
    ],
    "cp1250": [["Obsługa była bardzo niemiła i źle się czułem", "Łóżko było za małe"]],
    "cp1254": [["Oda çok küçüktü ve ışıklar çalışmıyordu", "İstanbul'da güzel bir şehir gördüğüm"]],
    "cp1251": [["Очень плохое обслуживание, номер был грязный", "Спасибо, всё понравилось"]],
    "koi8_r": [["Очень плохое обслуживание, номер был грязный", "Спасибо, всё понравилось"]],
    "cp1253": [["Το δωμάτιο ήταν πολύ μικρό και βρώμικο", "Ευχαριστώ, όλα ήταν τέλεια"]],
    "gb18030": [["房间很小，而且服务员的态度不好", "我们对这个酒店非常满意"]],
    "big5": [["房間很小，而且服務員的態度不好", "我們對這個酒店非常滿意"]],
    "cp932": [["①部屋がとても狭くて、スタッフの対応も悪かったです", "とても満足しました"]],
    "cp949": [
        ["방이 너무 작고 똠방각하처럼 직원들이 친절하지 않았습니다", "정말 만족스러운 호텔이었어요"]
    ],
    "utf-16": [["déjà vu", "日本語"], ["plain"]],
    "utf-16-le": [["déjà vu", "日本語"], ["plain"]],
    "utf-16-be": [["déjà vu", "日本語"], ["plain"]],
    "utf-32-le": [["déjà vu", "日本語"], ["plain"]],
    "utf-8": [["déjà vu", "日本語"], ["plain"]],
}


def with_plain_rows(texts: list[str], plain: int) -> str:
    rows = ["the soup was cold,ham"] * plain
    return "\n".join(["text,label", *rows, *[f'"{text}",spam' for text in texts], *rows, ""])


@pytest.mark.parametrize("plain", [0, 500])
@pytest.mark.parametrize(
    ("encoding", "texts"), [(name, texts) for name in LANGUAGES for texts in LANGUAGES[name]]
)
def test_the_encoding_of_two_sentences_is_found(encoding, texts, plain, tmp_path):
    content, path = with_plain_rows(texts, plain), tmp_path / "data.csv"
    path.write_bytes(content.encode(encoding))
    found, sample = likely_encoding(path, tried="ascii")
    assert found == encoding
    assert sample.strip() in content and len(sample) <= 40
    far = plain and encoding.startswith(("utf-16", "utf-32"))  # the sample is from the start
    assert far or content.isascii() or not sample.isascii()
    assert likely_encoding(path, tried=encoding.upper()) is None


@pytest.mark.parametrize(
    "content",
    [
        with_plain_rows(["déjà vu – café"], 1).encode() + b"a caf\xe9,ham\n",  # UTF-8, damaged
        with_plain_rows(["déjà vu"], 9).encode("utf-16")[:-1],
        random.Random(0).randbytes(3000),
    ],
)
def test_no_encoding_is_named_that_does_not_fit_the_whole_file(content, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    assert likely_encoding(path, tried="ascii") is None


def test_a_stray_nul_byte_does_not_make_a_file_utf16(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b"text,label\nhi\0,a\n")
    assert likely_encoding(path, tried="ascii") == ("utf-8", "text,label")


def test_the_sample_shows_the_first_character_beyond_ascii(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes((f"text,label\n{'x' * 30} caf" + "é" + "y" * 50 + ",a\n").encode("cp1252"))
    assert likely_encoding(path, "utf-8") == ("cp1252", "xxxxxxxxxxx café" + "y" * 24)


WORDS = "room cold loud nice staff soup train late lamp street quiet bread view guide".split()


def texts(count: int = 5):
    """Yield texts, each another one."""
    return (f"{' '.join(random.Random(n).choices(WORDS, k=count))} {n}" for n in itertools.count())


def table(header: list[str], *columns, rows: int = 40) -> tuple[list[str], list[list[str]]]:
    """Return a header and rows; a column is a function's values or a list that repeats."""
    columns = [itertools.cycle(c) if isinstance(c, list) else c for c in columns]
    return header, [list(row) for row in itertools.islice(zip(*columns, strict=True), rows)]


def numbers():
    return map(str, itertools.count())


def dates():
    return (f"Mon Apr 06 22:19:{second % 60:02} PDT 2009" for second in itertools.count(50))


CHINESE = (f"今天天气很好我们去公园玩吧{chr(0x4E00 + n)}" for n in itertools.count())
HAM = ["spam", "ham"]
FIRST_ROWS = {  # files without a header: the names to pass
    "label, text": (table(["spam", "loud street number 0"], HAM, texts()), "label text"),
    "number": (table(["1", "some text"], ["0", "1"], texts()), "label text"),
    "intents": (
        table(["What is my balance?", "balance"], texts(), ["card", "balance", "loan"]),
        "text label",
    ),
    "intent named like a column": (
        table(["What is this?", "question"], texts(), ["question", "statement"]),
        "text label",
    ),
    "title and body": (
        table(
            ["3", "Wall St. Bears", "Short-sellers are seeing green"],
            list("1234"),
            texts(2),
            texts(20),
        ),
        "label column_2 text",
    ),
    "ids and dates": (
        table(
            ["0", "17", "Mon Apr 06 22:19:45 PDT 2009", "the room is nice"],
            ["0", "4"],
            numbers(),
            dates(),
            texts(),
        ),
        "label column_2 column_3 text",
    ),
    "two columns of labels": (
        table(["loud room", "0", "1"], texts(), ["0", "1"], ["1", "0", "0"]),
        "text column_2 column_3",
    ),
    "long": (table(["the soup was cold " * 5], texts()), "text"),
    "no blanks between words": (
        table(["好", "今天天气很好我们去"], ["好", "坏"], CHINESE),
        "label text",
    ),
}
HEADERS = {  # files with a header: text and label
    "spreadsheet": (
        table(["v1", "v2", "", "", ""], HAM, texts(), [""], [""], [""]),
        ("v2", "v1"),
    ),
    "index": (table(["", "text", "label"], numbers(), texts(), HAM), ("text", "label")),
    "pandas": (
        table(["Unnamed: 0", "Title", "Category"], numbers(), texts(), HAM),
        ("Title", "Category"),
    ),
    "numbered": (table(["", "0", "1"], numbers(), texts(), HAM), ("0", "1")),
    "text named text": (
        (["text", "label"], [["text", "ham"], *table([], texts(), HAM)[1]]),
        ("text", "label"),
    ),
    "joined files": (
        (["comment", "stars"], [*table([], texts(), HAM)[1], ["comment", "stars"]] * 2),
        ("comment", "stars"),
    ),
    "a column for each label": (
        table(["comment_text", "toxic", "insult"], texts(), ["0", "1"], ["1", "0", "0"]),
        ("comment_text", "toxic,insult"),
    ),
    "question as a name": (
        table(
            ["How satisfied are you with the service that you received today?", "Comments"],
            list("12345"),
            texts(),
        ),
        ("Comments", "How satisfied are you with the service that you received today?"),
    ),
    "title and text": (
        table(["title", "text", "label"], texts(3), texts(20), HAM),
        ("text", "label"),
    ),
    "two texts": (table(["q1", "q2", "same"], texts(), texts(), HAM), (None, "same")),
    "two labels": (table(["words", "a", "b"], texts(), HAM, ["x", "y", "z"]), ("words", None)),
    "text twice": (table(["text", "text", "label"], texts(), texts(), HAM), (None, "label")),
    "ids, dates and numbers": (
        table(["id", "when", "price", "kind"], numbers(), dates(), numbers(), HAM),
        (None, "kind"),
    ),
    "new texts": (table(["id", "text"], numbers(), texts()), ("text", None)),
    "no rows": ((["v1", "v2"], []), (None, None)),
}


@pytest.mark.parametrize("kind", FIRST_ROWS)
def test_a_first_line_that_is_a_row_gets_names(kind):
    (header, rows), names = FIRST_ROWS[kind]
    found = guess_columns(header, rows)
    assert found.header_is_row and found.names == names.split()
    assert found.text == ("text" if "text" in found.names else None)
    assert found.label == ("label" if "label" in found.names else None)


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_is_kept_and_only_obvious_columns_are_guessed(kind):
    (header, rows), (text, label) = HEADERS[kind]
    assert guess_columns(header, rows) == (False, header, text, label)
