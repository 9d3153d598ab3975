"""`python -m moda_ext.info` prints what this installation is, with `--why` also who computes what. See _info.py."""

import sys
import types

from moda_ext._info import info, main


class _CallableModule(types.ModuleType):
    """`import moda_ext.info` binds this module where the function moda_ext.info is: it can be called as well."""

    def __call__(self) -> dict:
        return info()


if __name__ == "__main__":
    main(sys.argv[1:])
else:
    sys.modules[__name__].__class__ = _CallableModule
