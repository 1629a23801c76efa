"""Look at what was learned: dreams, evaluation in the real environment, figures and the report.

    python play.py --run runs/crafter            a game in the browser: dream beside reality
    python play.py eval --run runs/crafter       world model and agents, into results.json
    python play.py world --run runs/crafter      more on the world model: rules, interactions, K
    python play.py labels --run A --with none=B  what part of the actions' labels does
    python play.py bench                         speeds at pinned shapes
    python play.py dream --run runs/crafter      a GIF: context, imagined and real side by side
    python play.py report --run runs/crafter     one page: report.md with pictures
Judge rollouts and real episodes, not losses: PSNR per horizon with true and shuffled actions, the
ladder score of sampled policies on unseen worlds, with 95 % intervals.
"""

import argparse
import base64
import copy
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import socketserver
import sys
import tempfile
import threading
import time
import webbrowser
import zlib
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import imageio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from agent import (
    STAGES,
    autocast,
    freeze,
    imagine_rollout,
    load_run,
    pick_device,
    pick_dtype,
    sample_action,
    split_logits,
)
from data import (
    Dataset,
    UserError,
    VecEnv,
    branch_off,
    can_copy,
    controls,
    copy_env,
    finish_dataset,
    make_env,
    play_episode,
    ratio,
    read_json,
    record,
    run_cli,
    work,
    write_episode,
    write_whole,
)
from dynamics import Dream, euler_sample
from envs.crafter import symbol_counts
from tokenizer import Cache

HORIZONS = (1, 4, 8, 16, 32, 64)
REFERENCE_SEED, VALIDATION_SEED, TEST_SEED = 10_000, 20_000, 30_000
TEMPERATURES = (1.0, 0.75, 0.5, 0.3)
FILM = 1000                 # most frames of an episode's GIF
GREEN, ORANGE = (60, 170, 90), (240, 140, 20)           # borders: real, imagined


# --------------------------------------------------------------------- intervals, results.json

def wilson(successes, n):
    """95 % Wilson interval of a success rate."""
    z, p = 1.96, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(low, 0.0), min(high, 1.0)


def mean_interval(x):
    """Mean and its 95 % normal interval: x (n,) -> value, low, high."""
    half = 1.96 * np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return float(np.mean(x)), float(np.mean(x) - half), float(np.mean(x) + half)


def bootstrap(statistic, *samples, block=1, n=2000):
    """Value and 95 % interval of statistic(*samples) when blocks of rows are drawn again: the
    `block` clips of an episode stay together, since they are alike."""
    rng, blocks = np.random.default_rng(0), len(samples[0]) // block
    rows = rng.integers(blocks, size=(n, blocks, 1)) * block + np.arange(block)
    draws = [statistic(*(s[i] for s in samples)) for i in rows.reshape(n, -1)]
    return float(statistic(*samples)), *map(float, np.percentile(draws, [2.5, 97.5]))


def write_json(path, values):
    """Atomically: a reader sees the old file or the new one."""
    write_whole(Path(path), lambda file: file.write(json.dumps(values, indent=1).encode()))


def read_results(folder):
    path = Path(folder) / "results.json"
    return read_json(path) if path.exists() else {}


def read_metrics(folder):
    """The lines of metrics.jsonl; one that was cut off while it was written is left out."""
    path, lines = Path(folder) / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"Left out of {path}: a line that is cut off.", file=sys.stderr)
    return lines


def add_results(folder, command, entries, instead_of=()):
    """entries: {name: (value, low, high, n, unit)}; merged into folder/results.json, where names
    that begin with `instead_of` go."""
    results = {k: x for k, x in read_results(folder).items() if not k.startswith(instead_of)}
    for name, (value, low, high, n, unit) in entries.items():
        results[name] = {"value": value, "low": low, "high": high, "n": n, "unit": unit,
                         "command": command}
    write_json(Path(folder) / "results.json", results)


# ---------------------------------------------------------------------------- the world model

def reference_set(env, episodes=40, length=300, workers=0, path=""):
    """Recorded play that is never trained on: the dataset at path, or recorded at first."""
    if path:
        return Dataset(path)
    path = Path("datasets") / f"{env.replace(':', '_')}_reference_{episodes}x{length}"
    return record(env, path, episodes, length, REFERENCE_SEED, workers)


def reference_clips(dataset, per_episode, length, device):
    """Evenly spaced windows of the reference set as tensors: frames, actions, labelled; `where`
    holds their episodes and starts."""
    long = [i for i in dataset.episodes("all") if dataset.lengths[i] >= length]
    if not long:
        raise UserError(f"Got episodes of at most {max(dataset.lengths)} frames in {dataset.path}, "
                        f"need one of {length} to compare a dream with: record longer ones.")
    where = np.repeat(long, per_episode), np.concatenate(
        [np.linspace(0, dataset.lengths[i] - length, per_episode).astype(int) for i in long])
    clips, actions = to_tensors(dataset.read(*where, length), device)
    return clips | {"where": where}, actions


def to_tensors(batch, device):
    """What Dataset.read gives -> tensors, and the actions among them once more."""
    clips = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
    return clips, {k: clips[k] for k in ("binary", "categorical", "continuous")}


@torch.no_grad()
def dream_clips(run, z, actions, labelled, horizon, seed=0, forced=False):
    """Continue clips for their last `horizon` frames. z (B, T, S_z, Z), actions[:, t] led to
    frame t. Returns frames uint8 (B, T, H, W, 3): the context reconstructed, the rest imagined,
    from what was imagined before or, `forced`, one step ahead from the true frames before it.
    The noise depends on the seed alone, so that two calls with other actions can be paired."""
    dream = Dream(run.dynamics, torch.Generator(z.device).manual_seed(seed))
    cache, context = run.tokenizer.new_cache(), z.shape[1] - horizon
    dream.commit(z[:, :context], {k: x[:, :context] for k, x in actions.items()},
                 labelled[:, :context])
    frames = [run.tokenizer.decode(z[:, :context], cache)]
    for t in range(context, z.shape[1]):
        action, true = {k: x[:, t:t + 1] for k, x in actions.items()}, z[:, t:t + 1]
        has_action = labelled[:, t:t + 1]
        imagined = dream.imagine(action, has_action)
        frames.append(run.tokenizer.decode(imagined, cache))
        if forced:                      # the true frame takes the imagined one's place
            cache.advance(-1)
            run.tokenizer.decode(true, cache)
        dream.commit(true if forced else imagined, action, has_action)
    return torch.cat(frames, 1)


def squared_error(x_hat, x):
    """uint8 (B, T, H, W, 3) twice -> mean squared error (B, T) of pixels in [0, 1]."""
    return (x_hat.float() - x.float()).div(255).square().mean((2, 3, 4)).cpu().numpy()


def decibel(error):
    """PSNR from the mean squared error over all clips (not a mean of decibels)."""
    return -10 * np.log10(np.mean(error, 0))


def ssim(x_hat, x):
    """Structural similarity (Wang et al. 2004) of uint8 (B, T, H, W, 3): (B, T), Gaussian window of
    11 pixels (smaller frames: what fits; sigma 1.5), mean over the windows that lie inside and the
    channels."""
    half = min(5, (min(x.shape[2:4]) - 1) // 2)
    w = torch.exp(-(torch.arange(-half, half + 1) / 1.5) ** 2 / 2).to(x.device)
    w = w / w.sum()

    def blur(y):
        y = F.conv2d(y, w.view(1, 1, -1, 1))
        return F.conv2d(y, w.view(1, 1, 1, -1))

    out = []
    for a, b in zip(x_hat, x, strict=True):
        a, b = (y.movedim(-1, 1).flatten(0, 1)[:, None].float() / 255 for y in (a, b))
        ma, mb = blur(a), blur(b)
        va, vb, ab = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
        s = ((2 * ma * mb + 1e-4) * (2 * ab + 9e-4)
             / ((ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4)))
        out.append(s.mean((1, 2, 3)).view(-1, 3).mean(1))
    return torch.stack(out).cpu().numpy()


def f1(hits, events, claims):
    return 2 * np.sum(hits) / max(np.sum(events) + np.sum(claims), 1)


@torch.no_grad()
def evaluate_world(run, dataset, dtype="auto", per_episode=4, context=16, horizon=64,
                   simulator=False, picture=None):
    """PSNR, SSIM and symbols on the reference set -> entries for results.json.

    Curves by horizon: the dream with true actions and with those of another episode ("shuffled",
    same noise, same contexts), the last frame repeated, the tokenizer's reconstruction, and, with
    `simulator`, the true game under the shuffled actions. picture: path of a chart of them.
    """
    device = run.device
    horizon = min(horizon, max(dataset.lengths) - context)
    clips, actions = reference_clips(dataset, per_episode, context + horizon, device)
    frames, labelled, where = clips["frames"], clips["labelled"], clips["where"]
    n, entries = len(frames), {}
    interval = functools.partial(bootstrap, block=per_episode)
    probes = read_probes(dataset, *where, context + horizon)
    reader = reader_of(dataset)
    if reader and not probes:
        print(f"{dataset.path} holds no symbols to compare with: delete it to record it anew.")
        reader = None
    with autocast(device, dtype):
        z = torch.cat([run.tokenizer.encode(x) for x in frames.split(16)])
        recon = torch.cat([run.tokenizer.decode(x) for x in z.split(16)])
        entries["tokenizer_psnr_db"] = *interval(decibel, squared_error(recon, frames).mean(1)), \
            n, "dB"
        if reader:
            player = probes["probe_player"]
            day = (player[..., 0] >= 128) & (player[..., 1] == 0)
            right, items, held = (np.zeros(day.shape) for _ in range(3))
            for t in range(day.shape[1]):
                cells, count, _ = reader.read(recon[:, t].cpu(), player[:, t, 0] / 255,
                                              player[:, t, 1])
                true, have = (probes[f"probe_{k}"][:, t] for k in ("semantic", "inventory"))
                right[:, t] = (reader.semantic[cells] == true).mean((1, 2))
                items[:, t], held[:, t] = ((count == have) & (have > 0)).sum(1), (have > 0).sum(1)
            entries["tokenizer_cell_accuracy"] = *interval(
                ratio, (right * day).sum(1), day.sum(1)), n, "share"
            entries["tokenizer_inventory_accuracy"] = *interval(
                ratio, items.sum(1), held.sum(1)), n, "share"
        if run.dynamics is None:
            return entries
        real = frames[:, context:]
        other = per_episode if n > per_episode else 1
        shuffled = {k: torch.cat([x[:, :context], x[:, context:].roll(other, 0)], 1)
                    for k, x in actions.items()}
        shown = {"recon": recon[:, context:],
                 "repeat": frames[:, context - 1:context].expand_as(real)}
        for name, a, forced in (("dream", actions, False), ("shuffled", shuffled, False),
                                ("next", actions, True)):
            shown[name] = dream_clips(run, z, a, labelled, horizon, forced=forced)[:, context:]
    if simulator:
        shown["simulator"] = torch.from_numpy(play_on(dataset, *where, context, shuffled)[0]).to(
            device)
    errors = {name: squared_error(x, real) for name, x in shown.items()}
    likeness = {name: ssim(x, real) for name, x in shown.items()}
    entries["recon_psnr_db"] = *interval(decibel, errors["recon"].mean(1)), n, "dB"
    entries["next_frame_psnr_db"] = *interval(decibel, errors["next"].mean(1)), n, "dB"
    curves = [name for name in shown if name != "next"]
    for h in (h for h in HORIZONS if h <= horizon):
        for name in curves:
            entries[f"{name}_psnr_db_h{h}"] = *interval(decibel, errors[name][:, h - 1]), n, "dB"
            entries[f"{name}_ssim_h{h}"] = *interval(np.mean, likeness[name][:, h - 1]), n, "ssim"
        for other in ("repeat", "shuffled"):
            gain = interval(lambda a, b: decibel(a) - decibel(b), errors["dream"][:, h - 1],
                            errors[other][:, h - 1])
            entries[f"dream_minus_{other}_db_h{h}"] = *gain, n, "dB"
    least = interval(lambda a, b: (decibel(a) - decibel(b)).min(), errors["dream"][:, :16],
                     errors["repeat"][:, :16])
    entries["dream_minus_repeat_db_least_h1_16"] = *least, n, "dB"
    if reader:
        place = probes["probe_player"][:, context - 1:, 2:].astype(int)
        scrolled = (np.diff(place, axis=1) != 0).any(-1)            # (n, horizon)
        for h in (h for h in HORIZONS if h <= horizon):
            for name in ("dream", "repeat"):
                entries[f"{name}_moved_psnr_db_h{h}"] = *interval(
                    lambda e, m: -10 * np.log10(ratio(e * m, m)), errors[name][:, h - 1],
                    scrolled[:, h - 1]), int(scrolled[:, h - 1].sum()), "dB"
        entries |= symbol_entries(reader, shown, probes, context, interval)
    if picture:
        picture_rollouts(picture, errors, likeness)
    return entries


def reader_of(dataset):
    """Reads symbols off pictures of the environment that was recorded; None where it has none."""
    env = make_env(dataset.settings["env"]) if "env" in dataset.settings else None
    return env.reader() if hasattr(env, "reader") else None


def read_probes(dataset, episode, start, length):
    """Ground truth of windows, dict of (n, length, ...), {} where none was recorded."""
    rows = dataset.rows(int(episode[0])).dtype.names
    names = ("probe_semantic", "probe_inventory", "probe_player")
    return dataset.read(episode, start, length, names) if set(names) <= set(rows) else {}


def symbol_entries(reader, shown, probes, context, interval):
    """Accuracy of what the dream shows: cells by horizon, and over all single steps ("next") cells
    and inventory; that of the reconstructions is as much as the tokenizer lets one see."""
    at = lambda t: {k: x[:, t] for k, x in probes.items()}
    horizon, entries = shown["dream"].shape[1], {}
    n = len(shown["dream"])
    for h in (h for h in HORIZONS if h <= horizon):
        counts = symbol_counts(reader, shown["dream"][:, h - 1].cpu(), at(context - 1),
                               at(context + h - 1))
        known = int(counts["known"].sum())
        for name, right in (("cell_accuracy", "right"), ("repeat_cell_accuracy", "right_repeat")):
            entries[f"{name}_h{h}"] = (*interval(ratio, counts[right], counts["known"]), known,
                                       "share")
        wrong = [counts["known"] - counts[x] for x in ("right", "right_repeat")]
        entries[f"cell_error_to_repeat_h{h}"] = *interval(ratio, *wrong), known, "ratio"
    steps = {name: [symbol_counts(reader, shown[name][:, t].cpu(), at(context + t - 1),
                                  at(context + t)) for t in range(horizon)]
             for name in ("next", "recon")}
    total, ceiling = ({k: np.sum([s[k] for s in counts], 0) for k in counts[0]}
                      for counts in steps.values())
    wrong = [total["known"] - total[x] for x in ("right", "right_repeat")]
    for name, statistic, parts, count in (
            ("next_cell_accuracy", ratio, (total["right"], total["known"]), "known"),
            ("next_cell_error_to_repeat", ratio, wrong, "known"),
            ("next_changed_accuracy", ratio, (total["changed_right"], total["changed"]), "changed"),
            ("inventory_f1", f1, [total[k] for k in ("hits", "events", "claims")], "events"),
            ("inventory_f1_recon", f1, [ceiling[k] for k in ("hits", "events", "claims")],
             "events")):
        entries[name] = *interval(statistic, *parts), int(total[count].sum()), "share"
    return entries


def play_on(dataset, episode, start, context, actions):
    """The simulator from the end of each clip's context under other actions, (n, T, .): frames
    uint8 (n, T - context, H, W, 3), events (n, T - context, tasks). Each world is made anew and led
    there as it was recorded."""
    jobs, keys = [], list(actions)
    for i in np.unique(episode):
        rows, recorded = np.flatnonzero(episode == i), dataset.episode(i)
        jobs.append((dataset.settings["env"], dataset.settings["seed"] + int(i),
                     {k: np.array(recorded[k]) for k in keys},
                     [(int(start[r]) + context - 1,
                       {k: actions[k][r, context:].cpu().numpy() for k in keys}) for r in rows]))
    done = {job[1]: part for job, part in work(branch_off, jobs, 0)}    # by world, as they end
    films = [film for seed in sorted(done) for film in done[seed]]
    order = np.argsort(np.argsort(episode, kind="stable"))
    return tuple(np.stack(x)[order] for x in zip(*films, strict=True))


# --------------------------------------------------------------------------------------- speed

def empty_inputs(cfg, spec, B, T, device):
    """Zero latents, no-op actions, labelled: the arguments of Dream.commit."""
    return (torch.zeros(B, T, cfg.tokens, cfg.channels, device=device),
            {k: torch.from_numpy(x).to(device) for k, x in spec.zeros(B, T).items()},
            torch.ones(B, T, dtype=torch.bool, device=device))


def seconds(step, repeats, device):
    """Median wall time of step() over `repeats` calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


class Recomputed(Dream):
    """A dream without a cache, to measure what that saves: every pass sees the context again."""

    def __init__(self, model, generator=None, cache=None):
        super().__init__(model, generator, cache)
        self.past = []                                  # a tuple of the model's inputs per commit

    def again(self, *inputs):
        """The model's outputs for these inputs, behind those of the past."""
        def join(parts):
            if isinstance(parts[0], dict):
                return {k: join([x[k] for x in parts]) for k in parts[0]}
            return None if parts[0] is None else torch.cat(parts, 1)[:, -self.cache.context:]

        T = inputs[0].shape[1]
        return [None if y is None else y[:, -T:] for y in
                self.model(*(join(parts) for parts in zip(*self.past, inputs, strict=True)))]

    @torch.no_grad()
    def commit(self, z, actions, labelled, task=None):
        inputs = *self.as_context(z), actions, labelled, task
        h = None if task is None else self.again(*inputs)[1]
        self.past.append(inputs)
        self.past = self.past[-self.cache.context:]
        return h

    @torch.no_grad()
    def imagine(self, actions, labelled, task=None):
        return euler_sample(lambda z, tau, d: self.again(z, tau, d, actions, labelled, task)[0],
                            self.noise(len(labelled), 1), self.k, self.d_label)


@torch.no_grad()
def dream_rate(model, B, context, device, dtype, k=None, tokenizer=None, kind=Dream, repeats=12):
    """Frames/s of a dream of B rows on a full context; tokenizer: frames are decoded as well;
    kind: Dream, or Recomputed."""
    inputs, one = (empty_inputs(model.cfg, model.action_spec, B, T, device) for T in (context, 1))
    with autocast(device, dtype):
        dream, view = kind(model, cache=Cache(context)), tokenizer and tokenizer.new_cache()
        dream.k = k or dream.k
        dream.commit(*inputs)

        def step():
            z = dream.step(one[1])[0]
            if view:
                tokenizer.decode(z, view).cpu()

        return B / seconds(step, repeats, device)


@torch.no_grad()
def imagination_rate(model, agent, B, context, horizon, device, dtype, kind=Dream, repeats=3):
    """Imagined frames/s of training's rollouts: policy, rewards and values included."""
    task = torch.zeros(B, context, dtype=torch.long, device=device)
    inputs = empty_inputs(model.cfg, model.action_spec, B, context, device)

    def rollout():
        h = imagine_rollout(model, agent, *inputs, task, horizon, torch.Generator(device), kind)[0]
        (agent.rewards(h, task[:, :1]) + agent.values(h)).cpu()

    with autocast(device, dtype):
        return B * horizon / seconds(rollout, repeats, device)


def compiled(run):
    """A copy of the run's dynamics, compiled where training is: for many dreams of one shape."""
    world = copy.deepcopy(run.dynamics)
    if run.meta["config"]["train"]["compile"]:
        from train import compile_module  # later in the order of imports
        compile_module(world, run.device)
    return world


@torch.no_grad()
def measure_speed(run, dtype="auto"):
    """Dream frames/s at batch 1 (decoded) and imagined frames/s in training's rollouts."""
    context, device = run.dynamics.cfg.context, run.device
    rates = {"dream_fps_batch1": dream_rate(run.dynamics, 1, context, device, dtype, None,
                                            run.tokenizer, repeats=40)}
    if run.agent:
        agent, batch = run.agent, run.meta["config"]["train"]["imagine_batch"]
        rates["imagined_frames_per_s"] = imagination_rate(
            compiled(run), agent, batch, agent.cfg.context, agent.cfg.horizon, device, dtype)
    return {name: (rate, None, None, 1, "frames/s") for name, rate in rates.items()}


# -------------------------------------------------------------------- agents in the real world

class Ladder:
    """The prompt ladder of N environments: `task` (N,) moves on after enough real events."""

    def __init__(self, spec, n):
        self.steps = [(spec.tasks.index(task), times) for task, times in spec.ladder] or [(0, 0)]
        self.place, self.count = np.zeros(n, int), np.zeros(n, int)

    @property
    def task(self):
        return np.array([self.steps[i][0] for i in self.place])

    def advance(self, events):
        """events (N, tasks) of one step -> rows (N,) bool whose prompt changed."""
        self.count += events[np.arange(len(self.task)), self.task]
        times = np.array([self.steps[i][1] for i in self.place])
        done = (times > 0) & (self.count >= times) & (self.place < len(self.steps) - 1)
        self.place, self.count = self.place + done, np.where(done, 0, self.count)
        return done


def ladder_prompts(data):
    """(frames,): the task that the prompt ladder would ask for after each recorded frame."""
    prompts = []
    for i in data.episodes("all"):
        ladder = Ladder(data.spec, 1)
        for events in np.asarray(data.episode(i)["events"]):
            ladder.advance(events[None])
            prompts.append(ladder.task[0])
    return np.array(prompts)


class Actor:
    """The policy in N real environments at once: frames in, sampled actions out."""

    def __init__(self, run, generator, temperature=1.0):
        self.run, self.generator, self.temperature = run, generator, temperature
        self.dream, self.encoder = Dream(run.dynamics, generator), run.tokenizer.new_cache()
        self.device = run.device
        self.history = []

    @torch.no_grad()
    def observe(self, frames, actions, labelled, task, changed=None):
        """frames (N, H, W, 3), the actions (N, .) that led there, task (N,) from now on. Where the
        prompt `changed`, the window is replayed with the new one, so that the agent tokens'
        cache never mixes prompts."""
        rows = torch.as_tensor(frames, device=self.device)[:, None]
        actions = {k: torch.as_tensor(x, device=self.device)[:, None] for k, x in actions.items()}
        labelled = torch.full(rows.shape[:2], labelled, device=self.device)
        z = self.run.tokenizer.encode(rows, self.encoder)
        context = self.dream.cache.context
        self.history = [*self.history, (z, actions, labelled)][-context:]
        self.task = self.run.agent.prompt(torch.as_tensor(task, device=self.device))
        self.h = self.dream.commit(z, actions, labelled, self.task[:, None])[:, 0]
        if changed is not None and changed.any():
            self.replay(torch.as_tensor(np.flatnonzero(changed), device=self.device))

    def keep(self, rows):
        """Go on with these rows (n,) alone."""
        rows = torch.as_tensor(rows, device=self.device)
        self.dream.cache.keep(rows), self.encoder.keep(rows)
        pick = lambda z, actions, labelled: (z[rows], {k: x[rows] for k, x in actions.items()},
                                             labelled[rows])
        self.history = [pick(*frame) for frame in self.history]

    def replay(self, rows):
        """Commit the window of these rows again, under their present task. Exact for one time
        layer; with more, the window's first frames lose what they had seen before it."""
        z, actions, labelled = zip(*self.history, strict=True)
        T, cache = len(z), self.dream.cache
        fresh = Dream(self.run.dynamics, self.generator, cache=Cache(cache.context, cache.t - T))
        h = fresh.commit(torch.cat([x[rows] for x in z], 1),
                         {k: torch.cat([a[k][rows] for a in actions], 1) for k in actions[0]},
                         torch.cat([x[rows] for x in labelled], 1),
                         self.task[rows, None].expand(-1, T))
        cache.copy_rows(rows, fresh.cache)
        self.h[rows] = h[:, -1]

    @torch.no_grad()
    def act(self):
        actions = self.run.agent.act(self.h, self.generator, self.temperature)
        return {k: x.cpu().numpy() for k, x in actions.items()}


def evaluate_agent(worlds, length, run=None, dtype="auto", seed=0, gif=None, temperature=1.0):
    """Plays one sampled episode in each of `worlds` (VecEnv); run None: uniform random actions.

    Returns first (N, tasks + 1): the step at which each task was first done and, last, that of
    death, inf where never. gif: a path for the first world's frames.
    """
    rng, device = np.random.default_rng(seed), run.device if run else torch.device("cpu")
    frames, spec, N = worlds.reset(), worlds.spec, len(worlds.seeds)
    ladder, film, alive = Ladder(spec, N), [frames[0]], np.arange(N)
    first = np.full((N, len(spec.tasks) + 1), np.inf)
    with autocast(device, dtype):
        if run:
            actor = Actor(run, torch.Generator(device).manual_seed(seed), temperature)
            actor.observe(frames, spec.actions.zeros(N), False, ladder.task)
        for step in tqdm(range(1, length + 1), desc=f"{N} episodes", leave=False):
            chosen = actor.act() if run else spec.actions.sample(rng, len(alive))
            actions = spec.actions.zeros(N)
            for name, x in chosen.items():
                actions[name][alive] = x
            frames, events, terminal = worlds.step(actions)
            now = np.concatenate([events > 0, terminal[:, None]], 1)
            first = np.where(now & np.isinf(first), step, first)
            changed = ladder.advance(events)
            film += [frames[0]] if 0 in alive and len(film) < FILM else []
            if terminal.all():
                break
            if run and terminal[alive].any():           # the dead aren't computed any more
                actor.keep(np.flatnonzero(~terminal[alive]))
            alive = np.flatnonzero(~terminal)
            if run:
                actor.observe(frames[alive], {k: x[alive] for k, x in actions.items()}, True,
                              ladder.task[alive], changed[alive])
    if gif:
        write_film(gif, np.stack(film))
    return first


def evaluate_player(env, episodes, length, seed, workers=0):
    """The recorded player on the same worlds, for `length` steps -> first (N, tasks + 1)."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = record(env, folder, episodes, length + 1, seed, workers)
        events = [np.column_stack([e["events"] > 0, e["continues"] == 0])
                  for e in map(dataset.episode, range(episodes))]
    return np.stack([np.where(e.any(0), e.argmax(0), np.inf) for e in events])


def ladder_scores(spec, first):
    """first (..., tasks + 1) -> (...): how many rungs an episode reached, whatever the prompts."""
    return np.isfinite(first[..., [spec.tasks.index(r) for r in spec.rungs]]).sum(-1)


def played(folder, worlds, agent, length, device, dtype="auto", temperature=1.0):
    """evaluate_agent's `first` of "random", "player" or a stage of the run in `folder`. It is kept
    in folder/episodes, and read back where the same checkpoint is asked for the same again."""
    folder, env, seeds = Path(folder), worlds.name, worlds.seeds
    name = f"{env}_{agent}_{seeds[0]}_{len(seeds)}x{length}".replace("/", "_").replace(":", "_")
    if agent in STAGES:
        crc = zlib.crc32((folder / f"{agent}.pt").read_bytes())
        name += f"_t{temperature:g}_{pick_dtype(device, dtype)}_{crc:08x}"
    path = folder / "episodes" / f"{name}.npy"
    if path.exists():
        print(f"{path} is there; delete it to play again.")
        return np.load(path)
    print(f"Evaluating {folder}, {agent}, temperature {temperature:g}: {len(seeds)} episodes of "
          f"{length} steps.", flush=True)
    if agent == "player":
        first = evaluate_player(env, len(seeds), length, seeds[0], worlds.workers)
    else:
        run = load_run(folder, agent, device, dtype) if agent in STAGES else None
        gif = {"agent": "episode_bc.gif", "imagine": "episode_rl.gif"}.get(agent)
        gif = None if temperature != 1 or seeds[0] != TEST_SEED else gif
        first = evaluate_agent(worlds, length, run, dtype, temperature=temperature,
                               gif=gif and folder / gif)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, lambda file: np.save(file, first))
    return first


def t_interval(x):
    """Mean of few runs, its 95 % t interval, and two-sided p of mean 0: x (n,) -> 4 numbers."""
    n, mean = len(x), float(np.mean(x))
    if n < 2:
        return mean, -math.inf, math.inf, 1.0
    angle = np.linspace(0, np.pi / 2, 200_001)[:-1]             # t = sqrt(n - 1) tan(angle)
    share = np.cumsum(np.cos(angle) ** (n - 2))                 # P(|T| <= t), times its last
    t, share = math.sqrt(n - 1) * np.tan(angle), share / share[-1]
    error = float(np.std(x, ddof=1)) / math.sqrt(n)
    half = float(np.interp(0.95, share, t)) * error
    p = 1 - float(np.interp(abs(mean) / error, t, share)) if error else 1.0     # nothing to go by
    return mean, mean - half, mean + half, p


def mcnemar(a, b):
    """Two-sided p of the exact McNemar test: a, b bool (n,), success in the same n worlds."""
    more, less = int((a & ~b).sum()), int((~a & b).sum())
    n = more + less
    tail = sum(math.comb(n, i) for i in range(min(more, less) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def holm(p):
    """p values (n,), corrected for being the n tests that were made (Holm)."""
    order, out = np.argsort(p), np.zeros(len(p))
    worse = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    out[order] = np.maximum.accumulate(np.minimum(worse, 1.0))
    return out


def agent_entries(spec, firsts, length):
    """{agent: first (runs, N, tasks + 1)}, all in the same worlds -> entries for results.json:
    ladder score, steps until death (restricted to `length`), success and restricted mean time of
    each rung, and agents whose names begin with "rl" against all others.

    Intervals are over the runs where there are several, else over the worlds (they tell what other
    runs would give on this world model and these worlds); of success the wider of that and Wilson's
    of all episodes. Against "bc" the success of each rung is tested: paired t over runs, or McNemar
    over the worlds of one; Holm over rungs.
    """
    entries, rungs = {}, [spec.tasks.index(rung) for rung in spec.rungs]

    def over(values):                               # (runs, N) -> value, low, high, n
        few = len(values) > 1
        return *(t_interval(values.mean(1))[:3] if few else mean_interval(values[0])), values.size

    for agent, first in firsts.items():
        scores = ladder_scores(spec, first)
        entries[f"ladder_{agent}"] = *over(scores), "rungs"
        entries[f"life_{agent}"] = *over(np.minimum(first[..., -1], length)), "steps"
        for i, row in enumerate(scores if len(scores) > 1 else ()):
            entries[f"ladder_{agent}_run{i}"] = *mean_interval(row), len(row), "rungs"
        for rung, task in zip(spec.rungs, rungs, strict=True):
            done, n = np.isfinite(first[..., task]), scores.size
            low, high = wilson(int(done.sum()), n)
            if len(done) > 1:                           # runs without any success don't differ
                few = t_interval(done.mean(1))
                low, high = max(min(low, few[1]), 0.0), min(max(high, few[2]), 1.0)
            entries[f"success_{agent}_{rung}"] = done.mean(), low, high, n, "share"
            entries[f"time_{agent}_{rung}"] = *over(np.minimum(first[..., task], length)), "steps"
    pairs = [(a, b) for a in firsts if a.startswith("rl") for b in firsts if b[:2] != "rl"]
    for a, b in [*pairs, ("bc", "random")]:
        runs = {len(firsts.get(agent, ())) for agent in (a, b)}
        if 0 in runs or len(runs - {1}) > 1:
            continue                                # one run is compared with each of the others'
        n = min(firsts[a].shape[1], firsts[b].shape[1])
        x, y = np.broadcast_arrays(firsts[a][:, :n], firsts[b][:, :n])
        gain = ladder_scores(spec, x) - ladder_scores(spec, y)
        entries[f"ladder_{a}_minus_{b}"] = *over(gain), "rungs"
        if (a, b) != ("rl", "bc"):
            continue
        entries["ladder_rl_over_bc"] = (ladder_scores(spec, x).mean()
                                        / max(ladder_scores(spec, y).mean(), 1e-9), None, None,
                                        gain.size, "ratio")
        done = [(np.isfinite(x[..., task]), np.isfinite(y[..., task])) for task in rungs]
        chances = holm([t_interval(one.mean(1) - two.mean(1))[3] if len(one) > 1 else
                        mcnemar(one[0], two[0]) for one, two in done])
        for rung, task, chance, (one, two) in zip(spec.rungs, rungs, chances, done, strict=True):
            entries[f"p_rl_bc_{rung}"] = chance, None, None, gain.size, "p (Holm)"
            if min(one.mean(), two.mean()) > 0.5:
                entries[f"time_rl_minus_bc_{rung}"] = *over(
                    np.minimum(x[..., task], length) - np.minimum(y[..., task], length)), "steps"
    return entries


def data_config(folder):
    """The data settings of a run, from its config.json."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"No config.json in {folder}: name the folder of a run, or make one with "
                        "'python train.py'.")
    config, need = read_json(path), {"env": str, "reference_episodes": int, "length": int}
    try:
        wrong = [k for k, kind in need.items() if type(config["data"][k]) is not kind]
    except (KeyError, TypeError):
        wrong = list(need)
    if wrong:
        raise UserError(f"Got {path} without a right {wrong} in 'data', need what train.py wrote: "
                        "run its command again.")
    return config["data"]


def evaluate_agents(folder, agents, episodes, length, device, dtype="auto", workers=0):
    """Random, BC ("bc"), imagination policy ("rl") and recorded player ("player") on the test
    worlds, the player in half of them -> entries for results.json."""
    folder, env, firsts = Path(folder), data_config(folder)["env"], {}
    if bad := set(agents) - {"random", "bc", "rl", "player"}:
        raise UserError(f"Got agents {sorted(bad)}, need some of random, bc, rl and player.")
    worlds, fewer = (VecEnv(env, range(TEST_SEED, TEST_SEED + n), workers)
                     for n in (episodes, max(episodes // 2, 2)))
    with worlds, fewer:
        for agent in agents:
            firsts[agent] = played(folder, fewer if agent == "player" else worlds,
                                   {"bc": "agent", "rl": "imagine"}.get(agent, agent), length,
                                   device, dtype)[None]
    return agent_entries(worlds.spec, firsts, length)


@torch.no_grad()
def evaluate_heads(run, dataset, dtype="auto", chunk=100):
    """Reward and continue head along the reference episodes, under each of the tasks -> entries:
    how often a predicted reward above 1/2 meets an event in that very frame (precision), and an
    event such a prediction (recall); P(continue) at terminals and elsewhere."""
    tasks, device = run.spec.tasks, run.device
    generator = torch.Generator(device).manual_seed(0)
    task = torch.arange(len(tasks), device=device)[:, None]
    parts = []                          # of an episode: numbers by task, or at its end and before
    for i in tqdm(dataset.episodes("all"), "heads", leave=False):
        guess, alive = [], []
        dream, eyes = Dream(run.dynamics, generator), run.tokenizer.new_cache()
        for start in range(0, dataset.lengths[i], chunk):
            T = min(chunk, dataset.lengths[i] - start)
            clip, actions = to_tensors(dataset.read([i], [start], T), device)
            each = lambda x: x.expand(len(tasks), *x.shape[1:])
            with autocast(device, dtype):
                z = run.tokenizer.encode(clip["frames"], eyes)
                h = dream.commit(each(z), {k: each(x) for k, x in actions.items()},
                                 each(clip["labelled"]), run.agent.prompt(task).expand(-1, T))
                guess.append(run.agent.rewards(h, task).T.cpu().numpy())
                alive.append(run.agent.continue_prob(h).mean(0).cpu().numpy())
        guess, alive = np.concatenate(guess), np.concatenate(alive)
        true = np.asarray(dataset.episode(i)["events"]) > 0
        end = np.asarray(dataset.episode(i)["continues"]) == 0
        claim, rows = guess > 0.5, np.stack([end, ~end], 1)
        parts.append([x.sum(0) for x in (claim & true, claim, true, guess, rows * alive[:, None],
                                         rows)])
    hits, claims, events, guesses, alive, rows = (np.stack(x) for x in zip(*parts, strict=True))
    entries = {}

    def share(name, a, b, unit="share"):        # (episodes,) twice; intervals are over episodes
        if b.any():
            entries[name] = *bootstrap(ratio, a, b), int(b.sum()), unit

    for name, some in [("", slice(None))] + [(f"_{t}", [k]) for k, t in enumerate(tasks)]:
        of = [x[:, some].sum(1) for x in (hits, claims, events)]
        share(f"reward_precision{name}", of[0], of[1])
        share(f"reward_recall{name}", of[0], of[2])
    share("continue_at_terminals", alive[:, 0], rows[:, 0], "p")
    share("continue_elsewhere", alive[:, 1], rows[:, 1], "p")
    share("reward_predicted_mean", guesses.sum(1) / len(tasks), rows.sum(1), "reward")
    share("reward_true_mean", events.sum(1) / len(tasks), rows.sum(1), "reward")
    return entries


@torch.no_grad()
def evaluate_imagination(runs, dataset, dtype="auto", per_episode=4):
    """Does what an agent imagines come true? {name: run with agent} dream as in training, on from
    reference clips under the ladder's prompts; then the simulator takes the same actions -> shares
    of clips in which the task is done: by the reward head in the dream ("imagined"), by the head on
    the simulator's frames ("seen"), in truth; and of the imagined ones those that are true."""
    entries, prompts = {}, ladder_prompts(dataset)
    for name, run in runs.items():
        C, H, device = run.agent.cfg.context, run.agent.cfg.horizon, run.device
        clips, actions = reference_clips(dataset, per_episode, C + H, device)
        episode, start = clips["where"]
        last = dataset.offsets[episode] + start + C - 1
        task = torch.from_numpy(prompts[last])[:, None].to(device)
        prompt, labelled = run.agent.prompt(task).expand(-1, C + H), clips["labelled"]
        generator = torch.Generator(device).manual_seed(0)
        with autocast(device, dtype):
            z = torch.cat([run.tokenizer.encode(x) for x in clips["frames"][:, :C].split(32)])
            h, chosen, _ = imagine_rollout(
                run.dynamics, run.agent, z, {k: x[:, :C] for k, x in actions.items()},
                labelled[:, :C], prompt[:, :C], H, generator)
            actions = {k: torch.cat([actions[k][:, :C], x], 1) for k, x in chosen.items()}
            films, events = play_on(dataset, episode, start, C, actions)
            films = torch.cat([clips["frames"][:, :C], torch.from_numpy(films).to(device)], 1)
            z = torch.cat([run.tokenizer.encode(x) for x in films.split(32)])
            labelled = torch.cat([labelled[:, :C], torch.ones_like(labelled[:, C:])], 1)
            seen = Dream(run.dynamics, generator).commit(z, actions, labelled, prompt)[:, C:]
            done = [(run.agent.rewards(x, task) > 0.5).any(1).cpu().numpy()
                    for x in (h[:, 1:], seen)]
        task = task.cpu().numpy()
        done.append(np.take_along_axis(events > 0, task[..., None], 2).any((1, 2)))
        for kind, x in zip(("imagined", "seen", "true"), done, strict=True):
            entries[f"imagination_{name}_{kind}"] = *bootstrap(np.mean, x, block=per_episode), \
                len(x), "share"
        if done[0].any():
            entries[f"imagination_{name}_precision"] = *bootstrap(
                ratio, done[0] & done[2], done[0], block=per_episode), int(done[0].sum()), "share"
    return entries


# ------------------------------------------------------------------------------------ pictures

def enlarge(frames, factor=2):
    return np.asarray(frames).repeat(factor, -3).repeat(factor, -2)


def write_film(path, frames, fps=8):
    """frames uint8 (T, H, W, 3) -> .gif or .mp4, twice as large."""
    how = {"fps": fps} if Path(path).suffix == ".mp4" else {"duration": 1000 / fps, "loop": 0}
    imageio.mimwrite(path, list(enlarge(frames)), **how)


def border(frames, color, width=3):
    """A coloured border around uint8 frames (..., H, W, 3)."""
    frames = np.pad(frames, [(0, 0)] * (frames.ndim - 3) + [(width, width)] * 2 + [(0, 0)])
    edge = np.ones(frames.shape[-3:-1], bool)
    edge[width:-width, width:-width] = False
    frames[..., edge, :] = color
    return frames


@torch.no_grad()
def dream_film(run, dataset, rows=4, context=16, horizon=32, dtype="auto", seed=0):
    """uint8 (T, H', W', 3): for each clip imagined (left) and real (right). The left border is
    green while the model is shown real frames and orange from where it imagines."""
    device = run.device
    horizon = min(horizon, max(dataset.lengths) - context)
    clips, actions = reference_clips(dataset, 1, context + horizon, device)
    pick = torch.linspace(0, len(clips["frames"]) - 1, rows).long()
    real, labelled = clips["frames"][pick], clips["labelled"][pick]
    with autocast(device, dtype):
        z = run.tokenizer.encode(real)
        dreamed = dream_clips(run, z, {k: x[pick] for k, x in actions.items()}, labelled, horizon,
                              seed).cpu().numpy()
    left = np.concatenate([border(dreamed[:, :context], GREEN),
                           border(dreamed[:, context:], ORANGE)], 1)
    pairs = np.concatenate([left, border(real.cpu().numpy(), GREEN)], -2)
    return np.concatenate(list(pairs), -2)      # the clips side by side


@torch.no_grad()
def picture_reconstructions(run, dataset, path, n=8, dtype="auto"):
    """Real frames above, reconstructions below."""
    device = run.device
    clips, _ = reference_clips(dataset, 1, min(16, min(dataset.lengths)), device)
    frames = clips["frames"][torch.linspace(0, len(clips["frames"]) - 1, n).long()]
    with autocast(device, dtype):
        rebuilt = run.tokenizer.decode(run.tokenizer.encode(frames))
    rows = [np.concatenate(list(x[:, -1].cpu().numpy()), 1) for x in (frames, rebuilt)]
    imageio.imwrite(path, enlarge(np.concatenate(rows, 0)))


def new_figure(rows, columns, size, pad=1.08):
    """matplotlib without a screen -> figure and its axes (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(size, tight_layout={"pad": pad})
    return figure, figure.subplots(rows, columns, squeeze=False)


def picture_curves(folder, stage):
    """metrics.jsonl -> STAGE_curves.png, one small chart per logged key."""
    lines = [x for x in read_metrics(folder) if x["stage"] == stage]
    keys = [k for k in dict.fromkeys(k for x in lines for k in x)
            if k not in ("stage", "step", "rate")]
    if not keys:
        return
    rows = -(-len(keys) // 4)
    figure, axes = new_figure(rows, 4, (14, 2.6 * rows))
    for axis, key in zip(axes.flat, keys, strict=False):
        steps, values = zip(*[(x["step"], x[key]) for x in lines if key in x], strict=True)
        axis.plot(steps, values)
        axis.set_title(key, fontsize=9)
        if min(values) > 0 and max(values) > 5 * min(values):
            axis.set_yscale("log")
    for axis in axes.flat[len(keys):]:
        axis.axis("off")
    figure.savefig(Path(folder) / f"{stage}_curves.png", dpi=70)


def picture_rollouts(path, errors, likeness):
    """PSNR and SSIM by horizon: {curve: (n, T)} twice."""
    figure, (axes,) = new_figure(1, 2, (11, 3.6))
    for name in (name for name in errors if name != "next"):
        for axis, curve in zip(axes, (decibel(errors[name]), likeness[name].mean(0)), strict=True):
            axis.plot(np.arange(1, len(curve) + 1), curve, label=name)
    for axis, title in zip(axes, ("PSNR, dB", "SSIM"), strict=True):
        axis.set_xlabel("frames after the context")
        axis.set_title(title)
    axes[0].legend()
    figure.savefig(path, dpi=80)


def agents_in(results, spec):
    """Names of the agents whose success is known, worst first."""
    names = [k.removeprefix("ladder_") for k in results if k.startswith("ladder_")]
    names = [k for k in names if f"success_{k}_{(spec.rungs or ('',))[0]}" in results]
    return sorted(names, key=lambda name: results[f"ladder_{name}"]["value"])


def picture_rungs(path, spec, results, measure):
    """Bars of success or time per rung and agent with intervals (the paper's Figures 3 and 4)."""
    agents = agents_in(results, spec)
    if not agents:
        return
    figure, ((axis,),) = new_figure(1, 1, (13, 3.6))
    for i, agent in enumerate(agents):
        rows = [results[f"{measure}_{agent}_{rung}"] for rung in spec.rungs]
        value = np.array([r["value"] for r in rows])
        error = np.abs(np.array([[r["low"], r["high"]] for r in rows]).T - value)
        axis.bar(np.arange(len(rows)) + 0.84 * i / len(agents), value, 0.84 / len(agents),
                 yerr=error, label=agent, error_kw={"elinewidth": 0.8})
    axis.set_xticks(np.arange(len(spec.rungs)) + 0.4, spec.rungs, rotation=25, ha="right")
    axis.set_ylabel("success" if measure == "success" else "steps, failures count in full")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=80)


@torch.no_grad()
def picture_imagined(run, dataset, path, rows=3, dtype="auto", seed=0):
    """Imagined rollouts of the policy on reference windows before an event of the ladder (where
    one fits): the last frame of the context and what follows, with the task, predicted rewards and
    values."""
    cfg, device, rng = run.agent.cfg, run.device, np.random.default_rng(seed)
    C, H = cfg.context, cfg.horizon
    ladder, ahead = tuple(run.spec.tasks.index(name) for name, _ in run.spec.ladder), (C, C + H - 1)
    before = len(dataset.showing(C, "all", None, *ahead, ladder)[0]) > 0
    episode, start, task = dataset.sample(rng, rows, C, before, "all", ahead, ladder)
    clips, actions = to_tensors(dataset.read(episode, start, C), device)
    asked = torch.as_tensor(task, device=device)[:, None]
    with autocast(device, dtype):
        z = run.tokenizer.encode(clips["frames"])
        h, _, z_next = imagine_rollout(run.dynamics, run.agent, z, actions, clips["labelled"],
                                       run.agent.prompt(asked).expand(-1, C), H,
                                       torch.Generator(device).manual_seed(seed))
        frames = run.tokenizer.decode(torch.cat([z, z_next], 1))[:, C - 1:].cpu().numpy()
        rewards, values = run.agent.rewards(h, asked), run.agent.values(h)
    figure, axes = new_figure(rows, h.shape[1], (1.1 * h.shape[1], 1.5 * rows), 0.3)
    for i, row in enumerate(axes):
        for t, axis in enumerate(row):
            axis.imshow(frames[i, t])
            axis.set_title(f"r {rewards[i, t]:.2f}\nv {values[i, t]:.2f}" if t else
                           f"{run.spec.tasks[task[i]]}\nv {values[i, 0]:.2f}", fontsize=6, pad=2)
            axis.axis("off")
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------- report

PICTURES = (("rollouts.png", "PSNR and SSIM by horizon"),
            ("interactions.png", "Interactions: last frame shown, dreamed outcome (green: right), "
             "real outcome"),
            ("long.gif", "500 dreamed frames"),
            ("tokenizer_reconstructions.png", "Real frames (above) and their reconstructions"),
            ("dream.gif", "Dreams (left of each pair, orange border) beside reality (right)"),
            ("success.png", "Success by rung of the ladder, 95 % intervals"),
            ("times.png", "Restricted mean time to each rung, 95 % intervals"),
            ("imagined.png", "Imagined rollouts of the policy: predicted rewards r and values v"),
            ("episode_bc.gif", "A real episode of the BC policy"),
            ("episode_rl.gif", "A real episode of the policy trained in imagination"),
            *((f"{s}_curves.png", f"Training curves: {s}")
              for s in ("tokenizer", "dynamics", "agent", "imagine")))


def results_table(results):
    lines = ["| figure | value | 95 % interval | n | unit |", "|---|---|---|---|---|"]
    for name, r in sorted(results.items()):
        interval = "" if r["low"] is None else f"{r['low']:.3g} to {r['high']:.3g}"
        lines.append(f"| {name} | {r['value']:.4g} | {interval} | {r['n']} | {r['unit']} |")
    return "\n".join(lines)


def agents_table(results, spec):
    """Markdown: ladder score and success of each rung, agents in rows."""
    short = lambda r: f"{r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
    rows = [[name, str(results[f"ladder_{name}"]["n"]), short(results[f"ladder_{name}"]),
             f"{results[f'life_{name}']['value']:.0f}",
             *(f"{100 * results[f'success_{name}_{rung}']['value']:.3g}" for rung in spec.rungs)]
            for name in agents_in(results, spec)]
    head = ["agent", "episodes", "ladder score", "steps alive",
            *(f"{rung}, %" for rung in spec.rungs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def write_report(folder):
    """report.md: every figure of results.json and every picture of the run. Returns its path."""
    folder = Path(folder)
    data_config(folder)
    results, config = read_results(folder), read_json(folder / "config.json")
    spec = load_run(folder).spec
    picture_rungs(folder / "success.png", spec, results, "success")
    picture_rungs(folder / "times.png", spec, results, "time")
    parts = [f"# Report of {folder}", agents_table(results, spec), results_table(results),
             "Commands: `results.json`.",
             *(f"## {title}\n![{title}]({name})" for name, title in PICTURES
               if (folder / name).exists()),
             f"## Settings\n```json\n{json.dumps(config, indent=1)}\n```"]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    return folder / "report.md"


# ------------------------------------------------------------------------ play inside the dream

PLAY_SEED, PLAYED, MAX_ROWS, MAX_BODY = 40_000, 64, 3000, 4096
WORLDS = ("dream", "real")
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
           "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"}


def pick(request, name, options, default=None):
    """A field of a request: a whole number or word among the options, else UserError."""
    x = request.get(name, default)
    if type(x) not in (int, str) or x not in options:
        numbers = isinstance(options, range)
        need = f"{options[0]} to {options[-1]}" if numbers else ", ".join(map(str, options))
        raise UserError(f"Got {name} {x!r}, need one of {need}.")
    return x


def png(frame):
    """uint8 (H, W, 3) -> a PNG as base64 text."""
    return base64.b64encode(imageio.imwrite("<bytes>", frame, format="png",
                                            compress_level=1)).decode()


class Session:
    """The game: the dream beside the real environment, from the same start.

    `handle` answers one request, a dict with "op" and the page's settings. The dream has no task;
    `reader` commits the same frames for every world and prompt (the ladder's tasks), so that h
    (worlds, n, D) is there for all. rows: what a world showed, (frame, action, events, continues).
    """

    def __init__(self, run, env, folder, dtype="auto"):
        if run.dynamics is None:
            raise UserError(f"No dynamics in {folder}: run 'python train.py --stage dynamics'.")
        self.run, self.env, self.folder, self.dtype = run, env, Path(folder) / "sessions", dtype
        self.device, self.cfg = run.device, run.dynamics.cfg
        self.keys, self.spec = controls(env), env.spec
        self.prompts = list(dict.fromkeys(x for x, _ in env.spec.ladder)) or list(env.spec.tasks)
        self.n, self.rung = len(self.prompts), [env.spec.tasks.index(x) for x in self.prompts]
        self.level = round(run.dynamics.tau_ctx * self.cfg.k_max)
        agent, last = run.agent, run.stage == "imagine"
        self.policies = {"bc": agent.prior if last else agent.policy} if agent else {}
        self.policies |= {"rl": agent.policy} if last else {}
        self.ops = {f.__name__: f for f in (self.reset, self.step, self.what_if, self.denoise,
                                            self.mask, self.save)}
        self.handle({"op": "reset"})

    @torch.inference_mode()
    def handle(self, request):
        """Sampling steps and signal level of committed frames hold for what is dreamed next."""
        request, cfg = request if isinstance(request, dict) else {}, self.cfg
        op = self.ops[pick(request, "op", self.ops)]
        k = pick(request, "k", [2 ** i for i in range(cfg.k_max.bit_length())], cfg.k)
        level = pick(request, "level", range(cfg.k_max), self.level)
        self.run.dynamics.cfg = dataclasses.replace(cfg, k=k, tau_ctx=level / cfg.k_max)
        self.prompt = pick(request, "prompt", range(-1, self.n), -1)        # -1: the ladder's
        self.who = [pick(request, world, ("keys", *self.policies), "keys") for world in WORLDS]
        with autocast(self.device, self.dtype):
            return op(request)

    def reset(self, request):
        """Both worlds after `PLAYED` frames of the recorded player in a world never trained on
        ("held_out") or at its first frame ("fresh"); or the dream alone, from "nothing"."""
        seed = pick(request, "seed", range(2 ** 31), PLAY_SEED)
        start = pick(request, "start", ("held_out", "fresh", "nothing"), "held_out")
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.dream, self.reader = (Dream(self.run.dynamics, self.generator) for _ in range(2))
        self.encoder, self.decoder = (self.run.tokenizer.new_cache() for _ in range(2))
        self.worlds, self.t = WORLDS[:1 + (start != "nothing")], 0
        self.ladder = Ladder(self.spec, 2)
        empty = self.spec.actions.zeros(), np.zeros(len(self.spec.tasks), bool), True
        rows = [(None, *empty)]
        if start != "nothing":
            length = PLAYED if start == "held_out" else 1
            frames, actions, *more = play_episode(self.env, seed, 0, length, "skilled")[:4]
            actions = [{k: x[t] for k, x in actions.items()} for t in range(len(frames))]
            rows = list(zip(frames, actions, *more, strict=True))
        for row in rows:
            self.ladder.advance(np.stack([row[2]] * 2))
        seen, self.over = rows[-self.cfg.context:], not rows[-1][3]
        actions = self.tensors([[r[1] for r in seen]])
        labelled = torch.arange(len(rows), device=self.device)[None, -len(seen):] > 0
        z = (self.encode([r[0] for r in seen]) if start != "nothing" else
             self.dream.imagine(actions, labelled))
        self.rows, self.film = {"dream": [], "real": rows}, []
        for picture, row in zip(self.commit(z, actions, labelled), seen, strict=True):
            self.rows["dream"].append((picture, *((*row[1:3], True) if self.film else empty)))
            self.shoot(picture, row[0], GREEN if start != "nothing" else ORANGE)
        return {**self.show(), "controls": self.keys, "tasks": self.prompts,
                "policies": list(self.policies), "k_max": self.cfg.k_max, "k": self.cfg.k,
                "level": self.level, "name": self.spec.name, "seed": seed}

    def shoot(self, *frames):
        """A frame of the film: dream, real, and the colour of the dream's border."""
        self.now = frames[:len(self.worlds)]
        if len(self.film) < MAX_ROWS:
            self.film.append(np.concatenate([border(x, c) for x, c in
                                             zip(self.now, (frames[2], GREEN), strict=False)], 1))

    def tensors(self, actions):
        """Action dicts [row][t] -> tensors (rows, T, .)."""
        return {k: torch.as_tensor(np.array([[a[k] for a in row] for row in actions]),
                                   device=self.device) for k in actions[0][0]}

    def encode(self, frames):
        """Real frames (T, H, W, 3) -> their latents (1, T, S_z, Z); the last one is kept."""
        frames = torch.as_tensor(np.stack(frames), device=self.device)[None]
        z = self.run.tokenizer.encode(frames, self.encoder)
        self.z = z[:, -1:]
        return z

    def commit(self, z, actions, labelled):
        """Frames (1 or worlds, T, .) that are known now -> the dream's as pictures (T, H, W, 3)."""
        rows = self.n * len(self.worlds)
        many = lambda x: x.repeat_interleave(rows // len(x), 0)
        asked = torch.tensor(self.rung, device=self.device)
        self.dream.commit(z[:1], {k: x[:1] for k, x in actions.items()}, labelled[:1])
        if self.policies:
            h = self.reader.commit(many(z), {k: many(x) for k, x in actions.items()},
                                   many(labelled), self.run.agent.prompt(asked).repeat(
                                       len(self.worlds))[:, None].expand(-1, z.shape[1]))
            self.h = h[:, -1].view(len(self.worlds), self.n, -1)
            self.rewards = self.run.agent.rewards(self.h, asked).cpu().numpy()  # (worlds, n)
        return self.run.tokenizer.decode(z[:1], self.decoder)[0].cpu().numpy()

    def held(self, request):
        """The action of the keys that are held; of a categorical part the last one counts."""
        action, held = self.spec.actions.zeros(), request.get("held", [])
        for i in held if isinstance(held, list) else [held]:
            key = self.keys[pick({"held": i}, "held", range(len(self.keys)))]
            action[key["part"]][key["index"]] = key["value"]
        return action

    def policy(self, w):
        """World w -> its prompt, and its policy's logits (1, n) of the next action."""
        prompt = self.prompt if self.prompt >= 0 else self.rung.index(self.ladder.task[w])
        head = self.policies.get(self.who[w], self.run.agent.policy)
        return prompt, head(self.h[w, prompt][None])[:, 0]

    def step(self, request):
        """One frame of each world."""
        chosen = [self.held(request) for _ in self.worlds]
        for w in range(len(self.worlds)):
            if self.who[w] != "keys":
                drawn = sample_action(self.spec.actions, self.policy(w)[1], self.generator)
                chosen[w] = {k: x[0].cpu().numpy() for k, x in drawn.items()}
        events = np.zeros((2, len(self.spec.tasks)), bool)
        room = len(self.film) < MAX_ROWS
        actions, self.t = self.tensors([[a] for a in chosen]), self.t + 1
        frame, self.dream.k = self.now[-1], self.run.dynamics.cfg.k
        labelled = torch.ones(len(chosen), 1, dtype=torch.bool, device=self.device)
        z = self.dream.imagine({k: x[:1] for k, x in actions.items()}, labelled[:1])
        if len(chosen) == 2 and not self.over:
            frame, events[1], self.over = self.env.step(chosen[1])
            self.encode([frame])
            self.rows["real"] += [(frame, chosen[1], events[1], not self.over)] * room
        z = torch.cat([z, self.z]) if len(chosen) == 2 else z
        picture = self.commit(z, actions, labelled)[0]
        if self.policies:               # in the dream an event is a reward that the model predicts
            events[0, self.rung] = self.rewards[0] > 0.5
        self.rows["dream"] += [(picture, chosen[0], events[0], True)] * room
        self.shoot(picture, frame, ORANGE)
        self.ladder.advance(events)
        return self.show()

    def show(self):
        """What the page draws: pictures, and what the agent makes of them."""
        minds, agent = {}, self.run.agent
        for w, world in enumerate(self.worlds if self.policies else ()):
            prompt, logits = self.policy(w)
            binary, parts = split_logits(self.spec.actions, logits[0])
            p = torch.cat([binary.sigmoid(), *(x.softmax(-1) for x in parts[:1])]).tolist()
            h = self.h[w, prompt]
            minds[world] = {"prompt": prompt, "rewards": self.rewards[w].tolist(), "policy": p,
                            "value": agent.values(h).item(),
                            "goes_on": agent.continue_prob(h).item()}
        pictures = {world: png(x) for world, x in zip(self.worlds, self.now, strict=True)}
        return {"t": self.t, "over": self.over, "minds": minds, "pictures": pictures}

    def what_if(self, request):
        """Counterfactuals (Figure 6): each action held for some frames from the frozen state, in
        the dream and in copies of the real environment, where it can be copied."""
        frames, keys = pick(request, "frames", range(1, 17), 4), self.keys[:24]
        chosen = [self.held({"held": i}) for i in range(len(keys))]
        dream, decoder = self.dream.futures(len(keys)), self.decoder.fork(len(keys))
        for _ in range(frames):
            z, _ = dream.step(self.tensors([[a] for a in chosen]))
            pictures = self.run.tokenizer.decode(z, decoder)
        found = [{"label": key["label"], "dream": png(x[0])}
                 for key, x in zip(keys, pictures.cpu().numpy(), strict=True)]
        for action, shown in zip(chosen, found, strict=True):
            if len(self.worlds) == 2 and not self.over and (env := copy_env(self.env)):
                for _ in range(frames):
                    frame, _, end = env.step(action)
                    if end:
                        break
                shown["real"] = png(frame)
        return {"frames": frames, "outcomes": found}

    def denoise(self, request):
        """The next frame's K steps (Eq. 2): the noisy latents they see and the clean ones that they
        predict, as pictures."""
        steps = self.dream.futures(1).trace(self.tensors([[self.held(request)]]))
        z = torch.cat([x for pair in steps for x in pair])
        frames = self.run.tokenizer.decode(z, self.decoder.fork(len(z)))[:, 0].cpu().numpy()
        return {"sees": [png(x) for x in frames[::2]], "predicts": [png(x) for x in frames[1::2]]}

    def mask(self, request):
        """The tokenizer rebuilds the present picture with a share of its patches hidden."""
        share = pick(request, "share", range(101), 50) / 100
        frame = torch.as_tensor(self.now[-1], device=self.device)[None, None]
        tokenizer = self.run.tokenizer
        hidden = torch.rand(6, 1, tokenizer.patches, device=self.device) < share
        sees, rebuilt = tokenizer.rebuild(frame.expand(6, -1, -1, -1, -1), hidden)
        return {"sees": [png(x[0]) for x in sees.cpu().numpy()],
                "predicts": [png(x[0]) for x in rebuilt.cpu().numpy()]}

    def save(self, request):
        """The session as a GIF, and what each world showed as an episode of a dataset."""
        for world in self.worlds:
            folder = self.folder / world
            frames, actions, events, continues = zip(*self.rows[world], strict=True)
            write_episode(folder, len(list(folder.glob("episode_*.npy"))), frames,
                          {k: [a[k] for a in actions] for k in actions[0]}, events, continues)
            finish_dataset(folder, self.spec, {})
        path = self.folder / f"session_{len(list(self.folder.glob('*.gif'))):05d}.gif"
        write_film(path, np.stack(self.film))
        return {"saved": str(path), "frames": len(self.film)}


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /play asks the session; all else is refused and the line closed."""
    protocol_version, server_version, sys_version = "HTTP/1.1", "play", ""
    timeout, wbufsize, disable_nagle_algorithm = 60, -1, True

    def log_message(self, *_):
        pass

    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        if status != 200 or self.command != "POST":
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def send_error(self, code, message=None, explain=None):
        """Also http.server's own refusals; its code for an unknown method is 501."""
        message = message or HTTPStatus(code).phrase
        self.answer(405 if code == 501 else code, json.dumps({"error": message}).encode())

    def refused(self, path):
        """subtle: other sites can reach 127.0.0.1 through the browser, by a cross-site post or by
        a name of theirs that resolves to it. A port of its own is fine: that is a forwarded one."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        name = r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?"
        own = len(hosts) == 1 and re.fullmatch(name, hosts[0])
        if not own or any(origin != f"http://{hosts[0]}" for origin in origins):
            return self.send_error(403, "Got a foreign Host or Origin.") or True
        return self.path != path and (self.send_error(404) or True)

    def do_GET(self):
        if not self.refused("/"):
            self.answer(200, self.server.page, "text/html; charset=utf-8")

    def do_POST(self):
        if self.refused("/play"):
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            return self.send_error(415, "Need application/json.")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,9}", length):
            return self.send_error(411)
        if int(length) > MAX_BODY:
            return self.send_error(413, f"Need at most {MAX_BODY} bytes.")
        body = self.rfile.read(int(length))
        try:
            reply = self.server.pool.submit(self.server.session.handle, json.loads(body)).result()
        except (UserError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            return self.send_error(400, str(error))
        except Exception as error:
            print(f"error: {error!r}", file=sys.stderr)
            return self.send_error(500, repr(error))
        self.answer(200, json.dumps(reply).encode())


class Server(socketserver.ThreadingTCPServer):
    """A thread per connection; the session's work is done one request at a time, in one thread."""
    allow_reuse_address = daemon_threads = True
    request_queue_size = 32

    def __init__(self, session, page, port):
        self.session, self.page, self.pool = session, page, ThreadPoolExecutor(1)
        super().__init__(("127.0.0.1", port), Handler)

    def verify_request(self, request, client_address):
        return threading.active_count() < 64

    def handle_error(self, request, client_address):
        """A client that goes away is nothing to report."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"error: {error!r}", file=sys.stderr)


def open_server(session, port):
    """On this port of 127.0.0.1, or the next free one."""
    page = (Path(__file__).parent / "assets" / "play.html").read_bytes()
    for p in range(port, min(port + 100, 65536)) if port >= 0 else ():
        try:
            return Server(session, page, p)
        except OSError:
            continue
    raise UserError(f"Got --port {port}, need a free one there or up to 99 above: try another.")


def open_session(args):
    device, env = pick_device(args.device), make_env(data_config(args.run)["env"])
    run = load_run(args.run, None, device, args.dtype)
    if run.agent:
        freeze(run.agent, device, args.dtype)
    return Session(run, env, args.run, args.dtype)


def serve(args):
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))   # the browser needs the others
    with open_server(open_session(args), args.port) as server:
        port = server.server_address[1]
        print(f"Play at http://127.0.0.1:{port} (Ctrl-C ends it; from another machine: "
              f"ssh -L {port}:127.0.0.1:{port} HOST)", flush=True)
        if args.open:
            webbrowser.open(f"http://127.0.0.1:{port}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def film_actions(args):
    """`play.py dream --actions "right right do"`: the session's film, without a browser."""
    session = open_session(args)
    session.handle({"op": "reset", "seed": PLAY_SEED + args.seed})
    for word in args.actions.split():
        held = [i for i, key in enumerate(session.keys)
                if word == key["label"] or key["label"].split("_")[-1] == word]
        if len(held) != 1:
            raise UserError(f"Got action {word!r}, need one of "
                            f"{', '.join(key['label'] for key in session.keys)}.")
        session.handle({"op": "step", "held": held})
    return np.stack(session.film)


def whole_numbers(text):                                # argparse names it in its error
    return [int(k) for k in text.split(",")]


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="serve", choices=(
        "serve", "eval", "world", "labels", "bench", "dream", "report"))
    parser.add_argument("--port", type=int, default=8000, help="serve: this one or the next free")
    parser.add_argument("--open", action="store_true", help="serve: open the browser")
    parser.add_argument("--actions", help="dream: words like 'right right do', from one start")
    parser.add_argument("--run", default="runs/crafter", help="folder of a training run")
    parser.add_argument("--agents", default="random,bc,rl,player", help="eval: which agents")
    parser.add_argument("--episodes", type=int, default=200, help="eval: episodes of each policy")
    parser.add_argument("--length", type=int, default=500, help="eval: steps of an episode")
    parser.add_argument("--compare", metavar="NAME=RUNS:STAGE,...", help="eval: several runs, each "
                        "stage against the others: bc=seed*:agent,cool=seed*:agent@best,...")
    parser.add_argument("--world-only", action="store_true", help="eval: skip the agents")
    parser.add_argument("--with", dest="others", default="", metavar="NAME=RUN,...",
                        help="labels: runs with other shares of labels, among them none=...")
    parser.add_argument("--stage", choices=STAGES[1:], help="eval, world, labels: the stage "
                        "that is judged, default the run's latest, labels: dynamics")
    parser.add_argument("--parts", default="rollouts,interactions,sampling,long",
                        help="world: which measures")
    parser.add_argument("--policy", help="world: the run whose BC policy acts in sampling")
    parser.add_argument("--out", default=None, help="dream: .gif or .mp4, default RUN/dream.gif")
    parser.add_argument("--k", type=int, help="eval, world, labels, dream: sampling steps, "
                        "default the run's")
    parser.add_argument("--finest", action="store_true", help="eval, world, labels, dream: the "
                        "network is told its finest step, whatever K")
    parser.add_argument("--ks", default="1,2,4,8,16", metavar="K,K,...",
                        type=whole_numbers, help="world: the sampling steps that are compared")
    parser.add_argument("--clips", type=int, default=4, help="dream: pairs side by side")
    parser.add_argument("--horizon", type=int, default=32, help="dream: imagined frames")
    parser.add_argument("--seed", type=int, default=0, help="dream: seed of the noise, or world")
    parser.add_argument("--workers", type=int, default=0, help="processes, 0: one per core")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser


def evaluate(words):
    """`play.py eval` and the end of train.py: words of the command line -> results.json."""
    args, command = make_parser().parse_args(words), "python play.py " + shlex.join(words)
    folder, device, settings = Path(args.run), pick_device(args.device), data_config(args.run)
    if args.compare:
        from paper.figure3_agents import compare_agents
        return add_results(folder, command, compare_agents(
            folder, args.compare, args.episodes, args.length, device, args.dtype, args.workers),
            ("ladder_", "life_", "success_", "time_", "p_rl_", "temperature_", "validation_"))
    run, dataset = open_run(args, settings, device)
    add_results(folder, command, evaluate_world(run, dataset, args.dtype, horizon=16))
    if run.dynamics:
        add_results(folder, command, measure_speed(run, args.dtype))
    if run.agent and not args.world_only:
        add_results(folder, command, evaluate_heads(run, dataset, args.dtype))
        picture_imagined(run, dataset, folder / "imagined.png", dtype=args.dtype)
        if run.spec.ladder and "seed" in dataset.settings and can_copy(settings["env"]):
            runs = {name: load_run(folder, stage, device, args.dtype)
                    for name, stage in (("bc", "agent"), ("rl", "imagine"))
                    if (folder / f"{stage}.pt").exists()}
            add_results(folder, command, evaluate_imagination(runs, dataset, args.dtype))
        agents = [a for a in args.agents.split(",") if (a != "rl" or run.stage == "imagine")
                  and (a != "player" or hasattr(make_env(settings["env"]), "player"))]
        add_results(folder, command, evaluate_agents(folder, agents, args.episodes, args.length,
                                                     device, args.dtype, args.workers))


def evaluate_world_more(args, command):
    """`play.py world`: the measures of the world model that take longer, into results.json."""
    folder, device, settings = Path(args.run), pick_device(args.device), data_config(args.run)
    run, dataset = open_run(args, settings, device)
    parts = args.parts.split(",")
    if bad := set(parts) - {"rollouts", "interactions", "sampling", "long"}:
        raise UserError(f"Got parts {sorted(bad)}, need some of rollouts, interactions, sampling "
                        "and long.")
    if "interactions" in parts and not hasattr(make_env(settings["env"]), "reader"):
        raise UserError(f"Got --parts {args.parts}, need it without interactions: they are "
                        f"scripted for crafter, not for {settings['env']}.")
    from paper.figure5_interactions import evaluate_interactions, interaction_set
    from paper.figure8_sampling import evaluate_sampling
    from paper.rollouts import evaluate_long
    measures = {
        "rollouts": lambda: evaluate_world(run, dataset, args.dtype,
                                           simulator="seed" in dataset.settings,
                                           picture=folder / "rollouts.png"),
        "interactions": lambda: evaluate_interactions(
            run, interaction_set(settings["env"]), args.dtype, folder / "interactions.png"),
        "sampling": lambda: evaluate_sampling(
            run, dataset, load_run(args.policy or folder, "agent", device, args.dtype),
            args.ks, dtype=args.dtype),
        "long": lambda: evaluate_long(run, dataset, dtype=args.dtype, film=folder / "long.gif")}
    for part in parts:
        print(f"Measuring {part}.", flush=True)
        add_results(folder, command, measures[part]())


def load_asked(folder, args, device):
    """The run in `folder` at the stage, and sampling as, the command line asks for."""
    run = load_run(folder, args.stage, device, args.dtype)
    if run.dynamics is None and args.command != "eval":
        raise UserError(f"No dynamics in {folder}: run 'python train.py --stage dynamics'.")
    if run.dynamics:
        cfg = run.dynamics.cfg
        run.dynamics.cfg = dataclasses.replace(
            cfg, k=args.k or cfg.k, d_label="min" if args.finest else cfg.d_label)
    return run


def open_run(args, settings, device):
    """The run that the command names, and the reference set that it is judged by."""
    return load_asked(args.run, args, device), reference_set(
        settings["env"], settings["reference_episodes"], settings["length"], args.workers,
        settings.get("reference", ""))


def main():
    args = make_parser().parse_args()
    folder, command = Path(args.run), "python play.py " + shlex.join(sys.argv[1:])
    if args.command == "report":
        print(write_report(folder))
    elif args.command == "serve":
        serve(args)
    elif args.command == "eval":
        evaluate(sys.argv[1:])
    elif args.command == "world":
        evaluate_world_more(args, command)
    elif args.command == "labels":
        device, settings = pick_device(args.device), data_config(folder)
        args.stage = args.stage or "dynamics"           # as many steps in all of them
        run, dataset = open_run(args, settings, device)
        others = dict(pair.split("=", 1) for pair in args.others.split(",") if "=" in pair)
        if "none" not in others:
            raise UserError(f"Got --with {args.others!r}, need none=RUN,NAME=RUN,...: the run "
                            "without labels and those in between; --run is the one with all.")
        runs = {"all": run} | {k: load_asked(r, args, device) for k, r in others.items()}
        from paper.figure7_labels import evaluate_labels
        add_results(folder, command, evaluate_labels(runs, dataset, args.dtype))
    elif args.command == "bench":
        from paper.bench import bench
        entries = bench(pick_device(args.device), args.dtype)
        if folder.is_dir():
            add_results(folder, command, entries)
    else:
        path = Path(args.out or folder / "dream.gif")
        if args.actions is not None:
            film = film_actions(args)
        else:
            run, dataset = open_run(args, data_config(folder), pick_device(args.device))
            film = dream_film(run, dataset, args.clips, horizon=args.horizon, dtype=args.dtype,
                              seed=args.seed)
        write_film(path, film)
        print(path)
    if args.command in ("eval", "world", "labels"):
        print(results_table(read_results(folder)))


if __name__ == "__main__":
    run_cli(main)
