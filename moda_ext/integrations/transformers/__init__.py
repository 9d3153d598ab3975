"""MODA for vision-language models of Hugging Face Transformers 5: see :func:`apply_moda`.

Needs the extra ``moda_ext[transformers]``. Importing this module makes the attention "moda" known to Transformers and
the ``..._moda`` model types to its Auto classes. ``attn_implementation="moda"`` alone is ``sdpa`` that can be measured;
with settings in ``config.text_config.moda``, such as :meth:`MODAConfig.fixed_prior`, it applies them.
"""

from moda_ext.integrations.transformers.versions import check_minimum

check_minimum()

from moda_ext.integrations.recording import AttentionRecord, Recorder  # noqa: E402  transformers is checked first
from moda_ext.integrations.settings import MODAConfig  # noqa: E402
from moda_ext.integrations.transformers.cache import prepare_cache  # noqa: E402
from moda_ext.integrations.transformers.context_parallel import (  # noqa: E402
    ContextParallelTrainerMixin,
    context_parallel,
)
from moda_ext.integrations.transformers.models import (  # noqa: E402
    FAMILIES,
    apply_moda,
    attention_modules,
    check_identity,
    recording,
    text_stack,
)
from moda_ext.integrations.transformers.weights import (  # noqa: E402
    load_moda,
    load_moda_state_dict,
    load_release,
    moda_parameters,
    moda_state_dict,
    optimizer_groups,
    save_moda,
    train_only_moda,
)

__all__ = [
    "FAMILIES",
    "AttentionRecord",
    "ContextParallelTrainerMixin",
    "MODAConfig",
    "Recorder",
    "apply_moda",
    "attention_modules",
    "check_identity",
    "context_parallel",
    "load_moda",
    "load_moda_state_dict",
    "load_release",
    "moda_parameters",
    "moda_state_dict",
    "optimizer_groups",
    "prepare_cache",
    "recording",
    "save_moda",
    "text_stack",
    "train_only_moda",
]
