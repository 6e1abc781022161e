"""What Triton's kernels and their functions take, read from their sources: no triton is needed."""

import ast
import re
from pathlib import Path

import pytest

import regard
from regard.call.opcodes import Op
from regard.engines.blocks import launch as blocks
from regard.engines.second_pass.triton import effect, few_queries, kernel_tuples
from regard.ops.linear.triton import launch

FOLDERS = (
    "engines/second_pass/triton", "engines/blocks", "engines/decode", "ops/linear/triton"
)  # fmt: skip
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((Path(regard.__file__).parent / folder).glob("*.py"))
]
MOST = 25


def jitted(path: Path) -> list[ast.FunctionDef]:
    """The functions that Triton compiles, or interprets."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)
    ]


def test_no_kernel_has_more_parameters_than_can_be_read():
    found = {f"{p.stem}.{f.name}": f.args for p in SOURCES for f in jitted(p)}
    kernels = {
        "weigh",
        "sum_rows",
        "weigh_rows",
        "list_keys",
        "weigh_edges",
        "list_edges",
        "weigh_few",
        "join_few",
    }
    kernels |= {"pairs", "inverse", "walk", "read", "give", "walk_back", "products", "gradients"}
    kernels |= {"attend_chunk", "join_chunks", "attend_rows", "mend_queries", "mend_keys"}
    assert kernels <= {name.split(".")[1] for name in found}
    counts = {n: len(a.posonlyargs + a.args + a.kwonlyargs) for n, a in found.items()}
    assert not {name: n for name, n in counts.items() if n > MOST}
    assert not [name for name, a in found.items() if a.vararg or a.kwarg]


@pytest.mark.parametrize("module", [kernel_tuples, few_queries, effect, blocks, launch])
def test_what_kernels_take_is_flat(module):
    """Triton 3.6 loses what stands behind a tuple within a tuple."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    tuples = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and [ast.unparse(b) for b in node.bases] == ["NamedTuple"]
    ]
    assert tuples
    for each in tuples:
        fields = [ast.unparse(f.annotation) for f in each.body if isinstance(f, ast.AnnAssign)]
        assert set(fields) <= {"Tensor", "int", "float", "bool"}, each.name


def test_every_instruction_of_a_mask_has_its_branch_in_the_kernels():
    """As in mask.h, which test_abi.py compares with the same table."""
    (path,) = (p for p in SOURCES if p.stem == "scores_kernel")
    tree = ast.parse(path.read_text("utf-8"))
    text = ast.unparse(tree)
    constants = dict(
        re.findall(r"^_(\w+) = tl\.constexpr\(int\(Op\.(\w+)\)\)$", text, re.MULTILINE)
    )
    assert constants == {op.name: op.name for op in Op}
    (visible,) = (f for f in jitted(path) if f.name == "visible")
    branches = re.findall(r"if op == _(\w+):", ast.unparse(visible))
    assert sorted(branches) == sorted(op.name for op in Op)
    # A leaf's branch is compiled where the program has that instruction, and no other
    asked = re.findall(r"if _ONE << _(\w+) & KINDS:\n\s+if op == _(\w+):", ast.unparse(visible))
    leaves = sorted(op.name for op in Op if op not in (Op.AND, Op.OR, Op.NOT))
    assert sorted(asked) == [(name, name) for name in leaves]


def test_flags_are_made_once():
    """Triton compares each constant at each launch, unless it is the same object."""
    constexpr = pytest.importorskip("triton.language").constexpr
    form = kernel_tuples.Form(*[False] * 3, 0, True, 3, False, False, False, 16, 32, 64)
    flags = kernel_tuples.fixed(form)
    assert all(isinstance(flag, constexpr) for flag in flags)
    assert flags._fields == form._fields
    assert [flag.value for flag in flags] == list(form)
    assert kernel_tuples.fixed(form._replace(M=16)) is flags
    assert kernel_tuples.fixed(form._replace(M=32)).M.value == 32
