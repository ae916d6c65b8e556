"""`python -m snp_llm.evaluate MODEL`, the same as `snp-llm eval MODEL`."""

import sys

from snp_llm.cli.parse import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main(sys.argv[1:]))
