"""Speeds at pinned shapes."""
import copy
import functools
import resource

import torch

from agent import Agent, AgentConfig, autocast, freeze, pick_dtype
from data import ActionSpec
from dynamics import Dream, Dynamics, DynamicsConfig, dynamics_losses
from play import Recomputed, dream_rate, empty_inputs, imagination_rate, seconds
from tokenizer import Tokenizer, TokenizerConfig, reconstruction_loss


def matmul_peak(device, dtype, repeats=8):
    """FLOP/s of the fastest of some large matrix products."""
    rates = []
    for n in (512, 1024, 2048, *[8192] * (device.type == "cuda")):
        a, b = (torch.randn(m, n, device=device, dtype=dtype) for m in (8192, n))
        rates.append(2 * 8192 * n * n / seconds(lambda a=a, b=b: a @ b, repeats, device))
    return max(rates)


def training_rate(model, loss_fn, frames, device, dtype, repeats=6):
    """Frames/s and FLOP/s (matrix products, the optimizer's too) of a training step."""
    from torch.utils.flop_counter import FlopCounterMode

    from train import make_optimizers  # later in the order of imports
    optimizers = make_optimizers([model], 1e-4, 1e-4)

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


def compile_for_bench(module, device):
    """As training does it: on CUDA it takes minutes, and the preset gpu does without."""
    from train import compile_module  # later in the order of imports
    if device.type != "cuda":
        compile_module(module, device)


def bench(device, dtype="auto"):
    """Speeds at pinned shapes, random weights: 4 layers of width 256, 16 latent, 4 register tokens,
    K_max 16; training batch 16 x 16; and 8 layers of width 512 at T = 64 ("wide"). Encoding and
    decoding alone, and "tokenizer_default", are of the default tokenizer."""
    entries, spec = {}, ActionSpec(categorical=(17,))
    generator = torch.Generator(device).manual_seed(0)

    def note(name, value, unit):
        entries[f"bench_{name}"] = value, None, None, 1, unit
        print(f"{name:34s} {value:10.4g} {unit}", flush=True)

    def model(dim=256, layers=4, **more):
        cfg = DynamicsConfig(tokens=16, channels=32, registers=4, dim=dim, layers=layers, heads=4,
                             kv_heads=2, time_every=2, context=64, **more)
        return Dynamics(cfg, spec).to(device)

    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        note(f"matmul_{name}", matmul_peak(device, kind) / 1e9, "GFLOP/s")
    peak = entries["bench_matmul_bf16"][0] if pick_dtype(device, dtype) == "bf16" else \
        entries["bench_matmul_fp32"][0]
    for name, net, B, T in (("dynamics", model(), 16, 16), ("wide", model(512, 8), 4, 64)):
        z, actions, labelled = empty_inputs(net.cfg, spec, B, T, device)
        z = torch.randn(z.shape, device=device)
        loss = lambda net=net, z=z, a=actions, y=labelled, B=B: dynamics_losses(
            net, z, a, y, B // 4, generator)[0]["dynamics"]
        frames, flops = training_rate(net, loss, B * T, device, dtype)
        note(f"{name}_training", frames, "frames/s")
        note(f"{name}_training_share_of_peak", flops / 1e9 / peak, "share")
    pinned = TokenizerConfig(patch=24, dim=256, encoder_layers=4, decoder_layers=4, heads=4,
                             kv_heads=2, latents=16, channels=32, local=False, cell=0)
    pixels = torch.randn(16, 8, 72, 72, 3, device=device)
    for name, cfg in (("tokenizer", pinned), ("tokenizer_default", TokenizerConfig())):
        net = Tokenizer(cfg).to(device)
        frames, flops = training_rate(
            net, lambda net=net: reconstruction_loss(net(pixels), pixels)["mse"], 128, device,
            dtype)
        note(f"{name}_training", frames, "frames/s")
        note(f"{name}_training_share_of_peak", flops / 1e9 / peak, "share")

    tokenizer = freeze(net, device, dtype)
    frames = torch.zeros(16, 16, 72, 72, 3, dtype=torch.uint8, device=device)
    with torch.no_grad(), autocast(device, dtype):
        z = tokenizer.encode(frames)
        note("encode", 256 / seconds(lambda: tokenizer.encode(frames), 5, device), "frames/s")
        note("decode", 256 / seconds(lambda: tokenizer.decode(z), 5, device), "frames/s")
    net = freeze(model(), device, dtype)
    tokenizer = freeze(Tokenizer(pinned), device, dtype)
    rate = functools.partial(dream_rate, net, device=device, dtype=dtype)
    for k in (1, 4):
        note(f"dream_b1_c64_k{k}", rate(1, 64, k=k, repeats=60), "frames/s")
        note(f"dream_b1_c64_k{k}_decoded", rate(1, 64, k=k, tokenizer=tokenizer, repeats=60),
             "frames/s")
        note(f"dream_b64_c16_k{k}", rate(64, 16, k=k), "frames/s")
        note(f"dream_b64_c16_k{k}_decoded", rate(64, 16, k=k, tokenizer=tokenizer), "frames/s")
    note("uncached_b1_c64_k4", rate(1, 64, kind=Recomputed, repeats=8), "frames/s")
    note("cached_over_uncached", entries["bench_dream_b1_c64_k4"][0]
         / entries["bench_uncached_b1_c64_k4"][0], "ratio")
    once, agent = (Agent(AgentConfig(k=k), 256, spec, 22).to(device) for k in (1, 4))
    fast = copy.deepcopy(net)
    compile_for_bench(fast, device)
    imagined = functools.partial(imagination_rate, fast, B=64, context=16, horizon=12,
                                 device=device, dtype=dtype)
    note("imagination_b64_c16_k1", imagined(once), "frames/s")
    note("imagination_b64_c16", imagined(agent), "frames/s")
    note("imagination_uncached", imagined(agent, kind=Recomputed, repeats=1), "frames/s")
    note("imagination_cached_over_uncached", entries["bench_imagination_b64_c16"][0]
         / entries["bench_imagination_uncached"][0], "ratio")
    for context in (16, 64, 192):
        note(f"dream_b1_c{context}", 1000 / rate(1, context, repeats=60), "ms a frame")
    for times, dim in ((2, 368), (4, 512)):
        bigger = freeze(model(dim), device, dtype)
        note(f"dream_parameters_x{times}", 1000 / dream_rate(
            bigger, 1, 64, device, dtype, repeats=60), "ms a frame")
    with torch.no_grad(), autocast(device, dtype):
        dream, one = Dream(net), empty_inputs(net.cfg, spec, 1, 1, device)[1]
        cost = [seconds(lambda: dream.step(one), 19, device) for _ in range(26)]    # of 20 frames
    note("frame500_over_frame100", cost[25] / cost[5], "ratio")
    note("peak_memory", torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else
         resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, "GiB")
    return entries
