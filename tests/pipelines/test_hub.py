"""Folders that are no whole pretrained model: none is trained as if it were one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipelines_small import SHAPE, bert, clip, dinov2, vit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from pipelines import glue, hub, language
from pipelines.tiny.decoder import byte_tokenizer
from surm_seg.errors import BadInput

TEXT, PICTURES = "AutoModelForSequenceClassification", "AutoModelForImageClassification"


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def wrapped(folder: Path) -> None:
    """As DistributedDataParallel names them."""
    rewritten(folder, lambda weights: {f"module.{name}": value for name, value in weights.items()})


def without_the_last_layer(folder: Path) -> None:
    rewritten(folder, lambda weights: {name: value for name, value in weights.items() if ".1." not in name})


def wider(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": 32'))


@pytest.mark.parametrize("damage", [wrapped, without_the_last_layer, wider])
@pytest.mark.parametrize(("made", "kind"), [(bert, TEXT), (vit, PICTURES), (clip, PICTURES), (dinov2, PICTURES)])
def test_an_encoder_that_would_stay_random_is_refused(
    made: Callable[[Path], Path], kind: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = made(tmp_path)
    assert hub.with_new_head(kind, str(folder), num_labels=3)[1] == ("classifier",)
    damage(folder)
    with pytest.raises(BadInput, match=r"has no weights that fit [\w.]+ \(\d+ are missing or of another size\)"):
        hub.with_new_head(kind, str(folder), num_labels=3)


def test_heads_and_poolers_may_be_new_or_of_another_size(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=20, **SHAPE)).save_pretrained(tmp_path / "masked")
    assert hub.with_new_head(TEXT, str(tmp_path / "masked"))[1] == ("bert.pooler.dense", "classifier")
    five = RobertaForSequenceClassification(RobertaConfig(vocab_size=20, num_labels=5, **SHAPE))
    five.save_pretrained(tmp_path / "five")
    assert hub.with_new_head(TEXT, str(tmp_path / "five"), num_labels=5)[1] == ("classifier",)
    assert hub.with_new_head(TEXT, str(tmp_path / "five"), num_labels=3)[1] == ("classifier.out_proj",)


def llama(folder: Path, kind: type = LlamaForCausalLM, tied: bool = True) -> Path:
    words = byte_tokenizer()
    torch.manual_seed(0)
    kind(LlamaConfig(vocab_size=len(words), tie_word_embeddings=tied, **SHAPE)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_causal_model_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    language.create(language.Config(model=str(llama(tmp_path / "tied"))), 0)
    wrapped(tmp_path / "tied")
    llama(tmp_path / "headless", LlamaModel, tied=False)
    for folder, lacking in (("tied", 21), ("headless", 1)):
        with pytest.raises(BadInput, match=rf"no weights that fit lm_head\.weight \({lacking} "):
            language.create(language.Config(model=str(tmp_path / folder)), 0)


def test_an_encoder_is_no_causal_model(tmp_path: Path) -> None:
    words = byte_tokenizer()
    RobertaForMaskedLM(RobertaConfig(vocab_size=len(words), **SHAPE)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="reads both ways; give a causal language model"):
        language.create(language.Config(model=str(tmp_path)), 0)


def test_a_model_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    for path in bert(tmp_path).glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadInput, match="has no vocabulary; copy tokenizer"):
        glue.create(glue.Config(model=str(tmp_path)), 0)


@pytest.mark.parametrize("junk", [b"junk junk", b"", b"PK\x03\x04junk"])
def test_files_of_junk_are_named_with_the_kind_of_error(junk: bytes, tmp_path: Path) -> None:
    folder = bert(tmp_path)
    (folder / "tokenizer.json").write_bytes(junk)
    with pytest.raises(BadInput, match=r"cannot be loaded \(\w+: "):
        hub.tokenizer(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(junk)
    with pytest.raises(BadInput, match=r"cannot be loaded \(\w+: "):
        hub.with_new_head(TEXT, str(folder))
