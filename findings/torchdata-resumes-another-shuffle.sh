#!/bin/bash
# torchdata's StatefulDataLoader resumes shuffle=True exactly, and goes on in another order where the same shuffle was
# given as a sampler: some rows come twice in the epoch, others never.
#
# Version:      torchdata 0.11.0, torch 2.13.0, numpy 2.3.5, CPython 3.11, CPU; without workers and with two alike.
# Likely guess: sampler=RandomSampler(data) is what shuffle=True makes of itself; state_dict() in the middle of an epoch
#               holds what is needed for any sampler of torch.utils.data, or says that it does not, as it does for an
#               IterableDataset without a state.
# Behaviour:    of RandomSampler without a generator, SubsetRandomSampler and WeightedRandomSampler only the number of
#               rows is kept. The new process draws a new order and skips that many of it. Nothing is reported. With a
#               generator of a fixed seed, SubsetRandomSampler is right.
# Matters:      subsets (a validation split) and weights are why a sampler is given at all. After each resume the epoch
#               is not one any more, and a resumed run differs from an uninterrupted one although the state was saved. A
#               check with shuffle=True, or with the seed set again by the script, passes.
# Seen:         12 rows, resumed after 6: shuffle=True as without interruption, 0 rows twice; RandomSampler,
#               SubsetRandomSampler, WeightedRandomSampler (all weights 1, no replacement) another order, 3, 4 and 3
#               rows twice and as many never; SubsetRandomSampler with a seeded generator as without interruption, 0
#               twice
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "torchdata==0.11.0" "torch==2.13.0" "numpy==2.3.5"
cd "$scratch"
cat > resume.py <<'PYTHON'
import warnings

import torch
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

warnings.simplefilter("ignore")
rows = list(range(12))
arguments = {
    "shuffle=True": lambda: {"shuffle": True},
    "RandomSampler": lambda: {"sampler": RandomSampler(rows)},
    "SubsetRandomSampler": lambda: {"sampler": SubsetRandomSampler(rows)},
    "WeightedRandomSampler": lambda: {"sampler": WeightedRandomSampler([1.0] * 12, 12, replacement=False)},
    "seeded SubsetRandomSampler": lambda: {
        "sampler": SubsetRandomSampler(rows, generator=torch.Generator().manual_seed(7))
    },
}


def flat(batches):
    return [row for batch in batches for row in batch.tolist()]


def resumed(make, workers):
    torch.manual_seed(1)
    loader = StatefulDataLoader(rows, batch_size=3, num_workers=workers, **make())
    batches = iter(loader)
    first = flat([next(batches), next(batches)])
    state = loader.state_dict()
    rest = flat(batches)
    torch.manual_seed(2)
    new = StatefulDataLoader(rows, batch_size=3, num_workers=workers, **make())
    new.load_state_dict(state)
    found = flat(new)
    return found == rest, len(set(first) & set(found)), len(set(rows) - set(first) - set(found))


if __name__ == "__main__":
    holds = True
    for workers in (0, 2):
        for name, make in arguments.items():
            same, twice, never = resumed(make, workers)
            print(f"{workers} workers, {name}: {'same' if same else 'other'} order, {twice} twice, {never} never")
            holds = holds and (same and twice == 0 if name[0] == "s" else not same and twice == never > 0)
    raise SystemExit(0 if holds else 1)
PYTHON
"$scratch/venv/bin/python" resume.py
