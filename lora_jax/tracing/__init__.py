"""A jaxpr evaluated with weights as first-class values: what `adapt` and `infer_layouts` run on.

`axes` follows the axes of a leaf; `tracked` is the protocol of a value in a leaf's place, and
`lazy` and `probe` implement it; `interpreter` walks the equations by the rules of
`single_equations`, `slicing` and `inner_jaxprs`; `applying` multiplies.
"""
