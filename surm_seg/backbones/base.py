"""The contract of a backbone: it builds a segmentation model and names the parts an adapter can go to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from surm_seg.errors import BadConfig
from surm_seg.roles import Part
from surm_seg.roles import slices as slices_of
from surm_seg.tuner import SurmConfig

Decoder = Literal["full", "structured", "frozen"]
"""What of the decoder is trained beside the encoder's deltas; each backbone says what it means there."""

_registry: dict[str, type[Backbone]] = {}


class Segmenter(nn.Module, ABC):
    """A model that turns pixels into class logits, background first."""

    @abstractmethod
    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes h w"]:
        """Pixels normalised with the backbone's mean and standard deviation -> logits, at a lower resolution."""


class Backbone(ABC):
    """How to build one family of models. A subclass with `names` registers itself under each of them.

    Args:
        name: which member of the family.
        **options: the family's own options.
    """

    names: ClassVar[tuple[str, ...]] = ()
    patch: int
    """Side of a patch in pixels; input sizes are multiples of it."""
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    """What pixels in [0, 1] are normalised with before they enter the model."""
    roles: dict[str, Part]
    """q, k, v, out, mlp_in, mlp_out of the encoder."""

    def __init_subclass__(cls) -> None:
        _registry.update(dict.fromkeys(cls.names, cls))

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def build(self, classes: int, image_size: int, weights: str | Path) -> Segmenter:
        """A model for `classes` organs (classes + 1 logits) on square images.

        Args:
            weights: a file or folder, "auto" for the backbone's published weights, or "random".

        Raises:
            BadConfig: an image size that is not a multiple of the patch.
            BadInput: weights that are missing or belong to another backbone.
        """

    def weights_file(self, weights: str | Path) -> Path | None:
        """The file that `weights` stands for, whose SHA-256 a run records; None where there is no single one."""
        return None

    @abstractmethod
    def trained_modules(self, model: nn.Module, decoder: Decoder) -> list[str]:
        """Names of the modules that are trained whole and saved with the adapter."""

    def decoder_targets(self, decoder: Decoder) -> Iterable[str]:
        """Regular expressions of decoder modules that also receive a structure."""
        return ()

    def surm_config(
        self,
        model: nn.Module,
        *,
        structure: str,
        options: dict[str, Any],
        roles: Iterable[str],
        decoder: Decoder,
        **rest: Any,
    ) -> SurmConfig:
        """The adapter configuration for these roles of this model, with every slice written out.

        Raises:
            BadConfig: a role the backbone does not have, or that matches no Linear of the model.
        """
        chosen = tuple(roles)
        for role in chosen:
            if role not in self.roles:
                raise BadConfig("role", f"{self.name} has no role {role!r}; choose among {', '.join(self.roles)}.")
        if not chosen:
            raise BadConfig(
                "role", f"No role is chosen, nothing would be adapted; choose among {', '.join(self.roles)}."
            )
        slices = slices_of(model.named_modules(), {role: [self.roles[role]] for role in chosen}, self.name)
        targets = [*slices, *self.decoder_targets(decoder)]
        return SurmConfig(
            structure=structure,
            options=options,
            target_modules="|".join(f"(?:{t})" for t in targets),
            slices=slices,
            modules_to_save=self.trained_modules(model, decoder),
            **rest,
        )

    def _check_size(self, image_size: int) -> None:
        if image_size < self.patch or image_size % self.patch:
            raise BadConfig(
                "image-size", f"--image_size {image_size} is not a multiple of {self.patch}, the patch of {self.name}."
            )


def names() -> tuple[str, ...]:
    """All registered backbones, sorted."""
    return tuple(sorted(_registry))


def make(name: str, **options: Any) -> Backbone:
    """The backbone called `name`; raises BadConfig for an unknown name or option."""
    if name not in _registry:
        raise BadConfig("backbone-name", f"There is no backbone {name!r}; choose one of {', '.join(names())}.")
    try:
        return _registry[name](name, **options)
    except TypeError as error:
        raise BadConfig("backbone-option", f"Backbone {name} does not take these options: {error}.") from error
