"""Where the settings were before: models that were pickled then find them here."""

from moda_ext.integrations.settings import MODAConfig

__all__ = ["MODAConfig"]
