"""Somebody else's agent in our dream: PPO of stable-baselines3, unmodified.

PPO plays in envs.dream.DreamEnv, sees the agent token's output h, which is told one task,
and gets the reward head's rewards. Then it plays the real game beside BC and imagination,
all told that task throughout: in how many worlds is it done, and when?

    pip install stable-baselines3
    python -m paper.ppo_in_dream --run runs/crafter
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from agent import load_run, pick_device
from data import UserError, VecEnv, run_cli
from envs.dream import DreamEnv
from paper import results
from play import (TEST_SEED, Episodes, Result, agent_rows, data_config, play_episodes,
                  reference_of)


def train_ppo(run, dataset, task, steps, seed):
    """-> the model, and environment steps a second."""
    try:
        from stable_baselines3 import PPO
    except ImportError:
        raise UserError("Got no stable-baselines3, need it for PPO: pip install "
                        "stable-baselines3.") from None
    env = DreamEnv(run, dataset, task=task, observation="h", length=64)
    model, begin = PPO("MlpPolicy", env, n_steps=512, device="cpu", seed=seed), time.time()
    model.learn(steps)
    return model, steps / (time.time() - begin)


def acts_by(model):
    """agent.act for play_episodes, that asks the model."""
    def act(h, generator=None, temperature=1.0):
        actions = model.predict(h.float().cpu().numpy())[0]
        return torch.from_numpy(np.reshape(actions, (len(h), -1))).float().to(h.device)
    return act


def main():
    parser = results.make_parser(__doc__, "imagine")
    parser.add_argument("--task", default="collect_wood")
    parser.add_argument("--steps", type=int, default=20_000, help="in the dream")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--length", type=int, default=200, help="steps of an episode")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = pick_device(args.device)
    run = load_run(args.run, "imagine", device, args.dtype)
    dataset = reference_of(args.run).path
    model, rate = train_ppo(run, dataset, args.task, args.steps, args.seed)

    plays, spec = [], replace(run.spec, achievements=(args.task,), needs=(),
                              prompt_order=((args.task, 0),))
    for name in ("random", "BC", "imagination", "PPO in the dream"):
        player = None
        if name != "random":
            player = load_run(args.run, "agent" if name == "BC" else "imagine", device,
                              args.dtype)
        if name.startswith("PPO"):
            player.agent.act = acts_by(model)
        seeds = range(TEST_SEED, TEST_SEED + args.episodes)
        with VecEnv(data_config(args.run)["env"], seeds) as worlds:
            worlds.spec = spec
            first = play_episodes(worlds, args.length, player, args.dtype)
        plays.append(Episodes(name, Path(args.run).name, first))
    rows = agent_rows(spec, plays, args.length)
    rows.append(Result("ppo_rate", rate, None, None, args.steps, "steps/s"))
    results.save("ppo_in_dream", rows)


if __name__ == "__main__":
    run_cli(main)
