"""Tests in the paper's order: CPU, offline, seeded. `pytest -m "not slow"` takes minutes.

A docstring says what the test fails on; each negative claim has a positive control beside
it.
"""
import base64
import errno
import io
import itertools
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
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imageio
import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # also where there is a GPU, and in every child
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's jobs ignore it

import torch

import data
import envs.episodes
import play
import train
from agent import (LAMBDA, MTP, STAGES, Agent, AgentConfig, Run, action_kl,
                   action_log_prob, agent_losses, dream_of, freeze, imagination_losses,
                   imagine_rollout, lambda_returns, load_run, pmpo_loss, symexp_bins,
                   two_hot, two_hot_log_prob, two_hot_mean, value_loss)
from data import ActionSpec, EnvSpec, UserError, Windows, run_cli
from dynamics import (ActionEmbedding, Batch, Dream, Dynamics, DynamicsConfig, corrupt,
                      dynamics_losses, error_metrics, euler_sample, noise_like, pure_noise,
                      ramp_weight, sample_tau_d, shortcut_loss, shortcut_target,
                      show_as_context, x_prediction)
from tokenizer import (PIXEL_MEAN, PIXEL_STD, Block, Cache, LossNormalizer, Tokenizer,
                       TokenizerConfig, Transformer, compile_module, latent_health,
                       mae_mask, patchify, reader_mask, reconstruction_loss, rope_angles,
                       scale_pixels, unpatchify)

REPO = Path(data.__file__).parent


# --------------------------------------------------------------------------------- data.py

ENV = f"{__name__}:PaintEnv"


class PaintEnv:
    """Bring your own environment: the frame shows the last action, the step and the seed.

    A class of 5, two keys, one number. Seeds divisible by 3 end on step 12, others never.
    """
    copyable = True
    spec = EnvSpec("paint", 8, 12, ActionSpec((5, 2, 2), 1), ("four", "both_keys"))

    def reset(self, seed):
        self.seed, self.steps = seed, 0
        return self.paint(self.spec.actions.zeros())

    def paint(self, action):
        frame = np.zeros((8, 12, 3), np.uint8)
        frame[..., 0] = action[0]
        frame[:4, :, 1], frame[4:, :, 1] = action[1:3]
        frame[..., 2] = self.steps
        frame[0, 0, 2] = self.seed % 256
        return frame

    def step(self, action):
        self.steps += 1
        events = np.array([action[0] == 4, action[1:3].all()])
        return self.paint(action), events, self.seed % 3 == 0 and self.steps >= 12


class PlayerEnv(PaintEnv):
    """PaintEnv with a recorded player, who always takes the class of his skill."""
    skills = {"1": 0.75, "4": 0.25}
    action = np.zeros(4, np.float32)

    def player(self, rng, skill):
        self.action = np.array([int(skill), 0, 0, 0], np.float32)
        return self

    def act(self):
        return self.action

    def probe(self):
        return {"probe_class": np.uint8(self.action[0])}


class OpenEnv(PaintEnv):
    """PaintEnv that holds what can't be copied, once it is played."""

    def reset(self, seed):
        self.file = open(os.devnull)            # noqa: SIM115 (as long as the world)
        return super().reset(seed)


class SharedEnv(PaintEnv):
    """PaintEnv whose steps are counted by a simulator that all copies share."""
    simulator = SimpleNamespace(steps=0)

    def reset(self, seed):
        self.simulator.steps = 0
        return super().reset(seed)

    def step(self, action):
        self.simulator.steps += 1
        self.steps = self.simulator.steps - 1
        return super().step(action)


class BufferEnv(PaintEnv):
    """PaintEnv that draws into one array, as emulators do; its player moves one action."""

    def paint(self, action):
        self.buffer = getattr(self, "buffer", np.zeros((8, 12, 3), np.uint8))
        self.buffer[:] = super().paint(action)
        return self.buffer

    def player(self, rng, skill):
        action = self.spec.actions.zeros()

        def act():
            action[:] = self.spec.actions.sample(rng)
            return action
        return SimpleNamespace(act=act)


class OddEnv(PaintEnv):
    """PaintEnv whose answers aren't what its spec says."""
    frame, events = staticmethod(lambda x: x), staticmethod(lambda x: x)

    def reset(self, seed):
        return self.frame(super().reset(seed))

    def step(self, action):
        frame, events, terminal = super().step(action)
        return self.frame(frame), self.events(events), terminal


ODD = {"floats": ("frame", lambda x: x / 255), "int16": ("frame", lambda x: x.astype("i2")),
       "rgba": ("frame", lambda x: np.pad(x, ((0, 0), (0, 0), (0, 1)))),
       "grey": ("frame", lambda x: x[..., 0]), "pair": ("frame", lambda x: (x, {})),
       "one event": ("events", lambda x: 0.0),
       "three events": ("events", lambda x: [0, 0, 0])}


class FaultyEnv(PaintEnv):
    """PaintEnv that its user has to put right (class 1), or whose process dies (2)."""
    copyable = False

    def step(self, action):
        if action[0] == 1:
            raise UserError("game", "a licence", "buy it")
        os._exit(1)


def start(*words):
    """Start data.py as a user does."""
    path = os.pathsep.join([str(Path(__file__).parent), str(REPO)])
    return subprocess.Popen([sys.executable, "data.py", *map(str, words)], cwd=REPO,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": path})


@pytest.fixture(scope="module")
def paint(tmp_path_factory):
    """25 toy episodes; every third has 13 frames, the others 30."""
    return data.record(ENV, tmp_path_factory.mktemp("paint"), 25, 30, 0, workers=2)


def test_recorded_action_led_to_its_frame(paint):
    """Fails if actions are stored one row early or late, or row 0 counts as labelled."""
    for i in range(3):
        ep = paint.episode(i)
        assert (ep["frames"][:, 0, 1, 0] == ep["actions"][:, 0]).all()
        assert (ep["frames"][:, [0, 7], 1, 1] == ep["actions"][:, 1:3]).all()
        assert (ep["events"][:, 0] == (ep["actions"][:, 0] == 4)).all()
        assert (ep["actions"][1:] != ep["actions"][:-1]).any()          # control: they vary
        assert ep["labelled"].tolist() == [False] + [True] * (len(ep["labelled"]) - 1)


def test_continues_is_zero_on_terminal_frames_only(paint):
    """Fails if the time limit counts as an end, an end is missed, or offsets are wrong."""
    for i in range(6):
        ends = i % 3 == 0
        n = 13 if ends else 30
        assert paint.lengths[i] == n
        assert paint.episode(i)["continues"].tolist() == [1] * (n - 1) + [1 - ends]
        assert paint.offsets[i] == sum(13 if j % 3 == 0 else 30 for j in range(i))
    assert paint.frames_total == paint.offsets[-1] == sum(paint.lengths)


@pytest.mark.parametrize("relevant", [False, True])
def test_windows_stay_inside_an_episode(paint, relevant):
    """Fails if a window runs over the end of its episode into the next."""
    episode, start, _ = paint.sample(np.random.default_rng(0), 400, Windows(13, relevant))
    windows = paint.read(episode, start, 13)
    assert windows["frames"].shape == (400, 13, 8, 12, 3)
    assert (windows["frames"][:, :, 0, 0, 2] == episode[:, None]).all()        # one seed
    assert (windows["frames"][:, :, 1, 1, 2] == start[:, None] + np.arange(13)).all()
    assert (start + 13 <= paint.lengths[episode]).all()
    assert (start == 0).any() and (start + 13 == paint.lengths[episode]).any()  # the edges
    assert (paint.lengths[episode] == 13).any()                                # exact fit


def test_uniform_windows_are_uniform(paint):
    """Fails if short and long episodes are drawn equally often, or an edge is missed."""
    episode, start, task = paint.sample(np.random.default_rng(1), 20000, Windows(13))
    windows = np.maximum(paint.lengths - 12, 0)
    windows *= np.isin(np.arange(25), paint.episodes("train"))
    expected = 20000 * windows / windows.sum()
    count = np.bincount(episode, minlength=25)
    assert (np.abs(count - expected) <= 5 * np.sqrt(expected)).all()
    assert np.bincount(start[paint.lengths[episode] == 30], minlength=18).min() > 400
    assert abs(task.mean() - 0.5) < 0.02


def test_windows_with_edges_show_first_and_last_frames_as_often_as_others(paint):
    """Fails if they don't, or episodes aren't drawn by how many windows they have then."""
    windows = Windows(13, edges=True)
    episode, start, _ = paint.sample(np.random.default_rng(1), 20000, windows)
    counts = np.bincount(start[paint.lengths[episode] == 30], minlength=18)
    at_edges = counts[[0, -1]] / counts[1:-1].mean()
    assert len(counts) == 18 and abs(at_edges / 13 - 1).max() < 0.1
    shown = np.convolve(counts, np.ones(13))
    assert shown[[0, -1]].min() > 0.9 * shown[13:17].mean()
    trained = np.isin(np.arange(25), paint.episodes("train"))
    expected = 20000 * (paint.lengths + 12) * trained / (paint.lengths + 12)[trained].sum()
    count = np.bincount(episode, minlength=25)
    assert (np.abs(count - expected) <= 5 * np.sqrt(expected)).all()


def test_relevant_windows_hold_their_event(paint):
    """Fails if the event can lie in row 0, whose action is not of the window."""
    rng = np.random.default_rng(2)
    for relevant in (True, False):                              # control: uniform windows
        episode, start, task = paint.sample(rng, 300, Windows(6, relevant))
        events = paint.read(episode, start, 6, ["events"])["events"]
        events = events[np.arange(300), 1:, task]
        assert events.any(1).all() == relevant and set(task) == {0, 1}
        assert set(events.argmax(1)[events.sum(1) == 1]) == set(range(5))      # in any row
        assert set(paint.sample(rng, 50, Windows(6, relevant, tasks=[1]))[2]) == {1}


def test_events_ahead_lie_in_their_rows(paint):
    """Fails if `ahead` is off by one, ends with the window, or counts from another row."""
    windows = Windows(6, relevant=True, ahead=(4, 10))
    episode, start, task = paint.sample(np.random.default_rng(3), 900, windows)
    rows = [np.flatnonzero(paint.episode(i)["events"][:, t]) - first
            for i, first, t in zip(episode, start, task, strict=True)]
    assert all(((x >= 4) & (x <= 10)).any() for x in rows)      # even behind the window
    near = [x[(x >= 1) & (x <= 10)] for x in rows]
    assert {int(x[0]) for x in near if len(x) == 1} == set(range(4, 11))
    assert (start + 6 == paint.lengths[episode]).any()


def test_rare_tasks_are_drawn_as_often(paint):
    """Fails if tasks are drawn as often as they happen, or one of their events never."""
    few = data.Dataset(paint.path)                              # task 0 becomes rare
    few.events = few.events[(few.events[:, 2] == 1) | (few.events[:, 0] < 2)]
    assert (few.events[:, 2] == 0).mean() < 0.25
    windows = Windows(6, relevant=True, ahead=(1, 1))
    drawn = few.sample(np.random.default_rng(4), 9000, windows)
    assert abs(drawn[2].mean() - 0.5) < 0.03
    possible = {(i, row - 1, task) for i, row, task in few.events.tolist()
                if i != 19 and 1 <= row <= few.lengths[i] - 5}
    assert set(map(tuple, np.transpose(drawn).tolist())) == possible


def test_splits_are_disjoint(paint, tmp_path):
    """Fails if a validation episode is trained on, or a small dataset has no validation."""
    train, valid = paint.episodes("train"), paint.episodes("valid")
    assert valid.tolist() == [19]
    assert sorted([*train, *valid]) == paint.episodes("all").tolist()
    small = data.record(ENV, tmp_path / "small", 2, 5, 0, workers=1)
    assert [small.episodes(split).tolist() for split in ("train", "valid")] == [[0], [1]]
    for relevant in (False, True):
        for split, first, drawn in (("train", None, {*range(25)} - {19}),
                                    ("valid", None, {19}), ("train", 5, {*range(5)})):
            windows = Windows(5, relevant, split, first=first)
            episode, _, _ = paint.sample(np.random.default_rng(0), 2000, windows)
            assert set(episode.tolist()) == drawn


def test_batch_depends_on_seed_stage_and_step_only(paint):
    """Fails if there is hidden random state: resuming would see other batches."""
    def draw(*key):
        drawn = paint.sample(data.rng_for(*key), 16, Windows(8, relevant=True))
        return str(np.array(drawn))
    assert draw(0, "agent", 7) == draw(0, "agent", 7)
    keys = [(0, "agent", 7), (0, "agent", 8), (1, "agent", 7), (0, "imagine", 7)]
    assert len({draw(*key) for key in keys}) == 4


def test_recording_is_the_same_with_any_number_of_workers(tmp_path):
    """Fails if randomness depends on the process, or a skill is not that of its player."""
    env = f"{__name__}:PlayerEnv"
    one, two, other = (data.record(env, tmp_path / f"{seed} {n}", 12, 5, seed, workers=n)
                       for seed, n in ((5, 1), (5, 3), (6, 2)))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.skills == two.skills and 6 <= one.skills.count("1") < 12
    for i, skill in enumerate(one.skills):
        taken = [0] + [int(skill)] * 4
        assert one.episode(i)["actions"][:, 0].tolist() == taken
        assert one.episode(i)["probe_class"].tolist() == taken
    names, shares = (next(row.split(" | ") for row in data.describe(one).splitlines()
                          if row.startswith(f"| {name} |")) for name in ("task", "four"))
    found = dict(zip(names, shares, strict=True))
    assert (found["1"], found["4"]) == ("0 %", "100 %")
    about = data.read_about(tmp_path / "5 1")       # as if players had come to be others
    about["settings"]["skills"][3] = "9"
    data.write_json(tmp_path / "5 1" / "dataset.json", about)
    with pytest.raises(UserError, match=r"skills\[3\] = . for .*begun with 9; need"):
        data.record(env, tmp_path / "5 1", 12, 5, 5)


def test_vec_env_equals_single_envs():
    """Fails if workers mix up environments, step a finished one, or begin others."""
    seeds, rng, single = range(5), np.random.default_rng(0), [PaintEnv() for _ in range(5)]
    with data.VecEnv(ENV, seeds, workers=2) as env:
        for _ in range(2):
            frames, ended = env.reset(), np.zeros(5, bool)
            last = [e.reset(seed) for e, seed in zip(single, seeds, strict=True)]
            assert (frames == last).all()
            for _ in range(14):
                actions = env.spec.actions.sample(rng, 5)
                frames, events, terminal = env.step(actions)
                for i in range(5):
                    one = last[i], np.zeros(2), True
                    if not ended[i]:
                        one = single[i].step(actions[i])
                    assert (frames[i] == one[0]).all() and (events[i] == one[1]).all()
                    assert terminal[i] == one[2]
                    last[i], ended[i] = frames[i], one[2]
            assert ended.tolist() == [True, False, False, True, False]
        processes = env.processes
        assert all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("action, message", [(1, "a licence"), (2, "a worker that died")])
def test_a_worker_that_fails_is_one_error(action, message):
    """Fails if an error in a worker, or its death, gives a traceback or hangs us."""
    with data.VecEnv(f"{__name__}:FaultyEnv", [0, 1], workers=2) as env:
        env.reset()
        with pytest.raises(UserError, match=message):
            env.step(np.full((2, 4), action))


def test_worlds_that_draw_into_one_buffer_are_recorded_frame_by_frame(tmp_path):
    """Fails if a frame, or an action that a player uses again, is kept without a copy."""
    env = BufferEnv()
    assert env.reset(1) is env.step(env.spec.actions.zeros())[0]            # control
    dataset = data.record(f"{__name__}:BufferEnv", tmp_path, 1, 9, 1, workers=1)
    rows, plain = dataset.rows(0), PaintEnv()
    frames = [plain.reset(1)] + [plain.step(action)[0] for action in rows["actions"][1:]]
    assert (rows["frames"] == frames).all() and len(np.unique(rows["actions"], axis=0)) > 5
    with data.VecEnv(f"{__name__}:BufferEnv", [1, 2], workers=1) as worlds:
        first = worlds.reset()
        kept = first.copy()
        worlds.step(np.ones((2, 4)))
        assert (first == kept).all()


@pytest.mark.parametrize("odd", ODD)
def test_answers_other_than_the_spec_says_are_refused_at_once(odd, monkeypatch):
    """Fails if floats become black, int16 wraps, or another shape is found later."""
    monkeypatch.setattr(OddEnv, ODD[odd][0], staticmethod(ODD[odd][1]))
    env = data.make_env(f"{__name__}:OddEnv")
    with pytest.raises(UserError, match=r"got (a frame|events) .*need .*do: correct"):
        env.reset(1)
        env.step(env.spec.actions.zeros())


def test_events_are_counts_that_do_not_wrap(monkeypatch):
    """Fails if 256 events of one step become none."""
    monkeypatch.setattr(OddEnv, "events", staticmethod(lambda x: np.array([256, 0])))
    env = data.make_env(f"{__name__}:OddEnv")
    env.reset(1)
    assert env.step(env.spec.actions.zeros())[1].tolist() == [255, 0]
    with pytest.raises(UserError, match="an action"):
        env.step(np.zeros(3))


@pytest.mark.parametrize("wrong", [{"prompt_order": (("fuor", 1),)},
                                   {"achievements": ("fuor",)},
                                   {"needs": (("fuor", 1, 2, 3),)}])
def test_a_task_that_is_none_is_refused_by_the_spec(wrong):
    """Fails if a typing error in a prompt is found in the last evaluation."""
    with pytest.raises(UserError, match="fuor"):
        replace(PaintEnv.spec, **wrong)


def test_an_error_in_a_world_shows_its_traceback_and_one_line(monkeypatch, capfd):
    """Fails if a user can't see where his own code went wrong, an OSError of his is called
    a full disk, or a world that calls exit ends the program without a word."""
    for fault, name in ((lambda x: os.stat("/nowhere"), "FileNotFoundError"),
                        (lambda x: sys.exit("window closed"), "SystemExit")):
        monkeypatch.setattr(OddEnv, "frame", staticmethod(fault))
        with pytest.raises(UserError, match=f"{name} in the environment paint"):
            data.make_env(f"{__name__}:OddEnv").reset(1)
        assert "Traceback" in (shown := capfd.readouterr().err) and "test_" in shown


def test_half_written_episodes_are_recorded_again(tmp_path):
    """Fails if a .tmp or a cut-off file counts as an episode, or whole ones are redone."""
    made = data.record(ENV, tmp_path, 4, 20, 1, workers=1)
    about = json.loads((tmp_path / "dataset.json").read_text())
    keep, cut, lost = (data.episode_path(tmp_path, i) for i in range(3))
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(UserError, match="episode_00001"):
        data.Dataset(tmp_path)
    lost.rename(lost.with_suffix(".tmp"))
    about.update(complete=False, command="python data.py record --seed 1")
    data.write_json(tmp_path / "dataset.json", about)
    with pytest.raises(UserError, match="incomplete.*record --seed 1"):
        data.Dataset(tmp_path)
    before = keep.stat().st_mtime_ns
    again = data.record(ENV, tmp_path, 4, 20, 1, workers=1)
    assert again.fingerprint == made.fingerprint and keep.stat().st_mtime_ns == before


def test_recording_into_other_settings_is_refused(paint):
    """Fails if two recordings get mixed in one folder. Control: the same settings pass."""
    with pytest.raises(UserError, match="seed = 1.*need.*do:"):
        data.record(ENV, paint.path, 25, 30, 1, workers=1)
    same = data.record(ENV, paint.path, 25, 30, 0, workers=1)
    assert same.fingerprint == paint.fingerprint


def test_imported_episodes_are_checked(tmp_path):
    """Fails if an importer's mistake gets into a dataset. Control: its good episode."""
    spec = EnvSpec("toy", 4, 4, ActionSpec((3,), 2), ())        # no tasks: width 0
    actions = spec.actions.sample(np.random.default_rng(0), 6)
    good = data.Episode(np.zeros((6, 4, 4, 3)), actions, np.zeros((6, 0)), np.ones(6))
    data.write_episode(tmp_path, 0, good)
    data.finish_dataset(tmp_path, spec, {"source": "test"})
    dataset = data.Dataset(tmp_path)
    read = dataset.read([0], [1], 4)
    assert (read["actions"][0] == actions[1:5]).all() and dataset.spec == spec
    assert read["events"].shape == (1, 4, 0) and read["continues"].dtype == np.float32
    bad = [good._replace(actions=actions + np.float32(shift))
           for shift in ([3, 0, 0], [-3, 0, 0], [0.5, 0, 0], [0, 0, 2], [np.nan, 0, 0])]
    bad += [good._replace(**{name: wrong}) for name, wrong in (
        ("events", np.zeros((6, 1))), ("frames", good.frames[:, :3]),
        ("continues", np.zeros(6)), ("labelled", np.ones(6)))]
    for episode in bad:
        data.write_episode(tmp_path, 0, episode)
        with pytest.raises(UserError, match="episode_00000"):
            data.finish_dataset(tmp_path, spec, {})
    with pytest.raises(UserError, match="rows"):
        data.write_episode(tmp_path, 0, good._replace(frames=good.frames[:3]))


def test_changed_bytes_and_older_versions_are_refused(tmp_path):
    """Fails if damaged or older data is trained on, or the message lacks what to do."""
    data.record(ENV, tmp_path, 2, 5, 1, workers=1)
    path = data.episode_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    changed = data.Dataset(tmp_path)
    assert len(changed.rows(0)) == 5                            # control
    for _ in range(2):
        with pytest.raises(UserError, match="changed bytes.*episode_00001.*record"):
            changed.rows(1)
    about = json.loads((tmp_path / "dataset.json").read_text())
    data.write_json(tmp_path / "dataset.json", {**about, "version": 1})
    with pytest.raises(UserError, match="version 1, not 2: record it again"):
        data.Dataset(tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    """Fails if a failed write damages the file of before, or leaves a part of its own."""
    def full(number):
        raise OSError(errno.ENOSPC, "full")
    path, before = tmp_path / "a.json", tmp_path / "before.json"
    data.write_json(path, {"a": 1})
    data.write_whole(path, lambda file: file.write(b"[2]"), keep=before)
    assert data.read_json(before) == {"a": 1} and data.read_json(path) == [2]  # control
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no room.*full.*need both"):
        data.write_json(path, {"a": 3})
    assert data.read_json(path) == [2] and len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="got 0 MB free.*make room"):
        data.record(ENV, tmp_path / "set", 4, 20, 1, workers=1)


def test_two_recordings_at_once_are_one(tmp_path):
    """Fails if one deletes the other's files, or records what the other has."""
    words = ("record", "--env", ENV, "--episodes", 40, "--length", 200, "--workers", 1,
             "--out", tmp_path / "both")
    first, second = start(*words), start(*words)
    said = [run.communicate(timeout=100) for run in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    waited = sum("Waiting for" in text and "writes" in text for text, _ in said)
    recorded = sum("40 episodes to record" in text for text, _ in said)
    assert (waited, recorded) == (1, 1)
    assert len(data.Dataset(tmp_path / "both").lengths) == 40


def test_workers_are_as_many_as_the_cores_we_may_use(tmp_path, monkeypatch):
    """Fails if a container's limit doesn't count, or "max" is taken for one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(data, "CPU_LIMIT", limit)
    for text, workers in (("250000 100000", 2), ("50000 100000", 1), ("max 100000", 64)):
        limit.write_text(text)
        assert data.count_workers(0) == workers and data.count_workers(3) == 3
    limit.unlink()
    assert (data.count_workers(0), data.count_workers(0, 5)) == (64, 5)


class EditedEnv(PaintEnv):
    """PaintEnv that was edited after it had been recorded."""
    brighter, unseeded = 0, False

    def paint(self, action):
        again = np.random.default_rng().integers(100) if self.unseeded else 0
        return super().paint(action) + np.uint8(self.brighter + again)


def test_an_edited_world_is_noticed(tmp_path, monkeypatch, capsys):
    """Fails if a world with another spec, or other pictures, passes for the recorded one;
    where it doesn't follow from its seed a line says so."""
    name = f"{__name__}:EditedEnv"
    dataset = data.record(name, tmp_path / "one", 2, 6, 5, workers=1)
    capsys.readouterr()
    data.check_world(name, dataset)
    assert not capsys.readouterr().out
    monkeypatch.setattr(EditedEnv, "brighter", 40)
    with pytest.raises(UserError, match="got other first frames from .*EditedEnv than in"):
        data.check_world(name, dataset)
    monkeypatch.setattr(EditedEnv, "unseeded", True)
    data.check_world(name, dataset)
    assert "doesn't follow from its seed" in capsys.readouterr().out
    data.check_world(ENV, dataset)                      # control: of another one's play
    dataset.spec = replace(dataset.spec, idle=(1, 0, 0))
    data.check_world(name, dataset)                     # what no key sends is the game's
    assert dataset.spec == EditedEnv.spec
    dataset.spec = replace(dataset.spec, tasks=("both_keys", "four"))
    with pytest.raises(UserError, match=r"got tasks \['four', 'both_keys'\] of"):
        data.check_world(name, dataset)


def test_many_episodes_need_few_open_files(tmp_path):
    """Fails if more are open at once than 64, or too few are called a damaged episode."""
    out = data.record(ENV, tmp_path / "many", 80, 2, 0, workers=1).path
    code = f"import resource, data; resource.setrlimit(resource.RLIMIT_NOFILE, (%d, %d));" \
        f" data.run_cli(lambda: data.describe(data.Dataset({str(out)!r})))"
    for limit, right in ((64, True), (12, False)):
        run = subprocess.run([sys.executable, "-c", code % (limit, limit)], cwd=REPO,
                             text=True, capture_output=True)
        assert (run.returncode == 0) == right, run.stderr
    assert "do: 'ulimit -n 64'" in run.stderr and "delete" not in run.stderr


def test_commands_record_and_describe(tmp_path):
    """Fails if a user's mistake ends in a traceback or in success, or a command breaks."""
    new = "--env", ENV, "--out", tmp_path / "x"
    for words, need in [(("describe", "--data", tmp_path), "without a dataset.json"),
                        (("record", *new, "--env", "nope"), "'nope'"),
                        (("record", *new, "--episodes", 0), "0 episodes"),
                        (("record", *new, "--skill", "x"), "--skill x"),
                        (("record", *new, "--flag"), "--flag")]:
        run = start(*words)
        last = run.communicate()[1].splitlines()[-1]
        assert run.returncode == 2 and "error: " in last and need in last, last
    assert not (tmp_path / "x").exists()
    run = start("record", *new, "--episodes", 3, "--length", 4)
    table = run.communicate()[0].partition("| task")[2]
    assert run.returncode == 0 and "| episodes | 3 | 3 |" in table and "| four | " in table
    described = start("describe", "--data", tmp_path / "x").communicate()
    assert described == ("| task" + table, "")


def test_interrupted_recording_goes_on(tmp_path):
    """Fails if Ctrl-C loses whole episodes, leaves half ones, or does not exit with 130."""
    words = f"record --env {ENV} --episodes 4000 --length 30 --workers 1"
    words += f" --out {tmp_path}/set"
    run = start(*words.split())
    while not (tmp_path / "set/episode_00005.npy").exists():
        assert run.poll() is None, run.communicate()
    run.send_signal(2)
    last = run.communicate(timeout=20)[1].splitlines()[-1]
    assert run.returncode == 130
    assert last == f"interrupted: the same command goes on: python data.py {words}"
    about = json.loads((tmp_path / "set/dataset.json").read_text())
    kept = sorted((tmp_path / "set").glob("episode*"))
    assert not about["complete"] and about["command"] in last and 6 <= len(kept) < 4000
    assert all(len(data.open_episode(path, PaintEnv.spec)) in (13, 30) for path in kept)


def test_every_action_has_a_control():
    """Fails if own keys are ignored, two actions share one, one is lost."""
    env = PaintEnv()
    found = data.controls(env)                                  # declares none
    labels = [*(f"action {i}" for i in range(5)), "key 0", "key 1"]
    assert [x["label"] for x in found] == labels
    assert [(x["column"], x["value"]) for x in found[4:]] == [(0, 4), (1, 1), (2, 1)]
    assert len({x["key"] for x in found}) == 7 and all(x["key"] for x in found)
    env.spec = replace(env.spec, action_names=("noop", "go_left", "go_right", "up", "dig"))
    arrows = ["ArrowLeft", "ArrowRight", "ArrowUp"]
    assert [x["key"] for x in data.controls(env)] == ["", *arrows, "1", "2", "3"]
    env.keys = {"x": "dig", " ": "key 1"}
    assert [x["key"] for x in data.controls(env)] == ["", *arrows, "x", "", " "]


@pytest.mark.parametrize("idle, right", [
    ((), True), ((4, 0, 1), True), ((0, 0), False), ((0, 0, 0, 0), False),
    ((5, 0, 0), False), ((0, -1, 0), False), (("noop", 0, 0), False)])
def test_idle_is_a_class_of_each_column(idle, right):
    """Fails if an idle action that isn't one is taken, or is lost with a run."""
    spec = PaintEnv.spec
    if right:
        assert EnvSpec.from_json(replace(spec, idle=idle).to_json()).idle == idle
    else:
        with pytest.raises(UserError, match="got idle .* of paint; need"):
            replace(spec, idle=idle)


def test_copied_environments_go_their_own_way():
    """Fails if a copy shares its state with the original, or what can't be copied is."""
    env, action = PaintEnv(), np.ones(4, np.float32)
    env.reset(1)
    twin = data.copy_env(env)
    assert (env.step(action)[0] == twin.step(action)[0]).all()
    twin.step(action)
    assert (env.steps, twin.steps) == (1, 2)
    env = OpenEnv()
    assert data.copy_env(env) is not None                       # control: not yet open
    env.reset(1)
    assert data.copy_env(env) is None


@pytest.mark.parametrize("kind, copied", [("PaintEnv", True), ("SharedEnv", False)])
def test_worlds_that_share_their_simulator_are_not_copied(kind, copied):
    """Fails if a copy, or finding out, moves the world, or if no world is copied."""
    env, action = data.make_env(f"{__name__}:{kind}"), np.ones(4, np.float32)
    assert (env.reset(1) == PaintEnv().reset(1)).all()
    twin = data.copy_env(env)
    assert (twin is not None) == copied
    if copied:
        twin.step(action)
    plain = PaintEnv()
    plain.reset(1)
    for _ in range(2):
        assert (env.step(action)[0] == plain.step(action)[0]).all()


def test_data_needs_no_torch():
    """Fails if data.py imports torch: recording runs many processes."""
    script = "import sys, data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPO).returncode == 0


# ----------------------------------------------------- tokenizer.py, dynamics.py, agent.py

FIVE = ActionSpec(classes=(5,))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def randomize(module, seed=0, std=0.3):
    """Random weights: a zero output makes every perturbation test pass by silence."""
    generator = seeded(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return module.eval()


def tiny_tokenizer(**changes):
    """Six patches of 4 x 4 pixels; two packed tokens of 6 channels."""
    sizes = dict(height=8, width=12, patch=4, dim=16, layers=3, heads=4, kv_heads=2,
                 latents=4, channels=3, pack=2, context=3)
    return randomize(Tokenizer(TokenizerConfig(**sizes | changes)))


def tiny_dynamics(spec=FIVE, **changes):
    """One time layer, that sees 4 frames."""
    sizes = dict(tokens=2, channels=6, tasks=3, dim=16, layers=3, heads=4, kv_heads=2,
                 registers=1, context=4, time_every=3, k_max=8)
    return randomize(Dynamics(DynamicsConfig(**sizes | changes), spec))


def tiny_agent(spec=FIVE, **changes):
    return randomize(Agent(AgentConfig(**dict(hidden=16) | changes), 16, spec, 3))


def tiny_transformer(layers=2, every=2, dense=False, context=3):
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2, context=context)
    return randomize(Transformer(cfg, layers, every, dense))


def play_inputs(B=2, T=6, spec=FIVE, seed=0, task=None):
    """A random Batch, all labelled. With a task number: told it, no events, no ends."""
    actions = torch.from_numpy(spec.sample(np.random.default_rng(seed), B, T))
    batch = Batch(normal(B, T, 2, 6, seed=seed), actions, torch.ones(B, T).bool())
    if task is None:
        return batch
    return batch._replace(task=torch.full((B, T), task), events=torch.zeros(B, T, 3),
                          continues=torch.ones(B, T), asked=torch.ones(B, T).bool())


def pictures(*lead):
    return (normal(*lead, 8, 12, 3) * 60 + 128).clamp(0, 255).byte()


def levels(B, T, tau=0.5, d=0.125):
    return torch.full((B, T), tau), torch.full((B, T), d)


def largest(change, *kept):
    """abs, largest over all axes but those kept."""
    return change.detach().abs().amax([i for i in range(change.dim()) if i not in kept])


def watch(model, seen):
    """From here on the list gets the inputs of each call: z_tilde, tau, d, batch."""
    return model.register_forward_hook(lambda _, inputs, out: seen.append(inputs[:4]))


# ---------------------------------------------- tokenizer.py: transformer, causal tokenizer

def naive_attention(layer, x, mask):
    """Section 3.4 in float64, RoPE by complex numbers: x (L, 16), 4 heads on 2 kv heads."""
    spin = torch.arange(len(x))[:, None] * 1000.0 ** -torch.tensor([0, 0.5]).double()
    y = torch.zeros_like(x)

    def turned(x, norm):
        x = x / (x.square().mean(1, keepdim=True) + 2 ** -23).sqrt() * norm.weight
        x = torch.complex(x[:, :2], x[:, 2:]) * torch.polar(torch.ones_like(spin), spin)
        return torch.cat([x.real, x.imag], 1)

    for head in range(4):
        rows, kv = (slice(4 * n, 4 * n + 4) for n in (head, head // 2))
        q = turned(x @ layer.q.weight[rows].T, layer.q_norm)
        k = turned(x @ layer.k.weight[kv].T, layer.k_norm)
        scores = (50 * torch.tanh(q @ k.T / 2 / 50)).masked_fill(~mask, -math.inf)
        y[:, rows] = scores.softmax(1) @ x @ layer.v.weight[kv].T
    return y @ layer.out.weight.T


@pytest.mark.parametrize("kind", ["space", "time", "dense"])
@torch.no_grad()
def test_attention_equals_naive_loop(kind):
    """Fails if heads, GQA groups, axis, QK-norm, RoPE, soft cap, mask or block differ."""
    cfg = TokenizerConfig(dim=16, heads=4, kv_heads=2)
    block, x = randomize(Block(cfg, kind), std=0.6).double(), normal(2, 3, 4, 16).double()
    block.attention.k_norm.float()
    block.attention.q_norm.float().weight *= 30                 # the soft cap matters
    L = {"space": 4, "time": 3, "dense": 12}[kind]
    mask, axis = reader_mask(L - 2, 2), 2 if kind == "time" else 1
    normed = torch.rms_norm(x, (16,), block.norm1.weight).transpose(1, axis)
    y = [naive_attention(block.attention, row, mask) for row in normed.reshape(-1, L, 16)]
    y = x + torch.stack(y).view(normed.shape).transpose(1, axis)
    normed = torch.rms_norm(y, (16,), block.norm2.weight)
    gate = block.gate(normed)
    want = y + block.down(gate * gate.sigmoid() * block.up(normed))
    got = block(x, rope_angles(torch.arange(L), 4), mask)
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_transformer_is_causal_and_windowed(dense):
    """Fails if frame t sees t + 1, or more than `context`, or a single image any other."""
    model, mask, x = tiny_transformer(3, 3, dense), reader_mask(4, 0), normal(2, 7, 4, 16)
    changed, single = x.clone(), torch.tensor([True, False])
    changed[:, 2] += 1
    by_frame = largest(model(x, mask) - model(changed, mask), 1)
    assert by_frame[:2].max() == 0 and by_frame[5:].max() == 0  # one time layer: 3 frames
    assert by_frame[2:5].min() > 1e-3                           # control
    out, moved = (model(y, mask, single=single) for y in (x, changed))
    by_frame = largest(out - moved, 0, 1)
    assert by_frame[0].nonzero().tolist() == [[2]] and by_frame[1, 2:5].min() > 1e-3
    kinds = [block.kind for block in tiny_transformer(8, 4, dense).blocks]
    assert [i for i, kind in enumerate(kinds) if kind != "space"] == [2, 6]


def stream(model, x, mask, sizes, cache):
    """x in parts of these sizes through the cache; yields what each part gave."""
    for part in x.split(sizes, 1):
        yield model(part, mask, cache)
        cache.advance(part.shape[1])


@pytest.mark.parametrize("layers, dense, context, sizes", [
    *((4, dense, 3, sizes) for dense in (False, True) for sizes in
      ([1] * 44, [4, 1, 1, 5, 33], [2, 2, 1, 1, 1, 37], [44])), (2, False, 20, [1] * 44),
    (2, False, 20, [15, 1, 1, 1, 12, 1, 13]), (2, False, 20, [8, 5, 3, 1, 1, 1, 24, 1])])
def test_cache_equals_full_forward(layers, dense, context, sizes):
    """Fails if RoPE offset, window or slots are wrong, or a ring exceeds its past."""
    model, mask = tiny_transformer(layers, 2, dense, context), reader_mask(3, 1)
    x, cache, t = normal(2, 44, 4, 16), Cache(context), 0
    full = model(x, mask)
    for size, out in zip(sizes, stream(model, x, mask, sizes, cache), strict=True):
        assert torch.allclose(out, full[:, t:t + size], atol=1e-5), t
        twin, t = cache.branch(1), t + size
        twin.advance(size)
        assert twin.layers[1][0].shape[-3] == min(context, 16 * math.ceil(t / 16))
        out = model(x[:, t:t + 1], mask, twin) if t < 44 else full[:, t:]
        assert torch.allclose(out, full[:, t:t + 1], atol=1e-5), t


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_compiled_passes_compute_what_eager_ones_do(frozen, capsys):
    """Fails if the compiled pass of a frame sees a stale slot, ring or weight, or there is
    none."""
    model, mask, x = tiny_transformer(context=20), reader_mask(3, 1), normal(1, 22, 4, 16)

    def passes():                                       # rings of 16 slots, then 20
        return [model(x, mask), *stream(model, x, mask, 1, Cache(20))]

    want = passes()
    compile_module(model, torch.device("cpu"), frozen)
    if "doesn't work" in capsys.readouterr().out:
        pytest.skip("no C++ compiler")
    assert bool(model.compiled) == frozen != bool(model.blocks[0].compiled)
    for got, expected in zip(passes(), want, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_cache_go_their_own_way():
    """Fails if a branch shares memory, rows are mixed up, or a start too late is seen."""
    model, mask, x = tiny_transformer(), reader_mask(3, 1), normal(2, 5, 4, 16)
    cache, late, now = Cache(3), Cache(3, 3), x[:, 4:]
    list(stream(model, x[:, :4], mask, 4, cache))
    list(stream(model, x[1:, 3:4], mask, 1, late))              # row 1, begun at frame 3
    want, alone = model(now, mask, cache.branch(1)), model(x[:, 3:], mask)[:, 1:]
    twice = model(now.repeat(2, 1, 1, 1), mask, cache.branch(2))
    list(stream(model, normal(4, 3, 4, 16), mask, 1, cache.branch(2)))      # in all slots
    mixed = cache.branch(1)
    mixed.copy_rows(torch.tensor([1]), late)
    first = model(now, mask, mixed)[0]
    mixed.start = 3
    second = model(now, mask, mixed)[1]
    cache.select_rows(torch.tensor([1]))
    for got, expected in ((twice[:2], want), (twice[2:], want), (first, want[0]),
                          (second, alone[1]), (model(now[1:], mask, cache), want[1:])):
        assert torch.allclose(got, expected, atol=1e-6)
    assert (want - alone)[1].abs().max() > 1e-3                 # control


def test_loss_normalizer_is_a_running_rms():
    """Fails if a loss is divided by itself, terms share an estimate, or no memory grows."""
    norm = LossNormalizer(["a", "b"])
    assert abs(norm({"a": torch.tensor(4.0), "b": torch.tensor(0.1)}) - 2) < 1e-5
    x, rms = torch.tensor(2.0, requires_grad=True), math.sqrt(16 / 11 + 10 / 11 * 4)
    total = norm({"a": x}, {"a": 3.0})
    total.backward()                                            # the RMS is detached
    assert abs(total.item() - 3 * 2 / rms) < 1e-5 and abs(x.grad - 3 / rms) < 1e-5
    norm = LossNormalizer(["a"])
    late = [norm({"a": torch.tensor(5.0 if n < 10 else 0.01)}) for n in range(3100)]
    assert max(late[10:20]) < 0.1 and late[60] > 0.9
    for _ in range(200):
        norm({"a": torch.tensor(0.0)})                      # nothing: it leaves no trace
    assert 7 < norm({"a": torch.tensor(0.1)}) < 8           # 10 / sqrt(0.99 + 0.01 * 100)


@torch.no_grad()
def test_patches_and_their_latents_are_read_and_drawn_where_they_are():
    """Fails if H and W are swapped, padding stays, or a latent changes places."""
    for H, W in ((8, 12), (10, 13)):
        x = normal(2, 3, H, W, 3)
        assert patchify(x, 4).shape == (2, 3, -(-H // 4) * -(-W // 4), 48)
        assert torch.equal(unpatchify(patchify(x, 4), 4, H, W), x)
    assert tiny_tokenizer().own == tiny_tokenizer(latents=6, local=False).own == 0
    model, x = tiny_tokenizer(latents=12), normal(1, 1, 8, 12, 3)       # two of a patch
    model.encoder.blocks = model.decoder.blocks = torch.nn.ModuleList()     # all stays put
    z, position = model.bottleneck(x)[0, 0].unflatten(0, (6, 2)), model.patch_position
    picture = model.reconstruct(z.view(1, 1, 12, 3))[0, 0]
    for p, (row, column) in enumerate(np.ndindex(2, 3)):
        place = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        token = model.patch_in(x[0, 0][place].reshape(-1)) + position[p]
        latents = model.encoder.norm(token + model.latent_query[2 * p:2 * p + 2])
        assert torch.allclose(z[p], model.latent_out(latents).tanh(), atol=1e-5)
        token = model.decoder.norm(model.patch_query[p] + model.latent_in(z[p]).sum(0))
        drawn = model.patch_out(token).view(4, 4, 3)
        assert torch.allclose(picture[place], drawn, atol=1e-5)


@torch.no_grad()
def test_latents_of_neighbouring_patches_are_packed():
    """Fails if packing mixes rows and columns, isn't undone, or a frame's edge is lost."""
    sizes = dict(dim=16, heads=4, kv_heads=2, layers=3, channels=2)
    for height, width, patch, pack, shape, large in (
            (48, 48, 0, 9, (4, 18), 8), (21, 16, 8, 1, (6, 2), 8),
            (64, 64, 0, 9, (9, 18), 8), (210, 160, 0, 9, (20, 18), 16)):
        cfg = TokenizerConfig(height=height, width=width, patch=patch, pack=pack, **sizes)
        tokenizer = randomize(Tokenizer(cfg))
        assert (tokenizer.own, tokenizer.latent_shape) == (1, shape)
        assert tokenizer.patch == large
        frames = torch.randint(256, (1, 2, height, width, 3), generator=seeded()).byte()
        z = tokenizer.encode(frames)
        assert z.shape == (1, 2, *shape) and tokenizer.decode(z).shape == frames.shape
        assert torch.equal(tokenizer.paste(tokenizer.cut(frames)), frames)

        # a token holds the latents of a square of patches, row by row
        bottleneck, side = tokenizer.bottleneck(scale_pixels(frames)), math.isqrt(pack)
        grid = bottleneck.view(1, 2, tokenizer.rows, tokenizer.columns, 2)
        wide = tokenizer.columns // side
        for i in range(shape[0]):
            y, x = side * (i // wide), side * (i % wide)
            square = grid[:, :, y:y + side, x:x + side].flatten(2)
            assert torch.equal(z[:, :, i], square), i
        assert torch.equal(tokenizer.split(z), bottleneck)
    for latents, pack in ((6, 4), (0, 2)):
        with pytest.raises(UserError, match=f"Got tokenizer.latents {latents}, pack"):
            TokenizerConfig(latents=latents, pack=pack)


def test_masked_patches_are_not_seen_and_evaluation_never_masks():
    """Fails if polarity flips, one p serves all, others hide, or encode drops some."""
    share = mae_mask(64, 8, 4000, 0.9, seeded(), "cpu").float().mean(2)
    p = 0.9 * torch.rand(64, 8, 1, generator=seeded())[..., 0]
    assert (share - p).abs().max() < 4 * 0.5 / math.sqrt(4000) and share.std() > 0.2
    assert not mae_mask(4, 2, 9, 0.0, seeded(), "cpu").any()
    model, frames, hidden = tiny_tokenizer(), pictures(1, 2), torch.zeros(1, 2, 6).bool()
    other = frames.clone()
    other[:, :, :4, 4:8] = 255 - other[:, :, :4, 4:8]           # patch 1 of 2 x 3
    x, y = scale_pixels(frames), scale_pixels(other)
    for share in (False, True):
        hidden[..., 1] = share
        same = torch.equal(model.bottleneck(x, hidden), model.bottleneck(y, hidden))
        (sees, a), (_, b) = model.rebuild(frames, hidden), model.rebuild(other, hidden)
        assert same == torch.equal(a, b) == share
    assert sees[:, :, :4, 4:8].unique().numel() == 1            # grey
    sees[:, :, :4, 4:8] = frames[:, :, :4, 4:8]
    assert torch.equal(sees, frames)
    assert torch.equal(model.bottleneck(x).view(1, 2, 2, 6), model.encode(frames))


def test_tokenizer_masks_are_one_way():
    """Fails if encoder patches see latents, or decoder latents see patch queries."""
    model, x = tiny_tokenizer(), normal(1, 4, 10, 16)
    for module, mask, others in ((model.encoder, model.encoder_mask(), 6),
                                 (model.decoder, model.decoder_mask(), 4)):
        for first, last in ((others, 10), (0, others)):
            moved = x.clone()
            moved[:, :, first:last] += 1
            by_token = largest(module(x, mask) - module(moved, mask), 2)
            assert (by_token[:others].max() == 0) == (first == others)
            assert by_token[others:].min() > 1e-3


def test_tokenizer_streams_frame_by_frame():
    """Fails if a stream isn't the clip (a later frame changes z), packing or scale isn't
    undone, tanh is dropped, or z ignores the image."""
    model, frames = tiny_tokenizer(), pictures(2, 7)
    model.latent_std.fill_(0.5)
    z, cache, back = model.encode(frames), model.new_cache(), model.new_cache()
    parts = [model.encode(frames[:, t:t + 1], cache) for t in range(7)]
    assert z.shape == (2, 7, 2, 6) and torch.allclose(torch.cat(parts, 1), z, atol=1e-5)
    whole = model.decode(z).int()
    parts = [model.decode(z[:, t:t + 1], back) for t in range(7)]
    assert (torch.cat(parts, 1).int() - whole).abs().max() <= 1
    bottleneck = model.bottleneck(scale_pixels(frames))
    assert torch.allclose(z, 2 * bottleneck.reshape(z.shape))
    want = (255 * (model.reconstruct(bottleneck) * PIXEL_STD + PIXEL_MEAN)).round()
    assert (whole - want.clamp(0, 255)).abs().max() <= 1 and whole.float().std() > 1
    assert (z[:, 3:] - model.encode(frames[:, 3:])).abs().max() > 1e-3  # the past is seen
    model.latent_out.weight.data.mul_(20)
    bottleneck = model.bottleneck(scale_pixels(frames))
    assert 0.9 < bottleneck.abs().max() <= 1 and bottleneck.std((0, 1)).max() > 0.1


def test_eq5_reconstruction_loss():
    """Fails if Eq. 5's terms are mixed up, or LPIPS sees other than [-1, 1]."""
    x, seen = scale_pixels(torch.tensor([[0] * 3, [255] * 3]).expand(1, 1, 4, 2, 3)), []
    losses = reconstruction_loss(x + 2, x, lambda *ab: seen.append(ab) or ab[0] - ab[1])
    assert abs(losses["mse"] - 4) < 1e-5 and abs(losses["lpips"] - 4 * PIXEL_STD) < 1e-5
    assert seen[0][1].shape == (1, 3, 4, 2) and list(reconstruction_loss(x, x)) == ["mse"]
    assert torch.allclose(seen[0][1], torch.tensor([-1.0, 1]).expand(1, 3, 4, 2))


def test_latent_health_by_hand():
    """Fails if rank isn't of the frames' covariance, or saturation isn't counted."""
    z = 0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).view(2, 3, 1, 3)     # (B, T, S, Z)
    for shift in (0.0, 0.4):                                    # 3 directions, a constant
        got = latent_health(z + shift)
        assert abs(got["latent_rank"] - 3) < 1e-4 and got["tanh_saturated"] == 0
    got = latent_health(torch.tensor([1, 0.5, -0.99, 0]) * normal(4, 3, 1, 1).sign())
    assert abs(got["latent_rank"] - 1) < 1e-4 and abs(got["tanh_saturated"] - 0.5) < 1e-6


# --------------------------------------- dynamics.py: equations, network, loss, the dream

def test_eq4_tau_and_d_lie_on_the_grid():
    """Fails if a level is never drawn, tau is off d's grid, or a row shares one draw."""
    tau, d = sample_tau_d(400, 50, 16, 400, seeded())
    assert (tau / d % 1 == 0).all() and tau.min() == 0 and (tau + d).max() == 1
    for k in (1, 2, 4, 8, 16):
        n, rows = d.numel(), d == 1 / k
        assert abs(rows.float().mean() - 0.2) < 4 * math.sqrt(0.16 / n)     # over log2 d
        shares = torch.bincount((tau[rows] * k).long(), minlength=k) / rows.sum()
        assert len(shares) == k and (shares - 1 / k).abs().max() < 4 / math.sqrt(n / 5 * k)
    assert (d[:, 1:] != d[:, :-1]).float().mean() > 0.7         # drawn for each frame
    _, d = sample_tau_d(8, 5, 16, 3, seeded())
    assert (d[3:] == 1 / 16).all() and (d[:3] > 1 / 16).any()


def test_eq6_and_eq8_in_closed_form():
    """Fails if tau (B, T) is on wrong axes, v scales by tau, or the ramp is flipped."""
    z0, z1, tau = normal(3, 5, 2, 4), normal(3, 5, 2, 4, seed=1), normal(3, 5).sigmoid()
    z_tilde = corrupt(z0, z1, tau)
    want = [torch.einsum("bt,btsz->btsz", *x) for x in ((1 - tau, z0), (tau, z1))]
    assert torch.allclose(z_tilde, sum(want), atol=1e-6)
    assert torch.allclose(x_prediction(z1 - z0, z_tilde, tau, "v"), z1, atol=1e-5)
    assert torch.equal(x_prediction(z1, z0, tau, "x"), z1)
    assert np.allclose([ramp_weight(x) for x in (0, 0.5, 1)], [0.1, 0.55, 1])


def test_eq7_by_an_oracle_and_by_hand():
    """Fails if 1 - tau or a half step is wrong. f(z) = z/2, z_tilde = 1, tau = 0, d = 1/2:
    b1 = -1/2, z' = 7/8, b2 = -7/12, mean -13/24; a prediction of 0 costs (11/24)^2."""
    tau, d = sample_tau_d(20, 6, 16, 20, seeded())
    z0, z1 = normal(20, 6, 2, 3), normal(20, 6, 2, 3, seed=1)
    target = shortcut_target(lambda *_: z1, corrupt(z0, z1, tau), z1, tau, d, 1 / 16)
    for space, want in (("x", torch.ones_like(tau)), ("v", (1 - tau) ** -2)):
        assert shortcut_loss(z1, target, tau, space).max() < 1e-6
        assert torch.allclose(shortcut_loss(z1 + 1, target, tau, space), want, rtol=1e-3)
    one = torch.ones(1, 1, 1, 1)
    for tau, d_min, space, want in ((0.0, 1 / 4, "x", (11 / 24) ** 2),
                                    (0.5, 1 / 4, "x", (3 / 8) ** 2),  # b1 = -1, b2 = -3/2
                                    (0.5, 1 / 4, "v", (3 / 4) ** 2), (0.0, 1 / 2, "x", 25)):
        tau, d = levels(1, 1, tau, 1 / 2)
        target = shortcut_target(lambda z, *_: z / 2, one, 5 * one, tau, d, d_min)
        assert abs(shortcut_loss(0 * one, target, tau, space) - want) < 1e-5


def test_eq7_calls_the_network_at_half_steps_without_gradient():
    """Fails if labels or the stop-gradient are wrong, or frames at d_min move."""
    z, calls = normal(1, 2, 2, 3).requires_grad_(), []
    tau, d = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.5, 0.125]])
    target = shortcut_target(lambda *x: calls.append(x) or x[0] * 0.7, z, z.detach() + 1,
                             tau, d, 0.125)
    (z1, tau1, d1), (z2, tau2, d2) = calls
    assert torch.equal(tau1, tau) and tau2.tolist() == [[0.75, 0.25]]
    assert torch.equal(d1, d2) and d1.tolist() == [[0.25, 0.125]]
    assert torch.allclose(z2[:, 0], z1[:, 0] + 0.25 * (0.7 - 1) * z1[:, 0] / 0.5)
    assert torch.equal(z1[:, 1], z2[:, 1]) and torch.equal(target[:, 1], z[:, 1] + 1)
    assert z1.requires_grad and not target.requires_grad        # control


@pytest.mark.parametrize("k, label, told", [(1, None, 1), (2, None, .5), (4, .125, .125)])
def test_eq2_sampler_follows_an_oracle_straight_to_the_data(k, label, told):
    """Fails if the last step is skipped, or a step labelled with the level it goes to."""
    z0, z1, calls = normal(2, 1, 2, 3), normal(2, 1, 2, 3, seed=1), []
    z = euler_sample(lambda *x: calls.append(x) or z1, z0, k, label)
    assert torch.allclose(z, z1, atol=1e-6) and len(calls) == k
    for i, (z, tau, d) in enumerate(calls):
        assert (tau == i / k).all() and (d == told).all()
        assert torch.allclose(z, corrupt(z0, z1, tau), atol=1e-6)


def test_dynamics_is_causal_in_time():
    """Fails if frame t sees latents or action of t + 1, or not its own."""
    model, batch = tiny_dynamics(), play_inputs(1, 5)
    z, actions = map(torch.clone, batch[:2])
    z[:, 2] += 1
    actions[:, 2] = (actions[:, 2] + 1) % 5
    for pair in ((z, batch.actions), (batch.z, actions)):
        outs = [model(x, *levels(1, 5), batch._replace(actions=a))[0]
                for x, a in (pair, batch[:2])]
        change = largest(outs[0] - outs[1], 1)
        assert change[:2].max() == 0 and change[2:].min() > 1e-4


def test_unlabelled_frames_have_the_base_embedding_alone():
    """Fails if an unlabelled or single frame sees its action, or columns don't add up."""
    spec = ActionSpec((2, 3, 4), 2)
    embed = randomize(ActionEmbedding(spec, 8))
    actions = torch.from_numpy(spec.sample(np.random.default_rng(0), 6, 2))
    out = embed(actions, torch.tensor([[True, False]] * 6))
    assert torch.equal(out[:, 1], embed.base.expand(6, 8))
    for a, got in zip(actions[:, 0], out[:, 0], strict=True):
        rows = [int(a[0]), 2 + int(a[1]), 5 + int(a[2])]
        want = embed.categorical.weight[rows].sum(0) + embed.continuous.weight @ a[3:]
        assert torch.allclose(got, embed.base[0] + want, atol=1e-5)
    model, batch = tiny_dynamics(), play_inputs(1, 3)
    bare = batch._replace(labelled=~batch.labelled)
    outs = [model(batch.z, *levels(1, 3), x._replace(single=torch.tensor([single])))[0]
            for x, single in ((batch, True), (bare, True), (batch, False))]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0][:, 0], outs[2][:, 0])


def test_tau_and_d_labels_reach_the_prediction_one_by_one():
    """Fails if an embedding's row isn't of its level, or an output of its latent."""
    model, batch = tiny_dynamics(), play_inputs(1, 1)
    grid = [(tau, d) for d in (1.0, 0.5, 0.25, 0.125) for tau in np.arange(0, 1, d)]
    outs = [model(batch.z, *levels(1, 1, *level), batch)[0] for level in grid]
    model.tau_embed.weight.data[3] += 1                         # 3/8
    model.d_embed.weight.data[2] -= 1                           # 1/4
    for (tau, d), before in zip(grid, outs, strict=True):
        same = torch.equal(model(batch.z, *levels(1, 1, tau, d), batch)[0], before)
        assert same == (tau != 3 / 8 and d != 1 / 4)
    model.transformer.blocks = torch.nn.ModuleList()            # now every token is alone
    tokens = model.transformer.norm(model.latent_in(batch.z) + model.latent_position)
    got = model(batch.z, *levels(1, 1), batch)[0]
    assert torch.allclose(got, model.latent_out(tokens), atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_agent_token_is_unseen_and_sees_all(dense):
    """Fails if the world model sees the task (causal confusion), or the agent is inert."""
    model, batch = tiny_dynamics(dense=dense), play_inputs(1, 4, task=0)
    (z_a, h_a), (z_b, h_b), (z_none, h_none) = (
        model(batch.z, *levels(1, 4), batch._replace(task=task))
        for task in (batch.task, batch.task + 1, None))
    assert torch.equal(z_a, z_b) and h_none is None
    assert torch.allclose(z_a, z_none, atol=1e-6)
    assert largest(h_a - h_b, 1).min() > 1e-3
    changed = batch.z.clone()
    changed[:, 1] += 1
    change = largest(model(changed, *levels(1, 4), batch)[1] - h_a, 1)
    assert change[0] == 0 and change[1:].min() > 1e-3


def test_frozen_matrices_change_nothing():
    """Fails if weights held in bf16 give other numbers than cast in each call."""
    model, batch, (tau, d) = tiny_dynamics(), play_inputs(), levels(2, 6)
    frozen = freeze(tiny_dynamics(), torch.device("cpu"), "bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, after = (m(batch.z, tau, d, batch)[0] for m in (model, frozen))
    assert torch.equal(before, after)
    assert not torch.equal(before, model(batch.z, tau, d, batch)[0])    # control


def test_levels_of_clean_past_clips():
    """Fails if context isn't at (tau_ctx, d_min), pure noise reaches a row with coarse
    steps or misses one without, or other frames change."""
    model, (tau, d) = tiny_dynamics(k_max=16), sample_tau_d(40, 6, 16, 20, seeded())
    frames, coarse = normal(40, 6, seed=1) > 0, torch.arange(40)[:, None] < 20
    for chosen in (frames, frames[:, :1]):
        shown = show_as_context(tau, d, chosen, model)
        assert torch.equal(shown[0], tau.masked_fill(chosen, 14 / 16))
        assert torch.equal(shown[1], d.masked_fill(chosen, 1 / 16))
    assert ((tau == 14 / 16) & (d == 1 / 16)).any()             # a pair that is trained
    noisy = pure_noise(tau, d, frames, model)
    assert torch.equal(noisy, tau.masked_fill(frames & ~coarse, 0))
    assert (frames & coarse & (tau > 0) & (d == 1 / 16)).any()  # fine frames in coarse rows


def test_dynamics_loss_is_that_of_its_clips_one_by_one():
    """Fails if half steps are of other rows or actions, or weights are ignored."""
    model, batch, seen, errors = tiny_dynamics(), play_inputs(6, 4, task=1), [], []
    batch = batch._replace(labelled=normal(6, 4, seed=2) > 0, single=normal(6, seed=4) > 0)
    batch.z.requires_grad_()
    (tau, d), weight = sample_tau_d(6, 4, 8, 6, seeded()), normal(6, 4, seed=3).sigmoid()
    d[[0, 3]], weight[5], weight[2, 2] = 1 / 8, 0, 0            # coarse: rows 2, 4, 5
    watch(model, seen)
    losses, h, metrics = dynamics_losses(model, batch, tau, d, weight, seeded(1))
    dynamics_losses(model, batch, *levels(6, 4), weight, seeded(1))     # no coarse row
    assert [len(x[0]) for x in seen] == [6, 3, 3, 6] and seen[1][3].task is None
    z_tilde = corrupt(normal(6, 4, 2, 6, seed=1), batch.z, tau)
    for i in torch.arange(6).split(1):
        row = batch.rows(i)
        target = shortcut_target(lambda *x, row=row: model(*x, row)[0], z_tilde[i], row.z,
                                 tau[i], d[i], 1 / 8)
        error = model(z_tilde[i], tau[i], d[i], row)[0] - target
        errors.append(error.square().mean((2, 3)) * weight[i])
    errors, flow = torch.cat(errors), (d == 1 / 8) & (weight > 0)
    assert torch.allclose(losses["dynamics"], errors.sum() / 19, rtol=1e-4)
    assert torch.allclose(metrics["flow"], errors[flow].mean(), rtol=1e-4)
    assert torch.allclose(h, model(z_tilde, tau, d, batch)[1], atol=1e-5)
    losses["dynamics"].backward()
    assert batch.z.grad[5].abs().max() == 0 and largest(batch.z.grad[:5], 0).min() > 0


def test_errors_are_told_apart_by_signal_level_and_step_size():
    """Fails if a frame counts in another's bin, weights don't, or no frame isn't nan."""
    tau = torch.tensor([[0, .5, .75, 0], [0, .375, .25, .75]])
    d = torch.tensor([[1, .5, .25, .5], [.25] * 4])
    error, model = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 99]]), tiny_dynamics(k_max=4)
    got = error_metrics(error, error * (0.9 * tau + 0.1), tau, d, error < 99, model)
    want = {"flow": (2.325 + 1 + 8.75 + 9.75) / 4, "boot": (.1 + 1.1 + .4) / 3,
            "x_error_tau0": 10, "x_error_tau1": 25, "x_error_tau2": math.nan,
            "x_error_tau3": 3, "boot_error_d1": 1, "boot_error_d2": 3}
    assert got.keys() == want.keys()
    assert np.allclose([got[name] for name in want], list(want.values()), equal_nan=True)


def test_processes_share_the_noise_of_the_whole_batch(monkeypatch):
    """Fails if a process draws other noise than that of its rows in one process."""
    whole, dist = noise_like(torch.zeros(6, 2, 3), seeded()), torch.distributed
    assert torch.equal(whole, normal(6, 2, 3))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert torch.equal(noise_like(torch.zeros(2, 2, 3), seeded()), whole[rank::3])


@pytest.mark.parametrize("changes", [
    {}, {"prediction": "v"}, {"loss_space": "v"}, {"dense": True, "time_every": 1},
    {"kv_heads": 4}, {"registers": 0}, {"p_boot": 1.}, {"p_boot": 0., "step_label": "min"}])
def test_ablation_flags_train_and_dream(changes):
    """Fails if a flag of the paper's ablation table crashes, or changes nothing."""
    losses, batch = [], play_inputs(4, 5)
    for flags in ({}, changes):
        model, dream = tiny_dynamics(**flags), Dream(tiny_dynamics(**flags))
        tau, d = sample_tau_d(4, 5, 8, round(model.cfg.p_boot * 4), seeded())
        loss, _, _ = dynamics_losses(model, batch, tau, d, torch.ones(4, 5), seeded())
        loss["dynamics"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        dream.commit(*batch[:3])
        assert dream.step(batch.actions[:, :1])[0].isfinite().all()
        losses.append(loss["dynamics"].item())
    assert np.isfinite(losses).all() and (losses[0] == losses[1]) == (not changes)
    with pytest.raises(UserError, match="step_label min"):      # it knows d_min alone
        tiny_dynamics(p_boot=0.0)


@pytest.mark.parametrize("own, k, step_label, steps, told", [
    ("own", None, None, 4, .25), ("min", None, None, 4, .125), ("own", 0, "min", 4, .25),
    ("own", 2, "min", 2, .125), ("own", 1, "min", 1, .125), ("min", 1, "own", 1, 1)])
def test_sampling_takes_the_steps_that_were_asked_for(own, k, step_label, steps, told):
    """Fails if K or step_label is ignored, also in branches, or has another default."""
    model, dreams, seen = tiny_dynamics(step_label=own), [], []
    if k is not None and step_label != "own":
        dreams = [dream_of(model, tiny_agent(k=k))]
    if k != 0:
        dreams += [Dream(model, k=k, step_label=step_label)]
    watch(model, seen)
    for dream in (*dreams, *(dream.branch(2) for dream in dreams)):
        seen.clear()
        dream.imagine(*play_inputs(2, 1)[1:3])
        assert [tau[0, 0] for _, tau, *_ in seen] == [i / steps for i in range(steps)]
        assert all((d == told).all() for _, _, d, _ in seen)


def test_dream_keeps_one_frame_per_commit():
    """Fails if denoising passes stay in the cache, or context has another label than noise:
    commits equal one full forward, past the window and across a change of task."""
    model, batch, seen, hs = tiny_dynamics(), play_inputs(2, 9), [], []
    task = (torch.arange(9) >= torch.tensor([[5], [7]])).long() + 1
    dream, generator, _ = Dream(model, seeded()), seeded(), watch(model, seen)
    for t in range(9):
        z, *now = (x[:, t:t + 1] for x in (*batch[:3], task))
        dream.imagine(*now)
        assert dream.cache.t == t and len(seen) == t * 5 + 4    # K = 4 passes and a commit
        hs.append(dream.commit(z, *now))
    noise = [torch.randn(2, 1, 2, 6, generator=generator) for _ in range(18)][1::2]
    shown = corrupt(torch.cat(noise, 1), batch.z, torch.full((2, 9), model.tau_ctx))
    assert torch.equal(torch.cat([x[0] for x in seen[4::5]], 1), shown)
    h, other = (model(shown, *levels(2, 9, model.tau_ctx), batch._replace(task=x))[1]
                for x in (task, 0 * task + 1))
    assert torch.allclose(torch.cat(hs, 1), h, atol=1e-5)
    assert largest(other[0] - h[0], 0)[5:].min() > 1e-3         # control: the task matters


def test_branches_share_noise_and_leave_the_dream_alone():
    """Fails if copies differ by more than actions, see another past, or change the dream;
    or `trace` doesn't show the sampler's steps."""
    model, batch, ends, seen = tiny_dynamics(), play_inputs(1, 3), [], []
    actions = torch.tensor([0.0, 3, 0]).view(3, 1, 1)
    for shift, tries in ((0, 0), (0, 2), (1, 0)):
        dream = Dream(model, seeded(), k=2, tau_ctx=0.5)
        dream.commit(batch.z + shift, *batch[1:3])
        for n in [1, 3] * tries:
            ahead = dream.branch(n)
            for _ in range(6):                                  # past the context of 4
                branches, _ = ahead.step(actions[:n])
        seen.append(dream.branch(3).step(actions)[0])
        steps = dream.branch(1).trace(actions[:1])
        assert len(steps) == 2 and torch.equal(steps[0][0], dream.branch(1).noise(1, 1))
        assert torch.allclose(steps[1][1], seen[-1][:1], atol=1e-5)
        ends.append(dream.step(actions[:1])[0])
    assert torch.equal(*ends[:2]) and (dream.branch(1).as_context(batch.z)[1] == .5).all()
    assert torch.allclose(branches[0], branches[2], atol=1e-5)    # the same action
    assert (branches[0] - branches[1]).abs().max() > 1e-2
    assert torch.equal(*seen[:2]) and (seen[2] - seen[0]).abs().max() > 1e-3


# ------------------------------------------------- agent.py: heads, equations, imagination

def spread_out(x, bins):
    """The two-hot weights of x as a row over all bins."""
    index, weight = two_hot(torch.as_tensor(x), bins)
    return torch.zeros(*index.shape[:-1], len(bins)).scatter(-1, index, weight)


@torch.no_grad()
def test_eq9_agent_losses_equal_a_naive_loop():
    """Fails if a target isn't actions[t + 1 + n] or rewards[t + n], or past the end; BC
    counts unlabelled actions, rows that aren't cloned or frames of another prompt; another
    task's event counts."""
    agent, h, batch, T = tiny_agent(), normal(3, 12, 16), play_inputs(3, 12, task=0), 12
    batch.labelled[2, 3] = batch.asked[1, 5] = False
    batch.task[1], batch.task[2] = 2, 3                         # 3: no task, no reward
    batch.events.copy_(torch.rand(3, T, 3, generator=seeded()))
    batch.continues[0, 4] = batch.continues[1, 3] = 0
    losses, metrics = agent_losses(agent, h, batch, torch.tensor([False, True, True]))
    bc, reward, events, ends = [], [], [], []
    for b, t in np.ndindex(3, T):
        task, policy = int(batch.task[b, t]), agent.policy(h[b, t]).log_softmax(-1)
        asked = [agent.reward(h[b, t] + question).log_softmax(-1)
                 for question in agent.question.weight]
        for n in range(MTP + 1):
            known = t + 1 + n < T and batch.labelled[b, t + 1 + n]
            if b > 0 and known and batch.asked[b, t] and batch.asked[b, t + n]:
                bc.append((n, -float(policy[n, int(batch.actions[b, t + 1 + n, 0])])))
            if t + n < T:
                x = batch.events[b, t + n, task] if task < 3 else 0.0
                reward.append(-spread_out(x, agent.bins) @ asked[task][n])
        events += [-spread_out(batch.events[b, t, k], agent.bins) @ asked[k][0]
                   for k in range(3)]
        p = float(agent.continues(h[b, t]).sigmoid())
        ends.append(-math.log(p) if batch.continues[b, t] else -20 * math.log(1 - p))
    want = {"bc": [x for _, x in bc], "reward": reward, "continue": ends, "events": events}
    assert losses.keys() == want.keys()
    for name, values in want.items():
        assert abs(losses[name] - np.mean(values)) < 1e-4, name
    assert abs(metrics["bc_next_action"] - np.mean([x for n, x in bc if n == 0])) < 1e-4
    losses, metrics = agent_losses(agent, h, batch, torch.zeros(3).bool())
    assert losses["bc"] == 0 and metrics["bc_next_action"].isnan()  # nothing was shown


def test_eq9_random_actions_cannot_be_cloned():
    """Fails if a_t leaks into h as its own target: i.i.d. actions have entropy ln 5."""
    torch.manual_seed(0)
    model, agent = tiny_dynamics(), Agent(AgentConfig(hidden=32), 16, FIVE, 3)
    parameters = [p for m in (model, agent) for p in m.parameters() if p.requires_grad]
    optimizer, nlls, copies = torch.optim.Adam(parameters, 1e-2), [], []
    for step in range(120):
        batch = play_inputs(32, 6, seed=step, task=0)
        _, h = model(batch.z, *levels(32, 6, 0.875), batch)
        losses, metrics = agent_losses(agent, h, batch, torch.ones(32).bool())
        # control: a_t itself can be read from h_t, by the head at distance 8
        copy = -action_log_prob(FIVE, agent.policy(h)[:, :, MTP], batch.actions).mean()
        optimizer.zero_grad()
        (losses["bc"] + copy).backward()
        optimizer.step()
        nlls.append(metrics["bc_next_action"].item())
        copies.append(copy.item())
    assert np.mean(nlls[-30:]) > math.log(5) - 0.05 and np.mean(copies[-30:]) < 1.0


def test_two_hot_round_trip():
    """Fails if the bins are reversed, the weights swapped, or the ends wrap around."""
    bins = symexp_bins(255)
    x = torch.tensor([-1e9, -30.0, -1.0, -0.3, 0.0, 1e-3, 0.5, 1.0, 7.7, 1e9])
    weights = spread_out(x, bins)
    assert torch.allclose(weights.sum(-1), torch.ones(10)) and weights.min() > -1e-6
    assert weights[0, 0] == 1 and weights[-1, -1] == 1
    assert torch.allclose((weights @ bins)[1:-1], x[1:-1], rtol=1e-4, atol=1e-5)
    below = int((bins <= 0.5).sum()) - 1                        # its neighbours
    assert weights[6].nonzero().flatten().tolist() == [below, below + 1]
    assert abs(bins[-1] - math.expm1(10)) < 1 and abs(bins[127]) < 1e-6
    logits = normal(10, 255)
    assert torch.allclose(two_hot_mean(logits, bins), logits.softmax(-1) @ bins, atol=1e-2)
    want = (logits.log_softmax(-1) * weights).sum(-1)
    assert torch.allclose(two_hot_log_prob(logits, x, bins), want, atol=1e-5)


def test_action_distributions_against_closed_forms():
    """Fails if columns are mixed up, a sign is flipped, or KL is not KL[pi || prior]."""
    spec, sizes, total, kl = ActionSpec((2, 3, 2)), (2, 3, 2), 0.0, 0.0
    logits, prior = normal(7), normal(7, seed=1)
    p, q = ([part.softmax(0) for part in x.double().split(sizes)] for x in (logits, prior))
    for action in np.ndindex(sizes):
        here, there = (math.prod(float(part[i]) for part, i in zip(x, action, strict=True))
                       for x in (p, q))
        got = action_log_prob(spec, logits, torch.tensor(action).float())
        assert abs(got - math.log(here)) < 1e-5
        total, kl = total + here, kl + here * math.log(here / there)
    assert abs(total - 1) < 1e-6 and abs(action_kl(spec, logits, prior) - kl) < 1e-5
    # KL of (1/2, 1/2) and (9/10, 1/10) is ln(5/3) = 0.5108, the other way 0.3681
    spec, pi, prior = ActionSpec((2,)), torch.zeros(2), torch.tensor([0.9, 0.1]).log()
    assert abs(action_kl(spec, pi, prior) - math.log(5 / 3)) < 1e-5
    assert action_kl(spec, prior, prior) == 0


def test_temperature_prompt_and_ends_of_the_agent():
    """Fails if temperature multiplies, sharpens others, or rare ends keep their weight."""
    spec, h = ActionSpec((2, 5)), normal(1, 16).expand(4000, -1)
    agent, sharp, task = tiny_agent(spec), tiny_agent(spec, prompts=False), torch.arange(3)
    for temperature in (0.5, 1.0, 2.0):
        draws = agent.act(h, seeded(), temperature)
        parts = (agent.policy(h[:1])[0, 0] / temperature).split((2, 5))
        for column, part in zip(draws.T, parts, strict=True):
            shares = torch.bincount(column.long(), minlength=len(part)) / 4000
            assert (shares - part.softmax(0)).abs().max() < 0.03 and draws.dtype == h.dtype
    sharp.sharpen(0.5)
    assert torch.equal(sharp.act(h, seeded()), agent.act(h, seeded(), 0.5))
    assert torch.allclose(sharp.prior(h), 2 * agent.prior(h), atol=1e-6)
    assert torch.equal(sharp.reward(h), agent.reward(h))
    assert torch.equal(sharp.value(h), agent.value(h))
    assert torch.equal(agent.prompt(task), task) and (sharp.prompt(task) == 3).all()
    # of a coin that ends 1 time in 10, 0.9 ln p + 20 * 0.1 ln(1 - p) is best at ln(0.9 / 2)
    agent.continues.out.weight.data.zero_()
    agent.continues.out.bias.data.fill_(math.log(0.9 / 2))
    assert torch.allclose(agent.continue_prob(h), torch.tensor(0.9), atol=1e-5)


def naive_returns(r, c, v, gamma, lam):
    """Eq. 10 by its definition, (T + 1,): n-step returns, weighted by lam."""
    T, returns = len(v) - 1, []
    for t in range(T):
        total, discount, steps = 0.0, 1.0, []
        for i in range(t + 1, T + 1):
            total += discount * r[i]
            discount *= gamma * c[i]
            steps.append(total + discount * v[i])
        mix = sum((1 - lam) * lam ** i * x for i, x in enumerate(steps[:-1]))
        returns.append(mix + lam ** (len(steps) - 1) * steps[-1])
    return [*returns, v[-1]]


def test_eq10_lambda_returns():
    """Fails if an index shifts, c = 0 doesn't cut, lambda mixes wrong terms, R learns."""
    r, v, c = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]]), torch.ones(1, 3)
    assert lambda_returns(r, c, v, 0.5, 0.5).tolist() == [[11.5, 18, 30]]
    c[0, 2] = 0
    assert lambda_returns(r, c, v, 0.5, 0.5).tolist() == [[2 + (10 + 1.5) / 2, 3, 30]]
    r, c, v = torch.rand(3, 4, 7, generator=seeded(), dtype=torch.float64)
    want = [naive_returns(*(x[b].tolist() for x in (r, c, v)), 0.9, 0.7) for b in range(4)]
    assert np.allclose(lambda_returns(r, c, v, 0.9, 0.7), want, atol=1e-9)
    target, bins = torch.ones(1, requires_grad=True), symexp_bins(9)
    logits, counted = normal(2, 9), torch.tensor([True, False])
    loss = value_loss(logits, target.repeat(2), counted, bins)
    assert not loss.requires_grad and loss == -two_hot_log_prob(logits, target, bins)[0]


def test_eq11_gradient_signs_and_weights():
    """Fails if a sign is flipped, the size of A leaks, D+ and D- share a mean, 0/0, or one
    that isn't counted counts."""
    for advantages, alpha, want in (
            ([3.0, 0.1, 0.0, -2.0, -0.5], 0.5, [-1 / 6] * 3 + [1 / 4] * 2),
            ([300.0, 10.0, 0.0, -200.0, -50.0], 0.5, [-1 / 6] * 3 + [1 / 4] * 2),
            ([1.0, -1.0], 0.8, [-0.8, 0.2]), ([1.0, 2.0], 0.5, [-0.25] * 2),
            ([-1.0, -2.0], 0.5, [0.25] * 2)):
        n = len(want)
        log_p, kl = (torch.zeros(n + 2, requires_grad=True) for _ in range(2))
        advantages = torch.tensor([*advantages, 5.0, -5.0])
        loss = pmpo_loss(log_p, advantages, kl + 2, torch.arange(n + 2) < n, alpha, 0.3)
        loss.backward()
        want, share = torch.tensor([*want, 0, 0]), torch.tensor([0.3 / n] * n + [0, 0])
        assert torch.allclose(log_p.grad, want) and abs(loss - 0.6) < 1e-6
        assert torch.allclose(kl.grad, share)


@pytest.mark.parametrize("end_on_event", [True, False])
@torch.no_grad()
def test_imagination_losses_equal_a_naive_loop(end_on_event):
    """Fails if gamma and lambda swap, another action is scored, another task pays, KL is
    reversed, values learn another return, or frames behind a death (or the event) count."""
    agent = tiny_agent(gamma=0.6, pmpo_beta=0.7, end_on_event=end_on_event)
    randomize(agent.prior, seed=1)
    for head in (agent.reward, agent.value):        # numbers in (-1, 1), not near e^10
        head.out.bias.data.view(-1, 255)[:] -= (agent.bins.abs() > 1) * 90
        head.out.weight.data *= 60
    agent.reward.out.bias.data[:255] -= 15 * agent.bins.clamp(-1, 1)
    agent.continues.out.weight.data *= 5
    agent.continues.out.bias.data.fill_(-0.3)
    h, actions, task = normal(8, 6, 16), play_inputs(8, 5).actions, torch.arange(8) % 3
    losses, metrics = imagination_losses(agent, h, actions, task)
    good, bad, values, kls, begins = [], [], [], [], []
    for b in range(8):
        asked = agent.reward(h[b] + agent.question.weight[task[b]])[:, 0].softmax(1)
        c = (agent.continues(h[b])[:, 0, 0] + math.log(20)).sigmoid().tolist()
        begins.append(c[0])
        r, v = (asked @ agent.bins).tolist(), agent.values(h[b]).tolist()
        if end_on_event:
            c = [x * (1 - min(max(y, 0), 1)) for x, y in zip(c, r, strict=True)]
        returns = naive_returns(r, c, v, 0.6, LAMBDA)
        alive = [begins[b], *c[1:5]]        # an event at the start has ended nothing yet
        for t in [t for t in range(5) if math.prod(alive[:t + 1]) > 0.5]:
            pi, prior = (head(h[b, t])[0].log_softmax(0)
                         for head in (agent.policy, agent.prior))
            (good if returns[t] >= v[t] else bad).append(pi[int(actions[b, t, 0])])
            kls.append((pi.exp() * (pi - prior)).sum())
            value = agent.value(h[b, t])[0].log_softmax(0)
            values.append(-spread_out(returns[t], agent.bins) @ value)
    assert len(good) > 3 and len(bad) > 3 and len(kls) < 36    # all cases are there
    policy = 0.5 * np.mean(bad) - 0.5 * np.mean(good) + 0.7 * np.mean(kls)
    assert abs(losses["policy"] - policy) < 1e-4
    assert abs(losses["value"] - np.mean(values)) < 1e-4
    assert abs(metrics["positive_share"] - len(good) / len(kls)) < 1e-6


def imagine(agent, model, horizon=6, C=3):
    """A rollout from 4 contexts with one seed, which is not that of z."""
    batch = play_inputs(4, C, task=1)
    return imagine_rollout(dream_of(model, agent, seeded(1)), agent, batch, horizon)


def test_imagination_step_changes_policy_and_value_alone():
    """Fails if others get a gradient, these none under autocast, or the prior moves."""
    model, agent, task = tiny_dynamics(), tiny_agent(), torch.zeros(4).long()
    randomize(agent.prior, seed=1)
    h, actions, _ = imagine(agent, model)
    assert torch.equal(imagine(agent, model).actions, actions)         # the same seed
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():       # subtle: autocast can keep weights without gradients
            agent.values(h)
            agent.policy(h)
        losses, _ = imagination_losses(agent, h, actions, task)
        sum(losses.values()).backward()
    grads = {n: p.grad for m in (model, agent) for n, p in m.named_parameters()
             if p.grad is not None}
    assert {n.split(".")[0] for n in grads} == {"policy", "value"} and not h.requires_grad
    assert len(grads) == 16 and all(grad.abs().sum() > 0 for grad in grads.values())
    policy, prior = agent.policy(h), agent.prior(h)
    agent.freeze_prior()
    assert torch.equal(agent.prior(h), policy) and not torch.equal(prior, policy)
    assert not any(p.requires_grad for p in agent.prior.parameters())


def test_a_rollout_equals_one_by_full_forwards(monkeypatch):
    """Fails if passes leave traces in the cache, an action isn't the policy's at h, or
    doesn't lead to the next frame, or the task isn't told. All noise is 1."""
    monkeypatch.setattr(Dream, "noise", lambda self, B, T: torch.ones(B, T, 2, 6))
    model, agent, C, H = tiny_dynamics(), tiny_agent(k=2), 3, 6
    agent.act = lambda h, _: (h.sum(1, keepdim=True) * 1e4).floor() % 5     # h decides
    rollout, context = imagine(agent, model), play_inputs(4, C, task=1)
    z = torch.cat([context.z, rollout.z], 1)
    actions = torch.cat([context.actions, rollout.actions], 1)
    whole = play_inputs(4, C + H, task=1)._replace(z=z, actions=actions)
    tau, d = levels(4, C + H, model.tau_ctx)
    shown = corrupt(torch.ones_like(z), z, tau)
    h = model(shown, tau, d, whole)[1]
    assert torch.allclose(rollout.h, h[:, C - 1:], atol=1e-4)
    for t in range(C, C + H):
        clip = whole._replace(actions=actions[:, :t + 1], task=whole.task[:, :t + 1],
                              labelled=whole.labelled[:, :t + 1])

        def last_frame(*new, t=t, clip=clip):
            """Frame t by full forwards over the committed frames before it."""
            inputs = [torch.cat([x[:, :t], y], 1) for x, y in
                      zip((shown, tau, d), new, strict=True)]
            return model(*inputs, clip)[0][:, -1:]

        frame = euler_sample(last_frame, torch.ones(4, 1, 2, 6), 2, model.d_min)
        assert torch.allclose(rollout.z[:, t - C:t - C + 1], frame, atol=1e-4)
        assert torch.equal(agent.act(rollout.h[:, t - C], None), actions[:, t])
    assert rollout.z.std(1).max() > 1e-2                        # control: frames differ


# -------------------------------------------------------------------------------- train.py

FINALS = ("tokenizer.pt", "dynamics.pt", "agent.pt", "imagine.pt", "latents.npy",
          "latents.json", "config.json")


class StageEnv(PaintEnv):
    """PaintEnv without the number, with prompts, achievements and a probe."""
    spec = EnvSpec("keys", 8, 12, ActionSpec(classes=(5, 2, 2)), ("four", "both_keys"),
                   (("four", 2), ("both_keys", 0)), ("four", "both_keys"))

    def probe(self):
        return {"probe_even": np.uint8(self.steps % 2 == 0)}


class NumberEnv(StageEnv):
    """StageEnv with one more number in its actions."""
    spec = replace(StageEnv.spec, actions=ActionSpec(classes=(5, 2, 2), numbers=1))


class TasklessEnv(StageEnv):
    """StageEnv in which there is nothing to do."""
    spec = EnvSpec("taskless", 8, 12, ActionSpec(classes=(5, 2, 2)), ())

    def step(self, action):
        frame, _, terminal = super().step(action)
        return frame, np.zeros(0), terminal


KEYS, NUMBERS, TASKLESS = (f"{__name__}:{name}" for name in (
    "StageEnv", "NumberEnv", "TasklessEnv"))
EPISODES = f"datasets/{KEYS.replace(':', '_')}_6x36"
PLAY = "--data.path", EPISODES
NEW, ALL = ("--run", "new", "--stage", "tokenizer"), ("--run", "new", "--stage", "all")
TINY = f"""--data.env {KEYS} --data.episodes 6 --data.length 36 --data.reference_episodes 2
--data.eval_episodes 2 --data.eval_length 8 --tokenizer.patch 4 --tokenizer.pack 1
--tokenizer.dim 16 --tokenizer.latents 4 --tokenizer.channels 4 --tokenizer.layers 3
--dynamics.dim 16 --dynamics.layers 3 --dynamics.context 8 --agent.hidden 16
--agent.horizon 3 --agent.context 4 --train.tokenizer_batch 2 --train.batch 6
--train.length 6 --train.long_length 12 --train.imagine_batch 4 --train.tokenizer_steps 8
--train.dynamics_steps 8 --train.agent_steps 8 --train.imagine_steps 8
--train.compile false --train.log_every 4""".split()


def serial_work(function, jobs, workers=0):
    for job in jobs:
        yield job, function(*job)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(data, "work", serial_work)


def train_here(folder, *flags, cli=False, pictures=False, save_every=3):
    """train.main() in `folder` as on the command line; checkpoints after steps 3 and 6."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", save_every)
        patch.setattr(train, "VALUE_FIRST", 2)
        patch.setattr(data, "work", serial_work)
        if not pictures:
            patch.setattr(train, "pictures", lambda *_: None)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
        return run_cli(train.main) if cli else train.main()


def of(stage, *flags):
    return "--run", "base", "--stage", stage, *flags


def metrics_of(run, stage):
    """The stage's lines of metrics.jsonl without the rate, which is the machine's."""
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**x, "rate": None} for x in lines if x["stage"] == stage]


def weights(path):
    return torch.load(path, weights_only=True)


def same_tensors(a, b):
    return all(torch.equal(a[m][k], b[m][k]) for m in ("tokenizer", "dynamics", "agent")
               for k in a.get(m, ()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with datasets/ and runs/base, where all four stages are trained."""
    folder = tmp_path_factory.mktemp("finished")
    for stage in STAGES:
        train_here(folder, *of(stage))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of `finished` to break: its folder and its run."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy/runs/base"


@pytest.fixture(scope="module")
def keys(finished):
    return data.Dataset(finished / EPISODES)


def recordings_of(dataset, **settings):
    """train.Recordings whose latents are the numbers of the frames."""
    job = train.Job(None, None, None, train.DataConfig(**settings), None, None, dataset)
    recordings = train.Recordings(job)
    recordings.latents = np.arange(dataset.frames_total, dtype=np.float32)[:, None, None]
    return recordings


# ------------------------------------------------------------------------ flags and presets

def test_flags_are_few_and_real():
    """Fails if there are more than 75 settings, one that is derived from the data is a
    flag, or a preset sets one that doesn't exist, or sizes that don't fit together."""
    names = {f"{prefix}.{f.name}" for prefix, c in train.CONFIGS.items() for f in fields(c)}
    parser = train.make_parser(train.PRESETS)
    flags = {x.dest for x in parser._actions if "." in x.dest}
    assert flags == names - set(train.DERIVED) and len(flags) <= 75
    presets = {**train.PRESETS, **data.world_presets()}
    assert {"cpu", "smoke", "cpu_long", "gpu", "minecraft", "paper"} <= set(presets)
    for preset, settings in presets.items():
        configs = train.parse(["--preset", preset])[1]
        assert set(settings) <= flags
        for prefix, config in configs.items():
            for key, value in config.items():
                assert settings.get(f"{prefix}.{key}", value) == value, (preset, key)


def test_the_preset_follows_the_device(monkeypatch):
    """Fails if --device cpu takes the preset for CUDA where there is one, or the
    reverse."""
    for name, preset in (("cuda", "gpu"), ("cpu", "cpu")):
        monkeypatch.setattr(train, "pick_device", lambda _, name=name: torch.device(name))
        assert train.parse([])[0].preset == preset


@pytest.mark.parametrize("flags, word", [
    (["--dynamics.k_maxx", "4"], "k_maxx"), (["--dynamics.k_max", "6"], "k_max 6"),
    (["--tokenizer.heads", "3"], "heads 3"), (["--dynamics.prediction", "y"], "'y'"),
    (["--data.labels", "7"], "data.labels"), (["--data.labels", "nan"], "data.labels"),
    (["--train.compile", "maybe"], "maybe"), (["--stage", "sleep"], "sleep"),
    (["--device", "abacus"], "abacus"), (["--agent.gamma", "1.5"], "gamma 1.5"),
    (["--train.lr", "nan"], "lr nan"),
    (["--tokenizer.height", "9"], "--tokenizer.height"), (["--dtype", "int3"], "int3"),
    (["--train.long_length", "8"], "dynamics.context 8"), (["--seed", "-1"], "-1"),
    (["--agent.temperature", "0"], "temperature 0"), (["--agent.k", "3"], "agent.k 3"),
    (["--replay", "8", "--stage", "agent"], "--replay 8"), (["--replay", "1"], "replay"),
    (["--tokenizer.dim", "30"], "dim must divide"), (["--base", "x"], "--base x"),
    (["--dynamics.p_boot", "0"], "p_boot 0")])
def test_bad_flags_exit_2_with_one_line(flags, word, tmp_path, capsys):
    """Fails if a bad flag or value gives a traceback, names itself not, or costs a file."""
    with pytest.raises(SystemExit) as stop:
        train_here(tmp_path, *flags, cli=True)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.*"))


# ---------------------------------------------------------------------------------- batches

def test_windows_alternate_between_short_and_long(monkeypatch):
    """Fails if long windows are not every fourth and all of the last tenth, the share is
    another where it doesn't divide 1, or rows don't divide among processes."""
    cfg = train.TrainConfig(batch=12, length=4, long_length=16)
    sizes = [train.batch_shape(cfg, step, 100) for step in range(100)]
    assert sizes[:4] == [(12, 4)] * 3 + [(3, 16)] and set(sizes[90:]) == {(3, 16)}
    assert sum(length == 16 for _, length in sizes[:90]) == 22
    for share, count in ((0.0, 0), (0.4, 36), (0.7, 63), (1.0, 90)):
        cfg.long_share = share
        long = sum(train.batch_shape(cfg, step, 100)[1] == 16 for step in range(90))
        assert abs(long - count) <= 1
    assert train.batch_shape(replace(cfg, long_share=0.0), 99, 100) == (12, 4)
    monkeypatch.setattr(train, "PROCESSES", 2)
    assert train.batch_shape(cfg, 99, 100) == (4, 16)


def test_rates_rise_stay_and_fall():
    """Fails if the warmup is longer than a tenth or shorter than a hundredth, the peak is
    another or forgotten, or the end isn't reached."""
    cfg = train.TrainConfig(cooldown=0.5)
    job = train.Job(None, None, None, None, cfg, None, None, "tokenizer", 100)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    rates = []
    for step in range(100):
        train.set_rates(job, [sgd], step)
        rates.append(sgd.param_groups[0]["lr"])
    assert np.allclose(rates[:10], np.arange(1, 11) / 5) and set(rates[9:51]) == {2.0}
    assert np.allclose(rates[50:], 2 * np.arange(50, 0, -1) / 50)
    job.steps = 20_000
    train.set_rates(job, [sgd], 99)
    assert np.isclose(sgd.param_groups[0]["lr"], 1.0)


def test_a_batch_holds_the_rows_of_its_windows(keys):
    """Fails if a frame gets another one's latents, action, event or end."""
    recordings = recordings_of(keys)
    assert all(windows.edges for _, windows in recordings.anywhere(30, 5))
    kinds = recordings.anywhere(30, 5) + recordings.cloned(30, 5, 0.5)
    batch = recordings.read(np.random.default_rng(0), kinds)
    columns = {name: np.concatenate([keys.episode(i)[name] for i in range(6)])
               for name in ("actions", "labelled", "events", "continues")}
    index = batch.z[:, :, 0, 0].long()
    assert (index.diff(dim=1) == 1).all() and len(batch.z) == 60
    for name, column in columns.items():
        assert np.array_equal(getattr(batch, name), column[index]), name
    shown = batch.events[30:45].gather(-1, batch.task[30:45, :, None])[:, 1:]
    assert shown.any(1).all() and not batch.events[:30, 1:].any((1, 2)).all()   # control


def test_labels_are_the_first_episodes_or_where_a_probe_says(keys):
    """Fails if the share counts frames, a probe is turned round, the batch ignores them, or
    labelled rows are as rare in a batch as in the recordings."""
    def labelled(recordings, n=400):
        kinds = recordings.anywhere(n, 5)
        return recordings.read(np.random.default_rng(0), kinds).labelled[:, -1].float()

    half = recordings_of(keys, labels="0.34")            # 2 of 6
    known = np.arange(keys.frames_total) < keys.offsets[2]
    assert np.array_equal(half.labelled, known)
    rows = labelled(half)
    assert rows[200:].all() and 0.1 < rows[:200].mean() < 0.6
    none = recordings_of(keys, labels="0")
    assert not labelled(none).any() and not none.any_labelled() and half.any_labelled()
    assert labelled(recordings_of(keys)).all()         # control
    even = recordings_of(keys, labels="probe_even")
    truth = np.concatenate([np.arange(n) % 2 == 0 for n in keys.lengths])
    assert np.array_equal(even.labelled, truth)
    with pytest.raises(UserError, match="without probe_odd"):
        recordings_of(keys, labels="probe_odd")


def test_training_reads_training_episodes_alone(copy, monkeypatch):
    """Fails if a stage learns from the held-out episode, or is checked on another."""
    trained, checked = set(), set()

    def noted(self, episode, *rest, real=data.Dataset.read):
        (checked if checks else trained).update(map(int, episode))
        return real(self, episode, *rest)

    def note_checks(*args, real):
        checks.append(real)
        found = real(*args)
        checks.pop()
        return found

    def shuffled(actions, context, by, real=play.shuffle_actions):
        others.append(real(actions, context, by))
        assert not torch.equal(others[-1], actions)     # else it would compare with itself
        return others[-1]

    checks, others = [], []
    monkeypatch.setattr(data.Dataset, "read", noted)
    monkeypatch.setattr(play, "shuffle_actions", shuffled)
    for name in ("imitation_check", "rollout_check"):
        real = partial(note_checks, real=getattr(train, name))
        monkeypatch.setattr(train, name, real)
    for stage in STAGES:
        train_here(copy[0], *of(stage, "--resume", "no", "--train.batch", 12,
                                "--train.tokenizer_batch", 8, "--train.imagine_batch", 16))
        assert trained == {0, 1, 2, 3, 4} and checked <= {5}, stage
        trained.clear()
    assert checked == {5} and others


@pytest.mark.parametrize("far", [2, 128])
def test_a_share_of_the_cloned_rows_is_on_the_way_to_its_prompt(keys, far, monkeypatch):
    """Fails if the share counts other rows, these end at another prompt or too far from
    what it asks for, their frames under an earlier prompt are cloned, or others aren't."""
    monkeypatch.setattr(train, "ON_THE_WAY", far)
    recordings, (prompts, ahead) = recordings_of(keys), play.prompts_along(keys)
    for share, anywhere in itertools.product((0.0, 0.25, 1.0), (0, 40)):
        kinds = recordings.anywhere(anywhere, 8) + recordings.cloned(400, 8, share)
        batch = recordings.read(np.random.default_rng(0), kinds)
        index, on = batch.z[:, :, 0, 0].long().numpy(), anywhere + round(400 * (1 - share))
        last, task = index[on:, -1], batch.task[on:].numpy()
        assert (ahead[last] <= far).all() and (task == prompts[last, None]).all()
        assert (batch.asked[on:].numpy() == (prompts[index[on:]] == task)).all()
        assert batch.asked[:on].all() and len(index) == anywhere + 400
        if share == 1:                      # each frame that fits, and both prompts
            fits = [keys.offsets[i] + t for i in keys.episodes("train")
                    for t in range(7, keys.lengths[i])]
            assert set(last) <= {i for i in fits if ahead[i] <= far}
            ends = recordings.on_the_way(kinds[-1][1])[0]
            assert set(ends) == {i for i in fits if ahead[i] <= far}
            assert len(set(last)) > 0.8 * sum(ahead[i] <= far for i in fits)
            assert not batch.asked.all() and len(set(task[:, 0])) == 2


def test_long_windows_without_an_event_are_refused_before_training(copy, monkeypatch):
    """Fails if the agent stage ends at its first long batch, after hours of the others."""
    class ShortLives(data.Dataset):
        """What is done is done in an episode that a long window doesn't fit into."""
        def __init__(self, path):
            super().__init__(path)
            self.events = np.array([[int(np.argmin(self.lengths)), 7, 1]])

    monkeypatch.setattr(train, "Dataset", ShortLives)
    with pytest.raises(UserError, match="window of 16 frames.*long_share 0"):
        train_here(copy[0], *of("agent", "--resume", "no", "--train.long_length", 16))


def test_a_world_without_prompts_done_is_cloned_by_events_alone(keys, monkeypatch):
    """Fails if there must be a prompt that was done within reach."""
    monkeypatch.setattr(train, "ON_THE_WAY", 0)
    kinds = recordings_of(keys).cloned(40, 8, 1.0)
    assert [n for n, _ in kinds] == [40, 0]


def test_rarer_prompts_are_drawn_by_the_root_of_their_frames(keys):
    """Fails if prompts are drawn as often as they occur or all alike, or a frame never."""
    recordings = recordings_of(keys)
    windows = recordings.cloned(1, 8, 1.0)[1][1]
    frames, begin, count = recordings.on_the_way(windows)
    episode, start, task = recordings.sample_on_the_way(np.random.default_rng(0), 4000,
                                                        windows)
    share = [(task == p).mean() for p in recordings.along.task[frames[begin]]]
    root = np.sqrt(count) / np.sqrt(count).sum()
    assert np.abs(share - root).max() < 0.03
    assert np.abs(count / count.sum() - root).max() > 0.05          # control
    assert set(keys.offsets[episode] + start + 7) == set(frames)


def test_the_agent_stage_clones_its_share_on_the_way(copy, monkeypatch):
    """Fails if --agent.prompt_order isn't the share of the cloned rows."""
    counts = []

    def read(self, rng, kinds, real=train.Recordings.read):
        counts.append({w.prompted: n for n, w in kinds if w.relevant})
        return real(self, rng, kinds)

    monkeypatch.setattr(train.Recordings, "read", read)
    monkeypatch.setattr(train, "imitation_check", lambda *_: {})
    for share in (0.25, 1.0):
        counts.clear()
        train_here(copy[0], *of("agent", "--resume", "no", "--train.batch", 16,
                                "--agent.prompt_order", share))
        assert len(counts) == 8
        assert all(n[True] == round(share * sum(n.values())) for n in counts)


def test_imagination_practises_the_tasks_of_the_prompts_or_all(keys, copy, monkeypatch):
    """Fails if the choice is turned round, or "all" is told the prompts of then."""
    recordings = recordings_of(keys)
    recordings.spec = replace(keys.spec, prompt_order=(("both_keys", 0),))
    for every, tasks in ((False, {1}), (True, {0, 1})):
        (n, windows), = recordings.before_event(50, 4, 6, every)
        assert set(keys.sample(np.random.default_rng(0), n, windows)[2]) == tasks
    told = []

    def read(self, *how, real=train.Recordings.read):
        told.append(self.told)
        return real(self, *how)

    monkeypatch.setattr(train.Recordings, "read", read)
    train_here(copy[0], *of("imagine", "--resume", "no", "--agent.imagined_tasks", "all"))
    assert told and not any(told)


def test_imagination_starts_before_the_event_with_the_prompt_of_then(keys):
    """Fails if a chosen start has its event behind it or out of reach, or the other rows
    are told another task than the prompt order asks for at their end."""
    C, H, recordings = 4, 6, recordings_of(keys)
    recordings.told, prompts = True, play.prompts_along(keys)[0]
    kinds = recordings.anywhere(500, C) + recordings.before_event(50, C, H)
    batch = recordings.read(np.random.default_rng(0), kinds)
    last, task = batch.z[:, -1, 0, 0].long().numpy(), batch.task[:, 0].numpy()
    assert (task[:500] == prompts[last[:500]]).all() and set(task[:500]) == {0, 1}
    assert (batch.task == batch.task[:, :1]).all()
    events = np.concatenate([keys.episode(i)["events"] for i in range(6)])
    reached = [events[a + 1:a + 1 + H, t].any() for a, t in zip(last, task, strict=True)]
    assert all(reached[500:]) and not all(reached[:500])            # control


def note_batches(monkeypatch):
    """Marks z: 0 rows from anywhere, 1 rows chosen for an event, 2 the frames of their
    events. Returns the list that (batch, tau, d, weight) of every step goes into."""
    seen = []

    def marked(self, rng, kinds, real=train.Recordings.read):
        batch = real(self, rng, kinds)
        chosen = torch.arange(len(batch.z)) >= sum(n for n, w in kinds if not w.relevant)
        mark = chosen[:, None] * (1.0 + batch.events.any(-1))
        return batch._replace(z=mark[..., None, None].expand_as(batch.z).contiguous())

    def noted(model, batch, tau, d, weight, generator, real=train.dynamics_losses):
        seen.append((batch, tau, d, weight, model))
        return real(model, batch, tau, d, weight, generator)

    monkeypatch.setattr(train.Recordings, "read", marked)
    monkeypatch.setattr(train, "dynamics_losses", noted)
    return seen


def test_a_share_of_the_dynamics_rows_shows_an_event(copy, monkeypatch):
    """Fails if chosen rows are left out, are there where actions are unknown (whoever knows
    the events of a video has its actions), or never lie among those with bootstrap."""
    seen = note_batches(monkeypatch)
    for flags, share in ((), 0), (("--train.event_rows", 0.5), 0.5), (
            ("--train.event_rows", 0.5, "--data.labels", 0.5), 0):
        seen.clear()
        train_here(copy[0], *of("dynamics", "--resume", "no", *flags))
        rows = [batch.z[:, 0, 0, 0] > 0 for batch, *_ in seen]
        assert len(rows) == 8 and all(int(x.sum()) == round(share * len(x)) for x in rows)
        first = [bool(x[0]) for x in rows]      # p_boot: the first of six rows
        assert any(first) == (share > 0) and not all(first)


def test_clean_past_clips_are_context_and_pure_noise(copy, monkeypatch):
    """Fails if --train.event_rows leaves the frame of an event out, reaches a row from
    anywhere or of separate images, draws another share of the other frames, shows the rest
    otherwise than as context, or weighs such a row by the ramp."""
    seen, shares = note_batches(monkeypatch), []
    monkeypatch.setattr(train, "PURE_NOISE", 0.1)
    train_here(copy[0], *of("dynamics", "--resume", "no", "--train.event_rows", 0.5,
                            "--dynamics.single_images", 0.3, "--train.batch", 24))
    for batch, tau, d, weight, model in seen:
        mark = batch.z[..., 0, 0]
        fine = torch.arange(len(d)) >= round(0.25 * len(d))     # behind the bootstrap rows
        clip = (mark[:, 0] > 0) & ~batch.single
        context = (tau == model.tau_ctx) & (d == model.d_min)
        assert torch.allclose(weight[~clip], 0.9 * tau[~clip] + 0.1)
        assert not context[~clip & fine].all(1).any()
        clip &= fine                        # with bootstrap a frame keeps its level
        assert (tau[clip][mark[clip] == 2] == 0).all() and len(tau[clip])
        assert ((tau[clip] == 0) | context[clip]).all()
        assert (weight[clip][(tau[clip] == 0).any(1)] == 1).all()
        shares.append((tau[clip] == 0)[mark[clip] == 1].float())
    share = torch.cat(shares)
    assert abs(share.mean() - 0.1) < 4 * (0.09 / len(share)) ** 0.5 and len(share) > 100


def test_a_bootstrap_row_keeps_the_level_of_an_event_at_d_min(monkeypatch):
    """Fails if the past is shown as context before it is seen which rows are bootstrap's:
    here the only coarse frame of row 0 is one of the past."""
    d = torch.full((2, 4), 1 / 16)
    d[0, 1] = 0.5
    monkeypatch.setattr(train, "sample_tau_d", lambda *_: (torch.full((2, 4), 0.5), d))
    events = torch.zeros(2, 4, 3)
    events[:, 2, 0] = 1
    batch = train.Batch(None, None, torch.ones(2, 4).bool(), events=events,
                        single=torch.zeros(2).bool())
    job = SimpleNamespace(steps=1, train=SimpleNamespace(boot_after=0.0))
    monkeypatch.setattr(train, "PURE_NOISE", 1e-9)
    model = SimpleNamespace(cfg=DynamicsConfig(p_boot=0.5), tau_ctx=0.875, d_min=1 / 16)
    draws = train.Draws(0, np.random.default_rng(0), None, None)
    tau, d, weight = train.dynamics_levels(job, model, batch, torch.ones(2).bool(), draws)
    assert tau.tolist() == [[.875, .875, .5, .875], [.875, .875, 0, .875]]
    assert (d == 1 / 16).all() and (weight == 1).all()


def test_bootstrap_begins_after_its_share_of_the_steps(copy, monkeypatch):
    """Fails if --train.boot_after is turned round, counted in steps, or off by one."""
    seen = note_batches(monkeypatch)
    for share, first in (0, 0), (0.5, 4), (0.7, 6), (1, 8):
        seen.clear()
        train_here(copy[0], *of("dynamics", "--resume", "no", "--dynamics.p_boot", 1.0,
                                "--train.boot_after", share))
        coarse = [bool((d > model.d_min).any()) for _, _, d, _, model in seen]
        assert coarse == [step >= first for step in range(8)]


def test_the_agent_stage_shows_cloned_rows_as_the_policy_will_see_them(copy, monkeypatch):
    """Fails if cloned rows or a quarter of the others aren't shown as context, any other
    row is, --agent.bc_level uniform shows any so, the dynamics' loss counts a cloned row,
    or other rows than those are cloned."""
    seen, cloned_rows = note_batches(monkeypatch), []

    def noted(agent, h, batch, cloned, real=train.agent_losses):
        cloned_rows.append(cloned)
        return real(agent, h, batch, cloned)

    monkeypatch.setattr(train, "agent_losses", noted)
    monkeypatch.setattr(train, "imitation_check", lambda *_: {})
    for level in "context", "uniform":
        seen.clear()
        train_here(copy[0], *of("agent", "--resume", "no", "--train.batch", 16,
                                "--agent.bc_level", level))
        for (batch, tau, _, weight, model), cloned in zip(seen, cloned_rows, strict=False):
            rows, others = len(tau), len(tau) - round(0.5 * len(tau))
            assert cloned.tolist() == [i >= others for i in range(rows)]
            assert (batch.z[:, 0, 0, 0] > 0).tolist() == cloned.tolist()
            assert (weight[cloned] == 0).all() and (weight[~cloned] > 0).all()
            assert not batch.single[cloned].any()
            context = (tau == model.tau_ctx).all(1).tolist()
            first = others - others // 4 if level == "context" else rows
            assert context == [i >= first for i in range(rows)]
        assert len(seen) == 8 and any(len(tau) > 8 for _, tau, *_ in seen)
        cloned_rows.clear()


def test_bootstrap_is_of_labelled_rows_too_where_few_are(copy, monkeypatch):
    """Fails if windows from anywhere come first, and alone have bootstrap."""
    seen = note_batches(monkeypatch)
    monkeypatch.setattr(train, "imitation_check", lambda *_: {})
    train_here(copy[0], *of("agent", "--resume", "no", "--train.batch", 16,
                            "--data.labels", 0.34, "--train.agent_steps", 60))
    first = torch.cat([batch.labelled[:2, -1] for batch, *_ in seen]).float()
    assert 0.55 < first.mean() < 0.8            # half of all, and a third of the others
    cloned = [batch.labelled[len(batch.labelled) // 2:, -1] for batch, *_ in seen]
    assert torch.cat(cloned).all()              # what is imitated is known


def test_what_agent_and_heads_are_told_and_where_imagination_starts(copy, monkeypatch):
    """Fails if an agent without prompts is told its task, or its heads are asked about
    none; if an imagined rollout has its event behind it, another task than the prompt
    order's, or another length."""
    told, asked, kinds, prompts, rates = [], [], [], [], []

    def optimizers(modules, *lr, real=train.make_optimizers):
        rates.append(lr)
        return real(modules, *lr)

    def dynamics(model, batch, *rest, real=train.dynamics_losses):
        told.append(batch.task)
        return real(model, batch, *rest)

    def heads(agent, h, batch, cloned, real=train.agent_losses):
        asked.append(batch.task)
        return real(agent, h, batch, cloned)

    def rollout(dream, agent, batch, horizon, real=train.imagine_rollout):
        told.append(batch.task)
        assert horizon == 3
        return real(dream, agent, batch, horizon)

    def losses(agent, h, actions, task, real=train.imagination_losses):
        asked.append(task)
        return real(agent, h, actions, task)

    def events(self, *how, real=train.Recordings.before_event):
        kinds.append(how)
        return real(self, *how)

    def read(self, *rest, real=train.Recordings.read):
        prompts.append(self.told)
        return real(self, *rest)

    stubs = {"dynamics_losses": dynamics, "agent_losses": heads, "imagine_rollout": rollout,
             "imagination_losses": losses, "imitation_check": lambda *_: {},
             "make_optimizers": optimizers}
    for name, stub in stubs.items():
        monkeypatch.setattr(train, name, stub)
    train_here(copy[0], *of("agent", "--resume", "no", "--agent.prompts", "false"))
    monkeypatch.setattr(train.Recordings, "before_event", events)
    monkeypatch.setattr(train.Recordings, "read", read)
    train_here(copy[0], *of("imagine", "--resume", "no"))
    assert len(told) == len(asked) == 16 and all((task == 2).all() for task in told)
    assert all((task < 2).all() for task in asked)      # 2: no task
    # rows (2 in the check of the plan), context 4, horizon 3, of the prompts
    assert {how[1:] for how in kinds} == {(4, 3, False)} and all(prompts)
    assert rates == [(3e-3, 1.5e-3)]                    # half: the dynamics are finetuned


# -------------------------------------------------------------------------- stages, resume

def stop_after(folder, saves, *flags):
    """Train until the checkpoint number `saves` of the stage is on disk."""
    count = []

    def broken(path, state, keep=None, real=train.save_checkpoint):
        real(path, state, keep)
        count.append(path)
        if len(count) == saves:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_checkpoint", broken)
        train_here(folder, *flags)


def test_blocks_that_are_computed_again_learn_the_same(finished, tmp_path, monkeypatch):
    """Fails if --train.shard changes what one process learns, or computes nothing again, or
    is refused without a word beside compiling."""
    shutil.copytree(finished / "datasets", tmp_path / "datasets")
    calls = {"false": 0, "true": 0}

    def noted(self, *rest, real=Block.forward):
        calls[shard] += 1
        return real(self, *rest)

    monkeypatch.setattr(Block, "forward", noted)
    for name, shard in (("kept", "false"), ("again", "true")):
        for stage in STAGES[:3]:
            train_here(tmp_path, "--run", name, "--stage", stage, "--train.shard", shard)
    kept, again = (weights(tmp_path / f"runs/{x}/agent.pt") for x in ("kept", "again"))
    assert same_tensors(kept, again)
    # eight steps each of the tokenizer's six blocks, the dynamics' three, and again three
    assert calls["true"] - calls["false"] == 8 * (6 + 3 + 3)
    with pytest.raises(UserError, match="--train.compile false"):
        train.TrainConfig(shard=True)


def test_spread_weights_learn_the_same_and_are_saved_whole(tmp_path, monkeypatch):
    """Fails if optimizers keep the weights of before or forget what they knew, or a
    checkpoint holds a part."""
    monkeypatch.setattr(train, "made_with", lambda job: {})
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet",
                                         rank=0, world_size=1)
    try:
        x, saved = normal(1, 3, 4, 16), []
        for spread in (False, True):
            net = tiny_transformer()

            def loss(_, net=net):
                return net(x, reader_mask(3, 1)).square().mean()

            compute = train.Losses([net], loss)
            optimizers = train.make_optimizers([net], 1e-2, 1e-2)
            for step in range(2):
                if spread and step:                     # as after an interruption
                    train.shard(compute, optimizers, True)
                compute(None).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            job = SimpleNamespace(folder=tmp_path, stage="dynamics", began=0.0)
            train.save_resume(job, [net, *optimizers], 2, {})
            saved.append(weights(tmp_path / "dynamics.resume.pt")["parts"][0])
    finally:
        torch.distributed.destroy_process_group()
    assert saved[0].keys() == saved[1].keys()
    for name, x in saved[0].items():
        assert type(saved[1][name]) is torch.Tensor
        assert torch.allclose(x, saved[1][name], atol=1e-4), name


def test_every_stage_resumes_as_if_uninterrupted(finished, tmp_path):
    """Fails if a stage can't use what the one before it made, trains another part than its
    own, or optimizer, normalizer, step or batch order differ after an interruption."""
    shutil.copytree(finished / "datasets", tmp_path / "datasets")
    run, whole = tmp_path / "runs/base", {}
    for stage in STAGES:
        stop_after(tmp_path, 2, *of(stage))                 # after step 6 of 8
        train_here(tmp_path, *of(stage))
        whole[stage] = weights(finished / f"runs/base/{stage}.pt")
        assert same_tensors(whole[stage], weights(run / f"{stage}.pt")), stage
        assert metrics_of(run, stage) == metrics_of(finished / "runs/base", stage)

    def changed(module, a, b):
        a, b = whole[a][module], whole[b][module]
        return {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])}

    assert not changed("tokenizer", "tokenizer", "imagine")
    assert "transformer" in changed("dynamics", "dynamics", "agent")
    assert not changed("dynamics", "agent", "imagine")
    assert changed("agent", "agent", "imagine") == {"policy", "value"}
    agent = whole["agent"]["agent"]                         # the prior is the BC policy
    assert all(torch.equal(x, agent["policy" + k[5:]]) for k, x in agent.items()
               if k.startswith("prior"))


def test_one_command_ends_with_results_and_report(tmp_path, capsys):
    """Fails if the whole run leaves out a promised figure, metric or picture."""
    train_here(tmp_path, "--run", "all", pictures=True)
    folder = tmp_path / "runs/all"
    rows = play.read_results(folder)
    names = {"wall_minutes", "tokenizer_psnr", "psnr", "next_frame_psnr", "achievements",
             "success", "achievements_gain"}
    assert names <= {row.name for row in rows}
    parts = {row.of["part"]: row.value for row in rows if row.name == "wall_minutes"}
    assert set(parts) == {"record", *STAGES, "evaluation", "total"}
    assert abs(2 * parts["total"] - sum(parts.values())) < 1e-6 and min(parts.values()) > 0
    for picture in ("tokenizer_reconstructions.png", "dream.gif", "success.png",
                    "imagine_curves.png", "report.md"):
        assert (folder / picture).stat().st_size > 0
    assert "Done." in capsys.readouterr().out
    keys = {name for stage in STAGES for line in metrics_of(folder, stage) for name in line}
    assert {"mse", "flow", "boot", "bc", "reward", "continue", "policy", "value", "entropy",
            "x_error_tau0", "boot_error_d1", "kl_prior", "positive_share", "grad_norm",
            "latent_rank", "bc_next_action_valid", "rollout_minus_shuffled_h4"} <= keys
    train_here(tmp_path, "--run", "all", "--stage", "dynamics")         # skips it
    assert play.read_results(folder) == rows


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_overfits_one_batch(copy, monkeypatch, stage):
    """Fails on any wiring error that keeps a stage from learning what it is shown."""
    folder, run = copy
    monkeypatch.setattr(train, "rng_for", lambda seed, name, step: data.rng_for(0, name, 0))
    monkeypatch.setattr(train, "imitation_check", lambda *_: {})
    monkeypatch.setattr(train, "rollout_check", lambda *_: {})
    train_here(folder, *of(stage, "--resume", "no", f"--train.{stage}_steps", 150,
                           "--train.log_every", 10, "--train.long_share", 0))
    lines = metrics_of(run, stage)
    for name in {"tokenizer": ["mse"], "dynamics": ["flow"], "imagine": ["value"],
                 "agent": ["bc_next_action", "reward"]}[stage]:
        assert lines[-1][name] < 0.85 * lines[0][name], name


def test_other_seeds_and_settings_on_the_same_base(copy):
    """Fails if --base trains the base's stages again or changes its files, seeds give equal
    agents, or controls without prompts or pretraining learn with them."""
    folder, run = copy
    before = {p.name: p.read_bytes() for p in run.glob("*.pt")}
    for seed, flags in ((1, []), (2, ["--agent.prompts", "false"]),
                        (3, ["--agent.pretrained", "false"])):
        train_here(folder, "--run", f"seed{seed}", "--base", "base", "--stage", "agent",
                   "--seed", seed, *flags)
    assert before == {p.name: p.read_bytes() for p in run.glob("*.pt")}
    one, two, three = (load_run(folder / f"runs/seed{i}", "agent") for i in (1, 2, 3))
    base, start = load_run(run, "agent"), load_run(run, "dynamics").dynamics
    assert not torch.equal(one.agent.policy.out.weight, base.agent.policy.out.weight)

    def moved(run):
        return (next(run.dynamics.parameters()) - next(start.parameters())).abs().max()

    assert moved(one) < moved(three) / 3
    assert "dynamics" in metrics_of(folder / "runs/seed1", "agent")[0]
    assert "dynamics" not in metrics_of(folder / "runs/seed3", "agent")[0]
    # which rows of the task embedding have learned: with prompts, without
    told = [(x.dynamics.task_embed.weight != start.task_embed.weight).any(1).tolist()
            for x in (one, two)]
    assert told[0][:2] == [True, True] and told[1] == [False, False, True]

    # colder by half, and imagination starts and stays there
    train_here(folder, "--run", "sharp", "--base", "base", "--stage", "agent",
               "--seed", 1, "--agent.temperature", 0.25)
    train_here(folder, "--run", "sharp", "--stage", "imagine", "--train.lr_policy", 0,
               "--seed", 1)
    for stage, head in itertools.product(("agent", "imagine"), ("policy", "prior")):
        sharp = getattr(load_run(folder / "runs/sharp", stage).agent, head)
        assert torch.equal(sharp.out.weight, 2 * one.agent.policy.out.weight)
    with pytest.raises(UserError, match="is another one than"):     # it has its own agent
        train_here(folder, "--run", "seed1", "--base", "seed3", "--stage", "imagine")
    with pytest.raises(UserError, match="No tokenizer.pt"):
        train_here(folder, "--run", "seed1", "--base", "none", "--stage", "agent")


def test_a_stage_made_of_older_weights_is_noticed(copy):
    """Fails if a stage that was trained again leaves the later ones in silence: they would
    be judged with weights that are no longer there."""
    folder, _ = copy
    train_here(folder, *of("agent"))                        # control: all fits
    train_here(folder, *of("dynamics", "--resume", "no", "--seed", 5))
    for flags in (of("agent"), of("imagine", "--resume", "no")):
        with pytest.raises(UserError, match="Got dynamics"):
            train_here(folder, *flags)
    train_here(folder, *of("agent", "--resume", "no"))
    train_here(folder, *of("imagine", "--resume", "no"))


@pytest.mark.parametrize("damage", ["cut", "byte", "missing"])
def test_resume_falls_back_to_the_older_checkpoint(copy, capsys, damage):
    """Fails if one damaged checkpoint loses the stage, is used, or is passed over in
    silence; or if sums of metrics or lines of metrics.jsonl are lost or doubled."""
    folder, run = copy
    whole, lines = weights(run / "dynamics.pt"), metrics_of(run, "dynamics")
    (run / "dynamics.pt").unlink()
    stop_after(folder, 2, *of("dynamics"))
    newest, older = run / "dynamics.resume.pt", run / "dynamics.resume.old.pt"
    assert [weights(p)["step"] for p in (older, newest)] == [3, 6]
    if damage == "missing":                                 # killed between two renames
        newest.unlink()
    elif damage == "byte":
        break_file(newest)
    else:
        newest.write_bytes(newest.read_bytes()[:-9])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "dyna')                       # killed while it was written
    capsys.readouterr()
    train_here(folder, *of("dynamics"))
    out = capsys.readouterr().out
    assert "steps 3 to 8" in out
    assert ("Going on from the one before, step 3" in out) == (damage != "missing")
    assert same_tensors(whole, weights(run / "dynamics.pt"))
    assert metrics_of(run, "dynamics") == lines and len(lines) == 2
    assert not list(run.glob("*.tmp")) and not newest.exists() and not older.exists()


def test_wall_time_of_a_resumed_stage_adds_up(copy):
    """Fails if the seconds before a break are forgotten."""
    folder, run = copy
    (run / "dynamics.pt").unlink()
    stop_after(folder, 2, *of("dynamics"))
    state = weights(run / "dynamics.resume.pt")
    assert 0 < state["seconds"] < 300
    torch.save({**state, "seconds": 1000.0}, run / "dynamics.resume.pt")
    train_here(folder, *of("dynamics"))
    assert 1000 < weights(run / "dynamics.pt")["seconds"] < 1300


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(copy, monkeypatch, capsys, number, code):
    """Fails if the step in hand is lost, the exit code is another, the command to go on is
    wrong (--resume no would begin again), or going on differs from an uninterrupted run."""
    folder, run = copy
    whole, calls = weights(run / "agent.pt"), []

    def signalled(*args, real=train.agent_losses):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(train, "imitation_check", lambda *_: {})
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "agent_losses", signalled)
        train_here(folder, *of("agent", "--resume", "no"), cli=True)
    assert stop.value.code == code and len(calls) == 5
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("interrupted: the same command goes on: python")
    assert last.endswith("--run base --stage agent")
    assert weights(run / "agent.resume.pt")["step"] == 5
    train_here(folder, *of("agent"))
    assert same_tensors(whole, weights(run / "agent.pt"))


def test_a_second_signal_stops_at_once(copy, monkeypatch):
    """Fails if an impatient user has to wait for the step, or for the checkpoint."""
    folder, run = copy

    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(train, "agent_losses", twice)
    with pytest.raises(SystemExit) as stop:
        train_here(folder, *of("agent", "--resume", "no"), cli=True)
    assert stop.value.code == 130 and not (run / "agent.resume.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler    # as before


def test_a_loss_that_is_not_finite_stops_and_can_be_replayed(copy, monkeypatch, capsys):
    """Fails if training goes on with nan, the message lacks step and seed, the last
    checkpoint is overwritten, or --replay shows another batch or changes a file."""
    folder, run = copy
    (run / "tokenizer.pt").unlink()
    flags, seen = of("tokenizer", "--seed", 7), []

    def spoiled(x_hat, x, perceptual, real=train.reconstruction_loss):
        seen.append(x.clone())
        losses = real(x_hat, x, perceptual)
        return {"mse": losses["mse"] * torch.nan} if len(seen) == 5 else losses

    monkeypatch.setattr(train, "reconstruction_loss", spoiled)
    with pytest.raises(SystemExit) as stop:
        train_here(folder, *flags, cli=True)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "Got a loss or gradient that is not" in message
    assert "step 4 of tokenizer (seed 7)" in message and "--replay 4" in message
    assert weights(run / "tokenizer.resume.pt")["step"] == 3
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        train_here(folder, *flags, "--replay", 4, cli=True)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and torch.equal(seen[4], seen[-1])
    assert not torch.equal(seen[3], seen[-1])               # control: batches differ
    assert "steps 3 to 8" in out and re.search(r"step 4 .*: mse \d", out)
    assert "patch_in.weight" in out
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_replay_of_a_finished_stage_uses_its_weights(copy, capsys):
    """Fails if a finished stage is replayed with fresh weights."""
    with pytest.raises(SystemExit):
        train_here(copy[0], *of("dynamics", "--replay", 7))
    assert "steps 8 to 8" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_metrics(copy):
    """Fails if anything but seed, stage and step decides a number: 30 steps of each stage,
    twice, bit for bit. Control: another seed gives other numbers."""
    folder, run = copy
    for stage in STAGES:
        lines = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            target = folder / "runs" / name
            target.mkdir(exist_ok=True)
            for file in FINALS[:STAGES.index(stage)] + FINALS[4:]:
                shutil.copy(run / file, target / file)
            train_here(folder, "--run", name, "--stage", stage, "--seed", seed,
                       f"--train.{stage}_steps", 30, "--train.log_every", 1)
            lines.append(metrics_of(target, stage))
        assert len(lines[0]) == 30 and lines[0] == lines[1] != lines[2], stage


def new_log(folder):
    args, cpu = SimpleNamespace(seed=0, dtype="fp32"), torch.device("cpu")
    job = train.Job(args, folder, None, None, None, cpu, None, "tokenizer")
    return train.Log(job, 0, {})


def test_a_line_of_the_log_is_the_mean_since_the_last(tmp_path):
    """Fails if values add up, one that isn't there counts, or none is forgotten."""
    log, bar = new_log(tmp_path), SimpleNamespace(total=9, set_postfix=lambda *_, **__: 0)
    for value in (1.0, math.nan, 4.0):
        log.add({"mse": torch.tensor(value)})
    log.write(3, bar)
    log.add({"mse": torch.tensor(7.0)})
    log.write(4, bar)
    assert [line["mse"] for line in metrics_of(tmp_path, "tokenizer")] == [2.5, 7.0]


def test_unhealthy_metrics_are_warned_about(tmp_path):
    """Fails if a warning is missing, comes twice, comes for a healthy value, or names what
    the README doesn't explain."""
    written, bar = [], types.SimpleNamespace(write=lambda text, file: written.append(text))
    log = new_log(tmp_path)
    good = {"latent_rank": 6.0, "tanh_saturated": 0.02, "grad_norm": 2.0, "entropy": 1.3,
            "kl_prior": 0.1, "value_explained": 0.8, "positive_share": 0.5}
    bad = dict(zip(good, (1.1, 0.9, 1e4, 0.0, 5.0, -2.0, 1.0), strict=True))
    assert set(good) == set(train.HEALTH)
    for means, count in ((good, 0), (bad, 7), (bad, 7)):
        log.warn(means, bar)
        assert len(written) == count
    readme = (REPO / "README.md").read_text()
    for name, text in zip(bad, written, strict=True):
        assert f"warning: {name} {bad[name]:.3g}" in text and f"| `{name}`" in readme


# ----------------------------------------------------------------------------------- faults

def break_file(path, how="byte"):
    content, at = bytearray(path.read_bytes()), path.stat().st_size // 2
    if path.suffix == ".pt":                # the largest part, not the padding between two
        with zipfile.ZipFile(path) as file:
            part = max(file.infolist(), key=lambda x: x.file_size)
            at = part.header_offset + 200 + part.file_size // 2
    content[at] ^= 255
    path.write_bytes(content if how == "byte" else content[:len(content) // 2])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_checkpoint(path, **changes):
    torch.save({**weights(path), **changes}, path)


def other_play(folder, env=KEYS, episodes=3, length=36, seed=5, name="other"):
    return data.record(env, folder / "datasets" / name, episodes, length, seed)


def unlabelled(folder):
    events = np.ones((36, 2)) * (np.arange(36) > 0)[:, None]
    episode = data.Episode(np.zeros((36, 8, 12, 3)), np.zeros((36, 3)), events, np.ones(36),
                           np.zeros(36))
    for i in range(3):
        data.write_episode(folder / "datasets/other", i, episode)
    data.finish_dataset(folder / "datasets/other", StageEnv.spec, {})


def eventless(folder):
    """Play in which no task is done but in the episode that is held out."""
    for i in range(3):
        events = np.zeros((36, 2))
        events[5] = i == 2
        episode = data.Episode(np.zeros((36, 8, 12, 3)), np.zeros((36, 3)), events,
                               np.ones(36))
        data.write_episode(folder / "datasets/other", i, episode)
    data.finish_dataset(folder / "datasets/other", StageEnv.spec, {})


def remove(*names):
    """Breaks a run: these files are gone."""
    return lambda folder, run: [(run / name).unlink() for name in names]


def retrain(*stages, flags=()):
    return lambda folder, run: [train_here(folder, *of(stage, "--resume", "no", *flags))
                                for stage in stages]


AGAIN, OTHER = ("--resume", "no"), ("--data.path", "datasets/other")
# what is broken in a copy of the finished run (w: its folder, r: the run), the flags of
# train.py afterwards, and what the one line must say; faults of datasets: above
FAULTS = {
    "no dataset": (None, (*NEW, "--data.path", "nowhere"), "without a dataset.json"),
    "episode corrupted": (lambda w, r: [break_file(x) for x in (w / EPISODES).glob("*.npy")
                                        ], (*NEW, *PLAY), "changed bytes"),
    "other actions": (lambda w, r: other_play(w, NUMBERS), of("dynamics", *OTHER),
                      "got actions {'classes'"),
    "worlds of the judges": (lambda w, r: other_play(w, seed=49_998), (*NEW, *OTHER),
                             "Got the worlds 49998 to 50000 in datasets/other, need none"),
    "too many worlds": (None, (*NEW, "--data.episodes", 10_001), "0 to 10000 in datasets/"),
    "judged by worlds it learns": (
        lambda w, r: (other_play(w), other_play(w, seed=7, name="judge")),
        (*NEW, *OTHER, "--data.reference", "datasets/judge"), "Got worlds of datasets"),
    "continuous actions": (lambda w, r: other_play(w, NUMBERS), (
        *ALL, *OTHER, "--data.env", NUMBERS), "Got continuous actions"),
    "no tasks": (lambda w, r: other_play(w, TASKLESS), (
        *ALL, *OTHER, "--data.env", TASKLESS), "Got no tasks in datasets/other"),
    "no event to learn from": (lambda w, r: eventless(w), (*ALL, *OTHER),
                               "no task of the prompts is done"),
    "episodes shorter than a long window": (lambda w, r: other_play(w, length=9), (
        *ALL, *OTHER), "need 12 for stage dynamics"),
    "judged by what it learns": (None, (*NEW, *PLAY, "--data.reference", EPISODES),
                                 "to train on and as --data.reference"),
    "another seed": (None, of("tokenizer", "--seed", 3), "Got --seed 3, but runs/base"),
    "other steps": (None, of("dynamics", "--train.dynamics_steps", 9),
                    "Got --train.dynamics_steps 9, but runs/base/dynamics.pt"),
    "other labels": (None, of("dynamics", "--data.labels", 0.5), "Got --data.labels 0.5"),
    "episodes too short": (lambda w, r: other_play(w, length=5), (
        *NEW, *OTHER, "--train.tokenizer_length", 6), "training episodes of at most 5"),
    "no held-out episode": (lambda w, r: other_play(w, episodes=1), (*NEW, *OTHER),
                            "leaves none to hold out, need at least 2"),
    "no label is known": (None, of("agent", *AGAIN, "--data.labels", 0),
                          "without labelled frames"),
    "unlabelled play": (lambda w, r: (unlabelled(w), (r / "agent.pt").unlink()), of(
        "agent", *OTHER, "--resume", "anyway"), "without labelled frames"),
    "more sampling steps than learned": (
        retrain("dynamics", "agent", flags=("--dynamics.k_max", 8)),
        of("imagine", *AGAIN, "--agent.k", 16), "Got agent.k 16, need at most"),
    "stage before missing": (remove("dynamics.pt"), of("agent", *AGAIN),
                             "run 'python train.py --stage dynamics --run base' first"),
    "checkpoint cut": (lambda w, r: break_file(r / "dynamics.pt", "cut"), of("dynamics"),
                       "Can't read the checkpoint"),
    "checkpoint with a changed byte": (lambda w, r: break_file(r / "dynamics.pt"),
                                       of("dynamics"), "has changed"),
    "checkpoint of another program": (lambda w, r: torch.save(
        {"model": torch.ones(3), "version": 2}, r / "dynamics.pt"), of("dynamics"),
        "no checkpoint of this"),
    "checkpoint of another version": (lambda w, r: edit_checkpoint(
        r / "dynamics.pt", version=1), of("dynamics"), "version 1, need 2"),
    "impossible config in a checkpoint": (lambda w, r: edit_checkpoint(
        r / "tokenizer.pt", config={"tokenizer": {"dim": "wide"}}), of("tokenizer"),
        "Got tokenizer.dim 'wide', need int"),
    "both resume checkpoints damaged": (lambda w, r: [(r / x).write_bytes(b"PK") for x in (
        "agent.resume.pt", "agent.resume.old.pt")] + [(r / "agent.pt").unlink()],
        of("agent"), "agent.resume.old.pt (BadZipFile"),
    "another dataset": (lambda w, r: other_play(w), of("dynamics", *OTHER), "Got dataset "),
    "another tokenizer": (retrain("tokenizer", flags=("--seed", 3)), of("agent"),
                          "Got tokenizer "),
    "a flag against the checkpoint": (None, of("agent", "--dynamics.dim", 32),
                                      "--dynamics.dim 32, but runs/base/agent.pt has 16"),
    "results.json damaged": (lambda w, r: (r / "results.json").write_text("{"),
                             of("dynamics"), "no JSON to read in runs/base/results.json"),
    "a file in place of the run": (lambda w, r: (w / "runs/new").write_text("x"), NEW,
                                   "File exists: 'runs/new'"),
}


@pytest.mark.parametrize("factor, moves", [(math.inf, False), (1.0, True)])
def test_an_overflow_in_fp16_skips_every_optimizer(tmp_path, monkeypatch, factor, moves):
    """Fails if one optimizer steps where a gradient of the other one's is not finite."""
    began = []

    def overflowing(*args, real=train.make_optimizers):
        adamw, muon = optimizers = real(*args)
        adamw.param_groups[0]["params"][0].register_hook(lambda grad: grad * factor)
        began.extend(p for p in muon.param_groups[0]["params"])
        began.extend(p.detach().clone() for p in muon.param_groups[0]["params"])
        return optimizers

    monkeypatch.setattr(train, "make_optimizers", overflowing)
    train_here(tmp_path, *NEW, "--dtype", "fp16", "--train.tokenizer_steps", 1)
    now, then = began[:len(began) // 2], began[len(began) // 2:]
    assert all(torch.equal(a, b) != moves for a, b in zip(now, then, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_step_is_no_longer_than_the_clip(tmp_path, monkeypatch, dtype):
    """Fails if gradients aren't clipped, or in fp16 at the scaler's scale."""
    weights = []

    def sgd(modules, *_):
        weights.extend((p, p.detach().clone()) for p in modules[0].parameters())
        return [torch.optim.SGD(modules[0].parameters(), lr=1.0)]

    monkeypatch.setattr(train, "make_optimizers", sgd)
    monkeypatch.setattr(train, "CLIP", 0.01)
    train_here(tmp_path, *NEW, "--dtype", dtype, "--train.tokenizer_steps", 1)
    moved = math.sqrt(sum((now - then).square().sum().item() for now, then in weights))
    assert abs(moved - 0.01) < 1e-4


def test_the_mask_that_was_drawn_hides_the_patches(tmp_path, monkeypatch):
    """Fails if the tokenizer is trained without it, or with another; or not without at the
    end."""
    drawn, used = [], []

    def mask(*rest, real=train.mae_mask):
        drawn.append(real(*rest))
        return drawn[-1]

    def forward(self, x, hidden=None, real=Tokenizer.forward):
        used.append(hidden)
        return real(self, x, hidden)

    monkeypatch.setattr(train, "mae_mask", mask)
    monkeypatch.setattr(Tokenizer, "forward", forward)
    for whole, masked in (("0.4", 5), ("0", 8)):
        used.clear()
        drawn.clear()
        train_here(tmp_path, *NEW, "--train.tokenizer_steps", 8, "--resume", "no",
                   "--train.tokenizer_whole", whole)
        assert torch.equal(drawn[0], used[0])
        seen = [bool(hidden.any()) for hidden in used[:8]]
        assert seen == [True] * masked + [False] * (8 - masked)


def test_the_value_learns_three_times_as_fast(copy):
    """Fails if its rate is the policy's: Adam's first step is as long as the rate."""
    folder, run = copy
    train_here(folder, *of("imagine", *AGAIN, "--train.imagine_steps", 1))
    then, now = (torch.load(run / f"{stage}.pt")["agent"] for stage in ("agent", "imagine"))
    for head, rate in (("policy", 1e-3), ("value", 3e-3)):
        steps = [(now[x] - then[x]).abs().max() for x in now if x.startswith(f"{head}.")]
        assert abs(max(steps) / rate - 1) < 0.05, head


def test_what_was_measured_of_a_replaced_stage_goes(copy, monkeypatch, capsys):
    """Fails if results keep figures of weights that are gone, or an imagination that began
    with another BC is played beside the new one."""
    folder, run = copy
    old = [play.Result("achievements", 9, None, None, 1, "", {"agent": "BC"}),
           play.Result("wall_minutes", 1, None, None, 1, "min", {"part": "record"})]
    play.add_results(run, "then", old)
    agents = "BC", "imagination"
    monkeypatch.chdir(folder)
    rows = play.evaluate_agents("runs/base", torch.device("cpu"), "fp32", 2, 3, agents)
    assert {row.of["agent"] for row in rows if row.name == "achievements"} == set(agents)
    train_here(folder, *of("agent", *AGAIN))
    assert {row.name for row in play.read_results(run)} == {"wall_minutes"}
    rows = play.evaluate_agents("runs/base", torch.device("cpu"), "fp32", 2, 3, agents)
    assert {row.of["agent"] for row in rows if row.name == "achievements"} == {"BC"}
    assert "Left out: imagination" in capsys.readouterr().out


def test_no_folder_for_the_compiler_is_one_line(tmp_path):
    """Fails if torch's own traceback is what one sees, late."""
    def python(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, text=True, env={
            **os.environ, "TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"}, capture_output=True)

    made = python("-c", "import torch; torch.optim.AdamW([torch.zeros(1)])")
    if made.returncode == 0:
        pytest.skip("torch 2.9 asks for it when it compiles, and then goes on without")
    run = python(REPO / "train.py")
    assert run.returncode == 2 and not list(tmp_path.iterdir())
    assert re.fullmatch("error: Got no folder for the compiler .*\n", run.stderr)


def test_few_imagination_steps_move_the_policy(copy):
    """Fails if a short stage trains the value head alone."""
    folder, run = copy
    train_here(folder, *of("imagine", *AGAIN, "--train.imagine_steps", 2))
    agent = torch.load(run / "imagine.pt")["agent"]
    assert any(not torch.equal(x, agent[name.replace("policy", "prior")])
               for name, x in agent.items() if name.startswith("policy."))


def test_results_are_json_and_counts_begin_at_one(tmp_path, capsys):
    """Fails if nan or inf get into results.json, or nothing can be asked for."""
    play.add_results(tmp_path, "x", [play.Result("a", math.nan, -math.inf, 1.0, 1, "")])
    text = (tmp_path / "results.json").read_text()
    row = json.loads(text, parse_constant=pytest.fail)[0]
    assert (row["value"], row["low"], row["high"]) == (None, None, 1.0)
    assert abs(play.decibel(np.zeros(3)) - 99) < 1e-6
    for flags in (("--clips", "0"), ("--episodes", "-1"), ("--k", "x")):
        with pytest.raises(SystemExit):
            play.make_parser().parse_args(["dream", *flags])
        assert "need a whole number from 1" in capsys.readouterr().err


def test_cloned_windows_are_of_labelled_episodes(keys):
    """Fails if most of what is cloned at a share of labels has no action to learn."""
    recordings = recordings_of(keys, labels="0.34")                   # 2 of 6
    rng, kinds = np.random.default_rng(0), recordings.cloned(40, 6, 0.5)
    assert [n for n, _ in kinds] == [20, 20]
    assert set(keys.sample(rng, *kinds[0])[0]) == {0, 1}
    assert set(recordings.sample_on_the_way(rng, *kinds[1])[0]) <= {0, 1}
    every = recordings_of(keys)                                     # control
    (_, windows), kind = every.cloned(40, 6, 0.5)
    assert len(set(keys.sample(rng, 40, windows)[0])) > 3
    assert len(set(every.sample_on_the_way(rng, *kind)[0])) > 2


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_gives_one_line_and_exit_2(copy, capsys, fault):
    """Fails if a bad input ends in a traceback, in another message, in success, or costs a
    file."""
    folder, run = copy
    spoil, flags, message = FAULTS[fault]
    if spoil:
        spoil(folder, run)
    capsys.readouterr()
    before = {p: p.stat().st_size for p in folder.rglob("*.*")}
    with pytest.raises(SystemExit) as stop:
        train_here(folder, *flags, cli=True)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in last and "error: " in last, last
    lost = {p for p, n in before.items() if not p.exists() or p.stat().st_size < n}
    allowed = {run / f"{flags[3]}.pt"} if "no" in flags else set()
    assert lost <= allowed, lost
    assert not list(folder.rglob("new/*.pt"))       # known before anything is trained


def test_mismatches_show_both_fingerprints_and_can_be_lifted(copy):
    """Fails if the refusal hides which is which, or --resume anyway does not lift it."""
    folder, run = copy
    other = other_play(folder)
    (run / "imagine.pt").unlink()
    with pytest.raises(UserError) as error:
        train_here(folder, *of("imagine", *OTHER))
    made = weights(run / "agent.pt")["provenance"]["dataset"]
    assert f"Got dataset {other.fingerprint}" in str(error.value)
    assert f"agent.pt was made with {made}" in str(error.value)
    train_here(folder, *of("imagine", *OTHER, "--resume", "anyway"))
    assert weights(run / "imagine.pt")["provenance"]["dataset"] == other.fingerprint != made


def test_settings_of_a_resumed_stage_must_be_the_same(copy):
    """Fails if a stage goes on with other settings than it was begun with. Control:
    settings that don't change the result, or belong to other stages, may differ."""
    folder, run = copy
    (run / "dynamics.pt").unlink()
    stop_after(folder, 1, *of("dynamics"))
    for name, value in (("train.lr", 0.01), ("seed", 3), ("dynamics.k_max", 4)):
        with pytest.raises(UserError, match=f"Got {name} {value}.*was made with"):
            train_here(folder, *of("dynamics", f"--{name}", value))
    train_here(folder, *of("dynamics", "--train.log_every", 5, "--train.agent_steps", 9,
                           "--agent.gamma", 0.5))


def test_latents_beside_a_run_are_those_of_the_recordings(copy, keys, monkeypatch):
    """Fails if pieces of an episode are encoded without what was before them, after another
    episode, or into another place."""
    folder, run = copy
    monkeypatch.setattr(train, "LATENT_CHUNK", 7)
    (run / "dynamics.pt").unlink()
    (run / "latents.npy").unlink()
    train_here(folder, *of("dynamics", "--dtype", "fp32"))
    latents, tokenizer = np.load(run / "latents.npy"), load_run(run, "tokenizer").tokenizer
    assert len(latents) == keys.frames_total and 0.8 < latents.astype(float).std() < 1.25
    for i, first in enumerate(keys.offsets[:-1]):
        here = latents[first:first + keys.lengths[i]]
        frames = torch.from_numpy(np.array(keys.episode(i)["frames"]))[None]
        with torch.no_grad():
            z, alone = (tokenizer.encode(x)[0].numpy() for x in (frames, frames[:, 7:]))
        off = np.abs(here - z)
        assert off.max() < 2e-3 and off.mean() < np.abs(here[1:] - z[:-1]).mean() / 5
        assert off[7].mean() < np.abs(alone[0] - z[7]).mean() / 2       # it has a past


@pytest.mark.parametrize("harm", ["byte", "header", "of another tokenizer"])
def test_damaged_latents_are_computed_again(copy, capsys, harm):
    """Fails if a changed byte in the cache, or one in its header, or another tokenizer's
    latents are trained on; or the cache is not restored."""
    folder, run = copy
    path, before = run / "latents.npy", (run / "latents.npy").read_bytes()
    if harm == "byte":
        break_file(path)
    elif harm == "header":
        path.write_bytes(before.replace(b"'<f2'", b"'<i2'", 1))
    else:
        edit_json(run / "latents.json", tokenizer="0" * 64)
    (run / "dynamics.pt").unlink()
    train_here(folder, *of("dynamics"))
    assert "computing it again" in capsys.readouterr().out and path.read_bytes() == before
    (run / "dynamics.pt").unlink()
    train_here(folder, *of("dynamics"))                     # control: kept where right
    assert "computing it again" not in capsys.readouterr().out


def test_a_full_disk_costs_nothing(copy, monkeypatch, capsys):
    """Fails if a failed write of a checkpoint leaves rubbish, damages what was there, or
    can't be gone on from."""
    folder, run = copy
    whole, count = weights(run / "dynamics.pt"), []
    (run / "dynamics.pt").unlink()

    def full(file, real=os.fsync):
        count.append(file)
        if len(count) > 2:
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(data.os, "fsync", full)
        train_here(folder, *of("dynamics"), cli=True)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "No space left on device" in message
    assert "the same command goes on" in message
    assert not list(run.glob("*.tmp")) and weights(run / "dynamics.resume.pt")["step"] == 3
    train_here(folder, *of("dynamics"))
    assert same_tensors(whole, weights(run / "dynamics.pt"))


# ---------------------------------------------------------------- data parallel, kill tests

def torchrun(n, folder, *flags):
    paths = os.pathsep.join((str(REPO), str(Path(__file__).parent)))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={n}", "--", REPO / "train.py", *TINY, *map(str, flags)],
        text=True, capture_output=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_equal_one(finished, tmp_path, shard):
    """Fails if a stage's losses under torchrun differ from those of one process by more
    than 1e-3 in 20 steps, also with weights spread over the processes, or each process
    computes all rows. Muon rounds to bf16, which lets a sum's last bit grow: hence a low
    rate."""
    shutil.copytree(finished / "datasets", tmp_path / "datasets")
    flags = ("--dtype", "fp32", "--train.log_every", 1, "--train.batch", 8, "--train.lr",
             1e-3, "--train.lr_matrix", 1e-3, *(f"--train.{s}_steps=20" for s in STAGES))
    losses = {"tokenizer": ["mse"], "dynamics": ["dynamics"], "imagine": ["value"],
              "agent": ["dynamics", "bc", "reward", "continue", "events"]}
    for stage in STAGES:
        if (shard, stage) == ("true", "agent"):     # they go on where one process stopped
            stop_after(tmp_path, 3, *flags, "--stage", stage, "--run", "two")
        for n, name in enumerate(("one", "two"), 1):
            run = torchrun(n, tmp_path, *flags, "--stage", stage, "--run", name,
                           "--train.shard", shard if n == 2 else "false")
            assert run.returncode == 0, run.stderr[-2000:]
        one, two = (metrics_of(tmp_path / "runs" / name, stage) for name in ("one", "two"))
        assert len(one) == len(two) == 20
        worst = {k: max(abs(a[k] / b[k] - 1) for a, b in zip(one, two, strict=True))
                 for k in losses[stage]}
        print(stage, worst)
        assert max(worst.values()) < 1e-3, (stage, worst)
        assert one[0][losses[stage][0]] != one[-1][losses[stage][0]]
        if stage in ("dynamics", "agent"):      # metrics are of a process's own rows
            assert abs(one[-1]["flow"] / two[-1]["flow"] - 1) > 1e-3
        shutil.copy(tmp_path / f"runs/one/{stage}.pt", tmp_path / f"runs/two/{stage}.pt")


def kill_child(folder, flags, how, n):
    """Runs in a process of its own. how: "half" dies in the middle of its checkpoint number
    n, "between" after the first of that write's two renames, "" until it is killed."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")         # noqa: SIM115
    count, save, rename = [], torch.save, os.replace

    def half(state, file):
        count.append(file)
        if len(count) == n:
            content = io.BytesIO()
            save(state, content)
            file.write(content.getvalue()[:len(content.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    def between(source, target):
        rename(source, target)
        count.append(target)
        if ".old" in str(target) and len(count) >= n:
            os.kill(os.getpid(), signal.SIGKILL)

    if how == "half":
        torch.save = half
    elif how == "between":
        os.replace = between
    train_here(folder, *flags, save_every=1)


@pytest.mark.slow
def test_killed_at_any_moment_every_stage_ends_the_same(finished, tmp_path):
    """Fails if SIGKILL (6 random moments, 2 in the middle of a checkpoint's bytes, 2
    between its renames) costs one bit of the metrics or weights of a stage: 40 of 40 are
    equal."""
    server, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    server.set_forkserver_preload([__name__, "matplotlib.pyplot"])
    shutil.copytree(finished / "datasets", tmp_path / "datasets")
    equal = killed = resumed = 0
    whole = None

    def lines(run):
        path = run / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def start(*args):
        child = server.Process(target=kill_child, args=(tmp_path, *args))
        child.start()
        return child

    for stage in STAGES:
        flags = ("--stage", stage, "--train.log_every", 3, f"--train.{stage}_steps", 20,
                 "--run")
        kinds = [("", 0)] * 7 + [("half", rng.randint(2, 18)) for _ in range(2)]
        kinds += [("between", rng.randint(2, 18)) for _ in range(2)]
        for trial, (how, n) in enumerate(kinds):
            run = tmp_path / f"runs/{stage}{trial}"
            run.mkdir(parents=True)
            early = FINALS[4:6] if stage in STAGES[2:] else ()
            for file in (*FINALS[:STAGES.index(stage)], *early):
                shutil.copy(finished / "runs/base" / file, run / file)
            child = start((*flags, run.name), how, n)
            if trial and not how:
                wait = rng.randint(0, 5)            # lines of metrics.jsonl
                while child.is_alive() and lines(run) < wait:
                    time.sleep(0.001)
                time.sleep(rng.random() * (0.3 if wait else 2))
                child.kill()
            child.join()
            killed += trial > 0 and child.exitcode == -9
            resumed += trial > 0 and any(run.glob(f"{stage}.resume*.pt"))
            if trial:
                child = start((*flags, run.name), "", 0)
                child.join()
            assert child.exitcode == 0, (stage, trial, how, n)
            result = metrics_of(run, stage), weights(run / f"{stage}.pt")
            whole = result if trial == 0 else whole
            assert len(whole[0]) == 7               # steps 3, 6, ..., 18 and 20
            same = whole[0] == result[0] and same_tensors(whole[1], result[1])
            equal += trial > 0 and same
            print(stage, trial, how or "random", equal, killed, resumed, flush=True)
    assert equal == 40 and killed >= 36 and resumed >= 24, (equal, killed, resumed)


# ----------------------------------------------------------------------------------- README

def test_readme_commands_parse():
    """Fails if the README shows a command that the programs refuse."""
    text = (REPO / "README.md").read_text()
    lines = re.findall("`([^`\n]+)`", text)
    lines += [line for line in text.splitlines() if "`" not in line]
    def parse_data(words):
        if words[0] == "import-episodes":
            return envs.episodes.make_parser().parse_args(words[1:])
        return data.make_parser().parse_args(words)

    parsers = {"train.py": train.parse, "play.py": play.make_parser().parse_args,
               "data.py": parse_data}
    seen = 0
    for part in [part for line in lines for part in re.split(r"&&|\|\|", line)]:
        words = part.split("#")[0].split() if "python" in part else []
        program = next((word for word in words if word in parsers), None)
        if program and "--help" not in words:
            parsers[program](shlex.split(part.split("#")[0].split(program, 1)[1]))
            seen += 1
    assert seen >= 8


def test_readme_environment_can_be_recorded(tmp_path, monkeypatch):
    """Fails if the README's own environment is not one that can be recorded and read."""
    code = (REPO / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "mygame.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    dataset = data.record("mygame:Game", tmp_path / "set", 2, 20, 0)
    assert dataset.lengths.tolist() == [20, 20] and dataset.spec.tasks == ("right_edge",)
    assert len(code.splitlines()) <= 30


def test_every_equation_has_one_home():
    """Fails if an equation is cited by no function, or by two files, or not in the
    README."""
    readme = (REPO / "README.md").read_text()
    sources = {name: (REPO / name).read_text() for name in (
        "tokenizer.py", "dynamics.py", "agent.py", "train.py", "play.py")}
    for i in range(2, 12):
        home = re.compile(rf'"""Eq. {i}[ :]')
        homes = [name for name, text in sources.items() if home.search(text)]
        if i != 3:                                          # Eq. 1 and 3 are cases of Eq. 7
            assert len(homes) == 1, (i, homes)
            assert f"| Eq. {i} " in readme
    assert "(Eq. 1)" in sources["dynamics.py"] and "(Eq. 3)" in sources["dynamics.py"]
    assert "| Eq. 1, 3 " in readme


# --------------------------------------------------------------------------------- play.py

INF = np.inf


class KeyEnv(PaintEnv):
    """PaintEnv without the number and the seed's mark, with prompts, a probe, a reader."""
    spec = EnvSpec("keys", 8, 12, ActionSpec((5, 2, 2)), ("four", "both_keys"),
                   prompt_order=(("four", 2), ("both_keys", 0)))

    def paint(self, action):
        self.action, frame = action, super().paint(action)
        frame[0, 0, 2] = self.steps
        return frame

    def probe(self):
        return {"probe_action": np.uint8(self.action[:1])}

    def reader(self):
        return ActionReader()


class ActionReader:
    """Reads the action off a frame of KeyEnv."""

    def compare(self, frames, true, shown=None):
        right, one = frames[:, 0, 0, 0] == true["probe_action"][:, 0], np.ones(len(frames))
        if shown is None:
            return {"actions": (right, one)}
        changed = shown["probe_action"] != true["probe_action"]
        return {"changed": (right * changed[:, 0], changed[:, 0])}


class BareEnv(KeyEnv):
    """KeyEnv without tasks, prompts, ground truth or reader; its player stands still."""
    reader = probe = property()
    spec = EnvSpec("bare", 8, 12, ActionSpec(classes=(5, 2, 2)), ())

    def player(self, rng, skill):
        return types.SimpleNamespace(act=self.spec.actions.zeros)

    def step(self, action):
        frame, _, terminal = super().step(action)
        return frame, np.zeros(0, bool), terminal


class IdleEnv(KeyEnv):
    """KeyEnv in which classes 2, 0 and 1 are "do nothing"; the first column has names."""
    spec = replace(KeyEnv.spec, idle=(2, 0, 1),
                   action_names=("left", "right", "stay", "up", "down"))


class NumbersEnv(KeyEnv):
    """KeyEnv without keys: the frame shows three numbers, -1 as 0 and 1 as 200."""
    spec = replace(KeyEnv.spec, actions=ActionSpec(numbers=3))

    def paint(self, action):
        return super().paint(100 * (1 + action))


class MixedEnv(NumbersEnv):
    """NumbersEnv with a class of 2 in place of the first number: it shows as 100 or 200."""
    spec = replace(KeyEnv.spec, actions=ActionSpec(classes=(2,), numbers=2))


class AbsentEnv(KeyEnv):
    """KeyEnv that finds only in play that a part of it is missing."""

    def reset(self, seed):
        raise UserError("got no simulator; need it; do: install it")


class NoiseEnv(KeyEnv):
    """KeyEnv whose frames are as different as can be: by seed, step and action."""

    def paint(self, action):
        rng = np.random.default_rng([self.seed, self.steps, *action.astype(int)])
        return np.full((8, 12, 3), rng.integers(0, 256, 3), np.uint8)


KEY_ENV = f"{__name__}:KeyEnv"


def key_run(env=KeyEnv, stage="agent"):
    """A run with random weights, as load_run would give it; one time layer each. Stage
    "dynamics": without an agent."""
    spec, sizes = env().spec, dict(dim=16, layers=3, heads=4, kv_heads=2)
    tokenizer = TokenizerConfig(height=8, width=12, patch=4, latents=4, channels=3, pack=2,
                                context=3, **sizes)
    dynamics = DynamicsConfig(tokens=2, channels=6, tasks=len(spec.tasks), registers=1,
                              context=4, time_every=3, k_max=8, **sizes)
    agent = None
    if stage != "dynamics":
        agent = randomize(Agent(AgentConfig(hidden=16, context=4, horizon=3), 16,
                                spec.actions, len(spec.tasks)))
    return Run(Path("none"), stage, spec, randomize(Tokenizer(tokenizer)),
               randomize(Dynamics(dynamics, spec.actions)), agent, {})


def always_both_keys_and_4(agent):
    """Make the policy do that: 5 logits of the action, 2 of each key."""
    for parameter in agent.policy.parameters():
        parameter.data.zero_()
    logits = 30.0 * torch.tensor([-1, -1, -1, -1, 1, -1, 1, -1, 1])
    agent.policy.out.bias.data = logits.repeat(agent.policy.shape[0])


def clips(B=2, T=6, seed=0):
    """Random latents (B, T, 2, 6) and actions, all labelled."""
    z = torch.randn(B, T, 2, 6, generator=torch.Generator().manual_seed(seed))
    actions = KeyEnv.spec.actions.sample(np.random.default_rng(seed), B, T)
    return Batch(z, torch.from_numpy(actions), torch.ones(B, T, dtype=torch.bool))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "set"
    return data.record(KEY_ENV, folder, 5, 30, 0, workers=1)


@pytest.fixture
def silence(monkeypatch):
    """Dreams without noise."""
    monkeypatch.setattr(Dream, "noise", lambda self, B, T: torch.zeros(B, T, 2, 6))


# --------------------------------------------------------------- intervals and results.json

def test_intervals_against_known_values():
    """Fails if Wilson's centre or width is wrong (8 of 10: 0.490 to 0.943), t is normal, or
    the bootstrap does not keep pairs together."""
    low, high = play.wilson(8, 10)
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert play.wilson(0, 10)[0] == 0 and play.wilson(0, 10)[1] > 0.2
    value, low, high = play.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * 1.5811 / 5 ** 0.5
    assert value == 3 and abs(high - 3 - half) < 1e-3 and abs(low - 3 + half) < 1e-3
    assert play.t_interval([3.0]) == (3.0, None, None)
    x = np.random.default_rng(0).normal(size=200)
    value, low, high = play.bootstrap(lambda a, b, axis: (a - b).mean(axis), x + 1, x)
    assert abs(value - 1) < 1e-9 and abs(high - low) < 1e-9         # paired: no spread
    _, low, high = play.bootstrap(np.mean, x)
    assert abs((high - low) / 2 / (1.96 * x.std() / 200 ** 0.5) - 1) < 0.1


def test_rows_replace_those_of_equal_name_and_labels(tmp_path):
    """Fails if a row is doubled, or one of another agent is lost, or its command is."""
    old = [play.Result("success", x, None, None, 1, "share", {"agent": agent})
           for x, agent in ((0.1, "BC"), (0.2, "random"))]
    old.append(play.Result("psnr", 9.0, 8.0, 10.0, 4, "dB"))
    play.add_results(tmp_path, "first", old)
    play.add_results(tmp_path, "second", [old[0]._replace(value=0.5)])
    rows = play.read_results(tmp_path)
    assert [row.value for row in rows] == [0.2, 9.0, 0.5]
    assert play.find(rows, "success", {"agent": "BC"}).value == 0.5
    assert play.find(rows, "success") is None and play.find(rows, "psnr").low == 8.0
    assert [row.command for row in rows] == ["first", "first", "second"]


def episodes(agent, *firsts):
    return [play.Episodes(agent, "run", np.array(first)) for first in firsts]


def test_comparison_of_agents_against_known_values(tmp_path):
    """Fails if runs are pooled as if they were independent, a time forgets the episodes
    that never got there, worlds are not paired, or a chart is drawn of no agent."""
    spec = KeyEnv.spec
    # 2 runs, 2 worlds, 2 tasks and death
    bc = [[[3, INF, INF], [INF, INF, 8]], [[5, INF, 9], [7, INF, INF]]]
    imagined = [[[2, INF, INF], [4, 8, INF]], [[1, 9, INF], [3, INF, INF]]]
    plays = [*episodes("BC", *bc), *episodes("imagination", *imagined),
             *episodes("random", np.full((2, 3), INF))]
    rows = play.agent_rows(spec, plays, 10)
    assert play.agents_in(rows) == ["random", "BC", "imagination"]

    def row(name, agent="BC", **labels):
        return play.find(rows, name, {"agent": agent, **labels})

    assert row("achievements").value == 0.75
    assert row("achievements", "imagination").value == 1.5
    assert row("steps_alive").value == (10 + 8 + 9 + 10) / 4
    assert row("alive").value == 0.5 and row("alive", "imagination").value == 1
    assert row("time", task="four").value == (3 + 10 + 5 + 7) / 4
    assert row("success", task="four")[1:5] == (0.75, 0.0, 1.0, 4)  # t over 2 runs is wide
    assert row("success", "random", task="four")[2:4] == play.wilson(0, 2)
    gains = play.difference_rows(spec, plays, "imagination", "BC", 10)
    gain = play.find(gains, "achievements_gain", {"agent": "imagination", "than": "BC"})
    half = 12.71 * np.std([1.0, 0.5], ddof=1) / 2 ** 0.5
    assert gain.value == 0.75 and abs(gain.high - 0.75 - half) < 2e-3
    sooner = {"agent": "imagination", "than": "BC", "task": "four"}
    assert play.find(gains, "time_gain", sooner).value == (2 + 4 + 1 + 3) / 4 - 25 / 4
    assert len(gains) == 2                                        # BC never holds both keys
    one = play.difference_rows(spec, plays, "imagination", "random", 10)
    assert one[0].value == 1.5 and one[0].n == 4                    # with each of the runs
    for name, known in (("all", rows), ("none", gains)):
        play.picture_agents(tmp_path / f"{name}.png", spec, known, "success")
    assert [path.stem for path in tmp_path.iterdir()] == ["all"]


# ------------------------------------------------------------------------- the world model

def test_psnr_is_of_the_mean_error():
    """Fails if decibels are averaged: errors 0.1 and 0.001 give 12.97 dB, not 20."""
    assert abs(play.decibel(np.array([0.1, 0.001])) - 12.967) < 1e-3
    black = torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8)
    assert play.squared_error(black, black + 255) == 1


def test_paired_noise_makes_dreams_repeat():
    """Fails if the dream's noise depends on more than the seed: then shuffled actions are
    not compared with the same noise."""
    run, batch = key_run(), clips()
    other = batch._replace(actions=batch.actions.flip(0))
    films = [play.dream_clips(run, x, 3, seed) for x, seed in (
        (batch, 0), (batch, 0), (batch, 1), (other, 0))]
    assert torch.equal(films[0], films[1]) and films[0].shape == (2, 6, 8, 12, 3)
    assert not torch.equal(films[0], films[2]) and not torch.equal(films[0], films[3])
    assert torch.equal(films[0][:, :3], films[3][:, :3])           # the context is the same


def test_forced_dreams_see_the_true_frames(silence):
    """Fails if one-step dreams go on from what they imagined, or a free dream sees the
    truth."""
    run, batch = key_run(), clips(2, 7)
    other = batch._replace(z=batch.z.clone())
    other.z[:, 4] += 2                                              # a later true frame
    free, forced = (play.dream_clips(run, batch, 4, forced=x).int() for x in (False, True))
    changed = play.dream_clips(run, other, 4, forced=True).int()
    assert torch.equal(free, play.dream_clips(run, other, 4).int())
    assert torch.equal(free[:, :4], forced[:, :4])
    assert torch.equal(forced[:, :5], changed[:, :5])
    assert (forced[:, 5:] != changed[:, 5:]).any()
    for t in (4, 6):                   # each equals a dream of one frame from the true past
        one = play.dream_clips(run, Batch(*(x[:, :t + 1] for x in batch[:3])), 1)
        assert (one[:, -1].int() - forced[:, t]).abs().max() <= 1


def test_world_is_judged_frame_by_frame(dataset, monkeypatch):
    """Fails if shuffled actions are of the same episode or change the context, or frames
    are compared with the truth of others. A stub model paints the actions that it is given,
    a stub tokenizer flips each pixel's last bit but red's, which shows the action."""
    asked, how = [], []

    class Stub:
        latent_std, encode = torch.ones(1), lambda self, x: x
        decode = staticmethod(lambda z: z ^ torch.tensor([0, 1, 1], dtype=torch.uint8))

    def dream_clips(run, batch, horizon, seed=0, forced=False, sampler=()):
        asked.append(batch.actions)
        how.append(forced)
        film = batch.z.clone()
        film[:, -horizon:, :, :, 0] = batch.actions[:, -horizon:, None, None, 0].byte()
        return film

    monkeypatch.setattr(play, "dream_clips", dream_clips)
    run = Run(None, "dynamics", dataset.spec, Stub(), dynamics=True)
    rows = play.evaluate_world(run, dataset, "fp32", horizon=8)
    clips = play.reference_clips(dataset, play.CLIPS, 24, "cpu")
    frames, actions = clips.frames.numpy(), clips.actions.numpy()
    assert torch.equal(asked[0], clips.actions) and how == [False, False, True]
    assert torch.equal(asked[1][:, :16], asked[0][:, :16])
    for i, x in enumerate(asked[1]):
        same = [torch.equal(x[16:], y[16:]) for y in asked[0]]
        assert set(clips.episode[same]) - {clips.episode[i]}

    for h in (1, 4, 8):
        of, t = {"film": "copy", "horizon": h}, 15 + h
        error = np.square((frames[:, t] - 1.0 * frames[:, 15]) / 255).mean()
        assert abs(play.find(rows, "psnr", of).value + 10 * math.log10(error)) < 1e-3
        changed = actions[:, t, 0] != actions[:, 15, 0]
        found = play.find(rows, "changed", {"film": "dream", "horizon": h})
        assert (found.value, found.n) == (1.0, changed.sum())
    changes = actions[:, 16:, 0] != actions[:, 15:-1, 0]        # not those of the context
    assert play.find(rows, "changed", {"film": "next"}).n == changes.sum()
    bits = -10 * math.log10(2 / 3 / 255 ** 2)
    assert abs(play.find(rows, "tokenizer_psnr").value - bits) < 1e-3
    read = play.find(rows, "actions", {"film": "reconstruction"})
    assert read[1:5] == (1.0, 1.0, 1.0, 24 * len(frames))
    assert play.find(rows, "gain_over_copying", {"horizon": 8}).value > 0
    assert play.find(rows, "ssim", {"film": "dream", "horizon": 4}).value > 0.999
    assert {row.of.get("film") for row in rows} == {
        None, "dream", "shuffled", "copy", "reconstruction", "next"}


def test_short_episodes_are_judged(tmp_path, monkeypatch, capsys):
    """Fails if episodes no longer than a dream's context can't be dreamed on."""
    dataset, run = data.record(KEY_ENV, tmp_path / "set", 4, 12, 1, workers=1), key_run()
    rows = play.evaluate_world(run, dataset, "fp32")
    assert {row.of["horizon"] for row in rows if row.of.get("film") == "dream"} == {1, 4}
    film = play.dream_film(run, dataset, clips=2, dtype="fp32")
    orange = (film[:, 0, 0] == play.ORANGE).all(-1)
    assert orange.tolist() == [False] * 6 + [True] * 6
    run.agent.cfg = replace(run.agent.cfg, context=13)
    play.picture_imagined(run, dataset, tmp_path / "x.png", dtype="fp32")
    assert "Left out: " in capsys.readouterr().out and not (tmp_path / "x.png").exists()
    data.record(KEY_ENV, tmp_path / "least", 2, 2, 1, workers=1)
    assert play.evaluate_world(run, data.Dataset(tmp_path / "least"), "fp32")


def test_a_rare_class_counts_as_much_as_a_common_one():
    """Fails if a mean over cells is called balanced, the worst class isn't named, or one
    with too few cells is judged. Of each class: right, cells in a frame."""
    shares = {"grass": (90, 90), "zombie": (1, 4), "arrow": (0, 1)}

    class Reader:
        def by_class(self, frames, true, shown=None):
            one = np.ones(len(frames), int)
            assert (true["probe"] == 3).all() and (shown["probe"] == 1).all()
            return {name: (a * one, n * one) for name, (a, n) in shares.items()}

    frames, probes = torch.zeros(8, 5, 2, 2, 3), {"probe": np.tile(np.arange(5), (8, 1))}
    rolled = play.Rollouts(frames, {"dream": frames}, probes, 2, 2)
    of = {"film": "dream", "horizon": 2}
    rows = play.score_classes(rolled, Reader(), of, [3] * 2, 2)
    balanced, worst = (play.find(rows, name, of) for name in (
        "balanced_cells", "worst_class"))
    assert balanced.value == (1 + 1 / 4) / 2 and balanced.n == 2
    assert (worst.value, worst.unit, worst.n) == (1 / 4, "share of zombie", 64)
    assert not play.find(rows, "class_cells", of | {"class": "arrow"})      # 16 cells


def test_pictured_prompts_are_those_of_the_order(dataset, monkeypatch, tmp_path):
    """Fails if the picture of imagined rollouts shows prompts that are not practised, or
    can't be drawn where the events come too early to imagine what leads to them."""
    run, sampled = key_run(), []
    sample = dataset.sample

    def watch(*how):
        sampled.append(sample(*how))
        return sampled[-1]

    monkeypatch.setattr(dataset, "sample", watch)
    for order, asked in (((("both_keys", 0),), {1}), ((), {0, 1})):
        run.spec = replace(run.spec, prompt_order=order)
        play.picture_imagined(run, dataset, tmp_path / "x.png", 8, "fp32")
        assert set(sampled[-1][2].tolist()) == asked
    monkeypatch.setattr(dataset, "events", np.array([[0, 1, 1], [0, 20, 0]]))
    dataset.windows_with_event.cache_clear()
    run.spec = replace(run.spec, prompt_order=(("both_keys", 0),))  # happens in frame 1
    play.picture_imagined(run, dataset, tmp_path / "x.png", 4, "fp32")
    assert set(sampled[-1][2].tolist()) == {1}
    dataset.windows_with_event.cache_clear()


# -------------------------------------------------------------- agents in real environments

def test_a_packed_run_is_the_run_in_half_the_bits(copy, monkeypatch, capsys):
    """Fails if a packed run isn't small, a weight is another than the rounded one, BC isn't
    the imitated policy, another pack of the same name is mixed up with it, or no run means
    no game."""
    folder, run = copy
    monkeypatch.chdir(folder)
    monkeypatch.setattr(play, "DEMO", folder / "demo.pt")

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["play.py", *map(str, words)])
        play.main()

    trained = {p.name: p.read_bytes() for p in run.glob("*.pt")}
    command("pack", "--run", run)
    assert (folder / "demo.pt").stat().st_size < 0.5 * (run / "imagine.pt").stat().st_size
    command("eval", "--run", "demo.pt", "--episodes", 2, "--length", 4)
    got = [load_run(folder / "runs/demo", stage) for stage in ("agent", "imagine")]
    was = [load_run(run, stage) for stage in ("agent", "imagine")]
    h = normal(5, 16)
    for one, other in zip(got, was, strict=True):
        for name in ("tokenizer", "dynamics"):
            pairs = zip(*(getattr(x, name).state_dict().values() for x in (one, other)),
                        strict=True)
            assert all(torch.equal(x, y.half().float() if y.ndim else y) for x, y in pairs)
        for head in ("policy", "prior", "reward"):
            x, y = getattr(one.agent, head)(h, 1), getattr(other.agent, head)(h, 1)
            assert torch.allclose(x, y, atol=0.02), head
    assert torch.allclose(got[1].agent.value(h), was[1].agent.value(h), atol=0.02)
    assert not torch.equal(was[0].agent.policy(h), was[1].agent.policy(h))      # control
    agents = {row.of["agent"] for row in play.read_results(folder / "runs/demo")
              if row.name == "achievements"}
    assert {"BC", "imagination"} <= agents
    before = (folder / "runs/demo/imagine.pt").stat().st_mtime_ns
    play.unpack("demo.pt")
    assert (folder / "runs/demo/imagine.pt").stat().st_mtime_ns == before
    state = train.load_checkpoint("demo.pt")
    train.save_checkpoint("demo.pt", state | {"step": 3})
    assert load_run(play.unpack("demo.pt")).meta["step"] == 3
    assert not play.read_results(folder / "runs/demo")      # those were of the other one
    shutil.copy("demo.pt", "base.pt")                       # but runs/base was trained
    for path, match in ((run / "imagine.pt", "no packed run"), ("base.pt", "base")):
        with pytest.raises(UserError, match=match):
            play.unpack(path)
    assert {p.name: p.read_bytes() for p in run.glob("*.pt")} == trained
    seen = []
    monkeypatch.setattr(play, "serve", lambda args: seen.append(args.run))
    shutil.rmtree(folder / "runs/crafter", ignore_errors=True)
    command()
    assert seen == [Path("runs/demo")] and "train your own" in capsys.readouterr().out
    (folder / "runs/crafter").mkdir()
    command()
    assert Path(seen[-1]) == Path("runs/crafter")                   # one's own goes first
    demo = (folder / "demo.pt").read_bytes()
    command("pack", "--run", run, "--out", "small.pt")
    assert (folder / "small.pt").exists() and (folder / "demo.pt").read_bytes() == demo


def test_prompts_advance_by_real_events(dataset):
    """Fails if events of other tasks count, a prompt changes early, the last one ends, or
    the recorded frames get another prompt than the evaluation would ask for there."""
    order = play.PromptOrder(KeyEnv.spec, 2)
    both, none = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    first = np.array([[1, 0], [0, 1]], bool)
    changes = [order.advance(events).tolist() for events in (first, none, first)]
    assert changes == [[False, False], [False, False], [True, False]]
    assert order.task.tolist() == [1, 0]
    for _ in range(3):
        order.advance(both)
    assert order.task.tolist() == [1, 1]
    # what has been done often enough is not asked for; asked for again means once more
    order = play.PromptOrder(replace(KeyEnv.spec, prompt_order=(
        ("four", 1), ("both_keys", 2), ("four", 2))), 2)
    for events, tasks in (([[0, 1], [2, 0]], [0, 1]), ([[0, 1], [1, 0]], [0, 1]),
                          ([[1, 0], [0, 3]], [0, 0]), ([[2, 0], [0, 0]], [0, 0])):
        order.advance(np.array(events))
        assert order.task.tolist() == tasks
    free = play.PromptOrder(replace(KeyEnv.spec, prompt_order=()), 2)     # each in turn
    assert free.advance(first).tolist() == [True, False] and free.task.tolist() == [1, 0]
    assert not play.PromptOrder(BareEnv.spec, 2).advance(np.zeros((2, 0))).any()
    prompts, ahead = play.prompts_along(dataset)
    fours = [np.cumsum(dataset.episode(i)["events"][:, 0]) for i in range(5)]
    assert (prompts == (np.concatenate(fours) >= 2)).all() and 0 < prompts.mean() < 1
    for i, t in np.ndindex(5, 24):                          # until the prompt's next event
        events, now = dataset.episode(i)["events"], dataset.offsets[i] + t
        if t < len(events):
            later = np.flatnonzero(events[t + 1:, prompts[now]])
            assert ahead[now] == (later[0] + 1 if len(later) else np.inf)


@pytest.mark.parametrize("gamma, rewards, best, goes_on", [
    (0.99, [[9, 1, 1, 1], [0, 1]], [0, 1], 0),
    (0.5, [[0, 1], [0, 0, 0, 1.5]], [0, 4], 0),         # sooner counts more
    (0.99, [[0] * 7, [0, 1]], [7], 0),                  # most have none ahead
    (0.9, [[0, -1, -2, -1], [0, -1, -1, -1]], [4, 5], 1)])      # cut off, not ended
def test_the_best_returns_are_imitated(monkeypatch, gamma, rewards, best, goes_on):
    """Fails if other frames than the quarter with the most discounted reward ahead count,
    or a frame's own reward does, that of the next episode, or success."""
    monkeypatch.setattr(play, "GAMMA", gamma)
    rewards = [np.array([x, 50.0 * np.arange(len(x))]).T for x in rewards]
    n, first = sum(map(len, rewards)), len(rewards[0])
    recorded = SimpleNamespace(
        spec=replace(KeyEnv.spec, returns=True), frames_total=n, offsets=[0, first, n],
        episodes=lambda split: range(2), episode=lambda i: {
            "events": rewards[i], "continues": np.full(len(rewards[i]), goes_on)})
    task, ahead = play.prompts_along(recorded)
    assert np.flatnonzero(ahead == 0).tolist() == best and not task.any()
    assert np.isinf(ahead).sum() == n - len(best)


def test_needs_break_in_until_they_are_met_or_given_up():
    """Fails if a need is due early or late, isn't met by what happens unasked, is asked for
    without end, stops the order from counting, or yields to a later one."""
    spec = replace(KeyEnv.spec, tasks=("four", "both_keys", "rest"), prompt_order=(
        ("four", 2), ("both_keys", 0)), needs=(("rest", 2, 3, 4), ("both_keys", 1, 4, 9)))
    order = play.PromptOrder(spec, 2)
    assert order.tasks == (0, 1, 2)
    events, tasks = np.zeros((2, 3), int), []
    for step in range(1, 12):
        events[:] = 0
        events[0, 2] = step in (1, 4)       # world 0 rests unasked, then once more
        events[:, 0] = step == 4
        before = order.task
        assert (order.advance(events) == (order.task != before)).all()
        tasks.append(order.task.tolist())
    zero, one = zip(*tasks, strict=True)
    # due at 3, met at 4 where the other one is due, due at 8, given up after 2 more steps
    assert zero == (0, 0, 2, 1, 1, 1, 1, 2, 2, 2, 0)
    assert one == (0, 0, 2, 2, 2, 1, 1, 1, 0, 2, 2)


def test_what_is_done_while_a_need_is_asked_for_counts():
    """Fails if the order sleeps while a need is asked for."""
    spec = replace(KeyEnv.spec, tasks=("four", "both_keys", "rest"), prompt_order=(
        ("four", 1), ("both_keys", 0)), needs=(("rest", 1, 1, 9),))
    order = play.PromptOrder(spec, 1)
    for events, task in (([0, 0, 0], 2), ([1, 0, 0], 2), ([0, 0, 1], 1)):
        order.advance(np.array([events]))
        assert order.task.tolist() == [task]


def test_needs_are_due_in_recordings_and_game_as_in_the_evaluation(
        dataset, monkeypatch, tmp_path):
    """Fails if row 0, to which no step led, counts as one."""
    spec = replace(KeyEnv.spec, prompt_order=(("four", 0),),
                   needs=(("both_keys", 99, 3, 9),))
    monkeypatch.setattr(dataset, "spec", spec)
    assert play.prompts_along(dataset)[0][:9].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0]
    session, asked = game(tmp_path, env=type("NeedsEnv", (KeyEnv,), {"spec": spec})), []
    for _ in range(3):
        session.handle({"op": "step"})
        asked.append(int(session.order.task[1]))
    assert asked == [0, 0, 1]


def test_cached_h_equals_recomputed_h_after_a_change_of_task(silence):
    """Fails if a changed prompt leaves old agent tokens in the cache, or rows are mixed
    up."""
    run, N, T = key_run(), 3, 9
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (T, N, 8, 12, 3), dtype=np.uint8)
    actions = run.spec.actions.sample(rng, T, N)
    actor, task = play.Actor(run, torch.Generator()), np.zeros(N, int)
    for t in range(T):
        changed = np.array([False, t == 6, t == 2])
        task = np.where(changed, 1, task)
        actor.observe(frames[t], actions[t], t > 0, task, changed)
    z = run.tokenizer.encode(torch.from_numpy(frames).transpose(0, 1))
    past = z, torch.from_numpy(actions).transpose(0, 1), torch.arange(T).expand(N, T) > 0
    told = torch.as_tensor(task)[:, None].expand(N, T)
    h = Dream(run.dynamics).commit(*past, told)[:, -1]
    assert torch.allclose(actor.h, h, atol=1e-5)
    other = Dream(run.dynamics).commit(*past, torch.zeros(N, T, dtype=torch.long))[:, -1]
    assert (other[1:] - h[1:]).abs().max() > 1e-3                   # control: it matters


def test_evaluation_plays_the_sampled_policy():
    """Fails if events, first times or the mapping of actions to environments are
    shifted."""
    with data.VecEnv(KEY_ENV, range(1, 5), workers=1) as worlds:
        first = play.play_episodes(worlds, 40)
        assert np.isfinite(first[:, :2]).all() and first.min() >= 1
        assert first[:, 2].tolist() == [INF, INF, 12, INF]        # seeds divisible by 3 end
        run = key_run()
        always_both_keys_and_4(run.agent)
        first = play.play_episodes(worlds, 6, run)
    assert (first[:, :2] == 1).all() and np.isinf(first[:, 2]).all()
    assert play.count_achievements(run.spec, first).tolist() == [2] * 4


def test_a_temperature_asked_for_is_not_on_top_of_an_agents_own(copy, monkeypatch):
    """Fails if an agent made for 0.5 plays at 0.25 where 0.5 is asked for, at 1 where
    nothing is, or two temperatures share their episodes."""
    folder, run = copy
    monkeypatch.chdir(folder)
    worlds, heat = SimpleNamespace(name="keys", seeds=range(2)), []

    def episodes(worlds, length, run, dtype, temperature):
        heat.append(temperature)
        return np.zeros((2, 3))

    monkeypatch.setattr(play, "play_episodes", episodes)
    for temperature in (0, 0.5, 0.25, 1.0):
        play.played(run, worlds, "BC", 4, torch.device("cpu"), "fp32", temperature)
    assert heat == [1, 0.5, 2]              # 0 and 0.5 are the same, and read back


def test_agents_are_sampled_at_their_temperature(monkeypatch):
    """Fails if agents are greedy, or a temperature gets lost on the way to them."""
    run, taken = key_run(), []
    for parameter in run.agent.policy.parameters():
        parameter.data.zero_()
    run.agent.policy.out.bias.data = torch.tensor([0, 0.5, 0, 0, 0, 0.5, 0, 0, 0.5]).repeat(
        run.agent.policy.shape[0])

    def step(self, actions, real=data.VecEnv.step):
        taken.append(actions.copy())
        return real(self, actions)

    monkeypatch.setattr(data.VecEnv, "step", step)
    with data.VecEnv(KEY_ENV, (1, 2), workers=1) as worlds:
        for temperature, kinds in ((1.0, 5), (0.01, 1)):
            taken.clear()
            play.play_episodes(worlds, 40, run, "fp32", temperature=temperature)
            assert len(set(np.concatenate(taken)[:, 0])) == kinds


def test_prompts_move_on_by_what_happens_in_the_game(monkeypatch):
    """Fails if agents are told the task of before, or not that it changed: "four" is asked
    for twice, then "both_keys"."""
    run, told = key_run(), []
    always_both_keys_and_4(run.agent)

    def observe(self, frames, actions, labelled, task, changed=(), real=play.Actor.observe):
        told.append((task.tolist(), np.array(changed).tolist()))
        return real(self, frames, actions, labelled, task, changed)

    monkeypatch.setattr(play.Actor, "observe", observe)
    with data.VecEnv(KEY_ENV, (1, 2), workers=1) as worlds:
        play.play_episodes(worlds, 3, run, "fp32")
    same, moved = [False, False], [True, True]
    assert told == [([0, 0], []), ([0, 0], same), ([1, 1], moved), ([1, 1], same)]


def test_the_recorded_player_plays_in_the_same_worlds():
    """Fails if it gets other worlds, or fewer steps than an agent."""
    with data.VecEnv(KEY_ENV, range(2, 6), workers=1) as worlds:
        first = play.play_recorded(worlds, 12)
    assert first[:, 2].tolist() == [INF, 12, INF, INF]              # world 3 ends then


def test_the_dead_are_left_out_and_the_others_play_on(silence, monkeypatch):
    """Fails if, once some worlds have ended, the others' frames, prompts, caches or actions
    get mixed up: each must play as it does alone (no noise, a policy without chance)."""
    run, seen, middle, observed = key_run(), [], [], []

    def act(h, *_):
        middle.append(h.mean(0))
        h = h - middle[0]                                          # what tells worlds apart
        return torch.cat([h[:, :5].argmax(-1, keepdim=True), h[:, 5:7] > 0], 1).float()

    step, observe = data.VecEnv.step, play.Actor.observe
    monkeypatch.setattr(run.agent, "act", act)
    monkeypatch.setattr(data.VecEnv, "step",
                        lambda self, a: seen.append(deepcopy(a)) or step(self, a))
    monkeypatch.setattr(play.Actor, "observe", lambda self, frames, *rest:
                        observed.append(len(frames)) or observe(self, frames, *rest))

    def play_in(*seeds):
        seen.clear()
        with data.VecEnv(f"{__name__}:NoiseEnv", seeds, workers=1) as worlds:
            return play.play_episodes(worlds, 30, run, "fp32"), np.stack(seen)

    seeds = 3, 200, 30, 100, 6, 250
    first, actions = play_in(*seeds)
    assert set(observed[:12]) == {6} and set(observed[12:]) == {3}
    assert len({actions[:12, i].tobytes() for i in range(6)}) > 3   # control: they differ
    alone, chosen = play_in(seeds[5])
    assert (alone[0] == first[5]).all() and (chosen[:, 0] == actions[:, 5]).all()


def test_the_latest_world_model_is_judged_as_was_asked_for(dataset, monkeypatch, tmp_path):
    """Fails if an earlier stage is judged, or the command's sampling steps get lost."""
    run, asked = key_run(), []
    stubs = {"data_config": lambda folder: {"env": KEY_ENV},
             "picture_imagined": lambda *rest, dtype: None,
             "reference_of": lambda folder: dataset,
             "evaluate_world": lambda *rest, sampler: asked.append(sampler) or [],
             "load_run": lambda folder, stage, *rest: asked.append(stage) or run}
    for name, stub in stubs.items():
        monkeypatch.setattr(play, name, stub)
    sampler = play.Sampler(2, "min")
    play.evaluate(tmp_path, torch.device("cpu"), "fp32", 0, 5, sampler=sampler)
    assert asked == [None, sampler]


@pytest.mark.parametrize("env", [KeyEnv, BareEnv])
def test_a_run_is_judged_in_any_world(env, monkeypatch, tmp_path):
    """Fails if the evaluation or its report needs tasks, prompts, ground truth or a
    recorded player, agents play that were not trained, or the same episodes are played
    twice."""
    monkeypatch.chdir(tmp_path)
    name, run = f"{__name__}:{env.__name__}", key_run(env)
    config = {"data": {"env": name, "reference_episodes": 3, "length": 26,
                       "eval_episodes": 3, "eval_length": 26}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "agent.pt").touch()
    monkeypatch.setattr(play, "load_run", lambda *_: run)
    play.evaluate(tmp_path, torch.device("cpu"), "fp32", 2, 5)
    with monkeypatch.context() as once:
        once.delattr(play, "play_episodes")
        play.evaluate(tmp_path, torch.device("cpu"), "fp32", 2, 5)
    kept = [path.name for path in (tmp_path / "episodes").iterdir()]
    assert all("_50000_2x5" in name for name in kept)           # on which nothing is chosen
    rows = play.read_results(tmp_path)
    agents = {row.of.get("agent") for row in rows} - {None}
    assert agents == {"random", "BC", *(["player"] if env is BareEnv else [])}
    measured = {row.name for row in rows}
    assert {"psnr", "least_gain_over_copying", "achievements_gain"} <= measured
    assert ({"changed", "success", "time"} <= measured) == (env is KeyEnv)
    reference = play.reference_of(tmp_path)
    film = play.dream_film(run, reference, 2, 8, "fp32")
    assert film.shape == (24, 8 + 6, 2 * 2 * (12 + 6), 3)   # two dreams beside the world
    play.picture_reconstructions(run, reference, tmp_path / "tokenizer_reconstructions.png")
    report = play.write_report(tmp_path).read_text()
    assert "| achievements | BC |" in report and "imagined.png" in report
    assert ("success.png" in report) == (env is KeyEnv)
    with pytest.raises(UserError, match="jump"):
        play.evaluate_agents(tmp_path, torch.device("cpu"), "fp32", 2, 5, ["jump"])


# -------------------------------------------------------------------- play inside the dream

def game(tmp_path, start="fresh", stage="agent", env=KeyEnv):
    """A session with random weights, in fp32."""
    session = play.Session(key_run(env, stage), env(), tmp_path, "fp32")
    session.handle({"op": "reset", "start": start})
    return session


def play_everything(session):
    """Each request of the page, from each start -> names of those that were refused."""
    refused = set()
    for start in session.about()["starts"]:
        session.handle({"op": "reset", "start": start})
        for op in ("step", "what_if", "denoise", "mask", "step", "save", "join"):
            try:
                json.dumps(session.handle({"op": op, "frames": 1, "k": 2}))
            except UserError:
                refused.add(op)
        assert session.t == 2
    return refused


def keys_of(session, *labels):
    return [i for i, key in enumerate(session.keys) if key["label"] in labels]


def unpng(text):
    return imageio.v3.imread(base64.b64decode(text))


@pytest.mark.parametrize("start, frames", [("held_out", play.PLAYED), ("fresh", 1)])
def test_both_worlds_start_alike_and_take_the_same_keys(tmp_path, start, frames):
    """Fails if the worlds begin at different frames, or a pressed key reaches one of
    them."""
    session = game(tmp_path, start)
    assert len(session.rows["real"]) == frames
    assert len(session.rows["dream"]) == min(frames, 4)
    first = data.play_episode(KeyEnv(), play.PLAY_SEED, 0, frames, "-").frames[-1]
    shown = session.handle({"op": "reset", "start": start})["pictures"]
    assert (unpng(shown["real"]) == first).all()
    seen = np.stack([row.frame for row in session.rows["real"][-4:]])
    z = session.run.tokenizer.encode(torch.from_numpy(seen)[None])
    rebuilt = session.run.tokenizer.decode(z)[0, -1].numpy()
    assert np.abs(unpng(shown["dream"]).astype(int) - rebuilt).max() <= 1
    state = session.handle({"op": "step", "pressed": keys_of(session, "key 1", "action 3")})
    assert unpng(state["pictures"]["real"])[0, 1, 0] == 3          # KeyEnv shows the action
    assert all(rows[-1].action.tolist() == [3, 0, 1] for rows in session.rows.values())


def test_dreams_can_start_from_nothing(tmp_path):
    """Fails if a dream without context still has a real world, or never changes."""
    session = game(tmp_path, "nothing")
    states = [session.handle({"op": "step"}) for _ in range(3)]
    assert list(states[0]["pictures"]) == list(states[0]["readouts"]) == ["dream"]
    assert states[0]["pictures"]["dream"] != states[2]["pictures"]["dream"]


def test_a_policy_plays_in_the_world_it_is_given(tmp_path):
    """Fails if the policy's world and the person's are confused, the cloned policy and that
    of imagination are, or the page shows other probabilities than those of its controls."""
    session = game(tmp_path, stage="imagine")
    always_both_keys_and_4(session.run.agent)
    pressed = {"op": "step", "pressed": keys_of(session, "action 2")}
    for who in ((), ("dream",), ("real",), ("dream", "real")):
        state = session.handle({**pressed, **dict.fromkeys(who, "imagination")})
        for world in play.WORLDS:
            wanted = [4, 1, 1] if world in who else [2, 0, 0]
            assert session.rows[world][-1].action.tolist() == wanted
    assert [key["label"] for key in session.keys][4:] == ["action 4", "key 0", "key 1"]
    policy = state["readouts"]["real"]["policy"]
    assert np.allclose(policy, [0, 0, 0, 0, 1, 1, 1], atol=1e-6)
    state = session.handle({**pressed, "real": "BC"})               # the prior, untouched
    assert not np.allclose(state["readouts"]["real"]["policy"][4:], 1, atol=1e-2)


def test_without_a_key_the_idle_action_is_sent(tmp_path):
    """Fails if no key means class 0 where that is not "nothing", in a step or when another
    column's key is tried, or if the page says something else."""
    session = game(tmp_path, env=IdleEnv)
    assert session.handle({"op": "join"})["idle"] == "stay, column 1: 0, key 1"
    session.handle({"op": "step"})
    assert session.rows["real"][-1].action.tolist() == [2, 0, 1]
    outcomes = session.handle({"op": "what_if", "frames": 1})["outcomes"]
    real = {x["label"]: unpng(x["real"])[[1, 1, 5], 0, [0, 1, 1]] for x in outcomes}
    assert real["key 0"].tolist() == [2, 1, 1] and real["up"].tolist() == [3, 0, 1]
    plain = game(tmp_path)
    plain.handle({"op": "step"})
    assert plain.rows["real"][-1].action.tolist() == [0, 0, 0]      # control: none declared


def test_one_page_plays_and_the_others_watch(tmp_path):
    """Fails if a second page resets the game, moves it or computes anything, if the seat
    can't be taken, or isn't free when its page goes."""
    session = game(tmp_path)
    now = session.handle({"op": "step"})

    def ask(op, tab):
        return session.handle({"op": op, "tab": tab})

    first = ask("join", "a")
    assert first["player"] and first["t"] == 1 and first["controls"] == session.keys
    assert first["pictures"] == now["pictures"] and ask("step", "a")["t"] == 2
    moved = session.generator.get_state()
    second = ask("join", "b")
    assert second["t"] == 2 and second["player"] is False and second["controls"]
    for op in ("watch", "step", "leave", "watch"):
        assert ask(op, "b").get("player", False) is False
    for op in ("reset", "what_if", "denoise", "mask", "save"):
        with pytest.raises(UserError, match="page that watches"):
            ask(op, "b")
    assert session.t == 2 and (session.generator.get_state() == moved).all()
    assert ask("step", "a")["pictures"] == ask("watch", "b")["pictures"]
    assert ask("take", "b")["player"] and ask("step", "a")["player"] is False
    ask("leave", "a")                                               # it has no seat to give
    assert ask("watch", "a")["player"] is False and ask("step", "b")["t"] == 4
    ask("leave", "b")
    assert ask("watch", "a")["player"] is False                     # F5 of b comes back
    assert ask("join", "b")["player"] and ask("join", "a")["player"] is False
    assert session.handle({"op": "step"})["t"] == 5                 # a script always may


def test_sliders_are_the_numbers_of_an_action(tmp_path):
    """Fails if numbers don't reach both worlds beside the keys, or wrong ones do."""
    session = game(tmp_path, stage="dynamics", env=MixedEnv)
    sent = {"numbers": [0.5, -1], "pressed": [0]}
    session.handle({"op": "step", **sent})
    assert all(rows[-1].action.tolist() == [1, 0.5, -1] for rows in session.rows.values())
    outcome, = session.handle({"op": "what_if", "frames": 1, **sent})["outcomes"]
    assert unpng(outcome["real"])[[1, 1, 5], 0, [0, 1, 1]].tolist() == [200, 150, 0]
    session.handle({"op": "step"})
    assert session.rows["real"][-1].action.tolist() == [0, 0, 0]
    for numbers in ([0], [0] * 3, 0, "00", None, [0, 1.5], [0, math.nan], [0, True],
                    [0, "0"], [0, 10 ** 400], {"0": 0}):
        with pytest.raises(UserError, match="Got numbers"):
            session.handle({"op": "step", "numbers": numbers})
    assert session.t == 2


@pytest.mark.parametrize("env, stage, refused", [
    (BareEnv, "agent", set()), (BareEnv, "dynamics", set()), (KeyEnv, "dynamics", set()),
    (NumbersEnv, "dynamics", {"what_if"})])
def test_the_game_needs_neither_tasks_nor_keys(env, stage, refused, tmp_path, monkeypatch):
    """Fails if a world without tasks or without keys, or a run without an agent, can't be
    played or filmed, or a key that isn't there is an error of ours."""
    session = game(tmp_path, stage=stage, env=env)
    assert play_everything(session) == refused
    monkeypatch.setattr(play, "open_session", lambda args: session)
    args = SimpleNamespace(actions="'key 0' 'action 4'", seed=0)
    if refused:
        with pytest.raises(UserError, match="without keys"):
            play.film_actions(args)
        with pytest.raises(UserError, match="no keys"):
            session.handle({"op": "step", "pressed": [0]})
    else:
        assert len(play.film_actions(args)) == min(play.PLAYED, 4) + 2


@pytest.mark.parametrize("name, reason", [
    ("nowhere:Env", "'nowhere:Env'"), ("lacking:Env", "no module 'missing_package'"),
    (f"{__name__}:AbsentEnv", "no simulator")])
def test_a_dream_is_played_without_its_world(name, reason, tmp_path, monkeypatch, capsys):
    """Fails if the dream of a world that isn't installed can't be played and filmed from
    nothing, if one line doesn't say why, or another start is offered or taken."""
    config = {"data": {"env": name, "reference_episodes": 3, "length": 26,
                       "eval_episodes": 3, "eval_length": 26}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "lacking.py").write_text("import missing_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(play, "load_run", lambda *_: key_run(IdleEnv))
    args = play.make_parser().parse_args(["--run", str(tmp_path), "--device", "cpu",
                                          "--dtype", "fp32", "--actions", "up"])
    session = play.open_session(args)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and reason in said[0]
    about = session.about()
    assert list(about["starts"]) == ["nothing"] and about["idle"].startswith("stay")
    assert [key["label"] for key in session.keys][:2] == ["left", "right"]
    assert play_everything(session) == set()
    for start in ("fresh", "held_out"):
        with pytest.raises(UserError, match=f"Got start '{start}', need one of nothing"):
            session.handle({"op": "reset", "start": start})
    assert len(play.film_actions(args)) == 2


def test_read_outs_are_of_their_world_and_prompt(tmp_path, silence):
    """Fails if the rows of worlds and prompts are mixed up in the policies' batch."""
    session = game(tmp_path)
    for i in range(2):                                             # within the context of 4
        state = session.handle({"op": "step", "pressed": [i], "prompt": 1})
    assert state["readouts"]["dream"]["prompt"] == 1
    rows, labelled = session.rows["real"], torch.arange(3)[None] > 0
    frames = torch.from_numpy(np.stack([row.frame for row in rows]))[None]
    z = session.run.tokenizer.encode(frames)
    actions = session.tensor([[row.action for row in rows]])
    for prompt in (0, 1):
        task = torch.full((1, 3), prompt)
        h = Dream(session.run.dynamics).commit(z, actions, labelled, task)[0, -1]
        assert torch.allclose(session.h[1, prompt], h, atol=1e-4)
        assert (session.h[0, prompt] - h).abs().max() > 1e-3        # the dream's own frames
    assert (session.h[1, 0] - session.h[1, 1]).abs().max() > 1e-3


def test_k_and_corruption_act_at_once(tmp_path):
    """Fails if the page's K or corruption does not reach the sampler or the committed
    frames, changes the run, or forgets what was dreamed before."""
    session, calls = game(tmp_path), []
    cfg = deepcopy(session.run.dynamics.cfg)
    session.run.dynamics.register_forward_hook(
        lambda module, inputs, output: calls.append((inputs[1].unique().item(),
                                                     inputs[2].unique().item())))
    for n, (k, level) in enumerate(((1, 7), (4, 3), (8, 5))):
        calls.clear()
        session.handle({"op": "step", "k": k, "level": level})
        assert calls == [*((i / k, 1 / k) for i in range(k)), *[(level / 8, 1 / 8)] * 2]
        assert session.dream.cache.t == session.policy_dream.cache.t == n + 2
    assert session.run.dynamics.cfg == cfg


def test_looking_inside_changes_nothing(tmp_path):
    """Fails if what-if, denoising or masks move either world or the dream's noise, or if
    the true outcome of an action is not what the environment does."""
    sessions, ends = [game(tmp_path) for _ in range(2)], []
    for op in ("what_if", "denoise", "mask"):
        reply = sessions[1].handle({"op": op, "frames": 1, "k": 4, "share": 100})
        if op == "what_if":
            outcomes = {x["label"]: x for x in reply["outcomes"]}
            assert len({x["dream"] for x in outcomes.values()}) > 1
        else:
            assert len(reply["sees"]) == len(reply["predicts"]) > 3
    for session in sessions:
        pressed = keys_of(session, "action 2")
        ends.append(session.handle({"op": "step", "pressed": pressed})["pictures"])
    assert ends[0] == ends[1] and ends[0]["real"] == outcomes["action 2"]["real"]
    assert outcomes["action 3"]["real"] != outcomes["action 2"]["real"]     # control


def test_saved_sessions_are_a_film_and_datasets(tmp_path):
    """Fails if rows are shifted, the second session overwrites the first, or frames are
    lost."""
    session = game(tmp_path)
    for i in range(2):
        for j in keys_of(session, "action 1", "action 4"):
            session.handle({"op": "step", "pressed": [j]})
        reply = session.handle({"op": "save"})
        assert len(imageio.mimread(reply["saved"])) == reply["frames"] == 3 + 2 * i
    for world in play.WORLDS:
        dataset = data.Dataset(tmp_path / "sessions" / world)
        assert dataset.lengths.tolist() == [3, 5]
        shown = dataset.episode(1)
        assert shown["actions"][:, 0].tolist() == [0, 1, 4, 1, 4]
    assert world == "real" and shown["frames"][:, 0, 1, 0].tolist() == [0, 1, 4, 1, 4]
    assert shown["events"][:, 0].tolist() == [0, 0, 1, 0, 1]
    assert len(list((tmp_path / "sessions").glob("*.gif"))) == 2
    session.handle({"op": "reset", "seed": 40_002})            # that world ends before play
    assert not session.over
    for _ in range(play.PLAYED):
        session.handle({"op": "step"})
    session.handle({"op": "save"})
    assert session.over
    assert data.Dataset(tmp_path / "sessions" / "dream").episode(2)["continues"].all()


def test_actions_on_the_command_line_make_a_film(tmp_path, monkeypatch, capsys):
    """Fails if words are matched to other actions, a name with blanks can't be typed, or
    an unknown one or a quote without end is not one line."""
    session = game(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(play, "DEMO", tmp_path / "none")
    monkeypatch.setattr(play, "open_session", lambda args: session)
    words = ["play.py", "dream", "--out", str(tmp_path / "x.gif"), "--actions"]
    names = "noop", "left", "jump up", "move_up", "dig"
    for key, label in zip(session.keys, names, strict=False):
        key["label"] = label
    monkeypatch.setattr(sys, "argv", [*words, "up 'jump up' dig"])
    play.main()
    assert [row.action[0] for row in session.rows["real"][-3:]] == [3, 2, 4]
    assert len(imageio.mimread(tmp_path / "x.gif")) == len(session.film)
    for typed, named in (("jump", "'jump'"), ("up 'jump", "No closing quotation")):
        monkeypatch.setattr(sys, "argv", [*words, typed])
        with pytest.raises(SystemExit) as stop:
            run_cli(play.main)
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(said) == 1 and named in said[0]


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


# ------------------------------------------------------------------------------- the server

@pytest.fixture
def server(tmp_path):
    with play.open_server(game(tmp_path), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def talk(server, text):
    """Send bytes as they are -> status and body; 0: the line was closed without an
    answer."""
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


def ask_raw(server, body=b'{"op": "step"}', method="POST", path="/play", headers=()):
    known = {"Host": f"127.0.0.1:{server.server_address[1]}", "Content-Length": len(body),
             "Content-Type": "application/json", **dict(headers)}
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{k}: {v}" for k, v in known.items() if v != ""]
    return talk(server, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def test_server_is_on_loopback_and_takes_the_next_free_port(server):
    """Fails if other machines can connect, or a taken port ends the program."""
    host, port = server.server_address
    with play.open_server(server.session, port) as second:
        assert host == second.server_address[0] == "127.0.0.1"
        assert second.server_address[1] > port
    page = (REPO / "assets" / "play.html").read_bytes()
    assert ask_raw(server, b"", "GET", "/") == (200, page)


@pytest.mark.parametrize("headers, allowed", [
    ({}, True), ({"Host": "localhost:8000"}, True),                 # a forwarded port
    ({"Origin": "http://127.0.0.1:PORT"}, True),
    ({"Host": "localhost:9000", "Origin": "http://localhost:9000"}, True),
    ({"Host": "evil.example"}, False), ({"Host": "evil.example:PORT"}, False),  # rebinding
    ({"Host": "127.0.0.1.evil.example"}, False), ({"Host": "127.0.0.1:PORT@evil"}, False),
    ({"Host": ""}, False), ({"Origin": "http://evil.example"}, False),     # cross-site post
    ({"Origin": "null"}, False), ({"Origin": "https://127.0.0.1:PORT"}, False),
    ({"Origin": "http://localhost:PORT"}, False),
    ({"Origin": "http://127.0.0.1:1"}, False)])
def test_foreign_hosts_and_origins_are_refused(server, headers, allowed):
    """Fails if another site's page can drive the game or read its answers."""
    port = str(server.server_address[1])
    headers = {k: v.replace("PORT", port) for k, v in headers.items()}
    status, before = 200 if allowed else 403, server.session.t
    assert ask_raw(server, headers=headers)[0] == status
    assert server.session.t - before == allowed
    if "Origin" not in headers:
        assert ask_raw(server, b"", "GET", "/", headers)[0] == status


def malformed():
    """Bad requests: (body, method, path, headers, statuses that are right)."""
    step, rng = {"op": "step"}, np.random.default_rng(0)
    fields = [{"op": "rm"}, {"op": "__init__"}, {}, [], 7, None, {**step, "k": 3},
              {**step, "k": 64}, {**step, "k": True}, {**step, "level": -1},
              {**step, "level": 1e9}, {"op": ["step"]}, {**step, "pressed": [99]},
              {**step, "pressed": "x"}, {**step, "pressed": [[0]]},
              {**step, "pressed": {"a": 1}}, {**step, "dream": "imagination"},
              {**step, "real": None}, {**step, "prompt": 9}, {"op": "reset", "seed": -1},
              {"op": "reset", "seed": 2 ** 40}, {"op": "reset", "start": "../../etc"},
              {"op": "what_if", "frames": 10 ** 6}, {"op": "mask", "share": "all"},
              {**step, "numbers": [0]}, {**step, "tab": 7}, {**step, "tab": ["a"]}]
    bodies = [json.dumps(x).encode() for x in fields] + [b"[" * 4000, b"", b"\xff", b"{"]
    bodies += [rng.bytes(rng.integers(1, 300)) for _ in range(25)]
    paths = ["/../../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/%00",
             "/assets/play.html", "/play/../play.py", "/runs/crafter/agent.pt",
             "http://evil.example/play"]
    methods = ["PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "CONNECT", "XYZ"]
    headers = [{"Content-Length": 10 ** 8}, {"Content-Length": -1}, {"X": "y" * 70_000},
               {"Content-Length": "9" * 5000}, {"Content-Length": ""},
               {"Transfer-Encoding": "chunked"}, {"Content-Type": "text/plain"}]
    hosts = [{"Host": "a\x00b"}, {"Host": "\xff"}, {"Host": "evil.example"}]
    return [*((body, "POST", "/play", {}, {400}) for body in bodies),
            *((b"", "GET", path, {}, {404}) for path in paths),
            *((b"", "POST", path, {}, {404}) for path in paths),
            *((b"", method, "/play", {}, {405}) for method in methods),
            *((b"{}", "POST", "/play", header, {411, 413, 415, 431}) for header in headers),
            *((b"{}", "POST", "/play", host, {403}) for host in hosts),
            (b"", "\x00\xff GET", "/", {}, {400, 405})]


def test_bad_requests_and_disconnects_leave_the_server_well(server, tmp_path, capfd):
    """Fails if a malformed request or an abrupt disconnect is answered as if it were good,
    moves the game, writes a file, prints a traceback or stops the server."""
    moves, before = server.session.t, sorted(tmp_path.rglob("*"))
    for *request, right in malformed():
        assert ask_raw(server, *request)[0] in right | {0}, request
    assert server.session.t == moves
    whole = (b"POST /play HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
             b'Content-Length: 14\r\n\r\n{"op": "step"}')
    for i in range(20):                                        # reset, not closed, part-way
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
    with monkeypatch.context() as broken:
        broken.setitem(server.session.ops, "step", lambda request: 1 / 0)
        assert ask_raw(server)[0] == 500
    assert capfd.readouterr().err.startswith("error: ZeroDivisionError")
    assert ask_raw(server)[0] == 200


@pytest.fixture
def chromium():
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    path = next(filter(None, names), None)
    with sync.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path,
                                                 args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"no browser: {error}; playwright install chromium")
        yield browser
        browser.close()


def open_page(chromium, server, errors):
    """A tab with the game; what goes wrong in it is added to errors."""
    page = chromium.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(f"http://127.0.0.1:{server.server_address[1]}")
    return page


def wait_for(page, condition, seconds=60):
    """Until a JavaScript expression is true."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, (condition, page.inner_text("#message"))
        time.sleep(0.05)


@pytest.mark.slow
def test_game_in_a_real_browser(chromium, server, tmp_path):
    """Fails if a person can't play: keys, policies, K, what-if, denoising, masks,
    recording."""
    errors, session = [], server.session
    page = open_page(chromium, server, errors)

    def until(condition):
        wait_for(page, condition)

    def pictures():
        return [page.evaluate(f"document.getElementById('{world}').toDataURL()")
                for world in play.WORLDS]

    until("world")
    page.select_option("#start", "fresh")
    page.click("#reset")
    until("+document.getElementById('frame').textContent > 3")
    page.keyboard.press("Enter")                                   # pause: a key is a frame
    until("paused && !busy")
    moves, before = session.t, pictures()
    page.keyboard.press(session.keys[3]["key"])
    until(f"+document.getElementById('frame').textContent > {moves}")
    assert session.t == moves + 1
    assert all(a != b for a, b in zip(before, pictures(), strict=True))
    assert all(session.rows[world][-1].action[0] == 3 for world in play.WORLDS)
    for op, n in (("what_if", 14), ("denoise", 4), ("mask", 12)):
        page.click("#ks button:nth-child(2)")
        page.click(f"#{op}")
        until(f"document.querySelectorAll('#strip img').length == {n}")
        until("[...document.querySelectorAll('#strip img')].every(x => x.naturalWidth==12)")
    assert session.k == 2 and session.t == moves + 1
    page.select_option("#who_dream", "BC")
    page.select_option("#who_real", "BC")
    page.click("#pause")
    until(f"+document.getElementById('frame').textContent > {moves + 6}")
    assert session.who == ["BC", "BC"] and "frames/s" in page.inner_text("header")
    page.click("#save")
    until("document.getElementById('message').textContent.startsWith('Saved')")
    assert len(imageio.mimread(tmp_path / "sessions" / "session_00000.gif")) > 6
    page.select_option("#start", "nothing")
    page.click("#reset")
    until("document.getElementById('real_world').hidden && !busy")
    assert not errors


@pytest.mark.slow
def test_two_tabs_in_a_real_browser(chromium, server):
    """Fails if a second tab moves or resets the game, the seat can't be taken, the other
    tab isn't told, or a page that is loaded again loses the seat or the game."""
    errors, session = [], server.session
    first = open_page(chromium, server, errors)
    wait_for(first, "+$('frame').textContent > 2 && $('watches').hidden")
    first.click("#pause")
    wait_for(first, "paused && !busy")
    moves = session.t
    second = open_page(chromium, server, errors)
    wait_for(second, f"+$('frame').textContent === {moves} && !$('watches').hidden")
    second.keyboard.press("1")
    time.sleep(1)                                                  # it polls, and more
    assert session.t == moves
    first.click("#pause")
    wait_for(second, f"+$('frame').textContent > {moves + 2}")     # it follows
    second.click("#take")
    wait_for(second, "plays && $('watches').hidden")
    wait_for(first, "!$('watches').hidden")
    moves = session.t
    second.reload()
    wait_for(second, f"world && plays && +$('frame').textContent > {moves + 2}")
    assert first.is_visible("#watches") and second.is_hidden("#watches") and not errors


KEYS_HELD = [           # (d down or u up, key, code) ...: labels of the controls still held
    ("d 1 Digit1, d Shift ShiftLeft, u ! Digit1", []),
    ("d z KeyZ, u я KeyZ", []), ("d 1, d Shift, u !", []), ("d z, u z", []),
    ("d z, d Shift, u Shift", ["sleep"]),                          # control: still down
    ("d z, u x KeyX", ["sleep"]), ("d 1 Numpad1", []),
    ("d ц KeyW, d ф KeyA", ["up", "left"]), ("d z KeyW", ["up"]), ("d w KeyZ", ["sleep"]),
    ("d w, u W", []), ("d w", ["up"]), ("d ArrowLeft Numpad4", ["left"]),
    ("d ArrowRight ArrowRight, d d KeyD, u ArrowRight ArrowRight", ["right"]),
    ("d ArrowRight ArrowRight, d d KeyD, u ArrowRight ArrowRight, u d KeyD", []),
    ("d d KeyD, d Meta MetaLeft, u Meta MetaLeft", [])]


@pytest.mark.slow
def test_keys_in_a_real_browser(chromium, server):
    """Fails if a key stays held after its release, is released while another key of its
    control is down, or goes by what it types where its place is known."""
    errors, labels = [], ["right", "left", "up", "one", "sleep"]
    places = ["ArrowRight", "ArrowLeft", "ArrowUp", "1", "z"]
    for control, label, key in zip(server.session.keys, labels, places, strict=False):
        control.update(label=label, key=key)
    page = open_page(chromium, server, errors)
    wait_for(page, "world")
    assert "no key: right" in page.inner_text("#keys")             # class 0 of the first
    for events, held in KEYS_HELD:
        for event in events.split(", "):
            way, key, code = (*event.split(" "), "")[:3]
            page.evaluate("([type, key, code]) => document.body.dispatchEvent("
                          "new KeyboardEvent(type, { key, code, bubbles: true }))",
                          [{"d": "keydown", "u": "keyup"}[way], key, code])
        assert page.evaluate("[...held].map(i => world.controls[i].label)") == held, events
        page.evaluate("dispatchEvent(new Event('blur'))")
        assert page.evaluate("held.size") == 0
    assert not errors


@pytest.mark.slow
def test_sliders_in_a_real_browser(chromium, tmp_path):
    """Fails if the sliders of a world without keys don't reach it, or don't go back."""
    errors, session = [], game(tmp_path, stage="dynamics", env=NumbersEnv)
    with play.open_server(session, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = open_page(chromium, server, errors)
        wait_for(page, "sliders.length === 3 && +$('frame').textContent > 2")
        page.locator("#keys input").nth(1).fill("0.5")
        wait_for(page, f"+$('frame').textContent > {session.t + 2}")
        assert session.rows["real"][-1].action.tolist() == [0, 0.5, 0]
        page.locator("#keys button").nth(1).click()
        wait_for(page, f"+$('frame').textContent > {session.t + 2}")
        assert session.rows["real"][-1].action.tolist() == [0, 0, 0]
        assert "no key" not in page.inner_text("#keys")
        page.click("#what_if")
        wait_for(page, "$('message').textContent.includes('without keys')")
        server.shutdown()
    assert len(errors) == 1 and "400" in errors[0]                 # of that alone
