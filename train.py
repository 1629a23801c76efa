"""Training: the four stages of Dreamer 4, each on what the one before it made.

    python train.py                     all stages, evaluation, report, with this machine's preset
    python train.py --stage dynamics    one stage (tokenizer, dynamics, agent, imagine)
Every config field is a flag: --dynamics.k_max 32. A run lives in runs/NAME: STAGE.pt, config.json,
metrics.jsonl, pictures, results.json, report.md. A step's randomness is (seed, stage, step)'s.
"""

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import play
from agent import (STAGES, Agent, AgentConfig, agent_losses, autocast, imagination_losses,
                   imagine_rollout, load_run, pick_device, pick_dtype)
from data import Dataset, UserError, env_spec, record, rng_for, run_cli
from dynamics import Dynamics, DynamicsConfig, dynamics_losses
from tokenizer import (Block, LossNormalizer, Tokenizer, TokenizerConfig, lpips_loss, mae_mask,
                       reconstruction_loss, scale_pixels)


@dataclass
class DataConfig:
    """Recorded play to train on, and the episodes that judge the result."""
    env: str = "crafter"
    path: str = ""              # default: datasets/ENV_EPISODESxLENGTH, recorded where missing
    episodes: int = 320
    length: int = 300
    seed: int = 0
    workers: int = 0            # 0: one process per core
    labels: float = 1.0         # share of the episodes, in order, whose actions are known (Fig. 7)
    labels_above: bool = False  # only the actions above ground are known (its Overworld split)
    reference: str = ""         # dataset that judges, never trained on; default: recorded
    reference_episodes: int = 40
    eval_episodes: int = 100    # 0: the world model alone is judged
    eval_length: int = 500


    def __post_init__(self):
        if not 0 <= self.labels <= 1:
            raise UserError(f"Got data.labels {self.labels}, need a share in [0, 1].")


@dataclass
class TrainConfig:
    """Steps, batches and learning rates."""
    tokenizer_steps: int = 2000
    tokenizer_batch: int = 16
    tokenizer_length: int = 8   # frames
    dynamics_steps: int = 3000
    agent_steps: int = 1000
    imagine_steps: int = 180
    batch: int = 32             # of short windows; long ones hold as many frames in all
    length: int = 16            # 64 (T1)
    long_length: int = 48       # 256 (T2), longer than dynamics.context
    long_share: float = 0.25    # of the steps; the last tenth is long only
    imagine_batch: int = 64
    lr_matrix: float = 6e-3     # Muon: 2-D matrices of the transformers
    lr: float = 3e-3            # AdamW: everything else
    lr_policy: float = 5e-4     # AdamW in imagination
    lr_value: float = 3e-3      # AdamW in imagination: starts from nothing, must be ahead
    warmup: int = 50            # steps, at most a tenth of the stage
    value_first: int = 20       # imagination steps in which only the value head learns
    cooldown: float = 0.3       # share of a stage in which the rate falls to 0
    clip: float = 1.0           # gradient norm
    compile: bool = True        # torch.compile of the transformer's blocks
    log_every: int = 25
    check_every: int = 250      # dynamics steps between looks at dreams
    save_every: int = 250

    def __post_init__(self):
        for name in ("tokenizer_batch", "batch", "length", "imagine_batch"):
            if getattr(self, name) < 2:
                raise UserError(f"Got train.{name} {getattr(self, name)}, need at least 2.")


LATENT_CHUNK = 256          # frames of an episode that are encoded at once
TOKENIZER_SHARE = 0.22      # of the cpu preset's wall time, measured
CONFIGS = {"data": DataConfig, "tokenizer": TokenizerConfig, "dynamics": DynamicsConfig,
           "agent": AgentConfig, "train": TrainConfig}
PRESETS = {     # every preset starts from the defaults above, which are the cpu preset
    "cpu": {},
    "smoke": {"data.episodes": 12, "data.length": 80, "data.reference_episodes": 4,
              "data.eval_episodes": 4, "data.eval_length": 40, "tokenizer.dim": 128,
              "tokenizer.encoder_layers": 3, "tokenizer.decoder_layers": 3, "dynamics.dim": 128,
              "train.tokenizer_steps": 60, "train.dynamics_steps": 40, "train.agent_steps": 20,
              "train.imagine_steps": 6, "train.batch": 12, "train.compile": False,
              "train.log_every": 5, "agent.horizon": 6, "train.imagine_batch": 16},
    "cpu_long": {"data.episodes": 1200, "train.tokenizer_steps": 6000,
                 "train.dynamics_steps": 30000, "train.agent_steps": 8000,
                 "train.imagine_steps": 1000, "data.eval_episodes": 200},
    "gpu": {"data.episodes": 2000, "data.length": 500, "tokenizer.dim": 512,
            "tokenizer.encoder_layers": 8, "tokenizer.decoder_layers": 8, "dynamics.dim": 768,
            "dynamics.layers": 12, "dynamics.heads": 12, "dynamics.kv_heads": 3,
            "dynamics.registers": 8, "dynamics.context": 64, "dynamics.k_max": 64,
            "train.long_length": 96, "train.length": 32, "train.batch": 64,
            "train.tokenizer_steps": 20000, "train.dynamics_steps": 60000,
            "train.agent_steps": 20000, "train.imagine_steps": 2000, "agent.horizon": 15,
            "train.imagine_batch": 256, "train.lr_matrix": 3e-3, "train.lr": 1e-3},
    # real Minecraft (README, "Minecraft"), both never run: 'minecraft' by --stage sizes fits into
    # 80 GB; 'paper' has the paper's sizes as far as it gives them, and no plan for the memory
    "minecraft": {"data.env": "minerl", "data.path": "datasets/minecraft",
                  "data.reference": "datasets/minecraft_reference", "data.eval_episodes": 10,
                  "data.eval_length": 72000, "tokenizer.height": 128, "tokenizer.width": 128,
                  "tokenizer.patch": 8, "tokenizer.dim": 512, "tokenizer.encoder_layers": 8,
                  "tokenizer.decoder_layers": 8, "tokenizer.heads": 4, "tokenizer.kv_heads": 4,
                  "tokenizer.latents": 128, "tokenizer.channels": 16, "tokenizer.context": 16,
                  "tokenizer.mae_max": 0.9, "dynamics.dim": 1024, "dynamics.layers": 16,
                  "dynamics.heads": 8, "dynamics.kv_heads": 2, "dynamics.registers": 16,
                  "dynamics.context": 96, "dynamics.k_max": 64, "agent.hidden": 512,
                  "agent.context": 32, "agent.horizon": 15, "train.batch": 16, "train.length": 32,
                  "train.long_length": 128, "train.imagine_batch": 64,
                  "train.tokenizer_steps": 100000, "train.dynamics_steps": 200000,
                  "train.agent_steps": 50000, "train.imagine_steps": 5000,
                  "train.lr_matrix": 2e-3, "train.lr": 5e-4, "train.warmup": 1000},
    "paper": {"data.env": "minerl:384x640", "data.path": "datasets/minecraft_384x640",
              "data.reference": "datasets/minecraft_384x640_reference", "data.eval_episodes": 1000,
              "data.eval_length": 72000, "tokenizer.height": 384, "tokenizer.width": 640,
              "tokenizer.patch": 16, "tokenizer.dim": 1024, "tokenizer.encoder_layers": 16,
              "tokenizer.decoder_layers": 16, "tokenizer.heads": 8, "tokenizer.kv_heads": 8,
              "tokenizer.latents": 512, "tokenizer.channels": 16, "tokenizer.context": 48,
              "tokenizer.local": False, "tokenizer.mae_max": 0.9, "tokenizer.lpips": 0.2,
              "dynamics.dim": 2048,
              "dynamics.layers": 36, "dynamics.heads": 16, "dynamics.kv_heads": 4,
              "dynamics.registers": 32, "dynamics.context": 192, "dynamics.k_max": 64,
              "dynamics.p_boot": 1.0, "agent.bc_level": "uniform", "agent.hidden": 2048,
              "agent.horizon": 15, "train.length": 64, "train.long_length": 256,
              "train.tokenizer_length": 64, "train.lr_matrix": 1e-3, "train.lr": 2e-4,
              "train.warmup": 1000},
}


# --------------------------------------------------------------------------------------- flags

def to_bool(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}, need true or false")
    return text.lower() == "true"


def parse(argv=None):
    """Command line -> args and {prefix: config dict}: defaults < preset < explicit flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all", "sizes"), default="all",
                        help="sizes: what the models would take, without training")
    parser.add_argument("--preset", choices=PRESETS, default=None,
                        help="default: gpu with CUDA, else cpu")
    parser.add_argument("--run", default=None, help="default: the environment's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto: cuda, then mps, then cpu")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp16, fp32")
    parser.add_argument("--resume", choices=("auto", "no"), default="auto",
                        help="auto: go on where the run folder stands; no: train again")
    for prefix, config in CONFIGS.items():
        for field in dataclasses.fields(config):
            kind = to_bool if field.type is bool else field.type
            parser.add_argument(f"--{prefix}.{field.name}", type=kind, default=argparse.SUPPRESS,
                                metavar=field.type.__name__, help=f"default {field.default}")
    args = parser.parse_args(argv)
    args.preset = args.preset or ("gpu" if torch.cuda.is_available() else "cpu")
    given = {k: v for k, v in vars(args).items() if "." in k}
    chosen = {**PRESETS[args.preset], **given}
    configs = {prefix: {f.name: chosen.get(f"{prefix}.{f.name}", f.default)
                        for f in dataclasses.fields(config)} for prefix, config in CONFIGS.items()}
    for prefix, config in CONFIGS.items():
        config(**configs[prefix])                   # a bad value is one line, before anything runs
    if 0 < configs["train"]["long_share"] and (configs["train"]["long_length"]
                                               <= configs["dynamics"]["context"]):
        raise UserError(f"Got train.long_length {configs['train']['long_length']}, need more than "
                        f"dynamics.context {configs['dynamics']['context']}: else every frame that "
                        "the model sees has the start of the window in sight.")
    args.run = args.run or configs["data"]["env"].split(":")[0]
    return args, configs


@dataclass
class Job:
    """What all stages share."""
    args: argparse.Namespace
    folder: Path
    data: DataConfig
    train: TrainConfig
    configs: dict
    device: torch.device
    dataset: Dataset

    @functools.cached_property
    def known(self):
        return known_actions(self)

    def to_device(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


# ------------------------------------------------------------------------------- training loop

def make_optimizers(modules, lr_matrix, lr):
    """Muon for the matrices inside transformer blocks, AdamW without decay for the rest."""
    named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if "blocks." in n and p.ndim == 2]
    rest = [p for n, p in named if not ("blocks." in n and p.ndim == 2)]
    optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr_matrix, weight_decay=0.01,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def schedule(step, steps, warmup, cooldown):
    """Share of the peak rate: linear up, flat, linear down to 0."""
    return min(1.0, (step + 1) / max(warmup, 1), (steps - step) / max(cooldown * steps, 1))


def save(path, state):
    """Atomically: written beside, synced, then renamed."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save_stage(job, stage, step, **modules):
    """runs/NAME/STAGE.pt: all that load_run needs."""
    try:
        commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:                                 # no git on this machine
        commit = ""
    save(job.folder / f"{stage}.pt",
         {"stage": stage, "step": step, "commit": commit, "dataset": job.dataset.fingerprint,
          "spec": job.dataset.spec.to_json(), "config": job.configs,
          **{name: module.state_dict() for name, module in modules.items()}})
    (job.folder / f"{stage}.resume.pt").unlink(missing_ok=True)


class Log:
    """Means of the metrics between two lines of runs/NAME/metrics.jsonl."""

    def __init__(self, folder, stage, start):
        path = folder / "metrics.jsonl"
        old = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        with open(f"{path}.part", "w") as file:     # without this stage's lines from `start` on
            file.writelines(json.dumps(x) + "\n" for x in old
                            if x["stage"] != stage or x["step"] <= start)
        os.replace(f"{path}.part", path)
        self.file, self.stage, self.sums, self.mark = open(path, "a"), stage, {}, (None, None)

    def add(self, values):
        for key, value in values.items():       # nan: a bin that no frame of this batch fell into
            total, n = self.sums.get(key, (0.0, 0))
            value = value.detach()
            self.sums[key] = total + value.nan_to_num(), n + ~value.isnan()

    def write(self, step):
        """One line; returns it, with the rate in steps per second."""
        means = {k: float(total / n) for k, (total, n) in self.sums.items() if n > 0}
        last, begin = self.mark
        self.sums, self.mark = {}, (step, time.perf_counter())
        rate = (step - last) / (self.mark[1] - begin) if begin else None
        line = {"stage": self.stage, "step": step, **means, "rate": rate}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        return line


def fit(job, stage, modules, loss_fn, names, optimizers, weights=()):
    """The loop of every stage. loss_fn(rng, generator, step) -> losses by name, metrics."""
    cfg, steps = job.train, getattr(job.train, f"{stage}_steps")
    normalizer = LossNormalizer(names).to(job.device)
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.args.dtype == "fp16")
    stateful = [*modules, normalizer, *optimizers, scaler]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    resume, start = job.folder / f"{stage}.resume.pt", 0
    made_of = {"seed": job.args.seed, "dataset": job.dataset.fingerprint,
               **{k: job.configs[k] for k in ("tokenizer", "dynamics", "agent")}}
    if resume.exists():
        state = torch.load(resume, map_location=job.device, weights_only=True)
        for key in (k for k in made_of if state["made_of"][k] != made_of[k]):
            raise UserError(f"Got another {key} than {resume} was begun with: repeat the settings "
                            "of then, or start this stage again with --resume no.")
        for x, saved in zip(stateful, state["state"], strict=True):
            x.load_state_dict(saved)
        start = state["step"]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    print(f"Stage {stage}: {sum(p.numel() for p in parameters):,} parameters, steps {start} to "
          f"{steps}, {job.device} {job.args.dtype}, dataset {job.dataset.frames_total:,} frames in "
          f"{len(job.dataset.lengths)} episodes, every 20th kept for validation.", flush=True)
    log, bar = Log(job.folder, stage, start), tqdm(range(start, steps), stage, steps, initial=start)
    for step in bar:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps, min(cfg.warmup, steps // 10), cfg.cooldown)
        rng = rng_for(job.args.seed, stage, step)
        generator = torch.Generator(job.device).manual_seed(int(rng.integers(2 ** 31)))
        with autocast(job.device, job.args.dtype):
            losses, metrics = loss_fn(rng, generator, step)
        total = normalizer(losses, weights)
        scaler.scale(total).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
        if not torch.isfinite(total) or not (scaler.is_enabled() or torch.isfinite(norm)):
            raise UserError(f"Got a loss of {float(total)} at step {step} of {stage} (seed "
                            f"{job.args.seed}): try a lower --train.lr_matrix and --train.lr.")
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        log.add({**losses, **metrics, "grad_norm": norm})
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            line = log.write(step + 1)
            bar.set_postfix({k: f"{line[k]:.3g}" for k in names if k in line}, refresh=False)
            if step + 1 == start + 2 * cfg.log_every and (job.args.preset, stage) == (
                    "cpu", "tokenizer"):
                minutes = steps / line["rate"] / 60 / TOKENIZER_SHARE
                bar.write(f"At this speed all stages together take about {minutes:.0f} minutes.")
        if (step + 1) % cfg.save_every == 0 and step + 1 < steps:
            save(resume, {"step": step + 1, "made_of": made_of,
                          "state": [x.state_dict() for x in stateful]})
    for module in modules:
        module.eval()


def compile_module(module, device):
    """torch.compile of a module's blocks, faster on CPU too once compiled. It needs a C++ compiler;
    without one the blocks run as they are."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:          # whatever is missing, training goes on without
        print(f"torch.compile doesn't work here ({type(error).__name__}): training is slower.")
        return
    torch._dynamo.config.recompile_limit = 64
    for block in module.modules():
        if isinstance(block, Block):
            block.compiled = torch.compile(block.forward, dynamic=False)


# -------------------------------------------------------------------------------------- stages

def stage_before(job, stage):
    """The run as the stage before left it. UserError where it was made for other play."""
    run = load_run(job.folder, stage, job.device)
    if run.spec != job.dataset.spec:
        raise UserError(f"Got recordings of {job.dataset.spec.name!r}, {run.path} was trained on "
                        f"{run.spec.name!r}: name the same --data.env and --data.path.")
    return run


def train_tokenizer(job):
    """Section 3.1: masked autoencoding of frames."""
    cfg, spec = job.train, job.dataset.spec
    job.configs["tokenizer"].update(height=spec.height, width=spec.width)
    tokenizer = Tokenizer(TokenizerConfig(**job.configs["tokenizer"])).to(job.device)
    perceptual = lpips_loss().to(job.device) if tokenizer.cfg.lpips else None
    if job.train.compile:
        compile_module(tokenizer, job.device)

    def frames(rng, relevant):
        half = cfg.tokenizer_batch // 2         # relevant windows show the rare things more often
        parts = [job.dataset.sample(rng, n, cfg.tokenizer_length, r and len(job.dataset.events) > 0)
                 for n, r in ((cfg.tokenizer_batch - half, False), (half, relevant))]
        episode, start, _ = (np.concatenate(x) for x in zip(*parts, strict=True))
        return job.to_device(job.dataset.read(episode, start, cfg.tokenizer_length,
                                              ["frames"])["frames"])

    def loss_fn(rng, generator, step):
        x = scale_pixels(frames(rng, True))
        B, T = x.shape[:2]
        hidden = mae_mask(B, T, tokenizer.patches, tokenizer.cfg.mae_max, generator, job.device)
        losses = reconstruction_loss(tokenizer(x, hidden), x, perceptual)
        return losses, {}

    fit(job, "tokenizer", [tokenizer], loss_fn, ["mse", "lpips"],
        make_optimizers([tokenizer], cfg.lr_matrix, cfg.lr), {"lpips": tokenizer.cfg.lpips})
    with torch.no_grad(), autocast(job.device, job.args.dtype):
        z = torch.cat([tokenizer.encode(frames(rng_for(job.args.seed, "latent_std", i), False))
                       for i in range(8)])
        tokenizer.latent_std.copy_(z.float().std())
    save_stage(job, "tokenizer", cfg.tokenizer_steps, tokenizer=tokenizer)


def cached_latents(job, tokenizer):
    """Latents of all frames, float16 (frames, S_z, Z): streamed episode by episode through the
    frozen tokenizer once, and kept beside the run."""
    path, about = job.folder / "latents.npy", job.folder / "latents.json"
    weights = b"".join(p.float().cpu().numpy().tobytes() for p in tokenizer.state_dict().values())
    made_of = {"tokenizer": hashlib.sha256(weights).hexdigest(),
               "dataset": job.dataset.fingerprint}
    if about.exists() and json.loads(about.read_text()) == made_of:
        return np.load(path, mmap_mode="r")
    data, cfg = job.dataset, tokenizer.cfg
    part = path.with_suffix(".part.npy")            # on disk: it may be larger than the memory
    latents = np.lib.format.open_memmap(part, "w+", np.float16, (
        data.frames_total, cfg.latents // cfg.pack, cfg.channels * cfg.pack))
    with torch.no_grad(), tqdm(total=data.frames_total, desc="latents") as bar:
        for i, length in enumerate(data.lengths):
            cache = tokenizer.new_cache()
            for start in range(0, length, LATENT_CHUNK):
                n = min(LATENT_CHUNK, length - start)
                frames = job.to_device(data.read([i], [start], n, ["frames"])["frames"])
                with autocast(job.device, job.args.dtype):
                    z = tokenizer.encode(frames, cache)[0]
                first = data.offsets[i] + start
                latents[first:first + n] = z.cpu().numpy()
                bar.update(int(n))
    latents.flush()
    os.replace(part, path)
    play.write_json(about, made_of)
    return latents


def known_actions(job):
    """(frames,) bool: whose action the dynamics may see (Section 4.4, unlabelled video)."""
    data, cfg = job.dataset, job.data
    known = np.arange(data.frames_total) < data.offsets[round(cfg.labels * len(data.lengths))]
    if cfg.labels_above:
        probes = [play.read_probes(data, [i], [0], n) for i, n in enumerate(data.lengths)]
        if not all(probes):
            raise UserError(f"Got recordings in {data.path} without probes, need them to tell "
                            "caves from land: record them again.")
        known &= ~np.concatenate([play.in_cave(p["probe_semantic"][0]) for p in probes])
    return known


def latent_batch(job, latents, rng, uniform, relevant, length):
    """`uniform` rows from anywhere, then `relevant` ones that show their task being done ->
    dict of tensors: z (B, T, S_z, Z), actions, labelled, continues, rewards, task (B, T)."""
    parts = [job.dataset.sample(rng, n, length, r) for n, r in ((uniform, False), (relevant, True))
             if n]
    episode, start, task = (np.concatenate(x) for x in zip(*parts, strict=True))
    read = job.dataset.read(episode, start, length, ["binary", "categorical", "continuous",
                                                     "labelled", "events", "continues"])
    index = (job.dataset.offsets[episode] + start)[:, None] + np.arange(length)
    rewards = (read["events"][np.arange(len(task)), :, task] if job.dataset.spec.tasks
               else np.zeros(index.shape))
    batch = {"z": latents[index].astype(np.float32), "rewards": rewards.astype(np.float32),
             "task": np.repeat(task[:, None], length, 1),
             "labelled": read["labelled"] & job.known[index],
             "continues": read["continues"].astype(np.float32)}
    return ({k: job.to_device(x) for k, x in batch.items()},
            {k: job.to_device(read[k]) for k in ("binary", "categorical", "continuous")})


def window(cfg, step, steps):
    """(rows, length) of a step's batch: every fourth is long, the last tenth only long."""
    every = max(round(1 / cfg.long_share), 1) if cfg.long_share else steps + 1
    long = step % every == every - 1 or (cfg.long_share and step >= 0.9 * steps)
    length = cfg.long_length if long else cfg.length
    return max(cfg.batch * cfg.length // length, 2), length


def draw_single(rows, total, share, rng, job):
    """(total,) bool: which of the first `rows` are trained as separate images."""
    return job.to_device((rng.random(total) < share) & (np.arange(total) < rows))


@torch.no_grad()
def rollout_check(job, run, n=16, context=16, horizon=4):
    """A light look at dreams while training: PSNR `horizon` frames ahead on validation clips, with
    true actions and minus that with shuffled ones (same noise). {} where episodes are too short."""
    data = job.dataset
    if data.lengths[data.episodes("valid")].max() < context + horizon:
        return {}
    episode, start, _ = data.sample(rng_for(job.args.seed, "check", 0), n, context + horizon,
                                    split="valid")
    clips, actions = play.to_tensors(data.read(episode, start, context + horizon), job.device)
    with autocast(job.device, job.args.dtype):
        z = run.tokenizer.encode(clips["frames"])
        psnr = [float(play.decibel(play.squared_error(play.dream_clips(
            run, z, a, clips["labelled"], horizon)[:, -1:], clips["frames"][:, -1:]))[0])
            for a in (actions, {k: x.roll(1, 0) for k, x in actions.items()})]
    return {f"rollout_psnr_h{horizon}": torch.tensor(psnr[0]),
            f"rollout_minus_shuffled_h{horizon}": torch.tensor(psnr[0] - psnr[1])}


def train_dynamics(job):
    """Section 3.2: shortcut forcing on the frozen tokenizer's latents."""
    run = stage_before(job, "tokenizer")
    latents, tok, spec = cached_latents(job, run.tokenizer), run.tokenizer.cfg, run.spec
    job.configs["tokenizer"] = dataclasses.asdict(tok)
    job.configs["dynamics"].update(tokens=tok.latents // tok.pack, channels=tok.channels * tok.pack,
                                   tasks=len(spec.tasks))
    dynamics = Dynamics(DynamicsConfig(**job.configs["dynamics"]), spec.actions).to(job.device)
    if job.train.compile:
        compile_module(dynamics, job.device)
    cfg = job.train

    def loss_fn(rng, generator, step):
        rows, length = window(cfg, step, cfg.dynamics_steps)
        batch, actions = latent_batch(job, latents, rng, rows, 0, length)
        single = draw_single(rows, rows, dynamics.cfg.single_images, rng, job)
        losses, _, metrics = dynamics_losses(dynamics, batch["z"], actions, batch["labelled"],
                                             round(dynamics.cfg.p_boot * rows), generator,
                                             single=single)
        if (step + 1) % cfg.check_every == 0:
            metrics |= rollout_check(job, dataclasses.replace(run, dynamics=dynamics))
        return losses, metrics

    fit(job, "dynamics", [dynamics], loss_fn, ["dynamics"],
        make_optimizers([dynamics], cfg.lr_matrix, cfg.lr))
    save_stage(job, "dynamics", cfg.dynamics_steps, tokenizer=run.tokenizer, dynamics=dynamics)


def train_agent(job):
    """Section 3.3, Eq. 9: agent tokens and heads; the dynamics go on learning beside them."""
    run = stage_before(job, "dynamics")
    latents, dynamics = cached_latents(job, run.tokenizer), run.dynamics.requires_grad_(True)
    job.configs.update({k: run.meta["config"][k] for k in ("tokenizer", "dynamics")})
    agent = Agent(AgentConfig(**job.configs["agent"]), dynamics.cfg.dim,
                  run.spec.actions).to(job.device)
    if job.train.compile:
        compile_module(dynamics, job.device)
    cfg = job.train

    def loss_fn(rng, generator, step):
        rows, length = window(cfg, step, cfg.agent_steps)
        relevant = round(agent.cfg.relevant * rows)
        uniform = rows - relevant
        batch, actions = latent_batch(job, latents, rng, uniform, relevant, length)
        single = draw_single(uniform, rows, dynamics.cfg.single_images, rng, job)
        losses, h, metrics = dynamics_losses(
            dynamics, batch["z"], actions, batch["labelled"],
            round(dynamics.cfg.p_boot * uniform), generator, uniform, batch["task"], single,
            relevant if agent.cfg.bc_level == "context" else 0)
        is_relevant = torch.arange(rows, device=job.device) >= uniform
        more, more_metrics = agent_losses(agent, h, actions, batch["labelled"], batch["rewards"],
                                          batch["continues"], is_relevant)
        return losses | more, metrics | more_metrics

    fit(job, "agent", [dynamics, agent], loss_fn, ["dynamics", "bc", "reward", "continue"],
        make_optimizers([dynamics, agent], cfg.lr_matrix / 2, cfg.lr / 2))
    agent.freeze_prior()
    save_stage(job, "agent", cfg.agent_steps, tokenizer=run.tokenizer, dynamics=dynamics,
               agent=agent)


def train_imagine(job):
    """Section 3.3, Eq. 10 and 11: policy and value head learn from imagined rollouts alone."""
    run = stage_before(job, "agent")
    latents, dynamics, agent = cached_latents(job, run.tokenizer), run.dynamics, run.agent
    job.configs.update({k: run.meta["config"][k] for k in ("tokenizer", "dynamics")})
    fixed = ("hidden", "mtp", "bins", "terminal_weight")        # the heads were trained with them
    job.configs["agent"].update({k: run.meta["config"]["agent"][k] for k in fixed})
    agent.cfg = AgentConfig(**job.configs["agent"])
    agent.policy.requires_grad_(True), agent.value.requires_grad_(True)
    cfg, context, horizon = job.train, agent.cfg.context, agent.cfg.horizon
    relevant = round(agent.cfg.relevant * cfg.imagine_batch)

    def loss_fn(rng, generator, step):
        batch, actions = latent_batch(job, latents, rng, cfg.imagine_batch - relevant, relevant,
                                      context + horizon)    # so that a shown task lies ahead, often
        first = lambda x: x[:, :context]
        h, chosen, _ = imagine_rollout(dynamics, agent, first(batch["z"]),
                                       {k: first(x) for k, x in actions.items()},
                                       first(batch["labelled"]), first(batch["task"]), horizon,
                                       generator)
        losses, metrics = imagination_losses(agent, h, chosen)
        if step < cfg.value_first:      # a value of 0 would call every action good
            del losses["policy"]
        return losses, metrics

    optimizer = torch.optim.AdamW([{"params": agent.policy.parameters(), "lr": cfg.lr_policy},
                                   {"params": agent.value.parameters(), "lr": cfg.lr_value}],
                                  weight_decay=0.0)
    fit(job, "imagine", [agent], loss_fn, ["policy", "value"], [optimizer])
    save_stage(job, "imagine", cfg.imagine_steps, tokenizer=run.tokenizer, dynamics=dynamics,
               agent=agent)


# ---------------------------------------------------------------------------------------- main

ACTIVATION_BYTES = (66, 11)     # kept for backward, eager bf16: a channel; a head's pair of tokens
STATE_BYTES = 16                # of a parameter: itself, gradient, optimizer, bf16 copy


def transformer_costs(transformer, S, T):
    """Of a frame with S tokens in a window of T frames: forward FLOPs, and bytes of activations.
    FLOPs: 2 for a weight and token, 4 for a channel of a pair of tokens that attends."""
    flops = memory = 0
    for block in transformer.blocks:
        heads, size = block.attention.heads, block.attention.size
        pairs = {"space": S, "time": T, "dense": S * T}[block.kind]
        weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
        flops += S * (2 * weights + 4 * heads * size * pairs)
        memory += S * (ACTIVATION_BYTES[0] * heads * size + ACTIVATION_BYTES[1] * heads * pairs)
    return flops, memory


def sizes(configs):
    """Markdown: what a preset's models take, by formula; they are made on the meta device, without
    memory."""
    spec, train = env_spec(configs["data"]["env"]), configs["train"]
    with torch.device("meta"):
        tok = TokenizerConfig(**configs["tokenizer"])
        tokenizer = Tokenizer(tok)
        dynamics = Dynamics(DynamicsConfig(**{
            **configs["dynamics"], "tokens": tok.latents // tok.pack, "tasks": len(spec.tasks),
            "channels": tok.channels * tok.pack}), spec.actions)
        agent = Agent(AgentConfig(**configs["agent"]), dynamics.cfg.dim, spec.actions)
    S, cfg = tokenizer.patches + tok.latents, dynamics.cfg
    S_dyn = cfg.action_tokens + 1 + cfg.tokens + cfg.registers + 1
    parts = [transformer_costs(x, S, min(tok.context, train["tokenizer_length"]))
             for x in (tokenizer.encoder, tokenizer.decoder)]
    dyn = transformer_costs(dynamics.transformer, S_dyn, cfg.context)
    long = transformer_costs(dynamics.transformer, S_dyn, train["long_length"])[1]
    count = lambda module: sum(p.numel() for p in module.parameters())
    rows = [("tokenizer", count(tokenizer), S, sum(x[0] for x in parts),
             transformer_costs(tokenizer.encoder, S, train["tokenizer_length"])[1] +
             transformer_costs(tokenizer.decoder, S, train["tokenizer_length"])[1],
             train["tokenizer_batch"] * train["tokenizer_length"]),
            ("dynamics", count(dynamics), S_dyn, dyn[0], long,
             max(train["batch"] * train["length"], 2 * train["long_length"])),
            ("agent's heads", count(agent), 0, 2 * count(agent), 0, 0)]
    table = ["| model | parameters | tokens a frame | forward GFLOPs a frame | "
             "activations MB a frame | frames in a step | memory of a step, GB |", "|" + "---|" * 7]
    table += [f"| {name} | {n:,} | {tokens} | {flops / 1e9:,.1f} | {memory / 1e6:,.0f} | {frames} "
              f"| {(STATE_BYTES * n + memory * frames) / 1e9:,.0f} |"
              for name, n, tokens, flops, memory, frames in rows]
    dream = (cfg.k + 1) * dyn[0] + parts[1][0]
    return "\n".join([*table, f"A dreamed frame, decoded ({cfg.k} + 1 passes): "
                      f"{dream / 1e9:,.1f} GFLOPs."])


def pictures(job, stage, reference):
    """What a person looks at after a stage."""
    play.picture_curves(job.folder, stage)
    if stage in ("tokenizer", "dynamics", "agent"):
        run = load_run(job.folder, stage, job.device)
        if stage == "tokenizer":
            play.picture_reconstructions(run, reference, job.folder /
                                         "tokenizer_reconstructions.png", dtype=job.args.dtype)
        else:
            film = play.dream_film(run, reference, dtype=job.args.dtype)
            play.write_film(job.folder / "dream.gif", film)


def main():
    args, configs = parse()
    if args.stage == "sizes":
        return print(sizes(configs))
    begin = time.perf_counter()
    device = pick_device(args.device)
    args.dtype = pick_dtype(device, args.dtype)
    if configs["tokenizer"]["lpips"]:
        lpips_loss()                                # missing? say so before anything is recorded
    if device.type == "cpu" and sys.platform == "linux":    # keep big buffers instead of returning
        for knob, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):        # them to the system
            ctypes.CDLL(None).mallopt(knob, value)
    data, folder = DataConfig(**configs["data"]), Path("runs") / args.run
    command = "python train.py " + " ".join(sys.argv[1:])
    path = Path(data.path or f"datasets/{data.env.replace(':', '_')}_{data.episodes}x{data.length}"
                + f"_seed{data.seed}" * (data.seed > 0))
    changed = {f"{p}.{k}": v for p, c in configs.items() for k, v in c.items()
               if v != getattr(CONFIGS[p](), k)}
    print(f"Run {folder}, preset {args.preset}, {device}, changed settings: {changed or 'none'}")
    folder.mkdir(parents=True, exist_ok=True)
    seconds = {}
    if not data.path:
        record(data.env, path, data.episodes, data.length, data.seed, data.workers)
    reference = play.reference_set(data.env, data.reference_episodes, data.length, data.workers,
                                   data.reference)
    seconds["record"] = time.perf_counter() - begin
    job = Job(args, folder, data, TrainConfig(**configs["train"]), configs, device, Dataset(path))
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if (folder / f"{stage}.pt").exists() and args.resume == "auto":
            print(f"Stage {stage}: {folder / stage}.pt is there; --resume no trains it again.")
            continue
        if args.resume == "no":
            for old in (folder / f"{stage}.pt", folder / f"{stage}.resume.pt"):
                old.unlink(missing_ok=True)
        mark = time.perf_counter()
        torch.manual_seed(int(rng_for(args.seed, f"{stage} weights", 0).integers(2 ** 31)))
        {"tokenizer": train_tokenizer, "dynamics": train_dynamics, "agent": train_agent,
         "imagine": train_imagine}[stage](job)
        play.write_json(folder / "config.json", job.configs)
        pictures(job, stage, reference)
        seconds[stage] = time.perf_counter() - mark
    if args.stage == "all":
        mark = time.perf_counter()
        play.evaluate(["eval", "--run", str(folder), "--episodes", str(data.eval_episodes),
                       "--length", str(data.eval_length), "--workers", str(data.workers),
                       "--device", args.device, "--dtype", args.dtype,
                       *["--world-only"] * (data.eval_episodes == 0)])
        seconds["evaluation"] = time.perf_counter() - mark
    total = time.perf_counter() - begin
    if all(stage in seconds for stage in STAGES):       # a rerun that skips stages has no total
        seconds["total"] = total
    else:
        del seconds["record"]
    play.add_results(folder, command, {f"wall_seconds_{k}": (v, None, None, 1, "s")
                                       for k, v in seconds.items()})
    report = play.write_report(folder)
    if args.stage == "all":
        print(play.results_table(play.read_results(folder)))
    print(f"Done in {total / 60:.1f} minutes. Look at {report} and its pictures.")


if __name__ == "__main__":
    run_cli(main)
