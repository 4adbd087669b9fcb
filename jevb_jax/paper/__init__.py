"""The paper on one page: densities, bounds and the neighbors' losses, as functions of arrays.

Read in this order: `sphere` (eq. 1 to 3), `densities` (4 to 10, 16 and 33), `likelihood` (11 and 12),
`objective` (13 to 15 and 34), `baselines` (17 to 21), `mass` (31 and 32). `special` and `domain`
serve them; `distrax_faces` has the densities as distributions. The equations are those of
`docs/mathematics.md`. Nothing here knows a network, an optimizer or a config.

Shapes are in the signatures: `D` is the embedding dimension, `*batch` any batch shape, and `#` marks
axes that broadcast.
"""
