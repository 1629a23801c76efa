"""Tests of PushT, where gym-pusht is installed."""
import numpy as np
import pytest

from data import UserError, make_env, rng_for
from envs import pusht

pytest.importorskip("gym_pusht")


@pytest.mark.parametrize("name, row", [("pusht", [-0.5, 0.5]), ("pusht:5", [1, 3])])
def test_a_place_becomes_an_action_and_back(name, row):
    """Fails if x and y swap, or a class stands for another place."""
    env = make_env(name)
    assert env.spec.actions.numbers == (2 if name == "pusht" else 0)
    assert env.spec.actions.classes == (() if name == "pusht" else (5, 5))
    assert env.row((128, 384)).tolist() == row
    assert np.allclose(env.env.action(np.float32(row)), (128, 384))
    pytest.raises(UserError, pusht.make, "one")


def test_places_are_read_off_real_frames():
    """Fails if finger or block is found elsewhere than it is, or x and y swap."""
    env, far = make_env("pusht"), []
    for seed in range(4):
        frames, probes = [env.reset(seed)], [env.probe()]
        player = env.player(rng_for(seed, "player", 0), "average")
        for _ in range(40):
            frames.append(env.step(player.act())[0])
            probes.append(env.probe())
        true = np.stack([probe["probe_places"] for probe in probes]).reshape(-1, 2, 2) / 2
        far.append(np.linalg.norm(pusht.read_places(np.stack(frames)) - true, axis=-1))
    far = np.concatenate(far)
    assert far[:, 0].max() < 2                  # the block's own place is off its middle
    assert far[:, 1].max() < 10 and np.isfinite(far).all()


def test_skilled_players_cover_more_of_the_goal_than_wanderers():
    """Fails if a push goes the wrong way."""
    covered = {}
    for skill in ("skilled", "wandering"):
        covered[skill] = []
        for seed in range(4):
            env = make_env("pusht")
            env.reset(seed)
            player = env.player(rng_for(seed, "player", 0), skill)
            covered[skill].append(max(env.step(player.act())[1][0] for _ in range(100)))
    assert np.mean(covered["skilled"]) > np.mean(covered["wandering"]) + 0.1
