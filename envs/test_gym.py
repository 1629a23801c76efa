"""Tests of gymnasium worlds, on small ones made here."""
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import train
from data import UserError, make_env, record

SPACES = {
    "Discrete": (spaces.Discrete(3, start=2), (3,), [2], 4),
    "MultiBinary": (spaces.MultiBinary(2), (2, 2), [0, 1], [0, 1]),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4]), (3, 4), [2, 3], [2, 3]),
    "Box": (spaces.Box(np.float32([-2, 0]), np.float32([2, 1])), (11, 11), [5, 10], [0, 1]),
    "Dict": (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0, 1, (1,))}), (2, 11),
             [1, 0], {"a": 1, "b": [0]})}


class Probe(gymnasium.Env):
    """Paints how often it was stepped; the reward is that number over 10."""
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = spaces.Box(-1, 1, (2,))

    def __init__(self, space="Discrete", render_mode=None):
        self.action_space, self.render_mode = SPACES[space][0], render_mode
        self.buffer = np.zeros((20, 30, 3), np.uint8)       # one for all frames

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.got = 0, []
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.got.append(action)
        self.steps += 1
        return np.zeros(2, np.float32), self.steps / 10, self.steps == 9, False, {}

    def render(self):
        self.buffer[:] = 20 * self.steps
        return self.buffer


for space in SPACES:
    gymnasium.register(f"Probe{space}-v0", Probe, kwargs={"space": space},
                       max_episode_steps=3)


@pytest.mark.parametrize("space", SPACES)
def test_spaces_become_columns_and_back(space):
    """Fails if a column goes to another part of an action, or a start or scale is lost."""
    _, classes, row, want = SPACES[space]
    env = make_env(f"gym:Probe{space}-v0")
    assert env.spec.actions.classes == classes and env.spec.tasks == ("return",)
    env.reset(0)
    env.step(np.float32(row))
    got = env.env.env.unwrapped.got[0]
    if isinstance(want, dict):
        assert all(np.allclose(got[name], want[name]) for name in want)
    else:
        assert np.allclose(got, want) and SPACES[space][0].contains(got)


def test_numbers_of_a_box_may_stay_numbers():
    """Fails if -1 and 1 aren't the lowest and the highest value."""
    env = make_env("gym:ProbeBox-v0,bins=0")
    assert env.spec.actions.numbers == 2
    env.reset(0)
    env.step(np.float32([-1, 1]))
    assert np.allclose(env.env.env.unwrapped.got[0], [-2, 1])


def test_frames_rewards_and_repeats(tmp_path):
    """Fails if frames share a buffer, aren't resized, an action isn't repeated, rewards of
    the repeats are lost, or the world's own limit ends an episode."""
    name = "gym:envs.test_gym:ProbeDiscrete-v0,size=10x15,frameskip=2"
    data = record(name, tmp_path / "set", 1, 9, 0, workers=1)
    rows = data.rows(0)
    assert data.spec.returns and rows["frames"].shape == (6, 10, 15, 3)
    assert rows["frames"][:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 180]
    assert np.allclose(rows["events"][:, 0], [0, 0.3, 0.7, 1.1, 1.5, 0.9])
    assert rows["continues"].tolist() == [1, 1, 1, 1, 1, 0] and len(data.events) == 0


@pytest.mark.parametrize("name, said", [
    ("gym:Nowhere-v0", "Nowhere"), ("gym:ProbeBox-v0,size=3", "size=HEIGHTxWIDTH"),
    ("gym:ProbeBox-v0,foo=1", "'foo'"), ("gym:no_such_module:X-v0", "no_such_module")])
def test_what_is_wrong_in_a_name_is_one_line(name, said):
    """Fails if a traceback is all that a user gets."""
    with pytest.raises(UserError, match=said):
        make_env(name)


def test_flags_of_a_gymnasium_world_are_in_its_name():
    """Fails if recordings wouldn't know their size, or another world swallows the flags."""
    args, configs = train.parse(["--data.env", "gym:a:b/C-v0", "--data.size", "8x8"])
    assert configs["data"]["env"] == "gym:a:b/C-v0,size=8x8" and args.run == "C-v0"
    with pytest.raises(UserError, match="frameskip=2 for crafter"):
        train.parse(["--data.frameskip", "2"])
