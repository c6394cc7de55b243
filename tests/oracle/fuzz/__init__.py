"""Random small programs, written as text that runs on its own, and what must be true of each of them."""
