"""Config classes of the ``..._moda`` model types.

Made at import, at module level: vLLM's processes unpickle one before they load plugins.
"""

import transformers

from moda_ext.integrations.settings import FAMILIES, SUFFIX

__all__ = ["CONFIGS"]

CONFIGS: dict[str, type] = {}  # by model type
for _family, _prefix in FAMILIES.items():
    _members = {"model_type": _family + SUFFIX, "__module__": __name__, "__doc__": f"{_prefix}Config with MODA."}
    _config = type(f"{_prefix}MODAConfig", (getattr(transformers, f"{_prefix}Config"),), _members)
    CONFIGS[_family + SUFFIX] = globals()[_config.__name__] = _config
