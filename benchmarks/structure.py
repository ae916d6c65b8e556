"""How the code reads, in numbers: folders, levels of imports, lengths, parameters, duplicates, tests.

    python benchmarks/structure.py [CHECKOUT ...]      several side by side; default: this one

Lines are those of the package's modules. A function's length is from `def` to its last line without the docstring;
nested ones count inside and on their own; parameters without `self`. A level is one more than the deepest module that
is imported.
"""

import ast
import statistics
import sys
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure(checkout: Path) -> dict[str, str]:
    """The figures of one checkout, ready to print."""
    root = checkout / "snp_llm"
    sources = {file: file.read_text(encoding="utf-8") for file in sorted(root.rglob("*.py"))}
    trees = {file: ast.parse(text) for file, text in sources.items()}
    lines = {file: text.count("\n") for file, text in sources.items()}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)]
    lengths, parameters = sorted(map(length, functions)), sorted(map(count_parameters, functions))
    folder = [path for path in root.iterdir() if path.name not in ("__pycache__", "py.typed")]
    tests = sum(file.read_text(encoding="utf-8").count("\n") for file in (checkout / "tests").rglob("*.py"))
    return {
        "entries in snp_llm/": f"{len(folder)}",
        "modules": f"{len(sources)}",
        "levels of imports": f"{max(levels(root, trees).values())}",
        "lines": f"{sum(lines.values()):,}",
        "lines of code": f"{sum(map(code_lines, sources.values())):,}",
        "module, median / longest": f"{statistics.median(lines.values()):.0f} / {max(lines.values())}",
        "function, median / 90 % / longest": spread(lengths),
        "functions over 60 lines": f"{sum(n > 60 for n in lengths)}",
        "parameters, 90 % / most": f"{parameters[int(0.9 * len(parameters))]} / {parameters[-1]}",
        "functions of 7 parameters or more": f"{sum(n >= 7 for n in parameters)}",
        "tests : code": f"{tests / sum(lines.values()):.2f}",
    }


def spread(values: list[int]) -> str:
    """Median, ninth decile and largest of sorted values."""
    return f"{statistics.median(values):.0f} / {values[int(0.9 * len(values))]} / {values[-1]}"


def length(function: Function) -> int:
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(function) is not None
    docstring = function.body[0].end_lineno - function.body[0].lineno + 1 if documented else 0  # type: ignore[operator]
    return function.end_lineno - function.lineno + 1 - docstring  # type: ignore[operator]


def count_parameters(function: Function) -> int:
    """Parameters of a function without `self`."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def code_lines(text: str) -> int:
    """Lines that are neither empty nor a comment nor part of a docstring."""
    tree, documented = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    kept = (number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#")
    return sum(number not in documented for number in kept)


def levels(root: Path, trees: dict[Path, ast.Module]) -> dict[str, int]:
    """By module, how many stand below it."""
    targets: dict[str, set[str]] = {}
    for file, tree in trees.items():
        found = targets[".".join(file.relative_to(root).with_suffix("").parts)] = set()
        for node in tree.body:  # what is imported when it is needed stands on no floor
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "snp_llm":
                for alias in node.names:
                    inner = [*(node.module or "").split(".")[1:], alias.name]
                    found.add(".".join(inner if root.joinpath(*inner).with_suffix(".py").exists() else inner[:-1]))
    known: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in known:
            known[name] = 0
            known[name] = 1 + max((level(target) for target in targets.get(name, ()) if target != name), default=0)
        return known[name]

    return {name: level(name) for name in targets}


def main() -> None:
    checkouts = [Path(name) for name in sys.argv[1:]] or [Path(__file__).parent.parent]
    columns = [measure(checkout) for checkout in checkouts]
    for name in columns[0]:
        print(f"{name:36s}" + "".join(f"{column[name]:>20s}" for column in columns))


if __name__ == "__main__":
    main()
