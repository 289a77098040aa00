"""What was learned for one base: parameters that policies and the bounded cache read, beside what the policy says."""

from __future__ import annotations

import dataclasses

import jax

from memjax.errors import InputError
from memjax.evict.indexer import score_heads
from memjax.evict.policies import Policy
from memjax.memory.latent import Rule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learned:
    """indexer: its parameters [L, ...] as `abstract_indexer` describes them, None without one; memory: a latent memory's,
    as `abstract_memory` describes them for its `rule`, which is None without one."""

    indexer: dict[str, jax.Array] | None = None
    memory: dict[str, jax.Array] | None = None
    rule: Rule | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def index_shape(self) -> tuple[int, int] | None:
        """(P, e) of a token's index keys, None without an indexer."""
        return None if self.indexer is None else (score_heads(self.indexer), int(self.indexer["k_norm"].shape[-1]))


NOTHING = Learned()


def check_learned(policy: Policy, learned: Learned) -> None:
    """InputError where the policy reads what was not given."""
    if policy.judged and learned.indexer is None:
        raise InputError(
            f"policy {policy.name} reads a trained indexer; train one (memjax train indexer) and name it: --indexer DIR"
        )
    if policy.remembers and (learned.rule is None or learned.memory is None):
        raise InputError(
            f"policy {policy.name} writes a latent memory; train one (memjax train latent) and name it: --latent DIR"
        )
