"""Figure 5: does an interaction in the dream end as in the real game?

The paper: a person tries 16 tasks inside the world model. Here: scripts, each in 20
contexts of play that nobody trained on. A dream passes if the player, all items, all
altered cells and 9 in 10 of the cells in sight are as in the real game.

    python -m paper.figure5_interactions --run runs/crafter
    python -m paper.figure5_interactions --run runs/crafter --k 1 --step_label min
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from agent import autocast, load_run, pick_device
from data import Dataset, UserError, run_cli
from envs.crafter import INTERACTIONS, judge, record_interactions
from paper import results
from play import (AS_TRAINED, GREEN, Result, Sampler, border, dream_clips, encode,
                  new_figure, read_clips, read_probes, reader_of, wilson)

GREY, RED = (90, 90, 90), (200, 40, 40)
LOOK = "look_away_and_back"             # is judged when it is away, too


def interaction_set(path=Path("datasets/crafter_interactions")):
    """Contexts and outcomes of scripted interactions, recorded at the first call."""
    if not (path / "dataset.json").exists():
        print(f"Recording interactions into {path}.")
        record_interactions(path)
    dataset = Dataset(path)
    if dataset.settings.get("version") != INTERACTIONS:
        raise UserError(f"Got interactions of old code in {path}, need new: delete it.")
    return dataset


@torch.no_grad()
def try_interaction(run, dataset, kind, dtype="auto", sampler=AS_TRAINED):
    """-> bool (n,): which dreams of this kind pass; and a picture of four of them: last
    frame shown, end of the dream, end in the real game."""
    reader, context = reader_of(dataset), dataset.settings["context"]
    rows = np.flatnonzero(np.array(dataset.settings["kinds"]) == kind)
    start, length = np.zeros(len(rows), int), int(dataset.lengths[rows[0]])
    clips = read_clips(dataset, rows, start, length, run.device)
    probes = read_probes(dataset, rows, start, length)
    with autocast(run.device, dtype):
        dreamed = dream_clips(run, encode(run, clips), length - context, sampler=sampler)
    dreamed, real = dreamed.cpu().numpy(), clips.frames.cpu().numpy()

    passed = np.ones(len(rows), bool)
    before = {name: x[:, context - 1] for name, x in probes.items()}
    for t in [length - 1, context + 4] if kind == LOOK else [length - 1]:
        after = {name: x[:, t] for name, x in probes.items()}
        passed &= judge(reader, kind, dreamed[:, t], real[:, t], before, after)
    scenes = []
    for i in range(min(4, len(rows))):
        scenes += [border(real[i, context - 1], GREY),
                   border(dreamed[i, -1], GREEN if passed[i] else RED),
                   border(real[i, -1], GREY)]
    return passed, np.concatenate(scenes, 1)


def evaluate_interactions(run, dataset, dtype="auto", sampler=AS_TRAINED):
    """-> rows by kind and their mean, and {kind: picture}."""
    cfg, rows, pictures, passed = run.dynamics.cfg, [], {}, []
    told = ", step_label min" if (sampler.step_label or cfg.step_label) == "min" else ""
    name = f"K = {sampler.k or cfg.k}{told}"
    for kind in sorted(set(dataset.settings["kinds"])):
        good, pictures[kind] = try_interaction(run, dataset, kind, dtype, sampler)
        passed.append(good)
        interval = wilson(good.sum(), len(good))
        rows.append(Result("interaction", float(good.mean()), *interval, len(good), "share",
                           {"kind": kind, "sampler": name}))

    # the mean over kinds; its spread is that of the contexts within each kind
    mean = float(np.mean([x.mean() for x in passed]))
    half = 1.96 * float(np.sqrt(sum(x.var() / len(x) for x in passed))) / len(passed)
    rows.append(Result("interaction", mean, mean - half, mean + half, sum(map(len, passed)),
                       "share", {"kind": "mean of all kinds", "sampler": name}))
    return rows, pictures


def main():
    parser = results.make_parser(__doc__, "dynamics")
    parser.add_argument("--k", type=int, help="sampling steps, default the run's")
    parser.add_argument("--step_label", choices=("own", "min"), help="default the run's")
    args = parser.parse_args()
    run = load_run(args.run, args.stage, pick_device(args.device), args.dtype)
    rows, pictures = evaluate_interactions(run, interaction_set(), args.dtype,
                                           Sampler(args.k, args.step_label))
    results.save("figure5_interactions", rows)
    figure, axes = new_figure(len(pictures), 1, (12, 1.15 * len(pictures)))
    for axis, (kind, picture) in zip(axes.flat, pictures.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(kind, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    path = results.ROOT / "paper" / "figure5_interactions.png"
    figure.savefig(path, dpi=60)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    run_cli(main)
