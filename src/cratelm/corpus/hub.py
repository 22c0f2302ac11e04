"""Corpora of the Hugging Face Hub, streamed by `datasets`: nothing is downloaded in advance."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cratelm.corpus.documents import Document, ReadError
from cratelm.corpus.formats import CorpusFile, Fields, row_document
from cratelm.errors import InputError, missing_extra

HUB_ERRORS = (OSError, ValueError, RuntimeError)
"""what `datasets` raises when it reads a dataset, according to its source; `InputError` is a `ValueError`"""
# the names of the groups are arguments of `datasets.load_dataset`
_NAME = re.compile(r"hub:(?P<path>[^:@]+)(:(?P<name>[^@]+))?(@(?P<revision>.+))?")


@dataclass(frozen=True)
class HubCorpus:
    """The train split of a dataset, in its own order.

    Raises `InputError` for a name that is not of the form `hub:ID[:CONFIGURATION][@REVISION]`, and
    if `datasets` is not installed or cannot read the dataset.
    """

    corpus: str
    fields: Fields
    n_documents: None = None
    """unknown before the corpus is read"""
    _options: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        match = _NAME.fullmatch(self.corpus)
        if match is None:
            raise InputError(
                f"corpus {self.corpus!r} is not of the form hub:ID[:CONFIGURATION][@REVISION]:"
                " type, for example, --corpus hub:monology/pile-uncopyrighted"
            )
        object.__setattr__(self, "_options", match.groupdict())

    def identity(self) -> str:
        """Return the name itself: a change of the dataset is noticed only if @REVISION pins it."""
        return self.corpus

    def __iter__(self) -> Iterator[Document | ReadError]:
        file = CorpusFile(Path(self.corpus), self.corpus, "")
        number = 0
        try:
            for number, row in enumerate(self._load(), 1):
                yield row_document(row, self.fields, file, number, "row")
        except HUB_ERRORS as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.corpus} cannot be read after row {number} ({first_line(error)}): check the name and the"
                " network, or name a local --corpus"
            ) from None

    def _load(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError:
            raise missing_extra("hub", self.corpus, "datasets") from None
        return load_dataset(**self._options, split="train", streaming=True)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
