"""Say what a file that cannot be read as CSV is: its kind, its encoding, its broken bytes."""

import codecs
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 2**18  # bytes in memory at a time
MANY = 100_000  # broken bytes, after which counting them stops
SAMPLE = 2**12  # bytes from which an encoding is guessed
KINDS = {  # the first bytes: what the file is, and the way to a CSV file
    rb"\x1f\x8b": "compressed: unpack it with gunzip < FILE > NEW.csv",
    rb"BZh[1-9]1AY&SY": "compressed: unpack it with bunzip2 < FILE > NEW.csv",
    rb"\xfd7zXZ\0": "compressed: unpack it with unxz < FILE > NEW.csv",
    rb"\x28\xb5\x2f\xfd": "compressed: unpack it with unzstd < FILE > NEW.csv",
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a spreadsheet or Office file: save the table as CSV",
    rb"version https://git-lfs\.": "a Git LFS pointer: run git lfs pull in its folder",
    rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<(!doctype html|html)\b": "a web page (HTML): the "
    "download failed, or saved the page around the file; download the file itself",
    rb"%PDF-": "a PDF: get the table it was made from and save that as CSV",
    rb"SQLite format 3\0": "an SQLite database: unpack it with "
    'sqlite3 -header -csv FILE "SELECT * FROM TABLE" > NEW.csv',
    rb"ARROW1\0\0": "an Arrow (Feather) file: convert it with "
    'pandas.read_feather("FILE").to_csv("NEW.csv", index=False)',
    rb"\x80[\x02-\x05]": "a Python pickle: if you trust its author, load it and save it as CSV",
    rb"\x93NUMPY[\x01-\x03]": "a NumPy array: load it with numpy.load and save the table as CSV",
    rb"\x89HDF\r\n\x1a\n": "an HDF5 file: load its table and save it as CSV",
    rb"(?s).{257}ustar": "a tar archive: unpack it with tar -xf FILE",
}
ZIP = b"PK\x03\x04"

# What charset-normalizer may find: it knows many more, which are rare and easily mistaken.
CODE_PAGES = (
    "cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 koi8_r cp874 gb18030 big5 cp932 euc_jp cp949"
).split()
# Beyond ASCII, in texts of western Europe: letters, and marks that word processors set.
WESTERN = {*"àâãåäæçéèêëíîïñóôõöøúùûüßáìòœÀÂÅÄÆÇÉÈÊÍÎÑÓÔÖØÚÜÁŒ", *"‘’“”„–—…«»€£¥§°º®™•·¿¡\xa0©"}


class Utf8Health(NamedTuple):
    """How much of a file is UTF-8."""

    characters: int  # well-formed characters beyond ASCII
    broken: int  # bytes that are not UTF-8
    first: int | None  # the position of the first such byte


def not_csv(path: str | Path) -> str | None:
    """Return what a file is that is not a text table, and the way out; None if it may be one.

    The result ends the sentence "FILE is not a CSV file but ...". Parquet and JSON give None.
    """
    with open(path, "rb") as file:
        start = file.read(2**10)
    if start.startswith(ZIP):
        return zip_kind(path)
    return next((what for magic, what in KINDS.items() if re.match(magic, start)), None)


def zip_kind(path: str | Path) -> str:
    """Return what a zip archive is, and the way out."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            mimetype = b""
            if "mimetype" in names:
                with archive.open("mimetype") as file:
                    mimetype = file.read(100)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return "an incomplete zip archive or spreadsheet: copy or download it again"
    if b"spreadsheet" in mimetype or any(name.startswith("xl/") for name in names):
        return "a spreadsheet: save the table as CSV"
    return "a zip archive: unpack it with unzip FILE"


def utf8_health(path: str | Path) -> Utf8Health:
    """Count the characters beyond ASCII and the bytes that are not UTF-8.

    Counting stops after MANY such bytes, at the end of a block.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    characters = broken = position = 0
    first = None
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            position -= len(decoder.getstate()[0])  # of the first byte that is decoded now
            text = decoder.decode(block, final=not block)
            if not text.isascii():
                codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
                bad = (codes >= 0xDC80) & (codes <= 0xDCFF)  # how surrogateescape marks a byte
                characters += int((codes >= 0x80).sum() - bad.sum())
                broken += int(bad.sum())
                if first is None and bad.any():
                    first = position + len(text[: int(bad.argmax())].encode())
            if not block or broken > MANY:
                return Utf8Health(characters, broken, first)
            position = file.tell()


def sample_lines(path: str | Path) -> bytes:
    """Return lines that are not ASCII, from the start of the file, up to SAMPLE bytes."""
    lines, size = [], 0
    with open(path, "rb") as file:
        while size < SAMPLE and (line := file.readline(BLOCK)):
            if not line.isascii():
                lines.append(line)
                size += len(line)
    return b"".join(lines)[:SAMPLE]


def decodes(path: str | Path, encoding: str) -> bool:
    """Whether the whole file can be decoded."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with open(path, "rb") as file:
        try:
            while block := file.read(BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeError:
            return False
    return True


def decode_start(data: bytes, encoding: str) -> str | None:
    """Decode the start of a text, which may end within a character; None if that fails."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data).removeprefix("\ufeff")
    except UnicodeError:
        return None


def wide_encoding(start: bytes) -> str | None:
    """Return the UTF-16 or UTF-32 encoding of a text with this start, or None."""
    for encoding in "utf-32", "utf-16":
        for order in "le", "be":
            if start.startswith("\ufeff".encode(f"{encoding}-{order}")):
                return encoding
    zeros = [start[place::4].count(0) for place in range(4)]
    bits = 32 if 2 * sum(zeros) > len(start) else 16
    order = "le" if zeros[0] + zeros[2] < zeros[1] + zeros[3] else "be"
    text = decode_start(start, f"utf-{bits}-{order}") or ""
    # Other files with NUL bytes give no line break, or NUL characters
    is_text = any(zeros) and re.search(r"[\r\n]", text) and "\0" not in text
    return f"utf-{bits}-{order}" if is_text else None


def code_page(data: bytes) -> str:
    """Return the code page that a text is most likely in: cp1252, or what charset-normalizer finds.

    That package alone finds it seldom in English with a few quotes or accents, the usual case.
    """
    text = decode_start(data, "cp1252") or ""
    beyond = [char for char in text if not char.isascii()]
    known = sum(char in WESTERN for char in beyond)
    if beyond and known >= 0.98 * len(beyond) and 10 * len(beyond) < 3 * len(text):
        return "cp1252"
    from charset_normalizer import from_bytes

    best = from_bytes(data, cp_isolation=CODE_PAGES).best()
    return best.encoding if best else "cp1252"


def likely_encoding(path: str | Path, tried: Collection[str]) -> tuple[str, str] | None:
    """Return the encoding that a file most likely has, and a sample of at most 40 characters.

    The sample is from the first line beyond ASCII (in UTF-16 and UTF-32, of the file's start). The
    whole file can be decoded, and the encoding is not among `tried`. None if no encoding fits, or
    if the file is UTF-8 with a few broken bytes.
    """
    with open(path, "rb") as file:
        start = file.read(SAMPLE)
    beyond = sample_lines(path)
    if wide := wide_encoding(start):
        name, beyond = wide, start
    else:
        health = utf8_health(path)
        name = "utf-8" if health.characters >= 4 * health.broken else code_page(beyond)
    if codecs.lookup(name).name in {codecs.lookup(one).name for one in tried} or not decodes(
        path, name
    ):
        return None
    lines = (decode_start(beyond or start, name) or "").splitlines() or [""]
    line = next((line for line in lines if not line.isascii()), lines[0])
    place = next((i for i, char in enumerate(line) if not char.isascii()), 0)
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line)  # what would move a cursor
    return name, line[max(place - 15, 0) :][:40].strip()
