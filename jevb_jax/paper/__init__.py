"""The paper on one page: densities, bounds and the neighbours' losses, as functions of arrays.

Read in this order: `sphere` (eq. 1 to 3), `densities` (4 to 10), `objective` (11 to 16), `baselines`
(17 to 21), `mass` (31 to 33). `special` and `domain` serve them; `distrax_faces` is the same as
distributions. The equations are those of `docs/mathematics.md`. Nothing here knows a network, an
optimizer or a config.
"""
