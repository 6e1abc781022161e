"""`regard info`: what is installed, and what can run here."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import forked
import regard
from regard.cli import main
from regard.cli.info import faster, written
from regard.engines import ENGINES
from regard.engines.cpu import native


def said(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["info", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="no process is bound to cores here"
)
def test_threads_that_are_bound_have_their_cores():
    """Where threads are bound, the main one is to a single core; the others are counted, too."""
    command = [sys.executable, "-m", "regard", "info", "--json"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_PROC_BIND": "true"}, capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["cores"] == len(os.sched_getaffinity(0))


def test_json_is_what_is_here():
    found = json.loads(said("--json"))
    assert found["versions"]["regard"] == regard.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["engines"]) == set(ENGINES)
    for engine in found["engines"].values():
        assert engine["available"] == (not engine["reasons"])
    for name in ("sdpa", "tiled", "reference"):
        assert found["engines"][name]["available"]
    assert found["engines"]["cpu"]["available"] == native.AVAILABLE
    sets = found["instruction_sets"]
    assert set(sets["here"]) <= set(sets["library"]) <= set(native.LEVELS)
    assert sets["used"] == (native.LEVELS[native.level()] if native.AVAILABLE else None)
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_text_says_the_same():
    text, found = said(), json.loads(said("--json"))
    assert max(map(len, text.splitlines())) <= 80
    for name, given in found["versions"].items():
        assert f"{name:<18}{given or 'not installed'}" in text
    for name in ENGINES:
        assert f"engine {name}" in text
    assert f"{found['threads']} of {found['cores']} cores" in text


def test_gpus_have_a_line_each():
    found = json.loads(said("--json"))
    assert "GPU               none" in written(found | {"gpus": []})
    gpus = [{"name": f"Card {n}", "capability": "9.0", "memory_gib": 139.8} for n in (1, 2)]
    text = written(found | {"gpus": gpus})
    assert "GPU               Card 1, 139.8 GiB, compute capability 9.0" in text
    assert "GPU               Card 2" in text


def test_what_to_do_to_be_faster():
    found = json.loads(said("--json"))
    sets = {"library": ["portable", "avx2"], "here": ["portable", "avx2"], "asked": None}
    whole = found | {"instruction_sets": sets | {"used": "avx2"}, "threads": 2, "cores": 2}
    assert faster(whole | {"gpus": []}) == []
    assert "nothing to do here" in written(whole | {"gpus": []})
    slow = sets | {"asked": "portable", "used": "portable"}
    card = {"name": "Card", "capability": "9.0", "memory_gib": 80.0}
    versions = found["versions"] | {"triton": None}
    steps = faster(
        whole | {"instruction_sets": slow, "threads": 1, "gpus": [card], "versions": versions}
    )
    assert [step.split(":")[0] for step in steps] == [
        "unset REGARD_ISA",
        "torch uses 1 of 2 cores",
        "on the GPU, weights are read by torch alone",
    ]


def test_without_the_kernels(monkeypatch):
    """As where there was no compiler: the engine's reason, and what to do."""
    monkeypatch.setattr(native, "AVAILABLE", False)
    monkeypatch.setattr(native, "library", lambda: None)
    found = json.loads(said("--json"))
    assert not found["engines"]["cpu"]["available"]
    assert found["instruction_sets"] == {
        "library": [], "here": [], "asked": os.environ.get("REGARD_ISA"), "used": None,
    }  # fmt: skip
    text = said()
    assert "engine cpu        not here: this installation was built without" in text
    assert "install a C++ compiler" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.sample(0)
@pytest.mark.parametrize("one", [True, False], ids=["one of each", "the others"])
@pytest.mark.skipif(not native.AVAILABLE, reason="built without the compiled kernels")
def test_an_instruction_set_runs_here_or_is_refused(one):
    """In processes of their own: it is chosen once."""
    here = native.levels()
    named = [here[0], "AVX2"] if one else [*here[1:], "neon", "", "portable,avx2"]
    asked = [(["info", "--json"], {"REGARD_ISA": isa}) for isa in named]
    for (_, given), (code, out, said) in zip(
        asked, forked.commands(*asked, needs="torch"), strict=True
    ):
        isa = given["REGARD_ISA"]
        if isa in here:
            sets = json.loads(out)["instruction_sets"]
            assert (sets["asked"], sets["used"]) == (isa, isa)
        else:
            refused = f"regard: REGARD_ISA is {isa!r}; give one that runs here: {', '.join(here)}\n"
            assert (code, out, said) == (2, "", refused)
