"""A trained world model as a gymnasium world: what plays in it can't tell it from a game.

    from envs.dream import DreamEnv
    env = DreamEnv("runs/crafter", "datasets/crafter_reference_40x300", task="collect_wood")

DreamVector holds N dreams in one batch, DreamEnv is one of them. An episode begins behind a
window of recorded play and lasts `length` steps or to a predicted end. The observation is
the decoded frame or ("h") the agent token's output, the reward that of `task`, predicted.
"""
import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from agent import DTYPES, Run, autocast, load_run, pick_device
from data import Dataset, UserError, Windows
from dynamics import Batch, Dream
from tokenizer import Cache


class DreamVector(gymnasium.vector.VectorEnv):
    """N dreams. A row that has ended begins anew at the step after it (NEXT_STEP)."""
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, run, dataset, num_envs=1, task=None, observation="frame", length=100,
                 sampler=(None, None)):
        """run: of load_run, or its folder. sampler: K and step_label; None: as trained."""
        if not isinstance(run, Run):
            run = load_run(run, None, pick_device(), "auto")
        self.run = run
        self.device, dtype = self.run.device, self.run.dynamics.latent_in.weight.dtype
        self.dtype = next(name for name, kind in DTYPES.items() if kind == dtype)
        if self.run.agent is None:
            raise UserError(f"Got {self.run.path} without an agent, need its reward head: "
                            "train --stage agent first.")
        self.data, spec, self.sampler = Dataset(dataset), self.run.spec, sampler
        if self.data.spec.recorded() != spec.recorded():
            raise UserError(f"Got {dataset} of another world than {self.run.path}, need "
                            "recordings of the same.")
        task = task or spec.tasks[0]
        if task not in spec.tasks or observation not in ("frame", "h"):
            raise UserError(f"Got task {task!r}, observation {observation!r}, need one of "
                            f"{spec.tasks} and 'frame' or 'h'.")
        self.num_envs, self.length, self.observation = num_envs, length, observation
        self.draws = observation == "frame"         # decode the frames
        self.task = torch.full((num_envs, 1), spec.tasks.index(task), device=self.device)
        frame = spaces.Box(0, 255, (spec.height, spec.width, 3), np.uint8)
        h = spaces.Box(-np.inf, np.inf, (self.run.dynamics.cfg.dim,), np.float32)
        self.single_observation_space = frame if observation == "frame" else h
        sizes = spec.actions.classes        # an agent has no other actions
        self.single_action_space = (spaces.Discrete(sizes[0]) if len(sizes) == 1 else
                                    spaces.MultiDiscrete(sizes))
        batch = gymnasium.vector.utils.batch_space
        self.observation_space = batch(self.single_observation_space, num_envs)
        self.action_space = batch(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)

    def begin(self, n, t):
        """n dreams behind windows of recorded play that end before frame t: a Dream, the
        decoder's cache, h (n, 1, D), pictures (n, H, W, 3)."""
        C = self.run.dynamics.cfg.context
        episode, start, _ = self.data.sample(self.np_random, n, Windows(C, split="all"))
        rows = self.data.read(episode, start, C, ("frames", "actions", "labelled"))
        frames, actions, labelled = (torch.from_numpy(x).to(self.device)
                                     for x in rows.values())
        view = Cache(self.run.tokenizer.cfg.context, t - C)
        z = self.run.tokenizer.encode(frames)
        pictures = self.run.tokenizer.decode(z, view)[:, -1]
        dream = Dream(self.run.dynamics, self.generator, Cache(C, t - C), *self.sampler)
        task = self.run.agent.prompt(self.task[:n].expand(-1, C))
        h = dream.commit(*Batch(z, actions, labelled, task)[:4])
        return dream, view, h[:, -1:], pictures

    def seen(self):
        """What is observed of all rows, as numpy."""
        x = self.frames if self.observation == "frame" else self.h[:, 0]
        return x.cpu().numpy().copy()

    @torch.no_grad()
    def reset(self, *, seed=None, options=None):
        if seed is not None or self._np_random is None:
            self._np_random, self._np_random_seed = gymnasium.utils.seeding.np_random(seed)
        self.generator.manual_seed(int(self.np_random.integers(2 ** 31)))
        with autocast(self.device, self.dtype):
            begun = self.begin(self.num_envs, self.run.dynamics.cfg.context)
        self.dream, self.view, self.h, self.frames = begun
        self.steps, self.over = np.zeros(self.num_envs, int), np.zeros(self.num_envs, bool)
        return self.seen(), {}

    @torch.no_grad()
    def step(self, actions):
        agent, ended = self.run.agent, np.flatnonzero(self.over)
        rows = np.asarray(actions, np.float32).reshape(self.num_envs, 1, -1)
        rows = torch.from_numpy(rows).to(self.device)
        with autocast(self.device, self.dtype):
            z, self.h = self.dream.step(rows, agent.prompt(self.task))
            rewards = agent.rewards(self.h[:, 0], self.task[:, 0]).float().cpu().numpy()
            ends = (agent.continue_prob(self.h[:, 0]) < 0.5).cpu().numpy()
            if self.draws:
                self.frames = self.run.tokenizer.decode(z, self.view)[:, 0]
            else:
                self.view.advance()
            if len(ended):              # their next episode begins where the others stand
                dream, view, h, pictures = self.begin(len(ended), self.dream.cache.t)
                rows = torch.as_tensor(ended, device=self.device)
                self.frames[rows], self.h[rows] = pictures, h
                self.dream.cache.copy_rows(rows, dream.cache)
                self.view.copy_rows(rows, view)
        self.steps += 1
        rewards[ended], ends[ended], self.steps[ended] = 0, False, 0
        truncated = (self.steps >= self.length) & ~ends
        self.over = ends | truncated
        return self.seen(), rewards.astype(float), ends, truncated, {}


class DreamEnv(gymnasium.Env):
    """One dream; settings as DreamVector's."""
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, run, dataset, render_mode=None, **settings):
        self.rows, self.render_mode = DreamVector(run, dataset, 1, **settings), render_mode
        self.rows.draws |= render_mode is not None
        self.observation_space = self.rows.single_observation_space
        self.action_space = self.rows.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2 ** 31))
        return self.rows.reset(seed=seed)[0][0], {}

    def step(self, action):
        seen, rewards, ends, truncated, _ = self.rows.step([action])
        return seen[0], float(rewards[0]), bool(ends[0]), bool(truncated[0]), {}

    def render(self):
        return self.rows.frames[0].cpu().numpy()
