"""Every table and figure, in order, from a run of all stages to the filled tables.

    python -m paper.all --list              what there is, and how long it took
    python -m paper.all --budget cpu        all of it; again: goes on where it broke off

What is done stands in runs/paper/all.json: delete it, and runs/, to begin anew. The budget
gpu trains the preset of that name, and Table 2 on a run of the preset cpu beside it.
"""
import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

from data import UserError, read_json, run_cli, write_json
from paper import results
from play import Result, find

SEEDS = [f"python train.py --stage {stage}{base} --run seed{seed} --seed {seed}"
         for seed in range(1, 5) for stage, base in (("agent", " --base crafter"),
                                                     ("imagine", ""))]
SHORT = " --train.dynamics_steps 600"               # of trainings that are compared alone
WORDS = {"cpu": {"short": SHORT, "file": "default", "small": "crafter"},
         "gpu": {"short": "", "file": "gpu", "small": "small"}}
PACKAGES = {"gym_pusht": "gym-pusht 'pymunk<7'", "stable_baselines3": "stable-baselines3"}
PLAN = {    # name: its commands, with WORDS and {budget}
    "default": ["python train.py --preset {budget} --run crafter",
                "python -m paper.results --take runs/crafter {file}"],
    "seeds": SEEDS,
    "figure3_agents": ["python -m paper.figure3_agents --run runs/crafter --agent "
                       "'BC=seed*:agent' --agent 'imagination=seed*:imagine'"],
    "figure5_interactions": ["python -m paper.figure5_interactions --run runs/crafter"],
    "rollouts": ["python -m paper.rollouts --run runs/crafter"],
    "figure8_sampling": ["python -m paper.figure8_sampling --run runs/crafter"],
    "figure7_labels": ["python -m paper.figure7_labels --run runs/crafter{short}"],
    "preset cpu": ["python train.py --preset cpu --run {small}"],
    "table2_cascade": ["python -m paper.table2_cascade --run runs/{small}"],
    "table1_world_models": ["python -m paper.table1_world_models --run runs/{small}"],
    "figure6_robot": ["python -m paper.figure6_robot"],
    "ppo_in_dream": ["python -m paper.ppo_in_dream --run runs/crafter"],
    "bench": ["python -m paper.bench", "python -m paper.bench --sizes minecraft",
              "python -m paper.bench --sizes paper"],
    "tables": ["python -m paper.results --write"]}


def minutes_of(name):
    row = find(results.load("all"), "minutes", {"script": name})
    return "not yet run whole" if row is None else f"{row.value:.0f} min, {row.machine}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="names, commands, minutes")
    what.add_argument("--budget", choices=("cpu", "gpu"), help="do all; cpu: shorter")
    args = parser.parse_args()
    words = {"budget": args.budget or "cpu", **WORDS[args.budget or "cpu"]}
    plan = {name: [x.format(**words) for x in commands] for name, commands in PLAN.items()}
    if args.list:
        for name, commands in plan.items():
            print(f"{name}: {minutes_of(name)}", *commands, sep="\n    ")
        return
    for module, package in PACKAGES.items():        # before hours of work
        if importlib.util.find_spec(module) is None:
            raise UserError(f"no package {module}", "it for one of the scripts",
                            f"pip install {package}")
    kept = Path("runs/paper/all.json")
    minutes, done = read_json(kept) if kept.exists() else ({}, [])
    for name, commands in plan.items():
        for command in commands:
            if command in done:
                continue
            print(f"{name}: {command}", flush=True)
            begin = time.perf_counter()
            try:
                ended = subprocess.run([sys.executable, *shlex.split(command)[1:]])
                code = ended.returncode
                if code == 0:
                    done.append(command)
            finally:                                # an interrupted one will go on
                spent = (time.perf_counter() - begin) / 60
                minutes[command] = minutes.get(command, 0) + spent
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, (minutes, done))
            if code:                                # it has said why
                raise SystemExit(code)
            if command == commands[-1]:
                total = sum(minutes[x] for x in commands)
                results.save("all", [Result("minutes", total, None, None, 1, "min",
                                            {"script": name})])


if __name__ == "__main__":
    run_cli(main)
