"""The operators: their table, their references and kernels, the choice between them, their derivatives."""
