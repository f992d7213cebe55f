"""Texts in files: a folder of text files, or one JSON object per line; and how undecodable bytes are handled."""

import codecs
import gzip
import json
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path

from charset_normalizer import from_bytes

from retro_nb.common.arrays import PathLike, explain_write_errors, writing
from retro_nb.common.digests import digest
from retro_nb.text.document import Document, check_count, part_of, shares

# Byte order marks that no UTF-8 file begins with. UTF-32 comes first, because its mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
GZIP = b"\x1f\x8b"  # the beginning of a packed file
MEGABYTE = 2**20
TEXTS = ("**/*.txt", "**/*.md")  # patterns of the texts of a folder, if no other is passed
ENDINGS = (".txt", ".md")  # of these, also in capitals
BACKUPS = ("~", ".bak", ".orig", ".swp", ".tmp")
INSTALLED = {"node_modules", "site-packages", "__pycache__"}  # folders with libraries' readmes and licences
FOLDER = "a folder"
SPLITS = {"train", "validation", "valid", "val", "dev", "test"}  # of a dataset, as folders or files are named
MOST_KINDS = 8  # of files left out that are listed


def decode_text(data: bytes, encoding: str = "utf-8") -> tuple[str, int]:
    """Bytes -> (text without its byte order mark, number of U+FFFD that replace undecodable bytes)."""
    text = data.decode(encoding, errors="replace")
    found = text.count("\ufffd")
    if found:  # some may be the author's own
        found -= data.decode(encoding, errors="ignore").count("\ufffd")
    return text.removeprefix("\ufeff"), found


def _detect(data: bytes) -> str:
    """The encoding of a text: by its byte order mark or its zero bytes, UTF-8 if that decodes it, else the best guess.

    Every other byte of Latin letters in UTF-16 is zero, which UTF-8 decodes as a control character.
    """
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    places = min(len(data), MEGABYTE) // 2
    even, odd = (data[start : 2 * places : 2].count(0) for start in (0, 1))
    if len(data) % 2 == 0 and max(even, odd) > max(0.7 * places, 3) and min(even, odd) < 0.05 * places:
        return "utf-16-le" if odd > even else "utf-16-be"
    try:
        data.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:
        start = data if len(data) <= MEGABYTE else data[: data.rfind(b"\n", 0, MEGABYTE) + 1 or MEGABYTE]
        guesses = (from_bytes(start[: len(start) - cut]).best() for cut in range(4))  # its last character may be cut
        return next((guess.encoding for guess in guesses if guess), "utf-8")


def _mend(text: str) -> tuple[str, int]:
    """Like `decode_text`, for decoded text: "\\ud800" is valid JSON, but a lone surrogate, which no file can hold."""
    return decode_text(text.encode("utf-8", errors="surrogatepass"))


class text_folder:
    """The text files of a folder, in order of their relative paths, which without suffix are also their titles.

    Without a glob these are all files that end in .txt or .md, in small letters or capitals. A byte order mark is
    dropped. Undecodable bytes and NULs become U+FFFD and are counted in `Document.replaced`. An empty file is a
    Document with an empty text. The files are listed once, at construction, and opened one at a time.

    Left out, with a warning, is what no one means as text: hidden files and folders (names that begin with a dot, such
    as .git or .ipynb_checkpoints), __MACOSX, installed libraries, editors' backups, links to folders, and what is no
    regular file, such as a pipe, whose reading might never end. A pattern that names hidden files or backups itself
    ("**/.notes/*.txt", "*.bak") finds them. Without a glob, the warning also counts the files with other endings. A
    training set and a test set in one folder are read, with a warning.

    glob      a pattern, or several
    encoding  a name that Python knows; None to detect it file by file: UTF-16 or UTF-32 by a byte order mark, UTF-8
              if that decodes the file, else charset-normalizer's guess from the first megabyte. The guess tells
              scripts apart, but may confuse the old encodings of western and central Europe, so that an accent
              becomes another: name the encoding if you know it

    Raises FileNotFoundError if the folder does not exist or the glob matches no file in it, NotADirectoryError if
    it is a file, ValueError for an unknown encoding.
    """

    def __init__(self, folder: PathLike, glob: str | Sequence[str] = TEXTS, encoding: str | None = "utf-8") -> None:
        self.folder, self.glob, self.encoding = Path(folder), glob, encoding
        if not self.folder.exists():
            raise FileNotFoundError(f"{self.folder} does not exist: pass a folder of .txt files or a .jsonl file")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file: pass the folder that holds it, or a .jsonl file")
        _check_encoding(encoding)
        usual = glob == TEXTS
        self._paths, left_out = choose_files(self.folder, ENDINGS if usual else (), "**/*" if usual else glob)
        if not self._paths:
            found = f" (it has {left_out})" if left_out else ""
            raise FileNotFoundError(f"no file in {self.folder} matches glob {glob!r}{found}: pass e.g. '**/*.rst'")
        if left_out:
            warnings.warn(f"{self.folder}: files left out: {left_out}", stacklevel=2)
        splits = {part for name in self._paths for part in Path(name.lower()).with_suffix("").parts} & SPLITS
        if usual and "train" in splits and len(splits) > 1:
            warnings.warn(
                f"{self.folder} has files of the splits {', '.join(sorted(splits))}, and all get into one database: to "
                f"take one split, pass its folder, or a glob such as '**/train/**/*.txt'",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Document]:
        for name in self._paths:
            data = (self.folder / name).read_bytes()
            text, replaced = decode_text(data, self.encoding or _detect(data))
            text, replaced = text.replace("\0", "\ufffd"), replaced + text.count("\0")
            source, _ = _mend(name)  # names need not be UTF-8 either
            yield Document(text, Path(source).with_suffix("").as_posix(), source, replaced=replaced)

    def split(self, count: int) -> "list[text_folder]":
        """Divide the files, in order, into at most `count` corpora of similar size."""
        sizes = [(self.folder / name).stat().st_size for name in self._paths]
        return [part_of(self, _paths=self._paths[some]) for some in shares(sizes, count)]

    def fingerprint(self) -> dict:
        """A digest of each file's path, size and modification time, and the encoding; the folder itself may move."""
        stats = [(name, (self.folder / name).stat()) for name in self._paths]
        files = digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
        encoding = {} if self.encoding == "utf-8" else {"encoding": self.encoding}  # as in older fingerprints
        return {"corpus": "text_folder", "documents": len(self), "files": files} | encoding


def choose_files(folder: Path, endings: Sequence[str], glob: str | Sequence[str] = "**/*") -> tuple[list[str], str]:
    """The files of a folder that a corpus reads, and a line on those that it leaves out.

    Args:
        folder: where to look.
        endings: of the files wanted, in small letters; none for all that the glob matches.
        glob: a pattern, or several.

    Returns:
        Paths relative to the folder, in order; and the files left out, counted by the reason, "" for none.

    Raises:
        ValueError: a pattern is empty, absolute, or none.
    """
    reasons: dict[str, str | None] = {}
    for pattern in [glob] if isinstance(glob, str) else glob:
        try:
            names = [path.relative_to(folder).as_posix() for path in folder.glob(pattern)]
        except (ValueError, NotImplementedError, IndexError) as error:  # empty or absolute
            raise ValueError(
                f"glob {pattern!r} is no pattern of files in {folder} ({error}): pass e.g. '**/*.rst'"
            ) from None
        for name in names:
            if reasons.get(name, FOLDER) is not None:  # what one pattern leaves out, another may ask for
                reasons[name] = _reason_to_leave_out(folder, name, pattern)
                if reasons[name] is None and endings and not name.lower().endswith(tuple(endings)):
                    reasons[name] = ascii(Path(name).suffix.lower())[1:-1] or "without an ending"
    groups: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        if reason not in (None, FOLDER):
            groups.setdefault(str(reason), []).append(name)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    parts = [f"{len(names)} {reason} ({names[0]!r}{', …' if names[1:] else ''})" for reason, names in largest]
    parts[MOST_KINDS:] = ["…"] if parts[MOST_KINDS:] else []
    return sorted(name for name, reason in reasons.items() if reason is None), ", ".join(parts)


def _reason_to_leave_out(folder: Path, name: str, pattern: str) -> str | None:
    """Why a file that this pattern matches is no text of a corpus; None if it is one, or is asked for by its kind."""
    path, whole = Path(name), folder / name
    if whole.is_dir():
        return "a link to a folder" if whole.is_symlink() else FOLDER
    asked = any(part.startswith((".", "[.]")) for part in Path(pattern).parts)
    if not asked and any(part.startswith(".") and not part.startswith("..") for part in path.parts):
        return "hidden"
    if "__MACOSX" in path.parts:
        return "left by an archiver of macOS"
    if not INSTALLED.isdisjoint(path.parts):
        return "of an installed library"
    backup = path.name.endswith(BACKUPS) or (path.name.startswith("#") and path.name.endswith("#"))
    if backup and not pattern.endswith((*BACKUPS, "#")):
        return "an editor's backup"
    return None if whole.is_file() or not whole.exists() else "no regular file"  # a broken link is an error


def write_texts(texts: Mapping[str, str], folder: PathLike) -> None:
    """Write each text as `title`.txt in UTF-8 into a folder for `text_folder` to read.

    A file that already has this content is not touched: its modification time stays, so a store sees no change.
    """
    for title, text in texts.items():
        path, data = Path(folder) / f"{title}.txt", text.encode()
        if not path.exists() or path.read_bytes() != data:
            with writing(path) as file, explain_write_errors(path):
                file.write(data)


def _check_encoding(encoding: str | None) -> None:
    """Raise ValueError for an encoding that Python does not know. (Decoding an empty text would not reveal it.)"""
    try:
        b"text".decode(encoding or "utf-8", errors="replace")
    except LookupError:
        raise ValueError(
            f"encoding {encoding!r} is none that Python knows: pass e.g. 'utf-8', 'cp1251' or 'gb18030', or None to "
            f"find it out file by file"
        ) from None


class jsonl:
    """One JSON object per line, with its text under `text_field`; blank lines are skipped. It may be packed (.gz).

    A null is an empty text, as in tables. The title is the value under `title_field`, or "line N" without one; the
    source is "file.jsonl:N". Bytes that are not UTF-8 become U+FFFD and are counted, as in `text_folder`.

    Raises FileNotFoundError if the file does not exist, ValueError if it is UTF-16, or not packed despite its name.
    Iterating raises ValueError, naming file and line, for a line that is not a JSON object or has no text.
    """

    def __init__(self, path: PathLike, text_field: str = "text", title_field: str = "title") -> None:
        self.path, self.text_field, self.title_field = Path(path), text_field, title_field
        self._start, self._stop, self._line = 0, None, 1  # bytes to read (None: to the end), first line's number
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file: pass the path of a .jsonl file")
        with open(self.path, "rb") as file:
            start = file.read(4)
        if self._packed and start[:2] != GZIP:
            raise ValueError(f"{self.path} is not packed by gzip: fetch it again, or take .gz from its name")
        if encoding := next((MARKS[mark] for mark in MARKS if start.startswith(mark)), None):
            raise ValueError(f"{self.path} is {encoding.upper()}: convert it to UTF-8, the encoding of .jsonl files")

    def __iter__(self) -> Iterator[Document]:
        number = self._line
        with self._open() as file:  # bytes: only "\n" ends a line
            try:
                file.seek(self._start)
                for number, data in enumerate(file, start=self._line):
                    if data.strip():
                        yield self._document(number, *decode_text(data))
                    if self._stop is not None and file.tell() >= self._stop:
                        break
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                where = f"{self.path}, after line {number}"
                raise ValueError(f"{where}: damaged or cut ({error}): fetch it again, or unpack the rest") from None

    def _open(self) -> BufferedReader | gzip.GzipFile:
        return gzip.open(self.path) if self._packed else open(self.path, "rb")

    @property
    def _packed(self) -> bool:
        return self.path.suffix.lower() == ".gz"

    def _document(self, number: int, line: str, replaced: int) -> Document:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            raise ValueError(f"{where}: not valid JSON ({error}): write one object a line") from None
        return record_document(
            record,
            (self.text_field, self.title_field),
            source=f"{self.path.name}:{number}",
            untitled=f"line {number}",
            where=where,
            replaced=replaced,
        )

    def split(self, count: int) -> "list[jsonl]":
        """Divide the lines, in order, into at most `count` corpora of similar size.

        Each part needs the number of its first line, so the file is read once, as bytes, to count lines. A packed file
        can only be read from its beginning: it stays whole.
        """
        check_count(count)
        if self._packed:
            return [self]
        stop = self.path.stat().st_size if self._stop is None else self._stop
        parts, line = [], self._line
        with open(self.path, "rb") as file:
            file.seek(self._start)
            for share in range(1, count + 1):
                start, first = file.tell(), line
                goal = self._start + (stop - self._start) * share // count
                if start < goal:  # else the previous part's last line reaches beyond
                    while block := file.read(min(MEGABYTE, goal - 1 - file.tell())):
                        line += block.count(b"\n")
                    line += file.readline().count(b"\n")  # on to the end of the line that holds the last byte
                    parts.append(part_of(self, _start=start, _stop=file.tell(), _line=first))
        return parts

    def fingerprint(self) -> dict:
        """The fields read, and the file's name, size and modification time; its folder may move."""
        stat = self.path.stat()
        part: dict = {} if self._stop is None else {"bytes": [self._start, self._stop]}
        return {
            "corpus": "jsonl",
            "file": [self.path.name, stat.st_size, stat.st_mtime_ns],
            "fields": [self.text_field, self.title_field],
        } | part


def record_document(
    record: object, fields: tuple[str, str], *, source: str, untitled: str, where: str, replaced: int = 0
) -> Document:
    """The document of a record, from a `jsonl` line or a table's row.

    record    a mapping; lone surrogates in its text become U+FFFD and are counted
    fields    keys of the text and of the title
    untitled  the title of a record without one
    where     place named in errors: "my.jsonl, line 7"
    replaced  replacements already counted when the record was read

    Raises ValueError for a record without text.
    """
    text_field, title_field = fields
    row = record if isinstance(record, dict) else {}
    text = "" if text_field in row and row[text_field] is None else row.get(text_field)
    if not isinstance(text, str):
        found = f"the fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        found = found if text is None else f"{text!r:.40} ({type(text).__name__})"
        raise ValueError(f"{where}: no text under {text_field!r}, but {found}: pass text_field=…")
    title = row.get(title_field)
    title, _ = _mend(untitled if title is None else str(title))
    text, halves = _mend(text)
    return Document(text, title, source, replaced=replaced + halves)
