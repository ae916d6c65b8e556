"""`python -m snp_llm.prune MODEL`, the same as `snp-llm prune MODEL`; imported, it is the function `snp_llm.prune`."""

import sys

if __name__ == "__main__":
    from snp_llm.cli.parse import prune_main

    sys.exit(prune_main(sys.argv[1:]))

from snp_llm.api import prune

sys.modules[__name__] = prune  # type: ignore[assignment]
