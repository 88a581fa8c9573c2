"""A small BERT (arXiv 1810.04805) that has read acceptable sentences of `pipelines.agreement`, and nothing else."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines import agreement
from pipelines.tiny import kept
from surm_seg.engine import EngineConfig, fit
from surm_seg.task import Batch, Record, Task

VERSION = 2
"""Another one for another grammar, model or training, so that no older model is taken for it."""
SEED = 0
SENTENCES = 20_000
HELD_OUT = 500
LONGEST = 128
"""Positions; GLUE's usual length."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASKED, REPLACED, UNTOUCHED = 0.25, 0.1, 0.1
"""Share of the words that is asked for; of these, the shares that show another word, and the word itself."""
NOT_ASKED = -100
"""What cross-entropy passes over."""

TRAINING = EngineConfig(
    steps=2000, batch_size=32, learning_rate=2e-3, warmup=200, schedule="linear", precision="float32",
    validate_every=0, checkpoint_every=1_000_000, workers=0,
)  # fmt: skip


def text() -> Path:
    """The folder data/models/tiny-text-VERSION of the model and its tokenizer."""
    return kept(f"tiny-text-{VERSION}", _make)


def _make(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as scratch:
        torch.manual_seed(SEED)
        task = Masked(list(islice(agreement.acceptable(SEED), SENTENCES + HELD_OUT)))
        fit(task, TRAINING, Path(scratch), seed=SEED, device="cpu")
    task.encoder.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)


def tokenizer() -> Any:
    """One token a word of the grammar, for transformers."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *agreement.vocabulary()))}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, words[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LONGEST, model_input_names=inputs, **names)


class Masked(Task):
    """Masked language modelling of sentences, the last HELD_OUT of them to validate on."""

    def __init__(self, sentences: list[str]) -> None:
        from transformers import BertConfig, BertForMaskedLM

        self.tokenizer = tokenizer()
        encoded = [np.array(ids) for ids in self.tokenizer(sentences)["input_ids"]]
        self.train, self.held_out = encoded[:-HELD_OUT], encoded[-HELD_OUT:]
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=256,
                max_position_embeddings=LONGEST,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        self.model, self.encoder = model, model.bert

    def __len__(self) -> int:
        return len(self.train)

    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        return self._masked(self.train[index], rng)

    def _masked(self, ids: np.ndarray, rng: np.random.Generator) -> Batch:
        """Some words hidden, at least one, and only those asked for."""
        words = np.arange(1, len(ids) - 1)
        asked = rng.permutation(words)[: max(1, round(MASKED * len(words)))]
        shown, targets = ids.copy(), np.full_like(ids, NOT_ASKED)
        targets[asked] = ids[asked]
        chance = rng.random(len(asked))
        shown[asked[chance >= UNTOUCHED]] = self.tokenizer.mask_token_id
        other = asked[(chance >= UNTOUCHED) & (chance < UNTOUCHED + REPLACED)]
        shown[other] = rng.integers(len(SPECIAL), len(self.tokenizer), len(other))
        return {"input_ids": torch.from_numpy(shown), "labels": torch.from_numpy(targets)}

    def collate(self, samples: list[Batch]) -> Batch:
        filling = {"input_ids": self.tokenizer.pad_token_id, "labels": NOT_ASKED}
        return {
            name: nn.utils.rnn.pad_sequence([one[name] for one in samples], batch_first=True, padding_value=value)
            for name, value in filling.items()
        }

    def loss(self, batch: Batch) -> Tensor:
        seen = batch["input_ids"] != self.tokenizer.pad_token_id
        return self.model(**batch, attention_mask=seen).loss

    def validate(self) -> Record:
        rng = np.random.default_rng(SEED)
        return {"score": -float(self.loss(self.collate([self._masked(ids, rng) for ids in self.held_out])))}
