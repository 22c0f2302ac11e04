"""Sets with a name: from the Hub through `datasets`, or the same from a local file.

| name | on the Hub | a document is |
|---|---|---|
| lambada | EleutherAI/lambada_openai, test | a passage, of which the last word is predicted |
| lambada_raw | cimec/lambada, test | likewise, in the authors' tokenised text |
| wikitext2, wikitext103 | Salesforce/wikitext, raw, test | an article |
| ptb | ptb-text-only/ptb_text_only, test | 50 sentences |
| openwebtext | Skylion007/openwebtext, train | a web page |
| pile, pile:SUBSET | monology/pile-uncopyrighted, test | a document of the Pile |
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cratelm.corpus.documents import Document, ReadError
from cratelm.corpus.formats import CorpusFile, Fields, row_document
from cratelm.corpus.sources import HUB, open_corpus
from cratelm.errors import InputError, missing_extra
from cratelm.evaluate.texts import Passage, articles, blocks, last_words, whole
from cratelm.records import SPLITS

STREAMED_DOCUMENTS = 1000
"""of a streamed set, where no limit is given"""


@dataclass(frozen=True)
class Kind:
    """What a set is made of, and where the Hub keeps it."""

    hub: dict[str, Any] = field(default_factory=dict)
    """arguments of `datasets.load_dataset`"""
    unit: str = "documents"
    passages: Callable[[Iterable[str]], Iterator[Passage]] = whole
    field: str = "text"
    streamed: bool = False
    """read row by row, for it is large"""
    last_word: bool = False
    """the last word alone is predicted"""


def _wikitext(configuration: str) -> Kind:
    hub = {"path": "Salesforce/wikitext", "name": configuration, "split": "test"}
    return Kind(hub, "articles", articles)


KINDS: dict[str, Kind] = {
    "lambada": Kind(
        {"path": "EleutherAI/lambada_openai", "name": "default", "split": "test"},
        "passages",
        last_words,
        last_word=True,
    ),
    "lambada_raw": Kind(
        {"path": "cimec/lambada", "split": "test"}, "passages", last_words, last_word=True
    ),
    "wikitext2": _wikitext("wikitext-2-raw-v1"),
    "wikitext103": _wikitext("wikitext-103-raw-v1"),
    # the set's own branch is a script, which `datasets` reads no more; the Hub's copy is Parquet
    "ptb": Kind(
        {
            "path": "ptb-text-only/ptb_text_only",
            "revision": "refs/convert/parquet",
            "data_files": {"test": "penn_treebank/test/*.parquet"},
            "split": "test",
        },
        "blocks of 50 sentences",
        blocks,
        "sentence",
    ),
    "openwebtext": Kind({"path": "Skylion007/openwebtext", "split": "train"}, streamed=True),
    "pile": Kind(
        {
            "path": "monology/pile-uncopyrighted",
            "data_files": {"test": "test.jsonl.zst"},
            "split": "test",
        },
        streamed=True,
    ),
}


@dataclass(frozen=True)
class NamedSet:
    """A set of texts: `NAME` from the Hub, `NAME=PATH` from a file; of the Pile `pile:SUBSET`, too.

    It can be read any number of times and gives the same passages in the same order. Raises
    `InputError` for a name that is not known and has no path, while reading for a text that cannot
    be read, and where the Hub cannot be reached.
    """

    name: str
    path: str
    """empty: from the Hub"""
    kind: Kind
    subset: str
    """part of the Pile, empty: all"""
    max_documents: int | None
    text_field: str | None

    def passages(self) -> Iterator[Passage]:
        """All passages, of the first `max_documents`."""
        most = self.max_documents
        if most is None and self.kind.streamed and not self.path:
            most = STREAMED_DOCUMENTS
        return islice(self.kind.passages(self._texts()), most)

    def _texts(self) -> Iterator[str]:
        found = False
        for document in self._documents():
            if isinstance(document, ReadError):
                raise InputError(document.message)
            if not self.subset or document.subset == self.subset:
                found = True
                yield document.text
        if not found:
            part = f" of subset {self.subset!r} (meta.pile_set_name)" if self.subset else ""
            raise InputError(f"{self.name} holds no text{part}: name another set with --on")

    def _documents(self) -> Iterator[Document | ReadError]:
        fields = Fields(text=self.text_field or self.kind.field)
        if self.path:
            return iter(open_corpus(self.path, fields))
        return _hub_documents(self.name, self.kind)


def named_set(
    given: str, max_documents: int | None = None, text_field: str | None = None
) -> NamedSet:
    """The set that `--on` names. Raises `InputError` where the name is not known and has no path."""
    name, _, path = given.partition("=")
    base, _, subset = name.partition(":")
    if name in SPLITS and path:
        raise InputError(f"{given}: {name} is the run's split, give the file another name")
    if path and not path.startswith(HUB) and not Path(path).expanduser().exists():
        raise InputError(f"{path} is not there: name a file or a folder, --on {name}=PATH")
    if (subset and base != "pile") or (base not in KINDS and not path):
        known = [*SPLITS, *KINDS, "pile:SUBSET"]
        near = difflib.get_close_matches(base, known, n=1)
        hint = f" did you mean {near[0]}?" if near else ""
        raise InputError(
            f"--on {given} is not known:{hint} choose from {', '.join(known)}, or NAME=PATH"
        )
    return NamedSet(name, path, KINDS.get(base, Kind()), subset, max_documents, text_field)


def _hub_documents(name: str, kind: Kind) -> Iterator[Document | ReadError]:
    place = CorpusFile(Path(kind.hub["path"]), kind.hub["path"], "")
    fields = Fields(text=kind.field)
    try:
        for number, row in enumerate(_load(name, kind), 1):
            yield row_document(row, fields, place, number, "row")
    except (OSError, ValueError, RuntimeError) as error:  # what `datasets` raises, by its source
        if isinstance(error, InputError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name} cannot be read from the Hub ({reason}): check the network, or name a local copy,"
            f" --on {name}=PATH"
        ) from None


def _load(name: str, kind: Kind) -> Any:
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging
    except ImportError:
        otherwise = f", or name a local copy, --on {name}=PATH"
        raise missing_extra("hub", name, "datasets", otherwise) from None
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # without a network: twelve lines about retries before our one
    try:
        return load_dataset(**kind.hub, streaming=kind.streamed)
    finally:
        logging.set_verbosity(before)
