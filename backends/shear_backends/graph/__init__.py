"""The graph backend: a sheared program as an ``fx.GraphModule``."""
