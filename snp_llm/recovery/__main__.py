"""`python -m snp_llm.recovery FOLDER`, the same as `snp-llm recover FOLDER`, for launchers that take a module."""

import sys

from snp_llm.cli.parse import recover_main

sys.exit(recover_main(sys.argv[1:]))
