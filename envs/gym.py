"""gymnasium worlds as make_env describes one: any registered one, `--data.env
gym:Pendulum-v1`, or a gymnasium.Env of one's own, `--data.env mygame:Game`.

gym:MODULE:ID imports MODULE first, which registers the world. Behind the ID settings may
follow, which train.py fills in from --data.size, --data.frameskip and --data.bins:
"gym:gym_pusht:gym_pusht/PushT-v0,size=72x72,frameskip=2,bins=11".
Frames are observations that are pictures, else what render() returns ("rgb_array").
Discrete, MultiBinary, MultiDiscrete and Box actions, alone or in a Tuple or Dict, become
columns of classes; a number of a Box is cut into `bins` classes, with bins=0 it stays one
(for the world model alone). gymnasium's limit of steps is lifted: --data.length and
--data.eval_length are the limits here.
The reward is the task, "return"; where the info of a reset has "is_success" or "success",
that is counted too. But where the world has `tasks`, a tuple of names, info["events"] of a
step holds {task: how often it just happened}. It may also have the prompt_order,
achievements, action_names, needs of an EnvSpec, and what make_env lists.
"""
import importlib

import numpy as np
from PIL import Image

from data import ActionSpec, EnvSpec, UserError

try:
    import gymnasium
    from gymnasium import spaces
except ImportError:                                  # make() says how to get it
    gymnasium = None

LARGEST = 96            # pixels of a frame's longer side where no size is given


def parse(argument):
    """"MODULE:ID,size=72x72,frameskip=2,bins=11" -> ID, (height, width) or None, frameskip,
    bins. Imports the module."""
    name, *words = argument.split(",")
    settings = {"size": "", "frameskip": "1", "bins": "11"}
    for key, _, value in (word.partition("=") for word in words):
        if key not in settings:
            raise UserError(f"{key!r} in gym:{argument}", f"one of {list(settings)}",
                            "correct it")
        settings[key] = value
    try:
        size = tuple(map(int, settings["size"].split("x"))) if settings["size"] else None
        frameskip, bins = int(settings["frameskip"]), int(settings["bins"])
        if (size and (len(size) != 2 or min(size) < 1)) or frameskip < 1 or bins in (-1, 1):
            raise ValueError
    except ValueError:
        raise UserError(f"gym:{argument}", "size=HEIGHTxWIDTH, frameskip=1 or more, bins=0 "
                        "or 2 or more", "correct it") from None
    module, _, name = name.rpartition(":")
    if module:
        importlib.import_module(module)
    return name, size, frameskip, bins


def make(argument):
    """UserError: there is no gymnasium, or no such world."""
    if gymnasium is None:
        raise UserError("no package gymnasium", "it for gym:...", "pip install gymnasium")
    name, size, frameskip, bins = parse(argument)
    try:
        env = gymnasium.make(name, render_mode="rgb_array", max_episode_steps=-1)
    except gymnasium.error.Error as error:
        raise UserError(f"gym:{argument} ({error})", "a world that is there", "correct its "
                        "name, gym:MODULE:ID, or 'pip install' what it asks for") from None
    return Gym(env, argument, size, frameskip, bins)


def leaves(space):
    """The simple spaces in a Tuple or Dict, in order."""
    if isinstance(space, spaces.Tuple):
        return [leaf for part in space.spaces for leaf in leaves(part)]
    if isinstance(space, spaces.Dict):
        return [leaf for part in space.spaces.values() for leaf in leaves(part)]
    return [space]


def columns_of(space, bins):
    """A simple space -> sizes of its class columns, and how many numbers."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)], 0
    if isinstance(space, spaces.MultiBinary):
        return [2] * int(np.prod(space.shape)), 0
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.flatten()], 0
    if isinstance(space, spaces.Box) and np.isfinite([space.low, space.high]).all():
        n = int(np.prod(space.shape))
        return ([bins] * n, 0) if bins else ([], n)
    raise UserError(f"actions {space}", "Discrete, MultiBinary, MultiDiscrete or a bounded "
                    "Box, or a Tuple or Dict of these", "wrap the world")


def idle_of(space, bins):
    """Classes that mean "do nothing": those nearest to 0 of a Box's numbers."""
    if not isinstance(space, spaces.Box):
        return [0] * len(columns_of(space, bins)[0])
    if not bins:
        return []
    low, high = (x.astype(float).flatten() for x in (space.low, space.high))
    share = -low / np.maximum(high - low, 1e-9)
    return [int(i) for i in np.rint(np.clip(share, 0, 1) * (bins - 1))]


SETTINGS = ("prompt_order", "achievements", "action_names", "needs")


class Gym:
    """A gymnasium world as data.make_env describes one, by the name `name`."""

    def __init__(self, env, name, size=None, frameskip=1, bins=11):
        self.env, self.name, self.size = env, name, size
        self.frameskip, self.bins = frameskip, bins
        columns = [columns_of(space, bins) for space in leaves(env.action_space)]
        actions = ActionSpec(tuple(n for sizes, _ in columns for n in sizes),
                             sum(numbers for _, numbers in columns))
        if size is None:
            space = env.observation_space
            shape = getattr(space, "shape", None) or ()
            if len(shape) != 3 or shape[-1] != 3 or space.dtype != np.uint8:    # no picture
                shape = self.frame(env.reset(seed=0)[0]).shape
            height, width = shape[:2]
            share = min(1.0, LARGEST / max(height, width))
            self.size = max(1, round(height * share)), max(1, round(width * share))
        idle = [i for space in leaves(env.action_space) for i in idle_of(space, bins)]
        self.ours = env.has_wrapper_attr("tasks")
        if self.ours:
            tasks = tuple(env.get_wrapper_attr("tasks"))
            has = {key: env.get_wrapper_attr(key) for key in SETTINGS
                   if env.has_wrapper_attr(key)}
            self.spec = EnvSpec(name, *self.size, actions, tasks, **has, idle=tuple(idle))
        else:
            info = env.reset(seed=0)[1]
            self.success = [key for key in ("is_success", "success") if key in info][:1]
            tasks = ("return", *["success"] * len(self.success))
            self.spec = EnvSpec(name, *self.size, actions, tasks, (("return", 0),),
                                returns=True, idle=tuple(idle))

    def __getattr__(self, name):
        """Player, keys, probe, ... of a world with tasks. Others may mean something else
        by such a name."""
        # subtle: asked for while it is copied, too
        if name in ("env", "ours") or name.startswith("__") or not self.ours:
            raise AttributeError(name)
        return self.env.get_wrapper_attr(name)

    def frame(self, observation):
        """uint8 (H, W, 3): the observation if it is a picture, else what is rendered;
        resized by area."""
        def is_picture(x):
            return x.dtype == np.uint8 and x.ndim == 3 and x.shape[-1] == 3

        picture = observation
        if not isinstance(picture, np.ndarray) or not is_picture(picture):
            picture = np.asarray(self.env.render())
        if not is_picture(picture):
            raise UserError(f"a frame {picture.dtype}{picture.shape} of {self.name}",
                            "uint8 (height, width, 3)", "a world that renders rgb_array")
        if self.size and picture.shape[:2] != self.size:
            picture = Image.fromarray(picture).resize(self.size[::-1], Image.BOX)
        return np.array(picture)

    def action(self, row):
        """float32 (A,), classes and then numbers -> an action of the world's space."""
        n = len(self.spec.actions.classes)
        classes, numbers = iter(row[:n]), iter(row[n:])

        def build(space):
            if isinstance(space, spaces.Tuple):
                return tuple(build(part) for part in space.spaces)
            if isinstance(space, spaces.Dict):
                return {name: build(part) for name, part in space.spaces.items()}
            if isinstance(space, spaces.Discrete):
                return int(next(classes)) + int(space.start)
            if isinstance(space, spaces.Box):
                if self.bins:                   # 0 is the lowest number, 1 the highest
                    share = [next(classes) / max(self.bins - 1, 1) for _ in space.low.flat]
                else:
                    share = [(next(numbers) + 1) / 2 for _ in space.low.flat]
                share = np.reshape(share, space.shape)
                x = space.low + share * (space.high.astype(float) - space.low)
                if np.issubdtype(space.dtype, np.integer):
                    x = np.rint(x)
                return x.astype(space.dtype)
            x = np.array([next(classes) for _ in range(int(np.prod(space.shape)))])
            x = x.reshape(space.shape) + getattr(space, "start", 0)
            return x.astype(space.dtype)

        return build(self.env.action_space)

    def reset(self, seed):
        return self.frame(self.env.reset(seed=int(seed))[0])

    def step(self, row):
        action, total, terminal = self.action(row), np.zeros(len(self.spec.tasks)), False
        for _ in range(self.frameskip):
            observation, reward, terminated, truncated, info = self.env.step(action)
            terminal = terminated or truncated
            if self.ours:
                total += self.events(info)
            else:
                total += [float(reward), *(bool(info.get(key)) for key in self.success)]
            self.cut = truncated and not terminated
            if terminal:
                break
        return self.frame(observation), total, terminal

    def events(self, info):
        """info["events"] of a step, {task: times} -> (tasks,)."""
        events = info.get("events", {})
        if other := set(events) - set(self.spec.tasks):
            raise UserError(f"events {sorted(other)} of {self.name}", "some of its tasks "
                            f"{self.spec.tasks}", "correct its step")
        return np.array([events.get(task, 0) for task in self.spec.tasks], float)
