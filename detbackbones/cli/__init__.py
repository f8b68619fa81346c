"""The program `detbackbones`: a file for each command, and `main.py`, which calls them."""
