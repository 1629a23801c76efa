"""Tests of paper/: CPU, offline, seeded, on a toy environment."""
import inspect
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import play
import train
from agent import Agent, AgentConfig, Run, load_run, save_checkpoint
from data import ActionSpec, EnvSpec, UserError
from dynamics import Batch, Dream, Dynamics, DynamicsConfig
from envs import crafter
from paper import all as plan
from paper import (bench, exercises, figure3_agents, figure5_interactions, figure6_robot,
                   figure7_labels, figure8_sampling, ppo_in_dream, results, rollouts,
                   table1_world_models, table2_cascade)
from tokenizer import Tokenizer, TokenizerConfig, Transformer

CPU = torch.device("cpu")


class KeyEnv:
    """Two keys and a class of 5. The frame shows action, step and seed; seeds divisible by
    3 end on step 12, others never."""
    copyable = True
    tasks = ("four", "both_keys")
    spec = EnvSpec("keys", 8, 12, ActionSpec(classes=(2, 2, 5)), tasks,
                   prompt_order=(("four", 2), ("both_keys", 0)), achievements=tasks)

    def reset(self, seed):
        self.seed, self.steps = seed, 0
        return self.paint(self.spec.actions.zeros())

    def paint(self, action):
        frame = np.zeros((8, 12, 3), np.uint8)
        frame[:4, :, 1], frame[4:, :, 1], frame[..., 0] = action
        frame[..., 2] = self.steps
        frame[0, 0, 2] = self.seed % 256
        return frame

    def step(self, action):
        self.steps += 1
        events = np.array([action[2] == 4, action[0] and action[1]])
        return self.paint(action), events, self.seed % 3 == 0 and self.steps >= 12


KEYS = f"{__name__}:KeyEnv"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """25 episodes; every third has 13 frames, the others 30."""
    return data.record(KEYS, tmp_path_factory.mktemp("keys") / "set", 25, 30, 0, workers=1)


def key_run(seed=0):
    """A run for KeyEnv with random weights: zeros would make tests pass by silence."""
    spec, sizes = KeyEnv.spec, dict(dim=16, layers=3, heads=4, kv_heads=2)
    tokenizer = Tokenizer(TokenizerConfig(height=8, width=12, patch=4, latents=4,
                                          channels=3, pack=2, context=3, **sizes))
    cfg = DynamicsConfig(tokens=2, channels=6, tasks=2, context=4, time_every=3, **sizes)
    dynamics = Dynamics(cfg, spec.actions)
    agent = Agent(AgentConfig(hidden=16, context=3, horizon=5), 16, spec.actions, 2)
    for module, start in ((tokenizer, 0), (dynamics, 0), (agent, seed)):
        generator = torch.Generator().manual_seed(start)
        for weight in module.eval().parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    meta = {"config": {"train": {"imagine_batch": 2}}}
    return Run(Path("none"), "agent", spec, tokenizer, dynamics, agent, meta)


def value_of(rows, name, of):
    return play.find(rows, name, of).value


def test_agents_are_data_on_the_command_line(tmp_path):
    """Fails if a pattern takes runs without that stage, or a temperature is lost."""
    for name in ("seed0", "seed1"):
        (tmp_path / name).mkdir()
    (tmp_path / "seed1" / "agent.pt").touch()
    bc = figure3_agents.parse_agent("BC, low T=seed*:agent@0.5", tmp_path / "x")
    assert bc == ("BC, low T", [tmp_path / "seed1"], "agent", 0.5)
    for text, temperature in (("@best", None), ("", 0)):
        bc = figure3_agents.parse_agent(f"BC=seed1:agent{text}", tmp_path / "x")
        assert bc.temperature == temperature
    for text in ("BC=seed0:agent", "BC=seed1:imagine", "BC=seed1:agent@0", "BC=seed1"):
        with pytest.raises(UserError, match="NAME=RUNS:STAGE"):
            figure3_agents.parse_agent(text, tmp_path / "x")


def test_tests_of_success_against_known_values():
    """Fails if McNemar counts pairs that agree, Holm's correction is not monotone, or
    worlds of runs are pooled: gains of 4, 6, 2, 5, 3 of 20 have t = 5.657, p = 0.00481."""
    a = np.array([1] * 9 + [0] * 1 + [1] * 5, bool)
    b = np.array([0] * 9 + [1] * 1 + [1] * 5, bool)
    assert abs(figure3_agents.mcnemar(a, b) - 2 * (1 + 10) / 2 ** 10) < 1e-12
    assert figure3_agents.mcnemar(a, a) == 1.0
    assert np.allclose(figure3_agents.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    plays, always = [], np.ones((20, 3))
    for gain in (4, 6, 2, 5, 3):
        less = np.where(np.arange(20)[:, None] < (gain, 0, 0), np.inf, always)
        plays += [play.Episodes("BC", "", less), play.Episodes("imagination", "", always)]
    for some, p in ((plays, 0.00481), (plays[2:4], 2 / 2 ** 6)):    # a run: McNemar, 6 to 0
        rows = figure3_agents.significance(KeyEnv.spec, some, "imagination", "BC")
        assert abs(rows[0].value - 2 * p) < 1e-4 and rows[1].value == 1.0


def test_frechet_distance_in_closed_form():
    """Fails if the root is of the wrong matrix: N(0, 1) and N(3, 4) in one axis, N(0, 1)
    twice in the other, are 9 + (1 + 4 - 4) + 0 = 10 apart."""
    frechet, x = figure8_sampling.frechet, np.random.default_rng(0).normal(size=(4000, 2))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    assert abs(frechet(x, x)) < 1e-6
    assert abs(frechet(x, x * (2, 1) + (3, 0)) - 10) < 1e-6
    turned = x * (2, 1) @ np.array([[0, 1], [-1, 0]])
    assert abs(frechet(x * (2, 1), turned) - 2) < 1e-6          # (4 + 1) * 2 - 2 (2 + 2)


def test_heads_are_judged_frame_by_frame(monkeypatch, keys):
    """Fails if predictions are compared with another frame's or task's events, or precision
    and recall are swapped. A stub head sees task 0 wherever the picture shows class 4."""
    run, real = key_run(), Dream.commit

    def commit(self, z, actions, labelled, task):
        h = real(self, z, actions, labelled, task)
        for k in (0, 1):
            h[..., k] = (task == k) & (actions[..., 2] == 4) & labelled
        return h

    monkeypatch.setattr(Dream, "commit", commit)
    run.agent.rewards = lambda h, task: torch.where(task == 0, h[..., 0], h[..., 1])
    run.agent.continue_prob = lambda h: torch.full(h.shape[:2], 0.25)
    rows = figure3_agents.evaluate_heads(run, keys, "fp32", chunk=7)
    true = np.concatenate([keys.episode(i)["events"] for i in range(25)]) > 0
    both, four, both_keys = true.all(1).sum(), {"task": "four"}, {"task": "both_keys"}
    assert value_of(rows, "reward_recall", four) == 1
    assert value_of(rows, "reward_precision", four) == 1
    precision, recall = both / true.sum(0)
    assert abs(value_of(rows, "reward_precision", both_keys) - precision) < 1e-9
    assert abs(value_of(rows, "reward_recall", both_keys) - recall) < 1e-9
    run.agent.rewards = lambda h, task: h[..., 0]               # the prompt is that task's
    rows = figure3_agents.evaluate_heads(run, keys, "fp32")
    assert value_of(rows, "reward_recall", four) == 1
    assert value_of(rows, "reward_recall", both_keys) == 0
    end = play.find(rows, "continue", {"at": "terminals"})
    assert end.value == 0.25 and end.n == 9


def test_imagined_successes_are_checked_in_the_simulator(monkeypatch, tmp_path):
    """Fails if the simulator takes other actions than the dream, from another frame or
    world, or counts another task. A stub policy plays 4, the first prompt's event, from the
    third step on; a stub head says so in the dream alone; worlds 0 and 3 end at 12."""
    run, real, count = key_run(), Dream.commit, iter(range(1000))

    def commit(self, z, actions, labelled, task):
        h = real(self, z, actions, labelled, task)
        imagined = (actions[..., 2:] == 4) & (h.shape[1] == 1)
        return torch.where(imagined, 1.0, h.clamp(max=0.4))

    def act(h, generator):
        return torch.tensor([0.0, 0.0, 4 if next(count) % 5 > 1 else 3]).repeat(len(h), 1)

    monkeypatch.setattr(Dream, "commit", commit)
    run.agent.act, run.agent.rewards = act, lambda h, task: h[..., 0] * (task == 0)
    dataset = data.record(KEYS, tmp_path / "set", 6, 13, 0, workers=1)
    rows = figure3_agents.evaluate_imagination(run, "BC", dataset, "fp32", per_episode=6)
    asked = play.prompts_along(dataset)[0].reshape(6, 13)[:, 2:8] == 0
    by = {row.of["by"]: row.value for row in rows}
    assert 0 < asked.mean() < 1
    assert by == pytest.approx({"head in the dream": asked.mean(), "head in the game": 0,
                                "game": asked.mean(), "of the dreamed ones, game": 1})
    clips = play.reference_clips(dataset, 3, 8, CPU)                # control: as recorded
    frames, events = rollouts.play_on(dataset, clips, 3, clips.actions)
    recorded = dataset.read(clips.episode, clips.start, 8)["events"]
    assert np.array_equal(frames, clips.frames[:, 3:])
    assert np.array_equal(events, recorded[:, 3:])


def test_all_agents_beside_ppo_are_told_its_one_task(monkeypatch):
    """Fails if one is asked for something else, BC is imagination, or PPO doesn't act."""
    played, rows = [], []
    names = "random", "BC", "imagination", "PPO in the dream"

    def episodes(worlds, length, player=None, dtype=""):
        played.append((worlds, player))
        return np.full((len(worlds.seeds), 3), float(len(played)))

    def load(_, stage, *rest):
        return replace(key_run(), stage=stage, spec=spec)

    model = SimpleNamespace(predict=lambda h: (h.argmax(1), None))
    spec = replace(KeyEnv.spec, needs=(("four", 1, 1, 2),))
    stubs = {"load_run": load, "play_episodes": episodes,
             "reference_of": lambda _: SimpleNamespace(path=""),
             "train_ppo": lambda *_: (model, 2.0), "data_config": lambda _: {"env": KEYS},
             "VecEnv": lambda _, seeds: nullcontext(SimpleNamespace(seeds=seeds))}
    for name, stub in stubs.items():
        monkeypatch.setattr(ppo_in_dream, name, stub)
    monkeypatch.setattr(results, "save", lambda name, found: rows.extend(found))
    monkeypatch.setattr(sys, "argv", ["x", "--task", "both_keys", "--episodes", "5",
                                      "--device", "cpu"])
    ppo_in_dream.main()
    assert all(w.spec.prompt_order == (("both_keys", 0),) and not w.spec.needs
               and w.seeds == range(50_000, 50_005) for w, _ in played)
    assert [p and p.stage for _, p in played] == [None, "agent", "imagine", "imagine"]
    act = played[3][1].agent.act
    assert act(torch.eye(16)[[2, 5]], None, 1.0).tolist() == [[2], [5]]
    of = {"task": "both_keys"}
    assert [value_of(rows, "time", of | {"agent": a}) for a in names] == [1, 2, 3, 4]


def test_counterfactuals_begin_where_the_shown_frames_end(monkeypatch):
    """Fails if the simulator is led elsewhere than the frame shown last, or takes other
    actions than the dream."""
    rows = np.arange(60, dtype=np.float32).repeat(2).reshape(60, 2)
    worlds, seen = [], []

    class Toy:
        agent = SimpleNamespace(position=(250, 250))
        env = property(lambda self: SimpleNamespace(unwrapped=self))
        row = staticmethod(np.float32)

        def reset(self, seed):
            worlds.append([seed])

        def step(self, row):
            worlds[-1].append(row[0])
            return np.zeros((96, 96, 3), np.uint8), 0, False

    def dreamed(run, batch, horizon):
        seen.append(batch)
        return torch.zeros(5, 28, 96, 96, 3, dtype=torch.uint8)

    batch = Batch(torch.zeros(1, 16, 2, 3), torch.from_numpy(rows[None, 3:19]),
                  torch.ones(1, 16).bool())
    stubs = {"make": lambda _: Toy(), "pushed_clip": lambda _: (1, 3),
             "read_clips": lambda *_: None, "encode": lambda *_: batch,
             "dream_clips": dreamed}
    for name, stub in stubs.items():
        monkeypatch.setattr(figure6_robot, name, stub)
    dataset = SimpleNamespace(settings={"seed": 7}, episode=lambda i: {"actions": rows})
    film = figure6_robot.counterfactuals(SimpleNamespace(device=CPU), dataset, "fp32")
    assert len(worlds) == 5 and all(w[:19] == [8, *range(1, 19)] for w in worlds)
    assert [w[19] for w in worlds] == [225, 275, 250, 250, 250]
    assert seen[0].actions[:, 16:, 0].tolist() == [w[19:] for w in worlds]
    assert film.shape == (12, 2 * 102, 5 * 102, 3)


def test_the_block_is_scored_where_it_was_pushed(monkeypatch):
    """Fails if a horizon is off by one, finger and block swap, or a block at rest
    counts."""
    monkeypatch.setattr(figure6_robot, "places", lambda x: x)
    real = np.zeros((4, 32, 2, 2))
    real[:3, 16:, 1, 0] = 5                     # three of four are pushed, at first
    off = real.copy()
    off[:, 16, 0] += (3, 4)
    off[:, 19, 1, 1] += 2
    off[3, :, 1] += 50
    films = dict.fromkeys(("copy", "shuffled", "reconstruction"), real) | {"dream": off}
    rolled = SimpleNamespace(real=real, context=16, films=films)
    rows = figure6_robot.score_places(rolled)
    for name, h, value, n in (("finger", 1, 5, 4), ("finger", 2, 0, 4), ("block", 1, 0, 3),
                              ("block", 4, 2, 3)):
        row = play.find(rows, f"{name}_error", {"film": "dream", "horizon": h})
        assert (row.value, row.n) == (value, n)


def test_branches_of_a_world_leave_it_as_it_is():
    """Fails if a branch starts a step early or late, shares state, or goes on after the end
    (seed 3 ends at 12)."""
    spec, rng, env = KeyEnv.spec.actions, np.random.default_rng(0), KeyEnv()
    recorded, other = spec.sample(rng, 10), spec.sample(rng, 9)
    branches = [(3, recorded[4:]), (5, other), (3, other)]
    frames = [env.reset(3), *(env.step(action)[0] for action in recorded[1:])]
    play = {"actions": recorded, "frames": frames}
    (same, _), (late, events), (early, _) = rollouts.branch_off(KEYS, 3, play, branches)
    env.reset(3)
    assert np.array_equal(same, [env.step(action)[0] for action in recorded[1:]][3:])
    assert (events[:7, 0] == (other[:7, 2] == 4)).all() and not events[7:].any()
    assert (late[:7, 0, 1, 0] == other[:7, 2]).all()
    assert late[:, 0, 1, 2].tolist() == [6, 7, 8, 9, 10, 11, 12, 12, 12]
    assert early[:, 0, 1, 2].tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    with pytest.raises(UserError, match="follows from its seed"):
        rollouts.branch_off(KEYS, 4, play, branches)


def test_long_dreams_go_on_with_the_next_episodes(monkeypatch, keys):
    """Fails if a dream gets another episode's actions, or one of its own context or of a
    row 0, all start at an episode's first frame, or other frames are judged than named."""
    follow = rollouts.actions_that_follow(keys, range(25), 100)
    recorded = [keys.episode(i)["actions"][1:] for i in range(25)]
    for j in (0, 23):
        right = np.concatenate([recorded[(j + k) % 25] for k in range(1, 9)])[:100]
        assert np.array_equal(follow[j], right)

    starts, real, frames = [], rollouts.read_clips, iter(range(1, 200))
    reader = SimpleNamespace(LEGAL=20, read=lambda x: (0, 0, x[:, :1, :1, 0] // 50 * 15.0))
    for name, stub in {
            "CONTEXT": 6, "reader_of": lambda dataset: reader,
            "read_clips": lambda *rest: starts.extend(rest[2]) or real(*rest)}.items():
        monkeypatch.setattr(rollouts, name, stub)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, z, cache: torch.full(
        (*z.shape[:2], 72, 72, 3), next(frames), dtype=torch.uint8))
    rows = rollouts.evaluate_long(key_run(), keys, length=100, dtype="fp32")
    for frame, legal in ((50, 1), (100, 0)):
        assert value_of(rows, "legal_cells", {"frame": frame}) == legal
        assert abs(value_of(rows, "brightness", {"frame": frame}) - frame / 255) < 1e-6
    assert len(starts) == 25 and len(set(starts)) > 10 and starts[0] == 0


def test_interactions_are_judged_by_their_outcome(monkeypatch, tmp_path):
    """Fails if the real outcome does not pass, or the last frame shown passes for it."""
    crafter.record_interactions(tmp_path / "set", each=1, worlds=2)
    dataset = figure5_interactions.interaction_set(tmp_path / "set")
    kinds = set(dataset.settings["kinds"])
    assert len(kinds) >= 6 and "walk_left" in kinds
    run = SimpleNamespace(device=CPU, dynamics=SimpleNamespace(cfg=DynamicsConfig()))
    monkeypatch.setattr(figure5_interactions, "encode", lambda run, clips: clips.frames)
    stays = {"stopped_by_water", "look_away_and_back", "mean of all kinds"}
    for still in (False, True):
        def dreamed(run, real, horizon, sampler, still=still):
            frozen = real[:, -horizon - 1:-horizon].expand(-1, horizon, -1, -1, -1)
            return torch.cat([real[:, :-horizon], frozen], 1) if still else real

        monkeypatch.setattr(figure5_interactions, "dream_clips", dreamed)
        rows, pictures = figure5_interactions.evaluate_interactions(run, dataset, "fp32")
        assert set(pictures) == kinds and len(rows) == len(kinds) + 1
        assert all(row.value == 1 - still for row in rows if row.of["kind"] not in stays)


def test_label_shares_lie_between_none_and_all(monkeypatch):
    """Fails if the share is of the wrong gap: as good as none is 0, as all is 1; if "none"
    is told actions; or if caves are other frames than those not above ground."""
    shown, told = {"none": 90, "half": 120, "all": 150}, {}
    frames = torch.full((8, 32, 16, 16, 3), 160, dtype=torch.uint8)
    frames[:4] += 5
    clips = play.Clips(frames, None, torch.ones(8, 32, dtype=torch.bool), None, None)

    def dreamed(run, clips, horizon):
        told[run.stage] = clips.labelled.all().item()
        return torch.full_like(frames, shown[run.stage])

    above = np.repeat([[1], [0]], 4, 0) * np.ones((1, 32), int)
    for name, stub in {
            "dream_clips": dreamed, "reference_clips": lambda *rest: clips,
            "encode": lambda run, clips: clips,
            "read_probes": lambda *rest: {"probe_above": above},
            "bootstrap": lambda f, *samples: (float(f(*samples)), None, None)}.items():
        monkeypatch.setattr(figure7_labels, name, stub)
    runs = {name: SimpleNamespace(stage=name, device=CPU) for name in shown}
    rows = figure7_labels.evaluate_labels(runs, None, "fp32")
    assert told == {"none": False, "half": True, "all": True}
    psnr = {name: -10 * np.log10(np.mean([(v - 165) ** 2, (v - 160) ** 2]) / 255 ** 2)
            for name, v in shown.items()}
    share = (psnr["half"] - psnr["none"]) / (psnr["all"] - psnr["none"])
    half = {"labelled": "half", "measure": "PSNR"}
    assert abs(value_of(rows, "share_of_gap", half) - share) < 1e-5
    caves = play.find(rows, "quality", {"labelled": "all", "measure": "PSNR in caves"})
    assert abs(caves.value + 20 * np.log10(10 / 255)) < 1e-5 and caves.n == 4 * 16


def test_free_dreams_start_from_nothing():
    """Fails if the first frame has an action or a past, the policy does not act after it,
    or two dreams of one seed differ."""
    films = []
    for seed in (0, 1, 0):                              # of the policy
        dream = Dream(key_run().dynamics, torch.Generator().manual_seed(0))
        films.append(figure8_sampling.dream_from_nothing(dream, key_run(seed), 3, 6))
    assert films[0].shape == (3, 6, 2, 6) and torch.equal(films[0][:, 0], films[1][:, 0])
    assert not torch.equal(films[0], films[1]) and torch.equal(films[0], films[2])


def test_distances_of_videos_are_of_equal_samples(keys, monkeypatch):
    """Fails if dreams are compared with more real windows than real ones are, or with other
    ones: drawn alike they'd be closer to them than real play is to itself; or if a feature
    that never varies makes the distance nan."""
    rng, real, calls = np.random.default_rng(0), figure8_sampling.frechet, []
    basis = rng.normal(size=(64, 256))              # all that the 64 components can hold
    basis[:, 3] = 0
    for name, stub in {
            "LENGTH": 2, "frechet": lambda a, b: calls.append((a, b)) or real(a, b),
            "random_features": lambda x: rng.normal(size=(len(x), 64)) @ basis}.items():
        monkeypatch.setattr(figure8_sampling, name, stub)
    rows = figure8_sampling.evaluate_sampling({"x": key_run()}, key_run(), keys, n=400,
                                              dtype="fp32", ks=(4, 16))
    half, other = calls[0]
    assert all(np.array_equal(a, half) for a, _ in calls)
    assert 300 < len(half) < 500 and len(half) + len(other) == 800
    distances = [row.value for row in rows if row.name == "frechet"]
    assert np.ptp(distances) < 0.12 * distances[0]
    ratio = play.find(rows, "K = 4 over K = 16", {"video": "x"})
    assert ratio.low < ratio.value < ratio.high
    assert abs(ratio.value - distances[2] / distances[3]) < 1e-9


def test_bench_runs(monkeypatch, tmp_path):
    """Fails if shapes of the benchmark don't fit together; each step is made once, of small
    nets. Speeds are printed, never judged."""
    def once(step, repeats, device):
        step()
        return 1e-3

    small = {name: replace(cfg, dim=16) for name, cfg in bench.TOKENIZERS.items()}
    real = bench.new_dynamics
    for name, stub in {
            "compile_module": lambda *_: None, "TOKENIZERS": small, "seconds": once,
            "matmul_peak": lambda *_: 1e9, "GROWTH": {"context": (4, 6), "tokens": (2,)},
            "new_dynamics": lambda device, *_: real(device, 16, 2)}.items():
        monkeypatch.setattr(bench, name, stub)
    monkeypatch.setattr(bench.results, "ROOT", tmp_path)
    (tmp_path / "paper").mkdir()
    rows = bench.bench(CPU, "fp32", key_run())
    bench.picture_growth(rows)
    assert (tmp_path / "paper/growth.png").exists()
    assert len({str(row.of) for row in rows}) == len(rows) > 30
    assert all(row.value > 0 for row in rows)


def test_presets_of_minecraft_on_the_meta_device():
    """Fails if a preset can't be built, has not the paper's sizes, or needs more than 80 GB
    by the formula (`minecraft`)."""
    found = {(row.of["model"], row.of["size"]): row.value
             for preset in ("paper", "minecraft") for row in bench.sizes(preset)}
    for model, parameters in (("tokenizer", 400e6), ("dynamics", 1.6e9)):
        assert abs(found[f"paper, {model}", "parameters"] / parameters - 1) < 0.05
        assert 10 < found[f"minecraft, {model}", "memory of a step, GB"] < 70
    assert found["paper, tokenizer", "tokens a frame"] == 960 + 512
    assert found["paper, dynamics", "tokens a frame"] == 1 + 1 + 256 + 32 + 1


@pytest.mark.parametrize("sizes", [(128, 8, 2, 24, 40), (128, 2, 2, 64, 8)])
def test_activation_memory_agrees_with_the_formula(sizes):
    """Fails if the formula is off by more than an eighth from what autograd keeps."""
    dim, heads, kv_heads, S, T = sizes
    cfg = SimpleNamespace(dim=dim, heads=heads, kv_heads=kv_heads, context=T + 1)
    model = Transformer(cfg, layers=4, time_every=4)
    weights, kept, tensors = {p.data_ptr() for p in model.parameters()}, {}, []

    def pack(x):
        copy = x.ndim == 2 and x.dtype == torch.bfloat16 and 2 * T * S not in x.shape
        if x.data_ptr() not in weights and not copy:    # bf16 weights are in STATE_BYTES
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            tensors.append(x)                           # so that no address is used twice
        return x

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
          torch.autocast("cpu", torch.bfloat16)):
        model(torch.randn(2, T, S, dim, requires_grad=True), torch.ones(S, S).bool())
    formula = bench.transformer_costs(model, S, T)[1]
    assert abs(sum(kept.values()) / (2 * T) / formula - 1) < 0.125


def test_tables_are_written_from_the_rows(tmp_path, monkeypatch):
    """Fails if --check misses a stale table, --write leaves one or changes the text around
    it, or a measured row does not take the place of the one carried over."""
    def tables(flag):
        monkeypatch.setattr(sys, "argv", ["results.py", flag])
        results.main()

    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "paper").mkdir()
    for name in results.READMES:
        (tmp_path / name).write_text("a\n<!-- table figure8 --><!-- end -->\nb\n")
    readme, of = tmp_path / "README.md", {"video": "forcing", "K": 4}
    row = play.Result("frechet", 15.5, None, None, 8, "", of)
    for step, text in enumerate(("`python -m paper.figure8_sampling`", "15.5†", "16.5 |")):
        if step == 1:
            results.write_rows("figure8_sampling", [row._asdict() | {"source": "README"}])
        if step == 2:
            results.save("figure8_sampling", [row._replace(value=16.5)], seeds=[3])
        with pytest.raises(SystemExit):
            tables("--check")
        assert text not in readme.read_text()
        tables("--write")
        tables("--check")
        assert text in readme.read_text() and ("†" in readme.read_text()) == (step == 1)
    assert readme.read_text() == (
        "a\n<!-- table figure8 -->\n| video | K 4 |\n| --- | --- |\n| forcing | 16.5 |\n"
        "<!-- end -->\nb\n")
    assert results.load("figure8_sampling")[0].seeds == [3]


def test_every_table_can_be_made():
    """Fails if the results in this repository don't fit the tables."""
    assert all("|" in write() or "not yet" in write() for write in results.TABLES.values())


def test_the_cascade_ends_at_the_default(tmp_path, monkeypatch):
    """Fails if a row of Table 2 is refused by train.py, or drops the change of a row before
    it; or the one with registers isn't the default; or unpacked latents are other ones."""
    monkeypatch.setattr(sys, "argv", ["x"])
    names = [design.name for design in table2_cascade.DESIGNS]
    parsed = [train.parse(["--stage", "dynamics", *table2_cascade.flags_of(i)[0]])[1]
              for i in range(len(names))]
    whole, default = names.index("+ registers"), train.parse([])[1]
    assert parsed[whole] == default and parsed[0] == parsed[1]
    differ = [len(p["dynamics"].items() - default["dynamics"].items())
              + (p["train"] != default["train"]) for p in parsed[1:whole + 1]]
    assert differ == [10, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    unpacked = [table2_cascade.flags_of(i)[1] for i in range(len(names))]
    assert unpacked == [False] * (whole + 1) + [True, False, False]
    assert [design.k for design in table2_cascade.DESIGNS] == [16] + [4] * 13
    for i, changed in ((-2, {"p_boot": 1}), (-1, {"prediction": "v", "loss_space": "v"})):
        assert parsed[i] == default | {"dynamics": default["dynamics"] | changed}
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(TokenizerConfig(height=24, width=24, patch=4, dim=16, heads=2,
                                          kv_heads=1, pack=9))
    spec = replace(KeyEnv.spec, height=24, width=24)
    state = {"stage": "tokenizer", "config": {"tokenizer": vars(tokenizer.cfg)},
             "spec": spec.to_json(), "tokenizer": tokenizer.state_dict()}
    save_checkpoint(tmp_path / "tokenizer.pt", state)
    data.write_json(tmp_path / "config.json", {})
    other = load_run(f"runs/{table2_cascade.unpack_tokenizer(tmp_path)}").tokenizer
    z = torch.randn(1, 2, *other.latent_shape)
    assert other.latent_shape == (36, tokenizer.cfg.channels)
    assert torch.equal(tokenizer.split(tokenizer.merge(other.split(z))), other.split(z))


def test_a_design_is_judged_and_trained_as_itself(tmp_path, monkeypatch):
    """Fails if K, seed, latents or the kept figures are another design's."""
    asked, run, judge = [], key_run(), table2_cascade.judge
    run.meta["config"]["train"]["compile"] = False
    rows = [play.Result(name, 1.0, None, None, 1, "", of) for name, of in (
        ("wrong_cells", {"film": "dream", "horizon": 4}),
        ("changed_cells", {"film": "next"}), ("inventory_f1", {"film": "next"}),
        ("psnr", {"film": "dream", "horizon": 4}))]
    stubs = {"load_run": lambda *_: run, "real_play": lambda *_: (0, 0, lambda x: x),
             "evaluate_world": lambda *_, sampler: asked.append(sampler.k) or rows,
             "dreamed_videos": lambda *x: asked.append(x[3]),
             "dream_rate": lambda dream, *_: asked.append(dream.k) or 8.0,
             "frechet": lambda *_: 3.0,
             "read_metrics": lambda _: [{"rate": None}, {"rate": 4.0}],
             "reference_of": lambda _: None, "unpack_tokenizer": lambda _: "paper/unpacked",
             "judge": lambda folder, k, *_: {"Frechet": float(k)}}
    for name, stub in stubs.items():
        monkeypatch.setattr(table2_cascade, name, stub)
    for k in (16, 4, 4):                                # the last one is kept
        found = judge(tmp_path, k, None, None, CPU, "fp32")
    assert asked == [16] * 3 + [4] * 3
    assert found["step, s"] == 0.25 and found["frames/s"] == 8

    trained, saved = [], []
    monkeypatch.setattr(results, "trained",
                        lambda *words: trained.append(words) or words[0])
    monkeypatch.setattr(results, "save", lambda name, found, seeds: saved.extend(found))
    monkeypatch.setattr(sys, "argv", ["x", "--seeds", "0", "1", "--device", "cpu"])
    table2_cascade.main()
    # the first two share a training; else a name for each set of flags, and none twice
    assert len(trained) == 28 and len(set(trained)) == 26
    assert len({words[0] for words in trained}) == 26
    assert len({words[1:] for words in trained}) == 26
    for design, measure, value in ((table2_cascade.DESIGNS[0].name, "Frechet", 16),
                                   ("+ GQA", "paper: frames/s", 23.2),
                                   ("+ GQA", "paper: step, s", 0.5)):
        assert value_of(saved, "cascade", {"design": design, "measure": measure}) == value


def test_recipes_train_for_as_long_and_are_judged_as_themselves(tmp_path, monkeypatch):
    """Fails if train.py refuses a recipe, the two of one training are trained twice, a
    cheaper step buys no more of them, or K is another recipe's."""
    recipes, asked, run = table1_world_models.RECIPES, [], key_run()
    run.meta["config"]["train"]["compile"] = False
    (tmp_path / "dynamics.pt").touch()
    trained, saved, long = [], [], play.Result("legal_cells", 0.5, 0.4, 0.6, 9, "share",
                                               {"frame": 500})
    kind = long._replace(of={"kind": "mean of all kinds"})
    for name, stub in {
            "load_run": lambda *_: run, "reference_of": lambda _: None,
            "interaction_set": lambda: None, "dream_rate": lambda dream, *_: 60 / dream.k,
            "evaluate_interactions": lambda *x: asked.append(x[3].k) or ([kind], None),
            "evaluate_long": lambda *_, k, dtype: asked.append(k) or [long],
            "load_checkpoint": lambda _: {"seconds": 120}}.items():
        monkeypatch.setattr(table1_world_models, name, stub)
    monkeypatch.setattr(results, "trained",
                        lambda *words: trained.append(words) or tmp_path)
    monkeypatch.setattr(results, "save", lambda name, found, seeds: saved.extend(found))
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu"])
    table1_world_models.main()
    monkeypatch.setattr(sys, "argv", ["x"])
    parsed = [train.parse(["--stage", "dynamics", *words[4:]])[1] for words in trained]
    steps = [config["train"].pop("dynamics_steps") for config in parsed]
    assert steps == [2167, 2167, 2167, 2000] and asked == [16, 16, 4, 4, 1, 1, 4, 4]
    assert trained[0] == trained[1] and len({words[0] for words in trained}) == 3
    default = train.parse([])[1]
    assert parsed[3]["dynamics"] == default["dynamics"]
    assert [config["dynamics"]["prediction"] for config in parsed] == ["v", "v", "x", "x"]
    found = {(row.of["recipe"], row.of["measure"]): row.value
             for row in saved if row.name == "recipe"}
    assert len(found) == 7 * len(recipes)
    assert found[recipes[0].name, "frames/s"] == 3.75
    assert found[recipes[3].name, "minutes of training"] == 2
    ours = {"model": "Dreamer 4", "measure": "tasks of 16"}
    assert value_of(saved, "published", ours) == 14


def test_videos_are_of_their_k_and_each_of_its_own_seed(monkeypatch):
    """Fails if K is lost, or each 64 videos are the same ones."""
    asked, run = [], key_run()

    def noted(dream, actor, n, seen):
        asked.append((dream.k, dream.generator.initial_seed(), n))
        return torch.zeros(n, 2, 2, 6)

    monkeypatch.setattr(figure8_sampling, "dream_from_nothing", noted)
    films = figure8_sampling.dreamed_videos(run, run, 70, 2, "fp32")
    assert asked == [(2, 0, 64), (2, 64, 6)] and films.shape == (70, 2, 8, 12, 3)


@pytest.mark.parametrize("budget, short", [("gpu", []), ("cpu", plan.SHORT.split())])
def test_the_plan_goes_on_where_it_broke_off(tmp_path, monkeypatch, budget, short):
    """Fails if what failed counts as done, what is done is done again, minutes are lost, or
    a package is missed after hours."""
    ran, rows, clock = [], [], iter(range(0, 9999, 120))

    def run(words):
        ran.append(words[1:])
        return SimpleNamespace(returncode=int(len(ran) == 2))

    steps = {"a": ["python x{short}", "python y"], "b": ["python z"]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "PLAN", steps)
    monkeypatch.setattr(plan, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(results, "save", lambda name, found: rows.extend(found))
    monkeypatch.setattr(sys, "argv", ["x", "--budget", budget])
    monkeypatch.setattr(plan, "PACKAGES", {"no_such_module": "it"})
    with pytest.raises(UserError, match="pip install it"):
        plan.main()
    monkeypatch.setattr(plan, "PACKAGES", {})
    with pytest.raises(SystemExit):
        plan.main()
    plan.main()
    assert ran == [["x", *short], ["y"], ["y"], ["z"]]
    assert [(row.of["script"], row.value) for row in rows] == [("a", 6), ("b", 2)]


def test_the_plan_names_every_script():
    """Fails if a script is left out of paper.all, or a name in the plan is none."""
    words = " ".join(command for commands in plan.PLAN.values() for command in commands)
    scripts = {path.stem for path in (results.ROOT / "paper").glob("*.py")
               if "def main" in path.read_text()}
    scripts -= {"all", "page", "exercises", "test_paper"}
    assert scripts == set(re.findall(r"-m paper\.(\w+)", words))


def test_exercises_pass_with_the_right_answers_alone(tmp_path, monkeypatch):
    """Fails if a planted bug is not seen, or mended not passed; if an equation's function
    doesn't pass its exercise, or what is handed out, or another one, does."""
    monkeypatch.setattr(exercises, "HERE", tmp_path)
    for bug in exercises.BUGS:
        monkeypatch.setattr(exercises.random, "choice", lambda bugs, bug=bug: bug)
        with pytest.raises(exercises.NotYet, match="still wrong"):
            exercises.planted_bug()
        path = tmp_path / f"{bug.file}.py"
        assert path.read_text().count(bug.planted) >= 1
        path.write_text((results.ROOT / path.name).read_text())
        exercises.planted_bug()
        for name in ("agent", "dynamics", "tokenizer"):
            (tmp_path / f"{name}.py").unlink()
    for exercise, file, right in (
            (exercises.bootstrap_target, "equation7", "dynamics import shortcut_target"),
            (exercises.returns, "equation10", "agent import lambda_returns"),
            (exercises.sampling, "equation2", "dynamics import euler_sample")):
        with pytest.raises(exercises.NotYet, match="still to be written"):
            exercise()
        path, name = tmp_path / f"{file}.py", right.split()[-1]
        path.write_text(f"from {right} as true\ndef {name}(*x): return true(*x) * 1.01\n")
        with pytest.raises(exercises.NotYet, match="off by"):
            exercise()
        path.write_text(f"from {right}")
        exercise()
    with pytest.raises(exercises.NotYet, match="mean of tau"):
        exercises.noise_schedule()
    path, line = tmp_path / "schedule.py", "u = torch.rand(B, T, generator=generator"
    text = path.read_text()
    assert text.count(f"{line}, device=device)") == 1
    for change, why in (("** 0.4", ""), ("** 0.01", "drawn"), ("** 0.4 * 1.5", "not in 0")):
        path.write_text(text.replace(f"{line}, device=device)", f"{line}) {change}"))
        with pytest.raises(exercises.NotYet, match=why) if why else nullcontext():
            exercises.noise_schedule()
    right = text.replace(f"{line}, device=device)", f"{line}) ** 0.4")
    for part, other, why in (("halvings[n_boot:]", "halvings[:0]", "n_boot"),
                             (", generator=generator)", ")", "second time"),
                             ("return (u / d).floor() * d, d", "return d", "tau, d"),
                             ("def sample_tau_d", "def other", "has no sample_tau_d")):
        assert part in right
        path.write_text(right.replace(part, other))
        with pytest.raises(exercises.NotYet, match=why):
            exercises.noise_schedule()
    path = tmp_path / "equation7.py"
    source = inspect.getsource(exercises.dynamics.shortcut_target)
    for part, other, why in (("with torch.no_grad():", "if True:", "carries gradients"),
                             ("torch.where(coarse, d / 2, d)", "d / 2", "below d_min")):
        path.write_text("import torch\n" + source.replace(part, other))
        with pytest.raises(exercises.NotYet, match=why):
            exercises.bootstrap_target()


def test_runs_of_an_exercise_are_compared_fairly(tmp_path, monkeypatch):
    """Fails if another setting than the exercise's may differ, or runs of other stages."""
    monkeypatch.chdir(tmp_path)
    configs = {name: {"a": 1, "b": 2} for name in
               ("data", "tokenizer", "dynamics", "agent", "train")}
    for run, beta in (("crafter", 1), ("exploit", 0)):
        (tmp_path / "runs" / run).mkdir(parents=True)
        configs["agent"]["a"] = beta
        data.write_json(Path("runs", run, "config.json"), configs)
        Path("runs", run, "agent.pt").write_text("same")
    exercises.alike("exploit", "agent", "a")
    assert exercises.same_file("agent", "crafter", "exploit")
    for prefix, name in (("agent", "b"), ("train", "a")):
        with pytest.raises(exercises.NotYet, match="agent.a 0, runs/crafter 1"):
            exercises.alike("exploit", prefix, name)
    Path("runs/exploit/agent.pt").write_text("other")
    assert not exercises.same_file("agent", "crafter", "exploit")


def test_an_own_world_must_answer_to_its_actions(tmp_path, monkeypatch):
    """Fails if a dream that is as good under other actions passes, or another world's."""
    monkeypatch.chdir(tmp_path)
    readme = (results.ROOT / "README.md").read_text()
    world = re.search(r"```python\n(# mygame.*?)```", readme, re.S)[1]
    Path("exercises").mkdir()
    Path("exercises/world.py").write_text(world)
    with pytest.raises(exercises.NotYet, match="runs/world is missing"):
        exercises.own_world()
    for env, gain, why in (("mygame:Game", 1.0, "another world"),
                           ("exercises.world:Game", -1.0, "gain_over_shuffled"),
                           ("exercises.world:Game", 1.0, "")):
        Path("runs/world").mkdir(parents=True, exist_ok=True)
        data.write_json(Path("runs/world/config.json"), {"data": {"env": env}})
        rows = [play.Result(name, low, low, low, 9, "dB", {"horizon": 1}) for name, low in
                (("gain_over_copying", 1.0), ("gain_over_shuffled", gain))]
        play.forget_results(Path("runs/world"))
        play.add_results(Path("runs/world"), "", rows)
        with pytest.raises(exercises.NotYet, match=why) if why else nullcontext():
            exercises.own_world()
    crash = world.replace("action]", "action + 4]")             # out of range, mostly
    Path("exercises/world.py").write_text(crash)
    with pytest.raises(exercises.NotYet, match="IndexError"):
        exercises.own_world()


def test_the_exploit_must_imagine_more_and_reach_less(tmp_path, monkeypatch):
    """Fails if runs that were judged otherwise, or have no remedy, pass the exercise."""
    monkeypatch.chdir(tmp_path)
    names = ("data", "tokenizer", "dynamics", "agent", "train")

    def write(run, beta, score, reward, length=500, remedy=0):
        folder = Path("runs", run)
        folder.mkdir(parents=True, exist_ok=True)
        config = {name: {} for name in names} | {
            "data": {"eval_length": length}, "agent": {"pmpo_beta": beta, "gamma": remedy},
            "train": {"log_every": score, "compile": True, "shard": False}}
        if run == "exploit":
            config["train"]["log_every"] = 5.0          # crafter's, all else must be alike
        data.write_json(folder / "config.json", config)
        (folder / "agent.pt").write_text("one BC")
        lines = [{"stage": "imagine", "step": i, "imagined_reward": reward} for i in (1, 2)]
        (folder / "metrics.jsonl").write_text("\n".join(map(data.json.dumps, lines)) + "\n")
        play.forget_results(folder)
        play.add_results(folder, f"python play.py eval --run runs/{run}", [play.Result(
            "achievements", score, score, score, 9, "", {"agent": "imagination"})])

    def verdict(why):
        with pytest.raises(exercises.NotYet, match=why) if why else nullcontext():
            exercises.exploit()

    write("crafter", 0.3, 5.0, 0.1)
    write("exploit", 0.0, 3.0, 0.2)
    write("stopped", 0.0, 4.0, 0.1, remedy=1)
    verdict("")
    write("stopped", 0.3, 4.0, 0.1)
    verdict("all the settings")
    write("stopped", 0.0, 4.0, 0.1, length=20, remedy=1)
    verdict("judged otherwise")
    write("stopped", 0.0, 3.0, 0.1, remedy=1)
    verdict("need fewer than crafter and stopped, 3.00")
    write("exploit", 0.0, 2.0, 0.1)
    verdict("imagined reward")


def test_memory_of_one_gpu_among_eight():
    """Fails if weights, gradients (4 bytes each, whole in a step) or an eighth of the rest
    are left out; or what goes into each of 36 blocks, 2,048 wide, and all of one block, for
    an eighth of the frames."""
    size = {row.of["size"]: row.value for row in bench.sizes("paper")
            if row.of["model"] == "paper, dynamics"}
    kept = 4 * size["tokens a frame"] * 2048 * 36
    kept += 1e6 * size["activations MB a frame"] / 36
    need = (4 + 4 + 16 / 8) * size["parameters"] + kept * size["frames in a step"] / 8
    assert size["of 8 GPUs, --train.shard"] == pytest.approx(need / 1e9, rel=1e-3)
