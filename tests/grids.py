"""Grids that are awkward on purpose: primes, ragged tiles, one frame, text on either side."""

from vidattn.grid import Grid

AWKWARD = [
    Grid(3, 5, 7),
    Grid(5, 9, 4, text=11),
    Grid(1, 6, 10, text=3, text_first=True),
    Grid(7, 2, 3, text=130),
    Grid(11, 3, 13),
    Grid(1, 1, 1),
    Grid(2, 17, 1, text=1, text_first=True),
]
PUBLISHED = [Grid(21, 45, 80), Grid(21, 30, 52), Grid(21, 68, 120)]
