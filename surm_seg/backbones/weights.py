"""Where published weights come from, and how a foreign checkpoint becomes safetensors, once."""

from __future__ import annotations

import os
import pickle
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from surm_seg.errors import BadInput
from surm_seg.volume import file_digest, replacing


def cache_folder() -> Path:
    """SURM_CACHE, or surm-seg in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SURM_CACHE") or Path(base) / "surm-seg")


def load(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a PyTorch checkpoint, which is converted once into the cache.

    Checkpoints are read with weights_only=True: nothing in them is executed. Raises BadInput for anything else.
    """
    if not path.is_file():
        raise BadInput("weights-missing", f"There is no weights file {path}; give --weights an existing file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return load_file(_converted(path))
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise BadInput(
            "weights-unreadable", f"{path} holds no complete weights ({type(error).__name__}); fetch the file again."
        ) from error


def _converted(path: Path) -> Path:
    """The cached safetensors copy of a PyTorch checkpoint, made on first use."""
    converted = cache_folder() / f"{file_digest(path)}.safetensors"
    if converted.exists():
        return converted
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else {}
    tensors = {name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors")
    try:
        converted.parent.mkdir(parents=True, exist_ok=True)
        with replacing(converted) as file:
            file.write(save(tensors))  # not save_file, which leaves its own temporary file when it is killed
    except OSError as error:
        raise BadInput(
            "weights-cache",
            f"The cache {converted.parent} cannot be written; set SURM_CACHE to another folder.",
        ) from error
    return converted


def published(url: str) -> Path:
    """The cached copy of a published file, downloaded where there is a network; BadInput says where to put it else."""
    path = cache_folder() / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, replacing(path) as file:
            shutil.copyfileobj(response, file, 1 << 20)
    except (urllib.error.URLError, OSError) as error:
        raise BadInput(
            "weights-download",
            f"{url} cannot be downloaded ({error}); fetch it elsewhere and put it at {path}, or give --weights.",
        ) from error
    return path
