"""Tests in the paper's order: CPU, offline, seeded. `pytest -m "not slow"` takes minutes.

A docstring says what the test fails on; each negative claim has a positive control beside it.
"""
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import play
import train
from agent import (STAGES, Agent, AgentConfig, Run, action_kl, action_log_prob, agent_losses,
                   behavior_loss, imagination_losses, imagine_rollout, lambda_returns, load_run,
                   pmpo_loss, sample_action, symexp_bins, targets_ahead, two_hot,
                   two_hot_log_prob, two_hot_mean, value_loss)
from data import ActionSpec, EnvSpec, UserError, run_cli
from dynamics import (ActionEmbedding, Dream, Dynamics, DynamicsConfig, corrupt, dynamics_losses,
                      euler_sample, ramp_weight, sample_tau_d, shortcut_loss, x_prediction)
from tokenizer import (PIXEL_MEAN, PIXEL_STD, Attention, Cache, LossNormalizer, Tokenizer,
                       TokenizerConfig, Transformer, mae_mask, patchify, reader_mask,
                       reconstruction_loss, rope, rope_angles, scale_pixels, unpatchify)


# ------------------------------------------------------------------------------------- data.py

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
        frame[0, 0, 2] = self.seed % 256
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


def step_through(env, seed, steps, choose):
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


# -------------------------------------------------------- tokenizer.py: efficient transformer

def randomize(module, seed=0, std=0.3):
    """Random weights everywhere: a zero output makes every perturbation test pass by silence."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()


def tiny_tokenizer(**changes):
    sizes = dict(height=8, width=12, patch=4, dim=16, encoder_layers=3, decoder_layers=3, heads=4,
                 kv_heads=2, latents=4, channels=3, pack=2, context=3, time_every=3)
    return randomize(Tokenizer(TokenizerConfig(**sizes | changes)))


def tiny_dynamics(spec=ActionSpec(categorical=(5,)), **changes):
    sizes = dict(tokens=2, channels=6, tasks=3, dim=16, layers=3, heads=4, kv_heads=2, registers=1,
                 context=4, time_every=3, k_max=8)
    return randomize(Dynamics(DynamicsConfig(**sizes | changes), spec))


def play_inputs(B=2, T=6, spec=ActionSpec(categorical=(5,)), seed=0):
    """Latents (B, T, 2, 6), actions and labelled, random."""
    generator = torch.Generator().manual_seed(seed)
    actions = {k: torch.from_numpy(x)
               for k, x in spec.sample(np.random.default_rng(seed), B, T).items()}
    return (torch.randn(B, T, 2, 6, generator=generator), actions,
            torch.ones(B, T, dtype=torch.bool))


def levels(B, T, tau=0.5, d=0.125):
    return torch.full((B, T), tau), torch.full((B, T), d)


def test_attention_equals_naive_loop():
    """Fails if heads are reshaped without transpose, GQA groups are wrong, or QK-norm, RoPE, the
    soft cap or the mask differ from a float64 loop."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, soft_cap=2.0)
    layer = randomize(Attention(cfg, "space"), std=0.6).double()
    S, E = 5, 4
    x = torch.randn(1, 1, S, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = reader_mask(3, 2)
    angles = [a.double() for a in rope_angles(torch.arange(S), E)]
    got = layer(x, angles, mask)[0, 0]

    def normed(vector, gain):
        return vector / (vector.square().mean() + torch.finfo(torch.float32).eps).sqrt() * gain

    def rotated(vector, position):
        out = vector.clone()
        for i in range(E // 2):
            angle = position * 1000.0 ** (-i / (E // 2))
            a, b = vector[i], vector[i + E // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + E // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    want = torch.zeros(S, 16, dtype=torch.float64)
    for head in range(4):
        rows, kv = slice(head * E, head * E + E), head // 2
        kv_rows = slice(kv * E, kv * E + E)
        for i in range(S):
            q = rotated(normed(layer.q.weight[rows] @ x[0, 0, i], layer.q_norm.weight), i)
            scores = torch.full((S,), -math.inf, dtype=torch.float64)
            for j in range(S):
                if i >= 3 or j < 3:
                    k = rotated(normed(layer.k.weight[kv_rows] @ x[0, 0, j],
                                       layer.k_norm.weight), j)
                    scores[j] = 2.0 * torch.tanh(q @ k / math.sqrt(E) / 2.0)
            weights = scores.softmax(0)
            want[i, rows] = sum(weights[j] * (layer.v.weight[kv_rows] @ x[0, 0, j])
                                for j in range(S))
    assert torch.allclose(got, want @ layer.out.weight.T, atol=1e-5)


def test_rope_depends_on_distance_alone():
    """Fails if absolute position leaks: then a dream past the training length breaks."""
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    dot = lambda i, j: float((rope(q, *rope_angles(torch.tensor([i]), 8))
                              * rope(k, *rope_angles(torch.tensor([j]), 8))).sum())
    assert abs(dot(3, 1) - dot(103, 101)) < 1e-4
    assert abs(dot(3, 1) - dot(3, 2)) > 1e-3            # control: distance matters


@pytest.mark.parametrize("dense", [False, True])
def test_transformer_is_causal_and_windowed(dense):
    """Fails if frame t sees frame t + 1, or more than `context` frames (mask off by one)."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, context=3, time_every=3, dense=dense)
    model = randomize(Transformer(cfg, 3))
    x = torch.randn(1, 7, 4, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 2] += 1
    difference = (model(x, reader_mask(4, 0)) - model(changed, reader_mask(4, 0))).abs()
    by_frame = difference.amax((0, 2, 3))
    assert by_frame[:2].max() == 0 and by_frame[5:].max() == 0      # one time layer: 3 frames
    assert by_frame[2:5].min() > 1e-3                               # control


@pytest.mark.parametrize("dense", [False, True])
def test_cache_equals_full_forward(dense):
    """Fails if RoPE offset, window or ring slots are wrong: frame by frame, in chunks, and past
    the window must equal one forward over everything."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, context=3, time_every=2, dense=dense)
    model, mask = randomize(Transformer(cfg, 4)), reader_mask(3, 1)
    x = torch.randn(2, 11, 4, 16, generator=torch.Generator().manual_seed(0))
    full = model(x, mask)
    for sizes in ([1] * 11, [4, 1, 1, 5], [2, 2, 1, 1, 1, 4], [11]):
        cache, out = Cache(3), []
        for part in x.split(sizes, 1):
            out.append(model(part, mask, cache))
            cache.advance(part.shape[1])
        assert torch.allclose(torch.cat(out, 1), full, atol=1e-5), sizes


def test_single_images_see_only_themselves_in_time():
    """Fails if rows flagged as single images attend to other frames."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, context=4, time_every=2)
    model, mask = randomize(Transformer(cfg, 2)), reader_mask(3, 0)
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    out = model(x, mask, single=torch.tensor([True, False]))
    alone = model(x.flatten(0, 1)[:, None], mask).view_as(x)
    assert torch.allclose(out[0], alone[0], atol=1e-5)
    assert (out[1, 1:] - alone[1, 1:]).abs().max() > 1e-3           # control


def test_loss_normalizer_is_a_running_rms():
    """Fails if the loss is divided by itself (a constant 1), or terms share one estimate."""
    norm = LossNormalizer(["a", "b"], decay=0.5)
    assert abs(float(norm({"a": torch.tensor(4.0), "b": torch.tensor(0.1)})) - 2) < 1e-5
    # second call: RMS of a = sqrt((0.25 * 16 + 0.5 * 4) / 0.75) = sqrt(8)
    x = torch.tensor(2.0, requires_grad=True)
    total = norm({"a": x}, {"a": 3.0})
    total.backward()
    assert abs(float(total) - 3 * 2 / math.sqrt(8)) < 1e-5
    assert abs(float(x.grad) - 3 / math.sqrt(8)) < 1e-5             # the RMS is detached


# ------------------------------------------------------------- tokenizer.py: causal tokenizer

def test_patchify_round_trip():
    """Fails if height and width are swapped, or padding is not cropped."""
    for H, W in ((8, 12), (10, 13)):
        x = torch.randn(2, 3, H, W, 3)
        patches = patchify(x, 4)
        assert patches.shape == (2, 3, -(-H // 4) * -(-W // 4), 48)
        assert torch.equal(unpatchify(patches, 4, H, W), x)
    x = torch.arange(8 * 12 * 3.0).view(1, 1, 8, 12, 3)
    assert torch.equal(patchify(x, 4)[0, 0, 1].view(4, 4, 3), x[0, 0, :4, 4:8])


def test_mae_mask_drops_its_share_per_image():
    """Fails if the polarity is flipped, or one p serves the whole batch."""
    generator = torch.Generator().manual_seed(0)
    mask = mae_mask(64, 8, 4000, 0.9, generator, "cpu")
    share = mask.float().mean(2)
    p = 0.9 * torch.rand(64, 8, 1, generator=torch.Generator().manual_seed(0))[..., 0]
    assert (share - p).abs().max() < 4 * 0.5 / math.sqrt(4000)
    assert share.std() > 0.2 and abs(float(share.mean()) - 0.45) < 0.05
    assert not mae_mask(4, 2, 9, 0.0, generator, "cpu").any()


def test_mae_mask_hides_patches_and_evaluation_never_masks():
    """Fails if a hidden patch still reaches the latents, or encode drops patches."""
    model = tiny_tokenizer()
    frames = torch.randint(256, (1, 2, 8, 12, 3), dtype=torch.uint8)
    x, other = scale_pixels(frames), scale_pixels(frames)
    other[:, :, :4, :4] += 1                                        # patch 0
    hidden = torch.zeros(1, 2, 6, dtype=torch.bool)
    assert (model.bottleneck(x, hidden) - model.bottleneck(other, hidden)).abs().max() > 1e-4
    hidden[..., 0] = True
    assert torch.equal(model.bottleneck(x, hidden), model.bottleneck(other, hidden))
    assert torch.equal(model.encode(frames), model.encode(frames))
    assert torch.equal(model.bottleneck(x).view(1, 2, 2, 6), model.encode(frames))


def test_tokenizer_masks_are_one_way():
    """Fails if encoder patches see latents, decoder latents see patch queries, or a later frame
    changes an earlier latent."""
    model = tiny_tokenizer()
    P, N = model.patches, model.cfg.latents
    for mask, others in ((model.encoder_mask(), P), (model.decoder_mask(), N)):
        assert not mask[:others, others:].any() and mask[:others, :others].all()
        assert mask[others:].all()
    x = torch.randn(1, 4, P + N, 16, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[:, :, P:] += 1
    change = (model.encoder(x, model.encoder_mask()) - model.encoder(moved, model.encoder_mask()))
    assert change[:, :, :P].abs().max() == 0 and change[:, :, P:].abs().max() > 1e-3
    frames = torch.randn(1, 4, 8, 12, 3)
    later = frames.clone()
    later[:, 3] += 1
    change = (model.bottleneck(frames) - model.bottleneck(later)).abs().amax((0, 2, 3))
    assert change[:3].max() == 0 and change[3] > 1e-3


def test_bottleneck_is_bounded_and_informative():
    """Fails if tanh is dropped, or the latents ignore the image."""
    model = tiny_tokenizer()
    model.latent_out.weight.data.mul_(20)
    z = model.bottleneck(10 * torch.randn(3, 2, 8, 12, 3))
    assert z.abs().max() <= 1 and z.abs().max() > 0.9
    assert (z[0] - z[1]).abs().max() > 1e-3


def test_tokenizer_streams_frame_by_frame():
    """Fails if streaming encode or decode differs from the whole clip, or packing from its
    inverse, or the stored latent scale is not undone."""
    model = tiny_tokenizer()
    model.latent_std.fill_(0.5)
    frames = torch.randint(256, (2, 7, 8, 12, 3), dtype=torch.uint8)
    z = model.encode(frames)
    assert z.shape == (2, 7, 2, 6)
    cache, back = model.new_cache(), model.new_cache()
    parts = [model.encode(frames[:, t:t + 1], cache) for t in range(7)]
    assert torch.allclose(torch.cat(parts, 1), z, atol=1e-5)
    whole = model.decode(z).int()
    parts = torch.cat([model.decode(z[:, t:t + 1], back) for t in range(7)], 1).int()
    assert (parts - whole).abs().max() <= 1
    x = model.reconstruct(model.bottleneck(scale_pixels(frames)))
    want = (255 * (x * PIXEL_STD + PIXEL_MEAN)).round().clamp(0, 255)
    assert (whole - want).abs().max() <= 1


def test_eq5_reconstruction_loss():
    """Fails if Eq. 5's terms are mixed up, or LPIPS sees other than [-1, 1]."""
    x = scale_pixels(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2, 1)
                     .expand(1, 1, 4, 2, 3))
    seen = []
    losses = reconstruction_loss(x + 2, x, lambda a, b: seen.append((a, b)) or (a - b).abs())
    assert abs(float(losses["mse"]) - 4) < 1e-5
    assert seen[0][1].shape == (1, 3, 4, 2)
    assert abs(float(seen[0][1].min()) + 1) < 1e-5 and abs(float(seen[0][1].max()) - 1) < 1e-5
    assert list(reconstruction_loss(x, x)) == ["mse"]


# ---------------------------------------------------------------------- dynamics.py: equations

def test_eq4_tau_and_d_lie_on_the_grid():
    """Fails if a level is never drawn, tau is off d's grid or reaches 1, or frames of a row
    share one draw."""
    tau, d = sample_tau_d(400, 50, 16, 400, torch.Generator().manual_seed(0))
    assert set(d.unique().tolist()) == {1 / 2 ** i for i in range(5)}
    assert torch.equal(tau / d, (tau / d).round()) and (tau >= 0).all() and (tau + d <= 1).all()
    n = d.numel()
    for i in range(5):
        k = 2 ** i
        share = (d == 1 / k).float().mean()
        assert abs(share - 0.2) < 4 * math.sqrt(0.16 / n)           # uniform over log2 d
        counts = torch.bincount((tau[d == 1 / k] * k).long(), minlength=k) / (d == 1 / k).sum()
        assert counts.numel() == k and (counts - 1 / k).abs().max() < 4 / math.sqrt(n / 5 * k)
    assert (d[:, 1:] != d[:, :-1]).float().mean() > 0.7             # drawn for each frame
    _, d = sample_tau_d(8, 5, 16, 3, torch.Generator().manual_seed(0))
    assert (d[3:] == 1 / 16).all() and (d[:3] > 1 / 16).any()


def test_eq6_corrupt_broadcasts_over_frames():
    """Fails if tau (B, T) is applied to the wrong axes."""
    B, T = 3, 5
    z0, z1, tau = torch.randn(B, T, 2, 4), torch.randn(B, T, 2, 4), torch.rand(B, T)
    got = corrupt(z0, z1, tau)
    for b in range(B):
        for t in range(T):
            assert torch.allclose(got[b, t], (1 - tau[b, t]) * z0[b, t] + tau[b, t] * z1[b, t])
    assert torch.equal(corrupt(z0, z1, torch.ones(B, T)), z1)       # tau = 1 is data


def test_eq6_velocity_output_is_turned_into_latents():
    """Fails if the v-prediction ablation scales by tau in place of 1 - tau."""
    z0, z1, tau = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4), torch.rand(2, 3)
    assert torch.allclose(x_prediction(z1 - z0, corrupt(z0, z1, tau), tau, "v"), z1, atol=1e-5)
    assert torch.equal(x_prediction(z1, z0, tau, "x"), z1)


@pytest.mark.parametrize("space", ["x", "v"])
def test_eq7_perfect_predictor_has_no_loss(space):
    """Fails if a division by 1 - tau is missing: a predictor of z1 makes every bootstrap target
    z1 at every (tau, d)."""
    tau, d = sample_tau_d(20, 6, 16, 20, torch.Generator().manual_seed(0))
    z0, z1 = torch.randn(20, 6, 2, 3), torch.randn(20, 6, 2, 3)
    z_tilde = corrupt(z0, z1, tau)
    f = lambda z, tau, d: z1
    assert shortcut_loss(f, z1, z_tilde, z1, tau, d, 1 / 16, space).max() < 1e-6
    assert shortcut_loss(f, z1 + 1, z_tilde, z1, tau, d, 1 / 16, space).min() > 0.9     # control


def test_eq7_toy_by_hand():
    """Fails if a half step, or tau + d/2, is wrong. f(z) = z/2, z_tilde = 1, tau = 0, d = 1/2:
    b1 = -1/2, z' = 7/8, b2 = -7/12, mean -13/24; a prediction of 0 costs (11/24)^2."""
    one = torch.ones(1, 1, 1, 1)
    tau, d = torch.zeros(1, 1), torch.full((1, 1), 0.5)
    f = lambda z, tau, d: z / 2
    loss = shortcut_loss(f, 0 * one, one, 5 * one, tau, d, 1 / 4)
    assert abs(float(loss) - (11 / 24) ** 2) < 1e-6
    # tau = 1/2, same f: b1 = -1, z' = 3/4, b2 = -3/2, mean -5/4, target 1 - 5/8 = 3/8
    loss = shortcut_loss(f, 0 * one, one, 5 * one, tau + 0.5, d, 1 / 4)
    assert abs(float(loss) - (3 / 8) ** 2) < 1e-6
    loss = shortcut_loss(f, 0 * one, one, 5 * one, tau + 0.5, d, 1 / 4, "v")
    assert abs(float(loss) - (3 / 4) ** 2) < 1e-6
    assert abs(float(shortcut_loss(f, 0 * one, one, 5 * one, tau, d, 1 / 2)) - 25) < 1e-5   # d_min


def test_eq7_calls_the_network_at_half_steps_without_gradient():
    """Fails if the stop-gradient is lost, or the labels are not (tau, d/2), (tau + d/2, d/2), or
    frames at d_min move."""
    calls, weight = [], torch.tensor(0.7, requires_grad=True)

    def f(z, tau, d):
        calls.append((z.clone(), tau.clone(), d.clone()))
        return z * weight

    tau, d = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.5, 0.125]])
    z = torch.randn(1, 2, 2, 3)
    shortcut_loss(f, z * weight, z, z + 1, tau, d, 0.125).sum().backward()
    (z1, tau1, d1), (z2, tau2, d2) = calls
    assert torch.equal(tau1, tau) and torch.equal(tau2, torch.tensor([[0.75, 0.25]]))
    assert torch.equal(d1, d2) and torch.equal(d1, torch.tensor([[0.25, 0.125]]))
    assert torch.equal(z1, z2) is False and torch.equal(z1[:, 1], z2[:, 1])
    by_hand = weight.detach().clone().requires_grad_(True)
    with torch.no_grad():
        target = z + 0.5 * ((z1 * 0.7 - z1) / 0.5 + (z2 * 0.7 - z2) / 0.25) / 2
    error = torch.cat([(z * by_hand - target)[:, :1], (z * by_hand - (z + 1))[:, 1:]], 1)
    error.square().mean((2, 3)).sum().backward()
    assert torch.allclose(weight.grad, by_hand.grad, atol=1e-5)


def test_eq8_ramp_weight():
    """Fails if the ramp is flipped."""
    assert torch.allclose(ramp_weight(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.1, 0.55, 1]))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_eq2_sampler_with_an_oracle_ends_at_the_data(k):
    """Fails if the last step is skipped, or a step is labelled with the level it goes to."""
    z1, labels = torch.randn(2, 1, 2, 3), []

    def f(z, tau, d):
        labels.append((float(tau[0, 0]), float(d[0, 0])))
        return z1

    assert torch.allclose(euler_sample(f, torch.randn(2, 1, 2, 3), k), z1, atol=1e-6)
    assert labels == [(i / k, 1 / k) for i in range(k)]
    labels.clear()
    euler_sample(f, torch.randn(2, 1, 2, 3), k, d_label=1 / 8)
    assert {d for _, d in labels} == {1 / 8}


def test_eq2_sampler_follows_a_straight_line():
    """Fails if the velocity is not (x - z) / (1 - tau): after one of two steps of an oracle the
    point lies half way."""
    z0, z1, seen = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4), []
    euler_sample(lambda z, tau, d: seen.append(z) or z1, z0, 2)
    assert torch.allclose(seen[1], (z0 + z1) / 2, atol=1e-6)


# ------------------------------------------------------------------------ dynamics.py: network

def test_dynamics_is_causal_in_time():
    """Fails if frame t sees frame t + 1."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 4)
    changed = z.clone()
    changed[:, 2:] += 1
    past, future = (model(z, *levels(1, 4), actions, labelled)[0]
                    - model(changed, *levels(1, 4), actions, labelled)[0]
                    ).abs().amax((0, 2, 3)).split(2)
    assert past.max() == 0 and future.min() > 1e-3


def test_actions_change_their_own_frame_and_later_ones():
    """Fails if actions[:, t] reaches frame t - 1, or not frame t."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 5)
    other = {k: x.clone() for k, x in actions.items()}
    other["categorical"][:, 2] = (other["categorical"][:, 2] + 1) % 5
    change = (model(z, *levels(1, 5), actions, labelled)[0]
              - model(z, *levels(1, 5), other, labelled)[0]).abs().amax((0, 2, 3))
    assert change[:2].max() == 0 and change[2:].min() > 1e-4


def test_unlabelled_frames_have_the_base_embedding_alone():
    """Fails if an unlabelled or single-image frame still sees its action, or parts of an action
    are not summed."""
    spec = ActionSpec(binary=2, categorical=(3, 4), continuous=2)
    embed = randomize(ActionEmbedding(spec, 2, 8))
    actions = {k: torch.from_numpy(x)
               for k, x in spec.sample(np.random.default_rng(0), 3, 4).items()}
    labelled = torch.tensor([[True, False, True, False]] * 3)
    out = embed(actions, labelled)
    assert torch.equal(out[:, 1], embed.base.expand(3, 2, 8))
    key = actions["binary"][0, 0].long()
    a, b = actions["categorical"][0, 0]
    want = (embed.binary.weight[key[0]] + embed.binary.weight[2 + key[1]]
            + embed.categorical.weight[a] + embed.categorical.weight[3 + b]
            + embed.continuous.weight @ actions["continuous"][0, 0])
    assert torch.allclose(out[0, 0], embed.base + want.view(2, 8), atol=1e-5)
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 3)
    single = torch.tensor([True])
    assert torch.equal(model(z, *levels(1, 3), actions, labelled, single=single)[0],
                       model(z, *levels(1, 3), actions, ~labelled, single=single)[0])


def test_tau_and_d_labels_reach_the_prediction_one_by_one():
    """Fails if two levels share an embedding row."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 1)
    outs = [model(z, *levels(1, 1, tau, d), actions, labelled)[0]
            for d in (1.0, 0.5, 0.25, 0.125) for tau in np.arange(0, 1, d)]
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert (a - b).abs().max() > 1e-4


def test_agent_token_is_unseen_and_sees_all():
    """Fails if the world model sees the task (causal confusion), or the agent is inert."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 4)
    tau, d = levels(1, 4)
    task = torch.zeros(1, 4, dtype=torch.long)
    z_a, h_a = model(z, tau, d, actions, labelled, task)
    z_b, h_b = model(z, tau, d, actions, labelled, task + 1)
    z_none, h_none = model(z, tau, d, actions, labelled)
    assert torch.equal(z_a, z_b) and torch.allclose(z_a, z_none, atol=1e-6) and h_none is None
    assert (h_a - h_b).abs().amax((0, 2)).min() > 1e-3
    changed = z.clone()
    changed[:, 1] += 1
    change = (model(changed, tau, d, actions, labelled, task)[1] - h_a).abs().amax((0, 2))
    assert change[0] == 0 and change[1:].min() > 1e-3


def test_context_label_equals_the_noise_added():
    """Fails if a clean label is put on noisy context, or the pair (tau, d) is one that training
    never draws."""
    model, seen = tiny_dynamics(k_max=16), []
    model.register_forward_hook(lambda m, args, out: seen.append(args))
    z, actions, labelled = play_inputs(1, 3)
    z = z * 0 + 7.0
    dream = Dream(model, torch.Generator().manual_seed(0))
    dream.commit(z, actions, labelled)
    z_tilde, tau, d = seen[0][:3]
    noise = torch.randn(1, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z_tilde, corrupt(noise, z, tau))
    assert (tau == 14 / 16).all() and (d == 1 / 16).all()           # 0.9 snapped to the grid
    drawn_tau, drawn_d = sample_tau_d(500, 8, 16, 0, torch.Generator().manual_seed(0))
    assert ((drawn_tau == 14 / 16) & (drawn_d == 1 / 16)).any()


def test_dream_keeps_one_frame_per_commit():
    """Fails if denoising passes stay in the cache: K passes and a commit must equal a full
    forward over the committed frames, past the window."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(2, 9)
    task = torch.ones(2, 9, dtype=torch.long)
    dream = Dream(model, torch.Generator().manual_seed(0))
    pieces, hs = [], []

    def capture(module, args, out):
        pieces.append(args[0])

    part = lambda t: ({k: x[:, t:t + 1] for k, x in actions.items()}, labelled[:, t:t + 1],
                      task[:, t:t + 1])
    for t in range(9):
        imagined = dream.imagine(*part(t))
        assert dream.cache.t == t and torch.isfinite(imagined).all()
        handle = model.register_forward_hook(capture)
        hs.append(dream.commit(z[:, t:t + 1], *part(t)))
        handle.remove()
        assert dream.cache.t == t + 1
    tau, d = levels(2, 9, model.tau_ctx)
    _, h = model(torch.cat(pieces, 1), tau, d, actions, labelled, task)
    assert torch.allclose(torch.cat(hs, 1), h, atol=1e-5)


def test_dynamics_loss_rows():
    """Fails if rows outside the dynamics loss leak gradient into it, context-level rows are not
    at tau_ctx, or the bootstrap rows are not the first ones."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(6, 4)
    seen = []
    handle = model.register_forward_hook(lambda m, args, out: seen.append(args))
    z.requires_grad_(True)
    losses, h, metrics = dynamics_losses(model, z, actions, labelled, 2,
                                         torch.Generator().manual_seed(0), 4,
                                         torch.zeros(6, 4, dtype=torch.long), context_level=2)
    handle.remove()
    losses["dynamics"].backward()
    assert z.grad[4:].abs().max() == 0 and z.grad[:4].abs().amax((1, 2, 3)).min() > 0
    assert (seen[0][1][4:] == model.tau_ctx).all() and len(seen) == 3
    assert [len(args[0]) for args in seen] == [6, 2, 2] and h.shape == (6, 4, 16)
    assert (seen[0][2][2:] == model.d_min).all()


@pytest.mark.parametrize("changes", [
    {}, {"prediction": "v"}, {"loss_space": "v"}, {"ramp": False}, {"dense": True},
    {"dense": True, "time_every": 1}, {"kv_heads": 4}, {"registers": 0}, {"p_boot": 1.0},
    {"p_boot": 0.0}, {"action_tokens": 2}])
def test_ablation_flags_train_and_dream(changes):
    """Fails if a flag of the paper's ablation table crashes, or changes nothing."""
    z, actions, labelled = play_inputs(4, 5)

    def loss_of(**flags):
        model = tiny_dynamics(**flags)
        losses, _, _ = dynamics_losses(model, z, actions, labelled, round(model.cfg.p_boot * 4),
                                       torch.Generator().manual_seed(0),
                                       single=torch.tensor([True, False, False, False]))
        losses["dynamics"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        dream = Dream(model, torch.Generator().manual_seed(0))
        dream.commit(z, actions, labelled)
        assert dream.step({k: x[:, :1] for k, x in actions.items()})[0].isfinite().all()
        return float(losses["dynamics"].detach())

    assert math.isfinite(loss_of(**changes))
    assert not changes or loss_of(**changes) != loss_of()


# ------------------------------------------------------------------------------------ agent.py

def tiny_agent(spec=ActionSpec(categorical=(5,)), **changes):
    return randomize(Agent(AgentConfig(**dict(hidden=16, mtp=2, bins=31) | changes), 16, spec))


def test_eq9_targets():
    """Fails if the policy's target is not actions[t + 1 + n], the reward's not rewards[t + n], or
    entries past the end of the window are used (wrap-around)."""
    x = torch.arange(10).view(1, 10)
    for first in (0, 1):
        ahead, valid = targets_ahead(x, first, 3)
        assert ahead.shape == valid.shape == (1, 10, 4)
        for t in range(10):
            for n in range(4):
                assert bool(valid[0, t, n]) == (t + first + n < 10)
                if valid[0, t, n]:
                    assert ahead[0, t, n] == t + first + n


def test_eq9_loss_averages_valid_entries():
    """Fails if masked entries count, or the sign is flipped."""
    log_p = torch.tensor([[[-1.0, -100.0], [-3.0, -100.0]]])
    valid = torch.tensor([[[True, False], [True, False]]])
    policy, reward = behavior_loss(log_p, valid, 2 * log_p, valid)
    assert float(policy) == 2 and float(reward) == 4
    assert float(behavior_loss(log_p, valid & False, log_p, valid)[0]) == 0


def test_eq9_random_actions_cannot_be_cloned():
    """Fails if a label leaks into h (a_t as its own target): i.i.d. actions have entropy ln 5."""
    torch.manual_seed(0)
    spec = ActionSpec(categorical=(5,))
    model, agent = tiny_dynamics(), Agent(AgentConfig(hidden=32, mtp=1, bins=31), 16, spec)
    parameters = [*model.parameters(), *agent.parameters()]
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], 1e-2)
    nlls, copies = [], []
    for step in range(120):
        z, actions, labelled = play_inputs(32, 6, seed=step)
        task = torch.zeros(32, 6, dtype=torch.long)
        _, h = model(z, *levels(32, 6, 0.875), actions, labelled, task)
        losses, metrics = agent_losses(agent, h, actions, labelled, torch.zeros(32, 6),
                                       torch.ones(32, 6), torch.ones(32, dtype=torch.bool))
        # control: a_t itself can be read from h_t, by the head at distance 1
        copy = -action_log_prob(spec, agent.policy(h)[:, :, 1], actions).mean()
        optimizer.zero_grad()
        (losses["bc"] + copy).backward()
        optimizer.step()
        nlls.append(float(metrics["bc_next_action"]))
        copies.append(float(copy))
    assert np.mean(nlls[-30:]) > math.log(5) - 0.05
    assert np.mean(copies[-30:]) < 1.0


def test_agent_losses_respect_rows_and_labels():
    """Fails if BC counts rows that are not relevant or unlabelled actions, or reward and continue
    losses skip rows."""
    agent = tiny_agent()
    h = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    _, actions, labelled = play_inputs(3, 5)
    labelled[2, 3] = False
    relevant = torch.tensor([False, True, True])
    rewards, continues = torch.zeros(3, 5), torch.ones(3, 5)
    call = lambda a, r, c: agent_losses(agent, h, a, labelled, r, c, relevant)[0]
    base = call(actions, rewards, continues)

    def with_action(row, t):
        other = {k: x.clone() for k, x in actions.items()}
        other["categorical"][row, t] = (other["categorical"][row, t] + 1) % 5
        return float(call(other, rewards, continues)["bc"] - base["bc"])

    assert with_action(0, 2) == 0 and with_action(2, 3) == 0 and with_action(1, 0) == 0
    assert with_action(1, 2) != 0 and with_action(2, 2) != 0
    for row in range(3):
        changed = rewards.clone()
        changed[row, 2] = 1
        assert call(actions, changed, continues)["reward"] != base["reward"]
        changed = continues.clone()
        changed[row, 4] = 0
        assert call(actions, rewards, changed)["continue"] != base["continue"]


def test_two_hot_round_trip():
    """Fails if the bins are reversed, the weights swapped, or the ends wrap around."""
    bins = symexp_bins(255)
    x = torch.tensor([-1e9, -30.0, -1.0, -0.3, 0.0, 1e-3, 0.5, 1.0, 7.7, 1e9])
    weights = two_hot(x, bins)
    assert torch.allclose(weights.sum(-1), torch.ones(10)) and (weights >= 0).all()
    assert ((weights > 0).sum(-1) <= 2).all()
    assert torch.allclose((weights * bins).sum(-1)[1:-1], x[1:-1], rtol=1e-4, atol=1e-5)
    assert weights[0, 0] == 1 and weights[-1, -1] == 1
    used = weights[6].nonzero().flatten()
    assert used.tolist() == [int((bins <= 0.5).sum()) - 1, int((bins <= 0.5).sum())]
    logits = torch.log(two_hot(torch.tensor([0.37]), bins).clamp_min(1e-30))
    assert abs(float(two_hot_mean(logits, bins)) - 0.37) < 1e-4
    best = two_hot_log_prob(logits, torch.tensor([0.37]), bins)
    assert best > two_hot_log_prob(logits, torch.tensor([1.5]), bins)


def test_action_distributions_against_closed_forms():
    """Fails if keys and categories are mixed up, a sign is flipped, or samples do not follow the
    probabilities."""
    spec = ActionSpec(binary=2, categorical=(3, 2))
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    prior = torch.randn(7, generator=torch.Generator().manual_seed(1))
    p, q = logits.double(), prior.double()
    outcomes, kl = [], 0.0
    for k0 in (0, 1):
        for k1 in (0, 1):
            for a in range(3):
                for b in range(2):
                    def prob(x):
                        keys = [x[i].sigmoid() if k else 1 - x[i].sigmoid()
                                for i, k in ((0, k0), (1, k1))]
                        return keys[0] * keys[1] * x[2:5].softmax(0)[a] * x[5:].softmax(0)[b]
                    action = {"binary": torch.tensor([k0, k1]), "categorical": torch.tensor([a, b])}
                    got = action_log_prob(spec, logits, action)
                    assert abs(float(got) - float(prob(p).log())) < 1e-5
                    outcomes.append(float(prob(p)))
                    kl += float(prob(p) * (prob(p).log() - prob(q).log()))
    assert abs(sum(outcomes) - 1) < 1e-6
    assert abs(float(action_kl(spec, logits, prior)) - kl) < 1e-5
    draws = sample_action(spec, logits.expand(20000, 7), torch.Generator().manual_seed(0))
    assert (draws["binary"].float().mean(0) - logits[:2].sigmoid()).abs().max() < 0.02
    shares = torch.bincount(draws["categorical"][:, 0], minlength=3) / 20000
    assert (shares - logits[2:5].softmax(0)).abs().max() < 0.02


def test_prior_kl_is_reverse():
    """Fails if the direction is swapped: KL[pi || prior] of (1/2, 1/2) against (9/10, 1/10) is
    ln(5/3) = 0.5108, the other way 0.3681; zero at equality."""
    spec = ActionSpec(categorical=(2,))
    pi, prior = torch.zeros(2), torch.tensor([0.9, 0.1]).log()
    assert abs(float(action_kl(spec, pi, prior)) - 0.5 * math.log(25 / 9)) < 1e-5
    assert abs(float(action_kl(spec, prior, pi)) - 0.3681) < 1e-3
    assert float(action_kl(spec, prior, prior)) == 0


def test_eq10_lambda_returns_by_hand():
    """Fails if an index shifts: r = (1, 2, 3), v = (10, 20, 30), gamma = lambda = 1/2 gives
    (11.5, 18, 30); c = 0 cuts."""
    r, v = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]])
    c = torch.ones(1, 3)
    want = torch.tensor([[8.5, 10.5, 30.0]])
    want = torch.tensor([[2 + 0.5 * (0.5 * 20 + 0.5 * 18), 3 + 0.5 * 30, 30.0]])
    assert torch.allclose(want, torch.tensor([[11.5, 18, 30]]))
    assert torch.allclose(lambda_returns(r, c, v, 0.5, 0.5), want)
    c[0, 2] = 0
    assert torch.allclose(lambda_returns(r, c, v, 0.5, 0.5),
                          torch.tensor([[2 + 0.5 * (10 + 1.5), 3, 30.0]]))


def test_eq10_lambda_returns_equal_the_sum_of_n_step_returns():
    """Fails if lambda mixes the wrong terms: the definition by n-step returns, in float64."""
    generator = torch.Generator().manual_seed(0)
    r, v, c = (torch.rand(4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    gamma, lam, T = 0.9, 0.7, 6
    got = lambda_returns(r, c, v, gamma, lam)
    for b in range(4):
        for t in range(T):
            n_step = []
            for n in range(1, T - t + 1):
                total, discount = 0.0, 1.0
                for i in range(1, n + 1):
                    total += discount * r[b, t + i]
                    discount *= gamma * c[b, t + i]
                n_step.append(total + discount * v[b, t + n])
            want = sum((1 - lam) * lam ** i * x for i, x in enumerate(n_step[:-1]))
            want = want + lam ** (len(n_step) - 1) * n_step[-1]
            assert abs(float(got[b, t] - want)) < 1e-9


def test_eq10_value_loss_pulls_towards_the_return():
    """Fails if the target is not detached, or the head learns another number than the return."""
    bins, logits = symexp_bins(63), torch.zeros(1, 63, requires_grad=True)
    target = torch.tensor([1.3], requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.2)
    for _ in range(200):
        optimizer.zero_grad()
        value_loss(logits, target, bins).backward()
        optimizer.step()
    assert abs(float(two_hot_mean(logits, bins).detach()) - 1.3) < 0.05 and target.grad is None


def test_eq11_gradient_signs_and_weights():
    """Fails if the sign is flipped, the magnitude of A leaks, D+ and D- share one mean, or an
    empty set gives 0/0. A = (3, .1, 0, -2, -.5): -1/6 three times, +1/4 twice."""
    def gradient(advantages, alpha=0.5):
        log_p = torch.zeros(1, len(advantages), requires_grad=True)
        pmpo_loss(log_p, torch.tensor([advantages]), torch.zeros(1, len(advantages)), alpha,
                  0.3).backward()
        return log_p.grad[0]

    want = torch.tensor([-1 / 6] * 3 + [1 / 4] * 2)
    assert torch.allclose(gradient([3.0, 0.1, 0.0, -2.0, -0.5]), want)
    assert torch.allclose(gradient([300.0, 10.0, 0.0, -200.0, -50.0]), want)
    assert torch.allclose(gradient([1.0, -1.0], alpha=0.8), torch.tensor([-0.8, 0.2]))
    assert torch.allclose(gradient([1.0, 2.0]), torch.tensor([-0.25, -0.25]))
    assert torch.allclose(gradient([-1.0, -2.0]), torch.tensor([0.25, 0.25]))
    kl = torch.tensor([[1.0, 3.0]], requires_grad=True)
    loss = pmpo_loss(torch.zeros(1, 2), torch.ones(1, 2), kl, 0.5, 0.3)
    loss.backward()
    assert abs(float(loss) - 0.6) < 1e-6 and torch.allclose(kl.grad, torch.tensor([[0.15, 0.15]]))


def test_imagination_returns_align_with_actions():
    """Fails if the advantage scores the action before or after: reward comes exactly when action 3
    leads to a frame, so only action 3 may be scored up."""
    agent = tiny_agent(gamma=0.0)
    h = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    chosen = {"categorical": torch.randint(5, (64, 5, 1), generator=generator),
              "binary": torch.zeros(64, 5, 0)}
    rewards = torch.zeros(64, 6)
    rewards[:, 1:] = (chosen["categorical"][..., 0] == 3).float()
    agent.rewards, agent.values = (lambda _: rewards), (lambda _: torch.full((64, 6), 0.5))
    logits = torch.zeros(64, 5, 1, 5, requires_grad=True)
    agent.policy.forward = lambda _: logits
    losses, metrics = imagination_losses(agent, h, chosen)
    losses["policy"].backward()
    taken = logits.grad[:, :, 0].gather(-1, chosen["categorical"])[..., 0]
    assert (taken[rewards[:, 1:] == 1] < 0).all() and (taken[rewards[:, 1:] == 0] > 0).all()


def test_imagination_step_changes_policy_and_value_alone():
    """Fails if the optimizer holds other parameters, the prior gets a gradient, or h carries one
    back into the transformer."""
    model, agent = tiny_dynamics(), tiny_agent()
    z, actions, labelled = play_inputs(4, 3)
    before = {n: p.clone() for n, p in [*model.named_parameters(), *agent.named_parameters()]}
    h, chosen, frames = imagine_rollout(model, agent, z, actions, labelled,
                                        torch.zeros(4, 3, dtype=torch.long), 5,
                                        torch.Generator().manual_seed(0))
    assert h.shape == (4, 6, 16) and frames.shape == (4, 5, 2, 6)
    assert chosen["categorical"].shape == (4, 5, 1) and not h.requires_grad
    losses, metrics = imagination_losses(agent, h, chosen)
    pi, prior = (head(h[:, :-1])[:, :, 0].detach() for head in (agent.policy, agent.prior))
    kls = [float(action_kl(agent.spec, *pair).mean()) for pair in ((pi, prior), (prior, pi))]
    assert abs(float(metrics["kl_prior"]) - kls[0]) < 1e-5 < abs(kls[0] - kls[1]) / 100
    (losses["policy"] + losses["value"]).backward()
    touched = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
    assert touched == {"policy", "value"}
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    agent.freeze_prior()
    losses, metrics = imagination_losses(agent, h, chosen)
    assert abs(float(metrics["kl_prior"])) < 1e-6


def test_continue_probability_is_calibrated():
    """Fails if the weight of the rare class is not undone: trained with weight w on a coin that
    ends 1 time in 10, the head must answer 0.9."""
    torch.manual_seed(0)
    agent = Agent(AgentConfig(hidden=8, mtp=0, bins=5, terminal_weight=20.0), 16,
                  ActionSpec(categorical=(2,)))
    continues = torch.ones(10, 10)
    continues[:, 0] = 0
    h, optimizer = torch.ones(10, 10, 16), torch.optim.Adam(agent.continues.parameters(), 1e-2)
    _, actions, labelled = play_inputs(10, 10, ActionSpec(categorical=(2,)))
    for _ in range(300):
        optimizer.zero_grad()
        agent_losses(agent, h, actions, labelled, torch.zeros(10, 10), continues,
                     torch.ones(10, dtype=torch.bool))[0]["continue"].backward()
        optimizer.step()
    assert abs(float(agent.continue_prob(h)[0, 0].detach()) - 0.9) < 0.01


# ------------------------------------------------------------------- play.py: real environments

class KeyEnv(PaintEnv):
    """PaintEnv with keys and a category alone, so that a policy can play it; a ladder of two."""

    def __init__(self):
        super().__init__()
        self.spec = replace(self.spec, actions=ActionSpec(2, (5,)), rungs=("four", "both_keys"),
                            ladder=(("four", 2), ("both_keys", 0)))


def key_run():
    """A run for KeyEnv with random weights, as load_run would give it."""
    spec = KeyEnv().spec
    tokenizer = tiny_tokenizer()
    dynamics = tiny_dynamics(spec.actions, tasks=2)
    return Run(Path("none"), "agent", spec, tokenizer, dynamics, tiny_agent(spec.actions))


def test_intervals_against_known_values():
    """Fails if Wilson's centre or width is wrong (8 of 10: 0.490 to 0.943), or the bootstrap does
    not keep pairs together."""
    low, high = play.wilson(8, 10)
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert play.wilson(0, 10)[0] == 0 and play.wilson(0, 10)[1] > 0.2
    x = np.random.default_rng(0).normal(size=200)
    value, low, high = play.bootstrap(lambda a, b: (a - b).mean(), x + 1, x)
    assert abs(value - 1) < 1e-9 and abs(high - low) < 1e-9         # paired: no spread
    value, low, high = play.mean_interval(x)
    assert abs((high - low) / 2 - 1.96 * x.std(ddof=1) / math.sqrt(200)) < 1e-9
    alike = np.repeat(x[:50], 4)                                    # 4 clips of each episode
    narrow, wide = (np.diff(play.bootstrap(np.mean, alike, block=b)[1:])[0] for b in (1, 4))
    assert 1.7 < wide / narrow < 2.3


def test_psnr_is_of_the_mean_error():
    """Fails if decibels are averaged: errors 0.1 and 0.001 give 12.97 dB, not 20."""
    assert abs(play.decibel(np.array([0.1, 0.001])) - 12.967) < 1e-3
    black, white = torch.zeros(1, 1, 2, 2, 3).byte(), torch.full((1, 1, 2, 2, 3), 255).byte()
    assert play.squared_error(black, white) == 1


def test_ladder_advances_by_real_events():
    """Fails if events of other tasks count, a prompt changes early, or the last one ends."""
    ladder = play.Ladder(KeyEnv().spec, 2)
    assert ladder.task.tolist() == [0, 0]
    both, none = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    first = np.array([[1, 0], [0, 1]], bool)
    assert ladder.advance(first).tolist() == [False, False]
    assert ladder.advance(none).tolist() == [False, False]
    assert ladder.advance(first).tolist() == [True, False]
    assert ladder.task.tolist() == [1, 0]
    for _ in range(3):
        ladder.advance(both)
    assert ladder.task.tolist() == [1, 1]


def test_cached_h_equals_recomputed_h_after_a_change_of_task(monkeypatch):
    """Fails if a changed prompt leaves old agent tokens in the cache, or rows are mixed up."""
    monkeypatch.setattr(Dream, "noise", lambda self, B, T: torch.zeros(B, T, 2, 6))
    run, N, T = key_run(), 3, 9
    spec, rng = run.spec.actions, np.random.default_rng(0)
    frames = rng.integers(0, 256, (T, N, 8, 12, 3), dtype=np.uint8)
    actions = [spec.sample(rng, N) for _ in range(T)]
    actor = play.Actor(run, np.zeros(N, int), torch.Generator())
    task = np.zeros(N, int)
    for t in range(T):
        changed = np.array([False, t == 6, t == 2])
        task = np.where(changed, 1, task)
        before = actor.h.clone() if t else None
        actor.observe(frames[t], actions[t], t > 0, task, changed)
    whole = torch.from_numpy(frames).transpose(0, 1)
    z = run.tokenizer.encode(whole)
    a = {k: torch.from_numpy(np.stack([x[k] for x in actions], 1)) for k in actions[0]}
    labelled = torch.arange(T).expand(N, T) > 0
    h = Dream(run.dynamics).commit(z, a, labelled, torch.as_tensor(task)[:, None].expand(N, T))
    assert torch.allclose(actor.h, h[:, -1], atol=1e-5)
    other = Dream(run.dynamics).commit(z, a, labelled, torch.zeros(N, T, dtype=torch.long))
    assert (other[1:, -1] - h[1:, -1]).abs().max() > 1e-3           # control: the task matters
    assert before is not None


def test_evaluation_plays_the_sampled_policy(tmp_path):
    """Fails if events, first times or the mapping of actions to environments are shifted."""
    first = play.evaluate_agent(KEYS, range(1, 5), 40, None, workers=1)
    assert first.shape == (4, 2) and np.isfinite(first).all() and first.min() >= 1
    run = key_run()
    for parameter in run.agent.policy.parameters():
        parameter.data.zero_()
    logits = torch.full((3, 7), -30.0)
    logits[:, [0, 1, 6]] = 30.0                                     # both keys, category 4
    run.agent.policy.out.bias.data = logits.flatten()
    first = play.evaluate_agent(KEYS, range(1, 4), 6, run, workers=1, gif=tmp_path / "x.gif")
    assert (first[:, 1] == 1).all() and (first[:, 0] == 1).sum() in (0, 3)
    assert (tmp_path / "x.gif").stat().st_size > 0
    assert play.ladder_scores(run.spec, first).tolist() == np.isfinite(first).sum(1).tolist()


def test_paired_noise_makes_dreams_repeat(monkeypatch):
    """Fails if the dream's noise depends on more than the seed: then shuffled actions are not
    compared with the same noise."""
    run = key_run()
    z, _, labelled = play_inputs(2, 6)
    actions = {k: torch.from_numpy(x) for k, x in
               run.spec.actions.sample(np.random.default_rng(0), 2, 6).items()}
    films = [play.dream_clips(run, z, a, labelled, 3, seed)
             for a, seed in ((actions, 0), (actions, 0), (actions, 1),
                             ({k: x.flip(0) for k, x in actions.items()}, 0))]
    assert torch.equal(films[0], films[1]) and films[0].shape == (2, 6, 8, 12, 3)
    assert not torch.equal(films[0], films[2]) and not torch.equal(films[0], films[3])
    assert torch.equal(films[0][:, :3], films[3][:, :3])            # the context is the same


# -------------------------------------------------------------------------------------- train.py

KEYS = f"{__name__}:KeyEnv"
TINY = f"""--data.env {KEYS} --data.episodes 6 --data.length 36 --data.reference_episodes 2
--data.workers 1 --data.eval_episodes 2 --data.eval_length 8 --tokenizer.patch 4 --tokenizer.dim 16
--tokenizer.latents 4 --tokenizer.channels 4 --tokenizer.encoder_layers 3
--tokenizer.decoder_layers 3 --dynamics.dim 16 --dynamics.layers 3 --dynamics.context 8
--agent.hidden 16 --agent.mtp 2 --agent.horizon 3 --agent.context 4 --train.tokenizer_batch 2
--train.batch 6 --train.length 6 --train.long_length 12 --train.imagine_batch 4
--train.tokenizer_steps 8 --train.dynamics_steps 8 --train.agent_steps 8 --train.imagine_steps 8
--train.value_first 2 --train.compile false --train.log_every 4 --train.save_every 3""".split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def train_here(monkeypatch, workplace, *flags):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *flags])
    train.main()


def test_every_stage_runs_and_resume_equals_an_uninterrupted_run(monkeypatch, workplace):
    """Fails if a stage can't use what the one before it made, or optimizer, normalizer, step or
    batch order differ after an interruption."""
    finals = {}
    for name in ("whole", "cut"):
        for stage in STAGES:
            if name == "cut":
                real, count = train.save, []

                def broken(path, state, keep=None):
                    real(path, state, keep)
                    count.append(path)
                    if len(count) == 2:                             # after step 6 of 8
                        raise KeyboardInterrupt

                monkeypatch.setattr(train, "save", broken)
                with pytest.raises(KeyboardInterrupt):
                    train_here(monkeypatch, workplace, "--run", name, "--stage", stage)
                monkeypatch.setattr(train, "save", real)
            train_here(monkeypatch, workplace, "--run", name, "--stage", stage)
            path = workplace / "runs" / name / f"{stage}.pt"
            finals[name, stage] = torch.load(path, weights_only=True)
    for stage, module in zip(STAGES, ("tokenizer", "dynamics", "agent", "agent"), strict=True):
        a, b = finals["whole", stage][module], finals["cut", stage][module]
        assert all(torch.equal(a[k], b[k]) for k in a), stage
    a, b = finals["whole", "agent"]["dynamics"], finals["whole", "dynamics"]["dynamics"]
    assert any(not torch.equal(a[k], b[k]) for k in a)              # the agent stage trains it
    a, b = finals["whole", "imagine"], finals["whole", "agent"]
    assert all(torch.equal(a["dynamics"][k], b["dynamics"][k]) for k in a["dynamics"])
    moved = {k.split(".")[0] for k in a["agent"] if not torch.equal(a["agent"][k], b["agent"][k])}
    assert moved == {"policy", "value"}
    assert all(torch.equal(a["agent"][k], b["agent"]["policy" + k[5:]])
               for k in a["agent"] if k.startswith("prior"))        # it is the BC policy


def test_one_command_ends_with_results_and_report(monkeypatch, workplace, capsys):
    """Fails if the whole run leaves out a promised figure or picture."""
    train_here(monkeypatch, workplace, "--run", "all")
    folder = workplace / "runs" / "all"
    results = json.loads((folder / "results.json").read_text())
    names = {"wall_seconds_total", "tokenizer_psnr_db", "recon_psnr_db", "ladder_random",
             "ladder_bc", "ladder_rl", "ladder_rl_minus_bc", "success_rl_four",
             "imagined_frames_per_s", "dream_fps_batch1",
             *(f"wall_seconds_{s}" for s in STAGES),
             *(f"{x}_psnr_db_h{h}" for x in ("dream", "repeat", "shuffled")
               for h in (1, 4, 8, 16))}
    assert names <= set(results), names - set(results)
    assert all(set(r) == {"value", "low", "high", "n", "unit", "command"}
               for r in results.values())
    for picture in ("tokenizer_reconstructions.png", "dream.gif", "success.png",
                    "episode_rl.gif", "imagine_curves.png", "report.md"):
        assert (folder / picture).stat().st_size > 0
    assert "Done in" in capsys.readouterr().out
    train_here(monkeypatch, workplace, "--run", "all", "--stage", "dynamics")       # skips it
    again = json.loads((folder / "results.json").read_text())
    assert again["wall_seconds_total"] == results["wall_seconds_total"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    keys = set().union(*(json.loads(x) for x in lines))
    assert {"mse", "flow", "boot", "bc", "reward", "continue", "policy", "value", "x_error_tau0",
            "boot_error_d1", "kl_prior", "positive_share", "grad_norm"} <= keys


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_overfits_one_batch(monkeypatch, workplace, stage):
    """Fails on any wiring error that keeps a stage from learning what it is shown."""
    monkeypatch.setattr(train, "rng_for", lambda seed, stage, step: data.rng_for(0, stage, 0))
    flags = ["--run", "overfit", "--stage", stage, "--train.save_every", "1000",
             f"--train.{stage}_steps", "150", "--train.log_every", "10", "--train.long_share", "0"]
    train_here(monkeypatch, workplace, *flags)
    lines = [json.loads(x) for x in
             (workplace / "runs" / "overfit" / "metrics.jsonl").read_text().splitlines()]
    lines = [x for x in lines if x["stage"] == stage]
    for key in {"tokenizer": ["mse"], "dynamics": ["flow"], "agent": ["bc_next_action", "reward"],
                "imagine": ["value"]}[stage]:
        assert lines[-1][key] < 0.85 * lines[0][key], (key, lines[0][key], lines[-1][key])


@pytest.mark.parametrize("flags, word", [
    (["--dynamics.k_maxx", "4"], "--dynamics.k_maxx"), (["--dynamics.k_max", "6"], "k_max 6"),
    (["--tokenizer.heads", "3"], "heads 3"), (["--dynamics.prediction", "y"], "'y'"),
    (["--train.compile", "maybe"], "maybe"), (["--stage", "sleep"], "sleep"),
    (["--device", "abacus"], "abacus"), (["--agent.gamma", "1.5"], "gamma 1.5"),
    (["--stage", "dynamics", "--run", "/nowhere/new"], "nowhere")])
def test_bad_flags_exit_2_with_one_line(flags, word, workplace, monkeypatch, capsys):
    """Fails if a bad flag or value gives a traceback, or an error that does not name it."""
    monkeypatch.setattr(train.Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(
        UserError("Can't write /nowhere/new")) if "nowhere" in word else None)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: train_here(monkeypatch, workplace, *flags))
    assert stop.value.code == 2
    assert word in capsys.readouterr().err.strip().splitlines()[-1]


def test_missing_stages_are_named(tmp_path):
    """Fails if a missing or damaged checkpoint gives a traceback in place of got, need, do."""
    with pytest.raises(UserError, match="--stage dynamics"):
        load_run(tmp_path / "none", "dynamics")
    (tmp_path / "tokenizer.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="Can't read"):
        load_run(tmp_path)


def test_presets_name_real_flags_and_sizes():
    """Fails if a preset sets a flag that does not exist, or sizes that do not fit together."""
    for preset in train.PRESETS:
        args, configs = train.parse(["--preset", preset])
        for key, value in train.PRESETS[preset].items():
            prefix, field = key.split(".")
            assert configs[prefix][field] == value


def test_windows_alternate_between_short_and_long():
    """Fails if long windows are not every fourth and all of the last tenth."""
    cfg = train.TrainConfig(batch=12, length=4, long_length=16)
    lengths = [train.window(cfg, step, 100) for step in range(100)]
    assert lengths[:4] == [(12, 4)] * 3 + [(3, 16)] and set(lengths[90:]) == {(3, 16)}
    assert sum(length == 16 for _, length in lengths[:90]) == 22


# --------------------------------------------------------------------------------------- README

def test_readme_commands_parse():
    """Fails if the README shows a command that the programs refuse."""
    text = (REPO / "README.md").read_text()
    lines = [*re.findall("`([^`\n]+)`", text), *(x for x in text.splitlines() if "`" not in x)]
    commands = [part for line in lines for part in line.split("&&") if "python" in part]
    seen = 0
    for words in (c.split("#")[0].split() for c in commands):
        if "--help" in words:
            continue
        if "train.py" in words:
            train.parse(words[words.index("train.py") + 1:])
        elif "play.py" in words:
            play.make_parser().parse_args(words[words.index("play.py") + 1:])
        elif "data.py" in words:
            data.make_parser().parse_args(words[words.index("data.py") + 1:])
        else:
            continue
        seen += 1
    assert seen >= 8


def test_readme_environment_can_be_recorded(tmp_path, monkeypatch):
    """Fails if the README's own environment is not one that can be recorded and read."""
    code = (REPO / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "mygame.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    dataset = data.record("mygame:Game", tmp_path / "set", 2, 20, 0, workers=1)
    assert dataset.lengths.tolist() == [20, 20] and dataset.spec.tasks == ("right_edge",)
    assert len(code.splitlines()) <= 30


def test_every_equation_has_one_home():
    """Fails if an equation is cited by no function, or by two files, or not in the README."""
    readme = (REPO / "README.md").read_text()
    sources = {name: (REPO / name).read_text()
               for name in ("tokenizer.py", "dynamics.py", "agent.py", "train.py", "play.py")}
    for i in range(2, 12):
        homes = [name for name, text in sources.items() if f'"""Eq. {i} (' in text
                 or f'"""Eq. {i}:' in text]
        if i != 3:                                      # Eq. 1 and 3 are cases of Eq. 7
            assert len(homes) == 1, (i, homes)
    for i in range(1, 12):
        assert f"| Eq. {i} " in readme
    assert "(Eq. 1)" in sources["dynamics.py"] and "(Eq. 3)" in sources["dynamics.py"]


# ------------------------------------------------- resume, faults, determinism, data parallel

FINALS = ("tokenizer.pt", "dynamics.pt", "agent.pt", "imagine.pt", "latents.npy", "latents.json",
          "config.json")


def train_quietly(folder, *flags, cli=False):
    """train.main() in `folder` as on the command line, without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "pictures", lambda *_: None)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
        return run_cli(train.main) if cli else train.main()


def metrics_of(folder, stage):
    """The stage's lines of metrics.jsonl without the rate, which is the machine's."""
    lines = [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "rate"} for x in lines if x["stage"] == stage]


def same_tensors(a, b):
    return all(torch.equal(a[m][k], b[m][k]) for m in ("tokenizer", "dynamics", "agent")
               for k in a.get(m, ()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with datasets/ and runs/base, where all four stages are trained."""
    folder = tmp_path_factory.mktemp("finished")
    for stage in STAGES:
        train_quietly(folder, "--run", "base", "--stage", stage)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of `finished` to break: its folder and its run."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy/runs/base"


def stop_after(monkeypatch, folder, saves, *flags, signal_number=None):
    """Train until the checkpoint number `saves` of the stage is on disk -> the way it ended."""
    real, count = train.save, []

    def broken(path, state, keep=None):
        real(path, state, keep)
        count.append(path)
        if len(count) == saves:
            raise KeyboardInterrupt if signal_number is None else SystemExit

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(train, "save", broken)
        train_quietly(folder, *flags)


@pytest.mark.parametrize("damage", ["cut", "byte", "missing"])
def test_resume_falls_back_to_the_older_checkpoint(copy, monkeypatch, capsys, damage):
    """Fails if one damaged checkpoint loses the stage, is used, or is passed over in silence; or if
    wall time, sums of metrics or lines of metrics.jsonl are lost or doubled."""
    folder, run = copy
    whole, lines = torch.load(run / "dynamics.pt", weights_only=True), metrics_of(run, "dynamics")
    (run / "dynamics.pt").unlink()
    stop_after(monkeypatch, folder, 2, "--run", "base", "--stage", "dynamics")
    newest, older = run / "dynamics.resume.pt", run / "dynamics.resume.old.pt"
    assert [torch.load(p, weights_only=True)["step"] for p in (older, newest)] == [3, 6]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":                                         # killed between two renames
        newest.unlink()
    else:
        newest.write_bytes(content if damage == "byte" else content[:-9])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "dyna')                               # killed while it was written
    capsys.readouterr()
    train_quietly(folder, "--run", "base", "--stage", "dynamics")
    out = capsys.readouterr().out
    assert "steps 3 to 8" in out
    assert ("Going on from the one before, step 3" in out) == (damage != "missing")
    again = torch.load(run / "dynamics.pt", weights_only=True)
    assert same_tensors(whole, again) and metrics_of(run, "dynamics") == lines and len(lines) == 2
    assert not list(run.glob("*.tmp")) and not newest.exists() and not older.exists()


def test_wall_time_of_a_resumed_stage_adds_up(copy, monkeypatch):
    """Fails if the seconds before a break are forgotten."""
    folder, run = copy
    (run / "dynamics.pt").unlink()
    stop_after(monkeypatch, folder, 2, "--run", "base", "--stage", "dynamics")
    state = torch.load(run / "dynamics.resume.pt", weights_only=True)
    assert 0 < state["seconds"] < 300
    torch.save({**state, "seconds": 1000.0}, run / "dynamics.resume.pt")
    train_quietly(folder, "--run", "base", "--stage", "dynamics")
    results = json.loads((run / "results.json").read_text())
    assert 1000 < results["wall_seconds_dynamics"]["value"] < 1300


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(copy, monkeypatch, capsys, number, code):
    """Fails if the step in hand is lost, the exit code is another, the command to go on is wrong
    (--resume no would begin again), or going on differs from an uninterrupted run."""
    folder, run = copy
    whole = torch.load(run / "agent.pt", weights_only=True)
    real, calls = train.agent_losses, []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return real(*args)

    flags = ("--run", "base", "--stage", "agent", "--resume", "no")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "agent_losses", signalled)
        train_quietly(folder, *flags, cli=True)
    assert stop.value.code == code and len(calls) == 5
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("interrupted: the same command goes on: python train.py --data.env")
    assert last.endswith("--run base --stage agent")
    assert torch.load(run / "agent.resume.pt", weights_only=True)["step"] == 5
    train_quietly(folder, *flags[:-2])
    assert same_tensors(whole, torch.load(run / "agent.pt", weights_only=True))


def test_a_second_signal_stops_at_once(copy, monkeypatch):
    """Fails if an impatient user has to wait for the step, or for the checkpoint."""
    folder, run = copy

    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(train, "agent_losses", twice)
    with pytest.raises(SystemExit) as stop:
        train_quietly(folder, "--run", "base", "--stage", "agent", "--resume", "no", cli=True)
    assert stop.value.code == 130 and not (run / "agent.resume.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler     # as it was before


def test_a_loss_that_is_not_finite_stops_and_can_be_replayed(copy, monkeypatch, capsys):
    """Fails if training goes on with nan, the message lacks step and seed, the last checkpoint is
    overwritten, or --replay shows another batch or changes a file."""
    folder, run = copy
    (run / "tokenizer.pt").unlink()
    flags, real, seen = ("--run", "base", "--stage", "tokenizer"), train.reconstruction_loss, []

    def spoiled(x_hat, x, perceptual):
        seen.append(x.clone())
        losses = real(x_hat, x, perceptual)
        return {"mse": losses["mse"] * torch.nan} if len(seen) == 5 else losses

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "reconstruction_loss", spoiled)
        train_quietly(folder, *flags, "--seed", 7, cli=True)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "Got a loss of nan" in message and "--replay 4" in message
    assert "at step 4 of tokenizer (seed 7)" in message
    assert torch.load(run / "tokenizer.resume.pt", weights_only=True)["step"] == 3
    before = {p: p.read_bytes() for p in run.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "reconstruction_loss", spoiled)
        train_quietly(folder, *flags, "--seed", 7, "--replay", 4, cli=True)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and len(seen) == 6 and torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[3], seen[5])                        # control: batches differ
    assert "with the weights that the last checkpoint has, of step 3" in out
    assert re.search(r"step 4: mse \d", out) and "gradient norm" in out and "patch_in.weight" in out
    assert {p: p.read_bytes() for p in run.iterdir()} == before


def test_replay_of_a_finished_stage_uses_its_weights(copy, monkeypatch, capsys):
    """Fails if a finished stage is replayed with fresh weights."""
    folder, run = copy
    with pytest.raises(SystemExit):
        train_quietly(folder, "--run", "base", "--stage", "dynamics", "--replay", 7)
    assert "of step 8" in capsys.readouterr().out


def break_file(path, how):
    content = bytearray(path.read_bytes())
    content[-len(content) // 2] ^= 255
    path.write_bytes({"cut": content[:len(content) // 2], "byte": content}[how])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_checkpoint(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def other_play(folder, name="other", episodes=3, env=None, length=36):
    return data.record(env or KEYS, folder / "datasets" / name, episodes, length, 5, workers=1).path


def unlabelled(folder):
    path = folder / "datasets/unlabelled"
    path.mkdir()
    spec, T = KeyEnv().spec, 36
    for i in range(3):
        data.write_episode(path, i, np.zeros((T, 8, 12, 3)), spec.actions.zeros(T),
                           np.ones((T, 2)) * (np.arange(T) > 0)[:, None], np.ones(T), np.zeros(T))
    data.finish_dataset(path, spec, {})
    return path


EPISODES = f"datasets/{KEYS.replace(':', '_')}_6x36"
PLAY = "--data.path", EPISODES
NEW = "--run", "new", "--stage", "tokenizer"


def base(stage, *flags):
    return "--run", "base", "--stage", stage, *flags


# what is broken in a copy of the finished run (w: its folder, r: the run), the flags of train.py
# afterwards, and what the one line must say
FAULTS = {
    "no dataset": (None, (*NEW, "--data.path", "nowhere"), "got nowhere without a dataset.json"),
    "dataset.json cut": (lambda w, r: break_file(w / EPISODES / "dataset.json", "cut"),
                         (*NEW, *PLAY), "without a dataset.json to read"),
    "dataset.json lacks a key": (lambda w, r: (w / EPISODES / "dataset.json").write_text(
        '{"version": 1, "complete": true, "settings": {}}'), (*NEW, *PLAY), "it lacks ['content'"),
    "dataset of another version": (lambda w, r: edit_json(
        w / EPISODES / "dataset.json", version=9), (*NEW, *PLAY), "version 9, not 1"),
    "dataset incomplete": (lambda w, r: edit_json(
        w / EPISODES / "dataset.json", complete=False, command="python data.py record --x"),
        (*NEW, *PLAY), "incomplete; need all episodes; do: 'python data.py record --x'"),
    "dataset empty": (lambda w, r: edit_json(w / EPISODES / "dataset.json", lengths=[], events=[]),
                      (*NEW, *PLAY), "without episodes; need at least one"),
    "episode missing": (lambda w, r: (w / EPISODES / "episode_00002.npy").unlink(),
                        (*NEW, *PLAY), "got no whole episode in"),
    "episode cut": (lambda w, r: break_file(w / EPISODES / "episode_00002.npy", "cut"),
                    (*NEW, *PLAY), "got no whole episode in"),
    "episode corrupted": (lambda w, r: [break_file(x, "byte") for x in (
        w / EPISODES).glob("episode*")], (*NEW, *PLAY), "got changed bytes in"),
    "episode shorter": (lambda w, r: np.save(x := w / EPISODES / "episode_00002.npy",
                                             np.load(x)[:-1]), (*NEW, *PLAY), "frames in"),
    "wrong image size": (lambda w, r: np.save(w / EPISODES / "episode_00002.npy", np.zeros(
        36, [("frames", "u1", (8, 8, 3)), ("labelled", "?"), ("continues", "u1")])),
        (*NEW, *PLAY), "frames: uint8(36, 8, 8, 3), need u1(8, 12, 3)"),
    "wrong action count": (lambda w, r: np.save(w / EPISODES / "episode_00002.npy", np.zeros(
        36, [("frames", "u1", (8, 12, 3)), ("binary", "u1", (3,)), ("labelled", "?")])),
        (*NEW, *PLAY), "binary: uint8(36, 3), need u1(2,)"),
    "other actions than the checkpoint's": (
        lambda w, r: other_play(w, env=PAINT), base("dynamics", "--data.path", "datasets/other"),
        "Got recordings of actions {'binary': 2, 'categorical': [5], 'continuous': 1}"),
    "episodes too short": (lambda w, r: other_play(w, length=5), (
        *NEW, "--data.path", "datasets/other", "--train.tokenizer_length", "6"),
        "need episodes as long, not 5"),
    "no held-out episode": (lambda w, r: other_play(w, episodes=1), (
        *NEW, "--data.path", "datasets/other"), "which leaves none to hold out, need at least 2"),
    "unlabelled play": (lambda w, r: (unlabelled(w), (r / "agent.pt").unlink()), base(
        "agent", "--data.path", "datasets/unlabelled", "--resume", "anyway"),
        "without labelled frames, need actions for the policy"),
    "impossible sizes": (None, (*NEW, "--tokenizer.dim", "30"), "dim must divide into heads"),
    "impossible number": (None, (*NEW, "--train.lr", "nan"), "Got train.lr nan, need float from 0"),
    "zero": (None, (*NEW, "--train.save_every", "0"), "Got train.save_every 0, need int from 1."),
    "negative seed": (None, (*NEW, "--seed", "-1"), "Got --seed -1, need a whole number from 0."),
    "long windows too short": (None, (*NEW, "--train.long_length", "8"),
                               "need more than dynamics.context 8"),
    "unknown flag": (None, (*NEW, "--train.stepps", "3"), "unrecognized arguments: --train.stepps"),
    "no such device": (None, (*NEW, "--device", "abacus"), "--device abacus, which torch can't"),
    "no such dtype": (None, (*NEW, "--dtype", "int3"), "Got --dtype int3, need auto, bf16, fp16"),
    "replay of nothing": (None, (*NEW, "--replay", "8"), "Got --replay 8 --stage tokenizer, need"),
    "stage before missing": (lambda w, r: (r / "dynamics.pt").unlink(), base("agent", "--resume",
                             "no"), "run 'python train.py --stage dynamics --run base' first."),
    "checkpoint cut": (lambda w, r: break_file(r / "dynamics.pt", "cut"), base("dynamics"),
                       "Can't read the checkpoint"),
    "checkpoint with a changed byte": (lambda w, r: break_file(r / "dynamics.pt", "byte"),
                                       base("dynamics"), "has changed"),
    "checkpoint of another program": (lambda w, r: torch.save({"model": torch.ones(3)}, r /
                                      "dynamics.pt"), base("dynamics"), "no checkpoint of this"),
    "checkpoint of another version": (lambda w, r: edit_checkpoint(r / "dynamics.pt", version=0),
                                      base("dynamics"), "version 0, need 1"),
    "impossible config in a checkpoint": (lambda w, r: edit_checkpoint(r / "tokenizer.pt", config={
        "tokenizer": {"dim": "wide"}}), base("tokenizer"), "Got tokenizer.dim 'wide', need int"),
    "both resume checkpoints damaged": (lambda w, r: [(r / x).write_bytes(b"PK") for x in (
        "agent.resume.pt", "agent.resume.old.pt", "agent.pt")] + [(r / "agent.pt").unlink()],
        base("agent"), "agent.resume.old.pt (BadZipFile"),
    "another dataset": (lambda w, r: other_play(w), base("dynamics", "--data.path",
                        "datasets/other"), "dynamics.pt was made with "),
    "another tokenizer": (lambda w, r: (r / "tokenizer.pt").unlink() or train_quietly(
        w, *base("tokenizer", "--seed", "3")), base("agent"), "Got tokenizer "),
    "a flag against the checkpoint": (None, base("agent", "--dynamics.dim", "32"),
                                      "Got --dynamics.dim 32, but runs/base/agent.pt has 16"),
    "a flag against the recordings": (None, (*NEW, "--tokenizer.height", "9"),
                                      "Got --tokenizer.height 9, but datasets/"),
    "config.json damaged": (lambda w, r: break_file(r / "config.json", "cut"), None,
                            "got no JSON to read in runs/base/config.json"),
    "config.json foreign": (lambda w, r: (r / "config.json").write_text('{"data": {"env": 3}}'),
                            None, "without a right ['env', 'reference_episodes', 'length']"),
    "results.json damaged": (lambda w, r: (r / "results.json").write_text("{"), base("dynamics"),
                             "got no JSON to read in runs/base/results.json"),
    "a file in place of the run": (lambda w, r: (w / "runs/new").write_text("x"), NEW,
                                   "File exists: 'runs/new'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_gives_one_line_and_exit_2(copy, monkeypatch, capsys, fault):
    """Fails if a bad input ends in a traceback, in another message, in success, or costs a file."""
    folder, run = copy
    spoil, flags, message = FAULTS[fault]
    if spoil:
        spoil(folder, run)
    capsys.readouterr()
    before = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        if flags:
            train_quietly(folder, *flags, cli=True)
        else:
            monkeypatch.chdir(folder)
            monkeypatch.setattr(sys, "argv", ["play.py", "report", "--run", "runs/base"])
            run_cli(play.main)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in last and "error: " in last, last
    lost = {p for p, size in before.items() if not p.is_file() or p.stat().st_size < size}
    assert {p.name for p in lost} <= ({"agent.pt"} if "--resume" in (flags or ()) else set()), lost


def test_mismatches_show_both_fingerprints_and_can_be_lifted(copy, capsys):
    """Fails if the refusal hides which is which, or --resume anyway does not lift it."""
    folder, run = copy
    other = data.Dataset(other_play(folder))
    (run / "imagine.pt").unlink()
    flags = base("imagine", "--data.path", "datasets/other")
    with pytest.raises(UserError) as error:
        train_quietly(folder, *flags)
    made = torch.load(run / "agent.pt", weights_only=True)["dataset"]
    assert other.fingerprint in str(error.value) and made in str(error.value)
    train_quietly(folder, *flags, "--resume", "anyway")
    again = torch.load(run / "imagine.pt", weights_only=True)
    assert again["dataset"] == other.fingerprint != made


def test_settings_of_a_resumed_stage_must_be_the_same(copy, monkeypatch):
    """Fails if a stage goes on with other settings than it was begun with. Control: settings that
    don't change the result, or belong to other stages, may differ."""
    folder, run = copy
    (run / "dynamics.pt").unlink()
    stop_after(monkeypatch, folder, 1, *base("dynamics"))
    for flag, value, word in (("--train.lr", 1e-4, "train.lr 0.0001"), ("--seed", 3, "seed 3"),
                              ("--dynamics.k_max", 4, "dynamics.k_max 4")):
        with pytest.raises(UserError, match=f"Got {word}.*was begun with"):
            train_quietly(folder, *base("dynamics", flag, value))
    train_quietly(folder, *base("dynamics", "--train.save_every", 5, "--train.agent_steps", 9,
                                "--agent.gamma", 0.5))


def test_damaged_latents_are_computed_again(copy, capsys):
    """Fails if a changed byte in the cache is trained on, or the cache is not restored."""
    folder, run = copy
    before = (run / "latents.npy").read_bytes()
    break_file(run / "latents.npy", "byte")
    (run / "dynamics.pt").unlink()
    train_quietly(folder, *base("dynamics"))
    assert "got damaged latents" in capsys.readouterr().out
    assert (run / "latents.npy").read_bytes() == before


def test_a_full_disk_costs_nothing(copy, monkeypatch, capsys):
    """Fails if a failed write of a checkpoint leaves rubbish, damages what was there, or can't be
    gone on from. The disk is a fake; the slow test fills a real one."""
    folder, run = copy
    whole = torch.load(run / "dynamics.pt", weights_only=True)
    (run / "dynamics.pt").unlink()
    real, count = os.fsync, []

    def full(file):
        count.append(file)
        if len(count) > 3:
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(data.os, "fsync", full)
        train_quietly(folder, *base("dynamics", "--train.save_every", 1), cli=True)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "No space left on device" in message
    assert "do: see to it, then the same command goes on" in message
    assert not list(run.glob("*.tmp")) and (run / "dynamics.resume.pt").exists()
    train_quietly(folder, *base("dynamics", "--train.save_every", 1))
    assert same_tensors(whole, torch.load(run / "dynamics.pt", weights_only=True))


def test_the_same_seed_gives_the_same_metrics(copy):
    """Fails if anything but seed, stage and step decides a number: 50 steps of each stage, twice,
    bit for bit. Control: another seed gives other numbers."""
    folder, run = copy
    for stage in STAGES:
        lines = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            target = folder / "runs" / name
            target.mkdir(exist_ok=True)
            for file in FINALS[:STAGES.index(stage)] + FINALS[4:]:
                shutil.copy(run / file, target / file)
            train_quietly(folder, "--run", name, "--stage", stage, "--seed", seed,
                          f"--train.{stage}_steps", 50, "--train.log_every", 1,
                          "--train.save_every", 100)
            lines.append(metrics_of(target, stage))
        assert len(lines[0]) == 50 and str(lines[0]) == str(lines[1]) != str(lines[2]), stage


def test_unhealthy_metrics_are_warned_about(tmp_path):
    """Fails if a warning is missing, comes twice, comes for a healthy value, or names a tip that
    the README has not."""
    log, readme = train.Log(tmp_path, "imagine", 0, {}), (REPO / "README.md").read_text()
    good = {"step": 9, "entropy": 1.3, "kl_prior": 0.1, "value_explained": 0.8, "grad_norm": 2.0,
            "positive_share": 0.5, "latent_rank": 6.0, "tanh_saturated": 0.02}
    assert set(good) == {"step", *train.HEALTH} and not list(log.warn(good))
    bad = {"step": 9, "entropy": 0.0, "kl_prior": 5.0, "value_explained": -2.0, "grad_norm": 1e4,
           "positive_share": 1.0, "latent_rank": 1.1, "tanh_saturated": 0.9}
    warnings = list(log.warn(bad))
    assert len(warnings) == 7 and not list(log.warn(bad))
    for key, text in zip(train.HEALTH, warnings, strict=True):
        assert f"warning: {key} {bad[key]:.3g} at step 9 of imagine" in text
        assert any(line.startswith(f"| `{key}`") for line in readme.splitlines()), key


def test_latent_health_by_hand():
    """Fails if the effective rank isn't that of the frames' covariance: n equal directions give n,
    a constant added changes nothing; or saturation isn't counted."""
    signs = torch.tensor([1, -1, 1, -1.]).view(4, 1, 1)
    directions = torch.eye(3).repeat(4, 1).view(4, 3, 3) * signs
    z = 0.5 * directions.reshape(4, 3, 1, 3)                        # (B, T, S, Z)
    for shift in (0.0, 0.4):
        got = train.latent_health(z + shift)
        assert abs(got["latent_rank"] - 3) < 1e-4 and got["tanh_saturated"] == 0
    collapsed = torch.randn(4, 3, 1, 1).expand(4, 3, 5, 3)
    assert abs(train.latent_health(collapsed)["latent_rank"] - 1) < 1e-4
    assert abs(train.latent_health(torch.tensor([1.0, 0.5, -0.99, 0]).view(1, 1, 1, 4))
               ["tanh_saturated"] - 0.5) < 1e-6


SPLIT = """
import sys, torch, train
device = train.join_processes(torch.device("cpu"))
torch.manual_seed(0)
body, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
forward = body.forward
body.forward = lambda x, more: (forward(more["x"]) + x.sum(-1, True), None)
train.split_rows(body)
x, mask = torch.randn(5, 3), torch.tensor([1.0, 1, 0, 1, 0])
out, none = body(x, more={"x": x * 2})
loss = (head(out.tanh())[:, 0].square() * mask).sum() / mask.sum()        # a mean over a mask
loss.backward()
train.average_gradients([*body.parameters(), *head.parameters()])
stop = train.any_process([15] if train.rank() == train_last() else [], device)
grads = [p.grad.flatten().tolist() for m in (body, head) for p in m.parameters()]
print("RESULT", repr([loss.item(), sum(grads, []), none is None, stop]))
""".replace("train_last()", "int(__import__('os').environ.get('WORLD_SIZE', 1)) - 1")


def torchrun(n, *words, **options):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           f"--nproc_per_node={n}", "--", *map(str, words)], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(REPO),
                                                    "OMP_NUM_THREADS": "1"}, **options)


def test_split_rows_give_the_whole_batch_and_its_gradients(tmp_path):
    """Fails if losses over a mask, gradients before or behind the split, uneven shares, or a signal
    to one process differ between one and three processes."""
    (tmp_path / "split.py").write_text(SPLIT)
    one = subprocess.run([sys.executable, tmp_path / "split.py"], text=True, capture_output=True,
                         env={**os.environ, "PYTHONPATH": str(REPO)})
    three = torchrun(3, tmp_path / "split.py")
    assert three.returncode == 0, three.stderr[-2000:]
    a, b = (eval(re.search(r"RESULT (\[.*\])", x.stdout)[1]) for x in (one, three))
    assert np.allclose(a[0], b[0], rtol=1e-6) and np.allclose(a[1], b[1], rtol=1e-5, atol=1e-7)
    assert max(map(abs, a[1])) > 0.01 and a[2:] == b[2:] == [True, 15]


@pytest.mark.slow
def test_two_processes_equal_one(finished, tmp_path):
    """Fails if a stage's losses under torchrun differ from those of one process by more than 1e-4
    in 20 steps. At a low rate: Muon rounds to bf16, which at full rate lets a sum's last bit grow
    to a few 1e-4 within 20 steps (so does any other change of that bit)."""
    flags = [*TINY, "--dtype", "fp32", "--train.log_every", "1", "--train.lr", "1e-3",
             "--train.lr_matrix", "1e-3", *(f"--train.{s}_steps=20" for s in STAGES)]
    flags = [f.replace(KEYS, "test_all:KeyEnv") for f in flags]
    shutil.copytree(finished / EPISODES, tmp_path / "datasets/test_all_KeyEnv_6x36")
    (tmp_path / "runs").mkdir()
    for stage in STAGES[:3]:
        words = [REPO / "train.py", *flags, "--stage", stage, "--run"]
        for n, name in enumerate(("one", "two"), 1):
            run = torchrun(n, *words, name, cwd=tmp_path)
            assert run.returncode == 0, run.stderr[-2000:]
        one, two = (metrics_of(tmp_path / "runs" / name, stage) for name in ("one", "two"))
        assert len(one) == len(two) == 20
        losses = {"tokenizer": ["mse"], "dynamics": ["dynamics"],
                  "agent": ["dynamics", "bc", "reward", "continue"]}[stage]
        worst = {k: max(abs(a[k] / b[k] - 1) for a, b in zip(one, two, strict=True))
                 for k in losses}
        print(stage, worst)
        assert max(worst.values()) < 1e-4 and one[0][losses[0]] != one[-1][losses[0]], worst
        shutil.copy(tmp_path / f"runs/one/{stage}.pt", tmp_path / f"runs/two/{stage}.pt")
    run = torchrun(2, REPO / "train.py", *flags, "--stage", "imagine", "--run", "one", cwd=tmp_path)
    assert run.returncode == 0 and "imagine runs on one process: 1 others leave" in run.stdout


def kill_child(folder, flags, how, n):
    """Runs in a process of its own. how: "half" dies in the middle of its checkpoint number n,
    "between" after the first of that write's two renames, "" runs until it is killed or done."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    count, whole, replace = [], torch.save, os.replace

    def half(state, file):
        count.append(file)
        if len(count) == n:
            content = io.BytesIO()
            whole(state, content)
            file.write(content.getvalue()[:len(content.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(state, file)

    def between(source, target):
        replace(source, target)
        count.append(target)
        if ".old" in str(target) and len(count) >= n:
            os.kill(os.getpid(), signal.SIGKILL)

    if how == "half":
        torch.save = half
    elif how == "between":
        os.replace = between
    train_quietly(folder, *flags)


@pytest.mark.slow
def test_killed_at_any_moment_every_stage_ends_the_same(finished, tmp_path):
    """Fails if SIGKILL (6 random moments, 2 in the middle of a checkpoint's bytes, 2 between its
    renames) costs one bit of the metrics or weights of any stage: 40 of 40 must be equal."""
    server, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    server.set_forkserver_preload(["test_all", "matplotlib.pyplot"])
    shutil.copytree(finished / "datasets", tmp_path / "datasets")
    equal = killed = resumed = 0

    def lines(run):
        path = run / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    for stage in STAGES:
        flags = ("--stage", stage, "--train.save_every", 1, "--train.log_every", 3,
                 f"--train.{stage}_steps", 20, "--run")
        kinds = [("", 0)] + [("", k) for k in range(6)] + [(how, rng.randint(2, 18)) for how in (
            "half", "half", "between", "between")]
        for trial, (how, n) in enumerate(kinds):
            name = f"{stage}{trial}"
            run = tmp_path / "runs" / name
            run.mkdir(parents=True)
            for file in (*FINALS[:STAGES.index(stage)], *FINALS[4:6] * (stage in STAGES[2:])):
                shutil.copy(finished / "runs/base" / file, run / file)
            child = server.Process(target=kill_child, args=(tmp_path, (*flags, name), how, n))
            child.start()
            if trial and not how:
                wait = rng.randint(0, 5)                # metrics.jsonl has a line every third step
                while child.is_alive() and lines(run) < wait:
                    time.sleep(0.001)
                time.sleep(rng.random() * (0.3 if wait else 2))
                child.kill()
            child.join()
            killed += trial > 0 and child.exitcode == -9
            resumed += trial > 0 and any(run.glob(f"{stage}.resume*.pt"))
            if trial:
                child = server.Process(target=kill_child, args=(tmp_path, (*flags, name), "", 0))
                child.start()
                child.join()
            assert child.exitcode == 0, (stage, trial, how, n)
            result = metrics_of(run, stage), torch.load(run / f"{stage}.pt", weights_only=True)
            if trial == 0:
                whole = result
            assert len(whole[0]) == 7                   # steps 3, 6, ..., 18 and 20
            equal += trial > 0 and whole[0] == result[0] and same_tensors(whole[1], result[1])
            print(stage, trial, how or "random", "equal so far", equal, "killed", killed, "with a "
                  "checkpoint", resumed, flush=True)
            if trial:
                shutil.rmtree(run)
    assert equal == 40 and killed >= 36 and resumed >= 24, (equal, killed, resumed)


@pytest.mark.slow
def test_a_really_full_disk_in_recording_latents_and_checkpoints(finished, tmp_path, monkeypatch,
                                                                 capsys):
    """Fails if a disk that fills up gives more than one line, damages what was written before, or
    can't be gone on from once there is room. Needs the right to mount a tmpfs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("can't mount a tmpfs here")
    usage = shutil.disk_usage

    def full(folder, room, *flags):
        """train.py with `room` bytes free on the disk -> its last line; frees the rest after."""
        filler = disk / "filler"
        filler.write_bytes(bytes(max(usage(disk).free - room, 0) // 4096 * 4096))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train_quietly(folder, *flags, cli=True)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and "Traceback" not in last, last
        assert "error: got" in last and ("space" in last.lower() or "written" in last), last
        assert not list(disk.rglob("*.tmp"))
        filler.unlink()
        return last

    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage("/"))     # else refused at once
        (disk / "runs").mkdir()
        first = "--run", "base", "--stage", "tokenizer", "--train.save_every", 1
        print(full(disk, 40_000, *first))                           # recording: about 13 kB each
        kept = sorted((disk / EPISODES).glob("episode*"))
        assert 1 <= len(kept) < 6 and all(len(data.open_episode(p, KeyEnv().spec)) for p in kept)
        before = kept[0].stat().st_mtime_ns
        train_quietly(disk, *first)
        assert kept[0].stat().st_mtime_ns == before
        assert (disk / EPISODES / "dataset.json").read_bytes() == (
            finished / EPISODES / "dataset.json").read_bytes()
        dynamics = "--run", "base", "--stage", "dynamics", "--train.save_every", 1
        print(full(disk, 4_096, *dynamics))                         # latents
        assert not (disk / "runs/base/latents.npy").exists()
        load_run(disk / "runs/base", "tokenizer")
        print(full(disk, 450_000, *dynamics))                       # the checkpoint, some steps in
        state = torch.load(disk / "runs/base/dynamics.resume.pt", weights_only=True)
        assert 1 <= state["step"] < 8 and np.load(disk / "runs/base/latents.npy").shape[0] > 0
        train_quietly(disk, *dynamics)
        a, b = (torch.load(x / "runs/base/dynamics.pt", weights_only=True)
                for x in (disk, finished))
        assert same_tensors(a, b)
    finally:
        subprocess.run(["umount", "-l", disk])
