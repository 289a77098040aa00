"""Speed and memory, always as ratios against something, on random weights."""
