"""The agent (Dreamer 4, Section 3.3): behaviour cloning, then practice inside the world model.

Eq. 9   targets_ahead, behavior_loss   multi-token prediction of actions and rewards from h
Eq. 10  lambda_returns, value_loss     TD(lambda) returns, two-hot cross-entropy
Eq. 11  pmpo_loss                      only the sign of the advantage counts; KL to the BC policy
Agent holds the heads, imagine_rollout plays them inside the dream, load_run reads a checkpoint.
Conventions: actions[:, t] led to frame t, rewards[:, t] and continues[:, t] were received on
reaching it, and h[:, t] comes after it. Departures from the paper: README, "Departures".
"""

import copy
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import EnvSpec, UserError, check_config
from dynamics import Dream, Dynamics, DynamicsConfig
from tokenizer import Tokenizer, TokenizerConfig


@dataclass
class AgentConfig:
    """Heads, returns and imagination; the paper's values in the comments."""
    hidden: int = 256
    mtp: int = 8                # L = 8: heads predict distances 0 .. L
    bins: int = 255             # symexp two-hot
    relevant: float = 0.5       # 0.5: share of rows that show a task being done, to be cloned
    ladder: float = 0.0         # of those, share whose task is one of the prompt ladder
    bc_level: str = "context"   # signal level of relevant rows: "context" | "uniform" (paper)
    bc_weight: float = 4.0      # 1: of the BC loss among the losses of the agent stage
    prompts: bool = True        # False: the policy isn't told its task ("notask")
    pretrained: bool = True     # False: BC from scratch, on the latents but on fresh dynamics
    terminal_weight: float = 20.0   # of the rare class in the continue head's loss
    practice: str = "ladder"    # tasks that imagination practises: "ladder" | "all" (paper)
    context: int = 8            # data frames before an imagined rollout
    horizon: int = 12           # 15 (ours: the paper gives none)
    temperature: float = 1.0    # of the imitated policy that practice starts from and stays near
    k: int = 1                  # sampling steps of an imagined frame; 0: as the dynamics' k (paper)
    finest: bool = True         # told the finest step in these, which knows a context best
    once: bool = True           # a return ends with its task's event, as a prompt does
    gamma: float = 0.95         # 0.997
    lam: float = 0.95
    pmpo_alpha: float = 0.5     # 0.5
    pmpo_beta: float = 0.3      # 0.3
    objective: str = "pmpo"     # "pmpo" | "advantage": weighted by it, normalised (ablation)
    h_pass: str = "commit"      # h of imagined frames: "commit" | "denoise", last pass (ablation)
    corrupt: bool = True        # False (ablation): frames enter the context without noise

    def __post_init__(self):
        check_config("agent", self, zero=("mtp", "k"),
                     shares=("relevant", "ladder", "gamma", "lam", "pmpo_alpha"))
        for name, words in (("bc_level", ("context", "uniform")), ("h_pass", ("commit", "denoise")),
                            ("objective", ("pmpo", "advantage")), ("practice", ("ladder", "all"))):
            if getattr(self, name) not in words:
                raise UserError(f"Got agent.{name} {getattr(self, name)!r}, need one of {words}.")
        if not self.temperature:
            raise UserError("Got agent.temperature 0, need float above 0.")


# ------------------------------------------------------------------ symexp two-hot, the heads

def symexp_bins(n):
    """(n,) bin centres, symmetric and dense around 0: symexp of an even grid from -10 to 10."""
    x = torch.linspace(-10, 10, n)
    return x.sign() * x.abs().expm1()


def two_hot(x, bins):
    """x (...) -> the two bins (..., 2) beside it, and their weights, whose mean is x (clamped)."""
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
    """(..., nb + sum of categories) -> binary logits (..., nb), list of categorical (..., size)."""
    binary, *parts = logits.split([spec.binary, *spec.categorical], -1)
    return binary, parts


def action_log_prob(spec, logits, actions):
    """ln pi(a) of actions {binary (..., nb), categorical (..., nc)}: the parts are independent."""
    binary, parts = split_logits(spec, logits)
    total = (F.logsigmoid(binary) - (1 - actions["binary"].float()) * binary).sum(-1)
    for i, part in enumerate(parts):
        index = actions["categorical"][..., i:i + 1].long()
        total = total + part.log_softmax(-1).gather(-1, index)[..., 0]
    return total


def sample_action(spec, logits, generator=None):
    """Draw actions from logits (B, n). Returns a dict of (B, nb), (B, nc) and (B, 0)."""
    binary, parts = split_logits(spec, logits)
    keys = torch.rand(binary.shape, generator=generator, device=logits.device) < binary.sigmoid()
    choices = [torch.multinomial(part.softmax(-1), 1, generator=generator) for part in parts]
    empty = torch.zeros(len(logits), 0, device=logits.device)
    return {"binary": keys.to(torch.uint8), "continuous": empty,
            "categorical": torch.cat(choices, -1) if choices else empty.long()}


def action_kl(spec, logits, prior):
    """KL[pi || prior] (...), exact, summed over the action's parts."""
    binary, parts = split_logits(spec, logits)
    prior_binary, prior_parts = split_logits(spec, prior)
    p = binary.sigmoid()
    total = (p * (F.logsigmoid(binary) - F.logsigmoid(prior_binary))
             + (1 - p) * (F.logsigmoid(-binary) - F.logsigmoid(-prior_binary))).sum(-1)
    for part, prior_part in zip(parts, prior_parts, strict=True):
        log_p = part.log_softmax(-1)
        total = total + (log_p.exp() * (log_p - prior_part.log_softmax(-1))).sum(-1)
    return total


class Norm(nn.RMSNorm):
    """In fp32, also where autocast hands on bf16."""

    def forward(self, x):
        return super().forward(x.float())


class Head(nn.Module):
    """Small MLP on h (..., D) with one output layer for each distance: (..., distances, out)."""

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
    """Heads on the agent token's output h: policy, reward, continue, value, and the frozen prior
    that imagination training starts from and stays near. The reward head is asked about a task,
    which need not be the prompt: every frame can teach it about all of them."""

    def __init__(self, cfg, dim, action_spec, tasks):
        super().__init__()
        if action_spec.continuous:
            raise UserError("Got continuous actions, need binary or categorical ones for the "
                            "policy: discretise them, or stop after --stage dynamics.")
        self.cfg, self.spec, self.tasks = cfg, action_spec, tasks
        L = cfg.mtp
        self.policy = Head(dim, cfg.hidden, L + 1,
                           action_spec.binary + sum(action_spec.categorical))
        self.reward = Head(dim, cfg.hidden, L + 1, cfg.bins)
        self.question = nn.Embedding(tasks + 1, dim)
        self.continues = Head(dim, cfg.hidden, 1, 1)
        self.value = Head(dim, cfg.hidden, 1, cfg.bins)
        self.prior = copy.deepcopy(self.policy).requires_grad_(False)
        self.register_buffer("bins", symexp_bins(cfg.bins), persistent=False)

    def prompt(self, task):
        """task (...) as the agent token is told it: the last number where it learned without."""
        return task if self.cfg.prompts else torch.full_like(task, self.tasks)

    def freeze_prior(self):
        self.prior.load_state_dict(self.policy.state_dict())

    def sharpen(self, temperature):
        """From here on temperature 1 of policy and prior is what this temperature was before."""
        with torch.no_grad():
            for p in (*self.policy.out.parameters(), *self.prior.out.parameters()):
                p /= temperature

    def act(self, h, generator=None, temperature=1.0):
        """h (B, D) after frame t -> sampled actions that lead to frame t + 1, dict of (B, .).
        temperature < 1 sharpens the policy."""
        return sample_action(self.spec, self.policy(h, 1)[:, 0] / temperature, generator)

    def reward_logits(self, h, task, distances=None):
        """h (..., D), task (...), the one that is asked about -> (..., distances, bins)."""
        return self.reward(h + self.question(task), distances)

    def rewards(self, h, task):
        """Expected reward of a task on reaching the frame of h: the head at distance 0."""
        return two_hot_mean(self.reward_logits(h, task, 1)[..., 0, :], self.bins)

    def values(self, h):
        return two_hot_mean(self.value(h)[..., 0, :], self.bins)

    def continue_prob(self, h):
        """P(the episode goes on at the frame of h). The loss weighed terminals up; the logit is
        moved back by the log of that weight, so that the probability is calibrated."""
        logit = self.continues(h)[..., 0, 0]
        return torch.sigmoid(logit + torch.tensor(self.cfg.terminal_weight).log())


# ------------------------------------------------------------------------------ equation 9

def targets_ahead(x, first, L):
    """x (B, T, ...) -> x[:, t + first + n] for n = 0 .. L as (B, T, L + 1, ...), and valid
    (B, T, L + 1), False where that lies past the end of the window."""
    T = x.shape[1]
    index = torch.arange(T, device=x.device)[:, None] + first + torch.arange(L + 1, device=x.device)
    valid = (index < T).expand(len(x), T, L + 1)
    return x[:, index.clamp(max=T - 1)], valid


def behavior_loss(policy_log_prob, policy_valid, reward_log_prob, reward_valid):
    """Eq. 9 (Section 3.3): - sum_n ln p(a[t + 1 + n] | h_t) - sum_n ln p(r[t + n] | h_t), n = 0..L.

    All (B, T, L + 1), from targets_ahead with first = 1 and 0; averaged over the valid entries.
    (Print: a[t + n]. Our h_t has seen a_t, so that would be copying.) Returns the two terms.
    """
    mean = lambda x, valid: -(x * valid).sum() / valid.sum().clamp_min(1)
    return mean(policy_log_prob, policy_valid), mean(reward_log_prob, reward_valid)


def agent_losses(agent, h, actions, labelled, task, events, continues, relevant):
    """BC loss on rows with relevant (B,) True; reward and continue losses on all rows, the reward
    of the prompt at all distances ("reward") and that of every task at distance 0 ("events").

    h (B, T, D), labelled, task, continues (B, T), events (B, T, tasks). -> losses and metrics.
    """
    cfg, L = agent.cfg, agent.cfg.mtp
    known, valid = targets_ahead(labelled, 1, L)
    valid = valid & known & relevant[:, None, None]
    ahead = {name: targets_ahead(x, 1, L)[0] for name, x in actions.items()}
    policy = action_log_prob(agent.spec, agent.policy(h), ahead)
    rewards = F.pad(events, (0, 1)).gather(-1, task[..., None])[..., 0]
    reward, reward_valid = targets_ahead(rewards, 0, L)
    reward = two_hot_log_prob(agent.reward_logits(h, task), reward, agent.bins)
    bc, reward = behavior_loss(policy, valid, reward, reward_valid)
    weight = torch.where(continues > 0, 1.0, cfg.terminal_weight)
    cont = F.binary_cross_entropy_with_logits(agent.continues(h)[..., 0, 0], continues, weight)
    now = valid[..., 0]
    nll = -(policy[..., 0] * now).sum() / now.sum().clamp_min(1)
    losses = {"bc": bc, "reward": reward, "continue": cont}
    if agent.tasks:
        every = torch.arange(agent.tasks, device=h.device)
        every = agent.reward_logits(h[:, :, None], every, 1)[..., 0, :]
        losses["events"] = -two_hot_log_prob(every, events, agent.bins).mean()
    return losses, {"bc_next_action": nll.detach()}


# ---------------------------------------------------------------------- equations 10 and 11

def lambda_returns(rewards, continues, values, gamma, lam):
    """Eq. 10 (Section 3.3), left: all (B, T + 1), rewards[:, t] received on reaching state t.

    R[t] = r[t+1] + gamma c[t+1] ((1 - lam) v[t+1] + lam R[t+1]),  R[T] = v[T].
    (Print: r_t and v_t, which would bootstrap a value from itself.) rewards[:, 0] and
    continues[:, 0] are not used. Example: r = (., 1, 2, 3), see the test. Returns (B, T + 1).
    """
    returns = [values[:, -1]]
    for t in range(values.shape[1] - 2, -1, -1):
        mix = (1 - lam) * values[:, t + 1] + lam * returns[-1]
        returns.append(rewards[:, t + 1] + gamma * continues[:, t + 1] * mix)
    return torch.stack(returns[::-1], 1)


def value_loss(logits, returns, bins):
    """Eq. 10 (Section 3.3), right: - ln p(R | s), mean. logits (..., n), returns (...)."""
    return -two_hot_log_prob(logits, returns.detach(), bins).mean()


def pmpo_loss(log_prob, advantages, kl, alpha, beta):
    """Eq. 11 (Section 3.3), PMPO: log_prob, advantages, kl all (B, T).

    (1 - alpha) / |D-| sum_{D-} ln pi - alpha / |D+| sum_{D+} ln pi + beta / N sum KL[pi || prior]
    with D+ = {A >= 0}, D- = {A < 0} over batch and time: only the sign of A counts. An empty set
    adds nothing.
    """
    good = advantages >= 0
    mean = lambda mask: (log_prob * mask).sum() / mask.sum().clamp_min(1)
    return (1 - alpha) * mean(~good) - alpha * mean(good) + beta * kl.mean()


def advantage_loss(log_prob, advantages, returns, kl, beta):
    """Ablation of Eq. 11: the advantage itself, over the range of the middle 90 % of returns."""
    spread = torch.quantile(returns, 0.95) - torch.quantile(returns, 0.05)
    return -(log_prob * advantages / spread.clamp_min(1e-3)).mean() + beta * kl.mean()


@torch.no_grad()
def imagine_rollout(dynamics, agent, z, actions, labelled, task, horizon, generator, dream=None):
    """Plays the policy inside the dream, once from each data context.

    z (B, C, S_z, Z), actions[:, t] led to frame t, task (B, C). Returns h (B, horizon + 1, D),
    where h[:, 0] is the context's end, the sampled actions of (B, horizon, .), actions[:, t] taken
    at h[:, t], and the imagined latents (B, horizon, S_z, Z). dream: another class than Dream.
    """
    dream = (dream or Dream)(dynamics, generator)
    dream.corrupt, dream.k = agent.cfg.corrupt, agent.cfg.k or dream.k
    dream.d_label = dynamics.d_min if agent.cfg.finest else dream.d_label
    hs, chosen, frames = [dream.commit(z, actions, labelled, task)[:, -1]], [], []
    for _ in range(horizon):
        action = {k: x[:, None] for k, x in agent.act(hs[-1], generator).items()}
        z, h = dream.step(action, task[:, -1:])
        h = dream.h_denoise if agent.cfg.h_pass == "denoise" else h
        chosen.append(action), hs.append(h[:, 0]), frames.append(z)
    actions = {k: torch.cat([a[k] for a in chosen], 1) for k in chosen[0]}
    return torch.stack(hs, 1), actions, torch.cat(frames, 1)


def imagination_losses(agent, h, actions, task):
    """Losses of policy and value head on a rollout from imagine_rollout under the prompt task (B,).
    The advantage R[t] - v[t] scores the action taken at h[:, t], t < T; what comes after the
    prompt's end, or the player's, teaches nothing."""
    cfg = agent.cfg
    with torch.no_grad():
        values, continues = agent.values(h), agent.continue_prob(h)
        rewards = agent.rewards(h, task[:, None])
        if cfg.once:                    # the event's chance is that of the prompt's being over
            continues = continues * (1 - rewards.clamp(0, 1))
        live = F.pad(continues[:, 1:-1].cumprod(1), (1, 0), value=1.0)
        seen = live > 0.5
        returns = lambda_returns(rewards, continues, values, cfg.gamma, cfg.lam)[:, :-1]
        advantages = returns - values[:, :-1]
        prior = agent.prior(h[:, :-1], 1)[:, :, 0]
    logits = agent.policy(h[:, :-1], 1)[:, :, 0]
    log_prob = action_log_prob(agent.spec, logits, actions)[seen]
    kl = action_kl(agent.spec, logits, prior)[seen]
    returns, advantages = returns[seen], advantages[seen]
    policy = (pmpo_loss(log_prob, advantages, kl, cfg.pmpo_alpha, cfg.pmpo_beta)
              if cfg.objective == "pmpo" else
              advantage_loss(log_prob, advantages, returns, kl, cfg.pmpo_beta))
    losses = {"policy": policy,
              "value": value_loss(agent.value(h[:, :-1])[seen][:, 0], returns, agent.bins)}
    spread = returns.var().clamp_min(1e-8)
    return losses, {"imagined_reward": (live * rewards[:, 1:]).sum(1).mean(),
                    "kl_prior": kl.mean().detach(), "entropy": -log_prob.mean().detach(),
                    "value_mean": values.mean(),
                    "value_explained": 1 - advantages.var() / spread,
                    "positive_share": (advantages >= 0).float().mean()}


# --------------------------------------------------------------- devices, reading a trained run

def pick_device(name="auto"):
    """--device: "auto" is cuda, then mps, then cpu."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.ones((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Got --device {name}, which torch can't use here "
                        f"({str(error).splitlines()[0]}). Use --device auto.") from None


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(device, name="auto"):
    """--dtype: "auto" is bf16 where the hardware has it, fp16 on CUDA without, else fp32."""
    if name == "auto" and device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "fp16"
    if name == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if device.type == "cpu" and fast else "fp32"
    if name not in DTYPES:
        raise UserError(f"Got --dtype {name}, need auto, bf16, fp16 or fp32.")
    return name


def autocast(device, dtype="auto"):
    """Context in which matrix products run in `dtype`. Parameters, norms and losses stay fp32."""
    dtype = DTYPES[pick_dtype(device, dtype)]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def freeze(module, device, dtype="auto"):
    """For use without training: no gradients, and the matrices of linear layers held in the dtype
    that autocast would cast them to anew in every call."""
    module.to(device).eval().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.to(DTYPES[pick_dtype(device, dtype)])
    return module


STAGES = ("tokenizer", "dynamics", "agent", "imagine")
VERSION = 1                 # of checkpoints; those without one are of version 1
READ_ERRORS = (OSError, KeyError, TypeError, RuntimeError, ValueError, EOFError, AttributeError,
               IndexError, pickle.UnpicklingError, zipfile.BadZipFile)


def load_checkpoint(path, device="cpu"):
    """The dict in a checkpoint file. UserError where it is damaged, foreign or of another version:
    torch alone wouldn't notice a changed byte, the sums in the zip file show it."""
    try:
        with zipfile.ZipFile(path) as file:
            if bad := file.testzip():
                raise ValueError(f"{bad} in it has changed")
        state = torch.load(path, map_location=device, weights_only=True)
        if state.get("version", 1) != VERSION:
            raise ValueError(f"version {state['version']}, need {VERSION}; commit "
                             f"{state.get('commit')} wrote it")
        return state
    except READ_ERRORS as error:
        raise UserError(f"Can't read the checkpoint {path} ({type(error).__name__}: "
                        f"{(str(error) or '?').splitlines()[0]}): restore it, or train that stage "
                        "again with --resume no.") from None


@dataclass
class Run:
    """What a checkpoint holds. dynamics and agent are None before their stages."""
    path: Path
    stage: str
    spec: EnvSpec
    tokenizer: Tokenizer
    dynamics: Dynamics = None
    agent: Agent = None
    meta: dict = None

    @property
    def device(self):
        return self.tokenizer.latent_std.device


def load_run(path, stage=None, device="cpu", dtype=None):
    """Reads runs/NAME (its latest stage, or the one named) or a checkpoint file, in eval mode.
    With a dtype tokenizer and dynamics are frozen in it, for use without training.

    Raises UserError where there is none, or it can't be read.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        found = [s for s in STAGES if (path / f"{s}.pt").exists() and stage in (None, s)]
        if not found:
            raise UserError(f"No {stage or 'checkpoint'} in {path}: run 'python train.py --stage "
                            f"{stage or 'all'} --run {path.name}' first.")
        path = path / f"{found[-1]}.pt"
    state = load_checkpoint(path, device)
    try:
        spec, cfg = EnvSpec.from_json(state["spec"]), state["config"]
        run = Run(path, state["stage"], spec, Tokenizer(TokenizerConfig(**cfg["tokenizer"])),
                  meta={k: state[k] for k in ("step", "commit", "config", "dataset", "made_of",
                                              "seconds") if k in state})
        if "dynamics" in state:
            run.dynamics = Dynamics(DynamicsConfig(**cfg["dynamics"]), spec.actions)
        if "agent" in state:
            run.agent = Agent(AgentConfig(**cfg["agent"]), cfg["dynamics"]["dim"], spec.actions,
                              len(spec.tasks))
        for name in ("tokenizer", "dynamics", "agent"):
            if module := getattr(run, name):
                module.load_state_dict(state[name])
                freeze(module, device, dtype if dtype and name != "agent" else "fp32")
    except READ_ERRORS as error:
        raise UserError(f"Got {path}, which is no checkpoint of this code ({type(error).__name__}: "
                        f"{(str(error) or '?').splitlines()[0]}): train it again with --resume no, "
                        "or check out the code that wrote it.") from None
    return run
