"""A cache stays small: policies that score its tokens, one-shot and block-wise eviction under a fixed capacity."""
