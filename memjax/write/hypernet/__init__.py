"""Doc-to-LoRA: a hypernetwork that reads a document once and emits an adapter (arXiv 2602.15902)."""
