"""The modules with weights, and the states of decoding. Public in ``moda_ext.attention``, ``.alignment`` and ``.mask``."""
