"""Interactive dynamics (Dreamer 4, Section 3.2): predicts the clean latents of the next frame.

Eq. 2  euler_sample        K steps from noise to a frame
Eq. 4  sample_tau_d        step sizes and signal levels on the grid, for each frame
Eq. 6  corrupt, x_prediction   z_tilde = (1 - tau) z0 + tau z1, and the network predicts z1
Eq. 7  shortcut_loss       flow loss at d_min (Eq. 1), bootstrap loss above it (Eq. 3)
Eq. 8  ramp_weight
Dynamics is the network, dynamics_losses a training step's losses, Dream the world to act in.
Departures from the paper: README, "Departures".
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from data import UserError, check_config
from tokenizer import Cache, Transformer, check_transformer, reader_mask


@dataclass
class DynamicsConfig:
    """Sizes and settings of the dynamics; the paper's values in the comments."""
    tokens: int = 9             # 256 spatial tokens, from the tokenizer
    channels: int = 64          # 32 channels each, from the tokenizer
    tasks: int = 22             # 20, from the dataset
    dim: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    registers: int = 2
    action_tokens: int = 1
    context: int = 32           # 192 frames
    time_every: int = 2         # 4
    dense: bool = False         # True: block-causal attention over all tokens (first table rows)
    soft_cap: float = 50.0
    k_max: int = 16             # finest step: d_min = 1 / k_max
    k: int = 4                  # 4 sampling steps for a frame
    d_label: str = "own"        # step size told to the network in sampling: "own", 1/k | "min"
    p_boot: float = 0.25        # share of rows with bootstrap; 1: all rows, 0: diffusion forcing
    prediction: str = "x"       # "x": clean latents; "v": velocity (ablation)
    loss_space: str = "x"       # "x" | "v" (ablation)
    ramp: bool = True           # Eq. 8
    tau_ctx: float = 0.9        # printed as 0.1, read as 10 % noise; snapped to the grid
    single_images: float = 0.1  # 0.3: share of rows trained as separate images

    def __post_init__(self):
        check_config("dynamics", self, zero=("tasks", "registers"),
                     shares=("p_boot", "tau_ctx", "single_images"))
        check_transformer("dynamics", self, self.layers)
        for name in ("k_max", "k"):
            value = getattr(self, name)
            if value & (value - 1) or value > self.k_max:
                raise UserError(f"Got dynamics.{name} {value}: need a power of two, k <= k_max.")
        for name, words in (("prediction", ("x", "v")), ("loss_space", ("x", "v")),
                            ("d_label", ("own", "min"))):
            if getattr(self, name) not in words:
                raise UserError(f"Got dynamics.{name} {getattr(self, name)!r}, need one of "
                                f"{words}.")


# ----------------------------------------------------------------------- equations 2, 4 to 8

def corrupt(z0, z1, tau):
    """Eq. 6 (Section 3.2), left: z_tilde = (1 - tau) z0 + tau z1. tau (B, T), latents
    (B, T, S, Z): each frame has its own signal level."""
    tau = tau[:, :, None, None]
    return (1 - tau) * z0 + tau * z1


def x_prediction(output, z_tilde, tau, prediction="x"):
    """Eq. 6 (Section 3.2), right: z1_hat = f(z_tilde, tau, d, a). With prediction "v" (ablation)
    the network's output is a velocity, and z1_hat = z_tilde + (1 - tau) v."""
    return output if prediction == "x" else z_tilde + (1 - tau[:, :, None, None]) * output


def sample_tau_d(B, T, k_max, n_boot, generator=None, device="cpu"):
    """Eq. 4 (Section 3.2): d ~ 1 / U({1, 2, 4, ..., k_max}), tau ~ U({0, d, ..., 1 - d}).

    Returns tau, d (B, T), drawn for each frame (diffusion forcing). The print has 1/d where the
    grid needs d. The first n_boot rows draw d so, the others have d = d_min throughout.
    """
    levels = int(math.log2(k_max))
    draw = torch.randint(levels + 1, (B, T), generator=generator, device=device)
    draw[n_boot:] = levels                                      # d_min = 1 / k_max
    d = 0.5 ** draw                                             # 1, 1/2, 1/4, ..., 1 / k_max
    u = torch.rand(B, T, generator=generator, device=device)
    return (u / d).floor() * d, d


def ramp_weight(tau):
    """Eq. 8 (Section 3.2): w(tau) = 0.9 tau + 0.1."""
    return 0.9 * tau + 0.1


def shortcut_loss(f, z1_hat, z_tilde, z1, tau, d, d_min, loss_space="x"):
    """Eq. 7 (Section 3.2): squared error (B, T) of each frame.

    d = d_min:  |z1_hat - z1|^2
    d > d_min:  (1 - tau)^2 |(z1_hat - z_tilde) / (1 - tau) - stopgrad(b1 + b2) / 2|^2, with
                b1 = (f(z_tilde, tau, d/2) - z_tilde) / (1 - tau),   z' = z_tilde + b1 d/2,
                b2 = (f(z', tau + d/2, d/2) - z') / (1 - (tau + d/2))
    multiplied through, so that the prediction is never divided. f(z, tau, d) predicts clean latents
    (None: no frame has d > d_min). All coarse frames of a clip advance together, frames at d_min
    stay. loss_space "v" (ablation) compares velocities: no factor (1 - tau)^2, in either case.
    """
    target = z1
    rest = (1 - tau)[:, :, None, None]
    if f is not None:
        coarse = (d > d_min)[:, :, None, None]
        half = torch.where(d > d_min, d / 2, d)
        step = torch.where(d > d_min, d / 2, 0.0)               # frames at d_min don't move
        with torch.no_grad():                                   # subtle: stop-gradient
            b1 = (f(z_tilde, tau, half) - z_tilde) / rest
            z_prime = z_tilde + b1 * step[:, :, None, None]
            b2 = (f(z_prime, tau + step, half) - z_prime) / (rest - step[:, :, None, None])
            target = torch.where(coarse, z_tilde + rest * (b1 + b2) / 2, z1)
    error = z1_hat - target
    return (error if loss_space == "x" else error / rest).square().mean((2, 3))


def euler_sample(f, z, k, d_label=None):
    """Eq. 2: z <- z + v d for k steps of d = 1/k from noise z (B, T, S, Z) at tau = 0 to data.

    v = (f(z, tau, d) - z) / (1 - tau). subtle: the label is the level z is at, not the one it
    goes to. d_label: step size told to the network (diffusion forcing knows only d_min).
    """
    d = 1 / k
    for i in range(k):
        tau = torch.full(z.shape[:2], i * d, device=z.device)
        v = (f(z, tau, torch.full_like(tau, d_label or d)) - z) / (1 - i * d)
        z = z + v * d
    return z


# ------------------------------------------------------------------------------- the network

class ActionEmbedding(nn.Module):
    """Actions -> (B, T, S_a, D): each component encoded on its own, summed onto a learned base.
    Unlabelled frames get the base alone (Section 3.2)."""

    def __init__(self, spec, tokens, dim):
        super().__init__()
        self.shape = (tokens, dim)
        sizes = [2] * spec.binary + list(spec.categorical)      # a key: up or down
        self.register_buffer("first", torch.tensor([0, *sizes])[:-1].cumsum(0),
                             persistent=False)      # where each part's rows start
        self.base = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.categorical = nn.Embedding(sum(sizes), tokens * dim)
        self.continuous = (nn.Linear(spec.continuous, tokens * dim, bias=False)
                           if spec.continuous else None)

    def forward(self, actions, labelled):
        """actions: dict of binary (B, T, nb), categorical (B, T, nc), continuous (B, T, na)."""
        parts = torch.cat([actions["binary"].long(), actions["categorical"].long()], -1)
        total = self.categorical(parts + self.first).sum(2)
        if self.continuous is not None:
            total = total + self.continuous(actions["continuous"]).float()
        total = torch.where(labelled[..., None], total, 0.0)
        return self.base + total.unflatten(-1, self.shape)


class Dynamics(nn.Module):
    """Block-causal transformer over [action, (tau, d), latents, registers, agent] tokens.

    actions[:, t] led to frame t. Agent tokens are there when a task is given: they read the
    frame and nobody reads them, so the prediction is the same with and without.
    """

    def __init__(self, cfg, action_spec):
        super().__init__()
        self.cfg, self.action_spec, dim = cfg, action_spec, cfg.dim
        embedding = lambda *shape: nn.Parameter(torch.randn(*shape, dim) * 0.02)
        self.action = ActionEmbedding(action_spec, cfg.action_tokens, dim)
        self.tau_embed = nn.Embedding(cfg.k_max, dim // 2)      # 0, 1/k_max, ..., 1 - 1/k_max
        self.d_embed = nn.Embedding(int(math.log2(cfg.k_max)) + 1, dim - dim // 2)  # 1, 1/2, ...
        self.latent_in = nn.Linear(cfg.channels, dim)
        self.latent_position, self.registers = embedding(cfg.tokens), embedding(cfg.registers)
        self.task_embed = nn.Embedding(cfg.tasks + 1, dim)      # the last one: no task
        self.agent_token = embedding()
        self.transformer = Transformer(cfg, cfg.layers)
        self.latent_out = nn.Linear(dim, cfg.channels)
        nn.init.zeros_(self.latent_out.weight)

    @property
    def d_min(self):
        return 1 / self.cfg.k_max

    @property
    def tau_ctx(self):
        """Signal level of committed frames: the trained grid point nearest to cfg.tau_ctx."""
        return min(round(self.cfg.tau_ctx * self.cfg.k_max), self.cfg.k_max - 1) * self.d_min

    def forward(self, z_tilde, tau, d, actions, labelled, task=None, single=None, cache=None):
        """z_tilde (B, T, S_z, Z), tau and d (B, T) on the grid, labelled (B, T) bool, task (B, T)
        long or None (cfg.tasks: no task), single (B,) bool: rows of separate images.
        Returns z1_hat (B, T, S_z, Z) fp32 and h (B, T, D), the agent token's output, or None.
        """
        B, T, S_z, _ = z_tilde.shape
        cfg = self.cfg
        assert S_z == cfg.tokens and tau.shape == d.shape == (B, T), (z_tilde.shape, tau.shape)
        if single is not None:
            labelled = labelled & ~single[:, None]
        noise = torch.cat([self.tau_embed((tau * cfg.k_max).round().long()),
                           self.d_embed((-torch.log2(d)).round().long())], -1)[:, :, None]
        tokens = [self.action(actions, labelled), noise,
                  self.latent_in(z_tilde) + self.latent_position,
                  self.registers.expand(B, T, -1, -1)]
        if task is not None:
            tokens.append((self.task_embed(task) + self.agent_token)[:, :, None])
        x = torch.cat([y.float() for y in tokens], 2)
        agents = int(task is not None)
        mask = reader_mask(x.shape[2] - agents, agents, x.device)
        x = self.transformer(x, mask, cache, single)
        first = cfg.action_tokens + 1
        output = self.latent_out(x[:, :, first:first + S_z]).float()
        z1_hat = x_prediction(output, z_tilde, tau, cfg.prediction)
        return z1_hat, x[:, :, -1].float() if agents else None


def dynamics_losses(model, z1, actions, labelled, n_boot, generator, n_loss=None, task=None,
                    single=None, known=None, drawn=None):
    """One training step's losses: z1 (B, T, S_z, Z) clean latents.

    Rows [0, n_boot) draw coarse steps, rows [0, n_loss) take the dynamics loss (default: all).
    known (B, T) or (B, 1) bool: frames shown at the signal level of committed ones. drawn (B, T)
    bool: frames to draw from nothing, pure noise (in rows [0, n_boot) at the level and step drawn
    for them); no frame of such a row is weighed by the ramp.
    Returns losses {"dynamics"}, h (B, T, D) or None, metrics by term, tau and d (nan: no frame).
    """
    cfg = model.cfg
    B, T = z1.shape[:2]
    n = B if n_loss is None else n_loss
    tau, d = sample_tau_d(B, T, cfg.k_max, n_boot, generator, z1.device)
    if known is not None:
        tau, d = torch.where(known, model.tau_ctx, tau), torch.where(known, model.d_min, d)
    if drawn is not None:               # not in the paper: rows as in a dream
        tau[n_boot:] = torch.where(drawn, 0.0, tau)[n_boot:]
    z0 = torch.randn(z1.shape, generator=generator, device=z1.device)
    z_tilde = corrupt(z0, z1, tau)
    z1_hat, h = model(z_tilde, tau, d, actions, labelled, task, single)

    def f(z, tau, d):                   # the bootstrap rows alone; their agent tokens aren't needed
        rows = slice(0, n_boot)
        return model(z, tau, d, {name: x[rows] for name, x in actions.items()}, labelled[rows],
                     single=None if single is None else single[rows])[0]

    halves = [(f, slice(0, n_boot)), (None, slice(n_boot, n))]
    error = torch.cat([shortcut_loss(g, z1_hat[s], z_tilde[s], z1[s], tau[s], d[s], model.d_min,
                                     cfg.loss_space) for g, s in halves if s.stop > s.start])
    tau, d = tau[:n], d[:n]
    weighted = error * ramp_weight(tau) if cfg.ramp else error
    if drawn is not None:
        weighted = torch.where(drawn[:n].any(1, keepdim=True), error, weighted)
    fine = d == model.d_min
    with torch.no_grad():               # the table that explains the method: error by tau and d
        mean = lambda x, frames: (x * frames).sum() / frames.sum()
        metrics = {"flow": mean(weighted, fine), "boot": mean(weighted, ~fine)}
        for q in range(4):
            metrics[f"x_error_tau{q}"] = mean(error, fine & ((tau * 4).long() == q))
        for i in range(int(math.log2(cfg.k_max)) if n_boot else 0):
            metrics[f"boot_error_d{2 ** i}"] = mean(error, d == 0.5 ** i)
    # subtle: Eq. 7 is one loss with one running RMS. A constant output has almost no bootstrap
    # loss; divided by an RMS of its own that term drowned the flow term, and nothing was learned.
    return {"dynamics": weighted.mean()}, h, metrics


# ------------------------------------------------------------------------- the world to act in

class Dream:
    """The world model as an environment for B parallel rows.

    `commit` takes frames that are known (from data, from the real game, or just imagined): each is
    corrupted to tau_ctx, labelled so, and its keys and values kept. `imagine` draws the next frame
    in K passes that leave no trace. So a frame costs K + 1 forwards of one frame.
    """

    def __init__(self, model, generator=None, cache=None):
        self.model, self.generator, self.k = model, generator, model.cfg.k
        self.cache = cache or Cache(model.cfg.context)
        finest = model.cfg.d_label == "min" or model.cfg.p_boot == 0    # 0: diffusion forcing
        self.d_label = model.d_min if finest else None
        self.corrupt = True             # False (ablation): committed frames get no noise
        self.h_denoise = None           # h of `imagine`'s last pass (ablation)

    def noise(self, B, T):
        cfg, device = self.model.cfg, self.model.agent_token.device
        return torch.randn(B, T, cfg.tokens, cfg.channels, generator=self.generator, device=device)

    def as_context(self, z):
        """z (B, T, S_z, Z) -> z_tilde, tau, d: how committed frames are shown to the model."""
        tau = torch.full(z.shape[:2], self.model.tau_ctx, device=z.device)
        z_tilde = corrupt(self.noise(*tau.shape), z, tau) if self.corrupt else z
        return z_tilde, tau, torch.full_like(tau, self.model.d_min)

    @torch.no_grad()
    def commit(self, z, actions, labelled, task=None):
        """z (B, T, S_z, Z) clean, actions[:, t] led to frame t. Returns h (B, T, D) or None."""
        _, h = self.model(*self.as_context(z), actions, labelled, task, cache=self.cache)
        self.cache.advance(z.shape[1])
        return h

    @torch.no_grad()
    def imagine(self, actions, labelled, task=None):
        """actions (B, 1, .) -> the frame they lead to, (B, 1, S_z, Z). Commit it to go on. A task
        where the cache holds agent tokens: the frame doesn't depend on them."""
        def f(z, tau, d):
            z1_hat, self.h_denoise = self.model(z, tau, d, actions, labelled, task,
                                                cache=self.cache)
            return z1_hat
        return euler_sample(f, self.noise(len(labelled), 1), self.k, self.d_label)

    def step(self, actions, task=None):
        """Imagine the next frame and commit it: returns z (B, 1, S_z, Z), h (B, 1, D) or None."""
        labelled = torch.ones(next(iter(actions.values())).shape[:2], dtype=torch.bool,
                              device=self.model.agent_token.device)
        z = self.imagine(actions, labelled, task)
        return z, self.commit(z, actions, labelled, task)

    def futures(self, n):
        """n copies of a dream of one row, under the same noise: they differ by their actions alone
        (the paper's counterfactuals), and the dream itself stays as it is."""
        generator = torch.Generator(self.model.agent_token.device).manual_seed(0)
        copies = Dream(self.model, generator, self.cache.fork(n))
        copies.noise = lambda B, T: Dream.noise(copies, 1, T).expand(B, -1, -1, -1)
        return copies

    def trace(self, actions):
        """The K steps of the next frame: K pairs of (z_tilde, z1_hat), each (1, 1, S_z, Z)."""
        steps = []
        labelled = torch.ones(1, 1, dtype=torch.bool, device=self.model.agent_token.device)
        watch = lambda module, inputs, output: steps.append((inputs[0], output[0]))
        with self.model.register_forward_hook(watch):
            self.imagine(actions, labelled)
        return steps
