"""Training: the four stages of Dreamer 4, each on what the one before it made.

    python train.py                     all stages, evaluation, report, with this machine's preset
    python train.py --stage dynamics    one stage (tokenizer, dynamics, agent, imagine)
    torchrun --nproc_per_node 2 -- train.py --stage dynamics    the same batch split over processes
Every config field is a flag: --dynamics.k_max 32. A run lives in runs/NAME: STAGE.pt, config.json,
metrics.jsonl, pictures, results.json, report.md. A step's randomness is (seed, stage, step)'s, so
that a run goes on exactly after any interruption, and --replay STEP shows a step again.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import datetime
import filecmp
import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import play
from agent import (
    STAGES,
    VERSION,
    Agent,
    AgentConfig,
    agent_losses,
    autocast,
    freeze,
    imagination_losses,
    imagine_rollout,
    load_checkpoint,
    load_run,
    pick_device,
    pick_dtype,
)
from data import (
    TYPES,
    Dataset,
    UserError,
    check_config,
    column,
    read_json,
    record,
    rng_for,
    run_cli,
    write_whole,
)
from dynamics import Dream, Dynamics, DynamicsConfig, dynamics_losses
from envs.minecraft import env_spec
from tokenizer import (
    Block,
    LossNormalizer,
    Tokenizer,
    TokenizerConfig,
    latent_health,
    lpips_loss,
    mae_mask,
    reconstruction_loss,
    scale_pixels,
)


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
        check_config("data", self, zero=("seed", "workers", "eval_episodes"), shares=("labels",))


@dataclass
class TrainConfig:
    """Steps, batches and learning rates."""
    tokenizer_steps: int = 2000
    tokenizer_batch: int = 16
    tokenizer_length: int = 8   # frames
    dynamics_steps: int = 2400
    agent_steps: int = 3600
    imagine_steps: int = 540
    batch: int = 32             # of short windows; long ones hold as many frames in all
    length: int = 16            # 64 (T1)
    long_length: int = 48       # 256 (T2), longer than dynamics.context
    long_share: float = 0.25    # of the steps; the last tenth is long only
    relevant: float = 0.0       # share of the dynamics' rows that show a task being done
    drawn: float = 0.0          # above 0: those rows are as in a dream, from nothing where an event
                                # is and at this share of the other frames, the rest committed
    boot_after: float = 0.0     # share of the dynamics' steps before bootstrap rows come in
    imagine_batch: int = 64
    lr_matrix: float = 6e-3     # Muon: 2-D matrices of the transformers
    lr: float = 3e-3            # AdamW: everything else
    lr_policy: float = 1e-3     # AdamW in imagination
    lr_value: float = 3e-3      # AdamW in imagination: starts from nothing, must be ahead
    warmup: int = 50            # steps, at most a tenth of the stage
    value_first: int = 20       # imagination steps in which only the value head learns
    cooldown: float = 0.3       # share of a stage in which the rate falls to 0
    clip: float = 1.0           # gradient norm
    compile: bool = True        # torch.compile of the transformer's blocks
    log_every: int = 25
    check_every: int = 250      # steps between looks at dreams, or at imitation
    save_every: int = 250

    def __post_init__(self):
        check_config("train", self, zero=("warmup", "value_first"),
                     shares=("long_share", "relevant", "drawn", "boot_after", "cooldown"))
        for name in ("tokenizer_batch", "batch", "length", "imagine_batch"):
            if getattr(self, name) < 2:
                raise UserError(f"Got train.{name} {getattr(self, name)}, need at least 2.")
        if self.drawn and not self.relevant:
            raise UserError(f"Got train.drawn {self.drawn} and train.relevant 0, need rows that "
                            "show a task being done: add --train.relevant, or --train.drawn 0.")


LATENT_CHUNK = 256          # frames of an episode that are encoded at once
HEADS = ("hidden", "mtp", "bins", "terminal_weight", "bc_weight", "prompts",
         "pretrained")                                  # agent settings that its stage fixes
FREE = ("train.compile", "train.log_every", "train.check_every",
        "train.save_every")                             # may differ after a break
HEALTH = {      # metric: lowest and highest healthy value, likely cause outside (README, "Metrics")
    "latent_rank": (2.0, np.inf, "latents collapse: all frames look alike to the dynamics"),
    "tanh_saturated": (0.0, 0.3, "latents saturate: learning rate too high, or LPIPS outweighs"),
    "grad_norm": (1e-6, 100.0, "training is about to diverge, or nothing is learned"),
    "entropy": (0.02, np.inf, "policy collapsed onto one action: raise --agent.pmpo_beta"),
    "kl_prior": (0.0, 1.0, "policy left the data's actions: raise --agent.pmpo_beta"),
    "value_explained": (-0.5, np.inf, "value head does not follow the returns: --train.lr_value"),
    "positive_share": (0.05, 0.95, "nearly all actions count as good, or bad: --train.lr_value"),
}
TOKENIZER_SHARE = 0.16      # of the cpu preset's wall time, measured
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
    # a token for each cell of Crafter's grid: 2 to 3 times the work of a frame, far fewer steps
    "cpu_long": {"data.episodes": 640, "tokenizer.patch": 8, "tokenizer.cell": 0,
                 "tokenizer.latents": 81, "tokenizer.channels": 8, "tokenizer.dim": 128,
                 "tokenizer.heads": 2, "tokenizer.kv_heads": 1, "tokenizer.encoder_layers": 3,
                 "tokenizer.decoder_layers": 3, "dynamics.dim": 128, "dynamics.heads": 2,
                 "dynamics.kv_heads": 1, "dynamics.layers": 6, "dynamics.time_every": 3,
                 "train.batch": 16, "train.imagine_batch": 32, "agent.horizon": 6,
                 "agent.ladder": 0.5, "train.cooldown": 0.65, "train.relevant": 0.6,
                 "train.drawn": 0.25, "train.boot_after": 0.6,
                 "train.tokenizer_steps": 500, "train.dynamics_steps": 5000,
                 "train.agent_steps": 2400, "train.imagine_steps": 900,
                 "data.eval_episodes": 200},
    # real Minecraft (README, "Minecraft"), both never run: 'minecraft' by --stage sizes fits into
    # 80 GB; 'paper' has the paper's sizes as far as it gives them, and no plan for the memory
    "minecraft": {"data.env": "minerl", "data.path": "datasets/minecraft",
                  "data.reference": "datasets/minecraft_reference", "data.eval_episodes": 10,
                  "data.eval_length": 72000, "tokenizer.height": 128, "tokenizer.width": 128,
                  "tokenizer.patch": 8, "tokenizer.cell": 0, "tokenizer.dim": 512,
                  "tokenizer.encoder_layers": 8, "tokenizer.decoder_layers": 8,
                  "tokenizer.heads": 4, "tokenizer.kv_heads": 4, "tokenizer.latents": 128,
                  "tokenizer.channels": 16, "tokenizer.pack": 2,
                  "tokenizer.context": 16, "tokenizer.mae_max": 0.9, "dynamics.dim": 1024,
                  "dynamics.layers": 16, "dynamics.time_every": 4,
                  "dynamics.heads": 8, "dynamics.kv_heads": 2, "dynamics.registers": 16,
                  "dynamics.context": 96, "dynamics.k_max": 64, "agent.hidden": 512,
                  "agent.context": 32, "agent.horizon": 15, "agent.gamma": 0.997,
                  "agent.k": 0, "agent.finest": False,
                  "train.lr_policy": 5e-4, "train.batch": 16, "train.length": 32,
                  "train.long_length": 128, "train.imagine_batch": 64,
                  "train.tokenizer_steps": 100000, "train.dynamics_steps": 200000,
                  "train.agent_steps": 50000, "train.imagine_steps": 5000,
                  "train.lr_matrix": 2e-3, "train.lr": 5e-4, "train.warmup": 1000},
    "paper": {"data.env": "minerl:384x640", "data.path": "datasets/minecraft_384x640",
              "data.reference": "datasets/minecraft_384x640_reference", "data.eval_episodes": 1000,
              "data.eval_length": 72000, "tokenizer.height": 384, "tokenizer.width": 640,
              "tokenizer.patch": 16, "tokenizer.cell": 0, "tokenizer.dim": 1024,
              "tokenizer.encoder_layers": 16, "tokenizer.decoder_layers": 16,
              "tokenizer.heads": 8, "tokenizer.kv_heads": 8,
              "tokenizer.latents": 512, "tokenizer.channels": 16, "tokenizer.pack": 2,
              "tokenizer.context": 48, "tokenizer.local": False, "tokenizer.mae_max": 0.9,
              "tokenizer.lpips": 0.2, "dynamics.dim": 2048, "dynamics.layers": 36,
              "dynamics.time_every": 4, "dynamics.heads": 16, "dynamics.kv_heads": 4,
              "dynamics.registers": 32, "dynamics.context": 192, "dynamics.k_max": 64,
              "dynamics.p_boot": 1.0, "dynamics.single_images": 0.3, "agent.bc_level": "uniform",
              "agent.hidden": 2048, "agent.horizon": 15, "agent.gamma": 0.997, "agent.k": 0,
              "agent.finest": False,
              "train.lr_policy": 5e-4, "train.length": 64, "train.long_length": 256,
              "train.tokenizer_length": 64, "train.lr_matrix": 1e-3, "train.lr": 2e-4,
              "train.warmup": 1000},
}


# cpu_long with wider dynamics, more rows and play; uncompiled: on a GPU compiling takes minutes
PRESETS["gpu"] = {**PRESETS["cpu_long"], "data.episodes": 1280, "dynamics.dim": 256,
                  "dynamics.heads": 4, "dynamics.kv_heads": 2, "train.batch": 48,
                  "train.imagine_batch": 128, "train.lr_matrix": 5e-3, "train.lr": 2e-3,
                  "train.compile": False, "train.tokenizer_steps": 2000,
                  "train.dynamics_steps": 8000, "train.agent_steps": 3000}


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
    parser.add_argument("--base", metavar="RUN", help="take the stages before --stage from this "
                        "run, where --run has none: other settings or seeds on what it learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto: cuda, then mps, then cpu")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp16, fp32")
    parser.add_argument("--resume", choices=("auto", "no", "anyway"), default="auto",
                        help="auto: go on where the run folder stands; no: train again; anyway: "
                        "go on with another dataset or tokenizer than it was made with, too")
    parser.add_argument("--replay", type=int, metavar="STEP", help="run one step of --stage again "
                        "with the last checkpoint's weights, show its losses, change nothing")
    for prefix, config in CONFIGS.items():
        for field in dataclasses.fields(config):
            kind = to_bool if field.type is bool else field.type
            parser.add_argument(f"--{prefix}.{field.name}", type=kind, default=argparse.SUPPRESS,
                                metavar=field.type.__name__, help=f"default {field.default}")
    args = parser.parse_args(argv)
    args.preset = args.preset or ("gpu" if pick_device(args.device).type == "cuda" else "cpu")
    args.given = {k: v for k, v in vars(args).items() if "." in k}
    chosen = {**PRESETS[args.preset], **args.given}
    configs = {prefix: {f.name: chosen.get(f"{prefix}.{f.name}", f.default)
                        for f in dataclasses.fields(config)} for prefix, config in CONFIGS.items()}
    for prefix, config in CONFIGS.items():
        config(**configs[prefix])                   # a bad value is one line, before anything runs
    if not 0 <= args.seed < 2 ** 63:
        raise UserError(f"Got --seed {args.seed}, need a whole number from 0.")
    steps = configs["train"].get(f"{args.stage}_steps", 0)
    if args.replay is not None and not 0 <= args.replay < steps:
        raise UserError(f"Got --replay {args.replay} --stage {args.stage}, need one stage and a "
                        "step of it, counted from 0.")
    if 0 < configs["train"]["long_share"] and (configs["train"]["long_length"]
                                               <= configs["dynamics"]["context"]):
        raise UserError(f"Got train.long_length {configs['train']['long_length']}, need more than "
                        f"dynamics.context {configs['dynamics']['context']}: else every frame that "
                        "the model sees has the start of the window in sight.")
    check_steps(configs)
    args.run = args.run or configs["data"]["env"].split(":")[0]
    if args.base and (args.stage not in STAGES[1:] or args.base == args.run):
        raise UserError(f"Got --base {args.base} --run {args.run} --stage {args.stage}, need one "
                        f"stage of {STAGES[1:]} and another run.")
    return args, configs


def check_steps(configs):
    k, finest = configs["agent"]["k"], configs["dynamics"]["k_max"]
    if k & (k - 1) or k > finest:
        raise UserError(f"Got agent.k {k}, need a power of two up to dynamics.k_max {finest}, the "
                        "step sizes that the dynamics learn, or 0.")


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
    mark: float = 0.0           # when the stage began, were it not for breaks

    @functools.cached_property
    def known(self):
        return known_actions(self)

    @functools.cached_property
    def prompts(self):
        return play.ladder_prompts(self.dataset)

    def to_device(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


# ------------------------------------------------------------------------------- training loop

class Muon(torch.optim.Muon):
    """torch's Muon (nesterov, match_rms_adamw), with the matrices of one shape stepped together:
    one by one, a GPU waits for thousands of small launches."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike, (a, b, c) = {}, group["ns_coefficients"]
            assert group["nesterov"] and group["adjust_lr_fn"] == "match_rms_adamw", group
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for (rows, columns), params in alike.items():
                grads = [p.grad for p in params]
                momenta = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"])).bfloat16()
                x = x.mT if rows > columns else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(group["eps"])
                for _ in range(group["ns_steps"]):      # Newton-Schulz: singular values go to 1
                    gram = x @ x.mT
                    gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
                    x = torch.baddbmm(x, gram, x, beta=a)
                x = (x.mT if rows > columns else x).float()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(x.unbind()),   # as long as a step of AdamW
                                    alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def make_optimizers(modules, lr_matrix, lr):
    """Muon for the matrices inside transformer blocks, AdamW without decay for the rest."""
    named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if "blocks." in n and p.ndim == 2]
    rest = [p for n, p in named if not ("blocks." in n and p.ndim == 2)]
    return [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
            Muon(matrices, lr=lr_matrix, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def schedule(step, steps, warmup, cooldown):
    """Share of the peak rate: linear up, flat, linear down to 0."""
    return min(1.0, (step + 1) / max(warmup, 1), (steps - step) / max(cooldown * steps, 1))


# ------------------------------------------------------------- data parallel: torchrun train.py

def rank():
    """Number of this process. Process 0 writes, the others only compute."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def in_turn():
    """Process 0 first; then the others, which find on disk what it made."""
    if rank():
        dist.barrier()
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()


def split_rows(*modules):
    """Each process runs `forward` on its share of the rows and gets the outputs of all rows. From
    there on every process computes the whole batch's losses: their means and masks stay exact.
    subtle: a row's gradient arises in one process, that of the heads behind in all n alike. With
    the rows' times n, the mean over processes (`fit`) is the whole batch's gradient of both."""
    def each(change, x):                                # tensors (B, ...), in dicts and tuples
        if isinstance(x, dict):
            return {k: each(change, v) for k, v in x.items()}
        if isinstance(x, tuple):
            return tuple(each(change, v) for v in x)
        return x if x is None else change(x)

    def split(forward, *inputs, **named):
        B, n = len(inputs[0]), dist.get_world_size()
        begin, end = B * rank() // n, B * (rank() + 1) // n

        def whole(x):
            before, after = (x.new_zeros(k, *x.shape[1:]) for k in (begin, B - end))
            x = torch.cat([before, x, after])
            dist.all_reduce(rows := x.detach().clone())
            return rows + n * (x - x.detach())

        if B < n or named.get("cache"):                 # too few, or a dream: all in every process
            return forward(*inputs, **named)
        inputs, named = each(lambda x: x[begin:end], (inputs, named))
        return each(whole, forward(*inputs, **named))

    for module in modules if dist.is_initialized() else ():
        module.forward = functools.partial(split, module.forward)


def average_gradients(parameters):
    for p in parameters if dist.is_initialized() else ():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def any_process(noted, device):
    """The signal that a process has noted, 0 for none: all stop after the same step."""
    if not dist.is_initialized():
        return sum(noted)
    dist.all_reduce(flag := torch.tensor(sum(noted), device=device), dist.ReduceOp.MAX)
    return int(flag)


def join_processes(device):
    """Under torchrun: meet the other processes -> this process's device."""
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        # subtle: gloo's threads abort a process that ends while they are there
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        sys.stdout = open(os.devnull, "w") if rank() else sys.stdout
    return device


# ------------------------------------------------------------------------ checkpoints and the log

def save(path, state, keep=None):
    def write(file):
        try:
            torch.save({"version": VERSION, **state}, file)
        except RuntimeError as error:                       # torch's way to say so
            raise OSError(error) from None
    write_whole(path, write, keep)


def resume_paths(job, stage):
    """Newest and second newest checkpoint inside a stage."""
    return job.folder / f"{stage}.resume.pt", job.folder / f"{stage}.resume.old.pt"


def load_resume(job, stage, made_of):
    """The newest of the two checkpoints that can be read, or None. UserError where there are only
    damaged ones, or the settings, the recordings or the tokenizer differ from then."""
    faults, parts = [], {"step", "made_of", "sums", "seconds", "state"}
    for path in filter(Path.exists, resume_paths(job, stage)):
        try:
            state = load_checkpoint(path, job.device)
            if not parts <= set(state):
                raise UserError(f"Got {path}, which other code wrote, need {sorted(parts)} in it: "
                                "start this stage again with --resume no.")
        except UserError as error:
            faults.append(f"{error}")
            continue
        for fault in faults:
            print(f"warning: {fault} Going on from the one before, step {state['step']}.")
        for key, now in made_of.items():
            then, lifted = state["made_of"].get(key), key == "dataset" or "weights" in key
            if then != now and not (lifted and job.args.resume == "anyway"):
                raise UserError(f"Got {key} {now}, {path} was begun with {then}: repeat the "
                                "settings of then, or start this stage again with --resume no"
                                + ", or go on with --resume anyway" * lifted + ".")
        return state
    if faults:
        raise UserError(" And: ".join(faults))


def fingerprint(module):
    """sha256 of a module's weights."""
    weights = (x.float().cpu().numpy().tobytes() for x in module.state_dict().values())
    return hashlib.sha256(b"".join(weights)).hexdigest()


def save_stage(job, stage, step, made_of, **modules):
    """runs/NAME/STAGE.pt: all that load_run needs. made_of: what the stage began with, as in fit;
    so that it is noticed where a stage before it was trained again."""
    try:
        commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:                                 # no git on this machine
        commit = ""
    with in_turn():
        if rank():
            return
        save(job.folder / f"{stage}.pt",
             {"stage": stage, "step": step, "commit": commit, "made_of": made_of,
              "dataset": job.dataset.fingerprint,
              "spec": job.dataset.spec.to_json(), "config": job.configs,
              "seconds": time.perf_counter() - job.mark,
              **{name: module.state_dict() for name, module in modules.items()}})
        for path in resume_paths(job, stage):
            path.unlink(missing_ok=True)


class Log:
    """Means of the metrics between two lines of runs/NAME/metrics.jsonl; `sums`: those that a
    checkpoint has kept since the last line."""

    def __init__(self, folder, stage, start, sums):
        self.path, self.stage, self.mark = folder / "metrics.jsonl", stage, (None, None)
        self.sums, self.warned = {k: tuple(x) for k, x in sums.items()}, set()
        lines = [json.dumps(x) + "\n" for x in play.read_metrics(folder)
                 if x["stage"] != stage or x["step"] <= start]      # later ones come again
        if rank() == 0:
            write_whole(self.path, lambda file: file.write("".join(lines).encode()))

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
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def warn(self, line):
        """What is outside HEALTH in a line of write(), once each: lines for the user."""
        for key, (low, high, cause) in HEALTH.items():
            if key in line and not low <= line[key] <= high and key not in self.warned:
                self.warned.add(key)
                yield (f"warning: {key} {line[key]:.3g} at step {line['step']} of {self.stage}, "
                       f"healthy is {low:g} to {high:g}: {cause}. README, tip '{key}'.")


@contextlib.contextmanager
def gentle_stop():
    """Yields a list: the first SIGINT or SIGTERM is noted in it, the second stops at once."""
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt(128 + number)
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def replay(step, losses, modules):
    """What --replay STEP ends with."""
    norms = {name: float(p.grad.norm()) for module in modules
             for name, p in module.named_parameters() if p.grad is not None}
    print(f"step {step}:", ", ".join(f"{k} {float(x):.6g}" for k, x in losses.items()))
    print(f"gradient norm {sum(x * x for x in norms.values()) ** 0.5:.6g}, of which")
    print(*(f"  {name} {norm:.6g}" for name, norm in norms.items()), sep="\n")
    sys.exit(0)


def fit(job, stage, modules, loss_fn, names, optimizers, weights=(), made_of=()):
    """The loop of every stage. loss_fn(rng, generator, step) -> losses by name, metrics. made_of:
    fingerprints of the modules that the stage began with."""
    cfg, steps, seed = job.train, getattr(job.train, f"{stage}_steps"), job.args.seed
    normalizer = LossNormalizer(names).to(job.device)
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.args.dtype == "fp16")
    stateful = [*modules, normalizer, *optimizers, scaler]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    others = tuple(f"train.{s}_" for s in STAGES if s != stage)     # settings of other stages
    used = [*STAGES[:min(STAGES.index(stage), 2) + 1], "train"]
    settings = {f"{p}.{k}": v for p in used for k, v in job.configs[p].items()}
    made_of = {"seed": seed, "dtype": job.args.dtype, "dataset": job.dataset.fingerprint,
               **{f"{k} weights": v for k, v in dict(made_of).items()},
               **{k: v for k, v in settings.items() if k not in FREE and not k.startswith(others)}}
    state, shown = load_resume(job, stage, made_of), job.args.replay
    if state is None:
        state = {"step": 0, "sums": {}, "seconds": 0.0, "state": [x.state_dict() for x in stateful]}
        if shown is not None and (job.folder / f"{stage}.pt").exists():         # a finished stage
            done = load_checkpoint(job.folder / f"{stage}.pt", job.device)
            state["step"] = done["step"]
            state["state"][:len(modules)] = [done[type(m).__name__.lower()] for m in modules]
    for x, saved in zip(stateful, state["state"], strict=True):
        x.load_state_dict(saved)
    start, job.mark = state["step"], job.mark - state["seconds"]
    if shown is not None:
        print(f"Step {shown} with the weights that the last checkpoint has, of step {start}.")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    print(f"Stage {stage}: {sum(p.numel() for p in parameters):,} parameters, steps {start} to "
          f"{steps}, {job.device} {job.args.dtype}, dataset {job.dataset.frames_total:,} frames in "
          f"{len(job.dataset.lengths)} episodes, every 20th kept for validation.", flush=True)
    log = Log(job.folder, stage, start, state["sums"]) if shown is None else None
    todo = range(start, steps) if shown is None else [shown]
    bar = tqdm(todo, stage, steps, initial=start, disable=rank() > 0 or shown is not None)
    with gentle_stop() as stopped:
        for step in bar:
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * schedule(step, steps, min(cfg.warmup, steps // 10),
                                              cfg.cooldown)
            rng = rng_for(seed, stage, step)
            generator = torch.Generator(job.device).manual_seed(int(rng.integers(2 ** 31)))
            with autocast(job.device, job.args.dtype):
                losses, metrics = loss_fn(rng, generator, step)
            total = normalizer(losses, weights)
            scaler.scale(total).backward()
            average_gradients(parameters)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            if shown is not None:
                replay(step, losses, modules)
            norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
            if not torch.isfinite(total) or not (scaler.is_enabled() or torch.isfinite(norm)):
                raise UserError(
                    f"Got a loss of {float(total)}, gradient norm {float(norm)} at step {step} of "
                    f"{stage} (seed {seed}); the last checkpoint is kept: look with --stage "
                    f"{stage} --replay {step}, or try a lower --train.lr_matrix and --train.lr.")
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            log.add({**losses, **metrics, "grad_norm": norm})
            if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
                line = log.write(step + 1)
                for warning in log.warn(line) if step + 1 >= steps // 4 and rank() == 0 else ():
                    bar.write(warning, sys.stderr)
                bar.set_postfix({k: f"{line[k]:.3g}" for k in names if k in line}, refresh=False)
                if step + 1 == start + 2 * cfg.log_every and (job.args.preset, stage) == (
                        "cpu", "tokenizer"):
                    minutes = f"{steps / line['rate'] / 60 / TOKENIZER_SHARE:.0f} minutes"
                    bar.write(f"At this speed all stages together take about {minutes}.")
            signalled = any_process(stopped, job.device)
            if signalled or (step + 1) % cfg.save_every == 0 and step + 1 < steps:
                with in_turn():
                    state = {"step": step + 1, "made_of": made_of, "sums": log.sums,
                             "seconds": time.perf_counter() - job.mark,
                             "state": [x.state_dict() for x in stateful]}
                    if rank() == 0:
                        newest, before = resume_paths(job, stage)
                        save(newest, state, before)
            if signalled:
                raise KeyboardInterrupt(128 + signalled)
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
            block.project = torch.compile(block.project, dynamic=False)     # beside a cache
            block.finish = torch.compile(block.finish, dynamic=False)


# -------------------------------------------------------------------------------------- stages

def take_stages(base, folder, stage):
    """Link what the stages before `stage` made in the run `base` into a folder, where it is not
    there yet. No file of a run is ever changed, only replaced: links are as good as copies."""
    for name in [f"{s}.pt" for s in STAGES[:STAGES.index(stage)]] + ["latents.npy", "latents.json"]:
        source, target = base / name, folder / name
        if name.startswith("latents") and (target.exists() or not source.exists()):
            continue                                # the stage sees whether they fit, or makes them
        if not source.exists():
            raise UserError(f"No {name} in {base}: train its stages before {stage} first.")
        if target.exists() and not filecmp.cmp(source, target):
            raise UserError(f"Got --base {base.name}, but {target} is another one than {source}: "
                            "take another --run, or delete it.")
        if not target.exists():
            try:
                os.link(source, target)
            except OSError:                         # another disk
                write_whole(target, lambda file, source=source: file.write(source.read_bytes()))


def open_stage(job, stage):
    """The run as `stage` left it; its settings go on into job.configs. UserError where it was made
    of other play or another tokenizer, or a flag contradicts its settings."""
    run = load_run(job.folder, stage, job.device)
    now, then = job.dataset.spec.to_json(), run.spec.to_json()
    for key in (k for k in now if now[k] != then[k]):
        raise UserError(f"Got recordings of {key} {now[key]}, {run.path} was trained on "
                        f"{then[key]}: name the same --data.env and --data.path.")
    rests = {"dataset": (job.dataset.fingerprint, run.meta.get("dataset"))}
    if stage != "tokenizer" and (job.folder / "tokenizer.pt").exists():
        rests["tokenizer"] = (fingerprint(load_run(job.folder, "tokenizer", job.device).tokenizer),
                              fingerprint(run.tokenizer))
    before = STAGES[max(STAGES.index(stage) - 1, 0)]
    if run.meta.get("made_of") and (job.folder / f"{before}.pt").exists():
        weights = weights_of(load_run(job.folder, before, job.device))
        rests |= {k: (weights[k], made) for k, made in run.meta["made_of"].items()
                  if k != "tokenizer"}
    for name, (got, made) in rests.items():
        if got != made and job.args.resume != "anyway":
            raise UserError(f"Got {name} {got}, {run.path} was made with {made}: go back to that "
                            "one, train again with --resume no, or go on with --resume anyway.")
    for prefix in ("tokenizer", "dynamics", "agent"):
        if getattr(run, prefix):
            saved = run.meta["config"][prefix]
            take_settings(job, prefix, {k: v for k, v in saved.items()
                                        if (prefix, stage) != ("agent", "agent") or k in HEADS},
                          run.path)
    return run


def take_settings(job, prefix, settings, source):
    """Settings that are no longer free go into job.configs; a flag that contradicts is an error."""
    for key, value in settings.items():
        flag = job.args.given.get(f"{prefix}.{key}", value)
        if flag != value:
            raise UserError(f"Got --{prefix}.{key} {flag}, but {source} has {value}: leave the "
                            "flag out, or train all from there on with --resume no.")
    job.configs[prefix].update(settings)


def weights_of(run):
    """Fingerprints of a run's modules."""
    return {k: fingerprint(getattr(run, k)) for k in ("tokenizer", "dynamics", "agent")
            if getattr(run, k)}


def train_tokenizer(job):
    """Section 3.1: masked autoencoding of frames."""
    cfg, spec = job.train, job.dataset.spec
    take_settings(job, "tokenizer", {"height": spec.height, "width": spec.width},
                  job.dataset.path)
    tokenizer = Tokenizer(TokenizerConfig(**job.configs["tokenizer"])).to(job.device)
    perceptual = lpips_loss().to(job.device) if tokenizer.cfg.lpips else None
    if job.train.compile:
        compile_module(tokenizer, job.device)
    split_rows(tokenizer)

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
        if (step + 1) % cfg.log_every:
            return losses, {}
        with torch.no_grad():
            return losses, latent_health(tokenizer.bottleneck(x))

    fit(job, "tokenizer", [tokenizer], loss_fn, ["mse", "lpips"],
        make_optimizers([tokenizer], cfg.lr_matrix, cfg.lr), {"lpips": tokenizer.cfg.lpips})
    with torch.no_grad(), autocast(job.device, job.args.dtype):
        z = torch.cat([tokenizer.encode(frames(rng_for(job.args.seed, "latent_std", i), False))
                       for i in range(8)])
        tokenizer.latent_std.copy_(z.float().std())
    save_stage(job, "tokenizer", cfg.tokenizer_steps, {}, tokenizer=tokenizer)


def cached_latents(job, tokenizer):
    """All that later stages read of the recordings, kept beside the run: rows (frames,) of latents
    z, float16 (S_z, Z), streamed episode by episode through the frozen tokenizer once, and of the
    frames' other columns."""
    with in_turn():
        return make_latents(job, tokenizer)


def make_latents(job, tokenizer):
    path, about = job.folder / "latents.npy", job.folder / "latents.json"
    data, cfg, crc = job.dataset, tokenizer.cfg, 0
    shape = (data.frames_total,)
    descr = [("z", "<f2", (cfg.latents // cfg.pack, cfg.channels * cfg.pack)),
             *(x for x in data.rows(0).dtype.descr if x[0] in TYPES and x[0] != "frames")]
    made_of = {"tokenizer": fingerprint(tokenizer), "dataset": data.fingerprint,
               "rows": str(descr)}
    old = read_json(about) if about.exists() else {}
    if {k: old.get(k) for k in made_of} == made_of:
        try:
            latents = np.load(path, mmap_mode="r")
            if (latents.dtype, latents.shape) == (np.dtype(descr), shape) and (
                    zlib.crc32(latents.view(np.uint8)) == old.get("crc")):
                return latents
            raise ValueError("changed bytes")
        except (OSError, ValueError, EOFError) as error:
            print(f"warning: got damaged latents in {path} ({error}): computing them again.")

    def write(file):                                # piece by piece: may be larger than the memory
        nonlocal crc
        np.lib.format.write_array_header_1_0(
            file, {"descr": descr, "fortran_order": False, "shape": shape})
        for i, length in enumerate(data.lengths):
            cache = tokenizer.new_cache()
            for start in range(0, length, LATENT_CHUNK):
                source = np.array(data.rows(i)[start:start + LATENT_CHUNK])
                with autocast(job.device, job.args.dtype):
                    z = tokenizer.encode(job.to_device(source["frames"])[None], cache)[0]
                rows = np.empty(len(source), descr)
                rows["z"] = z.float().cpu().numpy()
                for name, *_ in descr[1:]:
                    rows[name] = source[name]
                file.write(piece := rows.tobytes())
                crc = zlib.crc32(piece, crc)
                bar.update(len(source))

    with torch.no_grad(), tqdm(total=data.frames_total, desc="latents") as bar:
        write_whole(path, write)
    play.write_json(about, {**made_of, "crc": crc})
    return np.load(path, mmap_mode="r")


def labelled_episodes(job):
    """How many episodes, in order, have their actions known."""
    return round(job.data.labels * len(job.dataset.lengths))


def known_actions(job):
    """(frames,) bool: whose action the dynamics may see (Section 4.4, unlabelled video)."""
    data, cfg = job.dataset, job.data
    known = np.arange(data.frames_total) < data.offsets[labelled_episodes(job)]
    if cfg.labels_above:
        probes = [play.read_probes(data, [i], [0], n) for i, n in enumerate(data.lengths)]
        if not all(probes):
            raise UserError(f"Got recordings in {data.path} without probes, need them to tell "
                            "caves from land: record them again.")
        known &= ~np.concatenate([play.in_cave(p["probe_semantic"][0]) for p in probes])
    return known


def latent_batch(job, latents, rng, uniform, relevant, length, ahead=None, ladder=0,
                 split="train"):
    """`uniform` rows from anywhere, then `relevant` ones that show their task being done, `ahead`
    as in Dataset.sample -> dict of tensors: z (B, T, S_z, Z), labelled, continues, task (B, T),
    events (B, T, tasks); and actions. latents: of cached_latents, with the frames' other columns.
    ladder: share of the relevant rows whose tasks are those of its prompts; with `ahead` uniform
    rows have that which it would ask for at their end. Where a part of the training episodes has
    its actions labelled, half of the uniform rows are from those, or their actions would be seldom
    seen."""
    spec = job.dataset.spec
    tasks = [spec.tasks.index(task) for task, _ in spec.ladder] if ladder else []
    other = relevant - round(ladder * relevant)
    first, train = labelled_episodes(job), job.dataset.episodes("train")
    few = (train < first) & (job.dataset.lengths[train] >= length)
    some = uniform // 2 if split == "train" and few.any() and job.data.labels < 1 else 0
    parts = [job.dataset.sample(rng, n, length, shows, split, ahead, of, these)
             for n, shows, of, these in (
                 (uniform - some, False, (), None), (some, False, (), first),
                 (other, True, (), None), (relevant - other, True, tasks, None)) if n]
    episode, start, task = (np.concatenate(x) for x in zip(*parts, strict=True))
    index = (job.dataset.offsets[episode] + start)[:, None] + np.arange(length)
    if tasks and ahead:
        task[:uniform] = job.prompts[index[:uniform, -1]]
    frames = latents[index]
    batch = {"task": np.repeat(task[:, None], length, 1),
             "labelled": frames["labelled"] & job.known[index],
             **{k: column(frames, k).astype(np.float32) for k in ("z", "events", "continues")}}
    return ({k: job.to_device(x) for k, x in batch.items()},
            {k: job.to_device(column(frames, k)) for k in ("binary", "categorical", "continuous")})


def window(cfg, step, steps):
    """(rows, length) of a step's batch: a share of the steps is long, the last tenth only long."""
    share = cfg.long_share
    long = int((step + 1) * share) > int(step * share) or share and step >= 0.9 * steps
    length = cfg.long_length if long else cfg.length
    return max(cfg.batch * cfg.length // length, 2), length


def draw_single(rows, total, share, rng, job):
    """(total,) bool: which of the first `rows` are trained as separate images."""
    return job.to_device((rng.random(total) < share) & (np.arange(total) < rows))


@torch.no_grad()
def rollout_check(job, run, n=16, context=16, horizon=4):
    """A light look at dreams while training: PSNR `horizon` frames ahead on validation clips, with
    true actions and minus that with shuffled ones (same noise and contexts). {} where episodes are
    too short."""
    data = job.dataset
    if data.lengths[data.episodes("valid")].max() < context + horizon:
        return {}
    episode, start, _ = data.sample(rng_for(job.args.seed, "check", 0), n, context + horizon,
                                    split="valid")
    clips, actions = play.to_tensors(data.read(episode, start, context + horizon), job.device)
    shuffled = {k: torch.cat([x[:, :context], x[:, context:].roll(1, 0)], 1)
                for k, x in actions.items()}
    z = run.tokenizer.encode(clips["frames"])
    psnr = [float(play.decibel(play.squared_error(play.dream_clips(
        run, z, a, clips["labelled"], horizon)[:, -1:], clips["frames"][:, -1:]))[0])
        for a in (actions, shuffled)]
    return {f"rollout_psnr_h{horizon}": torch.tensor(psnr[0]),
            f"rollout_minus_shuffled_h{horizon}": torch.tensor(psnr[0] - psnr[1])}


@torch.no_grad()
def imitation_check(job, latents, dynamics, agent, n=32, length=16):
    """Nats of the next action on relevant windows of the validation episodes. {}: there are none.
    It falls behind `bc_next_action` where the policy learns its episodes by heart."""
    data = job.dataset
    few = data.episodes("valid")[data.lengths[data.episodes("valid")] >= length]
    if not np.isin(data.events[:, 0], few).any():
        return {}
    batch, actions = latent_batch(job, latents, rng_for(job.args.seed, "check", 0), 0, n, length,
                                  split="valid")
    generator = torch.Generator(job.device).manual_seed(0)
    h = Dream(dynamics, generator).commit(batch["z"], actions, batch["labelled"],
                                          agent.prompt(batch["task"]))
    metrics = agent_losses(agent, h, actions, batch["labelled"], batch["task"], batch["events"],
                           batch["continues"], batch["labelled"].any(1))[1]
    return {"bc_next_action_valid": metrics["bc_next_action"]}


def train_dynamics(job):
    """Section 3.2: shortcut forcing on the frozen tokenizer's latents."""
    run = open_stage(job, "tokenizer")
    latents, tok, spec = cached_latents(job, run.tokenizer), run.tokenizer.cfg, run.spec
    take_settings(job, "dynamics", {"tokens": tok.latents // tok.pack, "tasks": len(spec.tasks),
                                    "channels": tok.channels * tok.pack}, run.path)
    dynamics = Dynamics(DynamicsConfig(**job.configs["dynamics"]), spec.actions).to(job.device)
    if job.train.compile:
        compile_module(dynamics, job.device)
    split_rows(dynamics)
    cfg, made_of = job.train, weights_of(run)
    share = cfg.relevant if len(job.dataset.events) and job.known.all() else 0   # unlabelled video

    def loss_fn(rng, generator, step):
        rows, length = window(cfg, step, cfg.dynamics_steps)
        relevant = round(share * rows)
        order = rng.permutation(rows)                   # or no relevant row would have bootstrap
        mixed = job.to_device(order)
        batch, actions = ({k: x[mixed] for k, x in part.items()} for part in latent_batch(
            job, latents, rng, rows - relevant, relevant, length))
        single = draw_single(rows, rows, dynamics.cfg.single_images, rng, job)
        n_boot = round(dynamics.cfg.p_boot * rows)
        n_boot *= step >= cfg.boot_after * cfg.dynamics_steps   # before, it'd learn from itself
        known = drawn = None
        if cfg.drawn and relevant:      # what happens, and some of what else, from nothing
            dreams = (job.to_device(order >= rows - relevant) & ~single)[:, None]
            chance = job.to_device(rng.random((rows, length)) < cfg.drawn)
            drawn = dreams & (batch["events"].any(-1) | chance)
            known = dreams & ~drawn
        losses, _, metrics = dynamics_losses(dynamics, batch["z"], actions, batch["labelled"],
                                             n_boot, generator, None, None, single, known, drawn)
        if (step + 1) % cfg.check_every == 0:
            metrics |= rollout_check(job, dataclasses.replace(run, dynamics=dynamics))
        return losses, metrics

    fit(job, "dynamics", [dynamics], loss_fn, ["dynamics"],
        make_optimizers([dynamics], cfg.lr_matrix, cfg.lr), made_of=made_of)
    save_stage(job, "dynamics", cfg.dynamics_steps, made_of, tokenizer=run.tokenizer,
               dynamics=dynamics)


def train_agent(job):
    """Section 3.3, Eq. 9: agent tokens and heads; the dynamics go on learning beside them."""
    run = open_stage(job, "dynamics")
    first = job.dataset.offsets
    if not any((job.dataset.rows(i)["labelled"] & job.known[first[i]:first[i + 1]]).any()
               for i in job.dataset.episodes("train")):
        raise UserError(f"Got {job.dataset.path} without labelled frames, need actions for the "
                        "policy: label some (--data.labels), or stop after --stage dynamics.")
    latents, dynamics = cached_latents(job, run.tokenizer), run.dynamics.requires_grad_(True)
    made_of = weights_of(run)
    if not job.configs["agent"]["pretrained"]:
        dynamics = Dynamics(dynamics.cfg, run.spec.actions).to(job.device)
    agent = Agent(AgentConfig(**job.configs["agent"]), dynamics.cfg.dim, run.spec.actions,
                  len(run.spec.tasks)).to(job.device)
    if job.train.compile:
        compile_module(dynamics, job.device)
    split_rows(dynamics)
    rungs = [run.spec.tasks.index(task) for task, _ in run.spec.ladder]
    cfg, climbs = job.train, bool(np.isin(job.dataset.events[:, 2], rungs).any())

    def loss_fn(rng, generator, step):
        rows, length = window(cfg, step, cfg.agent_steps)
        relevant = min(round(agent.cfg.relevant * rows), rows - 1)      # others: dynamics loss
        uniform = rows - relevant
        batch, actions = latent_batch(job, latents, rng, uniform, relevant, length, None,
                                      agent.cfg.ladder * climbs)
        single = draw_single(uniform, rows, dynamics.cfg.single_images, rng, job)
        order = torch.arange(rows, device=job.device)
        is_relevant = order >= uniform
        known = None
        if agent.cfg.bc_level == "context":
            known = (order >= uniform - uniform // 4)[:, None]      # as the policy will act
        losses, h, metrics = dynamics_losses(
            dynamics, batch["z"], actions, batch["labelled"],
            round(dynamics.cfg.p_boot * uniform), generator, uniform, agent.prompt(batch["task"]),
            single, known)
        more, more_metrics = agent_losses(agent, h, actions, batch["labelled"], batch["task"],
                                          batch["events"], batch["continues"], is_relevant)
        if not agent.cfg.pretrained:
            del losses["dynamics"]
        if (step + 1) % cfg.check_every == 0:
            more_metrics |= imitation_check(job, latents, dynamics, agent)
        return losses | more, metrics | more_metrics

    fit(job, "agent", [dynamics, agent], loss_fn,
        ["dynamics", "bc", "reward", "continue"] + ["events"] * bool(run.spec.tasks),
        make_optimizers([dynamics, agent], cfg.lr_matrix / 2, cfg.lr / 2),
        {"bc": agent.cfg.bc_weight}, made_of)
    agent.freeze_prior()
    save_stage(job, "agent", cfg.agent_steps, made_of, tokenizer=run.tokenizer, dynamics=dynamics,
               agent=agent)


def train_imagine(job):
    """Section 3.3, Eq. 10 and 11: policy and value head learn from imagined rollouts alone."""
    run = open_stage(job, "agent")
    check_steps(job.configs)                        # with the k_max of the checkpoint
    latents, dynamics, agent = cached_latents(job, run.tokenizer), run.dynamics, run.agent
    made_of = weights_of(run)
    agent.cfg = AgentConfig(**job.configs["agent"])
    agent.policy.requires_grad_(True), agent.value.requires_grad_(True)
    agent.sharpen(agent.cfg.temperature)
    cfg, context, horizon = job.train, agent.cfg.context, agent.cfg.horizon
    world = freeze(copy.deepcopy(dynamics), job.device, job.args.dtype)
    if cfg.compile:
        compile_module(world, job.device)
    relevant = round(agent.cfg.relevant * cfg.imagine_batch)

    def loss_fn(rng, generator, step):
        # relevant rows have their event in the frames to be imagined, none has it behind it
        batch, actions = latent_batch(job, latents, rng, cfg.imagine_batch - relevant, relevant,
                                      context, (context, context + horizon - 1),
                                      agent.cfg.practice == "ladder")
        h, chosen, _ = imagine_rollout(world, agent, batch["z"], actions, batch["labelled"],
                                       agent.prompt(batch["task"]), horizon, generator)
        losses, metrics = imagination_losses(agent, h, chosen, batch["task"][:, -1])
        if step < cfg.value_first:      # a value of 0 would call every action good
            del losses["policy"]
        return losses, metrics

    optimizer = torch.optim.AdamW([{"params": agent.policy.parameters(), "lr": cfg.lr_policy},
                                   {"params": agent.value.parameters(), "lr": cfg.lr_value}],
                                  weight_decay=0.0)
    fit(job, "imagine", [agent], loss_fn, ["policy", "value"], [optimizer], made_of=made_of)
    save_stage(job, "imagine", cfg.imagine_steps, made_of, tokenizer=run.tokenizer,
               dynamics=dynamics, agent=agent)


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
        agent = Agent(AgentConfig(**configs["agent"]), dynamics.cfg.dim, spec.actions,
                      len(spec.tasks))
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
    device = join_processes(device)
    data, folder = DataConfig(**configs["data"]), Path("runs") / args.run
    command = "python train.py " + shlex.join(sys.argv[1:])
    path = Path(data.path or f"datasets/{data.env.replace(':', '_')}_{data.episodes}x{data.length}"
                + f"_seed{data.seed}" * (data.seed > 0))
    changed = {f"{p}.{k}": v for p, c in configs.items() for k, v in c.items()
               if v != getattr(CONFIGS[p](), k)}
    print(f"Run {folder}, preset {args.preset}, {device}, changed settings: {changed or 'none'}")
    folder.mkdir(parents=True, exist_ok=True)
    with in_turn():
        if args.base:
            take_stages(Path("runs") / args.base, folder, args.stage)
        if not data.path:
            record(data.env, path, data.episodes, data.length, data.seed, data.workers)
        reference = play.reference_set(data.env, data.reference_episodes, data.length,
                                       data.workers, data.reference)
    job = Job(args, folder, data, TrainConfig(**configs["train"]), configs, device, Dataset(path))
    if not len(job.dataset.episodes("valid")):
        raise UserError(f"Got 1 episode in {path}, which leaves none to hold out, need at least 2: "
                        "record more.")

    def note_time(part, seconds):
        play.add_results(folder, command, {f"wall_seconds_{part}": (seconds, None, None, 1, "s")})

    if rank() == 0 and "wall_seconds_record" not in play.read_results(folder):
        note_time("record", time.perf_counter() - begin)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage == "imagine" and dist.is_initialized():
            print(f"Stage imagine runs on one process: {dist.get_world_size() - 1} others leave.")
            if rank():
                return
            dist.destroy_process_group()
        run_stage(job, stage, reference, note_time)
    if rank():
        return
    if args.stage == "all":
        mark = time.perf_counter()
        play.evaluate(["eval", "--run", str(folder), "--episodes", str(data.eval_episodes),
                       "--length", str(data.eval_length), "--workers", str(data.workers),
                       "--device", args.device, "--dtype", args.dtype,
                       *["--world-only"] * (data.eval_episodes == 0)])
        note_time("evaluation", time.perf_counter() - mark)
        walls = [play.read_results(folder)[f"wall_seconds_{part}"]["value"]
                 for part in ("record", *STAGES, "evaluation")]
        note_time("total", sum(walls))                  # breaks and work that was lost don't count
    report = play.write_report(folder)
    if args.stage == "all":
        print(play.results_table(play.read_results(folder)))
    print(f"Done in {(time.perf_counter() - begin) / 60:.1f} minutes. Look at {report} and its "
          "pictures.")


def run_stage(job, stage, reference, note_time):
    """Train a stage, or see that it is there; then what a person looks at."""
    job.mark, final = time.perf_counter(), job.folder / f"{stage}.pt"
    if job.args.resume == "no" and job.args.replay is None:
        for old in (final, *resume_paths(job, stage)):
            old.unlink(missing_ok=True)
    trained = not final.exists() or job.args.replay is not None
    if trained:
        seed = int(rng_for(job.args.seed, f"{stage} weights", 0).integers(2 ** 31))
        torch.manual_seed(seed)
        {"tokenizer": train_tokenizer, "dynamics": train_dynamics, "agent": train_agent,
         "imagine": train_imagine}[stage](job)
    else:
        print(f"Stage {stage}: {final} is there; --resume no trains it again.")
    seconds = open_stage(job, stage).meta.get("seconds")      # reads back what was written
    if rank():
        return
    if trained or not (job.folder / "config.json").exists():
        play.write_json(job.folder / "config.json", job.configs)
    if trained or not (job.folder / f"{stage}_curves.png").exists():
        pictures(job, stage, reference)
    if trained:
        note_time(stage, time.perf_counter() - job.mark)
    elif f"wall_seconds_{stage}" not in play.read_results(job.folder):      # killed before that
        note_time(stage, seconds or 0.0)


if __name__ == "__main__":
    run_cli(main)
