"""Crafter (Hafner, 2021), in place of Minecraft: all that this repository knows of it.

Crafter              the environment: frames of 72x72, 17 actions, 22 achievements as events
CrafterReader        reads map cells and inventory off a frame, real or dreamed
CrafterPlayer        a scripted player who knows what was in view (the paper's contractors)
record_interactions  scripted interactions, to be judged in dreams by judge() (Section 4.2)
A frame shows 9x7 cells of 8x8 pixels, the player's in the middle; arrays are [column, row].
"""
import collections
import functools
import heapq
from types import SimpleNamespace

import gymnasium
import numpy as np
from gymnasium import spaces
from scipy.ndimage import binary_dilation, uniform_filter
from tqdm import tqdm

from data import Episode, UserError, copy_env, finish_dataset, rng_for, write_episode
from envs.gym import Gym

try:
    import crafter
except ImportError:                                  # optional: make() says how to get it
    crafter = None

if crafter:                                          # reads its pictures for each world
    crafter.engine.Textures = functools.cache(crafter.engine.Textures)

MOVES = {(-1, 0): "move_left", (1, 0): "move_right",
         (0, -1): "move_up", (0, 1): "move_down"}
LAND = ("grass", "sand", "path")                     # what can be walked on
CAVE = np.isin(np.arange(256), (3, 4, 7, 8, 9, 10))  # of probe_semantic: stone, path, ores
# the ten achievements that a score counts, and how often each is prompted (0 = no end)
PROMPTS = {"collect_wood": 5, "place_table": 1, "make_wood_pickaxe": 1, "collect_stone": 5,
           "make_stone_pickaxe": 1, "place_furnace": 1, "collect_coal": 1,
           "collect_iron": 1, "make_iron_pickaxe": 1, "collect_diamond": 0}
# prompts between: a shelter takes 20 steps, dusk comes at 140; in 100 steps 5 of 9 drinks
# are gone
NEEDS = (("wake_up", 1, 120, 240), ("collect_drink", 3, 100, 100), ("eat_cow", 1, 200, 150))
# chances in a step of a random action, of dithering, of a detour, and, where lava is in
# view, of walking into it: no dream knows what no recording shows; share of the episodes
Skill = collections.namedtuple("Skill", "noise dither detour dare share")
SKILLS = {"skilled": Skill(0.01, 0.002, 0.001, 0.0, 0.45),
          "average": Skill(0.08, 0.010, 0.006, 0.03, 0.25),
          "novice": Skill(0.25, 0.020, 0.015, 0.2, 0.15),
          "clumsy": Skill(0.55, 0.030, 0.030, 0.2, 0.05),
          "curious": Skill(0.08, 0.010, 0.006, 0.2, 0.1)}


def make(argument):
    """The environment "crafter". UserError: an argument, or Crafter is not installed."""
    if argument:
        raise UserError(f"crafter:{argument}", "crafter alone", f"leave out {argument!r}")
    if crafter is None:
        raise UserError("no package crafter", "it to play", "pip install crafter")
    return Gym(Crafter(), "crafter")


@functools.cache
def picture(material, thing=None):
    """A cell of 8x8 pixels: a material's number (0: outside), perhaps a thing's picture on
    it -> uint8 (8, 8, 3) by day, float (8, 8, 3) what night mixes with it."""
    canvas = np.full((8, 8, 3), 127, np.uint8)
    textures = crafter.engine.Textures(crafter.constants.root / "assets")
    if material:
        name = crafter.constants.materials[material - 1]
        canvas[:] = textures.get(name, (8, 8))[..., :3]
    if thing:
        crafter.engine._draw_alpha(canvas, np.zeros(2, int), textures.get(thing, (8, 8)))
    view = crafter.engine.LocalView(SimpleNamespace(area=(64, 64)), textures, (9, 7))
    return canvas, 2 * view._light(canvas, 0.5) - canvas    # half of each, and no noise


@functools.cache
def grounds():
    """picture() of all materials: (13, 8, 8, 3) twice."""
    numbers = range(len(crafter.constants.materials) + 1)
    return tuple(map(np.stack, zip(*map(picture, numbers), strict=True)))


class QuickView:
    """Draws what Crafter's own view of the map does, to the pixel, from whole cells."""

    def __init__(self, view):
        self.view = view

    def __call__(self, player, unit):
        world, corner = self.view._world, player.pos - (4, 3)
        first, last = np.maximum(corner, 0), np.minimum(corner + (9, 7), world.area)
        there = tuple(map(slice, first, last))
        here = tuple(map(slice, first - corner, last - corner))
        cells, things = np.zeros((2, 9, 7), int)
        cells[here], things[here] = world._mat_map[there], world._obj_map[there]
        day, night = (ground[cells] for ground in grounds())
        for i, j in np.argwhere(things):
            thing = world._objects[things[i, j]].texture
            day[i, j], night[i, j] = picture(int(cells[i, j]), thing)
        day, night = (x.swapaxes(1, 2).reshape(72, 56, 3) for x in (day, night))
        light = world.daylight
        if light < 0.5:                              # with noise over all of it
            canvas = self.view._light(day, light)
        else:
            canvas = light * day + (1 - light) * night
        return self.view._sleep(canvas) if player.sleeping else canvas


class QuickItems:
    """Draws the inventory as Crafter does, each only once."""

    def __init__(self, view):
        self.view, self.drawn = view, {}

    def __call__(self, inventory, unit):
        numbers = tuple(inventory.values())
        if numbers not in self.drawn:
            self.drawn = {numbers: self.view(inventory, unit)}
        return self.drawn[numbers]


class InsertionSet(dict):
    """A set that is iterated in the order of insertion, in every process."""
    add, remove = dict.setdefault, dict.__delitem__


class Crafter(gymnasium.Env):
    """Ends with death only. info["events"]: achievements of this step, each time."""
    keys = {"ArrowUp": "move_up", "ArrowLeft": "move_left", "ArrowDown": "move_down",
            "ArrowRight": "move_right", " ": "do", "z": "sleep", "r": "place_stone",
            "t": "place_table", "f": "place_furnace", "p": "place_plant",
            "1": "make_wood_pickaxe", "2": "make_stone_pickaxe", "3": "make_iron_pickaxe",
            "4": "make_wood_sword", "5": "make_stone_sword", "6": "make_iron_sword"}
    skills = {name: skill.share for name, skill in SKILLS.items()}
    observation_space = spaces.Box(0, 255, (72, 72, 3), np.uint8)
    prompt_order, achievements, needs = tuple(PROMPTS.items()), tuple(PROMPTS), NEEDS
    copyable = True

    def __init__(self):
        self.action_names = tuple(crafter.constants.actions)
        self.tasks = tuple(crafter.constants.achievements)
        self.action_space = spaces.Discrete(len(self.action_names))

    def reset(self, *, seed=None, options=None):
        """Each world is a new crafter.Env, which counts the resets of one."""
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2 ** 31)) if seed is None else int(seed)
        self.game = game = crafter.Env(size=(72, 72), length=10 ** 9, seed=seed)
        game._local_view = QuickView(game._local_view)
        game._item_view = QuickItems(game._item_view)
        frame = np.ascontiguousarray(game.reset())
        self.cells = game._sem_view()
        # subtle: Crafter draws from sets of objects, which are ordered by memory address
        world = game._world
        world._chunks = collections.defaultdict(InsertionSet)
        for thing in world.objects:
            world._chunks[world.chunk_key(thing.pos)].add(thing)
        return frame, {}

    def step(self, action):
        player = self.game._player
        before = dict(player.achievements)
        frame, reward, _, about = self.game.step(int(action))
        self.cells = about["semantic"]
        events = {task: 1 for task, n in player.achievements.items() if n > before[task]}
        dead = bool(player.health <= 0)
        return np.ascontiguousarray(frame), reward, dead, False, {"events": events}

    def probe(self):
        """True cells (9, 7) around the player (0 = outside), inventory (16,), (daylight *
        255, asleep, x, y), and 1 where the player is not in a cave; all uint8."""
        # subtle: rendering again would draw from the world's random stream at night
        player = self.game._player
        x, y = player.pos
        cells = np.pad(self.cells, 4)[x:x + 9, y + 1:y + 8].astype(np.uint8)
        light = round(255 * self.game._world.daylight)
        return {"probe_semantic": cells,
                "probe_inventory": np.array(list(player.inventory.values()), np.uint8),
                "probe_player": np.array([light, player.sleeping, x, y], np.uint8),
                "probe_above": np.array(not in_cave(cells), np.uint8)}

    def reader(self):
        return CrafterReader()

    def player(self, rng, skill):
        return CrafterPlayer(self.game, rng, skill)


# ---------------------------------------------------------------------------- symbol reader
def in_cave(semantic):
    """probe_semantic (..., 9, 7) -> bool (...): over half is rock, ore, lava or path."""
    return CAVE[semantic].mean((-2, -1)) > 0.5


def in_view(before, after):
    """Probes (N, ...) of two frames -> which cells of `after` lay in the view of `before`,
    bool (N, 9, 7), and what it showed there (N, 9, 7)."""
    moved = after["probe_player"][:, 2:].astype(int) - before["probe_player"][:, 2:]
    dx, dy = moved.T[:, :, None, None]               # (N, 1, 1) each
    column, row = np.arange(9)[:, None] + dx, np.arange(7) + dy       # as `before` has it
    inside = (column >= 0) & (column < 9) & (row >= 0) & (row < 7)
    clip = np.arange(len(dx))[:, None, None]
    return inside, before["probe_semantic"][clip, column.clip(0, 8), row.clip(0, 6)]


def in_sight(before, after):
    """The same for cells that show terrain in both, 1 to 12, for creatures move."""
    inside, was = in_view(before, after)
    now = after["probe_semantic"]
    return inside & (was >= 1) & (was <= 12) & (now >= 1) & (now <= 12), was


def caused(change):
    """Which inventory changes (N, 16) an action causes: of items, and eating and drinking;
    health, hunger, thirst and tiredness come by themselves."""
    by_action = change != 0
    by_action[:, :4] = (change[:, :4] > 0) & [False, True, True, False]
    return by_action


def tiles(x):
    """Pixels (N, 8 rows, 8 columns, 3) -> float32 (N, rows * columns, 192)."""
    N, H, W, _ = x.shape
    x = x.reshape(N, H // 8, 8, W // 8, 8, 3).swapaxes(2, 3)
    return x.reshape(N, H * W // 64, 192).astype(np.float32)


def grey(x):
    return np.repeat((x @ (0.299, 0.587, 0.114))[..., None], 3, -1)


class CrafterReader:
    """Finds the nearest texture for each cell of a frame, under its light; by day it reads
    real frames without a mistake. textures: names; semantic: their probe_semantic."""
    LEGAL = 20.0        # further (rms of 0..255) from all textures is nothing that exists
    NIGHT, SLEEP = np.array([0, 16, 64]), np.array([0, 0, 16])      # tints, mixed by half
    NOISE, SPREAD = 79.5, 27.4                       # of night: mean and standard deviation

    def __init__(self):
        art = crafter.engine.Textures(crafter.constants.root / "assets")
        # a thing may stand on several grounds
        sides = [action.removeprefix("move_") for action in MOVES.values()]
        things = ["cow", "zombie", "skeleton", "plant", "plant-ripe", "player-sleep"]
        things = dict.fromkeys([*things, *(f"player-{side}" for side in sides)], LAND)
        things |= {f"arrow-{side}": (*LAND, "water", "lava") for side in sides}
        materials = crafter.constants.materials
        self.textures = ("outside", *materials, *things)
        ids = "outside", *materials, "player", "cow", "zombie", "skeleton", "arrow", "plant"
        self.classes = ids                           # by their number in probe_semantic
        self.semantic = np.array([ids.index(name.split("-")[0]) for name in self.textures])
        # all pictures of a cell, (P, 8, 8, 3), and the number of the texture in each
        pictures, numbers = [np.full((8, 8, 3), 127.0)], [0]
        for number, name in enumerate(self.textures[1:], 1):
            for ground in things.get(name, (name,)):
                canvas = art.get(ground, (8, 8))[..., :3].astype(float)
                if name in things:
                    thing = art.get(name, (8, 8))
                    crafter.engine._draw_alpha(canvas, np.zeros(2, int), thing)
                pictures.append(canvas.swapaxes(0, 1))
                numbers.append(number)
        pictures, self.number = np.stack(pictures), np.array(numbers)
        # their colours of day and of night, (192, P); asleep both are grey and darker
        dull = grey(pictures)
        flat = [x.reshape(len(x), 192).T.astype(np.float32)
                for x in (pictures, 0.4 * pictures + 0.6 * dull, dull / 2)]
        self.awake, self.asleep = (flat[0], flat[1]), (flat[2], flat[2])
        # night's noise covers the edges of the view, not its middle
        x, y = np.meshgrid(np.linspace(-1, 1, 72), np.linspace(-1, 1, 56))
        self.edge = 1 - np.exp(-2 * (x ** 2 + y ** 2))[..., None]
        # the inventory's 18 fields, each with the counts from 0 to 9, (18, 10, 192)
        view, items = crafter.engine.ItemView(art, (9, 2)), crafter.constants.items
        fields = [view(dict.fromkeys(items, n), np.array((8, 8))) for n in range(10)]
        self.counts = tiles(np.stack(fields).swapaxes(1, 2)).swapaxes(0, 1)

    def distances(self, frames, light, asleep):
        """Mean squared distances (N, 63, P) of the cells of frames (N, 72, 72, 3) to all
        pictures under a light (N,) in [0, 1]; what noise must add to them is taken off."""
        light = np.asarray(light)[:, None, None, None]
        sleeping = np.asarray(asleep, bool)[:, None, None, None]
        # Crafter mixes a picture by light with its colours of night, which are tinted and,
        # when dark, noisy: pixel = light * picture + veil * night + haze, +- spread
        noise = np.clip(1 - 2 * light, 0, 1) * self.edge              # (N, 56, 72, 1)
        veil = 0.5 * (1 - light) * (1 - noise)
        haze = 0.5 * (1 - light) * (self.NOISE * noise + self.NIGHT)
        haze = np.where(sleeping, (grey(haze) + self.SLEEP) / 2, haze)
        spread = 0.5 * (1 - light) * self.SPREAD * noise / (1 + sleeping)
        # |y - a p - v f|^2 multiplied out, so that pictures p, f enter by matrix products
        y = tiles(frames[:, :56] - haze)             # (N, 63, 192)
        v, a = tiles(np.repeat(veil, 3, -1)), light[:, :, :, 0].astype(np.float32)
        out = np.empty((*y.shape[:2], len(self.number)), np.float32)
        for state, (p, f) in ((False, self.awake), (True, self.asleep)):
            i = sleeping.ravel() == state
            out[i] = (a[i] ** 2 * (p ** 2).sum(0) + 2 * a[i] * (v[i] @ (p * f))
                      + v[i] ** 2 @ f ** 2 - 2 * (a[i] * (y[i] @ p) + (v[i] * y[i]) @ f))
        rest = (y ** 2).sum(-1) - tiles(np.repeat(spread ** 2, 3, -1)).sum(-1)
        return (out + rest[..., None]) / 192

    def read(self, frames, light=None, asleep=None):
        """uint8 (N, 72, 72, 3) -> texture numbers (N, 9, 7), inventory (N, 16) and the rms
        distance of each cell (N, 9, 7). Without a light the likeliest one is taken."""
        frames = np.asarray(frames).astype(np.float32)
        if light is None:
            tries = [(x, state) for state in (0, 1) for x in np.linspace(0, 1, 11)]
            costs = [self.distances(frames, *np.full((len(frames), 2), pair).T)
                     .min(-1).mean(-1) for pair in tries]
            light, asleep = np.array(tries)[np.argmin(costs, 0)].T
        distances = self.distances(frames, light, asleep)
        texture = self.number[distances.argmin(-1)].reshape(-1, 7, 9).swapaxes(1, 2)
        error = np.sqrt(np.maximum(distances.min(-1), 0)).reshape(-1, 7, 9).swapaxes(1, 2)
        items = tiles(frames[:, 56:])[:, :, None] - self.counts      # (N, 18, 10, 192)
        items = np.square(items).sum(-1).argmin(-1)
        return texture, items[:, :16], error

    def compare(self, frames, true, shown=None):
        """Frames (N, 72, 72, 3) against probes of the true ones -> {measure: (a (N,), b
        (N,))}: it is sum(a) / sum(b). Cells count by day only. shown: probes of the frame
        shown last to a model that dreamed these, so that only what it could know counts."""
        player, have = true["probe_player"], true["probe_inventory"].astype(int)
        texture, items, _ = self.read(frames, player[:, 0] / 255, player[:, 1] > 0)
        cells = true["probe_semantic"].reshape(-1, 63)
        right = self.semantic[texture].reshape(-1, 63) == cells
        day, held = (player[:, 0] >= 128) & (player[:, 1] == 0), have > 0
        if shown is None:
            return {"cells": (right.sum(1) * day, 63 * day),
                    "inventory": ((held & (items == have)).sum(1), held.sum(1))}
        # a copy of the last frame shown gets those cells wrong that have changed
        day &= shown["probe_player"][:, 1] == 0      # asleep, it saw little
        visible = in_sight(shown, true)[0].reshape(-1, 63) & day[:, None]
        changed = visible & (shown["probe_semantic"].reshape(-1, 63) != cells)
        # a true positive has the item and the number that an action changed
        before = shown["probe_inventory"].astype(int)
        real, dreamed = caused(have - before), caused(items - before)
        true_positives = (real & dreamed & (have == items)).sum(1)
        return {"visible_cells": ((visible & right).sum(1), visible.sum(1)),
                "wrong_cells": ((visible & ~right).sum(1), changed.sum(1)),
                "changed_cells": ((changed & right).sum(1), changed.sum(1)),
                "inventory_f1": (2 * true_positives, real.sum(1) + dreamed.sum(1))}

    def by_class(self, frames, true, shown=None):
        """As compare -> {class: (right (N,), cells (N,))} of what a cell truly shows, for a
        mean over all cells hides the rare ones. With `shown` cells that lay in its view."""
        player, cells = true["probe_player"], true["probe_semantic"]
        texture, _, _ = self.read(frames, player[:, 0] / 255, player[:, 1] > 0)
        day = (player[:, 0] >= 128) & (player[:, 1] == 0)
        counted = np.repeat(day, 63).reshape(cells.shape)
        if shown is not None:
            counted &= in_view(shown, true)[0]
        pairs = {}
        for number, name in enumerate(self.classes):
            of_class = counted & (cells == number)
            right = of_class & (self.semantic[texture] == number)
            pairs[name] = right.sum((1, 2)), of_class.sum((1, 2))
        return pairs


# -------------------------------------------------------------------------- recorded player
def around(mask):
    """Cells with a cell of the mask (64, 64) in their 3x3."""
    return binary_dilation(mask, np.ones((3, 3)))


def shortest_path(cost, goal, start):
    """Dijkstra over costs (64, 64) of entering a cell, from `start` to the nearest cell of
    the mask `goal` -> (cost, cells on the way); (inf, []) where none can be reached."""
    # flat lists with a border that nobody enters: neighbours are 1 or `side` places away
    side = len(cost) + 2
    cost = np.pad(cost, 1, constant_values=np.inf).ravel().tolist()
    goal = np.pad(goal, 1).ravel().tolist()
    start = int((start[0] + 1) * side + start[1] + 1)
    heap, best, came_from = [(0, start)], {start: 0}, {}
    while heap:
        total, here = heapq.heappop(heap)
        if goal[here]:
            path = [here]
            while path[-1] in came_from:
                path.append(came_from[path[-1]])
            return total, [(i // side - 1, i % side - 1) for i in path[-2::-1]]
        for there in (here - 1, here + 1, here - side, here + side):
            if total + cost[there] < best.get(there, np.inf):
                best[there] = total + cost[there]
                came_from[there] = here
                heapq.heappush(heap, (best[there], there))
    return np.inf, []


class CrafterPlayer:
    """Plays towards the diamond. Like a person it knows of the map what its frames have
    shown, of creatures those that they show now. Plans are generators of action names on a
    stack; needs interrupt the career. A plan reads all anew before each action, so that a
    slip costs time only, and returns whether it succeeded."""

    def __init__(self, env, rng, skill):
        self.rules, self.world, self.me = crafter.constants, env._world, env._player
        self.have, self.done = self.me.inventory, self.me.achievements
        self.map = np.zeros(self.world.area, int)    # material ids; 0: not seen yet
        self.rng, self.skill = rng, SKILLS[skill]
        self.digs = skill != "curious"
        self.stack, self.clock = [self.career() if self.digs else self.in_vain()], 0
        self.queue = []                              # actions of dithering
        self.retry = {}                              # plan: not again before this step
        self.sleepy = rng.choice([1, 2, 3])    # energy at which to go to sleep

    def act(self):
        """The next action, float32 (1,): as planned, or a slip."""
        self.clock += 1
        x, y = self.me.pos
        self.view = np.zeros(self.world.area, bool)
        self.view[max(x - 4, 0):x + 5, max(y - 3, 0):y + 4] = True
        self.map[self.view] = self.world._mat_map[self.view]
        name = planned = self.queue.pop() if self.queue else self.intend()
        if self.rng.random() < self.skill.noise:
            kinds = 6 if self.rng.random() < 0.4 else 17              # 6: noop, moves, do
            name = self.rules.actions[self.rng.integers(kinds)]
        if self.rng.random() < self.skill.dither:
            pairs = ["noop"] * 2, ["move_left", "move_right"], ["move_up", "move_down"]
            self.queue += pairs[self.rng.integers(3)] * int(self.rng.integers(1, 4))
        # no slip sends to sleep; one into lava shows what that does
        if name == "sleep" and planned != "sleep":
            name = "noop"
        index = self.rules.actions.index("sleep" if self.me.sleeping else name)
        return np.array([index], np.float32)

    def intend(self):
        """The name of the action of a player without slips."""
        for move, action in MOVES.items():
            if self.ahead(move)[1] in ("Zombie", "Skeleton"):
                return "do" if move == tuple(self.me.facing) else action
        light, have = self.world.daylight, self.have
        self.dark = light < 0.4                      # zombies come, on grass
        evening = light < 0.75 and self.clock % 300 > 90
        tired = have["energy"] <= (7 if evening else self.sleepy)
        # what is at hand is taken, what must be looked for can wait
        water, lava = self.cells("water") & self.view, self.cells("lava") & self.view
        cow = self.creatures("Cow")
        needs = {self.drink: have["drink"] <= (6 if water.any() else 1 if self.dark else 4),
                 self.eat: have["food"] <= (6 if cow.any() else 0 if self.dark else 3),
                 self.sleep: tired or have["health"] <= 3,
                 self.wander: self.rng.random() < self.skill.detour,
                 self.plant: self.rng.random() < self.skill.detour,
                 self.leap: lava.any() and self.rng.random() < self.skill.dare}
        for plan, needed in needs.items():
            if needed and self.clock >= self.retry.get(plan, 0) and len(self.stack) == 1:
                self.stack.append(plan())
                self.retry[plan] = self.clock + 30   # what it needs may be out of reach
        while (name := next(self.stack[-1], None)) is None:           # the plan has ended
            self.stack.pop()
        return name

    def ahead(self, move=None):
        """(material or None, kind of creature) in a direction; default: the one faced."""
        material, thing = self.world[self.me.pos + np.array(move or self.me.facing)]
        return material, type(thing).__name__ if thing else None

    def cells(self, *materials):
        """Where one of these is known to be (64, 64)."""
        return np.isin(self.map, [self.world._mat_ids[m] for m in materials])

    def creatures(self, *kinds):
        """Where one of these is to be seen (64, 64)."""
        mask = np.zeros(self.world.area, bool)
        for thing in self.world.objects:
            mask[tuple(thing.pos)] = type(thing).__name__ in kinds
        return mask & self.view

    def unknown(self, *beside):
        """Cells (64, 64) to walk to where nothing known serves: unseen ones that border on
        what was seen, of these materials if there are any, and best on much unseen."""
        unseen = self.map == 0
        border = unseen & around(~unseen)
        much = uniform_filter(unseen.astype(float), 7) > 0.3
        near = around(self.cells(*beside)) if beside else border
        for choice in (border & near & much, border & much, border):
            if choice.any():
                break
        return choice

    def enclosed(self):
        """The free cells around the player form a small closed room."""
        free = self.cells(*LAND)
        room = binary_dilation(self.creatures("Player"), iterations=4, mask=free)
        return room.sum() <= 4 and not (room & self.creatures("Zombie", "Skeleton")).any()

    def can_dig(self, material):
        rule = self.rules.collect.get(material, {"require": {"no such tool": 1}})
        tools = all(self.have.get(tool) for tool in rule["require"])
        return self.digs and tools and material != "water"

    def route(self, targets, touch):
        """The way to the nearest target of a mask (64, 64) -> (cost in steps, cells). Where
        touch, the target is only to be faced, so it may be solid."""
        # about how many steps a cell takes: digging, walking, bridging with a stone
        price = {name: 2.5 for name in self.rules.materials if self.can_dig(name)}
        price |= {"path": 1, "sand": 1, "grass": 8 if self.dark else 1}
        if self.have["stone"]:
            price["water"] = 4
        price = [1.5, *(price.get(name, np.inf) for name in self.rules.materials)]
        cost = np.take(price, self.map) + 3 * self.creatures("Cow")
        cost += 2 * around(around(self.creatures("Zombie", "Skeleton")))
        cost[self.creatures("Plant")] = np.inf
        if touch:
            cost[targets] = 1
        return shortest_path(cost, targets, self.me.pos)

    def go(self, find, touch=True, patience=200, beside=()):
        """Walk, dig and bridge until a target is faced (touch) or stood on. find: mask (64,
        64) of the targets, or a function that makes it anew in each step. Where it knows of
        none, it looks for one in the unknown beside those materials."""
        path = []
        for _ in range(patience):
            targets = find() if callable(find) else find
            here = tuple(map(int, self.me.pos))
            front = tuple(np.clip(self.me.pos + self.me.facing, 0, 63))
            if targets[front if touch else here]:
                return True
            if not targets.any():
                targets = self.unknown(*beside)
            # plan again where the target has gone, the path was left, or is an old one
            path = path[1:] if path and here == path[0] else path
            if not path or not targets[path[-1]] or self.clock % 16 == 0 \
                    or abs(path[0][0] - here[0]) + abs(path[0][1] - here[1]) != 1:
                path = self.route(targets, touch)[1]
            if not path:
                return False
            move = (path[0][0] - here[0], path[0][1] - here[1])
            material, creature = self.ahead(move)
            if tuple(self.me.facing) != move or (material in LAND and not creature):
                yield MOVES[move]                    # walks, or turns where it can't
            else:
                yield "place_stone" if material == "water" and not creature else "do"
        return False

    def collect(self, item, count):
        """Have `count` of a material, after making the tool for it."""
        source = {"wood": "tree"}.get(item, item)
        for tool in self.rules.collect[source]["require"]:
            if not (yield from self.make(tool)):
                return False
        beside = ("stone", "path") if item in ("coal", "iron", "diamond") else ()
        while self.have[item] < count:
            if not (yield from self.go(lambda: self.cells(source), beside=beside)):
                return False
            yield "do"
        return True

    def make(self, tool):
        """Have a tool: its materials, a table (and furnace) in the 3x3, then the action."""
        rule = self.rules.make[tool]
        while not self.have[tool]:
            for item in sorted(rule["uses"], reverse=True):      # wood, stone, iron, coal
                if not (yield from self.collect(item, rule["uses"][item])):
                    return False
            if not (yield from self.bench("furnace" in rule["nearby"])):
                return False
            yield f"make_{tool}"
        return True

    def bench(self, furnace=True):
        """Stand by a table (and furnace): the nearest, or new ones where it is quicker."""
        table = around(self.cells("table"))
        both = table & around(self.cells("furnace"))
        if furnace and self.route(both, False)[0] < 16:
            return (yield from self.go(both, touch=False))
        if furnace and not (yield from self.collect("stone", 4)):
            return False
        if self.route(table, False)[0] < (8 if self.have["wood"] > 2 else 25):
            yield from self.go(table, touch=False)
        elif not ((yield from self.collect("wood", 3))
                  and (yield from self.place("table"))):
            return False
        stay = around(self.cells("table"))
        return not furnace or (yield from self.place("furnace", stay))

    def place(self, item, stay=None):
        """Put an item ahead; turn, dig or step aside (within `stay`) until that works."""
        before = self.done[f"place_{item}"]
        for _ in range(25):
            material, creature = self.ahead()
            if not creature and material in self.rules.place[item]["where"]:
                yield f"place_{item}"
            elif not creature and material != "tree" and self.can_dig(material):
                yield "do"
            else:
                move = list(MOVES)[self.rng.integers(4)]
                there = tuple(np.clip(self.me.pos + move, 0, 63))
                if stay is None or stay[there] or self.ahead(move)[0] not in LAND:
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

    def leap(self):
        """Walk into lava."""
        if (yield from self.go(lambda: self.cells("lava"), patience=15)):
            yield MOVES[tuple(map(int, self.me.facing))]

    def wander(self):
        """Walk towards a random cell some way off."""
        spots = self.cells("path", "path" if self.dark else "grass")
        spots = np.argwhere(spots | self.creatures("Player"))
        spots = spots[np.abs(spots - self.me.pos).sum(1) < 20]
        target = np.zeros(self.world.area, bool)
        target[tuple(self.rng.choice(spots))] = True
        yield from self.go(target, touch=False, patience=25)
        yield "noop"

    def sleep(self):
        """Dig two cells into rock, step back, close the entrance with a stone; recover."""
        for _ in range(3):
            rock = ~around(self.cells(*LAND, "lava")) & self.cells("stone")
            if self.enclosed() or not self.have["stone"] \
                    or not (yield from self.go(rock, touch=False, patience=40)):
                break
            inwards = tuple(map(int, self.me.facing))
            yield MOVES[(-inwards[0], -inwards[1])]
            yield "place_stone"
            yield MOVES[inwards]                     # blows reach over corners
        safe = self.enclosed()
        while self.have["energy"] < (9 if safe else 2):
            yield "sleep"
        for _ in range(120):                         # till dawn, or till it hurts
            hurt = self.have["health"] < 5 or self.world.daylight < 0.35
            if safe and hurt and min(self.have["food"], self.have["drink"]) > 0:
                yield "noop"

    def in_vain(self):
        """Hits what it takes a tool to dig, and never has one. Else no recording would show
        that this stays, and agents would learn in dreams to dig without. It takes no wood
        on its way, so that no hit is imitated as the way to wood."""
        kinds = ("stone", "coal", "iron", "diamond")
        while True:
            known = [kind for kind in kinds if self.cells(kind).any()] or ["stone"]
            kind = known[self.rng.integers(len(known))]
            if (yield from self.go(lambda kind=kind: self.cells(kind), patience=40)):
                for _ in range(self.rng.integers(2, 9)):
                    yield "do"
            if self.rng.random() < 0.5:
                yield from self.wander()
            yield list(MOVES.values())[self.rng.integers(4)]

    def career(self):
        """Wood, table, pickaxes, furnace, iron, diamond; then whatever is left."""
        sword, better_sword = self.rng.random(2) < (0.8, 0.95)
        yield from self.collect("wood", self.rng.integers(5, 7))
        yield from self.make("wood_pickaxe")
        if sword:
            yield from self.make("wood_sword")
        yield from self.collect("wood", 8)           # two tables by the rock, tools
        yield from self.collect("stone", 7)
        yield from self.make("stone_pickaxe")
        if better_sword:
            yield from self.make("stone_sword")
        yield from self.bench()
        yield from self.collect("coal", 1)
        while not (yield from self.collect("diamond", 1)):
            yield from self.wander()
        while True:
            more = self.collect("diamond", self.have["diamond"] + 1)
            plans = self.make("iron_sword"), more, self.wander(), self.plant(), self.eat()
            yield from plans[self.rng.integers(3 if self.dark else 5)]
            yield "noop"


# --------------------------------------------------------------- interactions (Section 4.2)
INTERACTIONS = 3            # version of the scripts and of how their contexts are chosen
# actions to try, {item: change of its number} and cells walked that must come of them
Script = collections.namedtuple("Script", "actions gain walked", defaults=((0, 0),))
DIGGING = {"tree": "cut_a_tree", "water": "drink", "stone": "mine_stone",
           "coal": "mine_ore", "iron": "mine_ore", "diamond": "mine_ore"}
# letters: forward, back, right, left, place a stone
WALKS = {"look_away_and_back": "FFFFFBBBBB", "wall_of_three": "SBBFSBBFS",
         "closed_ring": "SBBFSRRFSBBFSLFFSBS"}


def interactions(player):
    """What can be tried from where a CrafterPlayer stands: {kind: Script}."""
    found = {}
    for move, action in MOVES.items():
        material, creature = player.ahead(move)
        if material in LAND and not creature:
            found[action.replace("move", "walk")] = Script([action], {}, move)
        if material == "water":
            found["stopped_by_water"] = Script([action], {})
    return found | deeds(player) | travels(player)


def deeds(player):
    """Scripts of one action: dig or drink, place, make a tool, eat a cow."""
    found, have, rules = {}, player.have, player.rules
    material, thing = player.world[player.me.pos + player.me.facing]
    item = {"tree": "wood", "water": "drink"}.get(material, material)
    can = material == "water" or player.can_dig(material)
    if material in DIGGING and not thing and can and have[item] < 9:
        found[DIGGING[material]] = Script(["do"], {item: 1})
    # things to place, on land, and tools that it does not have
    places = ("stone", "table", "furnace") if material in LAND and not thing else ()
    recipes = {f"place_{item}": rules.place[item] for item in places}
    recipes |= {f"make_{tool}": rules.make[tool] for tool in rules.make if not have[tool]}
    near = player.world.nearby(player.me.pos, 1)[0]
    for action, rule in recipes.items():
        affordable = all(have[item] >= n for item, n in rule["uses"].items())
        if affordable and set(rule.get("nearby", ())) <= set(near):
            gain = {item: -n for item, n in rule["uses"].items()}
            kind = action
            if action.startswith("make_"):
                gain[action.removeprefix("make_")] = 1
                kind = "make_a_" + action.split("_")[-1]
            found[kind] = Script([action], gain)
    # a cow that the next blow kills
    swords = {"wood_sword": 2, "stone_sword": 3, "iron_sword": 5}
    damage = max([1, *(n for sword, n in swords.items() if have[sword])])
    if type(thing).__name__ == "Cow" and thing.health <= damage and have["food"] < 9:
        found["eat_a_cow"] = Script(["do"], {"food": min(6, 9 - have["food"])})
    return found


def travels(player):
    """Longer scripts: through rock, asleep, out of sight and back, around stones placed."""
    found, have, me = {}, player.have, player.me
    ahead = np.array(me.facing)
    right = np.array((-ahead[1], ahead[0]))
    moves = {"F": ahead, "B": -ahead, "R": right, "L": -right}
    names = {letter: MOVES[tuple(move.tolist())] for letter, move in moves.items()}
    rock = [player.world[me.pos + n * ahead] for n in (1, 2, 3)] == [("stone", None)] * 3
    if rock and player.can_dig("stone"):
        gain = {"stone": min(3, 9 - have["stone"])}
        found["tunnel"] = Script(["do", names["F"]] * 3, gain, tuple(3 * ahead))
    if have["energy"] < 9 and player.world.daylight > 0.6:
        found["sleep"] = Script(["sleep"] * 2, {})
    for kind, letters in WALKS.items():
        # each cell that is walked on or filled must be free now
        place, front, free = me.pos, ahead, True
        for letter in letters:
            front = moves.get(letter, front)
            place = place + (0 if letter == "S" else front)
            material, thing = player.world[place + front if letter == "S" else place]
            free = free and material in LAND and thing in (None, me)
        stones = letters.count("S")
        if free and have["stone"] >= stones:
            actions = [names.get(letter, "place_stone") for letter in letters]
            gain = {"stone": -stones} if stones else {}
            found[kind] = Script(actions, gain, tuple(place - me.pos))
    return found


def try_script(env, kind, script):
    """Play a script in this copy of the real game -> rows (frame, action, probe); None: a
    creature, the night or a full pack spoils it, or a copied frame would look right."""
    start, rows = env.probe(), []
    for name in script.actions:
        action = np.array([env.spec.action_names.index(name)], np.float32)
        frame, _, terminal = env.step(action)
        rows.append((frame, action, env.probe()))
        if terminal:
            return None
    # the pack, the place and the light must be as they should
    probes = {k: np.stack([start[k], *(row[2][k] for row in rows)]) for k in start}
    pack, player = probes["probe_inventory"].astype(int), probes["probe_player"].astype(int)
    change = dict(zip(env.game._player.inventory, pack[-1] - pack[0], strict=True))
    items = [*script.gain, *list(change)[4:]]        # health, food, ... come and go
    right = all(change[item] == script.gain.get(item, 0) for item in items)
    walked = tuple(player[-1, 2:] - player[0, 2:])
    if not right or walked != script.walked or player[-1, 0] < 128:
        return None
    # some frame must look different, or would have if a step had not been stopped
    if script.gain or kind == "sleep":
        return rows
    cells = probes["probe_semantic"]
    if kind == "stopped_by_water":
        axis = 0 if script.actions[0] in ("move_left", "move_right") else 1
        share = (np.diff(cells[0], axis=axis) != 0).mean()
    else:
        visible = in_sight({k: x[:1].repeat(len(rows), 0) for k, x in probes.items()},
                         {k: x[1:] for k, x in probes.items()})[0]
        changed = (visible & (cells[1:] != cells[0])).sum((1, 2))
        share = (changed / np.maximum(visible.sum((1, 2)), 1)).max()
    return rows if share > 0.2 else None


def natural_play(env, world, context, seed):
    """Play a held-out world; yields step, player and the last `context` rows, by day."""
    env.reset(seed + world)
    skill = ("skilled", "average")[world % 2]
    player = env.player(rng_for(seed, "interactions", world), skill)
    rows = collections.deque(maxlen=context)
    for step in range(400):
        action = player.act()
        frame, _, terminal = env.step(action)
        rows.append((frame, action, env.probe()))
        if terminal:
            return
        if len(rows) == context and not player.me.sleeping and player.world.daylight >= 0.5:
            yield step, player, rows


def record_interactions(path, each=20, context=16, worlds=150, seed=40_000):
    """Contexts of natural play, each continued by the script of an interaction in a copy of
    the real game: an episode each, `context` true frames and the script's."""
    env, kinds = make(""), []
    for world in tqdm(range(worlds), desc="interactions"):
        last = {}                                    # kind: step of its last context here
        for step, player, rows in natural_play(env, world, context, seed):
            for kind, script in interactions(player).items():
                # 50 steps apart: not one scene twice
                if kinds.count(kind) >= each or step - last.get(kind, -50) < 50:
                    continue
                film = try_script(copy_env(env), kind, script)
                if film:
                    frames, actions, probes = zip(*rows, *film, strict=True)
                    probes = {k: [probe[k] for probe in probes] for k in probes[0]}
                    events = np.zeros((len(frames), len(env.spec.tasks)))
                    write_episode(path, len(kinds), Episode(
                        frames, actions, events, np.ones(len(frames)), None, probes))
                    kinds.append(kind)
                    last[kind] = step
    finish_dataset(path, env.spec, {"env": "crafter", "kinds": kinds, "context": context,
                                    "seed": seed, "version": INTERACTIONS})


def judge(reader, kind, dreamed, real, before, after):
    """Do dreamed frames (N, H, W, 3) show the outcome of real ones? bool (N,): the player,
    all items' counts, all cells that were altered and 9 in 10 of the visible cells are
    right. before, after: probes of the last frame shown and of the outcome."""
    light, asleep = after["probe_player"][:, 0] / 255, after["probe_player"][:, 1] > 0
    texture, items, _ = reader.read(dreamed, light, asleep)
    player = texture[:, 4, 3] == reader.read(real, light, asleep)[0][:, 4, 3]
    if kind == "sleep":                              # all is grey: nearer sleep than waking
        waking, sleeping = (reader.distances(dreamed, light, np.full(len(light), state))
                            .min(-1).mean(-1) for state in (False, True))
        return player & (sleeping < waking)
    # items, and food and drink where an action raised them
    true = after["probe_inventory"].astype(int)
    by_action = caused(true - before["probe_inventory"]) | (np.arange(16) >= 4)
    right_items = ((items == true) | ~by_action).all(1)
    # cells that look different; a stone where the player stood, whose ground was hidden
    visible, was = in_sight(before, after)
    now = after["probe_semantic"]
    right = reader.semantic[texture] == now
    under = before["probe_semantic"].copy()
    under[:, 4, 3] = 2
    placed = in_sight({**before, "probe_semantic": under}, after)[0] & (now == 3)
    altered = (visible & (was != now)) | (placed & ~visible)
    most = (visible & right).sum((1, 2)) >= 0.9 * visible.sum((1, 2))
    return player & right_items & (right | ~altered).all((1, 2)) & most
