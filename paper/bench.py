"""Speeds at pinned shapes, and what the models of a preset take.

The paper: frames/s on an H100 and seconds of a training step, by design. Here, with random
weights: dynamics of 4 layers, 256 wide, 16 latent and 4 register tokens, K_max 16, trained
on 16 rows of 16 frames (wide: 8 layers, 512 wide, 4 rows of 64); dreams of 1 or 64 rows on
contexts of so many frames ("64 x 16"), with and without the cache.

    python -m paper.bench                       10 minutes on two cores
    python -m paper.bench --run runs/crafter    and the speeds of a run with an agent
    python -m paper.bench --sizes paper         parameters, FLOPs, memory, by formula
"""

import itertools
import sys
import time
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from agent import (DTYPES, Agent, AgentConfig, autocast, dream_of, freeze, imagine_rollout,
                   load_run, pick_device, pick_dtype)
from data import ActionSpec, make_env, run_cli
from dynamics import (Batch, Dream, Dynamics, DynamicsConfig, dynamics_losses, ramp_weight,
                      sample_tau_d)
from paper import results
from play import Result, new_figure
from tokenizer import (Block, Cache, Tokenizer, TokenizerConfig, compile_module,
                       reconstruction_loss)

SPEC = ActionSpec(classes=(17,))
TOKENIZERS = {"tokenizer": TokenizerConfig(patch=24, dim=256, layers=4, heads=4, kv_heads=2,
                                           latents=16, channels=32, local=False, pack=1),
              "default tokenizer": TokenizerConfig()}
ACTIVATION_BYTES = (66, 11)     # for backward, bf16: a channel; a head's pair of tokens
STATE_BYTES = 16                # of a parameter: itself, gradient, optimizer, bf16 copy


GROWTH = {"context": (16, 32, 64, 128, 256, 512), "parameters": (1, 2, 4, 8),
          "rows": (1, 4, 16, 64, 256), "tokens": (9, 16, 64, 256)}
MOST_FRAMES = 4096              # of a training step there: 7 GB
WIDTH_LAYERS = {1: (256, 4), 2: (256, 8), 4: (512, 4), 8: (512, 8)}     # by parameters


def new_dynamics(device, dim=256, layers=4, tokens=16, context=64):
    cfg = DynamicsConfig(tokens=tokens, channels=32, registers=4, dim=dim, layers=layers,
                         heads=4, kv_heads=2, time_every=2, context=context, k_max=16, k=4)
    return Dynamics(cfg, SPEC).to(device)


def empty_batch(model, B, T):
    """Zero latents, no-op actions, labelled."""
    z = torch.zeros(B, T, model.cfg.tokens, model.cfg.channels)
    actions = torch.from_numpy(model.action_spec.zeros(B, T))
    labelled = torch.ones(B, T, dtype=torch.bool)
    return Batch(z, actions, labelled).to(model.agent_token.device)


def seconds(step, repeats, device):
    """Median wall time of step() over `repeats` calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        step()
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


def compile_for_bench(module, device, frozen=False):
    """As training does it, or the game; on CUDA that takes minutes, and the preset gpu does
    without."""
    if device.type != "cuda":
        compile_module(module, device, frozen)
    return module


@torch.no_grad()
def dream_rate(dream, B, tokenizer=None, repeats=12):
    """Frames/s of a dream of B rows on a full context, decoded if there is a tokenizer."""
    context = empty_batch(dream.model, B, dream.cache.context)
    actions = context.actions[:, :1]
    view = tokenizer.new_cache() if tokenizer else None
    dream.commit(context.z, context.actions, context.labelled)

    def step():
        z, _ = dream.step(actions)
        if tokenizer:
            tokenizer.decode(z, view).cpu()

    return B / seconds(step, repeats, actions.device)


@torch.no_grad()
def imagination_rate(new_dream, agent, B, context, horizon, repeats=3):
    """Imagined frames/s of rollouts as in training: policy, rewards and values included."""
    batch = empty_batch(new_dream().model, B, context)
    task = torch.zeros(B, context, dtype=torch.long, device=batch.z.device)

    def rollout():
        h = imagine_rollout(new_dream(), agent, batch._replace(task=task), horizon).h
        (agent.rewards(h, task[:, :1]) + agent.values(h)).cpu()

    return B * horizon / seconds(rollout, repeats, task.device)


@torch.no_grad()
def uncached_rate(model, B, context, passes):
    """Frames/s of a dream without a cache: each pass sees the whole context again."""
    batch = empty_batch(model, B, context)
    tau = torch.zeros(B, context, device=batch.z.device)
    forward = partial(model, batch.z, tau, torch.ones_like(tau), batch)
    return B / (passes * seconds(forward, 8, tau.device))


def matmul_peak(device, dtype, repeats=8):
    """FLOP/s of the fastest of some large matrix products."""
    rates = []
    for n in (512, 1024, 2048) if device.type == "cpu" else (2048, 8192):
        a, b = (torch.randn(m, n, device=device, dtype=dtype) for m in (8192, n))
        rates.append(2 * 8192 * n * n / seconds(lambda a=a, b=b: a @ b, repeats, device))
    return max(rates)


def training_rate(model, loss_fn, frames, dtype, repeats=6):
    """Frames/s and FLOP/s (matrix products, the optimizer's too) of a training step."""
    device = next(model.parameters()).device
    optimizers = train.make_optimizers([model], 1e-4, 1e-4)

    def step():
        with autocast(device, dtype):
            loss = loss_fn()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    compile_for_bench(model, device)
    time_of_step = seconds(step, repeats, device)
    return frames / time_of_step, counter.get_total_flops() / time_of_step


def note(rows, what, value, unit, k="any"):
    of = {"what": f"{what}, {unit}", "K": k}
    rows.append(Result("bench", value, None, None, 1, unit, of))
    print(f"{what}, K {k}: {value:.4g} {unit}", flush=True)


def bench_training(rows, device, dtype):
    """Matrix products, and training steps with the share of those that they reach."""
    peaks = {}
    for name in ("fp32", "bf16"):
        peaks[name] = matmul_peak(device, DTYPES[name])
        note(rows, f"matrix product {name}", peaks[name] / 1e9, "GFLOP/s")

    def note_training(name, net, loss_fn, frames):
        rate, flops = training_rate(net, loss_fn, frames, dtype)
        peak = peaks.get(pick_dtype(device, dtype), peaks["fp32"])
        note(rows, f"training, {name}", rate, "frames/s")
        note(rows, f"training, {name}, of that peak", flops / peak, "share")

    generator = torch.Generator(device).manual_seed(0)
    for name, net, B, T in (("dynamics", new_dynamics(device), 16, 16),
                            ("wide dynamics", new_dynamics(device, 512, 8), 4, 64)):
        batch = empty_batch(net, B, T)
        batch = batch._replace(z=torch.randn_like(batch.z))
        tau, d = sample_tau_d(B, T, net.cfg.k_max, B // 4)
        losses = partial(dynamics_losses, net, batch, tau, d, ramp_weight(tau), generator)
        note_training(name, net, lambda f=losses: f()[0]["dynamics"], B * T)
    x = torch.randn(16, 8, 72, 72, 3, device=device)
    for name, cfg in TOKENIZERS.items():
        net = Tokenizer(cfg).to(device)
        note_training(name, net, lambda f=net: reconstruction_loss(f(x), x)["mse"], 16 * 8)


def bench_dreams(rows, device, dtype):
    """Encoding, decoding; dreams by K and context, decoded or not, without the cache."""
    frames = torch.zeros(16, 16, 72, 72, 3, dtype=torch.uint8, device=device)
    tokenizer = freeze(Tokenizer(TOKENIZERS["default tokenizer"]), device, dtype)
    z = tokenizer.encode(frames)
    for name, step in (("encode", partial(tokenizer.encode, frames)),
                       ("decode", partial(tokenizer.decode, z))):
        note(rows, name, 16 * 16 / seconds(step, 5, device), "frames/s")

    net = compile_for_bench(freeze(new_dynamics(device), device, dtype), device, True)
    tokenizer = freeze(Tokenizer(TOKENIZERS["tokenizer"]), device, dtype)
    tokenizer = compile_for_bench(tokenizer, device, True)
    shapes = ((1, 16, 60), (1, 64, 60), (1, 192, 60), (64, 16, 12))
    combinations = itertools.product(shapes, (None, tokenizer), (1, 4))
    for (B, context, repeats), view, k in combinations:
        rate = dream_rate(Dream(net, cache=Cache(context), k=k), B, view, repeats)
        decoded = ", decoded" if view else ""
        note(rows, f"dream, {B} x {context}{decoded}", rate, "frames/s", k)
    note(rows, "dream, 1 x 64, no cache", uncached_rate(net, 1, 64, 4), "frames/s", 4)

    # 20 frames at a time: does a frame cost more the longer a dream lasts?
    step = partial(Dream(net).step, empty_batch(net, 1, 1).actions)
    cost = [seconds(step, 19, device) for _ in range(26)]
    note(rows, "frame 500 over frame 100", cost[25] / cost[5], "ratio", 4)


def bench_imagination(rows, device, dtype, run=None):
    """Rollouts of 12 frames; those of a run, and its dream, decoded, as in the game."""
    net = compile_for_bench(freeze(new_dynamics(device), device, dtype), device)
    agent = Agent(AgentConfig(), net.cfg.dim, SPEC, 22).to(device)
    for k in (1, 4):
        rate = imagination_rate(partial(Dream, net, k=k), agent, 64, 16, 12)
        note(rows, "imagination, 64 x 16", rate, "frames/s", k)
    rate = uncached_rate(net, 64, 16, 4 + 1)        # the policy needs the commit pass too
    note(rows, "imagination, 64 x 16, no cache", rate, "frames/s", 4)
    if run:
        agent, batch = run.agent, run.meta["config"]["train"]["imagine_batch"]
        rate = dream_rate(Dream(run.dynamics), 1, run.tokenizer, repeats=40)
        note(rows, f"dream of {run.path.parent}", rate, "frames/s", run.dynamics.cfg.k)
        dream = partial(dream_of, compile_for_bench(run.dynamics, device), agent)
        rate = imagination_rate(dream, agent, batch, agent.cfg.context, agent.cfg.horizon)
        note(rows, f"imagination of {run.path.parent}", rate, "frames/s", dream().k)


def kept_bytes(loss_fn):
    """Of the activations that a loss keeps for its backward pass."""
    sizes = {}

    def note_size(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note_size, lambda x: x):
        loss_fn().backward()
    return sum(sizes.values())


def growth_of(device, dtype, context, parameters, rows, tokens):
    """What a dreamed frame (of all rows) and a frame of training windows, as long as the
    context, take at one size -> {what: number}. Not compiled: that takes longer."""
    net = new_dynamics(device, *WIDTH_LAYERS[parameters], tokens, context)
    some = max(min(rows, MOST_FRAMES // context), 1)    # of the rows, to be trained on
    batch, frames = empty_batch(net, some, context), some * context
    tau, d = sample_tau_d(some, context, net.cfg.k_max, 0)
    generator = torch.Generator(device).manual_seed(0)

    def loss():
        with autocast(device, dtype):
            return dynamics_losses(net, batch, tau, d, tau, generator)[0]["dynamics"]

    weights = sum(p.nbytes for p in net.parameters())
    found = {"kept for backward, MB a frame": (kept_bytes(loss) - weights) / frames / 1e6}
    trained = seconds(lambda: loss().backward(), 2, device)
    found["training, ms a frame"] = 1e3 * trained / frames
    with torch.no_grad(), autocast(device, dtype):
        dream = Dream(freeze(net, device, dtype), cache=Cache(context))
        found["dreamed frame, ms"] = 1e3 * rows / dream_rate(dream, rows, repeats=5)
    rings = [ring.nbytes for layer in dream.cache.layers.values() for ring in layer]
    return found | {"cache, MB": sum(rings) / 1e6}


def bench_growth(rows, device, dtype):
    """One size grows, the others stay: a context of 64, 3.2 million parameters times 1, 1
    row, 16 latent tokens."""
    base = {"context": 64, "parameters": 1, "rows": 1, "tokens": 16}
    for size, values in GROWTH.items():
        for value in values:
            for what, x in growth_of(device, dtype, **base | {size: value}).items():
                of = {"size": f"{size} {value}", "what": what}
                rows.append(Result("growth", x, None, None, 1, "", of))
                print(f"{size} {value}, {what}: {x:.3g}", flush=True)


def picture_growth(rows):
    """growth.png: a chart for each size that grows, both axes by powers."""
    figure, axes = new_figure(1, len(GROWTH), (14, 3.4))
    for (size, values), axis in zip(GROWTH.items(), axes.flat, strict=True):
        lines = {}
        for row in rows:
            if row.name == "growth" and row.of["size"].split()[0] == size:
                lines.setdefault(row.of["what"], []).append(row.value)
        for what, line in lines.items():
            axis.loglog(values, line, "o-", label=what)
        axis.set_xticks(values, values)
        axis.minorticks_off()
        axis.set_xlabel(size)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(results.ROOT / "paper" / "growth.png", dpi=70)


def bench(device, dtype="auto", run=None):
    rows = []
    bench_training(rows, device, dtype)
    with torch.no_grad(), autocast(device, dtype):
        bench_dreams(rows, device, dtype)
        bench_imagination(rows, device, dtype, run)
    bench_growth(rows, device, dtype)
    note(rows, "peak memory", peak_memory(device) / 2 ** 30, "GiB")
    return rows


def peak_memory(device):
    """Bytes at most in use: of the GPU, else of this process (nan on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource                 # Windows has none
    except ImportError:
        return float("nan")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def transformer_costs(transformer, S, T):
    """Of a frame with S tokens in a window of T frames: forward FLOPs, and bytes of
    activations. FLOPs: 2 for a weight and token, 4 for a channel of a pair that attends."""
    flops = memory = 0
    for block in transformer.blocks:
        heads, size = block.attention.heads, block.attention.size
        pairs = {"space": S, "time": T, "dense": S * T}[block.kind]
        weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
        flops += S * (2 * weights + 4 * heads * size * pairs)
        memory += S * heads * (ACTIVATION_BYTES[0] * size + ACTIVATION_BYTES[1] * pairs)
    return flops, memory


def sizes(preset):
    """Rows: what a preset's models take. They are on the meta device, without memory."""
    configs = train.parse(["--preset", preset])[1]
    cfg, spec = configs["train"], make_env(configs["data"]["env"]).spec
    size = {"height": spec.height, "width": spec.width}
    tok = TokenizerConfig(**configs["tokenizer"] | size)
    with torch.device("meta"):
        tokenizer = Tokenizer(tok)
        size = dict(zip(("tokens", "channels"), tokenizer.latent_shape, strict=True))
        dyn = DynamicsConfig(**configs["dynamics"] | size | {"tasks": len(spec.tasks)})
        dynamics = Dynamics(dyn, spec.actions)

    # tokens a frame: patches and latents; action, level, latents, registers, agent
    S, S_dyn = tokenizer.patches + tokenizer.latents, dyn.tokens + dyn.registers + 3
    T, T_long = cfg["tokenizer_length"], cfg["long_length"]
    coder, world = (tokenizer.encoder, tokenizer.decoder), dynamics.transformer
    flops = (sum(transformer_costs(net, S, min(tok.context, T))[0] for net in coder),
             transformer_costs(world, S_dyn, dyn.context)[0])
    kept = (sum(transformer_costs(net, S, T)[1] for net in coder),
            transformer_costs(world, S_dyn, T_long)[1])
    frames = cfg["tokenizer_batch"] * T, max(cfg["batch"] * cfg["length"], 2 * T_long)
    rows, models = [], ((tokenizer, dynamics), (S, S_dyn), flops, kept, frames, (T, T_long))
    for net, tokens, flops, memory, frames, T in zip(*models, strict=True):
        n = sum(p.numel() for p in net.parameters())
        blocks = [part for part in net.modules() if isinstance(part, Block)]
        width = blocks[0].down.out_features
        # kept of a frame: what goes into each block, and all that one block computes
        one = 4 * tokens * width * len(blocks) + memory / len(blocks)
        # the dynamics' weights and gradients are whole only in a step
        state = STATE_BYTES * n if net is tokenizer else (STATE_BYTES / 8 + 8) * n
        name = f"{preset}, {type(net).__name__.lower()}"
        found = {"parameters": n, "tokens a frame": tokens, "forward GFLOPs": flops / 1e9,
                 "activations MB a frame": memory / 1e6, "frames in a step": frames,
                 "memory of a step, GB": (STATE_BYTES * n + memory * frames) / 1e9,
                 "of 8 GPUs, --train.shard": (state + one * max(frames / 8, T)) / 1e9}
        rows += [Result("size", float(x), None, None, 1, "", {"model": name, "size": size})
                 for size, x in found.items()]
    return rows


def main():
    parser = results.make_parser(__doc__)
    parser.set_defaults(run=None)
    parser.add_argument("--sizes", metavar="PRESET", help="a preset's models, by formula")
    args = parser.parse_args()
    if args.sizes:
        results.save("sizes", sizes(args.sizes))
        return print(results.TABLES["sizes"]())
    device = pick_device(args.device)
    run = load_run(args.run, args.stage, device, args.dtype) if args.run else None
    rows = bench(device, args.dtype, run)
    results.save("bench", rows)
    picture_growth(rows)
    results.chart([row for row in rows if row.of.get("K", "any") != "any"
                   and row.unit == "frames/s"], "K", "what", "frames/s", "bench.png")


if __name__ == "__main__":
    run_cli(main)
