"""Following instructions, by a causal language model: `--task language`.

commonsense and math are the published files (see `pipelines.instructions`), uuid asks to memorise random pairs (SURM,
arXiv 2406.17740), arithmetic is generated. Only the tokens of the output and the end after it are trained.

commonsense is answered by the option whose output is the most likely, the others by what greedy decoding says;
published figures come from beams of samples instead, so that they may differ a little.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines import hub, instructions, tiny
from pipelines.instructions import Instruction
from pipelines.supervised import Base, Options, Splits, Supervised, over_seeds, refuse_data
from pipelines.tiny.decoder import decoder
from surm_seg.errors import BadConfig, BadInput
from surm_seg.task import Batch, Record

__all__ = ["RECIPES", "Config", "create", "over_seeds"]

_ADAPTED = {"batch_size": 16, "epochs": 3.0, "warmup": 100, "schedule": "linear", "validate_every": 0, "workers": 0}
_MORE = {"method": "monarch", "method_options": {"blocks": 4, "rank": 4}, "roles": ["q", "k", "v"]}

RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "batch_size": 32,
        "epochs": 8.0,
        "warmup_share": 0.06,
        "schedule": "linear",
        "learning_rate": 3e-3,
        "validate_every": 0,
        "workers": 0,
    },
    "commonsense": {"name": "commonsense", "learning_rate": 4e-4, **_MORE, **_ADAPTED},
    "math": {"name": "math", "learning_rate": 3e-4, **_MORE, **_ADAPTED},
    "uuid": {
        "name": "uuid",
        "method": "displacement",
        "method_options": {"rank": 4},
        "roles": ["q", "k", "v"],
        "batch_size": 32,
        "epochs": 100.0,
        "learning_rate": 3e-3,
        "weight_decay": 0.0,
        "validate_every": 0,
        "workers": 0,
    },
}
"""default is for tiny. commonsense and math: Monarch with N = r = 4 on q, k and v and its learning rates from MoRe
(arXiv 2408.17383), batch, epochs and warm-up from LLM-Adapters (arXiv 2304.01933). uuid: W(G, H) of rank 4 from SURM,
the rest our own."""

IGNORED = -100
"""Target of a token that is not trained: cross entropy's own mark."""

ROWS_AT_ONCE = 64

CLOSE = 1e-3
"""How far two numbers may be apart to be the same, as in LLM-Adapters."""


@dataclass
class Config(Options):
    """A set of instructions.

    Args:
        name: commonsense, math, uuid or arithmetic.
        max_length: tokens of prompt and output at most; a longer prompt loses its beginning, an output its end.
        max_new_tokens: said at most where the output is free; 0 for as many as the longest output trained on has.
        pairs: of UUIDs.
    """

    name: str = "arithmetic"
    max_length: int = 256
    max_new_tokens: int = 0
    pairs: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_length", 2), ("max_new_tokens", 0), ("pairs", 1)):
            if getattr(self, name) < least:
                raise BadConfig("language-option", f"--{name} {getattr(self, name)} must be {least} or more.")


def equal(said: str, answer: str) -> tuple[float, ...]:
    """1 where the whole answer is right."""
    return (float(said == answer),)


def recalled(said: str, answer: str) -> tuple[float, ...]:
    """Whether the whole answer is right, and the share of its characters that stand where they should."""
    return (float(said == answer), sum(a == b for a, b in zip(said, answer, strict=False)) / len(answer))


def same_result(said: str, answer: str) -> tuple[float, ...]:
    """1 where the last number that is said is the answer, or the last word in capitals where the answer is one.

    Of any other answer, such as 1/2 or yes, the last words count, without regard to case and to a full stop.
    """
    number = r"-?\d+(?:\.\d+)?"
    if re.fullmatch(r"[A-Z]+", answer):
        return (float(re.findall(r"\b[A-Z]+\b", said)[-1:] == [answer]),)
    if not re.fullmatch(number, answer.replace(",", "")):
        last, wanted = (text.casefold().rstrip(" .").split() for text in (said, answer))
        return (float(last[-len(wanted) :] == wanted),)
    found = re.findall(number, said.replace(",", ""))
    return (float(bool(found) and abs(float(found[-1]) - float(answer.replace(",", ""))) <= CLOSE),)


@dataclass(frozen=True)
class Benchmark:
    """How a set of instructions is made and scored.

    Args:
        splits: its examples.
        measured: what is said and the answer -> each metric.
        metrics: their names, the main one first.
    """

    splits: Callable[[Config, int], Splits[Instruction]]
    measured: Callable[[str, str], tuple[float, ...]]
    metrics: tuple[str, ...] = ("accuracy",)


BENCHMARKS = {
    "commonsense": Benchmark(lambda config, seed: instructions.read("commonsense", config.data), equal),
    "math": Benchmark(lambda config, seed: instructions.read("math", config.data), same_result),
    "uuid": Benchmark(
        lambda config, seed: instructions.generated_uuids(config.pairs, seed), recalled, ("recalled", "characters")
    ),
    "arithmetic": Benchmark(lambda config, seed: instructions.generated_arithmetic(), equal),
}


class Language(Supervised[Instruction]):
    """A causal language model that says the output after the prompt."""

    def __init__(self, config: Config, seed: int) -> None:
        self.kind = _benchmark(config.name)
        if config.name not in instructions.PUBLISHED:
            refuse_data(config, config.name)
        self.metrics = self.kind.metrics
        splits = self.kind.splits(config, seed)
        self.tokenizer, base = _base(config.model)
        self.max_length = config.max_length
        super().__init__(f"language/{config.name}", config, seed, base, splits)
        longest = max(len(self._said(example.output)) for example in self.splits.train)
        self.new_tokens = config.max_new_tokens or min(longest, self.max_length)

    def encode(self, example: Instruction, rng: np.random.Generator | None) -> Batch:
        """To train, one row with its output; to answer, one row per option, or where there are none only the prompt."""
        prompt = self.tokenizer(example.prompt).input_ids
        if rng is not None:
            return _rows([self._trained(prompt, example.output)])
        if example.options:
            rows = _rows([self._trained(prompt, output) for output in example.outputs])
            return rows | {"options": torch.tensor([len(example.options)])}
        kept = torch.tensor([prompt[-self.max_length :]])
        return {"input_ids": kept, "attention_mask": torch.ones_like(kept)}

    def length(self, example: Instruction) -> int:
        """Characters of the prompt, which tokens follow closely enough."""
        return len(example.prompt)

    def collate(self, samples: list[Batch]) -> Batch:
        return joined(samples)

    def inputs(self, batch: Batch) -> Batch:
        return {"input_ids": batch["input_ids"]}

    def loss(self, batch: Batch) -> Tensor:
        return self.loss_of(self.sums(batch))

    def sums(self, batch: Batch) -> Tensor:
        """Summed over tokens, and their number: the loss is a mean over tokens, however they are spread."""
        losses = self._losses(batch)
        return torch.stack([losses.sum(), (batch["target"][:, 1:] != IGNORED).sum().to(losses.dtype)])

    def _losses(self, batch: Batch) -> Tensor:
        """-log p in nats of every output (rows,).

        Rows are padded at their end, where no token of theirs looks: so there is no mask.
        """
        logits = self.model(**self.inputs(batch), use_cache=False).logits[:, :-1]
        target = batch["target"][:, 1:]
        counts = target != IGNORED
        losses = nn.functional.cross_entropy(logits[counts].float(), target[counts], reduction="none")
        return losses.new_zeros(target.shape).masked_scatter(counts, losses).sum(1)

    @torch.inference_mode()
    def log_likelihood(self, examples: Sequence[Instruction]) -> np.ndarray:
        """log p of every output, its end included, in nats."""
        device = next(self.model.parameters()).device
        found = []
        for start in range(0, len(examples), ROWS_AT_ONCE):
            some = examples[start : start + ROWS_AT_ONCE]
            batch = joined([_rows([self._trained(self.tokenizer(e.prompt).input_ids, e.output)]) for e in some])
            found.append(-self._losses({name: value.to(device) for name, value in batch.items()}))
        return torch.cat(found).cpu().numpy()

    def answers(self, batch: Batch) -> Tensor:
        """Numbers of the options (batch,), or tokens (batch, new_tokens), after their end only ends."""
        if "options" in batch:
            rows = {name: value.split(ROWS_AT_ONCE) for name, value in batch.items() if name != "options"}
            pieces = [dict(zip(rows, piece, strict=True)) for piece in zip(*rows.values(), strict=True)]
            losses = torch.cat([self._losses(piece) for piece in pieces]).split(batch["options"].tolist())
            return torch.stack([one.argmin() for one in losses])
        said = self._generated(batch)
        return nn.functional.pad(said, (0, self.new_tokens - said.shape[1]), value=self.tokenizer.eos_token_id)

    def _generated(self, batch: Batch) -> Tensor:
        from transformers import GenerationConfig

        model: Any = self.model
        end = self.tokenizer.eos_token_id
        greedy = GenerationConfig(do_sample=False, max_new_tokens=self.new_tokens, eos_token_id=end, pad_token_id=end)
        return model.generate(**batch, generation_config=greedy)[:, batch["input_ids"].shape[1] :]

    def said(self, answer: Any, example: Instruction) -> str:
        """An answer as text."""
        if example.options:
            return example.options[int(answer)]
        tokens = [int(token) for token in answer]
        end = self.tokenizer.eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def scored(self, answers: np.ndarray, examples: Sequence[Instruction]) -> Record:
        found = [self.kind.measured(said, answer) for said, answer in self.shown(answers, examples)]
        return dict(zip(self.metrics, np.mean(found, axis=0).tolist(), strict=True))

    def shown(self, answers: np.ndarray, examples: Sequence[Instruction]) -> Iterator[tuple[str, str]]:
        for answer, example in zip(answers, examples, strict=True):
            yield self.said(answer, example), example.answer

    def _said(self, output: str) -> list[int]:
        return [*self.tokenizer(output, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def _trained(self, prompt: list[int], output: str) -> tuple[list[int], list[int]]:
        """Tokens, and as many targets."""
        said = self._said(output)[: self.max_length - 1]
        kept = prompt[len(said) - self.max_length :]
        return kept + said, [IGNORED] * len(kept) + said


def _rows(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Tokens and targets as tensors, (rows, length) both."""
    one_each = [{"input_ids": torch.tensor([t]), "target": torch.tensor([said])} for t, said in rows]
    return joined(one_each)


def joined(samples: Sequence[Batch]) -> Batch:
    """Rows of all samples, padded to the longest: prompts on the left, as generation needs it, others on the right."""
    longest = max(one["input_ids"].shape[1] for one in samples)
    left = "target" not in samples[0]

    def padded(name: str, value: Tensor) -> Tensor:
        if value.ndim < 2:
            return value
        more = longest - value.shape[1]
        return nn.functional.pad(value, (more, 0) if left else (0, more), value=IGNORED if name == "target" else 0)

    return {name: torch.cat([padded(name, one[name]) for one in samples]) for name in samples[0]}


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        near = get_close_matches(name, BENCHMARKS, 1)
        meant = f"do you mean {near[0]}? There are" if near else "there are"
        raise BadConfig("benchmark", f"--name {name} is no set of instructions; {meant} {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def _base(model: str) -> tuple[Any, Base]:
    folder = str(decoder()) if model == tiny.NAME else model
    tokenizer = hub.tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise BadInput("model", f"The tokenizer of --model {model} has no token for the end; set its eos_token.")
    build = partial(hub.whole, "AutoModelForCausalLM", folder)
    found = build()
    if reads_both_ways(found):
        raise BadInput("model", f"--model {model} reads both ways; give a causal language model, such as a Llama.")
    return tokenizer, Base(build, (), hub.digest(folder, found))


@torch.inference_mode()
def reads_both_ways(model: nn.Module) -> bool:
    """Whether what a model says after the first token depends on the last."""
    first, second = model(input_ids=torch.tensor([[0, 1, 2], [0, 1, 3]]), use_cache=False).logits[:, 0]
    return not torch.allclose(first, second, rtol=1e-4, atol=1e-5)


def create(config: Config, seed: int) -> Language:
    """The task that `surm-seg train --task language` runs."""
    return Language(config, seed)
