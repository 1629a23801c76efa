"""Real Minecraft (Dreamer 4, Sections 4.1 and 4.3): recordings of players in, MineRL out.

minecraft_spec, Minecraft   23 keys, a camera, 20 tasks; MineRL 1.0 as an environment
import_vpt, download_vpt    OpenAI's recordings (VPT) become a dataset
import_video                any videos become a dataset without actions
After the formats that OpenAI and MineRL published; tested on generated recordings alone.
Row t of a dataset holds the action that led to frame t.
"""
import argparse
import http.client
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from skimage.transform import resize_local_mean
from tqdm import tqdm

from data import (ActionSpec, Dataset, EnvSpec, Episode, UserError, describe, episode_path,
                  finish_dataset, one_writer, read_about, read_json, run_cli, work,
                  write_about, write_episode, write_json)
from envs.gym import Gym

KEYBOARD = {"ESC": "escape", "back": "s", "drop": "q", "forward": "w", "inventory": "e",
            "jump": "space", "left": "a", "right": "d", "sneak": "left.shift",
            "sprint": "left.control", "swapHands": "f",
            **{f"hotbar.{i}": str(i) for i in range(1, 10)}}
MOUSE = ("attack", "use", "pickItem")           # buttons 0, 1, 2
BUTTONS = tuple(sorted([*KEYBOARD, *MOUSE]))    # MineRL's 23, in its order
CAMERA = len(BUTTONS)                           # the column after them

WOODS = ("oak", "spruce", "birch", "jungle", "acacia", "dark_oak")
TABLES = ("crafting_table", "furnace")
TOOLS = ("wooden_pickaxe", "stone_pickaxe", "iron_pickaxe")
STATISTICS = {      # task: kind, names; the table is ours, the paper's isn't public
    "mine_log": ("mine_block", *(f"{s}{w}_log" for s in ("", "stripped_") for w in WOODS)),
    "mine_cobblestone": ("mine_block", "stone", "cobblestone"),
    "mine_iron_ore": ("mine_block", "iron_ore"),
    "mine_coal": ("mine_block", "coal_ore"),
    "mine_diamond": ("mine_block", "diamond_ore"),
    "craft_planks": ("craft_item", *(f"{w}_planks" for w in (*WOODS, "crimson", "warped"))),
    **{f"craft_{x}": ("craft_item", x) for x in ("stick", *TABLES, "iron_ingot", *TOOLS)},
    **{f"open_{x}": ("custom", f"interact_with_{x}") for x in TABLES},
    **{f"place_{x}": ("use_item", x) for x in TABLES},
    **{f"use_{x}": ("use_item", x) for x in TOOLS},
    "death": ("custom", "deaths")}              # the last one is no task
COUNTER_OF = {f"minecraft.{kind}:minecraft.{name}": i
              for i, (kind, *names) in enumerate(STATISTICS.values()) for name in names}
PROMPT_ORDER = (    # task, times (of items; 0 = no end)
    ("mine_log", 10), ("craft_planks", 20), ("craft_crafting_table", 1),
    ("place_crafting_table", 1), ("craft_stick", 4), ("craft_wooden_pickaxe", 1),
    ("use_wooden_pickaxe", 1), ("mine_cobblestone", 3), ("craft_planks", 4),
    ("craft_crafting_table", 1), ("place_crafting_table", 1), ("craft_stick", 4),
    ("craft_stone_pickaxe", 1), ("use_stone_pickaxe", 1), ("mine_iron_ore", 3),
    ("mine_cobblestone", 8), ("craft_planks", 4), ("craft_crafting_table", 1),
    ("place_crafting_table", 1), ("craft_furnace", 1), ("craft_iron_ingot", 3),
    ("craft_stick", 2), ("craft_iron_pickaxe", 1), ("use_iron_pickaxe", 1),
    ("mine_diamond", 0))
ACHIEVEMENTS = tuple(dict.fromkeys(         # of the paper's table: what is mined or crafted
    task for task, _ in PROMPT_ORDER if task.startswith(("mine", "craft"))))

SEGMENT = 6000                          # frames of 50 ms: five minutes, VPT's
LONGEST_TICK = np.array([500, 10])      # milliseconds, server ticks; more is a pause
GUI_SCALE = {"5.7": 0.5, "5.8": 0.5, "6.7": 2, "6.8": 2, "6.9": 2}   # by recorder version
BROKEN = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
ATTEMPTS, RETRY_SECONDS = 5, 1.0        # the pause doubles with each attempt

# Neither preset was ever run. "minecraft" fits into 80 GB by formula (paper/bench.py),
# "paper" has the paper's sizes as far as they are given, and no plan for the memory.
COMMON = {
    "data.eval_length": 72_000, "tokenizer.channels": 16, "tokenizer.pack": 2,
    "tokenizer.mae_max": 0.9, "dynamics.time_every": 4, "dynamics.k_max": 64,
    "agent.horizon": 15, "agent.gamma": 0.997, "agent.k": 0,
    "train.boot_after": 0.0, "train.lr_policy": 5e-4}
PRESETS = {
    "minecraft": {
        **COMMON, "data.env": "minecraft", "data.path": "datasets/minecraft",
        "data.reference": "datasets/minecraft_reference", "data.eval_episodes": 10,
        "tokenizer.patch": 8, "tokenizer.dim": 512, "tokenizer.layers": 8,
        "tokenizer.heads": 4, "tokenizer.kv_heads": 4, "tokenizer.latents": 128,
        "tokenizer.context": 16, "dynamics.dim": 1024, "dynamics.layers": 16,
        "dynamics.heads": 8, "dynamics.kv_heads": 2, "dynamics.registers": 16,
        "dynamics.context": 96, "agent.hidden": 512, "agent.context": 32,
        "train.tokenizer_steps": 100_000, "train.dynamics_steps": 200_000,
        "train.agent_steps": 50_000, "train.imagine_steps": 5000, "train.batch": 16,
        "train.length": 32, "train.long_length": 128, "train.imagine_batch": 64,
        "train.lr_matrix": 2e-3, "train.lr": 5e-4},
    "paper": {
        **COMMON, "data.env": "minecraft:384x640", "data.eval_episodes": 1000,
        "data.path": "datasets/minecraft_384x640",
        "data.reference": "datasets/minecraft_384x640_reference", "tokenizer.patch": 16,
        "tokenizer.dim": 1024, "tokenizer.layers": 16, "tokenizer.heads": 8,
        "tokenizer.kv_heads": 8, "tokenizer.latents": 512, "tokenizer.context": 48,
        "tokenizer.local": False, "tokenizer.lpips": 0.2, "dynamics.dim": 2048,
        "dynamics.layers": 36, "dynamics.heads": 16, "dynamics.kv_heads": 4,
        "dynamics.registers": 32, "dynamics.context": 192, "dynamics.p_boot": 1.0,
        "dynamics.single_images": 0.3, "agent.bc_level": "uniform", "agent.hidden": 2048,
        "train.length": 64, "train.long_length": 256, "train.tokenizer_length": 64,
        "train.lr_matrix": 1e-3, "train.lr": 2e-4}}


# ----------------------------------------- actions, frames, and the lines of a recording

def parse_size(text):
    """ "128x128" -> (128, 128), height first."""
    if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):
        raise UserError(f"got size {text!r}; need HEIGHTxWIDTH; do: for example 128x128")
    return tuple(map(int, text.split("x")))


def minecraft_spec(height=128, width=128):
    """An action is 23 keys of 0 or 1, then the camera's class."""
    actions = ActionSpec(classes=(2,) * len(BUTTONS) + (121,))
    return EnvSpec(f"minecraft_{height}x{width}", height, width, actions,
                   tuple(STATISTICS)[:-1], PROMPT_ORDER, ACHIEVEMENTS)


def camera_class(degrees):
    """[pitch, yaw] (..., 2) -> class (...): 11 x 11 mu-law bins (mu 10, at most 10 degrees:
    VPT's) in one number, counted on from no motion, which is 0 as in ActionSpec.zeros."""
    x = np.clip(np.asarray(degrees, np.float64), -10, 10)
    y = np.sign(x) * np.log1p(np.abs(x)) / np.log(11)       # -1 .. 1
    bins = np.round((y + 1) * 5).astype(np.int64)
    return (11 * bins[..., 0] + bins[..., 1] - 60) % 121


def camera_degrees(number):
    """Class (...) -> degrees (..., 2) at the bins' centres."""
    number = (np.asarray(number, np.int64) + 60) % 121
    y = np.stack([number // 11, number % 11], -1) / 5 - 1
    return np.sign(y) * (11 ** np.abs(y) - 1)


def to_minerl(action):
    """Action (24,) -> MineRL's: 23 keys of 0 and 1, camera float32 (2,)."""
    keys = dict(zip(BUTTONS, map(int, action[:CAMERA]), strict=True))
    return {**keys, "camera": camera_degrees(action[CAMERA]).astype(np.float32)}


def from_minerl(command):
    """MineRL's action -> float32 (24,)."""
    keys = [command[name] for name in BUTTONS]
    return np.array([*keys, camera_class(command["camera"])], np.float32)


def count_tasks(statistics):
    """{"minecraft.KIND:minecraft.NAME": n} -> int64 (21,): how often, up to now."""
    counts = np.zeros(len(STATISTICS), np.int64)
    for key in statistics.keys() & COUNTER_OF.keys():
        counts[COUNTER_OF[key]] += statistics[key]
    return counts


def fit_frame(frame, height, width):
    """uint8 (h, w, 3) -> (height, width, 3): means over areas. 360x640 becomes the paper's
    384x640 by 24 black rows below."""
    if frame.shape == (360, 640, 3) and (height, width) == (384, 640):
        return np.pad(frame, ((0, 24), (0, 0), (0, 0)))
    mean = resize_local_mean(frame.astype("f4"), (height, width, 3), preserve_range=True)
    return (mean + 0.5).astype(np.uint8)


def draw_cursor(frame, x, y):
    """The frame with the cursor at x, y of the 1280x720 window; recorders leave it out."""
    x, y = (int(c * frame.shape[0] / 720) for c in (x, y))
    if not (0 <= y < frame.shape[0] and 0 <= x < frame.shape[1]):
        return frame
    frame = frame.copy()
    patch = frame[y: y + 16, x: x + 16]
    row, column = np.indices((*patch.shape[:2], 1))[:2]
    white = (column > 0) & (column < row - 1) & (column + row < 14)
    edge = (column <= row) & (column + row < 16)            # black
    patch[:] = np.where(white, 255, np.where(edge, 0, patch))
    return frame


class Line(NamedTuple):
    """One tick of a recording."""
    action: dict                    # as MineRL takes it
    slot: int | None                # of the hotbar
    cursor: tuple | None            # x, y in the window, while a screen is open
    clock: np.ndarray               # milliseconds, server ticks; nan = not recorded
    counts: np.ndarray | None       # of the tasks up to now; None = no statistics
    new_buttons: list               # of the mouse, pressed in this tick


class Recording(NamedTuple):
    """What a jsonl file says about its n frames, up to its first broken line."""
    columns: dict                   # field of a row: array (n, ...)
    cursors: list                   # n times (x, y) or None
    starts: list                    # rows that begin a piece: after a pause or a death
    total: int                      # lines in the file
    fault: str | None               # what is wrong with the first broken line


def parse_line(text, scale):
    """A line of the recorder -> Line. One of BROKEN: it isn't such a line."""
    line = json.loads(text)
    mouse, screen_open = line["mouse"] or {}, bool(line["isGuiOpen"])
    keys, buttons = set((line["keyboard"] or {}).get("keys", ())), mouse.get("buttons", ())
    x, y, dx, dy = (float(mouse.get(k, 0)) for k in ("x", "y", "dx", "dy"))
    slot, clock = line.get("hotbar"), [line.get("milli"), line.get("serverTick")]
    if not np.isfinite([x, y, dx, dy]).all() or slot not in (None, *range(9)):
        raise ValueError("mouse or hotbar out of range")
    action = {name: f"key.keyboard.{key}" in keys for name, key in KEYBOARD.items()}
    action.update({name: i in buttons for i, name in enumerate(MOUSE)})
    if screen_open and action["ESC"]:                       # it closes the screen, as E
        action["ESC"], action["inventory"] = False, True
    action["camera"] = np.array([dy, dx]) * 0.15 * (scale if screen_open else 1)   # degrees
    statistics = dict(line.get("stats") or {})
    return Line(action, slot=None if slot is None else int(slot),
                cursor=(x, y) if screen_open and line["mouse"] else None,
                clock=np.array([np.nan if c is None else c for c in clock], np.float64),
                counts=count_tasks(statistics) if statistics else None,
                new_buttons=list(mouse.get("newButtons", ())))


def align(lines, total, fault):
    """Lines -> Recording. Line t acts on frame t, so its action lies in row t + 1."""
    n, starts, counts = len(lines), {0}, None
    actions = np.zeros((n + 1, CAMERA + 1), np.float32)
    events = np.zeros((n, len(STATISTICS)), np.uint8)
    stuck = n > 0 and lines[0].new_buttons == [0]
    for t, line in enumerate(lines):
        # an attack that goes on from before the recording counts when it is pressed anew
        stuck = stuck and (t == 0 or 0 not in line.new_buttons)
        line.action["attack"] = line.action["attack"] and not stuck
        actions[t + 1] = from_minerl(line.action)
        # the wheel leaves no key: the tick before a new slot gets that slot's key
        last = lines[max(t - 1, 0)]
        if None not in (line.slot, last.slot) and line.slot != last.slot:
            actions[t, BUTTONS.index(f"hotbar.{line.slot + 1}")] = 1
        # an event is a rise since the last statistics; the first ones may be of other lives
        if line.counts is not None:
            events[t] = counts is not None and line.counts > counts
            counts = line.counts
        # a pause, or the frame after a death, begins another piece
        ticks = line.clock - last.clock
        if ((ticks < 0) | (ticks > LONGEST_TICK)).any():
            starts.add(t)
        if events[t, -1]:
            starts.add(t + 1)
    starts = sorted(t for t in starts if t < n)
    columns = {"actions": actions[:n], "labelled": np.ones(n, bool),
               "events": events[:, :-1]}
    for values in columns.values():
        values[starts] = 0                                  # what led there is unknown
    columns["continues"] = 1 - events[:, -1]
    return Recording(columns, [line.cursor for line in lines], starts, total, fault)


def read_lines(path, scale=1.0):
    """jsonl -> Recording. scale: of the mouse's motion while a screen is open."""
    lines, total, fault = [], 0, None
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for total, text in enumerate(filter(str.strip, file), 1):
            if fault:                                       # count the rest
                continue
            try:
                lines.append(parse_line(text, scale))
            except BROKEN as error:
                fault = f"{path}, line {total}: {type(error).__name__} {str(error)[:60]}"
    return align(lines, total, fault)


# ------------------------------- recordings become episodes on disk, and are downloaded

class Report(NamedTuple):
    """What became of a video; kept as JSON, so that an import can go on."""
    video: str
    episodes: int
    skipped: str | None             # why there are none
    fault: str | None               # why its recording was cut short


def video_frames(path, fps=None):
    """Frames uint8 (h, w, 3) of a video, one at a time: all as they are, or `fps` a second.
    ValueError: it is no whole video."""
    import imageio_ffmpeg                                   # of imageio[ffmpeg]
    path = str(Path(path).resolve())
    probe = imageio_ffmpeg.read_frames(path)
    try:
        about = next(probe)
    except (OSError, RuntimeError) as error:
        raise ValueError(error) from None
    finally:
        probe.close()
    width, height = about["size"]

    # subtle: without passthrough ffmpeg repeats and drops frames to keep an even rate;
    # without explode it paints over what is damaged
    how = ["-vf", f"fps={fps}"] if fps else ["-fps_mode", "passthrough"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-err_detect",
               "explode", "-threads", "1", "-i", path, *how, "-map", "0:v:0", "-pix_fmt",
               "rgb24", "-f", "rawvideo", "-"]
    size, n = 3 * width * height, 0
    with (tempfile.TemporaryFile() as log,
          subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=log) as process):
        try:
            while len(frame := process.stdout.read(size)) == size:
                yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
                n += 1
            failed = process.wait()
        finally:
            process.kill()
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if failed or (fps and lines):
        raise ValueError(lines[0] if lines else f"ffmpeg ended with {failed}")
    # some formats don't notice that a download broke off; sound may be longer, a little
    if fps and n / fps < 0.9 * about["duration"] - 1:
        raise ValueError(f"{n / fps:.1f} of {about['duration']:.1f} seconds")


def read_piece(frames, recording, start, end, size):
    """The next end - start frames, or those that are left, with these rows of a recording,
    or without actions (None) -> Episode."""
    spec, n = minecraft_spec(*size), 0
    pictures = np.zeros((end - start, *size, 3), np.uint8)
    for n, frame in enumerate(itertools.islice(frames, end - start), 1):
        cursor = recording and recording.cursors[start + n - 1]
        pictures[n - 1] = fit_frame(draw_cursor(frame, *cursor) if cursor else frame, *size)
    if recording is None:
        return Episode(pictures[:n], spec.actions.zeros(n), np.zeros((n, len(spec.tasks))),
                       continues=np.ones(n), labelled=np.zeros(n))
    columns = {name: values[start: start + n] for name, values in recording.columns.items()}
    return Episode(pictures[:n], **columns)


def import_one(video, folder, size, fps=None):
    """Import a video, and its jsonl unless fps is given, as episodes in a folder -> Report.
    One piece, at most SEGMENT frames, is in memory at a time."""
    frames, recording, skipped, count, episodes = video_frames(video, fps), None, None, 0, 0
    try:
        bounds = itertools.repeat((0, SEGMENT))
        if fps is None:
            scale = GUI_SCALE.get(video.parent.name, 1)
            recording = read_lines(video.with_suffix(".jsonl"), scale)
            if recording.fault and len(recording.cursors) < 2 or not recording.total:
                raise ValueError(recording.fault or "no lines")
            bounds = itertools.pairwise([*recording.starts, len(recording.cursors)])
        for start, end in bounds:
            piece = read_piece(frames, recording, start, end, size)
            count += len(piece.frames)
            if len(piece.frames) > 1:                       # a lone frame shows no action
                write_episode(folder, episodes, piece)
                episodes += 1
            if len(piece.frames) < end - start:             # the video is over
                break
        # the recorder writes one frame more than lines
        count += sum(1 for _ in frames)
        if recording and abs(count - recording.total) > 1:
            raise ValueError(f"{count} frames for {recording.total} lines")
        if not episodes:
            raise ValueError(f"{count} frames")
    except UserError:                                       # no room: not the video's fault
        raise
    except (*BROKEN, OSError) as error:
        episodes = 0
        skipped = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        frames.close()
    return Report(str(video), episodes, skipped, recording and recording.fault)


def import_todo(todo, out, names, size, workers, fps):
    """Import videos in parallel; yields video, Report. UserError: the disk is too small."""
    texts = [video.with_suffix(".jsonl") for video in todo if fps is None]
    lines = sum(text.read_bytes().count(b"\n") for text in texts if text.is_file())
    need, free = lines * (3 * math.prod(size) + 128), shutil.disk_usage(out).free
    if free < need:
        raise UserError(f"got {free >> 20} MB free in {out}; need {need >> 20}; do: make "
                        "room, or import fewer or smaller frames")
    jobs = [(video, out / "parts" / names[video], size, fps) for video in todo]
    with tqdm(total=len(jobs), unit="video", desc="import", disable=not jobs) as bar:
        for (video, folder, *_), report in work(import_one, jobs, workers):
            write_json(folder.with_name(f"{folder.name}.json"), report._asdict())
            if report.skipped:
                bar.write(f"{video}: skipped: {report.skipped}")
            elif report.fault:
                bar.write(f"{report.fault}: the rest of it is left out")
            bar.update()
            yield video, report


def import_files(videos, out, size, workers=0, fps=None):
    """Import videos into one dataset, in parallel; goes on if interrupted -> Dataset. What
    can't be imported is named in one line, with the reason, and left out."""
    with one_writer(Path(out)):
        return import_into(videos, out, size, workers, fps)


def import_into(videos, out, size, workers, fps):
    """import_files, where no other process writes the dataset."""
    out, spec, parts, reports = Path(out), minecraft_spec(*size), Path(out) / "parts", {}
    # videos of one name may lie in two folders
    names = {v: f"{v.stem}-{zlib.crc32(os.fsencode(v.resolve())):08x}" for v in videos}
    settings = {"size": list(size), "fps": fps,
                "videos": zlib.crc32(os.fsencode(" ".join(names.values())))}
    old = read_about(out) if (out / "dataset.json").is_file() else None
    numbered = any(out.glob("episode_*.npy"))               # then no video may come or go
    for key, value in settings.items():
        if old and value != old["settings"].get(key) and (key != "videos" or numbered):
            raise UserError(f"got other {key} than {out}; need the same; do: use another")
    if old and old["complete"]:
        print(f"{out} is complete")
        return Dataset(out)
    # import what was not done before an interruption; what was skipped gets another chance
    for video, name in names.items():
        if (parts / f"{name}.json").is_file():
            reports[video] = Report(**read_json(parts / f"{name}.json"))
    todo = [v for v in videos if v not in reports or reports[v].skipped and not numbered]
    parts.mkdir(parents=True, exist_ok=True)
    print(f"{out}: {len(todo)} of {len(videos)} videos to import", flush=True)
    command = " ".join(["python -m envs.minecraft", *sys.argv[1:]])
    write_about(out, spec, settings, complete=False, command=command)
    reports.update(import_todo(todo, out, names, size, workers, fps))
    # the pieces become episodes
    pieces = [episode_path(parts / names[video], i)
              for video in videos for i in range(reports[video].episodes)]
    if not pieces:
        raise UserError(f"got {len(videos)} videos, of which none can be read; need one; "
                        "do: see the reasons above")
    for index, piece in enumerate(pieces):
        if piece.exists():                                  # else it was moved before
            os.replace(piece, episode_path(out, index))
    skipped = {r.video: r.skipped for r in reports.values() if r.skipped}
    cut = sum(r.fault is not None and not r.skipped for r in reports.values())
    finish_dataset(out, spec, {**settings, "skipped": skipped})
    shutil.rmtree(parts)
    print(f"{out}: {len(videos) - cut - len(skipped)} videos whole, {cut} cut short, "
          f"{len(skipped)} skipped; {len(pieces)} episodes", flush=True)
    return Dataset(out)


def import_vpt(src, out, size, part="all", workers=0):
    """Import the segments (NAME.mp4 and NAME.jsonl) in a folder and below it."""
    videos, files = [], [*Path(src).rglob("*.mp4"), *Path(src).rglob("*.jsonl")]
    for stem in sorted({path.with_suffix("") for path in files}):
        # the segments of a session stay together
        session = re.sub(r"-\d{8}-\d{6}$", "", stem.name)
        is_reference = zlib.crc32(os.fsencode(session)) % 20 == 0
        if part == "all" or is_reference == (part == "reference"):
            videos.append(stem.with_name(f"{stem.name}.mp4"))
    if not videos:
        raise UserError(f"got no segments ({part}) in {src}; need NAME.mp4, NAME.jsonl; "
                        "do: correct --src, or 'python -m envs.minecraft download-vpt'")
    return import_files(videos, out, size, workers)


def import_video(videos, out, size, fps=20.0, workers=0):
    """Import any videos, without actions: every row is unlabelled."""
    for video in videos:
        if not Path(video).is_file():
            raise UserError(f"got no file {video}; need videos; do: correct the path")
    if not 0 < fps < math.inf:
        raise UserError(f"got --fps {fps}; need more than 0 a second; do: leave it at 20")
    return import_files(list(map(Path, videos)), out, size, workers, fps)


def receive(url, part, first):
    """Append what is left of url to the file part -> None, or why it isn't all there; what
    can't be completed is deleted."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "dreamer4-mini"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:                            # the server begins again
            have = 0
        size = have + int(answer.headers.get("Content-Length") or -1)
        with open(part, "ab" if have else "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    with open(part, "rb") as file:
        good, got = re.match(first, file.read(16), re.DOTALL), part.stat().st_size
    if good and got == size:
        return None
    if not good or got > size:
        part.unlink()
    return "cut off" if good else "an error page"


def fetch(url, path, first):
    """Download url to path, going on from path.part -> None, or why that is impossible.
    first: pattern of the content's first bytes, which an error page doesn't have."""
    part, failure = path.with_name(path.name + ".part"), None
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        if attempt:
            tqdm.write(f"{url}: trying again ({failure})")
            time.sleep(RETRY_SECONDS * 2 ** attempt)
        try:
            failure = receive(url, part, first)
        except urllib.request.HTTPError as error:
            failure = f"answer {error.code}"
            if error.code == 416:                           # nothing is left: begin again
                part.unlink(missing_ok=True)
            elif error.code not in (408, 429, 500, 502, 503, 504):
                return failure
        except (OSError, http.client.HTTPException) as error:
            failure = error
        if failure is None:
            os.replace(part, path)
        if failure in (None, "an error page"):
            return failure
    if isinstance(failure, Exception):
        raise UserError(f"got no connection for {url} ({failure}); need the network, and "
                        "room; do: try later, the same command goes on")
    return f"{failure}, {ATTEMPTS} times"


def download_segment(base, relpath, out):
    """Download NAME.jsonl and NAME.mp4 -> None, or why not."""
    stem = local = re.sub(r"\.mp4$", "", relpath).split("/")
    if not all(re.fullmatch(r"(?a)\w[\w.+ -]*", name) for name in stem):
        return "unsafe name"
    if stem[0] == "data":                                   # it may stand in base too
        base, local = base.removesuffix("data/"), stem[1:]
    for ending, first in ((".jsonl", rb"\s*{"), (".mp4", rb".{4}ftyp")):
        path = Path(out, *local[:-1], local[-1] + ending)
        url = base + urllib.parse.quote("/".join(stem)) + ending
        if not path.exists() and (reason := fetch(url, path, first)):
            return reason
    return None


def download_vpt(index, out, limit):
    """Download the first `limit` segments of an index file, one at a time."""
    try:
        content = json.loads(Path(index).read_text())
        base, relpaths = content["basedir"], list(map(str, content["relpaths"][:limit]))
        if not re.match("https?://", base):
            raise ValueError(f"basedir {base!r}")
    except (OSError, *BROKEN) as error:
        raise UserError(f"got {index} ({error}); need an index file of VPT with basedir "
                        "and relpaths; do: see the README, \"Minecraft\"") from None
    skipped = 0
    for relpath in tqdm(relpaths, "download", unit="segment"):
        if reason := download_segment(f"{base.rstrip('/')}/", relpath, out):
            skipped += 1
            tqdm.write(f"{relpath}: skipped: {reason}")
    print(f"{out}: {len(relpaths) - skipped} segments, {skipped} skipped")


# ----------------------------------------------------------------- the game, the commands

class Minecraft(gymnasium.Env):
    """MineRL 1.0's HumanSurvival: from nothing, in a new world; 640x360 scaled to a size.

    info["events"]: by how much each task's count rose. Ends with death or a broken game,
    is cut after 60 minutes. The game starts at the first reset, which takes minutes.
    """
    limit = 72_000                                          # steps
    tasks, prompt_order, achievements = tuple(STATISTICS)[:-1], PROMPT_ORDER, ACHIEVEMENTS
    action_space = spaces.MultiDiscrete(minecraft_spec().actions.classes)

    def __init__(self, height=128, width=128):
        self.size, self.game = (height, width), None
        self.observation_space = spaces.Box(0, 255, (height, width, 3), np.uint8)

    def start_game(self):
        try:
            from minerl.herobraine.env_specs.human_survival_specs import HumanSurvival
            from minerl.herobraine.hero.handlers import ObserveFromFullStats
        except ImportError as error:
            raise UserError(f"got no MineRL 1.0 ({error}); need it, Java 8, numpy < 1.24; "
                            "do: pip install git+https://github.com/minerllabs/minerl, see "
                            "the README, \"Minecraft\"") from None

        class Survival(HumanSurvival):
            def create_observables(self):                   # deaths, opened furnaces
                return [*super().create_observables(), ObserveFromFullStats("custom")]

        game = Survival(fov_range=[70, 70], gamma_range=[2, 2], guiscale_range=[1, 1],
                        resolution=[640, 360], cursor_size_range=[16.0, 16.0], frameskip=1)
        return game.make()

    def observe(self, observation):
        """Keeps the frame and the counts of all tasks."""
        self.frame = fit_frame(observation["pov"], *self.size)
        statistics = {}
        for kind in {kind for kind, *_ in STATISTICS.values()} & observation.keys():
            for name, n in observation[kind].items():
                name = re.split("[.:]", name)[-1]
                statistics[f"minecraft.{kind}:minecraft.{name}"] = int(n)
        self.counts = count_tasks(statistics)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.game is None:
            self.game = self.start_game()
        seed = int(self.np_random.integers(2 ** 31)) if seed is None else int(seed)
        self.game.seed(seed)                                # of the next reset alone
        self.steps = 0
        self.observe(self.game.reset())
        return self.frame, {}

    def step(self, action):
        # ESC would end the episode; a screen is closed by `inventory`
        observation, _, done, info = self.game.step({**to_minerl(action), "ESC": 0})
        self.steps += 1
        if info.get("error"):                               # then the observation is random
            print(f"MineRL broke off, step {self.steps}: {info['error']}", file=sys.stderr)
            return self.frame, 0.0, True, False, {}
        before = self.counts
        self.observe(observation)
        *rises, died = (self.counts - before).clip(0, 255).tolist()
        events = {task: n for task, n in zip(self.tasks, rises, strict=True) if n}
        over = self.steps >= self.limit
        return self.frame, 0.0, bool(done or died), over, {"events": events}


def as_world(game):
    """A Minecraft as make_env describes a world."""
    height, width = game.size
    return Gym(game, f"minecraft_{height}x{width}", game.size)


def make(argument):
    """make_env("minecraft:128x128"); without a size it is that one. Needs no MineRL."""
    return as_world(Minecraft(*parse_size(argument or "128x128")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parsers = parser.add_subparsers(dest="command", required=True)
    get = parsers.add_parser("download-vpt", help="OpenAI's recordings of players")
    get.add_argument("--index", required=True, help="index file: README, Minecraft")
    get.add_argument("--limit", type=int, default=10, help="segments of at most 5 minutes")
    vpt = parsers.add_parser("import-vpt", help="those recordings become a dataset")
    vpt.add_argument("--src", required=True, help="folder with NAME.mp4 and NAME.jsonl")
    vpt.add_argument("--part", choices=("all", "train", "reference"), default="all",
                     help="reference: about every 20th session, train: the others")
    video = parsers.add_parser("import-video", help="any videos, as play without actions")
    video.add_argument("videos", nargs="+", help="files")
    video.add_argument("--fps", type=float, default=20.0, help="frames a second to keep")
    for importer in (vpt, video):
        importer.add_argument("--size", type=parse_size, default=(128, 128),
                              help="HEIGHTxWIDTH of the frames, default 128x128")
        importer.add_argument("--workers", type=int, default=0, help="0 = one per core")
    for command in (get, vpt, video):
        command.add_argument("--out", required=True, help="folder")
    flags = vars(parser.parse_args())
    commands = {"download-vpt": download_vpt, "import-vpt": import_vpt,
                "import-video": import_video}
    dataset = commands[flags.pop("command")](**flags)
    if dataset is not None:
        print(describe(dataset))


if __name__ == "__main__":
    run_cli(main)
