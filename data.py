"""Environments, recorded play and the dataset on disk (Dreamer 4, Sections 4.1 and 4.3).

ActionSpec, EnvSpec   what an action and an environment look like
make_env, VecEnv      Crafter (stands in for Minecraft), or your own class; many in parallel
CrafterPlayer         a scripted player who sees the whole map (stands in for the contractors)
Dataset               windows of episodes: half uniform, half relevant to a task (Section 4.1)
record, describe      the two commands
Time: row t holds the action that LED TO frame t, and what was received on reaching it.
"""
import argparse
import collections
import copy
import functools
import hashlib
import heapq
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import zlib
from dataclasses import asdict, dataclass
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


def run_cli(main):
    """Run main(); a UserError becomes one line and exit code 2, Ctrl-C one line and 130."""
    try:
        main()
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("interrupted: the same command goes on", file=sys.stderr) or 130)


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
    """The environment "crafter" or "module:Class"; UserError when there is none.

    It has: spec; reset(seed) -> frame uint8 (H, W, 3);
    step(action dict) -> (frame, events bool (n_tasks,), terminal bool).
    It may have: keys, {key of the browser game: action name};
    probe() -> dict of uint8 arrays, ground truth for evaluation only;
    reader() -> object that reads such symbols off pictures, see CrafterReader;
    player(rng, skill) -> object whose act() gives the action to record (else: random play).
    """
    module, _, cls = ("data:Crafter" if name == "crafter" else name).partition(":")
    try:
        return getattr(importlib.import_module(module), cls)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"got environment {name!r} ({error}); need 'crafter' or an importable "
                        "'module:Class'; do: check the name, pip install what is missing")


def controls(env):
    """What a person can press: dicts of label, key, part, index, value. Without `keys` an action
    gets an arrow by its name, or the next free letter."""
    spec, keys = env.spec, {name: key for key, name in getattr(env, "keys", {}).items()}
    sizes = spec.actions.categorical[:1]
    names = spec.action_names or [f"action {i}" for i in range(sum(sizes))]
    found = [(name, "categorical", 0, i) for i, name in enumerate(names)]
    found += [(f"key {i}", "binary", i, 1) for i in range(spec.actions.binary)]
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


class InsertionSet(dict):
    """A set that is iterated in the order of insertion, in every process."""
    def add(self, item):
        self[item] = None

    def remove(self, item):
        del self[item]


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
            name = self.rules.actions[self.rng.integers(6 if self.rng.random() < 0.8 else 17)]
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
        for plan in needs if len(self.stack) == 1 else ():
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
    envs, actions = [make_env(name) for _ in seeds], None
    while True:
        try:
            actions = pipe.recv()
        except EOFError:                                      # the parent closed, or died
            return
        events = np.zeros((len(envs), len(envs[0].spec.tasks)), bool)
        if actions is None:
            frames = np.stack([env.reset(seed) for env, seed in zip(envs, seeds, strict=True)])
            terminal = np.zeros(len(envs), bool)
        for i in np.flatnonzero(~terminal) if actions else ():
            frames[i], events[i], terminal[i] = envs[i].step({k: v[i] for k, v in actions.items()})
        pipe.send((frames, events, terminal))


class VecEnv:
    """N environments, one per seed, in worker processes (0 = one per core).

    A finished environment is not stepped any more: it repeats its last frame, without events.
    """

    def __init__(self, name, seeds, workers=0):
        self.spec, workers = make_env(name).spec, min(workers or os.cpu_count(), len(seeds))
        self.parts = np.array_split(np.arange(len(seeds)), workers)
        jobs = [(name, [int(seeds[i]) for i in part]) for part in self.parts]
        self.processes, self.pipes = start_workers(env_worker, jobs)

    def _exchange(self, messages):
        for pipe, message in zip(self.pipes, messages, strict=True):
            pipe.send(message)
        return tuple(map(np.concatenate, zip(*[pipe.recv() for pipe in self.pipes], strict=True)))

    def reset(self):
        """-> frames uint8 (N, H, W, 3)."""
        return self._exchange([None] * len(self.parts))[0]

    def step(self, actions):
        """dict of (N, ...) -> frames (N, H, W, 3), events bool (N, n_tasks), terminal bool (N,)."""
        return self._exchange([{k: np.asarray(v)[part] for k, v in actions.items()}
                               for part in self.parts])

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def episode_path(folder, index):
    return Path(folder) / f"episode_{index:05d}.npy"


def write_whole(path, write):
    """Call write(file) on a temporary name; the real name appears when all of it is on disk."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


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
    """A field of an episode's rows, (T, ...); fields of width zero are not in the file."""
    return rows[name] if name in rows.dtype.names else np.zeros((len(rows), 0), TYPES[name])


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
    for fault in (text for text, there in faults.items() if there):
        raise UserError(f"got {path}: {fault}; need rows as write_episode says; do: correct them")


def write_about(folder, spec, settings, **more):
    about = {"version": VERSION, "spec": spec.to_json(), "settings": settings, **more}
    write_whole(Path(folder) / "dataset.json", lambda f: f.write(json.dumps(about).encode()))


def read_about(folder):
    try:
        about = json.loads((Path(folder) / "dataset.json").read_text())
        if about["version"] == VERSION:
            return about
        raise ValueError(f"version {about['version']}, not {VERSION}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"got {folder} without a dataset.json to read ({error}); need a dataset; "
                        f"do: 'python data.py record --out {folder}', or correct the path")


def finish_dataset(folder, spec, settings):
    """Check all episodes, then write dataset.json; settings["skills"] may name each one's skill."""
    content, lengths, events = hashlib.sha256(), [], []
    for index in range(len(list(Path(folder).glob("episode_*.npy")))):
        path = episode_path(folder, index)
        rows = open_episode(path, spec)
        check_episode(path, rows, spec)
        content.update(path.read_bytes())
        lengths.append(len(rows))
        events += [[index, int(t), int(i)] for t, i in np.argwhere(column(rows, "events"))]
    write_about(folder, spec, settings, complete=True, lengths=lengths, events=events,
                split="valid: every 20th (i % 20 == 19)", content=content.hexdigest())


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
        self.lengths, self.events = np.array(about["lengths"]), np.array(about["events"])
        self.settings = about["settings"]
        self.skills = self.settings.get("skills") or ["-"] * len(self.lengths)
        self.events = self.events.reshape(-1, 3).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.frames_total = int(self.offsets[-1])
        self.rows = functools.lru_cache(256)(self.rows)       # bounds the number of open files
        for i, length in enumerate(self.lengths):
            if len(self.rows(i)) != length:
                raise UserError(f"got {len(self.rows(i))} frames in {episode_path(self.path, i)}; "
                                f"need {length}; do: restore the file or record again")

    def rows(self, i):
        return open_episode(episode_path(self.path, i), self.spec)

    def episodes(self, split):
        """Indices of "train", "valid" (every 20th; the last of fewer than 20) or "all"."""
        every = np.arange(len(self.lengths))
        valid = (every % 20 == 19) | ((every == len(every) - 1) & (1 < len(every) < 20))
        return every[{"train": ~valid, "valid": valid, "all": every >= 0}[split]]

    def sample(self, rng, n, length, relevant=False, split="train"):
        """Draw n windows of `length` rows inside episodes -> episode, start, task: int64 (n,).

        Uniform: over all windows, with a random task. Relevant: a task uniformly among those that
        happen, one of its events, a window with that event in rows 1 .. length - 1.
        """
        episodes = self.episodes(split)
        episodes = episodes[self.lengths[episodes] >= length]
        if not len(episodes):
            raise UserError(f"got windows of {length} frames for {split!r} of {self.path}; need "
                            f"episodes as long, not {self.lengths.max()}; do: shorten the windows")
        if not relevant:
            ends = np.cumsum(self.lengths[episodes] - length + 1)
            number = rng.integers(0, ends[-1], n)             # of a window, in their concatenation
            which = np.searchsorted(ends, number, side="right")
            start = ends[which] - 1 - number                  # counts down from the last window
            return episodes[which], start, rng.integers(0, max(1, len(self.spec.tasks)), n)
        events = self.events[np.isin(self.events[:, 0], episodes)]
        if not len(events) or length < 2:
            raise UserError(f"got {len(events)} events for relevant windows of {length} frames; "
                            "need an event and 2 frames; do: record more, or sample uniformly")
        task = rng.choice(np.unique(events[:, 2]), n)
        episode, row, _ = np.array([rng.choice(events[events[:, 2] == t]) for t in task]).T
        last = np.minimum(row - 1, self.lengths[episode] - length)
        return episode, rng.integers(np.maximum(0, row - length + 1), last + 1), task

    def read(self, episode, start, length, fields=None):
        """Windows -> dict of arrays (n, length, ...): all fields but the probes, or `fields`."""
        types = {"categorical": np.int64, "continues": np.float32}
        windows = [self.rows(int(e))[s: s + length] for e, s in zip(episode, start, strict=True)]
        batch = {k: np.stack([column(rows, k) for rows in windows])
                 for k in fields or TYPES}
        return {k: v.astype(types.get(k, v.dtype), copy=False) for k, v in batch.items()}

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
        rows.append((frame, action, events, not terminal, probe()))
    frames, actions, events, continues, probes = zip(*rows, strict=True)
    actions, probes = ({k: [d[k] for d in dicts] for k in dicts[0]} for dicts in (actions, probes))
    return frames, actions, events, continues, None, probes


def branch_off(name, seed, actions, branches):
    """Play a world by its recorded actions (T, .), and from the frames in `branches`, a list of
    (t, other actions (n, .)), by other ones: a list of frames uint8 (n, H, W, 3). A film stands
    still where its world has ended."""
    env, films = make_env(name), {}
    frame = env.reset(seed)
    for t in range(max(t for t, _ in branches) + 1):
        if t:
            frame = env.step({k: x[t] for k, x in actions.items()})[0]
        for i in (i for i, (point, _) in enumerate(branches) if point == t):
            fork, film, terminal = copy_env(env), [frame], False
            if fork is None:
                raise UserError(f"got {name}, which can't be copied; need that to try other "
                                "actions in it; do: leave this measure out")
            for action in zip(*branches[i][1].values(), strict=True):
                if not terminal:
                    frame_there, _, terminal = fork.step(dict(zip(actions, action, strict=True)))
                film.append(frame_there)
            films[i] = np.stack(film[1:])
    return [films[i] for i in range(len(branches))]


def record_worker(pipe, out, name, indices, seed, length, skills):
    """Sends the length of each episode that it has recorded, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)              # the parent ends us
    try:
        for i in indices:
            episode = play_episode(make_env(name), seed, i, length, skills[i])
            write_episode(out, i, *episode)
            pipe.send(len(episode[0]))
    except Exception as error:
        pipe.send(error)


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
    n = min(workers or os.cpu_count(), len(todo))
    jobs = [(out, env, todo[i::n], seed, length, skills) for i in range(n)]
    processes, pipes = start_workers(record_worker, jobs)
    left = {pipe: len(job[2]) for pipe, job in zip(pipes, jobs, strict=True)}
    try:
        with tqdm(total=length * len(todo), unit="frame", desc="record", disable=not todo) as bar:
            while any(left.values()):
                for pipe in wait([pipe for pipe in left if left[pipe]]):
                    got = pipe.recv()
                    if isinstance(got, Exception):
                        raise got
                    left[pipe] -= 1
                    bar.total -= length - got                 # an early death shortens the whole
                    bar.update(got)
    except EOFError:
        raise UserError("got a worker that died (memory?); need it; do: use fewer --workers")
    finally:
        for process in processes:
            process.terminate()
            process.join()
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


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("record", help="record play; goes on where it was interrupted")
    new.add_argument("--env", default="crafter", help="'crafter' or 'module:Class'")
    new.add_argument("--episodes", type=int, default=400)
    new.add_argument("--length", type=int, default=300, help="most frames in an episode")
    new.add_argument("--workers", type=int, default=0, help="0 = one per core")
    new.add_argument("--seed", type=int, default=0)
    new.add_argument("--skill", choices=list(SKILLS), help="default: a mix of all")
    new.add_argument("--out", required=True, help="folder")
    commands.add_parser("describe", help="what the players achieved").add_argument(
        "--data", required=True, help="folder")
    return parser


def main():
    flags = vars(make_parser().parse_args())
    is_record = flags.pop("command") == "record"
    print(describe(record(**flags) if is_record else Dataset(flags["data"])))


if __name__ == "__main__":
    import data                                               # subtle: one copy of the classes
    data.run_cli(data.main)
