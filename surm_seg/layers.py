"""The modules that the tuner puts in the place of frozen ones; one class for each form of adapter.

delta        W + structures on slices of a Linear's output     merges into the weight
bias         the module's own bias + a shift                   merges into the bias
adapter      X + GELU(S X) + b after any module                stays beside it
bottleneck   X + up(GELU(down(X))) after any module            stays beside it
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from surm_seg.errors import BadConfig
from surm_seg.kernel import LOST, Delta, add_deltas, lost_in_rounding, structured_linear
from surm_seg.structures import Generators, Structure, make
from surm_seg.updates import Bottleneck, Shift, Site, SiteValues, StructuredUpdate, Trainable

Placed = tuple[Site, Any, Generators]
"""A site, what is trained there, and its values."""


class SurmLayer(nn.Module, BaseTunerLayer):
    """A frozen module and what its adapters add; attributes it lacks are looked up in the frozen module."""

    adapter_layer_names = ("surm_generators",)
    other_param_names = ("surm_placement",)
    sliceable: ClassVar[bool] = False
    """Whether a site may be a slice of the outputs."""
    merges_into: ClassVar[str | None] = None
    """Name of the frozen parameter that merging writes."""

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.module_name = module_name
        self.training = base_layer.training  # otherwise dropout would act in a model that is in eval mode
        self.surm_generators = nn.ModuleDict()
        self.surm_placement: dict[str, list[tuple[Site, Any]]] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)

    @staticmethod
    @abstractmethod
    def outputs(module: nn.Module, name: str, features: int | None) -> int:
        """Number of output features of a module to adapt; raises BadConfig where this form does not fit it."""

    @abstractmethod
    def _trainable(self, site: Site) -> Trainable:
        """What is trained at a site."""

    def _merged(self, placed: Sequence[Placed]) -> Tensor:
        """The parameter `merges_into` with these sites in it, in its own type."""
        raise NotImplementedError

    def add_adapter(self, adapter: str, sites: Sequence[Site], like: Tensor) -> None:
        """Create an adapter's values on the device of `like`, in its precision and float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        placement = [(site, self._trainable(site)) for site in sites]
        values = {
            f"{site.part}_{name}": nn.Parameter(value.to(like.device, dtype))
            for site, trainable in placement
            for name, value in trainable.init().items()
        }
        self.surm_placement[adapter] = placement
        self.surm_generators[adapter] = SiteValues(self.module_name, values)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's would also round the values to the precision of the frozen module.
        home = next((p.device for p in self.base_layer.parameters()), None) if device is None else device
        if home is not None and adapter_name in self.surm_generators:
            self.surm_generators[adapter_name].to(home)

    def placed(self, adapters: Sequence[str] | None = None) -> list[Placed]:
        """The sites of these adapters on this module, of the active ones by default."""
        return [
            (site, trainable, {n: getattr(self.surm_generators[a], f"{site.part}_{n}") for n in trainable.generators})
            for a in (self.active_adapters if adapters is None else adapters)
            for site, trainable in self.surm_placement.get(a, ())
        ]

    def acting(self) -> list[Placed]:
        """The sites that a forward pass has to compute: none while disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return [] if self.disable_adapters or self.merged else self.placed()

    def dropout(self, acting: Sequence[Placed]) -> float:
        """Probability of dropping an input of the trained branch in this forward pass."""
        return max(site.dropout for site, _, _ in acting) if self.training else 0.0

    def refuse_merging(self, adapters: Sequence[str] | None) -> None:
        """Raise BadConfig where one of these adapters, by default of the active ones, cannot be merged."""
        if self.merges_into is None and self.placed(adapters):
            raise BadConfig(
                "adapter-merge",
                f"The adapter after module {self.module_name} cannot be merged into it; keep the adapted model as it "
                "is, or drop the adapter with unload().",
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters into the frozen module; its own value is kept, so that unmerging restores every bit."""
        self.refuse_merging(adapter_names)
        adapters = [a for a in check_adapters_to_merge(self, adapter_names) or [] if a in self.surm_placement]
        if not adapters or self.merges_into is None:
            return
        parameter = getattr(self.base_layer, self.merges_into)
        with torch.no_grad():
            merged = self._merged(self.placed(adapters))
        if safe_merge and not torch.isfinite(merged).all():
            raise BadConfig(
                "adapter-not-finite", f"Adapters {adapters} hold values that are not finite; nothing was merged."
            )
        if self._unmerged is None:
            self._unmerged = parameter.detach().clone()
        parameter.data = merged
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        if self._unmerged is not None and self.merges_into is not None:
            getattr(self.base_layer, self.merges_into).data = self._unmerged
            self._unmerged = None
        self.merged_adapters = []


class SurmLinear(SurmLayer):
    """Form "delta": a frozen nn.Linear with structured deltas on slices of its output; several adapters add up."""

    sliceable = True
    merges_into = "weight"
    _examined: tuple[list[tuple[int, int]], bool] = ([], False)

    @staticmethod
    def outputs(module: nn.Module, name: str, features: int | None) -> int:
        if not isinstance(module, nn.Linear):
            raise BadConfig(
                "adapter-target", f"Module {name} is a {type(module).__name__}; a delta needs a torch.nn.Linear."
            )
        if not module.weight.is_floating_point():
            raise BadConfig("adapter-target", f"Module {name} is quantised; load the model in floating point.")
        return module.out_features

    def _trainable(self, site: Site) -> Structure:
        return make(site.structure, site.stop - site.start, self.base_layer.in_features, **site.options)

    def _merged(self, placed: Sequence[Placed]) -> Tensor:
        weight, deltas = self.base_layer.weight, _deltas(placed)
        lost = lost_in_rounding(weight, deltas) if weight.dtype.itemsize < 4 else 0.0
        if lost > LOST:
            warnings.warn(
                f"Merging into {self.module_name} loses {lost:.0%} of the deltas, which are small against the "
                f"precision of its {weight.dtype} weight; load the model in float32 to merge.",
                stacklevel=2,
            )
        return add_deltas(weight, deltas)

    def deltas(self, adapters: Sequence[str] | None = None) -> list[Delta]:
        """The deltas of these adapters, of the active ones by default."""
        return _deltas(self.placed(adapters))

    def forward(self, x: Tensor) -> Tensor:
        acting = self.acting()
        if not acting:
            return self.base_layer(x)
        deltas, dropout = _deltas(acting), self.dropout(acting)
        if dropout > 0:
            return self._two_branches(x, nn.functional.dropout(x, dropout), deltas)
        if self._swallows(deltas):
            return self._two_branches(x, x, deltas)
        return structured_linear(x, self.base_layer.weight, self.base_layer.bias, deltas)

    def _swallows(self, deltas: Sequence[Delta]) -> bool:
        """Whether a weight that is stored in low precision would lose much of the deltas in one sum."""
        weight = self.base_layer.weight
        if weight.dtype.itemsize >= 4:
            return False
        if torch.compiler.is_compiling():
            return True  # the graph cannot depend on the values
        versions = [(id(value), value._version) for delta in deltas for value in delta.generators.values()]
        if self._examined[0] != versions:
            with torch.no_grad():
                self._examined = versions, lost_in_rounding(weight, deltas) > LOST
        return self._examined[1]

    def _two_branches(self, x: Tensor, dropped: Tensor, deltas: list[Delta]) -> Tensor:
        """W x + b beside the deltas of the dropped input: dropout cannot be folded into one product."""
        y = self.base_layer(x)
        for delta in deltas:
            update = delta.scale * delta.structure.matvec(delta.generators, dropped.to(y.dtype))
            before, after = delta.start, self.base_layer.out_features - delta.stop
            y = y + nn.functional.pad(update, (before, after)).to(y.dtype)
        return y


def _deltas(placed: Sequence[Placed]) -> list[Delta]:
    return [Delta(structure, values, site.scale, site.start, site.stop) for site, structure, values in placed]


class SurmBias(SurmLayer):
    """Form "bias": a frozen module whose bias is shifted (BitFit, arXiv 2106.10199)."""

    merges_into = "bias"

    @staticmethod
    def outputs(module: nn.Module, name: str, features: int | None) -> int:
        bias = getattr(module, "bias", None)
        if not isinstance(bias, nn.Parameter):
            raise BadConfig("adapter-target", f"Module {name} is a {type(module).__name__} without a bias to shift.")
        return bias.numel()

    def _trainable(self, site: Site) -> Shift:
        return Shift(tuple(self.base_layer.bias.shape))

    def _merged(self, placed: Sequence[Placed]) -> Tensor:
        bias = self.base_layer.bias
        return sum((site.scale * values["shift"] for site, _, values in placed), start=bias).to(bias.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = self.acting()
        if not acting:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, {"bias": self._merged(acting)}, args, kwargs)


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
        dropout = self.dropout(acting)
        y, dropped = x, nn.functional.dropout(x, dropout) if dropout > 0 else x
        for site, update, values in acting:
            y = y + (site.scale * update(values, dropped)).to(x.dtype)
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
