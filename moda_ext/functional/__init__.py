"""The functions of the package, a file for each family. Public in ``moda_ext.attention`` and ``moda_ext.alignment``.

They see what they are given, check it, choose a backend (:mod:`moda_ext._ops.backend`) and call operators. Modules with
weights and states are in :mod:`moda_ext.nn`, which is made of these; nothing here imports that.
"""
