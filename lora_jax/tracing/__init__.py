"""A jaxpr evaluated with weights as first-class values: what `adapt` and `infer_layouts` run on.

`axes` follows the axes of a leaf, `tracked` says what can stand for a leaf, and `lazy` and `probe`
are the two that do; `interpreter` walks the equations, `structure`, `slicing` and `calls` hold the
rules.
"""
