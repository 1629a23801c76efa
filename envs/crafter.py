"""Crafter: environment, recorded player, symbol reader, interaction scripts."""
import collections
import heapq
import importlib
import sys

import numpy as np
from tqdm import tqdm

from data import (
    ActionSpec,
    EnvSpec,
    copy_env,
    finish_dataset,
    make_env,
    ratio,
    rng_for,
    write_episode,
)


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
INTERACTIONS = 2            # version of the scripts and of how their contexts are chosen


# ------------------------------------------------------------------ symbols: does it obey the rules

INTERACTION_SEED = 40_000


def in_sight(before, after):
    """Probes (N, ...) of two frames -> which cells of `after` show terrain that could be known,
    bool (N, 9, 7): they lay open in the view of `before`; and what was there (N, 9, 7)."""
    dx, dy = (after["probe_player"][:, 2:].astype(int)
              - before["probe_player"][:, 2:]).T[:, :, None, None]
    column, row = np.arange(9)[:, None] + dx, np.arange(7) + dy         # (N, 9, 1), (N, 1, 7)
    inside = (column >= 0) & (column < 9) & (row >= 0) & (row < 7)
    was = before["probe_semantic"][np.arange(len(dx))[:, None, None], column.clip(0, 8),
                                   row.clip(0, 6)]
    terrain = lambda x: (x >= 1) & (x <= 12)
    return inside & terrain(was) & terrain(after["probe_semantic"]), was


def caused(change):
    """Inventory changes (N, 16) that an action causes: items, and eating and drinking; health,
    hunger, thirst and tiredness come by themselves."""
    by_action = change != 0
    by_action[:, [0, 3]] = False
    by_action[:, 1:3] &= change[:, 1:3] > 0
    return by_action


def symbol_counts(reader, frames, before, after):
    """Dreamed frames (N, H, W, 3) against the probes of the true ones (`after`) -> counts (N,).

    before: probes of the last frame that the model was shown. Cells count in daylight only.
    """
    player = after["probe_player"]
    texture, items, _ = reader.read(frames, player[:, 0] / 255, player[:, 1] > 0)
    cells, true, old = reader.semantic[texture], after["probe_semantic"], before["probe_semantic"]
    day = (player[:, 0] >= 128) & (player[:, 1] == 0) & (before["probe_player"][:, 1] == 0)
    known = in_sight(before, after)[0] & day[:, None, None]
    changed = known & (true != old)
    total = lambda mask: mask.sum((1, 2))
    change = after["probe_inventory"].astype(int) - before["probe_inventory"]
    guess = items - before["probe_inventory"].astype(int)
    real, dreamed = caused(change), caused(guess)
    return {"known": total(known), "right": total(known & (cells == true)),
            "right_repeat": total(known & (old == true)), "changed": total(changed),
            "changed_right": total(changed & (cells == true)),
            "hits": (real & dreamed & (change == guess)).sum(1),
            "events": real.sum(1), "claims": dreamed.sum(1)}


def in_cave(semantic):
    """probe_semantic (..., 9, 7) -> bool (...): more than half is rock, ore, lava or path."""
    return np.isin(semantic, (3, 4, 7, 8, 9, 10)).mean((-2, -1)) > 0.5


# -------------------------------------------------------------------- interactions (Section 4.2)

def interactions(player):
    """What can be tried from where a CrafterPlayer stands: {name: (script of action names, change
    of the inventory, cells walked)}. The last two say what must come of it in the real game."""
    me, world, rules, have = player.me, player.world, player.rules, player.have
    ahead = np.array(me.facing)
    side = np.array((-ahead[1], ahead[0]))
    name = lambda v: MOVES[tuple(int(c) for c in v)]
    F, B, D, U = map(name, (ahead, -ahead, side, -side))
    cell = lambda x, y=0: world[me.pos + x * ahead + y * side]
    free = lambda *cells: all(cell(*c)[0] in rules.walkable and not cell(*c)[1] for c in cells)
    owns = lambda uses: all(have[k] >= n for k, n in uses.items())
    material, thing = cell(1)
    found, still, away = {}, (0, 0), tuple(ahead)
    for move, action in MOVES.items():
        there, creature = player.ahead(move)
        if there in rules.walkable and not creature:
            found[action.replace("move", "walk")] = [action], {}, move
        if there == "water":
            found["stopped_by_water"] = [action], {}, still
    item, kind = {"tree": ("wood", "cut_a_tree"), "water": ("drink", "drink"),
                  "stone": ("stone", "mine_stone")}.get(material, (material, "mine_ore"))
    diggable = item in ("wood", "drink", "stone", "coal", "iron", "diamond")
    if diggable and not thing and have[item] < 9 and (item == "drink" or player.can_dig(material)):
        found[kind] = ["do"], {item: 1}, still
    for item in ("stone", "table", "furnace"):
        rule = rules.place[item]
        if not thing and material in ("grass", "sand", "path") and owns(rule["uses"]):
            found[f"place_{item}"] = ([f"place_{item}"],
                                      {k: -n for k, n in rule["uses"].items()}, still)
    for tool, rule in rules.make.items():
        near = world.nearby(me.pos, 1)[0]
        if owns(rule["uses"]) and set(rule["nearby"]) <= set(near) and not have[tool]:
            kind = "make_a_pickaxe" if "pickaxe" in tool else "make_a_sword"
            found[kind] = ([f"make_{tool}"],
                           {tool: 1} | {k: -n for k, n in rule["uses"].items()}, still)
    damage = max([1, *(n for n, k in ((2, "wood"), (3, "stone"), (5, "iron"))
                       if have[f"{k}_sword"])])
    if type(thing).__name__ == "Cow" and thing.health <= damage and have["food"] < 9:
        found["eat_a_cow"] = ["do"], {"food": min(6, 9 - have["food"])}, still
    if all(cell(i) == ("stone", None) for i in (1, 2, 3)) and player.can_dig("stone"):
        found["tunnel"] = ["do", F] * 3, {"stone": min(3, 9 - have["stone"])}, tuple(3 * ahead)
    if free((1,), (2,), (3,), (4,), (5,)):
        found["look_away_and_back"] = [F] * 5 + [B] * 5, {}, still
    if have["energy"] < 9 and world.daylight > 0.6:
        found["sleep"] = ["sleep"] * 2, {}, still
    stone = "place_stone"
    if have["stone"] >= 3 and free((1,), (-1,), (-2,), (-3,)):
        found["wall_of_three"] = ([stone, B, B, F, stone, B, B, F, stone], {"stone": -3},
                                  tuple(-2 * ahead))
    if have["stone"] >= 6 and free((1, 0), (-1, 0), (-2, 0), (-1, 1), (0, 1), (1, 1), (2, 1),
                                   (-2, 2), (-1, 2), (0, 2), (1, 2)):
        found["closed_ring"] = ([stone, B, B, F, stone, D, D, F, stone, B, B, F, stone, U, F, F,
                                 stone, B, stone], {"stone": -6}, tuple(side))
    return found


def try_script(env, kind, script, gain, walked):
    """Play a script in this copy of the real game -> [(frame, action, probe)], or None where a
    creature, the night or a full pack spoils it, or where the last frame already looks right."""
    names, items = env.spec.action_names, list(env.env._player.inventory)
    before, rows, shows = env.probe(), [], []
    for step in script:
        action = env.spec.actions.zeros()
        action["categorical"][0] = names.index(step)
        frame, _, terminal = env.step(action)
        rows.append((frame, action, env.probe()))
        if terminal:
            return None
        pair = [{k: x[None] for k, x in probe.items()} for probe in (before, rows[-1][2])]
        known = in_sight(*pair)[0]
        shows.append(ratio(known & (pair[1]["probe_semantic"] != pair[0]["probe_semantic"]), known))
    after = rows[-1][2]
    change = dict(zip(items, after["probe_inventory"].astype(int) - before["probe_inventory"],
                      strict=True))
    right = all(change[k] == n for k, n in gain.items()) and not any(
        change[k] for k in items[4:] if k not in gain)
    there = tuple(after["probe_player"][2:].astype(int) - before["probe_player"][2:]) == walked
    if kind == "stopped_by_water":      # moving would have looked different
        axis = 0 if script[0] in ("move_left", "move_right") else 1
        cells = np.moveaxis(before["probe_semantic"], axis, 0)
        shows = [(cells[1:] != cells[:-1]).mean()]
    visible = gain or kind == "sleep" or max(shows) > 0.2
    return rows if right and there and visible and after["probe_player"][0] >= 128 else None


def record_interactions(env_name, path, each=20, context=16, worlds=150, seed=INTERACTION_SEED):
    """Contexts of natural play in held-out worlds, each continued by the script of an interaction
    in a copy of the real game: an episode each, `context` true frames and the script's."""
    env, kinds = make_env(env_name), []
    for w in tqdm(range(worlds), desc="interactions"):
        env.reset(seed + w)
        player = env.player(rng_for(seed, "interactions", w), ("skilled", "average")[w % 2])
        rows, last = collections.deque(maxlen=context), {}
        for step in range(400):
            action = player.act()
            frame, _, terminal = env.step(action)
            rows.append((frame, action, env.probe()))
            if terminal:
                break
            if len(rows) < context or player.me.sleeping or player.world.daylight < 0.5:
                continue
            for kind, plan in interactions(player).items():
                if kinds.count(kind) >= each or step - last.get(kind, -50) < 50:
                    continue                                # 50 steps apart: not one scene twice
                if film := try_script(copy_env(env), kind, *plan):
                    frames, actions, probes = zip(*rows, *film, strict=True)
                    turn = lambda dicts: {k: [d[k] for d in dicts] for k in dicts[0]}
                    write_episode(path, len(kinds), frames, turn(actions),
                                  np.zeros((len(frames), len(env.spec.tasks))),
                                  np.ones(len(frames)), None, turn(probes))
                    kinds.append(kind)
                    last[kind] = step
    finish_dataset(path, env.spec, {"env": env_name, "kinds": kinds, "context": context,
                                    "seed": seed, "version": INTERACTIONS})


def judge(reader, kind, dreamed, real, before, after):
    """Does a dreamed frame show the right outcome? (N, H, W, 3) twice and the probes of the last
    frame shown and of the true outcome -> bool (N,). All of: the player as in the real frame, every
    item's count right, every cell that was altered right, and 9 in 10 of the known cells."""
    light, asleep = after["probe_player"][:, 0] / 255, after["probe_player"][:, 1] > 0
    texture, items, _ = reader.read(dreamed, light, asleep)
    player = texture[:, 4, 3] == reader.read(real, light, asleep)[0][:, 4, 3]
    if kind == "sleep":                 # grey all over: more like sleep than like waking
        costs = [reader.distances(dreamed, light, np.full(len(light), s)).min(-1).mean(-1)
                 for s in (False, True)]
        return player & (costs[1] < costs[0])
    true = after["probe_inventory"].astype(int)
    by_action = caused(true - before["probe_inventory"])
    by_action[:, 4:] = True
    known, was = in_sight(before, after)
    right = reader.semantic[texture] == after["probe_semantic"]
    altered = known & (was != after["probe_semantic"])
    under = before["probe_semantic"].copy()             # a stone where the player stood before
    under[:, 4, 3] = 2
    placed = in_sight(before | {"probe_semantic": under}, after)[0] & (after["probe_semantic"] == 3)
    altered |= placed & ~known
    return (player & ((items == true) | ~by_action).all(1) & (right | ~altered).all((1, 2))
            & ((known & right).sum((1, 2)) >= 0.9 * known.sum((1, 2))))
