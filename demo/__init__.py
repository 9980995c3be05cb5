"""A small real Mllama, the two data sets it is trained on, and the script that trains it."""
