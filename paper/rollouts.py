"""Long dreams."""
import numpy as np
import torch

from agent import autocast
from paper.figure8_sampling import dream_freely
from play import mean_interval, reader_of, to_tensors, write_film


@torch.no_grad()
def evaluate_long(run, dataset, length=500, context=16, dtype="auto", film=None):
    """Dreams of `length` frames from one context of each reference episode, early in the first ones
    and late in the last, with the recorded actions of the episodes that follow -> every 50 frames
    the share of legal cells and the map's brightness (dark cells are easily legal)."""
    device, reader = run.device, reader_of(dataset)
    long = [i for i in dataset.episodes("all") if dataset.lengths[i] >= context]
    n = len(long)
    start = np.array([(dataset.lengths[i] - context) * j // n for j, i in enumerate(long)])
    clips, shown = to_tensors(dataset.read(long, start, context), device)
    follow = []                                         # an episode's row 0 has no action
    for j in range(n):
        rows, i = [], j
        while sum(map(len, rows)) < length:
            i = (i + 1) % n
            rows.append(np.arange(dataset.offsets[long[i]] + 1, dataset.offsets[long[i] + 1]))
        follow.append(np.concatenate(rows)[:length])
    everything = {k: np.concatenate([dataset.episode(i)[k] for i in range(len(dataset.lengths))])
                  for k in shown}
    actions = {k: torch.as_tensor(x[np.stack(follow)], device=device).to(shown[k].dtype)
               for k, x in everything.items()}
    frames, cache = [], run.tokenizer.new_cache()
    with autocast(device, dtype):
        z = run.tokenizer.encode(clips["frames"])
        z = dream_freely(run, n, length, None, actions, (z, shown, clips["labelled"]))
        for part in z.split(50, 1):                     # as one who watches all of it sees it
            frames.append(run.tokenizer.decode(part, cache).cpu())
    frames, entries, legal = torch.cat(frames, 1).numpy(), {}, {}
    for t in range(50, length + 1, 50) if reader else ():
        legal[t] = (reader.read(frames[:, t - 1])[2] < reader.LEGAL).mean((1, 2))
        entries[f"legal_long_{t}"] = *mean_interval(legal[t]), n, "share"
        bright = frames[:, t - 1, :56].mean((1, 2, 3)) / 255
        entries[f"bright_long_{t}"] = *mean_interval(bright), n, "of white"
    if 500 in legal:
        entries["legal_long_500_minus_50"] = *mean_interval(legal[500] - legal[50]), n, "share"
    if film:
        write_film(film, np.concatenate(list(frames[:4, ::5]), -2))
    return entries
