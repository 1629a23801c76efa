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
import copy
import ctypes
import functools
import hashlib
import importlib
import json
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


def ratio(a, b):
    return np.sum(a) / max(np.sum(b), 1)


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
        from envs.minecraft import MineRL, parse_size
        return MineRL(*parse_size(name[7:] or "128x128"))
    module, _, cls = ("envs.crafter:Crafter" if name == "crafter" else name).partition(":")
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
    from envs.crafter import SKILLS
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
    from envs.crafter import SKILLS
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
    from envs.crafter import SKILLS
    from envs.minecraft import parse_size
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
    from envs.minecraft import download_vpt, import_video, import_vpt
    flags = vars(make_parser().parse_args())
    command = flags.pop("command")
    if command == "download-vpt":
        return download_vpt(**flags)
    importers = {"record": record, "import-vpt": import_vpt, "import-video": import_video}
    dataset = importers[command](**flags) if command in importers else Dataset(flags["data"])
    print(describe(dataset))


if __name__ == "__main__":
    import data  # subtle: one copy of the classes
    data.run_cli(data.main)
