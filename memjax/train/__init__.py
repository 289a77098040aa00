"""The loop every trained thing shares: `fit`, its data, its checkpoints. It knows no method and no model."""
