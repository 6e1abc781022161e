"""The `regard` command. Each command is one file, imported when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from functools import partial
from typing import Any

from .. import __version__
from ..errors import RegardError

try:
    import click
except ImportError:  # the entry point comes with the package, its libraries with the extra
    print('regard: the command needs its extra: pip install "regard[look]"', file=sys.stderr)
    raise SystemExit(2) from None

_COMMANDS = (
    "bench",
    "docs",
    "generate",
    "heads",
    "info",
    "look",
    "record",
    "scan",
    "study",
    "train",
    "translate",
    "view",
    "walk",
)


class _Commands(click.Group):
    """Commands found by name; what regard refuses is one line on stderr, exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name}", __name__)
        return getattr(module, cmd_name)

    def main(self, *args: Any, **more: Any) -> Any:
        """What the command refuses, a signal or a full disk: one line at most, no traceback."""
        clicks: Any = super().main
        run = partial(clicks, *args, **more | {"standalone_mode": False})
        if not more.get("standalone_mode", True):
            return run()
        try:
            code = run()
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "regard"
            said = error.format_message().rstrip(".")
            _Refused(f"{' '.join(said.split())}; see {path} --help").show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(130)  # as shells say of Ctrl-C
        except OSError as error:
            # What could not be written would be tried again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if error.errno != errno.EPIPE:
                _Refused(f"cannot write: {error.strerror or error}").show()
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except RegardError as error:
            raise _Refused(" ".join(str(error).split())) from error


class _Refused(click.ClickException):
    exit_code = 2

    def show(self, file: object = None) -> None:
        shown = "".join(char if char.isprintable() else "�" for char in self.message)
        click.echo(f"regard: {shown}", err=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Which tokens does each token regard? Attention, with the weights in sight."""
