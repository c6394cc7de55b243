"""The road in: a model, loaded by name or given, becomes a Program through torch.export."""
