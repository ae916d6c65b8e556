"""What a model may be quantised by, and how long rows have to be for it."""

from typing import Literal

Kernel = Literal["gptq", "awq", "marlin", "torchao", "bnb", "q8_0", "q4_0", "q4_k_m"]

ROWS: dict[Kernel, int] = {  # values that share a scale, or a kernel's tile: rows are whole numbers of them
    "gptq": 128,
    "awq": 128,
    "marlin": 128,
    "torchao": 128,
    "bnb": 64,
    "q8_0": 32,
    "q4_0": 32,
    "q4_k_m": 256,
}
