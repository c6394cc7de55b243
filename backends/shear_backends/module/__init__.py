"""The module backend: the same classes with smaller layers."""
