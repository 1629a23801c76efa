"""Tests of envs/crafter.py: world, recorded player, reader, interactions."""
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import data
from envs import crafter
from envs.crafter import Crafter, CrafterReader

REPO = Path(data.__file__).parent


@pytest.fixture(scope="module")
def env():
    return crafter.make("")


@pytest.fixture(scope="module")
def reader():
    return CrafterReader()


@pytest.fixture(scope="module")
def film():
    """Skilled play: frames (T, 72, 72, 3) and probes (T, ...)."""
    episode = data.play_episode(crafter.make(""), 3, 0, 150, "skilled")
    return episode.frames, episode.probes


def action(env, name):
    return np.array([env.spec.action_names.index(name)], np.float32)


def at(probes, rows):
    return {name: x[rows] for name, x in probes.items()}


def test_the_name_makes_a_world_with_a_key_for_every_action():
    """Fails if an argument is ignored, a prompted task is none, two actions share a key, or
    one is lost."""
    env = data.make_env("crafter")
    keys = {control["label"]: control["key"] for control in data.controls(env)}
    assert (keys["move_left"], keys["do"], keys["place_table"]) == ("ArrowLeft", " ", "t")
    assert list(keys) == list(env.spec.action_names) and keys["noop"] == ""
    assert len(set(keys.values())) == 17 and len(env.spec.achievements) == 10
    assert {task for task, _ in env.spec.prompt_order} <= set(env.spec.tasks)
    assert [task for task, *_ in env.spec.needs] == ["wake_up", "collect_drink", "eat_cow"]
    pytest.raises(data.UserError, crafter.make, "64x64")


def test_crafter_is_deterministic_across_processes(tmp_path):
    """Fails if creatures are drawn from sets ordered by memory address."""
    script = tmp_path / "walk.py"
    script.write_text(f"""import hashlib, sys
import numpy as np
sys.path.insert(0, {str(REPO)!r})
from envs.crafter import make
padding = [object() for _ in range(int(sys.argv[1]) * 100_003)]    # other addresses
env, rng, content = make(""), np.random.default_rng(0), hashlib.sha256()
content.update(env.reset(5))
for _ in range(120):
    content.update(env.step(env.spec.actions.sample(rng))[0])
print(content.hexdigest(), type(next(iter(env.game._world._chunks.values()))).__name__)
""")
    command = [sys.executable, script]
    one, two = (subprocess.check_output([*command, i], text=True) for i in "12")
    assert one == two and one.split()[1] == "InsertionSet", (one, two)


def test_recording_is_the_same_with_any_number_of_workers(tmp_path):
    """Fails if the player's or the world's randomness depends on the process."""
    one = data.record("crafter", tmp_path / "one", 3, 40, 5, workers=1)
    two = data.record("crafter", tmp_path / "two", 3, 40, 5, workers=2)
    first = one.episode(0)
    assert (first["frames"] != one.episode(1)["frames"]).any()      # control
    assert one.fingerprint == two.fingerprint
    assert one.skills == two.skills and set(one.skills) <= set(Crafter.skills)
    assert first["actions"].shape == (40, 1) and first["probe_inventory"].shape == (40, 16)
    assert (first["probe_semantic"][:, 4, 3] == 13).all()           # the player


def test_frames_are_those_that_crafter_draws(env, monkeypatch):
    """Fails if a pixel differs from Crafter's own view: 20 worlds, by day, at night (where
    both draw the same noise), asleep, and beyond the edge of the world."""
    plain, rng, seen = crafter.make(""), np.random.default_rng(0), set()
    for seed in range(20):
        frames = [env.reset(seed)]
        with monkeypatch.context() as patch:
            patch.setattr(crafter, "QuickView", lambda view: view)
            patch.setattr(crafter, "QuickItems", lambda view: view)
            assert np.array_equal(plain.reset(seed), frames[0])
        for world in (plain, env):
            world.game._step = 15 * seed                             # hours of the day
            if seed % 4 == 3:
                world.game._world.move(world.game._player, (seed % 3, 63))
            world.game._player.inventory.update(energy=2, sapling=seed % 10, wood=9)
        assert type(plain.game._local_view) is not type(env.game._local_view)
        for t in range(40):
            act = action(env, "sleep") if t > 25 else env.spec.actions.sample(rng)
            (frame, *_), (other, *_) = env.step(act), plain.step(act)
            assert np.array_equal(frame, other)
            player, light = env.game._player, env.game._world.daylight
            seen.add((bool(player.sleeping), bool(light < 0.5)))
    assert len(seen) == 4


def test_events_rise_with_the_achievement_counters(env):
    """Fails if an event is given for the first time only, or a step late."""
    env.reset(3)
    player, counts = env.player(np.random.default_rng(0), "skilled"), [np.zeros(22)]
    log = []
    for _ in range(60):
        log.append(env.step(player.act())[1])
        counts.append(np.array(list(env.game._player.achievements.values())))
        assert (log[-1] == (counts[-1] > counts[-2])).all()
    assert np.sum(log, 0)[env.spec.tasks.index("collect_wood")] > 1             # each time


def test_an_episode_ends_at_death_only(env):
    """Fails if a time limit ends episodes, or death does not."""
    env.reset(3)
    env.game._step = 20_000                                          # past any limit
    assert not env.step(env.spec.actions.zeros())[2]
    env.game._player.health = 0
    assert env.step(env.spec.actions.zeros())[2]


def test_probe_does_not_change_the_world(env):
    """Fails if looking at the truth draws from the world's randomness."""
    frames = []
    for look in (False, True):
        env.reset(3)
        env.game._step = 200                                         # night: noise
        for _ in range(12):
            frame = env.step(env.spec.actions.zeros())[0]
            assert not look or env.probe()["probe_semantic"].shape == (9, 7)
        frames.append(frame)
    assert (frames[0] == frames[1]).all()


def test_probe_above_is_zero_in_caves(env):
    """Fails if caves are not where over half of the view is rock, ore, lava or path."""
    env.reset(3)
    player = env.player(data.rng_for(3, "player", 0), "skilled")
    above = []
    for _ in range(250):
        env.step(player.act())
        rock = np.isin(env.probe()["probe_semantic"], (3, 4, 7, 8, 9, 10)).sum()
        above.append(env.probe()["probe_above"])
        assert above[-1] == (rock <= 31)                            # of 63
    assert 0 < np.mean(above) < 1                                   # control


def test_copies_go_their_own_way(env):
    """Fails if Crafter can't be copied, or a copy's steps are not those of the original."""
    env.reset(3)
    twin = data.copy_env(env)
    for name in ["move_right", "do", "move_down"] * 8:
        assert (env.step(action(env, name))[0] == twin.step(action(env, name))[0]).all()
    twin.step(action(env, "noop"))
    assert env.game._step + 1 == twin.game._step


def test_skilled_player_places_a_table(env):
    """Fails if the player's plans are broken. Control: random play doesn't."""
    for skilled in (True, False):
        env.reset(3)
        rng = np.random.default_rng(0)
        player, done = env.player(rng, "skilled"), np.zeros(22, bool)
        for _ in range(100):
            act = player.act() if skilled else env.spec.actions.sample(rng)
            done |= env.step(act)[1] > 0
        assert done[env.spec.tasks.index("place_table")] == skilled
        assert done[env.spec.tasks.index("collect_wood")] or not skilled


def test_curious_players_hit_rock_that_they_cannot_dig(env):
    """Fails if no recording shows that rock stays where the tool is missing, or its hits
    stand on the way to wood."""
    env.reset(2)
    player, in_vain = env.player(np.random.default_rng(0), "curious"), 0
    player.skill = player.skill._replace(noise=0.0)         # no slip hits a tree
    for _ in range(150):
        act, (material, creature) = player.act(), player.ahead()
        wall = material in ("stone", "coal", "iron", "diamond") and not creature
        in_vain += wall and env.spec.action_names[int(act[0])] == "do"
        events = env.step(act)[1]
        for task in ("collect_stone", "collect_wood"):
            assert not events[env.spec.tasks.index(task)]
    assert in_vain > 5


def test_players_walk_into_lava_in_view_by_their_skill(env):
    """Fails if no recording shows what lava does, or skilled players seek it."""
    for skill, dies in (("novice", True), ("skilled", False)):
        env.reset(3)
        world, (x, y) = env.game._world, env.game._player.pos
        for i in range(x - 4, x + 5):
            for j in range(y - 3, y + 4):
                world[i, j] = "grass"
        world[x + 3, y] = "lava"
        player = env.player(np.random.default_rng(0), skill)
        player.skill = player.skill._replace(noise=0.0, dither=0.0)
        assert any(env.step(player.act())[2] for _ in range(40)) == dies, skill


def test_shortest_path_goes_around_what_costs_more():
    """Fails if neighbours, costs or the border are mixed up."""
    cost, goal = np.ones((64, 64)), np.zeros((64, 64), bool)
    goal[2, 0] = True
    for bar, path in ((9, [(0, 1), (1, 1), (2, 1), (2, 0)]), (2, [(1, 0), (2, 0)])):
        cost[1, 0] = bar
        assert crafter.shortest_path(cost, goal, (0, 0)) == (min(bar + 1, 4), path)
    cost[1] = np.inf
    assert crafter.shortest_path(cost, goal, (0, 0)) == (np.inf, [])


def test_reader_reads_real_frames(film, reader):
    """Fails if cells are transposed, a texture is missing, or the light is another."""
    frames, probes = film
    light, asleep = probes["probe_player"][:, 0] / 255, probes["probe_player"][:, 1] > 0
    cells, items, error = reader.read(frames, light, asleep)
    day = (light >= 0.5) & ~asleep
    assert day.sum() > 100 and light[day].min() < 0.7               # dusk is in it too
    assert (reader.semantic[cells] == probes["probe_semantic"])[day].all()
    assert (items == probes["probe_inventory"]).all()
    assert error[day].max() < 3 < reader.LEGAL
    assert len(np.unique(probes["probe_semantic"][day])) > 4        # control: variety
    guessed = reader.semantic[reader.read(frames[::50])[0]]         # the light, too
    assert (guessed == probes["probe_semantic"][::50]).mean() > 0.95
    noise = np.random.default_rng(0).integers(0, 256, (1, 72, 72, 3))
    assert (reader.read(noise)[2] > reader.LEGAL).all()


def test_the_player_knows_what_it_has_seen_alone():
    """Fails if what no frame has shown moves it."""
    def acts(seed, elsewhere, knows_all=False):
        env = crafter.make("")
        env.reset(seed)
        world, (x, y) = env.game._world, env.game._player.pos
        player = env.player(np.random.default_rng(0), "skilled")
        hidden = np.ones((64, 64), bool)
        hidden[max(x - 4, 0):x + 5, max(y - 3, 0):y + 4] = False
        if elsewhere:
            cells = world._mat_map[hidden]
            world._mat_map[hidden] = np.random.default_rng(seed).permutation(cells)
        player.map[:] = world._mat_map if knows_all else 0
        return float(player.act()[0])

    assert all(acts(seed, True) == acts(seed, False) for seed in range(12))
    assert any(acts(seed, True, True) != acts(seed, False, True) for seed in range(12))


def test_the_player_sees_what_its_frame_shows_alone(env):
    """Fails if it knows a cell or creature beyond the 9x7 of its frame, or misses one in
    it."""
    beyond = 0
    for seed in range(4):
        env.reset(seed)
        player, (x, y) = env.player(data.rng_for(0, "", 0), "skilled"), env.game._player.pos
        player.act()
        assert set(map(tuple, np.argwhere(player.map).tolist())) == {
            (x + i, y + j) for i in range(-4, 5) for j in range(-3, 4)}
        things = [tuple(map(int, thing.pos)) for thing in env.game._world.objects]
        seen = {p for p in things if abs(p[0] - x) <= 4 and abs(p[1] - y) <= 3}
        mask = player.creatures("Player", "Cow", "Zombie", "Skeleton", "Plant")
        assert set(map(tuple, np.argwhere(mask).tolist())) == seen
        beyond += len(things) - len(seen)
    assert beyond > 20                                              # control


def test_skilled_players_outlive_the_night():
    """Fails if the shelter doesn't hold, or they never sleep."""
    alive, woke = [], []
    for seed in range(8):
        episode = data.play_episode(crafter.make(""), 70_000, seed, 260, "skilled")
        alive.append(episode.continues[-1])
        woke.append(episode.events[:, Crafter().tasks.index("wake_up")].any())
    assert sum(alive) >= 6 and sum(woke) >= 5


def test_reader_tells_sleep_from_waking(env, reader):
    """Fails if the grey of sleep is read as day."""
    env.reset(3)
    env.game._player.inventory["energy"] = 3
    for _ in range(3):
        frame = env.step(action(env, "sleep"))[0]
    probe = env.probe()
    light = probe["probe_player"][:1] / 255
    near, far = (reader.distances(frame[None].astype(float), light, [state]).min(-1).mean()
                 for state in (True, False))
    assert near < 2 and far > 20
    texture = reader.read(frame[None], light, [True])[0][0, 4, 3]
    assert reader.textures[texture] == "player-sleep"


def test_cells_in_sight_follow_the_walk():
    """Fails if the shift has the wrong sign or axis, or creatures count as terrain."""
    world = np.random.default_rng(0).integers(1, 19, (40, 40), dtype=np.uint8)

    def probe(x, y):
        return {"probe_semantic": world[None, x:x + 9, y:y + 7],
                "probe_player": np.array([[255, 0, x, y]], np.uint8)}

    for x, y in ((11, 10), (9, 10), (10, 12), (10, 10), (30, 10)):
        visible, was = crafter.in_sight(probe(10, 10), probe(x, y))
        for i, j in np.ndindex(9, 7):
            there = (x + i - 10, y + j - 10)
            inside = 0 <= there[0] < 9 and 0 <= there[1] < 7
            assert visible[0, i, j] == (inside and world[x + i, y + j] <= 12)
            assert not inside or was[0, i, j] == world[x + i, y + j]


def total(measures):
    return {name: (int(a.sum()), int(b.sum())) for name, (a, b) in measures.items()}


def test_compare_of_truth_and_of_standing_still(film, reader):
    """Fails if the true frame is not all right, a copied frame gets credit for what has
    changed, or hunger counts as the action's work."""
    frames, probes = film
    true, shown = at(probes, slice(1, 110)), at(probes, slice(0, 109))
    right = total(reader.compare(frames[1:110], true, shown))
    copied = total(reader.compare(frames[:109], true, shown))
    for name in ("visible_cells", "changed_cells", "inventory_f1"):
        assert right[name][0] == right[name][1] > 10 and copied[name][0] < copied[name][1]
    assert right["wrong_cells"][0] == 0 and right["visible_cells"][1] > 1000
    assert copied["wrong_cells"][0] == copied["wrong_cells"][1]     # it is the baseline
    assert copied["changed_cells"][0] == copied["inventory_f1"][0] == 0
    change = np.zeros((1, 16), int)
    change[0, [0, 1, 2, 3, 5]] = -1, -1, 1, 1, -2
    assert crafter.caused(change)[0].nonzero()[0].tolist() == [2, 5]


def test_compare_of_reconstructions(film, reader):
    """Fails if cells count at night, or what isn't held counts as an item that is right."""
    frames, probes = film
    right = total(reader.compare(frames, probes))
    light, asleep = probes["probe_player"][:, :2].T
    days = ((light >= 128) & (asleep == 0)).sum()
    held = (probes["probe_inventory"] > 0).sum()
    black = total(reader.compare(np.zeros_like(frames), probes))    # control
    assert right == {"cells": (63 * days, 63 * days), "inventory": (held, held)}
    assert black["cells"][0] < 63 * days and black["inventory"][0] < held
    classes = total(reader.by_class(frames, probes))
    assert sum(n for _, n in classes.values()) == 63 * days
    assert all(right == n for right, n in classes.values()) and classes["grass"][1] > 100
    lost = total(reader.by_class(np.zeros_like(frames), probes))    # all is read as one
    assert {n for _, n in lost.values()} == {n for _, n in classes.values()}
    assert sum(right for right, _ in lost.values()) < 20 * days
    after, before = ({k: x[i] for k, x in probes.items()} for i in ([9], [8]))
    seen = total(reader.by_class(frames[9:10], after, before))
    assert 40 < sum(n for _, n in seen.values()) <= 63              # what scrolled in isn't
    probes = {**probes, "probe_player": probes["probe_player"] * [0, 1, 1, 1]}
    assert total(reader.compare(frames, probes))["cells"] == (0, 0)
    assert total(reader.by_class(frames, probes))["grass"] == (0, 0)


def test_interactions_are_judged_by_their_outcome(tmp_path, reader):
    """Fails if the real outcome does not pass, or the last frame shown passes for it."""
    crafter.record_interactions(tmp_path, each=1, worlds=2)
    dataset = data.Dataset(tmp_path)
    kinds = dataset.settings["kinds"]
    assert len(set(kinds)) == len(kinds) >= 6 and "walk_left" in kinds
    for i, kind in enumerate(kinds):
        rows = dataset.episode(i)
        probes = {name: x for name, x in rows.items() if name.startswith("probe")}
        before, after = at(probes, slice(15, 16)), at(probes, slice(-1, None))
        real, shown = rows["frames"][-1:], rows["frames"][15:16]
        assert crafter.judge(reader, kind, real, real, before, after)[0], kind
        if kind not in ("stopped_by_water", "look_away_and_back"):  # they end as they began
            assert not crafter.judge(reader, kind, shown, real, before, after)[0], kind


def test_a_wall_has_no_hole_where_the_player_stood():
    """Fails if the cell that the player left, whose ground was hidden, isn't judged."""
    items = np.zeros((1, 16), int)
    stub = types.SimpleNamespace(semantic=np.arange(20), read=lambda x, *_: (x, items, 0))
    probes = [{"probe_semantic": np.full((1, 9, 7), 2), "probe_inventory": items,
               "probe_player": np.array([[255, 0, 5, y]])} for y in (8, 7)]     # a step up
    for probe in probes:
        probe["probe_semantic"][0, 4, 3] = 13
    whole = probes[1]["probe_semantic"]
    whole[0, 4, 4] = 3                                              # a stone where it stood
    hole = whole.copy()
    hole[0, 4, 4] = 2
    assert crafter.judge(stub, "wall_of_three", whole, whole, *probes)[0]
    assert not crafter.judge(stub, "wall_of_three", hole, whole, *probes)[0]
    probes[1]["probe_semantic"] = whole.copy()
    probes[1]["probe_semantic"][0, 4, 4] = 5                        # control: sand may be
    assert crafter.judge(stub, "wall_of_three", hole, whole, *probes)[0]
