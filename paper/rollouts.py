"""Long rollouts: how far does a dream follow the game, and does it last?

No figure of the paper, whose world model is judged by people who play in it. Here: PSNR and
SSIM up to 64 frames after the context, beside what a perfect model would score with the
shuffled actions: the simulator itself. And dreams of 500 frames: the share of map cells
near a texture that exists, and the map's brightness (dark cells pass easily).

    python -m paper.rollouts --run runs/crafter
"""

import numpy as np
import torch

from agent import autocast, load_run, pick_device
from data import UserError, copy_env, make_env, run_cli, work
from dynamics import Dream
from paper import results
from play import (CLIPS, CONTEXT, Result, encode, read_clips, reader_of, reference_clips,
                  reference_of, roll_out, score_pixels, shuffle_actions, t_interval)

MAP_ROWS = 56               # of the 72 of a Crafter frame; below the map is the inventory


def branch_off(name, seed, recorded, branches):
    """Play a world by its recorded actions (T, A), and copies of it from the frames in
    `branches`, a list of (t, other actions (n, A)), by those: a list of frames uint8
    (n, H, W, 3) and events (n, tasks). A film stands still where its world has ended.
    UserError: it can't be copied, or shows other frames than the recorded ones."""
    env, films = make_env(name), [None] * len(branches)
    shown = env.reset(seed)
    for t in range(max(point for point, _ in branches) + 1):
        if t:
            shown = env.step(recorded["actions"][t])[0]
        if not np.array_equal(shown, recorded["frames"][t]):
            raise UserError(f"Got another frame {t} from {name}, seed {seed}, than was "
                            "recorded, need a world that follows from its seed: leave out "
                            "what the simulator would show.")
        for i in (i for i, (point, _) in enumerate(branches) if point == t):
            twin, frame, frames, events, terminal = copy_env(env), shown, [], [], False
            if twin is None:
                raise UserError(f"Got {name}, need a world that can be copied: crafter.")
            for action in branches[i][1]:
                done = np.zeros(len(env.spec.tasks), np.uint8)
                if not terminal:
                    frame, done, terminal = twin.step(action)
                frames.append(frame)
                events.append(done)
            films[i] = np.stack(frames), np.stack(events)
    return films


def play_on(dataset, clips, context, actions):
    """The simulator from the end of each clip's context under other actions (n, T, A):
    frames uint8 (n, T - context, H, W, 3), events (n, T - context, tasks). Each world is
    made anew and led there as it was recorded."""
    jobs, actions = [], actions.cpu().numpy()
    for i in np.unique(clips.episode):
        branches = [(int(clips.start[row]) + context - 1, actions[row, context:])
                    for row in np.flatnonzero(clips.episode == i)]
        episode = dataset.episode(i)
        recorded = {name: np.array(episode[name]) for name in ("frames", "actions")}
        world = dataset.settings["seed"] + int(i)
        jobs.append((dataset.settings["env"], world, recorded, branches))
    done = {job[1]: films for job, films in work(branch_off, jobs)}     # as they end
    films = [film for world in sorted(done) for film in done[world]]
    order = np.argsort(np.argsort(clips.episode, kind="stable"))
    return tuple(np.stack(x)[order] for x in zip(*films, strict=True))


@torch.no_grad()
def evaluate_rollouts(run, dataset, dtype="auto", horizon=64):
    """-> rows of PSNR and SSIM by film and horizon."""
    with autocast(run.device, dtype):
        rolled = roll_out(run, dataset, horizon)
    C, length = rolled.context, rolled.real.shape[1]
    clips = reference_clips(dataset, CLIPS, length, run.device)
    by = CLIPS if len(clips.frames) > CLIPS else 1              # as roll_out shuffles
    actions = shuffle_actions(clips.actions, C, by)
    try:
        frames = torch.from_numpy(play_on(dataset, clips, C, actions)[0])
        frames = torch.cat([clips.frames[:, :C], frames.to(run.device)], 1)
        rolled.films["simulator"] = frames
    except UserError as error:
        print(f"Left out: the simulator. {error}")
    return score_pixels(rolled)


def actions_that_follow(dataset, episodes, length):
    """(n, length, A): for each episode the recorded actions of those after it, without the
    rows 0, which no action led to."""
    follow = []
    for i in range(len(episodes)):
        parts = []
        while sum(map(len, parts)) < length:
            i = (i + 1) % len(episodes)
            parts.append(np.asarray(dataset.episode(episodes[i])["actions"])[1:])
        follow.append(np.concatenate(parts)[:length])
    return torch.from_numpy(np.stack(follow))


@torch.no_grad()
def evaluate_long(run, dataset, length=500, dtype="auto", k=None):
    """Dreams on from one context of each reference episode, early in the first ones and
    late in the last -> every 50 frames the share of legal cells, and brightness."""
    device, reader = run.device, reader_of(dataset)
    episodes = [i for i in dataset.episodes("all") if dataset.lengths[i] >= CONTEXT]
    n = len(episodes)
    start = [(dataset.lengths[i] - CONTEXT) * j // n for j, i in enumerate(episodes)]
    actions = actions_that_follow(dataset, episodes, length).to(device)
    dream = Dream(run.dynamics, torch.Generator(device).manual_seed(0), k=k)
    cache, rows = run.tokenizer.new_cache(), []
    with autocast(device, dtype):
        batch = encode(run, read_clips(dataset, episodes, start, CONTEXT, device))
        dream.commit(batch.z, batch.actions, batch.labelled)
        for t in range(1, length + 1):
            z, _ = dream.step(actions[:, t - 1:t])
            frame = run.tokenizer.decode(z, cache)[:, 0].cpu().numpy()
            if t % 50 == 0:
                bright = frame[:, :MAP_ROWS].mean((1, 2, 3)) / 255
                legal = (reader.read(frame)[2] < reader.LEGAL).mean((1, 2))
                rows += [Result(name, *t_interval(x), n, "share", {"frame": t})
                         for name, x in (("legal_cells", legal), ("brightness", bright))]
    return rows


def main():
    args = results.make_parser(__doc__, "dynamics").parse_args()
    run = load_run(args.run, args.stage, pick_device(args.device), args.dtype)
    dataset = reference_of(args.run)
    rows = evaluate_rollouts(run, dataset, args.dtype)
    results.save("rollouts", rows + evaluate_long(run, dataset, dtype=args.dtype))
    rows = [row for row in rows if row.name == "psnr"]
    results.chart(rows, "horizon", "film", "PSNR, dB", "rollouts.png")


if __name__ == "__main__":
    run_cli(main)
