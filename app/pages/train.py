"""Train: choose data, structure and budget, see what it will take, start it, watch it, stop it, go on with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import streamlit as st

from app import choice, demo, jobs, preparing, screen
from app.workspace import Run, Workspace
from surm_seg import backbones, structures

POLL = "2s"
PHANTOM = "phantom"
BUDGETS = {"quick look": 100, "demo": 200, "thorough": 1000, "long": 3000}
"""Optimiser steps."""

SIZES = (128, 256, 384, 512, 1024)
FEWEST_STEPS = 3
"""Of a run, for its speed to be known."""

ESTIMATE_SECONDS = 180
"""Longest that a dry run may take: it reads the data set's digests and builds the model."""


@dataclass(frozen=True)
class Plan:
    """What is about to be trained.

    Args:
        name: of the run's folder.
        words: for `surm-seg train`, besides --output.
        pixels: of all slices of a step.
    """

    name: str
    words: tuple[str, ...]
    backbone: str
    steps: int
    pixels: int


def show() -> None:
    workspace = Workspace()
    screen.title("Train", "a few thousand structured parameters beside a frozen backbone")
    left, right = st.columns([2, 3], gap="large")
    with left, screen.sentences():
        plan = form(workspace)
        if plan:
            ask(workspace, plan)
    with right, screen.sentences():
        watch(workspace)


def form(workspace: Workspace) -> Plan | None:
    """The choices; None while they are not complete."""
    datasets, broken = workspace.datasets()
    for sentence in broken:
        st.warning(screen.plain(sentence))
    known = {dataset.folder.name: f"{len(dataset.split('train'))} training cases" for dataset in datasets}
    sets: list[str] = list(dict.fromkeys([*known, PHANTOM]))
    data = st.selectbox(
        "Data",
        sets,
        format_func=lambda name: f"{name}  ·  {known.get(name, '16 generated patients, made on first use')}",
        help="Prepared data sets below data/ of this workspace",
    )
    preparing.form(workspace)
    first, second = st.columns(2)
    every = structures.names()
    structure = first.selectbox("Structure", every, index=every.index("circulant") if "circulant" in every else 0)
    backbone = second.selectbox("Backbone", backbones.names())
    weights = st.text_input("Weights", "auto", help="auto, random, or a file on this machine") or "auto"
    budget = st.segmented_control(
        "Budget", list(BUDGETS), default="demo", required=True, format_func=lambda name: f"{name}, {BUDGETS[name]:,}"
    )
    third, fourth = st.columns(2)
    steps = int(third.number_input("Steps", 1, 1_000_000, BUDGETS[budget], key=f"steps {budget}"))
    size = fourth.selectbox("Image size", SIZES, index=SIZES.index(384), help="Side of the model's input in pixels")
    with st.expander("More"):
        batch = int(st.number_input("Batch size", 1, 256, 8))
        rate = float(st.number_input("Learning rate", 1e-6, 1.0, 2e-3, format="%.6f"))
        seed = int(st.number_input("Seed", 0, 2**31 - 1, 0))
        alone = st.checkbox("No held-out cases: score the training cases (shows that the pipe is whole, nothing more)")
    name = st.text_input("Name of the run", free_name(workspace, structure), max_chars=40)
    if not preparing.NAME.fullmatch(name):
        st.error("A run's name is made of letters, digits, - and _; choose another.  \n`run-name`")
        return None
    words = ["--data", PHANTOM if data not in known else str(workspace.folder / "data" / data)]
    words += ["--structure", structure, "--backbone", backbone, "--weights", weights, "--image_size", str(size)]
    words += ["--steps", str(steps), "--batch_size", str(batch), "--learning_rate", f"{rate:g}", "--seed", str(seed)]
    words += ["--warmup", str(min(20, steps // 5)), "--validate_every", str(min(100, steps))]
    words += ["--checkpoint_every", str(max(1, min(100, steps // 4)))]
    if alone:
        words += ["--validate_on", "none", "--score_on", "train"]
    return Plan(name, tuple(words), backbone, steps, batch * size * size)


def free_name(workspace: Workspace, structure: str) -> str:
    """A name that no run has yet."""
    taken = {run.name for run in workspace.runs()}
    return next(name for n in range(1, 10_000) if (name := f"{structure}-{n}") not in taken)


def ask(workspace: Workspace, plan: Plan) -> None:
    """Estimate and start."""
    output = workspace.folder / "runs" / plan.name
    with st.container(horizontal=True):
        wanted = st.button("Estimate")
        started = st.button("Start training", type="primary")
    if started:
        if output.exists():
            st.error(f"There is a run called {plan.name}; choose another name, or resume it.  \n`run-exists`")
            return
        jobs.start("train", [*plan.words, "--output", str(output)], workspace.folder / "jobs", work=workspace.folder)
        choice.remember(watched=plan.name)
        deadline = time.monotonic() + 10  # until the run's folder is there to be watched
        while not output.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        st.rerun()
    if wanted:
        with st.spinner("Building the model and checking the data"):
            st.session_state["estimate"] = (plan, estimate(workspace, plan))
    asked, lines = st.session_state.get("estimate", (None, ()))
    if asked == plan:
        st.markdown("\n".join(f"- {line}" for line in lines))


def estimate(workspace: Workspace, plan: Plan) -> list[str]:
    """What `surm-seg train --dry-run` finds out, and the time by this machine's earlier runs of the backbone."""
    words = [sys.executable, "-m", "surm_seg.train", *plan.words, "--output", f"runs/{plan.name}", "--dry-run"]
    try:
        done = subprocess.run(words, cwd=workspace.folder, capture_output=True, text=True, timeout=ESTIMATE_SECONDS)
    except subprocess.TimeoutExpired:
        return ["The dry run took too long to wait for; start the training, or choose smaller data."]
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        return [screen.plain(said[-1]) if said else "The dry run stopped without a word."]
    counted = re.search(r"([\d,]+) encoder adapter \+ ([\d,]+) decoder parameters trained of ([\d,]+)", done.stdout)
    lines = ["Parameters: they are counted once the patients are generated."]
    if counted:
        lines = [f"Parameters: {counted[1]} in the encoder, {counted[2]} in the decoder, of {counted[3]}."]
    lines += [f"Memory: {found[1]} GB for a step." for line in said if (found := re.search(r"about ([\d.]+) GB", line))]
    return [*lines, duration(workspace.runs(), plan)]


def duration(runs: Sequence[Run], plan: Plan) -> str:
    """The time of a plan, by this backbone's run whose steps are most like it: a step costs as its pixels do."""
    known = []
    for run in runs:
        seconds = [line["seconds"] for line in records(run.folder)]
        steps = [after - before for before, after in pairwise(seconds) if after > before]
        if run.options.get("backbone") == plan.backbone and len(steps) >= FEWEST_STEPS:
            share = plan.pixels / (int(run.options["batch_size"]) * int(run.options["image_size"]) ** 2)
            known.append((max(share, 1 / share), share, median(steps), run.name))
    if not known:
        return f"Time: no run of {plan.backbone} was made here yet to judge by."
    _, share, step, name = min(known)
    minutes = step * share * plan.steps / 60
    return f"Time: about {minutes:.1f} min and the scoring, by the {step:.2f} s that a step of {name} took here."


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def watch(workspace: Workspace) -> None:
    """The runs of this workspace; one of them with its curves."""
    runs = workspace.runs()
    if not runs:
        st.info("No run yet. The demo's choices are set: start it, and its curves appear here.")
        return
    names = [run.name for run in runs]
    before = choice.remembered("watched")
    name = st.selectbox("Run", names, index=names.index(before) if before in names else 0, key="watched menu")
    choice.remember(watched=name)
    curves(workspace, name)


@st.fragment(run_every=POLL)
@screen.guarded
def curves(workspace: Workspace, name: str) -> None:
    """Loss and validation as they grow, and what can be done with the run."""
    run = workspace.run(name)
    if run is None:
        st.info("This run is gone.")
        return
    job = demo.training(workspace, f"runs/{name}")
    log, total = records(run.folder), int(run.options.get("steps", 0))
    running = job is not None and job.state == "running"
    step = int(log[-1]["step"]) if log else 0
    state = "training" if running else "finished" if not run.problem else "stopped"
    st.progress(min(1.0, step / total) if total else 0.0, f"{state}: step {step:,} of {total:,}  ·  {run.described}")
    losses = [{"step": line["step"], "loss": line["loss"]} for line in log if "loss" in line]
    scores = [{"step": line["step"], "Dice": line["score"]} for line in log if "score" in line]
    first, second = st.columns(2)
    with first:
        st.caption("Loss")
        if losses:
            st.line_chart(losses, x="step", y="loss", height=210)
    with second:
        st.caption("Dice of the validation cases")
        if scores:
            st.line_chart(scores, x="step", y="Dice", height=210)
    with st.container(horizontal=True):
        if running and job and st.button("Stop", help="It finishes the step and saves; resume goes on from there."):
            job.cancel()
        resumable = not running and bool(run.problem) and bool(run.options)
        if resumable and st.button("Resume", type="primary"):
            words = ["--config", str(run.folder / "config.yaml"), "--output", str(run.folder), "--resume"]
            jobs.start("train", words, workspace.folder / "jobs", work=workspace.folder)
            st.rerun(scope="fragment")
    if job is not None and job.state == "failed":
        st.error(screen.plain(job.trouble))
    if job is not None:
        with st.expander("What it says"):
            st.code("\n".join(map(screen.plain, job.log_tail(30))) or "nothing yet", language=None)


show()
