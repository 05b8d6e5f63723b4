"""How good a sparse clip is: its likeness to the dense one, and what a plan loses of attention."""
