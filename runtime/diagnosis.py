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

# Characters beyond ASCII, lower case, for each language of an encoding; frequent ones first if it
# has another alphabet than the Latin one. Of several names, the first that reads the whole file is
# returned; of equally plausible rows, the first.
HANZI, KANA = "一", "".join(map(chr, range(0x3041, 0x30FF)))
RUSSIAN = "оеаинтсрвлкмдпуяыьгзбчйхжюшцщэъфё"
FRENCH_GERMAN_SPANISH = "àâçéèêëîïôùûüœ äöüß áéíñóúü"
IN_ENGLISH = "éèêëñöüçâîôûïåóíáàã"  # as in crème brûlée, Motörhead and El Niño
ENCODINGS = {
    "cp1252": f"{FRENCH_GERMAN_SPANISH} {IN_ENGLISH} àáâãçéêíóôõú àèéìòù åäöæøé",
    "gb18030": HANZI
    + "的是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自"
    "之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样",
    "big5 cp950": HANZI
    + "的是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下"
    "自之年過發後作裡用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣",
    "shift_jis cp932": HANZI + KANA,
    "euc_jp": HANZI + KANA,
    "euc_kr cp949": "가이다는에의을를은하고지로한사기도어서시자리나있대인아들부해그제정일수전만"
    "보라장상과주구게면관으원비스경개우위선신여모공안었및니습요것",
    "cp1251": f"{RUSSIAN} оаниівтерслкдумпзябьгчйхцїжщєюшфґ аиоетнрсвлкдпмзягъбучцщжйхшюфь",
    "koi8_r": RUSSIAN,
    "cp866": RUSSIAN,
    "cp1254": "çğıöşüâ",
    "cp1250": "ąćęłńóśźż áčéěíňřšťúůýž áéíóöőúüű ăâîşţ ćčđšž",
    "iso8859_2": "ąćęłńóśźż áčéěíňřšťúůýž",
    "cp1253": "αοιετσνηυρπκμλςίάόέήύγδωώθχφβξζψ",
    "cp1255": "יוהלאמשרתבנכדעחפסקגצטזםןףץך",
    "cp1256": "اليمونرتبةعدسفهكقأحجشطصخإىذضثزئءغظآؤ",
    "cp874": "านรอกเงมยลวดทสต่้ับหปิคพีแใช์จขไโะื็ุูผถณซศธฐึำ",
    "mac_roman": FRENCH_GERMAN_SPANISH,
    "cp850": FRENCH_GERMAN_SPANISH,
}
PUNCTUATION = "‘’“”„–—…«»‹›€£¥§°º©®™•·¿¡\xa0、。「」『』・！？，：；（）《》～　"
INSIDE_WORDS = "’–—…·"  # also between two letters


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


def plausibility(text: str, alphabet: str, others: str) -> float:
    """Return how much the characters beyond ASCII look like an alphabet: 1 all, below 0 not at all.

    others: all alphabets of the encoding, since texts contain foreign names.
    """
    total, count = 0.0, 0
    latin, ranked = alphabet[0] < "\u0250", "\u0370" <= alphabet[0] < "\u2000"
    weights = {c: 1 - ranked * place / len(alphabet) / 2 for place, c in enumerate(alphabet)}
    for match in re.finditer(r"[^\W\d_]+|[^\x00-\x7f]", text):
        token = match[0]
        beyond = re.sub(r"[\x00-\x7f]", "", token)
        count += len(beyond)
        if not beyond:
            continue
        if not token[0].isalpha() and token not in alphabet:
            around = text[match.start() - 1 : match.start()] + text[match.end() : match.end() + 1]
            inside = len(around) == 2 and around.isalpha() and token < "\u3000"
            good = token in PUNCTUATION and (not inside or token in INSIDE_WORDS)
            good &= token not in "¿¡" or not text[match.start() - 1 : match.start()].isalpha()
            total += 1 if good else -1
        elif token not in (token.lower(), token.upper(), token.title()):
            total -= len(beyond)
        elif len(beyond) > 3 and 3 * len(beyond) > 2 * len(token) if latin else token != beyond:
            total -= len(beyond)  # Latin words are mostly ASCII, words of other alphabets unmixed
        elif not ranked or len(token) > 1:
            for char in beyond.lower():
                block = HANZI if "一" <= char <= "鿿" else "가" if "가" <= char <= "힣" else char
                total += weights.get(char, 0.5 if block in others else -0.5)
    return total / max(count, 1)


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


def code_pages(data: bytes) -> list[str]:
    """Return the names of the encoding in which bytes are most plausible; none if all are odd."""
    best, names = 0.25, ""
    for candidate, alphabets in ENCODINGS.items():
        text = decode_start(data, candidate.split()[-1])
        if text is not None:
            score = max(plausibility(text, part, alphabets) for part in alphabets.split())
            score += 0.02 * (candidate == "cp1252")  # English with names of all kinds
            if score > best:
                best, names = score, candidate
    return names.split()


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
        names, beyond = [wide], start
    else:
        health = utf8_health(path)
        names = ["utf-8"] if health.characters >= 4 * health.broken else code_pages(beyond)
    known = {codecs.lookup(name).name for name in tried}
    for name in names:
        if codecs.lookup(name).name not in known and decodes(path, name):
            lines = (decode_start(beyond or start, name) or "").splitlines() or [""]
            line = next((line for line in lines if not line.isascii()), lines[0])
            place = next((i for i, char in enumerate(line) if not char.isascii()), 0)
            line = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line)  # what would move a cursor
            return name, line[max(place - 15, 0) :][:40].strip()
    return None
