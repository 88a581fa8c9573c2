"""The tables of a search: what each place was given, and what each trial came to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines import search
from pipelines.studies.picture import page, scatter
from pipelines.studies.table import Found, Row, markdown
from surm_seg.trials import FAILED, REDUCTION, Plan, Result, front


def of_places(
    families: Sequence[str],
    places: Sequence[search.Place],
    choices: Sequence[Sequence[search.Member]],
    chosen: Sequence[search.Member | None],
    budget: int,
    given: str,
    train: Path,
) -> Found:
    """What a search by gradient found.

    Args:
        given: what it was run with.
        train: file that trains it.
    """
    energy = sum(place.energy for place in places) or 1.0
    rows: list[Row] = [
        {
            "place": f"{place.module}.{place.part}",
            "share of the gradient": f"{place.energy / energy:.3f}",
            "structure": member.structure if member else "none",
            "options": json.dumps(member.options)[1:-1] if member else "",
            "parameters": f"{member.parameters:,}" if member else "0",
            "captured": f"{member.captured / place.energy:.3f}" if member and place.energy else "",
        }
        for place, member in zip(places, chosen, strict=True)
    ]
    alike = {family: search.uniform(choices, family, budget) for family in families}
    arms = {"mixture": [m for m in chosen if m], **{name: found for name, found in alike.items() if found}}
    compared = [
        {
            "structure": name,
            "parameters": sum(m.parameters for m in arm),
            "captured": sum(m.captured for m in arm) / energy,
        }
        for name, arm in arms.items()
    ]
    shown = [
        {"structure": one["structure"], "parameters": f"{one['parameters']:,}", "captured": f"{one['captured']:.3f}"}
        for one in compared
    ]
    notes = [
        "Captured: of the squared mean gradient of the loss, the share that the nearest member holds; in the second "
        "table of all places together, beside the same structure and options everywhere within the budget. It speaks "
        "of a first step along the gradient, not of a whole training.",
        f"surm-seg train --config {train} trains this mixture.",
    ]
    figures = {
        "budget": budget,
        "places": [
            {"module": place.module, "part": place.part, "energy": place.energy, "chosen": member and asdict(member),
             "members": [asdict(one) for one in offered]}
            for place, member, offered in zip(places, chosen, choices, strict=True)
        ],
        "compared": compared,
    }  # fmt: skip
    return Found(given, [markdown(rows), markdown(shown)], figures, notes, ("torch", "transformers", "peft"))


def of_trials(plan: Plan, results: Sequence[Result], train: Path) -> Found:
    """What a search by training found.

    Args:
        train: file that trains the best.
    """
    best = front(results)
    scored = [one for one in results if one.score is not None]
    order = sorted(scored, key=lambda one: (one not in best, one.trial.parameters, -(one.score or 0.0)))
    rows: list[Row] = [
        {
            "front": "yes" if one in best else "",
            "structure": one.trial.structure,
            "options": json.dumps(one.trial.options)[1:-1],
            "roles": ", ".join(one.trial.roles),
            "rate": f"{one.trial.rate:g}",
            "parameters": f"{one.trial.parameters:,}",
            "validation": f"{one.score:.3f}",
            "steps": f"{one.steps} {one.outcome}",
        }
        for one in order
    ]
    paragraphs = [markdown(rows) if rows else "No trial came to a validation."]
    paragraphs += [f"Failed: {plan.folder(one.trial).name} {one.why}" for one in results if one.outcome == FAILED]
    notes = [
        "Front: no other trial has a better validation score with as few parameters. Parameters: of the deltas, "
        "without the head. Validation: the best of a trial's validations with one seed, so that the front is "
        "optimistic; the test set was not read. stopped: by ASHA, which compares trials of like size at "
        f"{plan.rung} and {plan.rung * REDUCTION} of {plan.steps} steps.",
        f"surm-seg train --config {train} trains the best of them.",
    ]
    figures = {
        "trials": [asdict(one) | {"front": one in best} for one in results],
        "steps": plan.steps, "rung": plan.rung, "words": plan.words,
    }  # fmt: skip
    pictures: Mapping[str, str] = {}
    if best:
        names = {f"{one.trial.structure} {'+'.join(one.trial.roles)} {one.trial.parameters:,}": one for one in best}
        named = {name: (float(one.trial.parameters), float(one.score or 0.0), 0.0) for name, one in names.items()}
        others = [(float(one.trial.parameters), float(one.score or 0.0)) for one in scored if one not in best]
        panel = scatter("validation score", "trained parameters besides the head", named, others=others, stairs=True)
        pictures = {"picture.svg": page([[panel]])}
    given = (
        f"{len(results)} trials drawn with seed {plan.seed} from {', '.join(plan.families)}; roles among "
        f"{', '.join(plan.shapes)}; sizes {plan.sizes[0]:g} to {plan.sizes[1]:g} times rank 1; learning rates "
        f"{plan.rates[0]:g} to {plan.rates[1]:g}; surm-seg train {' '.join(plan.words)}."
    )
    return Found(given, paragraphs, figures, notes, ("torch", "transformers", "peft"), pictures)
