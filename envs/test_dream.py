"""Tests of the dream as a gymnasium world, with a run of random weights."""
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import data
from agent import load_run, save_checkpoint
from data import UserError
from dynamics import Dream
from envs.dream import DreamEnv, DreamVector
from test_all import KEY_ENV, key_run, serial_work


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, and recordings of the same world."""
    folder, run = tmp_path_factory.mktemp("dream"), key_run()
    config = {name: vars(getattr(run, name).cfg) for name in ("tokenizer", "dynamics",
                                                              "agent")}
    weights = {name: getattr(run, name).state_dict() for name in config}
    save_checkpoint(folder / "agent.pt", {"stage": "agent", "spec": run.spec.to_json(),
                                          "config": config, **weights})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "work", serial_work)
        data.record(KEY_ENV, folder / "set", 4, 30, 0)
    return load_run(folder / "agent.pt", dtype="fp32"), folder / "set"


@pytest.mark.parametrize("observation", ["frame", "h"])
def test_the_dream_passes_gymnasiums_own_check(made, observation):
    """Fails if spaces, seeds or types aren't what gymnasium asks for."""
    env = DreamEnv(*made, observation=observation, render_mode="rgb_array")
    check_env(env, skip_render_check=True)
    assert env.render().shape == (8, 12, 3)


def zero_noise(self, B, T):
    return torch.zeros(B, T, self.model.cfg.tokens, self.model.cfg.channels)


def test_a_row_that_begins_anew_is_a_dream_of_its_own(made, monkeypatch):
    """Fails if its next episode sees the one before it, or moves the other rows."""
    monkeypatch.setattr(Dream, "noise", zero_noise)
    env, own, undisturbed = (DreamVector(*made, num_envs=n, observation="h")
                             for n in (2, 1, 2))
    for one in (env, undisturbed):
        one.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = [np.stack([rng.integers(n, size=2) for n in env.run.spec.actions.classes], 1)
               for _ in range(9)]
    for t, action in enumerate(actions):
        if t == 3:              # the first row has ended; its next window is drawn now
            env.over[0] = True
            state = env.np_random.bit_generator.state
        seen, rewards, _, _, _ = env.step(action)
        other = undisturbed.step(action)[0]
        assert np.allclose(seen[1], other[1], atol=1e-5)
        assert np.allclose(seen[0], other[0], atol=1e-5) == (t < 3)
        if t == 3:
            own.reset(seed=1)
            own.np_random.bit_generator.state = state
            own.dream, own.view, own.h, own.frames = own.begin(1, env.dream.cache.t)
            assert rewards[0] == 0 and rewards[1] != 0
            assert np.allclose(seen[0], own.seen()[0], atol=1e-5)
        if t > 3:
            assert np.allclose(seen[0], own.step(action[:1])[0][0], atol=1e-5)


def test_an_episode_has_its_length_and_a_seed_repeats_it(made):
    """Fails if it is cut elsewhere, or the reset counts as a step."""
    env = DreamVector(*made, num_envs=2, length=3)
    first, _ = env.reset(seed=0)
    action = np.zeros((2, len(env.run.spec.actions.classes)), int)
    cut = [env.step(action)[3].tolist() for _ in range(8)]
    assert cut == [[t in (2, 6)] * 2 for t in range(8)]
    again, _ = env.reset(seed=0)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, env.reset(seed=1)[0])


def test_a_task_or_world_of_another_run_is_refused(made):
    """Fails if a wrong name is only noticed while playing."""
    with pytest.raises(UserError, match="task 'fly'"):
        DreamVector(*made, task="fly")


@pytest.mark.slow
def test_an_unmodified_ppo_trains_in_the_dream(made):
    """Fails if stable-baselines3 (where it is installed) finds fault with the world."""
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    env = DreamEnv(*made, observation="h", length=8)
    model = stable_baselines3.PPO("MlpPolicy", env, n_steps=32, batch_size=16, device="cpu")
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(64)
    after = list(model.policy.parameters())
    assert any((x != y).any() for x, y in zip(before, after, strict=True))
    assert env.action_space.contains(model.predict(env.reset(seed=0)[0])[0])
