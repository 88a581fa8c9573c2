"""The methods that PEFT brings: their configurations, the sizes that the literature gives them, and where they stand.

| method | size, usual value | starts as the frozen model | source |
|---|---|---|---|
| lora | r 8, lora_alpha 2 r | yes | arXiv 2106.09685, RoBERTa on GLUE; alpha as is common since |
| dora | r 8, lora_alpha 2 r | yes | arXiv 2402.09353 |
| gralora | r 32, alpha 2 r, gralora_k 2 | yes | arXiv 2505.20355 |
| miss | r 64 | yes | arXiv 2409.15371, PEFT's default |
| lokr | r 8, alpha r | yes | arXiv 2309.14859, PEFT's default; the left factor is whole |
| vera | r 256 | yes | arXiv 2310.11454, RoBERTa-large |
| c3a | block_size 256 | no: Xavier | arXiv 2407.19342, PEFT's default; parameters fall as it grows |
| fourierft | n_frequency 1000, scaling 150 | no: normal | arXiv 2405.03003, RoBERTa on GLUE |
| oft | oft_block_size 32 | yes | arXiv 2306.07280, PEFT's default; Cayley-Neumann |
| boft | boft_block_size 4 | yes | arXiv 2311.06243; see `quietly` |
| ia3 | none | yes | arXiv 2205.05638: k, v and the input of mlp_out |
| ln_tuning | none | yes | arXiv 2312.11420: every layer norm |

Where the usual value does not fit the widths of a model, it is the next smaller one that does.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft.tuners.boft.layer
from peft import (
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    GraloraConfig,
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    VeraConfig,
)
from peft.config import PeftConfig
from torch import nn

from surm_seg import roles as where
from surm_seg.errors import BadConfig

Shapes = Sequence[tuple[int, int]]
"""(out, in) of every place that a method changes."""


@dataclass(frozen=True)
class PeftMethod:
    """A method of PEFT with one option that sets how much it trains.

    Args:
        make: PEFT's configuration.
        size: that option.
        usual: its value in the literature.
        rungs: values that fit these shapes, by rising number of parameters.
        options: what else may be set.
        with_size: options that follow the size where they are not given.
    """

    make: Callable[..., PeftConfig]
    size: str
    usual: int
    rungs: Callable[[Shapes], Sequence[int]]
    options: tuple[str, ...]
    with_size: Callable[[int], dict[str, Any]] = lambda size: {}

    def config(self, options: Mapping[str, Any]) -> PeftConfig:
        """PEFT's configuration without a place; raises BadConfig for unknown options."""
        refuse_unknown(options, (self.size, *self.options))
        return self.make(**{**self.with_size(options[self.size]), **options})

    def configured(
        self, model: nn.Module, roles: Sequence[str], head: Sequence[str], options: Mapping[str, Any]
    ) -> PeftConfig:
        """PEFT's configuration for the Linears of these roles; raises BadConfig where one is fused."""
        rungs = self.rungs(self.sizes(model, roles, head))
        usual = max((rung for rung in rungs if rung <= self.usual), default=rungs[0])
        config: Any = self.config({self.size: usual, **options})
        config.target_modules = whole_linears(model, roles)
        return config

    def sizes(self, model: nn.Module, roles: Sequence[str], head: Sequence[str]) -> Shapes:
        """Shapes of the places in a model."""
        return shapes(model, roles, head)

    def ladder(self, sizes: Shapes) -> list[dict[str, Any]]:
        """Options by rising number of parameters."""
        return [{self.size: rung} for rung in self.rungs(sizes)]


def refuse_unknown(options: Iterable[str], known: Sequence[str]) -> None:
    """Raise BadConfig where an option is not among the known ones."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise BadConfig("method-options", f"There is no option {unknown}; it takes {', '.join(known) or 'none'}.")


def shapes(model: nn.Module, roles: Sequence[str], head: Sequence[str]) -> Shapes:
    """(out, in) of every Linear outside the head, or slice of a fused one, that carries one of these roles.

    Raises:
        BadConfig: no role at all, an unknown one, or one that matches no Linear.
    """
    if not roles:
        raise BadConfig("role", f"There is no role to change; choose among {', '.join(where.ROLES)}.")
    body = [(n, module) for n, module in model.named_modules() if not f"{n}.".startswith(tuple(f"{h}." for h in head))]
    slices = where.by_name(body, roles, type(model).__name__)
    return [
        (stop - start, module.in_features)
        for name, module in body
        if isinstance(module, nn.Linear) and any(re.fullmatch(pattern, name) for pattern in slices)
        for start, stop in where.spans(name, module, module.out_features, slices, None).values()
    ]


def whole_linears(model: nn.Module, roles: Sequence[str]) -> str:
    """Regular expression of the Linears of these roles; raises BadConfig where one holds other roles as well."""
    slices = where.by_name(model.named_modules(), roles, type(model).__name__)
    for pattern, parts in slices.items():
        if any(span is not None for span in parts.values()):
            name = next(name for name, _ in model.named_modules() if re.fullmatch(pattern, name))
            raise BadConfig(
                "method-fused",
                f"{' and '.join(parts)} of {type(model).__name__} are slices of one Linear, such as {name}, and PEFT's "
                "methods only take whole ones; choose a structure, such as low_rank, which takes slices.",
            )
    return "|".join(f"(?:{pattern})" for pattern in slices)


def ia3(model: nn.Module) -> PeftConfig:
    """Factors for keys, values and the hidden features of the MLP."""
    return IA3Config(
        target_modules=whole_linears(model, ["k", "v", "mlp_out"]),
        feedforward_modules=whole_linears(model, ["mlp_out"]),
    )


def ln_tuning(model: nn.Module) -> PeftConfig:
    """Every LayerNorm and RMSNorm, under whatever class name a model brings its own; raises BadConfig without any."""
    names = [name for name, module in model.named_modules() if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))]
    if not names:
        raise BadConfig("adapter-target", f"{type(model).__name__} has no layer norm to train; choose another method.")
    return LNTuningConfig(target_modules="|".join(map(re.escape, names)))


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT without warnings that are no user's matter, and its BOFT without a CUDA extension.

    BOFT would try to compile that for every layer. Without it there is one butterfly factor, so that the same method is
    trained and loaded with and without a compiler.
    """
    layer: Any = peft.tuners.boft.layer
    before = layer._FBD_CUDA
    layer._FBD_CUDA = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            warnings.filterwarnings(
                "ignore", ".*is_gradient_checkpointing", FutureWarning
            )  # PEFT asks for the old name
            yield
    finally:
        layer._FBD_CUDA = before


def _narrowest(shapes: Shapes) -> int:
    return min(map(min, shapes))


def _ranks(shapes: Shapes) -> range:
    return range(1, _narrowest(shapes) + 1)


def _blocks(widths: Iterable[int]) -> list[int]:
    """Numbers above 1 that divide all widths; 1 where there is none."""
    common = math.gcd(*widths)
    return [block for block in range(2, common + 1) if common % block == 0] or [1]


def _input_blocks(shapes: Shapes) -> list[int]:
    return _blocks(inputs for _, inputs in shapes)


LORA = ("lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")

OWN = {
    "lora": PeftMethod(LoraConfig, "r", 8, _ranks, LORA, lambda r: {"lora_alpha": 2 * r}),
    "dora": PeftMethod(LoraConfig, "r", 8, _ranks, LORA, lambda r: {"lora_alpha": 2 * r, "use_dora": True}),
    "gralora": PeftMethod(
        GraloraConfig,
        "r",
        32,
        lambda shapes: range(2, _narrowest(shapes) + 1, 2),  # multiples of gralora_k
        ("alpha", "gralora_k", "hybrid_r", "gralora_dropout"),
        lambda r: {"alpha": 2 * r},
    ),
    "miss": PeftMethod(MissConfig, "r", 64, _ranks, ("mini_r", "miss_dropout", "init_weights")),
    # Up to half the smaller side of a Kronecker factor; from there on PEFT stores that factor whole.
    "lokr": PeftMethod(
        LoKrConfig,
        "r",
        8,
        lambda shapes: range(1, max(math.isqrt(_narrowest(shapes)) // 2, 1) + 1),
        ("alpha", "rank_dropout", "module_dropout", "decompose_both", "decompose_factor", "init_weights"),
        lambda r: {"alpha": r},
    ),
    "vera": PeftMethod(
        VeraConfig, "r", 256, lambda shapes: range(1, 1025), ("vera_dropout", "d_initial", "projection_prng_key")
    ),
    "c3a": PeftMethod(
        C3AConfig, "block_size", 256, lambda shapes: _blocks(n for s in shapes for n in s)[::-1], ("init_weights",)
    ),
    "fourierft": PeftMethod(
        FourierFTConfig,
        "n_frequency",
        1000,
        lambda shapes: range(1, min(map(math.prod, shapes)) + 1),
        ("scaling", "random_loc_seed", "init_weights"),
    ),
    "oft": PeftMethod(
        OFTConfig,
        "oft_block_size",
        32,
        _input_blocks,
        ("module_dropout", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    ),
    "boft": PeftMethod(BOFTConfig, "boft_block_size", 4, _input_blocks, ("boft_dropout",)),
}
