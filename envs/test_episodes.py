"""Tests of the importer of recordings, on files made here."""
import io
import re
import zipfile

import imageio.v3 as imageio
import numpy as np
import pytest

from data import Dataset, Episode, UserError, make_env
from envs import episodes

T = 6
FRAMES = np.arange(T, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 12, 3), "u1")


def save(folder, name="a", **columns):
    folder.mkdir(exist_ok=True)
    columns = {"image": FRAMES, "action": np.arange(T), **columns}
    columns = {name: x for name, x in columns.items() if x is not None}
    np.savez_compressed(folder / f"{name}.npz", **columns)


def imported(tmp_path, **settings):
    episodes.import_episodes(tmp_path / "src", tmp_path / "out", **settings)
    return Dataset(tmp_path / "out")


def test_rows_stand_where_they_were(tmp_path):
    """Fails if an action, reward or end moves to another frame, or the first row keeps
    its own."""
    done = np.arange(T) == T - 1
    save(tmp_path / "src", reward=np.linspace(-1, 1, T), done=done)
    data = imported(tmp_path)
    rows = data.rows(0)
    assert data.spec.actions.classes == (T,) and data.spec.returns
    assert rows["actions"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(rows["frames"], FRAMES)
    assert np.allclose(rows["events"][:, 0], [0, *np.linspace(-1, 1, T)[1:]])
    assert rows["continues"].tolist() == [1, 1, 1, 1, 1, 0]
    assert rows["labelled"].tolist() == [False, *[True] * 5]
    assert (tmp_path / "out" / "first_rows.png").stat().st_size > 1000


def test_lead_moves_actions_to_the_frame_that_they_led_to(tmp_path):
    """Fails if --lead shifts the other way, or loses the end and its reward."""
    save(tmp_path / "src", reward=np.arange(T) + 1.0, done=np.arange(T) == 3)
    rows = imported(tmp_path, lead=True).rows(0)        # its last frame wasn't recorded
    assert rows["frames"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 3]
    assert rows["actions"][:, 0].tolist() == [0, 0, 1, 2, 3]
    assert rows["events"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert rows["continues"].tolist() == [1, 1, 1, 1, 0]


def test_rewards_of_a_replay_buffer_stand_beside_their_frame(tmp_path):
    """Fails if --lead moves what is_first and is_terminal say is in place."""
    save(tmp_path / "src", reward=np.arange(T) + 1.0, is_first=np.arange(T) == 0,
         is_terminal=np.arange(T) == T - 1)
    rows = imported(tmp_path, lead=True).rows(0)
    assert rows["actions"][:, 0].tolist() == [0, 0, 1, 2, 3, 4]
    assert rows["events"][:, 0].tolist() == [0, 2, 3, 4, 5, 6]
    assert rows["continues"].tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("action, kind, classes, numbers, row", [
    (np.arange(T) % 3, "discrete", (3,), 0, [2]),
    (np.stack([np.arange(T) % 3, np.arange(T) % 2], 1), "discrete", (3, 2), 0, [2, 0]),
    (np.eye(4)[np.arange(T) % 3], "onehot", (4,), 0, [2]),
    (np.eye(4)[np.arange(T) % 3] * (np.arange(T) > 0)[:, None], "onehot", (4,), 0, [2]),
    (np.where(np.arange(T) > 0, np.arange(T) % 3, np.nan), "discrete", (3,), 0, [2]),
    (np.linspace(-1, 1, 2 * T).reshape(T, 2), "continuous", (), 2, [-3 / 11, -1 / 11]),
    (np.linspace(-1, 1, T), "continuous", (), 1, [-0.2])])
def test_actions_are_found_out(tmp_path, capsys, action, kind, classes, numbers, row):
    """Fails if a kind of action is taken for another, or a column is lost."""
    save(tmp_path / "src", action=action)
    data = imported(tmp_path)
    assert (data.spec.actions.classes, data.spec.actions.numbers) == (classes, numbers)
    assert np.allclose(data.rows(0)["actions"][2], row, atol=1e-6)
    assert f"{kind} actions" in capsys.readouterr().out


def test_streams_are_split_and_counts_are_events(tmp_path):
    """Fails if a window could cross is_first, a counter pays twice, or flags are
    differences."""
    first = np.array([1, 0, 0, 1, 0, 0], bool)
    save(tmp_path / "src", is_first=first, achievement_wood=np.array([0, 1, 1, 0, 0, 2]),
         achievement_stone=np.array([0, 1, 0, 0, 1, 1]))
    save(tmp_path / "src", "b", achievement_wood=np.zeros(T), achievement_stone=np.zeros(T))
    data = imported(tmp_path)
    assert data.lengths.tolist() == [3, 3] and data.spec.tasks == ("stone", "wood")
    wood = [data.rows(i)["events"][:, 1].tolist() for i in (0, 1)]
    stone = [data.rows(i)["events"][:, 0].tolist() for i in (0, 1)]
    assert wood == [[0, 1, 0], [0, 0, 1]] and stone == [[0, 1, 0], [0, 1, 1]]


def test_frames_come_from_a_film_and_are_resized_by_area(tmp_path):
    """Fails if NAME.mp4 isn't NAME.npz's, or a small picture isn't the mean."""
    film = np.repeat(np.repeat(FRAMES * 40, 4, 1), 4, 2)
    save(tmp_path / "src", image=None)
    imageio.imwrite(tmp_path / "src" / "a.mp4", film, fps=10)
    rows = imported(tmp_path, size=(8, 12)).rows(0)
    assert np.abs(rows["frames"].astype(int).mean((1, 2, 3)) - np.arange(T) * 40).max() < 8
    half = np.zeros((1, 8, 12, 3), np.uint8)
    half[:, :, ::2] = 200
    assert (episodes.resized(half[0], (8, 6)) == 100).all()


BAD = {
    "float": {"image": FRAMES.astype(float)}, "grey": {"image": FRAMES[..., 0]},
    "no action": {"action": None}, "rows": {"action": np.arange(T - 1)},
    "not finite": {"action": np.full(T, np.nan)}, "inf": {"reward": np.full(T, np.inf)},
    "Object arrays": {"action": np.array([{}] * T)}, "negative": {"action": -np.arange(T)},
    "scale": {"action": np.linspace(-9, 9.5, T)}, "no image": {"image": None},
    "2 rows": {"image": FRAMES[:0], "action": np.arange(0)}}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_left_out_with_the_reason(tmp_path, capsys, fault):
    """Fails if it stops the import, is imported, or isn't named."""
    save(tmp_path / "src", "bad", **BAD[fault])
    with pytest.raises(UserError, match="no episode that is right|no episode of two"):
        imported(tmp_path)
    assert re.search(r"left out: .*bad.npz \(.+\)", capsys.readouterr().out)
    for name in ("good", "too", "also"):
        save(tmp_path / "src", name)
    data = imported(tmp_path)
    assert len(data.lengths) == 2 and "bad.npz" in capsys.readouterr().out


@pytest.mark.parametrize("n, want", [(1, (1, 0)), (2, (1, 1)), (9, (8, 1)), (10, (9, 1)),
                                     (11, (10, 1)), (20, (18, 2))])
def test_no_episode_is_lost_in_holding_some_out(tmp_path, n, want):
    """Fails if one replaces another, or none is held out."""
    film = (Episode(FRAMES + i, np.zeros((T, 1)), np.zeros((T, 0)), np.ones(T))
            for i in range(n))
    folders = tmp_path / "a", tmp_path / "b"
    assert tuple(episodes.write_apart(film, folders, False)) == want
    firsts = [np.load(path)["frames"][0, 0, 0, 0] for folder in folders
              for path in folder.glob("*.npy")]
    assert sorted(firsts) == list(range(n))


def test_cut_off_is_no_end(tmp_path):
    """Fails if a limit of steps teaches an end where is_terminal says there is none."""
    last = np.arange(T) == 3
    save(tmp_path / "src", is_last=last, is_terminal=np.zeros(T))
    save(tmp_path / "src", "b", is_last=last, discount=1.0 - last)
    data = imported(tmp_path)
    assert data.lengths.tolist() == [4, 2, 4] and data.rows(0)["continues"].all()
    assert data.rows(2)["continues"].tolist() == [1, 1, 1, 0]


def test_recordings_are_a_world_that_nobody_plays(tmp_path):
    """Fails if nothing judges them, or a recording both trains and judges."""
    for i in range(12):
        frames = np.roll(FRAMES, i, 0)
        save(tmp_path / "src", f"{i:02d}", image=frames, action=np.arange(T) % 2)
    data = imported(tmp_path)
    env = make_env(f"episodes:{tmp_path / 'out'}")
    trains, judges = map(Dataset, env.recordings)
    assert trains.fingerprint == data.fingerprint and env.spec == judges.spec
    assert (len(trains.lengths), len(judges.lengths)) == (11, 1)
    assert judges.rows(0)["frames"][0, 0, 0, 0] == np.roll(np.arange(T), 9)[0]
    with pytest.raises(UserError, match="a world to play"):
        env.reset(0)


@pytest.mark.slow
def test_a_thousand_malformed_files(tmp_path, capsys):
    """Fails if a damaged file crashes the import, or is imported though its bytes are not
    those that were written."""
    rng, good = np.random.default_rng(0), io.BytesIO()
    np.savez(good, image=FRAMES, action=np.arange(T), reward=np.arange(T) * 1.0)
    good, source = good.getvalue(), tmp_path / "src"
    save(source, "good", reward=np.arange(T) * 1.0)
    for i in range(1000):
        raw = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            where = rng.integers(len(raw))
            if i % 3 == 0:
                raw = raw[:where + 1]
            elif i % 3 == 1:
                raw[where] = rng.integers(256)
            else:
                raw[where:where] = rng.bytes(rng.integers(1, 50))
        (source / f"bad{i:04d}.npz").write_bytes(raw)
    data = imported(tmp_path)
    for i in range(len(data.lengths)):      # not each changed byte matters
        rows = data.rows(i)
        assert np.array_equal(rows["frames"], FRAMES)
        assert rows["actions"][:, 0].tolist() == list(range(T))
    held_out = Dataset(f"{tmp_path / 'out'}_reference")
    whole = len(data.lengths) + len(held_out.lengths)
    assert capsys.readouterr().out.count("left out") + whole == 1001 and whole < 500
    assert zipfile.is_zipfile(io.BytesIO(good))
