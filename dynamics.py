"""Interactive dynamics (Dreamer 4, Section 3.2): predicts the next frame's clean latents.

Eq. 2  euler_sample        K steps from noise to a frame
Eq. 4  sample_tau_d        step sizes and signal levels on the grid, for each frame
Eq. 6  corrupt, x_prediction   z_tilde = (1 - tau) z0 + tau z1, and the network predicts z1
Eq. 7  shortcut_target     what is predicted at d_min (Eq. 1), and above it (Eq. 3)
       shortcut_loss       the squared error
Eq. 8  ramp_weight

Dynamics is the network, dynamics_losses a training step's losses, Dream the world to act
in. train.py decides the levels (sample_tau_d, pure_noise, show_as_context), the loss
computes. Departures from the paper: README, "Departures".
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from data import UserError, check_config
from tokenizer import Cache, Transformer, check_transformer, reader_mask

TAU_CTX = 0.9       # signal level of committed frames; the paper's 0.1, read as noise


@dataclass
class DynamicsConfig:
    """Sizes and settings of the dynamics; the paper's values in brackets."""
    tokens: int = 9             # latents of a frame, from the tokenizer (256)
    channels: int = 72          # of each, from the tokenizer (32)
    tasks: int = 22             # from the dataset (20)
    dim: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    registers: int = 2
    context: int = 32           # frames that a time layer sees (192)
    time_every: int = 2         # one layer in so many is a time layer (4)
    dense: bool = False         # True: attention over all tokens of all frames (ablation)
    k_max: int = 16             # sets the finest step, d_min = 1 / k_max
    k: int = 4                  # sampling steps of a frame (4)
    step_label: str = "own"     # step size that the network is told while it samples: "own"
                                # is the one taken, 1 / k; "min" is d_min, which knows best
                                # what follows from a context
    p_boot: float = 0.25        # share of rows with bootstrap (1); 0: diffusion forcing
    prediction: str = "x"       # the network predicts "x", clean latents, or "v", velocity
    loss_space: str = "x"       # the loss compares "x" or "v"
    ramp: bool = True           # Eq. 8
    single_images: float = 0.1  # share of rows trained as separate images (0.3)

    def __post_init__(self):
        check_config("dynamics", self, zero=("tasks", "registers"),
                     shares=("p_boot", "single_images"))
        check_transformer("dynamics", self, self.time_every, self.dense)
        for name in ("k_max", "k"):
            value = getattr(self, name)
            if value & (value - 1) or value > self.k_max:
                raise UserError(f"Got dynamics.{name} {value}: need a power of two, "
                                "k <= k_max.")
        choices = {"prediction": ("x", "v"), "loss_space": ("x", "v"),
                   "step_label": ("own", "min")}
        for name, words in choices.items():
            if getattr(self, name) not in words:
                raise UserError(f"Got dynamics.{name} {getattr(self, name)!r}, need one of "
                                f"{words}.")
        if self.p_boot == 0 and self.step_label == "own":
            raise UserError("Got dynamics.p_boot 0 and step_label 'own': without bootstrap "
                            "rows the network learns d_min alone. Add "
                            "--dynamics.step_label min.")


def to_device(x, device):
    """A tensor on the device; the host doesn't wait, as it must for a copy of memory that
    isn't pinned."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Batch(NamedTuple):
    """Clips of play. actions[:, t] led to frame t; events and continues came on reaching
    it."""
    z: torch.Tensor                     # (B, T, S_z, Z) clean latents
    actions: torch.Tensor               # (B, T, A) class indices, then numbers
    labelled: torch.Tensor              # (B, T) bool: the action is known
    task: torch.Tensor = None           # (B, T) long; None: no agent tokens
    events: torch.Tensor = None         # (B, T, tasks): how often each happened
    continues: torch.Tensor = None      # (B, T): 0 on a terminal frame
    single: torch.Tensor = None         # (B,) bool: its frames are separate images
    asked: torch.Tensor = None          # (B, T) bool: its task was the prompt then

    def to(self, device):
        return Batch(*(None if x is None else to_device(x, device) for x in self))

    def rows(self, index):
        """These rows alone; index: a slice, or numbers (n,)."""
        return Batch(*(None if x is None else x[index] for x in self))


# ---------------------------------------------------------------------- equations 2, 4 to 8

def sample_tau_d(B, T, k_max, n_boot, generator=None):
    """Eq. 4 (Section 3.2): d ~ 1 / U({1, 2, 4, ..., k_max}), tau ~ U({0, d, ..., 1 - d}).

    Returns tau, d (B, T), sampled for each frame (diffusion forcing), on the generator's
    device. (The paper prints 1/d, where the grid needs d.) The first n_boot rows sample d
    so, the others have d = d_min throughout. Another noise schedule: another u in [0, 1).
    """
    device = generator.device if generator else "cpu"
    levels = int(math.log2(k_max))
    halvings = torch.randint(levels + 1, (B, T), generator=generator, device=device)
    halvings[n_boot:] = levels                              # d_min = 1 / k_max
    d = 0.5 ** halvings                                     # 1, 1/2, 1/4, ..., 1 / k_max
    u = torch.rand(B, T, generator=generator, device=device)
    return (u / d).floor() * d, d


def show_as_context(tau, d, frames, model):
    """tau, d (B, T), where `frames` (B, T) or (B, 1) bool are shown as committed ones
    are."""
    return torch.where(frames, model.tau_ctx, tau), torch.where(frames, model.d_min, d)


def pure_noise(tau, d, frames, model):
    """tau (B, T), where `frames` (B, T) bool have to come from nothing. Rows with
    coarse steps keep their levels: there the network learns to draw in few steps."""
    fine_rows = (d == model.d_min).all(1, keepdim=True)
    return torch.where(frames & fine_rows, 0.0, tau)


def corrupt(z0, z1, tau):
    """Eq. 6 (Section 3.2), left: z_tilde = (1 - tau) z0 + tau z1. tau (B, T), latents
    (B, T, S, Z): each frame has its own signal level."""
    tau = tau[:, :, None, None]
    return (1 - tau) * z0 + tau * z1


def x_prediction(output, z_tilde, tau, prediction="x"):
    """Eq. 6 (Section 3.2), right: z1_hat = f(z_tilde, tau, d, a). With prediction "v"
    (ablation) the network's output is a velocity, and z1_hat = z_tilde + (1 - tau) v."""
    return output if prediction == "x" else z_tilde + (1 - tau[:, :, None, None]) * output


def ramp_weight(tau):
    """Eq. 8 (Section 3.2): w(tau) = 0.9 tau + 0.1."""
    return 0.9 * tau + 0.1


def shortcut_target(f, z_tilde, z1, tau, d, d_min):
    """Eq. 7 (Section 3.2), its target for z1_hat (B, T, S, Z).

    d = d_min:  z1
    d > d_min:  z_tilde + (1 - tau) stopgrad(b1 + b2) / 2, the clean latents that the mean
                velocity of two half steps points to, with
                b1 = (f(z_tilde, tau, d/2) - z_tilde) / (1 - tau),   z' = z_tilde + b1 d/2,
                b2 = (f(z', tau + d/2, d/2) - z') / (1 - (tau + d/2))
    f(z, tau, d) predicts clean latents. All coarse frames of a clip advance together,
    frames at d_min stay where they are.
    """
    coarse = d > d_min
    half = torch.where(coarse, d / 2, d)
    step = torch.where(coarse, d / 2, 0.0)                      # frames at d_min don't move
    rest = (1 - tau)[:, :, None, None]                          # the way to clean latents
    step = step[:, :, None, None]
    with torch.no_grad():                                       # subtle: stop-gradient
        b1 = (f(z_tilde, tau, half) - z_tilde) / rest
        z_prime = z_tilde + b1 * step
        b2 = (f(z_prime, tau + step[:, :, 0, 0], half) - z_prime) / (rest - step)
        target = z_tilde + rest * (b1 + b2) / 2
    return torch.where(coarse[:, :, None, None], target, z1)


def shortcut_loss(z1_hat, target, tau, loss_space="x"):
    """Eq. 7 (Section 3.2): squared error (B, T) of each frame, target from shortcut_target.

    d = d_min:  |z1_hat - z1|^2
    d > d_min:  (1 - tau)^2 |(z1_hat - z_tilde) / (1 - tau) - stopgrad(b1 + b2) / 2|^2,
                multiplied through, so that the prediction is never divided.
    loss_space "v" (ablation) compares velocities: no factor (1 - tau)^2, in either case.
    """
    error = z1_hat - target
    if loss_space == "v":
        error = error / (1 - tau)[:, :, None, None]
    return error.square().mean((2, 3))


def euler_sample(f, z, k, step_label=None):
    """Eq. 2: z <- z + v d for k steps of d = 1/k from noise z (B, T, S, Z) at tau = 0 to
    data.

    v = (f(z, tau, d) - z) / (1 - tau). subtle: the level told is the one that z is at, not
    the one it goes to. step_label: step size told to the network, default d.
    """
    d = 1 / k
    for i in range(k):
        tau = torch.full(z.shape[:2], i * d, device=z.device)
        v = (f(z, tau, torch.full_like(tau, step_label or d)) - z) / (1 - i * d)
        z = z + v * d
    return z


# ------------------------------------------------------------------------------ the network

class ActionEmbedding(nn.Module):
    """Actions (B, T, A) -> one token (B, T, D): each column encoded on its own, summed onto
    a learned base. Unlabelled frames get the base alone (Section 3.2)."""

    def __init__(self, spec, dim):
        super().__init__()
        self.classes = len(spec.classes)            # the columns before the numbers
        self.register_buffer("first", torch.tensor([0, *spec.classes])[:-1].cumsum(0),
                             persistent=False)      # where each class column's rows start
        self.base = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.categorical = nn.Embedding(sum(spec.classes), dim)
        self.continuous = nn.Linear(spec.numbers, dim, bias=False) if spec.numbers else None

    def forward(self, actions, labelled):
        total = self.categorical(actions[..., :self.classes].long() + self.first).sum(2)
        if self.continuous is not None:
            total = total + self.continuous(actions[..., self.classes:]).float()
        return self.base + torch.where(labelled[..., None], total, 0.0)


class Dynamics(nn.Module):
    """Block-causal transformer over [action, (tau, d), latents, registers, agent] tokens.

    actions[:, t] led to frame t. Agent tokens are there when a task is given: they read the
    frame and nobody reads them, so the prediction is the same with and without.
    """

    def __init__(self, cfg, action_spec):
        super().__init__()
        self.cfg, self.action_spec, dim = cfg, action_spec, cfg.dim

        def embedding(*shape):
            return nn.Parameter(torch.randn(*shape, dim) * 0.02)

        self.action = ActionEmbedding(action_spec, dim)
        steps = int(math.log2(cfg.k_max)) + 1
        self.tau_embed = nn.Embedding(cfg.k_max, dim // 2)  # 0, 1/k_max, ..., 1 - 1/k_max
        self.d_embed = nn.Embedding(steps, dim - dim // 2)  # 1, 1/2, ..., 1/k_max
        self.latent_in = nn.Linear(cfg.channels, dim)
        self.latent_position = embedding(cfg.tokens)
        self.registers = embedding(cfg.registers)
        self.task_embed = nn.Embedding(cfg.tasks + 1, dim)      # the last one: no task
        self.agent_token = embedding()
        self.transformer = Transformer(cfg, cfg.layers, cfg.time_every, cfg.dense)
        self.latent_out = nn.Linear(dim, cfg.channels)
        nn.init.zeros_(self.latent_out.weight)

    @property
    def d_min(self):
        return 1 / self.cfg.k_max

    @property
    def tau_ctx(self):
        """Signal level of committed frames: the trained grid point nearest to TAU_CTX."""
        return min(round(TAU_CTX * self.cfg.k_max), self.cfg.k_max - 1) * self.d_min

    def forward(self, z_tilde, tau, d, batch, cache=None):
        """z_tilde (B, T, S_z, Z), tau and d (B, T) on the grid; of the batch its actions,
        labelled, task (cfg.tasks: no task; None: no agent tokens) and single.
        Returns z1_hat (B, T, S_z, Z) fp32 and h (B, T, D), the agent token's output, or
        None.
        """
        B, T, S_z, _ = z_tilde.shape
        cfg, labelled, single = self.cfg, batch.labelled, batch.single
        assert S_z == cfg.tokens, (z_tilde.shape, cfg.tokens)
        assert tau.shape == d.shape == (B, T), (tau.shape, d.shape, z_tilde.shape)
        if single is not None:          # no action leads to a separate image
            labelled = labelled & ~single[:, None]

        # the tokens of a frame, in this order
        level = torch.cat([self.tau_embed((tau * cfg.k_max).round().long()),
                           self.d_embed((-torch.log2(d)).round().long())], -1)
        tokens = [self.action(batch.actions, labelled)[:, :, None],
                  level[:, :, None],
                  self.latent_in(z_tilde) + self.latent_position,
                  self.registers.expand(B, T, -1, -1)]
        agents = int(batch.task is not None)
        if agents:
            tokens.append((self.task_embed(batch.task) + self.agent_token)[:, :, None])
        x = torch.cat([y.float() for y in tokens], 2)           # (B, T, S, D)

        mask = reader_mask(x.shape[2] - agents, agents, x.device)
        x = self.transformer(x, mask, cache, single, agents)
        output = self.latent_out(x[:, :, 2:2 + S_z]).float()    # behind action and level
        z1_hat = x_prediction(output, z_tilde, tau, cfg.prediction)
        return z1_hat, x[:, :, -1].float() if agents else None


def noise_like(z, generator):
    """Normal noise. Where processes share a batch each draws that of the whole batch and
    keeps its own rows, so that training is the same with any number of processes."""
    n, rank = 1, 0
    if dist.is_initialized():
        n, rank = dist.get_world_size(), dist.get_rank()
    shape = (n * len(z), *z.shape[1:])
    return torch.randn(shape, generator=generator, device=z.device)[rank::n]


def dynamics_losses(model, batch, tau, d, weight, generator):
    """Loss of one training step (Section 3.2), on clips noised to the levels of the caller.

    batch: z (B, T, S_z, Z) clean, actions, labelled, and task for h; tau, d (B, T) on the
    grid; weight (B, T) of each frame's error, 0 where it doesn't count. generator: of the
    noise z0. Returns {"dynamics": loss}, h (B, T, D) or None, and metrics by term, tau and
    d (nan: there was no such frame). tau and d on the CPU tell which rows have coarse steps
    without waiting for a GPU.
    """
    cfg, device = model.cfg, batch.z.device
    coarse_rows = to_device((d > model.d_min).any(1).nonzero()[:, 0], device)
    tau, d, weight = (to_device(x, device) for x in (tau, d, weight))
    z_tilde = corrupt(noise_like(batch.z, generator), batch.z, tau)
    z1_hat, h = model(z_tilde, tau, d, batch)

    # two half steps for the rows that have coarse frames; their agent tokens aren't needed
    target = batch.z
    if len(coarse_rows):
        clips = batch.rows(coarse_rows)._replace(task=None)

        def f(z, tau, d):
            return model(z, tau, d, clips)[0]

        targets = shortcut_target(f, z_tilde[coarse_rows], clips.z, tau[coarse_rows],
                                  d[coarse_rows], model.d_min)
        target = target.index_copy(0, coarse_rows, targets)

    # subtle: Eq. 7 is one loss with one running RMS. A constant output has almost no
    # bootstrap loss; divided by an RMS of its own that term drowns the flow term, and
    # nothing is learned.
    error = shortcut_loss(z1_hat, target, tau, cfg.loss_space)
    weighted = error * weight
    counted = weight > 0
    loss = weighted.sum() / counted.sum()
    return {"dynamics": loss}, h, error_metrics(error.detach(), weighted.detach(), tau, d,
                                                counted, model)


def error_metrics(error, weighted, tau, d, counted, model):
    """The table that explains the method: mean errors by term, signal level and step size,
    all (B, T). x_error_tau3: frames at d_min with tau in [3/4, 1); boot_error_d4: d =
    1/4."""
    def mean(x, frames):
        frames = frames & counted
        return (x * frames).sum() / frames.sum()

    fine = d == model.d_min
    metrics = {"flow": mean(weighted, fine), "boot": mean(weighted, ~fine)}
    for q in range(4):
        metrics[f"x_error_tau{q}"] = mean(error, fine & ((tau * 4).long() == q))
    for i in range(int(math.log2(model.cfg.k_max))):
        metrics[f"boot_error_d{2 ** i}"] = mean(error, d == 0.5 ** i)
    return metrics


# ---------------------------------------------------------------------- the world to act in

class Dream:
    """The world model as an environment for B parallel rows.

    `commit` takes frames that are there (from data, from the real game, or just imagined):
    each is corrupted to tau_ctx, labelled so, and its keys and values kept. `imagine` draws
    the next frame in K passes that leave no trace. So a frame costs K + 1 forwards of one
    frame.

    k, step_label ("own": the network is told d = 1/k; "min": d_min) and tau_ctx (on the
    grid): default the model's own. Another Dream on the same cache goes on with other ones.
    """

    def __init__(self, model, generator=None, cache=None, k=None, step_label=None,
                 tau_ctx=None):
        self.model, self.generator = model, generator
        self.cache = cache or Cache(model.cfg.context)
        self.k = k or model.cfg.k
        self.step_label = step_label or model.cfg.step_label
        self.tau_ctx = model.tau_ctx if tau_ctx is None else tau_ctx

    def noise(self, B, T):
        cfg, device = self.model.cfg, self.model.agent_token.device
        shape = (B, T, cfg.tokens, cfg.channels)
        return torch.randn(shape, generator=self.generator, device=device)

    def as_context(self, z):
        """z (B, T, S_z, Z) -> z_tilde, tau, d: how committed frames are shown to the
        model."""
        tau = torch.full(z.shape[:2], self.tau_ctx, device=z.device)
        d = torch.full_like(tau, self.model.d_min)  # the d that is trained at every level
        return corrupt(self.noise(*tau.shape), z, tau), tau, d

    @torch.no_grad()
    def commit(self, z, actions, labelled, task=None):
        """z (B, T, S_z, Z) clean, actions[:, t] led to frame t. Returns h (B, T, D) or
        None."""
        batch = Batch(z, actions, labelled, task)
        _, h = self.model(*self.as_context(z), batch, self.cache)
        self.cache.advance(z.shape[1])
        return h

    @torch.no_grad()
    def imagine(self, actions, labelled, task=None):
        """actions (B, 1, A) -> the frame they lead to, (B, 1, S_z, Z). Commit it to go on.
        A task where the cache holds agent tokens: the frame doesn't depend on them."""
        batch = Batch(None, actions, labelled, task)

        def f(z, tau, d):
            return self.model(z, tau, d, batch, self.cache)[0]

        label = self.model.d_min if self.step_label == "min" else None
        return euler_sample(f, self.noise(len(labelled), 1), self.k, label)

    def step(self, actions, task=None):
        """Imagine the next frame and commit it: z (B, 1, S_z, Z), h (B, 1, D) or None."""
        labelled = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
        z = self.imagine(actions, labelled, task)
        return z, self.commit(z, actions, labelled, task)

    def branch(self, n):
        """n copies of a dream of one row, under the same noise: they differ by their
        actions alone (the paper's counterfactuals), and the dream itself stays as it is."""
        generator = torch.Generator(self.model.agent_token.device).manual_seed(0)
        copies = Dream(self.model, generator, self.cache.branch(n), self.k, self.step_label,
                       self.tau_ctx)
        copies.noise = lambda B, T: Dream.noise(copies, 1, T).expand(B, -1, -1, -1)
        return copies

    def trace(self, actions):
        """The K steps of the next frame: K pairs of (z_tilde, z1_hat), each (1, 1, S_z,
        Z)."""
        steps = []
        labelled = torch.ones(1, 1, dtype=torch.bool, device=actions.device)

        def watch(module, inputs, output):
            steps.append((inputs[0], output[0]))

        with self.model.register_forward_hook(watch):
            self.imagine(actions, labelled)
        return steps
