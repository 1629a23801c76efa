"""Figure 7: how many labelled actions the world model needs."""
import functools

import numpy as np
import torch

from agent import autocast
from envs.crafter import in_cave
from play import bootstrap, dream_clips, read_probes, reference_clips, squared_error, ssim


@torch.no_grad()
def evaluate_labels(runs, dataset, dtype="auto", per_episode=4, context=16, horizon=16):
    """The paper's Figure 7: dreams of `horizon` frames by {name: run}, among them "none" (it has
    learned no actions and is shown none) and "all" -> PSNR and SSIM of each as a share of the way
    from "none" to "all", on all frames and on those in caves, and that gap."""
    device = runs["all"].device
    clips, actions = reference_clips(dataset, per_episode, context + horizon, device)
    real, where = clips["frames"][:, context:], clips["where"]
    cave = in_cave(read_probes(dataset, *where, context + horizon)["probe_semantic"][:, context:])
    scores, entries = {}, {}
    for name, run in runs.items():
        labelled = clips["labelled"] & (name != "none")
        with autocast(device, dtype):
            z = torch.cat([run.tokenizer.encode(x) for x in clips["frames"].split(16)])
            film = dream_clips(run, z, actions, labelled, horizon)[:, context:]
        scores[name] = squared_error(film, real), ssim(film, real)
    interval = functools.partial(bootstrap, block=per_episode)
    average = lambda x, rows: (x * rows).sum() / rows.sum()
    kinds = {"psnr": (0, lambda x, rows: -10 * np.log10(average(x, rows)), "dB"),
             "ssim": (1, average, "ssim")}
    for place, rows in (("", np.ones_like(cave)), ("_caves", cave)):
        for measure, (i, mean, unit) in kinds.items():
            value = {name: score[i] for name, score in scores.items()}
            n, none, full = int(rows.sum()), value["none"], value["all"]
            for name in runs:
                entries[f"labels_{name}{place}_{measure}"] = *interval(
                    mean, value[name], rows), n, unit
            entries[f"labels_gap{place}_{measure}"] = *interval(
                lambda x, y, r, mean=mean: mean(y, r) - mean(x, r), none, full, rows), n, unit
            for name in set(runs) - {"none", "all"}:
                entries[f"labels_{name}{place}_{measure}_share"] = *interval(
                    lambda x, y, z, r, mean=mean: (mean(y, r) - mean(x, r))
                    / (mean(z, r) - mean(x, r)), none, value[name], full, rows), n, "share"
    return entries
