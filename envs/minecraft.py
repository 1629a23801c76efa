"""Real Minecraft: importers of recordings, downloader, MineRL."""
import errno
import functools
import hashlib
import http.client
import importlib
import json
import math
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import (
    TYPES,
    ActionSpec,
    Dataset,
    EnvSpec,
    UserError,
    episode_path,
    finish_dataset,
    make_env,
    read_about,
    work,
    write_about,
    write_whole,
)

# ---------------------------------------------- real Minecraft: VPT recordings in, MineRL out
# After the published formats of OpenAI's recorder and of MineRL 1.0. README, "Not run here".

KEYBOARD = {"ESC": "escape", "back": "s", "drop": "q", "forward": "w", "inventory": "e",
            "jump": "space", "left": "a", "right": "d", "sneak": "left.shift",
            "sprint": "left.control", "swapHands": "f",
            **{f"hotbar.{i}": str(i) for i in range(1, 10)}}
MOUSE = ("attack", "use", "pickItem")                         # buttons 0, 1, 2
BUTTONS = tuple(sorted([*KEYBOARD, *MOUSE]))                  # MineRL's 23, in its order
WOODS = ("oak", "spruce", "birch", "jungle", "acacia", "dark_oak")
COUNTERS = {    # task: statistic, names in it; the table is ours, the paper's isn't public
    "mine_log": ("mine_block", *(f"{s}{w}_log" for s in ("", "stripped_") for w in WOODS)),
    "mine_cobblestone": ("mine_block", "stone", "cobblestone"),
    "mine_iron_ore": ("mine_block", "iron_ore"), "mine_coal": ("mine_block", "coal_ore"),
    "mine_diamond": ("mine_block", "diamond_ore"),
    "craft_planks": ("craft_item", *(f"{w}_planks" for w in (*WOODS, "crimson", "warped"))),
    **{f"craft_{x}": ("craft_item", x) for x in (
        "stick", "crafting_table", "furnace", "iron_ingot", "wooden_pickaxe", "stone_pickaxe",
        "iron_pickaxe")},
    **{f"open_{x}": ("custom", f"interact_with_{x}") for x in ("crafting_table", "furnace")},
    **{f"place_{x}": ("use_item", x) for x in ("crafting_table", "furnace")},
    **{f"use_{x}": ("use_item", x) for x in ("wooden_pickaxe", "stone_pickaxe", "iron_pickaxe")},
    "death": ("custom", "deaths")}                            # the last one is no task
COUNTER_OF = {f"minecraft.{kind}:minecraft.{name}": i
              for i, (kind, *names) in enumerate(COUNTERS.values()) for name in names}
LADDER = """mine_log 10 craft_planks 20 craft_crafting_table 1 place_crafting_table 1 craft_stick 4
craft_wooden_pickaxe 1 use_wooden_pickaxe 1 mine_cobblestone 3 craft_planks 4 craft_crafting_table 1
place_crafting_table 1 craft_stick 4 craft_stone_pickaxe 1 use_stone_pickaxe 1 mine_iron_ore 3
mine_cobblestone 8 craft_planks 4 craft_crafting_table 1 place_crafting_table 1 craft_furnace 1
craft_iron_ingot 3 craft_stick 2 craft_iron_pickaxe 1 use_iron_pickaxe 1 mine_diamond 0""".split()
RUNGS = """mine_log craft_planks craft_crafting_table craft_stick craft_wooden_pickaxe
mine_cobblestone craft_stone_pickaxe mine_iron_ore craft_furnace craft_iron_ingot
craft_iron_pickaxe mine_diamond""".split()                    # of the paper's success table
SEGMENT = 6000                                                # ticks of 50 ms, VPT's five minutes
GAP_MS, GAP_TICKS = 500, 10                                   # more between two lines is a pause
GUI_SCALE = {"5.7": 0.5, "5.8": 0.5, "6.7": 2, "6.8": 2, "6.9": 2}     # mouse, by recorder version
BROKEN = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
RETRY_SECONDS = 1.0                                           # doubles with each of five attempts


def parse_size(text):
    """ "128x128" -> (128, 128), height first."""
    if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):
        raise UserError(f"got size {text!r}; need HEIGHTxWIDTH; do: for example 128x128")
    return tuple(map(int, text.split("x")))


def minecraft_spec(height=128, width=128):
    """23 keys, a 121-class camera, 20 tasks, the paper's ladder (its times count items)."""
    return EnvSpec(f"minecraft_{height}x{width}", height, width, ActionSpec(23, (121,)),
                   tuple(COUNTERS)[:-1], tuple(zip(LADDER[::2], map(int, LADDER[1::2]))),
                   tuple(RUNGS))


def env_spec(name):
    """make_env(name).spec, for Minecraft without MineRL."""
    head, _, size = name.partition(":")
    return minecraft_spec(*parse_size(size or "128x128")) if head == "minerl" else \
        make_env(name).spec


def camera_class(degrees):
    """[pitch, yaw] in degrees (..., 2) -> class (...): 11 x 11 mu-law bins (mu 10, at most 10
    degrees, VPT's) in one number, counted on from no motion, which is 0 as in ActionSpec.zeros."""
    x = np.clip(np.asarray(degrees, np.float64), -10, 10)
    bins = np.round((np.sign(x) * np.log1p(np.abs(x)) / np.log(11) + 1) * 5).astype(np.int64)
    return (11 * bins[..., 0] + bins[..., 1] - 60) % 121


def camera_degrees(number):
    """Class (...) -> degrees (..., 2) at the bins' centres."""
    number = (np.asarray(number) + 60) % 121
    y = np.stack([number // 11, number % 11], -1) / 5 - 1
    return np.sign(y) * (11 ** np.abs(y) - 1)


def to_minerl(action):
    """Action dict of one step -> MineRL's: 23 keys of 0 and 1, camera float32 (2,)."""
    keys = {name: int(on) for name, on in zip(BUTTONS, action["binary"], strict=True)}
    return {**keys, "camera": camera_degrees(action["categorical"][0]).astype(np.float32)}


def from_minerl(command):
    """MineRL's action -> action dict of one step."""
    return {"binary": np.array([command[name] for name in BUTTONS], np.uint8),
            "categorical": camera_class(command["camera"])[None],
            "continuous": np.zeros(0, np.float32)}


class Counters:
    """Tasks from cumulative statistics, of a recording or of MineRL."""
    last = None                                               # the first that aren't empty: 0

    def rises(self, stats):
        """{"minecraft.KIND:minecraft.NAME": n} -> int64 (21,): by how much each of COUNTERS rose
        since the last statistics that weren't empty."""
        now = np.zeros(len(COUNTERS), np.int64)
        for key in stats.keys() & COUNTER_OF.keys():
            now[COUNTER_OF[key]] += stats[key]
        if not stats:
            return now
        rise = np.maximum(now - (now if self.last is None else self.last), 0)
        self.last = now
        return rise


@functools.lru_cache(8)
def area_weights(axis, n_in, n_out):
    """[(source index (n_out,), weight that fits (H, W, 3))] of each output pixel's area."""
    edge = np.arange(n_out + 1) * n_in / n_out
    index = edge[:-1].astype(int) + np.arange(-(-n_in // n_out) + 1)[:, None]
    weight = (np.minimum(index + 1, edge[1:]) - np.maximum(index, edge[:-1])).clip(0)
    weight = (weight / weight.sum(0)).astype(np.float32)
    return [(np.minimum(i, n_in - 1), w[:, None, None] if axis == 0 else w[:, None])
            for i, w in zip(index, weight, strict=True) if w.any()]


def fit_frame(frame, height, width):
    """uint8 (h, w, 3) -> (height, width, 3): means over areas. 360x640 becomes the paper's 384x640
    by 24 black rows below."""
    if frame.shape == (360, 640, 3) and (height, width) == (384, 640):
        return np.pad(frame, ((0, 24), (0, 0), (0, 0)))
    if frame.shape[:2] == (height, width):
        return np.ascontiguousarray(frame)
    for axis, n in enumerate((height, width)):
        frame = sum(np.take(frame, i, axis) * w
                    for i, w in area_weights(axis, frame.shape[axis], n))
    return (frame + 0.5).astype(np.uint8)


def draw_cursor(frame, x, y):
    """The frame with the cursor at x, y of the 1280x720 window, which the recorder leaves out."""
    x, y = (int(c * frame.shape[0] / 720) for c in (x, y))
    if 0 <= y < frame.shape[0] and 0 <= x < frame.shape[1]:
        frame = frame.copy()
        patch = frame[y: y + 16, x: x + 16]
        row, column = np.indices((*patch.shape[:2], 1))[:2]
        white = (0 < column) & (column < row - 1) & (column + row < 14)
        edge = (column <= row) & (column + row < 16)
        patch[:] = np.where(white, 255, np.where(edge, 0, patch))
    return frame


def parse_line(text, scale=1.0):
    """A line of the recorder -> MineRL action, hotbar slot or None, cursor or None, clock (ms,
    server tick), statistics, mouse buttons pressed now. One of BROKEN: it isn't such a line."""
    line = json.loads(text)
    mouse, gui = line["mouse"] or {}, bool(line["isGuiOpen"])
    keys, held = set((line["keyboard"] or {}).get("keys", ())), mouse.get("buttons", ())
    x, y, dx, dy = (float(mouse.get(k, 0)) for k in ("x", "y", "dx", "dy"))
    slot, clock = line.get("hotbar"), (line.get("milli"), line.get("serverTick"))
    if not np.isfinite([x, y, dx, dy]).all() or slot is not None and slot not in range(9):
        raise ValueError("mouse or hotbar out of range")
    action = {name: f"key.keyboard.{key}" in keys for name, key in KEYBOARD.items()}
    action.update({name: i in held for i, name in enumerate(MOUSE)})
    if gui and action["ESC"]:                                 # it closes the screen, as E does
        action["ESC"], action["inventory"] = False, True
    action["camera"] = np.array([dy, dx]) * 0.15 * (scale if gui else 1)    # degrees a count
    return (action, slot, (x, y) if gui and line["mouse"] else None, clock,
            dict(line.get("stats") or {}), list(mouse.get("newButtons", ())))


def read_lines(path, scale=1.0):
    """jsonl -> (columns, cursors, starts, lines in the file, fault or None).

    Line t acts on frame t, so its action lies in row t + 1 of the columns. starts: rows that begin
    a piece, after a pause or a death. Ends at the first line that is broken: the fault.
    """
    actions, events, cursors, starts, total, fault = [], [], [], {0}, 0, None
    counters, stuck, last_slot, last_clock = Counters(), False, None, (None, None)
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for total, text in enumerate((text for text in file if text.strip()), 1):
            if fault:                                         # count the rest
                continue
            try:
                action, slot, cursor, clock, stats, new = parse_line(text, scale)
                stuck = new == [0] if total == 1 else stuck and 0 not in new
                action["attack"] = action["attack"] and not stuck
                jumped = any(None not in (a, b) and not 0 <= b - a <= most for a, b, most in
                             zip(last_clock, clock, (GAP_MS, GAP_TICKS), strict=True))
                rises = counters.rises(stats)
            except BROKEN as error:
                fault = f"{path}, line {total}: {type(error).__name__} {str(error)[:60]}"
                continue
            if None not in (slot, last_slot) and slot != last_slot:     # a scroll leaves no key
                actions[-1]["binary"][BUTTONS.index(f"hotbar.{int(slot) + 1}")] = 1
            starts |= {total - 1} if jumped else set()
            starts |= {total} if rises[-1] else set()         # after the death
            actions.append(from_minerl(action)), cursors.append(cursor), events.append(rises > 0)
            last_slot, last_clock = slot, clock
    n, starts = len(actions), sorted(s for s in starts if s < len(actions))
    events = np.array(events, np.uint8).reshape(n, len(COUNTERS))
    columns = {"labelled": np.ones(n, bool), "events": events[:, :-1]}
    for k in ("binary", "categorical") if n else ():
        columns[k] = np.stack([actions[max(t - 1, 0)][k] for t in range(n)])
    for column in columns.values():
        column[starts] = 0                                    # what led there is not in the file
    return {**columns, "continues": 1 - events[:, -1]}, cursors, starts, total, fault


def video_frames(path, fps=None):
    """Frames uint8 (h, w, 3) of a video, one at a time: all as they are, or `fps` a second."""
    import imageio_ffmpeg  # of imageio[ffmpeg]
    # subtle: without passthrough ffmpeg repeats and drops frames to keep an even rate
    reader = imageio_ffmpeg.read_frames(
        str(Path(path).resolve()), input_params=["-threads", "1"],
        output_params=["-vf", f"fps={fps}"] if fps else ["-fps_mode", "passthrough", "-xerror"])
    width, height = next(reader)["size"]
    for frame in reader:
        yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)


def part_name(video):
    """Of its files while the import goes on; videos of one name may lie in two folders."""
    return f"{video.stem}-{zlib.crc32(str(video.resolve()).encode()):08x}"


def import_one(video, folder, size, fps=None):
    """Stream a video, and its jsonl unless fps is given, into FOLDER/NAME_I.npy; one frame is in
    memory at a time. -> report: rows of each piece, or why there are none; where it was cut."""
    spec, name, pieces, count = minecraft_spec(*size), part_name(video), {}, 0
    shapes = {"frames": (*size, 3), "binary": (23,), "categorical": (1,), "labelled": (),
              "events": (len(spec.tasks),), "continues": ()}
    row = np.zeros((), [(k, TYPES[k], shape) for k, shape in shapes.items()])
    frames, row["continues"], fault, reason = video_frames(video, fps), 1, None, None

    def write(file):
        nonlocal count
        head = {"descr": np.lib.format.dtype_to_descr(row.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**head, "shape": (0,)})     # room for any n
        for t in range(start, end):
            try:
                frame = next(frames, None)
            except (OSError, RuntimeError) as error:          # of ffmpeg: the video's fault
                raise ValueError(error) from None
            if frame is None:
                break
            for k in columns:
                row[k] = columns[k][t]
            row["frames"] = fit_frame(draw_cursor(frame, *cursors[t]) if cursors and cursors[t]
                                      else frame, *size)
            file.write(row.tobytes())
            count += 1
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**head, "shape": (count - start,)})

    try:
        if fps:
            columns, cursors, starts, total = {}, [], [0], None
        else:
            scale = GUI_SCALE.get(video.parent.name, 1)
            columns, cursors, starts, total, fault = read_lines(video.with_suffix(".jsonl"), scale)
            if fault and len(cursors) < 2 or not total:
                raise ValueError(fault or "no lines")
        while not pieces or count == end:                     # until the video ends
            i, start = len(pieces), count
            end = [*starts[1:], len(cursors)][i] if total else count + SEGMENT
            pieces[i] = 0
            write_whole(folder / f"{name}_{i}.npy", write)
            pieces[i] = count - start
            if total and end == len(cursors):
                break
        count += sum(1 for _ in frames)
        if total and abs(count - total) > 1:
            raise ValueError(f"{count} frames for {total} lines")
        if max(pieces.values()) < 2:
            raise ValueError(f"{count} frames")
    except UserError:                                         # no room: not the video's fault
        raise
    except (*BROKEN, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        pieces = {i: 0 for i in pieces}
    finally:
        frames.close()
    for i in [i for i, n in pieces.items() if n < 2]:         # a lone frame shows no action
        (folder / f"{name}_{i}.npy").unlink(missing_ok=True)
        del pieces[i]
    return {"video": str(video), "pieces": pieces, "skipped": reason, "fault": fault}


def guess_frames(video, fps):
    """About how many frames a video will give; an even guess from the first lines or header."""
    if fps:
        try:
            import imageio_ffmpeg
            return int(next(imageio_ffmpeg.read_frames(str(video.resolve())))["duration"] * fps)
        except (OSError, RuntimeError, StopIteration, KeyError):
            return 0
    with open(video.with_suffix(".jsonl"), "rb") as file:
        head = file.read(1 << 20)
    size = video.with_suffix(".jsonl").stat().st_size
    return round(head.count(b"\n") * size / max(len(head), 1)) + 1


def import_files(videos, out, size, workers=0, fps=None, lone=()):
    """Import videos into one dataset, in parallel; goes on if interrupted. Returns the Dataset.

    What can't be imported is named in one line, with the reason, and left out; so is lone
    {file: reason}, which the caller has named.
    """
    out, spec = Path(out), minecraft_spec(*size)
    names = [part_name(video) for video in videos]
    settings = {"size": list(size), "fps": fps,
                "videos": hashlib.sha256(" ".join(names).encode()).hexdigest()}
    old, parts, reports = {"settings": settings, "complete": False}, out / "parts", {}
    if (out / "dataset.json").is_file():
        old = read_about(out)
    numbered = any(out.glob("episode_*.npy"))                 # then no video may come or go
    for key in (k for k in settings if settings[k] != old["settings"].get(k)):
        if key != "videos" or numbered:
            raise UserError(f"got other {key} than {out} was begun with; need the same; do: use "
                            "another --out")
    if old["complete"]:
        print(f"{out} is complete")
        return Dataset(out)
    for video, name in zip(videos, names, strict=True):
        if (parts / f"{name}.json").is_file():
            reports[video] = json.loads((parts / f"{name}.json").read_text())
    todo = [v for v in videos if v not in reports or reports[v]["skipped"] and not numbered]
    need = sum(guess_frames(v, fps) for v in todo) * (3 * spec.height * spec.width + 48)
    parts.mkdir(parents=True, exist_ok=True)
    print(f"{out}: {len(todo)} of {len(videos)} videos to import, about {need / 1e6:.0f} MB",
          flush=True)
    if shutil.disk_usage(out).free < need:
        raise UserError(f"got {shutil.disk_usage(out).free / 1e6:.0f} MB free for {out}; need "
                        f"{need / 1e6:.0f}; do: make room, or import fewer or smaller frames")
    command = "python data.py " + " ".join(sys.argv[1:])
    write_about(out, spec, settings, complete=False, command=command)
    with tqdm(total=len(todo), unit="video", desc="import", disable=not todo) as bar:
        for (video, *_), got in work(import_one, [(v, parts, size, fps) for v in todo], workers):
            path, report = parts / f"{part_name(video)}.json", json.dumps(got).encode()
            write_whole(path, lambda file, report=report: file.write(report))
            reports[video] = json.loads(report)
            if got["skipped"] or got["fault"]:
                bar.write(f"{got['video']}: skipped: {got['skipped']}" if got["skipped"]
                          else f"{got['fault']}: the rest of it is left out")
            bar.update()
    pieces = [parts / f"{name}_{i}.npy" for video, name in zip(videos, names, strict=True)
              for i in reports[video]["pieces"]]
    skipped = {r["video"]: r["skipped"] for r in reports.values() if r["skipped"]}
    cut = sum(bool(r["fault"]) for r in reports.values() if not r["skipped"])
    whole, skipped = len(videos) - cut - len(skipped), {**dict(lone), **skipped}
    if not pieces:
        raise UserError(f"got {len(videos)} videos, none of which can be imported; need one; do: "
                        "see the reasons above")
    for index, piece in enumerate(pieces):
        if piece.exists():                                    # else moved before an interruption
            os.replace(piece, episode_path(out, index))
    finish_dataset(out, spec, {**settings, "skipped": skipped})
    shutil.rmtree(parts)
    print(f"{out}: {whole} videos whole, {cut} cut short, {len(skipped)} skipped; {len(pieces)} "
          "episodes", flush=True)
    return Dataset(out)


def import_vpt(src, out, size, part="all", workers=0):
    """Import the segments (NAME.mp4 and NAME.jsonl) in a folder and below it."""
    lines, films = ({path.with_suffix("") for path in Path(src).rglob(f"*{ending}")}
                    for ending in (".jsonl", ".mp4"))
    lone = {str(stem): f"no {'.mp4' if stem in lines else '.jsonl'}" for stem in lines ^ films}
    for stem in sorted(lone):
        print(f"{stem}: skipped: {lone[stem]} beside it")

    def session(stem):                                        # its segments stay on one side
        return zlib.crc32(re.sub(r"-\d{8}-\d{6}$", "", stem.name).encode()) % 20
    videos = [stem.with_name(stem.name + ".mp4") for stem in sorted(lines & films)
              if part == "all" or (part == "reference") == (session(stem) == 0)]
    if not videos:
        raise UserError(f"got no segments ({part}) in {src}; need NAME.mp4 with NAME.jsonl; do: "
                        "correct --src, or 'python data.py download-vpt'")
    return import_files(videos, out, size, workers, None, lone)


def import_video(videos, out, size, fps=20.0, workers=0):
    """Import any videos, without actions: every row is unlabelled."""
    if missing := [v for v in videos if not Path(v).is_file()]:
        raise UserError(f"got no file {missing[0]}; need videos; do: correct the path")
    if not 0 < fps < math.inf:
        raise UserError(f"got --fps {fps}; need frames a second above 0; do: leave it at 20")
    return import_files([Path(v) for v in videos], out, size, workers, fps)


def fetch(url, path, first):
    """Download url to path, going on from path.part -> None, or why there is nothing to keep.
    first: pattern of the content's first bytes, which an error page doesn't have."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(5):
        if attempt:
            tqdm.write(f"{url}: trying again ({failure})")
            time.sleep(RETRY_SECONDS * 2 ** attempt)
        have = part.stat().st_size if part.exists() else 0
        head = {"User-Agent": "dreamer4-mini", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            request = urllib.request.Request(url, headers=head)
            with urllib.request.urlopen(request, timeout=60) as answer:
                have = have if answer.status == 206 else 0    # else it starts from the beginning
                size = have + int(answer.headers.get("Content-Length") or -1)
                with open(part, "ab" if have else "wb") as file:
                    shutil.copyfileobj(answer, file, 1 << 20)
        except urllib.error.HTTPError as error:
            failure, offline = f"answer {error.code}", False
            if error.code == 416:                             # nothing is left: begin again
                part.unlink()
            elif error.code not in (408, 429, 500, 502, 503, 504):
                return failure
            continue
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise UserError(f"got {error}; need room; do: make some, the same command goes on")
            failure, offline = error, True
            continue
        failure, offline = "cut off", False
        with open(part, "rb") as file:
            good = re.match(first, file.read(16), re.DOTALL)
        if good and part.stat().st_size == size:
            return os.replace(part, path)
        if not good or part.stat().st_size > size:
            part.unlink()
        if not good:
            return "an error page"
    if offline:
        raise UserError(f"got no connection for {url} ({failure}); need the network; do: try later,"
                        " the same command goes on")
    return f"{failure}, five times"


def download_vpt(index, out, limit):
    """Download the first `limit` segments of an index file, one at a time."""
    try:
        content = json.loads(Path(index).read_text())
        base, relpaths = content["basedir"], list(map(str, content["relpaths"][:limit]))
        if not re.match("https?://", base):
            raise ValueError(f"basedir {base!r}")
    except (OSError, *BROKEN) as error:
        raise UserError(f"got {index} ({error}); need an index file of VPT with basedir and "
                        "relpaths; do: see the README, \"Minecraft\"")
    skipped = 0
    for relpath in tqdm(relpaths, "download", unit="segment"):
        stem = re.sub(r"\.mp4$", "", relpath).split("/")
        reason = None if all(re.fullmatch(r"(?a)\w[\w.+ -]*", x) for x in stem) else "unsafe name"
        local = Path(out, *stem[stem[0] == "data":])          # "data" may stand in either part
        url = f"{base.rstrip('/')}/".removesuffix("data/" * (stem[0] == "data"))
        for ending, first in ((".jsonl", rb"\s*{"), (".mp4", rb".{4}ftyp")):
            path = local.with_name(local.name + ending)
            if not reason and not path.exists():
                reason = fetch(url + urllib.parse.quote("/".join(stem)) + ending, path, first)
        if reason:
            skipped += 1
            tqdm.write(f"{relpath}: skipped: {reason}")
    print(f"{out}: {len(relpaths) - skipped} segments, {skipped} skipped")


class MineRL:
    """MineRL 1.0's HumanSurvival: from nothing, in a new world; 640x360 scaled to the given size.

    events: by how much each task's counter rose. Terminal: death, 72,000 steps, a broken game.
    """
    limit = 72_000                                            # 60 minutes

    def __init__(self, height=128, width=128):
        self.spec, self.game = minecraft_spec(height, width), self.make_game()

    def make_game(self):
        """The game; it starts with the first reset, which takes minutes."""
        try:
            specs = importlib.import_module("minerl.herobraine.env_specs.human_survival_specs")
            handlers = importlib.import_module("minerl.herobraine.hero.handlers")
        except ImportError as error:
            raise UserError(f"got no MineRL 1.0 ({error}); need it, with Java 8 and numpy < 1.24; "
                            "do: pip install git+https://github.com/minerllabs/minerl, see the "
                            "README, \"Minecraft\"")

        class Survival(specs.HumanSurvival):
            def create_observables(self):                     # deaths, opened tables and furnaces
                return [*super().create_observables(), handlers.ObserveFromFullStats("custom")]
        return Survival(fov_range=[70, 70], gamma_range=[2, 2], guiscale_range=[1, 1],
                        resolution=[640, 360], cursor_size_range=[16.0, 16.0], frameskip=1).make()

    def see(self, observation):
        """Keeps the frame -> by how much the counters rose."""
        self.frame = fit_frame(observation["pov"], self.spec.height, self.spec.width)
        return self.counters.rises({
            f"minecraft.{kind}:minecraft.{re.split('[.:]', name)[-1]}": int(n)
            for kind in {kind for kind, *_ in COUNTERS.values()} & observation.keys()
            for name, n in observation[kind].items()})

    def reset(self, seed):
        self.game.seed(int(seed))                             # of the next reset alone
        self.steps, self.counters = 0, Counters()
        self.see(self.game.reset())
        return self.frame

    def step(self, action):
        # ESC would end the episode; a screen is closed by `inventory`
        observation, _, done, info = self.game.step({**to_minerl(action), "ESC": 0})
        self.steps += 1
        if info.get("error"):                                 # then the observation is random
            print(f"MineRL broke off at step {self.steps}: {info['error']}", file=sys.stderr)
            return self.frame, np.zeros(len(self.spec.tasks), np.uint8), True
        rises = self.see(observation).clip(0, 255).astype(np.uint8)
        return self.frame, rises[:-1], bool(done or rises[-1] or self.steps >= self.limit)
