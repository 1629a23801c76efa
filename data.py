"""Environments, recorded play and the dataset on disk (Dreamer 4, Sections 4.1 and 4.3).

ActionSpec, EnvSpec   what an action and an environment look like
make_env, VecEnv      a world of envs/, or a class of your own; many in parallel
Dataset               windows of episodes: uniform, or relevant to a task (Section 4.1)
record, describe      commands (all: python data.py --help)
Time: row t holds the action that LED TO frame t, and what was received on reaching it.
"""
import argparse
import copy
import ctypes
import errno
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
import types
import zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                 # Windows
    fcntl = None

VERSION = 2                                         # of what is on disk
TYPES = {"frames": "u1", "actions": "f4", "labelled": "?", "events": "u1",
         "continues": "u1"}                         # probes: u1
RARE = 0.1                                          # share of frames with a rare reward
ENVS = Path(__file__).parent / "envs"
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")          # quota and period, microseconds
PROCESSES = multiprocessing.get_context("spawn")    # fork hurts torch


class UserError(ValueError):
    """What a user can put right: a message, or the three parts of one."""

    def __init__(self, got, need=None, do=None):
        super().__init__(f"got {got}; need {need}; do: {do}" if need else got)


def keep_buffers():
    """Let glibc keep big buffers: giving them back and getting them again takes time."""
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)                        # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)                  # M_TRIM_THRESHOLD


def this_command():
    """What to type to go on with this program."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    words = shlex.join([*(("-m", module.name) if module else sys.argv[:1]), *sys.argv[1:]])
    words = words.replace(" --resume no", "").replace(" --resume=no", "")
    n = os.environ.get("WORLD_SIZE")
    return f"torchrun --nproc_per_node {n} -- {words}" if n else f"python {words}"


def run_cli(main):
    """Run main(). What a user can put right becomes one line and exit code 2, Ctrl-C and
    SIGTERM one line and 130 and 143."""
    def stop(number, frame):
        raise KeyboardInterrupt(128 + number)
    for stream in (sys.stdout, sys.stderr):         # names of files need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        signal.signal(signal.SIGTERM, stop)
        keep_buffers()
        return main()
    except UserError as error:
        code, line = 2, f"error: {error}"
    except OSError as error:
        code, line = 2, (f"error: got {error}; need room on the disk and the right to "
                         "write; do: see to it, then the same command goes on")
    except KeyboardInterrupt as signalled:
        code = signalled.args[0] if signalled.args else 130
        line = f"interrupted: the same command goes on: {this_command()}"
    print(line, file=sys.stderr)
    sys.exit(code)


def check_config(prefix, cfg, zero=(), shares=()):
    """UserError where a setting has another type than its default, or is out of range: int
    from 1 (those in `zero` from 0), float from 0 (those in `shares` to 1)."""
    for setting in fields(cfg):
        value, kind, need = getattr(cfg, setting.name), setting.type, setting.type.__name__
        right = type(value) is kind or (kind is float and type(value) is int)
        if kind in (int, float):
            low = 1 if kind is int and setting.name not in zero else 0
            high = 1 if setting.name in shares else sys.float_info.max
            right = right and low <= value <= high
            need += f" from {low}" + (" to 1" if setting.name in shares else "")
        if not right:
            raise UserError(f"Got {prefix}.{setting.name} {value!r}, need {need}.")


def rng_for(seed, stage, step):
    """Randomness without state: the generator of a step >= 0 of a stage (any string)."""
    return np.random.default_rng([seed, zlib.crc32(stage.encode()), step])


def read_json(path):
    """The values in a JSON file. UserError where it can't be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no JSON to read in {path} ({error})", "what was written there",
                        "restore it, or delete it and run the command again") from None


def write_json(path, values):
    """Write a JSON file, whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(values).encode()))


def write_whole(path, write, keep=None):
    """Call write(file) on a temporary name; when all is on disk the file gets its real
    name, that of before the name `keep`. UserError: no room, no right; nothing is left."""
    path, part = Path(path), Path(path).with_suffix(".tmp")
    try:
        with open(part, "wb") as file:
            # subtle: np.save to a real file goes through C and hides that the disk is full
            write(types.SimpleNamespace(write=file.write, seek=file.seek, flush=file.flush))
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"no room or no right to write {path} ({error})", "both", "see to "
                        "it, then the same command goes on from what was there") from None
    finally:
        if part.is_file():
            part.unlink()


# ----------------------------------------------------------------- actions and environments

@dataclass(frozen=True)
class ActionSpec:
    """An action is one float32 row (A,): class indices, then numbers in [-1, 1]."""
    classes: tuple[int, ...] = ()                   # their sizes; a two-way key has size 2
    numbers: int = 0

    @property
    def width(self):
        return len(self.classes) + self.numbers     # A

    def zeros(self, *lead):
        """No action: float32 (*lead, A)."""
        return np.zeros((*lead, self.width), np.float32)

    def sample(self, rng, *lead):
        """Uniform random actions: float32 (*lead, A)."""
        indices = rng.integers(0, np.array(self.classes, int), (*lead, len(self.classes)))
        numbers = rng.uniform(-1, 1, (*lead, self.numbers))
        return np.concatenate([indices, numbers], -1).astype(np.float32)


@dataclass(frozen=True)
class EnvSpec:
    name: str
    height: int                                     # of a frame, in pixels
    width: int
    actions: ActionSpec
    tasks: tuple[str, ...]                          # events[:, i] belongs to tasks[i]
    prompt_order: tuple[tuple[str, int], ...] = ()  # task, how often (0: without end)
    achievements: tuple[str, ...] = ()              # tasks that agents are scored by
    action_names: tuple[str, ...] = ()              # of the first class column
    # events are rewards, any numbers, 0 in row 0: agents are scored by their sum
    returns: bool = False
    # prompts between: task, how often, from which step on, after how many steps again
    needs: tuple[tuple[str, int, int, int], ...] = ()
    # classes that mean "do nothing", (): 0 of each; for the game alone, so that recordings
    # of a world stay its own when it gets some
    idle: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self):
        sizes = self.actions.classes
        fits = [i in range(size) for i, size in zip(self.idle, sizes, strict=False)]
        if self.idle and (len(self.idle) != len(sizes) or not all(fits)):
            raise UserError(f"idle {self.idle} of {self.name}", "a class of each column, "
                            f"of sizes {sizes}", "correct its EnvSpec")
        asked = [task for task, *_ in (*self.prompt_order, *self.needs)]
        for task in (*asked, *self.achievements):
            if task not in self.tasks:
                raise UserError(f"a prompt or achievement {task!r} of {self.name}",
                                f"one of its tasks {self.tasks}", "correct its EnvSpec")

    @property
    def event_type(self):
        return np.float32 if self.returns else np.uint8

    def recorded(self):
        """What recordings of a world depend on: all but `idle`."""
        values = self.to_json()
        del values["idle"]
        return values

    def to_json(self):
        return json.loads(json.dumps(asdict(self)))           # lists for tuples

    @classmethod
    def from_json(cls, values):
        def tuples(x):
            return tuple(map(tuples, x)) if isinstance(x, list) else x
        actions = {name: tuples(x) for name, x in values["actions"].items()}
        values = {name: tuples(x) for name, x in values.items()}
        return cls(**{**values, "actions": ActionSpec(**actions)})


def world_presets():
    """{name: overrides}: the PRESETS of the files in envs/ that have some."""
    presets = {}
    for name in sorted(path.stem for path in ENVS.glob("[a-z]*.py")):
        if not name.startswith("test_"):
            with suppress(ImportError):             # what it needs may be missing
                world = importlib.import_module(f"envs.{name}")
                presets.update(getattr(world, "PRESETS", {}))
    return presets


def file_name(world):
    """The name of a world as that of a file: "gym:A/B-v0" -> "gym_A_B-v0"."""
    return re.sub(r"[^\w.=-]+", "_", world)


def make_env(name):
    """The environment "WORLD" or "WORLD:ARGUMENT", which envs/WORLD.py makes, or of an
    importable "module:Class", called without arguments. UserError: there is none.

    envs/gym.py makes one of a gymnasium.Env. It has: spec; reset(seed) -> frame uint8
    (H, W, 3); step(action float32 (A,)) -> frame, events (n_tasks,): how often each
    happened (spec.returns: its reward), terminal. It may have:
    keys      {key of the browser game: action name}
    player    (rng, skill) -> object whose act() is the action to record (else: random play)
    skills    {name: share of the recorded episodes} of that player
    copyable  True: copy.deepcopy makes a world of its own that goes on from here
    cut       True: the last step was terminal only because the world has a limit of steps
    probe     () -> dict of uint8 arrays, ground truth for evaluation only
    recordings  folders to train on and to judge by, of a world that nobody can play
    reader    () -> object that reads frames: compare(frames, true, shown=None) ->
              {measure: (a (N,), b (N,))}, reported as sum a / sum b; frames uint8
              (N, H, W, 3), dreamed or reconstructed; true: probes of the real ones, dict of
              (N, ...); shown: those of the last frame shown, None for reconstructions. It
              may have by_class, the same for each class of what a cell truly shows
    """
    head, _, argument = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())                # a module beside the command's user
    with users_code(name):
        if (ENVS / f"{head}.py").is_file():
            return CheckedEnv(importlib.import_module(f"envs.{head}").make(argument))
        found = None
        with suppress(ImportError, ValueError):     # no package of that name, no name
            found = importlib.util.find_spec(head)
        if not found or not hasattr(importlib.import_module(head), argument):
            raise UserError(f"environment {name!r}", "a world of envs/ or an importable "
                            "'module:Class'", "check it, install what is missing")
        env = getattr(sys.modules[head], argument)()
        if not isinstance(getattr(env, "spec", None), EnvSpec):     # a gymnasium.Env
            env = importlib.import_module("envs.gym").Gym(env, name)
        return CheckedEnv(env)


@contextmanager
def users_code(name):
    """What goes wrong in the code of a world is shown whole, and then said in one line;
    that a package is missing is said alone."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"no module {error.name!r} for the environment {name}", "it",
                        "install it") from None
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise UserError(f"{type(error).__name__} in the environment {name}: {error}",
                        "one that runs", "see the traceback above") from None


COPYABLE = {}                                       # class and name: it can be copied


class CheckedEnv:
    """A world whose answers are what its spec says, and copies: some draw all their frames
    into one buffer. Whatever else the world has it has too."""

    def __init__(self, env):
        self.env, self.spec, self.copyable = env, env.spec, None

    def __getattr__(self, name):
        if name == "env" or name.startswith("__"):  # subtle: asked for while it is copied
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, seed):
        with users_code(self.spec.name):
            frame = self.checked("a frame", self.env.reset(seed), np.uint8)
            kind = type(self.env), self.spec.name
            if kind not in COPYABLE:                # the first world of its kind
                COPYABLE[kind] = False
                if getattr(self.env, "copyable", False):
                    COPYABLE[kind] = self.copies_are_apart()    # they may have moved it
                    frame = self.checked("a frame", self.env.reset(seed), np.uint8)
            self.copyable = COPYABLE[kind]
            return frame

    def copies_are_apart(self):
        """Whether a copy that is stepped leaves another one where it was: those of one
        simulator move together."""
        copies = [copy_env(self.env), copy_env(self.env)]
        if any(copied is None for copied in copies):
            return False
        actions = self.spec.actions.sample(np.random.default_rng(0), 3)
        films = [[np.array(one.step(action)[0]) for action in actions] for one in copies]
        return np.array_equal(*films)

    def step(self, action):
        action = np.array(action, np.float32)
        self.checked("an action", action, np.float32)
        with users_code(self.spec.name):
            frame, events, terminal = self.env.step(action)
            events = self.checked("events", events, None)
            if not np.isfinite(events).all():
                raise UserError(f"events {events} of {self.spec.name}", "finite numbers",
                                "correct its step")
            if not self.spec.returns:
                events = np.clip(events, 0, 255)
            events = events.astype(self.spec.event_type)
            return self.checked("a frame", frame, np.uint8), events, bool(terminal)

    def checked(self, what, x, dtype):
        """A copy of x. UserError: it has another shape, or another dtype than this one."""
        shape = {"a frame": (self.spec.height, self.spec.width, 3),
                 "an action": (self.spec.actions.width,), "events": (len(self.spec.tasks),)}
        try:
            x = np.array(x)
        except ValueError:                          # a tuple of different things
            x = np.array(None)
        if x.shape != shape[what] or dtype not in (None, x.dtype):
            raise UserError(f"{what} {x.dtype}{x.shape} of {self.spec.name}",
                            f"{np.dtype(dtype) if dtype else ''}{shape[what]}",
                            "correct its reset, step or player")
        return x


def controls(env):
    """What a person can press in a world, or the dream of a run: dicts of label, key ("":
    none), column and value. A two-way key is one of them, any other class column has one
    for each class. Without env.keys a label gets its arrow, or the next free letter."""
    found, keys, actions = [], itertools.count(), itertools.count()
    for i, size in enumerate(env.spec.actions.classes):
        if i == 0 and env.spec.action_names:
            found += [(name, i, value) for value, name in enumerate(env.spec.action_names)]
        elif size == 2:
            found.append((f"key {next(keys)}", i, 1))
        else:
            found += [(f"action {next(actions)}", i, value) for value in range(size)]
    key_of = {label: key for key, label in getattr(env, "keys", {}).items()}
    free = iter("" if key_of else "1234567890qertyuiopfghjklzxcvbnm")
    for label, _, _ in found:
        arrows = [f"Arrow{way}" for way in ("Left", "Right", "Up", "Down")
                  if way.lower() in label and f"Arrow{way}" not in key_of.values()]
        if label not in key_of and label != "noop":
            key_of[label] = arrows[0] if arrows else next(free, "")
    return [{"label": label, "key": key_of.get(label, ""), "column": i, "value": value}
            for label, i, value in found]


def copy_env(env):
    """A copy of an environment to try things in; None where it isn't `copyable`."""
    modules = {id(module): module for module in list(sys.modules.values())}    # stay as one
    try:
        return copy.deepcopy(env, modules) if getattr(env, "copyable", False) else None
    except Exception:                               # processes, sockets, windows, ...
        return None


# -------------------------------------------------------------------------------- processes

def serve(pipe, function):
    """A worker: answers args with function(*args), or with what went wrong there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the parent ends us
    with suppress(EOFError, BrokenPipeError):       # the parent closed the pipe, or died
        while True:
            args = pipe.recv()
            try:
                pipe.send(function(*args))
            except Exception as error:
                pipe.send(error)


def start_workers(functions):
    """A process for each function -> processes, our ends of their pipes."""
    processes, pipes = [], []
    for function in functions:
        ours, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=serve, args=(theirs, function), daemon=True)
        process.start()
        theirs.close()                              # so that a dead worker reads as EOF
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def receive(pipe):
    """What a worker answers. Raises what went wrong there."""
    try:
        answer = pipe.recv()
    except EOFError:
        raise UserError("a worker that died (memory?)", "it", "use fewer --workers"
                        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def count_workers(workers, jobs=1 << 20):
    """`workers`, or (0) one for each core that we may use; no more than there are jobs."""
    if workers <= 0:
        affinity = getattr(os, "sched_getaffinity", None)     # only where Linux has it
        workers = len(affinity(0)) if affinity else os.cpu_count()
        with suppress(OSError, ValueError):         # a container's limit, "max" for none
            quota, period = map(int, CPU_LIMIT.read_text().split())
            workers = min(workers, max(1, quota // period))
    return min(workers, jobs)


def work(function, jobs, workers=0):
    """Yields each job with function(*job), from worker processes (0: one for each core)."""
    processes, free = start_workers([function] * count_workers(workers, len(jobs)))
    todo, busy = list(jobs), {}
    try:
        while todo or busy:
            while todo and free:
                pipe = free.pop()
                busy[pipe] = todo.pop(0)
                pipe.send(busy[pipe])
            for pipe in wait(list(busy)):
                free.append(pipe)
                answer = receive(pipe)
                yield busy.pop(pipe), answer
    finally:
        for process in processes:
            process.kill()                          # pygame takes SIGTERM for its own
            process.join()


class Worlds:
    """The environments of one worker: None resets them, actions (n, A) step them."""

    def __init__(self, name, seeds):
        self.name, self.seeds, self.envs, self.fresh = name, seeds, [], []

    def reset(self):
        """A reset may take a second: where worlds can be copied each is reset once."""
        if not self.fresh:
            self.first = np.stack([env.reset(seed) for env, seed in
                                   zip(self.envs, self.seeds, strict=True)])
            self.fresh = [copy_env(env) for env in self.envs]
        else:
            for i, seed in enumerate(self.seeds):
                if self.fresh[i]:
                    self.envs[i] = copy_env(self.fresh[i])
                else:
                    self.first[i] = self.envs[i].reset(seed)
        self.frames, self.terminal = self.first.copy(), np.zeros(len(self.envs), bool)

    def __call__(self, actions):
        self.envs = self.envs or [make_env(self.name) for _ in self.seeds]
        spec = self.envs[0].spec
        events = np.zeros((len(self.envs), len(spec.tasks)), spec.event_type)
        if actions is None:
            self.reset()
        else:
            for i in np.flatnonzero(~self.terminal):
                self.frames[i], events[i], self.terminal[i] = self.envs[i].step(actions[i])
        return self.frames, events, self.terminal


class VecEnv:
    """N environments, one per seed, in worker processes (0 = one per core), which start at
    the first reset. Every reset begins the same episodes. A finished environment is not
    stepped any more: it repeats its last frame, without events."""

    def __init__(self, name, seeds, workers=0):
        self.name, self.seeds, self.spec = name, np.array(seeds), make_env(name).spec
        n = count_workers(workers, len(seeds))
        self.parts = np.array_split(np.arange(len(seeds)), n)
        self.processes, self.pipes = [], []

    def exchange(self, messages):
        for pipe, message in zip(self.pipes, messages, strict=True):
            pipe.send((message,))
        answers = [receive(pipe) for pipe in self.pipes]
        return tuple(np.concatenate(parts) for parts in zip(*answers, strict=True))

    def reset(self):
        """-> frames uint8 (N, H, W, 3)."""
        if not self.processes:
            worlds = [Worlds(self.name, self.seeds[part].tolist()) for part in self.parts]
            self.processes, self.pipes = start_workers(worlds)
        return self.exchange([None] * len(self.parts))[0]

    def step(self, actions):
        """actions (N, A) -> frames (N, H, W, 3), events (N, n_tasks), terminal (N,)."""
        return self.exchange([np.asarray(actions)[part] for part in self.parts])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join()


# ------------------------------------------------------------------------- episodes on disk

class Episode(NamedTuple):
    """T rows; row t: the action that led to frame t, what was received on reaching it."""
    frames: np.ndarray                              # uint8 (T, H, W, 3)
    actions: np.ndarray                             # (T, A)
    events: np.ndarray                              # (T, n_tasks)
    continues: np.ndarray                           # (T,), 0 on a terminal frame
    labelled: np.ndarray | None = None              # (T,), has an action; None: not row 0
    probes: dict | None = None                      # of uint8 (T, ...)


def episode_path(folder, index):
    return Path(folder) / f"episode_{index:05d}.npy"


def write_episode(folder, index, episode, event_type=np.uint8):
    """Write an Episode; event_type: its EnvSpec's. UserError: its fields differ in
    length."""
    columns = {**episode._asdict(), **(episode.probes or {})}
    del columns["probes"]
    if episode.labelled is None:
        columns["labelled"] = np.arange(len(episode.frames)) > 0
    lengths = {name: len(x) for name, x in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{lengths} rows", "as many of each", "pad or cut")
    types = {**TYPES, "events": event_type}
    columns = {name: np.asarray(x, types.get(name, "u1")) for name, x in columns.items()}
    columns = {name: x for name, x in columns.items() if x.size}  # npy knows no zero widths
    kinds = [(name, x.dtype, x.shape[1:]) for name, x in columns.items()]
    rows = np.empty(len(episode.frames), kinds)
    for name, x in columns.items():
        rows[name] = x
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(episode_path(folder, index), lambda file: np.save(file, rows))


def column(rows, name):
    """A field of rows, (*rows.shape, ...); fields of width zero are not in the file."""
    if name in rows.dtype.names:
        return rows[name]
    return np.zeros((*rows.shape, 0), TYPES[name])


def open_episode(path, spec):
    """The rows of an episode, memory-mapped. UserError: missing, cut off, or foreign."""
    shapes = {"frames": (spec.height, spec.width, 3), "actions": (spec.actions.width,),
              "events": (len(spec.tasks),), "labelled": (), "continues": ()}
    try:
        rows = np.load(path, mmap_mode="r")
        for name, shape in shapes.items():
            got = column(rows, name)
            dtype = spec.event_type if name == "events" and shape[0] else TYPES[name]
            if got.shape != (len(rows), *shape) or got.dtype != dtype:
                raise ValueError(f"{name} {got.shape} {got.dtype}, not {shape}")
        return rows
    except (OSError, ValueError, TypeError, EOFError) as error:
        if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE):
            raise UserError(f"{error}: {path}", "at least 64", "'ulimit -n 64'") from None
        raise UserError(f"no whole episode in {path} ({error})", "all of its rows", "delete"
                        " that file if it is there, record or import it again") from None


def check_episode(path, rows, spec):
    """UserError when the rows can't be true."""
    sizes = np.array(spec.actions.classes, int)
    index, number = np.split(column(rows, "actions"), [len(sizes)], 1)
    faults = {"row 0 has an action": rows["labelled"][0],
              "row 0 has an event": column(rows, "events")[0].any(),
              "it ends before its last row": not rows["continues"][:-1].all(),
              "a class out of range": ((index < 0) | (index >= sizes)).any(),
              "a class that is not whole": (index != np.floor(index)).any(),
              "a number outside [-1, 1]": not (np.abs(number) <= 1).all(),
              "a reward that is not finite": not np.isfinite(column(rows, "events")).all()}
    for fault, found in faults.items():
        if found:
            raise UserError(f"{path}: {fault}", "rows as Episode describes", "correct them")


def write_about(folder, spec, settings, complete=False, command=None, found=None):
    """Write dataset.json. command: what completes it; found: what finish_dataset finds."""
    about = {"version": VERSION, "spec": spec.to_json(), "settings": settings,
             "complete": complete, "command": command, **(found or {})}
    write_json(Path(folder) / "dataset.json", about)


def read_about(folder):
    """The values of dataset.json. UserError: missing, damaged, or of another version."""
    try:
        about = json.loads((Path(folder) / "dataset.json").read_text())
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']}, not {VERSION}: record it again")
        needed = ("lengths", "events", "content") if about["complete"] else ()
        if lacks := sorted({"settings", *needed} - set(about)):
            raise ValueError(f"it lacks {lacks}")
        EnvSpec.from_json(about["spec"])
        return about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} without a dataset.json to read ({error})", "a dataset",
                        f"'python data.py record --out {folder}', or correct the path"
                        ) from None


def finish_dataset(folder, spec, settings):
    """Check all episodes, then write dataset.json. settings["skills"] may name theirs."""
    content, lengths, events, crc = hashlib.sha256(), [], [], []
    for i in range(len(list(Path(folder).glob("episode_*.npy")))):
        path = episode_path(folder, i)
        rows = open_episode(path, spec)
        check_episode(path, rows, spec)
        content.update(np.memmap(path, np.uint8, "r"))
        lengths.append(len(rows))
        crc.append(zlib.crc32(rows.view(np.uint8)))
        happened = np.argwhere(column(rows, "events") > 0).tolist()
        events += [[i, t, task] for t, task in happened]
    if spec.returns and len(events) > RARE * sum(lengths):
        events = []                                 # any window shows what is rewarded
    write_about(folder, spec, settings, complete=True, found={
        "lengths": lengths, "events": events, "crc": crc, "content": content.hexdigest()})


# ---------------------------------------------------------------------- windows of episodes

class Windows(NamedTuple):
    """Which windows of a dataset to draw."""
    length: int                                     # rows
    relevant: bool = False                          # windows with an event, else all
    split: str = "train"
    ahead: tuple[int, int] | None = None            # its first and last row; None: 1 .. end
    tasks: tuple[int, ...] = ()                     # indices of tasks to draw; (): of all
    prompted: bool = False                          # train.Recordings draws these
    first: int | None = None                        # of the first episodes; None: of all
    edges: bool = False         # an episode's first and last frame as often as the others


class Dataset:
    """A complete dataset, memory-mapped. UserError: missing, incomplete, damaged, empty.

    spec, lengths (n,), skills (n names), settings, fingerprint (sha256 of the episodes),
    frames_total, offsets (n + 1,): first frame of each episode in their concatenation,
    events (E, 3): episode, row and task of each event, or rare reward above 0.
    """

    def __init__(self, path):
        self.path, about = Path(path), read_about(path)
        if not about["complete"]:
            raise UserError(f"{path}, incomplete", "all episodes", f"'{about['command']}'")
        if not about["lengths"]:
            raise UserError(f"{path} without episodes", "at least one", "record")
        self.spec, self.settings = EnvSpec.from_json(about["spec"]), about["settings"]
        self.fingerprint, self.lengths = about["content"], np.array(about["lengths"])
        self.events = np.array(about["events"], np.int64).reshape(-1, 3)
        self.skills = self.settings.get("skills") or ["-"] * len(self.lengths)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.frames_total = int(self.offsets[-1])
        self.crc = dict(enumerate(about.get("crc", ())))      # of those still to be checked
        for i, length in enumerate(self.lengths):
            n = len(open_episode(episode_path(self.path, i), self.spec))
            if n != length:
                raise UserError(f"{n} frames in {episode_path(self.path, i)}", length,
                                "restore the file or record again")
        self.rows = functools.lru_cache(32)(self.rows)        # bounds the open files
        self.windows_with_event = functools.cache(self.windows_with_event)

    def rows(self, i):
        """Memory map of episode i. UserError when its bytes have changed (at first use)."""
        path = episode_path(self.path, i)
        rows = open_episode(path, self.spec)
        if i in self.crc and self.crc[i] != zlib.crc32(rows.view(np.uint8)):
            raise UserError(f"changed bytes in {path}", "those that were recorded",
                            "restore that file, or delete it and record or import it again")
        self.crc.pop(i, None)
        return rows

    def episodes(self, split):
        """Indices of "train", "valid" (every 20th; the last of fewer than 20) or "all"."""
        every = np.arange(len(self.lengths))
        valid = every % 20 == 19
        valid[-1] |= 1 < len(every) < 20
        return every[{"train": ~valid, "valid": valid, "all": every >= 0}[split]]

    def long_enough(self, windows):
        """Indices of the episodes that have such windows."""
        episodes = self.episodes(windows.split)
        first = len(self.lengths) if windows.first is None else windows.first
        return episodes[(self.lengths[episodes] >= windows.length) & (episodes < first)]

    def windows_with_event(self, windows):
        """Of the `events`, in order of their tasks, those that such a window can have in
        its rows `ahead`; for each task that is left its first index, and how many."""
        low, high = windows.ahead or (1, windows.length - 1)
        episode, row, task = self.events.T
        fits = (row >= low) & (row - high <= self.lengths[episode] - windows.length)
        fits &= np.isin(episode, self.long_enough(windows))
        fits &= np.isin(task, windows.tasks or task)
        events = self.events[fits]
        events = events[np.argsort(events[:, 2], kind="stable")]
        return events, *np.unique(events[:, 2], return_index=True, return_counts=True)[1:]

    def sample(self, rng, n, windows):
        """Draw n windows inside episodes -> episode, start, task: int64 (n,).

        Uniform: over all windows, with a random task; edges: also over those that reach
        beyond an end of their episode, which are moved inside. Else its last frame, which
        shows how one dies, is in one window of all, others are in `length` of them.
        Relevant: a task uniformly among those that happen, one of its events, a window
        with that event in one of its rows `ahead` (first, last); the last may lie behind
        the window's end.
        """
        windows = windows._replace(tasks=tuple(windows.tasks))
        episodes = self.long_enough(windows)
        if not len(episodes):
            raise UserError(f"windows of {windows.length} frames for {windows.split!r} of "
                            f"{self.path}", f"episodes as long, not {self.lengths.max()}",
                            "shorten the windows")
        if windows.relevant:
            return self.sample_relevant(rng, n, windows)
        beyond = (windows.length - 1) * windows.edges
        ends = np.cumsum(self.lengths[episodes] - windows.length + 1 + 2 * beyond)
        number = rng.integers(0, ends[-1], n)       # of a window, in their concatenation
        which = np.searchsorted(ends, number, side="right")
        start = ends[which] - 1 - number - beyond   # counts down from the last window
        start = start.clip(0, self.lengths[episodes[which]] - windows.length)
        tasks = np.array(windows.tasks or range(max(1, len(self.spec.tasks))))
        return episodes[which], start, rng.choice(tasks, n)

    def sample_relevant(self, rng, n, windows):
        low, high = windows.ahead or (1, windows.length - 1)
        events, begin, count = self.windows_with_event(windows)
        if not len(events) or high < low:
            raise UserError(f"{len(events)} events for windows of {windows.length} frames",
                            "an event and 2 frames", "record more, or sample uniformly")
        which = rng.integers(len(begin), size=n)
        episode, row, task = events[begin[which] + rng.integers(count[which])].T
        last = np.minimum(row - low, self.lengths[episode] - windows.length)
        return episode, rng.integers(np.maximum(0, row - high), last + 1), task

    def read(self, episode, start, length, fields=None):
        """Windows -> dict of arrays (n, length, ...): `fields`, or all but the probes."""
        pairs = zip(episode, start, strict=True)
        windows = [self.rows(int(i))[t: t + length] for i, t in pairs]
        batch = {name: np.stack([column(rows, name) for rows in windows])
                 for name in fields or TYPES}
        if "continues" in batch:
            batch["continues"] = batch["continues"].astype(np.float32)
        return batch

    def episode(self, i):
        """All fields of an episode: dict of arrays (T, ...), views of the memory map."""
        rows = self.rows(int(i))
        return {name: column(rows, name) for name in {**TYPES, **rows.dtype.fields}}


# -------------------------------------------------------------------------------- recording

def play_episode(env, seed, index, length, skill):
    """Play at most `length` frames of the world seed + index -> Episode."""
    rng, probe = rng_for(seed, "player", index), getattr(env, "probe", dict)
    no_event = np.zeros(len(env.spec.tasks), env.spec.event_type)
    rows = [(env.reset(seed + index), env.spec.actions.zeros(), no_event, True, probe())]
    player = env.player(rng, skill) if hasattr(env, "player") else None
    continues = True
    while continues and len(rows) < length:
        action = player.act() if player else env.spec.actions.sample(rng)
        action = np.array(action, np.float32)       # the player may use its array again
        frame, events, terminal = env.step(action)
        continues = not terminal
        events = events if env.spec.returns else events > 0
        goes_on = continues or getattr(env, "cut", False)       # cut off is no end
        rows.append((frame, action, events, goes_on, probe()))
    *columns, probes = zip(*rows, strict=True)
    probes = {name: np.stack([probe[name] for probe in probes]) for name in probes[0]}
    return Episode(*map(np.stack, columns), probes=probes)


def check_world(name, dataset):
    """UserError where the environment `name` isn't the one that was recorded: it has
    another spec or, under the recorded actions, other first frames."""
    env, settings, rows = make_env(name), dataset.settings, dataset.rows(0)[:4]
    now, then = env.spec.recorded(), dataset.spec.recorded()
    do = "name the --data.env that was recorded, or delete them to record them again"
    for key in (key for key in now if now[key] != then[key]):
        raise UserError(f"{key} {now[key]} of {name}", f"{then[key]}, as in the recordings "
                        f"in {dataset.path}", do)
    if settings.get("env") != name or "seed" not in settings:
        return                                      # somebody else's play

    actions, films = column(rows, "actions"), []
    for _ in range(2):
        film = [env.reset(settings["seed"]), *(env.step(a)[0] for a in actions[1:])]
        films.append(np.array(film, int))
    if not np.array_equal(*films):
        print(f"{name} doesn't follow from its seed: no two agents play the same world.")
    elif np.abs(films[0] - rows["frames"]).max() > 8:   # less is a machine's rounding
        raise UserError(f"other first frames from {name} than in {dataset.path}",
                        "the world that was recorded", do)


def record_one(out, name, index, seed, length, skill):
    """Record an episode -> its length."""
    env = make_env(name)
    episode = play_episode(env, seed, index, length, skill)
    write_episode(out, index, episode, env.spec.event_type)
    return len(episode.frames)


def choose_skills(env, episodes, seed, skill):
    """The skill of each episode: `skill`, or drawn by the shares; "-": there is none."""
    shares = getattr(env, "skills", {})
    if skill and skill not in shares:
        raise UserError(f"--skill {skill}", f"one of {list(shares)}", "correct it")
    if skill or not shares:
        return [skill or "-"] * episodes
    names, p = list(shares), list(shares.values())
    return [str(rng_for(seed, "skill", i).choice(names, p=p)) for i in range(episodes)]


@contextmanager
def one_writer(folder):
    """Whoever else writes this dataset is waited for. The lock goes with its process; there
    is none on Windows, and none in a folder that can't be written."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / "lock", "a+", encoding="utf-8",
                                            errors="backslashreplace"))
            if fcntl:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    print(f"Waiting for {folder}, which {file.read()} writes.", flush=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(0)
                file.write(f"process {os.getpid()} ({this_command()})")
                file.flush()
        yield


def begin_recording(spec, out, settings):
    """Refuse other settings than the folder's, and too small a disk -> episodes to do."""
    old = read_about(out) if (out / "dataset.json").is_file() else {"settings": settings}
    for name, value in settings.items():
        begun = old["settings"].get(name)
        if value != begun:
            if isinstance(value, list) and begun:       # the first episode with another one
                pairs = enumerate(zip(value, begun, strict=False))
                name, value, begun = next((f"{name}[{i}]", a, b) for i, (a, b) in pairs
                                          if a != b)
            raise UserError(f"{name} = {value} for {out}, begun with {begun}", "the same",
                            "use another --out (--data.path), or delete it")
    todo = []
    for index in range(settings["episodes"]):
        try:
            open_episode(episode_path(out, index), spec)
        except UserError:                           # missing, or cut off
            todo.append(index)
    if todo or not old.get("complete"):
        need = len(todo) * settings["length"] * (3 * spec.height * spec.width + 128) / 1e6
        out.mkdir(parents=True, exist_ok=True)
        print(f"{out}: {len(todo)} episodes to record, at most {need:.0f} MB", flush=True)
        free = shutil.disk_usage(out).free / 1e6
        if free < need:
            raise UserError(f"{free:.0f} MB free for {out}", f"{need:.0f}", "make room, or "
                            "record fewer or shorter episodes")
        write_about(out, spec, settings, command=this_command())
    return todo


def record(env, out, episodes, length, seed, workers=0, skill=None):
    """Record episodes of at most `length` frames of the environment named `env`, in the
    worlds seed + i; goes on if interrupted. The bytes are the same for any number of
    workers. Returns the Dataset."""
    if episodes < 1 or length < 2 or seed < 0:
        raise UserError(f"{episodes} episodes of {length} frames, seed {seed}",
                        "at least 1, 2 and 0", "correct them")
    out, world = Path(out), make_env(env)
    skills = choose_skills(world, episodes, seed, skill)
    settings = {"env": env, "episodes": episodes, "length": length, "seed": seed,
                "skill": skill, "skills": skills}
    with one_writer(out):
        todo = begin_recording(world.spec, out, settings)
        jobs = [(out, env, i, seed, length, skills[i]) for i in todo]
        bar = tqdm(total=length * len(todo), unit="frame", desc="record", disable=not todo)
        try:
            for _, frames in work(record_one, jobs, workers):
                bar.total -= length - frames        # an early death shortens the whole
                bar.update(frames)
        finally:
            bar.close()
            for part in out.glob("*.tmp"):          # of a worker that was stopped
                part.unlink()
        if not read_about(out)["complete"]:
            finish_dataset(out, world.spec, settings)
    return Dataset(out)


def describe(dataset):
    """Markdown: in which share of the episodes each task was done, by skill; achievements
    first, in bold."""
    skills, tasks = np.array(dataset.skills), dataset.spec.tasks
    groups = {name: np.flatnonzero(skills == name) for name in dict.fromkeys(skills)}
    groups["all"] = np.arange(len(skills))
    frames = [dataset.lengths[group].sum() for group in groups.values()]
    table = {"task": groups, "---": ["---"] * len(groups),
             "episodes": map(len, groups.values()), "frames": frames}
    done = {"died": [i for i in groups["all"] if not dataset.rows(i)["continues"][-1]]}
    for task in dict.fromkeys((*dataset.spec.achievements, *tasks)):
        name = f"**{task}**" if task in dataset.spec.achievements else task
        done[name] = dataset.events[dataset.events[:, 2] == tasks.index(task), 0]
    if dataset.spec.returns:
        done = {"died": done["died"]}           # rewards all along have no list of events
        for task, name in enumerate(tasks[1:], 1):
            done[name] = [i for i in groups["all"]
                          if dataset.rows(i)["events"][:, task].any()]
        sums = np.array([dataset.rows(i)["events"][:, 0].sum() for i in groups["all"]])
        table["mean return"] = [f"{sums[group].mean():.4g}" for group in groups.values()]
    for name, episodes in done.items():
        shares = [np.isin(group, episodes).mean() for group in groups.values()]
        table[name] = [f"{100 * share:.0f} %" for share in shares]
    return "\n".join(f"| {name} | {' | '.join(map(str, x))} |" for name, x in table.items())


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("record", help="record play; goes on if interrupted")
    new.add_argument("--env", default="crafter", help="a world of envs/, or 'module:Class'")
    new.add_argument("--episodes", type=int, default=400)
    new.add_argument("--length", type=int, default=300, help="most frames in an episode")
    new.add_argument("--workers", type=int, default=0, help="0 = one per core")
    new.add_argument("--seed", type=int, default=0)
    new.add_argument("--skill", help="one of the recorded player's; default: a mix of all")
    new.add_argument("--out", required=True, help="folder")
    commands.add_parser("import-episodes", help="recordings of yours: see its --help")
    about = commands.add_parser("describe", help="what the players achieved")
    about.add_argument("--data", required=True, help="folder")
    return parser


def main():
    if sys.argv[1:2] == ["import-episodes"]:
        return importlib.import_module("envs.episodes").main(sys.argv[2:])
    flags = vars(make_parser().parse_args())
    command = flags.pop("command")
    print(describe(record(**flags) if command == "record" else Dataset(flags["data"])))


if __name__ == "__main__":
    import data                                     # subtle: one copy of the classes
    data.run_cli(data.main)
