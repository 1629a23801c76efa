"""Figure 7: how many actions must be labelled to learn what actions do?

The paper: actions of 0.4 or 4 % of the hours bring 53 and 85 % of the PSNR that all actions
bring; those of the Overworld alone 76 % in Nether and End. Here: dynamics on one tokenizer
that know the actions of 0, 1, 4, 10 or 100 % of the episodes, or of all frames above
ground, judged in caves as well; dreams of 16 frames after 16 true ones.

    python -m paper.figure7_labels --run runs/crafter
    python -m paper.figure7_labels --run runs/crafter --train.dynamics_steps 400  # shorter

All share the run's tokenizer; further flags go to train.py.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from agent import autocast, load_run, pick_device
from data import run_cli
from paper import results
from play import (CLIPS, CONTEXT, Result, bootstrap, dream_clips, encode, ratio,
                  read_probes, reference_clips, reference_of, squared_error, ssim)

LABELLED = {"none": "0", "1 %": "0.01", "4 %": "0.04", "10 %": "0.1",
            "above ground": "probe_above", "all": "1"}
HORIZON = 16


def psnr(error, frames, axis=0):
    """From sums of squared errors and counts of frames, by episode."""
    return -10 * np.log10(np.maximum(ratio(error, frames, axis), 1e-9))


def share_of_gap(statistic, none, some, full, frames, axis=0):
    """How far `some` is on the way from none to full."""
    none, some, full = (statistic(x, frames, axis) for x in (none, some, full))
    return (some - none) / (full - none)


@torch.no_grad()
def score(run, clips, dtype="auto"):
    """-> squared error and SSIM of the dreamed frames, (n, HORIZON) each."""
    with autocast(run.device, dtype):
        film = dream_clips(run, encode(run, clips), HORIZON)[:, CONTEXT:]
    real = clips.frames[:, CONTEXT:]
    alike = [ssim(film[:, t], real[:, t]) for t in range(HORIZON)]
    return squared_error(film, real), np.stack(alike, 1)


def evaluate_labels(runs, dataset, dtype="auto", per_episode=CLIPS):
    """{labelled: run} -> rows: PSNR and SSIM of each, and as a share of the way from "none"
    to "all"; of all frames, and of those in caves. "none" isn't told any action."""
    clips = reference_clips(dataset, per_episode, CONTEXT + HORIZON, runs["all"].device)
    untold = clips._replace(labelled=torch.zeros_like(clips.labelled))
    scores = {name: score(run, untold if name == "none" else clips, dtype)
              for name, run in runs.items()}
    probes = read_probes(dataset, clips.episode, clips.start, CONTEXT + HORIZON)
    places = {"": np.ones_like(scores["all"][0])}
    if "probe_above" in probes:
        caves = probes["probe_above"][:, CONTEXT:] == 0
        places |= {" in caves": caves} if caves.any() else {}

    def by_episode(x):                  # the clips of an episode are alike
        return x.reshape(-1, per_episode * HORIZON).sum(1)

    rows = []
    for place, frames in places.items():
        n, count = int(frames.sum()), by_episode(frames)
        for i, (measure, statistic) in enumerate((("PSNR", psnr), ("SSIM", ratio))):
            sums = {name: by_episode(x[i] * frames) for name, x in scores.items()}
            for name, x in sums.items():
                of = {"labelled": name, "measure": measure + place}
                unit = "dB" if measure == "PSNR" else "ssim"
                rows.append(Result("quality", *bootstrap(statistic, x, count), n, unit, of))
                share = bootstrap(partial(share_of_gap, statistic), sums["none"], x,
                                  sums["all"], count)
                if name not in ("none", "all"):
                    rows.append(Result("share_of_gap", *share, n, "share", of))
    return rows


def main():
    args, flags = results.make_parser(__doc__).parse_known_args()
    device, base, runs = pick_device(args.device), Path(args.run).name, {}
    common = ["--base", base, "--train.event_rows", "0"]
    for name, labels in LABELLED.items():
        run = "labels_" + name.removesuffix(" %").replace(" ", "_")
        folder = results.trained(run, "dynamics", *common, "--data.labels", labels, *flags)
        runs[name] = load_run(folder, "dynamics", device, args.dtype)
    rows = evaluate_labels(runs, reference_of(folder), args.dtype)
    results.save("figure7_labels", rows)
    results.chart([row for row in rows if row.name == "share_of_gap"], "labelled",
                  "measure", "0: no actions labelled, 1: all", "figure7_labels.png")


if __name__ == "__main__":
    run_cli(main)
