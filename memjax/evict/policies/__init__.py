"""Policies: which tokens of a text deserve a place in a bounded cache. One file each, one list of all."""

from __future__ import annotations

import difflib

from memjax.errors import InputError
from memjax.evict.policies.adakv import AdaKV
from memjax.evict.policies.base import KeyPolicy, Policy, View
from memjax.evict.policies.expected_attention import ExpectedAttention
from memjax.evict.policies.h2o import H2O
from memjax.evict.policies.indexer import Indexer
from memjax.evict.policies.indexmem import IndexMem, SnapKVLatent
from memjax.evict.policies.keydiff import KeyDiff
from memjax.evict.policies.knorm import Knorm
from memjax.evict.policies.lagkv import LagKV
from memjax.evict.policies.pyramidkv import PyramidKV
from memjax.evict.policies.random import Random
from memjax.evict.policies.snapkv import SnapKV
from memjax.evict.policies.streaming import Streaming
from memjax.evict.policies.tova import Tova

__all__ = ["DEFAULT_POLICY", "LEARNED_POLICIES", "POLICIES", "KeyPolicy", "Policy", "View", "policy_named"]

POLICIES: tuple[Policy, ...] = (
    Random(),
    Knorm(),
    Streaming(),
    H2O(),
    SnapKV(),
    Tova(),
    PyramidKV(),
    AdaKV(),
    KeyDiff(),
    LagKV(),
    ExpectedAttention(),
)
LEARNED_POLICIES: tuple[Policy, ...] = (Indexer(), IndexMem(), SnapKVLatent())  # these read what was learned for a base
DEFAULT_POLICY = "snapkv"


def policy_named(name: str) -> Policy:
    """The policy of this name with its default settings. Raises InputError, naming the nearest one."""
    named = {policy.name: policy for policy in (*POLICIES, *LEARNED_POLICIES)}
    if name not in named:
        near = difflib.get_close_matches(name, named, n=1, cutoff=0.0)[0]
        raise InputError(f"{name!r} is no policy; the nearest is {near}, all are {', '.join(named)}")
    return named[name]
