"""What Python packs and the C++ reads: structs, types and instructions, as the headers say."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import regard
from regard.call.opcodes import EMPTY_CELL, FULL_CELL, TILE_SIDE, Op
from regard.engines.cpu import native
from regard.engines.cpu.call_struct import TYPES
from regard.engines.cpu.structs import EVERY, Struct

SOURCES = Path(__file__).parents[1] / "src/regard/engines/cpu/csrc"


def code(header: str) -> str:
    """A header without its comments."""
    return re.sub(r"//.*", "", (SOURCES / header).read_text())


def fields(body: str) -> str:
    """The fields of a C struct, as `Struct` is given them."""
    said = []
    for line in filter(None, (part.strip() for part in body.split(";"))):
        kind = re.match(r"(?:const )?(\w+)", line)[1]
        for name in re.sub(r"^(?:const )?\w+", "", line).split(","):
            label, size = re.fullmatch(r"[\s*]*(\w+)(?:\[(\d+)\])?", name).groups()
            if "*" in line or (kind == "int64_t" and not size):
                said.append(label)
            else:
                inner = {"double": "d", "int64_t": size}.get(kind, kind.removeprefix("Regard"))
                said.append(f"{label}:{inner}")
    return " ".join(said)


def test_every_struct_is_packed_as_the_header_has_it():
    found = dict(re.findall(r"struct Regard(\w+) \{(.*?)\n\};", code("abi.h"), re.DOTALL))
    assert list(found) == [s.name for s in EVERY]
    before, Struct.known = Struct.known, {}
    try:
        for mine in EVERY:
            theirs = Struct(mine.name, fields(found[mine.name]))
            assert (theirs.at, theirs.form) == (mine.at, mine.form), mine.name
    finally:
        Struct.known = before


def test_the_instructions_of_masks_are_those_of_the_header():
    said = re.search(r"enum Op \{(.*?)\}", code("mask.h"), re.DOTALL)[1]
    number, theirs = -1, {}
    for name, given in re.findall(r"(\w+)(?: = (\d+))?", said):
        number = int(given) if given else number + 1
        theirs[name] = number
    assert theirs == {op.name: op.value for op in Op}


def test_each_instruction_has_the_operands_of_the_header():
    body = re.search(r"int operands\(int op\) \{(.*?)\n\}", code("mask.h"), re.DOTALL)[1]
    theirs = dict.fromkeys((op.name for op in Op), 0)
    for cases, count in re.findall(r"((?:case \w+:\s*)+)return (\d+);", body):
        theirs |= dict.fromkeys(re.findall(r"case (\w+)", cases), int(count))
    assert theirs == {op.name: op.form.operands for op in Op}


def test_cells_and_types_are_those_of_the_headers():
    cells = re.search(r"CELL = (\d+), EMPTY_CELL = (-\d+), FULL_CELL = (-\d+)", code("mask.h"))
    assert tuple(map(int, cells.groups())) == (TILE_SIDE, EMPTY_CELL, FULL_CELL)
    types = dict(re.findall(r"(\w+) = (\d+)", re.search(r"enum RegardType.*?\}", code("abi.h"))[0]))
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
    assert {
        names[str(dtype)]: str(number) for dtype, number in TYPES.items()
    }.items() <= types.items()


@pytest.mark.parametrize("built", ["another size", "one struct less", "before sizes were told"])
def test_a_library_of_other_sources_is_refused(built):
    def sizes(told, room):
        told[:] = [s.size + 8 * (built == "another size" and s.name == "Call") for s in EVERY]
        return room - (built == "one struct less")

    library = SimpleNamespace() if "before" in built else SimpleNamespace(regard_sizes=sizes)
    with pytest.raises(regard.RegardError, match=r"x\.so was built from other sources.*again"):
        native._compare(library, "x.so")


@pytest.mark.skipif(not native.AVAILABLE, reason="no library: built without a compiler")
def test_the_library_here_tells_the_same_sizes():
    native._compare(native.library(), native.path())
