"""Results: rows in paper/results/*.json, tables and a picture of the READMEs made of them.

A row is a play.Result (name, value, low, high, n, unit, of, command) and how it came about:
commit, machine, date, seeds. "source" tells where a number was carried over from, if this
code has not measured it; tables mark that with a dagger.

    python -m paper.results --write                         the tables in the READMEs
    python -m paper.results --check                         exit 1 where one differs
    python -m paper.results --take runs/crafter default     results.json of a run
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from agent import load_run
from data import UserError, make_env, read_json, run_cli, write_whole
from play import Result, find, markdown_table, new_figure, picture_agents

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "paper/README.md")
DAGGER = "†"
FOOTNOTE = f"{DAGGER} Measured by an earlier version of this code."


def machine():
    """What speeds depend on, as a line."""
    info = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    parts = [cpus[0] if cpus else platform.processor(), f"{os.cpu_count()} cores",
             f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)


def commit():
    """Of this code; "-dirty" where files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError):     # no git on this machine
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def path_of(name):
    return ROOT / "paper" / "results" / f"{name}.json"


def load(name):
    """Rows of paper/results/NAME.json, [] where there is none."""
    path = path_of(name)
    return [SimpleNamespace(**row) for row in read_json(path)] if path.exists() else []


def write_rows(name, rows):
    """One row a line, so that a diff shows which numbers changed."""
    lines = [json.dumps(row, ensure_ascii=False, default=float) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    path_of(name).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path_of(name), lambda file: file.write(text.encode()))
    print(f"{path_of(name)}: {len(rows)} rows.")


def save(name, found, seeds=()):
    """Results of a script -> paper/results/NAME.json, in place of rows of equal name and
    labels; other rows stay."""
    command = ["python", "-m", f"paper.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    about = {"command": shlex.join(command), "commit": commit(), "machine": machine(),
             "date": str(datetime.date.today()), "seeds": list(seeds)}
    kept = [vars(row) for row in load(name) if not find(found, row.name, row.of)]
    write_rows(name, kept + [row._asdict() | about for row in found])


def take(folder, name):
    """results.json of a run -> paper/results/NAME.json, on the machine that trained it."""
    path = Path(folder) / "results.json"
    if not path.exists():
        raise UserError(f"Got {folder} without results.json, need a run that is evaluated: "
                        f"'python play.py eval --run {folder}'.")
    meta = load_run(folder).meta
    about = {"commit": meta["commit"], "machine": machine(),
             "seeds": [meta["made_with"]["seed"]],
             "date": str(datetime.date.fromtimestamp(path.stat().st_mtime))}
    write_rows(name, [row | about for row in read_json(path)])


def make_parser(doc, stage=None):
    """Flags of every script; stage: the default of --stage."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/crafter", help="folder of a training run")
    parser.add_argument("--stage", default=stage, help=f"that is judged, default {stage}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser


def trained(run, stage, *flags):
    """The folder runs/paper/RUN, where STAGE is trained: by train.py with these flags if it
    is missing. What was interrupted goes on."""
    folder = Path("runs") / "paper" / run
    if (folder / f"{stage}.pt").exists():
        print(f"{folder / stage}.pt is there; delete it to train it again.", flush=True)
        return folder
    words = ["--stage", stage, "--run", f"paper/{run}", *flags]
    print("python train.py " + shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, str(ROOT / "train.py"), *words]).returncode
    if code:                    # it has said why
        raise SystemExit(code)
    return folder


def chart(rows, x, series, ylabel, path):
    """Values and intervals by label x, a line for each value of the label `series`."""
    figure, ((axis,),) = new_figure(1, 1, (7, 3.6))
    for name in dict.fromkeys(row.of[series] for row in rows):
        some = [row for row in rows if row.of[series] == name]
        below = [0 if row.low is None else row.value - row.low for row in some]
        above = [0 if row.low is None else row.high - row.value for row in some]
        axis.errorbar([str(row.of[x]) for row in some], [row.value for row in some],
                      [below, above], fmt="o-", capsize=3, label=name)
    axis.set_xlabel(x)
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8)
    figure.savefig(ROOT / "paper" / path, dpi=80)


def missing(name):
    scripts = {"agents": "figure3_agents", "sizes": "bench --sizes paper",
               "cartpole": "results --take runs/CartPole-v1 cartpole"}
    return f"not yet measured by this code: `python -m paper.{scripts.get(name, name)}`"


def show(row, alone=False):
    """A cell: value (low to high), shares in percent, a dagger where it is carried over;
    alone: the value."""
    if row is None:
        return ""
    scale, unit = (100, " %") if row.unit == "share" else (1, "")
    digits = {"dB": ".1f", "achievements": ".2f"}.get(row.unit, ".3g")
    value, *interval = (format(scale * x, ",.0f" if abs(scale * x) >= 100 else digits)
                        for x in (row.value, row.low, row.high) if x is not None)
    if alone:
        return value + unit
    between = f" ({interval[0]} to {interval[1]})" if interval else ""
    return value + between + unit + (DAGGER if hasattr(row, "source") else "")


def table(head, lines):
    """Cells -> markdown, with the footnote where a dagger is in it."""
    text = markdown_table(head, lines)
    return f"{text}\n\n{FOOTNOTE}" if DAGGER in text else text


def pivot(file, name, down, across):
    """Rows of one name: the values of one label downwards, of another one across."""
    rows = [row for row in load(file) if row.name == name]
    if not rows:
        return missing(file)
    columns, lines = dict.fromkeys(row.of[across] for row in rows), {}
    for row in rows:
        line = lines.setdefault(row.of[down], dict.fromkeys(columns, ""))
        line[row.of[across]] = show(row)
    head = [f"{across} {x}" if isinstance(x, int) else x for x in columns]
    return table([down, *head], [[value, *line.values()] for value, line in lines.items()])


FRONT = (       # what, its row; what to compare it with, its row; or a film, by class
    ("tokenizer, PSNR in dB", "tokenizer_psnr", {}, "reconstruction"),
    ("dream, 1 frame ahead, PSNR in dB", "psnr", {"film": "dream", "horizon": 1},
     "above the last frame repeated", "gain_over_copying", {"horizon": 1}),
    ("dream, 16 frames ahead, PSNR in dB", "psnr", {"film": "dream", "horizon": 16},
     "above the last frame repeated", "gain_over_copying", {"horizon": 16}),
    ("dream, 1 frame ahead, changed cells right", "changed_cells", {"film": "next"},
     "next"),
    ("imitation (BC), achievements of 10", "achievements", {"agent": "BC"},
     "random play", "achievements", {"agent": "random"}),
    ("imagination, achievements of 10", "achievements", {"agent": "imagination"},
     "above BC", "achievements_gain", {"agent": "imagination", "than": "BC"}))


def by_class(rows, film):
    """The mean over what a cell truly shows, which hides no rare thing, and the worst."""
    of = {"film": film}
    mean, worst = (find(rows, name, of) for name in ("balanced_cells", "worst_class"))
    if mean is None:
        return ""
    name, share = worst.unit.removeprefix("share of "), 100 * worst.value
    return f"cells right, mean of {mean.n} classes {show(mean)}; {name}: {share:.0f} %"


def front_table():
    """The default run in six rows."""
    rows, lines = load("default"), []
    if not rows:
        return missing("results --take runs/crafter default")
    for what, name, of, *beside in FRONT:
        if len(beside) == 1:
            beside = by_class(rows, *beside)
        else:
            beside = f"{beside[0]} {show(find(rows, *beside[1:]))}".strip()
        lines.append([what, show(find(rows, name, of)), beside])
    return table(["what", "value (95 % interval)", "to compare with"], lines)


def hardware_table():
    """Hardware, minutes of the one command, what it gives."""
    lines = []
    for preset, file in (("cpu", "default"), ("cpu_long", "cpu_long"), ("gpu", "gpu")):
        rows, line = load(file), ["not run", "", "", ""]
        if total := find(rows, "wall_minutes", {"part": "total"}):
            line = [total.machine, show(total)]
            line += [show(find(rows, "achievements", {"agent": agent}))
                     for agent in ("BC", "imagination")]
        lines.append([f"`python train.py --preset {preset}`", *line])
    head = ["command", "hardware", "minutes", "BC, achievements of 10", "imagination"]
    return table(head, lines)


def agents_table(agents=(), tasks=()):
    """Agents downwards, weakest first, success across; agents, tasks: these alone."""
    rows = load("agents")
    scores = [row for row in rows if row.name == "achievements"
              and (not agents or row.of["agent"] in agents)]
    if not scores:
        return missing("agents")
    tasks = tasks or dict.fromkeys(row.of["task"] for row in rows if row.name == "success")
    lines = []
    for score in sorted(scores, key=lambda row: row.value):
        shares = [find(rows, "success", score.of | {"task": task}) for task in tasks]
        lines.append([score.of["agent"], score.n, show(score),
                      *(show(share, alone=True) for share in shares)])
    return table(["agent", "episodes", "achievements of 10", *tasks], lines)


def returns_table(file):
    """Agents of a world whose rewards are summed."""
    rows = [row for row in load(file) if row.name == "return"]
    lines = [[row.of["agent"], row.n, show(row)] for row in rows]
    return table(["agent", "episodes", "return"], lines) if rows else missing(file)


def departures_table(measured):
    """Where the code departs from the paper, and what that was measured to do."""
    lines = []
    for row in load("departures"):
        if (row.effect != "-") == measured:
            effect = [row.effect + (DAGGER if row.source else "")] * measured
            lines.append([row.what, row.paper, row.here, *effect])
    return table(["what", "paper", "here", *["measured effect"] * measured], lines)


TABLES = {      # name between <!-- table NAME --> and <!-- end -->: what writes it
    "results": front_table, "hardware": hardware_table,
    "departures": partial(departures_table, True),
    "unmeasured": partial(departures_table, False),
    "agents_front": partial(agents_table, ("random", "BC", "imagination", "player"), (
        "make_wood_pickaxe", "make_stone_pickaxe", "collect_iron", "collect_diamond")),
    "figure3": agents_table,
    "gains": partial(pivot, "agents", "achievements_gain", "agent", "than"),
    "tests": partial(pivot, "agents", "p_value", "task", "agent"),
    "imagined": partial(pivot, "agents", "imagined_success", "agent", "by"),
    "figure5": partial(pivot, "figure5_interactions", "interaction", "kind", "sampler"),
    "figure6": partial(pivot, "figure6_robot", "block_error", "film", "horizon"),
    "figure7": partial(pivot, "figure7_labels", "share_of_gap", "labelled", "measure"),
    "figure8": partial(pivot, "figure8_sampling", "frechet", "video", "K"),
    "ppo": partial(pivot, "ppo_in_dream", "success", "agent", "task"),
    "ppo_time": partial(pivot, "ppo_in_dream", "time", "agent", "task"),
    "cartpole": partial(returns_table, "cartpole"),
    "table1": partial(pivot, "table1_world_models", "recipe", "recipe", "measure"),
    "table1_paper": partial(pivot, "table1_world_models", "published", "model", "measure"),
    "table2": partial(pivot, "table2_cascade", "cascade", "design", "measure"),
    "rollouts": partial(pivot, "rollouts", "psnr", "film", "horizon"),
    "bench": partial(pivot, "bench", "bench", "what", "K"),
    "growth": partial(pivot, "bench", "growth", "size", "what"),
    "sizes": partial(pivot, "sizes", "size", "model", "size")}


def write_tables(path, check=False):
    """Fill the tables of a README -> those that differed. check: change nothing."""
    text, differed = path.read_text(), []

    def fill(match):
        begin, name, old, end = match.groups()
        if name not in TABLES:
            raise UserError(f"Got the table {name!r} in {path}, need one of "
                            f"{', '.join(TABLES)}: correct its name.")
        new = f"\n{TABLES[name]()}\n"
        if new != old:
            differed.append(name)
        return begin + new + end

    marks = r"(?s)(<!-- table (\w+) -->)(.*?)(<!-- end -->)"
    filled = re.sub(marks, fill, text)
    if differed and not check:
        write_whole(path, lambda file: file.write(filled.encode()))
    return differed


def front_picture():
    """assets/agents.png: success of four agents, by achievement."""
    four = ("random", "BC", "imagination", "player")
    rows = [Result(*(getattr(row, field) for field in Result._fields))
            for row in load("default") if row.of.get("agent") in four]
    measured = tuple(dict.fromkeys(row.of["task"] for row in rows if row.name == "success"))
    spec = replace(make_env("crafter").spec, achievements=measured)
    picture_agents(ROOT / "assets" / "agents.png", spec, rows, "success")


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="the tables")
    what.add_argument("--check", action="store_true", help="exit 1 where a table differs")
    what.add_argument("--take", nargs=2, metavar=("RUN", "NAME"), help="results of a run")
    args = parser.parse_args()
    if args.take:
        return take(*args.take)
    differed = {name: write_tables(ROOT / name, args.check) for name in READMES}
    for name, tables in differed.items():
        verb = "differs" if args.check else "is new"
        print(f"{name}: {', '.join(tables) or 'nothing'} {verb}")
    if args.write:
        front_picture()
    if args.check and any(differed.values()):
        raise SystemExit("Run 'python -m paper.results --write'.")


if __name__ == "__main__":
    run_cli(main)
