"""Figure 8: how many sampling steps does a frame need?

The paper: with shortcut forcing 4 steps come close to 64 of diffusion forcing. Here: 1,024
videos of 16 frames from nothing, acted by one BC policy; Frechet distance to real play in
64 principal components of random3d, a fixed random 3-D convolution net (no trained one can
be had offline), beside that of two halves of real play.

    python -m paper.figure8_sampling --run runs/crafter

trains diffusion forcing (no bootstrap rows) on the run's tokenizer; further flags go to
train.py. The videos of a model take 10 minutes on one core.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm

from agent import autocast, load_run, pick_device
from data import Windows, rng_for, run_cli
from dynamics import Dream
from paper import results
from play import Result, reference_of
from tokenizer import compile_module

KS = (1, 2, 4, 8, 16)
COMPONENTS, LENGTH = 64, 16     # of the features; frames of a video


@torch.no_grad()
def dream_from_nothing(dream, actor, n, length=LENGTH, seen=lambda z: z):
    """n dreams whose first frame has no action and no past -> latents (n, length, S_z, Z).
    The BC policy of the run `actor` acts: it looks at the same latents, `seen` as its own
    tokenizer packs them, with a task of its own for each row. So one policy can drive
    several world models."""
    tasks, generator = max(1, len(actor.spec.tasks)), dream.generator
    task = torch.randint(tasks, (n, 1), generator=generator, device=actor.device)
    policy_dream, frames = Dream(actor.dynamics, generator), []
    actions = torch.from_numpy(actor.spec.actions.zeros(n, 1)).to(actor.device)
    labelled = torch.zeros(n, 1, dtype=torch.bool, device=actor.device)
    for _ in range(length):
        z = dream.imagine(actions, labelled)
        dream.commit(z, actions, labelled)
        h = policy_dream.commit(seen(z), actions, labelled, actor.agent.prompt(task))
        actions = actor.agent.act(h[:, 0], generator)[:, None]
        labelled = torch.ones_like(labelled)
        frames.append(z)
    return torch.cat(frames, 1)


def random_features(frames, seed=0):
    """uint8 (N, T, H, W, 3) -> (N, 256): random3d, the means and deviations of 128 channels
    of a three-layer 3-D convolution with fixed random weights."""
    generator, widths = torch.Generator().manual_seed(seed), (3, 32, 64, 128)
    weights = [torch.randn(b, a, 3, 5, 5, generator=generator) * (2 / (75 * a)) ** 0.5
               for a, b in zip(widths, widths[1:], strict=False)]
    features = []
    for x in frames.split(32):
        x = x.movedim(-1, 1).float().cpu() / 127.5 - 1
        for i, weight in enumerate(weights):
            stride = (1 if i == 0 else 2, 3, 3)
            x = F.relu(F.conv3d(x, weight, stride=stride, padding=(1, 2, 2)))
        features.append(torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1))
    return torch.cat(features).double().numpy()


def frechet(real, fake):
    """Frechet distance of Gaussians fitted to (N, D) and (M, D):
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    mean = np.square(real.mean(0) - fake.mean(0)).sum()
    a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    return float(mean + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real)


def frechet_ratio(real, a, b, draws=100):
    """Distance of a over that of b, and its 95 % interval over videos drawn again. (Of the
    ratio alone: videos that are drawn twice make a distance larger.)"""
    rng, ratios = np.random.default_rng(0), []
    for _ in range(draws):
        rows = rng.integers(len(a), size=len(a))
        ratios.append(frechet(real, a[rows]) / frechet(real, b[rows]))
    low, high = np.percentile(ratios, (2.5, 97.5))
    return frechet(real, a) / frechet(real, b), float(low), float(high)


def real_play(dataset, n):
    """2 n real windows -> their components in two halves that share no episode, and the
    function that gives those of other videos."""
    windows = Windows(LENGTH, split="all")
    episode, start, _ = dataset.sample(rng_for(0, "frechet", 0), 2 * n, windows)
    frames = dataset.read(episode, start, LENGTH, ["frames"])["frames"]
    features = random_features(torch.from_numpy(frames))
    varies = features.std(0) > 0            # a feature that never varies tells nothing
    center, scale = features[:, varies].mean(0), features[:, varies].std(0)
    scaled = (features[:, varies] - center) / scale
    axes = np.linalg.svd(scaled, full_matrices=False)[2][:COMPONENTS].T

    def project(frames):
        return (random_features(frames)[:, varies] - center) / scale @ axes

    half = episode % 2 == 0
    return (scaled @ axes)[half], (scaled @ axes)[~half], project


@torch.no_grad()
def dreamed_videos(run, actor, n, k, dtype="auto"):
    """n videos from nothing with K = k -> uint8 frames (n, LENGTH, H, W, 3)."""
    def seen(z):
        return actor.tokenizer.merge(run.tokenizer.split(z))

    frames = []
    with autocast(run.device, dtype):
        for i in range(0, n, 64):
            dream = Dream(run.dynamics, torch.Generator(run.device).manual_seed(i), k=k)
            z = dream_from_nothing(dream, actor, min(64, n - i), seen=seen)
            frames += [run.tokenizer.decode(x).cpu() for x in z.split(16)]
    return torch.cat(frames)


def evaluate_sampling(runs, actor, dataset, n=1024, dtype="auto", ks=KS):
    """{video: run}: world models -> rows: distance to real play by K; K = 4 over K = 16."""
    half, other, project = real_play(dataset, n)
    rows = [Result("frechet", frechet(half, other), None, None, n, "distance",
                   {"video": "real play, another half", "K": k}) for k in ks]
    for video, run in runs.items():
        components = {}
        for k in ks:
            components[k] = project(dreamed_videos(run, actor, n, k, dtype))
            rows.append(Result("frechet", frechet(half, components[k]), None, None, n,
                               "distance", {"video": video, "K": k}))
        ratio = frechet_ratio(half, components[4], components[16])
        rows.append(Result("K = 4 over K = 16", *ratio, n, "ratio", {"video": video}))
    return rows


def main():
    args, flags = results.make_parser(__doc__).parse_known_args()
    device, base = pick_device(args.device), Path(args.run).name
    forcing = results.trained("forcing", "dynamics", "--base", base, "--dynamics.p_boot",
                              "0", "--dynamics.step_label", "min", *flags)
    runs = {"shortcut forcing": load_run(args.run, "dynamics", device, args.dtype),
            "diffusion forcing": load_run(forcing, "dynamics", device, args.dtype)}
    for run in runs.values():
        if run.meta["config"]["train"]["compile"]:
            compile_module(run.dynamics, device)
    actor = load_run(args.run, "agent", device, args.dtype)
    rows = evaluate_sampling(runs, actor, reference_of(args.run), dtype=args.dtype)
    results.save("figure8_sampling", rows)
    results.chart([row for row in rows if row.name == "frechet"], "K", "video",
                  "Frechet distance to real play", "figure8_sampling.png")


if __name__ == "__main__":
    run_cli(main)
