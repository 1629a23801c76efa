"""Environments, recorded play and the dataset on disk (Dreamer 4, Sections 4.1 and 4.3).

ActionSpec, EnvSpec   what an action and an environment look like
make_env, VecEnv      Crafter (stands in for Minecraft), or your own class; many in parallel
CrafterPlayer         a scripted player who sees the whole map (stands in for the contractors)
Dataset               windows of episodes: half uniform, half relevant to a task (Section 4.1)
record, describe      commands (all: python data.py --help)
MineRL, import_vpt    real Minecraft: play it, import recordings of it, download_vpt gets them
Time: row t holds the action that LED TO frame t, and what was received on reaching it.
"""
import argparse
import collections
import copy
import ctypes
import errno
import functools
import hashlib
import heapq
import http.client
import importlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import zlib
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

VERSION = 1
TYPES = {"frames": "u1", "binary": "u1", "categorical": "i4", "continuous": "f4",
         "labelled": "?", "events": "u1", "continues": "u1"}              # on disk; probes: u1
PROCESSES = multiprocessing.get_context("spawn")                          # fork hurts torch


class UserError(ValueError):
    """What a user can put right. The message says: got, need, do."""


def keep_buffers():
    """Let glibc keep big buffers instead of returning them to the system: in an evaluation of
    dreams on a CPU a third of the time went into getting them back."""
    for knob, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)) if sys.platform == "linux" else ():
        ctypes.CDLL(None).mallopt(knob, value)


def run_cli(main):
    """Run main(); what a user can put right becomes one line and exit code 2, Ctrl-C and SIGTERM
    one line and 130 and 143."""
    def stop(number, frame):
        raise KeyboardInterrupt(128 + number)
    try:
        signal.signal(signal.SIGTERM, stop)
        keep_buffers()
        main()
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(print(f"error: got {error}; need room on the disk and the right to write; do: see "
                       "to it, then the same command goes on", file=sys.stderr) or 2)
    except KeyboardInterrupt as signalled:
        n = os.environ.get("WORLD_SIZE")
        words = [f"torchrun --nproc_per_node {n} --" if n else "python",
                 shlex.join(sys.argv).replace(" --resume no", "").replace(" --resume=no", "")]
        print("interrupted: the same command goes on:", *words, file=sys.stderr)
        sys.exit(*signalled.args or (130,))


def check_config(prefix, cfg, zero=(), shares=()):
    """UserError where a setting has another type than its default, or is out of range: whole
    numbers count from 1 (those in `zero` from 0), others are finite and from 0 (`shares` to 1)."""
    for field in fields(cfg):
        value, kind = getattr(cfg, field.name), field.type
        low = int(kind is int and field.name not in zero)
        right = type(value) in (kind, int) if kind is float else type(value) is kind
        high = 1 if field.name in shares else sys.float_info.max
        if not right or kind in (int, float) and not low <= value <= high:
            need = f"{kind.__name__} from {low}" if kind in (int, float) else kind.__name__
            need += " to 1" * (field.name in shares)
            raise UserError(f"Got {prefix}.{field.name} {value!r}, need {need}.")


def read_json(path):
    """The values in a JSON file. UserError where it can't be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"got no JSON to read in {path} ({error}); need what training wrote there; "
                        "do: restore it, or delete it and run the command again") from None


def rng_for(seed, stage, step):
    """Randomness without state: the generator of step `step` >= 0 of a stage (any string)."""
    return np.random.default_rng([seed, zlib.crc32(stage.encode()), step])


@dataclass(frozen=True)
class ActionSpec:
    """An action is {"binary": (nb,), "categorical": (nc,), "continuous": (na,)}, width 0 = none."""
    binary: int = 0                                           # nb two-way keys
    categorical: tuple[int, ...] = ()                         # sizes of the nc categorical parts
    continuous: int = 0                                       # na numbers in [-1, 1]

    def zeros(self, *lead):
        """No action: uint8 (*lead, nb), int64 (*lead, nc), float32 (*lead, na)."""
        return {"binary": np.zeros((*lead, self.binary), np.uint8),
                "categorical": np.zeros((*lead, len(self.categorical)), np.int64),
                "continuous": np.zeros((*lead, self.continuous), np.float32)}

    def sample(self, rng, *lead):
        """Uniform random actions, shaped like zeros()."""
        sizes = np.array(self.categorical, np.int64)
        return {"binary": rng.integers(0, 2, (*lead, self.binary), np.uint8),
                "categorical": rng.integers(0, sizes, (*lead, len(sizes))),
                "continuous": rng.uniform(-1, 1, (*lead, self.continuous)).astype(np.float32)}


@dataclass(frozen=True)
class EnvSpec:
    name: str
    height: int                                               # of a frame, in pixels
    width: int
    actions: ActionSpec
    tasks: tuple[str, ...]                                    # events[:, i] belongs to tasks[i]
    ladder: tuple[tuple[str, int], ...] = ()                  # prompts: task, times (0 = no end)
    rungs: tuple[str, ...] = ()                               # tasks that the ladder score counts
    action_names: tuple[str, ...] = ()                        # of the first categorical part

    def to_json(self):
        return json.loads(json.dumps(asdict(self)))           # lists for tuples

    @classmethod
    def from_json(cls, values):
        def tuples(x):
            return tuple(map(tuples, x)) if isinstance(x, list) else x
        actions = ActionSpec(**{k: tuples(v) for k, v in values["actions"].items()})
        return cls(**{**{k: tuples(v) for k, v in values.items()}, "actions": actions})


def make_env(name):
    """The environment "crafter", "minerl" (or "minerl:HxW"), "module:Class"; UserError: none.

    It has: spec; reset(seed) -> frame uint8 (H, W, 3);
    step(action dict) -> (frame, events (n_tasks,): how often each happened, terminal bool).
    It may have: keys, {key of the browser game: action name};
    probe() -> dict of uint8 arrays, ground truth for evaluation only;
    reader() -> object that reads such symbols off pictures, see CrafterReader;
    player(rng, skill) -> object whose act() gives the action to record (else: random play).
    """
    if name.split(":")[0] == "minerl":
        return MineRL(*parse_size(name[7:] or "128x128"))
    module, _, cls = ("data:Crafter" if name == "crafter" else name).partition(":")
    try:
        return getattr(importlib.import_module(module), cls)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"got environment {name!r} ({error}); need 'crafter', 'minerl' or an "
                        "importable 'module:Class'; do: check it, pip install what is missing")


def controls(env):
    """What a person can press: dicts of label, key, part, index, value. Without `keys` an action
    gets an arrow by its name, or the next free letter."""
    spec, keys = env.spec, {name: key for key, name in getattr(env, "keys", {}).items()}
    sizes = spec.actions.categorical[:1]
    names = spec.action_names or [f"action {i}" for i in range(sum(sizes))]
    found = [(f"key {i}", "binary", i, 1) for i in range(spec.actions.binary)]
    found += [(name, "categorical", 0, i) for i, name in enumerate(names)]
    free = iter("1234567890qertyuiopfghjklzxcvbnm" if not keys else "")
    for name, *_ in found:
        arrow = [f"Arrow{x}" for x in ("Left", "Right", "Up", "Down") if x.lower() in name]
        if name not in keys and name != "noop":
            keys[name] = arrow[0] if arrow and arrow[0] not in keys.values() else next(free, "")
    return [{"label": name, "key": keys.get(name, ""), "part": part, "index": index, "value": value}
            for name, part, index, value in found]


def copy_env(env):
    """A copy of an environment to try things in; None where it can't be copied."""
    try:
        return copy.deepcopy(env, {id(m): m for m in list(sys.modules.values())})
    except Exception:                                         # processes, sockets, windows, ...
        return None


def can_copy(name):
    """Whether an environment can be copied while it is played."""
    env = make_env(name)
    env.reset(0)
    return copy_env(env) is not None


class InsertionSet(dict):
    """A set that is iterated in the order of insertion, in every process."""
    add, remove = dict.setdefault, dict.__delitem__


class Crafter:
    """Crafter at 72x72: 17 actions; events[i]: achievement i happened in this step, each time.

    Terminal is death only; there is no time limit.
    """
    keys = {"ArrowUp": "move_up", "ArrowLeft": "move_left", "ArrowDown": "move_down",
            "ArrowRight": "move_right", " ": "do", "z": "sleep", "r": "place_stone",
            "t": "place_table", "f": "place_furnace", "p": "place_plant", "1": "make_wood_pickaxe",
            "2": "make_stone_pickaxe", "3": "make_iron_pickaxe", "4": "make_wood_sword",
            "5": "make_stone_sword", "6": "make_iron_sword"}

    def __init__(self):
        names = importlib.import_module("crafter").constants
        rungs = ("collect_wood", "place_table", "make_wood_pickaxe", "collect_stone",
                 "make_stone_pickaxe", "place_furnace", "collect_coal", "collect_iron",
                 "make_iron_pickaxe", "collect_diamond")
        times = {"collect_wood": 5, "collect_stone": 5, "collect_diamond": 0}
        self.spec = EnvSpec("crafter", 72, 72, ActionSpec(categorical=(len(names.actions),)),
                            tuple(names.achievements), tuple((r, times.get(r, 1)) for r in rungs),
                            rungs, tuple(names.actions))

    def reset(self, seed):
        """A new Env per world, as Crafter numbers the resets of an Env."""
        self.env = sys.modules["crafter"].Env(size=(72, 72), length=10 ** 9, seed=int(seed))
        world, reset_world = self.env._world, self.env._world.reset

        def reset(seed=None):
            # subtle: Crafter draws from sets of objects, whose order is that of memory addresses
            reset_world(seed)
            world._chunks = collections.defaultdict(InsertionSet)
        world.reset = reset
        return np.ascontiguousarray(self.env.reset())

    def step(self, action):
        counts = self.env._player.achievements
        before = list(counts.values())
        frame = np.ascontiguousarray(self.env.step(int(action["categorical"][0]))[0])
        return frame, np.array(list(counts.values())) > before, bool(self.env._player.health <= 0)

    def probe(self):
        """True cells [column, row] (9, 7) around the player (0 = outside), inventory (16,), and
        (daylight * 255, asleep, x, y)."""
        # subtle: rendering again would draw from the world's random stream at night
        me, light = self.env._player, round(255 * self.env._world.daylight)
        cells = np.pad(self.env._sem_view(), 4)[me.pos[0]: me.pos[0] + 9, me.pos[1] + 1:][:, :7]
        return {"probe_semantic": cells.astype(np.uint8),
                "probe_inventory": np.array(list(me.inventory.values()), np.uint8),
                "probe_player": np.array([light, me.sleeping, *me.pos], np.uint8)}

    def reader(self):
        return CrafterReader()

    def player(self, rng, skill):
        return CrafterPlayer(self.env, rng, skill)


class CrafterReader:
    """Reads the symbols off frames, real or dreamed: the nearest texture for each cell, under the
    frame's light. On real frames in daylight it makes no mistake; night adds noise.

    textures: names by number; semantic: number -> id in probe_semantic (0 = outside);
    LEGAL: a cell further than that from every texture (rms of 0..255) shows nothing that exists.
    """
    LEGAL = 20.0

    def __init__(self):
        crafter = importlib.import_module("crafter")
        ids = crafter.Env(size=(72, 72))._world._mat_ids      # then objects, in Env's order
        creatures = ("player", "cow", "zombie", "skeleton", "arrow", "plant")
        ids = {**ids, **{name: 13 + i for i, name in enumerate(creatures)}}
        art, four = crafter.engine.Textures(crafter.constants.root / "assets"), MOVES.values()
        land = ("grass", "sand", "path")
        things = {"cow": land, "zombie": land, "skeleton": land, "plant": land, "plant-ripe": land,
                  "player-sleep": land, **{m.replace("move", "player").replace("_", "-"): land
                                           for m in four}}
        things |= {m.replace("move", "arrow").replace("_", "-"): (*land, "water", "lava")
                   for m in four}
        self.textures = ("outside", *crafter.constants.materials, *things)
        self.semantic = np.array([0, *(ids[name.split("-")[0]] for name in self.textures[1:])])
        pictures, self.number = [np.full((8, 8, 3), 127.0)], [0]
        for i, name in enumerate(self.textures[1:], 1):
            for ground in things.get(name, (name,)):
                canvas = art.get(ground, (8, 8))[..., :3].astype(float)
                if name in things:
                    crafter.engine._draw_alpha(canvas, np.zeros(2, int), art.get(name, (8, 8)))
                pictures.append(canvas.swapaxes(0, 1)), self.number.append(i)
        pictures, self.number = np.stack(pictures), np.array(self.number)
        grey = self.grey(pictures)
        flat = lambda x: x.reshape(len(x), -1).T.astype(np.float32)
        # a cell shows light * picture + veil * faded + haze, see lit()
        self.awake = flat(pictures), flat(0.4 * pictures + 0.6 * grey)
        self.asleep = flat(grey / 2), flat(grey / 2)
        x, y = np.meshgrid(np.linspace(-1, 1, 72), np.linspace(-1, 1, 56))
        self.edge = 1 - np.exp(-2 * (x ** 2 + y ** 2))[..., None]         # where night's noise is
        view, items = crafter.engine.ItemView(art, (9, 2)), crafter.constants.items
        counts = [view(dict.fromkeys(items, n), np.array((8, 8))).swapaxes(0, 1) for n in range(10)]
        self.counts = self.cells(np.stack(counts)).swapaxes(0, 1)         # (18, 10, 192)

    @staticmethod
    def grey(x):
        return np.repeat((x @ (0.299, 0.587, 0.114))[..., None], 3, -1)

    @staticmethod
    def cells(x):
        """(N, 8 rows, 8 columns, 3) -> (N, rows * columns, 192)."""
        N, H, W, _ = x.shape
        x = x.reshape(N, H // 8, 8, W // 8, 8, 3).swapaxes(2, 3)
        return x.reshape(N, H * W // 64, 192).astype(np.float32)

    def distances(self, frames, light, asleep):
        """Mean squared distance (N, 63, textures) under a light (N,) in [0, 1], as Crafter draws
        it; what night's noise is expected to add is taken off."""
        light, asleep = np.asarray(light)[:, None, None, None], np.asarray(asleep, bool)
        noise = np.clip(1 - 2 * light, 0, 1) * self.edge                  # (N, 56, 72, 1)
        veil = 0.5 * (1 - light) * (1 - noise)
        haze = 0.5 * (1 - light) * (79.5 * noise + np.array([0, 16, 64]))
        haze = np.where(asleep[:, None, None, None], self.grey(haze) / 2 + [0, 0, 8], haze)
        blur = (0.5 * (1 - light) * 27.4 * noise / (1 + asleep[:, None, None, None])) ** 2
        y, a = self.cells(frames[:, :56] - haze), light[:, :, :, 0].astype(np.float32)
        veil = self.cells(np.repeat(veil, 3, -1))
        out = np.empty((len(frames), 63, len(self.number)), np.float32)
        for state, (picture, faded) in ((False, self.awake), (True, self.asleep)):
            i = asleep == state                                           # |y - a p - veil f|^2
            v, b = veil[i], a[i]
            out[i] = (b ** 2 * (picture ** 2).sum(0) + 2 * b * (v @ (picture * faded))
                      + v ** 2 @ faded ** 2 - 2 * (b * (y[i] @ picture) + (v * y[i]) @ faded))
        extra = (y ** 2).sum(-1) - self.cells(np.repeat(blur, 3, -1)).sum(-1)
        return (out + extra[..., None]) / 192

    def read(self, frames, light=None, asleep=None):
        """uint8 (N, 72, 72, 3) -> texture numbers [column, row] (N, 9, 7), inventory (N, 16) and
        each cell's rms distance (N, 9, 7). Without a light the likeliest one is taken."""
        frames = np.asarray(frames).astype(np.float32)
        if light is None:
            tries = [(x, s) for s in (0, 1) for x in np.linspace(0, 1, 11)]
            costs = [self.distances(frames, np.full(len(frames), x), np.full(len(frames), s))
                     .min(-1).mean(-1) for x, s in tries]
            light, asleep = np.array(tries)[np.argmin(costs, 0)].T
        d = self.distances(frames, light, asleep)
        items = np.square(self.cells(frames[:, 56:])[:, :, None] - self.counts).sum(-1).argmin(-1)
        grid = lambda x: x.reshape(-1, 7, 9).swapaxes(1, 2)
        return (grid(self.number[d.argmin(-1)]), items[:, :16],
                grid(np.sqrt(np.maximum(d.min(-1), 0))))


# A step's chance of a random action, of starting to dither, of a detour; share of mixed play.
SKILLS = {"skilled": (0.01, 0.002, 0.001, 0.4), "average": (0.08, 0.010, 0.006, 0.3),
          "novice": (0.25, 0.020, 0.015, 0.2), "clumsy": (0.55, 0.030, 0.030, 0.1)}
MOVES = {(-1, 0): "move_left", (1, 0): "move_right", (0, -1): "move_up", (0, 1): "move_down"}


def around(mask):
    """Cells with a cell of the mask (64, 64) in their 3x3."""
    m = np.pad(mask, 1)
    rows = m[:-2] | m[1:-1] | m[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


class CrafterPlayer:
    """Plays towards the diamond, with privileged access to the world.

    Plans are generators of action names on a stack; needs interrupt the career. A plan reads the
    world anew before each action, so a slip of the hand costs time only. They return success.
    """

    def __init__(self, env, rng, skill):
        self.rules, self.world, self.me = sys.modules["crafter"].constants, env._world, env._player
        self.rng, (self.noise, self.dither, self.detour, _) = rng, SKILLS[skill]
        self.have, self.done = self.me.inventory, self.me.achievements
        self.stack, self.queue, self.clock, self.retry = [self.career()], [], 0, {}
        self.sleepy = rng.choice([1, 1, 2, 4, 7])             # energy at which to go to sleep

    def act(self):
        """The next action dict: as planned, or a slip."""
        self.clock += 1
        name = plan = self.queue.pop() if self.queue else self.intend()
        if self.rng.random() < self.noise:
            name = self.rules.actions[self.rng.integers(6 if self.rng.random() < 0.4 else 17)]
        if self.rng.random() < self.dither:
            pair = ["noop noop", "move_left move_right", "move_up move_down"][self.rng.integers(3)]
            self.queue += pair.split() * int(self.rng.integers(1, 4))
        step = {action: move for move, action in MOVES.items()}.get(name)
        if step and self.ahead(step)[0] == "lava" or name == "sleep" != plan:
            name = "noop"
        action = ActionSpec(categorical=(17,)).zeros()
        action["categorical"][0] = self.rules.actions.index("sleep" if self.me.sleeping else name)
        return action

    def intend(self):
        """The name of the action of a player without slips."""
        for move in MOVES:
            if self.ahead(move)[1] in ("Zombie", "Skeleton"):
                return "do" if move == tuple(self.me.facing) else MOVES[move]
        self.dark = self.world.daylight < 0.4                 # zombies come, on grass
        tired = self.have["energy"] <= (6 if self.dark else self.sleepy)
        needs = {self.sleep: tired or self.have["health"] <= 4,
                 self.drink: self.have["drink"] <= (3 if self.dark else 4),
                 self.eat: self.have["food"] <= (1 if self.dark else 5),
                 self.wander: self.rng.random() < self.detour,
                 self.plant: self.rng.random() < self.detour}
        for plan in needs:
            if needs[plan] and self.clock >= self.retry.get(plan, 0) and len(self.stack) == 1:
                self.stack.append(plan())
                self.retry[plan] = self.clock + 30            # may be out of reach: ask seldom
        while True:
            try:
                return next(self.stack[-1])
            except StopIteration:
                self.stack.pop()

    def ahead(self, move=None):
        """(material or None, kind of creature) in a direction; default: the one faced."""
        material, thing = self.world[self.me.pos + np.array(move or self.me.facing)]
        return material, type(thing).__name__ if thing else None

    def cells(self, *materials):
        return np.isin(self.world._mat_map, [self.world._mat_ids[m] for m in materials])

    def creatures(self, *kinds):
        mask = np.zeros(self.world.area, bool)
        for thing in self.world.objects:
            mask[tuple(thing.pos)] = type(thing).__name__ in kinds
        return mask

    def can_dig(self, material):
        rule = self.rules.collect.get(material, {"require": {"never": 1}})
        return material != "water" and all(self.have.get(k, 0) >= n
                                           for k, n in rule["require"].items())

    def route(self, targets, touch):
        """Dijkstra to the nearest target -> (cost in about steps, cells on the way).

        touch: the target is only to be faced, so it may be solid.
        """
        price = np.full(len(self.rules.materials) + 1, np.inf)
        for material, number in self.world._mat_ids.items():
            if material in self.rules.walkable:
                price[number] = 8 if material == "grass" and self.dark else 1
            elif self.can_dig(material) or material == "water" and self.have["stone"]:
                price[number] = 4 if material == "water" else 2.5
        monsters = self.creatures("Zombie", "Skeleton")
        cost = price[self.world._mat_map] + 2 * around(around(monsters)) + 3 * self.creatures("Cow")
        cost[self.creatures("Plant")] = np.inf
        if touch:
            cost[targets] = 1
        cost, goal = np.pad(cost, 1, constant_values=np.inf), np.pad(targets, 1).ravel().tolist()
        side, cost = len(cost), cost.ravel().tolist()
        start = (self.me.pos[0] + 1) * side + self.me.pos[1] + 1
        heap, best, came = [(0, int(start))], {start: 0}, {}
        while heap:
            total, here = heapq.heappop(heap)
            if goal[here]:
                path = [here]
                while path[-1] in came:
                    path.append(came[path[-1]])
                return total, [(c // side - 1, c % side - 1) for c in path[-2::-1]]
            for there in (here - 1, here + 1, here - side, here + side):
                if total + cost[there] < best.get(there, np.inf):
                    best[there], came[there] = total + cost[there], here
                    heapq.heappush(heap, (best[there], there))
        return np.inf, []

    def go(self, find, touch=True, patience=200):
        """Walk, dig and bridge until a target of find() -> mask is faced (touch) or stood on."""
        path = []
        for _ in range(patience):
            targets, here = find(), tuple(map(int, self.me.pos))
            front = tuple(np.clip(self.me.pos + self.me.facing, 0, 63))
            if targets[front if touch else here]:
                return True
            path = path[1:] if path and here == path[0] else path
            if not path or not targets[path[-1]] or self.clock % 16 == 0 \
                    or abs(path[0][0] - here[0]) + abs(path[0][1] - here[1]) != 1:
                path = self.route(targets, touch)[1]
            if not path:
                return False
            move = (path[0][0] - here[0], path[0][1] - here[1])
            material, creature = self.ahead(move)
            free = material in self.rules.walkable and not creature
            if free or tuple(self.me.facing) != move:
                yield MOVES[move]
            else:
                yield "place_stone" if material == "water" and not creature else "do"
        return False

    def collect(self, item, count):
        """Have `count` of a material, after making the tool for it."""
        source = {"wood": "tree"}.get(item, item)
        for tool in self.rules.collect[source]["require"]:
            if not (yield from self.make(tool)):
                return False
        while self.have[item] < count:
            if not (yield from self.go(lambda: self.cells(source))):
                return False
            yield "do"
        return True

    def make(self, tool):
        """Have a tool: its materials, a table (and furnace) in the 3x3, then the action."""
        rule = self.rules.make[tool]
        while not self.have[tool]:
            for item in sorted(rule["uses"], reverse=True):   # wood first, then stone, iron, coal
                if not (yield from self.collect(item, rule["uses"][item])):
                    return False
            if not (yield from self.bench("furnace" in rule["nearby"])):
                return False
            yield f"make_{tool}"
        return True

    def bench(self, furnace=True):
        """Stand by a table (and a furnace): the nearest, or new ones where that is quicker."""
        table = around(self.cells("table"))
        both = table & around(self.cells("furnace"))
        if furnace and self.route(both, False)[0] < 16:
            return (yield from self.go(lambda: both, touch=False))
        if furnace and not (yield from self.collect("stone", 4)):
            return False
        if self.route(table, False)[0] < (8 if self.have["wood"] > 2 else 25):
            yield from self.go(lambda: table, touch=False)
        elif not ((yield from self.collect("wood", 3)) and (yield from self.place("table"))):
            return False
        stay = around(self.cells("table"))
        return not furnace or (yield from self.place("furnace", stay))

    def place(self, item, stay=None):
        """Put an item on the cell ahead; turn, dig or step aside (on `stay`) until that works."""
        before = self.done[f"place_{item}"]
        for _ in range(25):
            material, creature = self.ahead()
            if not creature and material in self.rules.place[item]["where"]:
                yield f"place_{item}"
            elif not creature and material != "tree" and self.can_dig(material):
                yield "do"
            else:
                move = list(MOVES)[self.rng.integers(4)]
                if stay is None or stay[tuple(np.clip(self.me.pos + move, 0, 63))] \
                        or self.ahead(move)[0] not in self.rules.walkable:
                    yield MOVES[move]
            if self.done[f"place_{item}"] > before:
                return True
        return False

    def drink(self):
        while self.have["drink"] < 9 and (yield from self.go(lambda: self.cells("water"))):
            yield "do"

    def eat(self):
        while self.have["food"] < 7 and (yield from self.go(lambda: self.creatures("Cow"))):
            yield "do"

    def plant(self):
        if (yield from self.go(lambda: self.cells("grass"), patience=15)):
            for _ in range(12):
                yield "place_plant" if self.have["sapling"] else "do"

    def wander(self):
        """Walk towards a random cell some way off."""
        spots, mask = self.cells("path", "path" if self.dark else "grass"), self.creatures()
        spots = np.argwhere(spots | self.creatures("Player"))
        spots = spots[np.abs(spots - self.me.pos).sum(1) < 20]
        mask[tuple(self.rng.choice(spots))] = True
        yield from self.go(lambda: mask, touch=False, patience=25)
        yield "noop"

    def enclosed(self):
        """The free cells around the player form a small closed room."""
        room, free = self.creatures("Player"), self.cells(*self.rules.walkable)
        for _ in range(4):                                    # grow the room by a step each
            m = np.pad(room, 1)
            room = free & (m[2:, 1:-1] | m[:-2, 1:-1] | m[1:-1, 2:] | m[1:-1, :-2] | room)
        return room.sum() <= 4 and not (room & self.creatures("Zombie", "Skeleton")).any()

    def sleep(self):
        """Dig two cells into rock, step back, close the entrance with a stone; recover there."""
        for _ in range(3):
            rock = ~around(self.cells("grass", "sand", "path", "lava")) & self.cells("stone")
            if self.enclosed() or not self.have["stone"] or not (
                    yield from self.go(lambda: rock, touch=False)):
                break
            yield MOVES[tuple(-int(c) for c in self.me.facing)]
            yield "place_stone"
        safe, fed = self.enclosed(), min(self.have["food"], self.have["drink"]) > 0
        while self.have["energy"] < (9 if safe else 2):
            yield "sleep"
        for _ in range(50):
            if safe and fed and self.have["health"] < 6:
                yield "noop"

    def career(self):
        """Wood, table, pickaxes, furnace, iron, diamond; then whatever is left."""
        early, sword, better_sword = self.rng.random(3) < (0.6, 0.5, 0.9)
        yield from self.collect("wood", self.rng.integers(5, 9))
        yield from self.go(lambda: self.cells("stone"), patience=40)
        yield from self.make("wood_pickaxe")
        if sword:
            yield from self.make("wood_sword")
        yield from self.collect("stone", 7 if early else 2)
        yield from self.make("stone_pickaxe")
        if better_sword:
            yield from self.make("stone_sword")
        if early:
            yield from self.bench()
        yield from self.collect("coal", 1)
        yield from self.collect("stone", 6)
        while not (yield from self.collect("diamond", 1)):
            yield from self.wander()
        while True:
            plans = (self.make("iron_sword"), self.collect("diamond", self.have["diamond"] + 1),
                     self.wander(), self.plant(), self.eat())
            yield from plans[self.rng.integers(3 if self.dark else 5)]
            yield "noop"


def start_workers(target, jobs):
    """A process per job that runs target(pipe, *job) -> (processes, our ends of the pipes)."""
    pairs = [PROCESSES.Pipe() for _ in jobs]
    processes = []
    for (_, theirs), job in zip(pairs, jobs, strict=True):
        processes.append(PROCESSES.Process(target=target, args=(theirs, *job), daemon=True))
        processes[-1].start()
        theirs.close()                                        # so that a dead worker reads as EOF
    return processes, [ours for ours, _ in pairs]


def env_worker(pipe, name, seeds):
    """Answers None with fresh frames, actions with (frames, events, terminal)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    envs, fresh = [make_env(name) for _ in seeds], []
    while True:
        try:
            actions = pipe.recv()
        except EOFError:                                      # the parent closed, or died
            return
        events = np.zeros((len(envs), len(envs[0].spec.tasks)), np.uint8)
        if actions is None and fresh and all(fresh):          # sooner copied than made again
            envs, frames = [copy_env(env) for env in fresh], first.copy()
        elif actions is None:
            frames = np.stack([env.reset(seed) for env, seed in zip(envs, seeds, strict=True)])
            fresh, first = [copy_env(env) for env in envs], frames.copy()
        if actions is None:
            terminal = np.zeros(len(envs), bool)
        for i in np.flatnonzero(~terminal) if actions else ():
            frames[i], events[i], terminal[i] = envs[i].step({k: v[i] for k, v in actions.items()})
        pipe.send((frames, events, terminal))


class VecEnv:
    """N environments, one per seed, in worker processes (0 = one per core), which start at the
    first reset. Every reset begins the same episodes.

    A finished environment is not stepped any more: it repeats its last frame, without events.
    """

    def __init__(self, name, seeds, workers=0):
        self.name, self.seeds, self.spec = name, seeds, make_env(name).spec
        self.workers = min(workers or os.cpu_count(), len(seeds))
        self.parts = np.array_split(np.arange(len(seeds)), self.workers)
        self.processes, self.pipes = [], []

    def _exchange(self, messages):
        for pipe, message in zip(self.pipes, messages, strict=True):
            pipe.send(message)
        return tuple(map(np.concatenate, zip(*[pipe.recv() for pipe in self.pipes], strict=True)))

    def reset(self):
        """-> frames uint8 (N, H, W, 3)."""
        if not self.processes:
            jobs = [(self.name, [int(self.seeds[i]) for i in part]) for part in self.parts]
            self.processes, self.pipes = start_workers(env_worker, jobs)
        return self._exchange([None] * len(self.parts))[0]

    def step(self, actions):
        """dict of (N, ...) -> frames (N, H, W, 3), events uint8 (N, n_tasks), terminal (N,)."""
        return self._exchange([{k: np.asarray(v)[part] for k, v in actions.items()}
                               for part in self.parts])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join()


def episode_path(folder, index):
    return Path(folder) / f"episode_{index:05d}.npy"


def write_whole(path, write, keep=None):
    """Call write(file) on a temporary name; the real name appears when all of it is on disk, and
    the file of before gets the name `keep`. UserError where the disk is full or read-only: nothing
    is left of the attempt."""
    part = path.with_suffix(".tmp")
    try:
        with open(part, "wb") as file:
            # subtle: given a real file, np.save writes through C and on a full disk says nothing
            write(types.SimpleNamespace(write=file.write, seek=file.seek, flush=file.flush))
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"got no room or no right to write {path} ({error}); need both; do: see to "
                        "it, then the same command goes on from what was written before") from None
    finally:
        if part.is_file():
            part.unlink()


def write_episode(folder, index, frames, actions, events, continues, labelled=None, probes=None):
    """Write an episode of T rows; row t: the action that led to frame t. UserError: lengths differ.

    frames uint8 (T, H, W, 3), actions dict of (T, width), events (T, n_tasks), continues (T,): 0 on
    a terminal frame, labelled (T,): has an action (default: all but row 0), probes: dict.
    """
    labelled = np.arange(len(frames)) > 0 if labelled is None else labelled
    columns = {"frames": frames, **actions, "labelled": labelled, "events": events,
               "continues": continues, **(probes or {})}
    if len({len(c) for c in columns.values()}) > 1:
        raise UserError(f"got { {k: len(c) for k, c in columns.items()} } rows; need as many of "
                        "each; do: pad or cut")
    columns = {k: np.asarray(c, TYPES.get(k, "u1")) for k, c in columns.items()}
    columns = {k: c for k, c in columns.items() if c.size}    # npy files know no zero widths
    rows = np.empty(len(frames), [(k, c.dtype, c.shape[1:]) for k, c in columns.items()])
    for name, column in columns.items():
        rows[name] = column
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(episode_path(folder, index), lambda file: np.save(file, rows))


def column(rows, name):
    """A field of rows, (*rows.shape, ...); fields of width zero are not in the file."""
    return rows[name] if name in rows.dtype.names else np.zeros((*rows.shape, 0), TYPES[name])


def open_episode(path, spec):
    """The rows of an episode as a memory map. UserError: missing, cut off, or not of this spec."""
    nb, sizes, na = asdict(spec.actions).values()
    shapes = {"frames": (spec.height, spec.width, 3), "binary": (nb,), "categorical": (len(sizes),),
              "continuous": (na,), "events": (len(spec.tasks),), "labelled": (), "continues": ()}
    try:
        rows = np.load(path, mmap_mode="r")
        for name, shape in shapes.items():
            got = column(rows, name)
            if got.shape != (len(rows), *shape) or got.dtype != TYPES[name]:
                raise ValueError(f"{name}: {got.dtype}{got.shape}, need {TYPES[name]}{shape}")
        return rows
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"got no whole episode in {path} ({error}); need all of its rows; "
                        "do: delete that file if it is there, and record or import it again")


def check_episode(path, rows, spec):
    """UserError when the rows can't be true."""
    sizes = np.array(spec.actions.categorical, np.int64)
    category, number = column(rows, "categorical"), column(rows, "continuous")
    faults = {"row 0 has an action": rows["labelled"][0],
              "row 0 has an event": column(rows, "events")[0].any(),
              "it ends before its last row": not rows["continues"][:-1].all(),
              "a category out of range": ((category < 0) | (category >= sizes)).any(),
              "a number outside [-1, 1]": not (np.abs(number) <= 1).all(),
              "a key other than 0 and 1": (column(rows, "binary") > 1).any()}
    if found := [text for text, there in faults.items() if there]:
        raise UserError(f"got {path}: {found[0]}; need rows as write_episode says; do: correct "
                        "them")


def write_about(folder, spec, settings, **more):
    about = {"version": VERSION, "spec": spec.to_json(), "settings": settings, **more}
    write_whole(Path(folder) / "dataset.json", lambda f: f.write(json.dumps(about).encode()))


def read_about(folder):
    try:
        about = json.loads((Path(folder) / "dataset.json").read_text())
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']}, not {VERSION}")
        needed = {"settings", *(("lengths", "events", "content") if about["complete"] else ())}
        if lacks := sorted(needed - set(about)):
            raise ValueError(f"it lacks {lacks}")
        EnvSpec.from_json(about["spec"])
        return about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"got {folder} without a dataset.json to read ({error}); need a dataset; "
                        f"do: 'python data.py record --out {folder}', or correct the path")


def finish_dataset(folder, spec, settings):
    """Check all episodes, then write dataset.json; settings["skills"] may name each one's skill."""
    content, lengths, events, crc = hashlib.sha256(), [], [], []
    for index in range(len(list(Path(folder).glob("episode_*.npy")))):
        path = episode_path(folder, index)
        rows = open_episode(path, spec)
        check_episode(path, rows, spec)
        content.update(np.memmap(path, np.uint8, "r"))        # may be larger than the memory
        lengths.append(len(rows))
        crc.append(zlib.crc32(rows.view(np.uint8)))
        events += [[index, int(t), int(i)] for t, i in np.argwhere(column(rows, "events"))]
    write_about(folder, spec, settings, complete=True, lengths=lengths, events=events, crc=crc,
                content=content.hexdigest())


class Dataset:
    """A complete dataset, memory-mapped. UserError: missing, incomplete, damaged, empty.

    spec, lengths (n,), skills (n names), fingerprint (sha256 of the episodes), frames_total,
    offsets (n + 1,): first frame of each episode in their concatenation,
    events (E, 3): episode, row and task of each event.
    """

    def __init__(self, path):
        self.path, about = Path(path), read_about(path)
        if not about["complete"]:
            raise UserError(f"got {path}, incomplete; need all episodes; do: '{about['command']}'")
        if not about["lengths"]:
            raise UserError(f"got {path} without episodes; need at least one; do: record")
        self.spec, self.fingerprint = EnvSpec.from_json(about["spec"]), about["content"]
        self.lengths = np.array(about["lengths"])
        self.events = np.array(about["events"], np.int64).reshape(-1, 3)
        self.settings = about["settings"]
        self.skills = self.settings.get("skills") or ["-"] * len(self.lengths)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.frames_total = int(self.offsets[-1])
        self.crc = dict(enumerate(about.get("crc", ())))      # of the episodes still to be checked
        for i, length in enumerate(self.lengths):
            n = len(open_episode(episode_path(self.path, i), self.spec))
            if n != length:
                raise UserError(f"got {n} frames in {episode_path(self.path, i)}; need {length}; "
                                "do: restore the file or record again")
        self.rows = functools.lru_cache(256)(self.rows)       # bounds the number of open files
        self.fitting, self.showing = map(functools.cache, (self.fitting, self.showing))

    def rows(self, i):
        """Memory map of episode i. UserError when its bytes have changed (seen at first use)."""
        path = episode_path(self.path, i)
        rows, crc = open_episode(path, self.spec), self.crc.pop(i, None)
        if crc is not None and crc != zlib.crc32(rows.view(np.uint8)):
            self.crc[i] = crc
            raise UserError(f"got changed bytes in {path}; need those that were recorded; do: "
                            "restore that file, or delete it and record or import it again")
        return rows

    def episodes(self, split):
        """Indices of "train", "valid" (every 20th; the last of fewer than 20) or "all"."""
        every = np.arange(len(self.lengths))
        valid = (every % 20 == 19) | ((every == len(every) - 1) & (1 < len(every) < 20))
        return every[{"train": ~valid, "valid": valid, "all": every >= 0}[split]]

    def fitting(self, length, split, first):
        """Indices of the `first` episodes of a split (None: all) that have `length` rows."""
        episodes = self.episodes(split)
        return episodes[(self.lengths[episodes] >= length) & (
            episodes < (len(self.lengths) if first is None else first))]

    def showing(self, length, split, first, low, high, tasks):
        """Of the `events`, in order of their tasks, those that a window of `length` rows can have
        in one of its rows low .. high; for each task that is left its first index, and how many."""
        episode, row, kind = self.events.T
        fits = (row >= low) & (row - high <= self.lengths[episode] - length)
        events = self.events[fits & np.isin(episode, self.fitting(length, split, first))
                             & (np.isin(kind, tasks) | (len(tasks) == 0))]
        events = events[np.argsort(events[:, 2], kind="stable")]
        return events, *np.unique(events[:, 2], return_index=True, return_counts=True)[1:]

    def sample(self, rng, n, length, relevant=False, split="train", ahead=None, tasks=(),
               first=None):
        """Draw n windows of `length` rows inside episodes (the `first` ones, of those that the
        split has) -> episode, start, task: int64 (n,).

        Uniform: over all windows, with a random task. Relevant: a task uniformly among those that
        happen, one of its events, a window with that event in one of its rows `ahead`, (first,
        last), default (1, length - 1); the last may lie behind the window's end. tasks: indices,
        draw these alone.
        """
        episodes = self.fitting(length, split, first)
        if not len(episodes):
            raise UserError(f"got windows of {length} frames for {split!r} of {self.path}; need "
                            f"episodes as long, not {self.lengths.max()}; do: shorten the windows")
        if not relevant:
            ends = np.cumsum(self.lengths[episodes] - length + 1)
            number = rng.integers(0, ends[-1], n)             # of a window, in their concatenation
            which = np.searchsorted(ends, number, side="right")
            start = ends[which] - 1 - number                  # counts down from the last window
            return episodes[which], start, rng.choice(
                np.array(tasks or range(max(1, len(self.spec.tasks)))), n)
        low, high = ahead or (1, length - 1)
        events, begin, count = self.showing(length, split, first, low, high, tuple(tasks))
        if not len(events) or high < low:
            raise UserError(f"got {len(events)} events for relevant windows of {length} frames; "
                            "need an event and 2 frames; do: record more, or sample uniformly")
        which = rng.integers(len(begin), size=n)
        episode, row, task = events[begin[which] + rng.integers(count[which])].T
        last = np.minimum(row - low, self.lengths[episode] - length)
        return episode, rng.integers(np.maximum(0, row - high), last + 1), task

    def read(self, episode, start, length, fields=None):
        """Windows -> dict of arrays (n, length, ...): all fields but the probes, or `fields`."""
        kinds = {"categorical": np.int64, "continues": np.float32}
        windows = [self.rows(int(e))[s: s + length] for e, s in zip(episode, start, strict=True)]
        batch = {k: np.stack([column(rows, k) for rows in windows])
                 for k in fields or TYPES}
        return {k: v.astype(kinds.get(k, v.dtype), copy=False) for k, v in batch.items()}

    def episode(self, i):
        """All fields of an episode: dict of arrays (T, ...), views of the memory map."""
        rows = self.rows(int(i))
        return {k: column(rows, k) for k in {**TYPES, **rows.dtype.fields}}


def play_episode(env, seed, index, length, skill):
    """Play -> the arguments of write_episode from `frames` on; at most `length` frames."""
    rng, probe = rng_for(seed, "player", index), getattr(env, "probe", dict)
    rows = [(env.reset(seed + index), env.spec.actions.zeros(),
             np.zeros(len(env.spec.tasks), bool), True, probe())]
    player = env.player(rng, skill) if hasattr(env, "player") else None
    while len(rows) < length and rows[-1][3]:
        action = player.act() if player else env.spec.actions.sample(rng)
        frame, events, terminal = env.step(action)
        rows.append((frame, action, np.asarray(events) > 0, not terminal, probe()))
    frames, actions, events, continues, probes = zip(*rows, strict=True)
    actions, probes = ({k: [d[k] for d in dicts] for k in dicts[0]} for dicts in (actions, probes))
    return frames, actions, events, continues, None, probes


def branch_off(name, seed, actions, branches):
    """Play a world by its recorded actions (T, .), and from the frames in `branches`, a list of
    (t, other actions (n, .)), by other ones: a list of frames uint8 (n, H, W, 3) and their events
    (n, tasks). A film stands still where its world has ended."""
    env, films = make_env(name), {}
    frame = env.reset(seed)
    for t in range(max(t for t, _ in branches) + 1):
        if t:
            frame = env.step({k: x[t] for k, x in actions.items()})[0]
        for i in (i for i, (point, _) in enumerate(branches) if point == t):
            fork, film, events, terminal = copy_env(env), [frame], [], False
            if fork is None:
                raise UserError(f"got {name}, which can't be copied; need that to try other "
                                "actions in it; do: leave this measure out")
            for action in zip(*branches[i][1].values(), strict=True):
                done = np.zeros(len(env.spec.tasks), np.uint8)
                if not terminal:
                    there, done, terminal = fork.step(dict(zip(actions, action, strict=True)))
                film.append(there), events.append(done)
            films[i] = np.stack(film[1:]), np.stack(events)
    return [films[i] for i in range(len(branches))]


def worker(pipe, function, jobs):
    """Sends function(*job) of each job, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)              # the parent ends us
    try:
        for job in jobs:
            pipe.send(function(*job))
    except Exception as error:
        pipe.send(error)


def work(function, jobs, workers):
    """Yields each job with function(*job), from worker processes (0: one for each core)."""
    n = min(max(workers, 0) or os.cpu_count(), len(jobs))
    processes, pipes = start_workers(worker, [(function, jobs[i::n]) for i in range(n)])
    left = {pipe: jobs[i::n] for i, pipe in enumerate(pipes)}
    try:
        while any(left.values()):
            for pipe in wait([pipe for pipe in left if left[pipe]]):
                got = pipe.recv()
                if isinstance(got, Exception):
                    raise got
                yield left[pipe].pop(0), got
    except EOFError:
        raise UserError("got a worker that died (memory?); need it; do: use fewer --workers")
    finally:
        for process in processes:
            process.terminate()
            process.join()


def record_one(out, name, i, seed, length, skill):
    """Records episode i -> its length."""
    episode = play_episode(make_env(name), seed, i, length, skill)
    write_episode(out, i, *episode)
    return len(episode[0])


def begin(spec, out, settings):
    """Refuse other settings than the folder's, and too small a disk -> episodes to do or None."""
    old = {"settings": settings, "complete": False}
    if (out / "dataset.json").is_file():
        old = read_about(out)
    for key in (key for key in settings if settings[key] != old["settings"].get(key)):
        raise UserError(f"got {key} = {settings[key]} for {out}, begun with "
                        f"{old['settings'].get(key)}; need the same; do: use another --out")
    todo = []
    for i in range(settings["episodes"]):
        try:
            open_episode(episode_path(out, i), spec)
        except UserError:
            todo.append(i)
    if old["complete"] and not todo:
        return print(f"{out} is complete")
    need = len(todo) * settings["length"] * (3 * spec.height * spec.width + 128)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{out}: {len(todo)} episodes to record, at most {need / 1e6:.0f} MB", flush=True)
    if shutil.disk_usage(out).free < need:
        raise UserError(f"got {shutil.disk_usage(out).free / 1e6:.0f} MB free for {out}; need "
                        f"{need / 1e6:.0f}; do: make room, or record fewer or shorter episodes")
    flags = {**settings, "skills": None, "out": out}
    command = " ".join(f"--{k} {v}" for k, v in flags.items() if v is not None)
    write_about(out, spec, settings, complete=False, command=f"python data.py record {command}")
    return todo


def record(env, out, episodes, length, seed, workers=0, skill=None):
    """Record episodes of at most `length` frames, in the worlds seed + i; goes on if interrupted.

    The bytes are the same for any number of workers. Returns the Dataset.
    """
    spec, out, shares = make_env(env).spec, Path(out), [row[3] for row in SKILLS.values()]
    if episodes < 1 or length < 2 or seed < 0:
        raise UserError(f"got {episodes} episodes of {length} frames, seed {seed}; need at least "
                        "1, 2 and 0; do: correct them")
    skills = [skill or str(rng_for(seed, "skill", i).choice(list(SKILLS), p=shares))
              for i in range(episodes)]
    settings = {"env": env, "episodes": episodes, "length": length, "seed": seed, "skill": skill,
                "skills": skills}
    todo = begin(spec, out, settings)
    if todo is None:
        return Dataset(out)
    jobs = [(out, env, i, seed, length, skills[i]) for i in todo]
    try:
        with tqdm(total=length * len(todo), unit="frame", desc="record", disable=not todo) as bar:
            for _, frames in work(record_one, jobs, workers):
                bar.total -= length - frames                  # an early death shortens the whole
                bar.update(frames)
    finally:
        for part in out.glob("*.tmp"):                        # of a worker that was stopped
            part.unlink()
    finish_dataset(out, spec, settings)
    return Dataset(out)


def describe(dataset):
    """Markdown: share of the episodes in which each task was achieved, by skill; ladder first."""
    spec, skills = dataset.spec, np.array(dataset.skills)
    kinds = [k for k in (*SKILLS, "-") if k in dataset.skills] + ["all"]
    groups = [np.flatnonzero((skills == k) | (k == "all")) for k in kinds]
    dead = [dataset.rows(i)["continues"][-1] == 0 for i in range(len(skills))]
    table = {"task": kinds, "---": ["---"] * len(kinds), "episodes": [len(g) for g in groups],
             "frames": [dataset.lengths[g].sum() for g in groups],
             "died": [f"{100 * np.mean(np.array(dead)[g]):.0f} %" for g in groups]}
    for task in dict.fromkeys((*spec.rungs, *spec.tasks)):
        done = dataset.events[dataset.events[:, 2] == spec.tasks.index(task), 0]
        name = f"**{task}**" if task in spec.rungs else task
        table[name] = [f"{100 * np.isin(g, done).mean():.0f} %" for g in groups]
    return "\n".join(f"| {k} | " + " | ".join(map(str, row)) + " |" for k, row in table.items())


# ---------------------------------------------- real Minecraft: VPT recordings in, MineRL out
# After the published formats of OpenAI's recorder and of MineRL 1.0. README, "Not run here".

KEYBOARD = {"ESC": "escape", "back": "s", "drop": "q", "forward": "w", "inventory": "e",
            "jump": "space", "left": "a", "right": "d", "sneak": "left.shift",
            "sprint": "left.control", "swapHands": "f",
            **{f"hotbar.{i}": str(i) for i in range(1, 10)}}
MOUSE = ("attack", "use", "pickItem")                         # buttons 0, 1, 2
BUTTONS = tuple(sorted([*KEYBOARD, *MOUSE]))                  # MineRL's 23, in its order
WOODS = ("oak", "spruce", "birch", "jungle", "acacia", "dark_oak")
COUNTERS = {    # task: statistic, names in it; the table is ours, the paper's isn't public
    "mine_log": ("mine_block", *(f"{s}{w}_log" for s in ("", "stripped_") for w in WOODS)),
    "mine_cobblestone": ("mine_block", "stone", "cobblestone"),
    "mine_iron_ore": ("mine_block", "iron_ore"), "mine_coal": ("mine_block", "coal_ore"),
    "mine_diamond": ("mine_block", "diamond_ore"),
    "craft_planks": ("craft_item", *(f"{w}_planks" for w in (*WOODS, "crimson", "warped"))),
    **{f"craft_{x}": ("craft_item", x) for x in (
        "stick", "crafting_table", "furnace", "iron_ingot", "wooden_pickaxe", "stone_pickaxe",
        "iron_pickaxe")},
    **{f"open_{x}": ("custom", f"interact_with_{x}") for x in ("crafting_table", "furnace")},
    **{f"place_{x}": ("use_item", x) for x in ("crafting_table", "furnace")},
    **{f"use_{x}": ("use_item", x) for x in ("wooden_pickaxe", "stone_pickaxe", "iron_pickaxe")},
    "death": ("custom", "deaths")}                            # the last one is no task
COUNTER_OF = {f"minecraft.{kind}:minecraft.{name}": i
              for i, (kind, *names) in enumerate(COUNTERS.values()) for name in names}
LADDER = """mine_log 10 craft_planks 20 craft_crafting_table 1 place_crafting_table 1 craft_stick 4
craft_wooden_pickaxe 1 use_wooden_pickaxe 1 mine_cobblestone 3 craft_planks 4 craft_crafting_table 1
place_crafting_table 1 craft_stick 4 craft_stone_pickaxe 1 use_stone_pickaxe 1 mine_iron_ore 3
mine_cobblestone 8 craft_planks 4 craft_crafting_table 1 place_crafting_table 1 craft_furnace 1
craft_iron_ingot 3 craft_stick 2 craft_iron_pickaxe 1 use_iron_pickaxe 1 mine_diamond 0""".split()
RUNGS = """mine_log craft_planks craft_crafting_table craft_stick craft_wooden_pickaxe
mine_cobblestone craft_stone_pickaxe mine_iron_ore craft_furnace craft_iron_ingot
craft_iron_pickaxe mine_diamond""".split()                    # of the paper's success table
SEGMENT = 6000                                                # ticks of 50 ms, VPT's five minutes
GAP_MS, GAP_TICKS = 500, 10                                   # more between two lines is a pause
GUI_SCALE = {"5.7": 0.5, "5.8": 0.5, "6.7": 2, "6.8": 2, "6.9": 2}     # mouse, by recorder version
BROKEN = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
RETRY_SECONDS = 1.0                                           # doubles with each of five attempts


def parse_size(text):
    """ "128x128" -> (128, 128), height first."""
    if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):
        raise UserError(f"got size {text!r}; need HEIGHTxWIDTH; do: for example 128x128")
    return tuple(map(int, text.split("x")))


def minecraft_spec(height=128, width=128):
    """23 keys, a 121-class camera, 20 tasks, the paper's ladder (its times count items)."""
    return EnvSpec(f"minecraft_{height}x{width}", height, width, ActionSpec(23, (121,)),
                   tuple(COUNTERS)[:-1], tuple(zip(LADDER[::2], map(int, LADDER[1::2]))),
                   tuple(RUNGS))


def env_spec(name):
    """make_env(name).spec, for Minecraft without MineRL."""
    head, _, size = name.partition(":")
    return minecraft_spec(*parse_size(size or "128x128")) if head == "minerl" else \
        make_env(name).spec


def camera_class(degrees):
    """[pitch, yaw] in degrees (..., 2) -> class (...): 11 x 11 mu-law bins (mu 10, at most 10
    degrees, VPT's) in one number, counted on from no motion, which is 0 as in ActionSpec.zeros."""
    x = np.clip(np.asarray(degrees, np.float64), -10, 10)
    bins = np.round((np.sign(x) * np.log1p(np.abs(x)) / np.log(11) + 1) * 5).astype(np.int64)
    return (11 * bins[..., 0] + bins[..., 1] - 60) % 121


def camera_degrees(number):
    """Class (...) -> degrees (..., 2) at the bins' centres."""
    number = (np.asarray(number) + 60) % 121
    y = np.stack([number // 11, number % 11], -1) / 5 - 1
    return np.sign(y) * (11 ** np.abs(y) - 1)


def to_minerl(action):
    """Action dict of one step -> MineRL's: 23 keys of 0 and 1, camera float32 (2,)."""
    keys = {name: int(on) for name, on in zip(BUTTONS, action["binary"], strict=True)}
    return {**keys, "camera": camera_degrees(action["categorical"][0]).astype(np.float32)}


def from_minerl(command):
    """MineRL's action -> action dict of one step."""
    return {"binary": np.array([command[name] for name in BUTTONS], np.uint8),
            "categorical": camera_class(command["camera"])[None],
            "continuous": np.zeros(0, np.float32)}


class Counters:
    """Tasks from cumulative statistics, of a recording or of MineRL."""
    last = None                                               # the first that aren't empty: 0

    def rises(self, stats):
        """{"minecraft.KIND:minecraft.NAME": n} -> int64 (21,): by how much each of COUNTERS rose
        since the last statistics that weren't empty."""
        now = np.zeros(len(COUNTERS), np.int64)
        for key in stats.keys() & COUNTER_OF.keys():
            now[COUNTER_OF[key]] += stats[key]
        if not stats:
            return now
        rise = np.maximum(now - (now if self.last is None else self.last), 0)
        self.last = now
        return rise


@functools.lru_cache(8)
def area_weights(axis, n_in, n_out):
    """[(source index (n_out,), weight that fits (H, W, 3))] of each output pixel's area."""
    edge = np.arange(n_out + 1) * n_in / n_out
    index = edge[:-1].astype(int) + np.arange(-(-n_in // n_out) + 1)[:, None]
    weight = (np.minimum(index + 1, edge[1:]) - np.maximum(index, edge[:-1])).clip(0)
    weight = (weight / weight.sum(0)).astype(np.float32)
    return [(np.minimum(i, n_in - 1), w[:, None, None] if axis == 0 else w[:, None])
            for i, w in zip(index, weight, strict=True) if w.any()]


def fit_frame(frame, height, width):
    """uint8 (h, w, 3) -> (height, width, 3): means over areas. 360x640 becomes the paper's 384x640
    by 24 black rows below."""
    if frame.shape == (360, 640, 3) and (height, width) == (384, 640):
        return np.pad(frame, ((0, 24), (0, 0), (0, 0)))
    if frame.shape[:2] == (height, width):
        return np.ascontiguousarray(frame)
    for axis, n in enumerate((height, width)):
        frame = sum(np.take(frame, i, axis) * w
                    for i, w in area_weights(axis, frame.shape[axis], n))
    return (frame + 0.5).astype(np.uint8)


def draw_cursor(frame, x, y):
    """The frame with the cursor at x, y of the 1280x720 window, which the recorder leaves out."""
    x, y = (int(c * frame.shape[0] / 720) for c in (x, y))
    if 0 <= y < frame.shape[0] and 0 <= x < frame.shape[1]:
        frame = frame.copy()
        patch = frame[y: y + 16, x: x + 16]
        row, column = np.indices((*patch.shape[:2], 1))[:2]
        white = (0 < column) & (column < row - 1) & (column + row < 14)
        edge = (column <= row) & (column + row < 16)
        patch[:] = np.where(white, 255, np.where(edge, 0, patch))
    return frame


def parse_line(text, scale=1.0):
    """A line of the recorder -> MineRL action, hotbar slot or None, cursor or None, clock (ms,
    server tick), statistics, mouse buttons pressed now. One of BROKEN: it isn't such a line."""
    line = json.loads(text)
    mouse, gui = line["mouse"] or {}, bool(line["isGuiOpen"])
    keys, held = set((line["keyboard"] or {}).get("keys", ())), mouse.get("buttons", ())
    x, y, dx, dy = (float(mouse.get(k, 0)) for k in ("x", "y", "dx", "dy"))
    slot, clock = line.get("hotbar"), (line.get("milli"), line.get("serverTick"))
    if not np.isfinite([x, y, dx, dy]).all() or slot is not None and slot not in range(9):
        raise ValueError("mouse or hotbar out of range")
    action = {name: f"key.keyboard.{key}" in keys for name, key in KEYBOARD.items()}
    action.update({name: i in held for i, name in enumerate(MOUSE)})
    if gui and action["ESC"]:                                 # it closes the screen, as E does
        action["ESC"], action["inventory"] = False, True
    action["camera"] = np.array([dy, dx]) * 0.15 * (scale if gui else 1)    # degrees a count
    return (action, slot, (x, y) if gui and line["mouse"] else None, clock,
            dict(line.get("stats") or {}), list(mouse.get("newButtons", ())))


def read_lines(path, scale=1.0):
    """jsonl -> (columns, cursors, starts, lines in the file, fault or None).

    Line t acts on frame t, so its action lies in row t + 1 of the columns. starts: rows that begin
    a piece, after a pause or a death. Ends at the first line that is broken: the fault.
    """
    actions, events, cursors, starts, total, fault = [], [], [], {0}, 0, None
    counters, stuck, last_slot, last_clock = Counters(), False, None, (None, None)
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for total, text in enumerate((text for text in file if text.strip()), 1):
            if fault:                                         # count the rest
                continue
            try:
                action, slot, cursor, clock, stats, new = parse_line(text, scale)
                stuck = new == [0] if total == 1 else stuck and 0 not in new
                action["attack"] = action["attack"] and not stuck
                jumped = any(None not in (a, b) and not 0 <= b - a <= most for a, b, most in
                             zip(last_clock, clock, (GAP_MS, GAP_TICKS), strict=True))
                rises = counters.rises(stats)
            except BROKEN as error:
                fault = f"{path}, line {total}: {type(error).__name__} {str(error)[:60]}"
                continue
            if None not in (slot, last_slot) and slot != last_slot:     # a scroll leaves no key
                actions[-1]["binary"][BUTTONS.index(f"hotbar.{int(slot) + 1}")] = 1
            starts |= {total - 1} if jumped else set()
            starts |= {total} if rises[-1] else set()         # after the death
            actions.append(from_minerl(action)), cursors.append(cursor), events.append(rises > 0)
            last_slot, last_clock = slot, clock
    n, starts = len(actions), sorted(s for s in starts if s < len(actions))
    events = np.array(events, np.uint8).reshape(n, len(COUNTERS))
    columns = {"labelled": np.ones(n, bool), "events": events[:, :-1]}
    for k in ("binary", "categorical") if n else ():
        columns[k] = np.stack([actions[max(t - 1, 0)][k] for t in range(n)])
    for column in columns.values():
        column[starts] = 0                                    # what led there is not in the file
    return {**columns, "continues": 1 - events[:, -1]}, cursors, starts, total, fault


def video_frames(path, fps=None):
    """Frames uint8 (h, w, 3) of a video, one at a time: all as they are, or `fps` a second."""
    import imageio_ffmpeg                                     # of imageio[ffmpeg]
    # subtle: without passthrough ffmpeg repeats and drops frames to keep an even rate
    reader = imageio_ffmpeg.read_frames(
        str(Path(path).resolve()), input_params=["-threads", "1"],
        output_params=["-vf", f"fps={fps}"] if fps else ["-fps_mode", "passthrough", "-xerror"])
    width, height = next(reader)["size"]
    for frame in reader:
        yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)


def part_name(video):
    """Of its files while the import goes on; videos of one name may lie in two folders."""
    return f"{video.stem}-{zlib.crc32(str(video.resolve()).encode()):08x}"


def import_one(video, folder, size, fps=None):
    """Stream a video, and its jsonl unless fps is given, into FOLDER/NAME_I.npy; one frame is in
    memory at a time. -> report: rows of each piece, or why there are none; where it was cut."""
    spec, name, pieces, count = minecraft_spec(*size), part_name(video), {}, 0
    shapes = {"frames": (*size, 3), "binary": (23,), "categorical": (1,), "labelled": (),
              "events": (len(spec.tasks),), "continues": ()}
    row = np.zeros((), [(k, TYPES[k], shape) for k, shape in shapes.items()])
    frames, row["continues"], fault, reason = video_frames(video, fps), 1, None, None

    def write(file):
        nonlocal count
        head = {"descr": np.lib.format.dtype_to_descr(row.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**head, "shape": (0,)})     # room for any n
        for t in range(start, end):
            try:
                frame = next(frames, None)
            except (OSError, RuntimeError) as error:          # of ffmpeg: the video's fault
                raise ValueError(error) from None
            if frame is None:
                break
            for k in columns:
                row[k] = columns[k][t]
            row["frames"] = fit_frame(draw_cursor(frame, *cursors[t]) if cursors and cursors[t]
                                      else frame, *size)
            file.write(row.tobytes())
            count += 1
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**head, "shape": (count - start,)})

    try:
        if fps:
            columns, cursors, starts, total = {}, [], [0], None
        else:
            scale = GUI_SCALE.get(video.parent.name, 1)
            columns, cursors, starts, total, fault = read_lines(video.with_suffix(".jsonl"), scale)
            if fault and len(cursors) < 2 or not total:
                raise ValueError(fault or "no lines")
        while not pieces or count == end:                     # until the video ends
            i, start = len(pieces), count
            end = [*starts[1:], len(cursors)][i] if total else count + SEGMENT
            pieces[i] = 0
            write_whole(folder / f"{name}_{i}.npy", write)
            pieces[i] = count - start
            if total and end == len(cursors):
                break
        count += sum(1 for _ in frames)
        if total and abs(count - total) > 1:
            raise ValueError(f"{count} frames for {total} lines")
        if max(pieces.values()) < 2:
            raise ValueError(f"{count} frames")
    except UserError:                                         # no room: not the video's fault
        raise
    except (*BROKEN, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        pieces = {i: 0 for i in pieces}
    finally:
        frames.close()
    for i in [i for i, n in pieces.items() if n < 2]:         # a lone frame shows no action
        (folder / f"{name}_{i}.npy").unlink(missing_ok=True)
        del pieces[i]
    return {"video": str(video), "pieces": pieces, "skipped": reason, "fault": fault}


def guess_frames(video, fps):
    """About how many frames a video will give; an even guess from the first lines or header."""
    if fps:
        try:
            import imageio_ffmpeg
            return int(next(imageio_ffmpeg.read_frames(str(video.resolve())))["duration"] * fps)
        except (OSError, RuntimeError, StopIteration, KeyError):
            return 0
    with open(video.with_suffix(".jsonl"), "rb") as file:
        head = file.read(1 << 20)
    size = video.with_suffix(".jsonl").stat().st_size
    return round(head.count(b"\n") * size / max(len(head), 1)) + 1


def import_files(videos, out, size, workers=0, fps=None, lone=()):
    """Import videos into one dataset, in parallel; goes on if interrupted. Returns the Dataset.

    What can't be imported is named in one line, with the reason, and left out; so is lone
    {file: reason}, which the caller has named.
    """
    out, spec = Path(out), minecraft_spec(*size)
    names = [part_name(video) for video in videos]
    settings = {"size": list(size), "fps": fps,
                "videos": hashlib.sha256(" ".join(names).encode()).hexdigest()}
    old, parts, reports = {"settings": settings, "complete": False}, out / "parts", {}
    if (out / "dataset.json").is_file():
        old = read_about(out)
    numbered = any(out.glob("episode_*.npy"))                 # then no video may come or go
    for key in (k for k in settings if settings[k] != old["settings"].get(k)):
        if key != "videos" or numbered:
            raise UserError(f"got other {key} than {out} was begun with; need the same; do: use "
                            "another --out")
    if old["complete"]:
        print(f"{out} is complete")
        return Dataset(out)
    for video, name in zip(videos, names, strict=True):
        if (parts / f"{name}.json").is_file():
            reports[video] = json.loads((parts / f"{name}.json").read_text())
    todo = [v for v in videos if v not in reports or reports[v]["skipped"] and not numbered]
    need = sum(guess_frames(v, fps) for v in todo) * (3 * spec.height * spec.width + 48)
    parts.mkdir(parents=True, exist_ok=True)
    print(f"{out}: {len(todo)} of {len(videos)} videos to import, about {need / 1e6:.0f} MB",
          flush=True)
    if shutil.disk_usage(out).free < need:
        raise UserError(f"got {shutil.disk_usage(out).free / 1e6:.0f} MB free for {out}; need "
                        f"{need / 1e6:.0f}; do: make room, or import fewer or smaller frames")
    command = "python data.py " + " ".join(sys.argv[1:])
    write_about(out, spec, settings, complete=False, command=command)
    with tqdm(total=len(todo), unit="video", desc="import", disable=not todo) as bar:
        for (video, *_), got in work(import_one, [(v, parts, size, fps) for v in todo], workers):
            path, report = parts / f"{part_name(video)}.json", json.dumps(got).encode()
            write_whole(path, lambda file, report=report: file.write(report))
            reports[video] = json.loads(report)
            if got["skipped"] or got["fault"]:
                bar.write(f"{got['video']}: skipped: {got['skipped']}" if got["skipped"]
                          else f"{got['fault']}: the rest of it is left out")
            bar.update()
    pieces = [parts / f"{name}_{i}.npy" for video, name in zip(videos, names, strict=True)
              for i in reports[video]["pieces"]]
    skipped = {r["video"]: r["skipped"] for r in reports.values() if r["skipped"]}
    cut = sum(bool(r["fault"]) for r in reports.values() if not r["skipped"])
    whole, skipped = len(videos) - cut - len(skipped), {**dict(lone), **skipped}
    if not pieces:
        raise UserError(f"got {len(videos)} videos, none of which can be imported; need one; do: "
                        "see the reasons above")
    for index, piece in enumerate(pieces):
        if piece.exists():                                    # else moved before an interruption
            os.replace(piece, episode_path(out, index))
    finish_dataset(out, spec, {**settings, "skipped": skipped})
    shutil.rmtree(parts)
    print(f"{out}: {whole} videos whole, {cut} cut short, {len(skipped)} skipped; {len(pieces)} "
          "episodes", flush=True)
    return Dataset(out)


def import_vpt(src, out, size, part="all", workers=0):
    """Import the segments (NAME.mp4 and NAME.jsonl) in a folder and below it."""
    lines, films = ({path.with_suffix("") for path in Path(src).rglob(f"*{ending}")}
                    for ending in (".jsonl", ".mp4"))
    lone = {str(stem): f"no {'.mp4' if stem in lines else '.jsonl'}" for stem in lines ^ films}
    for stem in sorted(lone):
        print(f"{stem}: skipped: {lone[stem]} beside it")

    def session(stem):                                        # its segments stay on one side
        return zlib.crc32(re.sub(r"-\d{8}-\d{6}$", "", stem.name).encode()) % 20
    videos = [stem.with_name(stem.name + ".mp4") for stem in sorted(lines & films)
              if part == "all" or (part == "reference") == (session(stem) == 0)]
    if not videos:
        raise UserError(f"got no segments ({part}) in {src}; need NAME.mp4 with NAME.jsonl; do: "
                        "correct --src, or 'python data.py download-vpt'")
    return import_files(videos, out, size, workers, None, lone)


def import_video(videos, out, size, fps=20.0, workers=0):
    """Import any videos, without actions: every row is unlabelled."""
    if missing := [v for v in videos if not Path(v).is_file()]:
        raise UserError(f"got no file {missing[0]}; need videos; do: correct the path")
    if not 0 < fps < math.inf:
        raise UserError(f"got --fps {fps}; need frames a second above 0; do: leave it at 20")
    return import_files([Path(v) for v in videos], out, size, workers, fps)


def fetch(url, path, first):
    """Download url to path, going on from path.part -> None, or why there is nothing to keep.
    first: pattern of the content's first bytes, which an error page doesn't have."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(5):
        if attempt:
            tqdm.write(f"{url}: trying again ({failure})")
            time.sleep(RETRY_SECONDS * 2 ** attempt)
        have = part.stat().st_size if part.exists() else 0
        head = {"User-Agent": "dreamer4-mini", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            request = urllib.request.Request(url, headers=head)
            with urllib.request.urlopen(request, timeout=60) as answer:
                have = have if answer.status == 206 else 0    # else it starts from the beginning
                size = have + int(answer.headers.get("Content-Length") or -1)
                with open(part, "ab" if have else "wb") as file:
                    shutil.copyfileobj(answer, file, 1 << 20)
        except urllib.error.HTTPError as error:
            failure, offline = f"answer {error.code}", False
            if error.code == 416:                             # nothing is left: begin again
                part.unlink()
            elif error.code not in (408, 429, 500, 502, 503, 504):
                return failure
            continue
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise UserError(f"got {error}; need room; do: make some, the same command goes on")
            failure, offline = error, True
            continue
        failure, offline = "cut off", False
        with open(part, "rb") as file:
            good = re.match(first, file.read(16), re.DOTALL)
        if good and part.stat().st_size == size:
            return os.replace(part, path)
        if not good or part.stat().st_size > size:
            part.unlink()
        if not good:
            return "an error page"
    if offline:
        raise UserError(f"got no connection for {url} ({failure}); need the network; do: try later,"
                        " the same command goes on")
    return f"{failure}, five times"


def download_vpt(index, out, limit):
    """Download the first `limit` segments of an index file, one at a time."""
    try:
        content = json.loads(Path(index).read_text())
        base, relpaths = content["basedir"], list(map(str, content["relpaths"][:limit]))
        if not re.match("https?://", base):
            raise ValueError(f"basedir {base!r}")
    except (OSError, *BROKEN) as error:
        raise UserError(f"got {index} ({error}); need an index file of VPT with basedir and "
                        "relpaths; do: see the README, \"Minecraft\"")
    skipped = 0
    for relpath in tqdm(relpaths, "download", unit="segment"):
        stem = re.sub(r"\.mp4$", "", relpath).split("/")
        reason = None if all(re.fullmatch(r"(?a)\w[\w.+ -]*", x) for x in stem) else "unsafe name"
        local = Path(out, *stem[stem[0] == "data":])          # "data" may stand in either part
        url = f"{base.rstrip('/')}/".removesuffix("data/" * (stem[0] == "data"))
        for ending, first in ((".jsonl", rb"\s*{"), (".mp4", rb".{4}ftyp")):
            path = local.with_name(local.name + ending)
            if not reason and not path.exists():
                reason = fetch(url + urllib.parse.quote("/".join(stem)) + ending, path, first)
        if reason:
            skipped += 1
            tqdm.write(f"{relpath}: skipped: {reason}")
    print(f"{out}: {len(relpaths) - skipped} segments, {skipped} skipped")


class MineRL:
    """MineRL 1.0's HumanSurvival: from nothing, in a new world; 640x360 scaled to the given size.

    events: by how much each task's counter rose. Terminal: death, 72,000 steps, a broken game.
    """
    limit = 72_000                                            # 60 minutes

    def __init__(self, height=128, width=128):
        self.spec, self.game = minecraft_spec(height, width), self.make_game()

    def make_game(self):
        """The game; it starts with the first reset, which takes minutes."""
        try:
            specs = importlib.import_module("minerl.herobraine.env_specs.human_survival_specs")
            handlers = importlib.import_module("minerl.herobraine.hero.handlers")
        except ImportError as error:
            raise UserError(f"got no MineRL 1.0 ({error}); need it, with Java 8 and numpy < 1.24; "
                            "do: pip install git+https://github.com/minerllabs/minerl, see the "
                            "README, \"Minecraft\"")

        class Survival(specs.HumanSurvival):
            def create_observables(self):                     # deaths, opened tables and furnaces
                return [*super().create_observables(), handlers.ObserveFromFullStats("custom")]
        return Survival(fov_range=[70, 70], gamma_range=[2, 2], guiscale_range=[1, 1],
                        resolution=[640, 360], cursor_size_range=[16.0, 16.0], frameskip=1).make()

    def see(self, observation):
        """Keeps the frame -> by how much the counters rose."""
        self.frame = fit_frame(observation["pov"], self.spec.height, self.spec.width)
        return self.counters.rises({
            f"minecraft.{kind}:minecraft.{re.split('[.:]', name)[-1]}": int(n)
            for kind in {kind for kind, *_ in COUNTERS.values()} & observation.keys()
            for name, n in observation[kind].items()})

    def reset(self, seed):
        self.game.seed(int(seed))                             # of the next reset alone
        self.steps, self.counters = 0, Counters()
        self.see(self.game.reset())
        return self.frame

    def step(self, action):
        # ESC would end the episode; a screen is closed by `inventory`
        observation, _, done, info = self.game.step({**to_minerl(action), "ESC": 0})
        self.steps += 1
        if info.get("error"):                                 # then the observation is random
            print(f"MineRL broke off at step {self.steps}: {info['error']}", file=sys.stderr)
            return self.frame, np.zeros(len(self.spec.tasks), np.uint8), True
        rises = self.see(observation).clip(0, 255).astype(np.uint8)
        return self.frame, rises[:-1], bool(done or rises[-1] or self.steps >= self.limit)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("record", help="record play; goes on where it was interrupted")
    new.add_argument("--env", default="crafter", help="'crafter', 'minerl' or 'module:Class'")
    new.add_argument("--episodes", type=int, default=400)
    new.add_argument("--length", type=int, default=300, help="most frames in an episode")
    new.add_argument("--workers", type=int, default=0, help="0 = one per core")
    new.add_argument("--seed", type=int, default=0)
    new.add_argument("--skill", choices=list(SKILLS), help="default: a mix of all")
    new.add_argument("--out", required=True, help="folder")
    commands.add_parser("describe", help="what the players achieved").add_argument(
        "--data", required=True, help="folder")
    get = commands.add_parser("download-vpt", help="OpenAI's recordings of Minecraft players")
    get.add_argument("--index", required=True, help="index file: README, Minecraft")
    get.add_argument("--limit", type=int, default=10, help="segments of at most 5 minutes")
    vpt = commands.add_parser("import-vpt", help="those recordings become a dataset")
    vpt.add_argument("--src", required=True, help="folder with NAME.mp4 and NAME.jsonl")
    vpt.add_argument("--part", choices=("all", "train", "reference"), default="all",
                     help="reference: about every 20th session, train: the others")
    video = commands.add_parser("import-video", help="any videos, as play without actions")
    video.add_argument("videos", nargs="+", help="files")
    video.add_argument("--fps", type=float, default=20.0, help="frames a second to keep")
    get.add_argument("--out", required=True, help="folder")
    for importer in (vpt, video):
        importer.add_argument("--size", type=parse_size, default=(128, 128),
                              help="HEIGHTxWIDTH of the frames, default 128x128")
        importer.add_argument("--workers", type=int, default=0, help="0 = one per core")
        importer.add_argument("--out", required=True, help="folder")
    return parser


def main():
    flags = vars(make_parser().parse_args())
    command = flags.pop("command")
    if command == "download-vpt":
        return download_vpt(**flags)
    importers = {"record": record, "import-vpt": import_vpt, "import-video": import_video}
    dataset = importers[command](**flags) if command in importers else Dataset(flags["data"])
    print(describe(dataset))


if __name__ == "__main__":
    import data                                               # subtle: one copy of the classes
    data.run_cli(data.main)
