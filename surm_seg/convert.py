"""`surm-seg convert`: a trained LoRA -> the nearest members of a structure family, as an ordinary adapter of ours."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import Tensor

from surm_seg import SurmConfig, cli
from surm_seg.errors import BadConfig
from surm_seg.lora import PREFIX, Lora, read_lora
from surm_seg.output_folder import appearing, free
from surm_seg.structures import Generators, Structure, names, within
from surm_seg.tuner import WHOLE

BAD_FIT = 0.5
"""Mean relative error above which a conversion is not worth having: a quarter of the energy may be gone."""


@dataclass
class ConvertConfig(cli.Common):
    """Convert a trained LoRA to structured deltas.

    Args:
        output: folder for the new adapter, absent or empty; default ADAPTER-FAMILY beside the input.
        dry_run: print the table of errors only.
        adapter: folder of a PEFT LoRA (adapter_config.json and its weights), or a state dict that microsoft/LoRA saved.
        to: a structure family; several joined by commas, or all, are compared and nothing is written.
        budget: parameters that all deltas together may have, shared among the layers in proportion to in + out;
            default as many as the LoRA's.
        alpha: the LoRA's alpha, which microsoft/LoRA does not save (16 for its RoBERTa adapters).
    """

    adapter: str | None = None
    to: list[str] | str = ""
    budget: int | None = None
    alpha: float | None = None


@dataclass
class Fit:
    """The nearest members of one family.

    Args:
        structures: by module.
        generators: by module, float32.
        distances: module -> (Frobenius norm of delta - member, norm of delta).
    """

    family: str
    structures: dict[str, Structure]
    generators: dict[str, Generators] = field(default_factory=dict)
    distances: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, module: str, delta: Float[Tensor, "out in"]) -> None:
        structure = self.structures[module]
        found = {name: value.float() for name, value in structure.project(delta).items()}
        distance = torch.linalg.norm(structure.dense(found).double() - delta)
        self.distances[module] = distance.item(), torch.linalg.norm(delta).item()
        self.generators[module] = {name: value.cpu() for name, value in found.items()}

    def error(self, module: str) -> float:
        """|delta - member| / |delta|; 0 for a layer that LoRA left alone."""
        distance, norm = self.distances[module]
        return distance / norm if norm else 0.0

    @property
    def mean_error(self) -> float:
        return sum(map(self.error, self.distances)) / len(self.distances)

    @property
    def kept(self) -> float:
        """Share of the deltas' energy, the sum of their squared entries, that the members have."""
        lost, total = (sum(values[side] ** 2 for values in self.distances.values()) for side in (0, 1))
        return max(0.0, 1 - lost / total) if total else 1.0

    @property
    def parameters(self) -> int:
        return sum(structure.parameters for structure in self.structures.values())

    @property
    def verdict(self) -> str:
        energy = f"{100 * self.kept:.3g} % of the deltas' energy"
        if self.mean_error > BAD_FIT:
            return f"{self.family} is a bad fit for this adapter: it keeps {energy}; train it from scratch instead."
        return f"{self.family} keeps {energy}."


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    config = cli.parse("convert", ConvertConfig, argv, positional="adapter")
    return cli.run(lambda: convert(config), debug=config.debug)


def convert(config: ConvertConfig) -> int:
    """Run a parsed command."""
    families = _families(config)
    if config.adapter is None:
        raise BadConfig("missing-option", "Give an ADAPTER: the folder of a PEFT LoRA, or a microsoft/LoRA file.")
    if config.budget is not None and config.budget < 1:
        raise BadConfig("convert-budget", f"--budget {config.budget} must be 1 parameter or more.")
    path, device, reporter = Path(config.adapter), cli.device_named(config.device), cli.Reporter(config.quiet)
    writes = len(families) == 1 and not config.dry_run
    output = free(config.output or _beside(path, families[0]), "convert") if writes else None
    lora = read_lora(path, config.alpha)
    spent = sum(factors.parameters for factors in lora.factors.values())
    budget = config.budget or spent
    reporter.say(f"{path}: LoRA on {len(lora.factors)} layers, {spent:,} parameters; the budget is {budget:,}")
    fits, left_out = _fits(lora, families, budget, device, reporter)
    if not fits:
        raise BadConfig("convert-fit", " ".join(left_out))
    reporter.say(error_table(fits))
    for sentence in (*left_out, *(fit.verdict for fit in fits)):
        reporter.say(sentence)
    if output is None:
        reporter.say("Nothing was written; name one family with --to, without --dry_run, to write its adapter.")
        return 0
    write(output, lora, fits[0])
    model = lora.settings.get("base_model_name_or_path") or "the model that the LoRA was trained on"
    reporter.say(
        f"{output} holds the adapter; model being {model}, load it by\n\n"
        "import surm_seg  # before PEFT reads the adapter\nfrom peft import PeftModel\n"
        f"model = PeftModel.from_pretrained(model, {str(output)!r})"
    )
    return 0


def _fits(
    lora: Lora, families: Sequence[str], budget: int, device: str, reporter: cli.Reporter
) -> tuple[list[Fit], list[str]]:
    """The families' nearest members, and a sentence about every family that has none."""
    left_out: list[str] = []
    fits: list[Fit] = []
    for family in families:
        try:
            fits.append(Fit(family, _members(lora, family, budget)))
        except BadConfig as error:
            left_out.append(f"{family} is left out: {error}")
    for module, factors in reporter.track(lora.factors.items(), "projecting", len(lora.factors)):
        delta = factors.delta(device)
        for fit in tuple(fits):
            try:
                fit.add(module, delta)
            except BadConfig as error:
                fits.remove(fit)
                left_out.append(f"{fit.family} is left out: {error}")
    return fits, left_out


def _members(lora: Lora, family: str, budget: int) -> dict[str, Structure]:
    """Module -> the family's largest structure within the layer's share; raises BadConfig where none fits."""
    total = sum(sum(factors.out_in) for factors in lora.factors.values())
    members = {}
    for module, factors in lora.factors.items():
        try:
            members[module] = within(family, *factors.out_in, budget * sum(factors.out_in) // total)
        except BadConfig as error:
            sentence = f"{str(error).rstrip('.')}, at layer {module}; give a larger --budget."
            raise BadConfig(error.code, sentence) from error
    return members


def error_table(fits: Sequence[Fit]) -> str:
    """Relative Frobenius errors as plain text: a line per module and one for the mean, the families side by side."""
    lines = [["relative error", *(fit.family for fit in fits)]]
    lines.append(["parameters", *(f"{fit.parameters:,}" for fit in fits)])
    lines += [[module, *(f"{fit.error(module):.4f}" for fit in fits)] for module in fits[0].distances]
    lines.append(["mean", *(f"{fit.mean_error:.4f}" for fit in fits)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    rule = "-" * len(shown[0])
    return "\n".join([*shown[:2], rule, *shown[2:-1], rule, shown[-1]])


def write(output: Path, lora: Lora, fit: Fit) -> None:
    """Write the adapter's folder, complete or not at all; raises BadInput where that is impossible."""
    config = SurmConfig(structure=fit.family, inference_mode=True, **_options(fit), **lora.settings)
    tensors = {f"{PREFIX}{name}": value.clone().contiguous() for name, value in lora.whole.items()}
    for module, generators in fit.generators.items():
        for name, value in generators.items():
            tensors[f"{PREFIX}{module}.surm_generators.{WHOLE}_{name}"] = value.contiguous()
    with appearing(output, "convert") as partial:
        config.save_pretrained(str(partial))
        (partial / SAFETENSORS_WEIGHTS_NAME).write_bytes(save(tensors, {"format": "pt"}))


def _options(fit: Fit) -> dict[str, Any]:
    """The most frequent options, and what differs by module."""
    options = [structure.options for structure in fit.structures.values()]
    common = max(options, key=options.count)
    # ^ keeps PEFT's patterns, which match endings, to this one module.
    overrides = {
        f"^{re.escape(module)}": {"structure": fit.family, "options": structure.options}
        for module, structure in fit.structures.items()
        if structure.options != common
    }
    return {"options": common, "overrides": overrides} if overrides else {"options": common}


def _families(config: ConvertConfig) -> list[str]:
    """The names of --to; raises BadConfig for none, or an unknown one."""
    asked = config.to.split(",") if isinstance(config.to, str) else config.to
    asked = list(names()) if asked == ["all"] else list(dict.fromkeys(name.strip() for name in asked))
    unknown = sorted(set(asked) - set(names()))
    if unknown or not asked:
        shown = ", ".join(filter(None, unknown)) or "nothing"
        raise BadConfig("convert-family", f"--to names {shown}; choose among all, {', '.join(names())}.")
    return asked


def _beside(path: Path, family: str) -> Path:
    path = path.resolve()
    return path.with_name(f"{path.name if path.is_dir() else path.stem}-{family}")


if __name__ == "__main__":
    sys.exit(main())
