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
import functools
import hashlib
import heapq
import importlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import types
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


def run_cli(main):
    """Run main(); what a user can put right becomes one line and exit code 2, Ctrl-C and SIGTERM
    one line and 130 and 143."""
    def stop(number, frame):
        raise KeyboardInterrupt(128 + number)
    try:
        signal.signal(signal.SIGTERM, stop)
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


def check_config(prefix, cfg, zero=()):
    """UserError where a setting has another type than its default, or is out of range: whole
    numbers count from 1 (those in `zero` from 0), others are finite and from 0."""
    for field in fields(cfg):
        value, kind = getattr(cfg, field.name), field.type
        low = int(kind is int and field.name not in zero)
        right = type(value) in (kind, int) if kind is float else type(value) is kind
        if not right or kind in (int, float) and not low <= value < math.inf:
            need = f"{kind.__name__} from {low}" if kind in (int, float) else kind.__name__
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
    """The environment "crafter" or "module:Class"; UserError when there is none.

    It has: spec; reset(seed) -> frame uint8 (H, W, 3);
    step(action dict) -> (frame, events bool (n_tasks,), terminal bool).
    It may have: probe() -> dict of uint8 arrays, ground truth for evaluation only;
    player(rng, skill) -> object whose act() gives the action to record (else: random play).
    """
    module, _, cls = ("data:Crafter" if name == "crafter" else name).partition(":")
    try:
        return getattr(importlib.import_module(module), cls)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"got environment {name!r} ({error}); need 'crafter' or an importable "
                        "'module:Class'; do: check the name, pip install what is missing")


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

    def __init__(self):
        self.crafter = importlib.import_module("crafter")
        names = self.crafter.constants
        rungs = ("collect_wood", "place_table", "make_wood_pickaxe", "collect_stone",
                 "make_stone_pickaxe", "place_furnace", "collect_coal", "collect_iron",
                 "make_iron_pickaxe", "collect_diamond")
        times = {"collect_wood": 5, "collect_stone": 5, "collect_diamond": 0}
        self.spec = EnvSpec("crafter", 72, 72, ActionSpec(categorical=(len(names.actions),)),
                            tuple(names.achievements), tuple((r, times.get(r, 1)) for r in rungs),
                            rungs, tuple(names.actions))

    def reset(self, seed):
        """A new Env per world, as Crafter numbers the resets of an Env."""
        self.env = self.crafter.Env(size=(72, 72), length=10 ** 9, seed=int(seed))
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
        """True cells [column, row] (9, 7) around the player (0 = outside) and inventory (16,)."""
        # subtle: rendering again would draw from the world's random stream at night
        x, y = self.env._player.pos
        cells = np.pad(self.env._sem_view(), 4)[x: x + 9, y + 1: y + 8]
        inventory = np.array(list(self.env._player.inventory.values()), np.uint8)
        return {"probe_semantic": cells.astype(np.uint8), "probe_inventory": inventory}

    def player(self, rng, skill):
        return CrafterPlayer(self.env, rng, skill)


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


def write_whole(path, write, keep=None):
    """Call write(file) on a temporary name; the real name appears when all of it is on disk, and
    the file of before gets the name `keep`. UserError where the disk is full or read-only: nothing
    is left of the attempt."""
    part = path.with_suffix(".tmp")
    try:
        with open(part, "wb") as file:
            # subtle: given a real file, np.save writes through C and on a full disk says nothing
            write(types.SimpleNamespace(write=file.write, flush=file.flush))
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # RuntimeError: torch.save on a full disk
        if part.is_file():
            part.unlink()
        raise UserError(f"got no room or no right to write {path} ({error}); need both; do: see to "
                        "it, then the same command goes on from what was written before") from None


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
        content.update(path.read_bytes())
        lengths.append(len(rows))
        crc.append(zlib.crc32(rows.view(np.uint8)))
        events += [[index, int(t), int(i)] for t, i in np.argwhere(column(rows, "events"))]
    write_about(folder, spec, settings, complete=True, lengths=lengths, events=events, crc=crc,
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
        self.skills = about["settings"].get("skills") or ["-"] * len(self.lengths)
        self.events = self.events.reshape(-1, 3).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.frames_total = int(self.offsets[-1])
        self.crc = dict(enumerate(about.get("crc", ())))      # of the episodes still to be checked
        for i, length in enumerate(self.lengths):
            n = len(open_episode(episode_path(self.path, i), self.spec))
            if n != length:
                raise UserError(f"got {n} frames in {episode_path(self.path, i)}; need {length}; "
                                "do: restore the file or record again")
        self.rows = functools.lru_cache(256)(self.rows)       # bounds the number of open files

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
