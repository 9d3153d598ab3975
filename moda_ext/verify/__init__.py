"""Proof on the machine at hand: every native operator against the float64 reference, and how fast attention is.

``moda-ext verify``, or ``python -m moda_ext.verify`` (--help has the options), tries the operators of a GPU, or those
of every instruction set of a CPU, forward and backward, by the project's tolerance rule (:mod:`moda_ext.verify.rule`),
and keeps a stamp of what it finds. On a GPU, operators are in use by default where a stamp says that they are right; on
a CPU all are but those of which one says that they are wrong.
"""
