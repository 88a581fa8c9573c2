"""The modules that the tuner puts around frozen ones to work on their output, and the table of all forms.

adapter      X + GELU(S X) + b after any module                stays beside it
bottleneck   X + up(GELU(down(X))) after any module            stays beside it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from surm_seg.errors import BadConfig
from surm_seg.layers import Placed, SurmBias, SurmLayer, SurmLinear
from surm_seg.structures import make
from surm_seg.updates import Bottleneck, Site, StructuredUpdate


class SurmAfter(SurmLayer):
    """A frozen module of any kind whose output X gets updates computed from X; several adapters add up.

    The output is a tensor (..., features) or a tuple that starts with one.
    """

    @staticmethod
    def outputs(module: nn.Module, name: str, features: int | None) -> int:
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return module.normalized_shape[-1]
        if features is None:
            raise BadConfig(
                "adapter-features",
                f"Module {name} is a {type(module).__name__}, which does not say how wide its output is; set "
                "SurmConfig.features to the size of its last axis.",
            )
        return features

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        acting = self.acting()
        if not acting:
            return output
        x: Any = output[0] if isinstance(output, tuple) and output else output
        self._check(x, acting)
        y, dropped = x, self.dropped(x, acting)
        for site, update, values in acting:
            y = y + (site.scale * update(values, dropped[site.dropout])).to(x.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _check(self, x: Any, acting: Sequence[Placed]) -> None:
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        for site, _, _ in acting:
            if not shape or shape[-1] != site.stop:
                raise BadConfig(
                    "adapter-output",
                    f"Module {self.module_name} returns {shape or type(x).__name__}, but its adapter needs a tensor "
                    f"(..., {site.stop}), or a tuple that starts with one; adapt another module or set "
                    "SurmConfig.features.",
                )


class SurmAdapter(SurmAfter):
    """Form "adapter"."""

    def _trainable(self, site: Site) -> StructuredUpdate:
        return StructuredUpdate(make(site.structure, site.stop, site.stop, **site.options))


class SurmBottleneck(SurmAfter):
    """Form "bottleneck"."""

    def _trainable(self, site: Site) -> Bottleneck:
        unknown = sorted(set(site.options) - {"width"})
        if unknown:
            raise BadConfig("structure-option", f"Form 'bottleneck' has no option {unknown}; it takes ['width'].")
        return Bottleneck(site.stop, **site.options)


FORMS: dict[str, type[SurmLayer]] = {
    "delta": SurmLinear,
    "bias": SurmBias,
    "adapter": SurmAdapter,
    "bottleneck": SurmBottleneck,
}
