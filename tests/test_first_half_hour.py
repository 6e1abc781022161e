"""What a newcomer tries that is no error, and yet not what was meant."""

from __future__ import annotations

import pytest

for package in ("click", "transformers", "regard_minilm"):
    pytest.importorskip(package, reason='needs pip install "regard[look]"')

from click.testing import CliRunner  # noqa: E402

from regard.cli import main  # noqa: E402


@pytest.mark.parametrize("command", [["look"], ["walk", "--from", "cat"]])
def test_the_name_of_a_file_is_read_as_a_text_and_said_to_be(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").write_text("A dog sat.")
    done = CliRunner().invoke(main, [command[0], "cat", *command[1:]])
    assert done.exit_code == 0, done.output
    assert done.stderr == "'cat' is read as a text; @cat reads the file of that name\n"
    assert "dog" not in done.stdout
    assert CliRunner().invoke(main, ["look", "a cat"]).stderr == ""
