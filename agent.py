"""The agent (Dreamer 4, Section 3.3): behaviour cloning, then imagination training.

Eq. 9   targets_ahead, behavior_loss   multi-token prediction of actions and rewards from h
Eq. 10  lambda_returns, value_loss     TD(lambda) returns, two-hot cross-entropy
Eq. 11  pmpo_loss                      only the sign of the advantage counts; KL to BC

Agent holds the heads, imagine_rollout plays them inside the dream, load_run reads what
training saved. Conventions: actions[:, t] led to frame t, rewards[:, t] and
continues[:, t] were received on reaching it, and h[:, t] comes after it.
Departures from the paper: README, "Departures".
"""

import copy
import hashlib
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import EnvSpec, UserError, check_config, write_whole
from dynamics import Dream, Dynamics, DynamicsConfig
from tokenizer import Tokenizer, TokenizerConfig

MTP = 8                     # L of Eq. 9: the heads predict distances 0 .. L
BINS = 255                  # of the symexp two-hot heads
LAMBDA = 0.95               # of Eq. 10
PMPO_ALPHA = 0.5            # of Eq. 11
RELEVANT = 0.5              # share of rows chosen for their task
TERMINAL_WEIGHT = 20.0      # of the rare class in the continue head's loss


@dataclass
class AgentConfig:
    """Heads, cloning and imagination; the paper's values in brackets."""
    hidden: int = 256
    prompt_order: float = 0.5   # share of the cloned rows that are on the way to what the
                                # prompts ask for, or to the best quarter of returns; the
                                # others show any task being done, or anything
    bc_level: str = "context"   # level of cloned rows: "context" | "uniform" (paper)
    bc_weight: float = 4.0      # of the BC loss among those of the agent stage (1)
    prompts: bool = True        # False: the policy isn't told its task (control)
    pretrained: bool = True     # False: BC from scratch, on the latents alone (control)
    imagined_tasks: str = "prompt_order"    # "prompt_order" | "all" (paper)
    context: int = 8            # data frames before an imagined rollout
    horizon: int = 12           # imagined frames; the paper gives none
    temperature: float = 0.5    # of BC, also where imagination starts from it (1)
    k: int = 1                  # sampling steps, told d_min; 0: as the dynamics (paper)
    end_on_event: bool = True   # a return ends with its task's event, as a prompt does
    gamma: float = 0.95         # discount (0.997)
    pmpo_beta: float = 0.3      # pull towards BC (0.3)

    def __post_init__(self):
        check_config("agent", self, zero=("k",), shares=("prompt_order", "gamma"))
        choices = {"bc_level": ("context", "uniform"),
                   "imagined_tasks": ("prompt_order", "all")}
        for name, words in choices.items():
            if getattr(self, name) not in words:
                raise UserError(f"Got agent.{name} {getattr(self, name)!r}, need one of "
                                f"{words}.")
        if not self.temperature:
            raise UserError("Got agent.temperature 0, need float above 0.")


# ------------------------------------------------------------ symexp two-hot, the heads

def symexp_bins(n):
    """(n,) bin centres, symmetric and dense around 0: symexp of an even grid, -10 to 10."""
    x = torch.linspace(-10, 10, n)
    return x.sign() * x.abs().expm1()


def two_hot(x, bins):
    """x (...) -> the two bins (..., 2) beside it, and their weights, whose mean is x
    (clamped)."""
    x = x.clamp(bins[0], bins[-1])
    high = torch.searchsorted(bins, x.contiguous()).clamp(1, len(bins) - 1)
    share = (x - bins[high - 1]) / (bins[high] - bins[high - 1])
    return torch.stack([high - 1, high], -1), torch.stack([1 - share, share], -1)


def two_hot_mean(logits, bins):
    """(..., n) logits -> (...) expected value."""
    return (logits.softmax(-1) * bins).sum(-1)


def two_hot_log_prob(logits, x, bins):
    """ln p(x) under a two-hot head: minus the cross-entropy with two_hot(x)."""
    index, weight = two_hot(x, bins)
    return (logits.log_softmax(-1).gather(-1, index) * weight).sum(-1)


def split_logits(spec, logits):
    """(..., sum of class sizes) -> the logits (..., size) of each class column."""
    return logits.split(list(spec.classes), -1)


def action_log_prob(spec, logits, actions):
    """ln pi(a) (...) of actions (..., A): the columns are independent."""
    total = 0.0
    for i, column in enumerate(split_logits(spec, logits)):
        index = actions[..., i:i + 1].long()
        total = total + column.log_softmax(-1).gather(-1, index)[..., 0]
    return total


def sample_action(spec, logits, generator=None):
    """logits (B, n) -> sampled actions, float32 (B, A)."""
    columns = []
    for column in split_logits(spec, logits):
        # as torch.multinomial, which makes the host wait: the first of n clocks to ring,
        # each at the rate of its probability
        p = column.softmax(-1)
        columns.append((p / p.clone().exponential_(generator=generator)).argmax(-1))
    return torch.stack(columns, -1).float()


def action_kl(spec, logits, prior):
    """KL[pi || prior] (...), exact, summed over the action's columns."""
    total = 0.0
    columns = zip(split_logits(spec, logits), split_logits(spec, prior), strict=True)
    for column, prior_column in columns:
        log_p, log_prior = column.log_softmax(-1), prior_column.log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_prior)).sum(-1)
    return total


class Norm(nn.RMSNorm):
    """In fp32, also where autocast hands on bf16."""

    def forward(self, x):
        return super().forward(x.float())


class Head(nn.Module):
    """Small MLP on h (..., D), an output for each distance: (..., distances, out)."""

    def __init__(self, dim, hidden, distances, out):
        super().__init__()
        self.shape = (distances, out)
        self.trunk = nn.Sequential(nn.Linear(dim, hidden), Norm(hidden), nn.SiLU(),
                                   nn.Linear(hidden, hidden), Norm(hidden), nn.SiLU())
        self.out = nn.Linear(hidden, distances * out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h, distances=None):
        n, out = distances or self.shape[0], self.shape[1]
        x = F.linear(self.trunk(h), self.out.weight[:n * out], self.out.bias[:n * out])
        return x.float().unflatten(-1, (n, out))


class Agent(nn.Module):
    """Heads on the agent token's output h: policy, reward, continue, value, and the frozen
    prior that imagination starts from and stays near. The reward head is asked about a
    task, which need not be the prompt: every frame can teach it about all of them."""

    def __init__(self, cfg, dim, action_spec, tasks):
        super().__init__()
        if action_spec.numbers or not action_spec.classes:
            raise UserError("Got continuous actions, need classes for the policy: "
                            "discretise them, or stop after --stage dynamics.")
        self.cfg, self.spec, self.tasks = cfg, action_spec, tasks
        self.policy = Head(dim, cfg.hidden, MTP + 1, sum(action_spec.classes))
        self.reward = Head(dim, cfg.hidden, MTP + 1, BINS)
        self.question = nn.Embedding(tasks + 1, dim)
        self.continues = Head(dim, cfg.hidden, 1, 1)
        self.value = Head(dim, cfg.hidden, 1, BINS)
        self.prior = copy.deepcopy(self.policy).requires_grad_(False)
        self.register_buffer("bins", symexp_bins(BINS), persistent=False)

    def prompt(self, task):
        """task (...) as the agent token is told it: "no task" where it learned without."""
        return task if self.cfg.prompts else torch.full_like(task, self.tasks)

    def freeze_prior(self):
        self.prior.load_state_dict(self.policy.state_dict())

    def sharpen(self, temperature):
        """From here on temperature 1 of policy and prior is what this one was before."""
        with torch.no_grad():
            for p in (*self.policy.out.parameters(), *self.prior.out.parameters()):
                p /= temperature

    def act(self, h, generator=None, temperature=1.0):
        """h (B, D) after frame t -> sampled actions (B, A) that lead to frame t + 1.
        temperature < 1 sharpens the policy."""
        return sample_action(self.spec, self.policy(h, 1)[:, 0] / temperature, generator)

    def reward_logits(self, h, task, distances=None):
        """h (..., D), task (...), the one asked about -> (..., distances, bins)."""
        return self.reward(h + self.question(task), distances)

    def rewards(self, h, task):
        """Expected reward of a task on reaching the frame of h: the head at distance 0."""
        return two_hot_mean(self.reward_logits(h, task, 1)[..., 0, :], self.bins)

    def values(self, h):
        return two_hot_mean(self.value(h)[..., 0, :], self.bins)

    def continue_prob(self, h):
        """P(the episode goes on at the frame of h). The loss weighed terminals up; the
        logit is moved back by the log of that weight, so that the probability is
        calibrated."""
        logit = self.continues(h)[..., 0, 0]
        return torch.sigmoid(logit + torch.tensor(TERMINAL_WEIGHT).log())


# ---------------------------------------------------------------------------- equation 9

def mean_over(x, members):
    """Mean of x over the members, bool, of a set; 0 where it is empty. (To index with them
    would make the host wait for a GPU.)"""
    return (x * members).sum() / members.sum().clamp_min(1)


def targets_ahead(x, first, L):
    """Eq. 9: x (B, T, ...) -> x[:, t + first + n], n = 0 .. L, as (B, T, L + 1, ...), and
    valid (B, T, L + 1), False where that lies past the end of the window."""
    T = x.shape[1]
    t, n = torch.arange(T, device=x.device), torch.arange(L + 1, device=x.device)
    index = t[:, None] + first + n
    valid = (index < T).expand(len(x), T, L + 1)
    return x[:, index.clamp(max=T - 1)], valid


def behavior_loss(policy_log_prob, policy_valid, reward_log_prob, reward_valid):
    """Eq. 9 (Section 3.3): - sum_n ln p(a[t + 1 + n] | h_t) - sum_n ln p(r[t + n] | h_t).

    n = 0 .. L. All (B, T, L + 1), from targets_ahead with first = 1 and 0; averaged over
    the valid entries. (The paper prints a[t + n]; as our h_t has seen a_t, that would be
    copying.) Returns the two terms.
    """
    return (mean_over(-policy_log_prob, policy_valid),
            mean_over(-reward_log_prob, reward_valid))


def cloned_targets(batch, cloned):
    """(B, T, L + 1): which actions the policy learns from each h: those that are labelled,
    lie in the window, stand in a row with cloned (B,) True, and were taken under its
    task."""
    labelled, valid = targets_ahead(batch.labelled, 1, MTP)
    asked, _ = targets_ahead(batch.asked, 0, MTP)
    return valid & labelled & asked & (cloned[:, None] & batch.asked)[..., None]


def agent_losses(agent, h, batch, cloned):
    """BC loss on rows with cloned (B,) True; reward and continue losses on all rows, the
    reward of the prompt at all distances ("reward"), of every task at distance 0
    ("events").

    h (B, T, D); of the batch actions (B, T, A), labelled, task, continues, asked (B, T),
    events (B, T, tasks). Returns losses and metrics.
    """
    valid = cloned_targets(batch, cloned)
    actions, _ = targets_ahead(batch.actions, 1, MTP)
    policy = action_log_prob(agent.spec, agent.policy(h), actions)

    # reward of the prompt's task; the last task number, "no task", has none
    rewards = F.pad(batch.events, (0, 1)).gather(-1, batch.task[..., None])[..., 0]
    rewards, reward_valid = targets_ahead(rewards, 0, MTP)
    reward = two_hot_log_prob(agent.reward_logits(h, batch.task), rewards, agent.bins)
    bc, reward = behavior_loss(policy, valid, reward, reward_valid)

    # does the episode go on? ends are rare, and weigh more
    weight = torch.where(batch.continues > 0, 1.0, TERMINAL_WEIGHT)
    goes_on = F.binary_cross_entropy_with_logits(agent.continues(h)[..., 0, 0],
                                                 batch.continues, weight)
    losses = {"bc": bc, "reward": reward, "continue": goes_on}
    if agent.tasks:
        every = torch.arange(agent.tasks, device=h.device)
        logits = agent.reward_logits(h[:, :, None], every, 1)[..., 0, :]
        losses["events"] = -two_hot_log_prob(logits, batch.events, agent.bins).mean()
    now = valid[..., 0]
    nll = -(policy[..., 0] * now).sum() / now.sum()     # nan: no action was known
    return losses, {"bc_next_action": nll.detach()}


# ------------------------------------------------------------------- equations 10 and 11

def lambda_returns(rewards, continues, values, gamma, lam):
    """Eq. 10 (Section 3.3), left: all (B, T + 1), rewards[:, t] came on reaching state t.

    R[t] = r[t+1] + gamma c[t+1] ((1 - lam) v[t+1] + lam R[t+1]),  R[T] = v[T].
    (The paper prints r_t and v_t: a value learned from itself.) rewards[:, 0] and
    continues[:, 0] are not used. Returns (B, T + 1).
    """
    returns = [values[:, -1]]
    for t in range(values.shape[1] - 2, -1, -1):
        mix = (1 - lam) * values[:, t + 1] + lam * returns[-1]
        returns.append(rewards[:, t + 1] + gamma * continues[:, t + 1] * mix)
    return torch.stack(returns[::-1], 1)


def value_loss(logits, returns, counted, bins):
    """Eq. 10 (Section 3.3), right: - ln p(R | s), mean over counted. logits (..., n),
    returns and counted (...)."""
    return mean_over(-two_hot_log_prob(logits, returns.detach(), bins), counted)


def pmpo_loss(log_prob, advantages, kl, counted, alpha, beta):
    """Eq. 11 (Section 3.3), PMPO: log_prob, advantages, kl, counted all (B, T).

    (1 - alpha) / |D-| sum_{D-} ln pi - alpha / |D+| sum_{D+} ln pi
    + beta / N sum KL[pi || prior]
    with D+ = {A >= 0}, D- = {A < 0} over batch and time, N of them counted: only the sign
    of A counts. An empty set adds nothing.
    """
    good = advantages >= 0
    return ((1 - alpha) * mean_over(log_prob, ~good & counted)
            - alpha * mean_over(log_prob, good & counted) + beta * mean_over(kl, counted))


class Rollout(NamedTuple):
    """Imagined play. h[:, 0] is the context's end; actions[:, t] were taken at h[:, t] and
    led to z[:, t] and h[:, t + 1]."""
    h: torch.Tensor             # (B, horizon + 1, D)
    actions: torch.Tensor       # (B, horizon, A)
    z: torch.Tensor             # (B, horizon, S_z, Z)


def dream_of(dynamics, agent, generator=None):
    """The dream that the agent is trained in."""
    if agent.cfg.k == 0:        # as the dynamics sample
        return Dream(dynamics, generator)
    return Dream(dynamics, generator, k=agent.cfg.k, step_label="min")


@torch.no_grad()
def imagine_rollout(dream, agent, batch, horizon):
    """Plays the policy inside the dream, once from each data context: a Batch with z
    (B, C, S_z, Z), actions, labelled and task (B, C). Returns a Rollout."""
    hs = [dream.commit(batch.z, batch.actions, batch.labelled, batch.task)[:, -1]]
    actions, frames = [], []
    for _ in range(horizon):
        action = agent.act(hs[-1], dream.generator)[:, None]
        z, h = dream.step(action, batch.task[:, -1:])
        actions.append(action)
        frames.append(z)
        hs.append(h[:, 0])
    return Rollout(torch.stack(hs, 1), torch.cat(actions, 1), torch.cat(frames, 1))


def imagination_losses(agent, h, actions, task):
    """Losses of policy and value head on a Rollout's h and actions under the prompt task
    (B,). The advantage R[t] - v[t] scores the action taken at h[:, t], t < T; what comes
    after the prompt's event, or after death, teaches nothing."""
    cfg = agent.cfg
    with torch.no_grad():
        values, continues = agent.values(h), agent.continue_prob(h)
        rewards = agent.rewards(h, task[:, None])
        if cfg.end_on_event:    # the event's chance is that of the prompt's being over
            continues = continues * (1 - rewards.clamp(0, 1))
        alive = torch.cat([agent.continue_prob(h[:, :1]), continues[:, 1:-1]], 1)
        alive = alive.cumprod(1)                                            # (B, T)
        counted = alive > 0.5
        returns = lambda_returns(rewards, continues, values, cfg.gamma, LAMBDA)[:, :-1]
        advantages = returns - values[:, :-1]
        prior = agent.prior(h[:, :-1], 1)[:, :, 0]
    # subtle: torch 2.9 would use weights again that autocast has cast without gradients
    torch.clear_autocast_cache()

    logits = agent.policy(h[:, :-1], 1)[:, :, 0]
    log_prob = action_log_prob(agent.spec, logits, actions)
    kl = action_kl(agent.spec, logits, prior)
    value_logits = agent.value(h[:, :-1])[..., 0, :]
    policy = pmpo_loss(log_prob, advantages, kl, counted, PMPO_ALPHA, cfg.pmpo_beta)
    losses = {"policy": policy,
              "value": value_loss(value_logits, returns, counted, agent.bins)}

    def variance(x):
        return mean_over((x - mean_over(x, counted)).square(), counted)

    unexplained = variance(advantages) / variance(returns).clamp_min(1e-8)
    return losses, {"imagined_reward": (alive * rewards[:, 1:]).sum(1).mean(),
                    "kl_prior": mean_over(kl, counted).detach(),
                    "entropy": -mean_over(log_prob, counted).detach(),
                    "value_mean": values.mean(), "value_explained": 1 - unexplained,
                    "positive_share": mean_over((advantages >= 0).float(), counted)}


# -------------------------------------------------------- devices, saved and loaded runs

def pick_device(name="auto"):
    """--device: "auto" is cuda, then mps, then cpu."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.ones((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Got --device {name}, which torch can't use here "
                        f"({str(error).splitlines()[0]}). Use --device auto.") from None


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(device, name="auto"):
    """--dtype: "auto" is bf16 where the hardware has it, fp16 on CUDA without, else
    fp32."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"Got --dtype {name}, need auto, bf16, fp16 or fp32.")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


def autocast(device, dtype="auto"):
    """Matrix products run in `dtype` inside. Parameters, norms and losses stay fp32."""
    dtype = DTYPES[pick_dtype(device, dtype)]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def freeze(module, device, dtype="auto"):
    """For use without training: no gradients, and the matrices of linear layers held in the
    dtype that autocast would cast them to anew in every call."""
    module.to(device).eval().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.to(DTYPES[pick_dtype(device, dtype)])
    return module


STAGES = ("tokenizer", "dynamics", "agent", "imagine")
VERSION = 2                 # of checkpoints
READ_ERRORS = (OSError, KeyError, TypeError, RuntimeError, ValueError, EOFError,
               AttributeError, IndexError, pickle.UnpicklingError, zipfile.BadZipFile)


def first_line(error):
    return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"


def save_checkpoint(path, state, keep=None):
    """Writes the dict `state` whole or not at all; the file of before gets the name `keep`.
    UserError where there is no room."""
    def write(file):
        try:
            torch.save({"version": VERSION, **state}, file)
        except RuntimeError as error:       # torch's way to say so
            raise OSError(error) from None
    write_whole(path, write, keep)


def load_checkpoint(path, device="cpu"):
    """The dict in a checkpoint file. UserError where it is damaged, foreign or of another
    version: torch alone wouldn't notice a changed byte, the sums in the zip file show
    it."""
    try:
        with zipfile.ZipFile(path) as file:
            if bad := file.testzip():
                raise ValueError(f"{bad} in it has changed")
        state = torch.load(path, map_location=device, weights_only=True)
        if state.get("version", 1) != VERSION:
            raise ValueError(f"version {state.get('version', 1)}, need {VERSION}; commit "
                             f"{state.get('commit')} wrote it")
        return state
    except READ_ERRORS as error:
        raise UserError(f"Can't read the checkpoint {path} ({first_line(error)}): restore "
                        "it, or train that stage again with --resume no.") from None


@dataclass
class Run:
    """What a checkpoint holds. dynamics and agent are None before their stages."""
    path: Path
    stage: str
    spec: EnvSpec
    tokenizer: Tokenizer
    dynamics: Dynamics = None
    agent: Agent = None
    meta: dict = None           # step, commit, config, provenance, made_with, seconds

    @property
    def device(self):
        return self.tokenizer.latent_std.device


def sha256_of(path):
    """Of a file: tells whether a stage was trained again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(path, stage=None):
    """A checkpoint file, or of runs/NAME its latest stage or the one named -> the file."""
    path = Path(path)
    if path.suffix and not path.is_dir():
        return path
    found = [s for s in STAGES if (path / f"{s}.pt").exists() and stage in (None, s)]
    if not found:
        raise UserError(f"No {stage or 'checkpoint'} in {path}: run 'python train.py "
                        f"--stage {stage or 'all'} --run {path.name}' first.")
    return path / f"{found[-1]}.pt"


def build_run(path, state):
    """The modules of a checkpoint's dict, with their weights."""
    spec, config = EnvSpec.from_json(state["spec"]), state["config"]
    names = ("step", "commit", "config", "provenance", "made_with", "seconds")
    run = Run(path, state["stage"], spec, Tokenizer(TokenizerConfig(**config["tokenizer"])),
              meta={name: state[name] for name in names if name in state})
    if "dynamics" in state:
        run.dynamics = Dynamics(DynamicsConfig(**config["dynamics"]), spec.actions)
    if "agent" in state:
        run.agent = Agent(AgentConfig(**config["agent"]), config["dynamics"]["dim"],
                          spec.actions, len(spec.tasks))
    for name in ("tokenizer", "dynamics", "agent"):
        if module := getattr(run, name):
            module.load_state_dict(state[name])
    return run


def load_run(path, stage=None, device="cpu", dtype=None):
    """Reads runs/NAME (its latest stage, or the one named) or a checkpoint file, in eval
    mode. With a dtype tokenizer and dynamics are frozen in it, for use without training.

    UserError where there is none, or it can't be read.
    """
    path = find_checkpoint(path, stage)
    state = load_checkpoint(path, device)
    try:
        run = build_run(path, state)
    except READ_ERRORS as error:
        raise UserError(f"Got {path}, which is no checkpoint of this code "
                        f"({first_line(error)}): train it again with --resume no, or check "
                        "out the code that wrote it.") from None
    freeze(run.tokenizer, device, dtype or "fp32")
    if run.dynamics:
        freeze(run.dynamics, device, dtype or "fp32")
    if run.agent:
        freeze(run.agent, device, "fp32")
    return run
