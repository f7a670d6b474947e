"""Every operator in plain PyTorch, written to be read beside its equation; the kernels are held against these."""
