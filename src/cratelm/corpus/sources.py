"""The corpora that a user can name: `builtin`, a file, a folder, or `hub:ID`.

A corpus can be read any number of times and gives the same documents in the same order.
"""

import hashlib
import os
import sysconfig
import tokenize as python_source
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from cratelm.corpus.documents import Document, ReadError
from cratelm.corpus.formats import (
    CorpusFile,
    Fields,
    Found,
    Reader,
    open_file,
    read_jsonl,
    read_jsonl_zst,
    read_text,
    readable,
    why_unreadable,
)
from cratelm.corpus.generated import is_generated
from cratelm.corpus.parquet import read_parquet
from cratelm.errors import InputError

BUILTIN = "builtin"
HUB = "hub:"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
READERS: dict[str, Reader] = {
    **dict.fromkeys(TEXT_SUFFIXES, read_text),
    ".jsonl": read_jsonl,
    ".jsonl.zst": read_jsonl_zst,
    ".parquet": read_parquet,
}
"""reader of a file, by the end of its name; other files in a folder are skipped"""

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
"""skipped folders of the standard library: they differ most between installations"""
_LINK = "a link to a folder is not followed: move or copy the folder into the corpus, or move the link away"
_WHOLE = 16 * 2**20
"""bytes; a larger file is identified by samples of its content"""
_SAMPLES, _SAMPLE = 16, 2**20


class Corpus(Protocol):
    """Documents that can be read any number of times."""

    @property
    def n_documents(self) -> int | None:
        """Return the number of documents; None if it is unknown before reading."""
        ...

    def identity(self) -> str:
        """Return a hash that changes when the corpus does."""
        ...

    def __iter__(self) -> Iterator[Document | ReadError]: ...


@dataclass(frozen=True)
class FileCorpus:
    """Files on disk, in the order of their names.

    Memory: the names of all files.
    """

    files: tuple[CorpusFile, ...]
    fields: Fields
    reader: Reader | None = None
    """reader of every file; None: chosen by the end of its name"""

    @property
    def n_documents(self) -> int | None:
        """Return the number of files if each is one document, else None."""
        whole = all(_reader_of(f.path) in (read_text, None) for f in self.files)
        return len(self.files) if whole or self.reader else None

    def identity(self) -> str:
        """Return a hash over each file's name, size and content.

        For a file above 16 MiB, 16 evenly spread samples of 1 MiB represent the content, so that a
        corpus of terabytes is checked in seconds. A change between the samples that keeps the size
        goes unnoticed (in a compressed file hardly any change does). A file that cannot be read
        contributes only its name.
        """
        digest = hashlib.sha256()
        for file in self.files:
            size, content = _size_and_digest(file)
            digest.update(f"{file.name}\0{size}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def groups(self, n_bytes: int) -> list["FileCorpus"]:
        """Return the corpus as groups of consecutive files; a group ends with the file that reaches `n_bytes` on disk."""
        groups: list[list[CorpusFile]] = [[]]
        size = 0
        for file in self.files:
            if size >= n_bytes:
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += _size_on_disk(file.path)
        return [replace(self, files=tuple(files)) for files in groups]

    def __iter__(self) -> Found:
        for file in self.files:
            if reason := file.fault or why_unreadable(file.path):
                yield ReadError(f"{readable(file.path)}: {reason}")
                continue
            read = self.reader or _reader_of(file.path)
            assert read is not None, file.path
            yield from read(file, self.fields)


def open_corpus(corpus: str, fields: Fields | None = None) -> Corpus:
    """Return the corpus that `corpus` names. Raises `InputError` if it does not exist or is empty."""
    fields = fields or Fields()
    if corpus == BUILTIN:
        return builtin_corpus(fields)
    if corpus.startswith(HUB):
        from cratelm.corpus.hub import HubCorpus

        return HubCorpus(corpus, fields)
    # os.path, because Path raises if a parent folder may not be entered or a name is too long
    path, source = Path(os.path.expanduser(corpus)), readable(corpus)
    if os.path.isdir(path):
        return FileCorpus(_folder_files(path, source), fields)
    if reason := why_unreadable(path):
        reason = f": {reason}" if os.path.lexists(path) else " does not exist"
        raise InputError(
            f"corpus {source}{reason}. Name a file, a folder, `{BUILTIN}` or `{HUB}ID`"
        )
    if _reader_of(path) is None:
        raise InputError(
            f"corpus {source} ends in {path.suffix or 'no suffix'!r}, but must end in one of"
            f" {' '.join(READERS)}: convert the file, or rename it to .txt if it is plain text"
        )
    return FileCorpus((CorpusFile(path, source, readable(path.name)),), fields)


def builtin_corpus(fields: Fields) -> FileCorpus:
    """Return the Python standard library's own source files, about 10 MB; subset = top-level module.

    Installed packages, test folders, the build's own settings (`_sysconfigdata*`), and files that are generated or
    tables (see `cratelm.corpus.generated`) are excluded. Raises `InputError` if there are no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(
        CorpusFile(p, BUILTIN, name := p.relative_to(root).as_posix(), _top_level(name))
        for p, _ in _walk(root, _LEFT_OUT)
        if p.suffix == ".py" and not p.name.startswith("_sysconfigdata") and not _generated(p)
    )
    if not files:
        raise InputError(f"{root} holds no Python sources: name another corpus with --corpus PATH")
    return FileCorpus(files, fields, read_python)


def read_python(file: CorpusFile, fields: Fields) -> Found:
    """Yield a Python file, decoded as it declares (PEP 263), with `\\n` for line breaks."""
    try:
        with python_source.open(file.path) as stream:
            text = stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        yield ReadError(f"{readable(file.path)}: cannot be read as Python source ({error})")
    else:
        yield Document(text, file.source, file.name, 0, file.subset)


def _generated(path: Path) -> bool:
    """Return whether a Python file is generated or a table; False if it cannot be read, which reading reports."""
    try:
        with python_source.open(path) as stream:
            return is_generated(stream.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return False


def _folder_files(folder: Path, source: str) -> tuple[CorpusFile, ...]:
    """Return the files that have a reader, and the folders that are not read, each with the reason."""
    files = tuple(
        CorpusFile(path, source, readable(path.relative_to(folder).as_posix()), fault=fault)
        for path, fault in _walk(folder, frozenset())
        if fault or _reader_of(path) is not None
    )
    if not files:
        raise InputError(
            f"folder {source} holds no file that ends in {' '.join(READERS)}: name another --corpus"
        )
    return files


def _walk(root: Path, skipped: frozenset[str]) -> list[tuple[Path, str]]:
    """Return the files under `root`, and the folders that are not read with the reason.

    They are sorted by path. The reason is empty for files. A folder is not read if it cannot be listed,
    or if it is a link, which can be circular or lead out of the corpus. Hidden files and folders, and
    folders named in `skipped`, are skipped.
    """
    entries: list[tuple[Path, str]] = []
    folders = [root]
    while (
        folders
    ):  # not `os.walk`, which is recursive: folders can be nested more deeply than calls
        folder = folders.pop()
        try:
            with os.scandir(folder) as found:
                listed = [entry for entry in found if not entry.name.startswith(".")]
        except OSError as error:
            entries.append((folder, f"the folder cannot be listed ({error.strerror})"))
            continue
        for entry in listed:
            if not _is_folder(entry):
                entries.append((Path(entry.path), ""))
            elif entry.is_symlink():
                entries.append((Path(entry.path), _LINK))
            elif entry.name not in skipped:
                folders.append(Path(entry.path))
    return sorted(entries, key=lambda entry: entry[0].relative_to(root).as_posix())


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _reader_of(path: Path) -> Reader | None:
    name = path.name.lower()
    return next((read for suffix, read in READERS.items() if name.endswith(suffix)), None)


def _top_level(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def _size_on_disk(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it cannot be read."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def _size_and_digest(file: CorpusFile) -> tuple[str, bytes]:
    """Return size in bytes and hash of the content; "unreadable" and no bytes if it cannot be read."""
    if file.fault or why_unreadable(file.path):
        return "unreadable", b""
    try:
        return _content_digest(file.path)
    except OSError:
        return "unreadable", b""


def _content_digest(path: Path) -> tuple[str, bytes]:
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= _WHOLE:
            # not `file_digest`, which waits for the end of files of /proc that have none
            return str(size), hashlib.sha256(stream.read(_WHOLE) or b"").digest()
        digest = hashlib.sha256()
        for i in range(_SAMPLES):
            stream.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
        return str(size), digest.digest()
