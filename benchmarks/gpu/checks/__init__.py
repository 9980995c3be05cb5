"""The checks of the section "correct": one module for each kind of reference."""
