"""The roads out of a Program: modules, graphs, folders, pictures, and the oracle that checks them."""
