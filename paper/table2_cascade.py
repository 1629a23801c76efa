"""Table 2: from diffusion forcing to shortcut forcing, one change a row, each kept.

The paper: Frechet video distance falls from 306 (64 steps a frame; 875 with 4) to 57, while
a training step takes a sixth of the time and a dreamed frame a 27th. Here: the dynamics
alone on one tokenizer, each row about as many frames, three seeds; "more latents" gives the
same latents unpacked, a token each.

    python -m paper.table2_cascade --run runs/crafter
    python -m paper.table2_cascade --run runs/crafter --seeds 0 --designs 0 1 2

What is trained and judged stays under runs/paper/ and is not done again; further flags go
to train.py (default --train.dynamics_steps 600).
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from agent import autocast, load_checkpoint, load_run, pick_device, save_checkpoint
from data import UserError, read_json, run_cli, write_json
from dynamics import Dream
from paper import results
from paper.bench import dream_rate
from paper.figure8_sampling import dreamed_videos, frechet, real_play
from play import (Result, Sampler, evaluate_world, find, read_metrics, reference_of,
                  t_interval)
from tokenizer import compile_module


class Design(NamedTuple):
    name: str
    flags: dict                 # of train.py, that it changes
    k: int = 4
    paper: tuple = ()           # its seconds a step, frames/s, Frechet distance: see PAPER


DESIGNS = (
    Design("diffusion forcing, v-prediction, K = 16 (paper: 64)",
           {"prediction": "v", "loss_space": "v", "p_boot": 0, "step_label": "min",
            "ramp": "false", "dense": "true", "time_every": 1, "kv_heads": 4,
            "registers": 0, "train.long_share": 1}, 16, (9.8, 0.8, 306)),
    Design("K = 4", {}, 4, (9.8, 9.1, 875)),
    Design("+ shortcut", {"p_boot": 0.25, "step_label": "own"}, 4, (9.8, 9.1, 329)),
    Design("+ x-prediction", {"prediction": "x"}, 4, (9.8, 9.1, 326)),
    Design("+ x-loss", {"loss_space": "x"}, 4, (9.8, 9.1, 151)),
    Design("+ ramp", {"ramp": "true"}, 4, (9.8, 9.1, 102)),
    Design("+ alternating lengths", {"train.long_share": 0.25}, 4, (1.5, 9.1, 80)),
    Design("+ time in one layer of two (paper: four)", {"time_every": 2}, 4,
           (0.6, 18.9, 70)),
    Design("+ GQA", {"kv_heads": 2}, 4, (0.5, 23.2, 71)),
    Design("+ time-factorised", {"dense": "false"}, 4, (0.4, 30.1, 91)),
    Design("+ registers", {"registers": 2}, 4, (0.5, 28.9, 91)),
    Design("+ more latents", {"pack": 1}, 4, (0.8, 25.7, 66)),
    # not kept: changes of the row "+ registers"
    Design("registers, bootstrap in each row", {"pack": 9, "p_boot": 1}),
    Design("registers, v-prediction and v-loss",
           {"p_boot": 0.25, "prediction": "v", "loss_space": "v"}))
PAPER = ("paper: step, s", "paper: frames/s", "paper: Frechet")
VIDEOS = 512


def flags_of(number):
    """Of a design: those of all before it, too -> words for train.py, and whether its
    latents are unpacked."""
    flags = {}
    for design in DESIGNS[:number + 1]:
        flags |= design.flags
    pack = flags.pop("pack", 9)
    words = [(name if "." in name else f"dynamics.{name}", value)
             for name, value in flags.items()]
    return [word for name, x in words for word in (f"--{name}", str(x))], pack == 1


def unpack_tokenizer(folder):
    """A run whose tokenizer gives the latents of that in `folder`, a token each -> name."""
    other = Path("runs/paper/unpacked")
    if not (other / "tokenizer.pt").exists():
        state = load_checkpoint(Path(folder) / "tokenizer.pt")
        del state["version"]
        state["config"]["tokenizer"]["pack"] = 1
        other.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "config.json", other)
        save_checkpoint(other / "tokenizer.pt", state)
    return f"paper/{other.name}"


@torch.no_grad()
def judge(folder, k, actor, dataset, device, dtype):
    """A trained design -> {measure: value}; kept in its folder."""
    path = folder / f"table2_{k}.json"
    if path.exists():
        return read_json(path)
    run = load_run(folder, "dynamics", device, dtype)
    if run.meta["config"]["train"]["compile"]:
        compile_module(run.dynamics, device)
    rows = evaluate_world(run, dataset, dtype, sampler=Sampler(k))
    half, _, project = real_play(dataset, VIDEOS)
    rates = [line["rate"] for line in read_metrics(folder)]
    videos = dreamed_videos(run, actor, VIDEOS, k, dtype)
    with autocast(device, dtype):
        speed = dream_rate(Dream(run.dynamics, k=k), 1, run.tokenizer)
    symbols = {"wrong cells, 4 ahead": ("wrong_cells", {"film": "dream", "horizon": 4}),
               "changed cells": ("changed_cells", {"film": "next"}),
               "F1": ("inventory_f1", {"film": "next"}),
               "PSNR, 4 ahead": ("psnr", {"film": "dream", "horizon": 4})}
    found = {"step, s": 1 / float(np.median([rate for rate in rates if rate])),
             "frames/s": speed, "Frechet": frechet(half, project(videos)),
             **{name: find(rows, *key).value for name, key in symbols.items()}}
    write_json(path, found)
    return found


def main():
    parser = results.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--designs", type=int, nargs="+", default=range(len(DESIGNS)),
                        help="numbers of rows, default all")
    args, flags = parser.parse_known_args()
    device, base, rows = pick_device(args.device), Path(args.run).name, []
    actor = load_run(args.run, "agent", device, args.dtype)
    if actor.tokenizer.cfg.pack == 1:
        raise UserError(f"Got {args.run}, whose latents are not packed, need a run of the "
                        "preset cpu.")
    for number in args.designs:
        design = DESIGNS[number]
        words, unpacked = flags_of(number)
        words += ["--preset", "cpu", "--train.dynamics_steps", "600", *flags]
        same = next(i for i in range(number + 1) if flags_of(i) == flags_of(number))
        source = unpack_tokenizer(args.run) if unpacked else base
        found = []
        for seed in args.seeds:
            folder = results.trained(f"table2_{same}_{seed}", "dynamics", "--base", source,
                                     "--seed", str(seed), *words)
            dataset = reference_of(folder)
            found.append(judge(folder, design.k, actor, dataset, device, args.dtype))
        for measure in found[0]:
            values = t_interval(np.array([one[measure] for one in found]))
            unit = {"PSNR, 4 ahead": "dB", "F1": "share", "changed cells": "share"}
            rows.append(Result("cascade", *values, len(found), unit.get(measure, ""),
                               {"design": design.name, "measure": measure}))
        rows += [Result("cascade", value, None, None, 1, "",
                        {"design": design.name, "measure": measure})
                 for measure, value in zip(PAPER, design.paper, strict=False)]
    results.save("table2_cascade", rows, args.seeds)


if __name__ == "__main__":
    run_cli(main)
