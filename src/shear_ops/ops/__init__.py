"""The operator: typed functions, the checked batch, the choice of a backend, torch.library."""
