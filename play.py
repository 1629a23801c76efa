"""Look at what was learned: the game, films, the evaluation of a run and its report.

    python play.py --run runs/crafter         a game in the browser: dream beside reality
    python play.py eval --run runs/crafter    world model and agents, into results.json
    python play.py dream --run runs/crafter   a GIF: context, imagined and real side by side
    python play.py report --run runs/crafter  one page: report.md with pictures

A run is judged by rollouts and real episodes, not by losses (Sections 4.1 and 4.2). Films:
dream, shuffled (dreamed under another clip's actions), copy (last true frame repeated),
reconstruction (of the tokenizer) and next (dreamed one frame ahead of true ones). Intervals
are 95 %: bootstrap over recorded episodes, t over runs or else worlds, Wilson.
"""

import argparse
import base64
import json
import os
import re
import shlex
import socketserver
import sys
import tempfile
import threading
import webbrowser
import zlib
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple

import imageio
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from skimage.metrics import structural_similarity
from tqdm import tqdm

from agent import (MTP, STAGES, autocast, dream_of, find_checkpoint, freeze,
                   imagine_rollout, load_checkpoint, load_run, pick_device, pick_dtype,
                   sample_action, save_checkpoint, sha256_of, split_logits)
from data import (TYPES, Dataset, Episode, UserError, VecEnv, Windows, check_world,
                  controls, copy_env, count_workers, file_name, finish_dataset, make_env,
                  play_episode, read_json, record, run_cli, this_command, write_episode,
                  write_json, write_whole)
from dynamics import Batch, Dream
from tokenizer import Cache, compile_module

# Reported on; choices are made on reference episodes of seeds from 10,000 and in VALIDATION
REFERENCE_SEED, VALIDATION_SEED, TEST_SEED, PLAY_SEED = 15_000, 20_000, 50_000, 40_000
JUDGED = range(10_000, 60_000)                  # seeds of worlds that nothing trains on
REFERENCE_LENGTH = 300                          # frames, where training episodes are longer
HORIZONS = (1, 4, 8, 16, 32, 64)                # frames after the context
ENOUGH = 50                                     # cells of a class that is judged
CONTEXT, CLIPS = 16, 4                          # frames before a dream; clips an episode
BEST, GAMMA = 0.25, 0.99                        # share of returns that are best; discount
AGENTS = {"random": "", "BC": "agent", "imagination": "imagine", "player": ""}    # stages
GREEN, ORANGE = (60, 170, 90), (240, 140, 20)   # borders: real, imagined


# -------------------------------------------------------------- intervals and results.json

class Result(NamedTuple):
    """A row of results.json. low, high: 95 % interval, None: there is none; of: what was
    measured, {"film": "dream", "horizon": 4}; command: which wrote it."""
    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    of: dict = {}
    command: str = ""


def wilson(successes, n):
    """95 % Wilson interval of a success rate."""
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def t_interval(x):
    """x (n,) -> mean, low, high."""
    if len(x) < 2:
        return float(np.mean(x)), None, None
    half = stats.t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / len(x) ** 0.5
    return float(np.mean(x)), float(np.mean(x) - half), float(np.mean(x) + half)


def bootstrap(statistic, *samples):
    """samples (episodes, ...) -> statistic(*samples, axis) and its interval when episodes
    are drawn again, the same ones of all samples."""
    n = len(samples[0])
    rows = np.random.default_rng(0).integers(n, size=(2000, n))
    draws = statistic(*(x[rows] for x in samples), axis=1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(statistic(*samples, axis=0)), float(low), float(high)


def read_results(folder):
    path = Path(folder) / "results.json"
    return [Result(**row) for row in read_json(path)] if path.exists() else []


def find(rows, name, of=None):
    """The row of that name and `of`, or None."""
    return next((row for row in rows if (row.name, row.of) == (name, of or {})), None)


def add_results(folder, command, rows):
    """Add rows to results.json, in place of those of equal name and `of`."""
    def finite(x):                      # JSON knows neither nan nor inf
        return x if x is not None and np.isfinite(x) else None

    kept = [row for row in read_results(folder) if not find(rows, row.name, row.of)]
    for row in rows:
        kept.append(row._replace(value=finite(row.value), low=finite(row.low),
                                 high=finite(row.high), command=command))
    write_json(Path(folder) / "results.json", [row._asdict() for row in kept])


def forget_results(folder):
    """What was measured of a stage that is trained again; times stay."""
    rows = [row for row in read_results(folder) if row.name == "wall_minutes"]
    write_json(Path(folder) / "results.json", [row._asdict() for row in rows])


def read_metrics(folder):
    """The lines of metrics.jsonl; one that was cut off while it was written is left out."""
    path, lines = Path(folder) / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"Left out of {path}: a line that is cut off.", file=sys.stderr)
    return lines


# ------------------------------------------------------------------------- the world model

class Sampler(NamedTuple):
    """How frames are sampled; None: as the run was trained to."""
    k: int = None
    step_label: str = None


class Clips(NamedTuple):
    """Windows of recorded play; actions[:, t] led to frame t."""
    frames: torch.Tensor        # uint8 (n, T, H, W, 3)
    actions: torch.Tensor       # (n, T, A)
    labelled: torch.Tensor      # (n, T) bool: has an action
    episode: np.ndarray         # (n,)
    start: np.ndarray           # (n,)


AS_TRAINED = Sampler()


def reference_set(env, episodes=40, length=300, path=""):
    """Recorded play that is never trained on: the dataset at path, or recorded at first."""
    if path:
        return Dataset(path)
    length = min(length, REFERENCE_LENGTH)
    path = Path("datasets") / f"{file_name(env)}_reference_{episodes}x{length}"
    return record(env, path, episodes, length, REFERENCE_SEED)


def read_clips(dataset, episode, start, length, device):
    clips = dataset.read(episode, start, length, ("frames", "actions", "labelled"))
    return Clips(*(torch.from_numpy(x).to(device) for x in clips.values()), episode, start)


def reference_clips(dataset, per_episode, length, device, n=None):
    """Evenly spaced windows of each episode that is long enough; n: so many of them all."""
    long = [i for i in dataset.episodes("all") if dataset.lengths[i] >= length]
    if not long:
        raise UserError(f"Got episodes of at most {max(dataset.lengths)} frames in "
                        f"{dataset.path}, need {length} for a dream: record longer ones.")
    starts = [np.linspace(0, dataset.lengths[i] - length, per_episode) for i in long]
    where = np.stack([np.repeat(long, per_episode), np.concatenate(starts)]).astype(int)
    if n:
        where = where[:, np.linspace(0, where.shape[1] - 1, n).astype(int)]
    return read_clips(dataset, *where, length, device)


def encode(run, clips):
    """Clips -> Batch of their latents, 16 clips at a time."""
    z = torch.cat([run.tokenizer.encode(x) for x in clips.frames.split(16)])
    return Batch(z, clips.actions, clips.labelled)


@torch.no_grad()
def dream_clips(run, batch, horizon, seed=0, forced=False, sampler=AS_TRAINED):
    """Continue clips, a Batch (B, T, .), for their last `horizon` frames. Returns uint8
    (B, T, H, W, 3): the context reconstructed, the rest imagined, from what was imagined
    before or, `forced`, one step ahead from the true frames before it. The noise depends on
    the seed alone, so that two calls with other actions can be paired."""
    context, generator = batch.z.shape[1] - horizon, torch.Generator(batch.z.device)
    dream = Dream(run.dynamics, generator.manual_seed(seed), None, *sampler)
    cache, past = run.tokenizer.new_cache(), batch.z[:, :context]
    dream.commit(past, batch.actions[:, :context], batch.labelled[:, :context])
    frames = [run.tokenizer.decode(past, cache)]
    for t in range(context, batch.z.shape[1]):
        z, actions, labelled = (x[:, t:t + 1] for x in batch[:3])
        imagined = dream.imagine(actions, labelled)
        frames.append(run.tokenizer.decode(imagined, cache))
        if forced:                      # the true frame takes the imagined one's place
            cache.advance(-1)
            run.tokenizer.decode(z, cache)
        dream.commit(z if forced else imagined, actions, labelled)
    return torch.cat(frames, 1)


def squared_error(x_hat, x):
    """uint8 (B, T, H, W, 3) twice -> mean squared error (B, T) of pixels in [0, 1]."""
    return (x_hat.float() - x.float()).div(255).square().mean((2, 3, 4)).cpu().numpy()


def decibel(error, axis=0):
    """PSNR, at most 99 dB, of the mean squared error over all clips (not a mean of
    decibels)."""
    return -10 * np.log10(np.maximum(np.mean(error, axis), 10 ** -9.9))


def gain(error, other, axis=0):
    return decibel(error, axis) - decibel(other, axis)


def least_gain(error, other, axis=0):
    return gain(error, other, axis).min(-1)


def ratio(a, b, axis=0):
    return np.sum(a, axis) / np.maximum(np.sum(b, axis), 1e-9)


def ssim(x_hat, x):
    """Structural similarity (Wang et al. 2004) of uint8 (B, H, W, 3): (B,), Gaussian window
    of 11 pixels (smaller frames: what fits)."""
    size = min(11, (min(x.shape[1:3]) - 1) // 2 * 2 + 1)
    pairs = zip(x_hat.cpu().numpy(), x.cpu().numpy(), strict=True)
    return np.array([structural_similarity(
        a, b, win_size=size, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=255, channel_axis=-1) for a, b in pairs])


class Rollouts(NamedTuple):
    """Clips, and films that continue their first `context` frames, all uint8."""
    real: torch.Tensor          # (n, T, H, W, 3)
    films: dict                 # {name: (n, T, H, W, 3)}
    probes: dict                # ground truth of the clips (n, T, ...)
    context: int
    per_episode: int

    def by_episode(self, x):
        """(n, ...) -> (episodes, ...), means over an episode's clips, which are alike."""
        return x.reshape(-1, self.per_episode, *x.shape[1:]).mean(1)

    def horizons(self):
        """[(h, the frame that lies h after the context)]."""
        last = self.real.shape[1] - self.context
        return [(h, self.context + h - 1) for h in HORIZONS if h <= last]


def reader_of(dataset):
    """Reads symbols off pictures of the recorded environment; None: it has no reader."""
    env = make_env(dataset.settings["env"]) if "env" in dataset.settings else None
    return env.reader() if hasattr(env, "reader") else None


def read_probes(dataset, episode, start, length):
    """Ground truth of windows, dict of (n, length, ...), {} where none was recorded."""
    names = [name for name in dataset.rows(0).dtype.names if name not in TYPES]
    return dataset.read(episode, start, length, names) if names else {}


def shuffle_actions(actions, context, by):
    """What follows the context comes from the clip `by` rows before, of another episode."""
    return torch.cat([actions[:, :context], actions[:, context:].roll(by, 0)], 1)


def split_clips(dataset, context, horizon):
    """-> context and length of clips, less where the longest episode is shorter."""
    length = min(context + horizon, max(dataset.lengths))
    if length < 2:
        raise UserError(f"Got episodes of one frame in {dataset.path}, need two to dream.")
    return context if length > context else length // 2, length


@torch.no_grad()
def roll_out(run, dataset, horizon, context=CONTEXT, per_episode=CLIPS, sampler=AS_TRAINED):
    """Films of a run on the reference set; without dynamics reconstructions alone."""
    context, length = split_clips(dataset, context, horizon)
    clips, h = reference_clips(dataset, per_episode, length, run.device), length - context
    batch, probes = encode(run, clips), read_probes(dataset, *clips[3:], length)
    recon = torch.cat([run.tokenizer.decode(x) for x in batch.z.split(16)])
    films = {"reconstruction": recon}
    if run.dynamics:
        by = per_episode if len(recon) > per_episode else 1
        other = batch._replace(actions=shuffle_actions(batch.actions, context, by))
        films["copy"] = clips.frames[:, context - 1:context].expand_as(recon)
        films["dream"] = dream_clips(run, batch, h, sampler=sampler)
        films["shuffled"] = dream_clips(run, other, h, sampler=sampler)
        films["next"] = dream_clips(run, batch, h, forced=True, sampler=sampler)
    return Rollouts(clips.frames, films, probes, context, per_episode)


def score_pixels(rolled):
    """Rollouts -> rows of PSNR and SSIM by film and horizon, and the dream's gains."""
    n, C, rows = len(rolled.real), rolled.context, []
    errors = {film: rolled.by_episode(squared_error(frames, rolled.real))
              for film, frames in rolled.films.items()}         # (episodes, T)
    dream, copy = errors["dream"], errors["copy"]
    for h, t in rolled.horizons():
        for film in (film for film in errors if film != "next"):
            of, frames = {"film": film, "horizon": h}, rolled.films[film][:, t]
            likeness = rolled.by_episode(ssim(frames, rolled.real[:, t]))
            psnr = bootstrap(decibel, errors[film][:, t])
            rows.append(Result("psnr", *psnr, n, "dB", of))
            rows.append(Result("ssim", *bootstrap(np.mean, likeness), n, "ssim", of))
        for film, name in (("copy", "copying"), ("shuffled", "shuffled")):
            interval = bootstrap(gain, dream[:, t], errors[film][:, t])
            rows.append(Result(f"gain_over_{name}", *interval, n, "dB", {"horizon": h}))
    least = bootstrap(least_gain, dream[:, C:C + 16], copy[:, C:C + 16])
    rows.append(Result("least_gain_over_copying", *least, n, "dB"))
    ahead = bootstrap(decibel, errors["next"][:, C:].mean(1))
    return [*rows, Result("next_frame_psnr", *ahead, n, "dB")]


def sum_pairs(rolled, compare, film, times, back=None):
    """Reads the frames `times` of a film by compare(frames, true, shown), the truth beside
    it -> {name: (a, b)} summed over them, float (2, n). The model was last shown a true
    frame `back` frames before; None: it was shown this one."""
    sums, shown = {}, None
    for t in times:
        true = {name: x[:, t] for name, x in rolled.probes.items()}
        if back:
            shown = {name: x[:, t - back] for name, x in rolled.probes.items()}
        frames = rolled.films[film][:, t].cpu().numpy()
        for name, pair in compare(frames, true, shown).items():
            sums[name] = sums.get(name, 0) + np.array(pair, float)
    return sums


def score_frames(rolled, reader, of, times, back=None):
    """A row for each of the reader's measures, see sum_pairs."""
    sums = sum_pairs(rolled, reader.compare, of["film"], times, back)
    return [Result(measure, *bootstrap(ratio, rolled.by_episode(a), rolled.by_episode(b)),
                   int(b.sum()), "share", of) for measure, (a, b) in sums.items()]


def balanced(right, count, axis=0):
    """(episodes, classes) twice -> the mean over classes of the share that is right."""
    return ratio(right, count, axis).mean(-1)


def score_classes(rolled, reader, of, times, back=None):
    """By what a cell truly shows: a row for each class that has enough cells, the worst of
    them, and their mean ("balanced_cells")."""
    sums = sum_pairs(rolled, reader.by_class, of["film"], times, back)
    sums = {name: pair for name, pair in sums.items() if pair[1].sum() >= ENOUGH}
    if not sums:
        return []
    pairs = {name: [rolled.by_episode(x) for x in pair] for name, pair in sums.items()}
    rows = [Result("class_cells", *bootstrap(ratio, *pair), int(sums[name][1].sum()),
                   "share", of | {"class": name}) for name, pair in pairs.items()]
    worst = min(rows, key=lambda row: row.value)
    rows.append(worst._replace(name="worst_class", of=of,
                               unit=f"share of {worst.of['class']}"))
    right, count = (np.stack(x, -1) for x in zip(*pairs.values(), strict=True))
    mean = bootstrap(balanced, right, count)
    return [*rows, Result("balanced_cells", *mean, len(pairs), "share", of)]


def score_symbols(rolled, reader):
    """Rollouts -> rows of the reader's measures: of the dream by horizon, over all single
    steps, and of the reconstructions: as much as the tokenizer lets one see."""
    every = range(rolled.real.shape[1])
    rows = score_frames(rolled, reader, {"film": "reconstruction"}, every)
    if "dream" in rolled.films:
        for h, t in rolled.horizons():
            rows += score_frames(rolled, reader, {"film": "dream", "horizon": h}, [t], h)
        for film in ("next", "reconstruction"):
            rows += score_frames(rolled, reader, {"film": film}, every[rolled.context:], 1)

    # by class, where the reader knows any
    if hasattr(reader, "by_class"):
        rows += score_classes(rolled, reader, {"film": "reconstruction"}, every)
        if "dream" in rolled.films:
            steps = every[rolled.context:]
            rows += score_classes(rolled, reader, {"film": "next"}, steps, 1)
            far = {"film": "dream", "horizon": 8}
            steps = [t for h, t in rolled.horizons() if h == 8]
            rows += score_classes(rolled, reader, far, steps, 8)
    return rows


def evaluate_world(run, dataset, dtype="auto", horizon=16, sampler=AS_TRAINED):
    """PSNR, SSIM and symbols on the reference set -> [Result]."""
    with autocast(run.device, dtype):
        rolled = roll_out(run, dataset, horizon, sampler=sampler)
    error = squared_error(rolled.films["reconstruction"], rolled.real).mean(1)
    psnr = bootstrap(decibel, rolled.by_episode(error))
    rows = [Result("tokenizer_psnr", *psnr, len(error), "dB")]
    if run.dynamics:
        rows += score_pixels(rolled)
    reader = reader_of(dataset)
    if reader and not rolled.probes:
        print(f"{dataset.path} holds no symbols to compare with: record it anew.")
    elif reader:
        rows += score_symbols(rolled, reader)
    return rows


# ---------------------------------------------------------------- agents in the real world

class PromptOrder:
    """The prompts of N environments, `task` (N,): the first of the order that real events
    have not done often enough yet, or its last one. Without an order each task is asked for
    in turn, once. Needs break in when they are due, until they are met or half the time
    between two is over."""

    def __init__(self, spec, n):
        order = spec.prompt_order or [(task, 1) for task in spec.tasks]
        order = [(spec.tasks.index(task), times or np.inf) for task, times in order]
        self.order, times = map(np.array, zip(*order or [(0, np.inf)], strict=True))
        # how often in all where a task is asked for again later
        same = np.tril(self.order[:, None] == self.order)
        self.often = np.where(same, times, 0).sum(1)
        self.count = np.zeros((n, len(spec.tasks) + 1))     # there may be no task at all
        needs = [(spec.tasks.index(task), *numbers) for task, *numbers in spec.needs]
        self.needs, self.times, first, self.every = np.array(needs, int).reshape(-1, 4).T
        self.due = np.tile(first, (n, 1))       # (N, needs): steps until it is asked for
        self.met = np.zeros_like(self.due)      # and how often it was met since
        self.tasks = tuple(dict.fromkeys([*self.order.tolist(), *self.needs.tolist()]))

    @property
    def task(self):
        done = self.count[:, self.order] >= self.often
        place = done.cumprod(1).sum(1).clip(max=len(self.order) - 1)
        if not len(self.needs):
            return self.order[place]
        due = self.due <= 0
        return np.where(due.any(1), self.needs[due.argmax(1)], self.order[place])

    def advance(self, events):
        """events (N, tasks) of one step -> rows (N,) bool whose prompt changed."""
        before = self.task
        events = np.pad(events, ((0, 0), (0, 1)))
        self.count += events
        self.met += events[:, self.needs].astype(int)
        over = (self.met >= self.times) | (self.due <= -(self.every // 2))
        self.due = np.where(over, self.every, self.due - 1)
        self.met = np.where(over, 0, self.met)
        return self.task != before


class Along(NamedTuple):
    """After each recorded frame, (frames,): the task that would be asked for, and in how
    many frames it is next done, inf: never. (spec.returns: 0 before the BEST returns.)"""
    task: np.ndarray
    ahead: np.ndarray


def prompts_along(data):
    """The prompts of an agent to whom happens what was recorded -> Along."""
    if data.spec.returns:
        return before_returns(data)
    prompts, ahead = [], []
    for i in data.episodes("all"):
        events, order = np.asarray(data.episode(i)["events"]), PromptOrder(data.spec, 1)
        asked = [order.task[0]]
        for now in events[1:]:
            order.advance(now[None])
            asked.append(order.task[0])
        rows = np.arange(len(events))
        at = np.where(np.pad(events, ((0, 0), (0, 1))) > 0, rows[:, None], np.inf)
        at = np.minimum.accumulate(at[::-1])[::-1]          # this row or the next with one
        at = np.concatenate([at[1:], np.full_like(at[:1], np.inf)])
        prompts.append(asked)
        ahead.append(at[rows, asked] - rows)
    return Along(np.concatenate(prompts), np.concatenate(ahead))


def before_returns(data):
    """prompts_along where rewards are summed: which frames have the best returns ahead.
    Behind the end of a recording that was cut off the mean reward goes on."""
    returns, episodes = np.zeros(data.frames_total), data.episodes("all")
    rewards = [np.asarray(data.episode(i)["events"])[:, 0] for i in episodes]
    mean = np.concatenate([x[1:] for x in rewards]).mean()
    for i, reward in zip(episodes, rewards, strict=True):
        first, last = data.offsets[i], len(reward) - 1
        goes_on = data.episode(i)["continues"][last]
        returns[first + last] = ahead = goes_on * mean / (1 - GAMMA)
        for t in range(last - 1, -1, -1):
            returns[first + t] = ahead = reward[t + 1] + GAMMA * ahead
    best = returns > np.quantile(returns, 1 - BEST)
    return Along(np.zeros(len(best), int), np.where(best, 0.0, np.inf))


class Actor:
    """The policy in N real environments at once: frames in, sampled actions out."""

    def __init__(self, run, generator, temperature=1.0):
        self.run, self.generator, self.temperature = run, generator, temperature
        self.dream, self.encoder = Dream(run.dynamics, generator), run.tokenizer.new_cache()
        self.history = []               # z, actions, labelled of the frames in the window

    def tensor(self, x):
        return torch.as_tensor(x, device=self.run.device)

    @torch.no_grad()
    def observe(self, frames, actions, labelled, task, changed=()):
        """frames (N, H, W, 3), the actions (N, A) that led there, task (N,) from now on.
        Where the prompt `changed`, the window is replayed with the new one, so that the
        cache of agent tokens never mixes prompts."""
        z = self.run.tokenizer.encode(self.tensor(frames)[:, None], self.encoder)
        labelled = torch.full(z.shape[:2], labelled, device=z.device)
        now = (z, self.tensor(actions)[:, None], labelled)
        self.history = [*self.history, now][-self.dream.cache.context:]
        self.task = self.run.agent.prompt(self.tensor(task))
        self.h = self.dream.commit(*now, self.task[:, None])[:, 0]
        if np.any(changed):
            self.replay(self.tensor(np.flatnonzero(changed)))

    def select_rows(self, rows):
        """Go on with these rows (n,) alone."""
        rows = self.tensor(rows)
        self.dream.cache.select_rows(rows)
        self.encoder.select_rows(rows)
        self.history = [tuple(x[rows] for x in frame) for frame in self.history]

    def replay(self, rows):
        """Commit the window of these rows again, under their present task. Exact for one
        time layer; with more its first frames lose what they had seen before it."""
        past = [torch.cat(parts, 1)[rows] for parts in zip(*self.history, strict=True)]
        T, cache = len(self.history), self.dream.cache
        fresh = Dream(self.run.dynamics, self.generator, Cache(cache.context, cache.t - T))
        h = fresh.commit(*past, self.task[rows, None].expand(-1, T))
        cache.copy_rows(rows, fresh.cache)
        self.h[rows] = h[:, -1]

    @torch.no_grad()
    def act(self):
        return self.run.agent.act(self.h, self.generator, self.temperature).cpu().numpy()


def play_episodes(worlds, length, run=None, dtype="auto", seed=0, temperature=1.0):
    """One sampled episode in each of `worlds` (VecEnv); run None: uniform random actions.
    Returns first (N, tasks + 1): the step at which each task was first done (spec.returns:
    of the first the sum of its rewards) and, last, that of death, inf where never."""
    spec, N = worlds.spec, len(worlds.seeds)
    device = run.device if run else torch.device("cpu")
    frames, order, alive = worlds.reset(), PromptOrder(spec, N), np.arange(N)
    first, rng = np.full((N, len(spec.tasks) + 1), np.inf), np.random.default_rng(seed)
    total = np.zeros(N)
    with autocast(device, dtype):
        if run:
            actor = Actor(run, torch.Generator(device).manual_seed(seed), temperature)
            actor.observe(frames, spec.actions.zeros(N), False, order.task)
        for step in tqdm(range(1, length + 1), desc=f"{N} episodes", leave=False):
            actions = spec.actions.zeros(N)
            actions[alive] = actor.act() if run else spec.actions.sample(rng, len(alive))
            frames, events, terminal = worlds.step(actions)

            # what has happened for the first time, and the prompts that follow
            now = np.concatenate([events > 0, terminal[:, None]], 1)
            first[now & np.isinf(first)] = step
            total += events[:, :1].sum(1)
            changed = order.advance(events)
            if terminal.all():
                break

            # the dead aren't computed any more
            survivors = np.flatnonzero(~terminal[alive])
            if run and len(survivors) < len(alive):
                actor.select_rows(survivors)
            alive = alive[survivors]
            if run:
                actor.observe(frames[alive], actions[alive], True, order.task[alive],
                              changed[alive])
    if spec.returns:
        first[:, 0] = total
    return first


def play_recorded(worlds, length):
    """The recorded player in the same worlds -> first, as play_episodes."""
    first = []
    with tempfile.TemporaryDirectory() as folder:
        seed, n = int(worlds.seeds[0]), len(worlds.seeds)
        data = record(worlds.name, folder, n, length + 1, seed)
        for episode in map(data.episode, data.episodes("all")):
            events = np.column_stack([episode["events"] > 0, episode["continues"] == 0])
            first.append(np.where(events.any(0), events.argmax(0), np.inf))
            if data.spec.returns:
                first[-1][0] = episode["events"][:, 0].sum()
    return np.stack(first)


class Episodes(NamedTuple):
    """What an agent of a run did in N worlds: first (N, tasks + 1), see play_episodes."""
    agent: str
    run: str
    first: np.ndarray


def played(folder, worlds, agent, length, device, dtype="auto", temperature=0.0):
    """Episodes of an agent of AGENTS in `worlds`, sampled at a temperature (0: its own).
    They are kept in RUN/episodes, and read back where the same checkpoint is asked for the
    same again."""
    folder, seeds, stage = Path(folder), worlds.seeds, AGENTS[agent]
    name, run, own = f"{worlds.name}_{agent}_{seeds[0]}_{len(seeds)}x{length}", None, 1.0
    if stage:
        run = load_run(folder, stage, device, dtype)
        own = run.agent.cfg.temperature         # it was made so much colder already
        temperature = temperature or own
        crc = zlib.crc32((folder / f"{stage}.pt").read_bytes())
        name += f"_t{temperature:g}_{pick_dtype(device, dtype)}_{crc:08x}"
    if agent == "player":                       # another player, other reference episodes
        name += f"_{reference_of(folder).fingerprint[:8]}"
    path = folder / "episodes" / f"{file_name(name)}.npy"
    if path.exists():
        print(f"{path} is there; delete it to play again.")
        return Episodes(agent, folder.name, np.load(path))
    at = f", temperature {temperature:g}" if stage else ""
    print(f"{folder}, {agent}{at}: {len(seeds)} episodes of {length} steps.", flush=True)
    if agent == "player":
        first = play_recorded(worlds, length)
    else:
        colder = temperature / own or 1.0
        first = play_episodes(worlds, length, run, dtype, temperature=colder)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, lambda file: np.save(file, first))
    return Episodes(agent, folder.name, first)


def achievements_of(spec):
    """The tasks that are counted, by number; where rewards are summed those behind it."""
    if spec.returns:
        return list(range(1, len(spec.tasks)))
    return [spec.tasks.index(task) for task in spec.achievements or spec.tasks]


def count_achievements(spec, first):
    """first (..., tasks + 1) -> (...): how many were reached, whatever the prompts, or the
    return."""
    if spec.returns:
        return first[..., 0]
    return np.isfinite(first[..., achievements_of(spec)]).sum(-1)


def score_name(spec):
    return "return" if spec.returns else "achievements"


def firsts_of(plays, agent):
    """(runs, N, tasks + 1)."""
    return np.stack([episodes.first for episodes in plays if episodes.agent == agent])


def over_runs(x):
    """x (runs, N) -> mean and interval over runs where there are several, else over worlds;
    and how many episodes."""
    return *t_interval(x.mean(1) if len(x) > 1 else x[0]), x.size


def agent_rows(spec, plays, length):
    """Episodes of all agents -> rows: achievements, steps alive, share alive at the end,
    success and mean time of each achievement (failures count in full). The interval of
    success is the wider of that over runs and Wilson's of all episodes, for runs without
    any success don't differ."""
    rows = []
    for agent in dict.fromkeys(episodes.agent for episodes in plays):
        first, of = firsts_of(plays, agent), {"agent": agent}
        score, alive = count_achievements(spec, first), np.minimum(first[..., -1], length)
        rows.append(Result(score_name(spec), *over_runs(score), score_name(spec), of))
        rows.append(Result("steps_alive", *over_runs(alive), "steps", of))
        rows.append(Result("alive", *over_runs(np.isinf(first[..., -1])), "share", of))
        for task in achievements_of(spec):
            of, when = {"agent": agent, "task": spec.tasks[task]}, first[..., task]
            done = np.isfinite(when)
            low, high = wilson(done.sum(), done.size)
            share, runs_low, runs_high, n = over_runs(done)
            if len(done) > 1:
                low, high = max(min(low, runs_low), 0.0), min(max(high, runs_high), 1.0)
            rows.append(Result("success", share, low, high, n, "share", of))
            rows.append(Result("time", *over_runs(np.minimum(when, length)), "steps", of))
    return rows


def difference_rows(spec, plays, a, b, length):
    """Rows that compare two agents in the worlds that both played: achievements, and the
    time of what both reach in most episodes. One run is compared with each of the other's.
    """
    first, other, of = firsts_of(plays, a), firsts_of(plays, b), {"agent": a, "than": b}
    n = min(first.shape[1], other.shape[1])
    first, other = np.broadcast_arrays(first[:, :n], other[:, :n])
    more = count_achievements(spec, first) - count_achievements(spec, other)
    name = score_name(spec)
    rows = [Result(f"{name}_gain", *over_runs(more), name, of)]
    for task in achievements_of(spec):
        x, y = first[..., task], other[..., task]
        if min(np.isfinite(x).mean(), np.isfinite(y).mean()) > 0.5:
            later = over_runs(np.minimum(x, length) - np.minimum(y, length))
            task_of = of | {"task": spec.tasks[task]}
            rows.append(Result("time_gain", *later, "steps", task_of))
    return rows


def evaluate_agents(folder, device, dtype, episodes, length, agents=tuple(AGENTS)):
    """Those of the agents that there are in the test worlds, the recorded player in half of
    them -> [Result]."""
    if bad := set(agents) - set(AGENTS):
        raise UserError(f"Got agents {sorted(bad)}, need some of {', '.join(AGENTS)}.")
    folder, env, plays = Path(folder), data_config(folder)["env"], []
    if hasattr(make_env(env), "recordings"):
        print(f"Nobody can play {env}: no agent is judged.")
        return []
    seeds = range(TEST_SEED, TEST_SEED + episodes)
    there = {agent for agent, stage in AGENTS.items() if (folder / f"{stage}.pt").exists()}
    there |= {"random", "player"} if hasattr(make_env(env), "player") else {"random"}
    if {"BC", "imagination"} <= there:
        provenance = load_checkpoint(folder / "imagine.pt")["provenance"]
        if provenance.get("agent") != sha256_of(folder / "agent.pt"):
            print(f"Left out: imagination; {folder}/agent.pt was trained again since.")
            there.remove("imagination")
    with VecEnv(env, seeds) as worlds, VecEnv(env, seeds[:max(episodes // 2, 2)]) as fewer:
        for agent in (agent for agent in agents if agent in there):
            some = fewer if agent == "player" else worlds
            plays.append(played(folder, some, agent, length, device, dtype))
    rows, names = agent_rows(worlds.spec, plays, length), {p.agent for p in plays}
    for a, others in (("imagination", ("BC", "random", "player")), ("BC", ("random",))):
        for b in others:
            if {a, b} <= names:
                rows += difference_rows(worlds.spec, plays, a, b, length)
    return rows


def data_config(folder):
    """The data settings of a run, from its config.json."""
    path = Path(folder) / "config.json"
    need = {"env", "reference_episodes", "length", "eval_episodes", "eval_length"}
    if not path.exists():
        raise UserError(f"No config.json in {folder}: name the folder of a run, or make "
                        "one with 'python train.py'.")
    config = read_json(path)
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or need - set(data):
        raise UserError(f"Got {path} without {sorted(need)} in 'data', need what train.py "
                        "wrote: run its command again.")
    return data


def reference_of(folder):
    """The reference set by which a run is judged."""
    data = data_config(folder)
    return reference_set(data["env"], data["reference_episodes"], data["length"],
                         data.get("reference", ""))


def judge_world(folder, stage, device, dtype="auto", sampler=AS_TRAINED):
    """The world model of a stage (None: the latest) -> results.json. Returns the run."""
    dataset, run = reference_of(folder), load_run(folder, stage, device, dtype)
    check_world(data_config(folder)["env"], dataset)
    if run.spec != dataset.spec:
        raise UserError(f"Got {run.path}, made with another world than {dataset.path} "
                        "holds, need one of that: train it again.")
    rows = evaluate_world(run, dataset, dtype, sampler=sampler)
    add_results(folder, this_command(), rows)
    if run.agent:
        picture_imagined(run, dataset, Path(folder) / "imagined.png", dtype=dtype)
    return run


def evaluate(folder, device, dtype="auto", episodes=200, length=500, agents=tuple(AGENTS),
             sampler=AS_TRAINED):
    """`play.py eval` and the end of train.py: world model and, with episodes, agents."""
    run = judge_world(folder, None, device, dtype, sampler)
    if run.agent and episodes:
        rows = evaluate_agents(folder, device, dtype, episodes, length, agents)
        add_results(folder, this_command(), rows)


# ----------------------------------------------------------------- films, pictures, report

def enlarge(frames, factor=2):
    return np.asarray(frames).repeat(factor, -3).repeat(factor, -2)


def write_film(path, frames, fps=8):
    """frames uint8 (T, H, W, 3) -> .gif or .mp4, twice as large."""
    gif = {"duration": 1000 / fps, "loop": 0}
    how = {"fps": fps} if Path(path).suffix == ".mp4" else gif
    imageio.mimwrite(path, list(enlarge(frames)), **how)


def border(frames, color, width=3):
    """A coloured border around uint8 frames (..., H, W, 3)."""
    frames = np.pad(frames, [(0, 0)] * (frames.ndim - 3) + [(width, width)] * 2 + [(0, 0)])
    edge = np.ones(frames.shape[-3:-1], bool)
    edge[width:-width, width:-width] = False
    frames[..., edge, :] = color
    return frames


@torch.no_grad()
def dream_film(run, dataset, clips=4, horizon=32, dtype="auto", seed=0, sampler=AS_TRAINED):
    """uint8 (T, H', W', 3): for each clip imagined (left) and real (right). The left border
    is green while the model is shown real frames and orange from where it imagines."""
    context, length = split_clips(dataset, CONTEXT, horizon)
    real = reference_clips(dataset, 1, length, run.device, clips)
    with autocast(run.device, dtype):
        batch = encode(run, real)
        dreamed = dream_clips(run, batch, length - context, seed, sampler=sampler)
    dreamed = dreamed.cpu().numpy()
    left = np.concatenate([border(dreamed[:, :context], GREEN),
                           border(dreamed[:, context:], ORANGE)], 1)
    pairs = np.concatenate([left, border(real.frames.cpu().numpy(), GREEN)], -2)
    return np.concatenate(list(pairs), -2)      # the clips side by side


@torch.no_grad()
def picture_reconstructions(run, dataset, path, n=8, dtype="auto"):
    """Real frames above, reconstructions below."""
    clips = reference_clips(dataset, 1, min(16, min(dataset.lengths)), run.device, n)
    with autocast(run.device, dtype):
        rebuilt = run.tokenizer.decode(encode(run, clips).z)
    pair = torch.cat([clips.frames[:, -1], rebuilt[:, -1]], 1).cpu().numpy()
    imageio.imwrite(path, enlarge(np.concatenate(list(pair), 1)))


def new_figure(rows, columns, size, pad=1.08):
    """matplotlib without a screen -> figure and its axes (rows, columns)."""
    figure = Figure(size, tight_layout={"pad": pad})
    return figure, figure.subplots(rows, columns, squeeze=False)


def picture_curves(folder, stage):
    """metrics.jsonl -> STAGE_curves.png, one small chart per logged key."""
    lines = [x for x in read_metrics(folder) if x["stage"] == stage]
    keys = {k: None for x in lines for k in x if k not in ("stage", "step", "rate")}
    if not keys:
        return
    rows = -(-len(keys) // 4)
    figure, axes = new_figure(rows, 4, (14, 2.6 * rows))
    for axis in axes.flat[len(keys):]:
        axis.axis("off")
    for axis, key in zip(axes.flat, keys, strict=False):
        steps, values = zip(*[(x["step"], x[key]) for x in lines if key in x], strict=True)
        axis.plot(steps, values)
        axis.set_title(key, fontsize=9)
        if min(values) > 0 and max(values) > 5 * min(values):
            axis.set_yscale("log")
    figure.savefig(Path(folder) / f"{stage}_curves.png", dpi=70)


def agents_in(results):
    """Names of the agents that were judged, worst first."""
    rows = [row for row in results if row.name == "achievements"]
    return [row.of["agent"] for row in sorted(rows, key=lambda row: row.value)]


def picture_agents(path, spec, results, measure):
    """Bars of success or time by achievement and agent (the paper's Figures 3 and 4)."""
    agents, tasks = agents_in(results), spec.achievements or spec.tasks
    if not agents or not tasks:
        return
    figure, ((axis,),) = new_figure(1, 1, (13, 3.6))
    for i, agent in enumerate(agents):
        rows = [find(results, measure, {"agent": agent, "task": task}) for task in tasks]
        value, low, high = np.array([row[1:4] for row in rows], float).T    # None: nan
        axis.bar(np.arange(len(rows)) + 0.84 * i / len(agents), value, 0.84 / len(agents),
                 yerr=np.maximum([value - low, high - value], 0), label=agent)
    axis.set_xticks(np.arange(len(tasks)) + 0.4, tasks, rotation=25, ha="right")
    axis.set_ylabel("success" if measure == "success" else "steps, failures count in full")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=80)


@torch.no_grad()
def picture_imagined(run, dataset, path, rows=3, dtype="auto", seed=0):
    """Imagined rollouts of the policy, from reference windows before an event of the
    prompts (where one fits): its task, the rewards r and values v that it expects."""
    agent, device, names = run.agent, run.device, run.spec.tasks or ("no task",)
    C, H = agent.cfg.context, agent.cfg.horizon
    windows = Windows(C, True, "all", (C, C + H - 1), PromptOrder(run.spec, 1).tasks)
    if not len(dataset.long_enough(windows)):
        print(f"Left out: {path}, for no episode in {dataset.path} has {C} frames.")
        return
    windows = windows._replace(relevant=len(dataset.windows_with_event(windows)[0]) > 0)
    *where, task = dataset.sample(np.random.default_rng(seed), rows, windows)
    asked = torch.as_tensor(task, device=device)[:, None]
    with autocast(device, dtype):
        batch = encode(run, read_clips(dataset, *where, C, device))
        batch = batch._replace(task=agent.prompt(asked).expand(-1, C))
        generator = torch.Generator(device).manual_seed(seed)
        dream = dream_of(run.dynamics, agent, generator)
        rolled = imagine_rollout(dream, agent, batch, H)
        frames = run.tokenizer.decode(torch.cat([batch.z, rolled.z], 1)).cpu().numpy()
        rewards, values = agent.rewards(rolled.h, asked), agent.values(rolled.h)
    figure, axes = new_figure(rows, H + 1, (1.1 * (H + 1), 1.5 * rows), 0.3)
    for (i, t), axis in np.ndenumerate(axes):
        title = f"r {rewards[i, t]:.2f}" if t else names[task[i]]
        axis.imshow(frames[i, C - 1 + t])
        axis.set_title(f"{title}\nv {values[i, t]:.2f}", fontsize=6, pad=2)
        axis.axis("off")
    figure.savefig(path, dpi=110)


PICTURES = {"tokenizer_reconstructions.png": "Real frames (above) and reconstructions",
            "dream.gif": "Dreams (left of each pair, orange border) beside reality (right)",
            "success.png": "Success by achievement, 95 % intervals",
            "times.png": "Mean time to each achievement, 95 % intervals",
            "imagined.png": "Imagined rollouts of the policy: rewards r and values v",
            **{f"{stage}_curves.png": f"Training curves: {stage}" for stage in STAGES}}


def markdown_table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def headlines(folder):
    """Of a run's results what one looks at first, as a table; report.md has all."""
    names = ("tokenizer_psnr", "balanced_cells", "worst_class", "gain_over_copying",
             "gain_over_shuffled", "achievements", "achievements_gain", "alive", "return",
             "return_gain", "wall_minutes")
    return results_table([row for row in read_results(folder) if row.name in names
                          or row.of.get("task") == "success"])     # where a world says so


def results_table(results):
    """Rows of results.json -> markdown."""
    rows = []
    for r in sorted(results, key=lambda r: (r.name, str(r.of))):
        interval = "" if r.low is None else f"{r.low:.3g} to {r.high:.3g}"
        of = ", ".join(map(str, r.of.values()))
        value = "" if r.value is None else f"{r.value:.4g}"
        rows.append((r.name, of, value, interval, r.n, r.unit))
    return markdown_table(("measure", "of", "value", "95 % interval", "n", "unit"), rows)


def write_report(folder):
    """report.md: all rows of results.json and all pictures of the run. Returns its path."""
    folder = Path(folder)
    data_config(folder)
    config = json.dumps(read_json(folder / "config.json"), indent=1)
    results, spec = read_results(folder), load_run(folder).spec
    picture_agents(folder / "success.png", spec, results, "success")
    picture_agents(folder / "times.png", spec, results, "time")
    pictures = [f"## {title}\n![{title}]({name})" for name, title in PICTURES.items()
                if (folder / name).exists()]
    parts = [f"# Report of {folder}", results_table(results), "Commands: `results.json`.",
             *pictures, f"## Settings\n```json\n{config}\n```"]
    text = "\n\n".join(parts) + "\n"        # a folder's name need not be UTF-8
    (folder / "report.md").write_text(text, "utf-8", "backslashreplace")
    return folder / "report.md"


# -------------------------------------------------------------------- play inside the dream

PLAYED, MAX_ROWS, MAX_BODY = 64, 3000, 4096     # frames before the game, of a film; bytes
WORLDS = ("dream", "real")
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": "default-src 'none'; connect-src 'self'; "
           "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
           "frame-ancestors 'none'"}


def pick(request, name, options, default=None):
    """A field of a request: a whole number or word among the options, else UserError."""
    x = request.get(name, default)
    if type(x) not in (int, str) or x not in options:
        numbers = isinstance(options, range)
        need = f"{options[0]} to {options[-1]}" if numbers else ", ".join(map(str, options))
        raise UserError(f"Got {name} {x!r}, need one of {need}.")
    return x


def read_numbers(request, n):
    """Where the sliders of a request stand: n numbers from -1 to 1, else UserError."""
    numbers = request.get("numbers", [0] * n)
    right = isinstance(numbers, list) and len(numbers) == n
    if not right or any(type(x) not in (int, float) or not abs(x) <= 1 for x in numbers):
        raise UserError(f"Got numbers {numbers!r}, need a list of {n} from -1 to 1.")
    return numbers


def png(frame):
    """uint8 (H, W, 3) -> a PNG as base64 text."""
    data = imageio.imwrite("<bytes>", frame, format="png", compress_level=1)
    return base64.b64encode(data).decode()


class Row(NamedTuple):
    """A frame that a world showed, the action that led there and what happened."""
    frame: np.ndarray
    action: np.ndarray
    events: np.ndarray
    continues: bool = True


class Session:
    """The game: the dream beside the real environment (None: alone), from the same start.

    `handle` answers one request, a dict with "op" and the page's settings. Of the pages
    that are open, each with a "tab" of its own, one has the `seat` and plays; a request
    without "tab" always may. `dream` has no task; `policy_dream` commits the same frames
    for every world and prompt, so that h (worlds, n, D) is there for all.
    """

    def __init__(self, run, env, folder, dtype="auto"):
        if run.dynamics is None:
            raise UserError(f"No dynamics in {folder}: run 'python train.py --stage "
                            "dynamics' first.")
        self.run, self.env, self.dtype, self.device = run, env, dtype, run.device
        self.folder = Path(folder) / "sessions"
        world = run if env is None else env
        self.spec, self.keys = world.spec, controls(world)
        self.name = f"{self.spec.name}, run {Path(folder).name}, stage {run.stage}"
        self.idle = self.spec.idle or (0,) * len(self.spec.actions.classes)
        self.starts = ("nothing",) if env is None else ("held_out", "fresh", "nothing")
        self.tasks = PromptOrder(self.spec, 1).tasks                # of the prompts
        self.policies = {}
        if run.agent:
            self.policies["BC"] = run.agent.policy
        if run.stage == "imagine":
            self.policies = {"BC": run.agent.prior, "imagination": run.agent.policy}
        self.generator, self.caches, self.seat = None, (None, None), None
        self.ops = {"reset": self.reset, "step": self.step, "what_if": self.what_if,
                    "denoise": self.denoise, "mask": self.mask, "save": self.save}
        self.handle({"op": "reset"})

    def handle(self, request):
        """The answer to one request. Without the seat a page gets the last one again."""
        request = request if isinstance(request, dict) else {}
        op = pick(request, "op", (*self.ops, "join", "take", "watch", "leave"))
        player = self.take_seat(op, request.get("tab", ""))
        if op == "leave":
            return {}
        if op in ("join", "take"):
            return {**self.shown, **self.about(), "player": player}
        if op == "watch" or (op == "step" and not player):
            return {**self.shown, "player": player}
        if not player:
            raise UserError("Got a page that watches, need the one that plays: take its "
                            "place with 'Play here'.")
        return {**self.play(op, request), "player": True}

    def take_seat(self, op, tab):
        """Whether this tab plays now. "take" takes any seat, who doesn't watch a free one.
        """
        if not isinstance(tab, str):
            raise UserError(f"Got tab {tab!r}, need a text.")
        if op == "leave" and tab == self.seat:
            self.seat = None
        elif tab and (op == "take" or (op not in ("watch", "leave") and not self.seat)):
            self.seat = tab
        return tab in ("", self.seat)

    @torch.inference_mode()
    def play(self, op, request):
        """K and the signal level of committed frames hold for what is dreamed next."""
        op, model = self.ops[op], self.run.dynamics
        k_max = model.cfg.k_max
        ks, who = [2 ** i for i in range(k_max.bit_length())], ("keys", *self.policies)
        self.k = pick(request, "k", ks, model.cfg.k)
        self.level = pick(request, "level", range(k_max), round(model.tau_ctx * k_max))
        self.prompt = pick(request, "prompt", range(-1, len(self.tasks)), -1)   # -1: order
        self.who = [pick(request, world, who, "keys") for world in WORLDS]
        self.open_dreams()
        with autocast(self.device, self.dtype):
            return op(request)

    def open_dreams(self):
        """Dreams with the page's K and level that go on from the caches."""
        model, level = self.run.dynamics, self.level / self.run.dynamics.cfg.k_max
        self.dream, self.policy_dream = (
            Dream(model, self.generator, cache, self.k, tau_ctx=level)
            for cache in self.caches)

    def reset(self, request):
        """Both worlds after `PLAYED` frames of the recorded player in a world never trained
        on ("held_out") or at its first frame ("fresh"); or the dream, from "nothing"."""
        start = pick(request, "start", self.starts, self.starts[0])
        self.seed = seed = pick(request, "seed", range(2 ** 31), PLAY_SEED)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.caches = tuple(Cache(self.run.dynamics.cfg.context) for _ in range(2))
        self.encoder, self.decoder = (self.run.tokenizer.new_cache() for _ in range(2))
        self.order, self.t, self.film = PromptOrder(self.spec, 2), 0, []
        self.open_dreams()

        # what was played before the game begins
        first = Row(None, self.spec.actions.zeros(), np.zeros(len(self.spec.tasks), bool))
        if start == "nothing":
            self.worlds, played, color = WORLDS[:1], [first], ORANGE
        else:
            self.worlds, color = WORLDS, GREEN
            skill = next(iter(getattr(self.env, "skills", ())), "-")
            length = PLAYED if start == "held_out" else 1
            episode = play_episode(self.env, seed, 0, length, skill)
            if not episode.continues[-1]:           # too short a life: begin in its middle
                length = max(1, len(episode.frames) // 2)
                episode = play_episode(self.env, seed, 0, length, skill)
            played = [Row(*row) for row in zip(*episode[:4], strict=True)]
        for row in played[1:]:
            self.order.advance(np.stack([row.events] * 2))
        self.over = not played[-1].continues

        # the dream is shown the end of it
        seen = played[-self.run.dynamics.cfg.context:]
        actions = self.tensor([[row.action for row in seen]])
        labelled = torch.arange(len(played), device=self.device)[None, -len(seen):] > 0
        z = (self.dream.imagine(actions, labelled) if start == "nothing" else
             self.encode([row.frame for row in seen]))
        pictures = self.commit(z, actions, labelled)
        self.rows = {"dream": [], "real": played}
        for picture, row in zip(pictures, seen, strict=True):
            shown = row if self.film else first
            self.add_row("dream", shown._replace(frame=picture, continues=True))
            self.add_frame(picture, row.frame, color)
        return {**self.show(), **self.about()}

    def about(self):
        """What the page is built from."""
        names = self.spec.tasks or ("no task",)
        labels = {(key["column"], key["value"]): key["label"] for key in self.keys}
        idle = [labels.get(place, "column {}: {}".format(*place))
                for place in enumerate(self.idle)]
        return {"controls": self.keys, "policies": list(self.policies),
                "tasks": [names[i] for i in self.tasks], "name": self.name,
                "k_max": self.run.dynamics.cfg.k_max, "k": self.k, "level": self.level,
                "seed": self.seed, "starts": self.starts, "idle": ", ".join(idle),
                "numbers": self.spec.actions.numbers}

    def add_row(self, world, row):
        if len(self.film) < MAX_ROWS:
            self.rows[world].append(row)

    def add_frame(self, dream, real, color):
        """A frame of the film; color: of the dream's border."""
        self.now = (dream, real)[:len(self.worlds)]
        if len(self.film) < MAX_ROWS:
            parts = zip(self.now, (color, GREEN), strict=False)
            self.film.append(np.concatenate([border(*part) for part in parts], 1))

    def tensor(self, actions):
        """Actions [row][t] -> (rows, T, A)."""
        return torch.as_tensor(np.array(actions), device=self.device)

    def encode(self, frames):
        """Real frames (T, H, W, 3) -> latents (1, T, S_z, Z); the last one is kept."""
        frames = torch.as_tensor(np.stack(frames), device=self.device)[None]
        z = self.run.tokenizer.encode(frames, self.encoder)
        self.z = z[:, -1:]
        return z

    def commit(self, z, actions, labelled):
        """Frames (1 or worlds, T, .) that are there now -> the dream's as pictures."""
        worlds, n, asked = len(self.worlds), len(self.tasks), self.tensor(self.tasks)
        self.dream.commit(z[:1], actions[:1], labelled[:1])
        if self.policies:
            many = [x.repeat_interleave(worlds * n // len(x), 0)
                    for x in (z, actions, labelled)]
            task = self.run.agent.prompt(asked).repeat(worlds)[:, None]
            h = self.policy_dream.commit(*many, task.expand(-1, z.shape[1]))
            self.h = h[:, -1].view(worlds, n, -1)
            self.rewards = self.run.agent.rewards(self.h, asked).cpu().numpy()
        return self.run.tokenizer.decode(z[:1], self.decoder)[0].cpu().numpy()

    def pressed(self, request):
        """The action of sliders and pressed keys, of which the last of a column counts."""
        numbers = read_numbers(request, self.spec.actions.numbers)
        action = np.array([*self.idle, *numbers], np.float32)
        pressed = request.get("pressed", [])
        if pressed and not self.keys:
            raise UserError(f"Got pressed {pressed!r}, need none: this world has no keys.")
        for i in pressed if isinstance(pressed, list) else [pressed]:
            key = self.keys[pick({"pressed": i}, "pressed", range(len(self.keys)))]
            action[key["column"]] = key["value"]
        return action

    def policy(self, w):
        """World w -> its prompt, and its policy's logits (1, n) of the next action."""
        order = self.tasks.index(self.order.task[w])
        prompt = order if self.prompt < 0 else self.prompt
        head = self.policies.get(self.who[w], self.run.agent.policy)
        return prompt, head(self.h[w, prompt][None], 1)[:, 0]

    def step(self, request):
        """One frame of each world."""
        chosen = [self.pressed(request) for _ in self.worlds]
        for w in range(len(chosen)):
            if self.who[w] != "keys":
                logits = self.policy(w)[1]
                sampled = sample_action(self.spec.actions, logits, self.generator)
                chosen[w] = sampled[0].cpu().numpy()
        frame = self.now[-1]
        events = np.zeros((2, len(self.spec.tasks)), self.spec.event_type)
        actions, self.t = self.tensor(chosen)[:, None], self.t + 1
        labelled = torch.ones(actions.shape[:2], dtype=torch.bool, device=self.device)
        z = self.dream.imagine(actions[:1], labelled[:1])
        if len(chosen) == 2:
            if not self.over:
                frame, events[1], self.over = self.env.step(chosen[1])
                self.encode([frame])
                self.add_row("real", Row(frame, chosen[1], events[1], not self.over))
            z = torch.cat([z, self.z])
        picture = self.commit(z, actions, labelled)[0]
        if self.policies and self.spec.tasks:       # in the dream: predicted rewards
            seen = self.rewards[0]
            events[0, self.tasks] = seen if self.spec.returns else seen > 0.5
        self.add_row("dream", Row(picture, chosen[0], events[0]))
        self.add_frame(picture, frame, ORANGE)
        self.order.advance(events)
        return self.show()

    def show(self):
        """What the page draws: pictures, and what the agent makes of them."""
        readouts, agent = {}, self.run.agent
        for w, world in enumerate(self.worlds if self.policies else ()):
            prompt, logits = self.policy(w)
            p = [x[0].softmax(-1).tolist() for x in split_logits(self.spec.actions, logits)]
            h = self.h[w, prompt]
            readouts[world] = {
                "prompt": prompt, "rewards": self.rewards[w].tolist(),
                "policy": [p[key["column"]][key["value"]] for key in self.keys],
                "value": agent.values(h).item(), "goes_on": agent.continue_prob(h).item()}
        pictures = {world: png(x) for world, x in zip(self.worlds, self.now, strict=True)}
        self.shown = {"t": self.t, "over": self.over, "readouts": readouts,
                      "pictures": pictures}
        return self.shown

    def what_if(self, request):
        """Counterfactuals (Figure 6): each action for some frames from the frozen state, in
        the dream and in copies of the real environment, where it can be copied."""
        frames, keys = pick(request, "frames", range(1, 17), 4), self.keys[:24]
        if not keys:
            raise UserError("Got a world without keys, need some to compare.")
        chosen = [self.pressed({**request, "pressed": [i]}) for i in range(len(keys))]
        dream, decoder = self.dream.branch(len(keys)), self.decoder.branch(len(keys))
        for _ in range(frames):
            z, _ = dream.step(self.tensor(chosen)[:, None])
            pictures = self.run.tokenizer.decode(z, decoder).cpu().numpy()
        outcomes = []
        for key, action, picture in zip(keys, chosen, pictures, strict=True):
            outcomes.append({"label": key["label"], "dream": png(picture[0])})
            env = None if self.over or len(self.worlds) == 1 else copy_env(self.env)
            for _ in range(frames if env else 0):
                frame, _, terminal = env.step(action)
                outcomes[-1]["real"] = png(frame)
                if terminal:
                    break
        return {"frames": frames, "outcomes": outcomes}

    def denoise(self, request):
        """The next frame's K steps (Eq. 2): the noisy latents they see and the clean ones
        that they predict, as pictures."""
        steps = self.dream.branch(1).trace(self.tensor([[self.pressed(request)]]))
        z = torch.cat([x for pair in steps for x in pair])
        frames = self.run.tokenizer.decode(z, self.decoder.branch(len(z)))
        pictures = [png(x) for x in frames[:, 0].cpu().numpy()]
        return {"sees": pictures[::2], "predicts": pictures[1::2]}

    def mask(self, request):
        """The tokenizer rebuilds the present picture with a share of its patches hidden."""
        share = pick(request, "share", range(101), 50) / 100
        frames = torch.as_tensor(self.now[-1], device=self.device).expand(6, 1, -1, -1, -1)
        hidden = torch.rand(6, 1, self.run.tokenizer.patches, device=self.device) < share
        sees, rebuilt = self.run.tokenizer.rebuild(frames, hidden)
        return {"sees": [png(x) for x in sees[:, 0].cpu().numpy()],
                "predicts": [png(x) for x in rebuilt[:, 0].cpu().numpy()]}

    def save(self, request):
        """The session as a GIF, and what each world showed as an episode of a dataset."""
        for world in self.worlds:
            folder = self.folder / world
            n = len(list(folder.glob("episode_*.npy")))
            episode = Episode(*zip(*self.rows[world], strict=True))
            write_episode(folder, n, episode, self.spec.event_type)
            finish_dataset(folder, self.spec, {})
        path = self.folder / f"session_{len(list(self.folder.glob('*.gif'))):05d}.gif"
        write_film(path, np.stack(self.film))
        return {"saved": str(path), "frames": len(self.film)}


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /play asks the session; all else is refused."""
    protocol_version, server_version, sys_version = "HTTP/1.1", "play", ""
    timeout, wbufsize, disable_nagle_algorithm = 60, -1, True

    def log_message(self, *_):
        pass

    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        about = {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}
        if status != 200 or self.command != "POST":
            about["Connection"] = "close"
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def send_error(self, code, message=None, explain=None):
        """Also http.server's own refusals; its code for an unknown method is 501."""
        body = json.dumps({"error": message or HTTPStatus(code).phrase})
        self.answer(405 if code == 501 else code, body.encode())

    def refused(self, path):
        """subtle: other sites can reach 127.0.0.1 through the browser, by a cross-site post
        or a name of theirs that resolves to it. Another port is fine: a forwarded one."""
        hosts = self.headers.get_all("Host", [])
        origins = self.headers.get_all("Origin", [])
        name = r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?"
        own = len(hosts) == 1 and re.fullmatch(name, hosts[0])
        if not own or any(origin != f"http://{hosts[0]}" for origin in origins):
            self.send_error(403, "Got a foreign Host or Origin.")
            return True
        if self.path != path:
            self.send_error(404)
        return self.path != path

    def do_GET(self):
        if not self.refused("/"):
            self.answer(200, self.server.page, "text/html; charset=utf-8")

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if self.refused("/play"):
            return
        if self.headers.get_content_type() != "application/json":
            return self.send_error(415, "Need application/json.")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,9}", length):
            return self.send_error(411)
        if int(length) > MAX_BODY:
            return self.send_error(413, f"Need at most {MAX_BODY} bytes.")
        body = self.rfile.read(int(length))
        try:
            job = self.server.pool.submit(self.server.session.handle, json.loads(body))
            self.answer(200, json.dumps(job.result()).encode())
        except (UserError, json.JSONDecodeError, UnicodeError, RecursionError) as error:
            self.send_error(400, str(error))
        except Exception as error:
            print(f"error: {error!r}", file=sys.stderr)
            self.send_error(500, repr(error))


class Server(socketserver.ThreadingTCPServer):
    """A thread per connection; the session's work is done one request at a time, in one."""
    allow_reuse_address = daemon_threads = True
    request_queue_size = 32

    def __init__(self, session, page, port):
        self.session, self.page, self.pool = session, page, ThreadPoolExecutor(1)
        super().__init__(("127.0.0.1", port), Handler)

    def verify_request(self, request, client_address):
        return threading.active_count() < 64

    def handle_error(self, request, client_address):
        """A client that goes away is nothing to report."""
        if not isinstance(sys.exc_info()[1], OSError):
            print(f"error: {sys.exc_info()[1]!r}", file=sys.stderr)


def open_server(session, port):
    """On this port of 127.0.0.1, or the next free one."""
    page = (Path(__file__).parent / "assets" / "play.html").read_bytes()
    for p in range(port, min(port + 100, 65536)) if port >= 0 else ():
        try:
            return Server(session, page, p)
        except OSError:
            continue
    raise UserError(f"Got --port {port}, need a free one there or up to 99 above.")


def open_world(name):
    """The real world of a run, or None: its dream can be played without."""
    try:
        env = make_env(name)
        env.reset(PLAY_SEED)                    # only here some find that a part is missing
        return env
    except UserError as error:
        print(f"The dream is played alone: {error}", file=sys.stderr)
        return None


def open_session(args):
    env, device = open_world(data_config(args.run)["env"]), pick_device(args.device)
    run = load_run(args.run, args.stage, device, args.dtype)
    if run.agent:
        freeze(run.agent, device, args.dtype)
    return Session(run, env, args.run, args.dtype)


def compile_session(session):
    """Frames of the game that it plays are compiled; whatever has another shape runs as it
    is."""
    run = session.run
    for module in (run.tokenizer, run.dynamics):
        compile_module(module, run.device, frozen=True)
    for op in tqdm(("reset", "step", "step", "reset"), "compiling, a minute or two"):
        session.handle({"op": op})
    torch.compiler.set_stance("eager_on_recompile")


def serve(args):
    if "OMP_NUM_THREADS" not in os.environ:     # the browser needs some cores, too
        torch.set_num_threads(max(1, count_workers(0) // 2))
    session = open_session(args)
    if args.compile:
        compile_session(session)
    with open_server(session, args.port) as server:
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
    try:
        words = shlex.split(args.actions)
    except ValueError as error:
        raise UserError(f"Got --actions {args.actions!r} ({error}), need words, those with "
                        "blanks in quotes: \"right 'jump up' do\".") from None
    session = open_session(args)
    if not session.keys:
        raise UserError("Got --actions for a world without keys, need one with some.")
    session.handle({"op": "reset", "seed": PLAY_SEED + args.seed})
    labels = [key["label"] for key in session.keys]
    for word in words:
        fits = [i for i, label in enumerate(labels)
                if word in (label, label.split("_")[-1])]
        if len(fits) != 1:
            raise UserError(f"Got action {word!r}, need one of {', '.join(labels)}.")
        session.handle({"op": "step", "pressed": fits})
    return np.stack(session.film)


# ------------------------------------------------------------------------------- the demo

DEMO = Path(__file__).parent / "assets" / "demo.pt"
AHEAD = ("policy.out", "prior.out", "reward.out")       # layers with a part a distance


def is_ahead(module, name):
    return module == "agent" and name.startswith(AHEAD)


def pack(folder, path):
    """`play.py pack`: a whole run in one small file: weights in 16 bits, and of the heads
    that look ahead the nearest distance alone, for the others only serve in training."""
    state = load_checkpoint(find_checkpoint(folder, "imagine"))
    for module, name in packed_names(state):
        x = state[module][name]
        x = x[:len(x) // (MTP + 1)].clone() if is_ahead(module, name) else x
        state[module][name] = x.half() if x.ndim else x
    state["data"] = data_config(folder)
    save_checkpoint(path, state)


def packed_names(state):
    return [(module, name) for module in ("tokenizer", "dynamics", "agent")
            for name in state[module]]


def unpack(path):
    """A packed run -> runs/NAME with the checkpoints that training would have left, made
    where it isn't there yet."""
    folder, state = Path("runs") / Path(path).stem, load_checkpoint(path)
    if "data" not in state:
        raise UserError(f"Got {path}, which is no packed run, need one of 'python play.py "
                        "pack': name the folder of a run.")
    about = {"packed": sha256_of(path), "data": state.pop("data")}
    there = folder / "config.json"
    if there.exists() and read_json(there) == about:
        return folder
    if (folder / "tokenizer.pt").exists():
        raise UserError(f"Got {path}, whose folder {folder} is a run, need another name: "
                        "rename the file.")
    for module, name in packed_names(state):
        x = state[module][name].float()
        if is_ahead(module, name):
            x = torch.cat([x, x.new_zeros(MTP * len(x), *x.shape[1:])])
        state[module][name] = x
    folder.mkdir(parents=True, exist_ok=True)
    prior = {name.replace("prior", "policy"): x for name, x in state["agent"].items()
             if name.startswith("prior")}
    imitated = {**state, "stage": "agent", "agent": state["agent"] | prior}
    save_checkpoint(folder / "agent.pt", imitated)
    state["provenance"] = {"agent": sha256_of(folder / "agent.pt")}
    save_checkpoint(folder / "imagine.pt", state)
    forget_results(folder)
    write_json(folder / "config.json", about)
    return folder


def positive(text):
    """A whole number from 1, of the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number from 1")
    return int(text)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", nargs="?", default="serve", choices=("serve", "eval", "dream", "report",
                                                              "pack"))
    add("--run", help="folder of a training run, its name, or a packed one; default: "
        "runs/crafter, or the demo where there is none")
    add("--stage", choices=STAGES, help="default the latest; eval: its world model alone")
    add("--port", type=int, default=8000, help="serve: this one or the next free")
    add("--open", action="store_true", help="serve: open the browser")
    add("--compile", action="store_true", help="serve: compile first, then faster frames")
    add("--actions", help="dream: words like 'right right do', from one start")
    add("--agents", default=",".join(AGENTS), help="eval: which agents")
    add("--episodes", type=positive, help="eval: of each agent, default the run's")
    add("--length", type=positive, help="eval: steps of an episode, default the run's")
    add("--world-only", action="store_true", help="eval: skip the agents")
    add("--out", help="dream: .gif or .mp4, default RUN/dream.gif; pack: a .pt file")
    add("--k", type=positive, help="eval, dream: sampling steps, default the run's")
    add("--step_label", choices=("own", "min"), help="eval, dream: step told, 1/K or d_min")
    add("--clips", type=positive, default=4, help="dream: pairs side by side")
    add("--horizon", type=positive, default=32, help="dream: imagined frames")
    add("--seed", type=int, default=0, help="dream: seed of the noise, or world")
    add("--device", default="auto")
    add("--dtype", default="auto")
    return parser


def main():
    args = make_parser().parse_args()
    if args.run is None:
        args.run = "runs/crafter"
        if not Path(args.run).exists() and DEMO.exists():
            args.run = DEMO
            print(f"Playing {DEMO}; train your own with 'python train.py'.")
    if not Path(args.run).exists() and Path("runs", args.run).exists():
        args.run = Path("runs", args.run)       # a name, as train.py takes it
    if Path(args.run).suffix == ".pt":
        args.run = unpack(args.run)
    sampler, device = Sampler(args.k, args.step_label), pick_device(args.device)
    if args.command == "report":
        print(write_report(args.run))
    elif args.command == "pack":
        pack(args.run, args.out or DEMO)
        print(args.out or DEMO)
    elif args.command == "serve":
        serve(args)
    elif args.command == "eval":
        if args.stage or args.world_only:
            judge_world(args.run, args.stage, device, args.dtype, sampler)
        else:
            data = data_config(args.run)
            evaluate(args.run, device, args.dtype, args.episodes or data["eval_episodes"],
                     args.length or data["eval_length"], args.agents.split(","), sampler)
        print(headlines(args.run))
    else:
        path = Path(args.out or Path(args.run) / "dream.gif")
        if path.suffix not in (".gif", ".mp4"):
            raise UserError(f"Got --out {path}, need a name that ends in .gif or .mp4.")
        if args.actions is not None:
            film = film_actions(args)
        else:
            run = load_run(args.run, args.stage, device, args.dtype)
            film = dream_film(run, reference_of(args.run), args.clips, args.horizon,
                              args.dtype, args.seed, sampler)
        write_film(path, film)
        print(path)


if __name__ == "__main__":
    run_cli(main)
