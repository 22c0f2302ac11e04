"""The optional package SAELens: its import, and its registry of published autoencoders (extra `sae`)."""

import difflib
import functools
import hashlib
import json
import os
import warnings
from typing import Any

from cratelm.errors import InputError, missing_extra, one_line
from cratelm.models.autoencoder_formats import from_sae_lens
from cratelm.models.sparse_autoencoder import SparseAutoencoder
from cratelm.runs.hub import quiet_hub


def import_sae_lens() -> Any:
    """Return the optional package `sae_lens`; raise `InputError` with the name of the extra if it is missing."""
    # It imports wandb, which must not write files or connect to a server.
    os.environ.setdefault("WANDB_MODE", "disabled")
    try:
        import sae_lens
    except ImportError:
        raise missing_extra("sae", "an autoencoder", "sae-lens") from None
    return sae_lens


# A stage asks for the identity first, and for the autoencoder later.
@functools.lru_cache(maxsize=2)
def load_release(name: str) -> SparseAutoencoder:
    """Return the autoencoder that SAELens' registry calls `name`, RELEASE/ID; the same object each time.

    For a release that is not registered, `name` is OWNER/REPOSITORY/FOLDER of the Hub, in SAELens' format. Files come
    from the Hub, or from its cache on this machine. Raises `InputError` for a name that the registry does not have, an
    architecture that is not supported, and if the Hub does not answer.
    """
    lens = import_sae_lens()
    release, identifier = _split(name)
    try:
        with quiet_hub(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about, `from_sae_lens` reads itself
            sae = lens.SAE.from_pretrained(release, identifier, device="cpu", dtype="float32")
    except Exception as error:  # SAELens, its parts and the network share no base exception
        raise InputError(
            f"{name} cannot be loaded by SAELens ({type(error).__name__}: {one_line(error, 160)}): if the Hub cannot"
            " be reached, download the folder elsewhere and name it with --sae FOLDER"
        ) from None
    return from_sae_lens(sae.cfg.to_dict(), dict(sae.state_dict()), name)


def release_identity(name: str) -> str:
    """Return a string that changes when the settings or weights of a release do. Raises as `load_release`."""
    sae = load_release(name)
    digest = hashlib.sha256(json.dumps(repr(sae.config)).encode())
    for key, tensor in sorted(sae.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return f"release:{name}@{digest.hexdigest()}"


def _split(name: str) -> tuple[str, str]:
    """Return RELEASE and ID. Raises `InputError`, which lists similar names, if the registry has no such pair."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    release, _, identifier = name.partition("/")
    if release in directory:
        known = list(directory[release].saes_map)
        if identifier in known:
            return release, identifier
        near = difflib.get_close_matches(identifier, known, 3, 0.3) or known[:3]
        raise InputError(
            f"--sae {name}: release {release} of SAELens has no {identifier!r}; among its {len(known)} are"
            f" {', '.join(near)}"
        )
    parts = name.split("/")
    if len(parts) > 2:
        return "/".join(parts[:2]), "/".join(parts[2:])
    near = difflib.get_close_matches(release, directory, 3, 0.5)
    hint = f" (is it {' or '.join(near)}?)" if near else ""
    raise InputError(
        f"--sae {name} is neither a folder nor RELEASE/ID of SAELens' registry{hint}: name a folder, autoencoders of"
        " the run, or a release, such as gpt2-small-res-jb/blocks.8.hook_resid_pre"
    )
