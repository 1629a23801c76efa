"""Training: the four stages of Dreamer 4, each on what the one before it made.

    python train.py                     all stages, evaluation and report
    python train.py --stage dynamics    one stage (tokenizer, dynamics, agent, imagine)
    torchrun --nproc_per_node 2 -- train.py    the same batches split over processes;
                with --train.shard true --train.compile false the weights too

fit is the loop of all stages: train_tokenizer (Section 3.1), train_dynamics (3.2),
train_agent and train_imagine (3.3). Every config field is a flag: --dynamics.k_max 32.
A run lives in runs/NAME: STAGE.pt, config.json, metrics.jsonl, pictures, results.json,
report.md. What is random in a step comes from (seed, stage, step), so that an interrupted
run goes on exactly, and --replay STEP shows a step again.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import play
from agent import (RELEVANT, STAGES, Agent, AgentConfig, agent_losses, autocast,
                   cloned_targets, dream_of, freeze, imagination_losses, imagine_rollout,
                   load_checkpoint, load_run, pick_device, pick_dtype, save_checkpoint,
                   sha256_of)
from data import (Dataset, UserError, Windows, check_config, check_world, file_name,
                  make_env, read_json, record, rng_for, run_cli, this_command,
                  world_presets, write_json, write_whole)
from dynamics import (Batch, Dream, Dynamics, DynamicsConfig, dynamics_losses, pure_noise,
                      ramp_weight, sample_tau_d, show_as_context, to_device)
from tokenizer import (Block, LossNormalizer, Tokenizer, TokenizerConfig, compile_module,
                       latent_health, lpips_loss, mae_mask, reconstruction_loss,
                       scale_pixels)


@dataclasses.dataclass
class DataConfig:
    """Recorded play to train on, and the episodes that judge the result."""
    env: str = "crafter"        # gym:ID: any gymnasium world, of which
    size: str = ""              # its frames' size, "72x72"; default: at most 96 pixels
    frameskip: int = 1          # how often an action is repeated
    bins: int = 11              # classes for a number of an action; 0: the number itself
    path: str = ""              # default: datasets/ENV_EPISODESxLENGTH, recorded if missing
    episodes: int = 240
    length: int = 500
    labels: str = "1"           # share of the episodes, in order, with known actions; or a
                                # recorded probe, where it isn't 0
    reference: str = ""         # dataset that judges, never trained on; default: recorded
    reference_episodes: int = 40
    eval_episodes: int = 200    # 0: the world model alone is judged
    eval_length: int = 500

    def __post_init__(self):
        check_config("data", self, zero=("eval_episodes", "bins"))
        share = label_share(self.labels)
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"Got data.labels {self.labels}, need 0 to 1, or a probe.")


def label_share(labels):
    """The number in --data.labels; None: it names a probe."""
    try:
        return float(labels)
    except ValueError:
        return None


@dataclasses.dataclass
class TrainConfig:
    """Steps, batches and learning rates; the paper's values in the comments."""
    tokenizer_steps: int = 500
    tokenizer_batch: int = 16
    tokenizer_length: int = 8   # frames
    tokenizer_whole: float = 0.4        # share of these steps, the last, without masks (0)
    dynamics_steps: int = 2000
    agent_steps: int = 1800
    imagine_steps: int = 540
    batch: int = 32             # of short windows; long ones hold as many frames in all
    length: int = 16            # 64 (T1)
    long_length: int = 48       # 256 (T2), longer than dynamics.context
    long_share: float = 0.25    # of the steps; the last tenth has long windows only
    event_rows: float = 0.0     # share of the dynamics' rows that show a task being done,
                                # as clean-past clips: the event and PURE_NOISE of the other
                                # frames are pure noise, the rest is context
    boot_after: float = 0.5     # share of the dynamics' steps before bootstrap begins (0)
    imagine_batch: int = 64
    lr_matrix: float = 6e-3     # Muon: 2-D matrices of the transformers
    lr: float = 3e-3            # AdamW: everything else
    lr_policy: float = 1e-3     # AdamW in imagination
    cooldown: float = 0.3       # share of a stage in which the rate falls to 0
    compile: bool = True        # torch.compile of the transformers' blocks
    shard: bool = False         # for what is too large for one GPU: see shard()
    log_every: int = 25

    def __post_init__(self):
        shares = ("tokenizer_whole", "long_share", "event_rows", "boot_after", "cooldown")
        check_config("train", self, shares=shares)
        if self.shard and self.compile:
            raise UserError("Got train.shard true, need --train.compile false beside it.")


WARMUP = 50                 # steps, at most a tenth of the stage, at least a hundredth
PURE_NOISE = 0.25           # of the frames of clean-past clips
SAVE_EVERY = 250            # steps between checkpoints, and looks at dreams or imitation
CLIP = 1.0                  # norm to which a larger gradient is cut
VALUE_FIRST = 20            # imagination steps, at most a third of them, in which the value
                            # head learns alone: a value of 0 calls every action good
LATENT_CHUNK = 32           # frames of an episode that are encoded at once
ON_THE_WAY = 128            # frames before a prompt's event whose actions are cloned
CONFIGS = {"data": DataConfig, "tokenizer": TokenizerConfig, "dynamics": DynamicsConfig,
           "agent": AgentConfig, "train": TrainConfig}
DERIVED = ("tokenizer.height", "tokenizer.width", "dynamics.tokens", "dynamics.channels",
           "dynamics.tasks")                                    # no flags
CONFIGS_OF = {"tokenizer": ("tokenizer",), "dynamics": ("tokenizer", "dynamics"),
              "agent": ("tokenizer", "dynamics", "agent"),
              "imagine": ("tokenizer", "dynamics", "agent")}    # what a stage is made with
FIXED_BY_AGENT = ("hidden", "prompt_order", "bc_level", "bc_weight", "prompts",
                  "pretrained", "temperature")      # imagination can't change them
MAY_DIFFER = ("train.compile", "train.log_every", "train.shard")    # after a break
LOSSES = {"tokenizer": ("mse", "lpips"), "dynamics": ("dynamics",),
          "agent": ("dynamics", "bc", "reward", "continue", "events"),
          "imagine": ("policy", "value")}
HEALTH = {"latent_rank": (2.0, np.inf), "tanh_saturated": (0.0, 0.3),   # lowest, highest
          "grad_norm": (1e-6, 100.0), "entropy": (0.02, np.inf), "kl_prior": (0.0, 1.0),
          "value_explained": (-0.5, np.inf), "positive_share": (0.05, 0.95)}
PRESETS = {     # each starts from the defaults, which are the cpu preset; more in envs/
    "cpu": {},
    "smoke": {"data.episodes": 12, "data.length": 80, "data.reference_episodes": 4,
              "data.eval_episodes": 4, "data.eval_length": 40, "dynamics.dim": 128,
              "train.tokenizer_batch": 4, "train.tokenizer_steps": 60,
              "train.dynamics_steps": 40, "train.agent_steps": 20, "train.imagine_steps": 6,
              "train.batch": 12, "train.compile": False, "train.log_every": 5,
              "agent.horizon": 6, "train.imagine_batch": 16},
    # the choices that the paper states, as far as they are flags, at the default's sizes
    "letter": {"tokenizer.mae_max": 0.9, "tokenizer.local": False, "dynamics.p_boot": 1.0,
               "dynamics.single_images": 0.3, "dynamics.time_every": 4,
               "train.tokenizer_whole": 0.0, "train.boot_after": 0.0,
               "agent.bc_level": "uniform", "agent.bc_weight": 1.0,
               "agent.prompt_order": 0.0, "agent.temperature": 1.0, "agent.k": 0,
               "agent.imagined_tasks": "all", "agent.end_on_event": False,
               "agent.gamma": 0.997},
    # a token for each patch of a frame: more work a frame, so a smaller model and batch
    "cpu_long": {"data.episodes": 480, "tokenizer.pack": 1, "dynamics.dim": 128,
                 "dynamics.heads": 2, "dynamics.kv_heads": 1, "dynamics.layers": 6,
                 "dynamics.time_every": 3, "train.batch": 16, "train.imagine_batch": 32,
                 "agent.horizon": 6, "train.cooldown": 0.65, "train.event_rows": 0.6,
                 "train.boot_after": 0.6, "train.dynamics_steps": 5000,
                 "train.agent_steps": 2400, "train.imagine_steps": 900},
}
# cpu_long with wider dynamics, more rows and play; compiling would take a GPU minutes
PRESETS["gpu"] = {**PRESETS["cpu_long"], "data.episodes": 960, "dynamics.dim": 256,
                  "dynamics.heads": 4, "dynamics.kv_heads": 2, "train.batch": 48,
                  "train.imagine_batch": 128, "train.lr_matrix": 5e-3, "train.lr": 2e-3,
                  "train.compile": False, "train.tokenizer_steps": 2000,
                  "train.dynamics_steps": 8000, "train.agent_steps": 3000}


# --------------------------------------------------------------------------------- flags

def make_parser(presets):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=(*STAGES, "all"), default="all")
    add("--preset", choices=presets, help="default: gpu with CUDA, else cpu")
    add("--run", help="default: the environment's name")
    add("--base", metavar="RUN", help="take the stages before --stage from this run")
    add("--seed", type=int, help="default 0")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", default="auto", help="auto, bf16, fp16, fp32")
    add("--resume", choices=("auto", "no", "anyway"), default="auto", help="no: train "
        "again; anyway: go on although recordings or the stages before are other ones")
    add("--replay", type=int, metavar="STEP", help="show a step's losses, change nothing")
    for prefix, config in CONFIGS.items():
        for field in dataclasses.fields(config):
            name, kind = f"--{prefix}.{field.name}", field.type
            if name[2:] not in DERIVED:
                convert = json.loads if kind is bool else kind          # true, false
                add(name, type=convert, metavar=kind.__name__, default=argparse.SUPPRESS,
                    help=f"default {field.default}")
    return parser


def parse(argv=None):
    """Command line -> args, {prefix: config dict}: defaults < preset < explicit flags."""
    presets, configs = {**PRESETS, **world_presets()}, {}
    args = make_parser(presets).parse_args(argv)
    on_gpu = pick_device(args.device).type == "cuda"
    args.preset = args.preset or ("gpu" if on_gpu else "cpu")
    args.given = {name: value for name, value in vars(args).items()
                  if "." in name or (name == "seed" and value is not None)}
    args.seed = args.given.get("seed", 0)
    chosen = {**presets[args.preset], **args.given}
    for prefix, config in CONFIGS.items():
        configs[prefix] = {f.name: chosen.get(f"{prefix}.{f.name}", f.default)
                           for f in dataclasses.fields(config)}
        config(**configs[prefix])           # a bad value is one line, before anything runs
    env = name_world(configs["data"])
    world = [word for word in re.split("[:/]", env) if word]
    last = world[0] in ("gym", "episodes")
    args.run = args.run or world[-1 if last else 0]
    args.run = args.run.removeprefix("runs/")
    check_flags(args, configs)
    return args, configs


def name_world(data):
    """The settings of a gymnasium world become a part of its name, by which recordings and
    runs know it: gym:ID,size=72x72. Returns the name without them."""
    env, words = data["env"], []
    for name in ("size", "frameskip", "bins"):
        if data[name] != getattr(DataConfig, name):
            words.append(f"{name}={data[name]}")
    if words and not env.startswith("gym:"):
        raise UserError(f"Got {', '.join(words)} for {env}, need a world gym:ID.")
    data["env"] = ",".join([env, *words])
    return env.split(",")[0]


def check_flags(args, configs):
    """UserError where flags don't fit together."""
    train, dynamics, k = configs["train"], configs["dynamics"], configs["agent"]["k"]
    if not 0 <= args.seed < 2 ** 63:
        raise UserError(f"Got --seed {args.seed}, need a whole number from 0.")
    steps = train.get(f"{args.stage}_steps", 0)
    if args.replay is not None and not 0 <= args.replay < steps:
        raise UserError(f"Got --replay {args.replay} --stage {args.stage}, need one stage "
                        "and a step of it.")
    if args.base and (args.stage not in STAGES[1:] or args.base == args.run):
        raise UserError(f"Got --base {args.base} --run {args.run} --stage {args.stage}, "
                        f"need one stage of {STAGES[1:]} and another run.")
    if train["long_share"] > 0 and train["long_length"] <= dynamics["context"]:
        raise UserError(f"Got train.long_length {train['long_length']}, need more than "
                        f"dynamics.context {dynamics['context']}: the model must see "
                        "frames without the start of the window. Or --train.long_share 0.")
    if k & (k - 1) or (k > dynamics["k_max"] and args.stage == "all"):
        raise UserError(f"Got agent.k {k}, need a power of two up to dynamics.k_max "
                        f"{dynamics['k_max']}, or 0.")


@dataclasses.dataclass
class Job:
    """What all stages share, and the stage in hand."""
    args: argparse.Namespace
    folder: Path
    configs: dict
    data: DataConfig
    train: TrainConfig
    device: torch.device
    dataset: Dataset
    stage: str = ""
    steps: int = 0
    began: float = 0.0          # when the stage began, were it not for breaks
    provenance: dict = None     # fingerprints of what the stage begins with


# -------------------------------------------------------- data parallel: torchrun train.py

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
OWN_ROWS = slice(RANK, None, PROCESSES)     # of this process; process 0 alone writes


def join_processes(device):
    """Under torchrun: meet the other processes -> this process's device."""
    if PROCESSES > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group(timeout=datetime.timedelta(days=1))
        atexit.register(dist.destroy_process_group)     # else gloo's threads abort the exit
        if RANK:
            sys.stdout = open(os.devnull, "w")          # noqa: SIM115
    return device


@contextlib.contextmanager
def in_turn():
    """Process 0 first; then the others, which find on disk what it made."""
    if RANK:
        dist.barrier()
    yield
    if PROCESSES > 1 and RANK == 0:
        dist.barrier()


class Losses(nn.Module):
    """A stage's loss_fn as the forward of what it trains, as DistributedDataParallel, which
    averages gradients over the processes, wants it."""

    def __init__(self, modules, loss_fn):
        super().__init__()
        self.trained, self.loss_fn = nn.ModuleList(modules), loss_fn

    def forward(self, draws):
        return self.loss_fn(draws)


def shard(compute, optimizers, weights):
    """--train.shard: what a block computes is not kept, but computed again in the backward
    pass. weights: also, each process keeps its part alone of the weights and of the
    optimizers' memory; in a step it collects those of the others."""
    before = list(compute.parameters())
    for part in compute.modules():
        if isinstance(part, Block):
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
    if not weights:
        return
    # subtle: all at once; block by block processes would wait for each other for ever, as
    # those that have rows with bootstrap pass through the blocks thrice
    fully_shard(compute, mesh=init_device_mesh(before[0].device.type, (PROCESSES,)))
    new = dict(zip(before, compute.parameters(), strict=True))      # they are others now
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new[p] for p in group["params"]]
        for p in list(optimizer.state):                     # after an interruption
            where, old = (new[p].device_mesh, new[p].placements), optimizer.state.pop(p)
            optimizer.state[new[p]] = {k: distribute_tensor(x, *where) if x.ndim else x
                                       for k, x in old.items()}


def whole(state):
    """A tree of tensors, those that are spread over the processes as whole ones."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)


def over_processes(x, op):
    """The sum or maximum of a tensor over the processes, without a gradient."""
    x = x.detach().clone()
    if PROCESSES > 1:
        dist.all_reduce(x, op)
    return x


def mean_over_processes(loss):
    """The mean of the processes' losses, with this process's own gradient: those are
    averaged in the backward pass."""
    mean = over_processes(loss, dist.ReduceOp.SUM) / PROCESSES
    return loss - loss.detach() + mean


def divisible(rows):
    """So many rows, or a few more, that every process gets as many."""
    return math.ceil(rows / PROCESSES) * PROCESSES


# ------------------------------------------------------------------------- training loop

class Draws(NamedTuple):
    """The randomness of a training step."""
    step: int
    rng: np.random.Generator        # windows
    levels: torch.Generator         # tau and d, on the CPU
    noise: torch.Generator          # z0, actions, masks, on the device; on a CPU the same


def make_draws(job, step):
    rng = rng_for(job.args.seed, job.stage, step)
    seed = int(rng.integers(2 ** 31))
    levels = noise = torch.Generator().manual_seed(seed)
    if job.device.type != "cpu":
        noise = torch.Generator(job.device).manual_seed(seed)
    return Draws(step, rng, levels, noise)


def make_optimizers(modules, lr_matrix, lr):
    """Muon for the matrices inside transformer blocks, AdamW without decay for the rest."""
    matrices, rest = [], []
    for name, p in nn.ModuleList(modules).named_parameters():
        if not p.requires_grad:
            continue
        if "blocks." in name and p.ndim == 2:
            matrices.append(p)
        else:
            rest.append(p)
    return [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
            torch.optim.Muon(matrices, lr=lr_matrix, weight_decay=0.01,
                             adjust_lr_fn="match_rms_adamw")]   # steps as long as AdamW's


def set_rates(job, optimizers, step):
    """Linear up to the peak rate, flat, linear down to 0."""
    warmup = max(min(WARMUP, job.steps // 10), job.steps // 100, 1)
    cooldown = max(job.train.cooldown * job.steps, 1)
    share = min(1.0, (step + 1) / warmup, (job.steps - step) / cooldown)
    for optimizer in optimizers:
        for group in optimizer.param_groups:        # checkpoints keep the peak in the group
            group["lr"] = share * group.setdefault("peak", group["lr"])


def fit(job, modules, loss_fn, optimizers, weights=()):
    """The loop of every stage: batch -> losses -> backward -> clip -> step -> log -> save.
    loss_fn: Draws -> losses by name, metrics. weights: {loss: weight}, default 1."""
    normalizer = LossNormalizer(LOSSES[job.stage]).to(job.device)
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.args.dtype == "fp16")
    parts = [*modules, normalizer, *optimizers, scaler]
    start, sums = restore(job, modules, parts)
    compute = Losses(modules, loss_fn)
    spread = PROCESSES > 1 and job.train.shard and job.stage in ("dynamics", "agent")
    if job.train.shard:
        shard(compute, optimizers, spread)
    parameters = [p for p in compute.parameters() if p.requires_grad]
    if PROCESSES > 1 and not spread:
        compute = nn.parallel.DistributedDataParallel(compute, find_unused_parameters=True)
    print_header(job, start, parameters)
    if job.args.replay is not None:
        replay(job, compute, lambda losses: normalizer(losses, weights))
    log = Log(job, start, sums)
    steps = range(start, job.steps)
    bar = tqdm(steps, job.stage, job.steps, initial=start, disable=RANK > 0)
    with gentle_stop() as noted:
        for step in bar:
            # batch and losses
            set_rates(job, optimizers, step)
            with autocast(job.device, job.args.dtype):
                losses, metrics = compute(make_draws(job, step))
            losses = {name: mean_over_processes(loss) for name, loss in losses.items()}
            total = normalizer(losses, weights)

            # backward, clip, step
            scaler.scale(total).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = whole(nn.utils.clip_grad_norm_(parameters, CLIP))
            overflow = log.watch(step, total, norm)
            for optimizer in optimizers:
                if not overflow:        # subtle: all of them, or none
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()

            # log and save; a signal to one process stops all after the same step
            log.add({**losses, **metrics, "grad_norm": norm})
            if (step + 1) % job.train.log_every == 0 or step + 1 == job.steps:
                log.write(step + 1, bar)
            stop = signal_of_any(noted, job.device)
            if stop or ((step + 1) % SAVE_EVERY == 0 and step + 1 < job.steps):
                log.check()
                save_resume(job, parts, step + 1, log.sums)
            if stop:
                raise KeyboardInterrupt(128 + stop)
    for module in modules:
        module.eval()


def print_header(job, start, parameters):
    """The stage's first line."""
    count, data = sum(p.numel() for p in parameters), job.dataset
    print(f"Stage {job.stage}: {count:,} parameters, steps {start} to {job.steps}, "
          f"{job.device} {job.args.dtype}, dataset {data.frames_total:,} frames in "
          f"{len(data.lengths)} episodes, {len(data.episodes('valid'))} of them kept for "
          "validation.", flush=True)


def replay(job, compute, total_of):
    """--replay STEP: its losses and gradients under the weights of the last checkpoint."""
    with autocast(job.device, job.args.dtype):
        losses, _ = compute(make_draws(job, job.args.replay))
    total_of(losses).backward()
    print(f"step {job.args.replay} with the weights of the last checkpoint:",
          ", ".join(f"{name} {loss.item():.6g}" for name, loss in losses.items()))
    for name, p in compute.named_parameters():
        if p.grad is not None:
            print(f"  gradient norm of {name}: {float(p.grad.norm()):.6g}")
    sys.exit(0)


def signal_of_any(noted, device):
    """The signal that one of the processes was sent, 0: none."""
    stop = max(noted, default=0)
    if PROCESSES > 1:
        stop = int(over_processes(torch.tensor(stop, device=device), dist.ReduceOp.MAX))
    return stop


@contextlib.contextmanager
def gentle_stop():
    """Yields a list: the first SIGINT or SIGTERM is noted in it, a second stops at once."""
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt(128 + number)
        noted.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """Means of the metrics between two lines of runs/NAME/metrics.jsonl. sums: those since
    the last line, which a checkpoint keeps. They stay on the device until a line is
    written: reading them makes the host wait."""

    def __init__(self, job, start, sums):
        self.path, self.stage, self.sums = job.folder / "metrics.jsonl", job.stage, sums
        self.last, self.warned, self.seed = None, set(), job.args.seed
        self.fp16 = job.args.dtype == "fp16"
        self.diverged = torch.full((), -1, device=job.device)       # first such step
        lines = [json.dumps(x) + "\n" for x in play.read_metrics(job.folder)
                 if x["stage"] != job.stage or x["step"] <= start]  # others come again
        if RANK == 0:
            write_whole(self.path, lambda file: file.write("".join(lines).encode()))

    def watch(self, step, total, norm):
        """Notes a loss or gradient that isn't finite. In fp16 a gradient may overflow; the
        scaler lowers its scale then -> whether it did."""
        overflow = self.fp16 and not norm.isfinite()
        bad = ~(total if overflow else total + norm).isfinite()
        self.diverged = torch.where(bad & (self.diverged < 0), step, self.diverged)
        return overflow

    def check(self):
        """UserError where training has diverged."""
        step, stage = int(self.diverged), self.stage
        if step >= 0:
            raise UserError(f"Got a loss or gradient that is not finite at step {step} of "
                            f"{stage} (seed {self.seed}); the last checkpoint is kept: "
                            f"--stage {stage} --replay {step} shows more, or lower "
                            "--train.lr_matrix and --train.lr.")

    def add(self, values):
        for name, value in values.items():
            total, n = self.sums.get(name, (0.0, 0))
            value = value.detach()
            counts = value.isfinite()           # nan: no frame fell into that bin
            self.sums[name] = (total + torch.where(counts, value, 0.0), n + counts)

    def write(self, step, bar):
        """Append a line, show it on the bar, warn of what isn't healthy in it."""
        self.check()
        means = {name: float(total / n) for name, (total, n) in self.sums.items() if n > 0}
        now, rate = time.perf_counter(), None
        if self.last:
            rate = (step - self.last[0]) / (now - self.last[1])
        self.sums, self.last = {}, (step, now)
        if RANK == 0:
            line = {"stage": self.stage, "step": step, **means, "rate": rate}
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        shown = {name: f"{means[name]:.3g}" for name in LOSSES[self.stage] if name in means}
        bar.set_postfix(shown, refresh=False)
        if step >= max(bar.total // 4, 100):    # before, extremes are natural
            self.warn(means, bar)

    def warn(self, means, bar):
        """A line for what is outside HEALTH, once each."""
        for name, (low, high) in HEALTH.items():
            if name in means and not low <= means[name] <= high and name not in self.warned:
                self.warned.add(name)
                bar.write(f"warning: {name} {means[name]:.3g} in {self.stage}, healthy is "
                          f"{low:g} to {high:g}: see README, Metrics.", sys.stderr)


# ---------------------------------------------------------------------------- checkpoints

def provenance_of(job, stage):
    """Fingerprints of what a stage begins with: the recordings and the stages before it."""
    paths = {name: job.folder / f"{name}.pt" for name in STAGES[:STAGES.index(stage)]}
    return {"dataset": job.dataset.fingerprint,
            **{name: sha256_of(path) for name, path in paths.items() if path.exists()}}


def made_with(job):
    """What may not change while a stage is interrupted: provenance, seed, settings."""
    found = {**job.provenance, "seed": job.args.seed, "dtype": job.args.dtype,
             "data.labels": job.data.labels}
    others = tuple(f"train.{stage}_" for stage in STAGES if stage != job.stage)
    for prefix in (*CONFIGS_OF[job.stage], "train"):
        for key, value in job.configs[prefix].items():
            name = f"{prefix}.{key}"
            if name not in MAY_DIFFER and not name.startswith(others):
                found[name] = value
    return found


def refuse_changes(job, path, then, now):
    """UserError where a checkpoint was made with something else than there is now; --resume
    anyway allows it for the recordings and the stages before."""
    for name, made in then.items():
        may_differ, hint = name in ("dataset", *STAGES), ""
        if now.get(name, made) == made or (may_differ and job.args.resume == "anyway"):
            continue
        if may_differ:
            hint = ", or go on with --resume anyway"
        raise UserError(f"Got {name} {now[name]}, {path} was made with {made}: go back "
                        f"to that, or train this stage again with --resume no{hint}.")


def resume_paths(job):
    """Newest and second newest checkpoint inside a stage."""
    return job.folder / f"{job.stage}.resume.pt", job.folder / f"{job.stage}.resume.old.pt"


def save_resume(job, parts, step, sums):
    state = {"step": step, "sums": sums, "seconds": time.perf_counter() - job.began,
             "made_with": made_with(job),
             "parts": whole([part.state_dict() for part in parts])}
    if RANK == 0:
        newest, before = resume_paths(job)
        save_checkpoint(newest, state, before)


def restore(job, modules, parts):
    """What an interrupted stage saved goes into its parts -> step to go on from, sums of
    the log. --replay is shown the weights of a finished stage, too."""
    final, state, faults = job.folder / f"{job.stage}.pt", None, []
    if job.args.replay is not None and final.exists():
        state = load_checkpoint(final, job.device)
        for module in modules:
            module.load_state_dict(state[type(module).__name__.lower()])
        return state["step"], {}
    for path in filter(Path.exists, resume_paths(job)):
        try:
            state = load_checkpoint(path, job.device)
            break
        except UserError as error:
            faults.append(str(error))
    if state is None:
        if faults:
            raise UserError(" And: ".join(faults))
        return 0, {}
    for fault in faults:
        print(f"warning: {fault} Going on from the one before, step {state['step']}.")
    refuse_changes(job, path, state["made_with"], made_with(job))
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    job.began -= state["seconds"]
    return state["step"], {name: tuple(x) for name, x in state["sums"].items()}


def save_stage(job, **modules):
    """runs/NAME/STAGE.pt: all that load_run needs."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):      # no git on this machine
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    state = {"stage": job.stage, "step": job.steps, "commit": commit, "config": job.configs,
             "provenance": job.provenance, "made_with": made_with(job),
             "spec": job.dataset.spec.to_json(), "seconds": time.perf_counter() - job.began,
             **{name: whole(module.state_dict()) for name, module in modules.items()}}
    with in_turn():
        if RANK == 0:
            save_checkpoint(job.folder / f"{job.stage}.pt", state)
            for path in resume_paths(job):
                path.unlink(missing_ok=True)


def open_stage(job, stage):
    """The run as `stage` left it; its settings go on into job.configs. UserError where it
    was made of other play or of another stage before it, or a flag contradicts its
    settings."""
    run = load_run(job.folder, stage, job.device)
    now = {**job.dataset.spec.recorded(), **provenance_of(job, stage)}
    refuse_changes(job, run.path, {**run.spec.recorded(), **run.meta["provenance"]}, now)
    for prefix in CONFIGS_OF[stage]:
        saved = run.meta["config"][prefix]
        if (prefix, stage) == ("agent", "agent"):           # the others are free again
            saved = {key: saved[key] for key in FIXED_BY_AGENT}
        for key, value in saved.items():
            flag = job.args.given.get(f"{prefix}.{key}", value)
            if flag != value:
                raise UserError(f"Got --{prefix}.{key} {flag}, but {run.path} has {value}: "
                                "leave the flag out, or train from there on again.")
        job.configs[prefix].update(saved)
    return run


def refuse_flags(job, run):
    """UserError where a flag contradicts what a finished stage was trained with."""
    for name, value in job.args.given.items():
        made = run.meta["made_with"].get(name, value)
        if made != value:
            raise UserError(f"Got --{name} {value}, but {run.path} was trained with "
                            f"{made}: take another --run, or --resume no trains it again.")


def take_stages(base, folder, stage):
    """--base: copy the stages before `stage` from another run, where there are none."""
    stages = [f"{name}.pt" for name in STAGES[:STAGES.index(stage)]]
    for name in (*stages, "latents.npy", "latents.json"):
        source, target = base / name, folder / name
        if name in stages and not source.exists():
            raise UserError(f"No {name} in {base}: train its stages before {stage} first.")
        if name in stages and target.exists() and sha256_of(source) != sha256_of(target):
            raise UserError(f"Got --base {base.name}, but {target} is another one than "
                            f"{source}: take another --run, or delete it.")
        if source.exists() and not target.exists():
            with contextlib.suppress(OSError):      # one file, no room; it is never changed
                os.link(source, target)
                continue
            with open(source, "rb") as file:
                write_whole(target, lambda to, file=file: shutil.copyfileobj(file, to))


# ------------------------------------------------------------------- latents and batches

@torch.no_grad()
def encode_all(job, tokenizer, file):
    """Stream all recordings through the tokenizer into an npy file (frames, S_z, Z),
    float16: it may be larger than the memory."""
    data = job.dataset
    shape = (data.frames_total, *tokenizer.latent_shape)
    if job.train.compile:               # a copy: elsewhere its shapes are of all kinds
        tokenizer = copy.deepcopy(tokenizer)
        compile_module(tokenizer, job.device)
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    for i in tqdm(data.episodes("all"), "latents"):
        rows, cache = data.rows(i), tokenizer.new_cache()
        for start in range(0, len(rows), LATENT_CHUNK):
            frames = torch.from_numpy(np.array(rows["frames"][start:start + LATENT_CHUNK]))
            n = len(frames)             # filled up with its last one: one shape to compile
            frames = frames[torch.arange(LATENT_CHUNK).clamp(max=n - 1)]
            with autocast(job.device, job.args.dtype):
                z = tokenizer.encode(frames[None].to(job.device), cache)[0, :n]
            file.write(z.half().cpu().numpy().tobytes())


def open_latents(job, tokenizer):
    """The frozen tokenizer's latents of all frames, made once and kept beside the run."""
    path, about = job.folder / "latents.npy", job.folder / "latents.json"
    provenance = {"dataset": job.dataset.fingerprint,
                  "tokenizer": sha256_of(job.folder / "tokenizer.pt")}
    with in_turn():
        old = read_json(about) if about.exists() and path.exists() else None
        if old is not None and old != {**provenance, "sha256": sha256_of(path)}:
            print(f"{path} is damaged or out of date: computing it again.")
            old = None
        if old is None:
            write_whole(path, lambda file: encode_all(job, tokenizer, file))
            write_json(about, {**provenance, "sha256": sha256_of(path)})
    return np.load(path, mmap_mode="r")


class Recordings:
    """What the stages after the tokenizer read: recorded play, with latents for frames.
    labelled (frames,) bool: whose action may be seen (Section 4.4, unlabelled video);
    along: play.Along; told: windows from anywhere have the prompt at their end as their
    task, else a random one."""
    latents = None

    def __init__(self, job, told=False):
        self.told = told
        self.on_the_way = functools.cache(self.on_the_way)
        self.data, self.spec = job.dataset, job.dataset.spec
        episodes, probe = len(self.data.lengths), job.data.labels
        share = label_share(probe)
        if share is not None:
            self.labelled_episodes = round(share * episodes)            # the first ones
            frames = np.arange(self.data.frames_total)
            self.labelled = frames < self.data.offsets[self.labelled_episodes]
            return
        if probe not in self.data.rows(0).dtype.names:
            raise UserError(f"Got recordings in {self.data.path} without {probe}, need it "
                            "for --data.labels: record them again.")
        rows = [self.data.rows(i)[probe] for i in range(episodes)]
        self.labelled_episodes, self.labelled = episodes, np.concatenate(rows) > 0

    @property
    def rare(self):
        """Whether windows have to be chosen for what happens in them: where rewards are
        given all along any window does."""
        return len(self.data.events) > 0 or not self.spec.returns

    def any_labelled(self):
        """Whether there is an action to imitate."""
        for i in self.data.episodes("train"):
            labelled = self.labelled[self.data.offsets[i]:self.data.offsets[i + 1]]
            if (self.data.rows(i)["labelled"] & labelled).any():
                return True
        return False

    def anywhere(self, n, length, edges=True):
        """(rows, Windows) each. Where a part of the training episodes is labelled, half of
        the windows are from there, or actions would be seldom seen."""
        labelled = Windows(length, first=self.labelled_episodes, edges=edges)
        partly = self.labelled_episodes < len(self.data.lengths)
        some = n // 2 if partly and len(self.data.long_enough(labelled)) else 0
        return [(n - some, Windows(length, edges=edges)), (some, labelled)]

    def cloned(self, n, length, prompt_order):
        """(rows, Windows) each, of episodes with known actions alone: windows that show
        their task being done, and a share that end on the way to what is asked for."""
        windows = Windows(length, self.rare, first=self.labelled_episodes)
        on_the_way = windows._replace(prompted=True)
        there = prompt_order and len(self.on_the_way(on_the_way)[0])
        some = round(prompt_order * n) if there else 0
        return [(n - some, windows), (some, on_the_way)]

    def before_event(self, n, length, horizon, all_tasks=False):
        """(rows, Windows) each: windows whose task is done in the `horizon` frames after
        them, one of the prompts' or any."""
        ahead = (length, length + horizon - 1)
        tasks = () if all_tasks else play.PromptOrder(self.spec, 1).tasks
        return [(n, Windows(length, self.rare, ahead=ahead, tasks=tasks))]

    @functools.cached_property
    def along(self):
        return play.prompts_along(self.data)

    def on_the_way(self, windows):
        """Frames (n,) at which such windows may end, in order of their prompts: the prompt
        is done in the next ON_THE_WAY. For each prompt its first index, and how many."""
        starts, task = self.data.offsets, self.along.task
        inside = np.zeros(len(task), bool)          # such a window fits before it
        for i in self.data.long_enough(windows):
            inside[starts[i] + windows.length - 1:starts[i + 1]] = True
        frames = np.flatnonzero(inside & (self.along.ahead <= ON_THE_WAY))
        frames = frames[np.argsort(task[frames], kind="stable")]
        _, first, count = np.unique(task[frames], return_index=True, return_counts=True)
        return frames, first, count

    def sample_on_the_way(self, rng, n, windows):
        """As Dataset.sample: a prompt by the root of how many frames it has, then one of
        these to end at."""
        frames, first, count = self.on_the_way(windows)
        root = np.sqrt(count)
        which = rng.choice(len(count), n, p=root / root.sum())
        last = frames[first[which] + rng.integers(count[which])]
        episode = np.searchsorted(self.data.offsets, last, side="right") - 1
        start = last - self.data.offsets[episode] - windows.length + 1
        return episode, start, self.along.task[last]

    def read(self, rng, kinds):
        """Sample windows, kinds: (rows, Windows of one length) each -> Batch on the CPU."""
        parts = []
        for n, windows in kinds:
            sample = self.sample_on_the_way if windows.prompted else self.data.sample
            if n:
                parts.append(sample(rng, n, windows))
        episode, start, task = (np.concatenate(x) for x in zip(*parts, strict=True))
        length = kinds[0][1].length
        index = (self.data.offsets[episode] + start)[:, None] + np.arange(length)
        if self.told:
            n = sum(n for n, windows in kinds if not windows.relevant)  # they come first
            task[:n] = self.along.task[index[:n, -1]]
        asked = np.ones(index.shape, bool)
        n = sum(n for n, windows in kinds if windows.prompted)          # they come last
        if n:
            asked[-n:] = self.along.task[index[-n:]] == task[-n:, None]
        fields = ("actions", "labelled", "events", "continues")
        rows = self.data.read(episode, start, length, fields)
        columns = {"z": self.latents[index].astype(np.float32), "actions": rows["actions"],
                   "labelled": rows["labelled"] & self.labelled[index],
                   "task": np.repeat(task[:, None], length, 1),
                   "events": rows["events"].astype(np.float32), "asked": asked,
                   "continues": rows["continues"]}
        return Batch(**{name: torch.from_numpy(x) for name, x in columns.items()})


def batch_shape(cfg, step, steps):
    """(rows, length) of a step's batch: a share of the steps is long, evenly spread, and
    the last tenth."""
    long = int((step + 1) * cfg.long_share) > int(step * cfg.long_share)
    if cfg.long_share > 0 and step >= 0.9 * steps:
        long = True
    length = cfg.long_length if long else cfg.length
    return divisible(max(cfg.batch * cfg.length // length, 2)), length


@torch.no_grad()
def rollout_check(job, run, n=16, context=16, horizon=4):
    """A look at dreams while training: PSNR `horizon` frames ahead on validation clips, and
    how much better than under another clip's actions. {}: episodes are too short."""
    data, windows = job.dataset, Windows(context + horizon, split="valid")
    if not len(data.long_enough(windows)):
        return {}
    episode, start, _ = data.sample(rng_for(job.args.seed, "check", 0), n, windows)
    clips = play.read_clips(data, episode, start, windows.length, job.device)
    batch, psnr = play.encode(run, clips), []
    for actions in (batch.actions, play.shuffle_actions(batch.actions, context, 1)):
        film = play.dream_clips(run, batch._replace(actions=actions), horizon)
        error = play.squared_error(film[:, -1:], clips.frames[:, -1:])
        psnr.append(torch.tensor(float(play.decibel(error)[0])))
    return {"rollout_psnr_h4": psnr[0], "rollout_minus_shuffled_h4": psnr[0] - psnr[1]}


@torch.no_grad()
def imitation_check(job, recordings, dynamics, agent, n=32, length=16):
    """Nats of the next action on validation clips of tasks being done; above bc_next_action
    where the policy learns its episodes by heart. {}: there are none."""
    windows = Windows(length, recordings.rare, split="valid")
    there = job.dataset.windows_with_event(windows)[0] if windows.relevant else (
        job.dataset.long_enough(windows))
    if not len(there):
        return {}
    batch = recordings.read(rng_for(job.args.seed, "check", 0), [(n, windows)])
    batch = batch.to(job.device)
    dream = Dream(dynamics, torch.Generator(job.device).manual_seed(0))
    h = dream.commit(batch.z, batch.actions, batch.labelled, agent.prompt(batch.task))
    metrics = agent_losses(agent, h, batch, batch.labelled.any(1))[1]
    return {"bc_next_action_valid": metrics["bc_next_action"]}


# -------------------------------------------------------------------------------- stages

def train_tokenizer(job):
    """Section 3.1: masked autoencoding of frames. Not in the paper: the last
    tokenizer_whole of the steps mask none. What can't be known of hidden patches is nearly
    all of the error, and beside it no small thing counts."""
    cfg, data = job.train, job.dataset
    job.configs["tokenizer"] |= {"height": data.spec.height, "width": data.spec.width}
    tokenizer = Tokenizer(TokenizerConfig(**job.configs["tokenizer"])).to(job.device)
    print(f"{tokenizer.patches} patches of {tokenizer.patch}x{tokenizer.patch} "
          f"pixels, {tokenizer.latents} latents, {tokenizer.own or 'none'} of a patch's "
          "own.")
    perceptual = lpips_loss().to(job.device) if tokenizer.cfg.lpips else None
    if cfg.compile:
        compile_module(tokenizer, job.device)
    B, T = divisible(cfg.tokenizer_batch), cfg.tokenizer_length

    def frames(rng, relevant):
        """(B, T, H, W, 3); windows with an event show the rare things more often."""
        parts = [data.sample(rng, B - B // 2, Windows(T, edges=True)),
                 data.sample(rng, B // 2, Windows(T, relevant))]
        episode, start, _ = (np.concatenate(x) for x in zip(*parts, strict=True))
        x = data.read(episode[OWN_ROWS], start[OWN_ROWS], T, ["frames"])["frames"]
        return to_device(torch.from_numpy(x), job.device)

    def loss_fn(draws):
        x = scale_pixels(frames(draws.rng, len(data.events) > 0))
        masked = draws.step < (1 - cfg.tokenizer_whole) * job.steps
        hidden = mae_mask(B, T, tokenizer.patches, masked * tokenizer.cfg.mae_max,
                          draws.noise, job.device)[OWN_ROWS]
        losses, metrics = reconstruction_loss(tokenizer(x, hidden), x, perceptual), {}
        if (draws.step + 1) % cfg.log_every == 0:
            with torch.no_grad():
                metrics = latent_health(tokenizer.bottleneck(x))
        return losses, metrics

    optimizers = make_optimizers([tokenizer], cfg.lr_matrix, cfg.lr)
    fit(job, [tokenizer], loss_fn, optimizers, {"lpips": tokenizer.cfg.lpips})

    # the dynamics want latents of unit variance
    with torch.no_grad(), autocast(job.device, job.args.dtype):
        rngs = [rng_for(job.args.seed, "latent_std", i) for i in range(8)]
        z = torch.cat([tokenizer.encode(frames(rng, False)) for rng in rngs])
        tokenizer.latent_std.copy_(z.float().std())
    save_stage(job, tokenizer=tokenizer)


def dynamics_batch(job, recordings, draws, single_images):
    """The dynamics' batch, and (B,) bool: rows chosen for an event. In random order, or
    none of these would be among the first rows, which have bootstrap."""
    rows, length = batch_shape(job.train, draws.step, job.steps)
    # whoever knows the events of a video has its actions
    labelled = len(job.dataset.events) > 0 and recordings.labelled.all()
    n = round(job.train.event_rows * rows) if labelled else 0
    order = draws.rng.permutation(rows)
    kinds = recordings.anywhere(rows - n, length)
    kinds += [(n, Windows(length, recordings.rare))]
    batch = recordings.read(draws.rng, kinds).rows(order)
    single = torch.from_numpy(draws.rng.random(rows) < single_images)
    return batch._replace(task=None, single=single), torch.from_numpy(order >= rows - n)


def dynamics_levels(job, dynamics, batch, chosen, draws):
    """tau, d and the loss's weight, (B, T), of a batch from dynamics_batch."""
    cfg, (B, T) = dynamics.cfg, batch.labelled.shape
    n_boot = round(cfg.p_boot * B)
    if draws.step < job.train.boot_after * job.steps:
        n_boot = 0                          # the network would learn from its own noise
    tau, d = sample_tau_d(B, T, cfg.k_max, n_boot, draws.levels)
    if not chosen.any():
        return tau, d, frame_weight(tau, cfg)

    # not in the paper: clean-past clips, what the dream will see
    clips = (chosen & ~batch.single)[:, None]
    noisy = torch.from_numpy(draws.rng.random((B, T)) < PURE_NOISE) | batch.events.any(-1)
    noisy &= clips
    tau = pure_noise(tau, d, noisy, dynamics)
    tau, d = show_as_context(tau, d, clips & ~noisy, dynamics)
    return tau, d, torch.where(noisy.any(1, keepdim=True), 1.0, frame_weight(tau, cfg))


def frame_weight(tau, cfg):
    return ramp_weight(tau) if cfg.ramp else torch.ones_like(tau)


def train_dynamics(job):
    """Section 3.2: shortcut forcing on the frozen tokenizer's latents."""
    run = open_stage(job, "tokenizer")
    recordings, (tokens, channels) = Recordings(job), run.tokenizer.latent_shape
    recordings.latents = open_latents(job, run.tokenizer)
    job.configs["dynamics"] |= {"tokens": tokens, "channels": channels,
                                "tasks": len(run.spec.tasks)}
    cfg = DynamicsConfig(**job.configs["dynamics"])
    dynamics = Dynamics(cfg, run.spec.actions).to(job.device)
    if job.train.compile:
        compile_module(dynamics, job.device)

    def loss_fn(draws):
        batch, chosen = dynamics_batch(job, recordings, draws, cfg.single_images)
        levels = dynamics_levels(job, dynamics, batch, chosen, draws)
        batch = batch.rows(OWN_ROWS).to(job.device)
        levels = (x[OWN_ROWS] for x in levels)
        losses, _, metrics = dynamics_losses(dynamics, batch, *levels, draws.noise)
        if (draws.step + 1) % SAVE_EVERY == 0:
            metrics |= rollout_check(job, dataclasses.replace(run, dynamics=dynamics))
        return losses, metrics

    optimizers = make_optimizers([dynamics], job.train.lr_matrix, job.train.lr)
    fit(job, [dynamics], loss_fn, optimizers)
    save_stage(job, tokenizer=run.tokenizer, dynamics=dynamics)


def train_agent(job):
    """Section 3.3, Eq. 9: agent token and heads; the dynamics go on learning beside
    them."""
    run = open_stage(job, "dynamics")
    recordings, dynamics, spec = Recordings(job), run.dynamics, run.spec
    recordings.latents = open_latents(job, run.tokenizer)
    cfg, dyn = AgentConfig(**job.configs["agent"]), dynamics.cfg
    dynamics.requires_grad_(True)
    if not cfg.pretrained:
        dynamics = Dynamics(dyn, spec.actions).to(job.device)
    agent = Agent(cfg, dyn.dim, spec.actions, len(spec.tasks)).to(job.device)
    if job.train.compile:
        compile_module(dynamics, job.device)

    def loss_fn(draws):
        # the last rows show their task being done, or the way there, and are cloned; the
        # others are anywhere
        B, T = batch_shape(job.train, draws.step, job.steps)
        n = min(round(RELEVANT * B / PROCESSES), B // PROCESSES - 1)    # in each process
        others = B - n * PROCESSES
        kinds = recordings.anywhere(others, T)
        kinds += recordings.cloned(B - others, T, cfg.prompt_order)
        batch = recordings.read(draws.rng, kinds)
        cloned = torch.arange(B) >= others
        single = torch.from_numpy(draws.rng.random(B) < dyn.single_images) & ~cloned
        if not recordings.labelled.all():   # the first rows have bootstrap: of any kind
            order = [draws.rng.permutation(others), np.arange(others, B)]
            batch = batch.rows(np.concatenate(order))

        # the others have the dynamics' loss; the policy will act on committed frames, so
        # cloned rows are shown as such, and a quarter of the others for the reward head
        tau, d = sample_tau_d(B, T, dyn.k_max, round(dyn.p_boot * others), draws.levels)
        if cfg.bc_level == "context":
            as_context = torch.arange(B) >= others - others // 4
            tau, d = show_as_context(tau, d, as_context[:, None], dynamics)
        weight = torch.where(cloned[:, None], 0.0, frame_weight(tau, dyn))

        # the reward head is asked about the task, the agent token told it as a prompt
        batch = batch._replace(single=single).rows(OWN_ROWS).to(job.device)
        prompted = batch._replace(task=agent.prompt(batch.task))
        levels = (x[OWN_ROWS] for x in (tau, d, weight))
        losses, h, metrics = dynamics_losses(dynamics, prompted, *levels, draws.noise)
        cloned = cloned[OWN_ROWS].to(job.device)
        more, more_metrics = agent_losses(agent, h, batch, cloned)
        # an action counts alike in whichever process it is
        own = cloned_targets(batch, cloned).sum().float()
        mean = over_processes(own, dist.ReduceOp.SUM).clamp_min(1) / PROCESSES
        more["bc"] = more["bc"] * (own / mean)
        if not cfg.pretrained:
            losses = {}
        if (draws.step + 1) % SAVE_EVERY == 0:
            metrics |= imitation_check(job, recordings, dynamics, agent)
        return {**losses, **more}, {**metrics, **more_metrics}

    modules, train = [dynamics, agent], job.train
    optimizers = make_optimizers(modules, train.lr_matrix / 2, train.lr / 2)
    fit(job, modules, loss_fn, optimizers, {"bc": cfg.bc_weight})
    agent.freeze_prior()
    agent.sharpen(cfg.temperature)
    save_stage(job, tokenizer=run.tokenizer, dynamics=dynamics, agent=agent)


def train_imagine(job):
    """Section 3.3, Eq. 10 and 11: policy and value head learn from imagined rollouts alone.
    Every process computes all of it."""
    run = open_stage(job, "agent")
    cfg = AgentConfig(**job.configs["agent"])       # with what the agent stage fixed
    if cfg.k > run.dynamics.cfg.k_max:
        raise UserError(f"Got agent.k {cfg.k}, need at most the dynamics' k_max, "
                        f"{run.dynamics.cfg.k_max}.")
    ordered = cfg.imagined_tasks == "prompt_order"
    recordings, agent, train = Recordings(job, ordered), run.agent, job.train
    recordings.latents = open_latents(job, run.tokenizer)
    agent.cfg = dataclasses.replace(cfg, end_on_event=cfg.end_on_event
                                    and not run.spec.returns)
    agent.policy.requires_grad_(True)
    agent.value.requires_grad_(True)
    world = freeze(copy.deepcopy(run.dynamics), job.device, job.args.dtype)
    if train.compile:
        compile_module(world, job.device)
    n = round(RELEVANT * train.imagine_batch)

    def loss_fn(draws):
        # n contexts have their event in the frames to be imagined
        kinds = recordings.anywhere(train.imagine_batch - n, cfg.context, edges=False)
        kinds += recordings.before_event(n, cfg.context, cfg.horizon, not ordered)
        batch = recordings.read(draws.rng, kinds).to(job.device)
        prompted = batch._replace(task=agent.prompt(batch.task))
        dream = dream_of(world, agent, draws.noise)
        rollout = imagine_rollout(dream, agent, prompted, cfg.horizon)
        task = batch.task[:, -1]
        losses, metrics = imagination_losses(agent, rollout.h, rollout.actions, task)
        if draws.step < min(VALUE_FIRST, job.steps // 3):
            del losses["policy"]
        return losses, metrics

    # the value head starts from nothing and must be ahead
    groups = [{"params": agent.policy.parameters(), "lr": train.lr_policy},
              {"params": agent.value.parameters(), "lr": 3 * train.lr_policy}]
    fit(job, [agent], loss_fn, [torch.optim.AdamW(groups, weight_decay=0.0)])
    save_stage(job, tokenizer=run.tokenizer, dynamics=run.dynamics, agent=agent)


# ---------------------------------------------------------------------------------- main

TRAINERS = {"tokenizer": train_tokenizer, "dynamics": train_dynamics, "agent": train_agent,
            "imagine": train_imagine}


def pictures(job, run):
    """What a person looks at after a stage."""
    reference = play.reference_of(job.folder)
    if run.stage == "tokenizer":
        path = job.folder / "tokenizer_reconstructions.png"
        play.picture_reconstructions(run, reference, path, dtype=job.args.dtype)
    elif run.stage != "imagine":
        film = play.dream_film(run, reference, dtype=job.args.dtype)
        play.write_film(job.folder / "dream.gif", film)
    play.picture_curves(job.folder, run.stage)


def run_stage(job, stage):
    """Train a stage, or see that it is there; then what a person looks at."""
    job.stage, job.steps = stage, getattr(job.train, f"{stage}_steps")
    job.began, job.provenance = time.perf_counter(), provenance_of(job, stage)
    final = job.folder / f"{stage}.pt"
    if job.args.resume == "no" and job.args.replay is None:
        for path in (final, *resume_paths(job)):
            path.unlink(missing_ok=True)
    trained = not final.exists() or job.args.replay is not None
    if trained:
        rng = rng_for(job.args.seed, f"{stage} weights", 0)
        torch.manual_seed(int(rng.integers(2 ** 31)))
        TRAINERS[stage](job)
        if RANK == 0:
            play.forget_results(job.folder)     # they were of what was there before
    run = open_stage(job, stage)            # reads back what was written
    if not trained:
        refuse_flags(job, run)
        now, then = made_with(job), run.meta["made_with"]
        other = [f"{name} {then[name]}" for name in then if then[name] != now.get(name)]
        print(f"Stage {stage}: {final} is there, made with {', '.join(other) or 'the same'}"
              "; --resume no trains it again.")
    if RANK == 0 and (trained or not (job.folder / f"{stage}_curves.png").exists()):
        write_json(job.folder / "config.json", job.configs)
        pictures(job, run)


def check_plan(job, stages):
    """UserError, before anything is trained, where one of the stages couldn't be."""
    recordings, data, train = Recordings(job), job.dataset, job.train
    cfg, path = AgentConfig(**job.configs["agent"]), job.dataset.path
    longest = max(train.length, train.long_length if train.long_share > 0 else 0)
    frames = {"tokenizer": train.tokenizer_length, "dynamics": longest, "agent": longest,
              "imagine": cfg.context}
    for stage in stages:
        if not len(data.long_enough(Windows(frames[stage]))):
            raise UserError(f"Got training episodes of at most {data.lengths.max()} frames "
                            f"in {path}, need {frames[stage]} for stage {stage}: record "
                            "longer ones, or shorten --train.tokenizer_length, "
                            "--train.length, --train.long_length or --agent.context "
                            "(--train.long_share 0: no long windows).")
    if not {"agent", "imagine"} & set(stages):
        return

    # what the policy imitates, and what it is asked to do
    alone = "or train --stage tokenizer and --stage dynamics alone."
    if data.spec.actions.numbers:
        raise UserError(f"Got continuous actions in {path}, need classes for the policy: "
                        f"discretise them, {alone}")
    if not data.spec.tasks:
        raise UserError(f"Got no tasks in {path}, need one for the policy: name some in "
                        f"the EnvSpec, {alone}")
    if not recordings.any_labelled():
        raise UserError(f"Got {path} without labelled frames, need actions for the policy: "
                        f"add some (--data.labels), {alone}")
    rows = map(data.rows, data.episodes("train"))
    if data.spec.returns and not any(row["events"][:, 0].any() for row in rows):
        raise UserError(f"Got no reward at all in {path}, need some to learn from: record "
                        f"more play, {alone}")
    kinds, every = [], cfg.imagined_tasks == "all"
    if "agent" in stages:
        kinds += recordings.cloned(2, train.length, 0.0)
        kinds += recordings.cloned(2, longest, 0.0)
    if "imagine" in stages:
        kinds += recordings.before_event(2, cfg.context, cfg.horizon, every)
    for n, windows in kinds:
        if n and windows.relevant and not len(data.windows_with_event(windows)[0]):
            raise UserError(f"Got training episodes in {path} in which no task of the "
                            f"prompts is done in a window of {windows.length} frames, need "
                            "one to imitate: record more play, --train.long_share 0 (no "
                            f"long windows), --agent.imagined_tasks all, {alone}")


def note_minutes(folder, seconds):
    """{part of the work: seconds} go into results.json."""
    rows = [play.Result("wall_minutes", s / 60, None, None, 1, "min", {"part": part})
            for part, s in seconds.items()]
    play.add_results(folder, this_command(), rows)


def worlds_of(dataset, env):
    """Seeds of the worlds of `env` in which a dataset was recorded, as far as is known."""
    settings = dataset.settings
    if settings.get("env") != env or "seed" not in settings:
        return range(0)
    return range(settings["seed"], settings["seed"] + settings["episodes"])


def check_seeds(seeds, path):
    """UserError where recordings of the worlds `seeds` are no play to train on."""
    judged = play.JUDGED
    if seeds.start < judged.stop and seeds.stop > judged.start:
        raise UserError(f"Got the worlds {seeds.start} to {seeds.stop - 1} in {path}, need "
                        f"none of {judged.start} to {judged.stop - 1}, in which agents and "
                        "world models are judged: record fewer, or with another seed.")


def check_recordings(data, dataset, reference):
    """UserError where recordings can't be trained on, or judge what they taught."""
    for recorded in (dataset, reference):
        check_world(data.env, recorded)
    if reference.path.resolve() == dataset.path.resolve():
        raise UserError(f"Got {dataset.path} to train on and as --data.reference, need "
                        "another dataset to judge by: record one with another seed.")
    seeds = worlds_of(dataset, data.env)
    if seeds:
        check_seeds(seeds, dataset.path)
    if set(seeds) & set(worlds_of(reference, data.env)):
        raise UserError(f"Got worlds of {dataset.path} in {reference.path} too, need others"
                        " to judge by: record --data.reference with another seed.")
    if not len(dataset.episodes("valid")):
        raise UserError(f"Got 1 episode in {dataset.path}, which leaves none to hold out, "
                        "need at least 2: record more.")


def prepare(args, configs, device):
    """Run folder and recordings -> Job."""
    begin = time.perf_counter()
    data, train = configs["data"], TrainConfig(**configs["train"])
    if recordings := getattr(make_env(data["env"]), "recordings", None):
        # nobody can play them: the model is judged by those that were held out
        data |= {"path": data["path"] or recordings[0], "eval_episodes": 0,
                 "reference": data["reference"] or recordings[1]}
    data = DataConfig(**data)
    changed = {f"{prefix}.{key}": value for prefix, config in configs.items()
               for key, value in config.items() if value != getattr(CONFIGS[prefix](), key)}
    folder = Path("runs") / args.run
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Run {folder}, preset {args.preset}, {device}, changed: {changed or 'nothing'}")
    name = f"{file_name(data.env)}_{data.episodes}x{data.length}"
    path = Path(data.path or f"datasets/{name}")
    with in_turn():
        if args.base:
            take_stages(Path("runs") / args.base, folder, args.stage)
        if not data.path:
            check_seeds(range(data.episodes), path)
            record(data.env, path, data.episodes, data.length, 0)
        reference = play.reference_set(data.env, data.reference_episodes, data.length,
                                       data.reference)
        if data.path and not data.reference:
            print(f"Judged by {reference.path}, what {data.env}'s own player does, whatever"
                  f" {path} holds; --data.reference names another dataset.")
        of = {"part": "record"}
        if RANK == 0 and not play.find(play.read_results(folder), "wall_minutes", of):
            note_minutes(folder, {"record": time.perf_counter() - begin})
    dataset = Dataset(path)
    check_recordings(data, dataset, reference)
    return Job(args, folder, configs, data, train, device, dataset)


def finish(job):
    """Evaluation and report; the whole run's minutes, without breaks and lost work."""
    data, folder, begin = job.data, job.folder, time.perf_counter()
    if job.args.stage == "all":
        play.evaluate(folder, job.device, job.args.dtype, data.eval_episodes,
                      data.eval_length)
        seconds = {stage: load_checkpoint(folder / f"{stage}.pt")["seconds"]
                   for stage in STAGES}
        seconds["evaluation"] = time.perf_counter() - begin
        recorded = play.find(play.read_results(folder), "wall_minutes", {"part": "record"})
        seconds["total"] = sum(seconds.values()) + 60 * recorded.value
        note_minutes(folder, seconds)
        print(play.headlines(folder))
        if job.args.preset == "smoke":
            print("This was a toy run to see that all works: its figures mean nothing.")
    report = play.write_report(folder)
    print(f"Done. Look at {report} and its pictures.")


def check_compiler():
    """UserError where torch can't make the folder of its compiler, which optimizers want
    too, and which it asks for when the first one is made."""
    try:
        torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    except OSError as error:
        raise UserError(f"Got no folder for the compiler ({error}), need one that can be "
                        "written: set TORCHINDUCTOR_CACHE_DIR to such a one.") from None


def main():
    args, configs = parse()
    check_compiler()
    device = join_processes(pick_device(args.device))
    args.dtype = pick_dtype(device, args.dtype)
    if configs["tokenizer"]["lpips"]:
        lpips_loss()                        # missing? say so before anything is recorded
    job = prepare(args, configs, device)
    stages = STAGES if args.stage == "all" else [args.stage]
    check_plan(job, stages)
    for stage in stages:
        run_stage(job, stage)
    if RANK == 0:
        finish(job)


if __name__ == "__main__":
    run_cli(main)
