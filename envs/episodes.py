"""Your recordings become a dataset: `python data.py import-episodes --src DIR --out DIR`.

An episode is NAME.npz as Dreamer's replay buffers and Crafter's recorder write it:
    image      (T, H, W, 3) uint8; or NAME.mp4 beside it has the frames
    action     (T,) or (T, A) whole numbers, (T, A) one-hot, or (T, A) numbers in [-1, 1];
               action[t] led to image[t] (--lead: it was taken at image[t])
    is_first   optional (T,): where a new episode begins in a stream
    done, is_terminal          optional (T,): where one ends for good
    achievement_NAME, events   optional (T,), (T, N): tasks, that happen or are counted
    reward     optional (T,): without tasks it is the one, "return"
A file that isn't so is left out, with the reason. first_rows.png shows the first frames and
their actions: do they belong together? One episode in ten, or the last one, goes to
DIR_reference, which judges what was learned. Then: `train.py --data.env episodes:DIR`.
"""
import argparse
import collections
import itertools
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from data import (ActionSpec, Dataset, EnvSpec, Episode, UserError, episode_path,
                  finish_dataset, write_episode)

KINDS = ("discrete", "continuous", "onehot")
BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError,
          zipfile.BadZipFile, zlib.error, MemoryError)
MOST_CLASSES = 4096     # of a column; more are no classes


def read_columns(path, frames=True):
    """NAME.npz -> {column: array}, all as long, checked. ValueError says what is wrong."""
    with np.load(path, allow_pickle=False) as file:
        names = [name for name in file.files if frames or name != "image"]
        found = {name: file[name] for name in names}
        pictures = "image" in file.files
    film = path.with_suffix(".mp4")
    if not pictures and not film.exists():
        raise ValueError(f"no image in it, and no {film.name}")
    if not pictures and frames:
        found["image"] = np.stack(list(imageio.imiter(film)))
    if "action" not in found:
        raise ValueError("no action in it")
    columns = {name: x for name, x in found.items() if is_column(name)}
    lengths = {name: x.shape[0] if x.ndim else 0 for name, x in columns.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        raise ValueError(f"rows {lengths}, need as many of each and at least 2")
    for name, x in columns.items():
        shape = {"image": 4, "action": (1, 2), "events": 2}.get(name, 1)
        if x.dtype.kind not in "biuf" or x.ndim not in np.atleast_1d(shape) or not x.size:
            raise ValueError(f"{name} {x.dtype}{x.shape}")
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise ValueError(f"{name} is not finite")
    if frames and (columns["image"].dtype != np.uint8 or columns["image"].shape[3] != 3):
        raise ValueError(f"image {columns['image'].dtype}{columns['image'].shape}, need "
                         "uint8 (T, H, W, 3)")
    return columns


def is_column(name):
    known = ("image", "action", "reward", "done", "is_terminal", "is_first", "events")
    return name in known or name.startswith("achievement_")


def kind_of(action):
    """What the numbers of `action` look like: one of KINDS."""
    if action.ndim == 2 and action.shape[1] > 1:
        zero_one = ((action == 0) | (action == 1)).all()
        if zero_one and (action.sum(1) == 1).all():
            return "onehot"
    return "discrete" if (action == np.floor(action)).all() else "continuous"


def action_columns(action, kind):
    """-> (T, A) whole numbers from 0, or numbers in [-1, 1]. ValueError."""
    if kind == "onehot":
        if action.ndim != 2 or not (np.sort(action, 1)[:, -1] == action.sum(1)).all():
            raise ValueError(f"action {action.shape}, not one-hot")
        return action.argmax(1)[:, None]
    action = action.reshape(len(action), -1)
    if kind == "continuous" and np.abs(action).max() > 1:
        raise ValueError(f"action up to {np.abs(action).max():g}, need numbers in [-1, 1]: "
                         "scale them")
    if kind == "discrete" and ((action != np.floor(action)).any() or action.min() < 0
                               or action.max() >= MOST_CLASSES):
        raise ValueError(f"action from {action.min():g} to {action.max():g}, need whole "
                         f"numbers from 0 below {MOST_CLASSES}")
    return action


class Survey(NamedTuple):
    """What all files together say."""
    kind: str                   # of actions, one of KINDS
    width: int                  # their columns
    tasks: tuple
    classes: tuple              # sizes of the class columns
    counted: set                # tasks whose values count up over an episode

    @property
    def returns(self):
        return self.tasks == ("return",)


def task_values(columns):
    """{task: (T,)}: what the columns say of tasks; without any the reward."""
    found = {name.removeprefix("achievement_"): x for name, x in sorted(columns.items())
             if name.startswith("achievement_")}
    if "events" in columns:
        found |= {f"event_{i}": x for i, x in enumerate(columns["events"].T)}
    if not found and "reward" in columns:
        found = {"return": columns["reward"]}
    return {name: x.astype(np.float32) for name, x in found.items()}


def segments(columns):
    """Slices of a file's rows, an episode each: a new one begins at is_first, and behind an
    end. A row alone is none."""
    T = len(columns["action"])
    first = np.array(columns.get("is_first", np.zeros(T)), bool)
    first[1:] |= ends_of(columns)[:-1]
    first[0] = True
    bounds = [*np.flatnonzero(first), T]
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if b - a > 1]


def ends_of(columns):
    ends = np.zeros(len(columns["action"]), bool)
    for name in ("done", "is_terminal"):
        if name in columns:
            ends |= columns[name].astype(bool)
    return ends


def look_through(paths, kind):
    """A first look at all files -> those that are right, Survey. kind: of --actions."""
    columns, reasons = {}, {}
    for path in tqdm(paths, "reading"):
        try:
            columns[path] = read_columns(path, frames=False)
        except BROKEN as error:
            reasons[path] = error
    kinds = collections.Counter(kind_of(found["action"]) for found in columns.values())
    if kinds:                   # what most of them are: an episode of zeros may be anything
        kind = kind or kinds.most_common(1)[0][0]

    right, reference, classes, falling = [], None, 2, set()
    for path, found in columns.items():
        try:
            action = action_columns(found["action"], kind)
            values = task_values(found)
            signature = found["action"].shape[1:], tuple(values)
            if signature != (reference or signature):
                raise ValueError(f"actions and tasks {signature}, need {reference} as in "
                                 f"{right[0]}")
        except ValueError as error:
            reasons[path] = error
            continue
        right.append(path)
        reference, classes = signature, np.maximum(classes, action.max(0) + 1)
        for part in segments(found):
            falling |= {name for name, x in values.items() if (np.diff(x[part]) < 0).any()}
    for path, reason in reasons.items():
        print(f"left out: {path} ({reason or type(reason).__name__})")
    if not right:
        raise UserError("no episode that is right", "one at least", "see the reasons above,"
                        " and --help for what a file must hold")
    if kind == "onehot":
        classes = np.array(reference[0])
    tasks = reference[1]
    return right, Survey(kind, np.size(classes), tasks, tuple(int(n) for n in classes),
                         set(tasks) - falling - {"return"})


def episodes_of(columns, survey, lead):
    """A file's Episodes."""
    actions = action_columns(columns["action"], survey.kind).astype(np.float32)
    values, ends = task_values(columns), ends_of(columns)
    for part in segments(columns):
        acted, ended = actions[part].copy(), ends[part].copy()
        happened = np.zeros((len(acted), len(survey.tasks)), np.float32)
        for i, task in enumerate(survey.tasks):
            x = values[task][part]
            happened[:, i] = np.diff(x, prepend=x[:1]) if task in survey.counted else x
        if lead:                # what was done at a frame led to the next one
            for x in (acted, happened, ended):
                x[1:] = x[:-1].copy()
        acted[0], happened[0] = 0, 0
        ended[:-1] = False
        events = happened if survey.returns else happened > 0
        yield Episode(columns["image"][part], acted, events, ~ended)


def resized(frames, size):
    if size is None or frames.shape[1:3] == size:
        return frames
    return np.stack([Image.fromarray(x).resize(size[::-1], Image.BOX) for x in frames])


def picture_first_rows(path, episode, n=5):
    """The first rows of an episode, above each the action that led to it."""
    n = min(n, len(episode.frames))
    figure = Figure((2.2 * n, 2.8), tight_layout=True)
    for t, axis in enumerate(figure.subplots(1, n, squeeze=False)[0]):
        action = " ".join(f"{x:g}" for x in episode.actions[t][:8])
        axis.set_title(f"frame {t}\n" + (f"by action {action}" if t else "no action"),
                       fontsize=8)
        axis.imshow(episode.frames[t])
        axis.axis("off")
    figure.savefig(path, dpi=90)


def right_episodes(paths, survey, size, lead):
    """Yields the Episodes of the files, frames of one size; says which files are left
    out."""
    for path in tqdm(paths, "writing"):
        try:
            columns = read_columns(path)
            columns["image"] = resized(columns["image"], size)
            size = size or columns["image"].shape[1:3]
            if columns["image"].shape[1:3] != size:
                raise ValueError(f"frames {columns['image'].shape[1:3]}, the ones before "
                                 f"{size}: --size resizes them")
        except BROKEN as error:
            print(f"left out: {path} ({error or type(error).__name__})")
            continue
        yield from episodes_of(columns, survey, lead)


def write_apart(episodes, folders):
    """One episode in ten, or the last of fewer, goes to the second folder -> how many are
    in each."""
    counts = [0, 0]
    for episode in episodes:
        if not any(counts):
            folders[0].mkdir(parents=True, exist_ok=True)
            picture_first_rows(folders[0] / "first_rows.png", episode)
        held_out = sum(counts) % 10 == 9
        write_episode(folders[held_out], counts[held_out], episode)
        counts[held_out] += 1
    if 1 < counts[0] < 10:
        folders[1].mkdir(exist_ok=True)
        last = episode_path(folders[0], counts[0] - 1)
        last.rename(episode_path(folders[1], 0))
        counts = [counts[0] - 1, 1]
    return counts


def import_episodes(src, out, size=None, kind=None, lead=False):
    """All NAME.npz of src -> datasets in the folders out and out_reference. UserError:
    there is none that is right, or they hold something."""
    paths, folders = sorted(Path(src).glob("**/*.npz")), (Path(out), Path(f"{out}_reference"))
    if not paths:
        raise UserError(f"no .npz in {src}", "an episode a file", "correct --src")
    for folder in folders:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}, which is not empty", "a new folder", "name another "
                            "--out")
    paths, survey = look_through(paths, kind)
    counts = write_apart(right_episodes(paths, survey, size, lead), folders)
    if not any(counts):
        raise UserError("no episode of two frames", "one at least", "see the reasons above")

    # what all have in common
    height, width = np.load(episode_path(folders[0], 0), mmap_mode="r")["frames"].shape[1:3]
    if survey.kind == "continuous":
        actions = ActionSpec(numbers=survey.width)
    else:
        actions = ActionSpec(survey.classes)
    prompts = (("return", 0),) if survey.returns else ()
    spec = EnvSpec(folders[0].name, height, width, actions, survey.tasks, prompts,
                   returns=survey.returns)
    for folder, count in zip(folders, counts, strict=True):
        if count:
            finish_dataset(folder, spec, {})
            print(f"{folder}: {count} episodes")
    print(f"Frames {height}x{width}, {survey.kind} actions {actions}, tasks "
          f"{list(survey.tasks) or 'none'}. Look at {folders[0] / 'first_rows.png'}: does "
          "each action lead to the frame below it?")


class Recorded:
    """The world of imported recordings: nobody can play it."""

    def __init__(self, folder):
        self.spec = Dataset(folder).spec
        self.recordings = folder, f"{folder}_reference"

    def reset(self, seed):
        raise UserError(f"recordings {self.recordings[0]}", "a world to play", "play in "
                        "the dream alone")

    step = reset


def make(argument):
    """The world "episodes:DIR" of the recordings that were imported to DIR."""
    return Recorded(argument)


def parse_size(text):
    height, found, width = text.partition("x")
    if not found or not (height + width).isdecimal() or "0" in (height, width):
        raise argparse.ArgumentTypeError(f"got {text!r}, need HEIGHTxWIDTH")
    return int(height), int(width)


def main(argv):
    parser = argparse.ArgumentParser("python data.py import-episodes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--src", required=True, help="folder with NAME.npz")
    add("--out", required=True, help="new folder: the dataset")
    add("--size", type=parse_size, help="resize frames: HEIGHTxWIDTH")
    add("--actions", choices=KINDS, help="default: found out, and printed")
    add("--lead", action="store_true", help="action[t] was made at image[t]")
    args = parser.parse_args(argv)
    import_episodes(args.src, args.out, args.size, args.actions, args.lead)
