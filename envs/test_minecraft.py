"""Tests of envs/minecraft.py: generated recordings, a stand-in for MineRL, a web store.
"Quirk n" is one of the fifteen of the recorder's files."""
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import imageio
import numpy as np
import pytest

import play
import train
from data import Dataset, UserError, VecEnv, make_env, play_episode
from envs import minecraft
from envs.minecraft import BUTTONS, CAMERA, camera_class, minecraft_spec

REPO = Path(__file__).parents[1]
LOG, DEATHS = "minecraft.mine_block:minecraft.oak_log", "minecraft.custom:minecraft.deaths"


def command(*words, module="envs.minecraft"):
    """Run a command as a user does -> (exit code, stdout, stderr)."""
    run = subprocess.run([sys.executable, "-m", module, *map(str, words)], cwd=REPO,
                         text=True, capture_output=True)
    return run.returncode, run.stdout, run.stderr


def vpt_line(t, keys="", buttons=(), new=(), motion=(0.0, 0.0), **more):
    """A tick as OpenAI's recorder writes it. more: other fields; None leaves one out."""
    mouse = {"x": more.pop("x", 640.0), "y": 400.0, "dx": motion[0], "dy": motion[1],
             "dwheel": 0.0, "buttons": list(buttons), "newButtons": list(new)}
    keyboard = {"keys": [f"key.keyboard.{key}" for key in keys.split()], "chars": ""}
    line = {"mouse": mouse, "keyboard": keyboard, "isGuiOpen": False, "hotbar": 0,
            "yaw": 0.5 * t, "tick": t, "milli": 1.6e12 + 50 * t, "serverTick": 9000 + t,
            "stats": {"minecraft.custom:minecraft.jump": 7 + t}, **more}
    return {name: value for name, value in line.items() if value is not None}


def vpt_lines(n, keys="", **more):
    return [vpt_line(t, keys, **more) for t in range(n)]


def vpt_frame(t, height=360, width=640):
    """Twelve grey bars that spell t in binary: H.264 can't hide which frame it is."""
    bars = np.where((t >> np.arange(12)) & 1, 210, 60).astype(np.uint8)
    bars = bars.repeat(width // 12 + 1)[:width, None]
    return np.ascontiguousarray(np.broadcast_to(bars, (height, width, 3)))


CODECS = {"mp4": "libx264", "webm": "libvpx-vp9"}


def frame_numbers(rows):
    """Rows of an episode, of any size -> the t of their vpt_frame."""
    frames = rows["frames"]
    height, width = frames.shape[1:3]
    middle = ((np.arange(12) + 0.5) * (640 // 12 + 1) * width / 640).astype(int)
    bright = frames[:, height // 2, middle].mean(-1) > 135
    return (bright << np.arange(12)).sum(1).tolist()


def write_film(path, frames, **how):
    with imageio.get_writer(path, macro_block_size=8, **{"fps": 20, **how}) as film:
        for frame in frames:
            film.append_data(frame)


def write_lines(path, lines, tail=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + tail)
    return path


def write_segment(folder, lines, n=None, name="P-1-20220101-120000", tail=b"", **how):
    """NAME.jsonl and NAME.mp4, by default of one frame more than lines -> the mp4."""
    path = write_lines(folder / f"{name}.jsonl", lines, tail).with_suffix(".mp4")
    write_film(path, map(vpt_frame, range(len(lines) + 1 if n is None else n)), **how)
    return path


def import_pieces(path, size=(32, 64), fps=None):
    """Import a video in this process -> report, rows of its pieces."""
    out = path.parent / f"out_{path.stem}_{size[0]}"
    report = minecraft.import_one(path, out, size, fps)
    return report, [np.load(file) for file in sorted(out.glob("*"))]


def keys_of(columns):
    """Names of the keys pressed in each row."""
    return [" ".join(name for name, on in zip(BUTTONS, row, strict=False) if on)
            for row in columns["actions"]]


def test_camera_bins_agree_with_the_published_centres_and_edges():
    """Fails if mu, the range, the rounding or the order of pitch and yaw are others."""
    half = np.array([0.615, 1.609, 3.215, 5.809, 10])
    centres = np.array([*-half[::-1], 0, *half])
    pairs = minecraft.camera_degrees((np.arange(121) - 60) % 121).reshape(11, 11, 2)
    assert np.abs(pairs[..., 0].T - centres).max() < 1e-3           # pitch is the tens
    assert np.abs(pairs[..., 1] - centres).max() < 1e-3
    half = np.array([0.271, 1.053, 2.317, 4.358, 7.655])
    edges = np.array([*-half[::-1], *half])
    x = np.random.default_rng(0).uniform(-14, 14, (10_000, 2))
    clear = np.abs(x[..., None] - edges).min((1, 2)) > 1e-3         # the edges' precision
    pitch, yaw = np.searchsorted(edges, x).T
    assert (camera_class(x) == (11 * pitch + yaw - 60) % 121)[clear].all()
    assert clear.mean() > 0.99 and camera_class([[0, 0], [50, -50]]).tolist() == [0, 50]


def test_minerl_mapping_and_back_is_the_identity():
    """Fails if a key is lost or moved, or a bin's centre lies in another bin."""
    actions = minecraft_spec().actions.sample(np.random.default_rng(0), 10_000)
    commands = [minecraft.to_minerl(action) for action in actions]
    hotbar = " ".join(f"hotbar.{i}" for i in range(1, 10))
    assert " ".join(commands[0]) == (
        f"ESC attack back drop forward {hotbar} inventory jump left pickItem right sneak "
        "sprint swapHands use camera")
    assert commands[0]["camera"].dtype == np.float32 and type(commands[0]["use"]) is int
    back = np.stack([minecraft.from_minerl(command) for command in commands])
    assert back.dtype == np.float32 and (back == actions).all()
    assert actions[:, :CAMERA].max() == 1 and actions[:, CAMERA].max() == 120


def test_line_acts_on_its_frame_and_is_stored_with_the_next(tmp_path):
    """Fails if actions are off by one against the frames, or row 0 has an action."""
    presses = ["w", "", "s q", "left.shift 9", "", "f escape", "d"]
    lines = [vpt_line(t, keys, motion=(20.0 * t, 0)) for t, keys in enumerate(presses)]
    report, (rows,) = import_pieces(write_segment(tmp_path, lines))
    assert frame_numbers(rows) == list(range(7)) and report.skipped is report.fault is None
    assert keys_of(rows)[1:] == ["forward", "", "back drop", "hotbar.9 sneak", "",
                                 "ESC swapHands"]
    yaw = camera_class([[0, 3 * t] for t in range(6)])
    assert rows["actions"][1:, CAMERA].tolist() == yaw.tolist() and len(set(yaw)) > 3
    assert rows["labelled"].tolist() == [False] + [True] * 6 and rows["continues"].all()
    assert not rows["actions"][0].any()


@pytest.mark.parametrize("more", [-2, -1, 0, 1, 2])
def test_extra_frame(tmp_path, more):
    """Quirk 1. Fails if the extra last frame is kept, or a larger difference is let by."""
    report, pieces = import_pieces(write_segment(tmp_path, vpt_lines(9), 9 + more))
    if abs(more) > 1:
        assert f"{9 + more} frames for 9 lines" in report.skipped
        assert not pieces and not [path for path in tmp_path.iterdir() if path.is_dir()]
    else:
        assert frame_numbers(pieces[0]) == list(range(9 + min(more, 0)))


def test_frames_are_counted_not_timed(tmp_path):
    """Quirk 1. Fails if frames are repeated or dropped to fill gaps in the time stamps."""
    gap = ["-vf", "setpts=if(gt(N\\,4)\\,N+9\\,N)/(20*TB)", "-fps_mode", "vfr"]
    path = write_segment(tmp_path, vpt_lines(9), output_params=gap)
    assert frame_numbers(import_pieces(path)[1][0]) == list(range(9))
    assert sum(1 for _ in minecraft.video_frames(path)) in (9, 10)  # ffmpeg 7.0: one less
    assert sum(1 for _ in minecraft.video_frames(path, 20)) > 15    # control: a gap


CASES = {       # quirk: lines; keys, and [pitch, yaw] if there is any, of rows 1, 2, ...
    "2, a button from before counts when pressed anew": (
        [vpt_line(t, buttons=[0, 1], new=[0] * (t in (0, 4))) for t in range(6)],
        ["use"] * 4 + ["attack use"]),
    "2, control": (vpt_lines(6, buttons=[0, 1]), ["attack use"] * 5),
    "3, a scroll gives the key a tick before, the first slot none": (
        [vpt_line(t, hotbar=slot) for t, slot in enumerate([4, 4, 4, 7, 7, 0])],
        ["", "", "hotbar.8", "", "hotbar.1"]),
    "3, lines without slots": (vpt_lines(3, "3", hotbar=None), ["hotbar.3"] * 2),
    "5, motion under 7 counts stays": (
        [vpt_line(t, motion=(0, dy)) for t, dy in enumerate([2, -2, 6, 1, 0])],
        [""] * 4, [[0.3, 0], [-0.3, 0], [0.9, 0], [0, 0]]),
    "7, ESC in a screen is inventory": (
        [vpt_line(t, "escape", isGuiOpen=t == 1) for t in range(4)],
        ["ESC", "inventory", "ESC"]),
    "8, late ticks are no pause": (
        [vpt_line(t, milli=1.6e12 + 130 * t) for t in range(4)], [""] * 3),
    "8, lines without clocks": (vpt_lines(4, milli=None, serverTick=None), [""] * 3),
    "9, empty ticks stay: else time would jump": (
        [{**line, "mouse": None, "keyboard": None} for line in vpt_lines(5)], [""] * 4),
    "10, a cursor that jumps as its screen closes is no motion": (
        [vpt_line(0, isGuiOpen=True, x=9.0), vpt_line(1), vpt_line(2, yaw=99.0)], ["", ""]),
    "12, unknown keys": (vpt_lines(3, "f3 tab t unknown", buttons=[3, 4]), [""] * 2),
    "15, BASALT's lines": (
        [{k: x[k] for k in ("mouse", "keyboard", "isGuiOpen")} for x in vpt_lines(4, "w")],
        ["forward"] * 3)}


@pytest.mark.parametrize("case", CASES)
def test_lines_give_these_actions(tmp_path, case):
    """Fails if the quirk that the case names is read in another way."""
    lines, keys, *degrees = CASES[case]
    recording = minecraft.read_lines(write_lines(tmp_path / "a.jsonl", lines))
    assert keys_of(recording.columns) == ["", *keys]
    wanted = camera_class(degrees[0] if degrees else np.zeros((len(keys), 2))).tolist()
    assert recording.columns["actions"][:, CAMERA].tolist() == [0, *wanted]
    assert np.count_nonzero(wanted) == 3 * len(degrees)
    assert not recording.columns["events"].any() and recording.starts == [0]
    assert recording.total == len(lines) and recording.fault is None


def test_cursor_is_drawn_where_a_screen_is_open(tmp_path):
    """Quirk 4. Fails if it is missing, elsewhere, drawn after the resize, or else drawn."""
    lines = [vpt_line(t, isGuiOpen=t > 2, x=100.0 + 100 * t) for t in range(6)]
    path = write_segment(tmp_path, lines)
    (large,), (small,) = (import_pieces(path, size)[1] for size in ((360, 640), (90, 160)))
    flat = large["frames"][:, 100:101].astype(int)
    changed = np.abs(large["frames"] - flat).max(-1) > 30
    assert not changed[:3].any()
    for t in range(3, 6):
        y, x = np.argwhere(changed[t]).T
        assert (y.min(), x.min()) == (200, 50 + 50 * t)
        assert y.max() < 216 and x.max() < 66 + 50 * t
    for t in (1, 4):                                                # a mean over 4x4 pixels
        wanted = large["frames"][t].reshape(90, 4, 160, 4, 3).mean((1, 3))
        assert np.abs(small["frames"][t] - wanted).max() <= 1
    frame = np.zeros((360, 640, 3), np.uint8)
    for x, y in ((1279, 719), (-5, 3), (5000, 3), (1e300, 0)):      # edges, and beyond
        assert minecraft.draw_cursor(frame, x, y).shape == frame.shape


def test_gui_motion_is_scaled_by_version(tmp_path):
    """Quirk 6. Fails if old recorders' motion in screens isn't rescaled, or other is."""
    lines = [vpt_line(t, motion=(18.0, 0), isGuiOpen=t % 2 == 1) for t in range(4)]
    for version, factor in {"5.7": 0.5, "6.9": 2, "6.10": 1, "10.0": 1}.items():
        _, (rows,) = import_pieces(write_segment(tmp_path / version, lines))
        wanted = camera_class([[0, 2.7], [0, 2.7 * factor], [0, 2.7]])
        assert rows["actions"][1:, CAMERA].tolist() == wanted.tolist()


@pytest.mark.parametrize("field, jump", [
    ("milli", 4000), ("milli", -900), ("serverTick", 40), ("death", 1)])
def test_pauses_and_deaths_cut_the_segment(tmp_path, field, jump):
    """Quirks 8, 14. Fails if a sequence goes on after either, or a death isn't terminal."""
    lines = [vpt_line(t, "w", stats={DEATHS: 2}) for t in range(12)]
    for t in range(4, 12) if field == "death" else ():
        lines[t]["stats"] = {DEATHS: 3}
    for t in range(5, 12) if field != "death" else ():
        lines[t][field] += jump
    _, pieces = import_pieces(write_segment(tmp_path, lines))
    assert list(map(frame_numbers, pieces)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]
    assert pieces[0]["continues"].tolist() == [1, 1, 1, 1, int(field != "death")]
    assert pieces[1]["continues"].all()
    for piece in pieces:
        assert piece["labelled"].tolist() == [False] + [True] * (len(piece) - 1)
        assert keys_of(piece) == [""] + ["forward"] * (len(piece) - 1)


def test_events_are_rises_over_the_first_statistics(tmp_path):
    """Quirk 11. Fails if an earlier life counts, a rise comes late, early or twice, or an
    empty line in between forgets the counters."""
    stone, spruce = LOG.replace("oak_log", "stone"), LOG.replace("oak", "stripped_spruce")
    stats = [{}, {LOG: 3}, {LOG: 3}, {LOG: 5}, {}, {LOG: 5, stone: 1},
             {LOG: 5, stone: 1, spruce: 2}]
    lines = [vpt_line(t, stats=counts) for t, counts in enumerate(stats)]
    recording = minecraft.read_lines(write_lines(tmp_path / "a.jsonl", lines))
    tasks = minecraft_spec().tasks
    assert [(t, tasks[i]) for t, i in np.argwhere(recording.columns["events"])] == [
        (3, "mine_log"), (5, "mine_cobblestone"), (6, "mine_log")]


@pytest.mark.parametrize("tail, total, broken", [
    (b'{"mouse": {"x": 1', 7, True), (b"\xff\xfe\n", 7, True), (b"\n\n", 6, False)])
def test_broken_last_line(tmp_path, tail, total, broken):
    """Quirk 13. Fails if a half-written line ends the import, or is left out silently."""
    path = write_segment(tmp_path, vpt_lines(6), total + 1, tail=tail)
    text = path.with_suffix(".jsonl")                               # odd bytes do no harm
    text.write_bytes(text.read_bytes().replace(b'"chars": ""', b'"chars": "\xe9\x80"', 3))
    report, (rows,) = import_pieces(path)
    assert len(rows) == 6 and report.skipped is None
    assert f"{text}, line 7" in report.fault if broken else report.fault is None


def test_tasks_and_their_statistics():
    """Fails if a task is missing, a statistic belongs to two, or a prompt has no task."""
    spec = minecraft_spec()
    prompts = spec.prompt_order
    assert len(spec.tasks) == 20 and "death" not in spec.tasks and spec.actions.width == 24
    assert (len(prompts), len(spec.achievements)) == (25, 12)
    assert (prompts[0], prompts[-1]) == (("mine_log", 10), ("mine_diamond", 0))
    assert {*spec.achievements, *(task for task, _ in prompts)} <= set(spec.tasks)
    names = {"mine_block:minecraft.jungle_log": "mine_log",
             "craft_item:minecraft.warped_planks": "craft_planks",
             "custom:minecraft.interact_with_furnace": "open_furnace",
             "use_item:minecraft.crafting_table": "place_crafting_table",
             "use_item:minecraft.iron_pickaxe": "use_iron_pickaxe",
             "craft_item:minecraft.iron_ingot": "craft_iron_ingot"}
    for name, task in names.items():
        assert spec.tasks[minecraft.COUNTER_OF[f"minecraft.{name}"]] == task
    assert LOG.replace("log", "leaves") not in minecraft.COUNTER_OF


def test_frames_are_averaged_over_areas_or_padded():
    """Fails if the resize drops pixels, or the paper's 384 rows aren't 360 and a border."""
    frame = np.random.default_rng(0).integers(0, 256, (360, 640, 3), dtype=np.uint8)
    tall = minecraft.fit_frame(frame, 384, 640)
    assert (tall == np.concatenate([frame, np.zeros((24, 640, 3))])).all()
    assert (minecraft.fit_frame(frame, 360, 640) == frame).all()
    fine = frame.astype(float).repeat(16, 0)                        # 5760 = 128 * 45 rows
    wanted = fine.reshape(128, 45, 128, 5, 3).mean((1, 3))
    assert np.abs(minecraft.fit_frame(frame, 128, 128) - wanted).max() <= 0.51
    assert minecraft.fit_frame(frame[:5, :7], 32, 32).shape == (32, 32, 3)


def test_import_vpt_command(tmp_path):
    """Fails if bytes, skips, summary or dataset are wrong, or work is done twice."""
    folder, out = tmp_path / "in" / "10.0", tmp_path / "out"
    words = ["import-vpt", "--src", tmp_path / "in", "--out", out, "--workers", 2, "--size"]
    for i, n in enumerate((None, None, 5, None)):
        lines = [vpt_line(t, "w", stats={LOG: 3 + (t > 7)}) for t in range(10)]
        for line in lines[6:] if i == 3 else ():
            line["milli"] += 60_000
        write_segment(folder, lines, n, f"P-{i}-20220101-120000", b"{oops\n" * (i == 1))
    write_lines(folder / "lonely.jsonl", vpt_lines(1))
    write_lines(folder / "cut.jsonl", vpt_lines(1))
    (folder / "cut.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    code, said, error = command(*words, "32x32")
    assert code == 0, error
    for text in ("6 of 6 videos to import", "lonely.mp4: skipped: ", "cut.mp4: skipped: ",
                 "5 frames for 10 lines", "line 11",
                 "2 videos whole, 1 cut short, 3 skipped; 4 episodes"):
        assert text in said
    dataset = Dataset(out)
    assert (dataset.spec, *dataset.lengths) == (minecraft_spec(32, 32), 10, 10, 6, 4)
    assert frame_numbers(dataset.episode(1)) == list(range(10))
    mined = dataset.spec.tasks.index("mine_log")                    # episode, row, task:
    assert dataset.events.tolist() == [[0, 8, mined], [1, 8, mined], [3, 2, mined]]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    code, said, _ = command(*words, "32x32")
    assert code == 0 and "is complete" in said and not (out / "parts").exists()
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    for wrong, text in (([*words, "16x16"], "got other size"),
                        (["import-vpt", "--src", tmp_path / "none", "--out", "x"], "none"),
                        (["import-video", tmp_path / "none.mp4", "--out", "x"], "none")):
        code, _, error = command(*wrong)
        assert code == 2 and text in error and len(error.splitlines()) == 1


def test_interrupted_import_goes_on(tmp_path, monkeypatch):
    """Fails if whole segments are imported again, or pieces that were moved are lost."""
    videos = [write_segment(tmp_path / "in", vpt_lines(6), None, f"P{i}") for i in range(3)]
    whole = minecraft.import_files(videos, tmp_path / "whole", (16, 16), 1)
    real, moves, out = os.replace, [], tmp_path / "out"

    def breaks(a, b):
        if Path(b).match("out/episode*"):
            moves.append(b)
            if len(moves) == 3:
                raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", breaks)
        minecraft.import_files(videos, out, (16, 16), 1)
    assert len(list(out.glob("parts/*.json"))) == 3 and len(list(out.glob("*.npy"))) == 2
    with pytest.raises(UserError, match="incomplete"):
        Dataset(out)
    with pytest.raises(UserError, match="other videos"):            # numbers would shift
        minecraft.import_files(videos[1:], out, (16, 16), 1)
    monkeypatch.setattr(minecraft, "import_one", None)              # nothing is left to do
    again = minecraft.import_files(videos, out, (16, 16), 1)
    assert again.fingerprint == whole.fingerprint


def test_full_disk_ends_an_import(tmp_path, monkeypatch):
    """Fails if a full disk counts as a fault of every segment, which would be left out."""
    path, usage = write_segment(tmp_path, vpt_lines(4)), types.SimpleNamespace(free=0)
    monkeypatch.setattr(minecraft.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="0 MB free.*make room"):
        minecraft.import_files([path], tmp_path / "set", (32, 64), 1)
    monkeypatch.setattr(os, "fsync", lambda _: os.stat(tmp_path / "full"))
    with pytest.raises(UserError, match="no room.*full.*need both"):
        import_pieces(path)


def test_parts_split_by_session(tmp_path, monkeypatch):
    """Fails if segments of one session lie in both parts, or a segment lies in none."""
    names = [f"P-{s:012x}-20220101-12{m:02d}00" for s in range(90) for m in range(2)]
    for name in names:
        write_lines(tmp_path / f"{name}.jsonl", [])
    monkeypatch.setattr(minecraft, "import_files", lambda x, *_: {file.stem for file in x})
    taught, reference = (minecraft.import_vpt(tmp_path, "out", (8, 8), part)
                         for part in ("train", "reference"))
    assert taught | reference == set(names) and not taught & reference and reference
    assert not {name[:14] for name in taught} & {name[:14] for name in reference}


def test_import_video_is_unlabelled(tmp_path, monkeypatch):
    """Fails if plain videos count as labelled, keep another rate, or aren't cut right."""
    films = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for film, fps in zip(films, (20, 10), strict=True):
        write_film(film, [vpt_frame(t, 96, 128) for t in range(16)], fps=fps)
    code, _, error = command("import-video", *films, "--out", tmp_path / "out", "--size",
                             "32x64", "--workers", 1)
    assert code == 0, error
    dataset = Dataset(tmp_path / "out")
    assert dataset.lengths.tolist() == [16, 32] and dataset.spec == minecraft_spec(32, 64)
    episode = dataset.episode(0)
    assert not episode["labelled"].any() and not episode["events"].any()
    assert episode["continues"].all()
    for fps in (0, math.inf, math.nan):
        with pytest.raises(UserError, match="--fps"):
            minecraft.import_video(films, tmp_path / "more", (32, 64), fps)
    monkeypatch.setattr(minecraft, "SEGMENT", 5)
    _, pieces = import_pieces(films[0], fps=20)                     # without a lone frame
    assert list(map(frame_numbers, pieces)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9],
                                                [10, 11, 12, 13, 14]]


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_import_video_notices_damage(tmp_path, kind):
    """Fails if half a video, or one with a hole, is taken as whole without a word, or a
    file's name must be UTF-8."""
    write_film(tmp_path / f"whole.{kind}", np.random.default_rng(0).integers(
        256, size=(40, 32, 64, 3), dtype=np.uint8), codec=CODECS[kind])
    film = (tmp_path / f"whole.{kind}").read_bytes()
    middle = len(film) // 2
    (tmp_path / f"half.{kind}").write_bytes(film[:middle])
    hole = film[:middle] + bytes(4096) + film[middle + 4096:]
    (tmp_path / f"hole.{kind}").write_bytes(hole)
    (tmp_path / os.fsdecode(b"caf\xe9." + kind.encode())).write_bytes(film)
    code, output, error = command("import-video", *sorted(tmp_path.glob(f"*.{kind}")),
                                  "--out", tmp_path / "out", "--size", "16x32",
                                  "--workers", 1)
    assert code == 0, error
    assert Dataset(tmp_path / "out").lengths.tolist() == [40, 40]
    for name in ("half", "hole"):
        assert re.search(f"{name}.{kind}: skipped: .+", output + error)
    assert "2 videos whole, 0 cut short, 2 skipped" in output


class FakeMineRL:
    """HumanSurvival's interface: a tick of attack mines two logs, use opens a furnace,
    30 ticks forward in a row kill. Refuses what MineRL refuses."""

    def __init__(self):
        self.next_seed, self.seeds, self.commands, self.broken = None, [], [], False

    def seed(self, number):
        self.next_seed = number

    def observation(self):
        counts = {"mine_block": {"oak_log": self.logs, "stone": 0}, "craft_item": {},
                  "custom": {"deaths": self.deaths, "interact_with_furnace": self.opened}}
        counts = {kind: {name: np.array(float(n)) for name, n in names.items()}
                  for kind, names in counts.items()}
        return {"pov": np.full((360, 640, 3), self.logs, np.uint8), "life": {}, **counts}

    def reset(self):
        self.seeds.append(self.next_seed)
        self.next_seed, self.logs, self.opened, self.deaths, self.forward = None, 3, 0, 0, 0
        return self.observation()

    def step(self, command):
        assert set(command) == {*BUTTONS, "camera"} and command["camera"].shape == (2,)
        assert command["camera"].dtype == np.float32 and not command["ESC"]
        self.commands.append(command)
        self.logs += 2 * command["attack"]
        self.opened += command["use"]
        self.forward = (self.forward + 1) * command["forward"]
        self.deaths += self.forward >= 30
        info = {"error": "the game is gone"} if self.broken else {}
        return self.observation(), 0.0, bool(info), info


def TinyMinecraft():
    """The shipped adapter around the stand-in."""
    game = minecraft.Minecraft(32, 32)
    game.start_game = FakeMineRL
    return minecraft.as_world(game)


MINE = f"{__name__}:TinyMinecraft"


def press(*names, camera=0):
    action = minecraft_spec().actions.zeros()
    action[[BUTTONS.index(name) for name in names]] = 1
    action[CAMERA] = camera
    return action


def test_minerl_adapter(capsys):
    """Fails if seed, keys, camera, events, ESC, death, limit or a broken game are wrong."""
    env = make_env(MINE)
    tasks = env.spec.tasks
    assert env.reset(5).shape == (32, 32, 3) and env.game.seeds == [5]
    frame, events, terminal = env.step(press("attack", "ESC", camera=60))
    sent = env.game.commands[-1]
    assert sent["attack"] == 1 and sent["camera"].tolist() == [10, 10]
    assert events[tasks.index("mine_log")] == 2 and events.sum() == 2 and not terminal
    assert (frame == 5).all()
    events = env.step(press("use"))[1]                              # not the logs again
    assert [tasks[i] for i in np.flatnonzero(events)] == ["open_furnace"]
    assert [env.step(press("forward"))[2] for _ in range(30)] == [False] * 29 + [True]
    assert not env.cut
    env.reset(6)                                                    # in the same game
    assert env.game.seeds == [5, 6] and not env.step(press())[1].any()
    shown = env.step(press("attack"))[0]
    env.game.broken = True
    frame, events, terminal = env.step(press("attack"))
    assert terminal and not events.any() and (frame == shown).all() and not env.cut
    assert "the game is gone" in capsys.readouterr().err
    env.game.broken = False
    env.reset(7)
    env.env.env.steps = env.limit - 2
    assert [env.step(press())[2] for _ in range(2)] == [False, True] and env.limit == 72_000
    assert env.cut
    env.reset(8)
    env.game.step = lambda command: (env.game.observation(), 0.0, True, {})
    assert env.step(press())[2] and not env.cut                     # MineRL's own end
    game = minecraft.Minecraft(384, 640)
    game.start_game = FakeMineRL                                    # not swapped, padded
    frame = minecraft.as_world(game).reset(1)
    assert frame.shape == (384, 640, 3)
    assert (frame[:360] == 3).all() and not frame[360:].any()


def test_missing_minerl_says_how_to_install_it(tmp_path):
    """Fails if its lack gives a traceback, or the spec or importers need it, or torch."""
    for name, words in {"minecraft": "pip install git+", "minecraft:12": "x128"}.items():
        code, _, error = command("record", "--env", name, "--out", tmp_path, module="data")
        assert code == 2 and words in error.splitlines()[-1] and "Traceback" not in error
    assert make_env("minecraft:384x640").spec == minecraft_spec(384, 640)
    assert make_env("minecraft").spec == minecraft_spec()
    with VecEnv("minecraft", [1], 1) as worlds, pytest.raises(UserError, match="no MineRL"):
        worlds.reset()
    script = "import sys, envs.minecraft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPO).returncode == 0


def test_prompts_count_items_and_recordings_count_events():
    """Fails if four planks of one craft count as one for a prompt, or as four rewards."""
    prompts = play.PromptOrder(minecraft_spec(32, 32), 2)
    with VecEnv(MINE, [1, 2], 1) as worlds:
        worlds.reset()
        steps = [worlds.step([press("attack")] * 2)[1] for _ in range(5)]
    advanced = [prompts.advance(events) for events in steps]
    assert np.all(advanced, 1).tolist() == [False] * 4 + [True]     # 5 times 2 logs
    events = play_episode(TinyMinecraft(), 0, 0, 12, None).events
    assert events.any() and events.max() == 1


class Store(http.server.BaseHTTPRequestHandler):
    """A web store with Range and faults, {path: [that of the first request, ...]}."""
    files, faults, log = {}, {}, []

    def do_GET(self):
        body, wanted = self.files.get(self.path), self.headers.get("Range")
        fault = (self.faults.get(self.path) or [None]).pop(0)
        self.log.append((self.path, wanted))
        if fault == 503 or body is None:
            self.send_error(fault or 404)
            return
        resumed = wanted and fault != "whole"
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if resumed else 0
        self.send_response(206 if resumed else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start: start + 1000] if fault == "drop" else body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def store(monkeypatch):
    """-> address and handler of a store on this machine."""
    Store.files, Store.faults, Store.log = {}, {}, []
    monkeypatch.setattr(minecraft, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(folder, basedir, relpaths, out, limit=9):
    index = folder / "index.json"
    index.write_text(json.dumps({"basedir": basedir, "relpaths": relpaths}))
    minecraft.download_vpt(index, folder / out, limit)


def test_download_vpt(tmp_path, store, capsys):
    """Fails if it doesn't go on where it broke off, keeps a part or an error page, gives up
    at once, or fetches twice."""
    film, lines = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40, b'{"mouse": null}\n' * 300
    for stem in ("10.0/a-1", "10.0/b-2", "10.0/c-3", "6.9/d-4"):
        Store.files |= {f"/x/data/{stem}.mp4": film, f"/x/data/{stem}.jsonl": lines}
    Store.faults = {"/x/data/10.0/a-1.mp4": ["drop", "drop"],
                    "/x/data/10.0/a-1.jsonl": [503],
                    "/x/data/10.0/b-2.mp4": ["drop", "whole"]}
    Store.files["/x/data/10.0/c-3.mp4"] = b"<?xml version='1.0'?><Error>gone</Error>"
    del Store.files["/x/data/6.9/d-4.jsonl"]
    names = [f"data/{name}" for name in ("10.0/a-1.mp4", "10.0/b-2", "10.0/c-3", "6.9/d-4")]
    download(tmp_path, f"{store}/x/data/", [*names, "beyond"], "out", 4)
    out = tmp_path / "out"
    kept = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert kept == {"10.0/a-1.mp4": film, "10.0/a-1.jsonl": lines, "10.0/b-2.mp4": film,
                    "10.0/b-2.jsonl": lines, "10.0/c-3.jsonl": lines}
    asked = [wanted for path, wanted in Store.log if path == "/x/data/10.0/a-1.mp4"]
    assert asked == [None, "bytes=1000-", "bytes=2000-"]
    assert [path for path, _ in Store.log].count("/x/data/6.9/d-4.jsonl") == 1  # no retry
    said = capsys.readouterr().out
    for text in ("c-3: skipped: an error page", "d-4: skipped: answer 404",
                 "2 segments, 2 skipped"):
        assert text in said
    Store.log.clear()
    download(tmp_path, f"{store}/x/", names[:2], "out")             # another address
    assert not Store.log
    download(tmp_path, f"{store}/x/data", ["10.0/a-1"], "new")
    assert (tmp_path / "new/10.0/a-1.mp4").read_bytes() == film


def test_download_writes_nothing_outside_its_folder(tmp_path, store, capsys):
    """Fails if a path of the index leads out of --out, or changes the address."""
    for relpath in ("../../etc/x", "10.0/../../x", "/etc/x", "10.0/.x", "10.0//x",
                    "10.0/a?b=c", "10.0/a\\b", ""):
        download(tmp_path, store, [relpath], "out")
        assert not Store.log and "unsafe name" in capsys.readouterr().out
        assert [path.name for path in tmp_path.rglob("*")] == ["index.json"]


def test_download_errors_are_one_line(tmp_path, store, monkeypatch):
    """Fails if the index is evaluated as code, or no network or index gives a traceback."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no connection.*network.*do:"):
        download(tmp_path, "http://127.0.0.1:9", ["a"], "out")
    index = tmp_path / "index.json"
    for text in ('__import__("os").mkdir("evaluated")', '{"basedir": 3, "relpaths": []}',
                 '{"basedir": "file:///etc/", "relpaths": ["passwd"]}', "{}", None):
        index.unlink() if text is None else index.write_text(text)
        with pytest.raises(UserError, match="index file of VPT"):
            minecraft.download_vpt(index, tmp_path / "out", 1)
    assert not Path("evaluated").exists()


def vpt_play(rng, n):
    """Lines of a player who mines a log now and then."""
    logs, lines = 3, []
    for t in range(n):
        logs += int(rng.random() < 0.1)
        keys, motion = " ".join(rng.choice(list("wasd"), 2)), (rng.normal(0, 20), 0.0)
        lines.append(vpt_line(t, keys, rng.choice(2, 1).tolist(), motion=motion,
                              stats={LOG: logs}, isGuiOpen=t % 9 == 8))
    return lines


TINY = f"""--data.env {MINE} --data.path in_set --data.reference held_set --run mine
--data.eval_episodes 2 --data.eval_length 8 --tokenizer.patch 8 --tokenizer.dim 16
--tokenizer.latents 4 --tokenizer.channels 4 --tokenizer.layers 3 --dynamics.dim 16
--dynamics.layers 3 --dynamics.context 8 --agent.hidden 16 --agent.horizon 3
--agent.context 4 --train.tokenizer_steps 8 --train.tokenizer_batch 2
--train.dynamics_steps 8 --train.agent_steps 8 --train.imagine_steps 8 --train.batch 6
--train.imagine_batch 4 --train.length 6 --train.long_length 12 --train.compile false
--train.log_every 4""".split()


@pytest.mark.slow
def test_minecraft_end_to_end(tmp_path, monkeypatch):
    """Fails if recordings can't be imported, trained on or judged, also without MineRL."""
    rng, folder = np.random.default_rng(0), tmp_path / "runs/mine"
    for part, n in (("in", 6), ("held", 2)):
        for i in range(n):
            write_segment(tmp_path / part, vpt_play(rng, 60), None, f"P-{i}")
        minecraft.import_vpt(tmp_path / part, tmp_path / f"{part}_set", (32, 32), workers=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY])
    train.main()
    rows = play.read_results(folder)
    for agent in ("random", "BC", "imagination"):
        assert play.find(rows, "achievements", {"agent": agent})
    assert play.find(rows, "success", {"agent": "random", "task": "mine_log"}).value > 0
    assert play.find(rows, "psnr", {"film": "dream", "horizon": 16})
    (folder / "results.json").unlink()
    sys.argv += ["--data.env", "minecraft:32x32", "--data.eval_episodes", "0"]
    train.main()                                                    # judged without MineRL
    rows = play.read_results(folder)
    assert play.find(rows, "psnr", {"film": "dream", "horizon": 1})
    assert "achievements" not in [row.name for row in rows]


ODD = [b"null", b"NaN", b"-1e999", b"[]", b"{}", b'"x"', b"1" + b"0" * 400, b"[[0]]",
       b"true", b"\xff\x00", b"[" * 5000, b"9" * 5000]


def mutate(rng, line):
    """A line of which a byte, the end, a value or the order of its pieces is another."""
    kind, (a, b, c) = rng.integers(4), np.sort(rng.integers(len(line), size=3))
    if kind == 2:
        values = list(re.finditer(rb": ([^,{}\[\]]+)", line))
        a, b = values[rng.integers(len(values))].span(1)
    return [line[:a] + bytes([rng.integers(256)]) + line[a + 1:], line[:a],
            line[:a] + ODD[rng.integers(len(ODD))] + line[b:],
            line[:a] + line[b:c] + line[a:b] + line[c:]][kind].replace(b"\n", b" ")


@pytest.mark.slow
def test_mutated_lines_are_reported_not_fatal(tmp_path):
    """Fails if one of 10,000 damaged lines crashes the reader, or stops it unnamed."""
    rng, reported, path = np.random.default_rng(0), 0, tmp_path / "x.jsonl"
    good = [json.dumps(line).encode() for line in vpt_play(rng, 20)]
    for i in [*range(20)] * 500:
        text = mutate(rng, good[i])
        path.write_bytes(b"\n".join([*good[:i], text, *good[i + 1:]]) + b"\n")
        columns, cursors, starts, total, fault = minecraft.read_lines(path)
        n = len(cursors)
        assert total == (20 if text.strip() else 19) and (n == total) == (fault is None)
        assert fault is None or f"x.jsonl, line {n + 1}: " in fault and "\n" not in fault
        assert columns["actions"].shape == (n, 24) and all(0 <= t < n for t in starts)
        assert ((columns["actions"] >= 0) & (columns["actions"] < 121)).all()
        reported += fault is not None
    assert 2000 < reported < 9000                                   # some are harmless


@pytest.mark.slow
def test_damaged_videos_are_reported_not_fatal(tmp_path):
    """Fails if one of 100 bad videos crashes or hangs the import, or is cut unnamed."""
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    whole = write_segment(folder, vpt_lines(20), name="whole").read_bytes()
    for i in range(100):
        film = np.frombuffer(whole, np.uint8).copy()
        if i % 2:
            film = film[:rng.integers(len(film))]
        else:
            places = rng.integers(len(film), size=rng.integers(1, 40))
            film[places] = rng.integers(256, size=len(places))
        (folder / f"bad{i:02d}.mp4").write_bytes(film.tobytes())
        write_lines(folder / f"bad{i:02d}.jsonl", vpt_lines(20))
    dataset = minecraft.import_vpt(folder, tmp_path / "out", (16, 32), workers=2)
    skipped = dataset.settings["skipped"]
    assert len(dataset.lengths) + len(skipped) == 101 and len(skipped) >= 50
    assert all(reason and "\n" not in reason for reason in skipped.values())
    assert set(dataset.lengths) <= {19, 20}
