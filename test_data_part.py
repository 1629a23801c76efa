"""Tests of data.py: environments, the scripted player, recording, the dataset."""
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
from data import ActionSpec, EnvSpec, UserError


class PaintEnv:
    """Bring your own environment: the frame shows the last action, the step and the seed.

    One category of 5, two keys, one number. Seeds divisible by 3 end on step 12, others never.
    """

    def __init__(self):
        self.spec = EnvSpec("paint", 8, 12, ActionSpec(2, (5,), 1), ("four", "both_keys"))

    def reset(self, seed):
        self.seed, self.steps = seed, 0
        return self.paint(self.spec.actions.zeros())

    def paint(self, action):
        frame = np.zeros((8, 12, 3), np.uint8)
        frame[..., 0] = action["categorical"][0]
        frame[:4, :, 1], frame[4:, :, 1] = action["binary"]
        frame[..., 2] = self.steps
        frame[0, 0, 2] = self.seed
        return frame

    def step(self, action):
        self.steps += 1
        events = np.array([action["categorical"][0] == 4, action["binary"].all()])
        return self.paint(action), events, self.seed % 3 == 0 and self.steps >= 12


PAINT = f"{__name__}:PaintEnv"
REPO = Path(data.__file__).parent


def command(*words, **variables):
    """Run data.py as a user does -> (exit code, stdout, stderr)."""
    run = subprocess.run([sys.executable, "data.py", *map(str, words)], cwd=REPO, text=True,
                         capture_output=True, env={**os.environ, **variables})
    return run.returncode, run.stdout, run.stderr


@pytest.fixture(scope="module")
def paint(tmp_path_factory):
    """25 toy episodes; every third has 13 frames, the others 30."""
    return data.record(PAINT, tmp_path_factory.mktemp("paint") / "set", 25, 30, 0, workers=2)


@pytest.fixture(scope="module")
def crafter():
    env = data.Crafter()
    return env, env.reset(3)


def play(env, seed, steps, choose):
    """-> events of all steps, and the last terminal."""
    env.reset(seed)
    log = []
    for _ in range(steps):
        _, events, terminal = env.step(choose())
        log.append(events)
        if terminal:
            break
    return np.array(log), terminal


def test_recorded_action_led_to_its_frame(paint):
    """Fails if actions are stored one row early or late, or row 0 counts as labelled."""
    for i in range(3):
        ep = paint.episode(i)
        assert (ep["frames"][:, 0, 1, 0] == ep["categorical"][:, 0]).all()
        assert (ep["frames"][:, [0, 7], 1, 1] == ep["binary"]).all()
        assert (ep["events"][:, 0] == (ep["categorical"][:, 0] == 4)).all()
        assert (ep["categorical"][1:] != ep["categorical"][:-1]).any()     # control: they vary
        assert ep["labelled"].tolist() == [False] + [True] * (len(ep["labelled"]) - 1)


def test_continues_is_zero_on_terminal_frames_only(paint):
    """Fails if the time limit counts as an end, or an end is missed."""
    for i in range(6):
        ends = i % 3 == 0
        assert paint.lengths[i] == (13 if ends else 30)
        assert paint.episode(i)["continues"].tolist() == [1] * (paint.lengths[i] - 1) + [1 - ends]


@pytest.mark.parametrize("relevant", [False, True])
def test_windows_stay_inside_an_episode(paint, relevant):
    """Fails if a window runs over the end of its episode into the next."""
    episode, start, _ = paint.sample(np.random.default_rng(0), 400, 13, relevant)
    windows = paint.read(episode, start, 13)
    assert windows["frames"].shape == (400, 13, 8, 12, 3)
    assert (windows["frames"][:, :, 0, 0, 2] == episode[:, None]).all()           # one seed
    assert (windows["frames"][:, :, 1, 1, 2] == start[:, None] + np.arange(13)).all()
    assert (start + 13 <= paint.lengths[episode]).all()
    assert (start == 0).any() and (start + 13 == paint.lengths[episode]).any()    # to the edges
    assert (paint.lengths[episode] == 13).any()                                    # exact fit


def test_uniform_windows_are_uniform(paint):
    """Fails if short and long episodes are drawn equally often, or an edge start is missed."""
    episode, start, task = paint.sample(np.random.default_rng(1), 20000, 13)
    windows = np.maximum(paint.lengths - 12, 0) * np.isin(np.arange(25), paint.episodes("train"))
    expected = 20000 * windows / windows.sum()
    assert (np.abs(np.bincount(episode, minlength=25) - expected) <= 5 * np.sqrt(expected)).all()
    assert np.bincount(start[paint.lengths[episode] == 30], minlength=18).min() > 400
    assert abs(task.mean() - 0.5) < 0.02


def test_relevant_windows_hold_their_event(paint):
    """Fails if the event can lie in row 0 (whose action led there from outside) or outside."""
    rng = np.random.default_rng(2)
    episode, start, task = paint.sample(rng, 300, 6, relevant=True)
    events = paint.read(episode, start, 6, ["events"])["events"][np.arange(300), :, task]
    assert events[:, 1:].any(1).all() and set(task) == {0, 1}
    first = events[:, 1:].argmax(1)
    assert set(first[events[:, 1:].sum(1) == 1]) == set(range(5))              # any row but 0
    episode, start, task = paint.sample(rng, 300, 6)                            # control: uniform
    events = paint.read(episode, start, 6, ["events"])["events"][np.arange(300), :, task]
    assert not events[:, 1:].any(1).all()


def test_splits_are_disjoint(paint, tmp_path):
    """Fails if a validation episode is trained on, or a small dataset has no validation."""
    train, valid = paint.episodes("train"), paint.episodes("valid")
    assert valid.tolist() == [19] and sorted([*train, *valid]) == paint.episodes("all").tolist()
    small = data.record(PAINT, tmp_path / "small", 2, 5, 0, workers=1)
    assert (small.episodes("train").tolist(), small.episodes("valid").tolist()) == ([0], [1])
    assert set(paint.sample(np.random.default_rng(0), 200, 5, split="valid")[0]) == {19}
    assert 19 not in paint.sample(np.random.default_rng(0), 2000, 5)[0]


def test_batch_depends_on_seed_stage_and_step_only(paint):
    """Fails if there is hidden random state: resuming would see other batches."""
    def draw(*key):
        return np.array(paint.sample(data.rng_for(*key), 16, 8, relevant=True)).tolist()
    assert draw(0, "bc", 7) == draw(0, "bc", 7)
    assert len({str(draw(*key)) for key in [(0, "bc", 7), (0, "bc", 8), (1, "bc", 7),
                                            (0, "rl", 7)]}) == 4


def test_dataset_offsets_count_frames(paint):
    """Fails if the concatenated order that latents use is off."""
    assert paint.offsets[0] == 0 and (np.diff(paint.offsets) == paint.lengths).all()
    assert paint.frames_total == sum(len(paint.episode(i)["frames"]) for i in range(25))


def test_recording_is_the_same_with_any_number_of_workers(tmp_path):
    """Fails if a player's or a world's randomness depends on the process."""
    one = data.record("crafter", tmp_path / "one", 3, 40, 5, workers=1)
    two = data.record("crafter", tmp_path / "two", 3, 40, 5, workers=2)
    assert one.fingerprint == two.fingerprint
    assert (one.episode(0)["frames"][39] != one.episode(1)["frames"][39]).any()     # control
    assert one.lengths.tolist() == [40, 40, 40] and one.skills == two.skills
    assert one.episode(0)["probe_inventory"].shape == (40, 16)
    assert (one.episode(0)["probe_semantic"][:, 4, 3] == 13).all()              # the player
    assert "collect_diamond" in data.describe(one)


def test_crafter_is_deterministic_across_processes(tmp_path):
    """Fails if creatures are drawn from sets ordered by memory address."""
    script = tmp_path / "walk.py"
    script.write_text(f"""
import hashlib, os, sys, numpy as np
sys.path.insert(0, {str(REPO)!r})
import data
padding = [object() for _ in range(int(sys.argv[1]) * 100_003)]                # other addresses
env, rng, content = data.Crafter(), np.random.default_rng(0), hashlib.sha256()
content.update(env.reset(5))
for _ in range(120):
    content.update(np.ascontiguousarray(env.step(env.spec.actions.sample(rng))[0]))
print(content.hexdigest(), type(next(iter(env.env._world._chunks.values()))).__name__)
""")
    runs = [subprocess.Popen([sys.executable, script, str(i)], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONHASHSEED": str(i)}) for i in (1, 2)]
    one, two = [run.communicate()[0] for run in runs]
    assert one == two and one.split()[1] == "InsertionSet", (one, two)


def test_crafter_events_rise_with_the_achievement_counters(crafter):
    """Fails if an event is given for the first time only, or a step late."""
    env, _ = crafter
    player, log = None, []
    env.reset(3)
    player = env.player(np.random.default_rng(0), "skilled")
    for _ in range(60):
        before = np.array(list(env.env._player.achievements.values()))
        _, events, _ = env.step(player.act())
        rise = np.array(list(env.env._player.achievements.values())) - before
        assert (events == (rise > 0)).all()
        log.append(events)
    wood = np.array(log)[:, env.spec.tasks.index("collect_wood")]
    assert wood.sum() > 1                                                        # each time


def test_crafter_ends_at_death_only(crafter):
    """Fails if a time limit ends episodes, or death does not."""
    env, _ = crafter
    env.reset(3)
    env.env._step = 20_000                                                       # past any limit
    idle = env.spec.actions.zeros()
    assert not env.step(idle)[2]
    env.env._player.health = 0
    assert env.step(idle)[2]


def test_crafter_probe_does_not_change_the_world(crafter):
    """Fails if looking at the truth draws from the world's randomness."""
    env, _ = crafter
    frames = []
    for looks in (0, 1):
        env.reset(3)
        env.env._step = 200                                                      # night: noise
        for _ in range(12):
            frame = env.step(env.spec.actions.zeros())[0]
            if looks:
                assert env.probe()["probe_semantic"].shape == (9, 7)
        frames.append(frame)
    assert (frames[0] == frames[1]).all()


def test_skilled_player_places_a_table(crafter):
    """Fails if the player's plans are broken. Control: random play doesn't."""
    env, _ = crafter
    env.reset(3)
    for skilled in (True, False):
        env.reset(3)
        rng = np.random.default_rng(0)
        player = env.player(rng, "skilled")
        act = player.act if skilled else (lambda: env.spec.actions.sample(rng))
        done = np.any([env.step(act())[1] for _ in range(100)], 0)
        assert done[env.spec.tasks.index("place_table")] == skilled
        assert done[env.spec.tasks.index("collect_wood")] or not skilled


def test_vec_env_equals_single_envs():
    """Fails if workers mix up environments or step a finished one."""
    seeds, rng, single = [0, 1, 2, 3, 4], np.random.default_rng(0), [PaintEnv() for _ in range(5)]
    with data.VecEnv(PAINT, seeds, workers=2) as env:
        frames, ended = env.reset(), np.zeros(5, bool)
        last = [e.reset(s) for e, s in zip(single, seeds, strict=True)]
        assert (frames == last).all()
        for _ in range(20):
            actions = env.spec.actions.sample(rng, 5)
            frames, events, terminal = env.step(actions)
            for i in range(5):
                if ended[i]:
                    assert terminal[i] and not events[i].any() and (frames[i] == last[i]).all()
                else:
                    one = single[i].step({k: v[i] for k, v in actions.items()})
                    assert (frames[i] == one[0]).all() and (events[i] == one[1]).all()
                    last[i], ended[i] = frames[i], one[2]
                    assert terminal[i] == ended[i]
        assert ended.tolist() == [True, False, False, True, False]
        processes = env.processes
    assert not any(process.is_alive() for process in processes)


def test_half_written_episodes_are_recorded_again(tmp_path):
    """Fails if a .tmp or a cut-off file counts as an episode, or whole ones are made anew."""
    made = data.record(PAINT, tmp_path / "a", 4, 20, 1, workers=1)
    folder, about = tmp_path / "a", json.loads((tmp_path / "a/dataset.json").read_text())
    keep = data.episode_path(folder, 0)
    cut, lost = data.episode_path(folder, 1), data.episode_path(folder, 2)
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(UserError, match="episode_00001"):
        data.Dataset(folder)
    lost.rename(lost.with_suffix(".tmp"))
    (folder / "dataset.json").write_text(json.dumps(
        {**about, "complete": False, "command": "python data.py record --seed 1"}))
    with pytest.raises(UserError, match="incomplete.*record --seed 1"):
        data.Dataset(folder)
    before = keep.stat().st_mtime_ns
    again = data.record(PAINT, folder, 4, 20, 1, workers=1)
    assert again.fingerprint == made.fingerprint and keep.stat().st_mtime_ns == before


def test_recording_into_other_settings_is_refused(paint):
    """Fails if two recordings get mixed in one folder. Control: the same settings pass."""
    with pytest.raises(UserError, match="seed = 1.*need.*do:"):
        data.record(PAINT, paint.path, 25, 30, 1, workers=1)
    assert data.record(PAINT, paint.path, 25, 30, 0, workers=1).fingerprint == paint.fingerprint


def test_imported_episodes_are_checked(tmp_path):
    """Fails if an importer's mistake gets into a dataset. Control: the correct one is read."""
    spec = EnvSpec("toy", 4, 4, ActionSpec(continuous=2), ("t",))
    T, actions = 6, spec.actions.sample(np.random.default_rng(0), 6)
    frames, events, ends = np.zeros((T, 4, 4, 3)), np.zeros((T, 1)), np.ones(T)
    data.write_episode(tmp_path, 0, frames, actions, events, ends)
    data.finish_dataset(tmp_path, spec, {"source": "test"})
    read = data.Dataset(tmp_path).read([0], [1], 4)
    assert (read["continuous"][0] == actions["continuous"][1:5]).all()
    assert read["binary"].shape == (1, 4, 0) and read["categorical"].dtype == np.int64
    assert data.Dataset(tmp_path).spec == spec
    far = {**actions, "continuous": actions["continuous"] + 2}
    for wrong in ((frames, far, events, ends), (frames, actions, events + 1, ends),
                  (frames, actions, events, ends - 1), (frames[:, :3], actions, events, ends)):
        data.write_episode(tmp_path, 0, *wrong)
        with pytest.raises(UserError, match="episode_00000"):
            data.finish_dataset(tmp_path, replace(spec), {})
    with pytest.raises(UserError, match="rows"):
        data.write_episode(tmp_path, 0, frames[:3], actions, events, ends)


def test_user_errors_exit_2_with_one_line(tmp_path):
    """Fails if a user's mistake ends in a traceback or in success."""
    for words, need in [(("describe", "--data", tmp_path), "without a dataset.json"),
                        (("record", "--env", "nope", "--out", tmp_path / "x"), "'nope'"),
                        (("record", "--episodes", 0, "--out", tmp_path / "x"), "0 episodes")]:
        code, _, message = command(*words)
        assert code == 2 and need in message and len(message.splitlines()) == 1, message
    code, _, message = command("record", "--flag", "--out", "x")
    assert code == 2 and "--flag" in message and not (tmp_path / "x").exists()


def test_interrupted_recording_goes_on(tmp_path):
    """Fails if Ctrl-C loses whole episodes, leaves half ones, or does not exit with 130."""
    words = ["record", "--env", PAINT, "--episodes", "4000", "--length", "30", "--workers", "1",
             "--out", str(tmp_path / "set")]
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); " \
             f"sys.argv = {['data.py', *words]!r}; import data; data.run_cli(data.main)"
    run = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "set/episode_00005.npy").exists():
        assert run.poll() is None, run.communicate()
    run.send_signal(2)
    message = run.communicate(timeout=20)[1]
    assert run.returncode == 130 and "the same command goes on" in message.splitlines()[-1]
    about = json.loads((tmp_path / "set/dataset.json").read_text())
    kept = sorted((tmp_path / "set").glob("*.npy"))
    assert not about["complete"] and 6 <= len(kept) < 4000
    spec = PaintEnv().spec
    assert all(len(data.open_episode(path, spec)) in (13, 30) for path in kept)
    assert hashlib.sha256(kept[0].read_bytes()).digest()
