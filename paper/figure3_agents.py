"""Figures 3 and 4: agents."""
import re
from pathlib import Path

import numpy as np

from data import UserError, VecEnv, make_env
from play import (
    TEMPERATURES,
    TEST_SEED,
    VALIDATION_SEED,
    agent_entries,
    data_config,
    ladder_scores,
    played,
)


def compare_agents(folder, text, episodes, length, device, dtype="auto", workers=0):
    """text: "bc=seed*:agent,rl=seed*:imagine,cool=seed*:agent@best", an agent is a stage of all
    runs whose names match, at a temperature of its actions (default 1; best: of TEMPERATURES, by
    their mean ladder score in 50 validation worlds) -> entries for results.json."""
    env, firsts, entries = data_config(folder)["env"], {}, {}
    with (VecEnv(env, range(TEST_SEED, TEST_SEED + episodes), workers) as worlds,
          VecEnv(env, range(VALIDATION_SEED, VALIDATION_SEED + 50), workers) as trial):
        play_in = lambda runs, agent, worlds, t=1.0: np.stack([
            played(run, worlds, agent, length, device, dtype, t) for run in runs])
        for item in text.split(","):
            match = re.fullmatch(r"(\w+)=([^:]+):(agent|imagine)(?:@(best|\d*\.?\d+))?", item)
            name, pattern, stage, heat = match.groups("1") if match else ("", "-", "", "0")
            runs = [p for p in sorted(Path(folder).parent.glob(pattern))
                    if (p / f"{stage}.pt").exists()]
            if not runs or heat != "best" and not float(heat):
                raise UserError(f"Got --compare {item!r}, need NAME=RUNS:STAGE or NAME=RUNS:STAGE"
                                "@TEMPERATURE (above 0, or best) with the names of runs that have "
                                "a stage agent or imagine, * for any letters: bc=seed*:agent.")
            if heat == "best":
                scores = {t: ladder_scores(worlds.spec, play_in(runs, stage, trial, t)).mean()
                          for t in TEMPERATURES}
                heat = max(scores, key=scores.get)
                entries |= {f"validation_{name}_t{t:g}": (x, None, None, 50 * len(runs), "rungs")
                            for t, x in scores.items()}
            entries[f"temperature_{name}"] = float(heat), None, None, len(runs), ""
            firsts[name] = play_in(runs, stage, worlds, float(heat))
        for bound in ("random", *["player"] * hasattr(make_env(env), "player")):
            firsts[bound] = play_in([folder], bound, worlds)
    return entries | agent_entries(worlds.spec, firsts, length)
