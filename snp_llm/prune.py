"""`python -m snp_llm.prune MODEL`, the same as `snp-llm prune MODEL`."""

import sys

from snp_llm.cli import prune_main

if __name__ == "__main__":
    sys.exit(prune_main(sys.argv[1:]))
