"""Your recordings become a dataset: `python data.py import-episodes --src DIR --out DIR`.

An episode is NAME.npz as Dreamer's replay buffers and Crafter's recorder write it:
    image      (T, H, W, 3) uint8; or NAME.mp4 beside it has the frames
    action     (T,) or (T, A) whole numbers, (T, A) one-hot, or (T, A) numbers in [-1, 1];
               action[t] led to image[t] (--lead: it was taken at image[t])
    is_first   optional (T,): where a new episode begins in a stream
    is_terminal, discount      optional (T,): where one ends for good (discount 0)
    is_last, done              optional (T,): where one ends; for good, if neither of the
                               two before is there
    achievement_NAME, events   optional (T,), (T, N): tasks, that happen or are counted
    reward     optional (T,): without tasks it is the one, "return"
With --lead rewards, tasks and ends came of action[t] too, but where there is is_first or
is_terminal: DreamerV3 keeps them beside the frame that they came with.
A file that isn't so is left out, with the reason. first_rows.png shows the first frames and
their actions: do they belong together? One episode in ten, or the last one, goes to
DIR_reference, which judges what was learned. Then: `train.py --data.env episodes:DIR`.
"""
import argparse
import collections
import itertools
import tokenize
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
FLAGS = ("is_first", "is_terminal", "is_last", "done", "discount")
BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, MemoryError,
          tokenize.TokenError, zipfile.BadZipFile, zlib.error)
MOST_CLASSES = 4096     # of a column; more are no classes


def read_columns(path, frames=True, size=None):
    """NAME.npz -> {column: array}, all as long, checked. ValueError says what is wrong."""
    with np.load(path, allow_pickle=False) as file:
        known = [name for name in file.files if name.startswith("achievement_")
                 or name in ("action", "reward", "events", *FLAGS)]
        columns = {name: file[name] for name in known}
        pictures = "image" in file.files
        if pictures and frames:
            columns["image"] = file["image"]
    film = path.with_suffix(".mp4")
    if not pictures and not film.exists():
        raise ValueError(f"no image in it, and no {film.name}")
    if not pictures and frames:
        columns["image"] = np.stack([resized(x, size) for x in imageio.imiter(film)])
    if "action" not in columns:
        raise ValueError("no action in it")
    lengths = {name: x.shape[0] if x.ndim else 0 for name, x in columns.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        raise ValueError(f"rows {lengths}, need as many of each and at least 2")
    for name, x in columns.items():
        axes = {"image": (4,), "action": (1, 2), "events": (2,)}.get(name, (1,))
        if x.dtype.kind not in "biuf" or x.ndim not in axes or not x.size:
            raise ValueError(f"{name} {x.dtype}{x.shape}")
        # before the first frame there is no action, whatever stands there
        if x.dtype.kind == "f" and name != "action" and not np.isfinite(x).all():
            raise ValueError(f"{name} is not finite")
    if frames:
        image = columns["image"]
        if image.dtype != np.uint8 or image.shape[3] != 3:
            raise ValueError(f"image {image.dtype}{image.shape}, need uint8 (T, H, W, 3)")
        columns["image"] = np.stack([resized(x, size) for x in image])
    return columns


def resized(frame, size):
    """uint8 (H, W, 3), resized by area."""
    if size is None or frame.shape[:2] == size:
        return frame
    return np.array(Image.fromarray(frame).resize(size[::-1], Image.BOX))


def ends_of(columns):
    """(T,) bool: where an episode ends for good, and where one ends or is cut off."""
    def flag(name):
        return columns.get(name, np.zeros(len(columns["action"]))).astype(bool)

    good, cut = flag("is_terminal"), flag("done") | flag("is_last")
    if "discount" in columns:
        good |= columns["discount"] == 0
    if "is_terminal" not in columns and "discount" not in columns:
        good = cut
    return good, good | cut


def segments(columns):
    """Slices of a file's rows, an episode each. A row alone is none."""
    T = len(columns["action"])
    first = np.array(columns.get("is_first", np.zeros(T)), bool)
    first[1:] |= ends_of(columns)[1][:-1]
    first[0] = True
    bounds = [*np.flatnonzero(first), T]
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if b - a > 1]


def acted(columns, lead):
    """(T,) bool: rows whose action led to a frame. The first of an episode has none: zeros,
    or anything, stand there; with --lead the last one's led to a frame if it ended it."""
    found, cuts = np.zeros(len(columns["action"]), bool), ends_of(columns)[1]
    for part in segments(columns):
        found[part] = True
        if lead:
            found[part.stop - 1] = results_lead(columns) and cuts[part.stop - 1]
        else:
            found[part.start] = False
    return found


def results_lead(columns):
    """Whether with --lead rewards and ends stand beside the action that they came of."""
    return "is_first" not in columns and "is_terminal" not in columns


def kind_of(action):
    """What the numbers of `action` look like: one of KINDS."""
    if action.ndim == 2 and action.shape[1] > 1:
        zero_one = ((action == 0) | (action == 1)).all()
        if zero_one and (action.sum(1) == 1).all():
            return "onehot"
    return "discrete" if (action == np.floor(action)).all() else "continuous"


def action_columns(action, kind):
    """-> (T, A) whole numbers from 0, or numbers in [-1, 1]. ValueError."""
    if not np.isfinite(action).all():
        raise ValueError("action is not finite")
    if kind == "onehot":
        if action.ndim != 2 or not (action.max(1) == 1).all() or (action.sum(1) != 1).any():
            raise ValueError(f"action {action.shape}, not one-hot")
        return action.argmax(1)[:, None]
    action = action.reshape(len(action), -1).astype(float)
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


def look_through(paths, kind, lead):
    """A first look at all files -> those that are right, Survey. kind: of --actions."""
    actions, columns, reasons = {}, {}, {}
    for path in tqdm(paths, "reading"):
        try:
            columns[path] = read_columns(path, frames=False)
            actions[path] = columns[path]["action"][acted(columns[path], lead)]
            if not len(actions[path]):
                raise ValueError("no episode of two frames in it")
        except BROKEN as error:
            reasons[path] = error
    # what most of them are: an episode of zeros may be anything
    kinds = collections.Counter(kind_of(action) for path, action in actions.items()
                                if path not in reasons)
    kind = kind or (kinds.most_common(1)[0][0] if kinds else "discrete")
    signatures = {path: (found["action"].shape[1:], tuple(task_values(found)))
                  for path, found in columns.items() if path not in reasons}
    usual = collections.Counter(signatures.values()).most_common(1)

    right, classes, falling = [], 2, set()
    for path, signature in signatures.items():
        try:
            if signature != usual[0][0]:
                raise ValueError(f"actions and tasks {signature}, most have {usual[0][0]}")
            most = action_columns(actions[path], kind).max(0).astype(int)
        except ValueError as error:
            reasons[path] = error
            continue
        right.append(path)
        classes = np.maximum(classes, most + 1)
        values = task_values(columns[path])
        for part in segments(columns[path]):
            falling |= {name for name, x in values.items() if (np.diff(x[part]) < 0).any()}
    for path, reason in reasons.items():
        print(f"left out: {path} ({reason or type(reason).__name__})")
    if not right:
        raise UserError("no episode that is right", "one at least", "see the reasons above,"
                        " and --help for what a file must hold")
    width, tasks = usual[0][0]
    classes = width if kind == "onehot" else tuple(int(n) for n in classes)
    return right, Survey(kind, len(classes), tasks, classes,
                         set(tasks) - falling - {"return"})


def episodes_of(columns, survey, lead):
    """A file's Episodes."""
    values, (ends, cuts) = task_values(columns), ends_of(columns)
    counts = acted(columns, lead)
    actions = np.zeros((len(counts), survey.width), np.float32)
    actions[counts] = action_columns(columns["action"][counts], survey.kind)
    for part in segments(columns):
        rows = np.arange(part.start, part.stop)
        led_to = results = rows     # whose action led to a row's frame, whose rewards came
        if lead:
            if results_lead(columns) and cuts[rows[-1]]:
                rows = np.append(rows, rows[-1])    # the frame that it led to wasn't kept
            led_to = np.concatenate([rows[:1], rows[:-1]])
            results = led_to if results_lead(columns) else rows
        events = np.zeros((len(rows), len(survey.tasks)), np.float32)
        for i, task in enumerate(survey.tasks):
            x = values[task][results]
            events[:, i] = np.diff(x, prepend=x[:1]) if task in survey.counted else x
        action, ended = actions[led_to], ends[results]
        action[0], events[0], ended[:-1] = 0, 0, False
        yield Episode(columns["image"][rows], action,
                      events if survey.returns else events > 0, ~ended)


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
            columns = read_columns(path, size=size)
            size = size or columns["image"].shape[1:3]
            if columns["image"].shape[1:3] != size:
                raise ValueError(f"frames {columns['image'].shape[1:3]}, the ones before "
                                 f"{size}: --size resizes them")
        except BROKEN as error:
            print(f"left out: {path} ({error or type(error).__name__})")
            continue
        yield from episodes_of(columns, survey, lead)


def write_apart(episodes, folders, returns):
    """One episode in ten, or the last of fewer, goes to the second folder -> how many are
    in each."""
    counts = [0, 0]
    for episode in episodes:
        if not any(counts):
            folders[0].mkdir(parents=True, exist_ok=True)
            picture_first_rows(folders[0] / "first_rows.png", episode)
        held_out = sum(counts) % 10 == 9
        kind = np.float32 if returns else np.uint8
        write_episode(folders[held_out], counts[held_out], episode, kind)
        counts[held_out] += 1
    if counts[0] > 1 and not counts[1]:
        folders[1].mkdir(exist_ok=True)
        last = episode_path(folders[0], counts[0] - 1)
        last.rename(episode_path(folders[1], 0))
        counts = [counts[0] - 1, 1]
    return counts


def reference_of(folder):
    return Path(f"{Path(folder)}_reference")


def import_episodes(src, out, size=None, kind=None, lead=False):
    """All NAME.npz of src -> datasets in the folders out and out_reference. UserError:
    there is none that is right, or they hold something."""
    paths = sorted(Path(src).glob("**/*.npz"))
    folders = Path(out), reference_of(out)
    if not paths:
        raise UserError(f"no .npz in {src}", "an episode a file", "correct --src")
    for folder in folders:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}, which is not empty", "a new folder", "name another "
                            "--out")
    paths, survey = look_through(paths, kind, lead)
    episodes = right_episodes(paths, survey, size, lead)
    counts = write_apart(episodes, folders, survey.returns)
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
    if sum(counts) < 3:
        print("Too few to train on, need 3: to train, to hold out, to judge.")
    print(f"Frames {height}x{width}, {survey.kind} actions {actions}, tasks "
          f"{list(survey.tasks) or 'none'}. Look at {folders[0] / 'first_rows.png'}: does "
          "each action lead to the frame below it?")


class Recorded:
    """The world of imported recordings: nobody can play it."""

    def __init__(self, folder):
        self.spec = Dataset(folder).spec
        self.recordings = folder, str(reference_of(folder))

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


def make_parser():
    parser = argparse.ArgumentParser("python data.py import-episodes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--src", required=True, help="folder with NAME.npz")
    add("--out", required=True, help="new folder: the dataset")
    add("--size", type=parse_size, help="resize frames: HEIGHTxWIDTH")
    add("--actions", choices=KINDS, help="default: found out, and printed")
    add("--lead", action="store_true", help="action[t] was made at image[t]")
    return parser


def main(argv):
    args = make_parser().parse_args(argv)
    import_episodes(args.src, args.out, args.size, args.actions, args.lead)
