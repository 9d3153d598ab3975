"""Modules with weights and states of decoding. Public in ``moda_ext.attention``, ``.alignment`` and ``.mask``."""
