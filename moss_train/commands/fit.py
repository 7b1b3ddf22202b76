"""`fit`: train, resume or fine-tune."""

import sys

from moss_train.config.fit_schema import FitConfig
from moss_train.training.run.fit import fit

SUMMARY = "Train a tokenizer, or resume a run that was stopped."

EXAMPLES = (
    "python -m moss_train fit experiment=cat_tiny data.train=/my/shards",
    "python -m moss_train fit experiment=cat_1b6 data.train=/shards/{speech,music,sound} name=first",
    "python -m moss_train fit experiment=finetune init=my-tokenizer data.train=/my/shards 'trainable=[decoder]'",
)


def run(config: FitConfig) -> int:
    """Run `fit` and print whether the run finished or stopped, and at which update. Returns 0."""
    result = fit(config)
    state = "finished" if result.update >= result.updates else "stopped"
    if result.rank == 0:
        print(f"{state} at update {result.update} of {result.updates}: {result.directory}", file=sys.stderr)
    return 0
