"""A context becomes a memory: questions, teacher, and the writers that distil."""
