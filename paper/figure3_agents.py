"""Figures 3 and 4: does imagination beat imitation?

The paper: success and time of milestones, by how an agent was trained. Here: of
achievements, in the same worlds for all, which nobody trained on; paired gains, tests with
Holm's correction. And is what an agent believes and imagines true?

    python -m paper.figure3_agents --run runs/crafter
    python -m paper.figure3_agents --run runs/crafter --agent "BC=seed*:agent" \
        --agent "BC, best T=seed*:agent@best" --agent "imagination=seed*:imagine"

NAME=RUNS:STAGE@TEMPERATURE is a stage of all runs beside --run that are called so (* for
any letters). "best": the one of TEMPERATURES that does best in validation worlds.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from tqdm import tqdm

from agent import autocast, dream_of, imagine_rollout, load_run, pick_device
from data import UserError, VecEnv, make_env, run_cli
from dynamics import Batch, Dream
from paper import results
from paper.rollouts import play_on
from play import (CLIPS, TEST_SEED, VALIDATION_SEED, Result, achievements_of, agent_rows,
                  bootstrap, count_achievements, data_config, difference_rows, encode,
                  firsts_of, picture_agents, played, prompts_along, ratio, read_clips,
                  reference_clips, reference_of)

TEMPERATURES, TRIALS = (1.0, 0.75, 0.5, 0.3), 50    # for "best"; validation worlds
AGENTS = {"agent": "BC", "imagine": "imagination"}  # stage: agent


def mcnemar(a, b):
    """Two-sided p of the exact McNemar test: a, b bool (n,), success in the same worlds."""
    more, less = int((a & ~b).sum()), int((~a & b).sum())
    return float(stats.binomtest(more, more + less).pvalue) if more + less else 1.0


def holm(p):
    """p values (n,), corrected for being the n tests that were made (Holm)."""
    order, corrected = np.argsort(p), np.zeros(len(p))
    worse = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    corrected[order] = np.maximum.accumulate(np.minimum(worse, 1.0))
    return corrected


def significance(spec, plays, a, b):
    """Rows: does success at an achievement differ? Paired t test over runs, or McNemar over
    the worlds of one run; Holm's correction over the achievements."""
    first, other = np.broadcast_arrays(firsts_of(plays, a), firsts_of(plays, b))
    chances, tasks = [], achievements_of(spec)
    for task in tasks:
        done, others = np.isfinite(first[..., task]), np.isfinite(other[..., task])
        gain = done.mean(1) - others.mean(1)
        if len(gain) == 1:
            chances.append(mcnemar(done[0], others[0]))
        else:                           # equal gains in all runs: nothing to go by
            chances.append(float(stats.ttest_1samp(gain, 0).pvalue) if gain.std() else 1.0)
    return [Result("p_value", float(p), None, None, first[..., 0].size, "p",
                   {"agent": a, "than": b, "task": spec.tasks[task]})
            for p, task in zip(holm(chances), tasks, strict=True)]


class Contender(NamedTuple):
    """An agent of the comparison; temperature None: the best of TEMPERATURES, 0: the one
    that it was made with."""
    name: str
    runs: list
    stage: str
    temperature: float


def parse_agent(text, folder):
    """NAME=RUNS:STAGE@TEMPERATURE -> Contender of runs beside `folder`."""
    match = re.fullmatch(r"([^=]+)=([^:]+):(agent|imagine)(?:@(best|\d*\.?\d+))?", text)
    name, pattern, stage, heat = match.groups() if match else ("", "-", "", "1")
    runs = [path for path in sorted(Path(folder).parent.glob(pattern))
            if (path / f"{stage}.pt").exists()]
    temperature = None if heat == "best" else float(heat or 0)
    if not runs or (heat and temperature == 0):
        raise UserError(f"Got --agent {text!r}, need NAME=RUNS:STAGE@TEMPERATURE (above 0, "
                        "or best) of runs with that stage, like BC=seed*:agent@0.5.")
    return Contender(name, runs, stage, temperature)


def play_all(contender, worlds, length, device, dtype="auto"):
    """Episodes of each run of a contender."""
    return [played(run, worlds, AGENTS[contender.stage], length, device, dtype,
                   contender.temperature)._replace(agent=contender.name)
            for run in contender.runs]


def choose_temperature(contender, worlds, length, device, dtype="auto"):
    """-> the contender at the temperature that is best in `worlds`, and rows of all."""
    rows = []
    for t in TEMPERATURES:
        plays = play_all(contender._replace(temperature=t), worlds, length, device, dtype)
        scores = count_achievements(worlds.spec, firsts_of(plays, contender.name))
        rows.append(Result("validation_achievements", float(scores.mean()), None, None,
                           scores.size, "", {"agent": contender.name, "temperature": t}))
    best = max(rows, key=lambda row: row.value)
    return contender._replace(temperature=best.of["temperature"]), rows


def compare_agents(folder, contenders, episodes, length, device, dtype="auto"):
    """Rows of all in the same worlds; random play and the recorded player beside them."""
    env, plays, rows, how = data_config(folder)["env"], [], [], (length, device, dtype)
    with (VecEnv(env, range(TEST_SEED, TEST_SEED + episodes)) as worlds,
          VecEnv(env, range(VALIDATION_SEED, VALIDATION_SEED + TRIALS)) as trial):
        for contender in contenders:
            if contender.temperature is None:
                contender, tried = choose_temperature(contender, trial, *how)
                rows += tried
            plays += play_all(contender, worlds, *how)
        plays.append(played(folder, worlds, "random", *how))
        if hasattr(make_env(env), "player"):
            plays.append(played(folder, worlds, "player", *how))
    spec = worlds.spec
    rows += agent_rows(spec, plays, length)

    # imagination against all others, run by run; a single run against each of the others'
    ours = [contender.name for contender in contenders if contender.stage == "imagine"]
    others = [x for x in dict.fromkeys(play.agent for play in plays) if x not in ours]
    for a in ours:
        for b in others:
            if len({len(firsts_of(plays, name)) for name in (a, b)} - {1}) < 2:
                rows += difference_rows(spec, plays, a, b, length)
                if (a, b) == (ours[0], others[0]):
                    rows += significance(spec, plays, a, b)
    return rows


@torch.no_grad()
def evaluate_heads(run, dataset, dtype="auto", chunk=100):
    """Rows: how often a predicted reward above 1/2 meets an event in that very frame
    (precision), and an event such a prediction (recall); P(continue)."""
    found, tasks, device = [], len(run.spec.tasks), run.device
    n = max(tasks, 1)                           # without tasks one h tells what goes on
    task = torch.arange(n, device=device)[:, None]
    for i in tqdm(dataset.episodes("all"), "heads", leave=False):
        # the episode under each task at once: rewards (T, tasks), P(continue) (T,)
        dream = Dream(run.dynamics, torch.Generator(device).manual_seed(int(i)))
        cache, rewards, alive = run.tokenizer.new_cache(), [], []
        for start in range(0, dataset.lengths[i], chunk):
            T = min(chunk, dataset.lengths[i] - start)
            clip = read_clips(dataset, [i], [start], T, device)
            with autocast(device, dtype):
                z = run.tokenizer.encode(clip.frames, cache).expand(n, -1, -1, -1)
                h = dream.commit(z, clip.actions.expand(n, -1, -1),
                                 clip.labelled.expand(n, -1),
                                 run.agent.prompt(task).expand(-1, T))
                rewards.append(run.agent.rewards(h, task).T.cpu().numpy())
                alive.append(run.agent.continue_prob(h).mean(0).cpu().numpy())

        # its sums by task, and at terminals and elsewhere
        predicted, alive = np.concatenate(rewards)[:, :tasks] > 0.5, np.concatenate(alive)
        true = dataset.episode(i)["events"] > 0
        end = dataset.episode(i)["continues"] == 0
        where = np.stack([end, ~end], 1)
        found.append([x.sum(0) for x in (predicted & true, predicted, true,
                                         where * alive[:, None], where)])
    right, predicted, true, alive, where = (np.stack(x) for x in zip(*found, strict=True))

    shares = [("continue", {"at": place}, alive[:, k], where[:, k])
              for k, place in enumerate(("terminals", "elsewhere"))]
    by_task = [({"task": task}, [k]) for k, task in enumerate(run.spec.tasks)]
    for of, k in [({}, slice(None)), *by_task]:
        tp = right[:, k].sum(1)
        shares.append(("reward_precision", of, tp, predicted[:, k].sum(1)))
        shares.append(("reward_recall", of, tp, true[:, k].sum(1)))
    return [Result(name, *bootstrap(ratio, a, b), int(b.sum()), "share", of)
            for name, of, a, b in shares if b.any()]


@torch.no_grad()
def evaluate_imagination(run, name, dataset, dtype="auto", per_episode=CLIPS):
    """Does what an agent imagines come true? It dreams as in training, on from reference
    clips under the prompts of then; the simulator takes the same actions. Rows: share of
    clips in which the task is done by the reward head in the dream, by the head on the
    simulator's frames, and in the ground truth; of the imagined ones those that are
    true."""
    agent, device = run.agent, run.device
    C, H = agent.cfg.context, agent.cfg.horizon
    clips = reference_clips(dataset, per_episode, C + H, device)
    last = dataset.offsets[clips.episode] + clips.start + C - 1
    task = torch.from_numpy(prompts_along(dataset).task[last])[:, None].to(device)
    prompt = agent.prompt(task).expand(-1, C + H)
    generator = torch.Generator(device).manual_seed(0)
    with autocast(device, dtype):
        z = encode(run, clips._replace(frames=clips.frames[:, :C])).z
        context = Batch(z, clips.actions[:, :C], clips.labelled[:, :C], prompt[:, :C])
        dream = dream_of(run.dynamics, agent, generator)
        imagined = imagine_rollout(dream, agent, context, H)

        # the same actions in the simulator, seen by the same model
        actions = torch.cat([context.actions, imagined.actions], 1)
        frames, events = play_on(dataset, clips, C, actions)
        frames = torch.cat([clips.frames[:, :C], torch.from_numpy(frames).to(device)], 1)
        z = encode(run, clips._replace(frames=frames)).z
        labelled = F.pad(context.labelled, (0, H), value=True)
        seen = Dream(run.dynamics, generator).commit(z, actions, labelled, prompt)[:, C:]
        done = [(agent.rewards(h, task) > 0.5).any(1).cpu().numpy()
                for h in (imagined.h[:, 1:], seen)]
    asked = task.cpu().numpy()[..., None]
    done.append(np.take_along_axis(events > 0, asked, 2).any((1, 2)))

    done = [x.reshape(-1, per_episode).sum(1) for x in (*done, done[0] & done[2])]
    n, right = np.full(len(done[0]), per_episode), done.pop()
    found = [("head in the dream", done[0], n), ("head in the game", done[1], n),
             ("game", done[2], n), ("of the dreamed ones, game", right, done[0])]
    return [Result("imagined_success", *bootstrap(ratio, a, b), int(b.sum()), "share",
                   {"agent": name, "by": by}) for by, a, b in found if b.any()]


def main():
    parser = results.make_parser(__doc__)
    parser.add_argument("--agent", action="append", metavar="NAME=RUNS:STAGE@TEMPERATURE",
                        help="default: BC and imagination of --run")
    parser.add_argument("--episodes", type=int, default=200, help="worlds of each run")
    parser.add_argument("--length", type=int, default=500, help="steps of an episode")
    args = parser.parse_args()
    device, folder = pick_device(args.device), Path(args.run)
    own = [f"{name}={folder.name}:{stage}" for stage, name in AGENTS.items()]
    contenders = [parse_agent(text, folder) for text in args.agent or own]
    rows, dataset = [], reference_of(folder)
    runs = {name: load_run(folder, stage, device, args.dtype)
            for stage, name in AGENTS.items() if (folder / f"{stage}.pt").exists()}
    run = list(runs.values())[-1]
    for name, other in runs.items():
        other.agent.cfg = run.agent.cfg         # dreams of one length, by the same steps
        try:
            rows += evaluate_imagination(other, name, dataset, args.dtype)
        except UserError as error:              # the world can't tell what would have been
            print(f"Left out: imagined successes. {error}")
    rows += evaluate_heads(run, dataset, args.dtype)
    rows += compare_agents(folder, contenders, args.episodes, args.length, device,
                           args.dtype)
    results.save("agents", rows)
    for name, measure in (("figure3_agents", "success"), ("figure4_agents", "time")):
        picture_agents(results.ROOT / "paper" / f"{name}.png", run.spec, rows, measure)


if __name__ == "__main__":
    run_cli(main)
