"""Exercises with answers that a machine checks.

    python -m paper.exercises        what there is
    python -m paper.exercises 3      the text of number 3, a file to begin with, and whether
                                     it is passed, or why not yet

Files lie in exercises/, beside the code; write into them and call again. 6 trains a small
run, 7 and 8 begin with the default's, runs/crafter, and train more of such stages.
"""
import argparse
import importlib.util
import random
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

import agent
import dynamics
import tokenizer
from data import UserError, read_json, run_cli
from paper.results import ROOT
from play import find, read_metrics, read_results

HERE = Path("exercises")


class Bug(NamedTuple):
    file: str
    right: str
    planted: str


BUGS = (Bug("agent", "returns.append(rewards[:, t + 1]", "returns.append(rewards[:, t]"),
        Bug("agent", "good = advantages >= 0", "good = advantages <= 0"),
        Bug("dynamics", "tau + step[:, :, 0, 0], half)", "tau, half)"),
        Bug("dynamics", "return 0.9 * tau + 0.1", "return 0.9 * (1 - tau) + 0.1"),
        Bug("tokenizer", "(age >= 0) & (age < context)", "(age >= 0) & (age <= context)"),
        Bug("tokenizer", "is_reader[:, None] | ~is_reader[None, :]",
            "~is_reader[:, None] | is_reader[None, :]"))


class NotYet(Exception):
    """Why an exercise isn't passed."""


def need(fact, why):
    if not fact:
        raise NotYet(why)


def student(name, start=None, function=None):
    """exercises/NAME.py as a module, or a function of it; with `start` it is written where
    it is missing."""
    path = HERE / f"{name}.py"
    if not path.exists():
        need(start is not None, f"{path} is missing")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(start)
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise NotYet(f"{path} can't be imported: {type(error).__name__}: {error}") from None
    need(function is None or hasattr(module, function), f"{path} has no {function}")
    return getattr(module, function) if function else module


def answer(function, *inputs):
    """What the student's function returns; it may change its inputs."""
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    try:
        return function(*inputs)
    except NotYet:
        raise
    except NotImplementedError:
        raise NotYet(f"{function.__name__} is still to be written") from None
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise NotYet(f"{function.__name__} raises {kind}: {error}") from None


def equal(a, b, what):
    need(isinstance(a, torch.Tensor) and a.shape == b.shape, f"{what}: got {a}, need a "
         f"tensor of shape {tuple(b.shape)}")
    off = float((a.detach().double() - b.detach().double()).abs().max())
    need(off < 1e-4, f"{what} is off by {off:.3g}")


def net(z, tau, d):
    """In place of a network: some clean latents that depend on all three, for levels and
    steps that a network knows."""
    if not ((d >= 1 / 16) & (tau % d == 0) & (tau < 1)).all():
        raise ValueError("the network is asked about a d below d_min, or a tau that is no "
                         "multiple of d in 0 .. 1 - d")
    weight = torch.ones((), requires_grad=True)
    return weight * (0.5 * z + tau[:, :, None, None] + d[:, :, None, None] ** 2)


def outputs(agent, dynamics, tokenizer):
    """{function: what it returns for some input}, for those that BUGS are in."""
    rng = torch.Generator().manual_seed(0)
    x = [torch.randn(3, 6, generator=rng) for _ in range(5)]
    z = torch.randn(2, 4, 3, 5, generator=rng)
    tau, d = torch.full((2, 4), 0.25), torch.full((2, 4), 0.5)
    counted, frames = torch.ones(3, 6, dtype=torch.bool), torch.arange(9)
    return {"lambda_returns": agent.lambda_returns(x[0], x[1].sigmoid(), x[2], 0.9, 0.8),
            "pmpo_loss": agent.pmpo_loss(*x[:3], counted, 0.5, 0.3),
            "shortcut_target": dynamics.shortcut_target(net, z, z + 1, tau, d / 2, 1 / 16),
            "ramp_weight": dynamics.ramp_weight(tau),
            "euler_sample": dynamics.euler_sample(net, z, 4),
            "time_mask": tokenizer.time_mask(frames, frames, 4),
            "reader_mask": tokenizer.reader_mask(3, 2)}


def planted_bug():
    """Find the planted bug. exercises/agent.py, dynamics.py and tokenizer.py are copies of
    this repository's, one line of which is wrong: one of six bugs under which every loss
    falls. Find it without a diff, by reading beside the paper; mend it there. (Delete the
    three files and call again: another bug.)"""
    paths = {name: HERE / f"{name}.py" for name in ("agent", "dynamics", "tokenizer")}
    if not any(path.exists() for path in paths.values()):
        HERE.mkdir(exist_ok=True)
        bug = random.choice(BUGS)
        for name, path in paths.items():
            text = (ROOT / f"{name}.py").read_text()
            if name == bug.file:
                text = text.replace(bug.right, bug.planted)
            path.write_text(text)
    copies = [student(name) for name in paths]
    true = outputs(agent, dynamics, tokenizer)
    for name, x in answer(outputs, *copies).items():
        need(torch.equal(x, true[name]), "something is still wrong in one of the three "
             "files. (Which test would have seen it?)")


def noise_schedule():
    """Another noise schedule. In three lines of exercises/schedule.py: draw more frames
    nearly clean (the mean of tau at least 0.1 higher), d as before, all levels possible,
    tau still on the grid of its d. Put them into dynamics.py for a moment: which test of
    `python -m pytest test_all.py -k eq4` fails, and why?"""
    source = (ROOT / "dynamics.py").read_text()
    begin = source.index("def sample_tau_d")
    text = source[begin:source.index("\n\n\n", begin)]
    start = f"import math\n\nimport torch\n\n\n{text}\n"
    own, drawn = student("schedule", start, "sample_tau_d"), []
    for _ in range(2):
        x = answer(own, 500, 40, 16, 400, torch.Generator().manual_seed(0))
        need(isinstance(x, tuple) and len(x) == 2, "sample_tau_d doesn't return tau, d")
        drawn.append(torch.stack(x))
    need(torch.equal(*drawn), "the same generator draws other levels the second time")
    need((drawn[0][1, 400:] == 1 / 16).all(), "rows behind n_boot have a d above d_min")
    tau, d = drawn[0][:, :400]
    need(torch.allclose(tau / d, (tau / d).round()), "some tau is no multiple of its d")
    need(bool(((tau >= 0) & (tau <= 1 - d)).all()), "some tau is not in 0 .. 1 - d")
    share = [(d == 0.5 ** i).float().mean() for i in range(5)]
    need(max(abs(x - 0.2) for x in share) < 0.03, "step sizes are no more equally likely")
    need(len(tau[d == 1 / 16].unique()) == 16, "some level is never drawn at d = 1/16")
    need(tau.mean() > 0.41, f"the mean of tau is {tau.mean():.2f}, need 0.41; Equation 4 "
         "has 0.31")


def bootstrap_target():
    """Equation 7. Write its target from the paper, in exercises/equation7.py, without a
    look at dynamics.py. Where d = d_min the target is z1; elsewhere two half steps, through
    which no gradient flows. The network must not be asked about steps below d_min."""
    own = student("equation7", '''import torch


def shortcut_target(f, z_tilde, z1, tau, d, d_min):
    """f(z, tau, d) -> clean latents (B, T, S, Z); tau and d (B, T). Returns the clean
    latents with which the network's z1_hat is compared, not the velocity."""
    raise NotImplementedError
''', "shortcut_target")

    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    d = torch.tensor([[0.5, 0.25, 1 / 16, 0.5]] * 2)
    for tau in (torch.zeros(2, 4), d):
        inputs = net, z, z + 1, tau, d, 1 / 16
        start, target = f"the target from tau = {tau[0].tolist()}", answer(own, *inputs)
        equal(target, dynamics.shortcut_target(*inputs), start)
        need(not target.requires_grad, f"{start} carries gradients of the network")


def returns():
    """Equation 10. Write TD(lambda) returns in exercises/equation10.py. rewards[:, t] came
    on reaching state t. Why is the paper's print, with r_t and v_t, a value learned from
    itself?"""
    own = student("equation10", '''import torch


def lambda_returns(rewards, continues, values, gamma, lam):
    """All (B, T + 1) -> (B, T + 1); the last return is the last value."""
    raise NotImplementedError
''', "lambda_returns")
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for lam in (0.0, 1.0, 0.8):
        inputs = x[0], (x[1] > -0.5).float(), x[2], 0.9, lam
        equal(answer(own, *inputs), agent.lambda_returns(*inputs), f"at lambda {lam} it")


def sampling():
    """Equation 2. Write the sampler in exercises/equation2.py: K Euler steps from noise. To
    which level do you tell the network that z belongs, and what happens at the last step if
    you tell the next one?"""
    own = student("equation2", '''import torch


def euler_sample(f, z, k):
    """f(z, tau, d), tau and d (B, T) -> clean latents (B, T, S, Z). z: noise (B, T, S,
    Z). Returns clean latents."""
    raise NotImplementedError
''', "euler_sample")

    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    for k in (1, 4):
        equal(answer(own, net, z, k), dynamics.euler_sample(net, z, k), f"at K = {k} it")


def random_play(env, n=500):
    """-> frames of n random steps, and how many of them did a task."""
    env.action_space.seed(0)
    frames, done = [env.reset(seed=0)[0]], 0
    for _ in range(n):
        frame, _, terminated, truncated, info = env.step(env.action_space.sample())
        frames.append(np.array(frame))
        events = info.get("events", {})
        need(set(events) <= set(env.tasks), f"{set(events)} are not all of its tasks")
        done += any(events.values())
        if terminated or truncated:
            env.reset()
    return frames, done


def own_world():
    """Your own world. exercises/world.py: a gymnasium.Env named Game with uint8 frames and
    `tasks`, one of which random play does sometimes. Then train its world model, in
    minutes: `python train.py --preset smoke --train.dynamics_steps 300 --data.env
    exercises.world:Game --run world`. Its dream must beat the last frame shown again, and
    itself under other actions, one frame ahead, by their intervals."""
    start = "import gymnasium\n\n\nclass Game(gymnasium.Env):\n    pass\n"
    env = answer(student("world", start, "Game"))
    tasks = getattr(env, "tasks", ())
    need(tasks and not isinstance(tasks, str), "Game has no tuple of tasks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer(check_env, env, True)
    frames, done = answer(random_play, env)
    need(all(x.dtype == np.uint8 for x in frames), "its frames are no uint8")
    need(any(not np.array_equal(frames[0], frame) for frame in frames), "it never moves")
    need(0 < done < 450, f"{done} of 500 random steps do a task")
    need(trained("world")["data"]["env"] == "exercises.world:Game",
         "runs/world is of another world")
    for name in ("gain_over_copying", "gain_over_shuffled"):
        row = find(read_results("runs/world"), name, {"horizon": 1})
        need(row, "runs/world has no results yet: python play.py eval --run runs/world")
        need(row.low > 0, f"its {name} is {row.value:.2f} dB ({row.low:.2f} to "
             f"{row.high:.2f}): train for longer, or does its dream see the action?")


def trained(run, **flags):
    """The config of a run that was trained with these flags, dots as __."""
    path = Path("runs") / run / "config.json"
    need(path.exists(), f"runs/{run} is missing")
    config = read_json(path)
    for name, value in flags.items():
        prefix, name = name.split("__")
        need(config[prefix][name] == value, f"runs/{run} has --{prefix}.{name} "
             f"{config[prefix][name]}, need {value}")
    return config


def alike(run, prefix, *others):
    """All settings of a run are those of runs/crafter, but `others` of one prefix."""
    then, now = trained("crafter"), trained(run)
    for key in ("data", "tokenizer", "dynamics", "agent", "train"):
        for name, value in then[key].items():
            free = key == prefix and name in others
            need(free or now[key].get(name) == value, f"runs/{run} has --{key}.{name} "
                 f"{now[key].get(name)}, runs/crafter {value}")


def same_file(stage, *runs):
    return len({agent.sha256_of(f"runs/{run}/{stage}.pt") for run in runs}) == 1


def diffusion_forcing():
    """Diffusion forcing. Train the dynamics without bootstrap (README, "Where is what",
    says which flags) on the tokenizer of runs/crafter, as runs/forcing (`--stage dynamics
    --base crafter --run forcing`), else alike, and judge both with one sampling step told
    1/K (`python play.py eval --run runs/NAME --k 1 --step_label own --stage dynamics`).
    Shortcut forcing must win 4 frames ahead. When does it not? (Judge runs/crafter as it
    was trained again afterwards.)"""
    alike("forcing", "dynamics", "p_boot", "step_label")
    trained("forcing", dynamics__p_boot=0.0)
    need(same_file("tokenizer", "crafter", "forcing"), "they have two tokenizers")
    rows = [find(read_results(f"runs/{run}"), "psnr", {"film": "dream", "horizon": 4})
            for run in ("crafter", "forcing")]
    need(all(rows), "judge both runs first")
    asked = [re.search(rf"--{flag}[ =]{value}\b", row.command) for row in rows
             for flag, value in (("k", "1"), ("step_label", "own"))]
    need(all(asked), "judge both with --k 1 --step_label own; the last evaluation counts")
    need(rows[0].value > rows[1].value, f"crafter {rows[0].value:.1f} dB, forcing "
         f"{rows[1].value:.1f}")


def exploit():
    """Exploit the dream, and stop it. Imagine with --agent.pmpo_beta 0, else as crafter
    (`--stage imagine --base crafter --run exploit`), then find another remedy than beta's
    default (run stopped, from the same BC). Judge all three by `python play.py eval --run
    runs/NAME`. Passed: exploit imagines more reward than crafter and reaches fewer
    achievements; stopped reaches more than exploit."""
    alike("exploit", "agent", "pmpo_beta")
    trained("exploit", agent__pmpo_beta=0.0)
    stopped, crafter = trained("stopped"), trained("crafter")
    for name in ("log_every", "compile", "shard"):          # they are no remedy
        stopped["train"][name] = crafter["train"][name]
    need(stopped["data"] == crafter["data"], "runs/stopped is judged otherwise, or learned "
         "from other play")
    need(stopped != crafter, "runs/stopped has all the settings of runs/crafter")
    need(same_file("agent", "crafter", "exploit", "stopped"), "they begin with other BCs")
    reward, score, commands = {}, {}, set()
    for run in ("crafter", "exploit", "stopped"):
        lines = [x["imagined_reward"] for x in read_metrics(f"runs/{run}")
                 if x["stage"] == "imagine"]
        row = find(read_results(f"runs/{run}"), "achievements", {"agent": "imagination"})
        need(lines and row, f"runs/{run} isn't trained and judged yet")
        reward[run], score[run] = np.mean(lines[-len(lines) // 4:]), row.value
        commands.add(row.command.replace(run, "NAME"))
    need(len(commands) == 1, f"the three are judged by other commands: {commands}")
    need(reward["exploit"] > reward["crafter"], "the imagined reward of exploit is "
         f"{reward['exploit']:.3f}, need more than crafter's {reward['crafter']:.3f}")
    best = min(score["crafter"], score["stopped"])
    need(score["exploit"] < best, f"exploit reaches {score['exploit']:.2f} achievements, "
         f"need fewer than crafter and stopped, {best:.2f}")


EXERCISES = (planted_bug, noise_schedule, bootstrap_target, returns, sampling, own_world,
             diffusion_forcing, exploit)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", help=f"1 to {len(EXERCISES)}")
    number = parser.parse_args().number
    if number is None:
        for i, exercise in enumerate(EXERCISES, 1):
            print(f"{i}. {exercise.__doc__.split('.')[0]}")
        return
    if not 1 <= number <= len(EXERCISES):
        raise UserError(f"Got exercise {number}, need 1 to {len(EXERCISES)}.")
    exercise = EXERCISES[number - 1]
    print(" ".join(exercise.__doc__.split()), end="\n\n")
    try:
        exercise()
    except NotYet as why:
        raise SystemExit(f"Not yet: {why}.") from None
    print("Passed.")


if __name__ == "__main__":
    run_cli(main)
