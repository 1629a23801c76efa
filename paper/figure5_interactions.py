"""Figure 5: scripted interactions inside the dream."""
from pathlib import Path

import numpy as np
import torch

from agent import autocast
from data import Dataset, UserError
from envs.crafter import INTERACTIONS, judge, record_interactions
from play import GREEN, border, dream_clips, new_figure, read_probes, reader_of, to_tensors, wilson


def interaction_set(env):
    """Contexts and outcomes of scripted interactions, recorded at the first call."""
    path = Path("datasets") / f"{env.replace(':', '_')}_interactions"
    if not (path / "dataset.json").exists():
        print(f"Recording interactions into {path}.")
        record_interactions(env, path)
    dataset = Dataset(path)
    if dataset.settings.get("version") != INTERACTIONS:
        raise UserError(f"Got interactions of older code in {path}, need today's to compare with: "
                        "delete that folder, then the same command records it anew.")
    return dataset


@torch.no_grad()
def evaluate_interactions(run, dataset, dtype="auto", picture=None):
    """Share of contexts in which the dream shows what the script does in the real game, by kind."""
    device, context = run.device, dataset.settings["context"]
    reader, kinds = reader_of(dataset), np.array(dataset.settings["kinds"])
    entries, strips, passed = {}, [], {}
    for kind in sorted(set(kinds)):
        rows = np.flatnonzero(kinds == kind)
        length = int(dataset.lengths[rows[0]])
        where = rows, np.zeros(len(rows), int)
        clips, actions = to_tensors(dataset.read(*where, length), device)
        probes = read_probes(dataset, *where, length)
        at = lambda t: {k: x[:, t] for k, x in probes.items()}
        with autocast(device, dtype):
            dreamed = dream_clips(run, run.tokenizer.encode(clips["frames"]), actions,
                                  clips["labelled"], length - context).cpu().numpy()
        real, good = clips["frames"].cpu().numpy(), np.ones(len(rows), bool)
        moments = [length - 1] + [context + 4] * (kind == "look_away_and_back")
        for t in moments:
            good &= judge(reader, kind, dreamed[:, t], real[:, t], at(context - 1), at(t))
        n = len(rows)
        entries[f"interaction_{kind}"] = good.mean(), *wilson(int(good.sum()), n), n, "share"
        passed[kind] = good
        color = lambda ok: GREEN if ok else (200, 40, 40)
        strips.append(np.concatenate([np.concatenate(
            [border(real[i, context - 1], (90, 90, 90)), border(dreamed[i, -1], color(good[i])),
             border(real[i, -1], (90, 90, 90))], 1) for i in range(min(4, n))], 1))
    shares = np.array([x.mean() for x in passed.values()])
    spread = np.sqrt(sum(x.var() / len(x) for x in passed.values())) / len(passed)
    entries["interactions_pass_rate"] = (shares.mean(), shares.mean() - 1.96 * spread,
                                         shares.mean() + 1.96 * spread, len(kinds), "share")
    if picture:
        write_strips(picture, list(passed), strips)
    return entries


def write_strips(path, titles, strips):
    """Rows of pictures with their names, as one PNG."""
    figure, axes = new_figure(len(strips), 1, (12, 1.15 * len(strips)))
    for axis, title, strip in zip(axes.flat, titles, strips, strict=True):
        axis.imshow(strip)
        axis.set_title(title, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(path, dpi=80)
