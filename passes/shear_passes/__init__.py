"""Operator rules, analyses, importance criteria, selections and rewrites: everything a pipeline is made of."""
