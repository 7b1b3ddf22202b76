"""Shares of the gradient at the decoder's output instead of weights (EnCodec, arXiv 2210.13438, section 3.4).

The sizes of the terms' gradients differ by orders of magnitude and change in the course of a run, so that a weight says
little about how much a term moves the decoder. Here a share says it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

REFERENCE = "reconstruction"
SMALLEST_NORM = 1e-12  # below it a term has no gradient to speak of


class GradientBalancer:
    """Replaces the weights of some terms, so that each one's gradient has a given share of what they have together.

    What they have together is the gradient that the reconstruction alone would have with its own weight, so that terms
    without a share (commitment, codebook, semantic and others) keep their place beside it. A term's size is the running
    mean of the norm of its gradient at the decoder's output, over all clips of an update; it is known after the update,
    so a term takes part from the second update on in which it is computed. A term with weight 0 has no part, the shares
    of those that are computed make up the whole, and the adversarial ramp lets theirs rise from 0.

    Args:
        shares: by term; only their ratios count.
        names: the terms that see the decoder's output.
        decay: of the running mean, per update.

    Raises:
        ValueError: no reconstruction, an unknown term, or a share that is not above 0.
    """

    def __init__(self, shares: Mapping[str, float], names: Sequence[str], decay: float = 0.999) -> None:
        if unknown := set(shares) - set(names):
            raise ValueError(f"objective.balance: {sorted(unknown)} not among the decoder's terms {sorted(names)}")
        if REFERENCE not in shares:
            raise ValueError(f"objective.balance needs a share for {REFERENCE}: the others are measured by it")
        for name, share in shares.items():
            is_number = isinstance(share, int | float) and not isinstance(share, bool)
            if not is_number or not 0 < share < math.inf:
                raise ValueError(f"objective.balance.{name}={share} has to be a number above 0")
        self.shares = dict(shares)
        self.decay = decay
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def norm(self, name: str) -> float:
        """Return the running mean of a term's norm, 0 for one that was not seen yet."""
        return self.sums[name] / self.counts[name] if name in self.sums else 0.0

    def weights(self, weights: Mapping[str, float], ramps: Mapping[str, float]) -> dict[str, float]:
        """Return the weights with those of the balanced terms replaced.

        Args:
            weights: of the terms that are computed in this update.
            ramps: factors of shares.
        """
        shares = {name: share * ramps.get(name, 1.0) for name, share in self.shares.items() if weights.get(name)}
        if REFERENCE not in shares:
            return dict(weights)
        known = {name for name in shares if name == REFERENCE or self.norm(name) > SMALLEST_NORM}
        total = sum(shares[name] for name in known)
        whole = weights[REFERENCE] * self.norm(REFERENCE) / total
        balanced = {
            name: whole * shares[name] / self.norm(name) if name in known else 0.0
            for name in shares
            if name != REFERENCE
        }
        return {**weights, **balanced, REFERENCE: weights[REFERENCE] * shares[REFERENCE] / total}

    def add(self, norms: Mapping[str, float]) -> None:
        """Take the norms of an update's terms, before any weight, into the running means."""
        for name in self.shares.keys() & norms.keys():
            self.sums[name] = self.decay * self.sums.get(name, 0.0) + norms[name]
            self.counts[name] = self.decay * self.counts.get(name, 0.0) + 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the running means."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
