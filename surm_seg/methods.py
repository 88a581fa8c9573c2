"""Every method of fine-tuning under one name, so that a benchmark compares them through one option.

| method | trains | where |
|---|---|---|
| full | everything | the whole model |
| linear_probe | nothing | only the head trains |
| bitfit | biases | every Linear, norm and convolution |
| a structure, such as circulant | a structured change of the weight | the asked roles |
| STRUCTURE_adapter | X + GELU(S X) + b with a square structure S | after out and mlp_out |
| houlsby | a bottleneck of 64 features (arXiv 1902.00751) | after out and mlp_out |
| PEFT's own, such as lora | see `surm_seg.peft_methods` | the asked roles |

Structures take their own options, scale, dropout and overrides (see SurmConfig); houlsby takes width, scale and
dropout. All of the above start as the frozen model, except where the table of PEFT's own says otherwise.
"""

from __future__ import annotations

import bisect
import copy
import difflib
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surm_seg.errors import BadConfig, BadInput
from surm_seg.output_folder import writing
from surm_seg.peft_methods import OWN, PeftMethod, ia3, ln_tuning, quietly, refuse_unknown
from surm_seg.surm_methods import OURS, Structured, bitfit

TRAINED = "trained.safetensors"
"""File of what was trained without an adapter: tensors under their names in the model."""

WITHOUT_ADAPTER = ("full", "linear_probe")

UNSIZED: dict[str, Callable[[nn.Module], PeftConfig]] = {"bitfit": bitfit, "ln_tuning": ln_tuning, "ia3": ia3}
"""Methods without options that find their own places."""

SIZED: dict[str, Structured | PeftMethod] = {**OURS, **OWN}
"""Methods with an adapter and at most one option for its size."""


def names() -> tuple[str, ...]:
    """All methods, those without an adapter first."""
    return (*WITHOUT_ADAPTER, *sorted(UNSIZED | SIZED))


def check(method: str) -> None:
    """Raise BadConfig, with the nearest names, where there is no such method."""
    if method not in names():
        near = difflib.get_close_matches(method, names())
        hint = f"did you mean {' or '.join(near)}? There are" if near else "choose one of"
        raise BadConfig("method-name", f"There is no method {method!r}; {hint} {', '.join(names())}.")


def tuned(
    model: nn.Module,
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    roles: Sequence[str] = ("q", "v"),
    head: Sequence[str] = (),
) -> nn.Module:
    """The model, changed in place and ready to train: frozen but for the method's parameters and the head.

    Args:
        options: the method's own; what is left out has the usual value.
        roles: of `surm_seg.roles.ROLES`, for the methods that change the asked ones.
        head: names of modules, as in `named_modules`, to train whole and save with the adapter.

    Raises:
        BadConfig: an unknown method, option, role or head; or one that does not fit the model.
    """
    check(method)
    _check_head(model, head)
    options = {} if options is None else options
    try:
        if method not in SIZED:
            refuse_unknown(options, ())
        if method in WITHOUT_ADAPTER:
            return _without_adapter(model, method, head)
        sized = SIZED.get(method)
        config: Any = sized.configured(model, roles, head, options) if sized else UNSIZED[method](model)
        config.modules_to_save = list(head) or None
        with quietly():
            return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except BadConfig as error:
        raise BadConfig(error.code, f"Method {method}: {error}") from error
    except (TypeError, ValueError) as error:  # how PEFT refuses options
        raise BadConfig(
            "method-options", f"Method {method} does not fit {type(model).__name__} with options {options}: {error}"
        ) from error


def _check_head(model: nn.Module, head: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    for name in head:
        if not name or name not in modules:
            near = difflib.get_close_matches(name, modules) or [child for child, _ in model.named_children()]
            raise BadConfig(
                "method-head", f"{type(model).__name__} has no module {name!r} for a head; it has {', '.join(near)}."
            )


def _without_adapter(model: nn.Module, method: str, head: Sequence[str]) -> nn.Module:
    if method == "linear_probe" and not head:
        raise BadConfig("method-head", "Nothing but the head is trained; name its modules in head.")
    model.requires_grad_(method == "full")
    for name in head:
        model.get_submodule(name).requires_grad_()
    return model


@dataclass(frozen=True)
class Parameters:
    """Numbers of values: trained by the method, trained in the head, and in the model as it was before `tuned`."""

    method: int
    head: int
    model: int


def parameters(model: nn.Module, head: Sequence[str] = ()) -> Parameters:
    """Count what `tuned` or `load` returned; copies that PEFT trains in the place of a module count once."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    starts = tuple(f"{name}." for name in head)
    in_head = sum(n for name, n in trained.items() if ".modules_to_save." in name or name.startswith(starts))
    total = sum(p.numel() for p in model.parameters())
    added = sum(trained.values()) if isinstance(model, PeftModel) else 0
    return Parameters(sum(trained.values()) - in_head, in_head, total - added)


def options_near(
    model: nn.Module,
    method: str,
    budget: int,
    *,
    roles: Sequence[str] = ("q", "v"),
    head: Sequence[str] = (),
) -> tuple[dict[str, Any], int]:
    """The options with which a method trains nearest to `budget` values beside the head, and how many these are.

    A method has at most one option for its size; with none, its only number comes back.

    Args:
        model: to be tuned; left as it is, and one on the "meta" device will do.

    Raises:
        BadConfig: an unknown method, role or head. That PEFT takes no slices of a fused Linear is for `tuned` to say.
    """
    check(method)
    if method not in SIZED:
        return {}, parameters(tuned(_without_values(model), method, roles=roles, head=head), head).method
    sized = SIZED[method]
    places = Counter(sized.sizes(model, roles, head))
    rungs = sized.ladder(list(places))

    @functools.cache
    def count(rung: int) -> int:
        return sum(times * _trained_at(size, sized.config(rungs[rung])) for size, times in places.items())

    above = bisect.bisect_left(range(len(rungs)), budget, key=count)
    near = range(max(above - 1, 0), min(above + 1, len(rungs)))
    nearest = min(near, key=lambda rung: abs(count(rung) - budget))
    return rungs[nearest], count(nearest)


def _trained_at(size: tuple[int, int], config: Any) -> int:
    """Number of values that an adapter trains at one place, a Linear of this (out, in)."""
    config.target_modules = "place"
    with quietly():
        model = get_peft_model(nn.ModuleDict({"place": nn.Linear(size[1], size[0], device="meta")}), config)  # pyright: ignore
    return parameters(model).method


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of the model on the "meta" device, at the cost of its modules alone."""
    values = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    buffers = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return copy.deepcopy(model, {**values, **buffers})


def save(model: nn.Module, folder: Path) -> None:
    """Write what was trained, and nothing of the frozen model; raises BadInput where the disk refuses."""
    with writing(folder):
        if isinstance(model, PeftModel):
            # PEFT would look for the vocabulary's size on the hub; embeddings are only trained as a head.
            model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in _trained(model).items()}, folder / TRAINED)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What trains, with the running statistics of the same modules."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - trained
    homes = {name.rpartition(".")[0] for name in trained}
    state = model.state_dict()
    return {n: value for n, value in state.items() if n not in aliases and n.rpartition(".")[0] in homes}


def load(model: nn.Module, folder: Path) -> nn.Module:
    """The model that `save` wrote, trainable as before, out of an untouched one, which is changed in place.

    Raises:
        BadInput: nothing of ours there, a damaged file, or one of another model.
    """
    if (folder / CONFIG_NAME).is_file():
        with quietly():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=True)  # pyright: ignore
    file = folder / TRAINED
    try:
        trained = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BadInput("method-file", f"{folder} holds no adapter, and {TRAINED} is not readable: {error}.") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    foreign = [name for name, tensor in trained.items() if shapes.get(name) != tensor.shape]
    if foreign:
        raise BadInput(
            "method-file",
            f"{file} belongs to another model: {type(model).__name__} has no {foreign[0]} of shape "
            f"{tuple(trained[foreign[0]].shape)}; build the model that was trained.",
        )
    model.load_state_dict(trained, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def merged(model: nn.Module) -> nn.Module:
    """The plain model out of what `tuned` or `load` returned, its deltas in its weights.

    Raises:
        BadConfig: an adapter that acts after a module has no such form.
    """
    return model.merge_and_unload() if isinstance(model, PeftModel) else model  # pyright: ignore[reportCallIssue]
