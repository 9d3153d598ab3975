"""`python -m moda_ext.info` prints what this installation is; the function moda_ext.info() is in _info.py."""

import sys

from moda_ext._info import info, main

if __name__ == "__main__":
    main()
else:
    # An import of this module binds `moda_ext.info` to what sys.modules holds for it: keep that the function.
    sys.modules[__name__] = info
