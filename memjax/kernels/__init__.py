"""Array kernels: each folder holds one operation; nothing here knows a model, a bank or a file."""
