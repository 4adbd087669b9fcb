"""The mathematics: densities, bounds and the losses of other methods, as functions of arrays.

Read in this order: `sphere` (eq. 1 to 3), `densities` (4 to 10, 16 and 33), `likelihood` (11 and
12), `objective` (13 to 15 and 34), `baselines` (17 to 21), `mass` (31 and 32). `special` and
`domain` are helpers; `distrax_faces` offers the densities as distributions. The equations are those
of `docs/mathematics.md`. Nothing here imports a network, an optimizer or a config.

Shapes are in the signatures: `D` is the embedding dimension, `*batch` any batch shape, and `#`
marks axes that broadcast.
"""
