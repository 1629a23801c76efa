"""Tests of gymnasium worlds, on small ones made here."""
import signal

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import data
import play
import train
from agent import load_run
from data import Dataset, UserError, describe, make_env, record
from test_all import in_this_process, train_here  # noqa: F401

REAL_WORK = data.work           # other tests here work in this process
SPACES = {
    "Discrete": (spaces.Discrete(3, start=2), (3,), [2], 4),
    "MultiBinary": (spaces.MultiBinary(2), (2, 2), [0, 1], [0, 1]),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4], start=[1, 0]), (3, 4), [2, 3], [3, 3]),
    "Integers": (spaces.Box(0, 4, (1,), np.int64), (11,), [4], [2]),
    "Box": (spaces.Box(np.float32([-2, 0]), np.float32([2, 1])), (11, 11), [5, 10], [0, 1]),
    "Dict": (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0, 1, (1,))}), (2, 11),
             [1, 0], {"a": 1, "b": [0]})}


class Probe(gymnasium.Env):
    """Paints how often it was stepped; the reward is that number over 10."""
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = spaces.Box(-1, 1, (2,))

    def __init__(self, space="Discrete", render_mode=None, limited=False, rare=False,
                 goal=None):
        self.limited, self.rare, self.goal = limited, rare, goal
        self.action_space, self.render_mode = SPACES[space][0], render_mode
        self.buffer = np.zeros((20, 30, 3), np.uint8)       # one for all frames

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.got = 0, []
        return np.zeros(2, np.float32), self.info()

    def info(self):
        return {"is_success": self.steps == self.goal} if self.goal else {}

    def step(self, action):
        self.got.append(action)
        self.steps += 1
        cut = self.steps == 7 and self.limited      # its own limit of steps
        reward = float(self.steps == 9) if self.rare else self.steps / 10
        return np.zeros(2, np.float32), reward, self.steps == 9, cut, self.info()

    def render(self):
        self.buffer[:] = 20 * self.steps
        return self.buffer


class Tasked(Probe):
    """Probe with tasks: three in step 2; its picture is the observation."""
    observation_space = spaces.Box(0, 255, (20, 30, 3), np.uint8)
    tasks, prompt_order, needs = ("two", "never"), (("two", 1),), (("never", 1, 2, 3),)
    keys, wrong, times = {"x": "left"}, False, 3

    def reset(self, seed=None, options=None):
        return super().reset(seed)[1] or self.render(), {}

    def step(self, action):
        events = {"two": self.times} if super().step(action)[1] == 0.2 else {}
        events |= {"tow": 1} if self.wrong and self.steps == 3 else {}
        return self.render(), 5.0, False, False, {"events": events}


def test_a_world_of_ones_own_may_be_a_gymnasium_one_with_tasks(monkeypatch):
    """Fails if events, names, keys or needs get lost, the reward is taken for one, a world
    is reset to see its size, or a misspelt event is dropped in silence."""
    env = make_env(f"{__name__}:Tasked")
    assert not hasattr(env.env.env, "steps")
    assert (env.spec.height, env.spec.width, env.keys) == (20, 30, {"x": "left"})
    assert env.spec.tasks == ("two", "never") and not env.spec.returns
    assert (env.spec.prompt_order, env.spec.needs) == (Tasked.prompt_order, Tasked.needs)
    frames = [env.reset(0)]
    for events in ([0, 0], [3, 0], [0, 0]):
        frame, got, _ = env.step(np.float32([1]))
        assert got.tolist() == events and got.dtype == np.uint8
        frames.append(frame)
    assert [frame.max() for frame in frames] == [0, 20, 40, 60]     # not one buffer
    monkeypatch.setattr(Tasked, "times", 300)
    env.reset(0)
    assert [env.step(np.float32([1]))[1][0] for _ in range(2)] == [0, 255]
    monkeypatch.setattr(Tasked, "wrong", True)
    env.reset(0)
    with pytest.raises(UserError, match="tow"):
        for _ in range(3):
            env.step(np.float32([1]))


def test_tasks_are_found_behind_gymnasiums_wrappers():
    """Fails if a registered world's tasks, needs or keys get lost, or its reward is the
    task."""
    env = make_env("gym:ProbeTasked-v0")
    assert (env.spec.tasks, env.spec.needs, env.keys) == (
        Tasked.tasks, Tasked.needs, Tasked.keys)
    env.reset(0)
    assert [env.step(np.float32([1]))[1].tolist() for _ in range(2)] == [[0, 0], [3, 0]]


gymnasium.register("ProbeTasked-v0", Tasked)
gymnasium.register("ProbeLimited-v0", Probe, kwargs={"limited": True})
gymnasium.register("ProbeRare-v0", Probe, kwargs={"rare": True})
gymnasium.register("ProbeGoal-v0", Probe, kwargs={"goal": 5})
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


def test_cut_off_is_no_end(tmp_path):
    """Fails if a world's limit of steps teaches an end that no frame shows."""
    data = record("gym:envs.test_gym:ProbeLimited-v0", tmp_path / "set", 1, 20, 0, 1)
    assert data.lengths.tolist() == [8] and data.rows(0)["continues"].all()


def test_rare_rewards_are_events_that_windows_are_drawn_for(tmp_path):
    """Fails if a reward at the end alone is hardly ever shown."""
    data = record("gym:envs.test_gym:ProbeRare-v0", tmp_path / "set", 2, 20, 0, 1)
    assert data.events.tolist() == [[0, 9, 0], [1, 9, 0]]
    assert "| mean return | 1 | 1 |" in describe(data).splitlines()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs/gym: all four stages on rewards, evaluation and report."""
    folder = tmp_path_factory.mktemp("gym")
    train_here(folder, "--data.env", "gym:envs.test_gym:ProbeGoal-v0,size=8x12",
               "--run", "gym", "--data.length", 20, "--train.long_length", 9)
    return folder


def test_all_stages_learn_from_rewards(trained):
    """Fails if a stage wants events, agents are scored by something else, or what the
    world calls success gets lost, or counts as a reward."""
    rows = play.read_results(trained / "runs/gym")
    for name, value in ("success", 1), ("time", 5):
        for agent in ("BC", "imagination"):
            row = play.find(rows, name, {"agent": agent, "task": "success"})
            assert row.value == value, name
    assert "success" in play.headlines(trained / "runs/gym")
    data = min((trained / "datasets").iterdir())
    text = describe(Dataset(data))
    assert "| mean return | 4.5 |" in text and "| success | 100 % |" in text
    for agent in ("random", "BC", "imagination"):
        row = play.find(rows, "return", {"agent": agent})
        assert abs(row.value - 3.6) < 1e-5 and row.unit == "return"     # 0.1 to 0.8
    assert play.find(rows, "return_gain", {"agent": "imagination", "than": "BC"}).value == 0
    assert not any("achievements" in row.name for row in rows)
    assert "return" in (trained / "runs/gym/report.md").read_text()


def test_the_game_saves_rewards(trained, monkeypatch):
    """Fails if the first row, without a reward, makes an episode of events."""
    monkeypatch.chdir(trained)
    run = load_run("runs/gym")
    session = play.Session(run, make_env("gym:ProbeGoal-v0,size=8x12"), "runs/gym")
    for start in ("fresh", "held_out"):
        session.handle({"op": "reset", "start": start})
        session.handle({"op": "save"})
        assert not session.over
    session.handle({"op": "step"})
    session.handle({"op": "save"})
    rows = Dataset("runs/gym/sessions/real").rows(2)
    assert rows["events"].dtype == np.float32 and rows["events"][-1, 0] > 0.3


def take_no_signal(number):
    """As pygame's windows do."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return number + 1


def test_workers_that_take_no_signal_end():
    """Fails if recording a pygame world never ends."""
    assert list(REAL_WORK(take_no_signal, [(1,)], 1)) == [((1,), 2)]


def test_no_key_is_no_force():
    """Fails if the game, where no key is pressed, sends the lowest number of a Box."""
    assert make_env("gym:ProbeBox-v0").spec.idle == (5, 0)
    assert make_env("gym:ProbeDict-v0").spec.idle == (0, 0)


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
