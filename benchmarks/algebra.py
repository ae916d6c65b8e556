"""Linear algebra of one FFN site at several sizes: seconds, GFLOP/s, share of the matmul ceiling, and what it is worth.

    python benchmarks/algebra.py --sizes 1024,2048,4096        # add 8192 for the FFN of a 1.3B OPT; its eigh takes long

Inputs are made up: ReLU of correlated Gaussians whose spectrum decays, with a few channels of massive activations.
Everything takes turns in one process, and the best of `--repeats` counts, in CPU seconds with one thread, since
machines are shared. A ceiling is the matrix product of that size and type, measured in the same turn. FLOPs are those
of the textbook algorithm (n^3/3 for LDL, 9 n^3 for the symmetric eigendecomposition), so that a share can exceed what
the routine really did.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snp_llm.linalg.gram import add_product, add_sparse_product
from snp_llm.linalg.ldl import build_subspace, ldl, make_definite
from snp_llm.linalg.ordering import OrderingProblem, order_units, zca_exact
from snp_llm.linalg.quadrature import zca_quadrature

DAMPENING = 0.1
KEPT = 0.7  # of the units
TOKENS = 2048  # a batch of inputs
DENSITIES = (0.03, 0.05, 0.1, 0.3)


@dataclass(frozen=True)
class Row:
    """A thing to be timed.

    Attributes:
        name: in the table.
        flops: of the textbook algorithm.
        dtype: of the ceiling it is compared with.
        run: what is timed.
        judge: says what the result is worth.
    """

    name: str
    flops: float
    dtype: torch.dtype
    run: Callable[[], Any]
    judge: Callable[[Any], str] = lambda _result: ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,2048,4096")
    parser.add_argument("--exact-up-to", type=int, default=4096, help="largest n at which eigh is run")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"    python {' '.join(sys.argv)}\n")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, best of {args.repeats}.\n")
    print("| n | | seconds | GFLOP/s | of the ceiling | |")
    print("|---:|---|---:|---:|---:|---|")
    for n in map(int, args.sizes.split(",")):
        show(n, [*factorisations(n, args.exact_up_to), *gram_products(n)], args.repeats)


def show(n: int, rows: list[Row], repeats: int) -> None:
    """Times rows in turn and prints them; those with a price of minutes run once."""
    best: dict[str, float] = {}
    ceiling: dict[torch.dtype, float] = {}
    worth: dict[str, str] = {}
    for turn in range(repeats):
        for dtype in (torch.float64, torch.float32):
            a = torch.randn(min(n, 2048), n, dtype=dtype)
            b = torch.randn(n, n, dtype=dtype)
            rate = 2 * len(a) * n * n / seconds(partial(torch.mm, a, b))[0]
            ceiling[dtype] = max(ceiling.get(dtype, 0.0), rate)
        for row in rows:
            if turn and best[row.name] > 60:
                continue
            spent, result = seconds(row.run)
            best[row.name] = min(best.get(row.name, torch.inf), spent)
            if row.name not in worth:
                worth[row.name] = row.judge(result)
    for dtype, rate in ceiling.items():
        print(f"| {n} | matrix product, {str(dtype)[6:]} | | {rate / 1e9:.0f} | | |")
    for row in rows:
        rate = row.flops / best[row.name]
        share = f"{100 * rate / ceiling[row.dtype]:.0f} %"
        print(f"| {n} | {row.name} | {best[row.name]:.3f} | {rate / 1e9:.0f} | {share} | {worth[row.name]} |")
    sys.stdout.flush()


def factorisations(n: int, exact_up_to: int) -> list[Row]:
    """Everything that is done to one Gram matrix."""
    x = make_inputs(4 * n if n < 8192 else 2 * n, n)
    gram = (x.T @ x).double()
    del x
    d = n // 4
    W = torch.randn(d, n, dtype=torch.float64)
    definite, single = make_definite(gram.clone(), DAMPENING), make_definite(gram.float(), DAMPENING)
    factor = torch.linalg.cholesky(definite.gram)
    in_weight, keep = torch.ones(n, dtype=torch.float64), int(KEPT * n)
    whole = OrderingProblem(definite, W, in_weight, 1, 0)
    sparing = OrderingProblem(definite, W, in_weight, 1, 0, keep)
    narrow = OrderingProblem(single, W.float(), in_weight, 1, 0, keep)
    reference: dict[str, Tensor] = {}

    def against(name: str) -> Callable[[Tensor], str]:
        def judge(order: Tensor) -> str:
            kept = order[:keep].sort().values
            if name not in reference:
                reference[name] = kept
                return ""
            agree = len(set(kept.tolist()) & set(reference[name].tolist())) / keep
            ratio = cut_error(gram, W, kept) / cut_error(gram, W, reference[name])
            return f"{100 * agree:.1f} % of the kept, error x {ratio:.4f}"

        return judge

    def ranked(score: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: score().argsort(descending=True)

    f64, f32 = torch.float64, torch.float32
    third, order = n**3 / 3, torch.arange(n)
    rows = [
        Row("LDL, float64", third, f64, lambda: ldl(definite.gram.clone())),
        Row(
            "LDL, float32", third, f32, lambda: ldl(single.gram.clone()), lambda f: f"error {factor_error(f, gram):.0e}"
        ),
        Row("reordered LDL, float64", third, f64, lambda: build_subspace(definite, order)),
        Row("triangular solve, n/4 rows", n * n * d, f64, lambda: solve(factor, W)),
    ]
    if n <= exact_up_to:
        rows.append(Row("zca, exact", 9 * n**3, f64, ranked(lambda: zca_exact(whole)), against("zca")))
    # Quadrature starts from the Cholesky factor that dampening has left; the rest from the Gram matrix.
    quick = (1 / 3 + 2 / 32) * n**3
    rows += [
        Row("zca, quadrature", quick, f64, ranked(lambda: zca_quadrature(definite, 1)), against("zca")),
        Row("zca, quadrature, float32", quick, f32, ranked(lambda: zca_quadrature(single, 1)), against("zca")),
        Row("zca, quadrature, heads of 64", quick, f64, ranked(lambda: zca_quadrature(definite, 64))),
        Row("obs", 3 * third, f64, lambda: order_units("obs", fresh(whole))),
        Row("greedy, all units", 6 * third, f64, lambda: order_units("greedy", fresh(whole)), against("greedy")),
        Row("greedy, 70 % kept", 3.6 * third, f64, lambda: order_units("greedy", fresh(sparing)), against("greedy")),
        Row(
            "greedy, 70 % kept, float32",
            3.6 * third,
            f32,
            lambda: order_units("greedy", fresh(narrow)),
            against("greedy"),
        ),
    ]
    return rows


def gram_products(n: int) -> list[Row]:
    """A batch of inputs added to the sums, in the ways there are; FLOPs are those of one triangle."""
    flops, f32 = float(TOKENS * n * n), torch.float32

    def row(name: str, x: Tensor, add: Callable[[Tensor, Tensor], Any]) -> Row:
        def run() -> Tensor:
            second = torch.zeros(n, n)
            add(second, x)
            return second

        def judge(second: Tensor) -> str:
            exact = (x[:, :256].double().T @ x[:, :256].double()).tril()
            return f"error {float((second[:256, :256].double().tril() - exact).norm() / exact.norm()):.0e}"

        return Row(name, flops, f32, run, judge)

    dense = torch.randn(TOKENS, n).bfloat16()
    rows = [
        row("Gram, column blocks, bfloat16 widened", dense, lambda s, x: add_product(s, x.float())),
        row("Gram, whole, bfloat16 widened", dense, lambda s, x: s.addmm_(x.float().T, x.float())),
        row("Gram, whole, bfloat16 product", dense, lambda s, x: s.add_(x.T @ x)),
    ]
    for density in DENSITIES:
        z = torch.randn(TOKENS, n)
        x = (z - z.flatten()[:100_000].quantile(1 - density)).relu()
        rows.append(row(f"Gram, column blocks, {100 * density:g} % not zero", x, add_product))
        rows.append(row(f"Gram, sparse, {100 * density:g} % not zero", x, add_sparse_product))
    return rows


def make_inputs(tokens: int, n: int) -> Tensor:
    """ReLU of correlated Gaussians, channels of very different scale, four of them massive, (tokens, n), float32."""
    rank = n // 4
    mixing = torch.randn(rank, n) * torch.arange(1, rank + 1)[:, None] ** -0.5
    mixing /= mixing.norm(dim=0)
    x = torch.randn(tokens, rank) @ mixing + 0.3 * torch.randn(tokens, n) - 0.8 + 0.5 * torch.randn(n)
    x = x.relu_() * torch.exp(0.7 * torch.randn(n))
    x[:, :4] *= 30
    return x


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """With one thread, CPU seconds: waiting for other jobs does not count then."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = run()
    return clock() - start, result


def solve(factor: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, right, upper=False, left=False)


def fresh(problem: OrderingProblem) -> OrderingProblem:
    """Without a factor left over from the run before."""
    problem.definite.spare.clear()
    return problem


def factor_error(factors: tuple[Tensor, Tensor], gram: Tensor) -> float:
    """Of 64 rows of `L D L^T`, relative to the dampened matrix."""
    L, D = factors[0].double(), factors[1].double()
    rows = (L[:64] * D) @ L.T
    exact = gram[:64].clone()
    exact.diagonal().mul_(1 + DAMPENING)
    return float((rows - exact).norm() / exact.norm())


def cut_error(gram: Tensor, W: Tensor, kept: Tensor) -> float:
    """Squared output error of the least-squares repair on some channels, by Cholesky."""
    gone = torch.ones(len(gram), dtype=torch.bool)
    gone[kept] = False
    inside = gram[kept[:, None], kept]
    inside.diagonal().mul_(1 + 1e-6)
    taken = W[:, gone] @ gram[gone][:, kept]
    added = torch.cholesky_solve(taken.T, torch.linalg.cholesky(inside)).T
    return float(((W[:, gone] @ gram[gone][:, gone]) * W[:, gone]).sum() - (added * taken).sum())


if __name__ == "__main__":
    main()
