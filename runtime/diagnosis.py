"""Say what a file that cannot be read as CSV is: its kind, its encoding, its broken bytes."""

import codecs
import re
from itertools import islice
from pathlib import Path

BLOCK = 2**18  # bytes or characters in memory at a time
MANY = 100_000  # broken bytes, after which counting them stops
SAMPLE = 2**12  # bytes from which an encoding is guessed
KINDS = {  # the first bytes: what the file is, and the way to a CSV file
    rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd":
    "compressed: unpack it with gunzip, bunzip2, unxz or unzstd < FILE > NEW.csv",
    rb"(?s)\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1|PK\x03\x04.{26}(\[Content|_rels/|docProps/|xl/|mimetype)":
    "a spreadsheet or Office file: save the table as CSV",
    rb"(?s)PK\x03\x04|.{257}ustar": "an archive: unpack it with unzip FILE or tar -xf FILE",
    rb"version https://git-lfs\.": "a Git LFS pointer: run git lfs pull in its folder",
    rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<(!doctype html|html)\b":
    "a web page (HTML): download the file itself, not the page around it",
    rb"%PDF-": "a PDF: get the table it was made from and save that as CSV",
    rb"SQLite format 3\0|ARROW1\0\0|\x80[\x02-\x05]|\x93NUMPY[\x01-\x03]|\x89HDF\r\n\x1a\n":
    "SQLite, Arrow, pickle, NumPy or HDF5: load the table with Python and save it as CSV",
}  # fmt: skip

# What charset-normalizer may find: it knows many more, which are rare and easily mistaken.
CODE_PAGES = (
    "cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 koi8_r cp874 gb18030 big5 cp932 euc_jp cp949"
).split()
# Beyond ASCII, in texts of western Europe: letters, and marks that word processors set.
WESTERN = {*"àâãåäæçéèêëíîïñóôõöøúùûüßáìòœÀÂÅÄÆÇÉÈÊÍÎÑÓÔÖØÚÜÁŒ", *"‘’“”„–—…«»€£¥§°º®™•·¿¡\xa0©"}


def not_csv(path: str | Path) -> str | None:
    """Return what a file is that is not a text table, and the way out; None if it may be one.

    The result ends the sentence "FILE is not a CSV file but ...". Parquet and JSON give None.
    """
    with open(path, "rb") as file:
        start = file.read(2**10)
    return next((what for magic, what in KINDS.items() if re.match(magic, start)), None)


def utf8_health(path: str | Path) -> tuple[int, int]:
    """Count the characters beyond ASCII and the bytes that are not UTF-8, until these are MANY."""
    beyond = broken = 0
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        while broken <= MANY and (text := file.read(BLOCK)):
            beyond += len(re.sub(r"[\0-\x7f]+", "", text))
            broken += len(re.findall("[\udc80-\udcff]", text))
    return beyond - broken, broken


def decode_start(data: bytes, encoding: str) -> str:
    """Decode the start of a text, which may end within a character; "" if that fails."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeError:
        return ""


def wide_encoding(start: bytes) -> str | None:
    """Return the UTF-16 or UTF-32 encoding of a text with this start, or None."""
    for name in "utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be":
        if start.startswith("\ufeff".encode(name)):
            return name[:6]
        text = decode_start(start, name)  # of another kind: has no line break, or NUL characters
        if re.search(r"[\r\n]", text) and "\0" not in text:
            return name
    return None


def code_page(data: bytes) -> str:
    """Return the code page that a text is most likely in: cp1252, or what charset-normalizer finds.

    That package alone finds it seldom in English with a few quotes or accents, the usual case.
    """
    text = decode_start(data, "cp1252")
    beyond = [char for char in text if not char.isascii()]
    known = sum(char in WESTERN for char in beyond)
    if beyond and known >= 0.98 * len(beyond) and 10 * len(beyond) < 3 * len(text):
        return "cp1252"
    from charset_normalizer import from_bytes

    best = from_bytes(data, cp_isolation=CODE_PAGES).best()
    return best.encoding if best else "cp1252"


def likely_encoding(path: str | Path, tried: str) -> tuple[str, str] | None:
    """Return the encoding that a file most likely has, and a sample of at most 40 characters.

    The sample is from the first line beyond ASCII (in UTF-16 and UTF-32, of the file's start). The
    whole file can be decoded, and the encoding is not `tried`. None if no encoding fits, or if the
    file is UTF-8 with a few broken bytes.
    """
    with open(path, "rb") as file:
        data = file.read(SAMPLE)
        if not (name := wide_encoding(data)):
            file.seek(0)
            lines = iter(lambda: file.readline(BLOCK), b"")
            beyond = islice((line for line in lines if not line.isascii()), 100)
            data = b"".join(beyond)[:SAMPLE] or data
            characters, broken = utf8_health(path)
            name = "utf-8" if characters >= 4 * broken else code_page(data)
    if codecs.lookup(name).name == codecs.lookup(tried).name:
        return None
    try:
        with open(path, encoding=name, newline="") as file:
            while file.read(BLOCK):
                pass
    except UnicodeError:
        return None
    lines = decode_start(data, name).removeprefix("\ufeff").splitlines() or [""]
    line = next((line for line in lines if not line.isascii()), lines[0])
    place = next((i for i, char in enumerate(line) if not char.isascii()), 0)
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line)  # what would move a cursor
    return name, line[max(place - 15, 0) :][:40].strip()
