"""The parts of a merge: they know pools and tensors, not folders and not configuration."""
