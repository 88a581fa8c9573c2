"""The modules that the tuner puts in the place of frozen ones and that merge into them.

delta        W + structures on slices of a Linear's output     merges into the weight
bias         the module's own bias + a shift                   merges into the bias
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
from surm_seg.updates import Shift, Site, SiteValues, Trainable

EXAMINED = 16  # one row in so many tells how much of the deltas rounding loses
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Placed = tuple[Site, Any, Generators]
"""A site, what is trained there, and its values."""


class SurmLayer(nn.Module, BaseTunerLayer):
    """A frozen module and what its adapters add; attributes it lacks are looked up in the frozen module."""

    adapter_layer_names = ("surm_generators",)
    other_param_names = ("surm_placement",)
    sliceable: ClassVar[bool] = False
    """Whether a site may be a slice of the outputs."""
    merges_into: ClassVar[str | None] = None
    """Name of the frozen parameter that merging writes; None where nothing can be merged."""

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.module_name = module_name
        self.training = base_layer.training  # otherwise dropout would act in a model that is in eval mode
        self.surm_generators = nn.ModuleDict()
        self.surm_placement: dict[str, list[tuple[Site, Any]]] = {}
        self.merged_adapters: list[str] = []

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

    def add_adapter(self, adapter: str, sites: Sequence[Site], like: Tensor) -> None:
        """Create an adapter's values on the device of `like`, in its precision and float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        placement = [(site, self._named_trainable(site)) for site in sites]
        values = {
            f"{site.part}_{name}": nn.Parameter(value.to(like.device, dtype))
            for site, trainable in placement
            for name, value in trainable.init().items()
        }
        self.surm_placement[adapter] = placement
        self.surm_generators[adapter] = SiteValues(self.module_name, values)

    def _named_trainable(self, site: Site) -> Trainable:
        try:
            return self._trainable(site)
        except BadConfig as error:
            raise BadConfig(error.code, f"Module {self.module_name}, part {site.part}: {error}") from error

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

    def dropped(self, x: Tensor, acting: Sequence[Placed]) -> dict[float, Tensor]:
        """Probability of dropping an input of the trained branch in this forward pass -> x with those dropped."""
        chances = {site.dropout for site, _, _ in acting}
        return {p: nn.functional.dropout(x, p) if self.training and p > 0 else x for p in sorted(chances)}

    def refuse_merging(self, adapters: Sequence[str] | None, safe: bool = False) -> None:
        """Raise BadConfig where one of these adapters, by default of the active ones, cannot be merged.

        Args:
            safe: also where values are not finite.
        """
        if self.merges_into is None and self.placed(adapters):
            raise BadConfig(
                "adapter-merge",
                f"The adapter after module {self.module_name} cannot be merged into it; keep the adapted model as it "
                "is, or drop the adapter with unload().",
            )
        if safe and not all(v.isfinite().all() for _, _, values in self.placed(adapters) for v in values.values()):
            raise BadConfig(
                "adapter-not-finite",
                f"The adapter of module {self.module_name} holds values that are not finite; nothing was merged.",
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters into the frozen module; raises BadConfig where they cannot be merged."""
        self.refuse_merging(adapter_names, safe_merge)

    def unmerge(self) -> None:
        """Take the merged adapters out of the frozen module again."""
        self.merged_adapters = []


class SurmMergeable(SurmLayer):
    """A frozen module with a parameter into which its adapters can be written."""

    merges_into: ClassVar[str]
    _unmerged: Tensor | None = None

    @abstractmethod
    def _merged(self, placed: Sequence[Placed]) -> Tensor:
        """The parameter `merges_into` with these sites in it, in its own type."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As declared; the parameter's own value is kept, so that unmerging restores every bit."""
        super().merge(safe_merge, adapter_names)
        adapters = [a for a in check_adapters_to_merge(self, adapter_names) or [] if a in self.surm_placement]
        if not adapters:
            return
        parameter = getattr(self.base_layer, self.merges_into)
        with torch.no_grad():
            merged = self._merged(self.placed(adapters))
        if self._unmerged is None:
            self._unmerged = parameter.detach().clone()
        parameter.data = merged
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        if self._unmerged is not None:
            parameter = getattr(self.base_layer, self.merges_into)
            parameter.data = self._unmerged.to(parameter.device, parameter.dtype)  # the model may have moved since
            self._unmerged = None
        super().unmerge()


class SurmLinear(SurmMergeable):
    """Form "delta": a frozen nn.Linear with structured deltas on slices of its output; several adapters add up."""

    sliceable = True
    merges_into = "weight"
    _examined: tuple[list[tuple[Tensor, int]], bool] = ([], False)

    @staticmethod
    def outputs(module: nn.Module, name: str, features: int | None) -> int:
        if not isinstance(module, nn.Linear):
            raise BadConfig(
                "adapter-target", f"Module {name} is a {type(module).__name__}; a delta needs a torch.nn.Linear."
            )
        if module.weight.dtype not in FLOATS:
            raise BadConfig(
                "adapter-target", f"Module {name} is quantised ({module.weight.dtype}); load the model unquantised."
            )
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
        deltas, dropped = _deltas(acting), self.dropped(x, acting)
        if any(other is not x for other in dropped.values()) or not self._is_plain() or self._swallows(deltas):
            return self._apart(x, [dropped[site.dropout] for site, _, _ in acting], deltas)
        return structured_linear(x, self.base_layer.weight, self.base_layer.bias, deltas)

    def _is_plain(self) -> bool:
        """Whether calling the frozen module is a product with its weight and nothing else."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook")
        return type(base).forward is nn.Linear.forward and not hooked and not base.weight.is_meta

    def _swallows(self, deltas: Sequence[Delta]) -> bool:
        """Whether a weight that is stored in low precision would lose much of the deltas in one sum."""
        weight = self.base_layer.weight
        if weight.dtype.itemsize >= 4:
            return False
        if torch.compiler.is_compiling():
            return True  # the graph cannot depend on the values
        tensors = [weight, *(value for delta in deltas for value in delta.generators.values())]
        if any(tensor.is_inference() for tensor in tensors):  # they have no version
            return lost_in_rounding(weight, deltas, EXAMINED) > LOST
        known, swallowed = self._examined
        if len(known) != len(tensors) or any(
            tensor is not other or tensor._version != version
            for tensor, (other, version) in zip(tensors, known, strict=True)
        ):
            swallowed = lost_in_rounding(weight, deltas, EXAMINED) > LOST
            self._examined = [(tensor, tensor._version) for tensor in tensors], swallowed
        return swallowed

    def _apart(self, x: Tensor, inputs: Sequence[Tensor], deltas: Sequence[Delta]) -> Tensor:
        """W x + b as the frozen module computes it, beside each delta's product with an input of its own."""
        y = self.base_layer(x)
        for delta, own in zip(deltas, inputs, strict=True):
            update = delta.scale * delta.structure.matvec(delta.generators, own.to(y.dtype))
            before, after = delta.start, self.base_layer.out_features - delta.stop
            y = y + nn.functional.pad(update, (before, after)).to(y.dtype)
        return y


def _deltas(placed: Sequence[Placed]) -> list[Delta]:
    return [Delta(structure, values, site.scale, site.start, site.stop) for site, structure, values in placed]


class SurmBias(SurmMergeable):
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
