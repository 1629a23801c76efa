"""Look at what was learned: dreams, evaluation in the real environment, figures and the report.

    python play.py eval --run runs/crafter       world model and agents, into results.json
    python play.py dream --run runs/crafter      a GIF: context, imagined and real side by side
    python play.py report --run runs/crafter     one page: report.md with pictures
Judge rollouts and real episodes, not losses: PSNR per horizon with true and shuffled actions, the
ladder score of sampled policies on unseen worlds, with 95 % intervals.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import imageio
import numpy as np
import torch
from tqdm import tqdm

from agent import autocast, imagine_rollout, load_run, pick_device
from data import Dataset, UserError, VecEnv, make_env, read_json, record, run_cli, write_whole
from dynamics import Dream
from tokenizer import Cache

HORIZONS = (1, 4, 8, 16)
REFERENCE_SEED, TEST_SEED = 10_000, 30_000


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


def add_results(folder, command, entries):
    """entries: {name: (value, low, high, n, unit)}; merged into folder/results.json."""
    results = read_results(folder)
    for name, (value, low, high, n, unit) in entries.items():
        results[name] = {"value": value, "low": low, "high": high, "n": n, "unit": unit,
                         "command": command}
    write_json(Path(folder) / "results.json", results)


# ---------------------------------------------------------------------------- the world model

def reference_set(env, episodes=40, length=300, workers=0):
    """Recorded play that is never trained on, recorded at the first call."""
    path = Path("datasets") / f"{env.replace(':', '_')}_reference_{episodes}x{length}"
    if not (path / "dataset.json").exists():
        print(f"Recording the reference set into {path}.")
    record(env, path, episodes, length, REFERENCE_SEED, workers)
    return Dataset(path)


def reference_clips(dataset, per_episode, length, device):
    """Evenly spaced windows of the reference set as tensors: frames, actions, labelled."""
    episode, start = [], []
    for i in dataset.episodes("all"):
        room = dataset.lengths[i] - length
        if room >= 0:
            starts = np.linspace(0, room, per_episode).astype(int)
            episode += [i] * per_episode
            start += list(starts)
    if not episode:
        raise UserError(f"Got episodes of at most {max(dataset.lengths)} frames in {dataset.path}, "
                        f"need one of {length} to compare a dream with: record longer ones.")
    clips = dataset.read(np.array(episode), np.array(start), length)
    clips = {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in clips.items()}
    return clips, {k: clips[k] for k in ("binary", "categorical", "continuous")}


def dream_clips(run, z, actions, labelled, horizon, seed=0):
    """Continue clips for their last `horizon` frames. z (B, T, S_z, Z), actions[:, t] led to
    frame t. Returns frames uint8 (B, T, H, W, 3): the context reconstructed, the rest imagined.
    The noise depends on the seed alone, so that two calls with other actions can be paired."""
    generator = torch.Generator(z.device).manual_seed(seed)
    dream, context = Dream(run.dynamics, generator), z.shape[1] - horizon
    first = {name: x[:, :context] for name, x in actions.items()}
    dream.commit(z[:, :context], first, labelled[:, :context])
    frames = [z[:, :context]]
    for t in range(context, z.shape[1]):
        frames.append(dream.step({name: x[:, t:t + 1] for name, x in actions.items()})[0])
    return run.tokenizer.decode(torch.cat(frames, 1))


def squared_error(x_hat, x):
    """uint8 (B, T, H, W, 3) twice -> mean squared error (B, T) of pixels in [0, 1]."""
    return (x_hat.float() - x.float()).div(255).square().mean((2, 3, 4)).cpu().numpy()


def decibel(error):
    """PSNR from the mean squared error over all clips (not a mean of decibels)."""
    return -10 * np.log10(np.mean(error, 0))


@torch.no_grad()
def evaluate_world(run, dataset, dtype="auto", per_episode=4, context=16, horizon=16):
    """PSNR on the reference set -> entries for results.json."""
    device = run.tokenizer.latent_std.device
    clips, actions = reference_clips(dataset, per_episode, context + horizon, device)
    frames, labelled = clips["frames"], clips["labelled"]
    n, entries = len(frames), {}
    with autocast(device, dtype):
        z = torch.cat([run.tokenizer.encode(x) for x in frames.split(32)])
        recon = squared_error(torch.cat([run.tokenizer.decode(x) for x in z.split(32)]), frames)
        interval = functools.partial(bootstrap, block=per_episode)
        entries["tokenizer_psnr_db"] = *interval(decibel, recon.mean(1)), n, "dB"
        if run.dynamics is None:
            return entries
        real = frames[:, context:]
        shuffled = {k: x.roll(1, 0) for k, x in actions.items()}
        shuffled = {k: torch.cat([actions[k][:, :context], x[:, context:]], 1)
                    for k, x in shuffled.items()}
        errors = {"recon": recon[:, context:],
                  "repeat": squared_error(frames[:, context - 1:context].expand_as(real), real)}
        for name, a in (("dream", actions), ("shuffled", shuffled)):
            errors[name] = squared_error(
                dream_clips(run, z, a, labelled, horizon)[:, context:], real)
    entries["recon_psnr_db"] = *interval(decibel, errors["recon"].mean(1)), n, "dB"
    for h in HORIZONS:
        e = {name: error[:, h - 1] for name, error in errors.items()}
        for name in ("dream", "repeat", "shuffled"):
            entries[f"{name}_psnr_db_h{h}"] = *interval(decibel, e[name]), n, "dB"
        for other in ("repeat", "shuffled"):
            gain = interval(lambda a, b: decibel(a) - decibel(b), e["dream"], e[other])
            entries[f"dream_minus_{other}_db_h{h}"] = *gain, n, "dB"
    return entries


@torch.no_grad()
def measure_speed(run, dtype="auto", frames=40, rollouts=3):
    """Dream frames/s at batch 1 (decoded) and imagined frames/s in training's rollouts."""
    device, cfg = run.tokenizer.latent_std.device, run.dynamics.cfg
    generator, entries = torch.Generator(device).manual_seed(0), {}

    def inputs(B, T):
        return (torch.zeros(B, T, cfg.tokens, cfg.channels, device=device),
                {k: torch.from_numpy(x).to(device)
                 for k, x in run.spec.actions.zeros(B, T).items()},
                torch.ones(B, T, dtype=torch.bool, device=device))

    with autocast(device, dtype):
        dream, cache = Dream(run.dynamics, generator), run.tokenizer.new_cache()
        dream.commit(*inputs(1, cfg.context))
        begin = time.perf_counter()
        for _ in range(frames):
            run.tokenizer.decode(dream.step(inputs(1, 1)[1])[0], cache).cpu()
        entries["dream_fps_batch1"] = (frames / (time.perf_counter() - begin), None, None, frames,
                                       "frames/s")
        if run.agent:
            C, horizon = run.agent.cfg.context, run.agent.cfg.horizon
            task, rates = torch.zeros(64, C, dtype=torch.long, device=device), []
            for _ in range(rollouts):
                begin = time.perf_counter()
                h = imagine_rollout(run.dynamics, run.agent, *inputs(64, C), task, horizon,
                                    generator)[0]
                (run.agent.rewards(h) + run.agent.values(h)).cpu()
                rates.append(64 * horizon / (time.perf_counter() - begin))
            entries["imagined_frames_per_s"] = (float(np.median(rates)), None, None, rollouts,
                                                "frames/s")
    return entries


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


class Actor:
    """The policy in N real environments at once: frames in, sampled actions out."""

    def __init__(self, run, task, generator):
        self.run, self.generator = run, generator
        self.dream, self.encoder = Dream(run.dynamics, generator), run.tokenizer.new_cache()
        self.device = run.tokenizer.latent_std.device
        self.task, self.history = torch.as_tensor(task, device=self.device), []

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
        self.task = torch.as_tensor(task, device=self.device)
        self.h = self.dream.commit(z, actions, labelled, self.task[:, None])[:, 0]
        if changed is not None and changed.any():
            self.replay(torch.as_tensor(np.flatnonzero(changed), device=self.device))

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
        actions = self.run.agent.act(self.h, self.generator)
        return {k: x.cpu().numpy() for k, x in actions.items()}


def evaluate_agent(env, seeds, length, run=None, dtype="auto", workers=0, seed=0, gif=None):
    """Plays one sampled episode in each world; run None: uniform random actions.

    Returns first (N, tasks): the step at which each task was first done, inf where never. gif: a
    path for the first world's frames.
    """
    rng, device = np.random.default_rng(seed), pick_device("cpu")
    with VecEnv(env, seeds, workers) as worlds:
        frames, spec, N = worlds.reset(), worlds.spec, len(seeds)
        ladder, first, film = Ladder(spec, N), np.full((N, len(spec.tasks)), np.inf), [frames[0]]
        if run:
            device = run.tokenizer.latent_std.device
            actor = Actor(run, ladder.task, torch.Generator(device).manual_seed(seed))
        with autocast(device, dtype):
            if run:
                actor.observe(frames, spec.actions.zeros(N), False, ladder.task)
            for step in tqdm(range(1, length + 1), desc=f"{len(seeds)} episodes", leave=False):
                actions = actor.act() if run else spec.actions.sample(rng, N)
                frames, events, terminal = worlds.step(actions)
                first = np.where(events & np.isinf(first), step, first)
                changed = ladder.advance(events)
                film.append(frames[0])
                if terminal.all():
                    break
                if run:
                    actor.observe(frames, actions, True, ladder.task, changed)
    if gif:
        write_film(gif, np.stack(film))
    return first


def evaluate_player(env, episodes, length, seed, workers=0):
    """The recorded player on the same worlds, for `length` steps -> first (N, tasks)."""
    with tempfile.TemporaryDirectory() as folder:
        record(env, folder, episodes, length + 1, seed, workers)
        dataset = Dataset(folder)
        events = [np.asarray(dataset.episode(i)["events"]) > 0 for i in range(episodes)]
    return np.stack([np.where(e.any(0), e.argmax(0), np.inf) for e in events])


def ladder_scores(spec, first):
    """(N,) number of rungs that each episode reached, whatever the prompts."""
    return np.isfinite(first[:, [spec.tasks.index(r) for r in spec.rungs]]).sum(1)


def agent_entries(spec, firsts):
    """{agent: first (N, tasks)} on the same worlds -> entries for results.json."""
    entries = {}
    for agent, first in firsts.items():
        scores, n = ladder_scores(spec, first), len(first)
        entries[f"ladder_{agent}"] = *mean_interval(scores), n, "rungs"
        for rung in spec.rungs:
            k = int(np.isfinite(first[:, spec.tasks.index(rung)]).sum())
            entries[f"success_{agent}_{rung}"] = k / n, *wilson(k, n), n, "share"
    for a, b in (("rl", "bc"), ("bc", "random")):
        if a in firsts and b in firsts:
            n = min(len(firsts[a]), len(firsts[b]))
            gain = ladder_scores(spec, firsts[a])[:n] - ladder_scores(spec, firsts[b])[:n]
            entries[f"ladder_{a}_minus_{b}"] = *mean_interval(gain), n, "rungs"
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
    worlds, half as many episodes for the two bounds -> entries for results.json."""
    folder, env, firsts = Path(folder), data_config(folder)["env"], {}
    if bad := set(agents) - {"random", "bc", "rl", "player"}:
        raise UserError(f"Got agents {sorted(bad)}, need some of random, bc, rl and player.")
    for agent in agents:
        stage = {"bc": "agent", "rl": "imagine"}.get(agent)
        n = episodes if stage else max(episodes // 2, 2)
        print(f"Evaluating {agent}: {n} episodes of {length} steps.", flush=True)
        if agent == "player":
            firsts[agent] = evaluate_player(env, n, length, TEST_SEED, workers)
            continue
        run, gif = None, None
        if stage:
            run, gif = load_run(folder, stage, device), folder / f"episode_{agent}.gif"
        firsts[agent] = evaluate_agent(env, range(TEST_SEED, TEST_SEED + n), length, run, dtype,
                                       workers, gif=gif)
    return agent_entries(load_run(folder, None, device).spec, firsts)


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
    device = run.tokenizer.latent_std.device
    horizon = min(horizon, max(dataset.lengths) - context)
    clips, actions = reference_clips(dataset, 1, context + horizon, device)
    pick = torch.linspace(0, len(clips["frames"]) - 1, rows).long()
    real, labelled = clips["frames"][pick], clips["labelled"][pick]
    with autocast(device, dtype):
        z = run.tokenizer.encode(real)
        dreamed = dream_clips(run, z, {k: x[pick] for k, x in actions.items()}, labelled, horizon,
                              seed).cpu().numpy()
    left = np.concatenate([border(dreamed[:, :context], (60, 170, 90)),
                           border(dreamed[:, context:], (240, 140, 20))], 1)
    pairs = np.concatenate([left, border(real.cpu().numpy(), (60, 170, 90))], -2)
    return np.concatenate(list(pairs), -2)      # the clips side by side


@torch.no_grad()
def picture_reconstructions(run, dataset, path, n=8, dtype="auto"):
    """Real frames above, reconstructions below."""
    device = run.tokenizer.latent_std.device
    clips, _ = reference_clips(dataset, 1, min(16, min(dataset.lengths)), device)
    frames = clips["frames"][torch.linspace(0, len(clips["frames"]) - 1, n).long()]
    with autocast(device, dtype):
        rebuilt = run.tokenizer.decode(run.tokenizer.encode(frames))
    rows = [np.concatenate(list(x[:, -1].cpu().numpy()), 1) for x in (frames, rebuilt)]
    imageio.imwrite(path, enlarge(np.concatenate(rows, 0)))


def plot():
    """matplotlib without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def picture_curves(folder, stage):
    """metrics.jsonl -> STAGE_curves.png, one small chart per logged key."""
    lines = [x for x in read_metrics(folder) if x["stage"] == stage]
    keys = [k for k in (lines[-1] if lines else {}) if k not in ("stage", "step", "rate")]
    if not keys:
        return
    plt, rows = plot(), -(-len(keys) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(14, 2.6 * rows), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        steps, values = zip(*[(x["step"], x[key]) for x in lines if key in x], strict=True)
        axis.plot(steps, values)
        axis.set_title(key, fontsize=9)
        if min(values) > 0 and max(values) > 5 * min(values):
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(Path(folder) / f"{stage}_curves.png", dpi=70)
    plt.close(figure)


def picture_success(folder, spec, results):
    """Success per rung and agent with Wilson intervals (the paper's Figure 3)."""
    agents = [a for a in ("random", "bc", "rl", "player") if f"ladder_{a}" in results]
    if not agents:
        return
    plt = plot()
    figure, axis = plt.subplots(figsize=(11, 3.6))
    for i, agent in enumerate(agents):
        rows = [results[f"success_{agent}_{rung}"] for rung in spec.rungs]
        value = np.array([r["value"] for r in rows])
        error = np.abs(np.array([[r["low"], r["high"]] for r in rows]).T - value)
        axis.bar(np.arange(len(rows)) + 0.8 * i / len(agents), value, 0.8 / len(agents),
                 yerr=error, label=agent, capsize=2)
    axis.set_xticks(np.arange(len(spec.rungs)) + 0.3, spec.rungs, rotation=25, ha="right")
    axis.set_ylabel("success")
    axis.legend()
    figure.tight_layout()
    figure.savefig(Path(folder) / "success.png", dpi=80)
    plt.close(figure)


# -------------------------------------------------------------------------------------- report

PICTURES = (("tokenizer_reconstructions.png", "Real frames (above) and their reconstructions"),
            ("dream.gif", "Dreams (left of each pair, orange border) beside reality (right)"),
            ("success.png", "Success by rung of the ladder, 95 % Wilson intervals"),
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


def write_report(folder):
    """report.md: every figure of results.json and every picture of the run. Returns its path."""
    folder = Path(folder)
    data_config(folder)
    results, config = read_results(folder), read_json(folder / "config.json")
    picture_success(folder, load_run(folder).spec, results)
    parts = [f"# Report of {folder}", results_table(results), "Commands: `results.json`.",
             *(f"## {title}\n![{title}]({name})" for name, title in PICTURES
               if (folder / name).exists()),
             f"## Settings\n```json\n{json.dumps(config, indent=1)}\n```"]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    return folder / "report.md"


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("eval", "dream", "report"))
    parser.add_argument("--run", default="runs/crafter", help="folder of a training run")
    parser.add_argument("--agents", default="random,bc,rl,player", help="eval: which agents")
    parser.add_argument("--episodes", type=int, default=200, help="eval: episodes of each policy")
    parser.add_argument("--length", type=int, default=500, help="eval: steps of an episode")
    parser.add_argument("--world-only", action="store_true", help="eval: skip the agents")
    parser.add_argument("--out", default=None, help="dream: .gif or .mp4, default RUN/dream.gif")
    parser.add_argument("--k", type=int, help="eval, dream: sampling steps, default the run's")
    parser.add_argument("--clips", type=int, default=4, help="dream: pairs side by side")
    parser.add_argument("--horizon", type=int, default=32, help="dream: imagined frames")
    parser.add_argument("--seed", type=int, default=0, help="dream: seed of the noise")
    parser.add_argument("--workers", type=int, default=0, help="processes, 0: one per core")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser


def evaluate(words):
    """`play.py eval` and the end of train.py: words of the command line -> results.json."""
    args, command = make_parser().parse_args(words), "python play.py " + " ".join(words)
    folder, device, settings = Path(args.run), pick_device(args.device), data_config(args.run)
    run, dataset = open_run(args, settings, device)
    add_results(folder, command, evaluate_world(run, dataset, args.dtype))
    if run.dynamics:
        add_results(folder, command, measure_speed(run, args.dtype))
    if run.agent and not args.world_only:
        agents = [a for a in args.agents.split(",") if (a != "rl" or run.stage == "imagine")
                  and (a != "player" or hasattr(make_env(settings["env"]), "player"))]
        add_results(folder, command, evaluate_agents(folder, agents, args.episodes, args.length,
                                                     device, args.dtype, args.workers))


def open_run(args, settings, device):
    """The run and the reference set that it is judged by."""
    run = load_run(args.run, None, device)
    if run.dynamics and args.k:
        run.dynamics.cfg = dataclasses.replace(run.dynamics.cfg, k=args.k)
    return run, reference_set(settings["env"], settings["reference_episodes"], settings["length"],
                              args.workers)


def main():
    args = make_parser().parse_args()
    folder = Path(args.run)
    if args.command == "report":
        print(write_report(folder))
    elif args.command == "eval":
        evaluate(sys.argv[1:])
        print(results_table(read_results(folder)))
    else:
        run, dataset = open_run(args, data_config(folder), pick_device(args.device))
        if run.dynamics is None:
            raise UserError(f"No dynamics in {folder}: run 'python train.py --stage dynamics'.")
        path = Path(args.out or folder / "dream.gif")
        write_film(path, dream_film(run, dataset, args.clips, horizon=args.horizon,
                                    dtype=args.dtype, seed=args.seed))
        print(path)


if __name__ == "__main__":
    run_cli(main)
