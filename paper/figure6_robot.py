"""Figure 6: does the world model know what a robot's hand does to things?

The paper: from one frame of a real robot five movements, each imagined. Here: PushT, whose
simulator says what each would truly lead to. First a world model with continuous actions:
how far from the truth are finger and block, read from dreamed pictures, where the block is
pushed; then an agent with 11 x 11 classes of movements, through all stages.

    pip install gym-pusht 'pymunk<7'
    python -m paper.figure6_robot                   # --seeds 3: agents too, hours
"""

import numpy as np
import torch

from agent import STAGES, autocast, load_run, pick_device
from data import run_cli
from envs.pusht import SIDE, make, read_places
from paper import results
from play import (GREEN, ORANGE, Result, border, dream_clips, encode, evaluate_agents,
                  over_runs, read_clips, reference_of, roll_out, write_film)

PLAY = ("--data.episodes", "500", "--data.length", "100")
HORIZONS, PUSHED = (1, 2, 4, 8, 16), 2.0        # frames; pixels that a block has moved
CONTEXT, FILM = 16, 12                          # frames shown, and imagined in the film
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "stay": (0, 0)}


def places(frames):
    """read_places of films (n, T, 96, 96, 3): (n, T, 2, 2). What is gone counts as in the
    middle of the picture."""
    found = np.stack([read_places(film.cpu().numpy()) for film in frames])
    return np.where(np.isnan(found), frames.shape[2] / 2, found)


def score_places(rolled):
    """Rollouts -> rows: error of finger and block in pixels, by film and horizon. The block
    counts in clips in which it has been pushed by then."""
    real, C, rows = places(rolled.real), rolled.context, []
    for film in ("dream", "copy", "shuffled", "reconstruction"):
        error = np.linalg.norm(places(rolled.films[film]) - real, axis=-1)
        for h in HORIZONS:
            t = C + h - 1
            moved = np.linalg.norm(real[:, t, 1] - real[:, C - 1, 1], axis=-1) > PUSHED
            for name, some in (("finger", error[:, t, 0]), ("block", error[moved, t, 1])):
                rows.append(Result(f"{name}_error", *over_runs(some[None]), "pixels",
                                   {"film": film, "horizon": h}))
    return rows


def pushed_clip(dataset):
    """Episode and frame after whose CONTEXT frames the block is pushed most."""
    best = max((abs(np.diff(dataset.episode(i)["probe_places"][t:t + FILM, 2:].astype(int),
                            axis=0)).sum(), i, t - CONTEXT)
               for i in dataset.episodes("all") for t in range(CONTEXT, 80, 8))
    return best[1:]


@torch.no_grad()
def counterfactuals(run, dataset, dtype):
    """Film uint8 (FILM, 2 * 102, 5 * 102, 3), with borders: five movements of the hand from
    one state, above imagined, below true."""
    i, start = pushed_clip(dataset)
    clip = read_clips(dataset, [i], [start], CONTEXT, run.device)
    actions, real = [], []
    for move in MOVES.values():
        env = make("")                          # led there as it was recorded
        env.reset(dataset.settings["seed"] + i)
        rows = dataset.episode(i)["actions"]
        for row in rows[1:start + CONTEXT]:
            env.step(row)
        hand = np.array(env.env.unwrapped.agent.position)
        actions.append([env.row(np.clip(hand + 25 * t * np.array(move), 20, SIDE - 20))
                        for t in range(1, FILM + 1)])
        real.append([env.step(row)[0] for row in actions[-1]])
    with autocast(run.device, dtype):
        batch = encode(run, clip)
        five = [x.expand(len(MOVES), *x.shape[1:]) for x in batch[:3]]
        follow = torch.tensor(np.array(actions), device=run.device)
        pad = torch.zeros(len(MOVES), FILM, *five[0].shape[2:], device=run.device)
        batch = batch._replace(
            z=torch.cat([five[0], pad], 1), actions=torch.cat([five[1], follow], 1),
            labelled=torch.cat([five[2], torch.ones_like(follow[..., 0]).bool()], 1))
        dreamed = dream_clips(run, batch, FILM)[:, CONTEXT:].cpu().numpy()
    films = border(dreamed, ORANGE), border(np.array(real), GREEN)
    return np.concatenate([np.concatenate(list(film), 2) for film in films], 1)


def main():
    parser = results.make_parser(__doc__, "dynamics")
    parser.add_argument("--seeds", type=int, default=0, help="agents to train and judge")
    args = parser.parse_args()
    device = pick_device(args.device)
    for stage in STAGES[:2]:
        folder = results.trained("robot", stage, "--data.env", "pusht", *PLAY)
    run, dataset = load_run(folder, "dynamics", device, args.dtype), reference_of(folder)
    with autocast(device, args.dtype):
        results.save("figure6_robot", score_places(roll_out(run, dataset, max(HORIZONS))))
    film = counterfactuals(run, dataset, args.dtype)
    write_film(results.ROOT / "paper" / "figure6_robot.gif", film)

    rows = []
    for seed in range(args.seeds):
        for stage in STAGES:
            folder = results.trained(f"robot_agent{seed}", stage, "--data.env", "pusht:11",
                                     *PLAY, "--seed", str(seed))
        judged = evaluate_agents(folder, device, args.dtype, 100, 200)
        rows += [row._replace(of=row.of | {"seed": seed}) for row in judged]
    if rows:
        results.save("figure6_robot", rows, range(args.seeds))


if __name__ == "__main__":
    run_cli(main)
