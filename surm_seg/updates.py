"""What an adapter trains at one place of a model: its site, its values, and the updates that are no plain matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surm_seg.errors import BadConfig, BadInput
from surm_seg.kernel import Delta, structured_linear
from surm_seg.structures import Generators, Structure


@dataclass(frozen=True)
class Site:
    """What one adapter puts on the outputs [start, stop) of a module."""

    part: str
    start: int
    stop: int
    structure: str
    options: dict[str, Any]
    scale: float
    dropout: float


class SiteValues(nn.ParameterDict):
    """The values of one adapter at one module; refuses to load what is not finite or has another shape.

    Raises:
        BadInput: while a state dict is loaded, or a parameter assigned, naming the module.
    """

    def __init__(self, module_name: str, values: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.module_name = module_name
        self.update(values)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, own in self._parameters.items():
            if own is not None and prefix + name in state_dict:
                self._check(name, state_dict[prefix + name], own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # transformers' load_adapter loads no state dict: it assigns one parameter after the other.
        if param is not None:
            self._check(name, param, param.shape)
        super().register_parameter(name, param)

    def _check(self, name: str, value: Tensor, shape: torch.Size) -> None:
        if value.shape != shape:
            raise BadInput(
                "adapter-shape",
                f"The adapter's {name} of module {self.module_name} is {tuple(value.shape)}, not {tuple(shape)}; load "
                "it with its own configuration, on the model it was trained on.",
            )
        if not value.is_meta and not torch.isfinite(value).all():
            raise BadInput(
                "adapter-not-finite",
                f"The adapter's {name} of module {self.module_name} holds values that are not finite; restore the "
                "file, or train the adapter again.",
            )


@dataclass(frozen=True)
class Shift:
    """A bias to add."""

    shape: tuple[int, ...]

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        return {"shift": self.shape}

    def init(self) -> Generators:
        return {"shift": torch.zeros(self.shape)}


@dataclass(frozen=True)
class StructuredUpdate:
    """GELU(S x) + b with a square structure S: the adapter of SURM (arXiv 2406.17740) without a bottleneck.

    Trains the structure's generators and one bias per feature; exactly 0 at the start.
    """

    structure: Structure

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        return {**self.structure.generators, "bias": (self.structure.out_features,)}

    def init(self) -> Generators:
        return {**self.structure.init(), "bias": torch.zeros(self.structure.out_features)}

    def __call__(self, values: Generators, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        generators = {name: values[name] for name in self.structure.generators}
        delta = Delta(self.structure, generators, 1.0, 0, self.structure.out_features)
        return nn.functional.gelu(structured_linear(x, None, None, [delta])) + values["bias"].to(x.dtype)


@dataclass(frozen=True)
class Bottleneck:
    """up(GELU(down(x))), both with biases: the adapter of Houlsby et al. (arXiv 1902.00751); exactly 0 at the start.

    Args:
        features: of x.
        width: of the bottleneck, in features; trains 2 * width * features + width + features values.
    """

    features: int
    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise BadConfig("structure-option", f"bottleneck width {self.width} must be 1 or more.")

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        return {
            "down": (self.width, self.features),
            "down_bias": (self.width,),
            "up": (self.features, self.width),
            "up_bias": (self.features,),
        }

    def init(self) -> Generators:
        values = {name: torch.zeros(shape) for name, shape in self.generators.items()}
        values["down"].normal_(std=self.features**-0.5)
        return values

    def __call__(self, values: Generators, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        cast = {name: value.to(x.dtype) for name, value in values.items()}
        hidden = nn.functional.gelu(nn.functional.linear(x, cast["down"], cast["down_bias"]))
        return nn.functional.linear(hidden, cast["up"], cast["up_bias"])


Trainable = Structure | Shift | StructuredUpdate | Bottleneck
"""What a site trains: each has named `generators` and their start values from `init`."""
