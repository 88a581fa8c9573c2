"""Models and data sets of the Hugging Face hub, or of a local folder; no network is asked unless the user allows it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surm_seg.errors import BadInput
from surm_seg.volume import file_digest

ALLOWED = "the hub is asked only where HF_HUB_OFFLINE=0 and TRANSFORMERS_OFFLINE=0 are set"

HEADS = ("classifier", "score", "classification_head", "logits_proj", "head", "dist_head", "fc")
"""What transformers calls the heads of its classifiers."""
BEFORE_HEADS = ("pre_classifier", "pooler", "sequence_summary", "dense", "norm", "layernorm")
"""What it calls the modules before them that a pretrained encoder may lack as well."""
FEWEST_TOKENS = 16
"""That a vocabulary has besides its special tokens, which transformers makes up where there are no files."""


def pretrained(kind: str, model: str, **options: Any) -> Any:
    """What a class of transformers makes `from_pretrained` of a local folder or a name on the hub.

    Args:
        kind: name of the class, such as AutoTokenizer.
        model: as --model says it.

    Raises:
        BadInput: neither a folder with such files, nor on a hub that may be asked.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()  # or every model would report its new head, and draw a bar
    logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(model, **options)
    except Exception as error:  # of many kinds: what damaged files raise is up to each library
        raise BadInput(
            "model",
            f"--model {model} cannot be loaded ({reason(error)}); give the folder of a model that transformers saved "
            f"({ALLOWED}).",
        ) from error


def reason(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}"


def tokenizer(model: str) -> Any:
    """The tokenizer of a model.

    Raises:
        BadInput: there is none, or one that transformers made up without a vocabulary.
    """
    found = pretrained("AutoTokenizer", model)
    if len(found) - len(found.all_special_tokens) < FEWEST_TOKENS:
        raise BadInput(
            "model", f"--model {model} has no vocabulary; copy tokenizer.json or vocab.txt beside the model."
        )
    return found


def whole(kind: str, model: str) -> nn.Module:
    """A model of this class in float32 with all its weights; raises BadInput where the files lack some."""
    found, missing, other = _loaded(kind, model)
    _refuse(model, missing | other)
    return found


def with_new_head(kind: str, model: str, **options: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """A model of this class in float32, whatever its files are in, and the names of its head.

    The head is the modules that the files have no weights for; they are drawn from torch's random state. Where the
    files have a head of the asked size, it is that one.

    Raises:
        BadInput: the files lack other weights too, or have them in other sizes.
    """
    found, missing, other = _loaded(kind, model, **options)
    lacking = {name for name in missing if _outermost(name) not in (*HEADS, *BEFORE_HEADS) and ".pooler." not in name}
    _refuse(model, lacking | {name for name in other if _outermost(name) not in HEADS})
    new = {name.rpartition(".")[0] for name in missing | other}
    return found, tuple(sorted(new or {name for name, _ in found.named_children() if name in HEADS}))


def _outermost(name: str) -> str:
    return name.partition(".")[0]


def _loaded(kind: str, model: str, **options: Any) -> tuple[nn.Module, set[str], set[str]]:
    """A model, and the names of its weights that are random: its files lack some, others have another size."""
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True, **options}
    found, report = pretrained(kind, model, **options)
    return found, set(report["missing_keys"]), {name for name, *_ in report["mismatched_keys"]}


def _refuse(model: str, names: set[str]) -> None:
    if names:
        raise BadInput(
            "model",
            f"--model {model} has no weights that fit {min(names)} ({len(names)} are missing or of another size); save "
            "it again with transformers, so that names and sizes are those of its config.json.",
        )


def digest(model: str, found: nn.Module) -> str:
    """What identifies a pretrained model: its files' SHA-256, or the hub's commit."""
    files = sorted(path for path in Path(model).glob("*") if path.suffix in (".safetensors", ".bin"))
    if files:
        return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()
    commit = getattr(getattr(found, "config", None), "_commit_hash", None)
    return f"{model}@{commit}"


def rows(path: str, name: str | None, split: str) -> Iterable[dict[str, Any]]:
    """A split of a data set of the hub, by the library `datasets`.

    Raises:
        BadInput: the library is not installed, or there is no network, or no such data set.
    """
    where = f"{path}{f' ({name})' if name else ''}"
    try:
        load: Callable[..., Any] = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        sentence = f"{where} comes from the hub by the package datasets, which is not installed: pip install datasets."
        raise BadInput("no-datasets", f"{sentence[:-1]}; or give its files with --data.") from error
    try:
        return load(path, name, split=split)
    except Exception as error:  # of many kinds, from many libraries, all for want of the data
        sentence = f"{where} cannot be had ({reason(error)}; {ALLOWED}); give its files with --data."
        raise BadInput("hub", sentence) from error


def fresh(build: Callable[[], nn.Module], seed: int) -> Callable[[], nn.Module]:
    """The same model every time: its new modules are drawn from this seed, whatever was drawn before."""

    def built() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return built
