"""Tests in the paper's order: CPU, offline, seeded. `pytest -m "not slow"` takes minutes.

A docstring says what the test fails on; each negative claim has a positive control beside it.
"""
import base64
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import imageio
import imageio.v3
import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # also where there is a GPU, and in every child process
signal.signal(signal.SIGINT, signal.default_int_handler)    # background jobs of a shell ignore it

import torch

import data
import play
import train
from agent import (STAGES, Agent, AgentConfig, Run, action_kl, action_log_prob, advantage_loss,
                   agent_losses, behavior_loss, freeze, imagination_losses,
                   imagine_rollout, lambda_returns, load_run, pmpo_loss, sample_action,
                   symexp_bins, targets_ahead, two_hot, two_hot_log_prob, two_hot_mean, value_loss)
from data import ActionSpec, EnvSpec, UserError, run_cli
from dynamics import (ActionEmbedding, Dream, Dynamics, DynamicsConfig, corrupt, dynamics_losses,
                      euler_sample, ramp_weight, sample_tau_d, shortcut_loss, x_prediction)
from tokenizer import (PIXEL_MEAN, PIXEL_STD, Attention, Cache, LossNormalizer, Tokenizer,
                       TokenizerConfig, Transformer, attend, mae_mask, patchify, reader_mask,
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
    episode, start, task = paint.sample(rng, 900, 6, relevant=True, ahead=(4, 10))
    ahead = [np.flatnonzero(paint.episode(i)["events"][:, t]) - a
             for i, a, t in zip(episode, start, task, strict=True)]
    assert all(((4 <= x) & (x <= 10)).any() for x in ahead)                     # even behind it
    only = {int(x[(1 <= x) & (x <= 10)][0]) for x in ahead if ((1 <= x) & (x <= 10)).sum() == 1}
    assert only == set(range(4, 11)) and (start + 6 == paint.lengths[episode]).any()
    for relevant in (True, False):
        assert set(paint.sample(rng, 50, 6, relevant, tasks=[1])[2]) == {1}
    few = data.Dataset(paint.path)                                              # task 0 is rare
    few.events = few.events[(few.events[:, 2] == 1) | (few.events[:, 0] < 2)]
    episode, start, task = few.sample(rng, 9000, 6, relevant=True, ahead=(1, 1))
    assert abs(task.mean() - 0.5) < 0.03 and (few.events[:, 2] == 0).mean() < 0.25
    there = {tuple(x) for x in few.events.tolist()
             if x[0] != 19 and 1 <= x[1] <= few.lengths[x[0]] - 5}
    assert {*zip(episode.tolist(), (start + 1).tolist(), task.tolist(), strict=True)} == there
    episode, start, task = paint.sample(rng, 300, 6)                            # control: uniform
    events = paint.read(episode, start, 6, ["events"])["events"][np.arange(300), :, task]
    assert not events[:, 1:].any(1).all()


def test_splits_are_disjoint(paint, tmp_path):
    """Fails if a validation episode is trained on, or a small dataset has no validation."""
    train, valid = paint.episodes("train"), paint.episodes("valid")
    assert valid.tolist() == [19] and sorted([*train, *valid]) == paint.episodes("all").tolist()
    small = data.record(PAINT, tmp_path / "small", 2, 5, 0, workers=1)
    assert (small.episodes("train").tolist(), small.episodes("valid").tolist()) == ([0], [1])
    for relevant in (False, True):
        draw = lambda relevant=relevant, **how: set(paint.sample(
            np.random.default_rng(0), 2000, 5, relevant, **how)[0].tolist())
        assert 19 not in draw() and draw(split="valid") == {19} and max(draw(first=5)) == 4


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
        for e, s in zip(single, seeds, strict=True):
            e.reset(s)
        first = env.reset()                                             # the same episodes again
        assert (first == [e.reset(s) for e, s in zip(single, seeds, strict=True)]).all()
        for _ in range(2):
            actions = env.spec.actions.sample(rng, 5)
            frames, events, terminal = env.step(actions)
            ones = [e.step({k: v[i] for k, v in actions.items()}) for i, e in enumerate(single)]
            assert (frames == [one[0] for one in ones]).all() and not terminal.any()
            assert (env.reset() == first).all()
            for e, s in zip(single, seeds, strict=True):
                e.reset(s)
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
    sizes = dict(height=8, width=12, patch=4, cell=2, dim=16, encoder_layers=3, decoder_layers=3,
                 heads=4, kv_heads=2, latents=4, channels=3, pack=2, context=3, time_every=3)
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
    got = layer.merge(attend(*layer.project(x, angles), mask, cfg.soft_cap), x.shape)[0, 0]

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


@pytest.mark.parametrize("layers, every, order", [(4, 4, "ssts"), (4, 2, "stst"), (4, 3, "stss"),
                                                  (6, 3, "stssts"), (8, 4, "sstsssts")])
def test_order_of_space_and_time_layers(layers, every, order):
    """Fails if time layers stand elsewhere: how well a dream moves depends on it (README)."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, time_every=every)
    assert "".join(block.kind[0] for block in Transformer(cfg, layers).blocks) == order


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


def test_a_short_past_has_a_short_ring():
    """Fails if a ring that grows loses, moves or invents a frame, doesn't grow up to the context
    alone, or a fork's, or that of rows replayed at a later start, differs."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, context=20, time_every=2)
    model, mask = randomize(Transformer(cfg, 2)), reader_mask(3, 1)
    x = torch.randn(2, 44, 4, 16, generator=torch.Generator().manual_seed(0))
    full = model(x, mask)
    for sizes in ([1] * 44, [15, 1, 1, 1, 12, 1, 13], [8, 5, 3, 1, 1, 1, 24, 1]):
        cache, out = Cache(20), []
        for part in x.split(sizes, 1):
            out.append(model(part, mask, cache))
            cache.advance(part.shape[1])
            length = cache.layers[1][0].shape[-3]
            assert length == min(20, 16 * math.ceil(cache.t / 16)), cache.t
            if cache.t < 44:
                twin = model(x[:, cache.t:cache.t + 1], mask, cache.fork(1))
                assert torch.allclose(twin, full[:, cache.t:cache.t + 1], atol=1e-5), cache.t
        assert torch.allclose(torch.cat(out, 1), full, atol=1e-5), sizes
    cache, late = Cache(20), Cache(20, 7)           # 7 frames later: rows that are replayed
    model(x[:, :18], mask, cache), cache.advance(18)
    model(x[:, 7:18], mask, late), late.advance(11)
    cache.copy_rows(torch.arange(2), late)
    alone = model(x[:, 7:19], mask)[:, -1:]
    late.start = cache.start = 7
    assert torch.allclose(model(x[:, 18:19], mask, cache), alone, atol=1e-5)


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
    norm = LossNormalizer(["a", "b"])
    assert abs(float(norm({"a": torch.tensor(4.0), "b": torch.tensor(0.1)})) - 2) < 1e-5
    # second call: mean square of a = 16 / 11 + 10 / 11 * 4
    x = torch.tensor(2.0, requires_grad=True)
    total = norm({"a": x}, {"a": 3.0})
    total.backward()
    assert abs(float(total) - 3 * 2 / math.sqrt(56 / 11)) < 1e-5
    assert abs(float(x.grad) - 3 / math.sqrt(56 / 11)) < 1e-5       # the RMS is detached


def test_loss_normalizer_forgets_a_start_at_once_and_noise_slowly():
    """Fails if its memory doesn't grow: a loss that fell from 5 to 0.01 weighs in full 50 steps
    later, but 3,000 steps on a single outlier hardly changes the divisor."""
    norm = LossNormalizer(["a"])
    late = [float(norm({"a": torch.tensor(5.0 if n < 10 else 0.01)})) for n in range(100)]
    assert max(late[10:20]) < 0.1 and late[60] > 0.9
    for _ in range(3000):
        norm({"a": torch.tensor(0.01)})
    assert 7 < float(norm({"a": torch.tensor(0.1)})) < 8           # 10 / sqrt(0.99 + 0.01 * 100)


def test_muon_steps_as_torchs_does():
    """Fails if matrices of one shape get each other's step or a common norm, a tall one is taken
    for a wide one, rate, momentum or decay differ, or ours can't go on from torch's state. Three
    steps, the third at another rate."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (8, 24), (8, 8), (24, 8), (4, 8)]
    start = [torch.randn(s, generator=generator) for s in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    steppers = train.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for lr in (0.02, 0.02, 0.005):
        grads = [torch.randn(s, generator=generator) * 10.0 ** i for i, s in enumerate(shapes)]
        if lr < 0.01:
            steppers[0].load_state_dict(steppers[1].state_dict())
            grads[0].zero_()
        for params, stepper in zip((ours, theirs), steppers, strict=True):
            for p, grad in zip(params, grads, strict=True):
                p.grad = None if p is params[-1] and lr < 0.01 else grad
            stepper.param_groups[0]["lr"] = lr
            stepper.step()
        for p, q, x in zip(ours, theirs, start, strict=True):
            assert torch.allclose(p, q, atol=1.5e-3) and not torch.allclose(p, x, atol=4e-3)


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


@pytest.mark.parametrize("own", [1, 2])
def test_latents_start_from_their_own_patch(own):
    """Fails if a latent is paired with another patch, or the way back differs."""
    model = tiny_tokenizer(latents=6 * own, pack=own)
    assert model.own == own
    assert tiny_tokenizer().own == tiny_tokenizer(latents=6, local=False).own == 0
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        for layer in (block.attention.out, block.down):             # nothing is read elsewhere
            layer.weight.data.zero_()
    for patch, (row, column) in enumerate(np.ndindex(2, 3)):
        x = torch.zeros(1, 1, 8, 12, 3)
        moved = x.clone()
        moved[:, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4] = 1
        change = (model.bottleneck(moved) - model.bottleneck(x)).abs().amax((0, 1, 3))
        assert change.nonzero()[:, 0].tolist() == list(range(patch * own, patch * own + own))
        z = torch.zeros(1, 1, 6 * own, 3)
        other = z.clone()
        other[:, :, patch * own] = 0.5
        change = (model.reconstruct(other) - model.reconstruct(z)).abs().amax((0, 1, 4)) > 0
        assert change[4 * row:4 * row + 4, 4 * column:4 * column + 4].all() and change.sum() == 16


def test_cells_are_read_and_drawn_where_they_are():
    """Fails if a cell's code lands in another place, or the cells of a patch share one code."""
    model = tiny_tokenizer(latents=6, pack=1)
    for linear in (model.patch_in, model.patch_out):                # the cells' way alone
        linear.weight.data.zero_()
    x = torch.zeros(1, 1, 8, 12, 3)
    codes = {}
    for row, column in np.ndindex(4, 6):                            # cells of 2 pixels
        moved = x.clone()
        moved[:, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2] = 1
        cells = moved.view(1, 1, 8, 12, 3)
        patches = patchify(cells, 4).view(1, 6, 4, 4, 3)
        code = model.read_cell(patchify(patches, 2))                # (1, 6, 4, 32)
        still = model.read_cell(patchify(torch.zeros_like(patches), 2))
        changed = (code - still).abs().amax(-1)[0].nonzero().tolist()
        assert changed == [[row // 2 * 3 + column // 2, row % 2 * 2 + column % 2]]
        codes[row, column] = code.amax((1, 2))
        change = (model.bottleneck(moved) - model.bottleneck(x)).abs().sum()
        assert change > 1e-3
    assert all(torch.allclose(c, codes[0, 0]) for c in codes.values())      # one reader for all
    model.codes_out.weight.data.zero_()
    model.codes_out.bias.data.zero_()
    drawn = []
    for place in range(4):                  # the code of one cell draws that cell of every patch
        model.codes_out.bias.data.zero_()
        before = model.reconstruct(torch.zeros(1, 1, 6, 3))
        model.codes_out.bias.data[32 * place:32 * place + 32] = 1
        change = (model.reconstruct(torch.zeros(1, 1, 6, 3)) - before).abs().amax(-1)[0, 0] > 0
        rows, columns = change.nonzero().T
        assert change.sum() == 24 and set((rows % 4 // 2).tolist()) == {place // 2}
        assert set((columns % 4 // 2).tolist()) == {place % 2}
        drawn.append(change)
    assert torch.stack(drawn).sum(0).eq(1).all()
    assert not hasattr(tiny_tokenizer(cell=0), "read_cell")


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
    rows = embed.categorical.weight
    want = (rows[key[0]] + rows[2 + key[1]] + rows[4 + a] + rows[7 + b]
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


@pytest.mark.parametrize("changes, told", [({}, 1 / 2), ({"d_label": "min"}, 1 / 8),
                                           ({"p_boot": 0.0}, 1 / 8)])
def test_sampling_tells_the_step_size_that_was_asked_for(changes, told):
    """Fails if diffusion forcing, which knows the finest step alone, or d_label "min" is told
    another one, or a shortcut model is not told its own."""
    z, actions, labelled = play_inputs(2, 1)
    model, seen = tiny_dynamics(k=2, **changes), []
    dream = Dream(model, torch.Generator().manual_seed(0))
    model.register_forward_hook(lambda _, inputs, out: seen.append((inputs[1], inputs[2])))
    dream.imagine(actions, labelled)
    assert [float(tau[0, 0]) for tau, _ in seen] == [0, 1 / 2]
    assert all((d == told).all() for _, d in seen)


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
    """Fails if rows outside the dynamics loss leak gradient into it, known frames are not at
    tau_ctx and d_min, or the bootstrap rows are not the first ones."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(6, 4)
    seen = []
    handle = model.register_forward_hook(lambda m, args, out: seen.append(args))
    z.requires_grad_(True)
    losses, h, metrics = dynamics_losses(model, z, actions, labelled, 2,
                                         torch.Generator().manual_seed(0), 4,
                                         torch.zeros(6, 4, dtype=torch.long),
                                         known=(torch.arange(6) >= 4)[:, None])
    handle.remove()
    losses["dynamics"].backward()
    assert z.grad[4:].abs().max() == 0 and z.grad[:4].abs().amax((1, 2, 3)).min() > 0
    assert (seen[0][1][4:] == model.tau_ctx).all() and len(seen) == 3
    assert [len(args[0]) for args in seen] == [6, 2, 2] and h.shape == (6, 4, 16)
    assert (seen[0][2][2:] == model.d_min).all()
    seen.clear()                        # the literal paper: bootstrap in all rows
    handle = model.register_forward_hook(lambda m, args, out: seen.append(args))
    dynamics_losses(model, z, actions, labelled, 6, torch.Generator().manual_seed(0),
                    known=(torch.arange(6) >= 2)[:, None])
    handle.remove()
    tau, d = seen[0][1:3]
    assert (d[2:] == model.d_min).all() and (tau[2:] == model.tau_ctx).all()
    assert (d[:2] > model.d_min).any()


def test_rows_as_in_a_dream_show_a_known_past_and_draw_from_nothing(monkeypatch):
    """Fails if in a row with drawn frames any of those is shown more than noise (in a row with
    bootstrap: not at its own level and step), any known frame not at the level of committed ones,
    an error there is weighed by the ramp, or a row without drawn frames changes."""
    model, seen = tiny_dynamics(), []
    drawn = torch.zeros(6, 4, dtype=torch.bool)
    drawn[1, 2:] = drawn[3, 1] = drawn[5, 2:] = True
    known = drawn.any(1, keepdim=True) & ~drawn
    run = lambda *how: dynamics_losses(model, *play_inputs(6, 4), 2,
                                       torch.Generator().manual_seed(9), None, None, None, *how)
    handle = model.register_forward_hook(lambda m, args, out: seen.append(args))
    run(), run(known, drawn)
    handle.remove()
    (z, tau, d), (z_drawn, tau_drawn, d_drawn) = (args[:3] for args in (seen[0], seen[3]))
    rows, others, boot = torch.tensor([3, 5]), torch.tensor([0, 2, 4]), 1
    assert (d_drawn[rows] == model.d_min).all()
    assert torch.equal(tau_drawn[rows], torch.where(drawn[rows], 0.0, model.tau_ctx))
    assert torch.equal(tau_drawn[others], tau[others]) and torch.equal(d_drawn[others], d[others])
    assert torch.equal(z_drawn[others], z[others]) and not torch.equal(z_drawn[rows], z[rows])
    assert (tau_drawn[boot, :2] == model.tau_ctx).all() and (d_drawn[boot, :2] == model.d_min).all()
    assert torch.equal(tau_drawn[boot, 2:], tau[boot, 2:]) and tau[boot, 2:].any()
    assert torch.equal(d_drawn[boot, 2:], d[boot, 2:])
    fine = d[boot, 2:] == model.d_min
    assert fine.sum() == 1 and tau[boot, 2:][fine] > 0          # of either kind
    generator = torch.Generator().manual_seed(9)
    sample_tau_d(6, 4, model.cfg.k_max, 2, generator)
    noise = torch.randn(z.shape, generator=generator)
    assert torch.equal(z_drawn[rows][drawn[rows]], noise[rows][drawn[rows]])   # nothing is left
    monkeypatch.setattr("dynamics.shortcut_loss", lambda f, z, *_: torch.ones(z.shape[:2]))
    weights = torch.where(drawn.any(1, keepdim=True), 1.0, 0.9 * tau + 0.1)
    assert torch.isclose(run(known, drawn)[0]["dynamics"], weights.mean())


def test_errors_are_told_apart_by_signal_level_and_step_size(monkeypatch):
    """Fails if a coarse frame counts among the fine ones, a level falls into another quarter, the
    ramp is left out, or an empty bin is not nan. Errors and levels are given, means by hand."""
    tau = torch.tensor([[0, .5, .75, 0], [0, .25, .25, .75]])
    d = torch.tensor([[1, .5, .25, .5], [.25] * 4])
    errors = iter([torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[10.0, 20, 30, 40]])])
    monkeypatch.setattr("dynamics.sample_tau_d", lambda *_: (tau, d))
    monkeypatch.setattr("dynamics.shortcut_loss", lambda *_: next(errors))
    model = tiny_dynamics(k_max=4, k=4, tau_ctx=0.75)
    losses, _, metrics = dynamics_losses(model, *play_inputs(2, 4), 1, torch.Generator())
    weighted = torch.tensor([.1, 1.1, 2.325, .4, 1, 6.5, 9.75, 31])
    expected = {"flow": weighted[[2, 4, 5, 6, 7]].mean(), "boot": weighted[[0, 1, 3]].mean(),
                "x_error_tau0": 10, "x_error_tau1": 25, "x_error_tau2": math.nan,
                "x_error_tau3": 21.5, "boot_error_d1": 1, "boot_error_d2": 3}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(metrics[name], value, rel_tol=1e-5) or math.isnan(
            metrics[name]) and math.isnan(value), name
    assert math.isclose(losses["dynamics"], weighted.mean(), rel_tol=1e-5)


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
    return randomize(Agent(AgentConfig(**dict(hidden=16, mtp=2, bins=31) | changes), 16, spec, 3))


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
    model, agent = tiny_dynamics(), Agent(AgentConfig(hidden=32, mtp=1, bins=31), 16, spec, 3)
    parameters = [*model.parameters(), *agent.parameters()]
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], 1e-2)
    nlls, copies = [], []
    for step in range(120):
        z, actions, labelled = play_inputs(32, 6, seed=step)
        task = torch.zeros(32, 6, dtype=torch.long)
        _, h = model(z, *levels(32, 6, 0.875), actions, labelled, task)
        losses, metrics = agent_losses(agent, h, actions, labelled, task, torch.zeros(32, 6, 3),
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


def spread_out(x, bins):
    """The two-hot weights of x as a row over all bins."""
    index, weight = two_hot(torch.as_tensor(x), bins)
    return torch.zeros(*index.shape[:-1], len(bins)).scatter(-1, index, weight)


def test_agent_losses_respect_rows_and_labels():
    """Fails if BC counts rows that are not relevant or unlabelled actions, reward and continue
    losses skip rows, or an event counts for the reward of another task."""
    agent = tiny_agent()
    h = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    _, actions, labelled = play_inputs(3, 5)
    labelled[2, 3] = False
    relevant = torch.tensor([False, True, True])
    events, continues, task = torch.zeros(3, 5, 3), torch.ones(3, 5), torch.ones(3, 5).long()
    call = lambda a, e, c: agent_losses(agent, h, a, labelled, task, e, c, relevant)[0]
    base = call(actions, events, continues)

    def with_action(row, t):
        other = {k: x.clone() for k, x in actions.items()}
        other["categorical"][row, t] = (other["categorical"][row, t] + 1) % 5
        return float(call(other, events, continues)["bc"] - base["bc"])

    assert with_action(0, 2) == 0 and with_action(2, 3) == 0 and with_action(1, 0) == 0
    assert with_action(1, 2) != 0 and with_action(2, 2) != 0
    for row in range(3):
        for k in range(3):
            changed = events.clone()
            changed[row, 2, k] = 1
            losses = call(actions, changed, continues)
            assert (losses["reward"] != base["reward"]) == (k == 1)
            logits = agent.reward(h + agent.question.weight[k])[row, 2, 0].log_softmax(-1)
            gain = spread_out(0.0, agent.bins) - spread_out(1.0, agent.bins)
            assert torch.allclose(losses["events"] - base["events"], gain @ logits / 45, atol=1e-5)
        changed = continues.clone()
        changed[row, 4] = 0
        assert call(actions, events, changed)["continue"] != base["continue"]


def test_two_hot_round_trip():
    """Fails if the bins are reversed, the weights swapped, or the ends wrap around."""
    bins = symexp_bins(255)
    x = torch.tensor([-1e9, -30.0, -1.0, -0.3, 0.0, 1e-3, 0.5, 1.0, 7.7, 1e9])
    weights = spread_out(x, bins)
    assert torch.allclose(weights.sum(-1), torch.ones(10)) and (weights >= 0).all()
    assert ((weights > 0).sum(-1) <= 2).all()
    assert torch.allclose((weights * bins).sum(-1)[1:-1], x[1:-1], rtol=1e-4, atol=1e-5)
    assert weights[0, 0] == 1 and weights[-1, -1] == 1
    used = weights[6].nonzero().flatten()
    assert used.tolist() == [int((bins <= 0.5).sum()) - 1, int((bins <= 0.5).sum())]
    logits = torch.log(spread_out([0.37], bins).clamp_min(1e-30))
    assert abs(float(two_hot_mean(logits, bins)) - 0.37) < 1e-4
    best = two_hot_log_prob(logits, torch.tensor([0.37]), bins)
    assert best > two_hot_log_prob(logits, torch.tensor([1.5]), bins)
    logits = torch.randn(10, 255, generator=torch.Generator().manual_seed(0))
    want = (logits.log_softmax(-1) * weights).sum(-1)
    assert torch.allclose(two_hot_log_prob(logits, x, bins), want, atol=1e-5)


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
    agent = tiny_agent(gamma=0.0, once=False, terminal_weight=1.0)
    agent.continue_prob = lambda h: torch.ones(h.shape[:-1])
    h = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    chosen = {"categorical": torch.randint(5, (64, 5, 1), generator=generator),
              "binary": torch.zeros(64, 5, 0)}
    rewards = torch.zeros(64, 6)
    rewards[:, 1:] = (chosen["categorical"][..., 0] == 3).float()
    agent.rewards, agent.values = (lambda *_: rewards), (lambda _: torch.full((64, 6), 0.5))
    logits = torch.zeros(64, 5, 1, 5, requires_grad=True)
    agent.policy.forward = lambda *_: logits
    losses, metrics = imagination_losses(agent, h, chosen, torch.zeros(64, dtype=torch.long))
    losses["policy"].backward()
    taken = logits.grad[:, :, 0].gather(-1, chosen["categorical"])[..., 0]
    assert (taken[rewards[:, 1:] == 1] < 0).all() and (taken[rewards[:, 1:] == 0] > 0).all()


def test_a_prompt_is_over_with_its_event():
    """Fails if a return goes on behind the event of its task, or the frames behind it teach: the
    event comes on reaching frame 2 of 5, and again at 4; deaths end a rollout in the same way."""
    agent = tiny_agent(gamma=1.0, lam=1.0)
    h = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    chosen = {"categorical": torch.zeros(2, 5, 1, dtype=torch.long),
              "binary": torch.zeros(2, 5, 0)}
    rewards, alive = torch.zeros(2, 6), torch.ones(2, 6)
    rewards[0, [2, 4]], alive[1, 3] = 1, 0
    agent.rewards, agent.values = (lambda *_: rewards), (lambda _: torch.full((2, 6), 0.25))
    agent.continue_prob = lambda _: alive
    logits = torch.zeros(2, 5, 1, 5, requires_grad=True)
    agent.policy.forward, targets = (lambda *_: logits), []
    agent.value.forward = lambda h: torch.zeros(*h.shape[:2], 1, 31, requires_grad=True)
    imagination_losses(agent, h, chosen, torch.zeros(2).long())[0]["policy"].backward()
    taken = logits.grad[:, :, 0, 0]
    assert (taken[0, :2] < 0).all() and (taken[1, :3] > 0).all()        # R = 1 and 0 against 1/4
    assert not taken[0, 2:].any() and not taken[1, 3:].any()
    agent.cfg.once = False
    logits.grad = None
    imagination_losses(agent, h, chosen, torch.zeros(2).long())[0]["policy"].backward()
    assert (logits.grad[0, :, 0, 0] != 0).all()


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
    task = torch.zeros(4, dtype=torch.long)
    losses, metrics = imagination_losses(agent, h, chosen, task)
    pi, prior = (head(h[:, :-1])[:, :, 0].detach() for head in (agent.policy, agent.prior))
    kls = [float(action_kl(agent.spec, *pair).mean()) for pair in ((pi, prior), (prior, pi))]
    assert abs(float(metrics["kl_prior"]) - kls[0]) < 1e-5 < abs(kls[0] - kls[1]) / 100
    (losses["policy"] + losses["value"]).backward()
    touched = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None}
    assert touched == {"policy", "value"}
    agent.zero_grad()                   # subtle: autocast once kept bf16 weights without gradients
    with torch.autocast("cpu", torch.bfloat16):
        agent.policy(h), agent.value(h)
        with torch.no_grad():
            agent.values(h), agent.policy(h)
        sum(imagination_losses(agent, h, chosen, task)[0].values()).backward()
    heads = [*agent.policy.named_parameters(), *agent.value.named_parameters()]
    assert all(p.grad.abs().sum() > 0 for _, p in heads)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    agent.freeze_prior()
    assert abs(float(imagination_losses(agent, h, chosen, task)[1]["kl_prior"])) < 1e-6


def imagine_with(kind=None, C=3, horizon=6, **changes):
    """h, actions and latents of a rollout with one seed."""
    model, agent = tiny_dynamics(), tiny_agent(**changes)
    z, actions, labelled = play_inputs(4, C)
    return imagine_rollout(model, agent, z, actions, labelled,
                           torch.ones(4, C, dtype=torch.long), horizon,
                           torch.Generator().manual_seed(1), kind)     # not the seed of z


def test_a_rollout_with_the_cache_equals_one_without():
    """Fails if K passes and the commit pass leave traces in the cache, or the denoising passes
    change what a frame sees: against whole windows each time.
    (tiny_dynamics has one time layer: with more, a window's first frames would differ.)"""
    h, chosen, frames = imagine_with()
    again = imagine_with(play.Recomputed)
    assert torch.equal(chosen["categorical"], again[1]["categorical"])
    assert torch.allclose(h, again[0], atol=1e-4) and torch.allclose(frames, again[2], atol=1e-4)
    other = imagine_with(play.Recomputed, corrupt=False)            # control: noise matters
    assert (other[0] - h).abs().max() > 1e-3


def test_ablations_of_imagination_change_what_they_name():
    """Fails if h of the last denoising pass is that of the commit pass, changes the frames as long
    as the actions are the same, or context without noise is noisy, here or in a rollout."""
    h, chosen, frames = imagine_with(horizon=1)
    other, same, image = imagine_with(horizon=1, h_pass="denoise")
    assert torch.equal(chosen["categorical"], same["categorical"])
    assert torch.allclose(frames, image, atol=1e-5) and torch.equal(h[:, 0], other[:, 0])
    assert (h[:, 1] - other[:, 1]).abs().max() > 1e-3
    z, actions, labelled = play_inputs(4, 3)
    task, hs = torch.ones(4, 3, dtype=torch.long), []
    for seed in (0, 1):
        dream = Dream(tiny_dynamics(), torch.Generator().manual_seed(seed))
        dream.corrupt = False
        hs.append(dream.commit(z, actions, labelled, task))
    assert torch.equal(*hs)
    assert torch.equal(imagine_with(horizon=1, corrupt=False)[0][:, 0], hs[0][:, -1])


@pytest.mark.parametrize("k, finest, label", [
    (1, False, "own"), (4, False, "own"), (1, True, "own"), (4, True, "own"), (4, False, "min")])
def test_practice_may_take_other_sampling_steps(k, finest, label):
    """Fails if agent.k is not the number of sampling steps of imagined frames, or 0 is not the
    dynamics' own; if agent.finest doesn't tell them the finest step, or undoes the dynamics'."""
    z, actions, labelled = play_inputs(4, 3)
    task, model = torch.ones(4, 3, dtype=torch.long), tiny_dynamics(d_label=label)
    assert model.cfg.k == 4
    calls, forward = [], model.forward
    model.forward = lambda *args, **kw: calls.append(args[2].flatten()[0].item()) or forward(
        *args, **kw)
    imagine_rollout(model, tiny_agent(k=k, finest=finest), z, actions, labelled, task, 1,
                    torch.Generator().manual_seed(1))
    told = 1 / 8 if finest or label == "min" else 1 / k
    assert calls == [1 / 8] + k * [told] + [1 / 8]                  # context, k steps, commit
    h, same = imagine_with(k=k, finest=finest)[0], imagine_with(k=0, finest=False)[0]
    assert torch.equal(h, same) == (k == 4 and not finest)


def test_practice_may_start_from_a_colder_policy():
    """Fails if agent.sharpen is not the temperature of `act`, warms, or reaches but one of policy
    and prior, or other heads."""
    warm, cold = tiny_agent(), tiny_agent()
    cold.load_state_dict(warm.state_dict())
    cold.sharpen(0.5)
    h, draw = torch.randn(50, 16), lambda: torch.Generator().manual_seed(2)
    want = warm.act(h, draw(), 0.5)["categorical"]
    assert torch.equal(cold.act(h, draw())["categorical"], want)
    assert not torch.equal(warm.act(h, draw())["categorical"], want)        # control
    assert torch.allclose(cold.prior(h), 2 * warm.prior(h), atol=1e-6)
    assert torch.equal(cold.reward(h), warm.reward(h))
    assert torch.equal(cold.value(h), warm.value(h))


def test_advantage_objective_against_a_loop():
    """Fails if the ablation loses the sign, the size or the scale of the advantage, or the KL."""
    generator = torch.Generator().manual_seed(0)
    log_prob, advantages, returns, kl = torch.randn(4, 3, 5, generator=generator)
    got = advantage_loss(log_prob, advantages, returns, kl, 0.3)
    spread = np.percentile(returns, 95) - np.percentile(returns, 5)
    want = np.mean([-float(p * a) / spread + 0.3 * float(k) for p, a, k in
                    zip(log_prob.flatten(), advantages.flatten(), kl.flatten(), strict=True)])
    assert abs(float(got) - want) < 1e-5


def test_temperature_sharpens_the_policy():
    """Fails if the temperature multiplies, or reaches the keys or the categories alone."""
    agent, h = tiny_agent(ActionSpec(2, (5,))), torch.randn(1, 16).expand(4000, -1)
    logits = agent.policy(h[:1])[0, 0]
    draw = lambda t: agent.act(h, torch.Generator().manual_seed(0), t)
    for t in (0.5, 1.0, 2.0):
        keys, choice = draw(t)["binary"].float().mean(0), draw(t)["categorical"][:, 0]
        assert (keys - (logits[:2] / t).sigmoid()).abs().max() < 0.03
        assert (torch.bincount(choice, minlength=5) / 4000
                - (logits[2:] / t).softmax(0)).abs().max() < 0.03


def test_continue_probability_is_calibrated():
    """Fails if the weight of the rare class is not undone: trained with weight w on a coin that
    ends 1 time in 10, the head must answer 0.9."""
    torch.manual_seed(0)
    agent = Agent(AgentConfig(hidden=8, mtp=0, bins=5, terminal_weight=20.0), 16,
                  ActionSpec(categorical=(2,)), 0)
    continues = torch.ones(10, 10)
    continues[:, 0] = 0
    h, optimizer = torch.ones(10, 10, 16), torch.optim.Adam(agent.continues.parameters(), 1e-2)
    _, actions, labelled = play_inputs(10, 10, ActionSpec(categorical=(2,)))
    for _ in range(300):
        optimizer.zero_grad()
        agent_losses(agent, h, actions, labelled, torch.zeros(10, 10, dtype=torch.long),
                     torch.zeros(10, 10, 0), continues,
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


class OpenEnv(KeyEnv):
    """KeyEnv that holds what can't be copied, once it is played."""

    def reset(self, seed):
        self.file = open(os.devnull)
        return super().reset(seed)


class BusyEnv(KeyEnv):
    """KeyEnv whose frames are as different as can be: noise by seed, step and action."""

    def paint(self, action):
        rng = np.random.default_rng([self.seed, self.steps, *action["binary"],
                                     *action["categorical"]])
        return np.full((8, 12, 3), rng.integers(0, 256, 3), np.uint8)


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


def test_comparison_of_agents_against_known_values(tmp_path):
    """Fails if an interval, the exact McNemar test or Holm's correction is wrong, runs are pooled
    as if they were independent, a time forgets the episodes that never got there, or a chart is
    drawn of no agent."""
    value, low, high, p = play.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert value == 3 and abs(high - 3 - 2.776 * 1.5811 / 5 ** 0.5) < 1e-3 and low == 6 - high
    assert abs(p - 0.01324) < 1e-4 and abs(play.t_interval([0.0, 1.0])[2] - 0.5 - 6.353) < 1e-3
    a = np.array([1] * 9 + [0] * 1 + [1] * 5, bool)
    b = np.array([0] * 9 + [1] * 1 + [1] * 5, bool)
    assert abs(play.mcnemar(a, b) - 2 * (1 + 10) / 2 ** 10) < 1e-12
    assert play.mcnemar(a, a) == 1.0
    assert np.allclose(play.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    spec, inf = KeyEnv().spec, np.inf
    # 2 runs, 2 worlds, 2 tasks and death
    bc = np.array([[[3, inf, inf], [inf, inf, 8]], [[5, inf, 9], [7, inf, inf]]])
    rl = np.array([[[2, inf, inf], [4, 8, inf]], [[1, 9, inf], [3, inf, inf]]])
    got = play.agent_entries(spec, {"bc": bc, "rl": rl, "rlcool": bc + 1, "cool": bc,
                                    "random": bc[:1] * inf}, 10)
    named = {k: {"value": entry[0]} for k, entry in got.items()}
    assert play.agents_in(named, spec) == ["random", "bc", "rlcool", "cool", "rl"]
    shown = {k: dict(zip(("value", "low", "high"), entry[:3])) for k, entry in got.items()}
    for name, known in (("full", shown), ("none", {"ladder_rl_minus_bc": shown["ladder_bc"]})):
        play.picture_rungs(tmp_path / f"{name}.png", spec, known, "success")
    assert [path.stem for path in tmp_path.iterdir()] == ["full"]
    assert got["ladder_rlcool_minus_bc"][0] == 0 and "ladder_rl_minus_rlcool" not in got
    assert got["ladder_bc"][0] == 0.75 and got["ladder_rl"][0] == 1.5
    assert got["life_bc"][0] == (10 + 8 + 9 + 10) / 4 and got["life_rl"][0] == 10
    assert got["ladder_rl_minus_bc"][0] == 0.75 and got["ladder_rl_run0"][0] == 1.5
    half = 12.71 * np.std([1.0, 0.5], ddof=1) / 2 ** 0.5
    assert abs(got["ladder_rl_minus_bc"][2] - 0.75 - half) < 2e-3
    assert got["ladder_rl_over_bc"][0] == 2.0 and got["ladder_rl_minus_random"][0] == 1.5
    assert got["time_bc_four"][0] == (3 + 10 + 5 + 7) / 4
    assert got["time_rl_minus_bc_four"][0] == (2 + 4 + 1 + 3) / 4 - 25 / 4
    assert "time_rl_minus_bc_both_keys" not in got                  # BC never gets there
    assert got["success_bc_four"][0] == 0.75
    assert abs(got["p_rl_bc_four"][0] - 1.0) < 1e-3                 # runs: +1/2, 0: p 1/2, twice
    always = np.ones((5, 20, 3))                        # runs gain 4, 6, 2, 5, 3 of 20 worlds
    less = always.copy()
    less[..., 0][np.arange(20) < np.array([4, 6, 2, 5, 3])[:, None]] = inf
    many = play.agent_entries(spec, {"bc": less, "rl": always}, 10)
    assert abs(many["p_rl_bc_four"][0] - 2 * 0.00481) < 1e-4        # t = 5.657; worlds not pooled
    runs = play.t_interval([0.8, 0.7, 0.9, 0.75, 0.85])             # the wider interval of the two
    assert abs(many["success_bc_four"][1] - runs[1]) < 1e-9 and runs[1] < play.wilson(80, 100)[0]
    assert many["success_rl_four"][1:3] == (play.wilson(100, 100)[0], 1.0)
    one = play.agent_entries(spec, {"bc": bc[:1], "rl": rl[:1]}, 10)
    assert one["p_rl_bc_four"][0] == 1.0 and one["success_bc_four"][1:3] == play.wilson(1, 2)
    assert "ladder_rl_minus_bc" not in play.agent_entries(
        spec, {"rl": np.concatenate([rl, rl]), "bc": np.concatenate([bc, bc[:1]])}, 10)


def test_pictured_prompts_are_those_of_the_ladder(monkeypatch, tmp_path):
    """Fails if the picture of imagined rollouts shows prompts that are not practised, or can't be
    drawn where the ladder's events come too early to imagine what leads to them."""
    run, real, drawn = key_run(), data.Dataset.sample, []
    dataset = data.record(KEYS, tmp_path / "set", 5, 30, 0, workers=1)

    def sample(self, *how):
        drawn.append(real(self, *how))
        return drawn[-1]

    monkeypatch.setattr(data.Dataset, "sample", sample)
    for ladder in (((run.spec.tasks[1], 0),), ()):
        run.spec = replace(run.spec, ladder=ladder)
        play.picture_imagined(run, dataset, tmp_path / "imagined.png", 4, "fp32")
    assert [set(task.tolist()) for _, _, task in drawn] == [{1}, {0, 1}]
    dataset.events = np.array([[0, 1, 1], [0, 20, 0]])              # task 1 happens in frame 1
    dataset.showing.cache_clear()
    run.spec = replace(run.spec, ladder=((run.spec.tasks[1], 0),))
    play.picture_imagined(run, dataset, tmp_path / "imagined.png", 4, "fp32")
    assert set(drawn[-1][2].tolist()) == {1}


def test_heads_are_judged_frame_by_frame(monkeypatch, tmp_path):
    """Fails if predictions are compared with another frame's or task's events, or precision and
    recall are swapped. A stub head claims task 0 wherever the picture shows category 4."""
    run, real = key_run(), Dream.commit

    def commit(self, z, actions, labelled, task):
        h = real(self, z, actions, labelled, task)
        h[..., 0] = (task == 0) & (actions["categorical"][..., 0] == 4) & labelled
        h[..., 1] = (task == 1) & (actions["categorical"][..., 0] == 4) & labelled
        return h

    monkeypatch.setattr(Dream, "commit", commit)
    run.agent.rewards = lambda h, task: torch.where(task == 0, h[..., 0], h[..., 1])
    run.agent.continue_prob = lambda h: torch.full(h.shape[:2], 0.25)
    dataset = data.record(KEYS, tmp_path / "set", 5, 30, 0, workers=1)
    got = play.evaluate_heads(run, dataset, "fp32", chunk=7)
    true = np.concatenate([dataset.episode(i)["events"] for i in range(5)]) > 0
    ends = sum(int((dataset.episode(i)["continues"] == 0).sum()) for i in range(5))
    assert got["reward_recall_four"][0] == got["reward_precision_four"][0] == 1.0
    both = true.all(1).sum()
    assert got["reward_precision_both_keys"][0] == both / true[:, 0].sum()
    assert got["reward_recall_both_keys"][0] == both / true[:, 1].sum()
    run.agent.rewards = lambda h, task: h[..., 0]                   # the prompt is that task's
    alone = play.evaluate_heads(run, dataset, "fp32")
    assert alone["reward_recall_four"][0] == 1 and alone["reward_recall_both_keys"][0] == 0
    assert got["continue_at_terminals"][0] == 0.25 and got["continue_at_terminals"][3] == ends > 0


def test_imagined_successes_are_checked_in_the_simulator(monkeypatch, tmp_path):
    """Fails if the simulator takes other actions than the dream, from another frame or world, or
    counts another task. A stub policy plays 4, the event of the first prompt, from the third
    step on; a stub head says so in the dream alone; worlds divisible by 3 end at 12."""
    run, real = key_run(), Dream.commit
    run.agent.cfg = replace(run.agent.cfg, context=3, horizon=5)

    def commit(self, z, actions, labelled, task):
        h = real(self, z, actions, labelled, task)
        return torch.where((actions["categorical"] == 4) & (h.shape[1] == 1), 1.0, h.clamp(max=0.4))

    count = iter(range(1000))
    monkeypatch.setattr(Dream, "commit", commit)
    run.agent.act = lambda h, generator: {
        "binary": torch.zeros(len(h), 2, dtype=torch.long),
        "categorical": torch.full((len(h), 1), 4 if next(count) % 5 > 1 else 3)}
    run.agent.rewards = lambda h, task: h[..., 0] * (task == 0)
    dataset = data.record(KEYS, tmp_path / "set", 6, 13, 0, workers=1)
    got = play.evaluate_imagination({"rl": run}, dataset, "fp32", per_episode=6)
    prompts = play.ladder_prompts(dataset)
    first = np.array([prompts[dataset.offsets[i] + t] == 0 for i in range(6) for t in range(2, 8)])
    assert 0 < first.sum() < 36 and got["imagination_rl_imagined"][0] == first.mean()
    assert got["imagination_rl_true"][0] == first.mean() and got["imagination_rl_seen"][0] == 0
    assert got["imagination_rl_precision"][0] == 1.0
    clips, actions = play.reference_clips(dataset, 3, 8, "cpu")     # control: as it was recorded
    films, events = play.play_on(dataset, *clips["where"], 3, actions)
    assert np.array_equal(films, clips["frames"][:, 3:])
    assert np.array_equal(events, clips["events"][:, 3:])


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
    actor = play.Actor(run, torch.Generator())
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


def test_evaluation_plays_the_sampled_policy(tmp_path, monkeypatch):
    """Fails if events, first times or the mapping of actions to environments are shifted, or the
    film goes on after its world's end."""
    with data.VecEnv(KEYS, range(1, 5), workers=1) as worlds:
        first = play.evaluate_agent(worlds, 40)
    assert first.shape == (4, 3) and np.isfinite(first[:, :2]).all() and first.min() >= 1
    assert first[:, 2].tolist() == [np.inf, np.inf, 12, np.inf]         # seeds divisible by 3 end
    run = key_run()
    for parameter in run.agent.policy.parameters():
        parameter.data.zero_()
    logits = torch.full((3, 7), -30.0)
    logits[:, [0, 1, 6]] = 30.0                                     # both keys, category 4
    run.agent.policy.out.bias.data = logits.flatten()
    with data.VecEnv(KEYS, range(1, 4), workers=1) as worlds:
        first = play.evaluate_agent(worlds, 6, run, gif=tmp_path / "x.gif")
    assert (first[:, 1] == 1).all() and (first[:, 0] == 1).sum() in (0, 3)
    assert (tmp_path / "x.gif").stat().st_size > 0
    films = []
    monkeypatch.setattr(play, "write_film", lambda path, frames: films.append(len(frames)))
    with data.VecEnv(KEYS, (3, 4), workers=1) as worlds:            # the first ends at 12
        play.evaluate_agent(worlds, 40, gif="y.gif")
    assert films == [13]
    assert play.ladder_scores(run.spec, first).tolist() == np.isfinite(first[:, :2]).sum(1).tolist()


def test_the_dead_are_left_out_and_the_others_play_on(monkeypatch):
    """Fails if, once some worlds have ended, the others' frames, prompts, caches or actions get
    mixed up: each must play as it does alone (no noise, a policy without chance)."""
    monkeypatch.setattr(Dream, "noise", lambda self, B, T: torch.zeros(B, T, 2, 6))
    run, seen, middle = key_run(), [], []

    def act(h, *_):
        middle.append(h.mean(0))
        h = h - middle[0]                                               # what tells worlds apart
        return {"binary": (h[:, :2] > 0).byte(), "continuous": h[:, :0],
                "categorical": h[:, 2:7].argmax(-1, keepdim=True)}

    run.agent.act = act
    real = data.VecEnv.step
    monkeypatch.setattr(data.VecEnv, "step",
                        lambda self, a: seen.append(deepcopy(a)) or real(self, a))

    def play_in(*seeds):
        seen.clear()
        with data.VecEnv(f"{__name__}:BusyEnv", seeds, workers=1) as worlds:
            first = play.evaluate_agent(worlds, 30, run, "fp32")
        return first, np.stack([np.concatenate([a["binary"], a["categorical"]], 1) for a in seen])

    seeds, observed = (3, 200, 30, 100, 6, 250), []
    observe = play.Actor.observe
    monkeypatch.setattr(play.Actor, "observe", lambda self, frames, *rest:
                        observed.append(len(frames)) or observe(self, frames, *rest))
    first, actions = play_in(*seeds)
    assert set(observed[:12]) == {6} and set(observed[12:]) == {3}
    assert len({actions[:12, i].tobytes() for i in range(6)}) > 3       # control: they differ
    for i in (1, 5):
        alone, chosen = play_in(seeds[i])
        assert (alone[0] == first[i]).all() and (chosen[:, 0] == actions[:, i]).all()


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


# ------------------------------------------------------------- play.py: what a world model knows

def player_film(steps=60, seed=3, skill="skilled"):
    """Real play: frames (T, 72, 72, 3), actions (T, 1) and probes (T, ...)."""
    frames, actions, *_, probes = data.play_episode(data.Crafter(), seed, 0, steps, skill)
    return np.stack(frames), np.array(actions["categorical"]), {k: np.stack(x)
                                                                 for k, x in probes.items()}


def at(probes, t):
    return {k: x[t:t + 1] for k, x in probes.items()}


def test_reader_reads_real_frames():
    """Fails if cells are transposed, a texture is missing, or the light is not Crafter's."""
    frames, _, probes = player_film(150)
    light, asleep = probes["probe_player"][:, 0] / 255, probes["probe_player"][:, 1] > 0
    reader = data.CrafterReader()
    cells, items, error = reader.read(frames, light, asleep)
    day = (light >= 0.5) & ~asleep
    assert day.sum() > 100 and light[day].min() < 0.7 < light.max()  # dusk is in it too
    assert (reader.semantic[cells] == probes["probe_semantic"])[day].all()
    assert (items == probes["probe_inventory"]).all()
    assert error[day].max() < 3 < reader.LEGAL
    assert len(np.unique(probes["probe_semantic"][day])) > 4         # control: there is variety
    guessed = reader.read(frames[::50])[0]
    assert (reader.semantic[guessed] == probes["probe_semantic"][::50]).mean() > 0.95
    noise = np.random.default_rng(0).integers(0, 256, (1, 72, 72, 3))
    assert (reader.read(noise)[2] > reader.LEGAL).all()


def test_reader_tells_sleep_from_waking():
    """Fails if the grey of sleep is read as day."""
    env = data.Crafter()
    env.reset(3)
    env.env._player.inventory["energy"] = 3
    for _ in range(3):
        action = env.spec.actions.zeros()
        action["categorical"][0] = env.spec.action_names.index("sleep")
        frame = env.step(action)[0]
    probe, reader = env.probe(), data.CrafterReader()
    assert probe["probe_player"][1] == 1
    light = [probe["probe_player"][0] / 255]
    near, far = (reader.distances(frame[None].astype(float), light, [s]).min(-1).mean()
                 for s in (True, False))
    assert near < 2 and far > 20
    assert reader.textures[reader.read(frame[None], light, [True])[0][0, 4, 3]] == "player-sleep"


def test_cells_in_sight_follow_the_walk():
    """Fails if the shift has the wrong sign or axis, or creatures count as terrain."""
    world = np.random.default_rng(0).integers(1, 19, (40, 40), dtype=np.uint8)

    def probe(x, y):
        return {"probe_semantic": world[None, x:x + 9, y:y + 7],
                "probe_player": np.array([[255, 0, x, y]], np.uint8)}
    for x, y in ((11, 10), (9, 10), (10, 12), (10, 10), (30, 10)):
        known, was = play.in_sight(probe(10, 10), probe(x, y))
        for i, j in np.ndindex(9, 7):
            there = (x + i - 10, y + j - 10)
            inside = 0 <= there[0] < 9 and 0 <= there[1] < 7
            assert known[0, i, j] == (inside and world[x + i, y + j] <= 12)
            assert not inside or was[0, i, j] == world[x + i, y + j]


def test_symbol_counts_of_truth_and_of_standing_still():
    """Fails if the true frame is not all right, a repeated frame gets credit for what changed, or
    hunger counts as the action's work."""
    frames, _, probes = player_film(120)
    reader, total, still = data.CrafterReader(), {}, {}
    for t in range(1, 110):
        for into, shown in ((total, frames[t]), (still, frames[t - 1])):
            counts = play.symbol_counts(reader, shown[None], at(probes, t - 1), at(probes, t))
            for k, x in counts.items():
                into[k] = into.get(k, 0) + int(x.sum())
    assert total["right"] == total["known"] > 1000 and total["changed_right"] == total["changed"]
    assert total["hits"] == total["events"] == total["claims"] > 5
    assert still["right"] == still["right_repeat"] == total["right_repeat"] < total["known"]
    assert still["changed_right"] == still["hits"] == still["claims"] == 0 < still["changed"]
    change = np.zeros((1, 16), int)
    change[0, [0, 1, 2, 3, 5]] = -1, -1, 1, 1, -2
    assert play.caused(change)[0].nonzero()[0].tolist() == [2, 5]
    assert play.f1(np.array([2]), np.array([3]), np.array([5])) == 0.5


def test_world_is_judged_frame_by_frame(tmp_path, monkeypatch):
    """Fails if shuffled actions are of the same episode or change the context, "moved" frames are
    others than those that scrolled, or the ceilings are not those of the reconstruction. A stub
    model shows the last true frame; a stub tokenizer flips each pixel's last bit."""
    asked, crafter = [], data.record("crafter", tmp_path, 3, 60, 3, skill="skilled")

    class Stub:
        latent_std, encode, decode = torch.ones(1), lambda self, x: x, lambda self, z: z ^ 1

    def dream_clips(run, z, actions, labelled, horizon, seed=0, forced=False):
        asked.append(actions["categorical"])
        return torch.cat([z[:, :-horizon], z[:, -horizon - 1:-horizon].expand(
            -1, horizon, -1, -1, -1)], 1)

    monkeypatch.setattr(play, "dream_clips", dream_clips)
    run = Run(None, "dynamics", crafter.spec, Stub(), dynamics=True)
    entries = play.evaluate_world(run, crafter, "fp32", per_episode=2, context=4, horizon=8)
    clips, _ = play.reference_clips(crafter, 2, 12, "cpu")
    true, shuffled, _ = asked
    assert torch.equal(true, clips["categorical"]) and torch.equal(true[:, :4], shuffled[:, :4])
    rows = [np.flatnonzero([torch.equal(x[4:], y[4:]) for y in true]) for x in shuffled]
    episode = clips["where"][0]
    assert all((episode[j] != episode[i]).any() for i, j in enumerate(rows))
    place = play.read_probes(crafter, *clips["where"], 12)["probe_player"][:, :, 2:].astype(int)
    for h in (1, 4, 8):
        moved = (place[:, 3 + h] != place[:, 2 + h]).any(1)
        gap = clips["frames"][moved, 3 + h].float() - clips["frames"][moved, 3].float()
        psnr = -10 * math.log10(gap.div(255).square().mean())
        assert abs(entries[f"dream_moved_psnr_db_h{h}"][0] - psnr) < 1e-3
        assert entries[f"repeat_moved_psnr_db_h{h}"][3] == moved.sum() > 0
    flipped = -20 * math.log10(1 / 255)
    assert abs(entries["recon_psnr_db_h4"][0] - flipped) < 1e-3
    assert entries["tokenizer_inventory_accuracy"][0] == entries["inventory_f1_recon"][0] == 1
    assert entries["inventory_f1"][0] < 1 and entries["dream_minus_repeat_db_least_h1_16"][0] == 0


def test_ssim_equals_a_naive_loop():
    """Fails if window, constants or the covariance are wrong."""
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.integers(0, 256, (1, 1, 13, 12, 3), dtype=np.uint8))
            for _ in range(2))
    y = (0.6 * x + 0.4 * y).to(torch.uint8)
    w = np.exp(-((np.arange(11) - 5) / 1.5) ** 2 / 2)
    w = np.outer(w, w) / np.outer(w, w).sum()
    scores = []
    for i, j, c in np.ndindex(3, 2, 3):
        a, b = (v[0, 0, i:i + 11, j:j + 11, c].double().numpy() / 255 for v in (x, y))
        ma, mb = (w * a).sum(), (w * b).sum()
        va, vb, ab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), \
            (w * (a - ma) * (b - mb)).sum()
        scores.append((2 * ma * mb + 1e-4) * (2 * ab + 9e-4)
                      / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    assert abs(play.ssim(x, y)[0, 0] - np.mean(scores)) < 1e-4 < 1 - np.mean(scores)
    assert abs(play.ssim(x, x)[0, 0] - 1) < 1e-5


def test_frechet_distance_in_closed_form():
    """Fails if the root is of the wrong matrix: N(0, 1) and N(3, 4) in one axis, N(0, 1) twice in
    the other, are 9 + (1 + 4 - 4) + 0 = 10 apart."""
    x = np.random.default_rng(0).normal(size=(4000, 2))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    assert abs(play.frechet(x, x)) < 1e-6
    assert abs(play.frechet(x, x * (2, 1) + (3, 0)) - 10) < 1e-6
    turned = x * (2, 1) @ np.array([[0, 1], [-1, 0]])
    assert abs(play.frechet(x * (2, 1), turned) - 2) < 1e-6         # (4 + 1) * 2 - 2 (2 + 2)


def test_distances_of_videos_are_of_equal_samples(paint, monkeypatch):
    """Fails if dreams are compared with more real windows than real ones are, or with other ones:
    drawn alike they'd be closer to them than real play is to itself."""
    rng, real = np.random.default_rng(0), play.frechet
    monkeypatch.setattr(play, "compiled", lambda run: run.dynamics)
    monkeypatch.setattr(play, "dream_freely", lambda run, n, *_, **__: torch.zeros(n, 2, 2, 6))
    basis = rng.normal(size=(64, 256))              # all that the 64 components can hold
    monkeypatch.setattr(play, "random_features",
                        lambda frames: rng.normal(size=(len(frames), 64)) @ basis)
    calls = []
    monkeypatch.setattr(play, "frechet", lambda a, b: calls.append((a, b)) or real(a, b))
    run = replace(key_run(), dynamics=tiny_dynamics(KeyEnv().spec.actions, k_max=16))
    entries = play.evaluate_sampling(run, paint, None, ks=(4, 16), n=400, length=2)
    assert all(np.array_equal(a, calls[0][0]) for a, _ in calls)
    assert 300 < len(calls[0][0]) < 500 and len(calls[0][0]) + len(calls[0][1]) == 800
    for k in (4, 16):
        assert abs(entries[f"frechet_k{k}"][0] / entries["frechet_real"][0] - 1) < 0.12
    value, low, high = entries["frechet_k4_over_k16"][:3]
    assert abs(value - entries["frechet_k4"][0] / entries["frechet_k16"][0]) < 1e-9
    assert low < high


def test_forced_dreams_see_the_true_frames(monkeypatch):
    """Fails if one-step dreams go on from what they imagined, or a free dream sees the truth."""
    monkeypatch.setattr(Dream, "noise", lambda self, B, T: torch.zeros(B, T, 2, 6))
    run = key_run()
    z, _, labelled = play_inputs(2, 7)
    actions = {k: torch.from_numpy(x) for k, x in
               run.spec.actions.sample(np.random.default_rng(0), 2, 7).items()}
    other = z.clone()
    other[:, 4] += 2                                                # a later true frame
    film = lambda z, forced: play.dream_clips(run, z, actions, labelled, 4, forced=forced).int()
    free, forced = film(z, False), film(z, True)
    assert torch.equal(free, film(other, False)) and torch.equal(free[:, :4], forced[:, :4])
    assert torch.equal(forced[:, :5], film(other, True)[:, :5])
    assert (forced[:, 5:] != film(other, True)[:, 5:]).any()
    for t in (4, 6):                        # each equals a dream of one frame from the true past
        one = play.dream_clips(run, z[:, :t + 1], {k: x[:, :t + 1] for k, x in actions.items()},
                               labelled[:, :t + 1], 1)
        assert (one[:, -1].int() - forced[:, t]).abs().max() <= 1


def test_branches_of_a_world_leave_it_as_it_is():
    """Fails if a fork starts a step early or late, shares state, or goes on after the end."""
    spec, rng = PaintEnv().spec.actions, np.random.default_rng(0)
    recorded, other = spec.sample(rng, 10), spec.sample(rng, 9)
    same = {k: x[4:] for k, x in recorded.items()}
    films = data.branch_off(PAINT, 3, recorded, [(3, same), (5, other), (3, other)])
    env = PaintEnv()
    env.reset(3)
    truth = [env.step({k: x[t] for k, x in recorded.items()})[0] for t in range(1, 10)]
    events, films = [events for _, events in films], [film for film, _ in films]
    assert np.array_equal(films[0], truth[3:])
    assert (events[1][:7, 0] == (other["categorical"][:7, 0] == 4)).all()
    assert not events[1][7:].any()
    assert (films[1][:, 0, 1, 0] == other["categorical"][:, 0])[:7].all()
    assert films[1][:, 0, 1, 2].tolist() == [6, 7, 8, 9, 10, 11, 12, 12, 12]   # seed 3 ends at 12
    assert films[2][:, 0, 1, 2].tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_interactions_are_judged_by_their_outcome(tmp_path):
    """Fails if the real outcome does not pass, or the last frame shown passes for it."""
    play.record_interactions("crafter", tmp_path, each=1, worlds=2)
    dataset, reader = data.Dataset(tmp_path), data.CrafterReader()
    kinds = dataset.settings["kinds"]
    assert len(set(kinds)) == len(kinds) >= 6 and "walk_left" in kinds
    for i, kind in enumerate(kinds):
        rows = dataset.episode(i)
        before, after = (at({k: rows[k] for k in rows if k.startswith("probe")}, t)
                         for t in (15, len(rows["frames"]) - 1))
        real, shown = rows["frames"][-1:], rows["frames"][15:16]
        assert play.judge(reader, kind, real, real, before, after)[0], kind
        stays = kind in ("stopped_by_water", "look_away_and_back")
        if not stays:
            assert not play.judge(reader, kind, shown, real, before, after)[0], kind


def test_a_wall_has_no_hole_where_the_player_stood():
    """Fails if the cell that the player left, whose ground no frame showed, is not judged."""
    reader = types.SimpleNamespace(semantic=np.arange(20),
                                   read=lambda cells, *_: (cells, np.zeros((1, 16), int), None))
    probes = [{"probe_semantic": np.full((1, 9, 7), 2), "probe_inventory": np.zeros((1, 16), int),
               "probe_player": np.array([[255, 0, 5, y]])} for y in (8, 7)]     # one step up
    for probe in probes:
        probe["probe_semantic"][0, 4, 3] = 13
    whole = probes[1]["probe_semantic"]
    whole[0, 4, 4] = 3                                              # a stone where it stood
    hole = whole.copy()
    hole[0, 4, 4] = 2
    judge = lambda shown: play.judge(reader, "wall_of_three", shown, whole, *probes)[0]
    assert judge(whole) and not judge(hole)
    probes[1]["probe_semantic"] = whole.copy()
    probes[1]["probe_semantic"][0, 4, 4] = 5                        # control: sand may lie there
    assert judge(hole)


def test_long_dreams_go_on_with_the_next_episodes(monkeypatch, paint):
    """Fails if a dream gets another episode's actions, or one of its own context or of a row 0,
    all start at an episode's first frame, or the frames judged are others than named."""
    run, got = key_run(), {}
    run.spec = replace(run.spec, actions=paint.spec.actions)

    def freely(run, n, length, actor, actions, context):
        got.update(actions=actions, context=context)
        return torch.zeros(n, length, 2, 6)

    monkeypatch.setattr(play, "dream_freely", freely)
    real = data.Dataset.read
    monkeypatch.setattr(data.Dataset, "read", lambda self, episode, start, *rest: got.update(
        start=start) or real(self, episode, start, *rest))
    monkeypatch.setattr(play, "reader_of", lambda dataset: types.SimpleNamespace(
        LEGAL=20, read=lambda frames: (0, 0, np.full((len(frames), 9, 7), 10.0))))
    monkeypatch.setattr(Tokenizer, "decode", lambda self, z, cache: torch.full(
        (*z.shape[:2], 72, 72, 3), 51, dtype=torch.uint8))
    entries = play.evaluate_long(run, paint, length=100, context=6, dtype="fp32")
    assert entries["legal_long_100"][:1] == (1.0,) and "legal_long_50" in entries
    assert abs(entries["bright_long_50"][0] - 0.2) < 1e-6 and len(got["start"]) == 25
    assert len(set(got["start"])) > 10 and got["start"][0] == 0
    keys = got["actions"]["categorical"]
    assert keys.shape == (25, 100, 1) and got["context"][0].shape[1] == 6
    recorded = [paint.episode(i)["categorical"][1:] for i in range(25)]
    for j in (0, 23):
        follow = np.concatenate([recorded[(j + k) % 25] for k in range(1, 9)])[:100]
        assert np.array_equal(keys[j], follow)


def rows_of(dataset, z):
    """Rows as train.make_latents writes them, with these latents (frames, S, Z)."""
    episodes = [dataset.episode(i) for i in range(len(dataset.lengths))]
    columns = {"z": z, **{k: np.concatenate([e[k] for e in episodes])
                          for k in data.TYPES if k != "frames"}}
    columns = {k: x for k, x in columns.items() if x.size}
    rows = np.empty(len(z), [(k, x.dtype, x.shape[1:]) for k, x in columns.items()])
    for k, x in columns.items():
        rows[k] = x
    return rows


def test_labels_are_the_first_episodes_or_those_above_ground(paint, tmp_path):
    """Fails if the share counts frames, caves are not caves, the batch ignores it, or rows with
    known actions are as rare in a batch as in the recordings."""
    job = train.Job(None, None, train.DataConfig(labels=0.2), None,
                    {"agent": {"prompts": True}}, torch.device("cpu"), paint)
    assert job.known.sum() == paint.offsets[5] and job.known[:paint.offsets[5]].all()
    latents = rows_of(paint, np.zeros((paint.frames_total, 1, 1), np.float32))
    labelled = lambda job, *args, **more: train.latent_batch(
        job, latents, np.random.default_rng(0), *args, **more)[0]["labelled"][:, -1].float()
    rows = labelled(job, 400, 50, 5)            # from anywhere, from the first five, with an event
    assert rows[200:400].all() and 0.1 < rows[:200].mean() < 0.35 and rows[400:].mean() < 0.5
    assert not labelled(job, 64, 0, 5, split="valid").any()     # episode 19: not one of the first
    none = replace(job, data=train.DataConfig(labels=0.0))
    assert not labelled(none, 64, 0, 5).any()
    one = replace(job, data=train.DataConfig(labels=0.04))      # its one episode may be too short
    assert 0 < labelled(one, 64, 0, 5).mean() and not labelled(
        one, 64, 0, int(paint.lengths[0]) + 1).any()
    dataset = data.record("crafter", tmp_path, 1, 250, 3, skill="skilled")
    known = train.known_actions(replace(job, data=train.DataConfig(labels_above=True),
                                        dataset=dataset))
    cells = dataset.episode(0)["probe_semantic"]
    assert 0 < known.sum() < len(known)
    for t in range(len(known)):
        rock = sum((cells[t] == i).mean() for i in (3, 4, 7, 8, 9, 10))
        assert known[t] == (rock <= 0.5)


def test_label_shares_lie_between_none_and_all(monkeypatch):
    """Fails if the share is of the wrong gap: as good as none is 0, as all is 1; or if a run sees
    the latents of another's tokenizer."""
    shown = {"none": 90, "half": 120, "all": 150}
    told, latents = {}, {}

    def dreamed(run, z, a, labelled, horizon):
        told[run.stage], latents[run.stage] = labelled.all().item(), z
        return torch.full((8, 32, 72, 72, 3), shown[run.stage], dtype=torch.uint8)

    monkeypatch.setattr(play, "dream_clips", dreamed)
    clips = {"frames": torch.full((8, 32, 72, 72, 3), 160, dtype=torch.uint8),
             "labelled": torch.ones(8, 32, dtype=torch.bool),
             "where": (np.zeros(8, int), np.zeros(8, int))}
    clips["frames"][:4] += 5
    monkeypatch.setattr(play, "reference_clips", lambda *rest: (clips, {}))
    cells = np.full((8, 32, 9, 7), 2)
    cells[4:] = 4
    monkeypatch.setattr(play, "read_probes", lambda *rest: {"probe_semantic": cells})
    tokenizer = Tokenizer(TokenizerConfig(dim=16))
    runs = {name: Run(None, name, None, tokenizer) for name in shown}
    runs["all"] = replace(runs["all"], tokenizer=randomize(deepcopy(tokenizer)))
    entries = play.evaluate_labels(runs, None, "fp32")
    assert torch.equal(latents["half"], latents["none"])
    assert not torch.allclose(latents["all"], latents["none"], atol=1e-3)
    assert entries["labels_none_psnr"][0] < entries["labels_half_psnr"][0]
    assert told == {"none": False, "half": True, "all": True}           # what it never learned
    p = {name: -10 * math.log10(np.mean([(v - 165) ** 2, (v - 160) ** 2]) / 255 ** 2)
         for name, v in shown.items()}
    share = (p["half"] - p["none"]) / (p["all"] - p["none"])
    assert abs(entries["labels_half_psnr_share"][0] - share) < 1e-5
    assert entries["labels_half_caves_psnr_share"][3] == 4 * 16
    assert abs(entries["labels_gap_psnr"][0] - p["all"] + p["none"]) < 1e-5
    assert abs(entries["labels_all_caves_psnr"][0] + 20 * math.log10(10 / 255)) < 1e-5


def test_free_dreams_start_from_nothing():
    """Fails if the first frame has an action or a past, or two dreams of one seed differ."""
    run = key_run()
    actions = {k: torch.from_numpy(x) for k, x in
               run.spec.actions.sample(np.random.default_rng(0), 3, 6).items()}
    flipped = {k: x.flip(0) for k, x in actions.items()}
    a, b = (play.dream_freely(run, 3, 6, None, x) for x in (actions, flipped))
    assert a.shape == (3, 6, 2, 6) and torch.equal(a[:, 0], b[:, 0])
    assert not torch.equal(a[:, 1], b[:, 1])
    assert torch.equal(play.dream_freely(run, 3, 6, run), play.dream_freely(run, 3, 6, run))


def test_frozen_matrices_change_nothing():
    """Fails if holding the weights in bf16 gives other numbers than casting them in each call."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs()
    tau, d = levels(2, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(z, tau, d, actions, labelled)[0]
        after = freeze(deepcopy(model), torch.device("cpu"), "bf16")(
            z, tau, d, actions, labelled)[0]
    assert torch.equal(before, after)
    exact = model(z, tau, d, actions, labelled)[0]
    assert not torch.equal(before, exact)                           # control: bf16 was at work


def test_speed_is_of_the_same_dream_with_and_without_cache():
    """Fails if a path of the benchmark breaks; speeds are printed, never judged."""
    run = key_run()
    for more in ({}, {"kind": play.Recomputed}, {"tokenizer": run.tokenizer}, {"k": 1}):
        assert play.dream_rate(run.dynamics, 2, 4, torch.device("cpu"), "fp32", repeats=2,
                               **more) > 0
    assert run.dynamics.cfg.k == tiny_dynamics().cfg.k              # put back


# -------------------------------------------------------------------------------------- train.py

KEYS = f"{__name__}:KeyEnv"
TINY = f"""--data.env {KEYS} --data.episodes 6 --data.length 36 --data.reference_episodes 2
--data.workers 1 --data.eval_episodes 2 --data.eval_length 8 --tokenizer.patch 4 --tokenizer.cell 2
--tokenizer.dim 16 --tokenizer.latents 4 --tokenizer.channels 4 --tokenizer.encoder_layers 3
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


def test_half_of_the_dynamics_rows_show_a_task_being_done(monkeypatch, workplace):
    """Fails if relevant rows are left out, are drawn where actions are unknown (whoever knows the
    events of a video has its actions), or never lie among those with bootstrap."""
    seen = []

    def marked(job, latents, rng, uniform, relevant, *rest, real=train.latent_batch, **named):
        batch, actions = real(job, latents, rng, uniform, relevant, *rest, **named)
        batch["z"] = torch.zeros_like(batch["z"])
        batch["z"][uniform:] = 1
        return batch, actions

    def noted(model, z, *rest, real=train.dynamics_losses, **named):
        seen.append(z[:, 0, 0, 0].bool())
        return real(model, z, *rest, **named)

    monkeypatch.setattr(train, "latent_batch", marked)
    monkeypatch.setattr(train, "dynamics_losses", noted)
    train_here(monkeypatch, workplace, "--run", "rows", "--stage", "tokenizer")
    for flags, share in ((), 0), (("--train.relevant", "0.5"), 0.5), (
            ("--train.relevant", "0.5", "--data.labels", "0.5"), 0):
        seen.clear()
        train_here(monkeypatch, workplace, "--run", "rows", "--stage", "dynamics", "--resume", "no",
                   *flags)
        assert len(seen) == 8
        assert all(int(rows.sum()) == round(share * len(rows)) for rows in seen)
        assert torch.stack([rows[0] for rows in seen]).float().mean().item() < 1
        assert any(rows[0] for rows in seen) == (share > 0)     # p_boot: the first of six rows


def test_relevant_rows_as_in_a_dream(monkeypatch, workplace):
    """Fails if --train.drawn leaves the frame of an event out, reaches a row from anywhere or of
    separate images, leaves one with bootstrap out, draws another share of the other frames, or
    doesn't show the rest as known."""
    seen = []

    def marked(job, latents, rng, uniform, relevant, *rest, real=train.latent_batch, **named):
        batch, actions = real(job, latents, rng, uniform, relevant, *rest, **named)
        batch["z"] = torch.zeros_like(batch["z"])
        batch["z"][uniform:] = 1 + batch["events"][uniform:].any(-1)[..., None, None]
        return batch, actions

    def noted(model, z, *rest, real=train.dynamics_losses):
        seen.append((z[..., 0, 0], *rest[-3:]))
        return real(model, z, *rest)

    monkeypatch.setattr(train, "latent_batch", marked)
    monkeypatch.setattr(train, "dynamics_losses", noted)
    train_here(monkeypatch, workplace, "--run", "drawn", "--stage", "tokenizer")
    share = []
    for chance in 0, 0.1:
        seen.clear()
        train_here(monkeypatch, workplace, "--run", "drawn", "--stage", "dynamics", "--resume",
                   "no", "--train.relevant", "0.5", "--dynamics.single_images", "0.3",
                   "--train.drawn", str(chance))
        for kind, single, known, drawn in seen:
            if not chance:
                assert drawn is None and known is None
                continue
            row = (kind[:, 0] > 0) & ~single
            assert not drawn[~row].any() and drawn[row][kind[row] == 2].all()
            assert torch.equal(known, row[:, None] & ~drawn)
            share.append(drawn[row][kind[row] == 1].float())
    share = torch.cat(share)
    assert abs(share.mean() - 0.1) < 4 * (0.09 / len(share)) ** 0.5 and len(share) > 30


def test_the_agent_stage_shows_rows_as_the_policy_will_see_them(monkeypatch, workplace):
    """Fails if relevant rows, or a quarter of the uniform ones, aren't shown as known, any other
    row is, or --agent.bc_level uniform shows any so."""
    seen = []

    def noted(model, z, *rest, real=train.dynamics_losses):
        seen.append((len(z), rest[4], rest[7]))
        return real(model, z, *rest)

    monkeypatch.setattr(train, "dynamics_losses", noted)
    for stage in "tokenizer", "dynamics":
        train_here(monkeypatch, workplace, "--run", "known", "--stage", stage)
    for level in "context", "uniform":
        seen.clear()
        train_here(monkeypatch, workplace, "--run", "known", "--stage", "agent", "--resume", "no",
                   "--train.batch", "16", "--agent.bc_level", level)
        for rows, uniform, known in seen:
            assert uniform < rows and (known is None) == (level == "uniform")
            if known is not None:
                first = uniform - uniform // 4
                assert known[:, 0].tolist() == [i >= first for i in range(rows)]
        assert any(uniform // 4 for _, uniform, _ in seen)


def test_bootstrap_rows_come_in_after_their_share_of_the_steps(monkeypatch, workplace):
    """Fails if --train.boot_after is turned round, counted in steps, or off by one."""
    seen = []

    def noted(model, z, actions, labelled, n_boot, *rest, real=train.dynamics_losses, **named):
        seen.append(n_boot)
        return real(model, z, actions, labelled, n_boot, *rest, **named)

    monkeypatch.setattr(train, "dynamics_losses", noted)
    train_here(monkeypatch, workplace, "--run", "boots", "--stage", "tokenizer")
    for share, first in ("0", 0), ("0.5", 4), ("0.7", 6), ("1", 8):
        seen.clear()
        train_here(monkeypatch, workplace, "--run", "boots", "--stage", "dynamics", "--resume",
                   "no", "--dynamics.p_boot", "0.5", "--train.boot_after", share)
        assert len(seen) == 8 and [n > 0 for n in seen] == [step >= first for step in range(8)]


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
    (["--train.drawn", "0.2"], "train.relevant 0"),
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


def test_the_preset_follows_the_device(monkeypatch):
    """Fails if --device cpu takes the preset for CUDA where there is one, or without it the default
    doesn't."""
    for name, preset in (("cuda", "gpu"), ("cpu", "cpu")):
        monkeypatch.setattr(train, "pick_device", lambda _, name=name: torch.device(name))
        assert train.parse([])[0].preset == preset


def test_windows_alternate_between_short_and_long():
    """Fails if long windows are not every fourth and all of the last tenth, or the share is
    another where it doesn't divide 1."""
    cfg = train.TrainConfig(batch=12, length=4, long_length=16)
    lengths = [train.window(cfg, step, 100) for step in range(100)]
    assert lengths[:4] == [(12, 4)] * 3 + [(3, 16)] and set(lengths[90:]) == {(3, 16)}
    assert sum(length == 16 for _, length in lengths[:90]) == 22
    for share, count in ((0.0, 0), (0.4, 36), (0.7, 63), (1.0, 90)):
        cfg.long_share = share
        long = sum(train.window(cfg, step, 100)[1] == 16 for step in range(90))
        assert abs(long - count) <= 1
    assert train.window(replace(cfg, long_share=0.0), 99, 100) == (12, 4)


# --------------------------------------------------------------------------------------- README

def test_readme_commands_parse():
    """Fails if the README shows a command that the programs refuse."""
    text = (REPO / "README.md").read_text()
    lines = [*re.findall("`([^`\n]+)`", text), *(x for x in text.splitlines() if "`" not in x)]
    commands = [part for line in lines for part in re.split(r"&&|\|\|", line) if "python" in part]
    seen = 0
    for words in (shlex.split(c.split("#")[0].replace("$s", "1")) for c in commands):
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


# ----------------------------------------------------------------------- play inside the dream

def game(tmp_path, start="fresh", **request):
    """A session of KeyEnv with random weights, in fp32."""
    session = play.Session(key_run(), KeyEnv(), tmp_path, "fp32")
    session.handle({"op": "reset", "start": start, "seed": 40_000, **request})
    return session


def keys(session, *labels):
    return [i for i, key in enumerate(session.keys) if key["label"] in labels]


def unpng(text):
    return imageio.v3.imread(base64.b64decode(text))


def test_every_action_has_a_control(crafter):
    """Fails if an environment's own keys are ignored, two actions share one, or one is lost."""
    named = {key["label"]: key["key"] for key in data.controls(crafter[0])}
    assert (named["move_left"], named["do"], named["place_table"]) == ("ArrowLeft", " ", "t")
    assert list(named) == list(crafter[0].spec.action_names) and named["noop"] == ""
    dealt = data.controls(KeyEnv())                                 # declares none
    assert len(dealt) == len({key["key"] for key in dealt}) == 7 and all(x["key"] for x in dealt)
    game = KeyEnv()
    game.spec = replace(game.spec, action_names=("noop", "go_left", "go_right", "up", "dig"))
    assert [key["key"] for key in data.controls(game)[2:6]] == ["", "ArrowLeft", "ArrowRight",
                                                                "ArrowUp"]
    game.spec = data.minecraft_spec()                               # 23 keys, 121 directions
    assert all(key["key"] for key in data.controls(game) if key["part"] == "binary")


def test_futures_share_noise_and_leave_the_dream_alone():
    """Fails if copies of a dream differ by more than their actions, or change it."""
    model = tiny_dynamics()
    z, actions, labelled = play_inputs(1, 3)
    two = {k: torch.tensor([[0], [3], [0]]).view(3, 1, -1) if k == "categorical"
           else x[:, :1].expand(3, -1, -1) for k, x in actions.items()}
    ends = []
    for tries in (0, 2):
        dream = Dream(model, torch.Generator().manual_seed(0))
        dream.commit(z, actions, labelled)
        for _ in range(tries):
            for n in (1, 3):
                ahead = dream.futures(n)
                for _ in range(6):                                  # past the context of 4
                    futures, _ = ahead.step({k: x[:n] for k, x in two.items()})
        ends.append(dream.step({k: x[:, :1] for k, x in actions.items()})[0])
    assert torch.equal(*ends)
    assert torch.allclose(futures[0], futures[2], atol=1e-5)        # the same action
    assert (futures[0] - futures[1]).abs().max() > 1e-2
    rows = [x.expand(3, -1, -1, -1) for x in play_inputs(1, 1, seed=1)[:1]]
    forked = model(*rows, *levels(3, 1), two, labelled[:, :1].expand(3, -1),
                   cache=dream.cache.fork(3))[0]                    # sees what the dream has seen
    alone = model(rows[0][:1], *levels(1, 1), {k: x[:1] for k, x in two.items()}, labelled[:, :1],
                  cache=dream.cache)[0]
    assert torch.allclose(forked[:1], alone, atol=1e-5)


def test_trace_ends_at_the_frame_that_is_dreamed():
    """Fails if the steps shown are not those of the sampler, or sees and predicts are swapped."""
    dream = Dream(tiny_dynamics(k=4))
    z, actions, labelled = play_inputs(1, 3)
    dream.commit(z, actions, labelled)
    now = {k: x[:, :1] for k, x in actions.items()}
    steps = dream.futures(1).trace(now)
    assert len(steps) == 4 and torch.equal(steps[0][0], dream.futures(1).noise(1, 1))
    frame = dream.futures(1).imagine(now, labelled[:, :1])
    assert torch.allclose(steps[-1][1], frame, atol=1e-5)
    assert (steps[-1][0] - frame).abs().max() > 1e-2


def test_rebuilt_pictures_do_not_know_what_was_hidden():
    """Fails if the wrong patches are hidden, or a hidden one reaches the encoder."""
    tokenizer = tiny_tokenizer()
    frames = torch.randint(256, (1, 1, 8, 12, 3), generator=torch.Generator().manual_seed(0)).byte()
    other = frames.clone()
    other[:, :, :4, 4:8] = 255 - other[:, :, :4, 4:8]               # patch 1 of 2 x 3
    hidden = torch.zeros(1, 1, 6, dtype=torch.bool)
    for share in (True, False):
        hidden[..., 1] = share
        (sees, a), (_, b) = tokenizer.rebuild(frames, hidden), tokenizer.rebuild(other, hidden)
        assert torch.equal(a, b) == share
    hidden[..., 1] = True
    sees = tokenizer.rebuild(frames, hidden)[0]
    assert sees[:, :, :4, 4:8].unique().numel() == 1                # grey
    sees[:, :, :4, 4:8] = frames[:, :, :4, 4:8]
    assert torch.equal(sees, frames)


@pytest.mark.parametrize("start, frames", [("held_out", play.PLAYED), ("fresh", 1)])
def test_both_worlds_start_alike_and_take_the_same_keys(tmp_path, start, frames):
    """Fails if the worlds begin at different frames, or a pressed key reaches one of them only."""
    session = game(tmp_path, start)
    assert len(session.rows["real"]) == frames and len(session.rows["dream"]) == min(frames, 4)
    env = KeyEnv()
    first = data.play_episode(env, 40_000, 0, frames, "skilled")[0][-1]
    shown = session.handle({"op": "reset", "start": start})["pictures"]
    assert (unpng(shown["real"]) == first).all()
    z = session.run.tokenizer.encode(torch.from_numpy(np.stack(
        [row[0] for row in session.rows["real"][-4:]]))[None])
    rebuilt = session.run.tokenizer.decode(z)[0, -1].numpy()
    assert np.abs(unpng(shown["dream"]).astype(int) - rebuilt).max() <= 1
    state = session.handle({"op": "step", "held": keys(session, "key 1", "action 3")})
    assert unpng(state["pictures"]["real"])[0, 1, 0] == 3           # PaintEnv shows the action
    for world in play.WORLDS:
        action = session.rows[world][-1][1]
        assert action["binary"].tolist() == [0, 1] and action["categorical"].tolist() == [3]


def test_dreams_can_start_from_nothing(tmp_path):
    """Fails if a dream without context still has a real world, or never changes."""
    session = game(tmp_path, "nothing")
    states = [session.handle({"op": "step"}) for _ in range(3)]
    assert list(states[0]["pictures"]) == ["dream"] and list(states[0]["minds"]) == ["dream"]
    assert states[0]["pictures"]["dream"] != states[2]["pictures"]["dream"]


def test_a_policy_plays_in_the_world_it_is_given(tmp_path):
    """Fails if the policy's world and the person's are confused."""
    session = game(tmp_path)
    for parameter in session.run.agent.policy.parameters():
        parameter.data.zero_()
    logits = torch.full((3, 7), -30.0)
    logits[:, [0, 1, 6]] = 30.0                                     # both keys, category 4
    session.run.agent.policy.out.bias.data = logits.flatten()
    for who in ({}, {"dream": "bc"}, {"real": "bc"}, {"dream": "bc", "real": "bc"}):
        state = session.handle({"op": "step", "held": keys(session, "action 2"), **who})
        for world in play.WORLDS:
            action = session.rows[world][-1][1]
            assert action["categorical"].tolist() == ([4] if world in who else [2])
            assert action["binary"].tolist() == ([1, 1] if world in who else [0, 0])
    assert np.allclose(state["minds"]["real"]["policy"], [1, 1, 0, 0, 0, 0, 1], atol=1e-6)


def test_read_outs_are_of_their_world_and_prompt(tmp_path, monkeypatch):
    """Fails if the rows of worlds and prompts are mixed up in the reader's batch."""
    monkeypatch.setattr(Dream, "noise", lambda self, B, T: torch.full((B, T, 2, 6), 0.3))
    session = game(tmp_path, "fresh", prompt=1)
    for i in range(2):                                              # within the context of 4
        session.handle({"op": "step", "held": [i]})
    frames, actions, *_ = zip(*session.rows["real"], strict=True)
    z = session.run.tokenizer.encode(torch.from_numpy(np.stack(frames))[None])
    a = session.tensors([actions])
    labelled = torch.arange(3)[None] > 0
    for prompt in (0, 1):
        h = Dream(session.run.dynamics).commit(z, a, labelled, torch.full((1, 3), prompt))[0, -1]
        assert torch.allclose(session.h[1, prompt], h, atol=1e-4)
        assert (session.h[0, prompt] - h).abs().max() > 1e-3        # the dream's own frames
    assert (session.h[1, 0] - session.h[1, 1]).abs().max() > 1e-3


def test_k_and_corruption_act_at_once(tmp_path):
    """Fails if the page's K or corruption does not reach the sampler or the committed frames."""
    session, calls = game(tmp_path), []
    session.run.dynamics.register_forward_hook(
        lambda module, inputs, output: calls.append((inputs[1].unique().item(),
                                                     inputs[2].unique().item())))
    for k, level in ((1, 7), (4, 3), (8, 5)):
        calls.clear()
        session.handle({"op": "step", "k": k, "level": level})
        assert calls == [*((i / k, 1 / k) for i in range(k)), *[(level / 8, 1 / 8)] * 2]


def test_looking_inside_changes_nothing(tmp_path):
    """Fails if what-if, denoising or masks move either world or the dream's noise, or if the true
    outcome of an action is not what the environment does."""
    sessions, ends = [game(tmp_path) for _ in range(2)], []
    for op in ("what_if", "denoise", "mask"):
        reply = sessions[1].handle({"op": op, "frames": 1, "k": 4, "share": 100})
        if op == "what_if":
            outcomes = {x["label"]: x for x in reply["outcomes"]}
            assert len({x["dream"] for x in outcomes.values()}) > 1
        else:
            assert len(reply["sees"]) == len(reply["predicts"]) > 3
    for session in sessions:
        ends.append(session.handle({"op": "step", "held": keys(session, "action 2")})["pictures"])
    assert ends[0] == ends[1] and ends[0]["real"] == outcomes["action 2"]["real"]
    assert outcomes["action 3"]["real"] != outcomes["action 2"]["real"]     # control


def test_copied_environments_go_their_own_way(crafter):
    """Fails if Crafter can't be copied, or a copy's steps are not those of the original."""
    env = data.Crafter()
    env.reset(3)
    twin, action = data.copy_env(env), env.spec.actions.zeros()
    for name in ["move_right", "do", "move_down"] * 8:
        action["categorical"][0] = env.spec.action_names.index(name)
        frame = twin.step(action)[0]
        assert (env.step(action)[0] == frame).all()
    twin.step(action)
    assert env.env._step != twin.env._step
    assert data.copy_env(open(os.devnull)) is None                  # can't be copied
    assert data.can_copy(KEYS) and not data.can_copy(f"{__name__}:OpenEnv")


def test_saved_sessions_are_a_film_and_datasets(tmp_path):
    """Fails if rows are shifted, the second session overwrites the first, or frames are lost."""
    session = game(tmp_path)
    for i in range(2):
        for j in keys(session, "action 4", "action 1"):
            session.handle({"op": "step", "held": [j]})
        reply = session.handle({"op": "save"})
        assert len(imageio.mimread(reply["saved"])) == reply["frames"] == 3 + 2 * i
    for world in play.WORLDS:
        dataset = data.Dataset(tmp_path / "sessions" / world)
        assert dataset.lengths.tolist() == [3, 5]
        assert dataset.episode(1)["categorical"][:, 0].tolist() == [0, 1, 4, 1, 4]
    shown = dataset.episode(1)
    assert world == "real" and shown["frames"][:, 0, 1, 0].tolist() == [0, 1, 4, 1, 4]
    assert shown["events"][:, 0].tolist() == [0, 0, 1, 0, 1]
    assert len(list((tmp_path / "sessions").glob("*.gif"))) == 2
    session.handle({"op": "reset", "seed": 40_002})                 # that world ends before play
    assert session.over
    session.handle({"op": "step"})
    session.handle({"op": "save"})
    assert data.Dataset(tmp_path / "sessions/dream").episode(2)["continues"].all()


def test_actions_on_the_command_line_make_a_film(tmp_path, monkeypatch, capsys):
    """Fails if words are matched to other actions, or an unknown one is not named."""
    sessions = []
    monkeypatch.setattr(play, "open_session", lambda args: sessions.append(game(tmp_path)) or
                        sessions[-1])
    words = ["play.py", "dream", "--out", str(tmp_path / "x.gif"), "--run", "runs/none",
             "--actions", "3 action_4"]
    names = ("noop", "action_1", "action_2", "move_3", "action_4")
    monkeypatch.setattr(KeyEnv, "__init__", lambda self: (PaintEnv.__init__(self), setattr(
        self, "spec", replace(self.spec, actions=ActionSpec(2, (5,)), action_names=names)))[0])
    monkeypatch.setattr(sys, "argv", words)
    play.main()
    shown = [row[1]["categorical"][0] for row in sessions[0].rows["real"][-2:]]
    assert shown == [3, 4] and len(imageio.mimread(tmp_path / "x.gif")) == len(sessions[0].film)
    monkeypatch.setattr(sys, "argv", [*words[:-1], "jump"])
    with pytest.raises(SystemExit) as stop:
        run_cli(play.main)
    assert stop.value.code == 2 and "'jump'" in capsys.readouterr().err


def test_without_weights_one_line_names_the_command(tmp_path, monkeypatch, capsys):
    """Fails if `python play.py` is not the game, or a missing run gives a traceback."""
    assert play.make_parser().parse_args([]).command == "serve"
    monkeypatch.setattr(sys, "argv", ["play.py", "--run", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        run_cli(play.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "python train.py" in lines[0]
    with pytest.raises(UserError, match="--stage dynamics"):
        play.Session(replace(key_run(), dynamics=None, agent=None), KeyEnv(), tmp_path)


@pytest.fixture
def server(tmp_path):
    with play.open_server(game(tmp_path), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def talk(server, text):
    """Send bytes as they are -> status and body; 0 where the line was closed without an answer."""
    with socket.create_connection(server.server_address, 20) as line:
        try:
            line.sendall(text)
            line.shutdown(socket.SHUT_WR)
            got = b""
            while part := line.recv(65536):
                got += part
        except ConnectionError:                                     # closed on unread bytes
            return 0, b""
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else 0, body


def ask_raw(server, body=b'{"op": "step"}', method="POST", path="/play", **headers):
    port = server.server_address[1]
    headers = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json",
               "Content-Length": len(body)} | {k.replace("_", "-"): v for k, v in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items() if v != "")]
    return talk(server, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def test_server_is_on_loopback_and_takes_the_next_free_port(server, tmp_path):
    """Fails if other machines can connect, or a taken port ends the program."""
    host, port = server.server_address
    assert host == "127.0.0.1"
    with play.open_server(server.session, port) as second:
        assert second.server_address[0] == "127.0.0.1" and second.server_address[1] > port
    status, page = ask_raw(server, b"", "GET", "/")
    assert status == 200 and page == (REPO / "assets" / "play.html").read_bytes()


@pytest.mark.parametrize("headers, allowed", [
    ({}, True), ({"Host": "localhost:8000"}, True),                 # a forwarded port
    ({"Origin": "http://127.0.0.1:PORT"}, True),
    ({"Host": "localhost:9000", "Origin": "http://localhost:9000"}, True),
    ({"Host": "evil.example"}, False), ({"Host": "evil.example:PORT"}, False),  # DNS rebinding
    ({"Host": "127.0.0.1.evil.example"}, False), ({"Host": "127.0.0.1:PORT@evil"}, False),
    ({"Host": ""}, False), ({"Origin": "http://evil.example"}, False),          # cross-site post
    ({"Origin": "null"}, False), ({"Origin": "https://127.0.0.1:PORT"}, False),
    ({"Origin": "http://localhost:PORT"}, False), ({"Origin": "http://127.0.0.1:1"}, False)])
def test_foreign_hosts_and_origins_are_refused(server, headers, allowed):
    """Fails if another site's page can drive the game or read its answers."""
    port = str(server.server_address[1])
    headers = {k: v.replace("PORT", port) for k, v in headers.items()}
    before = server.session.t
    assert ask_raw(server, **headers)[0] == (200 if allowed else 403)
    assert server.session.t - before == allowed
    if "Origin" not in headers:
        assert ask_raw(server, b"", "GET", "/", **headers)[0] == (200 if allowed else 403)


def malformed(rng, i):
    """The i-th bad request: (body, method, path, headers, statuses that are right)."""
    junk = bytes(rng.integers(0, 256, int(rng.integers(1, 300)), np.uint8))
    step = {"op": "step"}
    bad = [{"op": "rm"}, {"op": "__init__"}, {}, [], 7, None, {**step, "k": 3}, {**step, "k": 64},
           {**step, "k": True}, {**step, "level": -1}, {**step, "level": 1e9}, {"op": ["step"]},
           {**step, "held": [99]}, {**step, "held": "x"}, {**step, "held": [[0]]},
           {**step, "held": {"a": 1}}, {**step, "dream": "rl"}, {**step, "real": None},
           {**step, "prompt": 9}, {"op": "reset", "seed": -1}, {"op": "reset", "seed": 2 ** 40},
           {"op": "reset", "start": "../../etc"}, {"op": "what_if", "frames": 10 ** 6},
           {"op": "mask", "share": "all"}]
    paths = ["/../../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/assets/play.html",
             "/play/../play.py", "/%00", "/runs/crafter/agent.pt", "http://evil.example/play", "*"]
    kind = i % 8
    return [
        (json.dumps(bad[i // 8 % len(bad)]).encode(), "POST", "/play", {}, {400}),
        (junk, "POST", "/play", {}, {400}),
        (b"[" * 4000, "POST", "/play", {}, {400}),
        (b"", ["GET", "POST"][i // 8 % 2], paths[i // 8 % len(paths)], {}, {404}),
        (b"", ["PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "CONNECT", "XYZ"][i // 8 % 8],
         ["/", "/play"][i % 2], {}, {405}),
        (b"{}", "POST", "/play", [{"Content_Length": 10 ** 8}, {"Content_Length": -1},
                                  {"Content_Length": "9" * 5000}, {"Content_Length": ""},
                                  {"Transfer_Encoding": "chunked"}, {"X": "y" * 70_000},
                                  {"Content_Type": "text/plain"}][i // 8 % 7],
         {411, 413, 415, 431}),
        (b"{}", "POST", "/play", [{"Host": "evil.example"}, {"Origin": "http://evil.example"},
                                  {"Host": "a\x00b"}, {"Host": "\xff"}][i // 8 % 4], {403}),
        (junk, "\x00\xff GET", "/", {}, {400, 405}),
    ][kind]


def test_bad_requests_and_disconnects_leave_the_server_well(server, tmp_path, capfd):
    """Fails if one of 200 malformed requests or 20 abrupt disconnects is answered as if it were
    good, moves the game, writes a file, prints a traceback or stops the server."""
    rng, before = np.random.default_rng(0), sorted(tmp_path.rglob("*"))
    moves = server.session.t
    for i in range(200):
        body, method, path, headers, right = malformed(rng, i)
        status, _ = ask_raw(server, body, method, path, **headers)
        assert status in right | {0}, (i, method, path, headers, body[:60], status)
    assert server.session.t == moves
    whole = (f"POST /play HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
             f"Content-Length: 14\r\n\r\n").encode() + b'{"op": "step"}'
    for i in range(20):                                             # reset, not closed, part-way
        line = socket.create_connection(server.server_address, 20)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.sendall(whole[:[0, 9, 40, len(whole) - 3, len(whole)][i % 5]])
        line.close()
    status, body = ask_raw(server)
    assert status == 200 and json.loads(body)["t"] > moves
    assert sorted(tmp_path.rglob("*")) == before
    assert capfd.readouterr().err == ""


def test_a_bug_is_one_line_and_the_server_goes_on(server, monkeypatch, capfd):
    """Fails if an error of our own is silent, or ends the connection without an answer."""
    good = server.session.ops["step"]
    server.session.ops["step"] = lambda request: 1 / 0
    assert ask_raw(server)[0] == 500
    assert capfd.readouterr().err.startswith("error: ZeroDivisionError")
    server.session.ops["step"] = good
    assert ask_raw(server)[0] == 200


@pytest.fixture
def chromium():
    sync = pytest.importorskip("playwright.sync_api", reason="no browser: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
    with sync.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}; playwright install chromium")
        yield browser
        browser.close()


@pytest.mark.slow
def test_game_in_a_real_browser(chromium, server, tmp_path):
    """Fails if a person can't play: keys, policies, K, what-if, denoising, masks, recording."""
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)

    def until(condition, seconds=60):
        end = time.monotonic() + seconds
        while not page.evaluate(condition):
            assert time.monotonic() < end, (condition, errors, page.inner_text("#message"))
            time.sleep(0.05)

    picture = lambda world: page.evaluate(f"document.getElementById('{world}').toDataURL()")
    page.goto(f"http://127.0.0.1:{server.server_address[1]}")
    page.select_option("#start", "fresh"), page.click("#reset")
    until("+document.getElementById('frame').textContent > 3")
    page.keyboard.press("Enter")                                    # pause: a key is a frame
    until("paused && !busy")
    moves, before = server.session.t, [picture(world) for world in play.WORLDS]
    page.keyboard.press(server.session.keys[3]["key"])
    until(f"+document.getElementById('frame').textContent > {moves}")
    assert server.session.t == moves + 1
    assert all(a != picture(w) for a, w in zip(before, play.WORLDS, strict=True))
    assert server.session.rows["real"][-1][1]["categorical"].tolist() == [3]
    assert server.session.rows["dream"][-1][1]["categorical"].tolist() == [3]
    for op, n in (("what_if", 14), ("denoise", 4), ("mask", 12)):
        page.click("#ks button:nth-child(2)"), page.click(f"#{op}")
        until(f"document.querySelectorAll('#strip img').length == {n}")
        until("[...document.querySelectorAll('#strip img')].every(x => x.naturalWidth == 12)")
    assert server.session.run.dynamics.cfg.k == 2 and server.session.t == moves + 1
    page.select_option("#who_dream", "bc"), page.select_option("#who_real", "bc")
    page.click("#pause")
    until(f"+document.getElementById('frame').textContent > {moves + 6}")
    assert server.session.who == ["bc", "bc"] and "frames/s" in page.inner_text("header")
    page.click("#save")
    until("document.getElementById('message').textContent.startsWith('Saved')")
    assert len(imageio.mimread(tmp_path / "sessions" / "session_00000.gif")) > 6
    page.select_option("#start", "nothing"), page.click("#reset")
    until("document.getElementById('real_world').hidden && !busy")
    assert not errors


# ---------------------------------------------------- real Minecraft: VPT recordings, MineRL

def vpt_line(t, keys="", buttons=(), new=(), dx=0.0, dy=0.0, gui=False, x=640.0, y=360.0, **more):
    """A tick as OpenAI's recorder 6.13 writes it. more: other fields; None leaves one out."""
    line = {"mouse": {"x": x, "y": y, "dx": dx, "dy": dy, "scaledX": 0.0, "scaledY": 0.0,
                      "dwheel": 0.0, "buttons": list(buttons), "newButtons": list(new)},
            "keyboard": {"keys": [f"key.keyboard.{k}" for k in keys.split()], "newKeys": [],
                         "chars": ""},
            "isGuiOpen": gui, "isGuiInventory": gui, "hotbar": 0, "yaw": 0.5 * t, "pitch": 1.0,
            "xpos": 0.0, "ypos": 64.0, "zpos": 0.0, "tick": t, "milli": 1.6e12 + 50 * t,
            "inventory": [{"type": "oak_log", "quantity": 1}], "serverTick": 9000 + t,
            "serverTickDurationMs": 3.0, "stats": {"minecraft.custom:minecraft.jump": 7 + t}}
    return {k: v for k, v in {**line, **more}.items() if v is not None}


def vpt_frame(t, height=360, width=640):
    """Twelve grey bars that spell t in binary, so that H.264 can't hide which frame it is."""
    bars = np.where((t >> np.arange(12)) & 1, 210, 60).astype(np.uint8)
    return np.broadcast_to(bars.repeat(width // 12 + 1)[None, :width, None], (height, width, 3))


def frame_numbers(frames):
    """(T, H, W, 3) at any size -> the t of vpt_frame (T,)."""
    height, width = frames.shape[1:3]
    middle = ((np.arange(12) + 0.5) * (640 // 12 + 1) * width / 640).astype(int)
    bars = frames[:, height // 2, middle]
    return ((bars.mean(-1) > 135) << np.arange(12)).sum(1)


def write_lines(path, lines, tail=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + tail)
    return path


def write_segment(folder, lines, frames=None, name="Player-0123456789ab-20220101-120000",
                  tail=b"", **how):
    """NAME.jsonl and NAME.mp4 (H.264, by default one frame more than lines) -> the mp4's path."""
    path = write_lines(folder / f"{name}.jsonl", lines, tail).with_suffix(".mp4")
    with imageio.get_writer(path, fps=20, macro_block_size=8, **how) as film:
        for t in range(len(lines) + 1 if frames is None else frames):
            film.append_data(np.ascontiguousarray(vpt_frame(t)))
    return path


def keys_of(columns):
    """Names of the keys pressed in each row."""
    return [{name for name, on in zip(data.BUTTONS, row, strict=True) if on}
            for row in columns["binary"]]


def read_vpt(tmp_path, lines, scale=1.0, tail=b""):
    return data.read_lines(write_lines(tmp_path / "a.jsonl", lines, tail), scale)


def import_pieces(folder, out, size=(32, 64), **how):
    """import_vpt without worker processes -> report of the first segment and its pieces' rows."""
    out.mkdir(exist_ok=True)
    video = sorted(folder.rglob("*.mp4"))[0]
    report = data.import_one(video, out, size, **how)
    return report, [np.load(out / f"{data.part_name(video)}_{i}.npy") for i in report["pieces"]]


def test_vpt_camera_bins_agree_with_the_published_centres_and_edges():
    """Fails if mu, the range, the rounding or the order of pitch and yaw are others."""
    centres = np.array([-10, -5.809, -3.215, -1.609, -0.615, 0, 0.615, 1.609, 3.215, 5.809, 10])
    edges = np.array([0.271, 1.053, 2.317, 4.358, 7.655])
    edges = np.concatenate([-edges[::-1], edges])
    pairs = data.camera_degrees((np.arange(121) - 60) % 121)
    assert np.abs(pairs[:, 0] - centres.repeat(11)).max() < 1e-3            # pitch is the tens
    assert np.abs(pairs[:, 1] - np.tile(centres, 11)).max() < 1e-3
    x = np.random.default_rng(0).uniform(-14, 14, (10_000, 2))
    clear = np.abs(x[..., None] - edges).min((1, 2)) > 1e-3                 # the facts' precision
    wanted = np.searchsorted(edges, x)
    assert (data.camera_class(x) == (11 * wanted[:, 0] + wanted[:, 1] - 60) % 121)[clear].all()
    assert clear.mean() > 0.99 and data.camera_class([0.0, 0.0]) == 0       # as in zeros()
    assert data.camera_class([50.0, -50.0]) == 50                           # clipped


def test_minerl_mapping_and_back_is_the_identity():
    """Fails if a key is lost or moved, or a bin's centre lies in another bin."""
    spec = data.minecraft_spec()
    actions = spec.actions.sample(np.random.default_rng(0), 10_000)
    commands = [data.to_minerl({k: v[i] for k, v in actions.items()}) for i in range(10_000)]
    assert list(commands[0]) == """ESC attack back drop forward hotbar.1 hotbar.2 hotbar.3 hotbar.4
        hotbar.5 hotbar.6 hotbar.7 hotbar.8 hotbar.9 inventory jump left pickItem right sneak sprint
        swapHands use camera""".split()
    assert commands[0]["camera"].dtype == np.float32 and type(commands[0]["use"]) is int
    back = [data.from_minerl(command) for command in commands]
    for k in actions:
        assert (np.stack([b[k] for b in back]) == actions[k]).all()


def test_vpt_line_acts_on_its_frame_and_is_stored_with_the_next(tmp_path):
    """Fails if actions are off by one against the frames, or row 0 has an action."""
    presses = ["w", "", "s q", "left.shift 9", "", "f escape", "d"]
    lines = [vpt_line(t, keys, dx=20.0 * t) for t, keys in enumerate(presses)]
    write_segment(tmp_path / "in", lines)
    report, (rows,) = import_pieces(tmp_path / "in", tmp_path / "out")
    assert frame_numbers(rows["frames"]).tolist() == list(range(7))
    assert keys_of(rows) == [set(), {"forward"}, set(), {"back", "drop"}, {"sneak", "hotbar.9"},
                             set(), {"swapHands", "ESC"}]
    yaw = data.camera_class(np.stack([np.zeros(7), 3.0 * np.arange(7)], -1))
    assert rows["categorical"][:, 0].tolist() == [0, *yaw[:6]] and len(set(yaw[:6])) > 3
    assert rows["labelled"].tolist() == [False] + [True] * 6 and rows["continues"].all()
    assert report["skipped"] is report["fault"] is None


@pytest.mark.parametrize("more", [-2, -1, 0, 1, 2])
def test_vpt_extra_frame(tmp_path, more):
    """Quirk 1. Fails if the recorder's extra last frame is kept, or a difference of more than one
    is not refused with a reason."""
    write_segment(tmp_path / "in", [vpt_line(t) for t in range(9)], 9 + more)
    report, pieces = import_pieces(tmp_path / "in", tmp_path / "out")
    if abs(more) > 1:
        assert f"{9 + more} frames for 9 lines" in report["skipped"] and not pieces
        assert not list((tmp_path / "out").glob("*"))
    else:
        assert frame_numbers(pieces[0]["frames"]).tolist() == list(range(9 + min(more, 0)))


def test_vpt_frames_are_counted_not_timed(tmp_path):
    """Quirk 1. Fails if frames are repeated or dropped to fill gaps in the video's time stamps."""
    gap = ["-vf", "setpts=if(gt(N\\,4)\\,N+9\\,N)/(20*TB)", "-fps_mode", "vfr"]
    path = write_segment(tmp_path / "in", [vpt_line(t) for t in range(9)], output_params=gap)
    assert sum(1 for _ in data.video_frames(path)) in (9, 10)       # ffmpeg 7.0 writes one less
    assert sum(1 for _ in data.video_frames(path, 20)) > 15          # control: there is a gap
    _, (rows,) = import_pieces(tmp_path / "in", tmp_path / "out")
    assert frame_numbers(rows["frames"]).tolist() == list(range(9))


def test_vpt_stuck_attack(tmp_path):
    """Quirk 2. Fails if a button held since before the segment counts until it is pressed anew."""
    held = [vpt_line(t, buttons=[0, 1], new=[0] if t in (0, 4) else []) for t in range(6)]
    columns = read_vpt(tmp_path, held)[0]
    assert [("attack" in k) for k in keys_of(columns)] == [False] * 5 + [True]
    assert all("use" in k for k in keys_of(columns)[1:])
    held[0]["mouse"]["newButtons"] = []                              # control: not stuck
    assert all("attack" in k for k in keys_of(read_vpt(tmp_path, held)[0])[1:])


def test_vpt_hotbar_by_wheel(tmp_path):
    """Quirk 3. Fails if a scroll gives no key, gives it a tick late, or a segment that starts on
    another slot gives a false one."""
    slots = [4, 4, 4, 7, 7, 0]
    columns = read_vpt(tmp_path, [vpt_line(t, hotbar=s) for t, s in enumerate(slots)])[0]
    assert keys_of(columns) == [set(), set(), set(), {"hotbar.8"}, set(), {"hotbar.1"}]
    old = read_vpt(tmp_path, [vpt_line(t, "3", hotbar=None) for t in range(3)])[0]
    assert keys_of(old) == [set(), {"hotbar.3"}, {"hotbar.3"}]


def test_vpt_cursor_is_drawn_where_a_screen_is_open(tmp_path):
    """Quirk 4. Fails if the cursor is missing, elsewhere, drawn after the resize, or drawn while
    no screen is open."""
    lines = [vpt_line(t, gui=t > 2, x=100.0 + 100 * t, y=400.0) for t in range(6)]
    write_segment(tmp_path / "in", lines)
    _, (rows,) = import_pieces(tmp_path / "in", tmp_path / "out", (360, 640))
    flat = np.broadcast_to(rows["frames"][:, 100:101], rows["frames"].shape)
    changed = np.abs(rows["frames"].astype(int) - flat).max(-1) > 30
    assert not changed[:3].any()
    for t in range(3, 6):
        y, x = np.argwhere(changed[t]).T
        assert (y.min(), x.min()) == (200, 50 + 50 * t) and y.max() < 216 and x.max() < 66 + 50 * t
    _, (small,) = import_pieces(tmp_path / "in", tmp_path / "out", (90, 160))
    for t in (1, 4):                                                 # a mean over 4x4 pixels
        wanted = rows["frames"][t].reshape(90, 4, 160, 4, 3).mean((1, 3))
        assert np.abs(small["frames"][t] - wanted).max() <= 1
    frame = np.zeros((360, 640, 3), np.uint8)
    for x, y in ((1279, 719), (-5, 3), (5000, 3), (1e300, 0)):       # at and beyond the edges
        assert data.draw_cursor(frame, x, y).shape == frame.shape


def test_vpt_small_motion_is_kept(tmp_path):
    """Quirk 5. Fails if degrees are truncated: motion under 7 counts would vanish."""
    motion = [2.0, -2.0, 6.0, 7.0, 1.0, 0.0]
    columns = read_vpt(tmp_path, [vpt_line(t, dy=m) for t, m in enumerate(motion)])[0]
    pitch, yaw = data.camera_degrees(columns["categorical"][1:, 0]).T
    assert np.sign(pitch).tolist() == [1, -1, 1, 1, 0] and np.abs(pitch).max() < 0.7
    assert not yaw.any()


@pytest.mark.parametrize("version, factor", [("5.7", 0.5), ("6.9", 2), ("6.10", 1), ("10.0", 1)])
def test_vpt_gui_motion_is_scaled_by_version(tmp_path, version, factor):
    """Quirk 6. Fails if old recorders' motion in screens isn't rescaled, or other motion is."""
    lines = [vpt_line(t, dx=18.0, gui=t % 2 == 1) for t in range(4)]
    write_segment(tmp_path / "in" / version, lines)
    _, (rows,) = import_pieces(tmp_path / "in", tmp_path / "out")
    wanted = data.camera_class([[0, 2.7], [0, 2.7 * factor], [0, 2.7]])
    assert rows["categorical"][1:, 0].tolist() == wanted.tolist()


def test_vpt_escape_closes_a_screen(tmp_path):
    """Quirk 7. Fails if ESC in an open screen isn't `inventory`, or is so elsewhere."""
    lines = [vpt_line(t, "escape", gui=t == 1) for t in range(4)]
    assert keys_of(read_vpt(tmp_path, lines)[0]) == [set(), {"ESC"}, {"inventory"}, {"ESC"}]


@pytest.mark.parametrize("field, jump", [("milli", 4000), ("milli", -900), ("serverTick", 40)])
def test_vpt_pauses_cut_the_segment(tmp_path, field, jump):
    """Quirk 8. Fails if frames on both sides of a pause make one sequence. Control: a late tick."""
    lines = [vpt_line(t, "w") for t in range(12)]
    for line in lines[5:]:
        line[field] += jump
    write_segment(tmp_path / "in", lines)
    report, pieces = import_pieces(tmp_path / "in", tmp_path / "out")
    assert [frame_numbers(p["frames"]).tolist() for p in pieces] == [[0, 1, 2, 3, 4],
                                                                     [5, 6, 7, 8, 9, 10, 11]]
    for piece in pieces:
        assert piece["labelled"].tolist() == [False] + [True] * (len(piece) - 1)
        assert not piece["binary"][0].any() and piece["continues"].all()
    late = [vpt_line(t, milli=1.6e12 + 130 * t) for t in range(4)]
    assert read_vpt(tmp_path, late)[2] == [0]
    old = [vpt_line(t, milli=None, serverTick=None) for t in range(4)]
    assert read_vpt(tmp_path, old)[2] == [0]


def test_vpt_null_actions_are_kept(tmp_path):
    """Quirk 9. Fails if ticks without action, or with null mouse or keyboard, are dropped: time
    would jump."""
    lines = [vpt_line(t, mouse=None, keyboard=None) for t in range(5)]
    for line in lines:
        line["mouse"] = line["keyboard"] = None
    columns, _, _, total, fault = read_vpt(tmp_path, lines)
    assert len(columns["binary"]) == total == 5 and fault is None
    assert (columns["categorical"][1:] == 0).all() and not columns["binary"].any()


def test_vpt_camera_comes_from_motion_not_from_positions(tmp_path):
    """Quirk 10. Fails if the cursor's jump to the centre, when a screen closes, turns the view."""
    lines = [vpt_line(0, gui=True, x=10.0, y=700.0), vpt_line(1), vpt_line(2, yaw=170.0)]
    assert (read_vpt(tmp_path, lines)[0]["categorical"][1:] == 0).all()


def test_vpt_events_are_rises_over_the_first_statistics(tmp_path):
    """Quirk 11. Fails if a counter's earlier life counts, a rise is given late, early or twice, or
    an empty line in between forgets the counters."""
    log, stone = "minecraft.mine_block:minecraft.oak_log", "minecraft.mine_block:minecraft.stone"
    spruce = "minecraft.mine_block:minecraft.stripped_spruce_log"
    stats = [{}, {log: 3}, {log: 3}, {log: 5}, {}, {log: 5, stone: 1},
             {log: 5, stone: 1, spruce: 2}]
    columns = read_vpt(tmp_path, [vpt_line(t, stats=s) for t, s in enumerate(stats)])[0]
    tasks = data.minecraft_spec().tasks
    got = [(t, tasks[i]) for t, i in np.argwhere(columns["events"])]
    assert got == [(3, "mine_log"), (5, "mine_cobblestone"), (6, "mine_log")]


def test_minecraft_tasks_and_their_statistics():
    """Fails if a task is missing, a statistic belongs to two, or the ladder asks for no task."""
    spec = data.minecraft_spec()
    assert len(spec.tasks) == 20 and "death" not in spec.tasks and len(spec.ladder) == 25
    assert spec.ladder[0] == ("mine_log", 10) and spec.ladder[-1] == ("mine_diamond", 0)
    assert set(spec.rungs) | {t for t, _ in spec.ladder} <= set(spec.tasks)
    for name, task in {"mine_block:minecraft.jungle_log": "mine_log",
                       "craft_item:minecraft.warped_planks": "craft_planks",
                       "custom:minecraft.interact_with_furnace": "open_furnace",
                       "use_item:minecraft.crafting_table": "place_crafting_table",
                       "use_item:minecraft.iron_pickaxe": "use_iron_pickaxe",
                       "craft_item:minecraft.iron_ingot": "craft_iron_ingot"}.items():
        assert spec.tasks[data.COUNTER_OF[f"minecraft.{name}"]] == task
    assert "minecraft.mine_block:minecraft.oak_leaves" not in data.COUNTER_OF


def test_vpt_unknown_keys_are_ignored(tmp_path):
    """Quirk 12. Fails if F3, tab or a fourth mouse button become another key."""
    lines = [vpt_line(t, "f3 tab t unknown", buttons=[3, 4]) for t in range(3)]
    assert not read_vpt(tmp_path, lines)[0]["binary"].any()


@pytest.mark.parametrize("tail, total, fault", [
    (b'{"mouse": {"x": 1', 7, True), (b"\xff\xfe\n", 7, True), (b"\n\n", 6, False)])
def test_vpt_broken_last_line(tmp_path, tail, total, fault):
    """Quirk 13. Fails if a half-written line ends the import, or is left out silently."""
    lines = [vpt_line(t) for t in range(6)]
    text = json.dumps(lines[2]).encode().replace(b'"chars": ""', b'"chars": "\xe9\x80"')
    path = write_segment(tmp_path / "in", lines, total + 1, tail=tail).with_suffix(".jsonl")
    path.write_bytes(path.read_bytes().replace(json.dumps(lines[2]).encode(), text))
    report, (rows,) = import_pieces(tmp_path / "in", tmp_path / "out")
    assert len(rows) == 6 and report["skipped"] is None
    assert (report["fault"] is not None) == fault
    assert not fault or f"{path}, line 7" in report["fault"]


def test_vpt_death_ends_an_episode(tmp_path):
    """Quirk 14. Fails if the frame of a death isn't terminal, or the next life goes on in it."""
    deaths = "minecraft.custom:minecraft.deaths"
    lines = [vpt_line(t, "w", stats={deaths: 2 + (t >= 4)}) for t in range(9)]
    write_segment(tmp_path / "in", lines)
    _, pieces = import_pieces(tmp_path / "in", tmp_path / "out")
    assert [p["continues"].tolist() for p in pieces] == [[1, 1, 1, 1, 0], [1, 1, 1, 1]]
    assert frame_numbers(pieces[1]["frames"]).tolist() == [5, 6, 7, 8]


def test_vpt_without_statistics_has_no_events(tmp_path):
    """Quirk 15. Fails if BASALT's stripped lines can't be read."""
    bare = [{k: vpt_line(t, "w")[k] for k in ("mouse", "keyboard", "isGuiOpen")} for t in range(4)]
    columns, _, starts, _, fault = read_vpt(tmp_path, bare)
    assert not columns["events"].any() and starts == [0] and fault is None
    assert keys_of(columns)[1:] == [{"forward"}] * 3


def test_frames_are_averaged_over_areas_or_padded():
    """Fails if the resize drops pixels, or the paper's 384 rows are not 360 and a black border."""
    frame = np.random.default_rng(0).integers(0, 256, (360, 640, 3), dtype=np.uint8)
    tall = data.fit_frame(frame, 384, 640)
    assert (tall[:360] == frame).all() and not tall[360:].any() and tall.shape == (384, 640, 3)
    assert (data.fit_frame(frame, 360, 640) == frame).all()
    fine = frame.astype(float).repeat(16, 0)                         # 5760 = 128 * 45 rows
    wanted = fine.reshape(128, 45, 128, 5, 3).mean((1, 3))
    assert np.abs(data.fit_frame(frame, 128, 128) - wanted).max() <= 0.51
    assert data.fit_frame(frame[:5, :7], 32, 32).shape == (32, 32, 3)


def test_import_vpt_command(tmp_path):
    """Fails if bytes, progress, skips, the summary or the dataset of the whole command are wrong,
    or it does work twice."""
    folder, words = tmp_path / "in", ["import-vpt", "--src", tmp_path / "in", "--out",
                                      tmp_path / "out", "--size", "32x32", "--workers", 2]
    stats = [{"minecraft.mine_block:minecraft.oak_log": 3 + (t > 7)} for t in range(10)]
    for i, frames in enumerate((None, None, 5, None)):
        lines = [vpt_line(t, "w", stats=stats[t]) for t in range(10)]
        for line in lines[6:] if i == 3 else []:
            line["milli"] += 60_000
        write_segment(folder / "10.0", lines, frames, f"P-{i:012x}-20220101-1200{i:02d}",
                      b"{oops\n" if i == 1 else b"")
    write_lines(folder / "10.0" / "lonely.jsonl", [vpt_line(0)])
    (folder / "10.0" / "cut.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    write_lines(folder / "10.0" / "cut.jsonl", [vpt_line(0)])
    code, out, error = command(*words)
    assert code == 0, error
    assert "5 of 5 videos to import, about 0 MB" in out and "lonely: skipped: no .mp4" in out
    assert "5 frames for 10 lines" in out and "line 11" in out and "cut.mp4: skipped: " in out
    assert "2 videos whole, 1 cut short, 3 skipped; 4 episodes" in out
    dataset = data.Dataset(tmp_path / "out")
    assert dataset.spec == data.minecraft_spec(32, 32)
    assert dataset.lengths.tolist() == [10, 10, 6, 4]
    assert frame_numbers(dataset.episode(1)["frames"]).tolist() == list(range(10))
    episode, start, task = dataset.sample(np.random.default_rng(0), 50, 4, relevant=True)
    assert set(task) == {dataset.spec.tasks.index("mine_log")}
    assert (start <= 8).all() and (start + 3 >= np.where(episode == 3, 2, 8)).all()
    assert not (tmp_path / "out" / "parts").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.npy")}
    code, out, _ = command(*words)
    assert code == 0 and "is complete" in out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.npy")}
    code, _, error = command(*words[:-3], "16x16")
    assert code == 2 and "got other size" in error
    for words in (["import-vpt", "--src", tmp_path / "none", "--out", tmp_path / "x"],
                  ["import-video", tmp_path / "none.mp4", "--out", tmp_path / "x"]):
        code, _, error = command(*words)
        assert code == 2 and "none" in error and len(error.splitlines()) == 1


def test_interrupted_import_goes_on(tmp_path, monkeypatch):
    """Fails if whole segments are imported again, or pieces that were already moved are lost."""
    for i in range(3):
        write_segment(tmp_path / "in", [vpt_line(t) for t in range(6)], None, f"P{i}")
    videos, out = sorted((tmp_path / "in").glob("*.mp4")), tmp_path / "out"
    whole = data.import_files(videos, tmp_path / "whole", (16, 16), 1)
    real, moves = os.replace, []

    def breaks(a, b):
        if Path(b).name.startswith("episode") and len(moves) == 2:
            raise KeyboardInterrupt
        moves.extend([b] if Path(b).name.startswith("episode") else [])
        real(a, b)

    monkeypatch.setattr(os, "replace", breaks)
    with pytest.raises(KeyboardInterrupt):
        data.import_files(videos, out, (16, 16), 1)
    monkeypatch.setattr(os, "replace", real)
    with pytest.raises(UserError, match="incomplete"):
        data.Dataset(out)
    marks = {p: p.stat().st_mtime_ns for p in (out / "parts").glob("*.json")}
    assert len(marks) == 3 and len(moves) == 2
    with pytest.raises(UserError, match="other videos"):             # numbers would shift
        data.import_files(videos[1:], out, (16, 16), 1)
    again = data.import_files(videos, out, (16, 16), 1)
    assert again.fingerprint == whole.fingerprint


def test_full_disk_ends_an_import(tmp_path, monkeypatch):
    """Fails if a full disk counts as a fault of every segment, which would end up left out."""
    write_segment(tmp_path / "in", [vpt_line(t) for t in range(4)])
    monkeypatch.setattr(data.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="no room.*full.*need both"):
        import_pieces(tmp_path / "in", tmp_path / "out")


def test_import_parts_split_by_session(tmp_path, monkeypatch):
    """Fails if segments of one session are trained on and judged by, or one is in no part."""
    names = [f"P-{s:012x}-20220101-12{m:02d}00" for s in range(90) for m in range(2)]
    for name in names:
        write_lines(tmp_path / f"{name}.jsonl", []), (tmp_path / f"{name}.mp4").touch()
    monkeypatch.setattr(data, "import_files", lambda videos, *_: {v.stem for v in videos})
    train_, reference = (data.import_vpt(tmp_path, "out", (8, 8), part)
                         for part in ("train", "reference"))
    assert train_ | reference == set(names) and not train_ & reference and reference
    assert not {n[:14] for n in train_} & {n[:14] for n in reference}


def test_import_video_is_unlabelled(tmp_path):
    """Fails if plain videos count as labelled play, or are not brought to the wanted rate."""
    for name, fps in (("a", 20), ("b", 10)):
        with imageio.get_writer(tmp_path / f"{name}.mp4", fps=fps, macro_block_size=8) as film:
            for t in range(16):
                film.append_data(np.ascontiguousarray(vpt_frame(t, 96, 128)))
    code, out, error = command("import-video", tmp_path / "a.mp4", tmp_path / "b.mp4", "--out",
                               tmp_path / "out", "--size", "32x64", "--workers", 1)
    assert code == 0, error
    dataset = data.Dataset(tmp_path / "out")
    assert dataset.lengths.tolist() == [16, 32] and dataset.spec == data.minecraft_spec(32, 64)
    episode = dataset.episode(0)
    assert not episode["labelled"].any() and not episode["events"].any()
    assert episode["continues"].all() and "about 0 MB" in out
    for fps in (0, math.inf, math.nan):
        with pytest.raises(UserError, match="--fps"):
            data.import_video([tmp_path / "a.mp4"], tmp_path / "more", (32, 64), fps)


def test_readers_of_recordings_use_no_torch():
    """Fails if data.py needs torch: importing runs many processes, MineRL's has no room for it."""
    script = "import sys, data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPO).returncode == 0


class FakeMineRL:
    """HumanSurvival's interface: each tick of attack mines a log; from three logs on, use opens a
    crafting table; 30 ticks forward in a row kill. Refuses what MineRL refuses."""

    def __init__(self):
        self.next_seed, self.seeds, self.stats, self.commands = None, [], {}, []
        self.broken = False

    def seed(self, number):
        self.next_seed = number

    def observation(self):
        pov = np.full((360, 640, 3), self.stats["mine_block"]["oak_log"], np.uint8)
        pov[:, :64] = self.steps
        return {"pov": pov, "inventory": {}, "life_stats": {"life": np.array(20.0)},
                **{kind: {k: np.array(float(n)) for k, n in names.items()}
                   for kind, names in self.stats.items()}}

    def reset(self):
        self.seeds.append(self.next_seed)
        self.next_seed, self.steps, self.forward = None, 0, 0
        self.stats = {kind: {} for kind in ("craft_item", "use_item", "pickup", "drop")}
        self.stats |= {"mine_block": {"oak_log": 3, "stone": 0},
                       "custom": {"deaths": 0, "interact_with_crafting_table": 0}}
        return self.observation()

    def step(self, command):
        assert set(command) == {*data.BUTTONS, "camera"} and command["camera"].shape == (2,)
        assert command["camera"].dtype == np.float32 and not command["ESC"]
        self.commands.append(command)
        self.steps += 1
        self.stats["mine_block"]["oak_log"] += 2 * command["attack"]
        self.stats["custom"]["interact_with_crafting_table"] += command["use"]
        self.forward = (self.forward + 1) * command["forward"]
        self.stats["custom"]["deaths"] += self.forward >= 30
        info = {"error": "the game is gone"} if self.broken else {}
        return self.observation(), 0.0, bool(info), info


class TinyMineRL(data.MineRL):
    """The shipped adapter around the fake."""

    def __init__(self):
        super().__init__(32, 32)

    def make_game(self):
        return FakeMineRL()


MINE = f"{__name__}:TinyMineRL"


def press(*names, camera=0):
    action = data.minecraft_spec().actions.zeros()
    action["binary"][[data.BUTTONS.index(name) for name in names]] = 1
    action["categorical"][0] = camera
    return action


def test_minerl_adapter(capsys):
    """Fails if seeding, keys, camera, events, ESC, death, the limit or a broken game are wrong."""
    env = data.make_env(MINE)
    tasks = env.spec.tasks
    assert env.reset(5).shape == (32, 32, 3) and env.game.seeds == [5]
    frame, events, terminal = env.step(press("attack", "ESC", camera=60))
    sent = env.game.commands[-1]
    assert sent["attack"] == 1 and sent["camera"].tolist() == [10, 10]
    assert events[tasks.index("mine_log")] == 2 and events.sum() == 2 and not terminal
    assert frame[5, 20].tolist() == [5] * 3
    events = env.step(press("use"))[1]                               # not the logs again
    assert [tasks[i] for i in np.flatnonzero(events)] == ["open_crafting_table"]
    deaths = [env.step(press("forward"))[2] for _ in range(30)]
    assert deaths == [False] * 29 + [True]
    env.reset(6)
    assert env.game.seeds == [5, 6] and not env.step(press())[1].any()
    shown = env.step(press("attack"))[0]
    env.game.broken = True
    frame, events, terminal = env.step(press("attack"))
    assert terminal and not events.any() and (frame == shown).all()
    assert "the game is gone" in capsys.readouterr().err
    env.game.broken = bool(env.reset(7) is None)
    env.steps = env.limit - 2
    assert [env.step(press())[2] for _ in range(2)] == [False, True] and env.limit == 72_000


def test_missing_minerl_says_how_to_install_it(tmp_path):
    """Fails if a missing MineRL gives a traceback, or its spec can't be had without it."""
    code, _, error = command("record", "--env", "minerl", "--out", tmp_path / "x")
    assert code == 2 and "pip install git+" in error and len(error.splitlines()) == 1
    code, _, error = command("record", "--env", "minerl:12", "--out", tmp_path / "x")
    assert code == 2 and "HEIGHTxWIDTH" in error
    assert data.env_spec("minerl:384x640") == data.minecraft_spec(384, 640)
    assert data.env_spec("minerl") == data.minecraft_spec() and data.env_spec(PAINT).name == "paint"


def test_ladder_counts_items_and_recordings_count_events(monkeypatch):
    """Fails if four planks of one craft count as one prompt's step, or as a reward of four."""
    class Pipe:
        """The parent of env_worker: fresh frames, then five times attack."""
        both = {k: np.stack([x] * 2) for k, x in press("attack").items()}
        asks, answers = [EOFError, *[both] * 5, None], []

        def recv(self):
            ask = self.asks.pop()
            if ask is EOFError:
                raise EOFError
            return ask

        def send(self, answer):
            self.answers.append([x.copy() for x in answer])

    monkeypatch.setattr(data.signal, "signal", lambda *_: None)
    data.env_worker(Pipe(), MINE, [1, 2])
    ladder = play.Ladder(data.minecraft_spec(32, 32), 2)
    advanced = [ladder.advance(events) for _, events, _ in Pipe.answers[1:]]
    assert np.array(advanced).all(1).tolist() == [False] * 4 + [True]       # 5 times 2 logs
    columns = data.play_episode(TinyMineRL(), 0, 0, 12, None)
    assert np.array(columns[2]).any() and np.array(columns[2]).max() == 1


class Store(http.server.BaseHTTPRequestHandler):
    """A web store with Range, and with faults: {path: [fault of the first request, ...]}."""
    files, faults, log = {}, {}, []

    def do_GET(self):
        body, start = self.files.get(self.path), 0
        fault = self.faults.get(self.path, []).pop(0) if self.faults.get(self.path) else None
        self.log.append((self.path, self.headers.get("Range")))
        if fault == 503 or body is None:
            self.send_response(fault or 404)
            self.end_headers()
            return self.wfile.write(b"<?xml version='1.0'?><Error><Code>NotFound</Code></Error>")
        if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) and fault != "whole":
            start = int(match[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start: start + 1000] if fault == "drop" else body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def store(monkeypatch):
    """-> address and handler of a store on this machine."""
    Store.files, Store.faults, Store.log = {}, {}, []
    monkeypatch.setattr(data, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Store
    server.shutdown()
    server.server_close()


def write_index(tmp_path, basedir, relpaths):
    (tmp_path / "index.json").write_text(json.dumps({"basedir": basedir, "relpaths": relpaths}))
    return tmp_path / "index.json"


def test_download_vpt(tmp_path, store, capsys):
    """Fails if a download doesn't go on where it broke off, keeps a part or an error page, gives up
    at once, or fetches twice."""
    base, server = store
    film, text = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40, b'{"mouse": null}\n' * 300
    for stem in ("10.0/a-1", "10.0/b-2", "10.0/c-3", "6.9/d-4"):
        server.files |= {f"/x/data/{stem}.mp4": film, f"/x/data/{stem}.jsonl": text}
    server.faults = {"/x/data/10.0/a-1.mp4": ["drop", "drop"], "/x/data/10.0/a-1.jsonl": [503],
                     "/x/data/10.0/b-2.mp4": ["drop", "whole"]}
    server.files["/x/data/10.0/c-3.mp4"] = b"<?xml version='1.0'?><Error>gone</Error>"
    del server.files["/x/data/6.9/d-4.jsonl"]
    names = ["data/10.0/a-1.mp4", "data/10.0/b-2", "data/10.0/c-3.mp4", "data/6.9/d-4.mp4"]
    index, out = write_index(tmp_path, f"{base}/x/data/", names), tmp_path / "out"
    data.download_vpt(index, out, 4)
    kept = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert kept == {"10.0/a-1.mp4": film, "10.0/a-1.jsonl": text, "10.0/b-2.mp4": film,
                    "10.0/b-2.jsonl": text, "10.0/c-3.jsonl": text}
    asked = [wanted for path, wanted in server.log if path == "/x/data/10.0/a-1.mp4"]
    assert asked == [None, "bytes=1000-", "bytes=2000-"]
    assert [path for path, _ in server.log].count("/x/data/6.9/d-4.jsonl") == 1      # no retry
    said = capsys.readouterr().out
    assert "c-3.mp4: skipped: an error page" in said and "d-4.mp4: skipped: answer 404" in said
    assert "2 segments, 2 skipped" in said
    server.log.clear()
    data.download_vpt(write_index(tmp_path, f"{base}/x/", names), out, 2)     # the other form
    assert not server.log
    data.download_vpt(write_index(tmp_path, f"{base}/x/data", ["10.0/a-1"]), tmp_path / "new", 9)
    assert (tmp_path / "new/10.0/a-1.mp4").read_bytes() == film


@pytest.mark.parametrize("relpath", ["../../etc/x", "10.0/../../x", "/etc/x", "10.0/.x", "10.0//x",
                                     "10.0/a?b=c", "10.0/a\\b", ""])
def test_download_writes_nothing_outside_its_folder(tmp_path, store, relpath, capsys):
    """Fails if a path of the index leads out of --out, or changes the address."""
    base, server = store
    data.download_vpt(write_index(tmp_path, base, [relpath]), tmp_path / "out", 1)
    assert not server.log and "unsafe name" in capsys.readouterr().out
    assert [p.name for p in tmp_path.rglob("*")] == ["index.json"]


def test_download_errors_are_one_line(tmp_path, monkeypatch):
    """Fails if the index is evaluated as code, or a missing network or index gives a traceback."""
    monkeypatch.setattr(data, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match="no connection.*network.*do:"):
        data.download_vpt(write_index(tmp_path, "http://127.0.0.1:9", ["a"]), tmp_path / "o", 1)
    for text in ('__import__("os").mkdir("evaluated")', "{}", '{"basedir": "file:///etc/", '
                 '"relpaths": ["passwd"]}', '{"basedir": 3, "relpaths": []}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(UserError, match="index file of VPT"):
            data.download_vpt(tmp_path / "index.json", tmp_path / "o", 1)
    assert not Path("evaluated").exists()
    with pytest.raises(UserError, match="index file of VPT"):
        data.download_vpt(tmp_path / "none.json", tmp_path / "o", 1)


def test_minecraft_presets_on_the_meta_device():
    """Fails if a preset can't be built, has not the paper's sizes or its practice with the
    dynamics' own sampling steps, needs more than 80 GB by the formula (`minecraft`), or the
    README's table says something else."""
    tables, readme = {}, (REPO / "README.md").read_text()
    for preset in ("paper", "minecraft"):
        _, configs = train.parse(["--preset", preset])
        tables[preset] = [[x.strip() for x in row.split("|")[1:-1]]
                          for row in train.sizes(configs).splitlines()[2:4]]
        assert all(f"| {' | '.join(row)} |" in readme for row in tables[preset])
        assert (configs["agent"]["k"], configs["agent"]["finest"]) == (0, False)
    assert all(10 < float(row[6]) < 70 for row in tables["minecraft"])
    number = lambda i, j: float(tables["paper"][i][j].replace(",", ""))
    _, configs = train.parse(["--preset", "paper"])
    assert abs(number(0, 1) / 400e6 - 1) < 0.05 and abs(number(1, 1) / 1.6e9 - 1) < 0.05
    tok, dyn = configs["tokenizer"], configs["dynamics"]
    assert (tok["latents"], tok["channels"], tok["pack"]) == (512, 16, 2)   # 256 x 32 packed
    assert number(0, 2) == 960 + 512 and number(1, 2) == 1 + 1 + 256 + 32 + 1
    assert dyn["context"] == 192 and dyn["heads"] == 4 * dyn["kv_heads"]
    assert (configs["train"]["length"], configs["train"]["long_length"]) == (64, 256)


@pytest.mark.parametrize("sizes", [(128, 8, 2, 24, 40), (128, 2, 2, 64, 8)])
def test_activation_memory_agrees_with_the_formula(sizes):
    """Fails if the table's formula is off by more than an eighth from what autograd keeps."""
    dim, heads, kv_heads, S, T = sizes
    model = Transformer(TokenizerConfig(dim=dim, heads=heads, kv_heads=kv_heads, context=T + 1), 4)
    weights, kept, tensors = {p.data_ptr() for p in model.parameters()}, {}, []

    def pack(x):
        copy = x.ndim == 2 and x.dtype == torch.bfloat16 and 2 * T * S not in x.shape
        if x.data_ptr() not in weights and not copy:    # bf16 copies of weights: STATE_BYTES
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            tensors.append(x)                           # so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), \
            torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, T, S, dim, requires_grad=True), torch.ones(S, S).bool())
    formula = train.transformer_costs(model, S, T)[1]
    assert abs(sum(kept.values()) / (2 * T) / formula - 1) < 0.125


def vpt_play(rng, n):
    """Lines of a player who mines a log now and then."""
    stats, lines = {"minecraft.mine_block:minecraft.oak_log": 3}, []
    for t in range(n):
        if rng.random() < 0.1:
            stats = {k: v + 1 for k, v in stats.items()}
        lines.append(vpt_line(t, " ".join(rng.choice(list("wasd"), 2)), rng.choice(2, 1).tolist(),
                              dx=float(rng.normal(0, 20)), stats=stats, gui=bool(t % 9 == 8)))
    return lines


@pytest.mark.slow
def test_minecraft_end_to_end(tmp_path, monkeypatch):
    """Fails if generated recordings can't be imported, trained on by all four stages and judged in
    MineRL's interface through the shipped adapter."""
    rng = np.random.default_rng(0)
    for part, n in (("in", 6), ("held", 2)):
        for i in range(n):
            write_segment(tmp_path / part, vpt_play(rng, 60), None, f"P-{i}")
        data.import_vpt(tmp_path / part, tmp_path / f"{part}_set", (32, 32), workers=2)
    train_here(monkeypatch, tmp_path, "--data.env", MINE, "--data.path", "in_set",
               "--data.reference", "held_set", "--run", "mine", "--tokenizer.patch", "8")
    results = json.loads((tmp_path / "runs/mine/results.json").read_text())
    assert {"ladder_bc", "ladder_rl", "success_rl_mine_log", "dream_psnr_db_h16"} <= set(results)
    assert results["success_random_mine_log"]["value"] > 0
    assert load_run(tmp_path / "runs/mine").spec == data.minecraft_spec(32, 32)
    (tmp_path / "runs/mine/results.json").unlink()
    train_here(monkeypatch, tmp_path, "--data.env", "minerl:32x32", "--data.path", "in_set",
               "--data.reference", "held_set", "--run", "mine", "--tokenizer.patch", "8",
               "--data.eval_episodes", "0")                         # judged without MineRL
    results = json.loads((tmp_path / "runs/mine/results.json").read_text())
    assert "dream_psnr_db_h1" in results and "ladder_bc" not in results


@pytest.mark.slow
def test_mutated_lines_are_reported_not_fatal(tmp_path):
    """Fails if one of 10,000 damaged lines crashes the reader, or one that it stops at is not
    named. Control: some are harmless, some are not."""
    rng, reported = np.random.default_rng(0), 0
    good = [json.dumps(line).encode() for line in vpt_play(rng, 40)]
    odd = [b"null", b"NaN", b"-1e999", b"[]", b"{}", b'"x"', b"1" + b"0" * 400, b"[[0]]", b"true",
           b"\xff\x00", b"[" * 5000, b"9" * 5000]
    for trial in range(500):
        lines = list(good[:20])
        for i in range(20):
            line = bytearray(lines[i])
            kind = rng.integers(4)
            if kind == 0:                                       # a byte
                line[rng.integers(len(line))] = rng.integers(256)
            elif kind == 1:                                     # cut off
                line = line[:rng.integers(len(line))]
            elif kind == 2:                                     # a value
                values = list(re.finditer(rb": ([^,{}\[\]]+)", bytes(line)))
                a, b = values[rng.integers(len(values))].span(1)
                line[a:b] = odd[rng.integers(len(odd))]
            else:                                               # a piece moved
                a, b, c = np.sort(rng.integers(len(line), size=3))
                line = line[:a] + line[b:c] + line[a:b] + line[c:]
            path = tmp_path / "x.jsonl"
            text = bytes(line).replace(b"\n", b" ")
            path.write_bytes(b"\n".join([*lines[:i], text, *lines[i + 1:]]) + b"\n")
            columns, cursors, starts, total, fault = data.read_lines(path)
            n = len(columns["binary"]) if "binary" in columns else 0
            whole = 20 if text.strip() else 19
            assert total == whole and (n == total) == (fault is None)
            assert fault is None or f"x.jsonl, line {n + 1}: " in fault and "\n" not in fault
            assert len(cursors) == n and all(0 <= s < n for s in starts)
            assert n == 0 or (columns["categorical"] < 121).all()
            reported += fault is not None
    assert 2000 < reported < 9000


@pytest.mark.slow
def test_damaged_videos_are_reported_not_fatal(tmp_path):
    """Fails if one of 100 cut or corrupted videos crashes or hangs the import, or one that isn't
    imported whole goes unnamed."""
    rng, lines = np.random.default_rng(0), [vpt_line(t) for t in range(20)]
    whole = write_segment(tmp_path / "in", lines, name="whole").read_bytes()
    for i in range(100):
        film = bytearray(whole)
        if i % 2:
            film = film[:rng.integers(len(film))]
        else:
            for place in rng.integers(len(film), size=rng.integers(1, 40)):
                film[place] = rng.integers(256)
        (tmp_path / "in" / f"bad{i:02d}.mp4").write_bytes(film)
        write_lines(tmp_path / "in" / f"bad{i:02d}.jsonl", lines)
    dataset = data.import_vpt(tmp_path / "in", tmp_path / "out", (16, 32), workers=2)
    skipped = data.read_about(tmp_path / "out")["settings"]["skipped"]
    assert len(dataset.lengths) + len(skipped) == 101 and len(skipped) >= 50
    assert all(reason and "\n" not in reason for reason in skipped.values())
    assert set(dataset.lengths) <= {19, 20}


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


def test_all_runs_of_a_command_sample_as_it_asks(finished, monkeypatch):
    """Fails if --k or --finest is lost, or of the runs that `labels` compares reaches one alone."""
    monkeypatch.chdir(finished)
    monkeypatch.setattr(play, "evaluate_labels", lambda runs, *_: asked.update(
        {name: (run.dynamics.cfg.k, run.dynamics.cfg.d_label) for name, run in runs.items()}) or {})
    for flags, want in (((), (4, "own")), (("--k", "2", "--finest"), (2, "min"))):
        asked = {}
        monkeypatch.setattr(sys, "argv", ["play.py", "labels", "--run", "runs/base", "--with",
                                          "none=runs/base", *flags])
        play.main()
        assert asked == {"all": want, "none": want}


def test_other_seeds_and_settings_on_the_same_base(finished, monkeypatch):
    """Fails if --base trains the base's stages again or changes its files, seeds give equal agents,
    or --compare mixes up runs, stages or what it keeps; and for the policies without prompts and
    without pretraining."""
    sums = {p.name: p.read_bytes() for p in (finished / "runs/base").glob("*.pt")}
    for seed, flags in ((1, []), (2, ["--agent.prompts", "false"]),
                        (3, ["--agent.pretrained", "false"])):
        for stage in ("agent", "imagine")[:1 + (seed == 1)]:
            base = ["--base", "base"] if stage == "agent" else []
            train_quietly(finished, "--run", f"seed{seed}", *base, "--stage", stage, "--seed", seed,
                          "--train.check_every", "4", *flags)
    assert sums == {p.name: p.read_bytes() for p in (finished / "runs/base").glob("*.pt")}
    one, two, three = (load_run(finished / f"runs/seed{i}", "agent") for i in (1, 2, 3))
    base = load_run(finished / "runs/base", "agent")
    assert not torch.equal(one.agent.policy.out.weight, base.agent.policy.out.weight)
    first = lambda run: next(run.dynamics.parameters())
    start = first(load_run(finished / "runs/base", "dynamics"))
    assert (first(one) - start).abs().max() < (first(three) - start).abs().max() / 3
    assert "dynamics" in metrics_of(finished / "runs/seed1", "agent")[0]
    assert metrics_of(finished / "runs/seed1", "agent")[0]["bc_next_action_valid"] > 0
    assert "dynamics" not in metrics_of(finished / "runs/seed3", "agent")[0]
    start = load_run(finished / "runs/base", "dynamics").dynamics.task_embed.weight
    told = lambda run: (run.dynamics.task_embed.weight != start).any(1).tolist()
    assert told(two) == [False] * (len(start) - 1) + [True] and any(told(one)[:-1])
    asked = torch.tensor([0, 1])
    assert two.agent.prompt(asked).tolist() == [2, 2] and not two.agent.cfg.prompts
    assert one.agent.prompt(asked).tolist() == [0, 1]               # control
    train_quietly(finished, "--run", "cold", "--base", "seed1", "--stage", "imagine",
                  "--agent.temperature", "0.5", "--train.lr_policy", "0")   # starts, and stays
    cold = load_run(finished / "runs/cold", "imagine").agent
    assert torch.equal(cold.policy.out.weight, 2 * one.agent.policy.out.weight)
    assert torch.equal(cold.prior.out.weight, 2 * one.agent.prior.out.weight)
    monkeypatch.chdir(finished)
    monkeypatch.setattr(play, "TEMPERATURES", (1.0, 0.5))
    words = ["eval", "--run", "runs/base", "--episodes", "3", "--length", "6", "--workers", "1",
             "--compare", "bc=seed1:agent,rl=seed1:imagine,cool=seed[12]:agent@best"]
    play.evaluate(words)
    results = play.read_results("runs/base")
    assert results["ladder_cool"]["n"] == 6 and results["ladder_rl_minus_bc"]["n"] == 3
    assert results["ladder_random"]["n"] == 3 and "ladder_player" not in results    # it has none
    assert results["temperature_cool"]["value"] in (1.0, 0.5)
    kept = sorted((finished / "runs/seed1/episodes").glob("*agent_30000_3x6_t1_*"))
    crc = zlib.crc32((finished / "runs/seed1/agent.pt").read_bytes())   # of these weights alone
    assert len(kept) == 1 and kept[0].stem.endswith(f"_{crc:08x}")
    monkeypatch.setattr(play, "evaluate_agent", None)               # nothing is played again
    play.evaluate(words)
    for wrong in ("bc=nothing:agent", "bc=seed1", "bc=seed1:dynamics"):
        with pytest.raises(UserError, match="--compare"):
            play.evaluate([*words[:-1], wrong])
    for wrong in ("base", "seed3"):                                 # itself; has another agent
        with pytest.raises(UserError, match="--base"):
            train_quietly(finished, "--run", "seed1" if wrong == "seed3" else "base", "--base",
                          wrong, "--stage", "imagine")
    with pytest.raises(UserError, match="No tokenizer.pt"):
        train_quietly(finished, "--run", "seed1", "--base", "none", "--stage", "agent")
    for name in ("latents.json", "latents.npy"):                    # other latents are no obstacle
        (finished / "runs/seed1" / name).unlink()                   # a link: base has it, too
    np.save(finished / "runs/seed1/latents.npy", np.zeros(3))
    train_quietly(finished, "--run", "seed1", "--base", "base", "--stage", "agent", "--seed", 1)
    bare = finished / "runs/bare"                                   # a tokenizer and no latents yet
    bare.mkdir()
    shutil.copy(finished / "runs/base/tokenizer.pt", bare)
    train.take_stages(bare, finished / "runs/seed1", "dynamics")
    with pytest.raises(UserError, match="No dynamics.pt"):
        train.take_stages(bare, finished / "runs/seed1", "agent")


def test_a_stage_made_of_older_weights_is_noticed(copy):
    """Fails if a stage that was trained again leaves the later ones in silence: they would be
    judged with weights that are no longer there."""
    folder, run = copy
    train_quietly(folder, "--run", "base", "--stage", "agent")      # control: all fits
    train_quietly(folder, "--run", "base", "--stage", "dynamics", "--resume", "no", "--seed", 5)
    with pytest.raises(UserError, match="Got dynamics"):
        train_quietly(folder, "--run", "base", "--stage", "agent")
    with pytest.raises(UserError, match="Got dynamics"):
        train_quietly(folder, "--run", "base", "--stage", "imagine", "--resume", "no")


def test_half_of_the_cloned_rows_show_a_rung_of_the_ladder(tmp_path):
    """Fails if the share counts other rows, the other half shows the ladder's tasks alone, or an
    environment without a ladder can't practise."""
    dataset = data.record(KEYS, tmp_path / "set", 8, 36, 0, workers=1)
    dataset.spec = replace(dataset.spec, ladder=(("both_keys", 0),), rungs=("both_keys",))
    job = train.Job(None, None, train.DataConfig(), None, {"agent": {"prompts": True}},
                    torch.device("cpu"), dataset)
    latents = rows_of(dataset, np.zeros((dataset.frames_total, 1, 1), np.float32))
    tasks = lambda ladder: train.latent_batch(job, latents, np.random.default_rng(0), 0, 400, 8,
                                              None, ladder)[0]["task"][:, 0]
    half = tasks(0.5)
    assert (half[200:] == 1).all() and 0.4 < half[:200].float().mean() < 0.6
    quarter = tasks(0.25)
    assert 0.4 < tasks(0).float().mean() < 0.6 and (quarter[300:] == 1).all()
    assert 0.4 < quarter[:300].float().mean() < 0.6
    other = train.latent_batch(job, latents, np.random.default_rng(0), 400, 40, 8, None, 1.0)[0]
    assert 0.4 < other["task"][:400, 0].float().mean() < 0.6        # those imitate nothing
    assert (other["task"][400:] == 1).all()
    dataset.spec = replace(dataset.spec, ladder=())
    free = train.latent_batch(job, latents, np.random.default_rng(0), 400, 0, 8, None, True)[0]
    assert 0.4 < free["task"][:, 0].float().mean() < 0.6


def test_imagination_starts_before_the_event_with_the_prompt_of_then(tmp_path):
    """Fails if a relevant start has its event behind it or out of reach, or the other rows are told
    another task than the ladder would ask for at their end."""
    dataset, C, H = data.record(KEYS, tmp_path / "set", 8, 36, 0, workers=1), 4, 6
    prompts = play.ladder_prompts(dataset)
    for i in range(8):
        fours = np.cumsum(dataset.episode(i)["events"][:, 0])
        here = prompts[dataset.offsets[i]:][:dataset.lengths[i]]
        assert (here == (fours >= 2)).all()
    job = train.Job(None, None, train.DataConfig(), None, {"agent": {"prompts": True}},
                    torch.device("cpu"), dataset)
    number = rows_of(dataset, np.arange(dataset.frames_total, dtype=np.float32)[:, None, None])
    batch, _ = train.latent_batch(job, number, np.random.default_rng(0), 2000, 50, C,
                                  (C, C + H - 1), True)
    last, task = batch["z"][:, -1, 0, 0].long().numpy(), batch["task"][:, 0].numpy()
    assert (task[:2000] == prompts[last[:2000]]).all() and set(task[:2000]) == {0, 1}
    events = np.concatenate([dataset.episode(i)["events"] for i in range(8)])
    assert all(events[a + 1:a + 1 + H, t].any()
               for a, t in zip(last[2000:], task[2000:], strict=True))
    assert not all(events[a + 1:a + 1 + H, 0].any() for a in last[:2000])             # control


@pytest.mark.slow
def test_bench_runs(monkeypatch):
    """Fails if shapes of the benchmark don't fit together; every step is made once."""
    monkeypatch.setattr(train, "compile_module", lambda *_: None)

    def once(step, repeats, device):
        step()
        return 1e-3

    monkeypatch.setattr(play, "seconds", once)
    assert play.bench(torch.device("cpu"))["bench_imagination_cached_over_uncached"][0] == 1


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
    files = lambda: {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    before = files()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "reconstruction_loss", spoiled)
        train_quietly(folder, *flags, "--seed", 7, "--replay", 4, cli=True)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and len(seen) == 6 and torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[3], seen[5])                        # control: batches differ
    assert "with the weights that the last checkpoint has, of step 3" in out
    assert re.search(r"step 4: mse \d", out) and "gradient norm" in out and "patch_in.weight" in out
    assert files() == before


def test_replay_of_a_finished_stage_uses_its_weights(copy, monkeypatch, capsys):
    """Fails if a finished stage is replayed with fresh weights."""
    folder, run = copy
    with pytest.raises(SystemExit):
        train_quietly(folder, "--run", "base", "--stage", "dynamics", "--replay", 7)
    assert "of step 8" in capsys.readouterr().out


def break_file(path, how):
    content, at = bytearray(path.read_bytes()), path.stat().st_size // 2
    if path.suffix == ".pt":                # the largest part, not the padding between two
        with zipfile.ZipFile(path) as file:
            part = max(file.infolist(), key=lambda x: x.file_size)
            at = part.header_offset + 200 + part.file_size // 2
    content[at] ^= 255
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
    "no label is known": (lambda w, r: (r / "agent.pt").unlink(), base(
        "agent", "--data.labels", "0", "--resume", "anyway"),
        "without labelled frames, need actions for the policy"),
    "unlabelled play": (lambda w, r: (unlabelled(w), (r / "agent.pt").unlink()), base(
        "agent", "--data.path", "datasets/unlabelled", "--resume", "anyway"),
        "without labelled frames, need actions for the policy"),
    "impossible sizes": (None, (*NEW, "--tokenizer.dim", "30"), "dim must divide into heads"),
    "impossible number": (None, (*NEW, "--train.lr", "nan"), "Got train.lr nan, need float from 0"),
    "zero": (None, (*NEW, "--train.save_every", "0"), "Got train.save_every 0, need int from 1."),
    "negative seed": (None, (*NEW, "--seed", "-1"), "Got --seed -1, need a whole number from 0."),
    "long windows too short": (None, (*NEW, "--train.long_length", "8"),
                               "need more than dynamics.context 8"),
    "no temperature": (None, (*NEW, "--agent.temperature", "0"),
                       "Got agent.temperature 0, need float above 0."),
    "sampling steps never learned": (None, (*NEW, "--agent.k", "3"), "Got agent.k 3, need a power"),
    "sampling steps its dynamics never learned": (
        lambda w, r: [train_quietly(w, *base(s, "--dynamics.k_max", "8", "--resume", "no"))
                      for s in ("dynamics", "agent")] + [(r / "imagine.pt").unlink()],
        base("imagine", "--agent.k", "16"), "Got agent.k 16, need a power of two up to dynamics.k"),
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


def test_rows_beside_a_run_are_those_of_the_recordings(copy, monkeypatch):
    """Fails if a frame gets another one's action, event or latents, or pieces of an episode are
    encoded without what was before them, or after another episode."""
    folder, run = copy
    monkeypatch.setattr(train, "LATENT_CHUNK", 7)
    (run / "dynamics.pt").unlink(), (run / "latents.npy").unlink()
    train_quietly(folder, *base("dynamics", "--dtype", "fp32"))
    rows, tokenizer = np.load(run / "latents.npy"), load_run(run, "tokenizer").tokenizer
    dataset = data.Dataset(next(p for p in (folder / "datasets").iterdir()
                                if "reference" not in p.name))
    made = rows_of(dataset, rows["z"]).dtype
    assert len(rows) == dataset.frames_total and made.fields.keys() == rows.dtype.fields.keys()
    assert all(rows.dtype[k] == made[k] for k in made.names)
    for i, first in enumerate(dataset.offsets[:-1]):
        episode, here = dataset.episode(i), rows[first:first + dataset.lengths[i]]
        for name in ("binary", "categorical", "continuous", "labelled", "events", "continues"):
            assert np.array_equal(data.column(here, name), episode[name])
        frames = torch.from_numpy(np.array(episode["frames"]))[None]
        with torch.no_grad():
            z, alone = (tokenizer.encode(x)[0].numpy() for x in (frames, frames[:, 7:]))
        off = np.abs(here["z"] - z)
        assert off.max() < 2e-3 and off.mean() < np.abs(here["z"][1:] - z[:-1]).mean() / 5
        assert off[7].mean() < np.abs(alone[0] - z[7]).mean() / 2               # has a past


@pytest.mark.parametrize("harm", ["byte", "name of a column", "of older code"])
def test_damaged_latents_are_computed_again(copy, capsys, harm):
    """Fails if a changed byte in the cache is trained on, one in its header, or latents without
    the other columns, as once; or the cache is not restored."""
    folder, run = copy
    path, about = run / "latents.npy", run / "latents.json"
    before = path.read_bytes()
    if harm == "byte":
        break_file(path, "byte")
    elif harm == "name of a column":
        path.write_bytes(before.replace(b"'events'", b"'evenus'", 1))
    else:
        z, old = np.load(path)["z"].copy(), json.loads(about.read_text())
        np.save(path, z)
        del old["rows"]
        about.write_text(json.dumps({**old, "crc": zlib.crc32(z)}))
    (run / "dynamics.pt").unlink()
    train_quietly(folder, *base("dynamics"))
    assert ("got damaged latents" in capsys.readouterr().out) == (harm != "of older code")
    assert path.read_bytes() == before


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
             "--train.lr_matrix", "1e-3", "--train.check_every", "10",
             *(f"--train.{s}_steps=20" for s in STAGES)]
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
