"""PushT (gym-pusht), a robot's task: a finger pushes a T onto its outline. For Figure 6.

pusht       an action is the place to move to, two numbers: for the world model alone
pusht:N     the same in N x N classes, for an agent

Pusher      a scripted player who sees all, of mixed skill, for the paper's teleoperators
read_places finds finger and block in a picture, real or dreamed
"""
import collections

import numpy as np

from data import UserError
from envs.gym import Gym

try:
    import gym_pusht                                # noqa: F401
    import gymnasium
except ImportError:                                 # optional: make() says how to get it
    gym_pusht = None

SIDE = 512              # of the table, in its own units; a frame shows it in 96 pixels
# chance in a step that a random place is the target for a while; share of the episodes
Skill = collections.namedtuple("Skill", "noise share")
SKILLS = {"skilled": Skill(0.01, 0.4), "average": Skill(0.06, 0.3),
          "wandering": Skill(1.0, 0.3)}
RADIUS = 45             # of the block, as a disc
FINGER, BLOCK = (65, 105, 225), (119, 136, 153)     # their colours
GREEN = (144, 238, 144)                             # of the outline


def make(argument):
    """UserError: gym-pusht is not installed, or the argument is no number of classes."""
    if gym_pusht is None:
        raise UserError("no package gym_pusht", "it to push", "pip install gym-pusht "
                        "'pymunk<7'")
    if argument and (not argument.isdecimal() or int(argument) < 2):
        raise UserError(f"pusht:{argument}", "a number of classes from 2", "correct it")
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels", max_episode_steps=-1)
    name = f"pusht:{argument}" if argument else "pusht"
    return PushT(env, name, bins=int(argument or 0))


class PushT(Gym):
    """Gym with a player, the truth about places, and episodes that don't end when solved
    (the reward, the covered share of the outline, is counted all along)."""
    skills = {name: skill.share for name, skill in SKILLS.items()}

    def step(self, row):
        frame, reward, _ = super().step(row)
        return frame, reward, False

    def probe(self):
        """Places of finger and block in pixels (x, y) times 2, and the block's angle in
        256 steps, uint8."""
        world = self.env.unwrapped
        scale = 2 * 96 / SIDE
        places = [np.clip(np.rint(scale * np.array(body.position)), 0, 255)
                  for body in (world.agent, world.block)]
        angle = world.block.angle / (2 * np.pi) * 256 % 256
        return {"probe_places": np.concatenate(places).astype(np.uint8),
                "probe_angle": np.array(angle).astype(np.uint8)}

    def player(self, rng, skill):
        return Pusher(self, rng, SKILLS[skill])

    def row(self, place):
        """A place (x, y) on the table -> the action that moves there, float32 (2,)."""
        share = np.clip(np.array(place) / SIDE, 0, 1)
        return np.float32(np.rint(share * (self.bins - 1)) if self.bins else 2 * share - 1)


class Pusher:
    """Picks the push, a point on the block's edge and the direction into it, that helps
    most to move and turn the block onto its outline; goes round the block to where it
    begins, then pushes. A push lasts some steps, then it looks again."""

    def __init__(self, env, rng, skill):
        self.env, self.world, self.rng, self.skill = env, env.env.unwrapped, rng, skill
        self.plan, self.wander = self.push(), 0

    def act(self):
        if self.wander == 0 and self.rng.random() < self.skill.noise:
            self.wander = int(self.rng.integers(3, 12))
            self.target = self.rng.uniform(30, SIDE - 30, 2)
        if self.wander:
            self.wander -= 1
            return self.env.row(self.target)
        return self.env.row(next(self.plan))

    def edges(self):
        """Points (n, 2) on the block's edges, and the directions (n, 2) into it."""
        points, inwards = [], []
        for shape in self.world.block.shapes:
            corners = [np.array(self.world.block.local_to_world(v))
                       for v in shape.get_vertices()]
            middle = np.mean(corners, 0)
            for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
                normal = np.array([(b - a)[1], -(b - a)[0]]) / np.linalg.norm(b - a)
                normal *= np.sign((middle - a) @ normal)
                for share in (0.15, 0.5, 0.85):
                    points.append(a + share * (b - a))
                    inwards.append(normal)
        return np.array(points), np.array(inwards)

    def best_push(self):
        """Of all points on the edges and some lengths of a push that which brings the block
        nearest to its goal -> where to begin, the direction, the length."""
        block, goal = self.world.block, self.world.goal_pose
        centre = np.array(block.local_to_world(block.center_of_gravity))
        points, inwards = self.edges()
        arm = points - centre
        torque = arm[:, 0] * inwards[:, 1] - arm[:, 1] * inwards[:, 0]
        # a sliding block turns about its middle as if it were a disc of this radius
        share = RADIUS ** 2 / (RADIUS ** 2 + torque ** 2)
        lengths = np.array([8.0, 16.0, 32.0, 64.0])[:, None]
        moved = lengths[..., None] * (share[:, None] * inwards)     # (lengths, points, 2)
        turned = lengths * share * torque / RADIUS ** 2
        away = goal[:2] - np.array(block.position) - moved
        turn = (goal[2] - block.angle - turned + np.pi) % (2 * np.pi) - np.pi
        error = np.hypot(away[..., 0], away[..., 1]) + RADIUS * np.abs(turn)
        starts = points - 40 * inwards
        inside = ((starts > 15) & (starts < SIDE - 15)).all(1)
        error = np.where(inside, error, np.inf) + 5 * self.rng.random(error.shape)
        length, best = np.unravel_index(np.argmin(error), error.shape)
        return starts[best], inwards[best], lengths[length, 0]

    def push(self):
        """Yields places to move to, without end."""
        while True:
            start, inward, length = self.best_push()
            for _ in range(12):                     # go there, round the block
                here = np.array(self.world.agent.position)
                centre = np.array(self.world.block.position)
                way = start - here
                if np.linalg.norm(way) < 15:
                    break
                along = np.clip((centre - here) @ way / (way @ way), 0, 1)
                nearest = here + along * way
                if np.linalg.norm(nearest - centre) < 70 and along > 0:
                    side = here - centre
                    side = side / max(np.linalg.norm(side), 1.0)
                    across = np.array([-side[1], side[0]])
                    across *= np.sign(across @ (start - centre)) or 1.0
                    yield np.clip(centre + 110 * (0.5 * side + across), 20, SIDE - 20)
                else:
                    yield start
            for way in np.arange(20, 25 + length, 15):
                yield start + inward * way
            for _ in range(2):                      # the finger lags behind
                yield start + inward * (25 + length)


def read_places(frames):
    """Frames uint8 (N, 96, 96, 3) -> centres (x, y) in pixels of finger and block, (N, 2,
    2); nan where nothing has its colour. A pixel belongs to the nearest of the colours."""
    colours = np.float32([FINGER, BLOCK, GREEN, (255, 255, 255), (211, 211, 211)])
    far = [np.square(frames - colour).sum(-1) for colour in colours]
    nearest = np.argmin(far, 0)                                     # (N, 96, 96)
    y, x = np.mgrid[:frames.shape[1], :frames.shape[2]] + 0.5
    places = []
    for colour in (0, 1):
        mask = nearest == colour
        n = mask.sum((1, 2))
        centre = [np.where(n > 3, (mask * axis).sum((1, 2)) / np.maximum(n, 1), np.nan)
                  for axis in (x, y)]
        places.append(np.stack(centre, -1))
    return np.stack(places, 1)
