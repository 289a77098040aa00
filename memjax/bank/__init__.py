"""Many memories, and the choice among them: the durable bank, retrieval, routing and the gate."""
