"""Models by path or by the name that they have on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sdcomp.files import regular, resolve_input
from sdcomp.model.files.diffusers_folder import hub_files
from sdcomp.model.files.tensors import ModelError, one_line


def is_hub_name(name: str) -> bool:
    """Whether a text is a hub name, `owner/model`, and no path: nothing here has the owner's name."""
    owner = name.partition("/")[0]
    local = os.path.exists(resolve_input(owner)) or name.endswith((".ckpt", ".safetensors"))
    return not local and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))


def local_model(path: str | Path, variant: str | None = None) -> Path:
    """The file or folder of a model. If there is none, the hub's diffusers folder of that name is fetched.

    Only the files that are needed are fetched, once; `variant` chooses among the weights. Raises ModelError
    where there is no such path and no such name.
    """
    found = resolve_input(path)
    if os.path.exists(found):
        return found
    if os.path.lexists(found):
        regular(found, ModelError)  # raises the error that explains the broken link
    name = str(path)
    if not is_hub_name(name):
        raise ModelError(
            f"model {name[:200]!r} does not exist; give a file or folder such as data/tiny, or a hub name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=hub_files(variant)))
    except Exception as error:  # of many kinds, from the hub's client, its transport and the system
        raise ModelError(
            f"model {name[:200]!r} does not exist here and cannot be fetched from the hub "
            f"({one_line(error)[:200]}); check name and connection, or give a local path"
        ) from error
