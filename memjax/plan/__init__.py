"""Plans: the library's own steps, compiled ahead of time for a TPU slice that is not there."""
