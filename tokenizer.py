"""Efficient transformer (Dreamer 4, Section 3.4) and causal tokenizer (Section 3.1).

Section 3.4  attend, rope, Cache, Transformer   pre-RMSNorm, RoPE, SwiGLU, QKNorm, GQA, soft
                                                cap; space layers and some time layers
Section 3.1  Tokenizer                          frames -> tanh latents -> frames
Eq. 5        reconstruction_loss                MSE + 0.2 LPIPS, each over its running RMS

Shape letters, here and everywhere: B batch, T frames, S tokens in a frame, D width,
Z latent channels, H W pixels. Departures from the paper: README, "Departures".
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, check_config

PIXEL_MEAN, PIXEL_STD = 0.35, 0.25      # scale play to about zero mean and unit variance
SOFT_CAP = 50.0                         # of attention logits
TIME_EVERY = 4                          # the tokenizer's time layers: one in four
MOST_PATCHES = 144                      # of a frame where no patch size is given


# ------------------------------------------------------- Section 3.4: efficient transformer

def attend(q, k, v, mask, soft_cap=SOFT_CAP):
    """Grouped-query attention; soft cap and softmax in fp32.

    q (..., heads, L, E), k and v (..., kv_heads, M, E), mask None or broadcastable to
    (..., kv_heads, heads / kv_heads, L, M), True = may attend. Returns (..., heads, L, E).
    """
    *lead, heads, L, E = q.shape
    kv_heads, M = k.shape[-3:-1]
    group = heads // kv_heads
    # subtle: the query heads that share a kv head lie in a row
    q = q.reshape(*lead, kv_heads, group * L, E)
    logits = (q @ k.transpose(-1, -2)).float() * E ** -0.5
    logits = (soft_cap * torch.tanh(logits / soft_cap)).view(*lead, kv_heads, group, L, M)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    weights = logits.softmax(-1).to(v.dtype).view(*lead, kv_heads, group * L, M)
    return (weights @ v).view(*lead, heads, L, E)


def rope_angles(positions, size, base=1000.0):
    """positions (L,) integers -> cos and sin (L, size / 2), fp32."""
    frequency = base ** (-torch.arange(size // 2, device=positions.device) / (size // 2))
    angle = positions[:, None].float() * frequency
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotary position embedding of x (..., L, E): the product of two depends on their
    distance."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def reader_mask(others, readers, device=None):
    """(S, S) modality mask, True = may attend: the last `readers` tokens of a frame see all
    of it, the first `others` see only each other. Encoder: latents read patches; decoder:
    patch queries read latents; dynamics: agent tokens read the world."""
    is_reader = torch.arange(others + readers, device=device) >= others
    return is_reader[:, None] | ~is_reader[None, :]


def time_mask(query_frames, key_frames, context):
    """(L,) and (M,) frame indices -> (L, M), True = may attend: a frame sees itself and the
    context - 1 frames before it."""
    age = query_frames[:, None] - key_frames[None, :]
    return (age >= 0) & (age < context)


class Cache:
    """Keys and values of the time layers for the last `context` frames, as a ring.

    A forward of one frame writes into the slot of frame `t`, and only `advance` moves on:
    the K denoising passes of a frame overwrite each other, and the commit pass is what
    stays. A short past has a short ring: it grows with the frames until it is `context`
    slots long.
    """

    def __init__(self, context, t=0):
        self.context = context
        self.start, self.t = t, t       # index of the first frame, and of the next one
        self.layers = {}                # layer -> ring of keys, ring of values

    def slots(self, T):
        """Length of the ring once T new frames are in it: it grows by 16 slots at a
        time."""
        return min(self.context, -(-(self.t + T) // 16) * 16)

    def make_room(self, T, device):
        """Before T new frames: rings long enough, and the slot of a single one, a tensor:
        compiled code would be compiled again for another number."""
        self.slot = torch.full((1,), self.t % self.context, device=device)
        for rings in self.layers.values():
            if (missing := self.slots(T) - rings[0].shape[-3]) > 0:
                rings[:] = [F.pad(ring, (0, 0, 0, 0, 0, missing)) for ring in rings]

    def key_frames(self, T, device):
        """Frame indices of the keys that `put` returns beside T new frames. One frame gets
        the whole ring as it lies; empty slots have an index to come, which nothing attends
        to."""
        if T > 1:
            first = max(self.start, self.t - self.context)
            return torch.arange(first, self.t + T, device=device)
        slots = torch.arange(self.slots(1), device=device)
        frames = self.t - (self.t - slots) % self.context
        return frames.masked_fill(frames < self.start, self.t + 1)

    def put(self, layer, k, v):
        """k, v (..., T, n, E), n tokens a frame -> keys and values (..., M * n, E) to
        attend to: those of the frames before, and the new ones."""
        T, to_attend = k.shape[-3], []
        if layer not in self.layers:
            self.layers[layer] = [torch.zeros_like(x[..., :1, :, :]).repeat_interleave(
                self.slots(T), -3) for x in (k, v)]
        for ring, x in zip(self.layers[layer], (k, v), strict=True):
            if T == 1:          # subtle: the whole ring, for a slice would be copied
                ring[..., self.slot, :, :] = x
                x = ring
            else:               # read what was there before its slots are overwritten
                C, t, new = self.context, self.t, x[..., -self.context:, :, :]
                before = torch.arange(max(self.start, t - C), t, device=k.device) % C
                x = torch.cat([ring[..., before, :, :], x], -3)
                after = torch.arange(t + max(T - C, 0), t + T, device=k.device) % C
                ring[..., after, :, :] = new
            to_attend.append(x.flatten(-3, -2))
        return to_attend

    def advance(self, T=1):
        self.t += T

    def branch(self, n):
        """A copy with its rows repeated n times: they leave this cache as it is."""
        twin = Cache(self.context, self.t)
        twin.start = self.start
        for layer, rings in self.layers.items():
            twin.layers[layer] = [ring.repeat(n, *[1] * (ring.dim() - 1)) for ring in rings]
        return twin

    def select_rows(self, rows):
        """Go on with these batch rows (n,) alone."""
        for layer, rings in self.layers.items():
            self.layers[layer] = [ring[rows] for ring in rings]

    def copy_rows(self, rows, other):
        """Replace batch rows (n,) by the rows of another cache that stands at the same
        frame."""
        assert (other.t, other.context) == (self.t, self.context), (other.t, self.t)
        for layer, rings in self.layers.items():
            for ring, new in zip(rings, other.layers[layer], strict=True):
                ring[rows] = new


class Attention(nn.Module):
    """Self-attention of one layer: over the tokens of a frame ("space"), over the frames of
    a token ("time"), or over all tokens of all frames ("dense", the paper's ablation)."""

    def __init__(self, cfg, kind):
        super().__init__()
        self.kind, self.heads, self.size = kind, cfg.heads, cfg.dim // cfg.heads
        self.q = nn.Linear(cfg.dim, cfg.heads * self.size, bias=False)
        self.k = nn.Linear(cfg.dim, cfg.kv_heads * self.size, bias=False)
        self.v = nn.Linear(cfg.dim, cfg.kv_heads * self.size, bias=False)
        self.out = nn.Linear(cfg.heads * self.size, cfg.dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.size), nn.RMSNorm(self.size)

    def split(self, x):
        """(B, T, S, heads * E) -> (B, T, heads, S, E), (B, S, heads, T, E) or
        (B, 1, heads, T * S, E): the axis that attends stands last but one."""
        B, T, S, _ = x.shape
        if self.kind == "dense":
            T, S = 1, T * S
        x = x.view(B, T, S, -1, self.size)
        return x.permute(0, 2, 3, 1, 4) if self.kind == "time" else x.transpose(2, 3)

    def project(self, x, angles):
        """x (B, T, S, D) -> queries, keys and values as `split` gives them."""
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        # subtle: norm first, then rotate
        q = rope(self.q_norm(q.float()), *angles).to(v.dtype)
        k = rope(self.k_norm(k.float()), *angles).to(v.dtype)
        return q, k, v

    def merge(self, y, shape):
        """What `attend` gives back -> (B, T, S, D)."""
        y = y.permute(0, 3, 1, 2, 4) if self.kind == "time" else y.transpose(2, 3)
        return self.out(y.reshape(shape))


class Block(nn.Module):
    """Pre-norm attention, then pre-norm SwiGLU."""
    compiled = None                     # set by compile_module: torch.compile of forward

    def __init__(self, cfg, kind):
        super().__init__()
        self.kind = kind
        self.attention = Attention(cfg, kind)
        hidden = 64 * round(cfg.dim * 8 / 3 / 64)
        self.norm1, self.norm2 = nn.RMSNorm(cfg.dim), nn.RMSNorm(cfg.dim)
        self.up = nn.Linear(cfg.dim, hidden, bias=False)
        self.gate = nn.Linear(cfg.dim, hidden, bias=False)
        self.down = nn.Linear(hidden, cfg.dim, bias=False)

    def project(self, x, angles):
        return self.attention.project(self.norm1(x), angles)

    def finish(self, x, y):
        x = x + self.attention.merge(y, x.shape)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def forward(self, x, angles, mask, cache=None, layer=None):
        q, k, v = self.project(x, angles)
        if cache is not None:
            T = x.shape[1]
            k, v = cache.put(layer, k.unflatten(-2, (T, -1)), v.unflatten(-2, (T, -1)))
        return self.finish(x, attend(q, k, v, mask))


class Transformer(nn.Module):
    """Space layers, and one time layer in every `time_every` (Section 3.4).

    cfg needs dim, heads, kv_heads, context. Time layers see the frame itself and context -
    1 earlier ones: of their own token, or with `dense` of all tokens.
    """
    compiled = None         # torch.compile of run, for single frames beside a cache

    def __init__(self, cfg, layers, time_every, dense=False):
        super().__init__()
        self.context, self.size = cfg.context, cfg.dim // cfg.heads
        in_time = "dense" if dense else "time"
        kinds = [in_time if i % time_every == time_every // 2 else "space"
                 for i in range(layers)]
        self.blocks = nn.ModuleList(Block(cfg, kind) for kind in kinds)
        self.norm = nn.RMSNorm(cfg.dim)
        for block in self.blocks:       # the residual stream starts close to the embeddings
            for weight in (block.attention.out.weight, block.down.weight):
                nn.init.normal_(weight, std=0.5 * (cfg.dim * layers) ** -0.5)

    def positions_and_masks(self, space_mask, cache, single, T, readers):
        """For the kinds of layers that there are: RoPE's angles and the mask, by kind."""
        S, device = len(space_mask), space_mask.device
        t = cache.t if cache else 0
        frames = torch.arange(t, t + T, device=device)
        keys = cache.key_frames(T, device) if cache else frames

        # which frames see which; separate images see themselves alone, (B, 1, 1, 1, T, T)
        in_time = time_mask(frames, keys, self.context)
        if single is not None:
            itself = torch.eye(T, dtype=torch.bool, device=device)
            in_time = (in_time & (~single[:, None, None] | itself))[:, None, None, None]

        masks = {"space": space_mask, "time": in_time}
        positions = {"space": torch.arange(S, device=device), "time": frames}
        if any(block.kind == "dense" for block in self.blocks):
            # all tokens of the frames that are seen, through the modality mask too
            wide = in_time.repeat_interleave(S, -2).repeat_interleave(S, -1)
            masks["dense"] = space_mask.repeat(T, keys.numel()) & wide
            # subtle: readers take up no positions, or those of the others would shift
            place = torch.arange(S, device=device)
            positions["dense"] = ((S - readers) * frames[:, None] + place).flatten()
        return {kind: rope_angles(x, self.size) for kind, x in positions.items()}, masks

    def forward(self, x, space_mask, cache=None, single=None, readers=0):
        """x (B, T, S, D) -> (B, T, S, D). space_mask (S, S), True = may attend. single (B,)
        bool: rows whose frames are separate images. With a cache, x continues at frame
        cache.t. readers: how many of the last tokens read and are not read."""
        T = x.shape[1]
        if cache is not None:
            cache.make_room(T, x.device)
        angles, masks = self.positions_and_masks(space_mask, cache, single, T, readers)
        compiled = cache is not None and T == 1 and len(cache.layers) > 0
        run = (self.compiled if compiled else None) or self.run
        return run(x, angles, masks, cache)

    def run(self, x, angles, masks, cache):
        for i, block in enumerate(self.blocks):
            if cache is None or block.kind == "space":      # nothing to remember
                x = (block.compiled or block)(x, angles[block.kind], masks[block.kind])
            else:
                x = block(x, angles[block.kind], masks[block.kind], cache, i)
        return self.finish(x)

    def finish(self, x):
        return self.norm(x)


def compile_module(module, device, frozen=False):
    """torch.compile of a module's blocks, faster on a CPU too once compiled. Where its
    weights won't change any more (frozen): of the whole pass of a single frame beside a
    cache, which would else wait for Python, weights in the order that a CPU likes best. It
    needs a C++ compiler; without one all runs as it is, and a line says so."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:          # whatever is missing, training goes on without
        print(f"torch.compile doesn't work here ({type(error).__name__}): it's slower.")
        return
    torch._dynamo.config.recompile_limit = 64
    for part in module.modules():
        if isinstance(part, Transformer) and frozen:
            options = {"freezing": device.type == "cpu"}
            part.compiled = torch.compile(part.run, dynamic=False, options=options)
        elif isinstance(part, Transformer):
            part.finish = torch.compile(part.finish)
        elif isinstance(part, Block) and not frozen:
            part.compiled = torch.compile(part.forward, dynamic=False)
            part.project = torch.compile(part.project, dynamic=False)       # beside a cache
            part.finish = torch.compile(part.finish, dynamic=False)


# ----------------------------------------------------------- losses that every stage shares

class LossNormalizer(nn.Module):
    """Divides every loss term by a running RMS of itself (Section 3, "loss normalization").

    Call with {name: scalar} and optional weights; returns the sum. Its buffers belong into
    the checkpoint. subtle: the RMS is detached and *running*; by its own value each loss
    would be 1. Its memory grows with the steps, up to 1 / (1 - decay) of them: what a loss
    started at, ln 255 for a two-hot head, would else make it count for next to nothing for
    a long time. A loss of exactly 0 is one of nothing (no frame had a target) and leaves no
    trace.
    """

    def __init__(self, names, decay=0.99):
        super().__init__()
        self.names, self.decay = list(names), decay
        self.register_buffer("square", torch.zeros(len(self.names)))
        self.register_buffer("count", torch.zeros(len(self.names)))

    def forward(self, losses, weights=()):
        weights, total = dict(weights), 0.0
        for name, loss in losses.items():
            i = self.names.index(name)
            with torch.no_grad():
                counts = (loss != 0).float()
                rate = (10 / (10 + self.count[i])).clamp_min(1 - self.decay)
                self.square[i].lerp_(loss.detach().float().square(), rate * counts)
                self.count[i] += counts
                rms = self.square[i].sqrt().clamp_min(1e-8)
            total = total + weights.get(name, 1.0) * loss / rms
        return total


# ------------------------------------------------------------ Section 3.1: causal tokenizer

@dataclass
class TokenizerConfig:
    """Sizes of the causal tokenizer; the paper's values in brackets."""
    height: int = 72            # of a frame, from the dataset (360)
    width: int = 72             # (640)
    patch: int = 0              # side in pixels (16); 0: 8, or more for a large frame
    dim: int = 128
    layers: int = 3             # of the encoder, and as many of the decoder
    heads: int = 2
    kv_heads: int = 1
    latents: int = 0            # bottleneck tokens of a frame (512); 0: one a patch
    channels: int = 8           # of each (16)
    pack: int = 9               # tokens merged into one for the dynamics (2); with one a
                                # patch those of a square of neighbours
    local: bool = True          # latents belong to a patch, where they divide evenly
    context: int = 6            # frames that a time layer sees
    mae_max: float = 0.5        # largest share of masked patches (0.9)
    lpips: float = 0.0          # weight of the perceptual loss, needs lpips (0.2)

    def __post_init__(self):
        check_config("tokenizer", self, zero=("patch", "latents"), shares=("mae_max",))
        check_transformer("tokenizer", self, TIME_EVERY)
        if self.latents % self.pack or not (self.latents or self.side ** 2 == self.pack):
            raise UserError(f"Got tokenizer.latents {self.latents}, pack {self.pack}: need "
                            "latents that are divisible by pack, or 0 (one a patch) and a "
                            "square: 1, 4, 9.")

    @property
    def side(self):
        """Patches along the side of a square whose latents are packed; learned latents have
        no place: 1."""
        return 1 if self.latents else math.isqrt(self.pack)


def check_transformer(prefix, cfg, time_every, dense=False):
    """UserError where sizes don't fit together."""
    if cfg.dim % (2 * cfg.heads) or cfg.heads % cfg.kv_heads:
        raise UserError(f"Got {prefix}.dim {cfg.dim}, heads {cfg.heads}, kv_heads "
                        f"{cfg.kv_heads}: dim must divide into heads of even size, heads "
                        "into groups of kv_heads.")
    if time_every == 1 and not dense:
        raise UserError(f"Got {prefix}.time_every 1: that leaves no layer within a frame. "
                        f"Use 2 or more, or {prefix}.dense true.")
    if cfg.layers <= time_every // 2:
        raise UserError(f"Got {cfg.layers} {prefix} layers, a time layer in every "
                        f"{time_every}: that leaves no layer over time. Use at least "
                        f"{time_every // 2 + 1}.")


def default_patch(height, width):
    """A multiple of 8 pixels, such that a frame has at most MOST_PATCHES patches."""
    return 8 * max(1, math.ceil(math.sqrt(height * width / MOST_PATCHES) / 8))


def patchify(frames, patch):
    """(B, T, H, W, C) -> (B, T, rows * columns, patch * patch * C), zero-padded at the
    end."""
    B, T, H, W, C = frames.shape
    frames = F.pad(frames, (0, 0, 0, -W % patch, 0, -H % patch))
    rows, columns = frames.shape[2] // patch, frames.shape[3] // patch
    x = frames.view(B, T, rows, patch, columns, patch, C).transpose(3, 4)
    return x.reshape(B, T, rows * columns, patch * patch * C)


def unpatchify(patches, patch, height, width):
    """Inverse of patchify: (B, T, P, patch * patch * C) -> (B, T, H, W, C)."""
    B, T, _, _ = patches.shape
    rows, columns = -(-height // patch), -(-width // patch)
    x = patches.view(B, T, rows, columns, patch, patch, -1).transpose(3, 4)
    return x.reshape(B, T, rows * patch, columns * patch, -1)[:, :, :height, :width]


def mae_mask(B, T, P, p_max, generator, device):
    """(B, T, P) bool, True = hidden. Section 3.1: p ~ U(0, p_max) drawn for each image."""
    p = p_max * torch.rand(B, T, 1, generator=generator, device=device)
    return torch.rand(B, T, P, generator=generator, device=device) < p


def reconstruction_loss(x_hat, x, perceptual=None):
    """Eq. 5 (Section 3.1): L = MSE(x_hat, x) + 0.2 LPIPS(x_hat, x), each over its running
    RMS.

    x_hat, x (B, T, H, W, 3) scaled pixels. Returns the terms by name; the caller's
    LossNormalizer weighs and adds them. perceptual: callable on images (N, 3, H, W) in [-1,
    1].
    """
    losses = {"mse": (x_hat - x).square().mean()}
    if perceptual is not None:          # subtle: LPIPS wants [-1, 1], not our scaled pixels
        a, b = ((2 * y.flatten(0, 1).movedim(-1, 1) * PIXEL_STD + 2 * PIXEL_MEAN - 1)
                for y in (x_hat, x))
        losses["lpips"] = perceptual(a, b).mean()
    return losses


class Tokenizer(nn.Module):
    """Frames (B, T, H, W, 3) uint8 <-> latents (B, T, S_z, Z) of about unit variance."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch = cfg.patch or default_patch(cfg.height, cfg.width)
        # so many that squares of neighbours fit, which may reach beyond the frame
        square = self.patch * cfg.side
        self.rows, self.columns = (-(-x // square) * cfg.side
                                   for x in (cfg.height, cfg.width))
        self.padded = self.rows * self.patch, self.columns * self.patch
        self.patches = self.rows * self.columns
        self.latents = cfg.latents or self.patches
        # not in the paper: where latents divide evenly among the patches, a latent starts
        # from its patch's token and a patch query from its latents: there is no routing to
        # learn
        self.own = 0                    # latents of a patch
        if cfg.local and self.latents % self.patches == 0:
            self.own = self.latents // self.patches

        def embedding(*shape):
            return nn.Parameter(torch.randn(*shape, cfg.dim) * 0.02)

        size = self.patch ** 2 * 3
        self.patch_in = nn.Linear(size, cfg.dim)
        self.patch_position, self.hidden_patch = embedding(self.patches), embedding()
        self.latent_query = embedding(self.latents)
        self.patch_query = embedding(self.patches)
        self.encoder = Transformer(cfg, cfg.layers, TIME_EVERY)
        self.decoder = Transformer(cfg, cfg.layers, TIME_EVERY)
        self.latent_out = nn.Linear(cfg.dim, cfg.channels)
        self.latent_in = nn.Linear(cfg.channels, cfg.dim)
        self.patch_out = nn.Linear(cfg.dim, size)
        self.register_buffer("latent_std", torch.ones(()))      # measured after training
        self.encoder_mask = functools.partial(reader_mask, self.patches, self.latents)
        self.decoder_mask = functools.partial(reader_mask, self.latents, self.patches)

    @property
    def latent_shape(self):
        """(S_z, Z) of a frame's latents as the dynamics get them: packed."""
        return self.latents // self.cfg.pack, self.cfg.channels * self.cfg.pack

    def new_cache(self):
        return Cache(self.cfg.context)

    def cut(self, x):
        """Pixels (B, T, H, W, 3) -> patches (B, T, P, patch * patch * 3)."""
        (H, W), (height, width) = x.shape[2:4], self.padded
        return patchify(F.pad(x, (0, 0, 0, width - W, 0, height - H)), self.patch)

    def paste(self, patches):
        """Inverse of cut."""
        x = unpatchify(patches, self.patch, *self.padded)
        return x[:, :, :self.cfg.height, :self.cfg.width]

    def bottleneck(self, x, hidden=None, cache=None):
        """Scaled pixels -> (B, T, latents, channels) in (-1, 1). hidden (B, T, P):
        masked."""
        B, T = x.shape[:2]
        tokens = self.patch_in(self.cut(x))
        if hidden is not None:
            tokens = torch.where(hidden[..., None], self.hidden_patch, tokens)
        tokens = tokens + self.patch_position
        latents = self.latent_query.expand(B, T, -1, -1)
        if self.own:
            latents = latents + tokens.repeat_interleave(self.own, 2)
        tokens = torch.cat([tokens, latents], 2)
        tokens = self.encoder(tokens, self.encoder_mask(x.device), cache)
        return torch.tanh(self.latent_out(tokens[:, :, self.patches:]).float())

    def reconstruct(self, bottleneck, cache=None):
        """(B, T, latents, channels) -> scaled pixels (B, T, H, W, 3), fp32."""
        B, T = bottleneck.shape[:2]
        latents, queries = self.latent_in(bottleneck), self.patch_query.expand(B, T, -1, -1)
        if self.own:
            queries = queries + latents.unflatten(2, (self.patches, self.own)).sum(3)
        tokens = torch.cat([latents, queries], 2)
        tokens = self.decoder(tokens, self.decoder_mask(bottleneck.device), cache)
        return self.paste(self.patch_out(tokens[:, :, self.latents:]).float())

    def merge(self, z):
        """(B, T, latents, channels) -> (B, T, S_z, Z): packed."""
        if self.cfg.side > 1:
            z = patchify(z.unflatten(2, (self.rows, self.columns)), self.cfg.side)
        return z.reshape(*z.shape[:2], *self.latent_shape)

    def split(self, z):
        """Inverse of merge."""
        if self.cfg.side > 1:
            z = unpatchify(z, self.cfg.side, self.rows, self.columns).flatten(2, 3)
        return z.reshape(*z.shape[:2], self.latents, self.cfg.channels)

    def forward(self, x, hidden=None):
        return self.reconstruct(self.bottleneck(x, hidden))

    def encode(self, frames, cache=None):
        """uint8 frames (B, T, H, W, 3) -> latents (B, T, S_z, Z) for the dynamics: packed,
        divided by one std. With a cache the frames continue a stream; it moves on by T."""
        z = self.bottleneck(scale_pixels(frames), cache=cache)
        if cache:
            cache.advance(z.shape[1])
        return self.merge(z) / self.latent_std

    def decode(self, z, cache=None):
        """Latents (B, T, S_z, Z) -> uint8 frames (B, T, H, W, 3)."""
        x = self.reconstruct(self.split(z * self.latent_std), cache)
        if cache:
            cache.advance(z.shape[1])
        return unscale_pixels(x)

    def rebuild(self, frames, hidden):
        """uint8 frames (B, T, H, W, 3) with patches hidden (B, T, P) -> what the encoder
        sees of them, hidden patches grey, and what the decoder makes of that; both
        uint8."""
        x = scale_pixels(frames)
        visible = self.paste(torch.where(hidden[..., None], 0.0, self.cut(x)))
        return unscale_pixels(visible), unscale_pixels(self(x, hidden))


@torch.no_grad()
def latent_health(bottleneck):
    """Not in the paper: signs of a collapse, of latents (B, T, S, Z) in (-1, 1). Effective
    rank (sum l)^2 / sum l^2 of the frames' covariance eigenvalues l, and share of saturated
    tanh."""
    x = bottleneck.float().flatten(0, 1).flatten(1)
    x = x - x.mean(0)
    gram = x @ x.T                      # has the covariance's eigenvalues, up to a factor
    rank = gram.trace().square() / gram.square().sum().clamp_min(1e-12)
    return {"latent_rank": rank, "tanh_saturated": (bottleneck.abs() > 0.97).float().mean()}


def scale_pixels(frames):
    """uint8 (..., H, W, 3) -> fp32 of about zero mean and unit variance."""
    return (frames.float() / 255 - PIXEL_MEAN) / PIXEL_STD


def unscale_pixels(x):
    """Inverse of scale_pixels, clamped."""
    return (255 * (x * PIXEL_STD + PIXEL_MEAN)).round().clamp(0, 255).to(torch.uint8)


def lpips_loss():
    """The perceptual loss of Eq. 5. UserError where the package is missing."""
    try:
        import lpips
    except ImportError:
        raise UserError("Got tokenizer.lpips > 0, need the package lpips and its weights: "
                        "'pip install lpips', or set --tokenizer.lpips 0.") from None
    return lpips.LPIPS(net="vgg").requires_grad_(False)
