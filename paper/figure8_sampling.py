"""Figure 8: sampling steps."""
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from agent import autocast
from data import rng_for
from dynamics import Dream
from play import bootstrap, compiled, mean_interval, reader_of

# ------------------------------------------------------------ sampling steps, long and free dreams

@torch.no_grad()
def dream_freely(run, n, length, actor=None, actions=None, context=None, seed=0):
    """Dreams of n rows -> latents (n, length, S_z, Z).

    From nothing (the first frame has no action and no past), or on from context, a tuple of z,
    actions, labelled. The actions are `actions` (n, length, .), or sampled by the BC policy of the
    run `actor`, which looks at the same latents: so one policy can drive several world models.
    """
    device = run.device
    generator = torch.Generator(device).manual_seed(seed)
    dream, eyes, frames, h = Dream(run.dynamics, generator), None, [], None
    none = {k: torch.from_numpy(x).to(device) for k, x in run.spec.actions.zeros(n, 1).items()}
    yes = torch.ones(n, 1, dtype=torch.bool, device=device)
    if actor:
        eyes = Dream(actor.dynamics, generator)
        task = torch.randint(max(1, len(run.spec.tasks)), (n, 1), generator=generator,
                             device=device)
    if context:
        dream.commit(*context)
    for t in range(length):
        labelled, action = yes, none
        if t == 0 and not context:
            labelled = ~yes
        elif actor:
            action = {k: x[:, None] for k, x in actor.agent.act(h, generator).items()}
        else:
            action = {k: x[:, t:t + 1] for k, x in actions.items()}
        z = dream.imagine(action, labelled)
        dream.commit(z, action, labelled)
        if actor:
            h = eyes.commit(z, action, labelled, actor.agent.prompt(task))[:, 0]
        frames.append(z)
    return torch.cat(frames, 1)


def random_features(frames, seed=0):
    """uint8 (N, T, H, W, 3) -> (N, 256): "random3d", the means and deviations of 128 channels of a
    three-layer 3-D convolution with fixed random weights. No trained net can be had offline."""
    generator, sizes = torch.Generator().manual_seed(seed), (3, 32, 64, 128)
    weights = [torch.randn(b, a, 3, 5, 5, generator=generator) * (2 / (75 * a)) ** 0.5
               for a, b in zip(sizes, sizes[1:], strict=False)]
    out = []
    for x in frames.split(32):
        x = x.movedim(-1, 1).float().cpu() / 127.5 - 1
        for i, w in enumerate(weights):
            x = F.relu(F.conv3d(x, w, stride=(1 + (i > 0), 3, 3), padding=(1, 2, 2)))
        out.append(torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1))
    return torch.cat(out).double().numpy()


def frechet(real, fake):
    """Frechet distance of two Gaussians fitted to (N, D) and (M, D): |m1 - m2|^2 + tr(C1 + C2 -
    2 (C1 C2)^(1/2))."""
    mean = np.square(real.mean(0) - fake.mean(0)).sum()
    a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    return float(mean + np.trace(a) + np.trace(b) - 2 * root)


@torch.no_grad()
def evaluate_sampling(run, dataset, actor, ks=(1, 2, 4, 8, 16), n=1024, length=16, dtype="auto"):
    """The paper's Figure 8: videos from nothing for each K, the Frechet distance of 64 principal
    components of random3d to real windows, and the share of cells that show a legal texture."""
    device, entries, run = run.device, {}, dataclasses.replace(run, dynamics=compiled(run))
    episode, start, _ = dataset.sample(rng_for(0, "frechet", 0), 2 * n, length, split="all")
    half = episode % 2 == 0                             # no episode in both halves
    real = random_features(torch.from_numpy(dataset.read(episode, start, length,
                                                         ["frames"])["frames"]))
    center, scale = real.mean(0), real.std(0)
    axes = np.linalg.svd((real - center) / scale, full_matrices=False)[2][:64].T
    project = lambda x: (x - center) / scale @ axes
    real = project(real)
    entries["frechet_real"] = frechet(real[half], real[~half]), None, None, n, "distance"
    reader, fakes = reader_of(dataset), {}
    for k in ks:
        run.dynamics.cfg = dataclasses.replace(run.dynamics.cfg, k=k)
        frames = []
        with autocast(device, dtype):
            for i in range(0, n, 64):
                z = dream_freely(run, min(64, n - i), length, actor, seed=i)
                frames += [run.tokenizer.decode(x).cpu() for x in z.split(16)]
        frames = torch.cat(frames)
        fakes[k] = project(random_features(frames))
        entries[f"frechet_k{k}"] = frechet(real[half], fakes[k]), None, None, n, "distance"
        if reader:
            some = frames[:: max(1, n // 256), -1]
            legal = (reader.read(some)[2] < reader.LEGAL).mean((1, 2))
            entries[f"legal_k{k}"] = *mean_interval(legal), len(some), "share"
    # rows drawn twice make a distance larger: intervals of its ratio alone
    if {4, 16} <= set(ks):
        entries["frechet_k4_over_k16"] = *bootstrap(
            lambda x, y: frechet(real[half], x) / frechet(real[half], y), fakes[4], fakes[16],
            n=100), n, "ratio"
    return entries
