"""Table 1: other recipes for a world model, with our network, play and minutes.

The paper compares published models, in which people try sixteen tasks. Here: the dynamics
alone on one tokenizer, trained for about as long each; then the twenty kinds of Figure 5,
and dreams of 500 frames. Discrete tokens drawn one after another, as in MineWorld, are not
here.

    python -m paper.table1_world_models --run runs/crafter

What is trained stays under runs/paper/ and is not trained again; further flags go to
train.py.
"""

from pathlib import Path
from typing import NamedTuple

from agent import autocast, load_checkpoint, load_run, pick_device
from data import run_cli
from dynamics import Dream
from paper import results
from paper.bench import dream_rate
from paper.figure5_interactions import evaluate_interactions, interaction_set
from paper.rollouts import evaluate_long
from play import Result, Sampler, find, reference_of
from tokenizer import compile_module


class Recipe(NamedTuple):
    name: str
    flags: str                  # of train.py
    k: int
    cost: float = 1.0           # of a training step


NO_SHORTCUT = "--dynamics.p_boot 0 --dynamics.step_label min --dynamics.ramp false "
VELOCITY = NO_SHORTCUT + "--dynamics.prediction v --dynamics.loss_space v"
RECIPES = (
    Recipe("diffusion forcing, v-prediction, K = 16, as Oasis", VELOCITY, 16),
    Recipe("diffusion forcing, v-prediction, K = 4", VELOCITY, 4),
    # a quarter of the frames, and what happens, from a clean past: K = 1, squared error
    Recipe("next frame by regression", NO_SHORTCUT + "--train.event_rows 1 "
           "--dynamics.single_images 0", 1),
    # a forward is a third of a step; in half of the steps a quarter of the rows have two
    # more
    Recipe("shortcut forcing", "", 4, 1 + 0.5 * 0.25 * 2 / 3))
STEPS = 2000                    # of shortcut forcing
PAPER = {"MineWorld": (None, 2, None), "Oasis, small": (None, 20, None),
         "Oasis, large": (None, 5, 5), "Dreamer 4": (9.6, 21, 14)}
PUBLISHED = ("context, s", "frames/s on an H100", "tasks of 16")


def judge(folder, recipe, device, dtype):
    """-> rows of a trained recipe."""
    run, dataset = load_run(folder, "dynamics", device, dtype), reference_of(folder)
    interactions, sampler = interaction_set(), Sampler(recipe.k)
    if run.meta["config"]["train"]["compile"]:
        compile_module(run.dynamics, device)
    with autocast(device, dtype):
        speed = dream_rate(Dream(run.dynamics, k=recipe.k), 1, run.tokenizer)
    tried, _ = evaluate_interactions(run, interactions, dtype, sampler)
    passed = next(row for row in tried if row.of["kind"] == "mean of all kinds")
    long = evaluate_long(run, dataset, dtype=dtype, k=recipe.k)
    legal = find(long, "legal_cells", {"frame": 500})
    seconds = load_checkpoint(folder / "dynamics.pt")["seconds"]
    size = sum(p.numel() for net in (run.tokenizer, run.dynamics) for p in net.parameters())
    plain = {"parameters, millions": size / 1e6, "minutes of training": seconds / 60,
             "pixels": run.spec.width, "context, frames": run.dynamics.cfg.context,
             "frames/s": speed}
    return [*(Result("recipe", x, None, None, 1, "", {"measure": name})
              for name, x in plain.items()),
            passed._replace(name="recipe", of={"measure": "interactions passed"}),
            legal._replace(name="recipe", of={"measure": "legal cells after 500 frames"})]


def main():
    parser = results.make_parser(__doc__)
    args, flags = parser.parse_known_args()
    device, base, rows = pick_device(args.device), Path(args.run).name, []
    for recipe in RECIPES:
        same = next(i for i, other in enumerate(RECIPES) if other.flags == recipe.flags)
        steps = round(STEPS * RECIPES[-1].cost / recipe.cost)
        words = [*recipe.flags.split(), "--train.dynamics_steps", str(steps), *flags]
        folder = results.trained(f"table1_{same}", "dynamics", "--base", base, *words)
        rows += [row._replace(of={"recipe": recipe.name} | row.of)
                 for row in judge(folder, recipe, device, args.dtype)]
    rows += [Result("published", x, None, None, 1, "", {"model": model, "measure": measure})
             for model, published in PAPER.items()
             for measure, x in zip(PUBLISHED, published, strict=True) if x is not None]
    results.save("table1_world_models", rows, [0])


if __name__ == "__main__":
    run_cli(main)
